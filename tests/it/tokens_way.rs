//! The token and its clearance go to an API host dialled by that name over TLS, and nowhere else.

use std::sync::{Arc, Mutex};

use tokio::net::TcpListener;

use crate::support::client::{API, GATE, Request, Way};
use crate::support::http::{Wire, text};
use crate::support::origin::{Origin, Recorded, Wall, redirect};
use crate::support::solver::Mode;
use crate::support::{Stage, World};

const PATH: &str = "/web/api/v2/x";
const ELSEWHERE: &str = "https://other.test/stolen";
const BROWSER: &str = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) \
                       Chrome/156.0.0.0 Safari/537.36";

/// A stage beside whose shop there is another host, trusted and within reach.
async fn with_other() -> (Stage, Origin) {
    let mut stage = Stage::new().await;
    let other = Origin::start_other(Some(stage.ca.acceptor(&["other.test", API]))).await;
    stage.add("CONNECT_TO", format!("other.test:443={}", other.addr()));
    (stage, other)
}

/// Whether anything of ours is in what a host got to see.
fn check_has_nothing_of_ours(stage: &Stage, seen: &[Recorded]) {
    for request in seen {
        let text = format!("{request:?}");
        for token in stage.tokens.issued() {
            assert!(!text.contains(&token), "{text}");
        }
        assert!(!text.contains("__ddg1_") && !text.contains(BROWSER), "{text}");
    }
}

#[tokio::test]
async fn redirect_of_the_shop_is_the_clients_to_follow() {
    let (stage, other) = with_other().await;
    let world = stage.start().await;
    world.origin.script(PATH, redirect(ELSEWHERE), false);
    for way in Way::ALL {
        let response = world.call(way, &Request::get(PATH)).await;
        assert_eq!(response.status, 307, "{way:?}");
        assert_eq!(response.value("location"), Some(ELSEWHERE), "{way:?}");
    }
    assert_eq!(world.origin.requests().len(), Way::ALL.len());
    assert_eq!(other.connections(), 0);
}

#[tokio::test]
async fn neither_verifier_nor_direct_source_follows_a_redirect() {
    let (mut stage, other) = with_other().await;
    stage.set("TOKEN_SOURCES", "direct");
    let world = stage.start().await;
    world.origin.send_away_to(ELSEWHERE);
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 401);
    assert!(world.origin.door_knocks() >= 1, "the source has asked");
    assert!(world.origin.verifications_of(&world.token) >= 2, "the verifier has asked again");
    assert_eq!(other.connections(), 0);
}

#[tokio::test]
async fn verified_token_is_not_published_on_the_word_of_a_redirect() {
    let (mut stage, other) = with_other().await;
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.start().await;
    world.origin.send_away_to(ELSEWHERE);
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    let status = world.sidecar.status().await;
    // The API's answer confirmed it, not the redirect.
    assert_eq!(status["token"]["generation"], 2, "{status}");
    assert_eq!(other.connections(), 0);
}

/// `http://` to an API host is an order to use the sidecar, not to go without TLS.
#[tokio::test]
async fn request_in_the_clear_goes_out_by_tls_only() {
    let mut stage = Stage::new().await;
    let plain = Origin::start_other(None).await;
    stage.add("CONNECT_TO", format!("{API}:80={}", plain.addr()));
    let world = stage.start().await;
    for way in [Way::AbsoluteHttp, Way::PlainTunnel, Way::Gateway] {
        assert_eq!(world.call(way, &Request::get(PATH)).await.status, 200, "{way:?}");
    }
    assert_eq!(plain.connections(), 0);
    assert_eq!(world.origin.requests().len(), 3, "the shop speaks TLS alone");
}

/// A shop that no longer speaks TLS gets no token in the clear.
#[tokio::test]
async fn shop_without_tls_is_an_error_and_not_a_downgrade() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut stage = Stage::new().await;
    stage.set("CONNECT_TO", format!("{API}:443={}", listener.local_addr().unwrap()));
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.launch().await;
    let heard = Arc::<Mutex<Vec<u8>>>::default();
    let record = heard.clone();
    let shop = tokio::spawn(async move {
        loop {
            // As a plain server answers a ClientHello.
            let mut wire = Wire::new(listener.accept().await.unwrap().0);
            let hello = wire.exactly(3).await.unwrap();
            wire.send("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await;
            let rest = wire.closed().await;
            record.lock().unwrap().extend([hello, rest].concat());
        }
    });
    for way in Way::ALL {
        let response = world.call(way, &Request::get(PATH)).await;
        assert_eq!((response.status, response.code()), (502, "upstream_tls".into()), "{way:?}");
    }
    shop.abort();
    let heard = text(&heard.lock().unwrap());
    assert!(heard.starts_with("\u{16}\u{3}\u{1}"), "a ClientHello");
    assert!(!heard.contains("HTTP/1.1") && !heard.contains("Bearer"), "{heard}");
}

