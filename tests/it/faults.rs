//! What goes wrong at the shop and at the solver, at each stage: the client is told whose fault it
//! was and in time, nobody is shown the token, and nothing is left behind.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use socket2::{Domain, Socket, Type};
use tokio::net::TcpSocket;
use tokio::time::{Instant, timeout};

use crate::routes::check_is_made_here;
use crate::support::certificates::TestCa;
use crate::support::client::{API, GATE};
use crate::support::http::{End, Response, Wire};
use crate::support::origin::{Greeting, Origin};
use crate::support::solver::Mode;
use crate::support::{Stage, World, nobody, until, until_within};

const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
const UPSTREAM_TIMEOUT: Duration = Duration::from_millis(700);

/// What a busy machine may add to a time-out.
const SLACK: Duration = Duration::from_secs(4);

/// How long idle upstream connections are kept, and a look at them.
const IDLE: Duration = Duration::from_secs(30 + 5);

/// An API host that nobody can connect to.
const FULL: &str = "other.test";

/// The ways to an API host that meet its faults in code of their own.
const WAYS: [Way; 3] = [Way::Intercept, Way::Absolute, Way::Gateway];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// CONNECT, then TLS.
    Intercept,
    Absolute,
    Gateway,
}

/// What the client gets.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// An answer made by the sidecar: status and code.
    Answer(u16, &'static str),
    /// An answer whose body breaks off for all to see.
    Break,
}

use Expected::{Answer, Break};

/// What the shop says to a request, how it leaves the connection, and what follows.
type Case = (&'static str, End, Expected);

const PROTOCOL: Expected = Answer(502, "upstream_protocol");
const SILENT: Expected = Answer(504, "upstream_timeout");
const UNREACHABLE: Expected = Answer(502, "upstream_unreachable");
const UNTRUSTED: Expected = Answer(502, "upstream_tls");

/// Faults that show at once.
const QUICK: [Case; 24] = [
    ("", End::Reset, PROTOCOL),
    ("", End::Cut, PROTOCOL),
    ("", End::Close, PROTOCOL),
    ("HTTP/1.1 200 OK\r\nContent-Le", End::Reset, PROTOCOL),
    ("HTTP/1.1 200 OK\r\nContent-Le", End::Cut, PROTOCOL),
    ("HTTP/1.1 200 OK\r\nContent-Le", End::Close, PROTOCOL),
    ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n", End::Close, PROTOCOL),
    ("HTTP/1.1 100 Continue\r\n\r\n", End::Close, PROTOCOL),
    ("SSH-2.0-OpenSSH_9.2\r\n", End::Stall, PROTOCOL),
    ("\0\u{1}\u{2}\u{7f}\r\n\r\n", End::Stall, PROTOCOL),
    ("HTTP/2.0 200 OK\r\n\r\n", End::Stall, PROTOCOL),
    ("HTTP/1.1 20 OK\r\n\r\n", End::Stall, PROTOCOL),
    ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", End::Stall, PROTOCOL),
    ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", End::Stall, PROTOCOL),
    ("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", End::Reset, Break),
    ("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", End::Reset, Break),
    ("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", End::Cut, Break),
    ("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", End::Close, Break),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", End::Close, Break),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhalf", End::Close, Break),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", End::Close, Break),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", End::Reset, Break),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nzz\r\n", End::Stall, Break),
    ("HTTP/1.1 200 OK\r\n\r\nuntil the end", End::Reset, Break),
];

/// Only TLS tells such an end from the true one.
const CUT_BEFORE_THE_END: Case = ("HTTP/1.1 200 OK\r\n\r\nuntil the end", End::Cut, Break);

/// Silence, for which there are limits.
const STALLS: [Case; 2] =
    [("", End::Stall, SILENT), ("HTTP/1.1 200 OK\r\nContent-Le", End::Stall, SILENT)];

const STALLS_IN_THE_BODY: [Case; 4] = [
    ("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", End::Stall, Break),
    ("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", End::Stall, Break),
    ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", End::Stall, Break),
    ("HTTP/1.1 200 OK\r\n\r\nuntil an end that never comes", End::Stall, Break),
];

