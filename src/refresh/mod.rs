//! How a token is renewed.
//!
//! A [`Refresher`] turns any number of "the API refused my token" into one
//! run that asks the sources, has the verifier check what they give,
//! publishes the new token and gives every waiter the same outcome. Around
//! that it keeps the schedule, the stores in step, and the back-off.
//!
//! # Invariants
//!
//! - At most one run is in flight in this process, and at most one solve.
//! - A run belongs to no request: a client that hangs up does not cancel it.
//! - The cache is published before waiters wake.
//! - A token that the verifier calls bad is never published.
//! - Stores are written beside the runs: neither waits for the other.

mod adoption;
mod backoff;
mod browser;
mod coalesce;
mod denied;
mod direct;
mod error;
mod flaresolverr;
mod fleet;
mod health;
mod in_step;
mod judge;
mod probe;
mod refresher;
mod run;
mod schedule;
mod session;
pub(crate) mod solution;
mod sources;
mod status;
mod stores;
mod stubborn;
mod tasks;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod verifier;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::Method;
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use url::Url;

pub use error::{RefreshError, SourceError, SourceFailure};
pub use probe::{Judgement, Rehearsal};
pub use refresher::{Parts, Refresher, SetupError};
pub use status::{
    EnvFileStatus, RedisStatus, RefreshStatus, RunStatus, SourceStatus, VerifierStatus,
};

pub use verifier::Unanswered;

use crate::config::{ParentProxy, SourceKind};
use crate::token::{EnvFile, Generation, Published, RedisStore, Source, Token};

/// What the refresher has to know.
pub struct RefreshSettings {
    /// The shop's page, whose cookie holds the token (`SHOP_URL`).
    pub shop_url: Url,
    /// Where the verifier asks (`VERIFY_URL`).
    pub verify_url: Url,
    /// The API's URLs with their prefix, for the direct source (`API_ORIGINS`).
    pub api_origins: Vec<Url>,
    /// Names of the token's cookie, the preferred first (`TOKEN_COOKIE`).
    pub token_cookies: Vec<String>,
    /// The sources in order (`TOKEN_SOURCES`); `FlareSolverr` counts only with a URL.
    pub sources: Vec<SourceKind>,
    /// `FLARESOLVERR_URL`, with `/v1` or without.
    pub flaresolverr_url: Option<Url>,
    /// TLS for a FlareSolverr behind https.
    pub solver_tls: rustls::ClientConfig,
    /// The parent proxy that FlareSolverr's browser uses: clearance is bound
    /// to the address that it was got from.
    pub solver_proxy: Option<ParentProxy>,
    /// When a slow source gets the next one beside it (`SOURCE_PATIENCE`).
    pub source_patience: Duration,
    /// FlareSolverr's `maxTimeout` (`SOLVE_TIMEOUT`).
    pub solve_timeout: Duration,
    /// The longest time from one renewal to the next (`REFRESH_EVERY`).
    pub refresh_every: Duration,
    /// The keys in Redis, if it is set.
    pub redis: Option<RedisStore>,
    /// The line in `ENV_FILE`.
    pub env_file: Option<EnvFile>,
    /// `CHITAI_GOROD_BEARER_TOKEN` of the environment: the last resort at start.
    pub environment: Option<Token>,
}

impl From<SourceKind> for Source {
    fn from(kind: SourceKind) -> Self {
        match kind {
            SourceKind::FlareSolverr => Self::FlareSolverr,
            SourceKind::Direct => Self::Direct,
        }
    }
}

/// What a refusal seems to be about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objection {
    /// A 401: the token.
    Token,
    /// A 403 in HTML, where the API speaks JSON: the anti-bot wall.
    Wall,
}

/// A 401, or the wall's 403, to a request that carried our token.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    /// Which of the two.
    pub objection: Objection,
    /// The token that the request carried.
    pub generation: Generation,
    /// When the request was sent.
    pub sent_at: Instant,
    /// What it asked for.
    pub endpoint: Endpoint,
}

/// A method and a path, of a fixed size whatever the path's.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Endpoint([u8; 16]);

impl Endpoint {
    /// `path` without the query.
    #[must_use]
    pub fn new(method: &Method, path: &str) -> Self {
        let digest =
            Sha256::new().chain_update(method.as_str()).chain_update(" ").chain_update(path);
        let digest: [u8; 32] = digest.finalize().into();
        let mut short = [0; 16];
        short.copy_from_slice(&digest[..16]);
        Self(short)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({:032x})", u128::from_be_bytes(self.0))
    }
}

/// What to do about a refusal.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// A newer token is there: send the request once more.
    Replay(Arc<Published>),
    /// The token is good, and passes: the refusal is that endpoint's own.
    PassOn,
    /// There is no newer token, and for now none to wait for.
    Failed(RefreshFailure),
}

/// Why there is no newer token.
#[derive(Clone, Debug)]
pub struct RefreshFailure {
    /// In one word.
    pub reason: FailureReason,
    /// The time until the next run may start, at least 1 s.
    pub retry_after: Duration,
    /// What the run, or the last one, failed with.
    pub error: Arc<RefreshError>,
}

/// Why there is no newer token, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureReason {
    /// The run failed.
    RefreshFailed,
    /// It failed a while ago, and the next one may not start yet.
    Backoff,
}

impl FailureReason {
    /// The word in `Proxy-Status`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RefreshFailed => "refresh_failed",
            Self::Backoff => "backoff",
        }
    }
}

/// A panic elsewhere is no reason to panic here too: what the locks of this
/// module guard is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
