//! The way to any other host: bytes are copied both ways, nothing is parsed.

use std::cell::Cell;
use std::time::Duration;

use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};
use tokio_util::io::InspectReader;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::intercept::Rewound;
use super::service::Service;

/// Longest rest of a tunnel in use.
const IDLE_LIMIT: Duration = Duration::from_mins(10);

/// Longest rest of a tunnel once the drain has begun.
const DRAIN_IDLE_LIMIT: Duration = Duration::from_secs(1);

/// Bytes copied at once, per direction.
const BUFFER: usize = 64 * 1024;

impl Service {
    /// Copies until both sides have ended, or nothing moves any more.
    pub(super) async fn tunnel(&self, client: Rewound, upstream: TcpStream) {
        let last = Cell::new(Instant::now());
        // What moves was read from one of the two.
        let note = |_: &[u8]| last.set(Instant::now());
        let (mut client, mut upstream) =
            (InspectReader::new(client, note), InspectReader::new(upstream, note));
        tokio::select! {
            copied = copy_bidirectional_with_sizes(&mut client, &mut upstream, BUFFER, BUFFER) => {
                match copied {
                    Ok((up, down)) => debug!(up, down, "tunnel ended"),
                    Err(error) => debug!(%error, "tunnel broke"),
                }
            }
            () = rest(&last, self.drain()) => debug!("idle tunnel closed"),
        }
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
