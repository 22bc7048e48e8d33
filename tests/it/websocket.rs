//! WebSocket: the only protocol that a request may switch to.

use crate::support::client::{API, Request, Session, Way};
use crate::support::http::Head;
use crate::support::{World, until};

const PATH: &str = "/web/api/v2/websocket";

fn handshake() -> Request {
    Request::get(PATH)
        .field("Connection", "keep-alive, Upgrade")
        .field("Upgrade", "websocket")
        .field("Sec-WebSocket-Version", "13")
        .field("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
}

/// Switches, and returns the head of the answer.
async fn switch(session: &mut Session) -> Head {
    session.send(&handshake()).await;
    let head = session.wire.head().await.unwrap().unwrap();
    assert_eq!(head.word(1), "101", "{head:?}");
    head
}

async fn check_echo(session: &mut Session, bytes: &[u8]) {
    session.wire.send(bytes).await;
    assert_eq!(session.wire.exactly(bytes.len()).await.unwrap(), bytes);
}

#[tokio::test]
async fn websocket_passes_both_ways_by_every_way() {
    let world = World::start().await;
    for way in Way::ALL {
        let mut session = world.open(way).await;
        let head = switch(&mut session).await;
        assert_eq!(head.value("upgrade"), Some("websocket"), "{way:?}");
        assert_eq!(head.value("connection"), Some("Upgrade"), "{way:?}");
        assert!(head.value("sec-websocket-accept").is_some(), "{way:?}");
        for framing in ["content-length", "transfer-encoding"] {
            assert!(head.value(framing).is_none(), "{way:?}: {head:?}");
        }
        check_echo(&mut session, b"\x81\x05hello").await;
        // What looks like HTTP is not looked at any more.
        check_echo(&mut session, b"GET /#x HTTP/1.1\r\n\r\n").await;
        check_echo(&mut session, &vec![0; 200_000]).await;
        let seen = world.origin.requests().pop().unwrap();
        assert_eq!(seen.token(), Some(world.tokens.latest().as_str()), "{way:?}");
        assert_eq!(seen.head.value("connection"), Some("Upgrade"), "{way:?}");
    }
}

#[tokio::test]
async fn nothing_follows_the_request_before_the_switch() {
    let world = World::start().await;
    for way in [Way::Intercept, Way::PlainTunnel, Way::Gateway] {
        let mut session = world.open(way).await;
        session.send(&handshake()).await;
        session.wire.send("early").await;
        let head = session.wire.head().await.unwrap().unwrap();
        assert_eq!(head.word(1), "101", "{way:?}: the shop got it too early");
        assert_eq!(session.wire.exactly(5).await.unwrap(), b"early", "{way:?}");
    }
}

#[tokio::test]
async fn refused_switch_is_held_and_asked_for_again() {
    let world = World::start().await;
    world.kill_token();
    let mut session = world.open(Way::Intercept).await;
    switch(&mut session).await;
    check_echo(&mut session, b"alive").await;
    assert_eq!(world.origin.requests_for(PATH).len(), 2);
}

#[tokio::test]
async fn answer_that_does_not_switch_is_an_ordinary_one() {
    let world = World::start().await;
    let path = "/web/api/v2/status/426";
    let request = Request::get(path).field("Connection", "Upgrade").field("Upgrade", "websocket");
    for way in Way::ALL {
        let mut session = world.open(way).await;
        assert_eq!(session.call(&request).await.status, 426, "{way:?}");
        assert_eq!(session.get("/web/api/v2/after").await.status, 200, "{way:?}");
    }
}

#[tokio::test]
async fn no_other_protocol_is_asked_for() {
    let world = World::start().await;
    for upgrade in ["h2c", "websocket, h2c", "TLS/1.2"] {
        let request = Request::get("/web/api/v2/x")
            .field("Connection", "Upgrade, HTTP2-Settings")
            .field("Upgrade", upgrade)
            .field("HTTP2-Settings", "AAMAAABkAARAAAAAAAIAAAAA");
        assert_eq!(world.call(Way::Gateway, &request).await.status, 200, "{upgrade}");
        let seen = world.origin.requests().pop().unwrap().head;
        for name in ["upgrade", "http2-settings", "connection"] {
            assert!(seen.value(name).is_none(), "{upgrade}: {name} crossed");
        }
    }
}

#[tokio::test]
async fn switch_that_nobody_asked_for_is_502() {
    let world = World::start().await;
    let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: ";
    world.origin.script("/web/api/v2/unasked", format!("{answer}websocket\r\n\r\n"), false);
    world.origin.script("/web/api/v2/other", format!("{answer}h2c\r\n\r\n"), false);
    let unasked = world.get("/web/api/v2/unasked").await;
    assert_eq!((unasked.status, unasked.code().as_str()), (502, "upstream_protocol"));
    let request = Request::get("/web/api/v2/other")
        .field("Connection", "Upgrade")
        .field("Upgrade", "websocket");
    let other = world.call(Way::Intercept, &request).await;
    assert_eq!((other.status, other.code().as_str()), (502, "upstream_protocol"));
}

#[tokio::test]
async fn websocket_takes_one_of_the_upstreams_connections_until_it_ends() {
    let world = World::with(&[("UPSTREAM_CONNECTIONS", "1"), ("UPSTREAM_TIMEOUT", "300ms")]).await;
    let mut session = world.open(Way::Intercept).await;
    switch(&mut session).await;
    assert_eq!(world.get("/web/api/v2/x").await.status, 503);
    check_echo(&mut session, b"still there").await;
    session.wire.try_finish().await.unwrap();
    session.wire.closed().await;
    until("the connection to be free", async || world.get("/web/api/v2/x").await.status == 200)
        .await;
}

#[tokio::test]
async fn websocket_ends_for_both_when_the_upstream_ends_it() {
    let world = World::start().await;
    let answer =
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nbye";
    world.origin.script("/web/api/v2/bye", answer, true);
    let request = Request::get("/web/api/v2/bye")
        .field("Connection", "Upgrade")
        .field("Upgrade", "websocket");
    let mut session = world.open(Way::Intercept).await;
    session.send(&request).await;
    assert_eq!(session.wire.head().await.unwrap().unwrap().word(1), "101");
    assert_eq!(session.wire.closed().await, b"bye");
}

#[tokio::test]
async fn request_with_a_body_cannot_switch() {
    let world = World::start().await;
    let request = handshake().body("early");
    assert_eq!(world.call(Way::Intercept, &request).await.status, 400);
    let seen = world.origin.only_request();
    assert!(seen.head.value("upgrade").is_none());
    assert_eq!(seen.body, b"early");
}

#[tokio::test]
async fn http_1_0_cannot_switch() {
    let world = World::start().await;
    let mut wire = world.wire().await;
    wire.send(format!(
        "GET http://{API}{PATH} HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    ))
    .await;
    assert_eq!(wire.response("GET").await.status, 400);
    let seen = world.origin.only_request().head;
    assert!(seen.value("upgrade").is_none(), "{seen:?}");
}
