//! The shop: its API, its anonymous door and its front page, over TLS or plain.
//!
//! Written on raw HTTP so that it records requests exactly as they came and
//! can fail in any way. Paths after the API prefix choose the behaviour:
//!
//! | path | what it does once the token is accepted |
//! |---|---|
//! | `/v2/always-401` | refuses any token |
//! | `/v2/gate/…` | waits, before it looks at the token, until [`Origin::open_gate`] |
//! | `/v2/early` | looks at the token before it has read the body |
//! | `/v2/echo` | sends body and trailers back |
//! | `/v2/uninviting` | the same, but waits for the body without asking for it |
//! | `/v2/unread/<code>` | answers so without looking for the body, and never closes |
//! | `/v2/websocket` | switches, and sends back what comes; 400 where something came before that |
//! | `/v2/events/<ms>` | two server-sent events, that time apart |
//! | `/v2/slow/<ms>` | answers after that time |
//! | `/v2/big/<bytes>`, `/v2/big-chunked/<bytes>` | a long body, the latter with trailers |
//! | `/v2/close-delimited`, `/v2/short`, `/v2/hang`, `/v2/reset`, `/v2/garbage` | as they say |
//! | `/v2/tired` | hangs up on a connection that has answered before |
//! | `/v2/status/<code>` | that status with JSON |
//! | scripted ([`Origin::script`]) | those bytes |
//! | anything else | 200 with the target as body |

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::http::{
    End, Framing, Head, PATIENCE, Wire, chunk, head, last_chunk, message, socket_of,
};
use super::token::{LIFE, Tokens, now};

/// The path of the verifier's question.
const VERIFY_PATH: &str = "/web/api/v2/search/product";
/// The end of the anonymous door's path, which each API host has.
const ANONYMOUS_PATH: &str = "/api/v1/auth/anonymous";

/// What the shop's 401 says.
pub(crate) const REFUSAL: &str =
    r#"{"message":"Authorization обязательное поле","requestId":"7f0c4d"}"#;

/// What the anti-bot wall says.
pub(crate) const WALL_PAGE: &str = "<html><title>DDoS-Guard</title></html>";

/// The anti-bot wall: a 403 in HTML for all who do not show what it wants.
#[derive(Clone, Debug)]
pub(crate) enum Wall {
    /// Everybody passes.
    Down,
    /// Who shows this cookie, `name=value`, and is this user-agent passes.
    Opens { cookie: String, user_agent: String },
    /// Nobody passes.
    Closed,
    /// Nobody passes but the verifier with cookies, once for each token.
    OncePerToken,
}

impl Wall {
    fn lets_pass(&self, head: &Head) -> bool {
        match self {
            Self::Down => true,
            Self::Closed | Self::OncePerToken => false,
            Self::Opens { cookie, user_agent } => {
                let cookies = head.value("cookie").unwrap_or_default();
                cookies.split("; ").any(|pair| pair == cookie)
                    && head.value("user-agent") == Some(user_agent)
            }
        }
    }
}

/// One request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Recorded {
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<(String, String)>,
    /// The whole message has been read.
    pub(crate) complete: bool,
}

impl Recorded {
    pub(crate) fn method(&self) -> &str {
        self.head.word(0)
    }

    /// The target byte for byte.
    pub(crate) fn target(&self) -> &str {
        let rest = self.head.start.split_once(' ').map_or("", |(_, rest)| rest);
        rest.rsplit_once(' ').map_or(rest, |(target, _)| target)
    }

    fn path(&self) -> &str {
        self.target().split('?').next().unwrap_or_default()
    }

    /// The bare token it carried.
    pub(crate) fn token(&self) -> Option<&str> {
        self.head.value("authorization").and_then(|value| value.strip_prefix("Bearer "))
    }

    pub(crate) fn is_verification(&self) -> bool {
        self.path() == VERIFY_PATH && self.target().contains("phrase=python")
    }

    fn is_ours(&self) -> bool {
        self.is_verification() || self.is_at_the_door() || self.path() == "/"
    }

    fn is_at_the_door(&self) -> bool {
        self.path().ends_with(ANONYMOUS_PATH)
    }
}

/// What the anonymous door does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    /// 201 with a fresh token.
    Open,
    /// This status with JSON.
    Status(u16),
    /// Never answers.
    Hangs,
}

