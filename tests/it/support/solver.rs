//! The solver `FlareSolverr`, as it answered when its replies were recorded.
//!
//! Success and failure are the recorded replies with a fresh token put in.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::http::{End, Framing, Head, PATIENCE, Wire, message, socket_of};
use super::token::Tokens;

/// What a solve ends in.
#[derive(Clone, Debug)]
pub(crate) enum Mode {
    /// `status: ok` with a fresh token in the cookie.
    Solves,
    /// The same with this value in the cookie, `{}` standing for a fresh token.
    Cookie(String),
    /// The same with these cookies: name, path and value.
    Cookies(Vec<(String, String, String)>),
    /// The same beside a page of this many bytes.
    WithPage(usize),
    /// `status: ok` without the cookie.
    NoCookie,
    /// HTTP 500, `status: error`.
    Error,
    /// HTTP 200, `status: error`, as other servers of this API do.
    ErrorAs200,
    /// `solution: null`.
    NullSolution,
    /// HTTP 200 with something that is not JSON.
    Garbage,
    /// These bytes, and then the connection is left so.
    Broken(&'static str, End),
    /// Closes without an answer.
    HangsUp,
    /// Accepts and never answers.
    Never,
    /// This many bytes without an end of JSON.
    Endless(usize),
    /// HTTP 429 with this `Retry-After`.
    Busy(&'static str),
    /// One of these by chance, drawn anew for each solve.
    OneOf(Vec<Mode>),
    /// A script sets the cookie late, and as up to 3.5.1 cookies are read before the wait: only the
    /// look that follows a wait in the same session ends in this; all before it have no cookie.
    Late(Box<Mode>),
}

struct State {
    mode: Mode,
    commands: Vec<Value>,
    heads: Vec<Head>,
    /// Open sessions, and whether a page has been waited on in each.
    sessions: BTreeMap<String, bool>,
    in_flight: usize,
    most_in_flight: usize,
}

struct Shared {
    tokens: Tokens,
    replies: Value,
    state: Mutex<State>,
    solves: watch::Sender<usize>,
    /// While true, solves wait before they answer.
    paused: watch::Sender<bool>,
}

/// A running stand-in. Stops when dropped.
pub(crate) struct Solver {
    addr: SocketAddr,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

impl Solver {
    pub(crate) async fn start(tokens: Tokens) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let replies = include_str!("../../fixtures/flaresolverr-replies.json");
        let state = State {
            mode: Mode::Solves,
            commands: Vec::new(),
            heads: Vec::new(),
            sessions: BTreeMap::new(),
            in_flight: 0,
            most_in_flight: 0,
        };
        let shared = Arc::new(Shared {
            tokens,
            replies: serde_json::from_str(replies).unwrap(),
            state: Mutex::new(state),
            solves: watch::Sender::new(0),
            paused: watch::Sender::new(false),
        });
        let stop = CancellationToken::new();
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept(
            listener,
            shared.clone(),
            stop.clone(),
        )));
        Self { addr, shared, _stop: stop.drop_guard() }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.shared.state.lock().unwrap().mode = mode;
    }

    /// Makes solves wait until [`Self::resume`].
    pub(crate) fn pause(&self) {
        self.shared.paused.send_replace(true);
    }

    /// Lets paused solves answer.
    pub(crate) fn resume(&self) {
        self.shared.paused.send_replace(false);
    }

    /// Page solves asked for so far.
    pub(crate) fn solves(&self) -> usize {
        *self.shared.solves.borrow()
    }

    /// Waits until `count` solves have been asked for.
    pub(crate) async fn asked(&self, count: usize) {
        let mut solves = self.shared.solves.subscribe();
        let wait = solves.wait_for(|&solves| solves >= count);
        let outcome = tokio::time::timeout(PATIENCE, wait).await.map(drop);
        outcome.unwrap_or_else(|_| panic!("{} solves instead of {count}", self.solves()));
    }

    /// The most solves at once.
    pub(crate) fn most_at_once(&self) -> usize {
        self.shared.state.lock().unwrap().most_in_flight
    }

    /// Bodies of the `request.get` commands.
    pub(crate) fn requests(&self) -> Vec<Value> {
        let mut commands = self.commands();
        commands.retain(|command| command["cmd"] == "request.get");
        commands
    }

