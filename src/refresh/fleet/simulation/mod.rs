//! A fleet in a world of its own: the decisions that production makes, and the
//! model of Redis's scripts, with virtual time and everything that goes wrong.
//!
//! Each seed is another history: messages late, lost or twice, members frozen,
//! killed and started anew, solvers away, Redis down, fail-overs to a replica
//! that lags behind, tokens that expire or are dead by surprise, values that
//! other programs leave. Then all of that ceases. Much later the token dies once
//! more, and in the end the fleet has to agree.
//!
//! The file, the wall and its clearance, and solves that come late are not in it.
//!
//! Turns, schedules, what is remembered of the fleet and of refusals, and what
//! to do about a stored value are production's own code. Its tasks, which wait
//! for each other, are happenings here; a verdict takes no time.
//!
//! A fail-over that loses what was acknowledged is the one way back that the
//! stored token may take: it starts a new timeline, within which nothing goes
//! backwards again.

mod invariants;
mod keeper;
mod member;
mod network;
mod run;
mod tests;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use fastrand::Rng;
use tokio::time::Instant;

use crate::refresh::testing::{issued_for, redis_store};
use crate::token::redis::Call;
use crate::token::redis::model::{Answer, Content, Flaw, Model, TOKEN};
use crate::token::{RedisStore, Timestamp, Token};

use invariants::Ledger;
use member::Member;

/// How long things go wrong, and how long they go well afterwards; ms.
const CHAOS: u64 = 60_000;
const CALM: u64 = 420_000;
/// What the trouble may leave behind: Redis comes back, tokens expire, leases
/// lapse, solves that fail end.
const AFTERMATH: u64 = 40_000;
/// When the token dies once more, with all well and no back-off on.
const LAST_DEATH: u64 = CHAOS + 350_000;
const END: u64 = CHAOS + CALM;
const LONGEST_SOLVE: u64 = 20_000;
const TIMEOUT: u64 = 1_000;
const POLL: u64 = 10_000;
/// From one look at a solver that is missed to the next, and the longest that a
/// schedule sleeps.
const PROBE: u64 = 30_000;
/// How long a request is held.
const HOLD: u64 = 60_000;
/// What a turn may last beside waiting and solving.
const MARGIN: u64 = 30_000;
/// How long tokens live that do not expire within a history.
const LONG_LIFE: u64 = 10_000_000;
/// All tokens are of this moment or later. Their clock counts a second in each
/// of the world's milliseconds.
const NOW: Timestamp = Timestamp(1_000_000);

/// A fault on purpose, which the invariants have to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Redis has one.
    Redis(Flaw),
    /// A member that is told to wait believes that it has the lease.
    Usurping,
    /// Members adopt what they know to be refused.
    Forgetful,
    /// Members do not hear what others have seen refused.
    Deaf,
    /// Members do not mind that a token has expired.
    Timeless,
    /// Members believe what other programs have left.
    Credulous,
    /// Whoever waits hears notices, and never looks without.
    Trusting,
}

impl Fault {
    fn server(self) -> Model {
        match self {
            Self::Redis(flaw) => Model::with_flaw(flaw),
            _ => Model::default(),
        }
    }
}

/// What another program does to the stored token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Foreign {
    /// It has got a new one.
    Newer,
    /// It puts back one that works still.
    Older,
    /// It puts back one that does not.
    Dead,
    /// It puts back one that has just expired.
    Expired,
    /// What it writes is no token.
    Rubbish,
    Deletes,
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
    /// The time of a held request is over.
    HoldEnds {
        waiter: u64,
    },
    RunDue {
        serial: u64,
    },
    Poll,
    Probe,
    KeepAgain {
        serial: u64,
    },
    Restarts,
    Freezes,
    Crashes,
    ByHand,
    TokensDie,
    Writes(Foreign),
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

