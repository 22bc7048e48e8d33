//! The admin port: health, metrics, status, refresh by hand, and a page.
//!
//! # Invariants
//!
//! - It runs on the control runtime, so it answers while the workers are busy.
//! - A page of another site can neither read from it nor act through it.
//! - No answer holds a secret: a token shows as its fingerprint.
//! - Each client is bounded in time and size, and all of them in number.

mod access;
mod answer;
mod error;
mod page;
mod routes;
mod status;

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::config::Secret;
use crate::hints::Hints;
use crate::metrics::Metrics;
use crate::refresh::Refresher;
use crate::token::{Clock, TokenCache};
use page::Page;

/// Connections served at a time; the next ones wait in the listener's queue.
const MAX_CONNECTIONS: usize = 64;
/// Time to send a request's head, the wait for it included.
const HEAD_TIME: Duration = Duration::from_secs(10);
const HEAD_SIZE: usize = 16 * 1024;
/// So that no client keeps its place for ever.
const CONNECTION_LIFE: Duration = Duration::from_mins(10);
/// How long a connection that must end may take to finish its answer.
const GRACE: Duration = Duration::from_secs(3);
/// When out of file descriptors: let some close.
const ACCEPT_BACKOFF: Duration = Duration::from_secs(1);

/// What the admin port shows and acts on.
pub struct AdminState {
    /// The token in use.
    pub cache: Arc<TokenCache>,
    /// Renews the token.
    pub refresher: Arc<Refresher>,
    /// What has happened so far.
    pub metrics: Arc<Metrics>,
    /// What people get wrong.
    pub hints: Arc<Hints>,
    /// Says whether the token has expired.
    pub clock: Arc<Clock>,
    /// The program's version.
    pub version: &'static str,
    /// When the program started.
    pub started: Instant,
    /// Cancelled when the proxy stops taking requests; `/ready` says so.
    pub draining: CancellationToken,
    /// What a POST must present. `ADMIN_TOKEN`; none: POSTs only from loopback.
    pub admin_token: Option<Secret>,
}

impl fmt::Debug for AdminState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminState").field("version", &self.version).finish_non_exhaustive()
    }
}

/// Answers on `listener` until `shutdown`, then ends the open connections.
///
/// Needs a Tokio runtime with timers. After `shutdown` it returns within a few
/// seconds: idle connections close at once, answers under way may finish.
pub async fn serve(listener: TcpListener, state: Arc<AdminState>, shutdown: CancellationToken) {
    let admin = Arc::new(Admin { state, page: Page::new(), shutdown });
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let connections = TaskTracker::new();
    let accept = async {
        // The semaphore is never closed.
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            let (stream, peer) = next_client(&listener).await;
            let admin = Arc::clone(&admin);
            connections.spawn(async move {
                admin.connection(stream, peer).await;
                drop(place);
            });
        }
    };
    admin.shutdown.run_until_cancelled(accept).await;
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// What all connections share.
struct Admin {
    state: Arc<AdminState>,
    page: Page,
    shutdown: CancellationToken,
}

impl Admin {
    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        let service = service_fn(|request: hyper::Request<Incoming>| {
            let admin = Arc::clone(&self);
            async move { Ok::<_, Infallible>(routes::respond(&admin, peer, request).await) }
        });
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(HEAD_SIZE);
        let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
        let ended = tokio::select! {
            ended = &mut connection => Some(ended),
            () = self.shutdown.cancelled() => None,
            () = sleep(CONNECTION_LIFE) => None,
        };
        let ended = if let Some(ended) = ended {
            Ok(ended)
        } else {
            connection.as_mut().graceful_shutdown();
            timeout(GRACE, connection).await
        };
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(client.addr = %peer, %error, "admin connection failed"),
            Err(_) => debug!(client.addr = %peer, "admin connection cut"),
        }
    }
}

async fn next_client(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                warn!(%error, "accept on the admin port failed");
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
