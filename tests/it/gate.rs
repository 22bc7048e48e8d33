//! Requests that must not get in.

use crate::routes::check_is_made_here;
use crate::support::World;
use crate::support::client::{API, Request, Way};

/// `request` is refused with `status`, its connection closed, and nothing of it
/// or after it reaches the shop: by the gateway, and inside a TLS tunnel.
async fn check_is_refused(request: impl AsRef<[u8]>, status: u16) {
    let request = request.as_ref();
    let shown = String::from_utf8_lossy(&request[..request.len().min(200)]);
    let world = World::start().await;
    for way in [Way::Gateway, Way::Intercept] {
        let mut wire = world.open(way).await.wire;
        // It may be refused before all of it was taken.
        let _ = wire.try_send(request).await;
        let _ = wire.try_send("GET /web/api/v2/next HTTP/1.1\r\nHost: x\r\n\r\n").await;
        let response = wire.response("GET").await;
        assert_eq!(response.status, status, "{way:?}: {shown}");
        assert!(wire.closed().await.is_empty(), "{way:?}: the connection goes on: {shown}");
    }
    assert!(world.origin.requests().is_empty(), "{shown}");
}

/// A POST to the API host with `fields` and a chunked body.
fn post(fields: &str) -> String {
    format!("POST /web/api/v2/x HTTP/1.1\r\n{fields}\r\n0\r\n\r\n")
}

/// The same, of which nothing is wrong but `fields`.
fn post_with(fields: &str) -> String {
    post(&format!("Host: {API}\r\n{fields}"))
}

#[tokio::test]
async fn content_length_beside_transfer_encoding_is_refused() {
    check_is_refused(post_with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), 400).await;
    check_is_refused(post_with("transfer-encoding: chunked\r\ncontent-length: 0\r\n"), 400).await;
}

#[tokio::test]
async fn differing_content_lengths_are_refused() {
    check_is_refused(post_with("Content-Length: 5\r\nContent-Length: 6\r\n"), 400).await;
    check_is_refused(post_with("Content-Length: 5, 6\r\n"), 400).await;
}

#[tokio::test]
async fn content_length_that_is_no_number_is_refused() {
    for length in ["+5", "-1", "0x5", "5 5", "", "99999999999999999999"] {
        check_is_refused(post_with(&format!("Content-Length: {length}\r\n")), 400).await;
    }
}

#[tokio::test]
async fn missing_host_is_refused() {
    check_is_refused(post("Transfer-Encoding: chunked\r\n"), 400).await;
}

#[tokio::test]
async fn second_host_is_refused() {
    check_is_refused(post_with("Host: y\r\nTransfer-Encoding: chunked\r\n"), 400).await;
}

#[tokio::test]
async fn host_that_is_no_host_is_refused() {
    for host in ["a b", "user@a", "a/b", "a:99999"] {
        check_is_refused(post(&format!("Host: {host}\r\nTransfer-Encoding: chunked\r\n")), 400)
            .await;
    }
}

#[tokio::test]
async fn chunked_coding_applied_twice_is_refused() {
    check_is_refused(post_with("Transfer-Encoding: chunked, chunked\r\n"), 400).await;
    let twice = "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n";
    check_is_refused(post_with(twice), 400).await;
}

#[tokio::test]
async fn other_transfer_codings_are_501() {
    check_is_refused(post_with("Transfer-Encoding: gzip, chunked\r\n"), 501).await;
}

#[tokio::test]
async fn transfer_coding_that_does_not_end_in_chunked_is_refused() {
    for coding in ["gzip", "identity", "xchunked", "chunked, gzip", "chunked;q=1"] {
        check_is_refused(post_with(&format!("Transfer-Encoding: {coding}\r\n")), 400).await;
    }
}

#[tokio::test]
async fn transfer_coding_in_http_1_0_is_refused() {
    let request = post_with("Transfer-Encoding: chunked\r\n").replace("HTTP/1.1", "HTTP/1.0");
    check_is_refused(request, 400).await;
}

#[tokio::test]
async fn space_before_a_colon_is_refused() {
    check_is_refused(post(&format!("Host : {API}\r\nTransfer-Encoding: chunked\r\n")), 400).await;
    check_is_refused(post_with("Transfer-Encoding : chunked\r\n"), 400).await;
}

#[tokio::test]
async fn folded_field_is_refused() {
    check_is_refused(post_with("X-A: 1\r\n 2\r\nTransfer-Encoding: chunked\r\n"), 400).await;
    check_is_refused(post_with("Transfer-Encoding:\r\n chunked\r\n"), 400).await;
}

#[tokio::test]
async fn control_bytes_in_a_head_are_refused() {
    for value in ["a\0b", "a\rb", "a\x01b", "a\x7fb"] {
        check_is_refused(post_with(&format!("X-A: {value}\r\n")), 400).await;
    }
    check_is_refused(post_with("X A: 1\r\n"), 400).await;
    check_is_refused(post_with("\0: 1\r\n"), 400).await;
}

#[tokio::test]
async fn target_with_a_fragment_or_of_another_form_is_refused() {
    for target in ["/web/api/v2/x#f", "*", "web/api/v2/x", "/web/api/v2/x y", "/web/api/v2/<x>"] {
        check_is_refused(format!("GET {target} HTTP/1.1\r\nHost: {API}\r\n\r\n"), 400).await;
    }
}