    /// Bodies of all commands.
    pub(crate) fn commands(&self) -> Vec<Value> {
        self.shared.state.lock().unwrap().commands.clone()
    }

    /// Everything that it was told, as one text.
    pub(crate) fn everything(&self) -> String {
        let state = self.shared.state.lock().unwrap();
        format!("{:?} {}", state.heads, Value::from(state.commands.clone()))
    }

    /// Names of the sessions that nobody has destroyed yet.
    pub(crate) fn open_sessions(&self) -> Vec<String> {
        self.shared.state.lock().unwrap().sessions.keys().cloned().collect()
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let serve = converse(stream, shared.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move { drop(serve.await) }));
    }
}

async fn converse(stream: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    let socket = socket_of(&stream);
    let mut wire = Wire::new(stream).above(socket);
    while let Some(head) = wire.head().await? {
        shared.state.lock().unwrap().heads.push(head.clone());
        let body = wire.body(Framing::of_request(&head)).await?.bytes;
        match (head.word(0), head.word(1)) {
            ("GET", "/health") => reply(&mut wire, 200, shared.case("health_GET_/health")).await?,
            ("GET", "/") => reply(&mut wire, 200, shared.case("index_GET_/")).await?,
            ("POST", "/v1") => command(&mut wire, &head, &body, &shared).await?,
            ("POST", _) => reply(&mut wire, 404, shared.case("POST_/v1/")).await?,
            _ => reply(&mut wire, 405, shared.case("GET_/v1")).await?,
        }
    }
    Ok(())
}

async fn reply(wire: &mut Wire, status: u16, json: Value) -> io::Result<()> {
    send(wire, status, json.to_string().as_bytes()).await
}

async fn send(wire: &mut Wire, status: u16, body: &[u8]) -> io::Result<()> {
    send_with(wire, status, &[], body).await
}

async fn send_with(
    wire: &mut Wire,
    status: u16,
    more: &[(String, String)],
    body: &[u8],
) -> io::Result<()> {
    let mut fields = vec![
        ("Content-Length".to_owned(), body.len().to_string()),
        ("Content-Type".to_owned(), "application/json".to_owned()),
        ("Server".to_owned(), "waitress".to_owned()),
    ];
    fields.extend_from_slice(more);
    wire.try_send(message(&format!("HTTP/1.1 {status} Said"), &fields, body)).await
}

async fn command(
    wire: &mut Wire,
    head: &Head,
    body: &[u8],
    shared: &Arc<Shared>,
) -> io::Result<()> {
    let is_json =
        head.value("content-type").is_some_and(|value| value.starts_with("application/json"));
    if !is_json {
        return reply(wire, 500, shared.case("no_content_type")).await;
    }
    let Ok(request) = serde_json::from_slice::<Value>(body) else {
        return reply(wire, 500, shared.case("invalid_json")).await;
    };
    shared.state.lock().unwrap().commands.push(request.clone());
    match request["cmd"].as_str() {
        Some("request.get") => solve(wire, &request, shared).await,
        Some("sessions.create") => create_session(wire, &request, shared).await,
        Some("sessions.destroy") => destroy_session(wire, &request, shared).await,
        Some("sessions.list") => reply(wire, 200, shared.case("sessions_list_empty")).await,
        _ => reply(wire, 500, shared.case("bad_cmd")).await,
    }
}

/// The session that a command names.
fn session(request: &Value) -> String {
    request["session"].as_str().unwrap_or_default().to_owned()
}

async fn create_session(wire: &mut Wire, request: &Value, shared: &Shared) -> io::Result<()> {
    let name = session(request);
    let made = shared.state.lock().unwrap().sessions.insert(name.clone(), false).is_none();
    let case = if made { "sessions_create" } else { "sessions_create_again" };
    let mut created = shared.case(case);
    created["session"] = Value::String(name);
    reply(wire, 200, created).await
}

async fn destroy_session(wire: &mut Wire, request: &Value, shared: &Shared) -> io::Result<()> {
    let was_there = shared.state.lock().unwrap().sessions.remove(&session(request)).is_some();
    if was_there {
        reply(wire, 200, shared.case("sessions_destroy")).await
    } else {
        reply(wire, 500, shared.case("sessions_destroy_missing")).await
    }
}

/// Counts a solve as in flight while it lives.
struct InFlight(Arc<Shared>);

