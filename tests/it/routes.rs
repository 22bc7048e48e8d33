//! The ways in: what each form of request on the one port leads to.

use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use crate::support::certificates::{connector, handshake};
use crate::support::client::{API, GATE, Request, Session, Way};
use crate::support::http::{Response, Wire};
use crate::support::origin::Origin;
use crate::support::{Stage, World, nobody};

/// Asks `way` for a page and checks that the shop saw it with the token.
async fn check_carries_the_token(way: Way) {
    let world = World::start().await;
    let response = world.call(way, &Request::get("/web/api/v2/products?q=1")).await;
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(response.text(), "/web/api/v2/products?q=1");
    let request = world.origin.only_request();
    assert_eq!(request.head.values("authorization"), [format!("Bearer {}", world.token)]);
    assert_eq!(request.head.values("host"), [API]);
}

#[tokio::test]
async fn connect_with_tls_inside_carries_the_token() {
    check_carries_the_token(Way::Intercept).await;
}

#[tokio::test]
async fn connect_to_port_80_with_plain_http_inside_carries_the_token() {
    check_carries_the_token(Way::PlainTunnel).await;
}

#[tokio::test]
async fn absolute_form_http_carries_the_token() {
    check_carries_the_token(Way::AbsoluteHttp).await;
}

#[tokio::test]
async fn absolute_form_https_carries_the_token() {
    check_carries_the_token(Way::AbsoluteHttps).await;
}

#[tokio::test]
async fn gateway_by_prefix_carries_the_token() {
    check_carries_the_token(Way::Gateway).await;
}

#[tokio::test]
async fn gateway_by_host_carries_the_token() {
    check_carries_the_token(Way::GatewayByHost).await;
}

/// `bytes` must open a tunnel in which TLS to the API host works.
async fn check_opens_a_tunnel(world: &World, bytes: &str, name: &str) {
    let mut wire = world.wire().await;
    wire.send(bytes).await;
    let (head, _) = wire.response_head().await.unwrap();
    assert_eq!(head.word(1), "200", "{bytes:?}: {head:?}");
    let mut tls = world.tls_over(wire, name).await;
    tls.send(format!("GET /web/api/v2/x HTTP/1.1\r\nHost: {name}\r\n\r\n")).await;
    assert_eq!(tls.response("GET").await.status, 200, "{bytes:?}");
}

#[tokio::test]
async fn connect_in_http_1_0_without_host_opens_a_tunnel() {
    let world = World::start().await;
    check_opens_a_tunnel(&world, &format!("CONNECT {API}:443 HTTP/1.0\r\n\r\n"), API).await;
}

#[tokio::test]
async fn answer_to_a_connect_has_no_framing_fields() {
    let world = World::start().await;
    for version in ["HTTP/1.0", "HTTP/1.1"] {
        let mut wire = world.wire().await;
        wire.send(format!("CONNECT {API}:443 {version}\r\nHost: {API}\r\n\r\n")).await;
        let head = wire.head().await.unwrap().unwrap();
        assert_eq!((head.word(1), &head.fields[..]), ("200", &[][..]), "{version}");
    }
}

#[tokio::test]
async fn host_of_a_connect_is_not_looked_at() {
    let world = World::start().await;
    let bytes = format!("CONNECT {API}:443 HTTP/1.1\r\nHost: elsewhere.test:1\r\n\r\n");
    check_opens_a_tunnel(&world, &bytes, API).await;
}

#[tokio::test]
async fn connect_accepts_proxy_connection_as_curl_sends_it() {
    let world = World::start().await;
    let bytes = format!(
        "CONNECT {API}:443 HTTP/1.1\r\nHost: {API}:443\r\nUser-Agent: curl/8\r\nProxy-Connection: Keep-Alive\r\n\r\n"
    );
    check_opens_a_tunnel(&world, &bytes, API).await;
}

#[tokio::test]
async fn names_match_without_regard_to_case_or_a_trailing_dot() {
    let world = World::start().await;
    let upper = API.to_uppercase();
    check_opens_a_tunnel(&world, &format!("CONNECT {upper}:443 HTTP/1.1\r\n\r\n"), API).await;
    check_opens_a_tunnel(&world, &format!("CONNECT {API}.:443 HTTP/1.1\r\n\r\n"), API).await;
    let response =
        world.raw(format!("GET https://{upper}./web/api/v2/y HTTP/1.1\r\nHost: x\r\n\r\n")).await;
    assert_eq!(response.status, 200, "{response:?}");
}

