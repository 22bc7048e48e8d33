//! The single flight: who waits for which run, and what comes of a refusal.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use thiserror::Error;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tracing::{debug, info};

use super::adoption::is_store;
use super::backoff::jitter;
use super::coalesce::{Coalesce, Entered};
use super::denied::Denied;
use super::error::RefreshError;
use super::fleet::Fleet;
use super::judge::Judge;
use super::run::{Cause, LastRun, Outcome};
use super::schedule::Schedule;
use super::sources::{Solved, Sources};
use super::stores::Stores;
use super::stubborn::Stubborn;
use super::verifier::{Finding, Opinion, Passage, Verifier};
use super::{
    Endpoint, FailureReason, Objection, RefreshFailure, RefreshSettings, Refusal, Verdict, lock,
};
use crate::metrics::Metrics;
use crate::net::Dialer;
use crate::token::{Candidate, Clock, Cookies, Generation, Published, Token, TokenCache};

/// The least that a client is told to wait.
const LEAST_RETRY: Duration = Duration::from_secs(1);
/// The most that a client is told to wait for a run in flight.
const MOST_EXPECTED: Duration = Duration::from_secs(10);

/// What the refresher shares with the rest of the process.
#[derive(Clone)]
pub struct Parts {
    /// Where tokens are published.
    pub cache: Arc<TokenCache>,
    /// The upstream's clock; the verifier's answers set it.
    pub clock: Arc<Clock>,
    /// How the API and the shop are reached.
    pub dialer: Arc<Dialer>,
    /// Where runs and stores are counted.
    pub metrics: Arc<Metrics>,
}

/// Why no refresher could be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SetupError {
    /// The HTTP client for FlareSolverr cannot be made.
    #[error("cannot make the client for FlareSolverr: {0}")]
    Client(#[from] reqwest::Error),
}

/// Keeps the token fresh.
pub struct Refresher {
    pub(super) cache: Arc<TokenCache>,
    pub(super) clock: Arc<Clock>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) handle: Handle,
    pub(super) verifier: Arc<Verifier>,
    pub(super) sources: Sources,
    pub(super) stores: Stores,
    /// Its lock is never taken under another one of these.
    pub(super) runs: Coalesce<Outcome>,
    /// The last run that ended.
    pub(super) last_run: Mutex<Option<LastRun>>,
    /// Somebody needs the run in flight: its failure starts the back-off.
    pub(super) needed: AtomicBool,
    /// Somebody wants the run in flight, or the next, by hand.
    pub(super) forced: AtomicBool,
    /// The run in flight is to get past the wall, for somebody's sake.
    pub(super) walled: AtomicBool,
    /// Something has changed that the schedule depends on.
    pub(super) woken: Notify,
    /// Solves that came too late for their run; taken by [`Refresher::start`].
    pub(super) late: Mutex<Option<mpsc::UnboundedReceiver<Solved>>>,
    /// The last resort at start.
    pub(super) environment: Option<Token>,
    /// What the last run for the wall's sake has put in force, until a request
    /// has passed with it.
    pub(super) walled_run: Mutex<Option<Generation>>,
    /// This sidecar's part in the fleet.
    pub(super) fleet: Fleet,
    pub(super) denied: Denied,
    judge: Judge,
    stubborn: Stubborn,
    schedule: Mutex<Schedule>,
    refresh_every: Duration,
    /// Names of the token's cookie, the preferred first.
    token_cookies: Vec<String>,
}