/// A sidecar with short time-outs. Nobody listens at [`GATE`], and at [`FULL`] nobody accepts.
struct Matrix {
    world: World,
    elsewhere: Origin,
    full: (Socket, Vec<std::net::TcpStream>, SocketAddr),
    nobody: (TcpSocket, SocketAddr),
}

impl Matrix {
    async fn start() -> Self {
        let mut stage = Stage::new().await;
        let elsewhere = Origin::start_other(None).await;
        let full = full_listener();
        let addr = full.2;
        let (nobody, port) = (nobody(), stage.origin.addr().port());
        stage.set("CONNECT_TIMEOUT", "500ms");
        stage.set("UPSTREAM_TIMEOUT", "700ms");
        stage.set(
            "API_ORIGINS",
            format!("https://{API}/web/api,https://{GATE}/api,https://{FULL}/full"),
        );
        stage.set(
            "CONNECT_TO",
            format!("{API}:443=127.0.0.1:{port},{GATE}:443={},{FULL}:443={addr}", nobody.1),
        );
        stage.set("ALLOW_HOSTS", "127.0.0.1");
        let world = stage.start().await;
        Self { world, elsewhere, full, nobody }
    }

    /// One GET of `path` at `host` on a connection of its own.
    async fn get(&self, way: Way, host: &str, path: &str) -> io::Result<Response> {
        let (mut wire, target) = match way {
            Way::Intercept => {
                let tunnel = self.world.tunnel(&format!("{host}:443")).await;
                (self.world.tls_over(tunnel, host).await, path.to_owned())
            }
            Way::Absolute => (self.world.wire().await, format!("http://{host}{path}")),
            Way::Gateway => (self.world.wire().await, path.to_owned()),
        };
        get(&mut wire, &target, host).await
    }

    /// The client gets what it must, by each way, within `limit`.
    async fn check(&self, host: &str, path: &str, expected: Expected, limit: Duration) {
        let calls = WAYS.map(|way| async move {
            let begun = Instant::now();
            let outcome = self.get(way, host, path).await;
            let case = format!("{host}{path} by {way:?}");
            check_outcome(&outcome, expected, &case);
            assert!(begun.elapsed() < limit + SLACK, "{case}: {:?}", begun.elapsed());
        });
        join_all(calls).await;
    }

    /// The same of a host that has nothing to do with the API, over plain HTTP.
    async fn check_elsewhere(&self, path: &str, expected: Expected) {
        let mut wire = self.world.wire().await;
        let host = self.elsewhere.addr().to_string();
        let outcome = get(&mut wire, &format!("http://{host}{path}"), &host).await;
        check_outcome(&outcome, expected, &format!("{host}{path}"));
    }

    /// Scripts these cases at the shop and elsewhere, and returns their paths.
    fn script(&self, cases: &[Case]) -> Vec<(String, Expected)> {
        let script = |(index, (bytes, end, expected)): (usize, &Case)| {
            let path = format!("/web/api/v2/fault/{index}/{end:?}");
            self.world.origin.script_to(&path, *bytes, *end);
            self.elsewhere.script_to(&path, *bytes, *end);
            (path, *expected)
        };
        cases.iter().enumerate().map(script).collect()
    }

    /// New connections to the shop meet this from now on, and there are no others.
    async fn greet(&self, greeting: Greeting) {
        self.world.origin.set_greeting(greeting);
        self.world.origin.drop_idle_connections().await;
    }

    async fn check_connections(&self) {
        for (greeting, expected) in [
            (Greeting::Silence, UNREACHABLE),
            (Greeting::HalfHandshake, UNREACHABLE),
            (Greeting::Ends(End::Reset), UNREACHABLE),
            (Greeting::Ends(End::Close), UNREACHABLE),
            (Greeting::PlainText, UNTRUSTED),
        ] {
            self.greet(greeting).await;
            self.check(API, &format!("/web/api/v2/{greeting:?}"), expected, CONNECT_TIMEOUT).await;
        }
        self.greet(Greeting::Usual).await;
        self.check(GATE, "/api/refused", UNREACHABLE, CONNECT_TIMEOUT).await;
        self.check(FULL, "/full/x", UNREACHABLE, CONNECT_TIMEOUT).await;
    }

