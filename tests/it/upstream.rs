//! Connections to the shop: pooled, capped, bounded in time, verified.

use std::net::SocketAddr;

use futures_util::future::join_all;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use crate::bounds::limited;
use crate::routes::check_is_made_here;
use crate::support::certificates::TestCa;
use crate::support::client::{API, Request, Way};
use crate::support::http::Response;
use crate::support::origin::Origin;
use crate::support::token::Jwt;
use crate::support::{Stage, World, nobody, until};

/// Sends `Request::get(path)` by each way; each must get this answer made here.
async fn check_error(world: &World, path: &str, status: u16, code: &str) {
    for way in Way::ALL {
        let response: Response = world.call(way, &Request::get(path)).await;
        assert_eq!(
            (response.status, response.code().as_str()),
            (status, code),
            "{way:?}: {response:?}"
        );
        check_is_made_here(&response);
    }
}

#[tokio::test]
async fn connection_whose_request_is_not_out_is_closed_with_its_answer() {
    let world = World::start().await;
    for expect in ["", "Expect: 100-continue\r\n"] {
        let mut wire = world.open(Way::Gateway).await.wire;
        wire.send(format!(
            "POST /web/api/v2/unread/200 HTTP/1.1\r\nHost: {API}\r\nContent-Length: 9\r\n{expect}\r\n"
        ))
        .await;
        assert_eq!(wire.response("POST").await.status, 200);
    }
    until("no connection to be left", async || {
        let open = world.sidecar.metric("sidecar_upstream_connections", &[]).await;
        open < 1.0 && world.origin.open_connections() == 0
    })
    .await;
}

#[tokio::test]
async fn other_hosts_leave_few_connections_behind() {
    let mut stage = Stage::new().await;
    stage.set("WORKERS", "1");
    let other = Origin::start_other(None).await;
    for host in 0..100 {
        stage.add("CONNECT_TO", format!("h{host}.test:80={}", other.addr()));
    }
    let world = stage.start().await;
    let mut wire = world.wire().await;
    for host in 0..100 {
        wire.send(format!("GET http://h{host}.test/x HTTP/1.1\r\nHost: x\r\n\r\n")).await;
        assert_eq!(wire.response("GET").await.status, 200);
    }
    let bound = 64 + 2; // The API's own one, and the last.
    until("most of them to be closed", async || {
        let idle = world.sidecar.metric("sidecar_upstream_connections", &["idle"]).await;
        idle <= f64::from(bound) && other.open_connections() <= 64
    })
    .await;
}

#[tokio::test]
async fn connections_are_used_again() {
    let world = World::with(&[("WORKERS", "1")]).await;
    let before = world.origin.connections();
    for number in 0..20 {
        assert_eq!(world.get(&format!("/web/api/v2/{number}")).await.status, 200);
    }
    assert!(
        world.origin.connections() - before <= 1,
        "{} connections",
        world.origin.connections() - before
    );
}

#[tokio::test]
async fn pooled_connection_that_the_shop_has_closed_costs_nothing() {
    let world = World::start().await;
    for number in 0..20 {
        for way in [Way::AbsoluteHttp, Way::Intercept] {
            let request = Request::post(&format!("/web/api/v2/stale/{number}/{way:?}"), "body");
            let response = world.call(way, &request).await;
            assert_eq!(response.status, 200, "{response:?}");
        }
        world.origin.drop_idle_connections().await;
    }
    let mut targets: Vec<String> =
        world.origin.requests().iter().map(|request| request.target().to_owned()).collect();
    let count = targets.len();
    targets.sort();
    targets.dedup();
    assert_eq!((count, targets.len()), (40, 40), "each was sent once");
}

#[tokio::test]
async fn request_that_a_connection_took_is_not_sent_again() {
    let world = World::start().await;
    assert_eq!(world.get("/web/api/v2/warm").await.status, 200);
    let response =
        world.call(Way::AbsoluteHttp, &Request::post("/web/api/v2/reset", "order")).await;
    assert_eq!(response.status, 502, "{response:?}");
    assert_eq!(world.origin.requests_for("/web/api/v2/reset").len(), 1);
}

