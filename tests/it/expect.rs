//! `Expect: 100-continue` (RFC 9110 §10.1.1): the client is asked for its body
//! when the upstream asks, or has said nothing for a second.

use std::time::Duration;

use tokio::time::Instant;

use crate::routes::check_is_made_here;
use crate::support::client::{API, Session, Way};
use crate::support::solver::Mode;
use crate::support::{Stage, World};

const SECOND: Duration = Duration::from_secs(1);

/// Sends a head that announces `body` and waits to be asked for it.
async fn announce(session: &mut Session, way: Way, path: &str) {
    let target =
        if way == Way::AbsoluteHttp { format!("http://{API}{path}") } else { path.to_owned() };
    let head = format!(
        "POST {target} HTTP/1.1\r\nHost: {API}\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
    );
    session.wire.send(head).await;
}

/// The time until the client was asked for its body.
async fn time_to_be_asked(session: &mut Session) -> Duration {
    let began = Instant::now();
    let interim = session.wire.head().await.unwrap().unwrap();
    assert_eq!(interim.word(1), "100", "{interim:?}");
    began.elapsed()
}

async fn check_echo(session: &mut Session) {
    session.wire.send("body").await;
    let response = session.wire.response("POST").await;
    assert_eq!((response.status, response.text().as_str()), (200, "body"));
    assert!(response.interim.is_empty(), "asked for twice");
}

#[tokio::test]
async fn body_is_asked_for_when_the_upstream_asks() {
    let world = World::start().await;
    for way in [Way::Intercept, Way::AbsoluteHttp, Way::Gateway] {
        let mut quickest = SECOND;
        for _ in 0..3 {
            let mut session = world.open(way).await;
            announce(&mut session, way, "/web/api/v2/echo").await;
            quickest = quickest.min(time_to_be_asked(&mut session).await);
            check_echo(&mut session).await;
        }
        assert!(quickest < SECOND, "{way:?}: only asked for after a second");
        let seen = world.origin.requests().pop().unwrap();
        assert_eq!(seen.head.value("expect"), Some("100-continue"), "{way:?}");
    }
}

#[tokio::test]
async fn body_is_asked_for_after_a_second_where_the_upstream_says_nothing() {
    let world = World::start().await;
    let mut session = world.open(Way::Intercept).await;
    announce(&mut session, Way::Intercept, "/web/api/v2/uninviting").await;
    assert!(time_to_be_asked(&mut session).await >= SECOND);
    check_echo(&mut session).await;
}

#[tokio::test]
async fn final_answer_goes_back_without_the_body() {
    let world = World::start().await;
    for way in [Way::Intercept, Way::AbsoluteHttp, Way::Gateway] {
        let mut session = world.open(way).await;
        announce(&mut session, way, "/web/api/v2/unread/417").await;
        let response = session.wire.response("POST").await;
        assert_eq!(response.status, 417, "{way:?}");
        assert!(response.interim.is_empty(), "{way:?}: the body was asked for");
        assert_eq!(response.value("connection"), Some("close"), "{way:?}");
        assert!(session.wire.closed().await.is_empty(), "{way:?}");
        assert!(world.origin.requests().pop().unwrap().body.is_empty(), "{way:?}");
    }
    assert_eq!(world.get("/web/api/v2/after").await.status, 200);
}

#[tokio::test]
async fn refusal_before_the_body_costs_the_client_nothing() {
    let world = World::start().await;
    world.kill_token();
    let mut session = world.open(Way::Intercept).await;
    announce(&mut session, Way::Intercept, "/web/api/v2/early").await;
    time_to_be_asked(&mut session).await;
    session.wire.send("body").await;
    let response = session.wire.response("POST").await;
    assert_eq!(response.status, 200, "{response:?}");
    assert!(response.interim.is_empty(), "asked for twice");
    let sends = world.origin.requests_for("/web/api/v2/early");
    let bodies: Vec<&[u8]> = sends.iter().map(|send| send.body.as_slice()).collect();
    assert_eq!(bodies, [&b""[..], b"body"]);
}

#[tokio::test]
async fn kept_body_is_sent_again_without_a_question() {
    let world = World::start().await;
    world.kill_token();
    let mut session = world.open(Way::Intercept).await;
    announce(&mut session, Way::Intercept, "/web/api/v2/echo").await;
    time_to_be_asked(&mut session).await;
    check_echo(&mut session).await;
    let sends = world.origin.requests_for("/web/api/v2/echo");
    let expected: Vec<_> = sends.iter().map(|send| send.head.value("expect")).collect();
    assert_eq!(expected, [Some("100-continue"), None]);
}

