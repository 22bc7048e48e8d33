//! A run's turn among the sidecars of a fleet: who solves, who waits, and what
//! follows when Redis, a holder or a solver fails.
//!
//! A state machine without I/O and without a clock of its own: it is told what
//! happened and when, and says what to do next. Production and the simulation
//! run this same code.
//!
//! # Invariants
//!
//! - Who has the lease solves; the others wait, and look again at each notice.
//! - A solved token is published only while the lease is certainly held, or
//!   after another look: what is stored by then may be newer.
//! - A turn ends within [`WAIT_LIMIT`] and the time of one solve, whatever the
//!   others do.

use std::time::Duration;

use fastrand::Rng;
use tokio::time::Instant;

use crate::token::{
    Entrance, LEASE, Lack, Lease, Owner, Request, SharedBackoff, Standing, ValueId, Wish,
};

/// From one renewal of the lease to the next.
const RENEW_EVERY: Duration = Duration::from_secs(5);
/// After a renewal without an answer.
const RENEW_AGAIN: Duration = Duration::from_secs(1);
/// Pauses between looks, should a notice get lost.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Longest pause before a Redis that was late is asked once more; beyond the one
/// that the link to it makes after a first silence.
const LATE_PAUSE: Duration = Duration::from_secs(1);
/// How long a sidecar whose solver is away leaves the lease to others.
const AWAY: Duration = Duration::from_secs(30);
/// How long it waits for one of them to take it.
const PATIENCE: Duration = Duration::from_millis(1_500);
/// The least time between two tokens got without Redis.
pub(in crate::refresh) const ALONE_PAUSE: Duration = Duration::from_mins(5);
/// How long others are waited for. Longer than any solve lasts.
pub(in crate::refresh) const WAIT_LIMIT: Duration = Duration::from_mins(5);
/// The most stored values that are remembered as useless.
const MOST_KNOWN: usize = 8;

/// What outlives a turn.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::refresh) struct Past {
    /// When the last token was got without Redis, since Redis has gone. To be
    /// read is not enough for it to be back: it has to take writes.
    alone_at: Option<Instant>,
    /// Until when the lease is left to others, for want of a solver.
    away_until: Option<Instant>,
}

impl Past {
    /// The solver is back.
    pub(in crate::refresh) fn solver_is_back(&mut self) {
        self.away_until = None;
    }

    /// A turn that began with `before` has ended with `after`: what it has not
    /// changed itself may have changed meanwhile, and stays so.
    pub(in crate::refresh) fn take_over(&mut self, before: Self, after: Self) {
        if after.alone_at != before.alone_at {
            self.alone_at = after.alone_at;
        }
        if after.away_until != before.away_until {
            self.away_until = after.away_until;
        }
    }

    /// Redis is back.
    pub(in crate::refresh) fn redis_is_back(&mut self) {
        self.alone_at = None;
    }

    /// Whether the last token was got without Redis.
    pub(in crate::refresh) fn is_alone(&self) -> bool {
        self.alone_at.is_some()
    }
}

/// What an [`Entrance`] says to a turn.
#[derive(Clone, Debug)]
pub(in crate::refresh) struct Situation {
    /// The stored values that no sidecar has seen refused.
    pub(in crate::refresh) values: Vec<ValueId>,
    pub(in crate::refresh) backoff: Option<SharedBackoff>,
    pub(in crate::refresh) turn: Standing,
}

impl Situation {
    pub(in crate::refresh) fn of(entrance: &Entrance) -> Self {
        let stored = entrance.value.clone().filter(|_| !entrance.is_denied);
        let unverified = entrance.unverified_value.clone();
        let unverified = unverified.filter(|_| !entrance.is_unverified_denied);
        Self {
            values: stored.into_iter().chain(unverified).collect(),
            backoff: entrance.backoff.clone(),
            turn: entrance.turn,
        }
    }
}

/// What a turn is told.
#[derive(Clone, Debug)]
pub(in crate::refresh) enum Event {
    /// Redis has answered, or is out of order.
    Entered(Option<Situation>),
    /// Redis, which was well, has not answered in time.
    Late,
    /// What is stored has been considered.
    Considered {
        /// It is in force now.
        adopted: bool,
    },
    /// The solve has brought a token that may be published.
    Solved,
    /// It has brought none.
    SolveFailed {
        /// What another sidecar may have that this one lacks.
        lack: Option<Lack>,
    },
    /// Whether another sidecar may take the lease; none: no answer.
    HandedOn(Option<bool>),
    /// Somebody says that there is something to see.
    Notice,
    /// The wait is over.
    Timer,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::refresh) enum Action {
    /// Ask Redis; answer with [`Event::Entered`].
    Enter(Request),
    /// Consider what the last answer brought; answer with [`Event::Considered`].
    Consider,
    /// Ask the sources, renewing the lease meanwhile if there is one.
    Solve,
    /// Give the lease to whoever waits for it; answer with [`Event::HandedOn`].
    HandOn(Lease, Lack),
    /// Wait for a notice, until then at most.
    Wait(Instant),
    /// The turn is over.
    End(End),
}