/// The tunnel's name counts: neither the SNI inside it nor a `Host` to match leads elsewhere.
#[tokio::test]
async fn sni_and_host_of_another_api_host_inside_a_tunnel_are_misdirected() {
    let world = World::start().await;
    for (named, inside) in [(API, GATE), (GATE, API)] {
        let tunnel = world.tunnel(&format!("{named}:443")).await;
        // The leaf is the tunnel's, so a client that means the other host would stop here.
        let mut tls = world.tls_over(tunnel, named).await;
        tls.send(format!("GET {PATH} HTTP/1.1\r\nHost: {inside}\r\n\r\n")).await;
        let response = tls.response("GET").await;
        assert_eq!((response.status, response.code()), (421, "misdirected".into()));
        let connector = crate::support::certificates::connector(&world.ca_file(), &[b"http/1.1"]);
        let tunnel = world.tunnel(&format!("{named}:443")).await.into_inner();
        let outcome = crate::support::certificates::handshake(tunnel, inside, &connector).await;
        let error = outcome.err().expect("a leaf for the tunnel's host alone").to_string();
        assert!(error.contains("not valid for name"), "{error}");
    }
    assert!(world.origin.requests().is_empty());
}

/// A tunnel to another host is not opened by what is said inside it.
#[tokio::test]
async fn api_name_inside_another_hosts_tunnel_gets_nothing_of_ours() {
    let (stage, other) = with_other().await;
    let world = stage.start().await;
    let tunnel = world.tunnel("other.test:443").await.into_inner();
    let trusted = world.path("shop-ca.pem");
    let connector = crate::support::certificates::connector(&trusted, &[]);
    let mut tls = crate::support::certificates::handshake(tunnel, API, &connector).await.unwrap();
    tls.send(format!("GET {PATH} HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
    assert_eq!(tls.response("GET").await.status, 200);
    let absolute = format!("GET {ELSEWHERE} HTTP/1.1\r\nHost: {API}\r\n\r\n");
    assert_eq!(world.raw(absolute).await.status, 200);
    let seen = other.all_requests();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[1].head.values("host"), ["other.test"]);
    check_has_nothing_of_ours(&world, &seen);
    assert!(seen.iter().all(|request| request.head.value("authorization").is_none()));
}

/// Like the token: not by a redirect, and not to whoever calls himself the API.
#[tokio::test]
async fn clearance_goes_where_the_token_goes_and_nowhere_else() {
    let (mut stage, other) = with_other().await;
    stage.without_token();
    stage.origin.close_doors();
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let cookie = |name: &str, value: &str| (name.to_owned(), "/".to_owned(), value.to_owned());
    let cookies = vec![cookie("access-token", "Bearer%20{}"), cookie("__ddg1_", "pass")];
    stage.solver.set(Mode::Cookies(cookies));
    let wall = Wall::Opens { cookie: "__ddg1_=pass".into(), user_agent: BROWSER.into() };
    stage.origin.set_wall(wall);
    let world = stage.launch().await;
    world.sidecar.status_where("clearance", |status| status["token"]["clearance"] == true).await;
    world.origin.script(PATH, redirect(ELSEWHERE), false);
    for way in Way::ALL {
        assert_eq!(world.call(way, &Request::get(PATH)).await.status, 307, "{way:?}");
    }
    let shown = world.origin.requests();
    assert!(shown.iter().all(|request| format!("{request:?}").contains("__ddg1_=pass")));
    assert_eq!(other.connections(), 0);
    let absolute = format!("GET {ELSEWHERE} HTTP/1.1\r\nHost: {API}\r\nCookie: a=1\r\n\r\n");
    assert_eq!(world.raw(absolute).await.status, 200);
    assert_eq!(other.only_request().head.values("cookie"), ["a=1"]);
    check_has_nothing_of_ours(&world, &other.all_requests());
}
