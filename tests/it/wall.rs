//! The anti-bot wall: a 403 in HTML where the API speaks JSON (rule 7), and the clearance that gets
//! past it.

use std::fmt::Write as _;

use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::support::client::{Request, Way};
use crate::support::http::Response;
use crate::support::origin::{Recorded, Verification, WALL_PAGE, Wall};
use crate::support::solver::Mode;
use crate::support::token::Jwt;
use crate::support::{Stage, World, until};

const PATH: &str = "/web/api/v2/x";

/// The browser of the recorded replies.
const BROWSER: &str = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) \
                       Chrome/156.0.0.0 Safari/537.36";

/// A wall that opens to the solver's cookie with this value.
fn wall(value: &str) -> Wall {
    Wall::Opens { cookie: format!("__ddg1_={value}"), user_agent: BROWSER.to_owned() }
}

/// The solver gives a fresh token and this value of the wall's cookie.
fn solve_with(stage: &Stage, value: &str) {
    let cookie = |name: &str, value: &str| (name.to_owned(), "/".to_owned(), value.to_owned());
    let cookies = vec![cookie("access-token", "Bearer%20{}"), cookie("__ddg1_", value)];
    stage.solver.set(Mode::Cookies(cookies));
}

/// No store has a token, and the solver is the only way to one.
async fn stage() -> Stage {
    let stage = Stage::new().await;
    stage.without_token();
    stage.origin.close_doors();
    solve_with(&stage, "first");
    stage
}

/// Starts before the wall, where the verifier cannot be calibrated.
async fn start_before(wall: Wall, stage: Stage) -> World {
    stage.origin.set_wall(wall);
    let world = stage.launch().await;
    world.sidecar.status_where("a token", |status| status["token"]["verified"] == true).await;
    world
}

fn cookies(request: &Recorded) -> &str {
    request.head.value("cookie").unwrap_or_default()
}

/// The shop's own 403, marked with why there was no replay.
fn check_is_the_walls_own(response: &Response, details: &str) {
    let patience = if details == "not_replayable" { 1 } else { 500 };
    assert_eq!((response.status, response.text().as_str()), (403, WALL_PAGE), "{response:?}");
    let status = response.value("proxy-status").unwrap_or_default();
    assert!(status.contains(&format!("details=\"{details}\"")), "{status:?}");
    let retry_after: u64 = response.value("retry-after").unwrap().parse().unwrap();
    assert!((patience..=600).contains(&retry_after), "{retry_after}");
}

#[tokio::test]
async fn wall_that_opens_to_the_clearance_we_hold_costs_no_solve() {
    for way in Way::ALL {
        let world = stage().await.start().await;
        world.origin.set_wall(wall("first"));
        assert_eq!(world.call(way, &Request::get(PATH)).await.status, 200);
        assert_eq!(world.call(way, &Request::get(PATH)).await.status, 200);
        assert_eq!(world.solver.solves(), 1);
        let sends = world.origin.requests();
        assert_eq!(sends.len(), 3, "{way:?}: one replay, and then the clearance at once");
        assert_eq!(cookies(&sends[0]), "");
        for send in &sends[1..] {
            assert!(cookies(send).contains("__ddg1_=first"), "{send:?}");
            assert!(
                cookies(send).contains(&format!("access-token=Bearer%20{}", send.token().unwrap()))
            );
            assert_eq!(send.head.values("user-agent"), [BROWSER]);
        }
        let status = world.sidecar.status().await;
        assert_eq!(
            (&status["token"]["clearance"], &status["token"]["generation"]),
            (&json!(true), &json!(2))
        );
    }
}

#[tokio::test]
async fn token_that_works_only_with_clearance_goes_with_it_from_the_first_request() {
    let world = start_before(wall("first"), stage().await).await;
    let request = Request::get(PATH)
        .field("User-Agent", "python-requests/2")
        .field("Cookie", "city=39; __ddg1_=stale; access-token=Bearer%20old");
    assert_eq!(world.call(Way::Intercept, &request).await.status, 200);
    let send = world.origin.only_request();
    let token = send.token().unwrap();
    assert_eq!(
        send.head.values("cookie"),
        [format!("city=39; access-token=Bearer%20{token}; __ddg1_=first")]
    );
    assert_eq!(send.head.values("user-agent"), [BROWSER]);
    assert_eq!(world.sidecar.status().await["token"]["clearance"], true);
}

#[tokio::test]
async fn without_a_wall_clients_keep_their_cookies_and_user_agent() {
    let world = stage().await.start().await;
    let request = Request::get(PATH).field("User-Agent", "own/1").field("Cookie", "city=39");
    assert_eq!(world.call(Way::Intercept, &request).await.status, 200);
    let send = world.origin.only_request();
    assert_eq!(send.head.values("user-agent"), ["own/1"]);
    assert_eq!(send.head.values("cookie"), ["city=39"]);
}

