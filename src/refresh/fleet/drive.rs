//! A run of a sidecar that shares Redis with others: does what its turn says.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fastrand::Rng;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, info};

use super::super::error::{RefreshError, readable};
use super::super::lock;
use super::super::refresher::Refresher;
use super::super::run::{Cause, LastRun, Outcome, Solution};
use super::super::schedule::Pause;
use super::super::{SourceKind, stores::NoAnswer};
use super::turn::{Action, End, Event, Past, Situation, Turn};
use super::{Fleet, Part};
use crate::token::{
    Entrance, Lack, Lease, Owner, Published, Request, SharedBackoff, Source, Standing, Token,
    ValueId, Wish,
};

/// What Redis may cost at the end of the process.
const LEAVE: Duration = Duration::from_secs(1);

/// A wait for another sidecar that is worth a word.
const LONG_WAIT: Duration = Duration::from_secs(5);

/// How much of the own pause the others are told. They add up to a tenth, so that
/// any of the fleet may be the first to try again, and not the one that cannot.
const SHARED_PART: f64 = 0.95;

/// What a turn has brought so far.
struct Gains<'a> {
    asked: Asked<'a>,
    /// Kept from one look to the next, so that no notice in between is lost.
    notices: Option<watch::Receiver<u64>>,
    entrance: Option<Entrance>,
    adopted: Option<Arc<Published>>,
    solution: Option<Solution>,
    error: Option<RefreshError>,
    /// Since when it waits for another sidecar.
    waits_since: Option<Instant>,
    wait_is_told: bool,
}

/// The lease was asked for. Where the answer is lost, with the turn or without,
/// the fleet remembers by whom.
struct Asked<'a> {
    fleet: &'a Fleet,
    owner: Owner,
    unanswered: bool,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.tell();
    }
}

impl<'a> Asked<'a> {
    /// By whoever asked last, if that is still unanswered.
    fn of(fleet: &'a Fleet) -> Self {
        let doubtful = fleet.take_doubtful();
        let unanswered = doubtful.is_some();
        Self { fleet, owner: doubtful.unwrap_or_else(Owner::random), unanswered }
    }

    /// Nothing more is asked for.
    fn tell(&mut self) {
        if std::mem::take(&mut self.unanswered) {
            self.fleet.doubt(self.owner.clone());
        }
    }
}

impl Cause {
    pub(super) fn wish(self, usable: bool) -> Wish {
        match self {
            Self::ByHand => Wish::Force,
            // A run for the wall's sake may well be in vain.
            Self::Walled => Wish::Routine,
            Self::Due | Self::Start if usable => Wish::Routine,
            Self::Due | Self::Start | Self::Refused | Self::Missing => Wish::Needed,
        }
    }
}

impl Refresher {
    /// Gets a token as one of a fleet: adopts what another sidecar has got, or
    /// solves while the others wait.
    pub(in crate::refresh) async fn take_turn(
        &self,
        cause: Cause,
    ) -> Result<Arc<Published>, RefreshError> {
        let before = *lock(&self.fleet.past);
        let asked = Asked::of(&self.fleet);
        let mut turn = self.new_turn(cause, asked.owner.clone(), before);
        let mut gains = Gains {
            asked,
            notices: self.stores.notices(),
            entrance: None,
            adopted: None,
            solution: None,
            error: None,
            waits_since: None,
            wait_is_told: false,
        };
        let mut action = turn.begin(Instant::now());
        loop {
            let event = match action {
                Action::Enter(request) => self.ask_in(&request, &mut gains).await,
                Action::Consider => self.consider_found(cause, &mut gains).await,
                Action::Solve => self.solve_in_turn(cause, &mut turn, &mut gains).await,
                Action::HandOn(lease, lack) => self.hand_on(&lease, lack).await,
                Action::Wait(until) => self.wait_in_turn(until, &mut gains).await,
                Action::End(end) => {
                    lock(&self.fleet.past).take_over(before, turn.past());
                    return self.end_turn(end, gains);
                }
            };
            turn.raise(self.wish(cause));
            action = turn.step(Instant::now(), event);
            *lock(&self.fleet.lease) = turn.lease().cloned();
        }
    }

    /// How much the token is wanted by now: whoever joins a run may want it more.
    fn wish(&self, cause: Cause) -> Wish {
        if self.forced.load(Ordering::Relaxed) {
            Wish::Force
        } else if self.needed.load(Ordering::Relaxed) {
            Wish::Needed
        } else {
            cause.wish(self.usable().is_some())
        }
    }

    fn new_turn(&self, cause: Cause, owner: Owner, past: Past) -> Turn {
        let wish = self.wish(cause);
        let known = self.cache.current().map(|current| ValueId::of_token(&current.token));
        Turn::new(wish, owner, known, past, Rng::new(), Instant::now())
    }

