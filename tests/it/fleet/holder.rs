//! Who solves for all may die, freeze, or be unable to.

use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::Value;
use tokio::time::Instant;

use super::{Answer, Fleet, HELD, Member, TAKE_OVER, TOKEN_KEY, all_well};
use crate::support::token::fingerprint;
use crate::support::{until, until_within};

/// The epoch that the token in Redis was committed with.
async fn committed_epoch(fleet: &Fleet) -> u64 {
    let meta = fleet.stage.redis().get("{chitai_gorod_token}:meta").await.expect("metadata");
    let meta: Value = serde_json::from_str(&meta).unwrap();
    meta["epoch"].as_u64().unwrap_or_else(|| panic!("no epoch in {meta}"))
}

/// Waits until one of `members` solves.
async fn somebody_solves(members: impl Iterator<Item = &Member> + Clone) {
    until_within(TAKE_OVER, "another one to take over", async || {
        members.clone().any(|member| member.solver.solves() > 0)
    })
    .await;
}

/// All but the answers of sidecar `number`.
fn without(number: usize, answers: &[Vec<Answer>]) -> impl Iterator<Item = &Answer> {
    answers.iter().enumerate().filter(move |(other, _)| *other != number).flat_map(|(_, a)| a)
}

#[tokio::test]
async fn killed_holder_is_followed_by_another_in_time_for_what_is_held() {
    let fleet = Fleet::start(4).await;
    let history = fleet.watch();
    fleet.pause_solvers();
    let trouble = async {
        let holder = fleet.holder().await;
        let killed = Instant::now();
        fleet.members[holder].sidecar.signal(Signal::KILL);
        somebody_solves(fleet.others(holder)).await;
        println!("taken over {:?} after the kill", killed.elapsed());
        fleet.resume_solvers();
        holder
    };
    let (answers, holder) = tokio::join!(fleet.refused_at_once(10), trouble);
    all_well(without(holder, &answers));
    assert_eq!(fleet.solves(), 2, "the dead one's, and one more");
    history.check();
}

#[tokio::test]
async fn hung_holder_shows_at_itself_and_at_those_that_wait_for_it() {
    let fleet = Fleet::start(2).await;
    let turn = |status: &Value| status["redis"]["turn"].clone();
    let first = fleet.members[0].sidecar.status().await;
    assert!(first["redis"].get("turn").is_some_and(Value::is_null), "no run: {first}");
    fleet.pause_solvers();
    let told = |member: &Member| {
        member.sidecar.log().matches("waits for another sidecar's refresh").count()
    };
    let trouble = async {
        let holder = fleet.holder().await;
        let waiting = fleet.others(holder).next().unwrap();
        waiting.sidecar.status_where("its wait", |status| turn(status) == "waiting").await;
        assert_eq!(turn(&fleet.members[holder].sidecar.status().await), "solving");
        until("a word about it", async || told(waiting) == 1).await;
        fleet.resume_solvers();
        holder
    };
    let (answers, holder) = tokio::join!(fleet.refused_at_once(3), trouble);
    all_well(answers.iter().flatten());
    for member in &fleet.members {
        member.sidecar.status_where("the end of its run", |status| turn(status).is_null()).await;
    }
    assert_eq!(told(fleet.others(holder).next().unwrap()), 1, "once in a run");
    assert_eq!(told(&fleet.members[holder]), 0);
}

#[tokio::test]
async fn holder_that_was_frozen_beyond_its_lease_writes_nothing() {
    let fleet = Fleet::start(3).await;
    let history = fleet.watch();
    fleet.pause_solvers();
    let trouble = async {
        let holder = fleet.holder().await;
        fleet.members[holder].sidecar.signal(Signal::STOP);
        // The answer waits for it in its socket, with a token older than the others'.
        fleet.members[holder].solver.resume();
        until("the frozen one's token", async || fleet.stage.tokens.issued().len() == 2).await;
        let stale = fleet.stage.tokens.latest();
        somebody_solves(fleet.others(holder)).await;
        fleet.resume_solvers();
        until_within(HELD, "the next one's token", async || fleet.stage.tokens.issued().len() == 3)
            .await;
        let newer = fleet.stage.tokens.latest();
        fleet.stage.redis().becomes(TOKEN_KEY, &newer).await;
        let epoch = committed_epoch(&fleet).await;
        fleet.members[holder].sidecar.signal(Signal::CONT);
        (stale, newer, epoch)
    };
    let (answers, (stale, newer, epoch)) = tokio::join!(fleet.refused_at_once(10), trouble);
    all_well(answers.iter().flatten());
    fleet.all_have(&newer).await;
    // All runs are over, so whoever wanted to write has.
    for member in &fleet.members {
        let over = |status: &Value| status["refresh"]["running"] == false;
        member.sidecar.status_where("its run to end", over).await;
    }
    assert_eq!(fleet.stage.redis().get(TOKEN_KEY).await.as_deref(), Some(&*newer));
    assert_eq!(committed_epoch(&fleet).await, epoch);
    assert!(!history.has(&fingerprint(&stale)), "the frozen one's token was never in force");
    assert_eq!(fleet.solves(), 2);
    history.check();
}

#[tokio::test]
async fn holder_whose_solver_is_away_hands_the_lease_on() {
    let fleet = with_one_solver_away(3).await;
    let history = fleet.watch();
    let [away, rest @ ..] = &fleet.members[..] else { unreachable!() };
    fleet.kill_token();
    let first = join_all((0..10).map(|_| away.get(super::PATH)));
    let after = async {
        until("its solver to be missed", async || {
            let failed = ["source=\"flaresolverr\"", "outcome=\"failed\""];
            away.sidecar.metric("sidecar_refreshes_total", &failed).await >= 1.0
        })
        .await;
        join_all(rest.iter().flat_map(|member| (0..10).map(|_| member.get(super::PATH)))).await
    };
    let start = Instant::now();
    let (first, rest) = tokio::join!(first, after);
    println!("handed on and solved in {:?}", start.elapsed());
    all_well(first.iter().chain(&rest));
    assert_eq!(fleet.solves(), 1);
    history.check();
}

#[tokio::test]
async fn sidecar_whose_solver_is_away_is_served_by_those_that_have_one_and_no_traffic() {
    let fleet = with_one_solver_away(3).await;
    fleet.kill_token();
    all_well(&join_all((0..10).map(|_| fleet.members[0].get(super::PATH))).await);
    assert_eq!(fleet.solves(), 1);
}

#[tokio::test]
async fn failure_of_a_fleet_whose_solvers_are_all_away_is_shared() {
    let mut fleet = Fleet::start(3).await;
    for number in 0..3 {
        fleet.members[number] = Member::launch_without_solver(&fleet.stage, number).await;
    }
    fleet.settled().await;
    let answers = fleet.refused_at_once(5).await;
    assert!(answers.iter().flatten().all(|answer| answer.status() == 401));
    until("the back-off to be shared", async || {
        fleet.stage.redis().get("{chitai_gorod_token}:backoff").await.is_some()
    })
    .await;
}

/// A fleet of `count` whose first sidecar has a solver that refuses connections.
async fn with_one_solver_away(count: usize) -> Fleet {
    let mut fleet = Fleet::start(count).await;
    fleet.members[0] = Member::launch_without_solver(&fleet.stage, 0).await;
    fleet.settled().await;
    fleet
}