#[tokio::test]
async fn wall_that_comes_back_costs_one_solve_for_all_requests() {
    let world = start_before(wall("first"), stage().await).await;
    assert_eq!(world.call(Way::Gateway, &Request::get(PATH)).await.status, 200);
    solve_with(&world, "second");
    world.origin.set_wall(wall("second"));
    let request = Request::post(PATH, "{}");
    let calls = (0..20).map(|_| world.call(Way::Gateway, &request));
    for response in join_all(calls).await {
        assert_eq!(response.status, 200);
    }
    assert_eq!(world.solver.solves(), 2);
    assert!(cookies(world.origin.requests().last().unwrap()).contains("__ddg1_=second"));
}

#[tokio::test]
async fn token_that_dies_behind_the_wall_is_renewed() {
    let world = start_before(wall("first"), stage().await).await;
    for _ in 0..2 {
        world.kill_token();
        assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 200);
    }
    assert_eq!(world.solver.solves(), 3);
}

#[tokio::test]
async fn wall_that_never_opens_costs_one_solve_and_the_client_sees_the_shops_own_403() {
    let world = stage().await.start().await;
    world.origin.set_wall(Wall::Closed);
    // The replay is the client's answer, whatever it is.
    let first = world.call(Way::Intercept, &Request::get(PATH)).await;
    assert_eq!((first.status, first.text().as_str()), (403, WALL_PAGE));
    assert_eq!(world.origin.requests().len(), 2);
    for path in [PATH, "/web/api/v2/y", "/web/api/v2/z"] {
        let response = world.call(Way::Intercept, &Request::get(path)).await;
        check_is_the_walls_own(&response, "backoff");
    }
    assert_eq!(world.solver.solves(), 2);
    assert_eq!(world.origin.requests().len(), 5);
}

#[tokio::test]
async fn wall_that_no_source_passes_is_passed_on_with_the_reason() {
    let world = stage().await.start().await;
    world.origin.set_wall(Wall::Closed);
    world.solver.set(Mode::Error);
    let first = world.call(Way::Intercept, &Request::get(PATH)).await;
    check_is_the_walls_own(&first, "refresh_failed");
    let second = world.call(Way::Intercept, &Request::get(PATH)).await;
    check_is_the_walls_own(&second, "backoff");
    assert_eq!(world.solver.solves(), 2);
    // A wall is no reason to let a death pass: that has a run of its own.
    world.origin.set_wall(Wall::Down);
    world.kill_token();
    solve_with(&world, "third");
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 200);
}

#[tokio::test]
async fn refresh_by_hand_ends_the_pause_before_the_wall() {
    let world = stage().await.start().await;
    world.origin.set_wall(Wall::Closed);
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 403);
    solve_with(&world, "second");
    world.origin.set_wall(wall("second"));
    assert_eq!(world.sidecar.ask("POST", "/refresh").await.status, 200);
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 200);
}

#[tokio::test]
async fn scheduled_renewal_does_not_give_a_working_token_for_one_that_meets_the_wall() {
    let world = start_before(wall("first"), stage().await).await;
    solve_with(&world, "another");
    let refreshed = world.sidecar.ask("POST", "/refresh").await;
    assert_eq!(refreshed.status, 502, "{refreshed:?}");
    assert!(refreshed.text().contains("anti-bot wall"), "{refreshed:?}");
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 200);
}

#[tokio::test]
async fn html_403_of_one_endpoint_is_its_own_where_the_verifier_passes() {
    let world = stage().await.start().await;
    let page =
        "HTTP/1.1 403 Forbidden\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\n<own>";
    world.origin.script(PATH, page, false);
    let asked = world.origin.verifications().len();
    for _ in 0..3 {
        let response = world.call(Way::Gateway, &Request::get(PATH)).await;
        assert_eq!((response.status, response.text().as_str()), (403, "<own>"));
        assert_eq!(response.value("proxy-status"), None);
    }
    assert_eq!(world.origin.verifications().len(), asked + 1);
    assert_eq!((world.solver.solves(), world.origin.requests().len()), (1, 3));
}

#[tokio::test]
async fn json_403_passes_without_a_question() {
    let world = stage().await.start().await;
    let asked = world.origin.verifications().len();
    let response = world.call(Way::Gateway, &Request::get("/web/api/v2/status/403")).await;
    assert_eq!((response.status, response.value("proxy-status")), (403, None));
    assert_eq!(world.origin.verifications().len(), asked);
}