#[tokio::test]
async fn get_whose_pooled_connection_the_shop_was_closing_is_sent_once_more() {
    let world = World::with(&[("WORKERS", "1")]).await;
    for method in ["GET", "HEAD", "OPTIONS"] {
        let before = world.origin.requests_for("/web/api/v2/tired").len();
        for way in Way::ALL {
            assert_eq!(world.get("/web/api/v2/warm").await.status, 200);
            let response = world.call(way, &Request::new(method, "/web/api/v2/tired")).await;
            assert_eq!(response.status, 200, "{method} {way:?}: {response:?}");
        }
        let seen = world.origin.requests_for("/web/api/v2/tired").len() - before;
        assert_eq!(seen, 2 * Way::ALL.len(), "{method}");
    }
    for method in ["POST", "DELETE", "GET"] {
        let target = format!("/web/api/v2/tired?{method}");
        assert_eq!(world.get("/web/api/v2/warm").await.status, 200);
        let response = world.call(Way::Gateway, &Request::new(method, &target).body("x")).await;
        let seen = (response.status, response.code());
        assert_eq!(seen, (502, "upstream_protocol".into()), "{response:?}");
        assert_eq!(world.origin.requests_for(&target).len(), 1);
    }
}

#[tokio::test]
async fn get_that_breaks_a_fresh_connection_too_is_sent_twice_at_most() {
    let world = World::with(&[("WORKERS", "1")]).await;
    for number in 0..3 {
        let target = format!("/web/api/v2/reset?{number}");
        assert_eq!(world.get("/web/api/v2/warm").await.status, 200);
        assert_eq!(world.get(&target).await.status, 502);
        assert_eq!(world.origin.requests_for(&target).len(), 2, "{number}");
        assert_eq!(world.get(&target).await.status, 502);
        assert_eq!(world.origin.requests_for(&target).len(), 3, "by a fresh connection: once");
    }
}

#[tokio::test]
async fn connections_per_origin_are_capped_and_the_rest_queues() {
    let world = World::with(&[("UPSTREAM_CONNECTIONS", "4")]).await;
    let calls = (0..24).map(|number| {
        let world = &world;
        async move { world.get(&format!("/web/api/v2/slow/50?{number}")).await.status }
    });
    let statuses = join_all(calls).await;
    assert!(statuses.iter().all(|&status| status == 200), "{statuses:?}");
    assert!(world.origin.most_connections() <= 4, "{}", world.origin.most_connections());
}

#[tokio::test]
async fn client_that_leaves_frees_its_upstream_connection() {
    let mut stage = Stage::new().await;
    stage.set("UPSTREAM_CONNECTIONS", "1");
    let world = stage.start().await;
    let mut leaver = world.open(Way::AbsoluteHttp).await;
    leaver.send(&Request::get("/web/api/v2/gate/1")).await;
    world.origin.arrived(1).await;
    drop(leaver);
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    world.origin.open_gate();
}

#[tokio::test]
async fn client_that_leaves_amid_a_long_answer_frees_its_upstream_connection() {
    let mut stage = Stage::new().await;
    stage.set("UPSTREAM_CONNECTIONS", "1");
    let world = stage.start().await;
    let mut leaver = world.open(Way::Intercept).await;
    leaver.send(&Request::get("/web/api/v2/big/50000000")).await;
    leaver.wire.response_head().await.unwrap();
    drop(leaver);
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
}

#[tokio::test]
async fn shop_that_does_not_answer_is_504_upstream_timeout() {
    let world = World::with(&[("UPSTREAM_TIMEOUT", "200ms")]).await;
    check_error(&world, "/web/api/v2/hang", 504, "upstream_timeout").await;
}

#[tokio::test]
async fn long_answer_is_not_cut_by_the_upstream_timeout() {
    let world = World::with(&[("UPSTREAM_TIMEOUT", "500ms")]).await;
    let mut session = world.open(Way::Intercept).await;
    session.send(&Request::get("/web/api/v2/big/8000000")).await;
    session.wire.response_head().await.unwrap();
    // The head was in time; what is read late still comes.
    tokio::time::sleep(std::time::Duration::from_millis(700)).await;
    assert_eq!(session.wire.exactly(8_000_000).await.unwrap().len(), 8_000_000);
}

#[tokio::test]
async fn shop_that_is_not_there_is_502_upstream_unreachable() {
    let (_kept, nobody) = nobody();
    let mut stage = Stage::new().await;
    stage.set("CONNECT_TO", format!("{API}:443={nobody}"));
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.launch().await;
    check_error(&world, "/web/api/v2/x", 502, "upstream_unreachable").await;
}