#[tokio::test]
async fn the_second_api_host_is_intercepted_with_its_own_certificate() {
    let world = World::start().await;
    let bytes = format!("CONNECT {GATE}:443 HTTP/1.1\r\nHost: {GATE}:443\r\n\r\n");
    check_opens_a_tunnel(&world, &bytes, GATE).await;
    assert_eq!(world.origin.only_request().head.values("host"), [GATE]);
}

#[tokio::test]
async fn first_byte_in_a_tunnel_decides_and_not_its_port() {
    let world = World::start().await;
    let mut plain = world.tunnel(&format!("{API}:443")).await;
    plain.send(format!("GET /web/api/v2/plain HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
    assert_eq!(plain.response("GET").await.status, 200);
    let tunnel = world.tunnel(&format!("{API}:80")).await;
    let mut tls = world.tls_over(tunnel, API).await;
    tls.send(format!("GET /web/api/v2/tls HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
    assert_eq!(tls.response("GET").await.status, 200);
}

#[tokio::test]
async fn tls_in_a_tunnel_settles_on_http_1_1_where_h2_is_offered() {
    use tokio_rustls::rustls::pki_types::ServerName;
    let world = World::start().await;
    let tunnel = world.tunnel(&format!("{API}:443")).await;
    let connector = connector(&world.ca_file(), &[b"h2", b"http/1.1"]);
    let name = ServerName::try_from(API).unwrap();
    let stream = connector.connect(name, tunnel.into_inner()).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
}

#[tokio::test]
async fn tls_in_a_tunnel_works_where_no_alpn_is_offered() {
    let world = World::start().await;
    let tunnel = world.tunnel(&format!("{API}:443")).await;
    let connector = connector(&world.ca_file(), &[]);
    let mut tls = handshake(tunnel.into_inner(), API, &connector).await.unwrap();
    tls.send(format!("GET /web/api/v2/x HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
    assert_eq!(tls.response("GET").await.status, 200);
}

#[tokio::test]
async fn host_of_an_absolute_form_request_is_replaced() {
    let world = World::start().await;
    let response = world
        .raw(format!("GET https://{API}/web/api/v2/x HTTP/1.1\r\nHost: elsewhere.test\r\n\r\n"))
        .await;
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(world.origin.only_request().head.values("host"), [API]);
}

#[tokio::test]
async fn absolute_form_with_the_default_port_spelt_out_reaches_the_api() {
    let world = World::start().await;
    for authority in [format!("https://{API}:443"), format!("http://{API}:80")] {
        let response =
            world.raw(format!("GET {authority}/web/api/v2/x HTTP/1.1\r\nHost: x\r\n\r\n")).await;
        assert_eq!(response.status, 200, "{authority}: {response:?}");
    }
}

#[tokio::test]
async fn another_host_inside_a_tunnel_is_misdirected() {
    let world = World::start().await;
    for way in [Way::Intercept, Way::PlainTunnel] {
        let mut session = world.open(way).await;
        session.wire.send("GET /web/api/v2/x HTTP/1.1\r\nHost: elsewhere.test\r\n\r\n").await;
        let response = session.wire.response("GET").await;
        assert_eq!((response.status, response.code().as_str()), (421, "misdirected"), "{way:?}");
    }
    assert!(world.origin.requests().is_empty());
}

/// As Node's `https` without an agent writes it.
#[tokio::test]
async fn port_that_is_not_the_origins_inside_a_tunnel_does_not_reach_the_shop() {
    let world = World::start().await;
    let mut session = world.open(Way::Intercept).await;
    session.wire.send(format!("GET /web/api/v2/x HTTP/1.1\r\nHost: {API}:80\r\n\r\n")).await;
    assert_eq!(session.wire.response("GET").await.status, 200);
    assert_eq!(world.origin.only_request().head.values("host"), [API]);
}

#[tokio::test]
async fn the_same_host_inside_a_tunnel_may_be_spelt_otherwise() {
    let world = World::start().await;
    for host in [API.to_uppercase(), format!("{API}."), format!("{API}:443")] {
        let mut session = world.open(Way::Intercept).await;
        session.wire.send(format!("GET /web/api/v2/x HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(session.wire.response("GET").await.status, 200, "{host}");
    }
}

#[tokio::test]
async fn gateway_takes_the_longest_prefix_where_no_host_matches() {
    let world = World::start().await;
    let response = world.raw("GET /api/v2/x HTTP/1.1\r\nHost: sidecar\r\n\r\n").await;
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(world.origin.only_request().head.values("host"), [GATE]);
    let response = world.raw("GET /web/api/v2/y HTTP/1.1\r\nHost: sidecar\r\n\r\n").await;
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(world.origin.requests_for("/web/api/v2/y")[0].head.values("host"), [API]);
}

#[tokio::test]
async fn gateway_prefers_the_host_to_the_prefix() {
    let world = World::start().await;
    let response = world.raw(format!("GET /web/api/v2/x HTTP/1.1\r\nHost: {GATE}\r\n\r\n")).await;
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(world.origin.only_request().head.values("host"), [GATE]);
}

#[tokio::test]
async fn gateway_matches_whole_path_segments() {
    let world = World::start().await;
    let response = world.raw("GET /web/apiary HTTP/1.1\r\nHost: sidecar\r\n\r\n").await;
    assert_eq!((response.status, response.code().as_str()), (404, "no_such_origin"));
}

#[tokio::test]
async fn gateway_without_a_matching_origin_is_404_that_says_so() {
    let world = World::start().await;
    let response = world.raw("GET /elsewhere HTTP/1.1\r\nHost: sidecar\r\n\r\n").await;
    assert_eq!((response.status, response.code().as_str()), (404, "no_such_origin"));
    check_is_made_here(&response);
}

/// Marks of every answer that the sidecar makes itself.
pub(crate) fn check_is_made_here(response: &Response) {
    let json = response.json();
    for name in ["error", "message", "hint"] {
        assert!(json[name].as_str().is_some_and(|text| !text.is_empty()), "{name}: {json}");
    }
    let status = response.value("proxy-status").unwrap_or_default();
    assert!(status.starts_with("token-sidecar"), "Proxy-Status: {status:?}");
    assert!(response.value("content-type").unwrap_or_default().starts_with("application/json"));
}

#[tokio::test]
async fn ca_certificate_is_served_at_its_well_known_path() {
    let world = World::start().await;
    let response =
        world.raw("GET /.well-known/token-sidecar/ca.pem HTTP/1.1\r\nHost: sidecar\r\n\r\n").await;
    assert_eq!(response.status, 200);
    assert_eq!(response.text(), std::fs::read_to_string(world.ca_file()).unwrap());
}

#[tokio::test]
async fn bundle_at_its_well_known_path_holds_public_roots_and_our_ca() {
    let world = World::start().await;
    let response = world
        .raw("GET /.well-known/token-sidecar/ca-bundle.pem HTTP/1.1\r\nHost: sidecar\r\n\r\n")
        .await;
    assert_eq!(response.status, 200);
    let bundle = response.text();
    assert!(bundle.matches("BEGIN CERTIFICATE").count() > 100);
    assert!(bundle.contains(std::fs::read_to_string(world.ca_file()).unwrap().trim()));
    assert!(!bundle.contains("PRIVATE KEY"));
}

#[tokio::test]
async fn several_requests_follow_each_other_on_one_connection() {
    let world = World::start().await;
    for way in Way::ALL {
        let mut session = world.open(way).await;
        for number in 0..3 {
            let path = format!("/web/api/v2/keep/{number}");
            let response = session.get(&path).await;
            assert_eq!((response.status, response.text()), (200, path), "{way:?}");
        }
    }
}

async fn check_pipelining(session: &mut Session, way: Way) {
    for number in 0..5 {
        session.send(&Request::get(&format!("/web/api/v2/pipe/{number}"))).await;
    }
    for number in 0..5 {
        let response = session.wire.response("GET").await;
        assert_eq!(response.text(), format!("/web/api/v2/pipe/{number}"), "{way:?}");
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let world = World::start().await;
    for way in Way::ALL {
        check_pipelining(&mut world.open(way).await, way).await;
    }
}

#[tokio::test]
async fn pipelined_requests_survive_a_token_death() {
    let world = World::start().await;
    world.kill_token();
    check_pipelining(&mut world.open(Way::Intercept).await, Way::Intercept).await;
    assert_eq!(world.solver.solves(), 1);
}

#[tokio::test]
async fn one_connection_may_carry_absolute_form_gateway_and_then_connect() {
    let world = World::start().await;
    let mut wire = world.wire().await;
    wire.send(format!("GET http://{API}/web/api/v2/a HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
    assert_eq!(wire.response("GET").await.text(), "/web/api/v2/a");
    wire.send("GET /web/api/v2/b HTTP/1.1\r\nHost: sidecar\r\n\r\n").await;
    assert_eq!(wire.response("GET").await.text(), "/web/api/v2/b");
    wire.send(format!("CONNECT {API}:443 HTTP/1.1\r\nHost: {API}:443\r\n\r\n")).await;
    let (head, _) = wire.response_head().await.unwrap();
    assert_eq!(head.word(1), "200");
    let mut tls = world.tls_over(wire, API).await;
    tls.send(format!("GET /web/api/v2/c HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
    assert_eq!(tls.response("GET").await.text(), "/web/api/v2/c");
}

// Other hosts.

/// A world that may reach one other host.
async fn world_with_other_host(tls: bool) -> (World, Origin) {
    let mut stage = Stage::new().await;
    let acceptor = stage.ca.acceptor(&["localhost", "127.0.0.1"]);
    let other = Origin::start_other(tls.then_some(acceptor)).await;
    stage.set("ALLOW_HOSTS", other.addr());
    (stage.start().await, other)
}

#[tokio::test]
async fn tunnel_to_a_listed_host_copies_bytes_both_ways() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let mut stage = Stage::new().await;
    stage.set("ALLOW_HOSTS", addr);
    let world = stage.start().await;
    let peer = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut heard = [0; 7];
        stream.read_exact(&mut heard).await.unwrap();
        stream.write_all(b"\x00\xffpong").await.unwrap();
        heard
    });
    let mut wire = world.tunnel(&addr.to_string()).await;
    wire.send(b"\x16\x01ping\x00").await;
    assert_eq!(wire.exactly(6).await.unwrap(), b"\x00\xffpong");
    assert_eq!(&peer.await.unwrap(), b"\x16\x01ping\x00");
    assert!(wire.closed().await.is_empty());
}

#[tokio::test]
async fn tunnel_that_is_reset_is_reset_on_the_other_side() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let world = World::with(&[("ALLOW_HOSTS", "127.0.0.1")]).await;
    let mut client = world.tunnel(&address.to_string()).await;
    let (mut server, _) = listener.accept().await.unwrap();
    server.write_all(b"half").await.unwrap();
    assert_eq!(client.exactly(4).await.unwrap(), b"half");
    server.set_zero_linger().unwrap();
    drop(server);
    let error = client.until_end().await.expect_err("a clean end");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn half_closed_tunnel_still_carries_the_answer() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let mut stage = Stage::new().await;
    stage.set("ALLOW_HOSTS", addr);
    let world = stage.start().await;
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        stream.write_all(&heard).await.unwrap();
    });
    let mut wire = world.tunnel(&addr.to_string()).await;
    wire.send("all that I have").await;
    wire.try_finish().await.unwrap();
    assert_eq!(wire.closed().await, b"all that I have");
}

#[tokio::test]
async fn tunnel_to_a_listed_host_is_blind_to_its_tls() {
    let (world, other) = world_with_other_host(true).await;
    let tunnel = world.tunnel(&other.addr().to_string()).await;
    // Only the other host's own certificate passes here: nobody sits in between.
    let connector = connector(&world.path("shop-ca.pem"), &[]);
    let mut tls = handshake(tunnel.into_inner(), "127.0.0.1", &connector).await.unwrap();
    tls.send("GET /any HTTP/1.1\r\nHost: other\r\n\r\n").await;
    assert_eq!(tls.response("GET").await.text(), "/any");
    assert!(other.only_request().head.value("authorization").is_none());
}

#[tokio::test]
async fn absolute_form_to_a_listed_host_is_forwarded_without_a_token() {
    let (world, other) = world_with_other_host(false).await;
    let host = other.addr();
    let response =
        world.raw(format!("GET http://{host}/any?x=%%2 HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
    assert_eq!((response.status, response.text().as_str()), (200, "/any?x=%%2"));
    let request = other.only_request();
    assert!(request.head.value("authorization").is_none());
    assert_eq!(request.head.values("host"), [host.to_string()]);
}

#[tokio::test]
async fn absolute_form_https_to_a_listed_host_is_forwarded_over_tls() {
    let (world, other) = world_with_other_host(true).await;
    let host = other.addr();
    let response =
        world.raw(format!("GET https://{host}/any HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
    assert_eq!((response.status, response.text().as_str()), (200, "/any"));
    assert!(other.only_request().head.value("authorization").is_none());
}

#[tokio::test]
async fn own_credentials_toward_another_host_pass_unchanged() {
    let (world, other) = world_with_other_host(false).await;
    let host = other.addr();
    let bytes = format!(
        "GET http://{host}/any HTTP/1.1\r\nHost: {host}\r\nAuthorization: Basic eDp5\r\nCookie: access-token=mine\r\n\r\n"
    );
    assert_eq!(world.raw(bytes).await.status, 200);
    let request = other.only_request();
    assert_eq!(request.head.values("authorization"), ["Basic eDp5"]);
    assert_eq!(request.head.values("cookie"), ["access-token=mine"]);
}

#[tokio::test]
async fn refusal_of_another_host_is_its_own() {
    let (world, other) = world_with_other_host(false).await;
    let host = other.addr();
    let path = "/api/v2/status/401";
    let response =
        world.raw(format!("GET http://{host}{path} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
    assert_eq!(response.status, 401);
    assert_eq!(other.requests().len(), 1);
    assert_eq!(world.solver.solves(), 0);
}

#[tokio::test]
async fn neighbour_that_is_not_found_is_led_to_no_proxy() {
    let world = World::start().await;
    let response =
        world.raw("GET http://redis-of-the-client/ HTTP/1.1\r\nHost: redis-of-the-client\r\n\r\n");
    let response = response.await;
    assert_eq!((response.status, response.code().as_str()), (502, "upstream_unreachable"));
    let text = response.text();
    assert!(text.contains("NO_PROXY"), "{text}");
}

fn check_is_refused(world: &World, response: &Response) {
    assert_eq!(
        (response.status, response.code().as_str()),
        (403, "target_not_allowed"),
        "{response:?}"
    );
    check_is_made_here(response);
    let text = response.text();
    assert!(text.contains("ALLOW_HOSTS") && text.contains("NO_PROXY"), "{text}");
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn tunnel_to_a_private_address_that_is_not_listed_is_refused() {
    let world = World::start().await;
    let port = world.origin.addr().port();
    for target in [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "10.0.0.1",
        "169.254.169.254",
    ] {
        let (response, _) = world.connect(&format!("{target}:{port}")).await;
        check_is_refused(&world, &response);
    }
}

#[tokio::test]
async fn absolute_form_to_a_private_address_that_is_not_listed_is_refused() {
    let world = World::start().await;
    let host = world.solver.url();
    let response = world.raw(format!("GET {host}/health HTTP/1.1\r\nHost: x\r\n\r\n")).await;
    check_is_refused(&world, &response);
}

#[tokio::test]
async fn api_host_on_another_port_falls_under_the_egress_policy() {
    let mut stage = Stage::new().await;
    let origin = Origin::start_other(None).await;
    // Without a redirect, the name would have to be resolved: let it lead to loopback.
    stage.set("API_ORIGINS", "https://localhost/web/api");
    stage.set("VERIFY_URL", "https://localhost/web/api/v2/search/product?phrase=python");
    stage.add("CONNECT_TO", format!("localhost:443=127.0.0.1:{}", stage.origin.addr().port()));
    let world = stage.start().await;
    let (response, _) = world.connect(&format!("localhost:{}", origin.addr().port())).await;
    check_is_refused(&world, &response);
    assert_eq!(origin.connections(), 0);
}

#[tokio::test]
async fn sidecar_does_not_dial_its_own_listeners() {
    let world = World::start().await;
    for addr in [world.sidecar.proxy(), world.sidecar.admin()] {
        let (response, _) = world.connect(&addr.to_string()).await;
        assert_eq!((response.status, response.code().as_str()), (403, "target_not_allowed"));
    }
}

#[tokio::test]
async fn refused_connect_leaves_the_connection_usable_or_closed() {
    let world = World::start().await;
    let (response, mut wire) = world.connect("127.0.0.1:9").await;
    assert_eq!(response.status, 403);
    let next = wire
        .try_send(format!("GET http://{API}/web/api/v2/x HTTP/1.1\r\nHost: {API}\r\n\r\n"))
        .await;
    if next.is_ok()
        && let Ok(response) = wire.try_response("GET").await
    {
        assert_eq!(response.status, 200);
    }
}

#[tokio::test]
async fn allowed_target_that_does_not_listen_is_502() {
    let (_kept, addr) = nobody();
    let world = World::with(&[("ALLOW_HOSTS", "127.0.0.0/8")]).await;
    let (response, _) = world.connect(&addr.to_string()).await;
    assert_eq!((response.status, response.code().as_str()), (502, "upstream_unreachable"));
    let response = world.raw(format!("GET http://{addr}/ HTTP/1.1\r\nHost: {addr}\r\n\r\n")).await;
    assert_eq!((response.status, response.code().as_str()), (502, "upstream_unreachable"));
}

#[tokio::test]
async fn token_never_goes_to_a_host_that_only_calls_itself_the_api() {
    let (world, other) = world_with_other_host(false).await;
    let host = other.addr();
    let bytes = format!("GET http://{host}/web/api/v2/x HTTP/1.1\r\nHost: {API}\r\n\r\n");
    assert_eq!(world.raw(bytes).await.status, 200);
    assert!(other.only_request().head.value("authorization").is_none());
}

#[tokio::test]
async fn silent_connections_hold_nobody_up() {
    let world = World::start().await;
    let _silent: Vec<Wire> = futures_util::future::join_all((0..50).map(|_| world.wire())).await;
    let _waiting = world.tunnel(&format!("{API}:443")).await;
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
}

/// What the shop, or another host, saw last: method, target and `Host`.
fn last_seen(origin: &Origin) -> (String, String, String) {
    let seen = origin.all_requests().pop().unwrap().head;
    (seen.word(0).into(), seen.word(1).into(), seen.value("host").unwrap_or_default().into())
}

#[tokio::test]
async fn options_without_a_path_is_about_the_host_as_a_whole() {
    let mut stage = Stage::new().await;
    let other = Origin::start_other(None).await;
    stage.add("CONNECT_TO", format!("other.test:80={}", other.addr()));
    let world = stage.start().await;
    for (line, target) in [
        ("OPTIONS http://{}", "*"),
        ("OPTIONS http://{}/", "/"),
        ("OPTIONS http://{}?q", "/?q"),
        ("OPTIONS http://{}/x", "/x"),
        ("GET http://{}", "/"),
    ] {
        let method = line.split(' ').next().unwrap();
        for (name, origin) in [(API, &world.origin), ("other.test", &other)] {
            let line = line.replace("{}", name);
            let expected = (method.to_owned(), target.to_owned(), name.to_owned());
            let message = format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n");
            assert_eq!(world.raw(&message).await.status, 200, "{line}");
            assert_eq!(last_seen(origin), expected, "{line}");
        }
        for way in [Way::Intercept, Way::PlainTunnel] {
            let mut wire = world.open(way).await.wire;
            let line = line.replace("{}", API);
            wire.send(format!("{line} HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
            assert_eq!(wire.response(method).await.status, 200, "{way:?}: {line}");
            let expected = (method.to_owned(), target.to_owned(), API.to_owned());
            assert_eq!(last_seen(&world.origin), expected, "{way:?}: {line}");
        }
    }
    let asterisk = format!("OPTIONS * HTTP/1.1\r\nHost: {API}\r\n\r\n");
    assert_eq!(world.raw(asterisk).await.status, 200);
    assert_eq!(last_seen(&world.origin).1, "*");
}

#[tokio::test]
async fn answers_of_the_api_have_100_fields_at_most_and_others_more() {
    let answer = |count: usize| {
        let fields = "X-A: 1\r\n".repeat(count - 1);
        format!("HTTP/1.1 200 OK\r\n{fields}Content-Length: 0\r\n\r\n")
    };
    let (world, other) = world_with_other_host(false).await;
    for (count, of_api, of_other) in
        [(100, 200, 200), (101, 502, 200), (256, 502, 200), (257, 502, 502)]
    {
        let path = format!("/web/api/v2/{count}");
        world.origin.script(&path, answer(count), true);
        assert_eq!(world.get(&path).await.status, of_api, "{count}");
        let path = format!("/{count}");
        other.script(&path, answer(count), true);
        let mut wire = world.wire().await;
        let host = other.addr();
        wire.send(format!("GET http://{host}{path} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(wire.response("GET").await.status, of_other, "{count}");
    }
}