    async fn check_certificates(&self) {
        let world = &self.world;
        let before = world.origin.all_requests().len();
        for tls in [
            TestCa::new().acceptor(&[API]),
            world.ca.acceptor(&["other.test"]),
            world.ca.acceptor_of_year(&[API], 2020),
            world.ca.acceptor_of_year(&[API], 2090),
        ] {
            world.origin.set_tls(tls);
            world.origin.drop_idle_connections().await;
            self.check(API, "/web/api/v2/untrusted", UNTRUSTED, CONNECT_TIMEOUT).await;
        }
        assert_eq!(world.origin.all_requests().len(), before, "something was said all the same");
        world.origin.set_tls(world.ca.acceptor(&[API, "www.chitai-gorod.ru"]));
    }

    /// A tunnel to where nobody listens, and to where nobody accepts.
    async fn check_tunnels(&self) {
        for addr in [self.nobody.1, self.full.2] {
            let (begun, (response, _)) =
                (Instant::now(), self.world.connect(&addr.to_string()).await);
            check_outcome(&Ok(response), UNREACHABLE, "tunnel");
            assert!(begun.elapsed() < CONNECT_TIMEOUT + SLACK, "{:?}", begun.elapsed());
        }
    }

    /// Everything works, and then nothing is left.
    async fn check_is_as_before(&self, descriptors: usize) {
        let world = &self.world;
        for way in WAYS {
            let response = self.get(way, API, "/web/api/v2/after").await.unwrap();
            assert_eq!(response.status, 200, "{way:?}: {response:?}");
        }
        let idle = world.sidecar.metric("sidecar_upstream_connections", &["idle"]).await;
        assert!(idle > 0.5, "no upstream connection is kept");
        let gone = async |name: &str| world.sidecar.metric(name, &[]).await < 0.5;
        until("no connection", async || gone("sidecar_connections").await).await;
        assert!(gone("sidecar_held").await, "something is held");
        let active = world.sidecar.metric("sidecar_upstream_connections", &["active"]).await;
        assert!(active < 0.5, "{active} upstream connections are in use");
        until_within(IDLE + SLACK, "no upstream connection", async || {
            gone("sidecar_upstream_connections").await
        })
        .await;
        // The question for the figure is a connection of its own.
        until("the descriptors of before", async || world.sidecar.descriptors() <= descriptors)
            .await;
        assert_eq!(world.sidecar.generation().await, 1, "none of this is the token's fault");
        assert_eq!(world.solver.solves(), 0);
    }

    fn check_token_went_nowhere_else(&self) {
        let told = format!("{:?}", self.elsewhere.all_requests());
        assert!(!told.contains(&self.world.token) && !self.elsewhere.all_requests().is_empty());
        assert!(!self.world.solver.everything().contains(&self.world.token));
        assert!(!self.world.sidecar.log().contains(&self.world.token));
    }
}

async fn get(wire: &mut Wire, target: &str, host: &str) -> io::Result<Response> {
    wire.try_send(format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await?;
    wire.try_response("GET").await
}

fn check_outcome(outcome: &io::Result<Response>, expected: Expected, case: &str) {
    match (outcome, expected) {
        (Ok(response), Answer(status, code)) => {
            let got = (response.status, response.code());
            assert_eq!((got.0, got.1.as_str()), (status, code), "{case}: {response:?}");
            check_is_made_here(response);
        }
        // A time-out is the test's own.
        (Err(error), Break) => assert_ne!(error.kind(), io::ErrorKind::TimedOut, "{case}"),
        _ => panic!("{case}: {expected:?}, but {outcome:?}"),
    }
}

/// A listener whose queue is full: no further connection comes about.
fn full_listener() -> (Socket, Vec<std::net::TcpStream>, SocketAddr) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let addr = listener.local_addr().unwrap().as_socket().unwrap();
    let connect = || std::net::TcpStream::connect_timeout(&addr, Duration::from_millis(100)).ok();
    let connections: Vec<_> = std::iter::from_fn(connect).take(16).collect();
    assert!(connections.len() < 16, "the queue has no end");
    (listener, connections, addr)
}

