//! The way to any other host, and of a connection that has switched its
//! protocol: bytes are copied both ways, nothing is parsed.

use std::cell::Cell;
use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
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
use crate::net::Place;

/// Longest rest of a tunnel in use.
const IDLE_LIMIT: Duration = Duration::from_mins(10);

/// Longest rest of a tunnel once the drain has begun.
const DRAIN_IDLE_LIMIT: Duration = Duration::from_secs(1);

/// Bytes copied at once, per direction.
const BUFFER: usize = 64 * 1024;

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
                let (mut client, mut upstream) = (TokioIo::new(client), TokioIo::new(upstream));
                self.tunnel(&mut client, &mut upstream).await;
            }
            Err(error) => debug!(%error, "protocol was not switched"),
        }
        drop(place);
    }

    /// Copies to and from another host. What does not end in order is reset
    /// toward both sides: neither must take it for the other's end.
    pub(super) async fn tunnel_to(&self, mut client: Rewound, mut upstream: TcpStream) {
        if !self.tunnel(&mut client, &mut upstream).await {
            client.reset();
            upstream.reset();
        }
    }

    /// Copies until both sides have ended, which is `true`, or nothing moves any
    /// more.
    async fn tunnel<C, U>(&self, client: &mut C, upstream: &mut U) -> bool
    where
        C: AsyncRead + AsyncWrite + Unpin,
        U: AsyncRead + AsyncWrite + Unpin,
    {
        let last = Cell::new(Instant::now());
        // What moves was read from one of the two.
        let note = |_: &[u8]| last.set(Instant::now());
        let (mut client, mut upstream) =
            (InspectReader::new(client, note), InspectReader::new(upstream, note));
        tokio::select! {
            copied = copy_bidirectional_with_sizes(&mut client, &mut upstream, BUFFER, BUFFER) => {
                match copied {
                    Ok((up, down)) => {
                        debug!(up, down, "tunnel ended");
                        return true;
                    }
                    Err(error) => debug!(%error, "tunnel broke"),
                }
            }
            () = rest(&last, self.drain()) => {
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
