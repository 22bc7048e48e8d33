//! A sidecar, the requests that come to it, and when its runs begin.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::run::Run;
use super::*;
use crate::refresh::adoption::is_store;
use crate::refresh::denied::Denied;
use crate::refresh::fleet::drive::shared;
use crate::refresh::fleet::{Fleet, Pace};
use crate::refresh::run::Cause;
use crate::refresh::schedule::Schedule;
use crate::token::{
    Candidate, Commit, Generation, Lease, Owner, Published, SharedBackoff, TokenCache, ValueId,
};

/// What an answer is for.
#[derive(Clone, Debug)]
pub(super) enum Purpose {
    Enter { run: u64 },
    HandOn { run: u64 },
    Renewal { run: u64, sent_at: u64 },
    Load { run: u64 },
    Poll,
    Commit { ours: Arc<Published>, lease: Option<Lease> },
    Share { ours: Arc<Published>, lease: Lease },
    RefusedLook { ours: Arc<Published>, refusal: Commit, lease: Option<Lease> },
    GiveBack(Owner),
    Fail(Lease),
    TryRedis,
    Nothing,
}

/// A request that is held until there is a token newer than `older`.
pub(super) struct Waiter {
    number: u64,
    since: u64,
    older: Option<Generation>,
    cause: Cause,
}

#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct Member {
    pub(super) life: u64,
    pub(super) alive: bool,
    pub(super) frozen_until: u64,
    pub(super) solver_up: bool,
    pub(super) cache: TokenCache,
    pub(super) denied: Denied,
    pub(super) last_denial: u64,
    pub(super) fleet: Fleet,
    pub(super) schedule: Schedule,
    /// Of the last plan of the next run.
    pub(super) planned: u64,
    pub(super) run: Option<Run>,
    pub(super) waiters: Vec<Waiter>,
    pub(super) pending: HashMap<u64, Purpose>,
    pub(super) in_redis: u64,
    pub(super) seen: Option<ValueId>,
    pub(super) doubted: u64,
    pub(super) pace: Pace,
    /// A write to Redis is under way; and there is something new since.
    pub(super) keeping: bool,
    pub(super) keep_news: bool,
    /// Of the last pause between writes.
    pub(super) keep_serial: u64,
    /// What the verifier has refused before its eyes.
    pub(super) refused: HashSet<[u8; 32]>,
    /// What it was told to be refused.
    pub(super) told: HashSet<[u8; 32]>,
}

impl Member {
    pub(super) fn new(life: u64) -> Self {
        Self {
            life,
            alive: true,
            frozen_until: 0,
            solver_up: true,
            cache: TokenCache::new(),
            denied: Denied::default(),
            last_denial: 0,
            fleet: Fleet::default(),
            schedule: Schedule::default(),
            planned: 0,
            run: None,
            waiters: Vec::new(),
            pending: HashMap::new(),
            in_redis: 0,
            seen: None,
            doubted: 0,
            pace: Pace::default(),
            keeping: false,
            keep_news: false,
            keep_serial: 0,
            refused: HashSet::new(),
            told: HashSet::new(),
        }
    }

    pub(super) fn generation(&self) -> Option<Generation> {
        self.cache.current().map(|current| current.generation)
    }
}

impl World {
    pub(super) fn start(&mut self, member: usize) {
        self.members[member].alive = true;
        for (most, what) in
            [(1_000, Happening::Traffic), (POLL, Happening::Poll), (PROBE, Happening::Probe)]
        {
            let first = self.rng.u64(1..most);
            self.after(first, member, what);
        }
        self.begin_run(member, Cause::Start);
    }

    /// Whether `token` may be adopted.
    pub(super) fn is_usable(&self, member: usize, token: &Token) -> bool {
        let is_live = self.fault == Fault::Timeless || token.is_live(self.timestamp());
        is_live && !self.members[member].denied.contains_anywhere(token)
    }

