//! Each bound is kept, answers quickly, counts, and lets go again.

use std::time::Duration;

use futures_util::future::{join, join_all};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::Instant;

use crate::routes::check_is_made_here;
use crate::support::alias::with_a_dead_resolver;
use crate::support::client::{API, Request, Way};
use crate::support::http::{Framing, Response, Wire};
use crate::support::{Stage, World, until};

const PATH: &str = "/web/api/v2/x";

/// Files that the sidecar may open where they shall run out.
const FILES: u64 = 128;

/// Starts the sidecar with room for `FILES` files.
async fn with_few_files(stage: Stage) -> World {
    let files = FILES.to_string();
    let script = "ulimit -n \"$1\" && shift && exec \"$@\"";
    let world = stage.launch_by(&["sh", "-c", script, "sh", &files]).await;
    world.sidecar.ready().await;
    world
}

/// How often this was logged at this level.
fn logged(world: &World, level: &str, message: &str) -> usize {
    let same = |event: &serde_json::Value| event["level"] == level && event["message"] == message;
    world.sidecar.events().iter().filter(|event| same(event)).count()
}

/// How often this bound turned something away.
pub(crate) async fn limited(world: &World, limit: &str) -> f64 {
    let label = format!("limit=\"{limit}\"");
    world.sidecar.metric("sidecar_limited_total", &[&label]).await
}

/// The answer of a sidecar that is full, and says of what.
fn check_is_turned_away(response: &Response, message: &str, remedy: &str) {
    check_is_full(response);
    let body = response.json();
    assert_eq!(body["message"], message);
    let hint = body["hint"].as_str().unwrap_or_default();
    assert!(hint.contains(remedy), "{hint}");
    assert_eq!(response.value("connection"), Some("close"));
}

/// The log says of so many clients that they ran into this bound.
async fn check_turned_away(world: &World, limit: &str, count: usize) {
    let is_one = |event: &serde_json::Value| {
        (&event["level"], &event["message"], &event["limit"])
            == (&"DEBUG".into(), &"client turned away".into(), &limit.into())
    };
    let told = || world.sidecar.events().iter().filter(|event| is_one(event)).count();
    until(&format!("{count} in the log"), async || told() >= count).await;
    assert_eq!(told(), count, "{limit}");
}

/// The answer of a sidecar that is full.
fn check_is_full(response: &Response) {
    let seen = (response.status, response.code());
    assert_eq!(seen, (503, "too_many_connections".into()), "{response:?}");
    assert_eq!(response.value("retry-after"), Some("1"), "{response:?}");
    check_is_made_here(response);
}

/// Opens connections until one is refused: those that were not, and the answer.
async fn fill(world: &World) -> (Vec<Wire>, Response) {
    let mut open = Vec::new();
    for _ in 0..FILES {
        let mut wire = world.wire().await;
        // Whoever is in is answered, whoever is not is told so.
        wire.send(format!("GET {PATH} HTTP/1.1\r\nHost: sidecar\r\n\r\n")).await;
        let response = wire.response("GET").await;
        if response.status != 200 {
            return (open, response);
        }
        open.push(wire);
    }
    panic!("{FILES} clients in {FILES} files");
}

const SHORT: &str = "accepting no clients for now";
const OVER: &str = "accepting clients again";

#[tokio::test]
async fn last_files_are_for_the_clients_that_are_in() {
    let world = with_few_files(Stage::new().await).await;
    let mut first = world.open(Way::Intercept).await;
    let (open, refused) = fill(&world).await;
    let message = "the last open files of the sidecar are for the clients that are in";
    check_is_turned_away(&refused, message, "limit of open files");
    check_turned_away(&world, "descriptors", 1).await;
    assert!(open.len() > 20, "{}", open.len());
    assert_eq!(first.get(PATH).await.status, 200, "it was in");
    world.origin.drop_idle_connections().await;
    assert_eq!(first.get(PATH).await.status, 200, "with a new connection to the shop");
    assert_eq!(world.sidecar.ask("GET", "/ready").await.status, 200, "the admin port is served");
    assert!(limited(&world, "descriptors").await > 0.5);
    drop(open);
    let freed = Instant::now();
    until("a new client to be served", async || world.get(PATH).await.status == 200).await;
    assert!(freed.elapsed() < Duration::from_secs(2), "{:?}", freed.elapsed());
    until("the end of the shortage", async || logged(&world, "INFO", OVER) == 1).await;
    assert_eq!(logged(&world, "WARN", SHORT), 1);
}