#[tokio::test]
async fn faults_of_the_shop_are_told_in_time_and_leave_nothing_behind() {
    let matrix = Matrix::start().await;
    let descriptors = matrix.world.sidecar.descriptors();
    let quick = matrix.script(&QUICK);
    for (path, expected) in &quick {
        matrix.check(API, path, *expected, Duration::ZERO).await;
        matrix.check_elsewhere(path, *expected).await;
    }
    for (path, expected) in matrix.script(&STALLS) {
        matrix.check(API, &path, expected, UPSTREAM_TIMEOUT).await;
        matrix.check_elsewhere(&path, expected).await;
    }
    matrix.check_connections().await;
    matrix.check_certificates().await;
    matrix.check_tunnels().await;
    matrix.check_token_went_nowhere_else();
    let resident = matrix.world.sidecar.resident();
    for (path, expected) in quick.iter().cycle().take(QUICK.len() * 10) {
        matrix.check(API, path, *expected, Duration::ZERO).await;
    }
    let grown = matrix.world.sidecar.resident().saturating_sub(resident);
    assert!(grown < 8_000_000, "grew by {grown} bytes");
    matrix.check_is_as_before(descriptors).await;
}

#[tokio::test]
async fn answer_by_tls_that_is_cut_is_not_made_to_look_whole() {
    let matrix = Matrix::start().await;
    let [(path, expected)] = &matrix.script(&[CUT_BEFORE_THE_END])[..] else { unreachable!() };
    matrix.check(API, path, *expected, Duration::ZERO).await;
}

#[tokio::test]
async fn answer_that_stalls_in_its_body_is_broken_off_in_time() {
    let matrix = Matrix::start().await;
    for (path, expected) in matrix.script(&STALLS_IN_THE_BODY) {
        matrix.check(API, &path, expected, UPSTREAM_TIMEOUT).await;
        matrix.check_elsewhere(&path, expected).await;
    }
    until("no upstream connection in use", async || {
        matrix.world.sidecar.metric("sidecar_upstream_connections", &["active"]).await < 0.5
    })
    .await;
}

