//! Where the upstream's connections are few, a client that gives its body slowly holds none.

use crate::support::client::{API, Request, Session, Way};
use crate::support::http::{chunk, last_chunk};
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
    until("the first uploads", async || world.origin.requests().len() == 3).await;
    for _ in 0..5 {
        assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    }
    assert_eq!(world.origin.requests().len(), 8, "uploads that took the last connection");
    for upload in &mut uploads {
        upload.wire.send("half").await;
        let response = upload.wire.response("POST").await;
        assert_eq!((response.status, response.text().as_str()), (200, "halfhalf"));
    }
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
async fn get_with_a_chunked_body_keeps_it() {
    let world = World::start().await;
    for way in Way::ALL {
        let request = Request::new("GET", ECHO).chunked(&[b"{\"page\"", b": 1}"], &[]);
        let response = world.call(way, &request).await;
        assert_eq!((response.status, response.text().as_str()), (200, "{\"page\": 1}"), "{way:?}");
    }
}