    /// The token in force, if it is not known to be dead.
    pub(super) fn usable(&self, member: usize) -> Option<Arc<Published>> {
        let is_live = |current: &Arc<Published>| current.token.is_live(self.timestamp());
        let current = self.members[member].cache.current().filter(is_live);
        current.filter(|current| !self.members[member].denied.contains(&current.token))
    }

    /// A request comes and finds out about the token.
    pub(super) fn traffic(&mut self, member: usize) {
        let longest = if self.is_chaos() { 4_000 } else { 12_000 };
        let pause = self.rng.u64(500..longest);
        self.after(pause, member, Happening::Traffic);
        let older = self.members[member].generation();
        match self.members[member].cache.current() {
            Some(current) if !self.is_dead(&current.token) => self.prove(member, &current),
            Some(current) if current.token.is_live(self.timestamp()) => {
                self.refused(member, &current);
            }
            current => {
                if current.is_some() {
                    self.count("expired token in force");
                }
                self.hold(member, older, Cause::Missing);
            }
        }
    }

    pub(super) fn prove(&mut self, member: usize, current: &Published) {
        if self.members[member].cache.confirm(current.generation) {
            self.members[member].schedule.proven();
            self.keep(member);
        }
    }

    /// The API has refused a request with `current`.
    fn refused(&mut self, member: usize, current: &Published) {
        if self.held_until(member).is_some() {
            return self.check_answer(member, self.now, false, true);
        }
        let is_judged = self.usable(member).is_some();
        if is_judged && self.verdict(&current.token) == Some(false) {
            self.deny(member, &current.token);
        }
        self.hold(member, Some(current.generation), Cause::Refused);
    }

    /// None: there is no telling.
    pub(super) fn verdict(&mut self, token: &Token) -> Option<bool> {
        let mute = self.is_chaos() && self.rng.u8(..8) == 0;
        (!mute).then(|| !self.is_dead(token))
    }

    /// The verifier says that the API refuses `token`.
    pub(super) fn deny(&mut self, member: usize, token: &Token) {
        self.members[member].refused.insert(*token.digest());
        if self.members[member].denied.add(token) {
            self.send(member, &Call::deny(token), Purpose::Nothing);
            self.plan_run(member);
        }
    }

    fn hold(&mut self, member: usize, older: Option<Generation>, cause: Cause) {
        self.waiters += 1;
        let waiter = Waiter { number: self.waiters, since: self.now, older, cause };
        self.after(HOLD, member, Happening::HoldEnds { waiter: waiter.number });
        self.wait_for_run(member, waiter);
    }

    pub(super) fn hold_ends(&mut self, member: usize, waiter: u64) {
        let waiters = &mut self.members[member].waiters;
        let Some(at) = waiters.iter().position(|other| other.number == waiter) else { return };
        let waiter = waiters.swap_remove(at);
        self.check_answer(member, waiter.since, false, false);
    }

    /// For a newer token, that of the run in flight, or that of a new run.
    fn wait_for_run(&mut self, member: usize, waiter: Waiter) {
        if self.members[member].cache.newer_than(waiter.older).is_some() {
            return self.check_answer(member, waiter.since, true, true);
        }
        if let Some(run) = &mut self.members[member].run {
            run.needed |= waiter.cause.is_need();
            return self.members[member].waiters.push(waiter);
        }
        if waiter.cause == Cause::Refused {
            self.count_disappointment(member);
        }
        if self.held_until(member).is_some() {
            return self.check_answer(member, waiter.since, false, true);
        }
        let cause = waiter.cause;
        self.members[member].waiters.push(waiter);
        self.begin_run(member, cause);
    }

    fn held_until(&self, member: usize) -> Option<Instant> {
        self.members[member].schedule.held_until(self.instant())
    }

    /// A run has ended, with this generation in force or in vain.
    pub(super) fn wake(&mut self, member: usize, outcome: Option<Generation>) {
        for waiter in std::mem::take(&mut self.members[member].waiters) {
            match outcome {
                Some(newer) if Some(newer) <= waiter.older => self.wait_for_run(member, waiter),
                _ => self.check_answer(member, waiter.since, outcome.is_some(), true),
            }
        }
        self.plan_run(member);
    }

