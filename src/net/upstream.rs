//! The connections of one worker to one origin.
//!
//! # Invariants
//!
//! - At most `capacity` connections are in use; further requests wait in order.
//!   One whose request is not out when its answer ends is closed.
//! - A request is sent again only when a pooled connection never took it.
//! - A connection goes back to the pool only after its answer was read whole.
//!
//! The most recently used connection serves first, so the rest fall idle and
//! are closed before an upstream would close them.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use super::guarded::Guarded;
use super::{DialError, Dialer, Reach};
use crate::metrics::Shard;

/// Longest rest of a pooled connection, below the usual limits of servers.
const IDLE_LIMIT: Duration = Duration::from_secs(30);

/// Time for a connection that has just answered to become ready again.
const READY_LIMIT: Duration = Duration::from_millis(100);

/// Fields in the head of an answer.
const MAX_FIELDS: usize = 256;

/// Why a request got no answer from the upstream.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SendError {
    /// No connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The connection broke before the answer's head, or that is no HTTP.
    #[error("the upstream's connection failed: {0}")]
    Http(#[from] hyper::Error),
}

/// An origin as a pool knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UpstreamKey {
    /// Normalized host.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Whether TLS is spoken there.
    pub tls: bool,
    /// Whose word the destination is.
    pub reach: Reach,
}

/// One origin's connections on one worker; `B` is the request body's type.
pub struct Upstream<B> {
    key: UpstreamKey,
    dialer: Arc<Dialer>,
    capacity: usize,
    most_idle: usize,
    permits: Arc<Semaphore>,
    idle: RefCell<Vec<Idle<B>>>,
    shard: Arc<Shard>,
}

/// An open connection; ended when dropped, whatever it is still busy with.
struct Connection<B> {
    sender: SendRequest<InFlight<B>>,
    task: AbortOnDropHandle<()>,
}

impl<B> Connection<B> {
    /// Ends a connection that nobody uses: in order, unless it is still busy.
    fn close(self) {
        if self.sender.is_ready() {
            drop(self.task.detach());
        }
    }
}

/// A request's body, of which one can tell whether it is still being sent.
type InFlight<B> = Guarded<B, Option<Rc<()>>>;

struct Idle<B> {
    connection: Connection<B>,
    since: Instant,
}

impl<B> Upstream<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// An origin without connections yet, of which `capacity` may be open, and
    /// `most_idle` of them at rest.
    #[must_use]
    pub fn new(
        key: UpstreamKey,
        capacity: usize,
        most_idle: usize,
        dialer: Arc<Dialer>,
        shard: Arc<Shard>,
    ) -> Self {
        Self {
            key,
            dialer,
            capacity,
            most_idle,
            permits: Arc::new(Semaphore::new(capacity)),
            idle: RefCell::new(Vec::new()),
            shard,
        }
    }

    /// The origin's name.
    #[must_use]
    pub fn key(&self) -> &UpstreamKey {
        &self.key
    }

    /// Whether most of the origin's connections are in use.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.permits.available_permits() * 2 < self.capacity
    }

    /// A place among the origin's connections; waits for one in order, as long
    /// as it takes.
    pub async fn place(self: &Rc<Self>) -> Place<B> {
        // The semaphore is never closed, so there always is a permit.
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok();
        self.shard.upstream_active(1);
        Place { upstream: Rc::clone(self), connection: None, sent: Weak::new(), _permit: permit }
    }

    /// Closes connections that have been idle for too long.
    pub fn close_idle(&self) {
        let mut idle = self.idle.borrow_mut();
        let before = idle.len();
        idle.extract_if(.., |idle| !idle.is_usable()).for_each(|idle| idle.connection.close());
        self.shard.upstream_idle(count(idle.len()) - count(before));
    }

    /// When one of its connections came to rest last; `None` where none rests.
    #[must_use]
    pub fn rests_since(&self) -> Option<Instant> {
        self.idle.borrow().last().map(|idle| idle.since)
    }

    /// Whether nobody uses it or waits.
    #[must_use]
    pub fn is_at_rest(self: &Rc<Self>) -> bool {
        Rc::strong_count(self) == 1
    }

    /// Whether nothing is open and nobody waits.
    #[must_use]
    pub fn is_unused(self: &Rc<Self>) -> bool {
        self.is_at_rest() && self.idle.borrow().is_empty()
    }

    async fn take_idle(&self) -> Option<Connection<B>> {
        loop {
            let mut idle = self.idle.borrow_mut().pop()?;
            self.shard.upstream_idle(-1);
            if !idle.is_usable() {
                idle.connection.close();
                continue;
            }
            // Just after an answer the connection's task may not have run yet.
            let sender = &mut idle.connection.sender;
            let ready = sender.is_ready()
                || matches!(timeout(READY_LIMIT, sender.ready()).await, Ok(Ok(())));
            if ready {
                return Some(idle.connection);
            }
        }
    }

    async fn open(&self) -> Result<Connection<B>, SendError> {
        let UpstreamKey { host, port, tls, reach } = &self.key;
        let stream = self.dialer.stream(host, *port, *reach, *tls).await?;
        let (sender, connection) = http1::Builder::new()
            .preserve_header_case(true)
            .max_headers(MAX_FIELDS)
            .handshake(TokioIo::new(stream))
            .await?;
        let task = tokio::task::spawn_local(async move {
            if let Err(error) = connection.with_upgrades().await {
                debug!(%error, "upstream connection ended");
            }
        });
        Ok(Connection { sender, task: AbortOnDropHandle::new(task) })
    }

    fn put_back(&self, connection: Connection<B>) {
        let mut idle = self.idle.borrow_mut();
        if connection.sender.is_closed() {
            return;
        }
        if idle.len() >= self.most_idle {
            return connection.close();
        }
        idle.push(Idle { connection, since: Instant::now() });
        self.shard.upstream_idle(1);
    }
}

