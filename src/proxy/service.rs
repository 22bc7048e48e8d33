//! One worker's service: takes a connection, and answers its requests.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use http::header::{CONNECTION, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::server::conn::http1::{self, UpgradeableConnection};
use hyper::service::{HttpService, service_fn};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, interval, sleep, timeout};
use tracing::debug;

use super::Proxy;
use super::body::AnswerBody;
use super::error::ProxyError;
use super::head::{Head, HeadWatch, Inspected, Resettable};
use super::headers::expects_continue;
use super::intercept::{Rewound, Tunnelled};
use super::replay::ReplayBody;
use super::tunnel::{Switched, Tunnels};
use super::watch::{Answering, Watch, Watches};
use super::way::{Coming, route_of};
use crate::metrics::{Limit, Route, Shard};
use crate::net::{Client, Door, Guarded, Reach, Upstream, UpstreamKey, Worker};

/// How long a client that has only just come when the drain begins may take for
/// each step up to its first request. To it the connection stands, so an end of
/// it would be an error and no refusal.
const DRAIN_NEWCOMER_LIMIT: Duration = Duration::from_secs(2);

/// Bytes that hyper reads ahead: the largest head, and room for the rest.
const READ_BUFFER: usize = 128 * 1024;

/// Pause between two looks at connections that may have lasted too long.
const SWEEP: Duration = Duration::from_secs(1);

/// Other hosts whose connections may rest, on one worker. Clients name them, so
/// there is no end of them.
const MOST_OTHERS: usize = 64;

/// Connections to each of them that may rest.
const OTHERS_IDLE: usize = 8;

/// Longest silence in a stream of events.
const EVENTS_PATIENCE: Duration = Duration::from_mins(10);

/// The content type of server-sent events.
const EVENT_STREAM: &[u8] = b"text/event-stream";

/// An answer on its way to the client.
pub(super) type Answer = Response<AnswerBody>;

/// What serves the connections of one worker.
pub struct Service {
    pub(super) proxy: Arc<Proxy>,
    pub(super) shard: Arc<Shard>,
    worker: Worker,
    http: http1::Builder,
    /// By API origin, in the order of [`super::Origins`].
    api: Vec<Rc<Upstream<ReplayBody>>>,
    others: RefCell<HashMap<UpstreamKey, Rc<Upstream<ReplayBody>>>>,
    watches: Watches,
    pub(super) tunnels: Tunnels,
}

/// A client's connection as its requests see it.
pub(super) struct ClientConnection {
    pub(super) address: SocketAddr,
    /// What it becomes when an answer that ends HTTP on it is out.
    next: RefCell<Option<(OnUpgrade, Next)>>,
    /// The client waits to be asked for the body of its request.
    waits: Cell<bool>,
}

impl ClientConnection {
    pub(super) fn new(address: SocketAddr) -> Rc<Self> {
        Rc::new(Self { address, next: RefCell::default(), waits: Cell::new(false) })
    }

    /// A request has come: notes whether the client waits to be asked for the
    /// body.
    pub(super) fn request_came(&self, parts: &Parts, body: &Incoming) {
        let expectant = parts.version == Version::HTTP_11 && expects_continue(&parts.headers);
        // A body of a CONNECT is nobody's, and not waited for.
        let waits = expectant || parts.method == Method::CONNECT;
        self.waits.set(waits && !body.is_end_stream());
    }

    /// The client was asked for the body of its request.
    pub(super) fn body_asked_for(&self) {
        self.waits.set(false);
    }

    /// Lets the connection end with `answer` where the client still waits:
    /// whether it sends its body all the same cannot be known.
    pub(super) fn end_if_it_waits(&self, answer: &mut Answer) {
        if self.waits.take() && self.next.borrow().is_none() {
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }

    /// Says what the connection becomes.
    pub(super) fn becomes(&self, on_upgrade: OnUpgrade, next: Next) {
        self.next.replace(Some((on_upgrade, next)));
    }

    /// What the connection becomes, if it does not end.
    pub(super) fn take_next(&self) -> Option<(OnUpgrade, Next)> {
        self.next.take()
    }
}

/// What the way of an answer depends on.
struct Asked {
    is_connect: bool,
    version: Version,
}

impl Asked {
    fn of(request: &Request<Incoming>) -> Self {
        Self { is_connect: request.method() == Method::CONNECT, version: request.version() }
    }
}

/// Whose turn it is on a connection: those who read it and those who keep its
/// time are told.
struct Turns {
    watch: Arc<Watch>,
    head: Arc<HeadWatch>,
    /// How long an upstream may be silent.
    patience: Duration,
}

impl Turns {
    /// A head was parsed: says what is known of it, or what is wrong with it.
    fn request_came(&self) -> Result<Head, ProxyError> {
        self.watch.head_parsed();
        self.head.take()
    }

