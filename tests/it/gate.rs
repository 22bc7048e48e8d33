//! Requests that must not get in.

use crate::routes::check_is_made_here;
use crate::support::World;
use crate::support::client::API;
use crate::support::http::Wire;

async fn check_is_bad_request(fields: &str) {
    let world = World::start().await;
    let mut wire: Wire = world.wire().await;
    wire.send(format!("POST /web/api/v2/x HTTP/1.1\r\n{fields}\r\n0\r\n\r\n")).await;
    assert_eq!(wire.response("POST").await.status, 400, "{fields:?}");
    assert!(world.origin.requests().is_empty(), "{fields:?}");
}

#[tokio::test]
async fn content_length_beside_transfer_encoding_is_refused() {
    check_is_bad_request("Host: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n").await;
}

#[tokio::test]
async fn differing_content_lengths_are_refused() {
    check_is_bad_request("Host: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n").await;
}

#[tokio::test]
async fn missing_host_is_refused() {
    check_is_bad_request("Transfer-Encoding: chunked\r\n").await;
}

#[tokio::test]
async fn second_host_is_refused() {
    check_is_bad_request("Host: x\r\nHost: y\r\nTransfer-Encoding: chunked\r\n").await;
}

#[tokio::test]
async fn chunked_coding_applied_twice_is_refused() {
    check_is_bad_request("Host: x\r\nTransfer-Encoding: chunked, chunked\r\n").await;
}

#[tokio::test]
async fn space_before_a_colon_is_refused() {
    check_is_bad_request("Host : x\r\nTransfer-Encoding: chunked\r\n").await;
}

#[tokio::test]
async fn targets_of_no_use_are_refused() {
    let world = World::start().await;
    let targets = [
        format!("http://user:word@{API}/web/api/v2/x"),
        format!("ftp://{API}/x"),
        format!("{API}:443"),
    ];
    for target in targets {
        let response = world.raw(format!("GET {target} HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
        assert_eq!((response.status, response.code().as_str()), (400, "bad_request"), "{target}");
    }
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn head_above_the_bound_is_431() {
    let world = World::start().await;
    let filler = "x".repeat(80 * 1024);
    let mut wire = world.wire().await;
    let _ = wire
        .try_send(format!("GET /web/api/v2/x HTTP/1.1\r\nHost: x\r\nX-Filler: {filler}\r\n\r\n"))
        .await;
    assert_eq!(wire.response("GET").await.status, 431);
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn garbage_gets_400_and_harms_nobody_else() {
    let world = World::start().await;
    for garbage in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "\x16\x03\x01 not tls at all\r\n\r\n",
    ] {
        let mut wire = world.wire().await;
        wire.send(garbage).await;
        let answer = String::from_utf8_lossy(&wire.closed().await).into_owned();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{garbage:?}: {answer}");
    }
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
}

#[tokio::test]
async fn broken_tls_in_a_tunnel_ends_that_tunnel_alone() {
    let world = World::start().await;
    let mut broken = world.tunnel(&format!("{API}:443")).await;
    broken.send(b"\x16\x03\x01\x00\x05hello and nothing that is TLS").await;
    broken.closed().await;
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
}

#[tokio::test]
async fn connect_inside_a_tunnel_is_refused() {
    let world = World::start().await;
    let mut inner = world.tunnel(&format!("{API}:80")).await;
    inner.send(format!("CONNECT {API}:443 HTTP/1.1\r\nHost: {API}:443\r\n\r\n")).await;
    let response = inner.response("GET").await;
    assert!((400..500).contains(&response.status), "{response:?}");
    check_is_made_here(&response);
}

#[tokio::test]
async fn connect_without_a_port_is_a_bad_request() {
    let world = World::start().await;
    let (response, _) = world.connect(API).await;
    assert_eq!(response.status, 400, "{response:?}");
}