/// What the front page does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Page {
    /// Sets the cookie with a fresh token.
    SetsCookie,
    /// HTML without the cookie.
    Bare,
}

/// What the verifier's question gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verification {
    /// 200 for an accepted token, else 401.
    ByToken,
    /// This status whatever the token.
    Always(u16),
    /// 401 without a token, this status with any.
    WithToken(u16),
    /// No answer at all.
    Hangs,
}

/// What a connection meets before the first request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// TLS, if this stand-in speaks it.
    Usual,
    /// Nothing at all.
    Silence,
    /// The beginning of a TLS handshake, and then nothing.
    HalfHandshake,
    /// The greeting of the client is read, and then this.
    Ends(End),
    /// An answer in plain text.
    PlainText,
}

struct Settings {
    greeting: Greeting,
    tls: Option<TlsAcceptor>,
    door: Door,
    page: Page,
    verification: Verification,
    refuses_api: bool,
    refusal: Vec<u8>,
    date: Option<String>,
    wall: Wall,
    /// Where all that the sidecar asks for itself is sent away to.
    moved_to: Option<String>,
    scripts: HashMap<String, Script>,
    /// Client requests, by count, with which all tokens die.
    deaths: Vec<usize>,
}

#[derive(Clone)]
struct Script {
    bytes: Vec<u8>,
    end: End,
}

struct Shared {
    tokens: Tokens,
    open_to_all: bool,
    settings: Mutex<Settings>,
    requests: Mutex<Vec<Recorded>>,
    gate: watch::Sender<bool>,
    arrived: watch::Sender<usize>,
    /// Bumped to make idle connections close.
    drop_idle: watch::Sender<u64>,
    accepted: AtomicUsize,
    open: watch::Sender<usize>,
    most_open: AtomicUsize,
}

/// A running stand-in. Stops when dropped.
pub(crate) struct Origin {
    addr: SocketAddr,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

impl Origin {
    /// The shop over TLS.
    pub(crate) async fn start(tokens: Tokens, tls: TlsAcceptor) -> Self {
        Self::listen(tokens, Some(tls), false).await
    }

    /// The shop without TLS.
    pub(crate) async fn start_plain(tokens: Tokens) -> Self {
        Self::listen(tokens, None, false).await
    }

    /// Some other host: plain HTTP or TLS, and no token is asked for.
    pub(crate) async fn start_other(tls: Option<TlsAcceptor>) -> Self {
        Self::listen(Tokens::default(), tls, true).await
    }

    /// The shop on a socket that is bound already.
    pub(crate) fn start_on(listener: TcpListener, tokens: Tokens, tls: TlsAcceptor) -> Self {
        Self::serve(listener, tokens, Some(tls), false)
    }

    /// Some other host on a socket that is bound already.
    pub(crate) fn start_other_on(listener: TcpListener, tls: TlsAcceptor) -> Self {
        Self::serve(listener, Tokens::default(), Some(tls), true)
    }

    async fn listen(tokens: Tokens, tls: Option<TlsAcceptor>, open_to_all: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::serve(listener, tokens, tls, open_to_all)
    }

    fn serve(
        listener: TcpListener,
        tokens: Tokens,
        tls: Option<TlsAcceptor>,
        open_to_all: bool,
    ) -> Self {
        let addr = listener.local_addr().unwrap();
        let settings = Settings {
            greeting: Greeting::Usual,
            tls,
            door: Door::Open,
            page: Page::SetsCookie,
            verification: Verification::ByToken,
            refuses_api: false,
            refusal: REFUSAL.as_bytes().to_vec(),
            date: None,
            wall: Wall::Down,
            moved_to: None,
            scripts: HashMap::new(),
            deaths: Vec::new(),
        };
        let shared = Arc::new(Shared {
            tokens,
            open_to_all,
            settings: Mutex::new(settings),
            requests: Mutex::default(),
            gate: watch::Sender::new(false),
            arrived: watch::Sender::new(0),
            drop_idle: watch::Sender::new(0),
            accepted: AtomicUsize::new(0),
            open: watch::Sender::new(0),
            most_open: AtomicUsize::new(0),
        });
        let stop = CancellationToken::new();
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept(
            listener,
            shared.clone(),
            stop.clone(),
        )));
        Self { addr, shared, _stop: stop.drop_guard() }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub(crate) fn set_door(&self, door: Door) {
        self.shared.settings.lock().unwrap().door = door;
    }