#[tokio::test]
async fn body_that_outgrew_the_limit_meets_the_wall_once() {
    let mut stage = stage().await;
    stage.set("REPLAY_BODY_LIMIT", "4B");
    let world = stage.start().await;
    world.origin.set_wall(wall("first"));
    let large = Request::post(PATH, "too large to keep");
    check_is_the_walls_own(&world.call(Way::Gateway, &large).await, "not_replayable");
    world
        .sidecar
        .status_where("the clearance", |status| status["token"]["clearance"] == true)
        .await;
    assert_eq!(world.call(Way::Gateway, &large).await.status, 200);
}

#[tokio::test]
async fn hold_at_the_wall_ends_and_the_next_try_finds_the_clearance() {
    let mut stage = stage().await;
    stage.set("HOLD_TIMEOUT", "200ms");
    let world = stage.start().await;
    solve_with(&world, "second");
    world.origin.set_wall(wall("second"));
    world.solver.pause();
    let held = world.call(Way::Gateway, &Request::get(PATH)).await;
    assert_eq!((held.status, held.code().as_str()), (503, "hold_timeout"));
    world.solver.resume();
    world
        .sidecar
        .status_where("the clearance", |status| status["token"]["clearance"] == true)
        .await;
    assert_eq!(world.call(Way::Gateway, &Request::get(PATH)).await.status, 200);
    assert_eq!(world.solver.solves(), 2);
}

/// Has one sidecar save its token with clearance in Redis, and hands the stage on to the next.
async fn saved_by_another() -> Stage {
    let mut stage = stage().await;
    stage.with_redis().await;
    let world = start_before(wall("first"), stage).await;
    let saved = async || world.redis().get("{chitai_gorod_token}:meta").await.is_some();
    until("the token in Redis", saved).await;
    let stage = world.stop();
    stage.without_token();
    stage
}

#[tokio::test]
async fn clearance_from_redis_is_used_after_a_verification_from_here() {
    let world = start_before(wall("first"), saved_by_another().await).await;
    let status = world.sidecar.status().await;
    assert_eq!(
        (&status["token"]["source"], &status["token"]["clearance"]),
        (&json!("redis"), &json!(true))
    );
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 200);
    assert_eq!((world.solver.solves(), world.origin.requests().len()), (1, 1));
}

#[tokio::test]
async fn clearance_from_redis_that_does_not_pass_from_here_is_replaced() {
    let stage = saved_by_another().await;
    solve_with(&stage, "second");
    stage.origin.set_wall(wall("second"));
    let world = stage.launch().await;
    let response = world.call(Way::Intercept, &Request::get(PATH)).await;
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(world.solver.solves(), 2);
    let shared = async || {
        let cookies = world.redis().get("chitai_gorod_cookies").await;
        cookies.is_some_and(|cookies| cookies.contains("second"))
    };
    until("the new clearance in Redis", shared).await;
}

#[tokio::test]
async fn cookies_of_the_old_system_are_tried_at_the_wall() {
    let mut stage = stage().await;
    stage.with_redis().await;
    let token = stage.tokens.issue();
    let cookies = json!({"access-token": format!("Bearer%20{token}"), "__ddg1_": "theirs"});
    stage.redis().set("chitai_gorod_token", &token).await;
    stage.redis().set("chitai_gorod_cookies", &cookies.to_string()).await;
    // Which user-agent they are for nobody wrote down: here it is the verifier's own.
    let world = stage.start().await;
    let user_agent = world.origin.verifications()[0].head.value("user-agent").unwrap().to_owned();
    let cookie = "__ddg1_=theirs".to_owned();
    world.origin.set_wall(Wall::Opens { cookie, user_agent: user_agent.clone() });
    let request = Request::get(PATH).field("User-Agent", &user_agent);
    assert_eq!(world.call(Way::Intercept, &request).await.status, 200);
    assert_eq!(world.solver.solves(), 0);
}

/// An endpoint that refuses every token, beside a verifier that cannot tell.
#[tokio::test]
async fn endpoints_own_401_does_not_keep_the_solver_busy_without_a_verdict() {
    let verifiers =
        [Verification::Always(403), Verification::Always(503), Verification::Always(200)];
    for verification in verifiers {
        let stage = stage().await;
        stage.origin.set_verification(verification);
        let world = stage.launch().await;
        let own = Request::get("/web/api/v2/always-401");
        let mut solves = Vec::new();
        for _ in 0..6 {
            assert_eq!(world.call(Way::Gateway, &own).await.status, 401);
            assert_eq!(world.call(Way::Gateway, &Request::get(PATH)).await.status, 200);
            // What the refusal has set off in the background ends with the run.
            let idle = |status: &serde_json::Value| status["refresh"]["running"] == false;
            world.sidecar.status_where("no run", idle).await;
            solves.push(world.solver.solves());
        }
        assert!(solves[5] <= 4 && solves[5] == solves[3], "{verification:?}: {solves:?}");
        // A death still shows.
        world.kill_token();
        assert_eq!(world.call(Way::Gateway, &Request::get(PATH)).await.status, 200);
    }
}

