//! Answers of any size and shape stream through.

use crate::support::client::{API, Request, Way};
use crate::support::http::Framing;
use crate::support::origin::pattern_bytes;
use crate::support::{World, until};

const LARGE: usize = 40_000_000;

#[tokio::test]
async fn large_answer_by_length_passes_whole() {
    let world = World::start().await;
    let response =
        world.call(Way::Intercept, &Request::get(&format!("/web/api/v2/big/{LARGE}"))).await;
    assert_eq!(response.framing, Framing::Length(LARGE));
    assert!(response.body == pattern_bytes(LARGE));
}

#[tokio::test]
async fn large_chunked_answer_passes_whole_with_its_trailers() {
    let world = World::start().await;
    for way in [Way::Intercept, Way::AbsoluteHttp, Way::Gateway] {
        let request = Request::get("/web/api/v2/big-chunked/8000000").field("TE", "trailers");
        let response = world.call(way, &request).await;
        assert_eq!(response.framing, Framing::Chunked, "{way:?}");
        assert!(response.body == pattern_bytes(8_000_000), "{way:?}");
        let names: Vec<String> =
            response.trailers.iter().map(|(name, _)| name.to_lowercase()).collect();
        assert_eq!(
            names,
            ["x-checksum"],
            "{way:?}: a forbidden trailer field is dropped, the other kept"
        );
        assert_eq!(response.trailers[0].1, "abc");
    }
}

#[tokio::test]
async fn large_answer_passes_after_a_replay() {
    let world = World::start().await;
    world.kill_token();
    let response =
        world.call(Way::Intercept, &Request::get("/web/api/v2/big-chunked/8000000")).await;
    assert_eq!(response.status, 200);
    assert!(response.body == pattern_bytes(8_000_000));
}

#[tokio::test]
async fn large_answer_is_not_kept_in_memory() {
    let world = World::start().await;
    let mut session = world.open(Way::AbsoluteHttp).await;
    assert_eq!(session.get("/web/api/v2/warm").await.status, 200);
    let before = world.sidecar.resident();
    session.send(&Request::get("/web/api/v2/big/80000000")).await;
    session.wire.response_head().await.unwrap();
    let mut left = 80_000_000;
    while left > 0 {
        left -= session.wire.exactly(1_000_000.min(left)).await.unwrap().len();
    }
    let grown = world.sidecar.resident().saturating_sub(before);
    assert!(grown < 20_000_000, "grew by {grown} bytes");
}

#[tokio::test]
async fn slow_reader_slows_the_shop_down() {
    let world = World::start().await;
    let mut session = world.open(Way::AbsoluteHttp).await;
    session.send(&Request::get("/web/api/v2/big/80000000")).await;
    session.wire.response_head().await.unwrap();
    let before = world.sidecar.resident();
    // Nobody reads: buffers may fill, memory may not.
    let mut last = 0;
    for _ in 0..10 {
        tokio::time::sleep(std::time::Duration::from_millis(30)).await;
        last = world.sidecar.resident().saturating_sub(before);
    }
    assert!(last < 20_000_000, "grew by {last} bytes");
    assert_eq!(session.wire.exactly(80_000_000).await.unwrap().len(), 80_000_000);
}

#[tokio::test]
async fn answer_comes_while_the_shop_still_sends() {
    let world = World::start().await;
    // A head and a first chunk, and nothing more until the other side leaves.
    let part = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n";
    world.origin.script("/web/api/v2/part", part, false);
    for way in Way::ALL {
        let mut session = world.open(way).await;
        session.send(&Request::get("/web/api/v2/part")).await;
        session.wire.response_head().await.unwrap();
        let chunk =
            tokio::time::timeout(crate::support::http::PATIENCE, session.wire.chunk()).await;
        assert_eq!(chunk.unwrap().unwrap().unwrap(), b"first", "{way:?}");
    }
}

#[tokio::test]
async fn close_delimited_answer_passes_whole() {
    let world = World::start().await;
    for way in Way::ALL {
        let response = world.call(way, &Request::get("/web/api/v2/close-delimited")).await;
        assert_eq!((response.status, response.text().as_str()), (200, "until the end"), "{way:?}");
    }
}

#[tokio::test]
async fn answer_shorter_than_its_length_is_not_made_to_look_whole() {
    let world = World::start().await;
    for way in Way::ALL {
        let mut session = world.open(way).await;
        let outcome = session.try_call(&Request::get("/web/api/v2/short")).await;
        assert!(
            outcome.is_err() || outcome.as_ref().is_ok_and(|response| response.status == 502),
            "{way:?}: {outcome:?}"
        );
    }
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
}

#[tokio::test]
async fn empty_answer_passes() {
    let world = World::start().await;
    world.origin.script("/web/api/v2/empty", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false);
    let response = world.call(Way::Intercept, &Request::get("/web/api/v2/empty")).await;
    assert_eq!((response.status, response.body.len()), (200, 0));
    assert_eq!(response.framing, Framing::Length(0));
}

#[tokio::test]
async fn large_upload_is_not_kept_in_memory() {
    let world = World::start().await;
    let mut session = world.open(Way::AbsoluteHttp).await;
    assert_eq!(session.get("/web/api/v2/warm").await.status, 200);
    let before = world.sidecar.resident();
    let length = 60_000_000;
    session.wire.send(format!("POST http://{API}/web/api/v2/upload HTTP/1.1\r\nHost: {API}\r\nContent-Length: {length}\r\n\r\n")).await;
    for part in crate::support::origin::pattern(length) {
        session.wire.send(part).await;
    }
    assert_eq!(session.wire.response("POST").await.status, 200);
    let grown = world.sidecar.resident().saturating_sub(before);
    assert!(grown < 40_000_000, "grew by {grown} bytes");
    until("the whole body", async || world.origin.requests().last().unwrap().body.len() == length)
        .await;
}

#[tokio::test]
async fn client_that_asks_to_close_is_closed() {
    let world = World::start().await;
    for way in Way::ALL {
        let mut session = world.open(way).await;
        let response =
            session.call(&Request::get("/web/api/v2/x").field("Connection", "close")).await;
        assert_eq!(response.status, 200, "{way:?}");
        assert!(session.wire.closed().await.is_empty());
    }
}