    pub(crate) fn set_page(&self, page: Page) {
        self.shared.settings.lock().unwrap().page = page;
    }

    /// What new connections meet from now on.
    pub(crate) fn set_greeting(&self, greeting: Greeting) {
        self.shared.settings.lock().unwrap().greeting = greeting;
    }

    /// What new connections are shown as a certificate from now on.
    pub(crate) fn set_tls(&self, tls: TlsAcceptor) {
        self.shared.settings.lock().unwrap().tls = Some(tls);
    }

    /// Closes the ways to a token that lead here, so that only the solver is left.
    pub(crate) fn close_doors(&self) {
        self.set_door(Door::Status(403));
        self.set_page(Page::Bare);
    }

    pub(crate) fn set_verification(&self, verification: Verification) {
        self.shared.settings.lock().unwrap().verification = verification;
    }

    /// Lets the API refuse every token, while the verifier's question is answered as ever.
    pub(crate) fn refuse_api(&self, refuses: bool) {
        self.shared.settings.lock().unwrap().refuses_api = refuses;
    }

    /// The body of the 401s.
    pub(crate) fn set_refusal(&self, body: impl Into<Vec<u8>>) {
        self.shared.settings.lock().unwrap().refusal = body.into();
    }

    /// Puts up the wall before everything, or takes it down.
    pub(crate) fn set_wall(&self, wall: Wall) {
        self.shared.settings.lock().unwrap().wall = wall;
    }

    /// Answers what the sidecar asks for itself, verifier and sources, by a redirect.
    pub(crate) fn send_away_to(&self, url: &str) {
        self.shared.settings.lock().unwrap().moved_to = Some(url.to_owned());
    }

    /// Sends this `Date` with each answer.
    pub(crate) fn set_date(&self, date: &str) {
        self.shared.settings.lock().unwrap().date = Some(date.to_owned());
    }

    /// Answers `path` with exactly these bytes, and then keeps the connection or closes it.
    pub(crate) fn script(&self, path: &str, bytes: impl Into<Vec<u8>>, close: bool) {
        self.script_to(path, bytes, if close { End::Close } else { End::Stall });
    }

    /// Answers `path` with exactly these bytes, and then leaves the connection so.
    pub(crate) fn script_to(&self, path: &str, bytes: impl Into<Vec<u8>>, end: End) {
        let script = Script { bytes: bytes.into(), end };
        self.shared.settings.lock().unwrap().scripts.insert(path.to_owned(), script);
    }

    /// Lets all tokens die as the client requests with these numbers, from 1, come in.
    pub(crate) fn die_at(&self, requests: &[usize]) {
        self.shared.settings.lock().unwrap().deaths = requests.to_vec();
    }

    /// Lets what waits at `/v2/gate/…` through, from now on.
    pub(crate) fn open_gate(&self) {
        self.shared.gate.send_replace(true);
    }

    /// Waits until `count` requests have come to the gate so far.
    pub(crate) async fn arrived(&self, count: usize) {
        let mut arrived = self.shared.arrived.subscribe();
        let wait = arrived.wait_for(|&arrived| arrived >= count);
        let outcome = tokio::time::timeout(PATIENCE, wait).await.map(drop);
        outcome
            .unwrap_or_else(|_| panic!("{} of {count} at the gate", *self.shared.arrived.borrow()));
    }

    /// Lets all connections on which no request is under way be closed.
    pub(crate) fn start_dropping_idle_connections(&self) {
        self.shared.drop_idle.send_modify(|count| *count += 1);
    }

    /// Closes all connections on which no request is under way, and waits until they are closed.
    pub(crate) async fn drop_idle_connections(&self) {
        self.start_dropping_idle_connections();
        let mut open = self.shared.open.subscribe();
        let wait = open.wait_for(|&open| open == 0);
        tokio::time::timeout(PATIENCE, wait).await.expect("idle connections to close").unwrap();
    }

    /// Everything that came.
    pub(crate) fn all_requests(&self) -> Vec<Recorded> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// What came from clients: neither verification nor a source's question.
    pub(crate) fn requests(&self) -> Vec<Recorded> {
        self.all_requests().into_iter().filter(|request| !request.is_ours()).collect()
    }

