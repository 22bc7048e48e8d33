//! What fails is shared as well: a run, and a token that the shop refuses.

use std::time::Duration;

use futures_util::future::join_all;

use super::{Answer, Fleet, PATH, SPREAD, TOKEN_KEY, all_well};
use crate::support::origin::Verification;
use crate::support::solver::Mode;
use crate::support::token::{Jwt, fingerprint};
use crate::support::{Stage, until, until_within};

/// Every answer is the shop's 401, passed on, that says when to come back.
fn all_refused(answers: &[Vec<Answer>]) {
    for answer in answers.iter().flatten() {
        assert_eq!(answer.status(), 401, "{:?}", answer.response);
        let retry = answer.response.as_ref().unwrap().value("retry-after");
        assert!(retry.is_some_and(|seconds| seconds != "0"), "{retry:?}");
    }
}

async fn each_asks(fleet: &Fleet, count: usize) -> Vec<Vec<Answer>> {
    join_all(fleet.members.iter().map(|member| join_all((0..count).map(|_| member.get(PATH)))))
        .await
}

#[tokio::test]
async fn failed_run_holds_all_back_until_one_is_renewed_by_hand() {
    let fleet = Fleet::start(4).await;
    let history = fleet.watch();
    fleet.members.iter().for_each(|member| member.solver.set(Mode::Error));
    all_refused(&fleet.refused_at_once(10).await);
    assert_eq!(fleet.solves(), 1, "one has tried for all");
    all_refused(&each_asks(&fleet, 5).await);
    assert!(fleet.solves() <= 2, "{} solves; each back-off may end in one", fleet.solves());
    for member in &fleet.members {
        let backs_off = |status: &serde_json::Value| {
            status["refresh"]["backoff_s"].as_f64().is_some_and(|left| left > 0.0)
        };
        member.sidecar.status_where("the back-off", backs_off).await;
    }

    fleet.members.iter().for_each(|member| member.solver.set(Mode::Solves));
    let before = fleet.solves();
    let response = fleet.members[3].sidecar.ask("POST", "/refresh").await;
    assert_eq!(response.status, 200, "by hand there is no back-off: {response:?}");
    fleet.all_have(&fleet.stage.tokens.latest()).await;
    all_well(each_asks(&fleet, 5).await.iter().flatten());
    assert!(fleet.solves() <= before + 1, "{} solves, {before} before", fleet.solves());
    history.check();
}

#[tokio::test]
async fn refused_token_is_not_adopted_back_by_those_who_never_saw_it_refused() {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    let fleet = Fleet::start_on(stage, 3).await;
    // Newer by `iat` than all that comes later: only the refusal speaks against it.
    let refused = Jwt::anonymous().issued_in(600).make();
    fleet.stage.tokens.accept(&refused);
    fleet.stage.redis().set(TOKEN_KEY, &refused).await;
    fleet.all_have(&refused).await;

    fleet.kill_token();
    // Only the first ever sees it refused.
    all_well([&fleet.members[0].get(PATH).await]);
    let good = fleet.stage.tokens.latest();
    fleet.stage.redis().becomes(TOKEN_KEY, &good).await;
    fleet.all_have(&good).await;

    // As a lagging replica or another program would put it back, while nobody can verify.
    let history = fleet.watch();
    fleet.stage.origin.set_verification(Verification::Always(503));
    fleet.stage.redis().set(TOKEN_KEY, &refused).await;
    until_within(SPREAD, "the good one to be written over it", async || {
        fleet.stage.redis().get(TOKEN_KEY).await.as_deref() == Some(&*good)
    })
    .await;
    all_well(each_asks(&fleet, 5).await.iter().flatten());
    assert!(!history.has(&fingerprint(&refused)), "the refused token was in force again");
    assert_eq!(fleet.solves(), 1);
    history.check();
}

#[tokio::test]
async fn token_that_nobody_can_verify_is_shared_too() {
    let fleet = Fleet::start(3).await;
    let history = fleet.watch();
    fleet.stage.origin.set_verification(Verification::Always(503));
    let answers = fleet.refused_at_once(10).await;
    all_well(answers.iter().flatten());
    assert_eq!(fleet.solves(), 1);
    let token = fleet.stage.tokens.latest();
    fleet.all_have(&token).await;
    // The answers have confirmed it.
    until("it to be stored as verified", async || {
        fleet.stage.redis().get(TOKEN_KEY).await.as_deref() == Some(&*token)
    })
    .await;
    until_within(Duration::from_secs(5), "the unverified one to go", async || {
        fleet.stage.redis().get("{chitai_gorod_token}:unverified").await.is_none()
    })
    .await;
    history.check();
}
