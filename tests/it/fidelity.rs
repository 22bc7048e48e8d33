//! Requests and answers pass byte for byte, but for what the contract changes.

use crate::routes::check_is_made_here;
use crate::support::World;
use crate::support::client::{API, Request, Way};
use crate::support::http::Framing;
use crate::support::origin::Recorded;

/// Targets that a URL parser would like to mend.
const TARGETS: [&str; 22] = [
    "/web/api/v2/search/product?products[page]=1&products[per-page]=2",
    "/web/api/v2/search?products%5Bpage%5D=1&phrase=%D0%BA%D0%BD%D0%B8%D0%B3%D0%B0",
    "/web/api/v2/search?phrase=a+b%20c",
    "/web/api/v2/search?phrase=%%2",
    "/web/api/v2/search?phrase=%",
    "/web/api/v2/search?phrase=%zz%d0%BA",
    "/web/api/v2/x?",
    "/web/api/v2/x??a",
    "/web/api/v2/x?&&==&a=",
    "/web/api/v2//double//slash/",
    "/web/api/v2/a/../b/./c",
    "/web/api/v2/..",
    "/web/api/v2/%2e%2E/%2F",
    "/web/api/v2/semi;colon=1,2",
    "/web/api/v2/x?url=https://www.chitai-gorod.ru/?a=b",
    "/web/api/v2/x\"double\"?a='quote'",
    "/web/api/v2/x?{json:[1]}",
    "/web/api/v2/x?a|b\\c^d",
    "/web/api/v2/~!$&'()*+,;=:@-._",
    "/web/api/v2/x?tilde~!$'()*,;:@/?",
    "/web/api/v2/UPPER/lower",
    "/web/api/v2/x?q=%00%0a%0D",
];

async fn check_targets(way: Way) {
    let world = World::start().await;
    let mut session = world.open(way).await;
    for target in TARGETS {
        let response = session.get(target).await;
        assert_eq!(response.status, 200, "{way:?} {target}: {response:?}");
    }
    let seen = world.origin.requests();
    let seen: Vec<&str> = seen.iter().map(Recorded::target).collect();
    assert_eq!(seen, TARGETS);
}

#[tokio::test]
async fn targets_pass_byte_for_byte_in_tls_tunnels() {
    check_targets(Way::Intercept).await;
}

#[tokio::test]
async fn targets_pass_byte_for_byte_in_plain_tunnels() {
    check_targets(Way::PlainTunnel).await;
}

#[tokio::test]
async fn targets_pass_byte_for_byte_in_absolute_form() {
    check_targets(Way::AbsoluteHttp).await;
    check_targets(Way::AbsoluteHttps).await;
}

#[tokio::test]
async fn targets_pass_byte_for_byte_through_the_gateway() {
    check_targets(Way::Gateway).await;
    check_targets(Way::GatewayByHost).await;
}

#[tokio::test]
async fn targets_pass_byte_for_byte_on_the_replay_too() {
    let world = World::start().await;
    world.kill_token();
    let target = "/web/api/v2//gate/..?products[page]=%%2&";
    assert_eq!(world.call(Way::Intercept, &Request::get(target)).await.status, 200);
    let sends = world.origin.requests_for(target);
    assert_eq!(sends.len(), 2);
}