impl<B> Drop for Upstream<B> {
    fn drop(&mut self) {
        self.shard.upstream_idle(-count(self.idle.borrow().len()));
    }
}

impl<B> Idle<B> {
    fn is_usable(&self) -> bool {
        !self.connection.sender.is_closed() && self.since.elapsed() < IDLE_LIMIT
    }
}

/// One of the origin's places, and the connection that fills it. Dropping it
/// closes that connection.
pub struct Place<B> {
    upstream: Rc<Upstream<B>>,
    connection: Option<Connection<B>>,
    /// There while the request's body is being sent.
    sent: Weak<()>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl<B> Place<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Sends `request` (origin-form, with its `Host`) and returns the answer,
    /// whose body gives the connection back when it has ended. Dropping the
    /// future closes the connection that the request was on.
    ///
    /// # Errors
    ///
    /// [`SendError`].
    pub async fn send(mut self, request: Request<B>) -> Result<Response<PooledBody<B>>, SendError> {
        let mut request = request.map(|body| {
            let sign = (!body.is_end_stream()).then(|| Rc::new(()));
            self.sent = sign.as_ref().map(Rc::downgrade).unwrap_or_default();
            Guarded::new(body, sign)
        });
        loop {
            let (mut connection, reused) = match self.upstream.take_idle().await {
                Some(connection) => (connection, true),
                None => (self.upstream.open().await?, false),
            };
            match connection.sender.try_send_request(request).await {
                Ok(response) => {
                    self.connection = Some(connection);
                    return Ok(PooledBody::of(response, self));
                }
                Err(mut error) => match error.take_message() {
                    Some(unsent) if reused => request = unsent,
                    _ => return Err(error.into_error().into()),
                },
            }
        }
    }
}

impl<B> Drop for Place<B> {
    fn drop(&mut self) {
        self.upstream.shard.upstream_active(-1);
    }
}

/// The body of an upstream's answer, streaming.
pub struct PooledBody<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    body: Incoming,
    place: Option<Place<B>>,
}

impl<B> PooledBody<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fn of(response: Response<Incoming>, place: Place<B>) -> Response<Self> {
        let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        response.map(|body| {
            let mut pooled = Self { body, place: Some(place) };
            if !switches {
                pooled.release_at_end();
            }
            pooled
        })
    }

    /// The place of a connection that has become another protocol's.
    #[must_use]
    pub fn into_place(self) -> Option<Place<B>> {
        self.place
    }

    fn release_at_end(&mut self) {
        if self.body.is_end_stream() {
            self.release();
        }
    }

    fn release(&mut self) {
        if let Some(mut place) = self.place.take()
            && place.sent.strong_count() == 0
            && let Some(connection) = place.connection.take()
        {
            place.upstream.put_back(connection);
        }
    }
}

impl<B> Body for PooledBody<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let frame = std::task::ready!(Pin::new(&mut this.body).poll_frame(cx));
        match &frame {
            Some(Ok(_)) => this.release_at_end(),
            Some(Err(_)) => this.place = None,
            None => this.release(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn count(connections: usize) -> isize {
    isize::try_from(connections).unwrap_or(isize::MAX)
}
