//! Where a new token comes from, and what is done when a source fails.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::support::client::{Request, Way};
use crate::support::origin::{Door, Page, Verification};
use crate::support::solver::Mode;
use crate::support::token::{Jwt, fingerprint};
use crate::support::{Stage, World, nobody, until};

const PATH: &str = "/web/api/v2/x";

/// A world with one token dead and this solver.
async fn dying(mode: Mode, prepare: impl FnOnce(&mut Stage)) -> World {
    let mut stage = Stage::new().await;
    stage.solver.set(mode);
    prepare(&mut stage);
    let world = stage.start().await;
    world.kill_token();
    world
}

async fn source(world: &World) -> String {
    world.sidecar.status().await["token"]["source"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn solver_is_asked_as_the_contract_says() {
    let world = dying(Mode::Solves, |stage| stage.set("SOLVE_TIMEOUT", "20s")).await;
    assert_eq!(world.get(PATH).await.status, 200);
    let expected = json!({
        "cmd": "request.get",
        "url": "https://www.chitai-gorod.ru/",
        "maxTimeout": 20_000,
        "disableMedia": true,
        "returnOnlyCookies": true,
    });
    assert_eq!(world.solver.requests(), [expected]);
    assert_eq!(source(&world).await, "flaresolverr");
}

#[tokio::test]
async fn solver_url_may_end_in_v1_or_a_slash() {
    for tail in ["/v1", "/"] {
        let world = dying(Mode::Solves, |stage| {
            let url = format!("{}{tail}", stage.solver.url());
            stage.set("FLARESOLVERR_URL", url);
            stage.set("TOKEN_SOURCES", "flaresolverr");
        })
        .await;
        assert_eq!(world.get(PATH).await.status, 200, "{tail}");
    }
}

/// The solver fails thus: the anonymous door takes over at once.
async fn check_hands_over(mode: Mode) {
    let world = dying(mode.clone(), |_| {}).await;
    let start = Instant::now();
    let response = world.get(PATH).await;
    assert_eq!(response.status, 200, "{mode:?}: {response:?}");
    assert!(start.elapsed() < Duration::from_secs(7), "{mode:?}: {:?}", start.elapsed());
    assert_eq!(source(&world).await, "direct", "{mode:?}");
    assert!(
        world.sidecar.metric("sidecar_refreshes_total", &["flaresolverr", "failed"]).await >= 1.0
    );
    assert!(world.sidecar.metric("sidecar_refreshes_total", &["direct", "ok"]).await >= 1.0);
}

#[tokio::test]
async fn solver_error_hands_over_to_the_anonymous_door() {
    check_hands_over(Mode::Error).await;
}

#[tokio::test]
async fn solver_error_with_status_200_hands_over() {
    check_hands_over(Mode::ErrorAs200).await;
}

#[tokio::test]
async fn solver_reply_without_the_cookie_hands_over() {
    check_hands_over(Mode::NoCookie).await;
}

#[tokio::test]
async fn solver_reply_with_a_null_solution_hands_over() {
    check_hands_over(Mode::NullSolution).await;
}

#[tokio::test]
async fn solver_garbage_hands_over() {
    check_hands_over(Mode::Garbage).await;
}

#[tokio::test]
async fn solver_that_hangs_up_hands_over() {
    check_hands_over(Mode::HangsUp).await;
}

#[tokio::test]
async fn solver_cookie_that_is_empty_hands_over() {
    check_hands_over(Mode::Cookie(String::new())).await;
}

#[tokio::test]
async fn solver_cookie_that_is_no_jwt_hands_over() {
    check_hands_over(Mode::Cookie("\"Bearer x.y.z\"".into())).await;
}

#[tokio::test]
async fn solver_reply_above_32_mib_hands_over() {
    check_hands_over(Mode::Endless(34 * 1024 * 1024)).await;
}

#[tokio::test]
async fn solver_that_does_not_run_hands_over() {
    let (_kept, nobody) = nobody();
    let nobody = format!("http://{nobody}");
    let world = dying(Mode::Solves, |stage| stage.set("FLARESOLVERR_URL", nobody)).await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(source(&world).await, "direct");
}

#[tokio::test]
async fn solver_page_of_20_mb_is_read() {
    let world = dying(Mode::WithPage(20_000_000), |stage| {
        stage.set("TOKEN_SOURCES", "flaresolverr");
    })
    .await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(source(&world).await, "flaresolverr");
}

#[tokio::test]
async fn every_form_of_the_cookie_is_understood() {
    let world = dying(Mode::Solves, |stage| {
        stage.set("TOKEN_SOURCES", "flaresolverr");
    })
    .await;
    let forms = [
        "Bearer%20{}",
        "Bearer {}",
        "Bearer+{}",
        "{}",
        "\"Bearer%20{}\"",
        "\"Bearer {}\"",
        "\"{}\"",
        "bearer%20{}",
        "Bearer%20Bearer%20{}",
    ];
    for form in forms {
        world.solver.set(Mode::Cookie(form.into()));
        world.kill_token();
        let response = world.sidecar.ask("POST", "/refresh").await;
        assert_eq!(response.status, 200, "{form}: {response:?}");
        assert_eq!(world.get(PATH).await.status, 200, "{form}");
        let token = world.tokens.latest();
        assert_eq!(
            world.origin.requests().last().unwrap().head.values("authorization"),
            [format!("Bearer {token}")]
        );
    }
}

#[tokio::test]
async fn cookie_of_path_root_wins_and_then_the_last_valid_one() {
    let cookie =
        |name: &str, path: &str, value: &str| (name.to_owned(), path.to_owned(), value.to_owned());
    let other = Jwt::anonymous().make();
    let world = dying(
        Mode::Cookies(vec![
            cookie("access-token", "/", &format!("Bearer%20{other}")),
            cookie("access-token", "/", "Bearer%20{}"),
            cookie("access-token", "/", "Bearer%20damaged"),
            cookie("access-token", "/dup", "Bearer%20old"),
        ]),
        |stage| stage.set("TOKEN_SOURCES", "flaresolverr"),
    )
    .await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.verifications_of(&other), 0);
}

#[tokio::test]
async fn second_name_of_the_cookie_is_looked_for_too() {
    let cookies = vec![("bearer_token".to_owned(), "/".to_owned(), "{}".to_owned())];
    let world = dying(Mode::Cookies(cookies), |stage| {
        stage.set("TOKEN_SOURCES", "flaresolverr");
    })
    .await;
    assert_eq!(world.get(PATH).await.status, 200);
}

#[tokio::test]
async fn name_of_the_cookie_is_a_setting() {
    let cookies = vec![("shop-token".to_owned(), "/".to_owned(), "Bearer%20{}".to_owned())];
    let world = dying(Mode::Cookies(cookies), |stage| {
        stage.set("TOKEN_SOURCES", "flaresolverr");
        stage.set("TOKEN_COOKIE", "shop-token");
    })
    .await;
    assert_eq!(world.get(PATH).await.status, 200);
}

#[tokio::test]
async fn wedged_solver_costs_only_the_patience_where_the_door_is_open() {
    let world = dying(Mode::Never, |stage| stage.set("SOURCE_PATIENCE", "500ms")).await;
    let start = Instant::now();
    let response = world.get(PATH).await;
    assert_eq!(response.status, 200, "{response:?}");
    assert!(start.elapsed() >= Duration::from_millis(400), "the first source has its patience");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(source(&world).await, "direct");
    assert_eq!(world.solver.solves(), 1);
}

#[tokio::test]
async fn wedged_solver_with_the_door_closed_ends_in_the_hold_timeout() {
    let world = dying(Mode::Never, |stage| {
        stage.set("SOURCE_PATIENCE", "100ms");
        stage.set("HOLD_TIMEOUT", "800ms");
        stage.origin.close_doors();
    })
    .await;
    let response = world.get(PATH).await;
    assert_eq!((response.status, response.code().as_str()), (503, "hold_timeout"));
    assert_eq!(world.solver.solves(), 1);
    assert_eq!(world.get(PATH).await.status, 503);
    assert_eq!(world.solver.most_at_once(), 1);
}

#[tokio::test]
async fn late_reply_of_the_solver_is_still_used() {
    let world = dying(Mode::Solves, |stage| {
        stage.set("SOURCE_PATIENCE", "100ms");
        stage.set("HOLD_TIMEOUT", "300ms");
        stage.origin.close_doors();
        stage.solver.pause();
    })
    .await;
    assert_eq!(world.get(PATH).await.status, 503);
    world.solver.resume();
    world.sidecar.status_where("the late token", |status| status["token"]["generation"] == 2).await;
    assert_eq!(source(&world).await, "flaresolverr");
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.solver.solves(), 1);
}

