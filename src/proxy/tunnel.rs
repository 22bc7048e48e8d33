//! The way to any other host, and of a connection that has switched its
//! protocol: bytes are copied both ways, nothing is parsed.

use std::cell::Cell;
use std::io;
use std::pin::{Pin, pin};
use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};
use tokio_util::io::InspectReader;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::head::Resettable;
use super::intercept::Rewound;
use super::replay::ReplayBody;
use super::service::Service;
use crate::metrics::Limit;
use crate::net::{Place, relay};

/// Longest rest of a tunnel in use.
const IDLE_LIMIT: Duration = Duration::from_mins(10);

/// Longest rest of a tunnel once the drain has begun.
const DRAIN_IDLE_LIMIT: Duration = Duration::from_secs(1);

/// Bytes of a switched connection that are copied at once, per direction.
const BUFFER: usize = 16 * 1024;

/// An upstream's connection that speaks WebSocket from now on.
pub(super) struct Switched {
    pub(super) upstream: OnUpgrade,
    /// Among the origin's connections; free when the tunnel has ended.
    pub(super) place: Option<Place<ReplayBody>>,
}

impl Service {
    /// Copies between the two sides of a connection that has switched to
    /// another protocol.
    pub(super) async fn tunnel_switched(&self, client: OnUpgrade, switched: Switched) {
        let Switched { upstream, place } = switched;
        match tokio::try_join!(client, upstream) {
            Ok((client, upstream)) => {
                let last = Cell::new(Instant::now());
                // What moves was read from one of the two.
                let note = |_: &[u8]| last.set(Instant::now());
                let mut client = InspectReader::new(TokioIo::new(client), note);
                let mut upstream = InspectReader::new(TokioIo::new(upstream), note);
                let copy =
                    copy_bidirectional_with_sizes(&mut client, &mut upstream, BUFFER, BUFFER);
                self.tunnel(pin!(copy), &last).await;
            }
            Err(error) => debug!(%error, "protocol was not switched"),
        }
        drop(place);
    }

    /// Leads to and from another host. What does not end in order is reset toward
    /// both sides: neither must take it for the other's end.
    pub(super) async fn tunnel_to(&self, client: Rewound, mut upstream: TcpStream) {
        let (early, mut client) = client.into_parts();
        let last = Cell::new(Instant::now());
        let moved = || last.set(Instant::now());
        let relayed = relay(&mut client, &early, &mut upstream, &moved);
        let ended = self.tunnel(pin!(relayed), &last).await;
        if !ended {
            client.reset();
            upstream.reset();
        }
    }

    /// Runs `tunnel`, which moved its `last` bytes then, until both sides have
    /// ended, which is `true`, or nothing moves any more.
    async fn tunnel(
        &self,
        mut tunnel: Pin<&mut impl Future<Output = io::Result<(u64, u64)>>>,
        last: &Cell<Instant>,
    ) -> bool {
        tokio::select! {
            ended = tunnel.as_mut() => match ended {
                Ok((up, down)) => {
                    debug!(up, down, "tunnel ended");
                    return true;
                }
                Err(error) => debug!(%error, "tunnel broke"),
            },
            () = rest(last, self.drain()) => {
                if !self.drain().is_cancelled() {
                    self.proxy.metrics.limited(Limit::TunnelIdle);
                }
                debug!("idle tunnel closed");
            }
        }
        false
    }
}

/// Ends when nothing has moved for as long as a tunnel may rest.
async fn rest(last: &Cell<Instant>, drain: &CancellationToken) {
    let idle_for = |limit| async move {
        while last.get().elapsed() < limit {
            sleep_until(last.get() + limit).await;
        }
    };
    tokio::select! {
        () = idle_for(IDLE_LIMIT) => return,
        () = drain.cancelled() => {}
    }
    idle_for(DRAIN_IDLE_LIMIT).await;
}
