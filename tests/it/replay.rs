//! What is sent a second time, and what cannot be.

use crate::bounds::limited;
use crate::support::client::{API, Request, Way};
use crate::support::http::{chunk, last_chunk};
use crate::support::origin::{REFUSAL, pattern_bytes};
use crate::support::{Stage, World, until};

const ECHO: &str = "/web/api/v2/echo";
const MIB: usize = 1024 * 1024;

async fn check_echo(world: &World, way: Way, request: &Request, body: &[u8]) {
    world.kill_token();
    let response = world.call(way, request).await;
    assert_eq!(response.status, 200, "{way:?}: {:?}", response.head);
    assert!(
        response.body == body,
        "{way:?}: {} of {} bytes came back",
        response.body.len(),
        body.len()
    );
    let sends = world.origin.requests();
    let [.., first, second] = sends.as_slice() else { panic!("{way:?}: {} sends", sends.len()) };
    assert!(first.body == body && second.body == body, "{way:?}: the body was not the same twice");
    assert_eq!(first.trailers, second.trailers);
}

#[tokio::test]
async fn body_by_length_is_replayed() {
    let world = World::start().await;
    for way in Way::ALL {
        check_echo(&world, way, &Request::post(ECHO, "the body"), b"the body").await;
    }
}

#[tokio::test]
async fn framing_of_a_body_by_length_stays() {
    let world = World::start().await;
    world.kill_token();
    assert_eq!(world.call(Way::Intercept, &Request::post(ECHO, "12345")).await.status, 200);
    for send in world.origin.requests() {
        assert_eq!(send.head.values("content-length"), ["5"]);
        assert!(send.head.value("transfer-encoding").is_none());
    }
}

#[tokio::test]
async fn chunked_body_is_replayed() {
    let world = World::start().await;
    for way in Way::ALL {
        let request = Request::new("PUT", ECHO).chunked(&[b"one ", b"two ", b"three"], &[]);
        check_echo(&world, way, &request, b"one two three").await;
    }
}

#[tokio::test]
async fn trailers_are_kept_on_both_sends_and_on_the_way_back() {
    let world = World::start().await;
    let request = Request::new("POST", ECHO)
        .field("TE", "trailers")
        .chunked(&[b"data"], &[("X-Checksum", "9"), ("X-More", "a b")]);
    world.kill_token();
    let response = world.call(Way::Intercept, &request).await;
    assert_eq!(response.status, 200, "{response:?}");
    let expected = [("x-checksum", "9"), ("x-more", "a b")];
    let lower = |trailers: &[(String, String)]| -> Vec<(String, String)> {
        trailers.iter().map(|(name, value)| (name.to_lowercase(), value.clone())).collect()
    };
    let expected: Vec<(String, String)> =
        expected.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    let sends = world.origin.requests();
    assert_eq!(sends.len(), 2);
    for send in &sends {
        assert_eq!(lower(&send.trailers), expected);
    }
    assert_eq!(lower(&response.trailers), expected);
}