    /// The `answer` to what was `asked`, as it goes out.
    fn answer(
        &self,
        asked: &Asked,
        mut answer: Answer,
    ) -> Response<Guarded<AnswerBody, Answering>> {
        if ends_http(asked.is_connect, answer.status()) {
            self.head.look_away();
        } else {
            self.head.await_head();
        }
        let has_length = answer.body().size_hint().exact().is_some();
        let ends_by_closing = asked.version != Version::HTTP_11 && !has_length;
        self.head.set_answer_spelling(answer.body_mut().take_spelling());
        let patience = patience(&answer, self.patience);
        let answering = self.watch.answer_begun(patience, ends_by_closing);
        answer.map(|body| Guarded::new(body, answering))
    }
}

/// What follows HTTP on a connection.
pub(super) enum Next {
    /// An API host: the inner requests are served here.
    Intercept(Tunnelled),
    /// Another host: bytes are copied.
    Tunnel(TcpStream),
    /// WebSocket: bytes are copied.
    Switched(Switched),
}

impl Service {
    /// The service of `worker`, and the task that closes its idle upstream
    /// connections.
    #[must_use]
    pub fn start(proxy: &Arc<Proxy>, worker: &Worker) -> Rc<Self> {
        let mut http = http1::Builder::new();
        http.auto_date_header(false)
            .max_buf_size(READ_BUFFER)
            // `watch` does that.
            .header_read_timeout(None);
        let mut service = Self {
            shard: proxy.metrics.shard(worker.index),
            proxy: Arc::clone(proxy),
            worker: worker.clone(),
            http,
            api: Vec::new(),
            others: RefCell::default(),
            watches: Watches::default(),
            tunnels: Tunnels::default(),
        };
        for origin in proxy.origins.iter() {
            let key = UpstreamKey {
                host: origin.host.clone(),
                port: origin.port,
                tls: true,
                reach: Reach::Operator,
            };
            let known = service.api.iter().find(|upstream| *upstream.key() == key);
            let upstream = known.cloned().unwrap_or_else(|| service.new_upstream(key, usize::MAX));
            service.api.push(upstream);
        }
        let service = Rc::new(service);
        tokio::task::spawn_local(Rc::clone(&service).sweep());
        service
    }

    /// Serves a client's connection to its end.
    pub async fn serve(self: Rc<Self>, client: Client) {
        let _open = Open::new(&self.shard);
        let Client { stream, address, door, admitted } = client;
        match door {
            Door::Proxy => self.serve_proxy(stream, address).await,
            Door::Sni => Box::pin(self.serve_sni(stream, address)).await,
        }
        drop(admitted);
    }

    /// Serves a connection to `PROXY_LISTEN`: HTTP, and what follows a CONNECT.
    pub(super) async fn serve_proxy(&self, stream: TcpStream, address: SocketAddr) {
        let connection = ClientConnection::new(address);
        let served = self
            .serve_http(stream, address, |request, head| self.outer(request, head, &connection));
        Box::pin(served).await;
        if let Some((on, next)) = connection.take_next() {
            Box::pin(self.go_on(on, next, address)).await;
        }
    }

    /// Serves what a connection has become.
    async fn go_on(&self, on: OnUpgrade, next: Next, address: SocketAddr) {
        match next {
            Next::Intercept(tunnelled) => self.intercept(on, tunnelled, address).await,
            Next::Tunnel(upstream) => match Rewound::from_upgrade(on).await {
                Ok(client) => Box::pin(self.tunnel_to(client, upstream)).await,
                Err(error) => debug!(%error, "tunnel was not used"),
            },
            Next::Switched(switched) => Box::pin(self.tunnel_switched(on, switched)).await,
        }
    }