    async fn ask_in(&self, request: &Request, gains: &mut Gains<'_>) -> Event {
        if let Some(notices) = &mut gains.notices {
            notices.mark_unchanged();
        }
        let wants_it = request.wish != Wish::None;
        gains.asked.unanswered |= wants_it;
        let entrance = self.enter(request).await.ok();
        // An answer to a mere look says nothing of an earlier question.
        gains.asked.unanswered &= entrance.is_none() || !wants_it;
        if let Some(entrance) = &entrance {
            debug!(turn = ?entrance.turn, wish = ?request.wish, "fleet asked");
        }
        let situation = entrance.as_ref().map(Situation::of);
        gains.entrance = entrance;
        match situation {
            None if self.stores.is_redis_late() => Event::Late,
            situation => Event::Entered(situation),
        }
    }

    async fn consider_found(&self, cause: Cause, gains: &mut Gains<'_>) -> Event {
        let started = Instant::now();
        if let Some(entrance) = &gains.entrance {
            gains.adopted = self.consider_all(entrance, cause.is_doubt()).await;
        }
        if gains.adopted.is_some() {
            self.metrics.refresh_finished(Source::Redis.as_str(), "ok", started.elapsed());
        }
        Event::Considered { adopted: gains.adopted.is_some() }
    }

    async fn solve_in_turn(&self, cause: Cause, turn: &mut Turn, gains: &mut Gains<'_>) -> Event {
        self.fleet.set_part(Some(Part::Solving));
        gains.asked.tell(); // Without an answer it goes alone.
        let solve = self.solve(cause);
        tokio::pin!(solve);
        let solved = loop {
            let renewal = self.renew_when_due(turn);
            tokio::select! {
                biased;
                solved = &mut solve => break solved,
                (sent_at, answer) = renewal => {
                    turn.renewed(sent_at, answer);
                    *lock(&self.fleet.lease) = turn.lease().cloned();
                }
            }
        };
        match solved {
            Ok(solution) => {
                gains.solution = Some(solution);
                Event::Solved
            }
            Err(error) => {
                let lack = self.lack(&error);
                gains.error = Some(error);
                Event::SolveFailed { lack }
            }
        }
    }

    /// What another sidecar may have that this one lacks.
    pub(in crate::refresh) fn lack(&self, error: &RefreshError) -> Option<Lack> {
        if !self.sources.order().contains(&SourceKind::FlareSolverr) {
            return Some(Lack::None);
        }
        error.is_down(SourceKind::FlareSolverr).then_some(Lack::Away)
    }

    /// Renews the lease at its time; never ready without one.
    async fn renew_when_due(&self, turn: &Turn) -> (Instant, Option<bool>) {
        let (Some(due), Some(lease)) = (turn.renew_at(), turn.lease()) else {
            return std::future::pending().await;
        };
        sleep_until(due).await;
        let sent_at = Instant::now();
        (sent_at, self.stores.renew(&lease.owner).await.ok())
    }

    async fn hand_on(&self, lease: &Lease, lack: Lack) -> Event {
        let handed = self.stores.hand_on(lease, lack).await.ok();
        debug!(epoch = lease.epoch, handed = handed == Some(true), "lease handed on");
        Event::HandedOn(handed)
    }

    async fn wait_in_turn(&self, until: Instant, gains: &mut Gains<'_>) -> Event {
        self.fleet.set_part(Some(Part::Waiting));
        self.fleet.waits.store(true, Ordering::Relaxed);
        let noticed = async {
            match &mut gains.notices {
                Some(notices) => drop(notices.changed().await),
                None => std::future::pending().await,
            }
        };
        let event = tokio::select! {
            () = noticed => Event::Notice,
            () = sleep_until(until) => Event::Timer,
        };
        self.fleet.waits.store(false, Ordering::Relaxed);
        tell_long_wait(gains);
        event
    }

    fn end_turn(&self, end: End, gains: Gains<'_>) -> Result<Arc<Published>, RefreshError> {
        match (end, gains) {
            (End::Adopted, Gains { adopted: Some(adopted), .. }) => Ok(adopted),
            (End::Publish(lease), Gains { solution: Some(solution), .. }) => {
                *lock(&self.fleet.lease) = lease;
                self.fleet.owe(&solution.candidate.token);
                Ok(self.put_out(solution))
            }
            (End::Elsewhere(backoff), _) => Err(self.held_back(backoff)),
            (End::TooSoon(left), _) => Err(RefreshError::Alone(left)),
            (_, Gains { error: Some(error), .. }) => Err(error),
            _ => Err(RefreshError::Stopped),
        }
    }

    /// The error of a run that has found a back-off: the own one, if the failure
    /// is this sidecar's or was told here before.
    fn held_back(&self, backoff: SharedBackoff) -> RefreshError {
        let is_news = self.fleet.tell(&backoff);
        let last = lock(&self.last_run).as_ref().and_then(LastRun::error);
        match last {
            Some(error) if !is_news => RefreshError::Still(error, backoff),
            _ => RefreshError::Elsewhere(backoff),
        }
    }

