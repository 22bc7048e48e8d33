//! A run: its turn, and how it ends.

use super::member::Purpose;
use super::*;
use crate::refresh::adoption::View;
use crate::refresh::fleet::Considered;
use crate::refresh::fleet::turn::{ALONE_PAUSE, Action, End, Event, Past, Situation, Turn};
use crate::refresh::lock;
use crate::refresh::run::Cause;
use crate::refresh::schedule::Failed;
use crate::token::{
    Candidate, Entrance, Generation, Lack, Lease, Owner, SharedBackoff, Source, Standing, ValueId,
    Wish,
};

#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct Run {
    number: u64,
    cause: Cause,
    /// Somebody needs it: its failure starts the back-off.
    pub(super) needed: bool,
    /// Somebody wants it by hand.
    pub(super) forced: bool,
    owner: Owner,
    /// It has asked for the lease, and there is no answer yet.
    unanswered: bool,
    /// What was in force when it began.
    before: Option<Generation>,
    past: Past,
    pub(super) turn: Turn,
    pub(super) started: u64,
    pub(super) frozen: u64,
    serial: u64,
    waits: bool,
    noticed: bool,
    solving: bool,
    entrance: Option<Entrance>,
    solution: Option<Candidate>,
}

/// Why a run has brought no token.
enum Failure {
    Own { solver_away: bool },
    Elsewhere(SharedBackoff),
    Alone(Duration),
}

impl World {
    pub(super) fn begin_run(&mut self, member: usize, cause: Cause) {
        self.runs += 1;
        let number = self.runs;
        let wish = cause.wish(self.usable(member).is_some());
        let (now, dice) = (self.instant(), self.rng.fork());
        let m = &mut self.members[member];
        let known = m.cache.current().map(|current| ValueId::of_token(&current.token));
        let owner = m.fleet.take_doubtful();
        let owner = owner.unwrap_or_else(|| Owner::named(format!("member-{member}-{number}")));
        let past = *lock(&m.fleet.past);
        m.run = Some(Run {
            number,
            cause,
            needed: cause.is_need(),
            forced: cause == Cause::ByHand,
            owner: owner.clone(),
            unanswered: false,
            before: m.generation(),
            past,
            turn: Turn::new(wish, owner, known, past, dice, now),
            started: self.now,
            frozen: 0,
            serial: 0,
            waits: false,
            noticed: false,
            solving: false,
            entrance: None,
            solution: None,
        });
        if cause == Cause::Start {
            return self.look(member, Purpose::Load { run: number });
        }
        self.begin_turn(member);
    }

    /// At start a stored token is believed.
    pub(super) fn loaded(&mut self, member: usize, run: u64, entrance: Option<&Entrance>) {
        if self.run_of(member, run).is_none() {
            return;
        }
        let stored = entrance.and_then(|entrance| entrance.stored.as_ref());
        match stored.filter(|stored| self.is_usable(member, &stored.token)) {
            Some(stored) => {
                self.adopt(member, stored, stored.verified && !stored.foreign);
                self.overtake(member);
            }
            None => self.begin_turn(member),
        }
    }

    fn begin_turn(&mut self, member: usize) {
        let now = self.instant();
        let action = self.members[member].run.as_mut().unwrap().turn.begin(now);
        self.act(member, action);
    }

    fn run_of(&mut self, member: usize, number: u64) -> Option<&mut Run> {
        self.members[member].run.as_mut().filter(|run| run.number == number)
    }

    fn step(&mut self, member: usize, event: Event) {
        let now = self.instant();
        let usable = self.usable(member).is_some();
        let Some(run) = &mut self.members[member].run else { return };
        run.turn.raise(match () {
            () if run.forced => Wish::Force,
            () if run.needed => Wish::Needed,
            () => run.cause.wish(usable),
        });
        run.waits = false;
        run.serial += 1;
        let action = run.turn.step(now, event);
        let lease = run.turn.lease().cloned();
        *lock(&self.members[member].fleet.lease) = lease;
        self.act(member, action);
    }

    fn act(&mut self, member: usize, action: Action) {
        self.check_budget(member);
        let run = self.members[member].run.as_mut().unwrap();
        let number = run.number;
        match action {
            Action::Enter(request) => {
                run.noticed = false;
                run.unanswered |= request.wish != Wish::None;
                let call = Call::enter(&request, self.members[member].last_denial);
                self.send(member, &call, Purpose::Enter { run: number });
            }
            Action::Consider => self.consider_in_turn(member),
            Action::Solve => self.solve(member),
            Action::HandOn(lease, lack) => {
                self.send(member, &Call::hand_on(&lease, lack), Purpose::HandOn { run: number });
            }
            Action::Wait(_) if run.noticed => self.step(member, Event::Notice),
            Action::Wait(until) => self.wait(member, until),
            Action::End(end) => self.end(member, end),
        }
    }

