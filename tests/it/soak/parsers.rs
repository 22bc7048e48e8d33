//! Hours of a parser's life in minutes: the token dies again and again, and the solver fails half
//! of the time.
//!
//! It lasts `SOAK_SECONDS` (900), and a token lives `SOAK_DEATH_SECONDS` (60).
//! While the anonymous door is open, parsers see no error; with
//! `SOAK_DOOR=closed` the solver is the only source, and they see the 401 of
//! failed runs and of the back-off after them, and nothing else.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use tokio::time::{Instant, sleep};

use super::seconds;
use crate::support::client::API;
use crate::support::parser::{in_container, script};
use crate::support::sidecar::{output_within, stderr, stdout};
use crate::support::solver::Mode;
use crate::support::{Stage, World, until, until_within};

const PATH: &str = "/web/api/v2/x";

/// How long a parser may take to end after its time.
const GRACE: Duration = Duration::from_mins(1);
/// How long a token may take to come where the solver is the only source: seven failures in a row.
const RECOVERY: Duration = Duration::from_mins(12);

/// Whether a source works that the solver's failures do not touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AnonymousDoor {
    Open,
    Closed,
}

impl AnonymousDoor {
    /// What `SOAK_DOOR` says: open unless `closed`.
    fn from_environment() -> Self {
        match std::env::var("SOAK_DOOR").as_deref() {
            Ok("closed") => Self::Closed,
            Ok("open") | Err(_) => Self::Open,
            Ok(other) => panic!("SOAK_DOOR is {other}, neither open nor closed"),
        }
    }

    /// What the solver does from a death on. Behind a closed door nothing is drawn that outlasts
    /// the parsers' patience, and every solve has its own chance.
    fn mode(self, random: &mut fastrand::Rng) -> Mode {
        let failures = [Mode::Error, Mode::NoCookie, Mode::HangsUp];
        match self {
            Self::Closed => Mode::OneOf([failures, [const { Mode::Solves }; 3]].concat()),
            Self::Open if random.bool() => Mode::Solves,
            Self::Open => {
                let failures = [&failures[..], &[Mode::Never]].concat();
                random.choice(failures).expect("a failure")
            }
        }
    }

    /// Waits until a death has ended in the token of this generation.
    async fn renewed(self, world: &World, generation: usize) {
        let is_there = async || world.sidecar.generation().await == generation as u64;
        match self {
            Self::Open => until("the next token", is_there).await,
            // Asks for it as well, since the parsers may have ended in the back-off.
            Self::Closed => {
                until_within(RECOVERY, "the next token", async || {
                    world.get(PATH).await;
                    is_there().await
                })
                .await;
            }
        }
    }

    /// Whether a parser may see this error.
    fn allows(self, error: &str) -> bool {
        self == Self::Closed && ["401 refresh_failed", "401 backoff"].contains(&error)
    }
}

/// What a parser says at its end.
#[derive(Deserialize)]
struct Report {
    requests: u64,
    /// By the library, unseen by the parser's code.
    retries: u64,
    /// The longest request, in seconds.
    longest: f64,
    /// Answers other than 200, and exceptions.
    errors: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, retries, longest, errors } = self;
        let errors = errors.len();
        write!(f, "{requests} requests, {errors} errors seen, {retries} retries by the library, ")?;
        write!(f, "longest {longest:.2} s")
    }
}

/// Runs a parser for its time, through the proxy.
async fn run_parser(world: &World, name: &str, package: &str, length: u64) -> Report {
    let mut command = script(package, name, package).expect("tests/run.sh --install-only");
    command.args([format!("https://{API}/web/api/v2"), length.to_string()]);
    let bundle = world.path("certs").join("ca-bundle.pem").display().to_string();
    let proxy = format!("http://{}", world.sidecar.proxy());
    let command = in_container(command, vec![("HTTPS_PROXY", proxy), ("SSL_CERT_FILE", bundle)]);
    let (started, length) = (Instant::now(), Duration::from_secs(length));
    let output = output_within(length + GRACE, command).await;
    let said = stdout(&output);
    assert!(started.elapsed() >= length, "{name} ended early: {said}\n{}", stderr(&output));
    let report = said.lines().last().and_then(|line| serde_json::from_str(line).ok());
    report.unwrap_or_else(|| panic!("{name}: {said}\n{}", stderr(&output)))
}

