//! Redis comes and goes; the fleet's traffic does not notice, and is of one mind again afterwards.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::{Fleet, Member, PATH, SPREAD, TOKEN_KEY, all_well};
use crate::support::redis::Redis;
use crate::support::token::fingerprint;
use crate::support::until_within;

/// Kills the token and has each sidecar ask a few times; returns how long the slowest answer took.
async fn renew(fleet: &Fleet) -> Duration {
    let start = Instant::now();
    fleet.kill_token();
    let asked = fleet.members.iter().flat_map(|member| (0..5).map(|_| member.get(PATH)));
    let answers = join_all(asked).await;
    all_well(&answers);
    answers.iter().map(|answer| answer.at - start).max().unwrap()
}

/// Waits until Redis has a live token again, all sidecars have the same one, and Redis counts as well
/// with each.
async fn agreed(fleet: &Fleet) {
    until_within(SPREAD, "all to agree", async || {
        let Some(stored) = fleet.stage.redis().get(TOKEN_KEY).await else { return false };
        let statuses = join_all(fleet.members.iter().map(|member| member.sidecar.status())).await;
        let fingerprint = fingerprint(&stored);
        fleet.stage.tokens.authorizes(&format!("Bearer {stored}"))
            && statuses.iter().all(|status| status["token"]["fingerprint"] == fingerprint.as_str())
    })
    .await;
    redis_well(fleet).await;
}

/// Lets Redis go and come back, in some way; the token dies before, amid and after that.
async fn outlast(leave: impl FnOnce(&mut Redis), come_back: impl AsyncFnOnce(&mut Redis)) {
    let mut fleet = Fleet::start(3).await;
    let history = fleet.watch();
    renew(&fleet).await;
    assert_eq!(fleet.solves(), 1);
    leave(fleet.stage.redis_mut());
    let slowest = renew(&fleet).await;
    assert!(slowest < Duration::from_secs(6), "{slowest:?}");
    assert!(fleet.solves() <= 4, "each by itself, once: {}", fleet.solves());
    come_back(fleet.stage.redis_mut()).await;
    agreed(&fleet).await;
    let before = fleet.solves();
    renew(&fleet).await;
    assert_eq!(fleet.solves(), before + 1, "one for all again");
    history.check();
}

#[tokio::test]
async fn redis_killed_and_back_empty() {
    outlast(Redis::kill, async |redis| redis.restart().await).await;
}

#[tokio::test]
async fn redis_frozen_and_thawed() {
    outlast(|redis| redis.freeze(), async |redis| redis.thaw()).await;
}

/// It was asked for and gave no answer; now it does what it was asked for.
#[tokio::test]
async fn lease_that_a_thawed_redis_grants_to_nobody_is_given_back() {
    let fleet = Fleet::start(1).await;
    let redis = fleet.stage.redis();
    redis.freeze();
    renew(&fleet).await;
    redis.thaw();
    let lease = "{chitai_gorod_token}:lease";
    until_within(Duration::from_secs(2), "the lease", async || redis.get(lease).await.is_some())
        .await;
    until_within(Duration::from_secs(8), "its return", async || redis.get(lease).await.is_none())
        .await;
}

/// A look of no consequence was in vain, and so is the first one of the run.
#[tokio::test]
async fn redis_that_is_slow_for_all_sends_nobody_to_a_solver_alone() {
    let fleet = Fleet::start(1).await;
    let (redis, member) = (fleet.stage.redis(), &fleet.members[0]);
    let looked_in_vain = async |before: f64| {
        until_within(SPREAD, "a look in vain", async || errors(member).await > before).await;
    };
    redis.freeze();
    looked_in_vain(0.0).await;
    let before = errors(member).await;
    fleet.kill_token();
    let thaw = async {
        looked_in_vain(before).await;
        redis.thaw();
    };
    let (answer, ()) = tokio::join!(member.get(PATH), thaw);
    all_well([&answer]);
    agreed(&fleet).await;
    let meta = redis.get("{chitai_gorod_token}:meta").await.unwrap();
    let meta: serde_json::Value = serde_json::from_str(&meta).unwrap();
    assert_ne!(meta["epoch"], 0, "it was committed with a lease: {meta}");
}

/// How often Redis has failed the sidecar.
async fn errors(member: &Member) -> f64 {
    member.sidecar.metric("sidecar_store_errors_total", &["store=\"redis\""]).await
}

#[tokio::test]
async fn redis_down_renews_alone_once_and_then_backs_off() {
    let mut fleet = Fleet::start(2).await;
    fleet.stage.redis_mut().kill();
    renew(&fleet).await;
    let alone = fleet.solves();
    assert!(alone <= 2, "{alone}");
    // A second death within five minutes: a solve by oneself is refused, and that is said.
    fleet.kill_token();
    let answers = join_all(fleet.members.iter().map(|member| member.get(PATH))).await;
    for answer in &answers {
        assert_eq!(answer.status(), 401, "{:?}", answer.response);
        assert!(answer.response.as_ref().unwrap().value("retry-after").is_some());
    }
    assert_eq!(fleet.solves(), alone);
    // With Redis back it is renewed again, without the five minutes.
    fleet.stage.redis_mut().restart().await;
    until_within(SPREAD, "a renewal", async || fleet.members[0].get(PATH).await.status() == 200)
        .await;
    agreed(&fleet).await;
}

/// Redis answers all again, and takes what there is to write.
async fn redis_well(fleet: &Fleet) {
    for member in &fleet.members {
        let well = |status: &serde_json::Value| status["redis"]["ok"] == true;
        until_within(SPREAD, "Redis to be well", async || well(&member.sidecar.status().await))
            .await;
    }
}

#[tokio::test]
async fn redis_that_goes_a_second_time_is_gone_without_at_once_again() {
    let mut fleet = Fleet::start(2).await;
    fleet.stage.redis_mut().kill();
    renew(&fleet).await;
    fleet.stage.redis_mut().restart().await;
    agreed(&fleet).await;
    fleet.stage.redis_mut().kill();
    let before = fleet.solves();
    renew(&fleet).await;
    let alone = fleet.solves() - before;
    assert!((1..=2).contains(&alone), "each by itself, once: {alone}");
}

#[tokio::test]
async fn full_redis_is_gone_without_once_and_then_every_five_minutes() {
    let fleet = Fleet::start(2).await;
    let redis = fleet.stage.redis();
    let () = redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
    renew(&fleet).await;
    let alone = fleet.solves();
    assert!(alone <= 2, "each by itself, once: {alone}");
    // It can be read all the while, and is looked at: that is not enough.
    tokio::time::sleep(Duration::from_secs(12)).await;
    fleet.kill_token();
    for answer in &join_all(fleet.members.iter().map(|member| member.get(PATH))).await {
        assert_eq!(answer.status(), 401, "{:?}", answer.response);
    }
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(fleet.solves(), alone, "no second one within five minutes");
    let () = redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
    until_within(SPREAD, "a renewal", async || fleet.members[0].get(PATH).await.status() == 200)
        .await;
    agreed(&fleet).await;
    assert_eq!(fleet.solves(), alone + 1, "one for all again");
}