    /// Client requests for exactly this target.
    pub(crate) fn requests_for(&self, target: &str) -> Vec<Recorded> {
        self.requests().into_iter().filter(|request| request.target() == target).collect()
    }

    /// The only client request.
    pub(crate) fn only_request(&self) -> Recorded {
        let mut requests = self.requests();
        assert_eq!(requests.len(), 1, "{requests:#?}");
        requests.remove(0)
    }

    /// The verifier's questions that carried `token`.
    pub(crate) fn verifications_of(&self, token: &str) -> usize {
        let of_token =
            |request: &&Recorded| request.is_verification() && request.token() == Some(token);
        self.all_requests().iter().filter(of_token).count()
    }

    /// The verifier's questions.
    pub(crate) fn verifications(&self) -> Vec<Recorded> {
        self.all_requests().into_iter().filter(Recorded::is_verification).collect()
    }

    /// Times that the anonymous door was tried.
    pub(crate) fn door_knocks(&self) -> usize {
        self.all_requests().iter().filter(|request| request.is_at_the_door()).count()
    }

    /// Connections that are open now.
    pub(crate) fn open_connections(&self) -> usize {
        *self.shared.open.borrow()
    }

    /// The most connections that were open at once.
    pub(crate) fn most_connections(&self) -> usize {
        self.shared.most_open.load(Ordering::Relaxed)
    }

    /// Connections accepted so far.
    pub(crate) fn connections(&self) -> usize {
        self.shared.accepted.load(Ordering::Relaxed)
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let serve = converse(stream, shared.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(serve));
    }
}

/// Counts a connection as open while it lives.
struct Open(Arc<Shared>);

impl Open {
    fn new(shared: Arc<Shared>) -> Self {
        shared.open.send_modify(|open| {
            *open += 1;
            shared.most_open.fetch_max(*open, Ordering::Relaxed);
        });
        Self(shared)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.send_modify(|open| *open -= 1);
    }
}

async fn converse(stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    shared.accepted.fetch_add(1, Ordering::Relaxed);
    let _open = Open::new(shared.clone());
    let (greeting, tls) = {
        let settings = shared.settings.lock().unwrap();
        (settings.greeting, settings.tls.clone())
    };
    let socket = socket_of(&stream);
    if greeting != Greeting::Usual {
        let _ = greet(Wire::new(stream).above(socket), greeting).await;
        return;
    }
    let wire = match tls {
        None => Wire::new(stream),
        Some(tls) => match tls.accept(stream).await {
            Ok(stream) => Wire::new(stream),
            Err(_) => return,
        },
    };
    let mut talk = Talk { wire: wire.above(socket), shared, heads: 0 };
    let _ = talk.serve().await;
}