    /// Serves HTTP on the `stream` of `client` with `route`, until it ends or the
    /// drain begins; a client that has only just come by then is still answered.
    /// `route` is told what is known of the head as it came, or what is wrong with it.
    pub(super) fn serve_http<I, R, F>(
        &self,
        stream: I,
        client: SocketAddr,
        route: R,
    ) -> impl Future<Output = ()> + use<'_, I, R, F>
    where
        I: AsyncRead + AsyncWrite + Resettable + Unpin + Send + 'static,
        R: Fn(Request<Incoming>, Result<Head, ProxyError>) -> F,
        F: Future<Output = Answer>,
    {
        let (watch, head) = (self.watches.open(), Arc::new(HeadWatch::default()));
        let stream = Inspected::new(stream, &head, &watch, &self.proxy.bounds.heads);
        let patience = self.proxy.settings.upstream_timeout;
        let turns = Rc::new(Turns { watch: Arc::clone(&watch), head, patience });
        let service = service_fn(move |request| {
            let asked = Asked::of(&request);
            let turns = Rc::clone(&turns);
            // A future that awaits what it holds would be twice as large.
            let answer = route(request, turns.request_came());
            answer.map(move |answer| Ok::<_, Infallible>(turns.answer(&asked, answer)))
        });
        let connection = self.http.serve_connection(TokioIo::new(stream), service).with_upgrades();
        // In a box, which goes with HTTP: what follows may last.
        let mut connection = Box::pin(connection);
        async move {
            tokio::select! {
                biased;
                ended = self.until_drained(connection.as_mut(), &watch) => if let Err(error) = ended {
                    debug!(%error, "client connection ended");
                },
                limit = self.limit_met(&watch) => {
                    debug!(
                        client.addr = %client,
                        limit = limit.as_str(),
                        waits_for = watch.waits_for(),
                        "client connection ran into a limit"
                    );
                }
            }
        }
    }

    /// Ends when the connection is beyond a bound, says which, and has counted
    /// it: before the client sees the connection end.
    async fn limit_met(&self, watch: &Watch) -> Limit {
        let limit = watch.expired().await;
        self.proxy.metrics.limited(limit);
        limit
    }

    /// Serves `connection` to its end, in order when the drain begins.
    async fn until_drained<I, S>(
        &self,
        mut connection: Pin<&mut UpgradeableConnection<TokioIo<I>, S>>,
        watch: &Watch,
    ) -> hyper::Result<()>
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        S: HttpService<Incoming, ResBody = Guarded<AnswerBody, Answering>, Error = Infallible>,
    {
        tokio::select! {
            biased;
            ended = connection.as_mut() => return ended,
            () = self.worker.drain.cancelled() => {}
        }
        tokio::select! {
            biased;
            ended = connection.as_mut() => return ended,
            _ = timeout(DRAIN_NEWCOMER_LIMIT, watch.first_head()) => {}
        }
        connection.as_mut().graceful_shutdown();
        connection.await
    }

    /// Cancelled when the drain begins.
    pub(super) fn drain(&self) -> &tokio_util::sync::CancellationToken {
        &self.worker.drain
    }

    /// Ends when the drain has begun and a client that has only just come has
    /// had its time for the next step.
    pub(super) async fn newcomers_time_is_up(&self) {
        self.worker.drain.cancelled().await;
        sleep(DRAIN_NEWCOMER_LIMIT).await;
    }

    /// The upstream of API origin `index`.
    pub(super) fn api(&self, index: usize) -> &Rc<Upstream<ReplayBody>> {
        &self.api[index]
    }

    /// A request on the connection itself, not inside a tunnel.
    fn outer(
        &self,
        request: Request<Incoming>,
        head: Result<Head, ProxyError>,
        client: &Rc<ClientConnection>,
    ) -> impl Future<Output = Answer> + use<'_> {
        let started = Instant::now();
        let seen = Seen::of(&request, client.address);
        let mut route = route_of(request.method(), request.uri());
        let client = Rc::clone(client);
        let coming = if request.method() == Method::CONNECT {
            self.connect(request, head, &mut route, &client)
        } else {
            self.answer(request, head, &mut route, &client)
        };
        async move {
            let answer = answer_of(coming, &client).await;
            // An opened interception counts by its inner requests.
            let next = client.next.borrow();
            if !matches!(&*next, Some((_, Next::Intercept(_)))) {
                self.count(route, &answer, started);
            }
            log(route, &seen, &answer, started);
            answer
        }
    }

