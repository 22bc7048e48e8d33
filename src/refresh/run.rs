//! One run: from the wish for a token to its publication.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::adoption::is_store;
use super::backoff::jitter;
use super::error::{RefreshError, SourceError, SourceFailure, readable};
use super::refresher::Refresher;
use super::schedule::Failed;
use super::solution::Found;
use super::sources::Solved;
use super::verifier::{Finding, Opinion, Passage};
use super::{SourceKind, lock};
use crate::token::{Candidate, Clearance, Generation, Published};

/// What the waiters of a run share.
pub(super) type Outcome = Result<Arc<Published>, Arc<RefreshError>>;

/// Why a run is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The process has started: the stores come first.
    Start,
    /// The API refused the token in force.
    Refused,
    /// The wall lets the token in force pass no longer.
    Walled,
    /// There is no token, or its time is over.
    Missing,
    /// The schedule says so.
    Due,
    /// A person says so.
    ByHand,
}

impl Cause {
    /// Whether requests wait for the run that cannot be served without it.
    pub(super) fn is_need(self) -> bool {
        matches!(self, Self::Refused | Self::Missing)
    }

    /// Whether the token in force is of no use, although it has not expired.
    pub(super) fn is_doubt(self) -> bool {
        matches!(self, Self::Refused | Self::Walled)
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
        self.forced.store(cause == Cause::ByHand, Ordering::Relaxed);
        self.walled.store(cause == Cause::Walled, Ordering::Relaxed);
        async move {
            let started = Instant::now();
            // A panic is a failure like any other: it must start the back-off.
            let work = AssertUnwindSafe(self.obtain(cause)).catch_unwind().await;
            let outcome = work.unwrap_or(Err(RefreshError::Panicked)).map_err(Arc::new);
            self.conclude(cause, &outcome, started.elapsed());
            self.leave_turn(&outcome);
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
        if self.stores.has_redis() {
            return self.take_turn(cause).await;
        }
        let solution = self.solve(cause).await?;
        Ok(self.put_out(solution))
    }

    /// Asks the sources for a token that may be published.
    pub(super) async fn solve(&self, cause: Cause) -> Result<Solution, RefreshError> {
        let walled = Mutex::new(None);
        let race = self.sources.race(|source, offer| self.check(source, offer, &walled));
        match race.await {
            Ok(candidate) => {
                if cause == Cause::ByHand {
                    // Whether it passes the wall the next request will show.
                    self.schedule().wall_passed();
                }
                Ok(Solution { candidate, walled: false })
            }
            Err(failures) => self.resort_to(lock(&walled).take(), failures),
        }
    }

    /// The last resort: a token that meets the wall, where it is better than
    /// the one in force, if only because it is younger.
    fn resort_to(
        &self,
        walled: Option<Candidate>,
        failures: Vec<SourceFailure>,
    ) -> Result<Solution, RefreshError> {
        let wanted = self.needed.load(Ordering::Relaxed)
            || self.walled.load(Ordering::Relaxed)
            || self.usable().is_none();
        match walled {
            Some(candidate) if wanted => {
                warn!("the new token meets the anti-bot wall, with its cookies too");
                Ok(Solution { candidate, walled: true })
            }
            _ => Err(RefreshError::Sources(failures)),
        }
    }

    /// Publishes what the sources gave.
    pub(super) fn put_out(&self, solution: Solution) -> Arc<Published> {
        let published = self.publish(solution.candidate);
        if solution.walled {
            self.schedule().wall_stands(Instant::now());
        }
        published
    }

    /// Lets pass what may be published. What meets the wall is put aside.
    async fn check(
        &self,
        source: SourceKind,
        offer: Solved,
        walled: &Mutex<Option<Candidate>>,
    ) -> Result<Candidate, SourceError> {
        let found = offer?;
        if self.is_denied(&found.token) {
            return Err(SourceError::KnownRefused);
        }
        if !found.token.is_live(self.clock.now()) {
            return Err(SourceError::Expired);
        }
        let candidate = candidate(&found, source);
        let finding = self.examine(&candidate).await;
        match finding {
            Finding { opinion: Opinion::Bad, .. } => Err(SourceError::Rejected),
            Finding { passage: Passage::Walled, .. } => {
                // Some endpoints may let it pass with its clearance all the same.
                let clearance = Arc::clone(&candidate.clearance);
                let needed = !clearance.is_empty();
                lock(walled).get_or_insert(candidate.with_clearance(clearance, needed));
                Err(SourceError::Walled)
            }
            finding => Ok(finding.of(candidate)),
        }
    }

    /// Has a token judged from here that may be put in force, and draws what
    /// follows for others: a bad one is denied, a good one has passed the wall.
    pub(super) async fn examine(&self, candidate: &Candidate) -> Finding {
        let finding = self.verifier.examine(&candidate.token, &candidate.clearance).await;
        match finding.opinion {
            Opinion::Bad => self.deny(&candidate.token),
            Opinion::Good => self.schedule().wall_passed(),
            Opinion::Unknown => {}
        }
        finding
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
        let error = outcome.as_ref().err().map(|error| match &**error {
            RefreshError::Still(first, _) => Arc::clone(first),
            _ => Arc::clone(error),
        });
        *lock(&self.last_run) = Some(LastRun { error, took });
        match outcome {
            Ok(published) => {
                let for_wall = self.walled.load(Ordering::Relaxed);
                *lock(&self.walled_run) = for_wall.then_some(published.generation);
                self.succeeded(cause, published, took);
            }
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

    /// A failure of others has its own end, but for some jitter: the fleet must
    /// not come back as one.
    fn count_failure(&self, error: &RefreshError, needed: bool, now: Instant) {
        match error {
            RefreshError::Elsewhere(backoff) | RefreshError::Still(_, backoff) => {
                let until = now + backoff.left + backoff.left.mul_f64(fastrand::f64() * 0.1);
                let needed = needed && !backoff.routine;
                self.schedule().failed_elsewhere(until, needed, backoff.failures);
            }
            RefreshError::Alone(left) => {
                self.fleet.pause_alone();
                self.schedule().failed_elsewhere(now + *left, needed, 0);
            }
            _ => {
                let solver_away = error.is_unreachable(SourceKind::FlareSolverr);
                self.schedule().failed(now, Failed { needed, solver_away }, jitter());
            }
        }
    }

    fn failed(&self, error: &RefreshError, took: Duration) {
        if self.walled.load(Ordering::Relaxed) || error.meets_wall() {
            self.schedule().wall_stands(Instant::now());
        }
        let needed = self.needed.load(Ordering::Relaxed) || self.usable().is_none();
        let now = Instant::now();
        self.count_failure(error, needed, now);
        let held_until = self.schedule().held_until(now);
        let next_try = held_until.unwrap_or_else(|| self.due(now)) - now;
        if matches!(error, RefreshError::Still(..)) {
            debug!(next_try = %readable(next_try), "fleet still held back");
            return;
        }
        warn!(%error, took = %readable(took), next_try = %readable(next_try), "refresh failed");
    }
}

/// What the sources gave.
pub(super) struct Solution {
    pub(super) candidate: Candidate,
    /// It meets the anti-bot wall.
    walled: bool,
}

/// What a source gave, as it goes to the verifier.
pub(super) fn candidate(found: &Found, source: SourceKind) -> Candidate {
    let clearance = Clearance::new(found.cookies.clone(), found.user_agent.as_deref());
    Candidate::new(found.token.clone(), source.into()).with_clearance(Arc::new(clearance), false)
}