/// Uses up the last files, too, by the tunnels of clients that are in.
async fn exhaust(world: &World, peer: &TcpListener) -> (Vec<Wire>, Response) {
    let (mut open, _) = fill(world).await;
    let target = peer.local_addr().unwrap();
    let connect = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
    for wire in &mut open {
        wire.send(&connect).await;
        let (head, _) = wire.response_head().await.unwrap();
        if head.word(1) == "200" {
            continue;
        }
        let framing = Framing::of_response(&head, "CONNECT");
        let body = wire.body(framing).await.unwrap().bytes;
        let status = head.word(1).parse().unwrap();
        let refused = Response { status, head, body, trailers: vec![], interim: vec![], framing };
        return (open, refused);
    }
    panic!("{} tunnels in {FILES} files", open.len());
}

#[tokio::test]
async fn want_of_files_is_told_as_the_sidecars_own_and_ends_with_it() {
    let peer = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut stage = Stage::new().await;
    stage.set("ALLOW_HOSTS", "127.0.0.0/8");
    let world = with_few_files(stage).await;
    let mut first = world.open(Way::Intercept).await;
    assert_eq!(first.get(PATH).await.status, 200);
    let (open, refused) = exhaust(&world, &peer).await;
    check_is_full(&refused);
    let message = refused.json()["message"].as_str().unwrap_or_default().to_owned();
    assert!(message.contains("the sidecar is at its own limit of open files"), "{message}");
    assert_eq!(first.get(PATH).await.status, 200, "by a connection that stands");
    // Nobody can be accepted now: the client waits, and the log does not fill.
    let mut waiting = world.wire().await;
    waiting.send(format!("GET {PATH} HTTP/1.1\r\nHost: sidecar\r\n\r\n")).await;
    let silence = tokio::time::timeout(Duration::from_millis(500), waiting.exactly(1)).await;
    assert!(silence.is_err(), "{silence:?}");
    assert_eq!((logged(&world, "WARN", SHORT), logged(&world, "INFO", OVER)), (1, 0));
    drop(open);
    let freed = Instant::now();
    assert_eq!(waiting.response("GET").await.status, 200, "it was only late");
    assert!(freed.elapsed() < Duration::from_secs(1), "{:?}", freed.elapsed());
    assert_eq!(world.get(PATH).await.status, 200);
    until("the end of the shortage", async || logged(&world, "INFO", OVER) == 1).await;
    assert_eq!(logged(&world, "WARN", SHORT), 1);
    assert!(limited(&world, "descriptors").await > 1.5, "a dial and an accept at least");
}

#[tokio::test]
async fn limit_of_files_that_is_too_low_is_told_at_the_start() {
    let mut stage = Stage::new().await;
    stage.set("MAX_CONNECTIONS", "1000");
    let world = with_few_files(stage).await;
    let message = "the limit of open files is too low for MAX_CONNECTIONS; raise it, or lower that";
    let events = world.sidecar.events();
    let told: Vec<_> = events.iter().filter(|event| event["message"] == message).collect();
    assert_eq!(told.len(), 1);
    assert_eq!(told[0]["level"], "WARN");
    assert_eq!(told[0]["limit"], FILES);
    assert_eq!((&told[0]["needed"], &told[0]["clients"]), (&2256.into(), &1000.into()));
}

#[tokio::test]
async fn soft_limit_of_files_is_raised_as_far_as_it_goes() {
    let mut stage = Stage::new().await;
    stage.set("MAX_CONNECTIONS", "100");
    let script = "ulimit -Sn 64 && ulimit -Hn 512 && exec \"$@\"";
    let world = stage.launch_by(&["sh", "-c", script, "sh"]).await;
    let _open =
        futures_util::future::join_all((0..90).map(|_| TcpStream::connect(world.sidecar.proxy())))
            .await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert!(!world.sidecar.log().contains("the limit of open files"));
}

/// Sends a request at once, as a client does that knows of no limit. One that is turned away can
/// read the whole answer and go on writing: a reset would have cut both short.
async fn ask_at_once(mut wire: Wire) -> Response {
    let head = format!("POST {PATH} HTTP/1.1\r\nHost: sidecar\r\nContent-Length: 60000\r\n\r\n");
    let half = vec![b'x'; 30_000];
    wire.send([head.as_bytes(), &half[..]].concat()).await;
    let (head, interim) = wire.response_head().await.unwrap();
    let framing = Framing::of_response(&head, "POST");
    let body = wire.body(framing).await.unwrap().bytes;
    assert!(wire.closed().await.is_empty());
    wire.send(&half).await;
    let status = head.word(1).parse().unwrap();
    Response { status, head, body, trailers: vec![], interim, framing }
}

/// A connection from this address of loopback.
pub(crate) async fn wire_from(world: &World, address: &str) -> Wire {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(format!("{address}:0").parse().unwrap()).unwrap();
    Wire::new(socket.connect(world.sidecar.proxy()).await.unwrap())
}