/// How a turn ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::refresh) enum End {
    /// A stored token is in force.
    Adopted,
    /// The solved token is to be published, and committed with this lease.
    Publish(Option<Lease>),
    /// The own solve has failed.
    Failed,
    /// Another sidecar's run has failed.
    Elsewhere(SharedBackoff),
    /// Redis is out, and the last token got without it is not old enough.
    TooSoon(Duration),
}

/// The lease as far as is known here.
#[derive(Clone, Debug)]
struct Held {
    lease: Lease,
    /// When its last confirmed renewal was sent: it lives from then on at least.
    sent_at: Instant,
    renew_at: Instant,
}

/// What this turn's own solve has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OwnSolve {
    /// There was none, or it goes on.
    None,
    /// Its token waits to be published.
    InReserve,
    /// It has failed, and others may do better.
    Failed,
    /// Nor has anybody else done better: the lease is wanted once more, so that
    /// all are told of the failure.
    Hopeless,
}

/// One run's turn.
#[derive(Debug)]
pub(in crate::refresh) struct Turn {
    owner: Owner,
    wish: Wish,
    past: Past,
    dice: Rng,
    started: Instant,
    /// Stored values that are of no use here.
    known: Vec<ValueId>,
    /// The last answer of Redis, while it is considered.
    situation: Option<Situation>,
    held: Option<Held>,
    /// When the last question was sent.
    asked_at: Instant,
    /// Redis is out: the solve is nobody else's business.
    alone: bool,
    own: OwnSolve,
    /// Redis was late with the last answer.
    late: bool,
    /// Since when nobody has taken the lease that is left to others.
    free_since: Option<Instant>,
    pause: Duration,
}

impl Turn {
    /// A turn that begins now. `known` is the token in force.
    pub(in crate::refresh) fn new(
        wish: Wish,
        owner: Owner,
        known: Option<ValueId>,
        past: Past,
        dice: Rng,
        now: Instant,
    ) -> Self {
        Self {
            owner,
            wish,
            past,
            dice,
            started: now,
            known: known.into_iter().collect(),
            situation: None,
            held: None,
            asked_at: now,
            alone: false,
            own: OwnSolve::None,
            late: false,
            free_since: None,
            pause: FIRST_PAUSE,
        }
    }

    /// What to do first.
    pub(in crate::refresh) fn begin(&mut self, now: Instant) -> Action {
        self.enter(now)
    }

    /// Somebody wants the token more than whoever began the run.
    pub(in crate::refresh) fn raise(&mut self, wish: Wish) {
        self.wish = self.wish.max(wish);
    }

    /// What to do after `event`.
    pub(in crate::refresh) fn step(&mut self, now: Instant, event: Event) -> Action {
        match event {
            Event::Entered(Some(situation)) => self.entered(situation, now),
            Event::Entered(None) => self.without_redis(now),
            Event::Late => self.late(now),
            Event::Considered { adopted: true } => {
                self.past.redis_is_back();
                Action::End(End::Adopted)
            }
            Event::Considered { adopted: false } => match self.situation.take() {
                Some(situation) => self.go_on(&situation, true, now),
                None => self.enter(now),
            },
            Event::Solved => self.solved(now),
            Event::SolveFailed { lack } => self.solve_failed(lack, now),
            Event::HandedOn(Some(true)) => self.handed_on(now),
            Event::HandedOn(_) => Action::End(End::Failed),
            Event::Notice => {
                self.pause = FIRST_PAUSE;
                self.enter(now)
            }
            Event::Timer => self.enter(now),
        }
    }

    /// The lease, if it was held when last heard of.
    pub(in crate::refresh) fn lease(&self) -> Option<&Lease> {
        self.held.as_ref().map(|held| &held.lease)
    }

    /// What the next turn has to know.
    pub(in crate::refresh) fn past(&self) -> Past {
        self.past
    }

    /// When the lease is to be renewed next, if there is one.
    pub(in crate::refresh) fn renew_at(&self) -> Option<Instant> {
        self.held.as_ref().map(|held| held.renew_at)
    }

    /// What came of a renewal that was sent at `sent_at`; none: no answer.
    pub(in crate::refresh) fn renewed(&mut self, sent_at: Instant, still_ours: Option<bool>) {
        let Some(held) = &mut self.held else { return };
        match still_ours {
            Some(true) => {
                held.sent_at = sent_at;
                held.renew_at = sent_at + RENEW_EVERY;
            }
            Some(false) => self.held = None,
            None => held.renew_at = sent_at + RENEW_AGAIN,
        }
    }

    fn enter(&mut self, now: Instant) -> Action {
        self.asked_at = now;
        let (owner, wish) = (self.owner.clone(), self.wish_at(now));
        Action::Enter(Request { owner, wish, known: self.known.clone() })
    }

    fn wish_at(&self, now: Instant) -> Wish {
        match self.wish {
            _ if self.own == OwnSolve::InReserve => Wish::Force, // There is nothing left to fail.
            _ if self.own == OwnSolve::Failed => Wish::None,
            wish if self.own == OwnSolve::Hopeless => wish,
            Wish::Force => Wish::Force,
            _ if self.past.away_until.is_some_and(|until| now < until) => Wish::None,
            wish => wish,
        }
    }

