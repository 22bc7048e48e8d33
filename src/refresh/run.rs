//! One run: from the wish for a token to its publication.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;
use tracing::{info, warn};

use super::adoption::is_store;
use super::backoff::jitter;
use super::error::{RefreshError, SourceError, readable};
use super::refresher::Refresher;
use super::schedule::Failed;
use super::solution::Found;
use super::sources::Solved;
use super::verifier::Opinion;
use super::{SourceKind, lock};
use crate::token::{Generation, Published, Source};

/// What the waiters of a run share.
pub(super) type Outcome = Result<Arc<Published>, Arc<RefreshError>>;

/// Why a run is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The process has started: the stores come first.
    Start,
    /// The API refused the token in force.
    Refused,
    /// There is no token, or its time is over.
    Missing,
    /// The schedule says so.
    Due,
    /// A person says so.
    ByHand,
}

impl Cause {
    /// Whether requests wait for the run.
    pub(super) fn is_need(self) -> bool {
        matches!(self, Self::Refused | Self::Missing)
    }
}

/// How the last run ended.
#[derive(Clone, Debug, Default)]
pub(super) struct LastRun {
    error: Option<Arc<RefreshError>>,
    pub(super) took: Duration,
}

impl LastRun {
    /// What it failed with, if it did.
    pub(super) fn error(&self) -> Option<Arc<RefreshError>> {
        self.error.clone()
    }

    /// Its token proved useless afterwards.
    pub(super) fn fail(&mut self, error: Arc<RefreshError>) {
        self.error = Some(error);
    }
}

impl Refresher {
    /// A run, to be spawned. Called under the lock of the runs.
    pub(super) fn run(
        self: Arc<Self>,
        cause: Cause,
    ) -> impl Future<Output = Outcome> + Send + 'static {
        self.needed.store(cause.is_need(), Ordering::Relaxed);
        async move {
            let started = Instant::now();
            // A panic is a failure like any other: it must start the back-off.
            let work = AssertUnwindSafe(self.obtain(cause)).catch_unwind().await;
            let outcome = work.unwrap_or(Err(RefreshError::Panicked)).map_err(Arc::new);
            self.conclude(cause, &outcome, started.elapsed());
            outcome
        }
    }

    async fn obtain(&self, cause: Cause) -> Result<Arc<Published>, RefreshError> {
        let before = self.generation();
        if cause == Cause::Start
            && let Some(loaded) = self.load_stores().await
        {
            return Ok(loaded);
        }
        tokio::select! {
            biased;
            // The stores may be faster than a source that hangs.
            newer = self.newer_than(before) => Ok(newer),
            obtained = self.obtain_new(cause) => obtained,
        }
    }

    async fn obtain_new(&self, cause: Cause) -> Result<Arc<Published>, RefreshError> {
        let started = Instant::now();
        // At start it has just been read.
        if cause != Cause::Start
            && let Some(adopted) = self.look_into_redis(cause == Cause::Refused).await
        {
            self.metrics.refresh_finished(Source::Redis.as_str(), "ok", started.elapsed());
            return Ok(adopted);
        }
        let race = self.sources.race(|source, offer| self.check(source, offer));
        let (source, found, verified) = race.await.map_err(RefreshError::Sources)?;
        let (token, source) = (found.token.clone(), Source::from(source));
        Ok(self.publish(token, &found.cookies, source, verified))
    }

    /// Lets pass what may be published, and says whether it is verified.
    async fn check(
        &self,
        source: SourceKind,
        offer: Solved,
    ) -> Result<(SourceKind, Arc<Found>, bool), SourceError> {
        let found = offer?;
        if self.is_denied(&found.token) {
            return Err(SourceError::KnownRefused);
        }
        if !found.token.is_live(self.clock.now()) {
            return Err(SourceError::Expired);
        }
        match self.verifier.examine(&found.token).await {
            Opinion::Good => Ok((source, found, true)),
            Opinion::Unknown => Ok((source, found, false)),
            Opinion::Bad => {
                self.deny(&found.token);
                Err(SourceError::Rejected)
            }
        }
    }

    /// Another sidecar, or an operator, may have put a token there.
    /// While Redis is down that is left to the polling: it must not cost time.
    async fn look_into_redis(&self, in_doubt: bool) -> Option<Arc<Published>> {
        if self.stores.redis_error().is_some() {
            return None;
        }
        let stored = self.stores.load_redis().await.ok()?;
        self.consider(stored, in_doubt).await
    }

    /// Waits until something newer than `older` is in force.
    async fn newer_than(&self, older: Option<Generation>) -> Arc<Published> {
        let mut changes = self.cache.changes();
        loop {
            if let Some(newer) = self.cache.newer_than(older) {
                return newer;
            }
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Draws the consequences, before anyone wakes.
    fn conclude(&self, cause: Cause, outcome: &Outcome, took: Duration) {
        let error = outcome.as_ref().err().cloned();
        *lock(&self.last_run) = Some(LastRun { error, took });
        match outcome {
            Ok(published) => self.succeeded(cause, published, took),
            Err(error) => self.failed(error, took),
        }
        self.woken.notify_one();
    }

    fn succeeded(&self, cause: Cause, published: &Published, took: Duration) {
        if published.is_verified() {
            self.schedule().proven();
        }
        let (generation, source) = (published.generation.0, published.source.as_str());
        let (token, verified) = (published.token.fingerprint(), published.is_verified());
        let expires_at = published.token.expires_at().map(tracing::field::display);
        if cause == Cause::Start && is_store(published.source) {
            info!(generation, source, %token, expires_at, verified, "token loaded");
        } else {
            let took = readable(took);
            info!(generation, source, %token, expires_at, verified, %took, "token refreshed");
        }
    }

    fn failed(&self, error: &RefreshError, took: Duration) {
        let needed = self.needed.load(Ordering::Relaxed) || self.usable().is_none();
        let solver_away = error.is_unreachable(SourceKind::FlareSolverr);
        let now = Instant::now();
        self.schedule().failed(now, Failed { needed, solver_away }, jitter());
        let held_until = self.schedule().held_until(now);
        let next_try = held_until.unwrap_or_else(|| self.due(now)) - now;
        warn!(%error, took = %readable(took), next_try = %readable(next_try), "refresh failed");
    }
}