#[tokio::test]
async fn client_beyond_max_connections_is_told_and_closed_until_one_leaves() {
    let world = World::with(&[("MAX_CONNECTIONS", "2")]).await;
    let mut open = [world.open(Way::Gateway).await, world.open(Way::Intercept).await];
    for session in &mut open {
        assert_eq!(session.get(PATH).await.status, 200);
    }
    // Many times: a reset that overtakes the answer would not show each time.
    for number in 1..=30_usize {
        let response = ask_at_once(world.wire().await).await;
        let message = "the sidecar has as many clients as MAX_CONNECTIONS lets in";
        check_is_turned_away(&response, message, "raise MAX_CONNECTIONS");
        check_turned_away(&world, "connections", number).await;
        let number = u32::try_from(number).unwrap();
        assert!((limited(&world, "connections").await - f64::from(number)).abs() < 0.5);
    }
    let [first, mut second] = open;
    assert_eq!(second.get(PATH).await.status, 200, "who is in stays in");
    drop(first);
    until("a place", async || world.get(PATH).await.status == 200).await;
    assert!(limited(&world, "client_connections").await < 0.5);
}

#[tokio::test]
async fn client_with_too_many_connections_is_told_and_others_are_served() {
    let world = World::with(&[("MAX_CLIENT_CONNECTIONS", "1")]).await;
    let _open = world.wire().await;
    let message = "this address has as many connections as MAX_CLIENT_CONNECTIONS lets it have";
    let response = ask_at_once(world.wire().await).await;
    check_is_turned_away(&response, message, "raise MAX_CLIENT_CONNECTIONS");
    check_turned_away(&world, "client_connections", 1).await;
    let mut other = wire_from(&world, "127.0.0.2").await;
    other.send(format!("GET {PATH} HTTP/1.1\r\nHost: sidecar\r\n\r\n")).await;
    assert_eq!(other.response("GET").await.status, 200);
    assert!((limited(&world, "client_connections").await - 1.0).abs() < 0.5);
    assert!(limited(&world, "connections").await < 0.5);
}

#[tokio::test]
async fn client_of_another_network_is_closed_without_a_word() {
    let world = World::with(&[("CLIENT_NETWORKS", "127.0.0.2,192.0.2.0/24")]).await;
    for number in 1..=3 {
        let begun = Instant::now();
        assert!(world.wire().await.closed().await.is_empty());
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        assert!((limited(&world, "client_networks").await - f64::from(number)).abs() < 0.5);
    }
    let mut other = wire_from(&world, "127.0.0.2").await;
    other.send(format!("GET {PATH} HTTP/1.1\r\nHost: sidecar\r\n\r\n")).await;
    assert_eq!(other.response("GET").await.status, 200);
}

/// Names that a client wants to reach while none is found.
const LOST_NAMES: usize = 120;

#[tokio::test]
async fn names_that_clients_give_leave_room_for_the_apis() {
    let mut stage = Stage::new().await;
    // By the hosts file, so without the resolver, but by a thread as any name.
    stage.set("CONNECT_TO", format!("{API}:443=localhost:{}", stage.origin.addr().port()));
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let Some((runner, _dns)) = with_a_dead_resolver(&stage).await else {
        return;
    };
    let runner: Vec<&str> = runner.iter().map(String::as_str).collect();
    let world = stage.launch_by(&runner).await;
    world.sidecar.ready().await;
    let begun = Instant::now();
    let lost = (0..LOST_NAMES).map(|number| {
        let world = &world;
        async move { world.connect(&format!("lost-{number}.test:443")).await.0 }
    });
    let api = async {
        until("the names to be full", async || limited(&world, "lookups").await > 0.5).await;
        for way in [Way::AbsoluteHttp, Way::Intercept, Way::Gateway, Way::AbsoluteHttps] {
            world.origin.drop_idle_connections().await;
            assert_eq!(world.call(way, &Request::get(PATH)).await.status, 200);
        }
        begun.elapsed()
    };
    let (answers, took) = join(join_all(lost), api).await;
    assert!(took < Duration::from_secs(4), "the API waited for the names of others: {took:?}");
    let refused = || answers.iter().filter(|answer| answer.status == 503);
    let count = u32::try_from(refused().count()).unwrap();
    assert!(count as usize >= LOST_NAMES - 24, "{count}");
    for answer in refused() {
        check_is_full(answer);
        let message = answer.json()["message"].to_string();
        assert!(message.contains("too many names are being looked up"), "{message}");
    }
    assert!((limited(&world, "lookups").await - f64::from(count)).abs() < 0.5);
}