#[tokio::test]
async fn walled_token_goes_with_its_clearance_where_that_may_pass() {
    let world = start_before(wall("first"), stage().await).await;
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 200);
    world.origin.set_verification(Verification::Always(403));
    let page =
        "HTTP/1.1 403 Forbidden\r\nContent-Type: text/html\r\nContent-Length: 5\r\n\r\n<own>";
    world.origin.script("/web/api/v2/own", page, false);
    assert_eq!(world.call(Way::Intercept, &Request::get("/web/api/v2/own")).await.status, 403);
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 200);
    assert_eq!(world.solver.solves(), 2);
}

#[tokio::test]
async fn wall_that_lets_only_the_verifier_pass_costs_one_solve() {
    let world = start_before(Wall::OncePerToken, stage().await).await;
    for _ in 0..4 {
        assert_eq!(world.call(Way::Gateway, &Request::get(PATH)).await.status, 403);
        world.sidecar.status_where("no run", |status| status["refresh"]["running"] == false).await;
    }
    world.sidecar.status_where("the pause", |status| status["refresh"]["walled_s"] != 0.0).await;
    assert_eq!(world.solver.solves(), 2);
    let hints = world.sidecar.status().await["hints"].to_string();
    assert!(hints.contains("anti-bot wall is up"), "{hints}");
}

#[tokio::test]
async fn failed_refresh_by_hand_leaves_the_pause_before_the_wall() {
    let world = stage().await.start().await;
    world.origin.set_wall(Wall::Closed);
    world.solver.set(Mode::Error);
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 403);
    assert_eq!(world.sidecar.ask("POST", "/refresh").await.status, 502);
    let solves = world.solver.solves();
    check_is_the_walls_own(&world.call(Way::Intercept, &Request::get(PATH)).await, "backoff");
    assert_eq!(world.solver.solves(), solves);
}

/// Another sidecar, which passes the wall or has none, saves a token that was issued later.
async fn saved_elsewhere(world: &World, later: u64, clearance: bool) -> String {
    let token = Jwt::anonymous().issued_in(later).make();
    world.tokens.accept(&token);
    let cookies = json!({"access-token": format!("Bearer%20{token}"), "__ddg1_": "theirs"});
    let digest = Sha256::digest(&token).iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    });
    let meta = json!({"sha256": digest, "source": "flaresolverr", "verified": true,
                      "clearance": clearance, "user_agent": "Other/1"});
    let redis = world.redis();
    redis.set("chitai_gorod_cookies", &cookies.to_string()).await;
    redis.set("{chitai_gorod_token}:meta", &meta.to_string()).await;
    redis.set("chitai_gorod_token", &token).await;
    token
}

#[tokio::test]
async fn token_proven_elsewhere_does_not_end_the_pause_before_the_wall_here() {
    let mut stage = stage().await;
    stage.with_redis().await;
    let world = stage.start().await;
    world.origin.set_wall(Wall::Closed);
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 403);
    let solves = world.solver.solves();
    for later in [20, 40] {
        let theirs = saved_elsewhere(&world, later, false).await;
        world.sidecar.signal(Signal::HUP);
        let asked = async || world.origin.verifications_of(&theirs) > 0;
        until("a verification from here", asked).await;
        let refused = world.call(Way::Intercept, &Request::get(PATH)).await;
        assert_eq!(refused.status, 403, "{refused:?}");
    }
    assert_eq!(world.solver.solves(), solves);
}

#[tokio::test]
async fn walled_token_of_another_host_does_not_keep_a_dead_one_from_being_renewed() {
    let mut stage = stage().await;
    stage.with_redis().await;
    let world = start_before(wall("first"), stage).await;
    let saved = async || world.redis().get("{chitai_gorod_token}:meta").await.is_some();
    until("the token in Redis", saved).await;
    world.kill_token();
    let theirs = saved_elsewhere(&world, 20, true).await;
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 200);
    assert_eq!(world.solver.solves(), 2);
    // Nor is it asked about each time that Redis is looked into.
    let asked = world.origin.verifications_of(&theirs);
    for _ in 0..3 {
        world.sidecar.signal(Signal::HUP);
        world.call(Way::Intercept, &Request::get(PATH)).await;
    }
    assert_eq!(world.origin.verifications_of(&theirs), asked);
}