#[tokio::test]
async fn late_solve_of_a_client_that_hung_up_is_still_used() {
    let world = dying(Mode::Solves, |stage| {
        stage.set("TOKEN_SOURCES", "flaresolverr");
        stage.solver.pause();
    })
    .await;
    let mut session = world.open(Way::Intercept).await;
    session.send(&Request::get(PATH)).await;
    world.solver.asked(1).await;
    drop(session);
    world.sidecar.status_where("the hold to end", |status| status["held"] == 0).await;
    world.solver.resume();
    world.sidecar.status_where("the late token", |status| status["token"]["generation"] == 2).await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests().last().unwrap().token(), Some(&*world.tokens.latest()));
    assert_eq!(world.solver.solves(), 1);
}

#[tokio::test]
async fn solver_that_asks_for_a_rest_is_left_alone_and_the_door_is_not() {
    let world = dying(Mode::Busy("30"), |_| {}).await;
    for generation in [2, 3] {
        let response = world.sidecar.ask("POST", "/refresh").await;
        assert_eq!(response.status, 200, "{response:?}");
        let token = world.sidecar.status().await["token"].clone();
        assert_eq!(
            (&token["source"], &token["generation"]),
            (&json!("direct"), &json!(generation))
        );
    }
    assert_eq!((world.solver.solves(), world.origin.door_knocks()), (1, 2));
}