#[tokio::test]
async fn shop_that_takes_no_connection_is_given_up_after_the_connect_timeout() {
    // A listener that accepts TCP and never answers the TLS greeting.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut stage = Stage::new().await;
    stage.set("CONNECT_TO", format!("{API}:443={}", silent.local_addr().unwrap()));
    stage.set("CONNECT_TIMEOUT", "200ms");
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.launch().await;
    let response = world.get("/web/api/v2/x").await;
    assert!([502, 504].contains(&response.status), "{response:?}");
    check_is_made_here(&response);
}

#[tokio::test]
async fn certificate_of_an_unknown_authority_is_502_upstream_tls() {
    let mut stage = Stage::new().await;
    let impostor = Origin::start_other(Some(TestCa::new().acceptor(&[API]))).await;
    stage.set("CONNECT_TO", format!("{API}:443={}", impostor.addr()));
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.launch().await;
    check_error(&world, "/web/api/v2/x", 502, "upstream_tls").await;
    assert!(impostor.all_requests().is_empty(), "the token went nowhere");
}

#[tokio::test]
async fn certificate_for_another_name_is_502_upstream_tls() {
    let mut stage = Stage::new().await;
    let impostor = Origin::start_other(Some(stage.ca.acceptor(&["other.test"]))).await;
    stage.set("CONNECT_TO", format!("{API}:443={}", impostor.addr()));
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.launch().await;
    check_error(&world, "/web/api/v2/x", 502, "upstream_tls").await;
    assert!(impostor.all_requests().is_empty(), "the token went nowhere");
}

#[tokio::test]
async fn extra_roots_are_needed_for_a_private_authority() {
    let mut stage = Stage::new().await;
    stage.unset("UPSTREAM_CA_FILE");
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.launch().await;
    check_error(&world, "/web/api/v2/x", 502, "upstream_tls").await;
}

async fn check_tls_failure(shop: SocketAddr, kind: &str) {
    let mut stage = Stage::new().await;
    stage.set("CONNECT_TO", format!("{API}:443={shop}"));
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.launch().await;
    let response = world.get("/web/api/v2/x").await;
    let status = response.value("proxy-status").unwrap();
    assert!(status.contains(&format!("error={kind}")), "{status}");
}

#[tokio::test]
async fn failure_of_tls_says_whether_it_was_the_certificates() {
    let impostor = Origin::start_other(Some(TestCa::new().acceptor(&[API]))).await;
    check_tls_failure(impostor.addr(), "tls_certificate_error").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"220 this is no TLS\r\n").await;
        }
    });
    check_tls_failure(address, "tls_protocol_error").await;
}

#[tokio::test]
async fn answer_that_is_not_http_is_502_upstream_protocol() {
    let world = World::start().await;
    check_error(&world, "/web/api/v2/garbage", 502, "upstream_protocol").await;
}

#[tokio::test]
async fn answer_of_a_length_and_a_coding_is_502_for_a_refusal_too() {
    let world = World::start().await;
    let hidden = "01234HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nPOISON";
    for status in ["200 OK", "401 Unauthorized"] {
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{hidden}\r\n0\r\n\r\n",
            hidden.len()
        );
        world.origin.script("/web/api/v2/both", answer, false);
        check_error(&world, "/web/api/v2/both", 502, "upstream_protocol").await;
    }
}

#[tokio::test]
async fn answer_of_two_lengths_is_502() {
    let world = World::start().await;
    for lengths in
        ["Content-Length: 2\r\nContent-Length: 3", "Content-Length: 2, 3", "Content-Length: -2"]
    {
        let answer = format!("HTTP/1.1 200 OK\r\n{lengths}\r\n\r\nok!");
        world.origin.script("/web/api/v2/lengths", answer, true);
        check_error(&world, "/web/api/v2/lengths", 502, "upstream_protocol").await;
    }
}

#[tokio::test]
async fn answer_in_an_unknown_transfer_coding_is_502() {
    let world = World::start().await;
    for coding in ["gzip, chunked", "gzip", "chunked, chunked", "identity"] {
        let answer = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: {coding}\r\n\r\n0\r\n\r\n");
        world.origin.script("/web/api/v2/coded", answer, true);
        check_error(&world, "/web/api/v2/coded", 502, "upstream_protocol").await;
    }
}

