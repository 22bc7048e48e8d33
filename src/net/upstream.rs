//! The connections of one worker to one origin.
//!
//! # Invariants
//!
//! - At most `capacity` connections are in use; further requests wait in order.
//!   One whose request is not out when its answer ends is closed.
//! - While requests wait, one whose client is too slow gives its place away.
//! - A request is sent again only when a pooled connection never took it, or
//!   ended without an answer to what changes nothing.
//! - A connection goes back to the pool only after its answer was read whole.
//!
//! The most recently used connection serves first, so the rest fall idle and
//! are closed before an upstream would close them.

use std::cell::RefCell;
use std::error::Error as _;
use std::io::{self, ErrorKind};
use std::pin::{Pin, pin};
use std::rc::Rc;
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

use super::seat::{Seat, Seated, Slow, Taken, data_length};
use super::spelling::{Heads, Spelled, Spelling};
use super::{DialError, Dialer, Reach};
use crate::metrics::{Metrics, Shard};

/// Longest rest of a pooled connection, or a look of the sweep more: below the
/// usual limits of servers.
const IDLE_LIMIT: Duration = Duration::from_secs(30);

/// Fields in the head of another host's answer. The API's may have 100, which hyper
/// takes by itself: for more it needs the heap, with each answer.
const MAX_FIELDS_OF_OTHERS: usize = 256;

/// Time for a connection that has just answered to become ready again.
const READY_LIMIT: Duration = Duration::from_millis(100);

/// How long a request waits for a place before a slow client has to give its own away.
const COURTESY: Duration = Duration::from_secs(1);

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
    /// Others waited, and the client gave its body too slowly.
    #[error("the request body came too slowly")]
    TooSlow,
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
    slow: Rc<Slow>,
    shard: Arc<Shard>,
    metrics: Arc<Metrics>,
}

/// An open connection; ended when dropped, whatever it is still busy with.
struct Connection<B> {
    sender: SendRequest<Seated<B>>,
    task: AbortOnDropHandle<()>,
    heads: Arc<Heads>,
}

impl<B> Connection<B> {
    /// Ends a connection that nobody uses: in order, unless it is still busy.
    fn close(self) {
        if self.sender.is_ready() {
            drop(self.task.detach());
        }
    }
}

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
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            key,
            dialer,
            capacity,
            most_idle,
            permits: Arc::new(Semaphore::new(capacity)),
            idle: RefCell::new(Vec::new()),
            slow: Rc::default(),
            shard,
            metrics,
        }
    }

    /// The origin's name.
    #[must_use]
    pub fn key(&self) -> &UpstreamKey {
        &self.key
    }

    /// Whether half of the origin's connections are in use, or would be with one
    /// more.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        let left = self.permits.available_permits().saturating_sub(1);
        left * 2 < self.capacity
    }

    /// A place among the origin's connections, where one is free and nobody waits
    /// for it.
    #[must_use]
    pub fn free_place(self: &Rc<Self>) -> Option<Place<B>> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        Some(self.seated(Some(permit)))
    }

    /// A place among the origin's connections; waits for one in order, as long
    /// as it takes.
    pub async fn place(self: &Rc<Self>) -> Place<B> {
        let mut permit = pin!(Arc::clone(&self.permits).acquire_owned());
        // The semaphore is never closed, so there always is a permit.
        let permit = loop {
            match timeout(COURTESY, permit.as_mut()).await {
                Ok(permit) => break permit.ok(),
                Err(_) => self.end_slowest(),
            }
        };
        self.seated(permit)
    }

    fn seated(self: &Rc<Self>, permit: Option<OwnedSemaphorePermit>) -> Place<B> {
        let taken = Taken::new(Arc::clone(&self.shard), permit);
        let seat = Seat::new(taken, &self.slow);
        Place { upstream: Rc::clone(self), connection: None, seat }
    }

    fn end_slowest(&self) {
        if let Some(limit) = self.slow.end_slowest() {
            self.metrics.limited(limit);
            debug!(limit = limit.as_str(), "slow client gave its upstream connection away");
        }
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
            if idle.connection.sender.is_closed() {
                continue;
            }
            // Just after an answer the connection's task may not have run yet.
            let sender = &mut idle.connection.sender;
            let ready = sender.is_ready()
                || matches!(Box::pin(timeout(READY_LIMIT, sender.ready())).await, Ok(Ok(())));
            if ready {
                return Some(idle.connection);
            }
        }
    }

    async fn open(&self) -> Result<Connection<B>, SendError> {
        let UpstreamKey { host, port, tls, reach } = &self.key;
        let stream = self.dialer.stream(host, *port, *reach, *tls).await?;
        let heads = Arc::default();
        let stream = Spelled::new(stream, &heads);
        let mut http = http1::Builder::new();
        if *reach == Reach::Client {
            http.max_headers(MAX_FIELDS_OF_OTHERS);
        }
        let (sender, connection) = http.handshake(TokioIo::new(stream)).await?;
        let task = tokio::task::spawn_local(async move {
            if let Err(error) = connection.with_upgrades().await {
                debug!(%error, "upstream connection ended");
            }
        });
        Ok(Connection { sender, task: AbortOnDropHandle::new(task), heads })
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
    seat: Rc<Seat>,
}