    /// Asks Redis who is to solve, and hears what the API has refused elsewhere.
    pub(in crate::refresh) async fn enter(&self, request: &Request) -> Result<Entrance, NoAnswer> {
        let entrance = self.stores.enter(request).await?;
        self.denied.hear(&entrance);
        if entrance.is_granted() {
            self.redis_is_back();
        }
        Ok(entrance)
    }

    /// Redis takes writes, or has brought a token: nobody need go without it.
    pub(in crate::refresh) fn redis_is_back(&self) {
        if self.fleet.redis_is_back() {
            self.schedule().lift();
            self.woken.notify_one();
        }
    }

    /// Redis can be read: where this sidecar has gone without it, and the token
    /// that it got is of no more use, finds out whether it takes writes too. To
    /// tell it of that token once more does so, and serves the others.
    pub(in crate::refresh) async fn try_redis(&self) {
        let useless = |current: &Arc<Published>| !self.is_usable(&current.token);
        let Some(current) = self.cache.current().filter(useless) else { return };
        if self.fleet.is_alone()
            && let Some(denying) = self.stores.deny(&current.token)
            && denying.await
        {
            self.redis_is_back();
        }
    }

    /// What lies in Redis, whoever's turn it is.
    pub(in crate::refresh) async fn look_into_redis(&self) -> Result<Entrance, NoAnswer> {
        let look = Request { owner: Owner::random(), wish: Wish::None, known: Vec::new() };
        let entrance = self.enter(&look).await?;
        self.give_back_doubtful().await;
        Ok(entrance)
    }

    /// Gives back the lease that a turn has asked for without an answer, and may
    /// have got since, so that others need not wait for it to lapse.
    pub(in crate::refresh) async fn give_back_doubtful(&self) {
        let Some(owner) = self.fleet.take_doubtful() else { return };
        if self.stores.release(&owner).await.is_err() {
            self.fleet.doubt(owner);
        }
    }

    /// The run has ended: tells the others, beside it.
    pub(in crate::refresh) fn leave_turn(self: &Arc<Self>, outcome: &Outcome) {
        self.fleet.set_part(None);
        let Some(lease) = self.fleet.take_lease() else { return };
        if let Some(backoff) = outcome.as_ref().err().and_then(|error| self.backoff_of(error)) {
            return self.share_failure(lease, backoff);
        }
        let this = Arc::clone(self);
        self.handle.spawn(async move { this.stores.release(&lease.owner).await.ok() });
    }

    fn share_failure(self: &Arc<Self>, lease: Lease, backoff: SharedBackoff) {
        let backoff = SharedBackoff { epoch: lease.epoch, ..backoff };
        self.fleet.tell(&backoff);
        let this = Arc::clone(self);
        self.handle.spawn(async move {
            if this.stores.fail(&lease, &backoff).await.is_err() {
                this.stores.release(&lease.owner).await.ok();
            }
        });
    }

    /// The API refuses `token`, which nobody could verify, and a back-off has
    /// begun for it. Where the others have the token from here, it is for them
    /// too, unless somebody has begun since.
    pub(in crate::refresh) fn share_disappointment(
        self: &Arc<Self>,
        token: &Token,
        error: &RefreshError,
    ) {
        if let Some(lease) = self.fleet.take_shown(token)
            && let Some(backoff) = self.backoff_of(error)
        {
            self.share_failure(lease, backoff);
        }
    }

    /// What the others are to know of an own failure.
    fn backoff_of(&self, error: &RefreshError) -> Option<SharedBackoff> {
        self.schedule().pause(Instant::now()).map(|pause| shared(pause, error.to_string()))
    }

    /// The process ends: tells Redis what it does not know yet, and whoever waits
    /// for this run is to go on at once.
    pub(in crate::refresh) async fn leave_fleet(&self) {
        let leave = async {
            self.save_to_redis().await;
            self.give_back_doubtful().await;
            if let Some(lease) = self.fleet.take_lease().or_else(|| self.fleet.settle()) {
                self.stores.release(&lease.owner).await.ok();
            }
        };
        let _ = timeout(LEAVE, leave).await;
    }
}

/// What the others are to know of a `pause` here.
pub(super) fn shared(pause: Pause, error: String) -> SharedBackoff {
    let Pause { failures, routine, left } = pause;
    SharedBackoff { error, failures, routine, left: left.mul_f64(SHARED_PART), epoch: 0 }
}

/// Says once in a run that another sidecar takes long.
fn tell_long_wait(gains: &mut Gains<'_>) {
    if !matches!(gains.entrance, Some(Entrance { turn: Standing::Held(_), .. })) {
        gains.waits_since = None;
        return;
    }
    let waited = gains.waits_since.get_or_insert_with(Instant::now).elapsed();
    if waited > LONG_WAIT && !gains.wait_is_told {
        gains.wait_is_told = true;
        info!(waited = %readable(waited), "waits for another sidecar's refresh");
    }
}