struct World {
    fault: Fault,
    rng: Rng,
    now: u64,
    base: Instant,
    serial: u64,
    operations: u64,
    runs: u64,
    waiters: u64,
    queue: BinaryHeap<Reverse<Scheduled>>,
    members: Vec<Member>,
    server: Model,
    replica: Model,
    ledger: Ledger,
    /// As of the replica.
    replica_ledger: Ledger,
    redis_up: bool,
    chaotic: bool,
    /// Turns answers into what members see; never connects.
    reader: RedisStore,
    /// The tokens issued until then are dead.
    dead_until: u64,
    solves: u64,
    /// Of these, before the last death.
    solves_before: u64,
    /// What has happened how often, so that no invariant holds for want of it.
    tally: BTreeMap<&'static str, u64>,
}

fn issued_at(token: &Token) -> u64 {
    token.issued_at().map_or(0, |time| time.0 - NOW.0)
}

fn stored(server: &Model) -> Option<Token> {
    Token::parse(std::str::from_utf8(server.text(TOKEN)?).ok()?).ok()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap()
}

impl World {
    fn new(seed: u64, fault: Fault, chaotic: bool) -> Self {
        let mut rng = Rng::with_seed(seed);
        let count = rng.usize(2..6);
        let mut world = Self {
            fault,
            now: 0,
            base: Instant::now(),
            serial: 0,
            operations: 0,
            runs: 0,
            waiters: 0,
            queue: BinaryHeap::new(),
            members: (0..count).map(|_| Member::new(0)).collect(),
            server: fault.server(),
            replica: fault.server(),
            ledger: Ledger::default(),
            replica_ledger: Ledger::default(),
            redis_up: true,
            chaotic,
            reader: redis_store("redis://nowhere"),
            dead_until: 0,
            solves: 0,
            solves_before: 0,
            tally: BTreeMap::new(),
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
            self.at(at, 0, None, Happening::Replicates);
        }
        for _ in 0..self.rng.usize(4..20) {
            let (at, member) = (self.rng.u64(0..CHAOS), self.rng.usize(..self.members.len()));
            let what = match self.rng.u8(..20) {
                0..4 => Happening::TokensDie,
                4..7 => Happening::Freezes,
                7..9 => Happening::Crashes,
                9..12 => Happening::SolverTurns,
                12 | 13 => Happening::RedisGoes,
                14 | 15 => Happening::FailsOver,
                16 => Happening::ByHand,
                _ => Happening::Writes(self.any_foreign()),
            };
            self.at(at, member, None, what);
        }
        self.at(LAST_DEATH, 0, None, Happening::TokensDie);
    }

    fn any_foreign(&mut self) -> Foreign {
        let all = [
            Foreign::Newer,
            Foreign::Older,
            Foreign::Dead,
            Foreign::Expired,
            Foreign::Rubbish,
            Foreign::Deletes,
        ];
        all[self.rng.usize(..all.len())]
    }

    fn run(self) -> Self {
        let world = self.run_until(END);
        world.check_agreement();
        world
    }

    fn run_until(mut self, end: u64) -> Self {
        while self.queue.peek().is_some_and(|Reverse(next)| next.at <= end) {
            let Some(Reverse(next)) = self.queue.pop() else { break };
            self.now = next.at;
            self.happen(next);
            self.check_members();
        }
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

    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    fn instant(&self) -> Instant {
        self.base + Duration::from_millis(self.now)
    }

    fn millis(&self, instant: Instant) -> u64 {
        millis(instant - self.base)
    }

    /// What the clock of the tokens says.
    fn timestamp(&self) -> Timestamp {
        Timestamp(NOW.0 + self.now)
    }

    fn jitter(&mut self) -> f64 {
        0.9 + 0.2 * self.rng.f64()
    }

    fn is_chaos(&self) -> bool {
        self.chaotic && self.now < CHAOS
    }

    /// Whether the API refuses it.
    fn is_dead(&self, token: &Token) -> bool {
        issued_at(token) <= self.dead_until || !token.is_live(self.timestamp())
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
            Happening::HoldEnds { waiter } => self.hold_ends(member, waiter),
            Happening::RunDue { serial } => self.run_due(member, serial),
            Happening::Poll => self.poll(member),
            Happening::Probe => self.probe(member),
            Happening::KeepAgain { serial } => self.keep_again(member, serial),
            other => self.trouble(member, &other),
        }
    }