/// Lets each token live `period` seconds, up to a period before the end, and waits for the next
/// one after each death: one that dies while its requests are being replayed would cost them their
/// only replay. Returns the solver's mode at each death.
async fn kill_tokens(world: &World, door: AnonymousDoor, length: u64, period: u64) -> Vec<Mode> {
    let mut random = fastrand::Rng::with_seed(20_260_801);
    let period = Duration::from_secs(period);
    let last = Instant::now() + Duration::from_secs(length) - period;
    let mut modes = Vec::new();
    loop {
        sleep(period).await;
        if Instant::now() > last {
            return modes;
        }
        let mode = door.mode(&mut random);
        world.solver.set(mode.clone());
        world.kill_token();
        modes.push(mode);
        door.renewed(world, modes.len() + 1).await;
    }
}

async fn print_figures(world: &World, modes: &[Mode]) {
    println!("  {} deaths, at which the solver did: {modes:?}", modes.len());
    // The sum of no samples is a negative zero.
    let refreshes =
        async |labels: &[&str]| world.sidecar.metric("sidecar_refreshes_total", labels).await + 0.0;
    let ok = "outcome=\"ok\"";
    println!(
        "  {} solves, {} sign-ins, {} new tokens: {} by the solver, {} by sign-in; {} sources failed",
        world.solver.solves(),
        world.origin.door_knocks(),
        refreshes(&[ok]).await,
        refreshes(&[ok, "source=\"flaresolverr\""]).await,
        refreshes(&[ok, "source=\"direct\""]).await,
        refreshes(&["outcome=\"failed\""]).await,
    );
    println!("  {} replays", world.sidecar.metric("sidecar_replays_total", &[]).await);
}

/// What kind of error a parser saw: status and mark of an answer that the sidecar marked.
fn kind(error: &str) -> String {
    let marked = error.split_once(" token-sidecar; error=proxy_internal_error; details=\"");
    match marked.and_then(|(status, rest)| Some((status, rest.split_once('"')?.0))) {
        Some((status, details)) => format!("{status} {details}"),
        None => error.to_owned(),
    }
}

/// How many errors of each kind there were.
fn count(errors: &[String]) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for error in errors {
        *counts.entry(kind(error)).or_default() += 1;
    }
    counts
}

async fn start(door: AnonymousDoor) -> World {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    stage.set("RUST_LOG", "info");
    if door == AnonymousDoor::Closed {
        stage.set("TOKEN_SOURCES", "flaresolverr");
        stage.origin.close_doors();
    }
    stage.start().await
}

#[tokio::test]
#[ignore = "lasts SOAK_SECONDS, a quarter of an hour"]
async fn parsers_see_no_error_but_those_of_failed_runs_where_no_other_source_works() {
    let length = seconds("SOAK_SECONDS", 900).as_secs();
    let period = seconds("SOAK_DEATH_SECONDS", 60).as_secs();
    let door = AnonymousDoor::from_environment();
    let world = start(door).await;
    let (spider, program, modes) = tokio::join!(
        run_parser(&world, "soak_spider.py", "scrapy", length),
        run_parser(&world, "soak_aiohttp.py", "aiohttp", length),
        kill_tokens(&world, door, length, period),
    );
    println!("soak of {length} s, each token lives {period} s, door {door:?}");
    println!("  scrapy: {spider}\n  aiohttp: {program}");
    print_figures(&world, &modes).await;
    let seen = count(&[spider.errors, program.errors].concat());
    println!("  errors seen: {seen:?}");
    let others: Vec<_> = seen.keys().filter(|error| !door.allows(error)).collect();
    assert!(others.is_empty(), "{others:#?}");
}
