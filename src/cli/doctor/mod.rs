//! `doctor`: each dependency and the whole path, step by step.
//!
//! # Invariants
//!
//! - Nothing is changed: no CA is made, no file or key written, no token
//!   saved. No solve is started and no token asked for unless `--solve`, and
//!   never by the request through the sidecar, which only looks on.
//! - Every check is bounded in time; what hangs is reported as such.
//! - The lines come in the order of [`Section::ALL`], while the sections run
//!   side by side.

mod certificates;
mod report;
mod sidecar;
mod sources;
mod stores;
mod upstream;
mod verifier;

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::{StreamExt, stream};

use crate::app::{AppError, Probes};
use crate::config::{Config, ConfigError, Env};
use crate::token::Timestamp;
use report::{Check, Report};

/// Where settings come from.
const SETTINGS: &str = "environment and ENV_FILE";

/// What the command line asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    /// One JSON object instead of lines.
    pub(super) json: bool,
    /// Ask the sources for a token, too.
    pub(super) solve: bool,
}

/// What is examined.
struct Patient {
    config: Config,
    /// Names that look like a slip of the pen, with ours.
    near_misses: Vec<(String, &'static str)>,
    probes: Probes,
    solve: bool,
}

/// A group of checks that follow from one another.
#[derive(Clone, Copy, Debug)]
enum Section {
    Settings,
    Certificates,
    EnvFile,
    Redis,
    Solver,
    Upstreams,
    Verifier,
    Sidecar,
    Solve,
}

impl Section {
    const ALL: [Self; 9] = [
        Self::Settings,
        Self::Certificates,
        Self::EnvFile,
        Self::Redis,
        Self::Solver,
        Self::Upstreams,
        Self::Verifier,
        Self::Sidecar,
        Self::Solve,
    ];

    async fn examine(self, patient: &Patient) -> Vec<Check> {
        match self {
            Self::Settings => settings(&patient.near_misses),
            Self::Certificates => certificates::examine(&patient.config),
            Self::EnvFile => stores::env_file(patient),
            Self::Redis => stores::redis(patient).await,
            Self::Solver => vec![sources::solver(patient).await],
            Self::Upstreams => upstream::examine(patient).await,
            Self::Verifier => verifier::examine(patient).await,
            Self::Sidecar => sidecar::examine(patient).await,
            Self::Solve => vec![sources::solve(patient).await],
        }
    }
}

/// Runs all checks and prints them, each as soon as those before it are done.
/// Exit code 1 if one failed; warnings fail nothing.
pub(super) async fn execute(
    config: Config,
    env: &Env,
    options: Options,
) -> Result<ExitCode, AppError> {
    let probes = Probes::new(&config)?;
    let near_misses = env.near_misses();
    let patient = Patient { config, near_misses, probes, solve: options.solve };
    let sections = stream::iter(Section::ALL).map(|section| section.examine(&patient));
    let mut sections = sections.buffered(Section::ALL.len());
    let mut checks = Vec::new();
    while let Some(section) = sections.next().await {
        if !options.json {
            for check in &section {
                println!("{}", check.line());
            }
        }
        checks.extend(section);
    }
    drop(sections);
    // A solve that another source has overtaken must leave no browser open.
    patient.probes.refresher.close().await;
    let report = Report::of(checks);
    if options.json {
        println!("{}", serde_json::json!(report));
    }
    Ok(if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints the report for machines where settings that cannot be used leave
/// nothing to examine.
pub(super) fn refuse(error: &ConfigError) {
    let advice = "mend it: `token-sidecar --help` lists the settings";
    let check = Check::failed("settings", SETTINGS, error, advice);
    println!("{}", serde_json::json!(Report::of(vec![check])));
}

/// Settings that could not be used have ended the command before this.
fn settings(near_misses: &[(String, &'static str)]) -> Vec<Check> {
    if near_misses.is_empty() {
        return vec![Check::ok("settings", SETTINGS, "all are usable")];
    }
    let check = |(given, known): &(String, &'static str)| {
        let found = "no variable of token-sidecar has this name";
        Check::warning("settings", given, found, format!("did you mean {known}?"))
    };
    near_misses.iter().map(check).collect()
}

/// A span of time for people, without what nobody reads.
fn readable(span: Duration) -> humantime::FormattedDuration {
    let precise = span < Duration::from_secs(10);
    let whole = Duration::from_secs(span.as_secs());
    let millis = Duration::from_millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX));
    humantime::format_duration(if precise { millis } else { whole })
}

/// This machine's clock.
fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    Timestamp(since.map_or(0, |since| since.as_secs()))
}