    fn entered(&mut self, situation: Situation, now: Instant) -> Action {
        self.late = false;
        self.held = match situation.turn {
            Standing::Granted { epoch } => Some(Held {
                lease: Lease { owner: self.owner.clone(), epoch },
                sent_at: self.asked_at,
                renew_at: self.asked_at + RENEW_EVERY,
            }),
            _ => None,
        };
        if self.held.is_some() {
            self.past.redis_is_back();
        }
        let news: Vec<_> =
            situation.values.iter().filter(|value| !self.known.contains(value)).cloned().collect();
        if news.is_empty() {
            return self.go_on(&situation, false, now);
        }
        self.known.extend(news);
        let surplus = self.known.len().saturating_sub(MOST_KNOWN);
        self.known.drain(..surplus);
        self.situation = Some(situation);
        Action::Consider
    }

    /// Nothing that is stored is of use.
    fn go_on(&mut self, situation: &Situation, considered: bool, now: Instant) -> Action {
        match situation.turn {
            Standing::Granted { .. } if self.own == OwnSolve::InReserve => self.publish(now),
            Standing::Granted { .. } if self.own == OwnSolve::Hopeless => Action::End(End::Failed),
            Standing::Granted { .. } => Action::Solve,
            Standing::Held(_) => {
                self.free_since = None;
                self.wait(now)
            }
            Standing::Free => self.find_free(situation, considered, now),
        }
    }

    fn find_free(&mut self, situation: &Situation, considered: bool, now: Instant) -> Action {
        let wish = self.wish_at(now);
        let holds = |backoff: &&SharedBackoff| !(self.wish == Wish::Needed && backoff.routine);
        match situation.backoff.as_ref().filter(holds) {
            Some(backoff) if wish != Wish::Force => {
                return Action::End(End::Elsewhere(backoff.clone()));
            }
            // The lease was refused for what is known now to be useless.
            _ if wish != Wish::None && considered => return self.enter(now),
            _ => {}
        }
        let since = *self.free_since.get_or_insert(now);
        if now < since + PATIENCE {
            return self.wait(now);
        }
        match self.own {
            OwnSolve::Failed => self.own = OwnSolve::Hopeless,
            OwnSolve::Hopeless => return Action::End(End::Failed),
            OwnSolve::None | OwnSolve::InReserve => self.past.away_until = None,
        }
        self.free_since = None;
        self.enter(now)
    }

    fn wait(&mut self, now: Instant) -> Action {
        if now >= self.started + WAIT_LIMIT {
            return self.without_redis(now);
        }
        let pause = self.pause.mul_f64(0.75 + 0.5 * self.dice.f64());
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Action::Wait(now + pause)
    }

    /// One that is only busy must not send a whole fleet to its solvers: it is
    /// asked once more.
    fn late(&mut self, now: Instant) -> Action {
        if std::mem::replace(&mut self.late, true) {
            return self.without_redis(now);
        }
        Action::Wait(now + LATE_PAUSE.mul_f64(0.5 + 0.5 * self.dice.f64()))
    }

    fn without_redis(&mut self, now: Instant) -> Action {
        if self.own == OwnSolve::InReserve {
            return Action::End(End::Publish(None));
        }
        if matches!(self.own, OwnSolve::Failed | OwnSolve::Hopeless) {
            return Action::End(End::Failed);
        }
        let since = self.past.alone_at.map(|at| now.saturating_duration_since(at));
        match since.and_then(|since| ALONE_PAUSE.checked_sub(since)) {
            Some(left) if self.wish != Wish::Force && !left.is_zero() => {
                Action::End(End::TooSoon(left))
            }
            _ => {
                self.alone = true;
                Action::Solve
            }
        }
    }

    fn solved(&mut self, now: Instant) -> Action {
        if self.alone {
            self.past.alone_at = Some(now);
            return Action::End(End::Publish(None));
        }
        self.own = OwnSolve::InReserve;
        self.publish(now)
    }

    /// Only while nobody else can have the lease.
    fn publish(&mut self, now: Instant) -> Action {
        match &self.held {
            Some(held) if now < held.sent_at + LEASE => {
                Action::End(End::Publish(Some(held.lease.clone())))
            }
            _ => {
                self.held = None;
                self.enter(now)
            }
        }
    }

    fn solve_failed(&mut self, lack: Option<Lack>, now: Instant) -> Action {
        match (lack, &self.held) {
            (Some(lack), Some(held)) if !self.alone && now < held.sent_at + LEASE => {
                Action::HandOn(held.lease.clone(), lack)
            }
            _ => Action::End(End::Failed),
        }
    }

    fn handed_on(&mut self, now: Instant) -> Action {
        self.held = None;
        self.own = OwnSolve::Failed;
        self.past.away_until = Some(now + AWAY);
        self.free_since = Some(now);
        self.pause = FIRST_PAUSE;
        self.wait(now)
    }
}
