//! A fleet in a world of its own: the turns that production runs, and the
//! model of Redis's scripts, with virtual time and everything that goes wrong.
//!
//! Each seed is another history: messages late, lost or twice, members frozen,
//! killed and started anew, solvers away, Redis down, fail-overs to a replica
//! that lags behind, tokens dead by surprise. In the end all of that ceases,
//! and the fleet has to agree.
//!
//! A fail-over that loses what was acknowledged is the one way back that the
//! stored token may take: it starts a new timeline, within which nothing goes
//! backwards again.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use tokio::time::Instant;

use super::super::adoption::{Adoption, View};
use super::super::denied::Denied;
use super::super::testing::{issued, redis_store};
use super::keeping::{Considered, Next, after_refusal};
use super::turn::{ALONE_PAUSE, Action, End, Event, Past, Situation, Turn, WAIT_LIMIT};
use crate::token::redis::model::{Answer, Model, TOKEN};
use crate::token::redis::{Call, Operation, RawEntrance};
use crate::token::{
    Candidate, Commit, Entrance, Generation, Lack, Lease, Owner, Published, RedisStore, Request,
    SharedBackoff, Source, Timestamp, Token, TokenCache, ValueId, Wish,
};

/// Histories of a usual run; the test that is ignored by default has the rest.
const SEEDS: u64 = 300;
/// How long things go wrong, and how long they go well afterwards; ms.
const CHAOS: u64 = 60_000;
const CALM: u64 = 420_000;
const LONGEST_SOLVE: u64 = 20_000;
const TIMEOUT: u64 = 1_000;
const POLL: u64 = 10_000;
/// What a turn may last beside waiting and solving.
const MARGIN: u64 = 30_000;
/// All tokens are of this moment or later.
const NOW: Timestamp = Timestamp(1_000_000);

/// A fault on purpose, which the invariants have to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Redis takes a commit from whoever sends one.
    Unfenced,
    /// Members adopt what they know to be refused.
    Forgetful,
    /// Whoever waits hears notices, and never looks without.
    Trusting,
}

/// What an answer is for.
#[derive(Clone, Debug)]
enum Purpose {
    Turn { run: u64 },
    Renewal { run: u64, sent_at: u64 },
    Keep,
    KeepLook { refusal: Commit, with_lease: bool },
    Poll,
    Nothing,
}

#[derive(Clone, Debug)]
enum Happening {
    /// A call reaches the server.
    Arrives {
        from: usize,
        operation: u64,
        call: Call,
    },
    /// Its answer reaches the member.
    Answered {
        operation: u64,
        answer: Answer,
    },
    /// The member has waited long enough for it.
    TimedOut {
        operation: u64,
    },
    Notice,
    Waited {
        run: u64,
        serial: u64,
    },
    RenewalDue {
        run: u64,
    },
    SolveEnds {
        run: u64,
        alive_since: u64,
    },
    Traffic,
    Poll,
    KeepAgain,
    Restarts,
    Freezes,
    Crashes,
    TokensDie,
    RedisGoes,
    RedisReturns,
    FailsOver,
    Replicates,
    SolverTurns,
}

struct Scheduled {
    at: u64,
    serial: u64,
    member: usize,
    /// Of the member's life that it belongs to; none: of no life.
    life: Option<u64>,
    what: Happening,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.serial == other.serial
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.serial).cmp(&(other.at, other.serial))
    }
}

#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
struct Run {
    number: u64,
    turn: Turn,
    started: u64,
    frozen: u64,
    serial: u64,
    waits: bool,
    solving: bool,
    in_doubt: bool,
    routine: bool,
    entrance: Option<Entrance>,
    solution: Option<Candidate>,
}

struct Member {
    life: u64,
    alive: bool,
    frozen_until: u64,
    solver_up: bool,
    cache: TokenCache,
    denied: Denied,
    last_denial: u64,
    past: Past,
    run: Option<Run>,
    pending: HashMap<u64, Purpose>,
    owed: Option<(Token, Lease)>,
    in_redis: u64,
    seen: Option<ValueId>,
    keeping: bool,
    held_until: u64,
    failures: u32,
    /// What the API has refused before its eyes.
    refused: HashSet<[u8; 32]>,
}

