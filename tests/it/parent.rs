//! The parent proxy: all that leaves for the shop or for others goes through it, or says why not.

use crate::routes::check_is_made_here;
use crate::support::Stage;
use crate::support::client::{API, GATE, Request, Way};
use crate::support::http::Response;
use crate::support::origin::{Door, Origin};
use crate::support::parent::{Manner, ParentProxy, REFUSAL};
use crate::support::sidecar::stderr;

const PATH: &str = "/web/api/v2/x";
const SHOP: &str = "www.chitai-gorod.ru";

/// `us er:p@ss:w/ord` as the variable and as Basic credentials have it.
const ENCODED: &str = "us%20er:p%40ss:w%2Ford";
const BASIC: &str = "Basic dXMgZXI6cEBzczp3L29yZA==";

/// A stage whose only way to the shop is `parent`, and no solver.
async fn behind(parent: &ParentProxy) -> Stage {
    let mut stage = Stage::new().await;
    for host in [API, GATE, SHOP] {
        parent.knows(&format!("{host}:443"), stage.origin.addr());
    }
    stage.unset("CONNECT_TO");
    stage.set("TOKEN_SOURCES", "direct");
    stage.set("UPSTREAM_PROXY", parent.url());
    stage
}

fn with_credentials(parent: &ParentProxy, credentials: &str) -> String {
    format!("http://{credentials}@{}", parent.addr())
}

#[tokio::test]
async fn traffic_verifier_and_direct_source_go_through_the_parent() {
    let parent = ParentProxy::start(Manner::Leads).await;
    let world = behind(&parent).await.start().await;
    world.kill_token();
    for way in Way::ALL {
        assert_eq!(world.call(way, &Request::get(PATH)).await.status, 200, "{way:?}");
    }
    assert_eq!(world.sidecar.generation().await, 2, "the direct source gave a token");
    assert_eq!(world.origin.connections(), parent.asked().len(), "none went another way");
    for head in parent.asked() {
        assert_eq!(head.start, format!("CONNECT {API}:443 HTTP/1.1"));
        assert_eq!(head.values("host"), [format!("{API}:443")]);
        assert_eq!(head.fields.len(), 1, "neither credentials nor anything else: {head:?}");
    }
}

#[tokio::test]
async fn shop_page_is_asked_through_the_parent() {
    let parent = ParentProxy::start(Manner::Leads).await;
    let world = behind(&parent).await.start().await;
    world.origin.set_door(Door::Status(403));
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    assert!(parent.targets().contains(&format!("{SHOP}:443")), "{:?}", parent.targets());
}

#[tokio::test]
async fn credentials_are_decoded_and_sent_with_each_request() {
    let parent = ParentProxy::start(Manner::Asks(BASIC.to_owned())).await;
    let mut stage = behind(&parent).await;
    stage.set("UPSTREAM_PROXY", with_credentials(&parent, ENCODED));
    stage.set("RUST_LOG", "trace");
    let world = stage.start().await;
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    for head in parent.asked() {
        assert_eq!(head.values("proxy-authorization"), [BASIC]);
    }
    for request in world.origin.all_requests() {
        assert!(request.head.value("proxy-authorization").is_none(), "{request:?}");
    }
    check_hides_credentials(&world.sidecar.log());
}

fn check_hides_credentials(text: &str) {
    for secret in ["p@ss", "p%40ss", "w/ord", "us er", "us%20er", "dXMgZXI6"] {
        let line = text.lines().find(|line| line.contains(secret));
        assert!(line.is_none(), "{secret} in: {}", line.unwrap_or_default());
    }
}

#[tokio::test]
async fn wrong_credentials_are_told_and_not_shown() {
    let parent = ParentProxy::start(Manner::Asks("Basic b3RoZXI=".to_owned())).await;
    let mut stage = behind(&parent).await;
    stage.set("UPSTREAM_PROXY", with_credentials(&parent, ENCODED));
    stage.set("RUST_LOG", "trace");
    let world = stage.launch().await;
    let response = world.get(PATH).await;
    check_fails(&response, "check the credentials of UPSTREAM_PROXY", "proxy_configuration_error");
    let refresh = world.sidecar.ask("POST", "/refresh").await;
    assert_eq!(refresh.status, 502, "{refresh:?}");
    let status = world.sidecar.status().await.to_string();
    assert!(status.contains("check the credentials of UPSTREAM_PROXY"), "{status}");
    for text in [response.text(), refresh.text(), status, world.sidecar.log()] {
        check_hides_credentials(&text);
    }
}