#[tokio::test]
async fn never_two_solves_at_once() {
    let world = dying(Mode::Solves, |stage| {
        stage.set("SOURCE_PATIENCE", "100ms");
        stage.solver.pause();
    })
    .await;
    // The door gives tokens while the solver is still busy with the first question.
    for _ in 0..3 {
        assert_eq!(world.get(PATH).await.status, 200);
        world.kill_token();
    }
    world.solver.resume();
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.solver.most_at_once(), 1);
}

#[tokio::test]
async fn without_a_solver_the_anonymous_door_is_the_default() {
    let world = dying(Mode::Solves, |stage| stage.unset("FLARESOLVERR_URL")).await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!((source(&world).await.as_str(), world.solver.solves()), ("direct", 0));
    assert_eq!(world.origin.door_knocks(), 1);
}

#[tokio::test]
async fn sources_are_asked_in_the_order_of_the_setting() {
    let world = dying(Mode::Solves, |stage| {
        stage.set("TOKEN_SOURCES", "direct,flaresolverr");
    })
    .await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!((source(&world).await.as_str(), world.solver.solves()), ("direct", 0));
    world.origin.close_doors();
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!((source(&world).await.as_str(), world.solver.solves()), ("flaresolverr", 1));
}

#[tokio::test]
async fn page_of_the_shop_follows_where_the_door_is_closed() {
    for door in [Door::Status(404), Door::Status(401), Door::Status(500)] {
        let world = dying(Mode::Solves, |stage| {
            stage.set("TOKEN_SOURCES", "direct");
            stage.origin.set_door(door);
        })
        .await;
        assert_eq!(world.get(PATH).await.status, 200, "{door:?}");
        assert_eq!(source(&world).await, "direct");
    }
}

#[tokio::test]
async fn door_that_hangs_ends_in_a_hold_timeout_or_the_page() {
    let world = dying(Mode::Error, |stage| {
        stage.set("HOLD_TIMEOUT", "1s");
        stage.origin.set_door(Door::Hangs);
        stage.origin.set_page(Page::Bare);
    })
    .await;
    let response = world.get(PATH).await;
    assert!([401, 503].contains(&response.status), "{response:?}");
}

// The verifier.

#[tokio::test]
async fn verifier_asks_as_the_shops_own_page_does() {
    let world = dying(Mode::Solves, |_| {}).await;
    assert_eq!(world.get(PATH).await.status, 200);
    let of_candidate = world.tokens.latest();
    let asked = world.origin.verifications();
    let asked = asked.iter().find(|request| request.token() == Some(&of_candidate)).unwrap();
    assert_eq!(asked.method(), "GET");
    for (name, value) in
        [("initial-feature", "index"), ("platform", "desktop"), ("shop-brand", "chitaiGorod")]
    {
        assert_eq!(asked.head.values(name), [value]);
    }
    assert!(asked.head.value("user-agent").is_some_and(|agent| agent.starts_with("Mozilla/5.0")));
    assert_eq!(asked.head.value("user-id").map(str::len), Some(36));
    let target = asked.target();
    let target = target.replace("%5B", "[").replace("%5D", "]");
    assert_eq!(
        target,
        "/web/api/v2/search/product?customerCityId=39&products[page]=1&products[per-page]=1&phrase=python"
    );
}

#[tokio::test]
async fn bad_candidate_is_never_published() {
    let bad = Jwt::anonymous().make();
    let world = dying(Mode::Cookie(format!("Bearer%20{bad}")), |stage| {
        stage.set("TOKEN_SOURCES", "flaresolverr");
    })
    .await;
    let response = world.get(PATH).await;
    assert_eq!(response.status, 401);
    assert!(world.origin.verifications_of(&bad) >= 1);
    assert!(world.origin.requests().iter().all(|request| request.token() != Some(&bad)));
    assert_ne!(world.sidecar.status().await["token"]["fingerprint"], fingerprint(&bad));
}

#[tokio::test]
async fn bad_candidate_hands_over_to_the_next_source() {
    let bad = Jwt::anonymous().make();
    let world = dying(Mode::Cookie(format!("Bearer%20{bad}")), |_| {}).await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(source(&world).await, "direct");
}