impl Member {
    fn new(life: u64) -> Self {
        Self {
            life,
            alive: true,
            frozen_until: 0,
            solver_up: true,
            cache: TokenCache::new(),
            denied: Denied::default(),
            last_denial: 0,
            past: Past::default(),
            run: None,
            pending: HashMap::new(),
            owed: None,
            in_redis: 0,
            seen: None,
            keeping: false,
            held_until: 0,
            failures: 0,
            refused: HashSet::new(),
        }
    }

    fn is_usable(&self, token: &Token) -> bool {
        !self.denied.contains_anywhere(token)
    }

    fn usable(&self) -> Option<Arc<Published>> {
        self.cache.current().filter(|current| !self.denied.contains(&current.token))
    }
}

struct World {
    fault: Fault,
    rng: Rng,
    now: u64,
    base: Instant,
    serial: u64,
    operations: u64,
    runs: u64,
    queue: BinaryHeap<Reverse<Scheduled>>,
    members: Vec<Member>,
    server: Model,
    replica: Model,
    redis_up: bool,
    chaotic: bool,
    /// Turns answers into what members see; never connects.
    reader: RedisStore,
    /// The tokens issued until then are dead.
    dead_until: u64,
    /// Who got an epoch, since the last fail-over.
    holders: HashMap<u64, String>,
    solves: u64,
    ended_turns: u64,
}

fn issued_at(token: &Token) -> u64 {
    token.issued_at().map_or(0, |time| time.0 - NOW.0)
}

impl World {
    fn new(seed: u64, fault: Fault, chaotic: bool) -> Self {
        let mut rng = Rng::with_seed(seed);
        let count = rng.usize(2..6);
        let server = Model::with_fault(fault == Fault::Unfenced);
        let mut world = Self {
            fault,
            now: 0,
            base: Instant::now(),
            serial: 0,
            operations: 0,
            runs: 0,
            queue: BinaryHeap::new(),
            members: (0..count).map(|_| Member::new(0)).collect(),
            replica: server.clone(),
            server,
            redis_up: true,
            chaotic,
            reader: redis_store("redis://nowhere"),
            dead_until: 0,
            holders: HashMap::new(),
            solves: 0,
            ended_turns: 0,
            rng,
        };
        world.server.listeners = count;
        for member in 0..count {
            world.start(member);
        }
        if chaotic {
            world.plan_trouble();
        }
        world
    }

    fn plan_trouble(&mut self) {
        for at in (0..CHAOS).step_by(400) {
            self.at(at + self.now, 0, None, Happening::Replicates);
        }
        for _ in 0..self.rng.usize(4..16) {
            let (at, member) = (self.rng.u64(0..CHAOS), self.rng.usize(..self.members.len()));
            let what = match self.rng.u8(..16) {
                0..4 => Happening::TokensDie,
                4..7 => Happening::Freezes,
                7..9 => Happening::Crashes,
                9..12 => Happening::SolverTurns,
                12 | 13 => Happening::RedisGoes,
                _ => Happening::FailsOver,
            };
            self.at(at, member, None, what);
        }
    }

    fn run(mut self) -> Self {
        let end = CHAOS + CALM;
        while let Some(Reverse(next)) = self.queue.pop() {
            if next.at > end {
                break;
            }
            self.now = next.at;
            self.happen(next);
        }
        self.check_agreement();
        self
    }

    fn at(&mut self, at: u64, member: usize, life: Option<u64>, what: Happening) {
        self.serial += 1;
        self.queue.push(Reverse(Scheduled { at, serial: self.serial, member, life, what }));
    }

    fn after(&mut self, delay: u64, member: usize, what: Happening) {
        let life = Some(self.members[member].life);
        self.at(self.now + delay, member, life, what);
    }

    fn instant(&self) -> Instant {
        self.base + Duration::from_millis(self.now)
    }

    fn millis(&self, instant: Instant) -> u64 {
        u64::try_from((instant - self.base).as_millis()).unwrap()
    }

    fn is_chaos(&self) -> bool {
        self.chaotic && self.now < CHAOS
    }

    fn is_dead(&self, token: &Token) -> bool {
        issued_at(token) <= self.dead_until
    }

