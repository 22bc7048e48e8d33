//! Hours of a parser's life in minutes: the token dies again and again, and the solver fails half
//! of the time.
//!
//! Ignored unless asked for: `tests/run.sh -- --ignored --nocapture soak`. It
//! lasts `SOAK_SECONDS` (900), and a token lives `SOAK_DEATH_SECONDS` (60).

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use tokio::time::{Instant, sleep};

use crate::support::client::API;
use crate::support::parser::{in_container, script};
use crate::support::sidecar::{output_within, stderr, stdout};
use crate::support::solver::Mode;
use crate::support::{Stage, World};

/// How long a parser may take to end after its time.
const GRACE: Duration = Duration::from_mins(1);

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

/// A number of seconds from the environment of the test run.
fn seconds(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().expect(variable))
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

/// What the solver does after a death: its work, or by the same chance one of the ways to fail.
fn chance(random: &mut fastrand::Rng) -> Mode {
    let failures = [Mode::Error, Mode::NoCookie, Mode::HangsUp, Mode::Never];
    if random.bool() { Mode::Solves } else { random.choice(failures).expect("a failure") }
}

/// Lets each token live `period` seconds, up to a period before the end, and waits for the next
/// one after each death: one that dies while its requests are being replayed would cost them their
/// only replay. Returns the solver's mode at each death.
async fn kill_tokens(world: &World, length: u64, period: u64) -> Vec<Mode> {
    let mut random = fastrand::Rng::with_seed(20_260_801);
    let period = Duration::from_secs(period);
    let last = Instant::now() + Duration::from_secs(length) - period;
    let mut modes = Vec::new();
    loop {
        sleep(period).await;
        if Instant::now() > last {
            return modes;
        }
        let mode = chance(&mut random);
        world.solver.set(mode.clone());
        world.kill_token();
        modes.push(mode);
        let renewed = |status: &serde_json::Value| status["token"]["generation"] == modes.len() + 1;
        world.sidecar.status_where("the next token", renewed).await;
    }
}

async fn print_figures(world: &World, modes: &[Mode]) {
    let solving = modes.iter().filter(|mode| matches!(mode, Mode::Solves)).count();
    println!("  {} deaths, the solver able at {solving}: {modes:?}", modes.len());
    let refreshes =
        async |labels: &[&str]| world.sidecar.metric("sidecar_refreshes_total", labels).await;
    let ok = "outcome=\"ok\"";
    println!(
        "  {} solves, {} sign-ins, {} new tokens: {} by the solver, {} by sign-in",
        world.solver.solves(),
        world.origin.door_knocks(),
        refreshes(&[ok]).await,
        refreshes(&[ok, "source=\"flaresolverr\""]).await,
        refreshes(&[ok, "source=\"direct\""]).await,
    );
    println!("  {} replays", world.sidecar.metric("sidecar_replays_total", &[]).await);
}

#[tokio::test]
#[ignore = "lasts SOAK_SECONDS, a quarter of an hour"]
async fn parsers_see_no_error_while_a_source_works() {
    let length = seconds("SOAK_SECONDS", 900);
    let period = seconds("SOAK_DEATH_SECONDS", 60);
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    stage.set("RUST_LOG", "info");
    let world = stage.start().await;
    let (spider, program, modes) = tokio::join!(
        run_parser(&world, "soak_spider.py", "scrapy", length),
        run_parser(&world, "soak_aiohttp.py", "aiohttp", length),
        kill_tokens(&world, length, period),
    );
    println!("soak of {length} s, each token lives {period} s");
    println!("  scrapy: {spider}\n  aiohttp: {program}");
    print_figures(&world, &modes).await;
    let seen = [spider.errors, program.errors].concat();
    assert!(seen.is_empty(), "{seen:#?}");
}
