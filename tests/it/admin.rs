//! The admin port.

use serde_json::Value;

use crate::support::client::{Request, Way};
use crate::support::solver::Mode;
use crate::support::token::fingerprint;
use crate::support::{Stage, World, until};

const PATH: &str = "/web/api/v2/x";

#[tokio::test]
async fn live_answers_whatever_the_token() {
    let stage = Stage::new().await;
    stage.without_token();
    stage.origin.close_doors();
    stage.solver.set(Mode::Error);
    let world = stage.launch().await;
    assert_eq!(world.sidecar.ask("GET", "/live").await.status, 200);
}

#[tokio::test]
async fn ready_needs_a_token_and_gives_a_reason_without_one() {
    let mut stage = Stage::new().await;
    stage.without_token();
    stage.set("TOKEN_SOURCES", "flaresolverr");
    stage.solver.pause();
    let world = stage.launch().await;
    let response = world.sidecar.ask("GET", "/ready").await;
    assert_eq!(response.status, 503);
    assert!(!response.body.is_empty(), "a reason");
    let status = world.sidecar.status().await;
    assert_eq!(status["ready"], false);
    assert!(status["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{status}");
    world.solver.resume();
    world.sidecar.ready().await;
    assert_eq!(world.sidecar.status().await["ready"], true);
}

#[tokio::test]
async fn not_ready_with_a_token_that_is_known_bad() {
    let world = World::start().await;
    world.origin.close_doors();
    world.solver.set(Mode::Error);
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 401);
    until("/ready to say so", async || world.sidecar.ask("GET", "/ready").await.status == 503)
        .await;
    world.solver.set(Mode::Solves);
    assert_eq!(world.sidecar.ask("POST", "/refresh").await.status, 200);
    world.sidecar.ready().await;
}

#[tokio::test]
async fn status_has_the_fields_of_the_contract() {
    let world = World::start().await;
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 200);
    world
        .sidecar
        .status_where("the token to be verified", |status| status["token"]["verified"] == true)
        .await;
    let status = world.sidecar.status().await;
    for name in [
        "version",
        "uptime_s",
        "ready",
        "reason",
        "token",
        "refresh",
        "sources",
        "redis",
        "env_file",
        "verifier",
        "held",
        "connections",
        "requests",
        "hints",
    ] {
        assert!(status.get(name).is_some(), "{name} in {status}");
    }
    for name in
        ["fingerprint", "generation", "source", "issued_at", "expires_at", "verified", "clearance"]
    {
        assert!(status["token"].get(name).is_some(), "token.{name} in {}", status["token"]);
    }
    for name in ["running", "last_outcome", "last_error", "last_s", "next_at", "backoff_s"] {
        assert!(status["refresh"].get(name).is_some(), "refresh.{name} in {}", status["refresh"]);
    }
    assert!(status["redis"].is_null(), "none is set: {status}");
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["token"]["fingerprint"], fingerprint(&world.token));
    assert_eq!(status["token"]["source"], "env_file");
    assert_eq!(status["requests"]["intercept"], 1);
    assert!(
        status["token"]["expires_at"]
            .as_str()
            .is_some_and(|at| at.ends_with('Z') && at.contains('T'))
    );
    assert!(!status.to_string().contains(&world.token));
}

#[tokio::test]
async fn status_hints_at_a_missing_proxy_variable_until_requests_come() {
    let world = World::start().await;
    let hints = |status: &Value| status["hints"].to_string();
    let status = world.sidecar.status().await;
    assert!(hints(&status).contains("HTTPS_PROXY"), "{status}");
    assert_eq!(world.get(PATH).await.status, 200);
    let status = world.sidecar.status().await;
    assert!(!hints(&status).contains("HTTPS_PROXY"), "{status}");
}

#[tokio::test]
async fn metrics_have_the_names_of_the_contract() {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    let world = stage.start().await;
    world.kill_token();
    for way in Way::ALL {
        assert_eq!(world.call(way, &Request::get(PATH)).await.status, 200);
    }
    let metrics = world.sidecar.metrics().await;
    for name in [
        "sidecar_requests_total{",
        "sidecar_request_seconds_bucket{",
        "sidecar_held ",
        "sidecar_hold_seconds_bucket{",
        "sidecar_replays_total{",
        "sidecar_refreshes_total{",
        "sidecar_refresh_seconds_bucket{",
        "sidecar_token_expiry_timestamp_seconds ",
        "sidecar_token_generation ",
        "sidecar_upstream_connections{",
        "sidecar_connections ",
        "sidecar_verifier_trusted ",
        "sidecar_build_info{",
    ] {
        assert!(metrics.contains(name), "{name} is not in\n{metrics}");
    }
    assert!(!metrics.contains("eyJ"), "no secret");
}

#[tokio::test]
async fn metrics_count_requests_by_route_and_status() {
    let world = World::start().await;
    for way in Way::ALL {
        for status in [200, 404] {
            let path = format!("/web/api/v2/status/{status}");
            assert_eq!(world.call(way, &Request::get(&path)).await.status, status);
        }
        let labels = [format!("route=\"{}\"", way.label()), "status=\"404\"".to_owned()];
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        until("the request to be counted", async || {
            world.sidecar.metric("sidecar_requests_total", &labels).await >= 1.0
        })
        .await;
    }
    let (response, _) = world.connect("127.0.0.1:9").await;
    assert_eq!(response.status, 403);
    let total = world.sidecar.metric("sidecar_requests_total", &["status=\"404\""]).await;
    assert!((total - 6.0).abs() < f64::EPSILON, "{total}");
}

