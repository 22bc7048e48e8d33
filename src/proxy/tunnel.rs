//! The way to any other host, and of a connection that has switched its
//! protocol: bytes are copied both ways, nothing is parsed.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::future::{AbortHandle, Abortable, Aborted};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::io::InspectReader;
use tracing::debug;

use super::head::Resettable;
use super::intercept::Rewound;
use super::replay::ReplayBody;
use super::service::Service;
use crate::metrics::Limit;
use crate::net::{Place, relay};

/// Longest rest of a tunnel in use.
const IDLE_LIMIT: Duration = Duration::from_mins(10);

/// Bytes of a switched connection that are copied at once, per direction.
const BUFFER: usize = 16 * 1024;

/// An upstream's connection that speaks WebSocket from now on.
pub(super) struct Switched {
    pub(super) upstream: OnUpgrade,
    /// Among the origin's connections; free when the tunnel has ended.
    pub(super) place: Option<Place<ReplayBody>>,
}

/// The tunnels of one worker. Like other connections they have no timers of their
/// own: one look a second finds those that have rested for too long.
#[derive(Default)]
pub(super) struct Tunnels(RefCell<Vec<Weak<Tunnel>>>);

/// What is known of one.
struct Tunnel {
    /// It is new, or bytes have come since the last look.
    moved: Cell<bool>,
    rests_since: Cell<Instant>,
    end: AbortHandle,
}

impl Tunnels {
    fn open(&self, end: AbortHandle) -> Rc<Tunnel> {
        let (moved, rests_since) = (Cell::new(true), Cell::new(Instant::now()));
        let tunnel = Rc::new(Tunnel { moved, rests_since, end });
        self.0.borrow_mut().push(Rc::downgrade(&tunnel));
        tunnel
    }

    /// Ends the tunnels that have rested for as long as they may, which is from one look
    /// to the next once the drain has begun, and forgets those that have ended.
    pub(super) fn look(&self, drains: bool) {
        let now = Instant::now();
        self.0.borrow_mut().retain(|tunnel| {
            let Some(tunnel) = tunnel.upgrade() else {
                return false;
            };
            if tunnel.moved.take() {
                tunnel.rests_since.set(now);
            } else if drains || now - tunnel.rests_since.get() >= IDLE_LIMIT {
                tunnel.end.abort();
            }
            true
        });
    }
}

impl Service {
    /// Copies between the two sides of a connection that has switched to
    /// another protocol.
    pub(super) async fn tunnel_switched(&self, client: OnUpgrade, switched: Switched) {
        let Switched { upstream, place } = switched;
        match tokio::try_join!(client, upstream) {
            Ok((client, upstream)) => {
                self.tunnel(async |tunnel| {
                    // What moves was read from one of the two.
                    let note = |_: &[u8]| tunnel.moved.set(true);
                    let mut client = InspectReader::new(TokioIo::new(client), note);
                    let mut upstream = InspectReader::new(TokioIo::new(upstream), note);
                    copy_bidirectional_with_sizes(&mut client, &mut upstream, BUFFER, BUFFER).await
                })
                .await;
            }
            Err(error) => debug!(%error, "protocol was not switched"),
        }
        drop(place);
    }

    /// Leads to and from another host. What does not end in order is reset toward
    /// both sides: neither must take it for the other's end.
    pub(super) async fn tunnel_to(&self, client: Rewound, mut upstream: TcpStream) {
        let (early, mut client) = client.into_parts();
        let ended = self
            .tunnel(async |tunnel| {
                relay(&mut client, &early, &mut upstream, &|| tunnel.moved.set(true)).await
            })
            .await;
        if !ended {
            client.reset();
            upstream.reset();
        }
    }

    /// Runs what `copies` between two sides, until both have ended, which is `true`,
    /// or nothing moves any more.
    async fn tunnel(&self, copies: impl AsyncFnOnce(&Tunnel) -> io::Result<(u64, u64)>) -> bool {
        let (end, ended) = AbortHandle::new_pair();
        let tunnel = self.tunnels.open(end);
        match Abortable::new(copies(&tunnel), ended).await {
            Ok(Ok((up, down))) => {
                debug!(up, down, "tunnel ended");
                return true;
            }
            Ok(Err(error)) => debug!(%error, "tunnel broke"),
            Err(Aborted) => {
                if !self.drain().is_cancelled() {
                    self.proxy.metrics.limited(Limit::TunnelIdle);
                }
                debug!("idle tunnel closed");
            }
        }
        false
    }
}