#[tokio::test]
async fn odd_message_behind_another_one_is_refused() {
    let world = World::start().await;
    let x = format!("/web/api/v2/x HTTP/1.1\r\nHost: {API}");
    let firsts = [
        format!("POST {x}\r\nContent-Length: 4\r\n\r\nbody"),
        format!("POST {x}\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"),
        format!("GET {x}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"),
    ];
    let odds = [
        post_with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
        format!("GET /web/api/v2/y#f HTTP/1.1\r\nHost: {API}\r\n\r\n"),
    ];
    let mut arrived = 0;
    for (first, odd) in firsts.iter().flat_map(|first| odds.iter().map(move |odd| (first, odd))) {
        for way in [Way::Gateway, Way::Intercept] {
            let mut wire = world.open(way).await.wire;
            wire.send(format!("{first}{odd}{first}")).await;
            assert_eq!(wire.response("POST").await.status, 200, "{way:?}: {first}{odd}");
            assert_eq!(wire.response("POST").await.status, 400, "{way:?}: {first}{odd}");
            assert!(wire.closed().await.is_empty(), "{way:?}: {first}{odd}");
            arrived += 1;
        }
    }
    assert_eq!(world.origin.requests().len(), arrived);
}

#[tokio::test]
async fn malformed_chunks_end_the_request() {
    for body in
        ["x\r\n", "5\r\nab\r\n0\r\n\r\n", "-1\r\n\r\n", "1\r\nabc\r\n", "1ffffffffffffffff\r\n"]
    {
        let world = World::start().await;
        let mut wire = world.open(Way::Gateway).await.wire;
        let head = post_with("Transfer-Encoding: chunked\r\n");
        let head = head.strip_suffix("0\r\n\r\n").unwrap();
        wire.send(format!("{head}{body}")).await;
        let response = wire.response("POST").await;
        assert_eq!((response.status, response.code().as_str()), (400, "bad_request"), "{body:?}");
        check_is_made_here(&response);
        assert!(wire.closed().await.is_empty(), "{body:?}");
        let whole = world.origin.requests().iter().any(|request| request.complete);
        assert!(!whole, "{body:?} went on as a whole message");
    }
}

#[tokio::test]
async fn forbidden_trailer_fields_are_dropped() {
    let world = World::start().await;
    let trailers = [
        ("Authorization", "Bearer x"),
        ("Cookie", "a=b"),
        ("Host", "evil"),
        ("Content-Length", "5"),
        ("Transfer-Encoding", "chunked"),
        ("Connection", "close"),
        ("Proxy-Authorization", "Basic eDp5"),
        ("X-Sum", "1"),
    ];
    for way in [Way::Gateway, Way::Intercept, Way::AbsoluteHttp] {
        let request = Request::new("POST", "/web/api/v2/echo").chunked(&[b"body"], &trailers);
        assert_eq!(world.call(way, &request).await.status, 200, "{way:?}");
        let seen = world.origin.requests().pop().unwrap();
        let names: Vec<_> = seen.trailers.iter().map(|(name, _)| name.to_lowercase()).collect();
        assert_eq!(names, ["x-sum"], "{way:?}");
    }
}

#[tokio::test]
async fn trailers_above_the_bound_end_the_request() {
    let world = World::start().await;
    for trailers in ["X-A: 1\r\n".repeat(300), format!("X-A: {}\r\n", "x".repeat(20_000))] {
        let mut wire = world.open(Way::Gateway).await.wire;
        let head = post_with("Transfer-Encoding: chunked\r\nTrailer: X-A\r\n");
        let head = head.strip_suffix("\r\n").unwrap();
        let _ = wire.try_send(format!("{head}{trailers}\r\n")).await;
        let response = wire.response("POST").await;
        assert_eq!((response.status, response.code().as_str()), (400, "bad_request"));
        wire.closed().await;
    }
    assert!(!world.origin.requests().iter().any(|request| request.complete));
}

#[tokio::test]
async fn targets_of_no_use_are_refused() {
    let world = World::start().await;
    let targets = [
        format!("http://user:word@{API}/web/api/v2/x"),
        format!("ftp://{API}/x"),
        format!("{API}:443"),
        format!("http://{API}:0/"),
        format!("http://{API}:99999/"),
        "http:///x".to_owned(),
    ];
    for target in targets {
        let response = world.raw(format!("GET {target} HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
        assert_eq!(response.status, 400, "{target}");
    }
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn head_above_its_bounds_is_431() {
    for count in [100, 250, 5000] {
        let fields = "X-A: 1\r\n".repeat(count);
        let head = format!("GET /web/api/v2/x HTTP/1.1\r\nHost: {API}\r\n{fields}\r\n");
        check_is_refused(head, 431).await;
        // Neither its length nor its body lead hyper astray, which sees no more of them.
        let body = "GET /web/api/v2/smuggled HTTP/1.1\r\nHost: x\r\n\r\n";
        for length in [&format!("Content-Length: {}", body.len()), "Expect: 100-continue"] {
            for (first, last) in [(length.to_owned() + "\r\n", ""), (String::new(), length)] {
                let head = format!(
                    "POST /web/api/v2/x HTTP/1.1\r\nHost: {API}\r\n{first}{fields}{last}\r\n\r\n"
                );
                check_is_refused(head + body, 431).await;
            }
        }
    }
    let filler = "x".repeat(80 * 1024);
    check_is_refused(
        format!("GET /web/api/v2/x HTTP/1.1\r\nHost: {API}\r\nX-Filler: {filler}\r\n\r\n"),
        431,
    )
    .await;
}

#[tokio::test]
async fn target_above_its_bound_is_414() {
    for length in [40_000, 100_000] {
        let target = format!("/web/api/v2/{}", "x".repeat(length));
        check_is_refused(format!("GET {target} HTTP/1.1\r\nHost: {API}\r\n\r\n"), 414).await;
    }
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
        let bare = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(answer, bare, "{garbage:?}");
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