impl InFlight {
    fn new(shared: &Arc<Shared>) -> Self {
        let mut state = shared.state.lock().unwrap();
        state.in_flight += 1;
        state.most_in_flight = state.most_in_flight.max(state.in_flight);
        drop(state);
        shared.solves.send_modify(|solves| *solves += 1);
        Self(shared.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().in_flight -= 1;
    }
}

async fn solve(wire: &mut Wire, request: &Value, shared: &Arc<Shared>) -> io::Result<()> {
    let _in_flight = InFlight::new(shared);
    // A real solve lasts too: runs that were to overlap shall be seen to.
    tokio::time::sleep(Duration::from_millis(30)).await;
    let _ = shared.paused.subscribe().wait_for(|&paused| !paused).await;
    match shared.end_of(request) {
        Mode::Solves => reply(wire, 200, shared.solved("Bearer%20{}")).await,
        Mode::Cookie(value) => reply(wire, 200, shared.solved(&value)).await,
        Mode::Cookies(cookies) => reply(wire, 200, shared.solved_with(&cookies)).await,
        Mode::WithPage(bytes) => {
            let mut solved = shared.solved("Bearer%20{}");
            solved["solution"]["response"] = Value::String("p".repeat(bytes));
            reply(wire, 200, solved).await
        }
        Mode::NoCookie | Mode::Late(_) | Mode::OneOf(_) => {
            reply(wire, 200, shared.case("no_cookie_page")).await
        }
        Mode::Error => reply(wire, 500, shared.case("challenge_unsolved_maxTimeout8000")).await,
        Mode::ErrorAs200 => reply(wire, 200, shared.case("access_denied")).await,
        Mode::NullSolution => {
            reply(wire, 200, json!({"status": "ok", "message": "", "solution": null})).await
        }
        Mode::Garbage => send(wire, 200, b"<html>502 Bad Gateway</html>").await,
        Mode::Broken(bytes, end) => {
            wire.try_send(bytes).await?;
            wire.end(end).await
        }
        Mode::HangsUp => Err(io::ErrorKind::ConnectionReset.into()),
        Mode::Never => wire.until_end().await.map(drop),
        Mode::Endless(bytes) => send(wire, 200, &vec![b' '; bytes]).await,
        Mode::Busy(rest) => {
            let rest = ("Retry-After".to_owned(), rest.to_owned());
            send_with(wire, 429, &[rest], br#"{"detail":"too many requests"}"#).await
        }
    }
}

impl Shared {
    /// What the solve that `request` asks for ends in.
    fn end_of(&self, request: &Value) -> Mode {
        let mut state = self.state.lock().unwrap();
        match state.mode.clone() {
            Mode::Late(end) => match state.sessions.get_mut(&session(request)) {
                Some(waited) if *waited => *end,
                Some(waited) => {
                    *waited = request["waitInSeconds"].as_u64().is_some_and(|seconds| seconds > 0)
                        && request.get("returnOnlyCookies").is_none();
                    Mode::NoCookie
                }
                None => Mode::NoCookie,
            },
            Mode::OneOf(modes) => fastrand::choice(modes).expect("a mode"),
            mode => mode,
        }
    }

    /// The recorded body of a case.
    fn case(&self, name: &str) -> Value {
        let json = &self.replies["cases"][name]["json"];
        assert!(json.is_object(), "no recorded case {name}");
        json.clone()
    }

    /// The recorded success with this value in the cookie.
    fn solved(&self, value: &str) -> Value {
        let mut reply = self.case("ok_returnOnlyCookies");
        let cookies = reply["solution"]["cookies"].as_array_mut().unwrap();
        let cookie = cookies.iter_mut().find(|cookie| cookie["name"] == "access-token").unwrap();
        cookie["value"] = Value::String(self.fill(value));
        reply
    }

    fn solved_with(&self, cookies: &[(String, String, String)]) -> Value {
        let mut reply = self.case("ok_returnOnlyCookies");
        let cookies = cookies.iter().map(|(name, path, value)| {
            json!({"domain": "www.chitai-gorod.ru", "httpOnly": false, "name": name, "path": path,
                   "sameSite": "Lax", "secure": false, "value": self.fill(value)})
        });
        reply["solution"]["cookies"] = cookies.collect();
        reply
    }

    fn fill(&self, value: &str) -> String {
        if value.contains("{}") {
            value.replace("{}", &self.tokens.issue())
        } else {
            value.to_owned()
        }
    }
}