async fn greet(mut wire: Wire, greeting: Greeting) -> io::Result<()> {
    // A handshake message of 122 bytes, a ServerHello, of which two bytes of its version come.
    const HALF_A_SERVER_HELLO: &[u8] = &[22, 3, 3, 0, 122, 2, 0, 0, 118, 3, 3];
    if greeting != Greeting::Silence {
        wire.exactly(5).await?;
    }
    match greeting {
        Greeting::HalfHandshake => wire.try_send(HALF_A_SERVER_HELLO).await?,
        Greeting::PlainText => {
            wire.try_send("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await?;
        }
        Greeting::Ends(end) => return wire.end(end).await,
        Greeting::Usual | Greeting::Silence => {}
    }
    wire.end(End::Stall).await
}

/// One connection's conversation.
struct Talk {
    wire: Wire,
    shared: Arc<Shared>,
    /// Requests that have come by it.
    heads: usize,
}

/// What to do with the connection after an answer.
enum Next {
    Keep,
    Close,
}

impl Talk {
    async fn serve(&mut self) -> io::Result<()> {
        let mut drop_idle = self.shared.drop_idle.subscribe();
        loop {
            let head = tokio::select! {
                head = self.wire.head() => head?,
                _ = drop_idle.changed() => None,
            };
            let Some(head) = head else {
                return self.wire.try_finish().await;
            };
            let close =
                head.value("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
            match self.answer(head).await? {
                Next::Keep if !close => {}
                _ => return self.wire.try_finish().await,
            }
        }
    }

    fn record(&self, head: Head) -> usize {
        let mut requests = self.shared.requests.lock().unwrap();
        requests.push(Recorded { head, body: Vec::new(), trailers: Vec::new(), complete: false });
        requests.len() - 1
    }

    /// Reads the body as it comes, into the record.
    async fn read_body(&mut self, index: usize, head: &Head) -> io::Result<()> {
        let invites = behaviour(head_path(head)) != "uninviting";
        if invites && head.value("expect").is_some() {
            self.wire.try_send("HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        let framing = Framing::of_request(head);
        if framing == Framing::Chunked {
            while let Some(chunk) = self.wire.chunk().await? {
                self.shared.requests.lock().unwrap()[index].body.extend_from_slice(&chunk);
            }
            let trailers = self.wire.trailers().await?;
            self.shared.requests.lock().unwrap()[index].trailers = trailers;
        } else {
            let body = self.wire.body(framing).await?;
            self.shared.requests.lock().unwrap()[index].body = body.bytes;
        }
        self.shared.requests.lock().unwrap()[index].complete = true;
        Ok(())
    }

    async fn answer(&mut self, head: Head) -> io::Result<Next> {
        let index = self.record(head.clone());
        self.heads += 1;
        let request = self.shared.requests.lock().unwrap()[index].clone();
        self.die_if_due(&request);
        let path = request.path().to_owned();
        let behaviour = behaviour(&path);
        if behaviour == "early" && !self.is_authorized(&head) {
            return self.refuse(&head).await;
        }
        if let Some(code) = behaviour.strip_prefix("unread/") {
            self.reply(&head, code.parse().unwrap(), "text/plain", b"no").await?;
            return self.hang().await;
        }
        self.read_body(index, &head).await?;
        let wall = self.shared.settings.lock().unwrap().wall.clone();
        let excepted = matches!(wall, Wall::OncePerToken) && self.is_first_with_cookies(index);
        if !excepted && !wall.lets_pass(&head) {
            return self.reply(&head, 403, "text/html; charset=utf-8", WALL_PAGE.as_bytes()).await;
        }
        let moved_to = self.shared.settings.lock().unwrap().moved_to.clone();
        if let Some(url) = moved_to.filter(|_| request.is_ours()) {
            self.wire.try_send(redirect(&url)).await?;
            return Ok(Next::Keep);
        }
        if request.is_verification() {
            return self.verify(&head).await;
        }
        if request.is_at_the_door() {
            return self.door().await;
        }
        if path == "/" {
            return self.page().await;
        }
        if behaviour.starts_with("gate/") {
            self.shared.arrived.send_modify(|arrived| *arrived += 1);
            let _ = self.shared.gate.subscribe().wait_for(|&open| open).await;
        }
        let refuses = self.shared.settings.lock().unwrap().refuses_api || behaviour == "always-401";
        if refuses || !self.is_authorized(&head) {
            return self.refuse(&head).await;
        }
        let script = self.shared.settings.lock().unwrap().scripts.get(&path).cloned();
        if let Some(Script { bytes, end }) = script {
            self.wire.try_send(bytes).await?;
            return match end {
                // There may be more requests to come.
                End::Stall => Ok(Next::Keep),
                End::Close => Ok(Next::Close),
                End::Cut | End::Reset => self.wire.end(end).await.map(|()| Next::Close),
            };
        }
        self.behave(behaviour, index).await
    }

    /// Whether this is the first question of the verifier with cookies about its token.
    fn is_first_with_cookies(&self, index: usize) -> bool {
        let requests = self.shared.requests.lock().unwrap();
        let asks = |request: &Recorded| {
            request.is_verification()
                && request.head.value("cookie").is_some()
                && request.token() == requests[index].token()
        };
        asks(&requests[index]) && !requests[..index].iter().any(asks)
    }

    fn die_if_due(&self, request: &Recorded) {
        let due = &self.shared.settings.lock().unwrap().deaths;
        if due.is_empty() {
            return;
        }
        let requests = self.shared.requests.lock().unwrap();
        let count = requests.iter().filter(|request| !request.is_ours()).count();
        if !request.is_ours() && due.contains(&count) {
            self.shared.tokens.kill_all();
        }
    }

    fn is_authorized(&self, head: &Head) -> bool {
        match head.values("authorization").as_slice() {
            _ if self.shared.open_to_all => true,
            [one] => self.shared.tokens.authorizes(one),
            _ => false,
        }
    }

    async fn reply(
        &mut self,
        head: &Head,
        status: u16,
        kind: &str,
        body: &[u8],
    ) -> io::Result<Next> {
        let mut fields = vec![
            ("Content-Type".to_owned(), kind.to_owned()),
            ("Content-Length".to_owned(), body.len().to_string()),
        ];
        let date = self.shared.settings.lock().unwrap().date.clone();
        fields.extend(date.map(|date| ("Date".to_owned(), date)));
        let body = if head.word(0) == "HEAD" { &[] } else { body };
        self.wire.try_send(message(&format!("HTTP/1.1 {status} Said"), &fields, body)).await?;
        Ok(Next::Keep)
    }

    async fn refuse(&mut self, head: &Head) -> io::Result<Next> {
        let body = self.shared.settings.lock().unwrap().refusal.clone();
        self.reply(head, 401, "application/json", &body).await
    }

    async fn verify(&mut self, head: &Head) -> io::Result<Next> {
        let verification = self.shared.settings.lock().unwrap().verification;
        let status = match verification {
            Verification::ByToken if self.is_authorized(head) => 200,
            Verification::Always(status) => status,
            Verification::WithToken(status) if head.value("authorization").is_some() => status,
            Verification::ByToken | Verification::WithToken(_) => 401,
            Verification::Hangs => return self.hang().await,
        };
        match status {
            401 => self.refuse(head).await,
            _ => self.reply(head, status, "application/json", br#"{"data":[]}"#).await,
        }
    }

    async fn door(&mut self) -> io::Result<Next> {
        let door = self.shared.settings.lock().unwrap().door;
        let head = Head::default();
        match door {
            Door::Hangs => self.hang().await,
            Door::Status(status) => {
                self.reply(&head, status, "application/json", br#"{"message":"no"}"#).await
            }
            Door::Open => {
                let token = format!("Bearer {}", self.shared.tokens.issue());
                let body = json!({"token": {"accessToken": token, "expAccessToken": now() + LIFE}, "isNew": true});
                self.reply(&head, 201, "application/json", body.to_string().as_bytes()).await
            }
        }
    }

    async fn page(&mut self) -> io::Result<Next> {
        let page = self.shared.settings.lock().unwrap().page;
        let mut fields = vec![("Content-Type".to_owned(), "text/html".to_owned())];
        if page == Page::SetsCookie {
            let cookie = format!(
                "access-token=Bearer%20{}; Path=/; Domain=.chitai-gorod.ru",
                self.shared.tokens.issue()
            );
            fields.push(("Set-Cookie".to_owned(), "refresh-token=; Path=/".to_owned()));
            fields.push(("Set-Cookie".to_owned(), cookie));
        }
        fields.push(("Content-Length".to_owned(), "13".to_owned()));
        self.wire.try_send(message("HTTP/1.1 200 OK", &fields, b"<html></html>")).await?;
        Ok(Next::Keep)
    }

    /// Says nothing until the other side gives up.
    async fn hang(&mut self) -> io::Result<Next> {
        self.wire.until_end().await?;
        Ok(Next::Close)
    }

    async fn behave(&mut self, behaviour: &str, index: usize) -> io::Result<Next> {
        let request = self.shared.requests.lock().unwrap()[index].clone();
        let (name, argument) = behaviour.split_once('/').unwrap_or((behaviour, ""));
        let number: usize = argument.parse().unwrap_or(0);
        let start = "HTTP/1.1 200 OK";
        match name {
            "echo" | "uninviting" => self.echo(&request).await,
            "websocket" => self.websocket(&request.head).await,
            "events" => self.events(Duration::from_millis(number as u64)).await,
            "slow" => {
                sleep(Duration::from_millis(number as u64)).await;
                self.reply(&request.head, 200, "text/plain", b"late").await
            }
            "big" => {
                self.wire
                    .try_send(head(start, &[field("Content-Length", &number.to_string())]))
                    .await?;
                for part in pattern(number) {
                    self.wire.try_send(part).await?;
                }
                Ok(Next::Keep)
            }
            "big-chunked" => {
                let fields =
                    [field("Transfer-Encoding", "chunked"), field("Trailer", "X-Checksum")];
                self.wire.try_send(head(start, &fields)).await?;
                for part in pattern(number) {
                    self.wire.try_send(chunk(&part)).await?;
                }
                self.wire
                    .try_send(last_chunk(&[("X-Checksum", "abc"), ("Authorization", "Bearer x")]))
                    .await?;
                Ok(Next::Keep)
            }
            "close-delimited" => {
                self.wire.try_send(format!("{start}\r\n\r\nuntil the end")).await?;
                Ok(Next::Close)
            }
            "short" => {
                self.wire
                    .try_send(format!("{start}\r\nContent-Length: 100\r\n\r\nten bytes."))
                    .await?;
                Ok(Next::Close)
            }
            "hang" => self.hang().await,
            "tired" if self.heads > 1 => Ok(Next::Close),
            "reset" => Err(io::ErrorKind::ConnectionReset.into()),
            "garbage" => {
                self.wire.try_send("this is not HTTP\r\n\r\n").await?;
                Ok(Next::Close)
            }
            "status" => {
                let status = u16::try_from(number).unwrap_or(500);
                self.reply(&request.head, status, "application/json", br#"{"message":"said so"}"#)
                    .await
            }
            _ => self.reply(&request.head, 200, "text/plain", request.target().as_bytes()).await,
        }
    }

    async fn websocket(&mut self, head: &Head) -> io::Result<Next> {
        let asked = head.value("upgrade").is_some() && head.value("connection").is_some();
        if !asked || self.wire.speaks_within(Duration::from_millis(50)).await {
            return self.reply(head, 400, "text/plain", b"not now").await;
        }
        let fields = [
            field("Upgrade", "websocket"),
            field("Connection", "Upgrade"),
            field("Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        ];
        self.wire.try_send(super::http::head("HTTP/1.1 101 Switching Protocols", &fields)).await?;
        while let Some(bytes) = self.wire.some().await? {
            self.wire.try_send(bytes).await?;
        }
        Ok(Next::Close)
    }

    async fn events(&mut self, pause: Duration) -> io::Result<Next> {
        self.wire
            .try_send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
            .await?;
        sleep(pause).await;
        self.wire.try_send("data: 2\n\n").await?;
        Ok(Next::Close)
    }

    async fn echo(&mut self, request: &Recorded) -> io::Result<Next> {
        let kind = request.head.value("content-type").unwrap_or("application/octet-stream");
        if request.trailers.is_empty() {
            return self.reply(&request.head, 200, kind, &request.body).await;
        }
        let names: Vec<&str> = request.trailers.iter().map(|(name, _)| name.as_str()).collect();
        let fields = [field("Transfer-Encoding", "chunked"), field("Trailer", &names.join(", "))];
        let trailers: Vec<(&str, &str)> =
            request.trailers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        self.wire.try_send(head("HTTP/1.1 200 OK", &fields)).await?;
        if !request.body.is_empty() {
            self.wire.try_send(chunk(&request.body)).await?;
        }
        self.wire.try_send(last_chunk(&trailers)).await?;
        Ok(Next::Keep)
    }
}

/// The path of a request with this head.
fn head_path(head: &Head) -> &str {
    head.word(1).split('?').next().unwrap_or_default()
}

/// An answer that sends the client to `url`.
pub(crate) fn redirect(url: &str) -> Vec<u8> {
    let fields = [field("Location", url), field("Content-Length", "0")];
    message("HTTP/1.1 307 Temporary Redirect", &fields, b"")
}

/// What the path asks for: its part after the API prefix and version.
fn behaviour(path: &str) -> &str {
    let rest = path.strip_prefix("/web").unwrap_or(path);
    rest.strip_prefix("/api/v2/").unwrap_or_default()
}

fn field(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

/// `length` bytes in parts, from which a lost, doubled or moved part can be told.
pub(crate) fn pattern(length: usize) -> impl Iterator<Item = Vec<u8>> {
    const PART: usize = 64 * 1024;
    let byte = |at: usize| u8::try_from((at ^ (at >> 8) ^ (at >> 16)) & 0xff).unwrap();
    (0..length).step_by(PART).map(move |from| (from..length.min(from + PART)).map(byte).collect())
}

/// The whole of [`pattern`].
pub(crate) fn pattern_bytes(length: usize) -> Vec<u8> {
    pattern(length).flatten().collect()
}