impl Refresher {
    /// A refresher whose runs live on `handle`. Does no I/O.
    ///
    /// # Errors
    ///
    /// [`SetupError`] if an HTTP client cannot be made.
    pub fn new(
        settings: RefreshSettings,
        parts: Parts,
        handle: Handle,
    ) -> Result<Arc<Self>, SetupError> {
        let Parts { cache, clock, dialer, metrics } = parts;
        let (late_sender, late) = mpsc::unbounded_channel();
        let counting = || Arc::clone(&metrics);
        let sources =
            Sources::new(&settings, Arc::clone(&dialer), counting(), handle.clone(), late_sender)?;
        let verifier =
            Arc::new(Verifier::new(dialer, Arc::clone(&clock), counting(), settings.verify_url));
        Ok(Arc::new(Self {
            judge: Judge::new(Arc::clone(&verifier), handle.clone()),
            stores: Stores::new(settings.redis, settings.env_file, Arc::clone(&metrics)),
            runs: Coalesce::new(handle.clone()),
            last_run: Mutex::default(),
            needed: AtomicBool::new(false),
            forced: AtomicBool::new(false),
            walled: AtomicBool::new(false),
            woken: Notify::new(),
            late: Mutex::new(Some(late)),
            environment: settings.environment,
            walled_run: Mutex::default(),
            fleet: Fleet::default(),
            denied: Denied::default(),
            stubborn: Stubborn::default(),
            schedule: Mutex::default(),
            refresh_every: settings.refresh_every,
            token_cookies: settings.token_cookies,
            cache,
            clock,
            metrics,
            handle,
            verifier,
            sources,
        }))
    }

    /// What to do about a 401, or the wall's 403, to a request that carried
    /// our token.
    ///
    /// A newer token is there: replay. The token is good and passes: pass the
    /// answer on. It passes with the clearance that it came with: replay with
    /// that. Else a run has to find a newer one, which this waits for. Not
    /// bounded in time; dropping the future abandons the wait, not the run.
    pub async fn refused(self: &Arc<Self>, refusal: Refusal) -> Verdict {
        let refusal = self.brought_up_to_date(refusal);
        if let Some(newer) = self.cache.newer_than(Some(refusal.generation)) {
            return Verdict::Replay(newer);
        }
        if let Some(failure) = self.held_up(refusal.objection) {
            return Verdict::Failed(failure);
        }
        // In a task of its own: a client that hangs up while the token is
        // judged must not keep a dead one from being renewed.
        let this = Arc::clone(self);
        let decided = self.handle.spawn(async move { this.decide(refusal).await }).await;
        decided.unwrap_or_else(|_| {
            let stopped = Arc::new(RefreshError::Stopped);
            Verdict::Failed(self.failure(FailureReason::RefreshFailed, stopped))
        })
    }

    /// A 401 on a token that has since been put in force anew is one on that.
    fn brought_up_to_date(&self, refusal: Refusal) -> Refusal {
        let same = |current: &Arc<Published>| {
            refusal.objection == Objection::Token && current.since <= refusal.generation
        };
        let generation = self.cache.current().filter(same).map(|current| current.generation);
        Refusal { generation: generation.unwrap_or(refusal.generation), ..refusal }
    }

    /// Asks the judge, and where the token is not good, a run.
    async fn decide(self: &Arc<Self>, refusal: Refusal) -> Verdict {
        let older = Some(refusal.generation);
        let refused = self.usable().filter(|usable| Some(usable.generation) == older);
        let cause = match refused {
            None => Cause::Refused,
            Some(refused) => {
                let finding = self.finding(&refusal, &refused).await;
                match self.settle(&refusal, finding, &refused) {
                    Ok(verdict) => return verdict,
                    Err(cause) => cause,
                }
            }
        };
        match self.renew(older, cause).await {
            Ok(newer) => Verdict::Replay(newer),
            Err(failure) => Verdict::Failed(failure),
        }
    }

    /// What follows from the judge's finding, or why a run must follow.
    fn settle(
        &self,
        refusal: &Refusal,
        finding: Finding,
        refused: &Published,
    ) -> Result<Verdict, Cause> {
        match (refusal.objection, finding.opinion, finding.passage) {
            (Objection::Token, Opinion::Good, _) => Ok(Verdict::PassOn),
            (Objection::Token, Opinion::Unknown, _) if self.is_its_own(refusal, refused) => {
                Ok(Verdict::PassOn)
            }
            (Objection::Token, _, _) | (_, Opinion::Bad, _) => Err(Cause::Refused),
            (Objection::Wall, _, Passage::Walled) => self.meet_wall(refused),
            (Objection::Wall, opinion, Passage::Cleared) if !refused.needs_clearance => {
                let verified = opinion == Opinion::Good || refused.is_verified();
                Ok(Verdict::Replay(self.add_clearance(refused, verified)))
            }
            (Objection::Wall, _, _) => Ok(Verdict::PassOn),
        }
    }

