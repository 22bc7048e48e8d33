//! A refused token: rules 1 to 6, by every way into the API.

use std::time::Duration;

use serde_json::Value;

use crate::support::client::{Request, Way};
use crate::support::http::{End, PATIENCE, Response};
use crate::support::origin::{REFUSAL, Verification};
use crate::support::solver::Mode;
use crate::support::token::Jwt;
use crate::support::{Stage, World, until};

const PATH: &str = "/web/api/v2/x";

/// Makes a test of each function for each way in.
macro_rules! by_every_way {
    ($($rule:ident),* $(,)?) => {
        mod intercept { $(#[tokio::test] async fn $rule() { super::$rule(super::Way::Intercept).await; })* }
        mod plain_tunnel { $(#[tokio::test] async fn $rule() { super::$rule(super::Way::PlainTunnel).await; })* }
        mod absolute_http { $(#[tokio::test] async fn $rule() { super::$rule(super::Way::AbsoluteHttp).await; })* }
        mod absolute_https { $(#[tokio::test] async fn $rule() { super::$rule(super::Way::AbsoluteHttps).await; })* }
        mod gateway { $(#[tokio::test] async fn $rule() { super::$rule(super::Way::Gateway).await; })* }
        mod gateway_by_host { $(#[tokio::test] async fn $rule() { super::$rule(super::Way::GatewayByHost).await; })* }
    };
}

by_every_way!(
    rule_1_straggler_is_replayed_with_the_newer_token_at_once,
    rule_2_bad_token_is_refreshed_and_the_request_replayed,
    rule_2_refusal_of_a_good_token_is_the_endpoints_own,
    rule_3_refusal_of_the_replay_is_passed_on,
    rule_4_failed_refresh_passes_the_shops_own_401,
    rule_5_hold_timeout_is_503_and_the_next_try_finds_the_token,
    rule_6_back_off_passes_the_401_at_once,
);

/// The shop's own 401, marked with why there was no replay.
fn check_is_the_shops_own(response: &Response, details: &str) {
    assert_eq!((response.status, response.text().as_str()), (401, REFUSAL), "{response:?}");
    assert_eq!(response.value("content-type"), Some("application/json"));
    let status = response.value("proxy-status").unwrap_or_default();
    assert!(status.starts_with("token-sidecar") && status.contains("error="), "{status:?}");
    assert!(status.contains(&format!("details=\"{details}\"")), "{status:?}");
    assert!(retry_after(response) >= 1);
}

fn retry_after(response: &Response) -> u64 {
    let value = response.value("retry-after").and_then(|value| value.parse().ok());
    value.unwrap_or_else(|| panic!("no Retry-After in {response:?}"))
}

async fn rule_1_straggler_is_replayed_with_the_newer_token_at_once(way: Way) {
    let world = World::start().await;
    let mut straggler = world.open(way).await;
    straggler.send(&Request::get("/web/api/v2/gate/late")).await;
    world.origin.arrived(1).await;
    world.kill_token();
    assert_eq!(world.call(way, &Request::get(PATH)).await.status, 200);
    let verified = world.origin.verifications().len();
    world.origin.open_gate();
    let response = straggler.wire.response("GET").await;
    assert_eq!(response.status, 200, "{response:?}");
    let sends = world.origin.requests_for("/web/api/v2/gate/late");
    assert_eq!(sends.len(), 2);
    assert_eq!(sends[1].token(), Some(world.tokens.latest().as_str()));
    assert_eq!(world.solver.solves(), 1);
    assert_eq!(world.origin.verifications().len(), verified, "a straggler needs no verdict");
}

async fn rule_2_bad_token_is_refreshed_and_the_request_replayed(way: Way) {
    let world = World::start().await;
    world.kill_token();
    let request = Request::post(PATH, r#"{"id":1}"#)
        .field("Content-Type", "application/json")
        .field("X-Mark", "7");
    let response = world.call(way, &request).await;
    assert_eq!(response.status, 200, "{response:?}");
    assert!(response.value("proxy-status").is_none());
    let sends = world.origin.requests();
    assert_eq!(sends.len(), 2);
    assert_eq!(sends[0].token(), Some(world.token.as_str()));
    assert_eq!(sends[1].token(), Some(world.tokens.latest().as_str()));
    for send in &sends {
        assert_eq!((send.method(), send.body.as_slice()), ("POST", &br#"{"id":1}"#[..]));
        assert_eq!(send.head.values("x-mark"), ["7"]);
    }
    assert_eq!(world.solver.solves(), 1);
    assert_eq!(world.origin.verifications_of(&world.tokens.latest()), 1, "a candidate is verified");
}

async fn rule_2_refusal_of_a_good_token_is_the_endpoints_own(way: Way) {
    let world = World::start().await;
    let response = world.call(way, &Request::get("/web/api/v2/always-401")).await;
    assert_eq!((response.status, response.text().as_str()), (401, REFUSAL));
    assert_eq!(world.origin.requests().len(), 1, "no replay of what would be refused again");
    assert_eq!(world.solver.solves(), 0);
    assert_eq!(world.sidecar.generation().await, 1);
}

async fn rule_3_refusal_of_the_replay_is_passed_on(way: Way) {
    let world = World::start().await;
    world.kill_token();
    world.origin.refuse_api(true);
    let response = world.call(way, &Request::get(PATH)).await;
    assert_eq!((response.status, response.text().as_str()), (401, REFUSAL), "{response:?}");
    assert_eq!(world.origin.requests().len(), 2, "at most two sends");
    assert_eq!(world.solver.solves(), 1);
}

async fn rule_4_failed_refresh_passes_the_shops_own_401(way: Way) {
    let world = World::start().await;
    world.origin.close_doors();
    world.solver.set(Mode::Error);
    world.kill_token();
    let response = world.call(way, &Request::get(PATH)).await;
    check_is_the_shops_own(&response, "refresh_failed");
    assert_eq!(world.origin.requests().len(), 1);
}

async fn rule_5_hold_timeout_is_503_and_the_next_try_finds_the_token(way: Way) {
    let mut stage = Stage::new().await;
    stage.set("HOLD_TIMEOUT", "300ms");
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.start().await;
    world.solver.pause();
    world.kill_token();
    let response = world.call(way, &Request::get(PATH)).await;
    assert_eq!((response.status, response.code().as_str()), (503, "hold_timeout"), "{response:?}");
    assert!(retry_after(&response) >= 1);
    world.solver.asked(1).await;
    world.solver.resume();
    world.sidecar.status_where("the run to end", |status| status["token"]["generation"] == 2).await;
    let before = world.origin.requests().len();
    assert_eq!(world.call(way, &Request::get(PATH)).await.status, 200);
    assert_eq!(world.origin.requests().len(), before + 1, "the next try needs no replay");
    assert_eq!(world.solver.solves(), 1);
}

async fn rule_6_back_off_passes_the_401_at_once(way: Way) {
    let world = World::start().await;
    world.origin.close_doors();
    world.solver.set(Mode::Error);
    world.kill_token();
    assert_eq!(world.call(way, &Request::get(PATH)).await.status, 401);
    let solves = world.solver.solves();
    world.solver.set(Mode::Solves);
    let response = world.call(way, &Request::get(PATH)).await;
    check_is_the_shops_own(&response, "backoff");
    assert_eq!(world.solver.solves(), solves, "no run during back-off");
    assert!(retry_after(&response) <= 6);
}

// Details of the rules, by one way.

#[tokio::test]
async fn rule_2_expired_token_is_not_sent_in_vain() {
    let mut stage = Stage::new().await;
    let expired = Jwt::anonymous().expires_in(-5).make();
    stage.write_env_file(&format!("CHITAI_GOROD_BEARER_TOKEN={expired}\n"));
    stage.set("TOKEN_SOURCES", "flaresolverr");
    stage.solver.pause();
    let world = stage.launch().await;
    let mut session = world.open(Way::Intercept).await;
    session.send(&Request::get(PATH)).await;
    world.solver.asked(1).await;
    until("the request to be held", async || world.sidecar.status().await["held"] == 1).await;
    assert!(world.origin.requests().is_empty());
    world.solver.resume();
    assert_eq!(session.wire.response("GET").await.status, 200);
    assert_eq!(world.origin.requests().len(), 1);
    assert!(world.origin.all_requests().iter().all(|request| request.token() != Some(&expired)));
}

#[tokio::test]
async fn rule_2_unknown_verdict_refreshes() {
    let world = World::start().await;
    world.kill_token();
    world.origin.set_verification(Verification::Always(500));
    let response = world.get(PATH).await;
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(world.solver.solves(), 1);
}

#[tokio::test]
async fn rule_2_silent_verifier_is_given_up_after_two_seconds() {
    let world = World::start().await;
    world.kill_token();
    world.origin.set_verification(Verification::Hangs);
    let mut session = world.open(Way::Intercept).await;
    session.send(&Request::get(PATH)).await;
    world.solver.asked(1).await;
    // Now the candidate waits for its verdict.
    world.origin.set_verification(Verification::ByToken);
    assert_eq!(session.wire.response("GET").await.status, 200);
}

#[tokio::test]
async fn rule_2_good_verdict_excuses_the_same_endpoint_without_asking_again() {
    let world = World::start().await;
    for _ in 0..20 {
        let response = world.get("/web/api/v2/always-401").await;
        assert_eq!(response.status, 401);
    }
    let asked = world.origin.verifications_of(&world.token);
    assert!(asked <= 2, "{asked} questions for one endpoint");
    assert_eq!(world.solver.solves(), 0);
}

#[tokio::test]
async fn rule_2_good_verdict_excuses_no_other_endpoint() {
    let world = World::start().await;
    assert_eq!(world.get("/web/api/v2/always-401").await.status, 401);
    world.kill_token();
    let response = world.get(PATH).await;
    assert_eq!(response.status, 200, "a real death must not hide behind it: {response:?}");
    let other_method = world.call(Way::Intercept, &Request::post("/web/api/v2/other", "x")).await;
    assert_eq!(other_method.status, 200);
}

#[tokio::test]
async fn rule_2_endpoint_that_is_always_401_does_not_hide_a_death() {
    let world = World::start().await;
    let poll = async {
        let mut session = world.open(Way::Intercept).await;
        loop {
            assert_eq!(session.get("/web/api/v2/always-401").await.status, 401);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let work = async {
        for _ in 0..3 {
            for _ in 0..10 {
                assert_eq!(world.get(PATH).await.status, 200);
            }
            world.kill_token();
            assert_eq!(world.get(PATH).await.status, 200);
        }
    };
    tokio::select! {
        () = poll => unreachable!(),
        outcome = tokio::time::timeout(PATIENCE, work) => outcome.expect("three deaths to be healed"),
    }
    assert_eq!(world.solver.solves(), 3);
    assert_eq!(world.sidecar.generation().await, 4);
}

#[tokio::test]
async fn rule_2_polled_refusals_ask_the_verifier_at_most_once_a_second() {
    let world = World::start().await;
    let start = tokio::time::Instant::now();
    let before = world.origin.verifications().len();
    let calls = (0..60).map(|number| {
        let world = &world;
        async move {
            let mut session = world.open(Way::AbsoluteHttp).await;
            // Different endpoints, so that none is excused by the verdict on another.
            session.get(&format!("/web/api/v2/always-401?{number}")).await.status
        }
    });
    let statuses = futures_util::future::join_all(calls).await;
    assert!(statuses.iter().all(|&status| status == 401));
    let asked = world.origin.verifications().len() - before;
    let seconds = usize::try_from(start.elapsed().as_secs()).unwrap();
    assert!(asked <= seconds + 2, "{asked} questions in {seconds} s");
}

#[tokio::test]
async fn rule_3_refused_new_generation_is_judged_without_waiting() {
    let world = World::start().await;
    world.kill_token();
    world.origin.refuse_api(true);
    assert_eq!(world.get(PATH).await.status, 401);
    // The new one dies too. Its refusal was reported; the next request meets a fresh one.
    world.kill_token();
    world.origin.refuse_api(false);
    assert_eq!(world.get(PATH).await.status, 200);
    assert!(world.origin.requests().len() <= 4);
    assert_eq!(world.solver.most_at_once(), 1);
}

#[tokio::test]
async fn rule_4_proxy_status_uses_a_registered_error_type() {
    let world = World::start().await;
    world.origin.close_doors();
    world.solver.set(Mode::HangsUp);
    world.kill_token();
    let response = world.get(PATH).await;
    check_is_the_shops_own(&response, "refresh_failed");
    let status = response.value("proxy-status").unwrap();
    let error = status.split("error=").nth(1).unwrap().split(';').next().unwrap();
    assert!(error.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{status}");
}

#[tokio::test]
async fn rule_4_large_401_is_passed_whole() {
    let world = World::start().await;
    let body = "r".repeat(300 * 1024);
    world.origin.set_refusal(body.clone());
    world.origin.close_doors();
    world.solver.set(Mode::Error);
    world.kill_token();
    for way in [Way::Intercept, Way::AbsoluteHttp] {
        let response = world.call(way, &Request::get(PATH)).await;
        assert_eq!(response.status, 401);
        assert!(response.body == body.as_bytes(), "{} bytes came", response.body.len());
    }
}

#[tokio::test]
async fn refusal_that_breaks_off_is_the_shops_fault() {
    let world = World::start().await;
    for framing in ["Transfer-Encoding: chunked\r\n", "Content-Length: 9\r\n"] {
        let broken = format!("HTTP/1.1 401 No\r\n{framing}\r\n5\r\nhe");
        world.origin.script_to("/web/api/v2/broken", broken, End::Cut);
        for way in Way::ALL {
            let response = world.call(way, &Request::get("/web/api/v2/broken")).await;
            let seen = (response.status, response.code());
            assert_eq!(seen, (502, "upstream_protocol".into()), "{way:?}: {response:?}");
        }
    }
}

#[tokio::test]
async fn rule_4_large_401_is_replayed_like_a_small_one() {
    let world = World::start().await;
    world.origin.set_refusal("r".repeat(300 * 1024));
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
}

#[tokio::test]
async fn rule_5_status_can_be_429() {
    let mut stage = Stage::new().await;
    stage.set("HOLD_TIMEOUT", "200ms");
    stage.set("RETRY_STATUS", "429");
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.start().await;
    world.solver.pause();
    world.kill_token();
    let response = world.get(PATH).await;
    assert_eq!((response.status, response.code().as_str()), (429, "hold_timeout"));
    assert!(retry_after(&response) >= 1);
}

#[tokio::test]
async fn rule_6_manual_refresh_ends_the_back_off() {
    let world = World::start().await;
    world.origin.close_doors();
    world.solver.set(Mode::Error);
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 401);
    let status = world.sidecar.status().await;
    assert!(
        status["refresh"]["backoff_s"].as_f64().is_some_and(|left| left > 0.0),
        "{}",
        status["refresh"]
    );
    world.solver.set(Mode::Solves);
    assert_eq!(world.sidecar.ask("POST", "/refresh").await.status, 200);
    assert_eq!(world.get(PATH).await.status, 200);
}

#[tokio::test]
async fn rule_6_back_off_ends_by_itself_after_five_seconds() {
    let world = World::start().await;
    world.origin.close_doors();
    world.solver.set(Mode::Error);
    world.kill_token();
    let response = world.get(PATH).await;
    let failed_at = tokio::time::Instant::now();
    assert!((4..=6).contains(&retry_after(&response)), "{response:?}");
    world.solver.set(Mode::Solves);
    until("the back-off to end", async || world.get(PATH).await.status == 200).await;
    let took = failed_at.elapsed();
    assert!(took > Duration::from_secs(4) && took < Duration::from_secs(8), "{took:?}");
}

#[tokio::test]
async fn rule_6_scheduled_run_that_failed_does_not_back_off_a_refusal() {
    let mut stage = Stage::new().await;
    stage.set("REFRESH_EVERY", "1s");
    stage.origin.close_doors();
    stage.solver.set(Mode::Error);
    let world = stage.start().await;
    world
        .sidecar
        .status_where("a scheduled run to fail", |status| {
            status["refresh"]["last_error"].is_string()
        })
        .await;
    assert_eq!(world.get(PATH).await.status, 200, "the old token serves on");
    world.solver.set(Mode::Solves);
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
}

#[tokio::test]
async fn refusals_and_replays_are_counted() {
    let world = World::start().await;
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    let outcomes = world.sidecar.metrics().await;
    let replays: Vec<&str> =
        outcomes.lines().filter(|line| line.starts_with("sidecar_replays_total{")).collect();
    let sum: f64 =
        replays.iter().filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum();
    assert!((sum - 1.0).abs() < f64::EPSILON, "{replays:?}");
    let status: Value = world.sidecar.status().await;
    assert_eq!(status["token"]["generation"], 2);
}

#[tokio::test]
async fn replay_without_an_answer_is_counted_as_failed() {
    let world = World::start().await;
    world.origin.script("/web/api/v2/silent", "", true);
    world.kill_token();
    assert_eq!(world.get("/web/api/v2/silent").await.status, 502);
    let failed = world.sidecar.metric("sidecar_replays_total", &["outcome=\"failed\""]).await;
    assert!((failed - 1.0).abs() < f64::EPSILON, "{failed}");
}
