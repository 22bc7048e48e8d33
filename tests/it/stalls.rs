//! Messages that stand still have a bound, and whoever let them do so is named.

use std::time::Duration;

use tokio::time::Instant;

use crate::support::client::{API, Request, Way};
use crate::support::http::{PATIENCE, Wire};
use crate::support::{World, until};

async fn world() -> World {
    World::with(&[("UPSTREAM_TIMEOUT", "300ms")]).await
}

async fn check_counted(world: &World, limit: &str) {
    let name = format!("{limit} to be counted");
    until(&name, async || {
        world.sidecar.metric("sidecar_limited_total", &[&format!("limit=\"{limit}\"")]).await > 0.0
    })
    .await;
}

#[tokio::test]
async fn request_body_that_stops_is_the_clients_408() {
    let world = world().await;
    let mut session = world.open(Way::Intercept).await;
    session
        .wire
        .send(format!(
            "POST /web/api/v2/echo HTTP/1.1\r\nHost: {API}\r\nContent-Length: 100\r\n\r\nonly a part"
        ))
        .await;
    let response = session.wire.response("POST").await;
    assert_eq!((response.status, response.code().as_str()), (408, "bad_request"), "{response:?}");
    session.wire.closed().await;
    check_counted(&world, "body_stall").await;
    assert!(!world.origin.only_request().complete);
}

#[tokio::test]
async fn answer_that_stops_breaks_off_and_does_not_look_whole() {
    let world = world().await;
    let part = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n";
    world.origin.script("/web/api/v2/part", part, false);
    let mut session = world.open(Way::Intercept).await;
    session.send(&Request::get("/web/api/v2/part")).await;
    session.wire.response_head().await.unwrap();
    assert_eq!(session.wire.chunk().await.unwrap().unwrap(), b"first");
    let rest = tokio::time::timeout(PATIENCE, session.wire.chunk()).await.expect("an end");
    assert!(rest.is_err(), "{rest:?}");
    check_counted(&world, "answer_stall").await;
    until("its upstream connection to be closed", async || {
        world.sidecar.metric("sidecar_upstream_connections", &["state=\"active\""]).await < 1.0
    })
    .await;
}

#[tokio::test]
async fn stream_of_events_may_be_silent_for_longer() {
    let world = world().await;
    let response = world.call(Way::Intercept, &Request::get("/web/api/v2/events/3000")).await;
    assert_eq!(response.text(), "data: 1\n\ndata: 2\n\n");
}

#[tokio::test]
async fn each_event_comes_at_once() {
    let world = World::start().await;
    for way in Way::ALL {
        let mut session = world.open(way).await;
        session.send(&Request::get("/web/api/v2/events/600000")).await;
        session.wire.response_head().await.unwrap();
        let comes = async {
            let mut seen = Vec::new();
            while !seen.ends_with(b"data: 1\n\n") && !seen.ends_with(b"data: 1\n\n\r\n") {
                seen.extend(session.wire.some().await.unwrap().expect("an event"));
            }
        };
        assert!(tokio::time::timeout(PATIENCE, comes).await.is_ok(), "{way:?}");
    }
}

#[tokio::test]
async fn slow_but_steady_upload_is_no_stall() {
    let world = World::with(&[("UPSTREAM_TIMEOUT", "2s")]).await;
    let mut session = world.open(Way::Gateway).await;
    let head =
        format!("POST /web/api/v2/echo HTTP/1.1\r\nHost: {API}\r\nContent-Length: 10\r\n\r\n");
    session.wire.send(head).await;
    for byte in b"0123456789" {
        tokio::time::sleep(Duration::from_millis(300)).await;
        session.wire.send([*byte]).await;
    }
    let response = session.wire.response("POST").await;
    assert_eq!((response.status, response.text().as_str()), (200, "0123456789"));
}

/// Sends `bytes`, waits for the end, and says how long that took.
async fn time_to_be_closed(mut wire: Wire, bytes: &[u8]) -> Duration {
    let began = Instant::now();
    wire.send(bytes).await;
    assert!(wire.closed().await.is_empty());
    began.elapsed()
}

#[tokio::test]
async fn client_that_begins_and_does_not_go_on_is_closed_after_ten_seconds() {
    let world = World::start().await;
    let tunnel = async || world.tunnel(&format!("{API}:443")).await;
    let (head, inner_head, hello, nothing) = tokio::join!(
        time_to_be_closed(world.wire().await, b"GET /web/api/v2/x HTTP/1.1\r\nHost: a"),
        time_to_be_closed(tunnel().await, b"GET /web/api/v2/x HTTP/1.1\r\n"),
        time_to_be_closed(tunnel().await, b"\x16\x03\x01\x02\x00\x01"),
        time_to_be_closed(tunnel().await, b""),
    );
    for time in [head, inner_head, hello, nothing] {
        assert!(time >= Duration::from_secs(9), "closed after {time:?}");
    }
    for (limit, count) in [("head_time", 2.0), ("handshake_time", 2.0)] {
        let labels = [format!("limit=\"{limit}\"")];
        let seen = world.sidecar.metric("sidecar_limited_total", &[&labels[0]]).await;
        assert!((seen - count).abs() < 0.5, "{limit}: {seen}");
    }
    assert!(world.origin.requests().is_empty());
}