    fn wait(&mut self, member: usize, until: Instant) {
        let until = self.millis(until).max(self.now);
        let run = self.members[member].run.as_mut().unwrap();
        run.waits = true;
        let (run, serial) = (run.number, run.serial);
        if self.fault != Fault::Trusting {
            self.after(until - self.now, member, Happening::Waited { run, serial });
        }
    }

    pub(super) fn waited(&mut self, member: usize, run: u64, serial: u64) {
        if self.run_of(member, run).is_some_and(|run| run.waits && run.serial == serial) {
            self.step(member, Event::Timer);
        }
    }

    pub(super) fn notice(&mut self, member: usize) {
        if !self.members[member].alive {
            return;
        }
        match &mut self.members[member].run {
            Some(run) if run.waits => self.step(member, Event::Notice),
            run => {
                if let Some(run) = run {
                    run.noticed = true;
                }
                self.look(member, Purpose::Poll);
            }
        }
    }

    pub(super) fn entered(&mut self, member: usize, run: u64, entrance: Option<Entrance>) {
        let is_usurper = self.fault == Fault::Usurping;
        let epoch = self.server.last_epoch();
        let is_late = self.rng.bool();
        let Some(run) = self.run_of(member, run) else { return };
        run.unanswered &= entrance.is_none();
        let mut situation = entrance.as_ref().map(Situation::of);
        run.entrance = entrance;
        if run.entrance.as_ref().is_some_and(Entrance::is_granted) {
            self.redis_is_back(member);
        }
        if let Some(situation) = situation.as_mut().filter(|_| is_usurper)
            && matches!(situation.turn, Standing::Held(_))
        {
            situation.turn = Standing::Granted { epoch };
        }
        match situation {
            // A lost answer is a late one.
            None if is_late => self.step(member, Event::Late),
            situation => self.step(member, Event::Entered(situation)),
        }
    }

    pub(super) fn handed_on(&mut self, member: usize, run: u64, handed: Option<bool>) {
        if handed == Some(true) {
            self.count("lease handed on");
        }
        if self.run_of(member, run).is_some() {
            self.step(member, Event::HandedOn(handed));
        }
    }

    fn consider_in_turn(&mut self, member: usize) {
        let run = self.members[member].run.as_ref().unwrap();
        let (in_doubt, entrance) = (run.cause.is_doubt(), run.entrance.clone().unwrap());
        let mut adopted = self.consider(member, &entrance, in_doubt) == Considered::Adopted;
        let heeds = !matches!(self.fault, Fault::Forgetful | Fault::Deaf);
        let unverified = entrance.unverified.as_ref();
        let unverified =
            unverified.filter(|_| !(adopted || heeds && entrance.is_unverified_denied));
        if let Some(unverified) = unverified {
            adopted = self.weigh(member, Some(unverified), in_doubt) == Considered::Adopted;
            if let Some(generation) = self.members[member].generation().filter(|_| adopted) {
                self.members[member].fleet.note_unproven(generation);
            }
        }
        self.step(member, Event::Considered { adopted });
    }