#[tokio::test]
async fn get_with_a_json_body_is_replayed() {
    let world = World::start().await;
    let request =
        Request::get(ECHO).field("Content-Type", "application/json").body(r#"{"filter":[1]}"#);
    check_echo(&world, Way::Intercept, &request, br#"{"filter":[1]}"#).await;
}

#[tokio::test]
async fn every_method_is_replayed() {
    let world = World::start().await;
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE"] {
        world.kill_token();
        let path = format!("/web/api/v2/method/{method}");
        let response = world.call(Way::Intercept, &Request::new(method, &path)).await;
        assert_eq!(response.status, 200, "{method}: {response:?}");
        assert_eq!(world.origin.requests_for(&path).len(), 2, "{method}");
    }
}

#[tokio::test]
async fn body_below_the_cap_is_replayed_whole() {
    let world = World::start().await;
    let body = pattern_bytes(7 * MIB);
    check_echo(&world, Way::Intercept, &Request::post(ECHO, body.clone()), &body).await;
}

#[tokio::test]
async fn chunked_body_below_the_cap_is_replayed_whole() {
    let world = World::start().await;
    let body = pattern_bytes(3 * MIB);
    let chunks: Vec<&[u8]> = body.chunks(100_000).collect();
    let request = Request::new("POST", ECHO).chunked(&chunks, &[]);
    check_echo(&world, Way::AbsoluteHttp, &request, &body).await;
}

async fn check_not_replayable(world: &World, way: Way, request: &Request, length: usize) {
    world.kill_token();
    let solves = world.solver.solves();
    let before = world.origin.requests().len();
    let response = world.call(way, request).await;
    assert_eq!((response.status, response.text().as_str()), (401, REFUSAL), "{way:?}");
    let status = response.value("proxy-status").unwrap_or_default();
    assert!(
        status.starts_with("token-sidecar") && status.contains("details=\"not_replayable\""),
        "{status:?}"
    );
    let sends = world.origin.requests();
    assert_eq!(sends.len(), before + 1, "{way:?}: sent once");
    assert_eq!(sends[before].body.len(), length, "{way:?}: the body streamed on");
    // The next one, which can be held, finds or gets a new token.
    assert_eq!(world.call(way, &Request::get("/web/api/v2/next")).await.status, 200);
    assert_eq!(world.solver.solves(), solves + 1);
}

#[tokio::test]
async fn body_above_the_cap_streams_on_and_its_401_is_passed_on() {
    let world = World::with(&[("REPLAY_BODY_LIMIT", "64KiB")]).await;
    for way in [Way::Intercept, Way::AbsoluteHttp, Way::Gateway] {
        let counted = limited(&world, "replay_body").await;
        check_not_replayable(&world, way, &Request::post(ECHO, pattern_bytes(MIB)), MIB).await;
        assert!((limited(&world, "replay_body").await - counted - 1.0).abs() < 0.5, "{way:?}");
    }
    // One that was too large leaves nothing behind.
    check_echo(&world, Way::Intercept, &Request::post(ECHO, "small"), b"small").await;
    assert!((limited(&world, "replay_body").await - 3.0).abs() < 0.5);
    assert!(limited(&world, "replay_memory").await < 0.5);
}

#[tokio::test]
async fn chunked_body_above_the_cap_streams_on_and_its_401_is_passed_on() {
    let world = World::with(&[("REPLAY_BODY_LIMIT", "64KiB")]).await;
    let body = pattern_bytes(MIB);
    let chunks: Vec<&[u8]> = body.chunks(10_000).collect();
    let request = Request::new("POST", ECHO).chunked(&chunks, &[]);
    check_not_replayable(&world, Way::Intercept, &request, MIB).await;
}

#[tokio::test]
async fn body_above_the_cap_passes_with_a_good_token() {
    let world = World::with(&[("REPLAY_BODY_LIMIT", "64KiB")]).await;
    let body = pattern_bytes(2 * MIB);
    let response = world.call(Way::Intercept, &Request::post(ECHO, body.clone())).await;
    assert_eq!(response.status, 200);
    assert!(response.body == body);
}

#[tokio::test]
async fn body_of_exactly_the_cap_is_replayed() {
    let world = World::with(&[("REPLAY_BODY_LIMIT", "64KiB")]).await;
    let body = pattern_bytes(64 * 1024);
    check_echo(&world, Way::Intercept, &Request::post(ECHO, body.clone()), &body).await;
}

#[tokio::test]
async fn bodies_beyond_the_common_memory_are_not_replayable() {
    let mut stage = Stage::new().await;
    stage.set("REPLAY_MEMORY", "256KiB");
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.start().await;
    world.kill_token();
    world.solver.pause();
    // The first holds most of the memory while it waits.
    let mut first = world.open(Way::Intercept).await;
    let body = pattern_bytes(200 * 1024);
    first.send(&Request::post(ECHO, body.clone())).await;
    until("the first to be held", async || world.sidecar.status().await["held"] == 1).await;
    let second = world.call(Way::Intercept, &Request::post(ECHO, body.clone())).await;
    assert_eq!(second.status, 401);
    assert!(
        second.value("proxy-status").unwrap_or_default().contains("not_replayable"),
        "{second:?}"
    );
    assert!((limited(&world, "replay_memory").await - 1.0).abs() < 0.5);
    world.solver.resume();
    let response = first.wire.response("POST").await;
    assert_eq!(response.status, 200);
    assert!(response.body == body);
    // The memory is free again.
    check_echo(&world, Way::Intercept, &Request::post(ECHO, body.clone()), &body).await;
    assert!((limited(&world, "replay_memory").await - 1.0).abs() < 0.5);
    assert!(limited(&world, "replay_body").await < 0.5);
}

#[tokio::test]
async fn body_streams_to_the_shop_while_the_client_still_sends() {
    let world = World::start().await;
    for way in [Way::Intercept, Way::AbsoluteHttp] {
        let mut session = world.open(way).await;
        let target =
            if way == Way::AbsoluteHttp { format!("http://{API}{ECHO}") } else { ECHO.to_owned() };
        let head =
            format!("POST {target} HTTP/1.1\r\nHost: {API}\r\nTransfer-Encoding: chunked\r\n\r\n");
        session.wire.send(head).await;
        session.wire.send(chunk(b"first")).await;
        until("the first part at the shop", async || {
            world
                .origin
                .requests()
                .last()
                .is_some_and(|request| request.body == b"first" && !request.complete)
        })
        .await;
        session.wire.send(chunk(b" second")).await;
        session.wire.send(last_chunk(&[])).await;
        assert_eq!(session.wire.response("POST").await.text(), "first second");
    }
}

#[tokio::test]
async fn refusal_that_comes_before_the_body_has_ended_is_healed_too() {
    let world = World::start().await;
    world.kill_token();
    let mut session = world.open(Way::Intercept).await;
    let head = format!(
        "POST /web/api/v2/early HTTP/1.1\r\nHost: {API}\r\nTransfer-Encoding: chunked\r\n\r\n"
    );
    session.wire.send(head).await;
    session.wire.send(chunk(b"first")).await;
    // Refused by now, with the rest of the body still to come.
    world.solver.asked(1).await;
    session.wire.send(chunk(b" second")).await;
    session.wire.send(last_chunk(&[])).await;
    let response = session.wire.response("POST").await;
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(world.origin.requests().last().unwrap().body, b"first second");
}

#[tokio::test]
async fn expectation_of_100_continue_is_met() {
    let world = World::start().await;
    world.kill_token();
    let mut session = world.open(Way::Intercept).await;
    let head = format!(
        "POST {ECHO} HTTP/1.1\r\nHost: {API}\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
    );
    session.wire.send(head).await;
    let interim = session.wire.head().await.unwrap().unwrap();
    assert_eq!(interim.word(1), "100", "{interim:?}");
    session.wire.send("body").await;
    let response = session.wire.response("POST").await;
    assert_eq!((response.status, response.text().as_str()), (200, "body"));
}

#[tokio::test]
async fn body_that_breaks_off_is_not_sent_as_whole() {
    let world = World::start().await;
    let mut session = world.open(Way::Intercept).await;
    let head =
        format!("POST {ECHO} HTTP/1.1\r\nHost: {API}\r\nContent-Length: 100\r\n\r\nonly a part");
    session.wire.send(head).await;
    until("the head at the shop", async || world.origin.requests().len() == 1).await;
    drop(session);
    assert_eq!(world.get("/web/api/v2/next").await.status, 200);
    let broken = &world.origin.requests_for(ECHO)[0];
    assert!(!broken.complete, "{broken:?}");
}

#[tokio::test]
async fn connection_of_a_refusal_is_free_during_the_hold() {
    let mut stage = Stage::new().await;
    stage.set("UPSTREAM_CONNECTIONS", "1");
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.start().await;
    world.kill_token();
    world.solver.pause();
    let mut held = world.open(Way::Intercept).await;
    held.send(&Request::get("/web/api/v2/x")).await;
    until("it to be held", async || world.sidecar.status().await["held"] == 1).await;
    let personal = crate::support::token::Jwt::personal().make();
    world.tokens.accept(&personal);
    let request =
        Request::get("/web/api/v2/y").field("Authorization", &format!("Bearer {personal}"));
    assert_eq!(world.call(Way::Intercept, &request).await.status, 200);
    world.solver.resume();
    assert_eq!(held.wire.response("GET").await.status, 200);
}