#[tokio::test]
async fn event_stream_may_be_silent_for_longer() {
    let matrix = Matrix::start().await;
    let stream = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n\
        9\r\ndata: 1\n\n\r\n";
    matrix.world.origin.script("/web/api/v2/events", stream, false);
    let mut wire = matrix.world.wire().await;
    wire.send(format!("GET http://{API}/web/api/v2/events HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
    wire.response_head().await.unwrap();
    assert_eq!(wire.chunk().await.unwrap().unwrap(), b"data: 1\n\n");
    let ended = timeout(UPSTREAM_TIMEOUT * 3, wire.chunk()).await;
    assert!(ended.is_err(), "{ended:?}");
}

/// A world whose token has died, in which the solver alone, or the door too, leads to the next.
async fn dying(mode: Mode, door: bool, variables: &[(&str, &str)]) -> World {
    let mut stage = Stage::new().await;
    if !door {
        stage.set("TOKEN_SOURCES", "flaresolverr");
    }
    for (name, value) in variables {
        stage.set(name, value);
    }
    let world = stage.start().await;
    world.solver.set(mode);
    world.kill_token();
    world
}

/// The solver breaks thus: with the door open the client does not notice; without, it is told.
async fn check_solver(mode: Mode) {
    let with_door = async {
        let world = dying(mode.clone(), true, &[]).await;
        assert_eq!(world.get("/web/api/v2/x").await.status, 200, "{mode:?}");
        assert_eq!(world.sidecar.status().await["token"]["source"], "direct", "{mode:?}");
    };
    let without = async {
        let world = dying(mode.clone(), false, &[]).await;
        let descriptors = world.sidecar.descriptors();
        let response = world.get("/web/api/v2/x").await;
        assert_eq!(response.status, 401, "{mode:?}: {response:?}");
        let why = response.value("proxy-status").unwrap_or_default();
        assert!(why.contains("details=\"refresh_failed\""), "{mode:?}: {response:?}");
        assert!(response.value("retry-after").is_some(), "{mode:?}");
        assert!(!world.solver.everything().contains(&world.token), "{mode:?}");
        // The kept connection to the shop is one more; the rest is gone.
        until("the descriptors of before", async || world.sidecar.descriptors() <= descriptors + 1)
            .await;
    };
    tokio::join!(with_door, without);
}

#[tokio::test]
async fn faults_of_the_solver_are_told_and_leave_nothing_behind() {
    for (bytes, end) in [
        ("", End::Reset),
        ("HTTP/1.1 200 OK\r\nContent-Le", End::Reset),
        ("HTTP/1.1 200 OK\r\nContent-Le", End::Close),
        ("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", End::Reset),
        ("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"status\": \"ok\", ", End::Close),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{\"status\": ", End::Close),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", End::Close),
        ("SSH-2.0-OpenSSH_9.2\r\n", End::Close),
        ("\u{15}\u{3}\u{3}\0\u{2}\u{2}\u{28}", End::Close),
    ] {
        check_solver(Mode::Broken(bytes, end)).await;
    }
}

#[tokio::test]
async fn solver_that_is_not_there_is_told() {
    let (_kept, nobody) = nobody();
    let nobody = format!("http://{nobody}");
    let world = dying(Mode::Solves, false, &[("FLARESOLVERR_URL", &nobody)]).await;
    let response = world.get("/web/api/v2/x").await;
    assert_eq!(response.status, 401, "{response:?}");
    assert!(response.value("proxy-status").unwrap().contains("refresh_failed"), "{response:?}");
}

/// The solver stalls: after its patience the door takes over; without one, the hold runs out.
async fn check_stalled_solver(mode: Mode, variables: &[(&str, &str)]) {
    let times = [("SOURCE_PATIENCE", "300ms"), ("HOLD_TIMEOUT", "1500ms")];
    let variables = [&times, variables].concat();
    let with_door = async {
        let world = dying(mode.clone(), true, &variables).await;
        assert_eq!(world.get("/web/api/v2/x").await.status, 200, "{mode:?}");
    };
    let without = async {
        let world = dying(mode.clone(), false, &variables).await;
        let (descriptors, begun) = (world.sidecar.descriptors(), Instant::now());
        let response = world.get("/web/api/v2/x").await;
        let got = (response.status, response.code());
        assert_eq!((got.0, got.1.as_str()), (503, "hold_timeout"), "{mode:?}: {response:?}");
        assert!(response.value("retry-after").is_some(), "{mode:?}");
        assert!(begun.elapsed() < Duration::from_millis(1500) + SLACK, "{:?}", begun.elapsed());
        assert!(world.sidecar.metric("sidecar_held", &[]).await < 0.5, "{mode:?}");
        assert!(!world.solver.everything().contains(&world.token), "{mode:?}");
        // The connection to the shop, and the one that the run still waits on.
        until("the descriptors of before", async || world.sidecar.descriptors() <= descriptors + 2)
            .await;
    };
    tokio::join!(with_door, without);
}

#[tokio::test]
async fn stalls_of_the_solver_cost_no_more_than_their_time() {
    let (_listener, _connections, full) = full_listener();
    let full = format!("http://{full}");
    let stalls = [
        "",
        "HTTP/1.1 200 OK\r\nContent-Le",
        "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"status\": \"ok\", ",
    ];
    for bytes in stalls {
        check_stalled_solver(Mode::Broken(bytes, End::Stall), &[]).await;
    }
    check_stalled_solver(Mode::Solves, &[("FLARESOLVERR_URL", &full)]).await;
}