    fn trouble(&mut self, member: usize, what: &Happening) {
        match what {
            Happening::Freezes => self.freeze(member),
            Happening::Crashes => {
                let life = self.members[member].life + 1;
                self.members[member] = Member { alive: false, ..Member::new(life) };
                let pause = self.rng.u64(100..20_000);
                self.after(pause, member, Happening::Restarts);
            }
            Happening::Restarts => self.start(member),
            Happening::ByHand => self.refresh_by_hand(member),
            Happening::TokensDie => {
                self.dead_until = self.now;
                self.solves_before = self.solves;
            }
            Happening::Writes(foreign) => self.write(*foreign),
            Happening::RedisGoes => {
                self.redis_up = false;
                let pause = self.rng.u64(500..20_000);
                self.at(self.now + pause, 0, None, Happening::RedisReturns);
            }
            Happening::RedisReturns => {
                self.redis_up = true;
                if self.rng.u8(..3) == 0 {
                    // Restarted without its data.
                    self.begin_timeline(self.fault.server(), Ledger::default());
                }
            }
            Happening::FailsOver => {
                self.begin_timeline(self.replica.clone(), self.replica_ledger.clone());
            }
            Happening::Replicates => {
                if self.rng.bool() {
                    self.replica = self.server.clone();
                    self.replica_ledger = self.ledger.clone();
                }
            }
            Happening::SolverTurns => {
                let up = &mut self.members[member].solver_up;
                *up = !*up;
            }
            _ => unreachable!("{what:?}"),
        }
    }

    fn freeze(&mut self, member: usize) {
        let length = self.rng.u64(500..40_000);
        let thaw = (self.now + length).min(CHAOS);
        let frozen = thaw.saturating_sub(self.now);
        self.members[member].frozen_until = thaw;
        if let Some(run) = &mut self.members[member].run {
            run.frozen += frozen;
        }
    }

    fn begin_timeline(&mut self, successor: Model, ledger: Ledger) {
        let (listeners, told) = (self.members.len(), self.server.told);
        self.server = successor;
        (self.server.listeners, self.server.told) = (listeners, told);
        self.server.advance(self.now);
        self.ledger = ledger.after(&self.ledger);
        self.replica = self.server.clone();
        self.replica_ledger = self.ledger.clone();
    }

    /// Another program writes the token, by a plain SET.
    fn write(&mut self, foreign: Foreign) {
        if !self.redis_up {
            return;
        }
        self.server.advance(self.now);
        let value = match foreign {
            Foreign::Deletes => return self.server.delete([TOKEN]),
            Foreign::Rubbish => "no token at all".to_owned(),
            Foreign::Newer => self.foreign_token(self.now, LONG_LIFE),
            Foreign::Older => {
                let newest = stored(&self.server).map_or(self.now, |stored| issued_at(&stored));
                let oldest = (self.dead_until + 1).min(newest);
                let iat = self.rng.u64(oldest..=newest);
                self.foreign_token(iat, LONG_LIFE)
            }
            Foreign::Dead => self.foreign_token(self.dead_until, LONG_LIFE),
            Foreign::Expired => self.foreign_token(self.now, 0),
        };
        self.server.put(TOKEN, Content::Text(value.into()), None);
    }

    fn foreign_token(&mut self, iat: u64, life: u64) -> String {
        self.serial += 1;
        issued_for(&format!("foreign-{}", self.serial), NOW.0 + iat, life).expose().to_owned()
    }

    /// What the shop gives out.
    fn new_token(&mut self, name: u64, issued_at: u64) -> Token {
        let is_short = self.is_chaos() && self.rng.u8(..3) == 0;
        let life = if is_short { self.rng.u64(3_000..60_000) } else { LONG_LIFE };
        issued_for(&name.to_string(), NOW.0 + issued_at, life)
    }
}