#[tokio::test]
async fn unverifiable_candidate_is_published_and_saved_once_an_answer_confirms_it() {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    stage.without_token();
    stage.origin.set_verification(Verification::WithToken(500));
    let world = stage.launch().await;
    let status =
        world.sidecar.status_where("a token", |status| status["token"]["generation"] == 1).await;
    assert_eq!(status["token"]["verified"], false);
    let token = world.tokens.latest();
    assert_eq!(world.redis().get("chitai_gorod_token").await, None, "not before it is confirmed");
    assert!(!world.read_env_file().contains(&token));
    assert_eq!(world.get(PATH).await.status, 200);
    world
        .sidecar
        .status_where("it to count as verified", |status| status["token"]["verified"] == true)
        .await;
    world.redis().becomes("chitai_gorod_token", &token).await;
    world.saved(&token).await;
}

#[tokio::test]
async fn verifier_that_cannot_tell_is_found_out_and_not_asked() {
    let stage = Stage::new().await;
    stage.origin.set_verification(Verification::Always(200));
    let world = stage.launch().await;
    world.sidecar.ready().await;
    world
        .sidecar
        .status_where("the calibration", |status| status["verifier"]["trusted"] == false)
        .await;
    until("the metric", async || {
        world.sidecar.metrics().await.contains("sidecar_verifier_trusted 0")
    })
    .await;
    assert!(
        world.sidecar.events().iter().any(|event| event["level"] == "WARN"),
        "a warning says so"
    );
    // It would have excused this refusal.
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.solver.solves(), 1);
}

#[tokio::test]
async fn verifier_that_can_tell_is_trusted() {
    let world = World::start().await;
    world
        .sidecar
        .status_where("the calibration", |status| status["verifier"]["trusted"] == true)
        .await;
    assert!(world.sidecar.metrics().await.contains("sidecar_verifier_trusted 1"));
    assert!(
        world
            .origin
            .verifications()
            .iter()
            .any(|request| request.head.value("authorization").is_none())
    );
}

// The schedule.

#[tokio::test]
async fn token_is_renewed_on_schedule_while_the_old_one_serves() {
    let mut stage = Stage::new().await;
    stage.set("REFRESH_EVERY", "1s");
    stage.solver.pause();
    let world = stage.start().await;
    world.solver.asked(1).await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests()[0].token(), Some(world.token.as_str()));
    world.solver.resume();
    world
        .sidecar
        .status_where("the new token", |status| status["token"]["generation"].as_u64() >= Some(2))
        .await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_ne!(world.origin.requests()[1].token(), Some(world.token.as_str()));
    assert!(world.origin.requests().len() == 2, "no refusal was needed");
}

#[tokio::test]
async fn token_is_renewed_before_it_expires() {
    let mut stage = Stage::new().await;
    let short = Jwt::anonymous().expires_in(5).make();
    stage.tokens.accept(&short);
    stage.write_env_file(&format!("CHITAI_GOROD_BEARER_TOKEN=\"{short}\"\n"));
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.start().await;
    let start = Instant::now();
    world.sidecar.status_where("the new token", |status| status["token"]["generation"] == 2).await;
    assert!(start.elapsed() < Duration::from_millis(4900), "{:?}", start.elapsed());
    assert!(world.origin.requests().is_empty(), "nobody had to be refused for it");
}

#[tokio::test]
async fn upstream_clock_corrects_ours() {
    // By the shop's clock, two days ahead, the token in the env file has expired.
    let stage = Stage::new().await;
    let ahead = std::time::SystemTime::now() + Duration::from_hours(48);
    stage.origin.set_date(&httpdate::fmt_http_date(ahead));
    stage.origin.set_verification(Verification::WithToken(503));
    let world = stage.launch().await;
    world.sidecar.status_where("a run for the expired token", |_| world.solver.solves() >= 1).await;
}

#[tokio::test]
async fn token_that_has_expired_by_the_upstream_clock_is_not_sent() {
    let mut stage = Stage::new().await;
    let expired = Jwt::anonymous().expires_in(12 * 3600).make();
    stage.tokens.accept(&expired);
    stage.write_env_file(&format!("CHITAI_GOROD_BEARER_TOKEN=\"{expired}\"\n"));
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let ahead = std::time::SystemTime::now() + Duration::from_hours(24);
    stage.origin.set_date(&httpdate::fmt_http_date(ahead));
    let world = stage.launch().await;
    let learnt = |status: &Value| status["verifier"]["clock_offset_s"].as_i64() > Some(80_000);
    world.sidecar.status_where("the offset to be learnt", learnt).await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert!(world.origin.requests().iter().all(|request| request.token() != Some(&expired)));
}