    fn count_disappointment(&mut self, member: usize) {
        let (now, jitter) = (self.instant(), self.jitter());
        let m = &mut self.members[member];
        let Some(current) = m.cache.current().filter(|current| !current.is_verified()) else {
            return;
        };
        let from_sources = !is_store(current.source) || m.fleet.is_unproven(current.generation);
        if from_sources
            && m.schedule.disappointed(now, current.generation, jitter)
            && let Some(lease) = m.fleet.take_shown(&current.token)
        {
            self.share_failure(member, &lease);
        }
    }

    pub(super) fn share_failure(&mut self, member: usize, lease: &Lease) {
        let now = self.instant();
        if let Some(pause) = self.members[member].schedule.pause(now) {
            let epoch = lease.epoch;
            let backoff = SharedBackoff { epoch, ..shared(pause, "failed".to_owned()) };
            self.send(member, &Call::fail(lease, &backoff), Purpose::Fail(lease.clone()));
        }
    }

    // The schedule.

    /// Something has changed that the next run depends on.
    pub(super) fn plan_run(&mut self, member: usize) {
        let usable = self.usable(member).is_some();
        let due = self.members[member].schedule.due(self.instant(), usable);
        // A timer goes off late rather than early.
        let delay = if due > self.instant() { self.millis(due) + 1 - self.now } else { 0 };
        let m = &mut self.members[member];
        m.planned += 1;
        let serial = m.planned;
        self.after(delay.min(PROBE), member, Happening::RunDue { serial });
    }

    pub(super) fn run_due(&mut self, member: usize, serial: u64) {
        let m = &self.members[member];
        // One that is in flight plans the next when it ends.
        if m.planned != serial || m.run.is_some() {
            return;
        }
        let usable = self.usable(member).is_some();
        let due = self.members[member].schedule.due(self.instant(), usable);
        if due > self.instant() || self.held_until(member).is_some() {
            return self.plan_run(member);
        }
        self.begin_run(member, Cause::Due);
    }

    pub(super) fn refresh_by_hand(&mut self, member: usize) {
        if self.members[member].alive {
            self.members[member].schedule.by_hand();
            match &mut self.members[member].run {
                Some(run) => run.forced = true,
                None => self.begin_run(member, Cause::ByHand),
            }
        }
    }

    /// A solver that was away may be back.
    pub(super) fn probe(&mut self, member: usize) {
        self.after(PROBE, member, Happening::Probe);
        let (now, well) = (self.instant(), self.solver_answers(member));
        let m = &mut self.members[member];
        if well && m.schedule.awaits_solver(now) {
            m.schedule.lift();
            m.fleet.solver_is_back();
            self.plan_run(member);
        }
    }

    pub(super) fn solver_answers(&self, member: usize) -> bool {
        self.members[member].solver_up || !self.is_chaos()
    }

    pub(super) fn redis_is_back(&mut self, member: usize) {
        if self.members[member].fleet.redis_is_back() {
            self.members[member].schedule.lift();
            self.plan_run(member);
        }
    }

    pub(super) fn publish(
        &mut self,
        member: usize,
        candidate: Candidate,
        is_foreign: bool,
    ) -> Arc<Published> {
        let before = self.members[member].cache.current();
        self.check_publication(before.as_deref(), &candidate, is_foreign);
        let (moment, jitter) = ((self.instant(), self.timestamp()), self.jitter());
        let m = &mut self.members[member];
        let published = m.cache.publish(candidate, moment.1);
        let expires_at = published.token.expires_at();
        let life = expires_at.map(|at| Duration::from_millis(at.0.saturating_sub(moment.1.0)));
        m.schedule.published(moment, life, Duration::from_hours(3), jitter);
        self.plan_run(member);
        self.keep(member);
        published
    }
}