    fn start(&mut self, member: usize) {
        let first = self.rng.u64(1..1_000);
        self.after(first, member, Happening::Traffic);
        let first = self.rng.u64(1..POLL);
        self.after(first, member, Happening::Poll);
    }

    fn happen(&mut self, next: Scheduled) {
        let member = next.member;
        if let Some(life) = next.life {
            if life != self.members[member].life {
                return;
            }
            let thaw = self.members[member].frozen_until;
            if self.now < thaw && !matches!(next.what, Happening::Restarts) {
                // In the order in which they came.
                self.queue.push(Reverse(Scheduled { at: thaw, ..next }));
                return;
            }
        }
        match next.what {
            Happening::Arrives { from, operation, call } => self.serve(from, operation, &call),
            Happening::Answered { operation, answer } => {
                self.answered(member, operation, Some(&answer));
            }
            Happening::TimedOut { operation } => self.answered(member, operation, None),
            Happening::Notice => self.notice(member),
            Happening::Waited { run, serial } => self.waited(member, run, serial),
            Happening::RenewalDue { run } => self.renew(member, run),
            Happening::SolveEnds { run, alive_since } => self.solve_ends(member, run, alive_since),
            Happening::Traffic => self.traffic(member),
            Happening::Poll => {
                self.look(member, Purpose::Poll);
                self.after(POLL, member, Happening::Poll);
            }
            Happening::KeepAgain => {
                self.members[member].keeping = false;
                self.keep(member);
            }
            other => self.trouble(member, &other),
        }
    }

    fn trouble(&mut self, member: usize, what: &Happening) {
        match what {
            Happening::Freezes => {
                let length = self.rng.u64(500..40_000);
                let thaw = (self.now + length).min(CHAOS);
                let frozen = thaw.saturating_sub(self.now);
                self.members[member].frozen_until = thaw;
                if let Some(run) = &mut self.members[member].run {
                    run.frozen += frozen;
                }
            }
            Happening::Crashes => {
                let life = self.members[member].life + 1;
                self.members[member] = Member { alive: false, ..Member::new(life) };
                let pause = self.rng.u64(100..20_000);
                self.after(pause, member, Happening::Restarts);
            }
            Happening::Restarts => {
                self.members[member].alive = true;
                self.start(member);
            }
            Happening::TokensDie => self.dead_until = self.now,
            Happening::RedisGoes => {
                self.redis_up = false;
                let pause = self.rng.u64(500..20_000);
                self.at(self.now + pause, 0, None, Happening::RedisReturns);
            }
            Happening::RedisReturns => {
                self.redis_up = true;
                if self.rng.u8(..3) == 0 {
                    // Restarted without its data.
                    self.begin_timeline(Model::with_fault(self.fault == Fault::Unfenced));
                }
            }
            Happening::FailsOver => self.begin_timeline(self.replica.clone()),
            Happening::Replicates => {
                if self.rng.bool() {
                    self.replica = self.server.clone();
                }
            }
            Happening::SolverTurns => {
                let up = &mut self.members[member].solver_up;
                *up = !*up;
            }
            _ => unreachable!("{what:?}"),
        }
    }

    fn begin_timeline(&mut self, successor: Model) {
        let (listeners, told) = (self.members.len(), self.server.told);
        self.server = successor;
        (self.server.listeners, self.server.told) = (listeners, told);
        self.server.advance(self.now);
        self.replica = self.server.clone();
        self.holders.clear();
    }

    // The network.

    fn send(&mut self, member: usize, call: &Call, purpose: Purpose) {
        self.operations += 1;
        let operation = self.operations;
        self.members[member].pending.insert(operation, purpose);
        self.after(TIMEOUT, member, Happening::TimedOut { operation });
        let copies = if self.is_chaos() && self.rng.u8(..20) == 0 { 2 } else { 1 };
        for _ in 0..copies {
            if let Some(delay) = self.delay() {
                let arrival = Happening::Arrives { from: member, operation, call: call.clone() };
                // On its way it depends on the sender's life no more.
                self.at(self.now + delay, member, None, arrival);
            }
        }
    }

