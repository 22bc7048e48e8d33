//! Whatever a fleet's size: one solve for a token's death.

use std::time::Duration;

use futures_util::future::join_all;

use super::notices::Notices;
use super::{Answer, Fleet, TOKEN_KEY, all_well};
use crate::support::token::fingerprint;
use crate::support::{Stage, until};

/// Requests of each sidecar that are refused at once.
const EACH: usize = 50;

/// Has each of `count` sidecars refused at once; returns how long after the commit each answer came.
async fn check_herd(count: usize) -> Vec<Duration> {
    let fleet = Fleet::start(count).await;
    let (notices, history) = (Notices::on(fleet.stage.redis()).await, fleet.watch());
    let answers = fleet.refused_at_once(EACH).await;
    all_well(answers.iter().flatten());
    assert_eq!(fleet.solves(), 1);
    let token = fleet.stage.tokens.latest();
    fleet.stage.redis().becomes(TOKEN_KEY, &token).await;
    fleet.all_have(&token).await;
    assert_eq!(fleet.solves(), 1, "and nobody solves after that");
    history.check();
    assert!(!notices.text().contains(&token), "no notice holds the secret");
    let commits = notices.times_of("committed");
    assert_eq!(commits.len(), 1, "{}", notices.text());
    let wait = |answer: &Answer| answer.at.saturating_duration_since(commits[0]);
    let mut waits: Vec<Duration> = answers.iter().flatten().map(wait).collect();
    waits.sort();
    waits
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent).div_ceil(100) - 1]
}

#[tokio::test]
async fn six_sidecars_with_fifty_refusals_each_lead_to_one_solve() {
    check_herd(6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "twenty processes, and a bound in time that a busy machine breaks"]
async fn twenty_sidecars_answer_within_half_a_second_of_the_commit() {
    let waits = check_herd(20).await;
    let [half, most, all] = [50, 99, 100].map(|percent| percentile(&waits, percent));
    println!("{} answers after the commit: p50 {half:?}, p99 {most:?}, last {all:?}", waits.len());
    assert!(most <= Duration::from_millis(500), "p99 {most:?}");
}

#[tokio::test]
async fn sidecars_that_start_together_without_a_token_lead_to_one_solve() {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    stage.without_token();
    let fleet = Fleet::launch(stage, 4).await;
    let first = join_all(fleet.members.iter().map(|member| member.get(super::PATH))).await;
    all_well(&first);
    assert_eq!(fleet.solves(), 1);
}

#[tokio::test]
async fn renewal_by_hand_at_one_reaches_all() {
    let fleet = Fleet::start(3).await;
    let response = fleet.members[0].sidecar.ask("POST", "/refresh").await;
    assert_eq!(response.status, 200, "{response:?}");
    let token = fleet.stage.tokens.latest();
    fleet.all_have(&token).await;
    assert_eq!(fleet.solves(), 1);
    let status = fleet.members[1].sidecar.status().await;
    assert_eq!(status["token"]["source"], "redis");
}

#[tokio::test]
async fn sidecar_that_comes_later_takes_what_the_others_have() {
    let fleet = Fleet::start(2).await;
    fleet.refused_at_once(1).await;
    let token = fleet.stage.tokens.latest();
    fleet.stage.redis().becomes(TOKEN_KEY, &token).await;
    fleet.stage.without_token();
    let third = super::Member::launch(&fleet.stage, 2).await;
    let expected = fingerprint(&token);
    until("the token in the third", async || {
        third.sidecar.status().await["token"]["fingerprint"] == expected.as_str()
    })
    .await;
    assert_eq!((fleet.solves(), third.solver.solves()), (1, 0));
}