#[tokio::test]
async fn answer_that_ends_before_its_head_is_502() {
    let world = World::start().await;
    for way in Way::ALL {
        let response = world.call(way, &Request::get("/web/api/v2/reset")).await;
        assert_eq!(response.status, 502, "{way:?}: {response:?}");
        check_is_made_here(&response);
    }
}

#[tokio::test]
async fn error_of_one_request_leaves_the_client_connection_usable() {
    let world = World::start().await;
    for way in Way::ALL {
        let mut session = world.open(way).await;
        assert_eq!(session.get("/web/api/v2/garbage").await.status, 502, "{way:?}");
        assert_eq!(session.get("/web/api/v2/x").await.status, 200, "{way:?}");
    }
}

#[tokio::test]
async fn token_of_a_failed_connection_is_not_called_refused() {
    let world = World::start().await;
    assert_eq!(world.get("/web/api/v2/reset").await.status, 502);
    assert_eq!(world.get("/web/api/v2/status/500").await.status, 500);
    assert_eq!(world.solver.solves(), 0);
    assert_eq!(world.sidecar.generation().await, 1);
}

#[tokio::test]
async fn redirect_by_address_needs_no_name_server() {
    // `.test` names resolve nowhere: only `CONNECT_TO` can lead there.
    let mut stage = Stage::new().await;
    stage.set("API_ORIGINS", "https://other.test/web/api");
    stage.set("VERIFY_URL", "https://other.test/web/api/v2/search/product?phrase=python");
    stage.set("CONNECT_TO", format!("other.test:443=localhost:{}", stage.origin.addr().port()));
    let world = stage.start().await;
    let response =
        world.raw("GET https://other.test/web/api/v2/x HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(response.status, 200, "{response:?}");
}

#[tokio::test]
async fn name_that_does_not_resolve_is_502_or_refused() {
    let world = World::with(&[("ALLOW_HOSTS", "*.invalid")]).await;
    let (response, _) = world.connect("nowhere.invalid:443").await;
    assert_eq!(
        (response.status, response.code().as_str()),
        (502, "upstream_unreachable"),
        "{response:?}"
    );
}

#[tokio::test]
async fn environment_proxies_of_the_sidecar_are_ignored() {
    let nobody = "http://127.0.0.1:9";
    let variables =
        ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"];
    let variables: Vec<(&str, &str)> = variables.iter().map(|&name| (name, nobody)).collect();
    let world = World::with(&variables).await;
    world.kill_token();
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    assert_eq!(world.solver.solves(), 1);
}

#[tokio::test]
async fn personal_request_passes_while_there_is_no_token_at_all() {
    let stage = Stage::new().await;
    stage.without_token();
    stage.solver.pause();
    let world = stage.launch().await;
    let personal = Jwt::personal().make();
    world.tokens.accept(&personal);
    let request =
        Request::get("/web/api/v2/x").field("Authorization", &format!("Bearer {personal}"));
    assert_eq!(world.call(Way::Intercept, &request).await.status, 200);
    world.solver.resume();
}

#[tokio::test]
async fn queue_that_does_not_move_is_a_503_of_its_own() {
    let world = World::with(&[("UPSTREAM_CONNECTIONS", "1"), ("UPSTREAM_TIMEOUT", "1s")]).await;
    let mut slow = world.wire().await;
    let head = format!(
        "POST http://{API}/web/api/v2/slow-upload HTTP/1.1\r\nHost: {API}\r\nContent-Length: 1000\r\n\r\n"
    );
    slow.send(head).await;
    let trickle = async {
        loop {
            slow.send("x").await;
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    let queued = async {
        // Not before the upload has the only connection.
        until("the upload", async || {
            world.sidecar.metric("sidecar_upstream_connections", &["active"]).await > 0.5
        })
        .await;
        world.get("/web/api/v2/x").await
    };
    let response = tokio::select! {
        () = trickle => unreachable!(),
        response = queued => response,
    };
    assert_eq!((response.status, response.code().as_str()), (503, "too_many_connections"));
    assert_eq!(response.head.value("retry-after"), Some("1"));
    let counted = limited(&world, "upstream_connections").await;
    assert!((counted - 1.0).abs() < 0.5, "{counted}");
    drop(slow);
    until("the connection to be free", async || {
        world.sidecar.metric("sidecar_upstream_connections", &["active"]).await < 0.5
    })
    .await;
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    assert!((limited(&world, "upstream_connections").await - 1.0).abs() < 0.5);
}
