//! What must hold, whatever happens.

use std::collections::HashMap;

use super::*;
use crate::refresh::fleet::turn::WAIT_LIMIT;
use crate::token::redis::Operation;
use crate::token::{Candidate, Published, Source};

/// What a server has granted.
#[derive(Clone, Default)]
pub(super) struct Ledger {
    /// How often a fail-over has lost what was acknowledged.
    timeline: u64,
    holders: HashMap<u64, String>,
    /// The last epoch.
    last: u64,
    /// The timeline in which each owner got its epoch. That a server forgets it
    /// does not undo it.
    grants: HashMap<(String, u64), u64>,
}

impl Ledger {
    /// This one, of the successor of the server that had `lost`.
    pub(super) fn after(self, lost: &Self) -> Self {
        Self { timeline: lost.timeline + 1, grants: lost.grants.clone(), ..self }
    }

    fn note(&mut self, owner: &str, epoch: u64) {
        let holder = self.holders.entry(epoch).or_insert_with(|| owner.to_owned());
        assert_eq!(holder, owner, "two holders of epoch {epoch}");
        self.last = epoch;
        self.grants.insert((owner.to_owned(), epoch), self.timeline);
    }
}

impl World {
    // On the server.

    pub(super) fn check_server(&mut self, old: Option<&Token>, call: &Call, answer: &Answer) {
        let owner = &call.arguments[0];
        match answer {
            Answer::Entrance(entrance) if entrance.state == "granted" => {
                self.ledger.note(owner, entrance.detail);
            }
            Answer::Outcome("committed") if call.operation == Operation::Commit => {
                self.check_commit(old, call);
            }
            Answer::Outcome("lost" | "fenced") => self.count("stale writer refused"),
            _ => {}
        }
    }

    /// Called where something was written.
    pub(super) fn check_epoch(&self, call: &Call) {
        let by_lease = matches!(call.operation, Operation::Commit | Operation::Share);
        if by_lease && !call.arguments[0].is_empty() {
            let (epoch, last) = (&call.arguments[1], self.ledger.last);
            assert_eq!(*epoch, last.to_string(), "epoch {epoch} has written after epoch {last}");
        }
    }

    fn check_commit(&self, old: Option<&Token>, call: &Call) {
        if let Some(old) = old
            && let Some(new) = stored(&self.server)
            && issued_at(&new) < issued_at(old)
        {
            assert!(self.is_dead(old), "{old:?} gave way to the older {new:?}: {call:?}");
        }
    }

    // At the members.

    pub(super) fn check_members(&mut self) {
        let mut believers = HashMap::new();
        for (number, member) in self.members.iter().enumerate() {
            let served = member.run.is_some() || member.waiters.is_empty();
            assert!(served, "requests wait for no run of member {number}");
            let Some(lease) = member.run.as_ref().and_then(|run| run.turn.lease()) else {
                continue;
            };
            let grant = (lease.owner.as_str().to_owned(), lease.epoch);
            let timeline = self.ledger.grants.get(&grant).copied();
            let other = believers.insert((timeline, lease.epoch), number);
            let epoch = lease.epoch;
            assert_eq!(other, None, "{number} believes too that it has the lease of {epoch}");
            assert!(timeline.is_some(), "{number} believes that it has the lease of {epoch}");
        }
        if believers.len() > 1 {
            self.count("two believe in leases");
        }
    }

    /// `before` is about to give way to `candidate`.
    pub(super) fn check_publication(
        &self,
        before: Option<&Published>,
        candidate: &Candidate,
        is_foreign: bool,
    ) {
        let token = &candidate.token;
        let is_store = candidate.source == Source::Redis;
        // An own one may have waited in reserve until Redis was back.
        let is_live = !is_store || token.is_live(self.timestamp());
        assert!(is_live, "{token:?} has expired and is put in force");
        let is_good = !candidate.verified || !is_foreign || !self.is_dead(token);
        assert!(is_good, "{token:?} is dead and counts as verified");
        if let Some(before) = before
            && issued_at(token) < issued_at(&before.token)
        {
            // An operator's word counts, whatever its age.
            let may = is_store && is_foreign || self.is_dead(&before.token);
            assert!(may, "{token:?} was put in force after {before:?}");
        }
    }

    pub(super) fn check_budget(&self, member: usize) {
        let run = self.members[member].run.as_ref().unwrap();
        let lasted = self.now - run.started - run.frozen.min(self.now - run.started);
        let budget = millis(WAIT_LIMIT) + 2 * LONGEST_SOLVE + MARGIN;
        assert!(lasted <= budget, "a turn has lasted {lasted} ms: {:?}", run.turn);
    }

    /// The answer to a request that has been held since `since`: whether there
    /// was a token for it, and whether it came in time.
    pub(super) fn check_answer(&mut self, member: usize, since: u64, served: bool, in_time: bool) {
        self.count(match (served, in_time) {
            (true, _) => "request served",
            (false, true) => "request passed on",
            (false, false) => "request timed out",
        });
        let lasted = self.now - since;
        let is_well = !self.chaotic || since >= CHAOS + AFTERMATH;
        let run = self.members[member].run.as_ref().map(|run| &run.turn);
        assert!(in_time || !is_well, "a request has waited in vain at {member}: {run:?}");
        let is_last = !self.chaotic || since >= LAST_DEATH;
        assert!(served || !is_last, "a request was held {lasted} ms at {member} for nothing");
    }

    /// In the end everybody has the token that is stored.
    pub(super) fn check_agreement(&self) {
        let stored = stored(&self.server).expect("nothing is stored in the end");
        assert!(!self.is_dead(&stored), "a dead token is stored in the end");
        for (number, member) in self.members.iter().enumerate() {
            let token = member.cache.current().map(|current| current.token.clone());
            let run = member.run.as_ref().map(|run| &run.turn);
            assert_eq!(token.as_ref(), Some(&stored), "in the end at member {number}, {run:?}");
        }
        let late = self.solves - self.solves_before;
        assert!(late <= 1, "{late} solves for one death in the end");
    }
}
