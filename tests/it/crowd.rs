//! Where the upstream's connections are few, a client that is slow holds none.

use std::time::Duration;

use futures_util::future::{join_all, select_all};
use tokio::time::{Instant, interval};

use crate::support::client::{API, Request, Session, Way};
use crate::support::http::{Response, chunk, last_chunk};
use crate::support::{World, until};

const ECHO: &str = "/web/api/v2/echo";

async fn world(connections: &str) -> World {
    World::with(&[("WORKERS", "1"), ("UPSTREAM_CONNECTIONS", connections)]).await
}

/// An upload of which the end is missing.
async fn begin_upload(world: &World) -> Session {
    let mut session = world.open(Way::Intercept).await;
    let head = format!("POST {ECHO} HTTP/1.1\r\nHost: {API}\r\nContent-Length: 8\r\n\r\nhalf");
    session.wire.send(head).await;
    session
}

#[tokio::test]
async fn slow_uploads_leave_connections_to_others() {
    let world = world("4").await;
    let mut uploads = Vec::new();
    for _ in 0..8 {
        uploads.push(begin_upload(&world).await);
    }
    until("the first uploads", async || world.origin.requests().len() == 2).await;
    for _ in 0..5 {
        assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    }
    assert_eq!(world.origin.requests().len(), 7, "uploads that took more than half");
    for upload in &mut uploads {
        upload.wire.send("half").await;
        let response = upload.wire.response("POST").await;
        assert_eq!((response.status, response.text().as_str()), (200, "halfhalf"));
    }
}

/// An upload too large to be kept, of which a byte comes now and then; what is answered, if it is
/// not let go on.
async fn trickle(world: &World) -> Response {
    let mut session = world.open(Way::Intercept).await;
    let head = format!("POST {ECHO} HTTP/1.1\r\nHost: {API}\r\nContent-Length: 9000000\r\n\r\n");
    session.wire.send(head).await;
    let mut ticks = interval(Duration::from_millis(200));
    let response = loop {
        ticks.tick().await;
        session.wire.send("x").await;
        if session.wire.speaks_within(Duration::ZERO).await {
            break session.wire.response("POST").await;
        }
    };
    session.wire.closed().await;
    response
}

async fn all_connections_are_taken(world: &World) {
    until("all connections to be taken", async || {
        let active = &["state=\"active\""];
        world.sidecar.metric("sidecar_upstream_connections", active).await > 3.5
    })
    .await;
}

async fn limited(world: &World, limit: &str) -> f64 {
    let label = format!("limit=\"{limit}\"");
    world.sidecar.metric("sidecar_limited_total", &[&label]).await
}

#[tokio::test]
async fn uploads_too_large_to_be_read_ahead_give_way_where_they_trickle() {
    let world = world("4").await;
    let others = async {
        all_connections_are_taken(&world).await;
        join_all((0..4).map(|_| world.get("/web/api/v2/x"))).await
    };
    let uploads = (0..4).map(|_| Box::pin(trickle(&world)));
    let ((upload, _, _), others) = tokio::join!(select_all(uploads), others);
    assert!(others.iter().all(|other| other.status == 200), "{others:?}");
    let seen = (upload.status, upload.code());
    assert_eq!(seen, (408, "bad_request".into()), "{upload:?}");
    assert_eq!(upload.value("connection"), Some("close"));
    assert!(limited(&world, "body_stall").await > 0.5);
}

#[tokio::test]
async fn answers_that_nobody_takes_give_way() {
    let world = world("4").await;
    let mut readers = Vec::new();
    for _ in 0..4 {
        let mut session = world.open(Way::Intercept).await;
        session.send(&Request::get("/web/api/v2/big/30000000")).await;
        readers.push(session);
    }
    all_connections_are_taken(&world).await;
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    assert!(limited(&world, "answer_stall").await > 0.5);
    let ends = readers.iter_mut().map(|reader| reader.wire.try_response("GET"));
    let ends = join_all(ends).await;
    let cut = ends.iter().filter(|end| end.is_err()).count();
    assert_eq!(cut, 1, "one was enough, and does not look whole");
}

#[tokio::test]
async fn slow_upload_that_nobody_waits_behind_goes_on() {
    let world = World::with(&[("WORKERS", "1"), ("UPSTREAM_CONNECTIONS", "2")]).await;
    let upload = async {
        let mut session = world.open(Way::Intercept).await;
        let head =
            format!("POST {ECHO} HTTP/1.1\r\nHost: {API}\r\nContent-Length: 9000000\r\n\r\n");
        session.wire.send(head).await;
        session.wire.speaks_within(Duration::from_secs(12)).await
    };
    let spoke = tokio::select! {
        spoke = upload => spoke,
        () = async { loop { assert_eq!(world.get("/web/api/v2/x").await.status, 200); } } => true,
    };
    assert!(!spoke, "it was not cut off");
    assert!(limited(&world, "body_stall").await < 0.5);
}