fn check_fails(response: &Response, why: &str, kind: &str) {
    assert_eq!((response.status, response.code().as_str()), (502, "upstream_unreachable"));
    let message = response.json()["message"].as_str().unwrap_or_default().to_owned();
    assert!(message.contains("UPSTREAM_PROXY") && message.contains(why), "{message}");
    let field = response.value("proxy-status").unwrap_or_default();
    assert!(field.contains(&format!("error={kind};")), "{field}");
    check_is_made_here(response);
}

/// Traffic of each kind, the verifier and the direct source all fail for this reason, and say so.
async fn check_everything_fails(url: &str, mut stage: Stage, why: &str, kind: &str) {
    stage.set("UPSTREAM_PROXY", url);
    stage.set("CONNECT_TIMEOUT", "300ms");
    let world = stage.launch().await;
    for way in [Way::Intercept, Way::AbsoluteHttp, Way::Gateway] {
        check_fails(&world.call(way, &Request::get(PATH)).await, why, kind);
    }
    let (tunnel, _) = world.connect("other.test:443").await;
    check_fails(&tunnel, why, kind);
    let plain = world.raw("GET http://other.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n").await;
    check_fails(&plain, why, kind);
    assert_eq!(world.sidecar.ask("POST", "/refresh").await.status, 502);
    let status = world.sidecar.status().await;
    let error = status["refresh"]["last_error"].as_str().unwrap_or_default();
    assert!(error.contains("UPSTREAM_PROXY") && error.contains(why), "{error}");
    let verifier = world.sidecar.events().into_iter().find(|event| {
        event["message"] == "the verifier does not answer"
            && event["error"].as_str().is_some_and(|error| error.contains(why))
    });
    assert!(verifier.is_some(), "the verifier went another way");
    assert!(world.origin.all_requests().is_empty());
}

async fn check_parent_that(manner: Manner, why: &str, kind: &str) {
    let parent = ParentProxy::start(manner).await;
    let stage = behind(&parent).await;
    check_everything_fails(&parent.url(), stage, why, kind).await;
}

fn says(bytes: &[u8]) -> Manner {
    Manner::Says(bytes.to_vec())
}

#[tokio::test]
async fn parent_that_does_not_run_is_named() {
    let parent = ParentProxy::start(Manner::Leads).await;
    let stage = behind(&parent).await;
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let url = format!("http://{nobody}");
    check_everything_fails(&url, stage, "cannot be reached", "connection_refused").await;
}

#[tokio::test]
async fn parent_that_hangs_costs_the_connect_timeout() {
    check_parent_that(Manner::Hangs, "within 300ms", "connection_timeout").await;
}

#[tokio::test]
async fn parent_that_stops_amid_its_head_and_hangs_costs_the_connect_timeout() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut kept = Vec::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.try_write(b"HTTP/1.1 200 OK\r\nVia").unwrap();
            kept.push(stream);
        }
    });
    let parent = ParentProxy::start(Manner::Leads).await;
    let stage = behind(&parent).await;
    check_everything_fails(&url, stage, "within 300ms", "connection_timeout").await;
}

#[tokio::test]
async fn parent_that_asks_for_credentials_is_told_of() {
    check_parent_that(
        says(REFUSAL),
        "check the credentials of UPSTREAM_PROXY",
        "proxy_configuration_error",
    )
    .await;
}