    pub(super) fn view<'a>(
        &self,
        member: usize,
        stored: Option<&'a crate::token::Stored>,
        ours: Option<&'a crate::token::Published>,
        in_doubt: bool,
    ) -> View<'a> {
        View::of(stored, ours, in_doubt, |token| {
            let denied = &self.members[member].denied;
            let forgotten = self.fault == Fault::Forgetful && denied.contains(token);
            forgotten || self.is_usable(member, token)
        })
    }

    fn solve(&mut self, member: usize) {
        self.solves += 1;
        self.tell_unanswered(member); // Without an answer it goes alone.
        let length = self.rng.u64(200..LONGEST_SOLVE);
        let issue = self.rng.u64(100..length);
        let run = self.members[member].run.as_mut().unwrap();
        run.solving = true;
        let (number, renew_at) = (run.number, run.turn.renew_at());
        let ends = Happening::SolveEnds { run: number, alive_since: self.now + issue };
        self.after(length, member, ends);
        self.plan_renewal(member, number, renew_at);
    }

    fn plan_renewal(&mut self, member: usize, run: u64, renew_at: Option<Instant>) {
        if let Some(renew_at) = renew_at {
            let delay = self.millis(renew_at).saturating_sub(self.now);
            self.after(delay, member, Happening::RenewalDue { run });
        }
    }

    pub(super) fn renew(&mut self, member: usize, run: u64) {
        let sent_at = self.now;
        let Some(owner) = self
            .run_of(member, run)
            .filter(|run| run.solving)
            .and_then(|run| run.turn.lease().map(|lease| lease.owner.clone()))
        else {
            return;
        };
        self.send(member, &Call::renew(&owner), Purpose::Renewal { run, sent_at });
    }

    pub(super) fn renewed(
        &mut self,
        member: usize,
        number: u64,
        sent_at: u64,
        still_ours: Option<bool>,
    ) {
        let sent = self.base + Duration::from_millis(sent_at);
        let Some(run) = self.run_of(member, number).filter(|run| run.solving) else { return };
        run.turn.renewed(sent, still_ours);
        let (lease, renew_at) = (run.turn.lease().cloned(), run.turn.renew_at());
        *lock(&self.members[member].fleet.lease) = lease;
        self.plan_renewal(member, number, renew_at);
    }

    pub(super) fn solve_ends(&mut self, member: usize, number: u64, alive_since: u64) {
        let luck = if self.is_chaos() { self.rng.u8(..20) } else { 10 };
        let solver_up = self.solver_answers(member);
        let Some(run) = self.run_of(member, number) else { return };
        run.solving = false;
        if !solver_up || luck == 0 {
            let away = (!solver_up).then_some(Lack::Away);
            return self.step(member, Event::SolveFailed { lack: away });
        }
        let token = self.new_token(number, alive_since);
        let verdict = self.verdict(&token);
        if !token.is_live(self.timestamp()) || verdict == Some(false) {
            return self.step(member, Event::SolveFailed { lack: None });
        }
        let candidate = Candidate::new(token, Source::Direct).verified(verdict.is_some());
        self.members[member].run.as_mut().unwrap().solution = Some(candidate);
        self.step(member, Event::Solved);
    }

    fn end(&mut self, member: usize, end: End) {
        let solver_away = !self.solver_answers(member);
        self.tell_unanswered(member);
        let mut run = self.members[member].run.take().unwrap();
        let solution = run.solution.take();
        let fleet = &self.members[member].fleet;
        lock(&fleet.past).take_over(run.past, run.turn.past());
        let needed = run.needed;
        let failure = match end {
            End::Adopted => return self.succeeded(member),
            End::Publish(lease) => return self.publish_solution(member, solution.unwrap(), lease),
            End::Failed => Failure::Own { solver_away },
            End::Elsewhere(backoff) => Failure::Elsewhere(backoff),
            End::TooSoon(left) => {
                assert!(left <= ALONE_PAUSE);
                Failure::Alone(left)
            }
        };
        self.failed(member, needed, &failure);
    }

    /// Whoever has asked for the lease without an answer may have got it.
    fn tell_unanswered(&mut self, member: usize) {
        let m = &mut self.members[member];
        if let Some(run) = &mut m.run
            && std::mem::take(&mut run.unanswered)
        {
            m.fleet.doubt(run.owner.clone());
        }
    }

    fn publish_solution(&mut self, member: usize, solution: Candidate, lease: Option<Lease>) {
        let fleet = &self.members[member].fleet;
        *lock(&fleet.lease) = lease;
        fleet.owe(&solution.token);
        self.publish(member, solution, false);
        self.succeeded(member);
    }

    /// Something newer than what the run began with is in force: whatever it is
    /// at, it is over.
    pub(super) fn overtake(&mut self, member: usize) {
        let generation = self.members[member].generation();
        if self.members[member].run.as_ref().is_some_and(|run| generation > run.before) {
            self.tell_unanswered(member);
        }
        if self.members[member].run.take_if(|run| generation > run.before).is_some() {
            self.succeeded(member);
        }
    }

    fn succeeded(&mut self, member: usize) {
        let m = &mut self.members[member];
        let current = m.cache.current().unwrap();
        if current.is_verified() {
            m.schedule.proven();
        }
        if let Some(lease) = m.fleet.take_lease() {
            self.send(member, &Call::release(&lease.owner), Purpose::Nothing);
        }
        self.wake(member, Some(current.generation));
    }

    fn failed(&mut self, member: usize, needed: bool, failure: &Failure) {
        let (now, jitter) = (self.instant(), self.jitter());
        let needed = needed || self.usable(member).is_none();
        let m = &mut self.members[member];
        match *failure {
            Failure::Own { solver_away } => {
                m.schedule.failed(now, Failed { needed, solver_away }, jitter);
            }
            Failure::Elsewhere(SharedBackoff { left, failures, routine, .. }) => {
                let needed = needed && !routine;
                let until = now + left + left.mul_f64((jitter - 0.9) / 2.0);
                m.schedule.failed_elsewhere(until, needed, failures);
            }
            Failure::Alone(left) => {
                m.fleet.pause_alone();
                m.schedule.failed_elsewhere(now + left, needed, 0);
            }
        }
        if let Some(lease) = m.fleet.take_lease() {
            self.share_failure(member, &lease);
        }
        self.wake(member, None);
    }
}
