//! The refresher's share of `/status`.

use serde::Serialize;
use tokio::time::Instant;

use super::lock;
use super::refresher::Refresher;
use crate::token::RedisTrouble;

/// What the refresher knows of itself.
#[derive(Clone, Debug, Serialize)]
pub struct RefreshStatus {
    /// The runs.
    pub refresh: RunStatus,
    /// The sources in their order.
    pub sources: Vec<SourceStatus>,
    /// Redis; null if it is not set.
    pub redis: Option<RedisStatus>,
    /// The env file; null if there is none.
    pub env_file: Option<EnvFileStatus>,
    /// The verifier.
    pub verifier: VerifierStatus,
}

/// How the runs go.
#[derive(Clone, Debug, Serialize)]
pub struct RunStatus {
    /// One is in flight.
    pub running: bool,
    /// `ok` or `failed`; null before the first has ended.
    pub last_outcome: Option<&'static str>,
    /// What the last one failed with.
    pub last_error: Option<String>,
    /// How long the last one took.
    pub last_s: Option<f64>,
    /// When the next one is due, as RFC 3339.
    pub next_at: String,
    /// How long no run may start; 0 without back-off.
    pub backoff_s: f64,
    /// How long none starts for the anti-bot wall's sake; 0 without a wall.
    pub walled_s: f64,
}

/// How a source fared when it was last asked.
#[derive(Clone, Debug, Serialize)]
pub struct SourceStatus {
    /// Its name in `TOKEN_SOURCES`.
    pub name: &'static str,
    /// `ok` or `failed`; null before it was asked.
    pub last_outcome: Option<&'static str>,
    /// What it failed with.
    pub last_error: Option<String>,
    /// How long it took, the verification included.
    pub last_s: Option<f64>,
}

/// How Redis fares.
#[derive(Clone, Debug, Serialize)]
pub struct RedisStatus {
    /// Reading and writing worked when they were last tried.
    pub ok: bool,
    /// What it failed with.
    pub last_error: Option<String>,
    /// What kind of trouble that is.
    #[serde(skip)]
    pub trouble: Option<RedisTrouble>,
    /// What the run in flight does among the sidecars: `solving`, or `waiting`
    /// for another one; null without a run.
    pub turn: Option<&'static str>,
}

/// How the env file fares.
#[derive(Clone, Debug, Serialize)]
pub struct EnvFileStatus {
    /// Where it lies.
    pub path: String,
    /// The last operation worked.
    pub ok: bool,
    /// What it failed with.
    pub last_error: Option<String>,
}

/// What the verifier is worth.
#[derive(Clone, Debug, Serialize)]
pub struct VerifierStatus {
    /// `pending`, `trusted` or `blind`.
    pub state: &'static str,
    /// Whether its 200 counts.
    pub trusted: bool,
    /// Seconds by which the upstream's clock is ahead of ours.
    pub clock_offset_s: i64,
}

impl Refresher {
    /// What the refresher knows of itself.
    pub fn status(&self) -> RefreshStatus {
        RefreshStatus {
            refresh: self.run_status(),
            sources: self.source_statuses(),
            redis: self.stores.has_redis().then(|| self.redis_status()),
            env_file: self.stores.env_file_state().map(|(path, last_error)| EnvFileStatus {
                path,
                ok: last_error.is_none(),
                last_error,
            }),
            verifier: self.verifier_status(),
        }
    }

    fn redis_status(&self) -> RedisStatus {
        let last_error = self.stores.redis_error();
        let trouble = self.stores.redis_trouble();
        let turn = self.fleet.part().map(super::fleet::Part::as_str);
        RedisStatus { ok: last_error.is_none(), last_error, trouble, turn }
    }

    fn run_status(&self) -> RunStatus {
        let last = lock(&self.last_run).clone();
        let error = last.as_ref().and_then(super::run::LastRun::error);
        let now = (Instant::now(), self.clock.now());
        let usable = self.usable().is_some();
        // Not under the schedule's lock: the runs take that under theirs.
        let running = self.runs.is_running();
        let schedule = self.schedule();
        let left =
            |until: Option<Instant>| until.map_or(0.0, |until| (until - now.0).as_secs_f64());
        RunStatus {
            running,
            last_outcome: last.as_ref().map(|_| outcome(error.is_some())),
            last_error: error.map(|error| error.to_string()),
            last_s: last.map(|last| last.took.as_secs_f64()),
            next_at: schedule.next_at(now, usable).to_string(),
            backoff_s: left(schedule.held_until(now.0)),
            walled_s: left(schedule.walled_until(now.0)),
        }
    }

    fn source_statuses(&self) -> Vec<SourceStatus> {
        let status = |source: &super::SourceKind| {
            let report = self.sources.report(*source);
            SourceStatus {
                name: source.as_str(),
                last_outcome: report.as_ref().map(|report| outcome(report.error.is_some())),
                last_s: report.as_ref().map(|report| report.took.as_secs_f64()),
                last_error: report.and_then(|report| report.error),
            }
        };
        self.sources.order().iter().map(status).collect()
    }

    fn verifier_status(&self) -> VerifierStatus {
        let trust = self.verifier.trust();
        VerifierStatus {
            state: trust.as_str(),
            trusted: trust != super::verifier::Trust::Blind,
            clock_offset_s: self.clock.offset(),
        }
    }
}

fn outcome(failed: bool) -> &'static str {
    if failed { "failed" } else { "ok" }
}