    /// Whether the 401 is that endpoint's own, as far as can be told without a
    /// verdict: it refused a new token before, and this one works elsewhere.
    fn is_its_own(&self, refusal: &Refusal, refused: &Published) -> bool {
        refused.is_verified() && self.stubborn.contains(refusal.endpoint, Instant::now())
    }

    /// The wall lets the token in force pass no longer: a run has to follow,
    /// unless the token is the last one's, and no request has passed with it.
    fn meet_wall(&self, refused: &Published) -> Result<Verdict, Cause> {
        if *lock(&self.walled_run) != Some(refused.generation) {
            return Err(Cause::Walled);
        }
        self.schedule().wall_stands(Instant::now());
        self.held_up(Objection::Wall).map(Verdict::Failed).ok_or(Cause::Walled)
    }

    /// A request that had met the wall has passed it with `generation`.
    pub fn passed_wall(&self, generation: Generation) {
        lock(&self.walled_run).take_if(|of_run| *of_run == generation);
    }

    /// A live token: the one in force, or that of a run if there is none or it
    /// has expired. Waits like [`Refresher::refused`].
    ///
    /// # Errors
    ///
    /// [`RefreshFailure`] if the run fails, or none may start yet.
    pub async fn acquire(self: &Arc<Self>) -> Result<Arc<Published>, RefreshFailure> {
        let current = self.cache.current();
        let older = current.as_ref().map(|current| current.generation);
        match current {
            Some(live) if live.token.is_live(self.clock.now()) => Ok(live),
            _ => self.renew(older, Cause::Missing).await,
        }
    }

    /// The replay was refused too: has that judged in the background.
    pub fn refused_again(self: &Arc<Self>, refusal: Refusal) {
        if refusal.objection == Objection::Token {
            self.stubborn.add(refusal.endpoint, Instant::now());
        }
        self.report(refusal);
    }

    /// A refusal that nobody waits for: has it judged in the background.
    pub fn report(self: &Arc<Self>, refusal: Refusal) {
        let this = Arc::clone(self);
        self.handle.spawn(async move { this.refused(refusal).await });
    }

    /// A real answer, a success, came from `endpoint` for `generation`: its
    /// token counts as verified from now on, and is saved. Costs little if it
    /// did.
    pub fn confirm(&self, generation: Generation, endpoint: Endpoint) {
        self.stubborn.remove(endpoint);
        self.prove(generation);
    }

    /// The token of `generation` counts as verified from now on.
    pub(super) fn prove(&self, generation: Generation) {
        if self.cache.confirm(generation) {
            debug!(generation = generation.0, "token confirmed");
            self.schedule().proven();
        }
    }

    /// A run by hand: joins one in flight, ends the back-off otherwise.
    ///
    /// # Errors
    ///
    /// [`RefreshFailure`] with the run's error.
    pub async fn refresh_now(self: &Arc<Self>) -> Result<Arc<Published>, RefreshFailure> {
        self.schedule().by_hand();
        self.renew(self.generation(), Cause::ByHand).await
    }

    /// To be called last: gives back the lease, ends a solve that is under way
    /// and waits, for at most 4 s, until it has left nothing open at the solver.
    pub async fn close(&self) {
        self.leave_fleet().await;
        self.sources.close().await;
    }

    /// The time until the next run may start, at least 1 s.
    pub fn retry_after(&self) -> Duration {
        let now = Instant::now();
        let until = self.schedule().held_until(now);
        until.map_or(LEAST_RETRY, |until| (until - now).max(LEAST_RETRY))
    }

    /// The time that the run in flight may still take: as long again as it
    /// has lasted, from 1 s to 10 s; without one the least.
    ///
    /// A client with a fixed number of tries gets so much further with each
    /// as the run proves slow.
    pub fn expected_wait(&self) -> Duration {
        let lasted = self.runs.running_for().unwrap_or_default();
        lasted.clamp(LEAST_RETRY, MOST_EXPECTED)
    }

