//! `Expect: 100-continue` (RFC 9110 §10.1.1): the client is asked for its body
//! when the upstream asks, or has said nothing for a second.

use std::time::Duration;

use tokio::time::Instant;

use crate::support::World;
use crate::support::client::{API, Session, Way};

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