#[tokio::test]
async fn absolute_form_without_a_path_asks_for_the_root() {
    let world = World::start().await;
    let before = world.origin.all_requests().len();
    let response = world.raw(format!("GET https://{API} HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
    assert_eq!(response.status, 200, "{response:?}");
    let seen = world.origin.all_requests();
    assert!(seen[before..].iter().any(|request| request.target() == "/"), "{seen:?}");
}

#[tokio::test]
async fn targets_that_the_uri_type_cannot_hold_are_refused() {
    let world = World::start().await;
    for raw in ["x<", "x>", "x`", "x?a=<", "x?a=>", "x?a=\""] {
        let path = format!("/web/api/v2/{raw}");
        let response = world.call(Way::PlainTunnel, &Request::get(&path)).await;
        assert_eq!(response.status, 400, "{raw}");
    }
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn target_with_a_fragment_is_refused() {
    let world = World::start().await;
    for target in ["/web/api/v2/x#fragment", "/web/api/v2/x?a#fragment"] {
        let response = world.call(Way::PlainTunnel, &Request::get(target)).await;
        assert_eq!(response.status, 400, "{target}");
    }
}

#[tokio::test]
async fn every_method_passes() {
    let world = World::start().await;
    let mut session = world.open(Way::Intercept).await;
    for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE", "M-SEARCH"]
    {
        let path = format!("/web/api/v2/by/{method}");
        assert_eq!(session.call(&Request::new(method, &path)).await.status, 200, "{method}");
        assert_eq!(world.origin.requests_for(&path)[0].method(), method);
    }
}

#[tokio::test]
async fn trace_carries_no_token_of_ours() {
    let world = World::start().await;
    for way in Way::ALL {
        assert_eq!(world.call(way, &Request::new("TRACE", "/web/api/v2/x")).await.status, 401);
        let head = world.origin.requests().pop().unwrap().head;
        assert!(head.value("authorization").is_none(), "{way:?}: {head:?}");
    }
}

#[tokio::test]
async fn max_forwards_counts_the_hop() {
    let world = World::start().await;
    for (method, sent, seen) in
        [("OPTIONS", "2", "1"), ("TRACE", "1", "0"), ("GET", "0", "0"), ("OPTIONS", "x", "x")]
    {
        let request = Request::new(method, "/web/api/v2/x").field("Max-Forwards", sent);
        let response = world.call(Way::Intercept, &request).await;
        assert!(response.value("proxy-status").is_none(), "{method} {sent}: {response:?}");
        let reached = world.origin.requests().pop().unwrap().head;
        assert_eq!(
            (reached.word(0), reached.value("max-forwards")),
            (method, Some(seen)),
            "{sent}"
        );
    }
}

#[tokio::test]
async fn last_hop_that_max_forwards_allows_says_that_it_is_the_sidecar() {
    let world = World::start().await;
    for way in Way::ALL {
        let mut session = world.open(way).await;
        let request = |method| Request::new(method, "/web/api/v2/x").field("Max-Forwards", "0");
        let options = session.call(&request("OPTIONS")).await;
        assert_eq!((options.status, options.text().as_str()), (200, ""), "{way:?}");
        assert_eq!(options.value("proxy-status"), Some("token-sidecar"), "{way:?}");
        assert_eq!(options.value("content-length"), Some("0"), "{way:?}");
        // It would give back what it carried.
        let trace = session.call(&request("TRACE").field("Cookie", "secret=1")).await;
        assert_eq!((trace.status, trace.code().as_str()), (501, "bad_request"), "{way:?}");
        check_is_made_here(&trace);
        assert!(!trace.text().contains("secret"), "{way:?}");
    }
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn fields_arrive_in_case_and_order_with_nothing_added() {
    let world = World::start().await;
    for way in Way::ALL {
        let path = format!("/web/api/v2/fields/{way:?}");
        let request = Request::get(&path)
            .field("accept", "*/*")
            .field("Initial-Feature", "index")
            .field("X-UPPER", "1")
            .field("x-lower", "2")
            .field("X-Many", "b")
            .field("X-Many", "a")
            .field("X-Empty", "")
            .field("User-Agent", "parser/1.0 (+no\u{e9}l)")
            .field("Accept-Encoding", "gzip, br")
            .field("Cookie", "a=1; b=\"2\"; c")
            .field("authorization", "Bearer stale");
        assert_eq!(world.call(way, &request).await.status, 200, "{way:?}");
        let seen = world.origin.requests_for(&path).remove(0).head;
        let mut names: Vec<&str> = seen.fields.iter().map(|(name, _)| name.as_str()).collect();
        for name in [
            "accept",
            "Initial-Feature",
            "X-UPPER",
            "x-lower",
            "X-Many",
            "X-Empty",
            "User-Agent",
            "Accept-Encoding",
            "Cookie",
        ] {
            assert!(names.contains(&name), "{way:?}: {name} in {names:?}");
        }
        names.sort_by_key(|name| name.to_lowercase());
        names.dedup_by_key(|name| name.to_lowercase());
        assert_eq!(names.len(), 11, "{way:?}: {names:?}");
        assert_eq!(seen.values("x-many"), ["b", "a"]);
        assert_eq!(seen.values("x-empty"), [""]);
        assert_eq!(seen.values("user-agent"), ["parser/1.0 (+no\u{e9}l)"]);
        assert_eq!(seen.values("cookie"), ["a=1; b=\"2\"; c"]);
    }
}

#[tokio::test]
async fn each_head_on_a_connection_keeps_a_spelling_of_its_own() {
    let world = World::start().await;
    let mut session = world.open(Way::Intercept).await;
    for (number, name) in ["X-ONE", "X-One", "x-one", "X-one", "x-oNE"].iter().enumerate() {
        let path = format!("/web/api/v2/spelling/{number}");
        let answer =
            format!("HTTP/1.1 200 OK\r\n{name}: 1\r\nContent-Length: 10\r\n\r\nX-ONE: 1\r\n");
        world.origin.script(&path, answer, false);
        let request = Request::new("POST", &path).field(name, "1").body(b"\r\nX-ONE: 1".to_vec());
        let response = session.call(&request).await;
        assert_eq!(response.text(), "X-ONE: 1\r\n");
        assert!(response.head.fields.iter().any(|(seen, _)| seen == name), "{response:?}");
        let seen = &world.origin.requests_for(&path)[0];
        assert!(seen.head.fields.iter().any(|(seen, _)| seen == name), "{seen:?}");
        assert_eq!(seen.body, b"\r\nX-ONE: 1");
    }
}

#[tokio::test]
async fn spelling_of_fields_is_kept_on_the_replay() {
    let world = World::start().await;
    world.kill_token();
    let path = "/web/api/v2/spelling/replay";
    let request = Request::get(path).field("X-SHOUTED", "1").field("x-said", "1");
    assert_eq!(world.call(Way::Gateway, &request).await.status, 200);
    let sends = world.origin.requests_for(path);
    assert_eq!(sends.len(), 2);
    for sent in sends {
        for name in ["X-SHOUTED", "x-said"] {
            assert!(sent.head.fields.iter().any(|(seen, _)| seen == name), "{sent:?}");
        }
    }
}

#[tokio::test]
async fn order_of_fields_is_kept() {
    let world = World::start().await;
    let mut request = Request::get("/web/api/v2/order");
    let names = ["Zeta", "alpha", "Mid", "Beta", "accept", "User-Agent", "x-9", "x-1"];
    for name in names {
        request = request.field(name, "v");
    }
    assert_eq!(world.call(Way::Intercept, &request).await.status, 200);
    let seen = world.origin.only_request().head;
    let seen: Vec<&str> = seen
        .fields
        .iter()
        .map(|(name, _)| name.as_str())
        .filter(|name| names.contains(name))
        .collect();
    assert_eq!(seen, names);
}

#[tokio::test]
async fn neither_via_nor_the_clients_address_is_added() {
    let world = World::start().await;
    for way in Way::ALL {
        assert_eq!(world.call(way, &Request::get("/web/api/v2/plain")).await.status, 200);
    }
    for request in world.origin.requests() {
        let names: Vec<String> =
            request.head.fields.iter().map(|(name, _)| name.to_lowercase()).collect();
        let mut sorted = names.clone();
        sorted.sort();
        assert_eq!(sorted, ["authorization", "host"], "{names:?}");
    }
}

#[tokio::test]
async fn hop_by_hop_fields_of_a_request_do_not_cross() {
    let world = World::start().await;
    for way in Way::ALL {
        let path = format!("/web/api/v2/hop/{way:?}");
        let request = Request::get(&path)
            .field("Connection", "keep-alive, X-Private, x-other")
            .field("X-Private", "1")
            .field("X-Other", "1")
            .field("Keep-Alive", "timeout=5")
            .field("Proxy-Authorization", "Basic eDp5")
            .field("Proxy-Connection", "keep-alive")
            .field("Proxy-Authenticate", "Basic")
            .field("Proxy-Authentication-Info", "x")
            .field("TE", "trailers")
            .field("Upgrade", "websocket")
            .field("X-Public", "1");
        assert_eq!(world.call(way, &request).await.status, 200, "{way:?}");
        let seen = world.origin.requests_for(&path).remove(0).head;
        for name in [
            "X-Private",
            "X-Other",
            "Keep-Alive",
            "Proxy-Authorization",
            "Proxy-Connection",
            "Proxy-Authenticate",
            "Proxy-Authentication-Info",
            "Upgrade",
        ] {
            assert!(seen.value(name).is_none(), "{way:?}: {name} crossed");
        }
        assert!(!seen.value("connection").unwrap_or_default().to_lowercase().contains("private"));
        assert_eq!(seen.values("x-public"), ["1"]);
    }
}

#[tokio::test]
async fn of_te_only_trailers_cross() {
    let world = World::start().await;
    for (sent, seen) in
        [("trailers", vec!["trailers"]), ("gzip;q=1", vec![]), ("gzip, trailers", vec![])]
    {
        let request = Request::get("/web/api/v2/x").field("Connection", "TE").field("TE", sent);
        assert_eq!(world.call(Way::Intercept, &request).await.status, 200, "{sent}");
        let head = world.origin.requests().pop().unwrap().head;
        assert_eq!(head.values("te"), seen, "{sent}");
    }
}

#[tokio::test]
async fn hop_by_hop_fields_of_an_answer_do_not_cross() {
    let world = World::start().await;
    let answer = "HTTP/1.1 200 OK\r\nConnection: X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\n\
        Proxy-Authenticate: Basic\r\nProxy-Authentication-Info: x\r\nProxy-Connection: close\r\nUpgrade: h2c\r\n\
        X-Public: 1\r\nContent-Length: 2\r\n\r\nok";
    world.origin.script("/web/api/v2/hop", answer, false);
    for way in Way::ALL {
        let response = world.call(way, &Request::get("/web/api/v2/hop")).await;
        assert_eq!(response.text(), "ok");
        for name in [
            "X-Private",
            "Keep-Alive",
            "Proxy-Authenticate",
            "Proxy-Authentication-Info",
            "Proxy-Connection",
            "Upgrade",
        ] {
            assert!(response.value(name).is_none(), "{way:?}: {name} crossed");
        }
        assert_eq!(response.value("x-public"), Some("1"));
    }
}

#[tokio::test]
async fn fields_of_an_answer_keep_case_and_order_and_nothing_is_added() {
    let world = World::start().await;
    let answer = "HTTP/1.1 200 OK\r\nx-lower: 1\r\nX-UPPER: 2\r\nSet-Cookie: b=1; Path=/\r\nSet-Cookie: a=2\r\n\
        ETag: \"x\"\r\nContent-Length: 2\r\n\r\nok";
    world.origin.script("/web/api/v2/fields", answer, false);
    for way in Way::ALL {
        let response = world.call(way, &Request::get("/web/api/v2/fields")).await;
        let mut names: Vec<&str> =
            response.head.fields.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(response.head.values("set-cookie"), ["b=1; Path=/", "a=2"]);
        names.sort_unstable();
        assert_eq!(
            names,
            ["Content-Length", "ETag", "Set-Cookie", "Set-Cookie", "X-UPPER", "x-lower"],
            "{way:?}"
        );
    }
}

#[tokio::test]
async fn date_of_the_upstream_passes_and_none_is_made_up() {
    let world = World::start().await;
    let response = world.get("/web/api/v2/x").await;
    assert!(response.value("date").is_none(), "{response:?}");
    world.origin.set_date("Tue, 15 Nov 1994 08:12:31 GMT");
    let response = world.get("/web/api/v2/x").await;
    assert_eq!(response.head.values("date"), ["Tue, 15 Nov 1994 08:12:31 GMT"]);
}

#[tokio::test]
async fn proxy_status_of_the_upstream_stays() {
    let world = World::start().await;
    let answer = "HTTP/1.1 200 OK\r\nProxy-Status: edge; fwd=miss\r\nContent-Length: 0\r\n\r\n";
    world.origin.script("/web/api/v2/edge", answer, false);
    let response = world.get("/web/api/v2/edge").await;
    assert_eq!(response.head.values("proxy-status"), ["edge; fwd=miss"]);
}

#[tokio::test]
async fn encoded_answers_are_not_decoded() {
    let world = World::start().await;
    let mut answer =
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 6\r\n\r\n".to_vec();
    answer.extend_from_slice(b"\x1f\x8b\x08\x00\xff\x00");
    world.origin.script("/web/api/v2/gzip", answer, false);
    let response = world.call(Way::Intercept, &Request::get("/web/api/v2/gzip")).await;
    assert_eq!(response.value("content-encoding"), Some("gzip"));
    assert_eq!(response.body, b"\x1f\x8b\x08\x00\xff\x00");
}

#[tokio::test]
async fn ordinary_answers_pass_without_refresh_or_replay() {
    let world = World::start().await;
    for status in [400, 403, 404, 405, 409, 418, 422, 429, 500, 502, 503] {
        let path = format!("/web/api/v2/status/{status}");
        let response = world.call(Way::Intercept, &Request::get(&path)).await;
        assert_eq!(
            (response.status, response.text().as_str()),
            (status, r#"{"message":"said so"}"#)
        );
        assert_eq!(world.origin.requests_for(&path).len(), 1);
    }
    assert_eq!(world.solver.solves(), 0);
}

#[tokio::test]
async fn answers_without_a_body_stay_so() {
    let world = World::start().await;
    world.origin.script("/web/api/v2/204", "HTTP/1.1 204 No Content\r\nX-A: 1\r\n\r\n", false);
    world.origin.script(
        "/web/api/v2/304",
        "HTTP/1.1 304 Not Modified\r\nETag: \"1\"\r\n\r\n",
        false,
    );
    for way in Way::ALL {
        let mut session = world.open(way).await;
        assert_eq!(session.get("/web/api/v2/204").await.status, 204);
        assert_eq!(session.get("/web/api/v2/304").await.status, 304);
        assert_eq!(session.get("/web/api/v2/after").await.status, 200, "{way:?}");
    }
}

#[tokio::test]
async fn answer_to_head_keeps_its_length_and_has_no_body() {
    let world = World::start().await;
    let mut session = world.open(Way::Intercept).await;
    let response = session.call(&Request::new("HEAD", "/web/api/v2/big-head")).await;
    assert_eq!(response.status, 200);
    assert_eq!(response.value("content-length"), Some("20"));
    assert_eq!(session.get("/web/api/v2/after").await.status, 200);
}

#[tokio::test]
async fn interim_answers_of_the_upstream_break_nothing() {
    let world = World::start().await;
    let answer = "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    world.origin.script("/web/api/v2/hints", answer, false);
    assert_eq!(world.get("/web/api/v2/hints").await.text(), "ok");
}

#[tokio::test]
async fn http_1_0_client_gets_a_body_that_ends_with_the_connection_or_has_a_length() {
    let world = World::start().await;
    let mut wire = world.wire().await;
    wire.send(format!("GET http://{API}/web/api/v2/big-chunked/1000 HTTP/1.0\r\n\r\n")).await;
    let response = wire.response("GET").await;
    assert_eq!(response.status, 200);
    assert_ne!(response.framing, Framing::Chunked);
    assert_eq!(response.body.len(), 1000);
}

#[tokio::test]
async fn http_1_0_client_does_not_take_half_an_answer_for_the_whole() {
    let world = World::start().await;
    let half = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n5\r\nsec";
    world.origin.script("/web/api/v2/half", half, true);
    for way in [Way::AbsoluteHttp, Way::PlainTunnel, Way::Intercept] {
        let target = if way == Way::AbsoluteHttp { format!("http://{API}") } else { String::new() };
        let mut wire = world.open(way).await.wire;
        wire.send(format!("GET {target}/web/api/v2/half HTTP/1.0\r\nHost: {API}\r\n\r\n")).await;
        let error = wire.until_end().await.expect_err("a clean end");
        let broken = [std::io::ErrorKind::ConnectionReset, std::io::ErrorKind::UnexpectedEof];
        assert!(broken.contains(&error.kind()), "{way:?}: {error}");
    }
}