    /// None: the message is lost.
    fn delay(&mut self) -> Option<u64> {
        if !self.is_chaos() {
            return Some(self.rng.u64(1..5));
        }
        match self.rng.u8(..100) {
            0..4 => None,
            4..8 => Some(self.rng.u64(30..2_500)),
            _ => Some(self.rng.u64(1..30)),
        }
    }

    fn serve(&mut self, from: usize, operation: u64, call: &Call) {
        if !self.redis_up {
            return;
        }
        self.server.advance(self.now);
        let told = self.server.told.0;
        let before = (call.operation == Operation::Commit).then(|| stored(&self.server)).flatten();
        let answer = self.server.run(call);
        self.check_server(before, call, &answer);
        if self.server.told.0 != told {
            for member in 0..self.members.len() {
                if let Some(delay) = self.delay() {
                    self.after(delay, member, Happening::Notice);
                }
            }
        }
        if let Some(delay) = self.delay() {
            self.after(delay, from, Happening::Answered { operation, answer });
        }
    }

    // What must hold on the server.

    fn check_server(&mut self, old: Option<Token>, call: &Call, answer: &Answer) {
        if let (Operation::Enter, Answer::Entrance(entrance)) = (call.operation, answer)
            && entrance.state == "granted"
        {
            let owner = &call.arguments[0];
            let holder = self.holders.entry(entrance.detail).or_insert_with(|| owner.clone());
            assert_eq!(holder, owner, "two holders of epoch {}", entrance.detail);
        }
        if let Some(old) = old
            && let Some(new) = stored(&self.server)
            && issued_at(&new) < issued_at(&old)
        {
            assert!(self.is_dead(&old), "{old:?} gave way to the older {new:?}: {call:?}");
        }
    }

    // A member.

    fn request(&mut self, wish: Wish) -> Request {
        self.operations += 1;
        Request {
            owner: Owner::named(format!("look-{}", self.operations)),
            wish,
            known: Vec::new(),
        }
    }

    fn look(&mut self, member: usize, purpose: Purpose) {
        let request = self.request(Wish::None);
        let call = Call::enter(&request, self.members[member].last_denial);
        self.send(member, &call, purpose);
    }

    fn answered(&mut self, member: usize, operation: u64, answer: Option<&Answer>) {
        let Some(purpose) = self.members[member].pending.remove(&operation) else { return };
        let entrance = self.read_entrance(member, answer);
        match purpose {
            Purpose::Turn { run } => self.turn_answered(member, run, answer, entrance),
            Purpose::Renewal { run, sent_at } => self.renewed(member, run, sent_at, answer),
            Purpose::Keep => self.kept(member, answer),
            Purpose::KeepLook { refusal, with_lease } => {
                self.keep_looked(member, refusal, with_lease, entrance);
            }
            Purpose::Poll => {
                if let Some(entrance) = entrance {
                    self.consider(member, &entrance, false);
                    self.end_run_if_newer(member);
                }
            }
            Purpose::Nothing => {}
        }
    }

    fn read_entrance(&mut self, member: usize, answer: Option<&Answer>) -> Option<Entrance> {
        let member = &mut self.members[member];
        match answer {
            Some(Answer::Entrance(raw)) => {
                let entrance = self.reader.entrance(RawEntrance::clone(raw));
                member.last_denial = entrance.denials.last;
                member.denied.hear(&entrance);
                Some(entrance)
            }
            Some(_) => None,
            None => {
                member.last_denial = 0;
                None
            }
        }
    }

    /// Requests come and find out about the token.
    fn traffic(&mut self, member: usize) {
        let pause = self.rng.u64(500..4_000);
        self.after(pause, member, Happening::Traffic);
        let current = self.members[member].cache.current();
        match current {
            Some(current) if !self.is_dead(&current.token) => {
                if self.members[member].cache.confirm(current.generation) {
                    self.keep(member);
                }
            }
            Some(current) => {
                self.refuse(member, &current.token);
                self.begin_run(member, Wish::Needed, true);
            }
            None => self.begin_run(member, Wish::Needed, false),
        }
    }

    fn refuse(&mut self, member: usize, token: &Token) {
        self.members[member].refused.insert(*token.digest());
        if self.members[member].denied.add(token) {
            self.send(member, &Call::deny(token), Purpose::Nothing);
        }
    }