#[tokio::test]
async fn body_that_was_read_ahead_is_whole_and_can_be_sent_again() {
    let large = vec![b'x'; 100_000];
    let world = world("1").await;
    let mut first = world.open(Way::Gateway).await;
    first.send(&Request::get("/web/api/v2/gate/x")).await;
    world.origin.arrived(1).await;
    world.kill_token();
    let mut session = world.open(Way::Intercept).await;
    let head = format!(
        "POST {ECHO} HTTP/1.1\r\nHost: {API}\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\nTrailer: X-Sum\r\n\r\n"
    );
    session.wire.send(head).await;
    session.wire.send(chunk(b"first ")).await;
    session.wire.send(chunk(&large)).await;
    session.wire.send(last_chunk(&[("X-Sum", "1")])).await;
    world.origin.open_gate();
    let response = session.wire.response("POST").await;
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(response.body, [&b"first "[..], &large].concat());
    assert_eq!(response.trailers, [("x-sum".to_owned(), "1".to_owned())]);
    assert_eq!(world.origin.requests_for(ECHO).len(), 2);
}

#[tokio::test]
async fn body_too_large_for_memory_streams_on() {
    let variables =
        [("WORKERS", "1"), ("UPSTREAM_CONNECTIONS", "1"), ("REPLAY_BODY_LIMIT", "10KiB")];
    let world = World::with(&variables).await;
    let mut first = world.open(Way::Gateway).await;
    first.send(&Request::get("/web/api/v2/gate/x")).await;
    world.origin.arrived(1).await;
    let body = vec![b'y'; 300_000];
    let mut session = world.open(Way::Intercept).await;
    let chunks: Vec<&[u8]> = body.chunks(4000).collect();
    session.send(&Request::new("POST", ECHO).chunked(&chunks, &[])).await;
    world.origin.open_gate();
    let response = session.wire.response("POST").await;
    assert_eq!(response.status, 200);
    assert!(response.body == body);
}

#[tokio::test]
async fn request_that_waited_for_a_connection_carries_the_token_of_its_sending() {
    let variables =
        [("WORKERS", "1"), ("UPSTREAM_CONNECTIONS", "1"), ("REPLAY_BODY_LIMIT", "1KiB")];
    let world = World::with(&variables).await;
    let mut first = world.open(Way::Gateway).await;
    first.send(&Request::get("/web/api/v2/gate/x")).await;
    world.origin.arrived(1).await;
    let (mut get, mut post) = (world.open(Way::Intercept).await, world.open(Way::Gateway).await);
    get.send(&Request::get("/web/api/v2/get")).await;
    // Too large to be kept: it could not be sent again.
    post.send(&Request::post("/web/api/v2/post", vec![b'x'; 5000])).await;
    // The only worker answers this after it has seen those.
    assert_eq!(
        world.raw("GET /.well-known/token-sidecar/ca.pem HTTP/1.1\r\nHost: x\r\n\r\n").await.status,
        200
    );
    world.kill_token();
    assert_eq!(world.sidecar.ask("POST", "/refresh").await.status, 200);
    world.origin.open_gate();
    assert_eq!(get.wire.response("GET").await.status, 200);
    assert_eq!(post.wire.response("POST").await.status, 200);
    for path in ["/web/api/v2/get", "/web/api/v2/post"] {
        assert_eq!(world.origin.requests_for(path).len(), 1, "{path} was sent in vain");
    }
}

#[tokio::test]
async fn upload_that_stops_before_it_is_read_is_told_in_time() {
    let variables = [("WORKERS", "1"), ("UPSTREAM_CONNECTIONS", "1"), ("UPSTREAM_TIMEOUT", "2s")];
    let world = World::with(&variables).await;
    let mut first = world.open(Way::Gateway).await;
    first.send(&Request::get("/web/api/v2/events/600000")).await;
    first.wire.response_head().await.unwrap();
    let began = Instant::now();
    let mut upload = begin_upload(&world).await;
    let response = upload.wire.response("POST").await;
    assert_eq!((response.status, response.code()), (408, "bad_request".into()), "{response:?}");
    assert!(began.elapsed() < Duration::from_millis(3500), "{:?}", began.elapsed());
}

#[tokio::test]
async fn get_with_a_chunked_body_keeps_it() {
    let world = World::start().await;
    for way in Way::ALL {
        let request = Request::new("GET", ECHO).chunked(&[b"{\"page\"", b": 1}"], &[]);
        let response = world.call(way, &request).await;
        assert_eq!((response.status, response.text().as_str()), (200, "{\"page\": 1}"), "{way:?}");
    }
}