/// Whether the peer closed the connection before it answered.
fn is_closed(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    let broken = cause.is_some_and(|cause| {
        matches!(
            cause.kind(),
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof
        )
    });
    broken || error.is_incomplete_message()
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
    /// An upstream closes a connection that rests when it likes, and a request may
    /// just then be on its way. Whether it was seen cannot be known; `again` gives
    /// the same one where that does not matter (RFC 9110 §9.2.2), once.
    ///
    /// # Errors
    ///
    /// [`SendError`].
    pub fn send(
        mut self,
        request: Request<B>,
        spelling: &Spelling,
        again: impl FnOnce() -> Option<Request<B>>,
    ) -> impl Future<Output = Result<Response<PooledBody<B>>, SendError>> {
        let mut request = self.seated(request);
        let mut again = Some(again);
        // An async function would have what it is given twice.
        async move {
            loop {
                // Where one that rested was closed, the others may be, too.
                let (mut connection, reused) = self.next_connection(again.is_some()).await?;
                self.seat.uses(connection.task.abort_handle());
                connection.heads.await_answer(spelling.clone());
                let sent = connection.sender.try_send_request(request);
                let connection = self.connection.insert(connection);
                let sent = sent.await;
                let spelling = connection.heads.take_answer();
                let mut failure = match sent {
                    Ok(response) => return Ok(PooledBody::of(response, spelling, self)),
                    Err(_) if self.seat.is_given_away() => return Err(SendError::TooSlow),
                    Err(failure) => failure,
                };
                let (unsent, error) = (failure.take_message(), failure.into_error());
                request = match unsent {
                    Some(unsent) if reused => unsent,
                    _ if reused && is_closed(&error) => {
                        let repeated = again.take().and_then(|again| again()).ok_or(error)?;
                        let path = repeated.uri().path();
                        debug!(http.target = path, "request sent again on a fresh connection");
                        self.seated(repeated)
                    }
                    _ => return Err(error.into()),
                };
            }
        }
    }

    fn seated(&self, request: Request<B>) -> Request<Seated<B>> {
        request.map(|body| Seated::new(body, &self.seat))
    }

    /// A connection that is ready, and whether it is one that has rested.
    async fn next_connection(
        &self,
        may_have_rested: bool,
    ) -> Result<(Connection<B>, bool), SendError> {
        if may_have_rested && let Some(rested) = self.upstream.take_idle().await {
            return Ok((rested, true));
        }
        Ok((Box::pin(self.upstream.open()).await?, false))
    }
}

/// The body of an upstream's answer, streaming.
pub struct PooledBody<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    body: Incoming,
    /// How the names of the answer's fields are spelled.
    spelling: Spelling,
    place: Option<Place<B>>,
}

impl<B> PooledBody<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fn of(response: Response<Incoming>, spelling: Spelling, place: Place<B>) -> Response<Self> {
        let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        response.map(|body| {
            let mut pooled = Self { body, spelling, place: Some(place) };
            if !switches {
                pooled.release_at_end();
            }
            pooled
        })
    }

    /// Takes out how the names of the answer's fields are spelled.
    pub fn take_spelling(&mut self) -> Spelling {
        std::mem::take(&mut self.spelling)
    }

    /// The rest is not asked for until later; that is not the client's doing.
    pub fn set_aside(&self) {
        if let Some(place) = &self.place {
            place.seat.settle();
        }
    }

    /// The place of a connection that has become another protocol's.
    #[must_use]
    pub fn into_place(self) -> Option<Place<B>> {
        self.place
    }

    /// A frame was given; the next one is for the client to ask for.
    fn given(&mut self, bytes: usize) {
        self.moved(bytes);
        self.release_at_end();
        if let Some(place) = &self.place {
            place.seat.clients_turn();
        }
    }

    fn moved(&self, bytes: usize) {
        if let Some(place) = &self.place {
            place.seat.moved(bytes);
        }
    }

    fn release_at_end(&mut self) {
        if self.body.is_end_stream() {
            self.release();
        }
    }

    fn release(&mut self) {
        if let Some(mut place) = self.place.take()
            && !place.seat.is_sending()
            && !place.seat.is_given_away()
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
        // Whoever asks for more has taken what there was.
        this.moved(0);
        let frame = std::task::ready!(Pin::new(&mut this.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => this.given(data_length(frame)),
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