    fn begin_run(&mut self, member: usize, wish: Wish, in_doubt: bool) {
        if self.members[member].run.is_some() || self.now < self.members[member].held_until {
            return;
        }
        self.runs += 1;
        let number = self.runs;
        let known = self.members[member].cache.current();
        let known = known.map(|current| ValueId::of_token(&current.token));
        let owner = Owner::named(format!("member-{member}-{number}"));
        let (past, dice) = (self.members[member].past, self.rng.fork());
        let mut turn = Turn::new(wish, owner, known, past, dice, self.instant());
        let action = turn.begin(self.instant());
        self.members[member].run = Some(Run {
            number,
            turn,
            started: self.now,
            frozen: 0,
            serial: 0,
            waits: false,
            solving: false,
            in_doubt,
            routine: wish == Wish::Routine,
            entrance: None,
            solution: None,
        });
        self.act(member, action);
    }

    fn run_of(&mut self, member: usize, number: u64) -> Option<&mut Run> {
        self.members[member].run.as_mut().filter(|run| run.number == number)
    }

    fn step(&mut self, member: usize, event: Event) {
        let now = self.instant();
        let Some(run) = &mut self.members[member].run else { return };
        run.waits = false;
        run.serial += 1;
        let action = run.turn.step(now, event);
        self.act(member, action);
    }

    fn act(&mut self, member: usize, action: Action) {
        self.check_budget(member);
        let run = self.members[member].run.as_ref().unwrap().number;
        match action {
            Action::Enter(request) => {
                let call = Call::enter(&request, self.members[member].last_denial);
                self.send(member, &call, Purpose::Turn { run });
            }
            Action::Consider => self.consider_in_turn(member),
            Action::Solve => self.solve(member),
            Action::HandOn(lease, lack) => {
                self.send(member, &Call::hand_on(&lease, lack), Purpose::Turn { run });
            }
            Action::Wait(until) => self.wait(member, until),
            Action::End(end) => self.end(member, end),
        }
    }