#[tokio::test]
async fn expectation_of_http_1_0_does_not_count() {
    let world = World::start().await;
    let mut wire = world.wire().await;
    wire.send(format!(
        "POST http://{API}/web/api/v2/echo HTTP/1.0\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\nbody"
    ))
    .await;
    let response = wire.response("POST").await;
    assert_eq!((response.status, response.text().as_str()), (200, "body"));
    assert!(response.interim.is_empty());
    assert!(world.origin.only_request().head.value("expect").is_none());
}

/// A request whose body stays out gets this answer made here, and the connection ends with it.
async fn check_is_refused_and_closed(session: &mut Session, head: &str, status: u16, code: &str) {
    let rest = "Content-Length: 4\r\nExpect: 100-continue\r\n\r\n";
    session.wire.send(format!("{head}\r\n{rest}")).await;
    let response = session.wire.response("POST").await;
    assert_eq!((response.status, response.code().as_str()), (status, code), "{head}");
    check_is_made_here(&response);
    assert!(response.interim.is_empty(), "{head}: the body was asked for");
    assert_eq!(response.value("connection"), Some("close"), "{head}");
    assert!(session.wire.closed().await.is_empty(), "{head}");
}

#[tokio::test]
async fn refusal_before_the_body_was_asked_for_ends_the_connection() {
    let world = World::start().await;
    let host = format!("Host: {API}");
    for (way, head, status, code) in [
        (Way::Gateway, "POST /elsewhere HTTP/1.1\r\nHost: x", 404, "no_such_origin"),
        (Way::AbsoluteHttp, "POST http://10.0.0.1/ HTTP/1.1\r\nHost: x", 403, "target_not_allowed"),
        (Way::Gateway, "CONNECT 10.0.0.1:1 HTTP/1.1\r\nHost: x", 403, "target_not_allowed"),
        (Way::Intercept, "POST /web/api/v2/x HTTP/1.1\r\nHost: x", 421, "misdirected"),
        (Way::Intercept, "POST /web/api/v2/x HTTP/1.1", 400, "bad_request"),
        (
            Way::PlainTunnel,
            &format!("TRACE /web/api/v2/x HTTP/1.1\r\nMax-Forwards: 0\r\n{host}"),
            501,
            "bad_request",
        ),
        (
            Way::Gateway,
            "POST /.well-known/token-sidecar/ca.pem HTTP/1.1\r\nHost: x",
            405,
            "bad_request",
        ),
    ] {
        let mut session = world.open(way).await;
        check_is_refused_and_closed(&mut session, head, status, code).await;
    }
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn demand_for_credentials_ends_the_connection_of_a_client_that_waits() {
    let world = World::with(&[("PROXY_AUTH", "user:word")]).await;
    let absolute = format!("POST http://{API}/web/api/v2/x HTTP/1.1\r\nHost: x");
    let mut session = world.open(Way::AbsoluteHttp).await;
    check_is_refused_and_closed(&mut session, &absolute, 407, "proxy_auth_required").await;
    let mut session = world.open(Way::Gateway).await;
    let gateway = "POST /web/api/v2/x HTTP/1.1\r\nHost: x";
    check_is_refused_and_closed(&mut session, gateway, 401, "proxy_auth_required").await;
}

#[tokio::test]
async fn want_of_a_token_ends_the_connection_of_a_client_that_waits() {
    let stage = Stage::new().await;
    stage.without_token();
    stage.origin.close_doors();
    stage.solver.set(Mode::Error);
    let world = stage.launch().await;
    let mut session = world.open(Way::PlainTunnel).await;
    let head = format!("POST /web/api/v2/x HTTP/1.1\r\nHost: {API}");
    check_is_refused_and_closed(&mut session, &head, 503, "token_unavailable").await;
}

#[tokio::test]
async fn error_after_the_body_was_read_leaves_the_connection_open() {
    let world = World::start().await;
    for way in [Way::Intercept, Way::AbsoluteHttp] {
        let mut session = world.open(way).await;
        announce(&mut session, way, "/web/api/v2/reset").await;
        time_to_be_asked(&mut session).await;
        session.wire.send("body").await;
        let response = session.wire.response("POST").await;
        assert_eq!((response.status, response.value("connection")), (502, None), "{way:?}");
        assert_eq!(session.get("/web/api/v2/next").await.status, 200, "{way:?}");
    }
}