#[tokio::test]
async fn metrics_follow_the_token() {
    let world = World::start().await;
    let generation = async || world.sidecar.metric("sidecar_token_generation", &[]).await;
    assert!((generation().await - 1.0).abs() < f64::EPSILON);
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    assert!((generation().await - 2.0).abs() < f64::EPSILON);
    let expiry = world.sidecar.metric("sidecar_token_expiry_timestamp_seconds", &[]).await;
    assert!(expiry > 1_700_000_000.0);
    let refreshes = world.sidecar.metric("sidecar_refreshes_total", &["flaresolverr", "ok"]).await;
    assert!((refreshes - 1.0).abs() < f64::EPSILON);
}

#[tokio::test]
async fn metrics_count_connections_and_let_go_of_them() {
    let world = World::start().await;
    let sessions = [world.wire().await, world.wire().await, world.wire().await];
    until("three connections", async || {
        world.sidecar.metric("sidecar_connections", &[]).await >= 3.0
    })
    .await;
    drop(sessions);
    until("none", async || world.sidecar.metric("sidecar_connections", &[]).await < 1.0).await;
}

#[tokio::test]
async fn refresh_by_hand_returns_generation_source_and_expiry() {
    let world = World::start().await;
    let response = world.sidecar.ask("POST", "/refresh").await;
    assert_eq!(response.status, 200, "{response:?}");
    let json = response.json();
    assert_eq!(
        (&json["generation"], &json["source"]),
        (&2.into(), &"flaresolverr".into()),
        "{json}"
    );
    assert!(json.to_string().contains("expir"), "{json}");
    assert!(!json.to_string().contains("eyJ"));
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests()[0].token(), Some(world.tokens.latest().as_str()));
}

#[tokio::test]
async fn refresh_by_hand_that_fails_is_502_and_the_old_token_serves_on() {
    let world = World::start().await;
    world.origin.close_doors();
    world.solver.set(Mode::Error);
    let response = world.sidecar.ask("POST", "/refresh").await;
    assert_eq!(response.status, 502, "{response:?}");
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests().len(), 1);
}

#[tokio::test]
async fn refresh_by_hand_joins_a_run_in_flight() {
    let mut stage = Stage::new().await;
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.start().await;
    world.solver.pause();
    let both = async {
        tokio::join!(world.sidecar.ask("POST", "/refresh"), world.sidecar.ask("POST", "/refresh"))
    };
    let release = async {
        world.solver.asked(1).await;
        world.sidecar.status_where("a run", |status| status["refresh"]["running"] == true).await;
        world.solver.resume();
    };
    let ((first, second), ()) = tokio::join!(both, release);
    assert_eq!((first.status, second.status), (200, 200));
    assert_eq!(first.json()["generation"], second.json()["generation"]);
    assert_eq!(world.solver.solves(), 1);
}

#[tokio::test]
async fn refresh_by_hand_needs_post() {
    let world = World::start().await;
    let response = world.sidecar.ask("GET", "/refresh").await;
    assert!([404, 405].contains(&response.status), "{response:?}");
    assert_eq!(world.solver.solves(), 0);
}

#[tokio::test]
async fn refresh_by_hand_needs_the_admin_token_where_one_is_set() {
    let world = World::with(&[("ADMIN_TOKEN", "a-word-for-admins")]).await;
    let refused = world.sidecar.ask("POST", "/refresh").await;
    assert!([401, 403].contains(&refused.status), "{refused:?}");
    let wrong = world.sidecar.ask_with("POST", "/refresh", "Authorization: Bearer wrong\r\n").await;
    assert!([401, 403].contains(&wrong.status), "{wrong:?}");
    assert_eq!(world.solver.solves(), 0);
    let right = world
        .sidecar
        .ask_with("POST", "/refresh", "Authorization: Bearer a-word-for-admins\r\n")
        .await;
    assert_eq!(right.status, 200);
}

#[tokio::test]
async fn unknown_path_of_the_admin_port_is_404() {
    let world = World::start().await;
    assert_eq!(world.sidecar.ask("GET", "/nowhere").await.status, 404);
}

#[tokio::test]
async fn admin_paths_are_not_on_the_proxy_port() {
    let world = World::start().await;
    for path in ["/status", "/metrics", "/refresh"] {
        let response = world.raw(format!("GET {path} HTTP/1.1\r\nHost: sidecar\r\n\r\n")).await;
        assert_eq!((response.status, response.code().as_str()), (404, "no_such_origin"), "{path}");
    }
}

#[tokio::test]
async fn status_shows_the_last_error_of_a_refresh() {
    let world = World::start().await;
    world.origin.close_doors();
    world.solver.set(Mode::Error);
    assert_eq!(world.sidecar.ask("POST", "/refresh").await.status, 502);
    let status = world.sidecar.status().await;
    assert!(
        status["refresh"]["last_error"].as_str().is_some_and(|error| !error.is_empty()),
        "{status}"
    );
}
