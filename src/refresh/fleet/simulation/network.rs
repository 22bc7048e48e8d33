//! Messages between the members and Redis.

use super::member::Purpose;
use super::*;
use crate::token::redis::{Operation, RawEntrance};
use crate::token::{Entrance, Owner, Request, Wish};

impl World {
    pub(super) fn send(&mut self, member: usize, call: &Call, purpose: Purpose) {
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

    pub(super) fn serve(&mut self, from: usize, operation: u64, call: &Call) {
        if !self.redis_up {
            return;
        }
        self.server.advance(self.now);
        let told = self.server.told.0;
        let before = (call.operation == Operation::Commit).then(|| stored(&self.server)).flatten();
        let answer = self.server.run(call);
        self.check_server(before.as_ref(), call, &answer);
        if self.server.told.0 != told {
            self.check_epoch(call);
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

    pub(super) fn look(&mut self, member: usize, purpose: Purpose) {
        self.operations += 1;
        let owner = Owner::named(format!("look-{}", self.operations));
        let request = Request { owner, wish: Wish::None, known: Vec::new() };
        let call = Call::enter(&request, self.members[member].last_denial);
        self.send(member, &call, purpose);
    }

    pub(super) fn answered(&mut self, member: usize, operation: u64, answer: Option<&Answer>) {
        let Some(purpose) = self.members[member].pending.remove(&operation) else { return };
        let truth = match answer {
            Some(Answer::Truth(truth)) => Some(*truth),
            _ => None,
        };
        match purpose {
            Purpose::Enter { run } => {
                let entrance = self.read_entrance(member, answer);
                self.entered(member, run, entrance);
            }
            Purpose::HandOn { run } => self.handed_on(member, run, truth),
            Purpose::Renewal { run, sent_at } => self.renewed(member, run, sent_at, truth),
            Purpose::Load { run } => {
                let entrance = self.read_look(member, answer);
                self.loaded(member, run, entrance.as_ref());
            }
            Purpose::Poll => {
                if let Some(entrance) = self.read_look(member, answer) {
                    self.polled(member, &entrance);
                }
            }
            Purpose::Commit { ours, lease } => self.committed(member, ours, lease, answer),
            Purpose::Share { ours, lease } => self.shared(member, &ours, lease, answer),
            Purpose::RefusedLook { ours, refusal, lease } => {
                let entrance = self.read_look(member, answer);
                self.considered_refusal(member, &ours, refusal, lease, entrance);
            }
            Purpose::GiveBack(owner) if truth.is_none() => self.members[member].fleet.doubt(owner),
            Purpose::Fail(lease) if truth.is_none() => {
                self.send(member, &Call::release(&lease.owner), Purpose::Nothing);
            }
            Purpose::TryRedis if truth.is_some() => self.redis_is_back(member),
            Purpose::GiveBack(_) | Purpose::Fail(_) | Purpose::TryRedis | Purpose::Nothing => {}
        }
    }

    /// An answer to a look, whoever's turn it is.
    fn read_look(&mut self, member: usize, answer: Option<&Answer>) -> Option<Entrance> {
        let entrance = self.read_entrance(member, answer)?;
        self.give_back_doubtful(member);
        Some(entrance)
    }

    fn read_entrance(&mut self, member: usize, answer: Option<&Answer>) -> Option<Entrance> {
        let Some(Answer::Entrance(raw)) = answer else {
            self.members[member].last_denial = 0;
            return None;
        };
        let entrance = self.reader.entrance(RawEntrance::clone(raw));
        let is_deaf = self.fault == Fault::Deaf;
        let m = &mut self.members[member];
        m.last_denial = entrance.denials.last;
        m.told.extend(entrance.denials.digests.iter().copied());
        if !is_deaf {
            m.denied.hear(&entrance);
        }
        Some(entrance)
    }
}