    fn check_budget(&self, member: usize) {
        let run = self.members[member].run.as_ref().unwrap();
        let lasted = self.now - run.started - run.frozen.min(self.now - run.started);
        let budget = u64::try_from(WAIT_LIMIT.as_millis()).unwrap() + 2 * LONGEST_SOLVE + MARGIN;
        assert!(lasted <= budget, "a turn has lasted {lasted} ms: {:?}", run.turn);
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

    fn waited(&mut self, member: usize, run: u64, serial: u64) {
        if self.run_of(member, run).is_some_and(|run| run.waits && run.serial == serial) {
            self.step(member, Event::Timer);
        }
    }

    fn notice(&mut self, member: usize) {
        if !self.members[member].alive {
            return;
        }
        if self.members[member].run.as_ref().is_some_and(|run| run.waits) {
            self.step(member, Event::Notice);
        } else {
            self.look(member, Purpose::Poll);
        }
    }

    fn turn_answered(
        &mut self,
        member: usize,
        run: u64,
        answer: Option<&Answer>,
        entrance: Option<Entrance>,
    ) {
        let Some(run) = self.run_of(member, run) else { return };
        match answer {
            Some(Answer::Truth(handed)) => self.step(member, Event::HandedOn(Some(*handed))),
            Some(_) => {
                let situation = entrance.as_ref().map(Situation::of);
                run.entrance = entrance;
                self.step(member, Event::Entered(situation));
            }
            // Whichever it was, no answer is the same to both.
            None if run.turn.lease().is_some() => self.step(member, Event::HandedOn(None)),
            // A lost answer is a late one.
            None if self.rng.bool() => self.step(member, Event::Late),
            None => self.step(member, Event::Entered(None)),
        }
    }

    fn consider_in_turn(&mut self, member: usize) {
        let run = self.members[member].run.as_ref().unwrap();
        let (in_doubt, entrance) = (run.in_doubt, run.entrance.clone().unwrap());
        let mut adopted = self.consider(member, &entrance, in_doubt) == Considered::Adopted;
        let unverified = entrance.unverified.as_ref();
        let unverified = unverified.filter(|_| {
            !adopted && (!entrance.is_unverified_denied || self.fault == Fault::Forgetful)
        });
        if let Some(unverified) = unverified {
            adopted = self.weigh(member, Some(unverified), in_doubt) == Considered::Adopted;
        }
        self.step(member, Event::Considered { adopted });
    }

    fn consider(&mut self, member: usize, entrance: &Entrance, in_doubt: bool) -> Considered {
        let stored = entrance.stored.as_ref();
        if let Some(stored) = stored {
            let ours = self.members[member].usable();
            let ours = ours.filter(|ours| !in_doubt && ours.token == stored.token);
            if let Some(ours) = ours.filter(|_| stored.verified && !stored.foreign) {
                self.members[member].in_redis = ours.generation.0;
                self.members[member].cache.confirm(ours.generation);
            }
            if self.members[member].denied.contains(&stored.token) && !entrance.is_denied {
                self.send(member, &Call::deny(&stored.token), Purpose::Nothing);
            }
        }
        let considered = self.weigh(member, stored, in_doubt);
        if considered == Considered::WriteOurs {
            self.members[member].seen = entrance.value.clone();
            self.members[member].in_redis = 0;
            self.keep(member);
        }
        considered
    }

    fn weigh(
        &mut self,
        member: usize,
        stored: Option<&crate::token::Stored>,
        in_doubt: bool,
    ) -> Considered {
        let forgetful = self.fault == Fault::Forgetful;
        let (ours, decision) = {
            let member = &self.members[member];
            let ours = member.cache.current();
            let usable = |token: &Token| member.is_usable(token);
            let view = View {
                stored,
                stored_usable: stored.is_some_and(|stored| forgetful || usable(&stored.token)),
                ours: ours.as_deref(),
                ours_usable: !in_doubt && ours.as_ref().is_some_and(|ours| usable(&ours.token)),
            };
            let decision = view.decide();
            (ours, decision)
        };
        drop(ours);
        match (decision, stored) {
            (Adoption::WriteOurs, _) => return Considered::WriteOurs,
            (Adoption::Take, Some(stored)) => self.adopt(member, stored, true),
            (Adoption::Examine { newer }, Some(stored)) => match self.verdict(&stored.token) {
                _ if forgetful => self.adopt(member, stored, false),
                Some(true) => self.adopt(member, stored, true),
                Some(false) => {
                    self.refuse(member, &stored.token);
                    return Considered::Nothing;
                }
                None if newer => self.adopt(member, stored, false),
                None => return Considered::Nothing,
            },
            _ => return Considered::Nothing,
        }
        Considered::Adopted
    }

    /// None: there is no telling.
    fn verdict(&mut self, token: &Token) -> Option<bool> {
        let mute = self.is_chaos() && self.rng.u8(..8) == 0;
        (!mute).then(|| !self.is_dead(token))
    }

    fn adopt(&mut self, member: usize, stored: &crate::token::Stored, verified: bool) {
        let refused = self.members[member].refused.contains(stored.token.digest());
        assert!(!refused, "{:?} has been refused here and is adopted", stored.token);
        let candidate = Candidate::new(stored.token.clone(), Source::Redis).verified(verified);
        let generation = self.publish(member, candidate);
        if stored.verified {
            self.members[member].in_redis = generation.0;
        }
    }

    fn publish(&mut self, member: usize, candidate: Candidate) -> Generation {
        let before = self.members[member].cache.current();
        if let Some(before) = before {
            let older = issued_at(&candidate.token) < issued_at(&before.token);
            let dead = self.is_dead(&before.token);
            assert!(!older || dead, "{:?} was put in force after {before:?}", candidate.token);
        }
        self.members[member].held_until = 0;
        let published = self.members[member].cache.publish(candidate, NOW);
        self.keep(member);
        published.generation
    }

    fn end_run_if_newer(&mut self, member: usize) {
        let newer =
            self.members[member].usable().is_some_and(|usable| !self.is_dead(&usable.token));
        if newer && let Some(run) = self.members[member].run.take() {
            // As in production: whatever the run is at, it is over.
            self.ended_turns += 1;
            if let Some(lease) = run.turn.lease() {
                self.send(member, &Call::release(&lease.owner), Purpose::Nothing);
            }
        }
    }

    fn solve(&mut self, member: usize) {
        self.solves += 1;
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

    fn renew(&mut self, member: usize, run: u64) {
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

    fn renewed(&mut self, member: usize, number: u64, sent_at: u64, answer: Option<&Answer>) {
        let sent = self.base + Duration::from_millis(sent_at);
        let Some(run) = self.run_of(member, number).filter(|run| run.solving) else { return };
        let ours = match answer {
            Some(Answer::Truth(ours)) => Some(*ours),
            _ => None,
        };
        run.turn.renewed(sent, ours);
        let renew_at = run.turn.renew_at();
        self.plan_renewal(member, number, renew_at);
    }

    fn solve_ends(&mut self, member: usize, number: u64, alive_since: u64) {
        let luck = if self.is_chaos() { self.rng.u8(..20) } else { 10 };
        let solver_up = self.members[member].solver_up || !self.is_chaos();
        let Some(run) = self.run_of(member, number) else { return };
        run.solving = false;
        if !solver_up || luck == 0 {
            return self
                .step(member, Event::SolveFailed { lack: (!solver_up).then_some(Lack::Away) });
        }
        let token = issued(&format!("{number}"), NOW.0 + alive_since);
        let verdict = self.verdict(&token);
        if verdict == Some(false) {
            return self.step(member, Event::SolveFailed { lack: None });
        }
        let candidate = Candidate::new(token, Source::Direct).verified(verdict.is_some());
        self.members[member].run.as_mut().unwrap().solution = Some(candidate);
        self.step(member, Event::Solved);
    }

    fn end(&mut self, member: usize, end: End) {
        self.ended_turns += 1;
        let run = self.members[member].run.take().unwrap();
        self.members[member].past = run.turn.past();
        let lease = run.turn.lease().cloned();
        match end {
            End::Publish(lease) => {
                let candidate = run.solution.unwrap();
                let token = candidate.token.clone();
                self.members[member].owed = lease.map(|lease| (token, lease));
                self.members[member].failures = 0;
                self.publish(member, candidate);
            }
            End::Adopted => {
                self.members[member].failures = 0;
                if let Some(lease) = lease {
                    self.send(member, &Call::release(&lease.owner), Purpose::Nothing);
                }
            }
            End::Failed => self.failed(member, lease, run.routine),
            End::Elsewhere(backoff) => {
                let left = u64::try_from(backoff.left.as_millis()).unwrap();
                let failures = self.members[member].failures.max(backoff.failures);
                self.members[member].failures = failures;
                self.members[member].held_until = self.now + left;
            }
            End::TooSoon(left) => {
                assert!(left <= ALONE_PAUSE);
                let left = u64::try_from(left.as_millis()).unwrap();
                self.members[member].held_until = self.now + left;
            }
        }
    }

    fn failed(&mut self, member: usize, lease: Option<Lease>, routine: bool) {
        let failures = self.members[member].failures;
        let pause = (5_000 << failures.min(5)).min(60_000);
        self.members[member].failures += 1;
        self.members[member].held_until = self.now + pause;
        if let Some(lease) = lease {
            let backoff = SharedBackoff {
                error: "failed".to_owned(),
                failures: failures + 1,
                routine,
                epoch: 0,
                left: Duration::from_millis(pause),
            };
            self.send(member, &Call::fail(&lease, &backoff), Purpose::Nothing);
        }
    }

    // What keeps Redis in step.

    fn keep(&mut self, member: usize) {
        let m = &self.members[member];
        if m.keeping {
            return;
        }
        let Some(published) = m.usable().filter(|usable| m.is_usable(&usable.token)) else {
            return;
        };
        let lease = m.owed.as_ref().filter(|(owed, _)| *owed == published.token);
        let lease = lease.map(|(_, lease)| lease.clone());
        let call = match (&lease, published.is_verified()) {
            (Some(lease), false) => {
                self.members[member].owed = None;
                let call = Call::share(&published, lease, 80_000);
                return self.send(member, &call, Purpose::Nothing);
            }
            (None, false) => return,
            (None, true) if published.generation.0 <= m.in_redis => return,
            _ => Call::commit(&published, lease.as_ref(), m.seen.as_ref(), (NOW, 80_000)),
        };
        self.members[member].keeping = true;
        self.send(member, &call, Purpose::Keep);
    }

    fn kept(&mut self, member: usize, answer: Option<&Answer>) {
        let m = &mut self.members[member];
        let Some(Answer::Outcome(outcome)) = answer else {
            return self.after(2_000, member, Happening::KeepAgain);
        };
        let outcome = crate::token::redis::committed(outcome).unwrap();
        let Some(current) = m.cache.current() else { return };
        let with_lease = m.owed.take_if(|(owed, _)| *owed == current.token).is_some();
        if outcome == Commit::Committed {
            m.in_redis = current.generation.0;
            m.seen = None;
            return self.after(0, member, Happening::KeepAgain);
        }
        self.look(member, Purpose::KeepLook { refusal: outcome, with_lease });
    }

    fn keep_looked(
        &mut self,
        member: usize,
        refusal: Commit,
        with_lease: bool,
        entrance: Option<Entrance>,
    ) {
        if let Some(entrance) = entrance {
            let considered = self.consider(member, &entrance, false);
            match after_refusal(refusal, considered, with_lease) {
                Next::Leave => {
                    let m = &mut self.members[member];
                    m.in_redis = m.cache.current().map_or(0, |current| current.generation.0);
                }
                Next::Replace { .. } => self.members[member].seen = entrance.value,
            }
            self.end_run_if_newer(member);
        }
        self.after(100, member, Happening::KeepAgain);
    }

    /// In the end everybody has the token that is stored.
    fn check_agreement(&self) {
        let stored = stored(&self.server).expect("nothing is stored in the end");
        assert!(!self.is_dead(&stored), "a dead token is stored in the end");
        for (number, member) in self.members.iter().enumerate() {
            let token = member.cache.current().map(|current| current.token.clone());
            let run = member.run.as_ref().map(|run| &run.turn);
            assert_eq!(token.as_ref(), Some(&stored), "member {number}, {run:?}");
        }
    }
}

fn stored(server: &Model) -> Option<Token> {
    let text = std::str::from_utf8(server.text(TOKEN)?).unwrap();
    Some(Token::parse(text).unwrap())
}

fn simulate(seed: u64, fault: Fault) {
    World::new(seed, fault, true).run();
}

/// Runs the seeds until one shows the fault.
fn shows(fault: Fault, seeds: u64) -> Option<String> {
    (0..seeds).find_map(|seed| {
        let panicked = std::panic::catch_unwind(|| simulate(seed, fault)).err()?;
        let text = panicked.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panicked.downcast_ref::<&str>().copied());
        Some(format!("seed {seed}: {}", text.unwrap_or_default()))
    })
}

#[test]
fn whatever_goes_wrong_nothing_goes_backwards_and_all_agree_in_the_end() {
    for seed in 0..SEEDS {
        println!("seed {seed}");
        simulate(seed, Fault::None);
    }
}

#[test]
#[ignore = "takes minutes"]
fn ten_thousand_histories_go_well() {
    for seed in 0..10_000 {
        println!("seed {seed}");
        simulate(seed, Fault::None);
    }
}

#[test]
fn a_commit_without_fencing_is_found() {
    let shown = shows(Fault::Unfenced, SEEDS).expect("no seed shows it");
    assert!(shown.contains("gave way to the older"), "{shown}");
}

#[test]
fn a_member_that_forgets_refusals_is_found() {
    let shown = shows(Fault::Forgetful, SEEDS).expect("no seed shows it");
    assert!(shown.contains("has been refused here and is adopted"), "{shown}");
}

#[test]
fn a_wait_for_notices_alone_is_found() {
    let shown = shows(Fault::Trusting, SEEDS).expect("no seed shows it");
    assert!(shown.contains("in the end") || shown.contains("member"), "{shown}");
}

#[test]
fn in_quiet_times_one_solve_serves_the_fleet() {
    for seed in 0..20 {
        let world = World::new(seed, Fault::None, false).run();
        assert_eq!(world.solves, 1, "seed {seed}");
    }
}