    /// A token newer than `older`: one that is there, or that of the run in
    /// flight, or that of a new run.
    pub(super) async fn renew(
        self: &Arc<Self>,
        older: Option<Generation>,
        cause: Cause,
    ) -> Result<Arc<Published>, RefreshFailure> {
        loop {
            let entered = self
                .runs
                .enter(|running| self.look(older, cause, running), || Arc::clone(self).run(cause));
            let outcome = match entered {
                Entered::Settled(settled) => return settled,
                Entered::Joined(flight) | Entered::Started(flight) => flight.outcome().await,
            };
            match outcome.unwrap_or_else(|| Err(Arc::new(RefreshError::Stopped))) {
                // Published just before the refused request was sent with it.
                Ok(published) if Some(published.generation) <= older => {}
                Ok(published) => return Ok(published),
                Err(error) => {
                    let failure = self.failure(FailureReason::RefreshFailed, error);
                    let pause = self.held_up(objection_of(cause));
                    let longest = pause.map_or(failure.retry_after, |pause| pause.retry_after);
                    return Err(RefreshFailure { retry_after: longest, ..failure });
                }
            }
        }
    }

    /// Under the lock of the runs: a run publishes before it ends and fails
    /// before it ends, so what it did shows here or it is still in flight.
    fn look(
        self: &Arc<Self>,
        older: Option<Generation>,
        cause: Cause,
        running: bool,
    ) -> Option<Result<Arc<Published>, RefreshFailure>> {
        if let Some(newer) = self.cache.newer_than(older) {
            return Some(Ok(newer));
        }
        self.needed.fetch_or(cause.is_need(), Ordering::Relaxed);
        self.forced.fetch_or(cause == Cause::ByHand, Ordering::Relaxed);
        self.walled.fetch_or(cause == Cause::Walled, Ordering::Relaxed);
        if running {
            return None;
        }
        if cause == Cause::Refused {
            self.count_disappointment();
        }
        self.held_up(objection_of(cause)).or_else(|| self.held_up(Objection::Token)).map(Err)
    }

    /// Where the verifier cannot tell, a source may give one useless token
    /// after the other: that must not start one run after the other.
    ///
    /// A token that another sidecar could not verify counts like an own one; one
    /// that a store brought is an operator's, or was believed once.
    fn count_disappointment(self: &Arc<Self>) {
        let Some(current) = self.cache.current() else {
            return;
        };
        let from_sources = !is_store(current.source) || self.fleet.is_unproven(current.generation);
        if current.is_verified() || !from_sources {
            return;
        }
        let counted = self.schedule().disappointed(Instant::now(), current.generation, jitter());
        if counted {
            let error = Arc::new(RefreshError::RefusedAgain);
            self.share_disappointment(&current.token, &error);
            lock(&self.last_run).get_or_insert_default().fail(error);
        }
    }

    async fn finding(&self, refusal: &Refusal, refused: &Arc<Published>) -> Finding {
        let finding = self.judge.judge(refusal, refused).await;
        if finding.opinion == Opinion::Bad {
            self.deny(&refused.token);
        }
        finding
    }

    /// Remembers that the API refuses `token`.
    pub(super) fn deny(&self, token: &Token) {
        if self.denied.add(token) {
            info!(token = %token.fingerprint(), "token refused by the API");
            self.woken.notify_one();
            self.deny_in_redis(token);
        }
    }

    /// Tells the other sidecars that the API refuses `token`, beside all else.
    pub(super) fn deny_in_redis(&self, token: &Token) {
        if let Some(denying) = self.stores.deny(token) {
            self.handle.spawn(denying);
        }
    }

    /// Whether the API has refused `token` before, here or elsewhere.
    pub(super) fn is_denied(&self, token: &Token) -> bool {
        self.denied.contains_anywhere(token)
    }

