//! Clients that give up sooner than a slow solve ends.

use std::time::Duration;

use tokio::time::sleep;

use super::matrix::{AIOHTTP, HTTPX};
use super::{Way, run};
use crate::support::parser::{in_container, script};
use crate::support::sidecar::{output, stdout};
use crate::support::{World, until};

const REQUESTS: &str = "sidecar_requests_total";

/// How long the solve lasts, and the patience of those who wait for it.
struct Story {
    hold_timeout: &'static str,
    /// In seconds.
    client_total: &'static str,
    /// `None`: until the second try waits for its end.
    solve: Option<Duration>,
    /// The least that the first 429 says, in seconds.
    retry_after: u64,
}

/// Plays the old system's client with that many tries, and returns what it said.
async fn old_client(world: &World, tries: &str, total: &str) -> String {
    let mut command = script(AIOHTTP.name, "old_api_client.py", "aiohttp").unwrap();
    command.args([tries, total]);
    let [base, _] = Way::Gateway.bases(world);
    let variables = vec![("CHITAI_GOROD_API_URL", base)];
    stdout(&output(in_container(command, variables)).await)
}

async fn check_old_client(story: &Story) {
    if script(AIOHTTP.name, "old_api_client.py", "aiohttp").is_none() {
        return;
    }
    // Each in a world of its own: they need not start at one moment.
    tokio::join!(check_tries(story, "2"), check_tries(story, "3"));
}

async fn check_tries(story: &Story, tries: &str) {
    let variables = [("HOLD_TIMEOUT", story.hold_timeout), ("RETRY_STATUS", "429")];
    let world = World::paused(&variables).await;
    let solve = async {
        world.solver.asked(1).await;
        match story.solve {
            Some(length) => sleep(length).await,
            None => second_try_is_held(&world).await,
        }
        world.solver.resume();
    };
    let client = old_client(&world, tries, story.client_total);
    let (said, ()) = tokio::join!(client, solve);
    let first = said.lines().next().and_then(|line| line.strip_prefix("try 1 429 "));
    let retry_after: u64 = first.unwrap_or_else(|| panic!("{said}")).parse().unwrap();
    assert!(retry_after >= story.retry_after, "{said}");
    assert!(said.ends_with("result found\n"), "{said}");
    assert_eq!(world.solver.solves(), 1);
}

/// The client has been sent away once, and is back.
async fn second_try_is_held(world: &World) {
    let sent_away = async || world.sidecar.metric(REQUESTS, &["gateway", "429"]).await > 0.5;
    until("a 429", sent_away).await;
    world.sidecar.status_where("a held request", |status| status["held"] == 1).await;
}

/// The first hold ends after 1.1 s and sends the client away for 2 s, since the run has lasted
/// longer than one; the second sees the solve end, after more than the 3 s of the client.
#[tokio::test]
async fn old_client_comes_through_a_solve_longer_than_its_time_out() {
    let (hold_timeout, client_total) = ("1100ms", "3");
    check_old_client(&Story { hold_timeout, client_total, solve: None, retry_after: 2 }).await;
}

#[tokio::test]
#[ignore = "lasts as long as the real thing: half a minute"]
async fn old_client_of_15_s_comes_through_a_solve_of_30_s_with_a_hold_of_12_s() {
    let solve = Some(Duration::from_secs(30));
    check_old_client(&Story { hold_timeout: "12s", client_total: "15", solve, retry_after: 10 })
        .await;
}

/// One call with a time-out of `seconds` while the solver is busy, and the next when it is done.
async fn check_httpx(seconds: &str) {
    let Some(mut first) = script(HTTPX.name, "httpx_once.py", "httpx") else {
        return;
    };
    let mut next = script(HTTPX.name, "httpx_once.py", "httpx").unwrap();
    let world = World::paused(&[]).await;
    let [base, _] = Way::Proxy.bases(&world);
    first.args([&base, seconds]);
    next.args([&base, seconds]);
    let said = stdout(&run(&world, &HTTPX, Way::Proxy, first).await);
    assert_eq!(said, "timed out\n");
    world.solver.resume();
    world.sidecar.status_where("the run to end", |status| status["token"]["generation"] == 2).await;
    let said = stdout(&run(&world, &HTTPX, Way::Proxy, next).await);
    assert_eq!(said, "status 200\n");
    assert_eq!(world.solver.solves(), 1);
}

#[tokio::test]
async fn next_try_of_an_httpx_that_gave_up_finds_the_token() {
    check_httpx("0.5").await;
}

#[tokio::test]
#[ignore = "waits out the default time-out"]
async fn next_try_of_an_httpx_with_its_default_time_out_finds_the_token() {
    check_httpx("5").await;
}