    /// Counts an answer.
    pub(super) fn count(&self, route: Route, answer: &Answer, started: Instant) {
        self.shard.request(route, answer.status().as_u16(), started.elapsed());
    }

    pub(super) fn other(&self, key: UpstreamKey) -> Rc<Upstream<ReplayBody>> {
        let mut others = self.others.borrow_mut();
        if let Some(known) = others.get(&key) {
            return Rc::clone(known);
        }
        if others.len() >= MOST_OTHERS {
            let resting = others.iter().filter(|(_, upstream)| upstream.is_at_rest());
            let oldest = resting.min_by_key(|(_, upstream)| upstream.rests_since());
            let oldest = oldest.map(|(key, _)| key.clone());
            oldest.and_then(|key| others.remove(&key));
        }
        let upstream = self.new_upstream(key.clone(), OTHERS_IDLE);
        others.insert(key, Rc::clone(&upstream));
        upstream
    }

    fn new_upstream(&self, key: UpstreamKey, most_idle: usize) -> Rc<Upstream<ReplayBody>> {
        let capacity = self.proxy.settings.upstream_connections[self.worker.index];
        let Proxy { dialer, metrics, .. } = &*self.proxy;
        let (dialer, metrics) = (Arc::clone(dialer), Arc::clone(metrics));
        let shard = Arc::clone(&self.shard);
        Rc::new(Upstream::new(key, capacity, most_idle, dialer, shard, metrics))
    }

    async fn sweep(self: Rc<Self>) {
        let mut ticks = interval(SWEEP);
        loop {
            ticks.tick().await;
            self.watches.look();
            self.tunnels.look(self.worker.drain.is_cancelled());
            self.api.iter().for_each(|upstream| upstream.close_idle());
            self.others.borrow_mut().retain(|_, upstream| {
                upstream.close_idle();
                !upstream.is_unused()
            });
        }
    }
}

/// Counts a connection for as long as it is served, however that ends.
struct Open(Arc<Shard>);

impl Open {
    fn new(shard: &Arc<Shard>) -> Self {
        shard.connection_opened();
        Self(Arc::clone(shard))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.connection_closed();
    }
}

/// The answer that is `coming`, or that says why none is.
pub(super) async fn answer_of(
    coming: Result<Coming<'_>, ProxyError>,
    client: &ClientConnection,
) -> Answer {
    let answer = match coming {
        Ok(coming) => coming.await,
        Err(error) => Err(error),
    };
    let mut answer = answer.unwrap_or_else(ProxyError::into_response);
    client.end_if_it_waits(&mut answer);
    answer
}

/// What the log says of a request.
pub(super) struct Seen {
    client: SocketAddr,
    method: Method,
    /// Host and path: a query may hold what is nobody's business.
    target: String,
}

impl Seen {
    /// Notes what the log will need; nothing where it will not ask.
    pub(super) fn of(request: &Request<Incoming>, client: SocketAddr) -> Self {
        let uri = request.uri();
        let shown = tracing::enabled!(tracing::Level::DEBUG);
        let target = if shown {
            // Not the authority: it may hold credentials.
            let port = uri.port_u16().map(|port| format!(":{port}")).unwrap_or_default();
            format!("{}{port}{}", uri.host().unwrap_or_default(), uri.path())
        } else {
            String::new()
        };
        Self { client, method: request.method().clone(), target }
    }
}

/// Logs an answer, at DEBUG.
pub(super) fn log(route: Route, seen: &Seen, answer: &Answer, started: Instant) {
    debug!(
        client.addr = %seen.client,
        route = route.as_str(),
        http.method = %seen.method,
        http.target = seen.target,
        http.status = answer.status().as_u16(),
        took_ms = started.elapsed().as_millis(),
        "request answered"
    );
}

/// Whether an answer with `status` makes the connection another protocol's.
fn ends_http(is_connect: bool, status: StatusCode) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS || (is_connect && status.is_success())
}

/// How long `answer` may stand still: as long as an upstream may be silent, and
/// a stream of events for longer.
fn patience(answer: &Answer, upstream: Duration) -> Duration {
    let kind = answer.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let is_stream = kind
        .get(..EVENT_STREAM.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(EVENT_STREAM));
    if is_stream { upstream.max(EVENTS_PATIENCE) } else { upstream }
}