    /// Whether `token` has neither expired nor been refused anywhere, and is no
    /// logged-in visitor's, which must not become everybody's.
    pub(super) fn is_usable(&self, token: &Token) -> bool {
        token.is_live(self.clock.now()) && !token.is_personal() && !self.is_denied(token)
    }

    /// The token in force, if it has neither expired nor been refused here.
    pub fn usable(&self) -> Option<Arc<Published>> {
        let is_live = |current: &Arc<Published>| current.token.is_live(self.clock.now());
        let current = self.cache.current().filter(is_live);
        current.filter(|current| !self.denied.contains(&current.token))
    }

    /// The generation in force.
    pub(super) fn generation(&self) -> Option<Generation> {
        self.cache.load().as_ref().map(|current| current.generation)
    }

    /// Puts a token in force and plans its renewal.
    pub(super) fn publish(&self, candidate: Candidate) -> Arc<Published> {
        let cookies = self.in_step(candidate.clearance.cookies(), &candidate.token);
        let clearance = candidate.clearance.with_cookies(cookies);
        let needed = candidate.needs_clearance;
        let published = self.put_in_force(candidate.with_clearance(Arc::new(clearance), needed));
        let now = self.clock.now();
        let expires_at = published.token.expires_at();
        let life = expires_at.map(|at| Duration::from_secs(at.0.saturating_sub(now.0)));
        let moment = (Instant::now(), now);
        self.schedule().published(moment, life, self.refresh_every, jitter());
        self.woken.notify_one();
        published
    }

    /// Has the token in force go with its clearance from now on. Its renewal
    /// stays where it was planned.
    pub(super) fn add_clearance(&self, current: &Published, verified: bool) -> Arc<Published> {
        // Nothing is awaited here, and publications are made on one thread.
        if let Some(newer) = self.cache.newer_than(Some(current.generation)) {
            return newer;
        }
        let clearance = Arc::clone(&current.clearance);
        let candidate = current.candidate().verified(verified).with_clearance(clearance, true);
        let published = self.put_in_force(candidate);
        info!(generation = published.generation.0, "token passes with clearance only");
        published
    }

    fn put_in_force(&self, candidate: Candidate) -> Arc<Published> {
        let published = self.cache.publish(candidate, self.clock.now());
        let expires_at = published.token.expires_at().map(|at| at.0);
        self.metrics.token(published.generation.0, expires_at);
        published
    }

    /// The cookies with every form of the token's own set to `token`.
    fn in_step(&self, cookies: &Cookies, token: &Token) -> Cookies {
        let present = self.token_cookies.iter().filter(|name| cookies.get(name).is_some());
        let names = self.token_cookies.iter().take(1).chain(present);
        names.fold(cookies.clone(), |cookies, name| cookies.with_token(name, token))
    }

    pub(super) fn schedule(&self) -> MutexGuard<'_, Schedule> {
        lock(&self.schedule)
    }

    /// The back-off that keeps a run for such a refusal from starting, if it is
    /// on: the one after a failed run, or the pause before the wall. The wall
    /// is looked at even while the former is on: it may take no run to pass it.
    fn held_up(&self, objection: Objection) -> Option<RefreshFailure> {
        let now = Instant::now();
        let (until, error) = match objection {
            Objection::Token => {
                let until = self.schedule().held_until(now)?;
                let error = lock(&self.last_run).as_ref().and_then(LastRun::error);
                (until, error.unwrap_or_else(|| Arc::new(RefreshError::RefusedAgain)))
            }
            Objection::Wall => (self.schedule().walled_until(now)?, Arc::new(RefreshError::Walled)),
        };
        let retry_after = (until - now).max(LEAST_RETRY);
        Some(RefreshFailure { reason: FailureReason::Backoff, retry_after, error })
    }

    fn failure(&self, reason: FailureReason, error: Arc<RefreshError>) -> RefreshFailure {
        RefreshFailure { reason, retry_after: self.retry_after(), error }
    }
}

/// What a run for this cause is to get past.
fn objection_of(cause: Cause) -> Objection {
    if cause == Cause::Walled { Objection::Wall } else { Objection::Token }
}