#[tokio::test]
async fn parent_that_forbids_is_told_of() {
    let manner = says(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno");
    check_parent_that(manner, "answered 403", "destination_unavailable").await;
}

#[tokio::test]
async fn parent_that_finds_no_way_is_told_of() {
    let manner = says(b"HTTP/1.0 502 Bad Gateway\r\n\r\n<html>");
    check_parent_that(manner, "answered 502", "destination_unavailable").await;
}

#[tokio::test]
async fn parent_that_speaks_no_http_is_told_of() {
    check_parent_that(says(b"SSH-2.0-x\r\n\r\n"), "no HTTP answer", "http_protocol_error").await;
}

#[tokio::test]
async fn parent_whose_head_does_not_end_is_told_of() {
    let mut head = b"HTTP/1.1 200 OK\r\n".to_vec();
    head.resize(20_000, b'x');
    check_parent_that(Manner::Says(head), "no HTTP answer", "http_protocol_error").await;
}

#[tokio::test]
async fn parent_that_breaks_off_amid_its_head_is_told_of() {
    let manner = says(b"HTTP/1.1 200 OK\r\nVia: 1.1");
    check_parent_that(manner, "broke off", "connection_terminated").await;
}

#[tokio::test]
async fn tunnels_and_plain_requests_to_others_go_through_the_parent() {
    let parent = ParentProxy::start(Manner::Leads).await;
    let stage = behind(&parent).await;
    let tls = Origin::start_other(Some(stage.ca.acceptor(&["other.test"]))).await;
    let plain = Origin::start_other(None).await;
    parent.knows("other.test:443", tls.addr());
    parent.knows("other.test:80", plain.addr());
    let world = stage.start().await;
    let tunnel = world.tunnel("other.test:443").await.into_inner();
    let trusted = world.path("shop-ca.pem");
    let connector = crate::support::certificates::connector(&trusted, &[]);
    let mut inner =
        crate::support::certificates::handshake(tunnel, "other.test", &connector).await.unwrap();
    inner.send("GET /inside HTTP/1.1\r\nHost: other.test\r\n\r\n").await;
    assert_eq!(inner.response("GET").await.text(), "/inside");
    let answer = world.raw("GET http://other.test/a?b HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!((answer.status, answer.text().as_str()), (200, "/a?b"));
    let request = plain.all_requests().remove(0);
    assert_eq!(request.head.start, "GET /a?b HTTP/1.1");
    let targets = parent.targets();
    assert!(
        targets.contains(&"other.test:443".into()) && targets.contains(&"other.test:80".into())
    );
}

#[tokio::test]
async fn what_the_destination_says_at_once_is_not_lost() {
    let parent = ParentProxy::start(says(b"HTTP/1.1 200 OK\r\n\r\n220 mail.test ready\r\n")).await;
    let world = behind(&parent).await.launch().await;
    let mut wire = world.tunnel("mail.test:25").await;
    assert_eq!(wire.exactly(21).await.unwrap(), b"220 mail.test ready\r\n");
}

#[tokio::test]
async fn loopback_and_connect_to_never_go_to_the_parent() {
    let parent = ParentProxy::start(Manner::Leads).await;
    let other = Origin::start_other(None).await;
    let mut stage = Stage::new().await;
    let port = other.addr().port();
    stage.set("UPSTREAM_PROXY", parent.url());
    stage.set("ALLOW_HOSTS", "127.0.0.0/8,[::1]");
    stage.add("CONNECT_TO", format!("other.test:80={}", other.addr()));
    let world = stage.start().await;
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.solver.solves(), 1, "the solver was asked directly");
    for host in [format!("127.0.0.1:{port}"), format!("localhost:{port}"), "other.test".into()] {
        let request = format!("GET http://{host}/x HTTP/1.1\r\nHost: {host}\r\n\r\n");
        assert_eq!(world.raw(request).await.status, 200, "{host}");
    }
    assert!(parent.asked().is_empty(), "{:?}", parent.targets());
}

#[tokio::test]
async fn private_addresses_are_refused_although_a_parent_would_lead_there() {
    let parent = ParentProxy::start(Manner::Leads).await;
    let world = behind(&parent).await.start().await;
    let before = parent.asked().len();
    let own = world.sidecar.admin().to_string();
    for target in
        ["10.0.0.1:443", "[fd00::1]:443", "169.254.169.254:80", "127.1:80", "0x7f000001:80", &own]
    {
        let (response, _) = world.connect(target).await;
        let seen = (response.status, response.code());
        assert_eq!(seen, (403, "target_not_allowed".into()), "{target}");
    }
    assert_eq!(parent.asked().len(), before);
}

#[tokio::test]
async fn sidecar_that_is_its_own_parent_does_not_ask_itself() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = listener.local_addr().unwrap();
    drop(listener);
    let mut stage = Stage::new().await;
    stage.unset("CONNECT_TO");
    stage.set("TOKEN_SOURCES", "direct");
    stage.set("PROXY_LISTEN", own);
    stage.set("UPSTREAM_PROXY", format!("http://{own}"));
    let world = stage.launch().await;
    let response = world.get(PATH).await;
    check_fails(&response, "is this sidecar itself", "proxy_loop_detected");
}

#[tokio::test]
async fn parent_whose_name_does_not_resolve_is_told_of() {
    let parent = ParentProxy::start(Manner::Leads).await;
    let mut stage = behind(&parent).await;
    stage.set("UPSTREAM_PROXY", "http://nowhere.invalid:3128");
    let world = stage.launch().await;
    check_fails(&world.get(PATH).await, "cannot be found", "dns_error");
}

#[tokio::test]
async fn unusable_value_ends_the_start_and_is_not_shown() {
    for value in ["socks5://u:hunter2@h:1080", "http://u:hunter2@h", "http://u:hunter2@h:1/x"] {
        let mut stage = Stage::new().await;
        stage.set("UPSTREAM_PROXY", value);
        let output = stage.run(&["run"]).await;
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains("UPSTREAM_PROXY:") && !text.contains("hunter2"), "{text}");
    }
}
