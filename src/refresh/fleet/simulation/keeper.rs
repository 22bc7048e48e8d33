//! What keeps Redis and the token in force in step, beside the runs.

use std::sync::Arc;

use super::member::Purpose;
use super::*;
use crate::refresh::adoption::{Adoption, is_acceptable, is_in_step};
use crate::refresh::fleet::{Considered, Next, Saving, Writing, after_refusal};
use crate::refresh::verifier::Opinion;
use crate::token::redis::committed;
use crate::token::{Candidate, Commit, Entrance, Lease, Published, Source, Stored};

impl World {
    pub(super) fn poll(&mut self, member: usize) {
        self.look(member, Purpose::Poll);
        let pause = self.rng.u64(POLL * 3 / 4..POLL * 5 / 4);
        self.after(pause, member, Happening::Poll);
    }

    pub(super) fn polled(&mut self, member: usize, entrance: &Entrance) {
        if self.consider(member, entrance, false) != Considered::Adopted {
            self.doubt_ours(member);
            self.try_redis(member);
        }
        self.overtake(member);
    }

    /// Another member has seen our token refused: asks about it, once.
    fn doubt_ours(&mut self, member: usize) {
        let heard =
            |ours: &Arc<Published>| self.members[member].denied.contains_anywhere(&ours.token);
        let Some(ours) = self.usable(member).filter(heard) else { return };
        let asked_about = std::mem::replace(&mut self.members[member].doubted, ours.generation.0);
        if asked_about != ours.generation.0 && self.verdict(&ours.token) == Some(false) {
            self.deny(member, &ours.token);
        }
    }

    /// Where it has gone without Redis, finds out whether it takes writes.
    fn try_redis(&mut self, member: usize) {
        let m = &self.members[member];
        let current = m.cache.current().filter(|_| m.fleet.is_alone());
        if let Some(current) = current.filter(|current| !self.is_usable(member, &current.token)) {
            self.send(member, &Call::deny(&current.token), Purpose::TryRedis);
        }
    }

    pub(super) fn consider(
        &mut self,
        member: usize,
        entrance: &Entrance,
        in_doubt: bool,
    ) -> Considered {
        let stored = entrance.stored.as_ref();
        if let Some(stored) = stored {
            let ours = self.usable(member).filter(|ours| !in_doubt && is_in_step(stored, ours));
            if let Some(ours) = ours {
                self.members[member].in_redis = ours.generation.0;
                self.prove(member, &ours);
            }
            if self.members[member].denied.contains(&stored.token) && !entrance.is_denied {
                self.send(member, &Call::deny(&stored.token), Purpose::Nothing);
            }
        }
        let considered = self.weigh(member, stored, in_doubt);
        if considered == Considered::WriteOurs {
            let m = &mut self.members[member];
            m.seen = entrance.value.clone();
            m.in_redis = 0;
            self.keep(member);
        }
        considered
    }

    pub(super) fn weigh(
        &mut self,
        member: usize,
        stored: Option<&Stored>,
        in_doubt: bool,
    ) -> Considered {
        let ours = self.members[member].cache.current();
        let decision = self.view(member, stored, ours.as_deref(), in_doubt).decide();
        let minds = |stored: &Stored| {
            let m = &self.members[member];
            !m.denied.contains(&stored.token) && m.denied.contains_anywhere(&stored.token)
        };
        if stored.is_some_and(minds) {
            self.count("refusal elsewhere minded");
        }
        match (decision, stored) {
            (Adoption::WriteOurs, _) => return Considered::WriteOurs,
            (Adoption::Take, Some(stored)) => self.adopt(member, stored, true),
            (Adoption::Examine { newer }, Some(stored)) => {
                let opinion = self.examine(member, stored);
                if !is_acceptable(opinion, newer) {
                    return Considered::Nothing;
                }
                self.adopt(member, stored, opinion == Opinion::Good);
            }
            _ => return Considered::Nothing,
        }
        Considered::Adopted
    }

    fn examine(&mut self, member: usize, stored: &Stored) -> Opinion {
        let is_believed = match self.fault {
            Fault::Credulous => stored.foreign,
            // It would show anew.
            Fault::Forgetful | Fault::Deaf => !stored.foreign,
            _ => false,
        };
        match self.verdict(&stored.token) {
            _ if is_believed => Opinion::Good,
            Some(true) => Opinion::Good,
            Some(false) => {
                self.deny(member, &stored.token);
                Opinion::Bad
            }
            None => Opinion::Unknown,
        }
    }

    pub(super) fn adopt(&mut self, member: usize, stored: &Stored, verified: bool) {
        let (token, m) = (&stored.token, &self.members[member]);
        assert!(!m.refused.contains(token.digest()), "{token:?} is adopted where it was refused");
        let is_told = m.told.contains(token.digest());
        assert!(!is_told, "{token:?} is adopted where its refusal was heard of");
        let candidate = Candidate::new(token.clone(), Source::Redis).verified(verified);
        let adopted = self.publish(member, candidate, stored.foreign);
        self.count(match (stored.foreign, stored.verified) {
            (true, _) => "foreign token adopted",
            (false, true) => "committed token adopted",
            (false, false) => "shared token adopted",
        });
        self.redis_is_back(member);
        if stored.cookies_agree && !stored.foreign && stored.verified {
            self.members[member].in_redis = adopted.generation.0;
        }
    }

    // Writes.

    /// There is something new that may have to be written.
    pub(super) fn keep(&mut self, member: usize) {
        if self.members[member].keeping {
            self.members[member].keep_news = true;
            return;
        }
        // Later, as a task that is woken: what goes on now comes first.
        self.keep_in(member, Duration::ZERO);
    }

    fn keep_in(&mut self, member: usize, pause: Duration) {
        self.members[member].keep_serial += 1;
        let serial = self.members[member].keep_serial;
        self.after(millis(pause), member, Happening::KeepAgain { serial });
    }

    pub(super) fn keep_again(&mut self, member: usize, serial: u64) {
        if self.members[member].keep_serial == serial && !self.members[member].keeping {
            self.save(member);
        }
    }

    fn save(&mut self, member: usize) {
        let ours = self.usable(member).filter(|ours| self.is_usable(member, &ours.token));
        let m = &mut self.members[member];
        m.keeping = true;
        let lease = ours.as_ref().and_then(|ours| m.fleet.owed_with(&ours.token));
        if lease.is_none() {
            let overtaken = m.fleet.settle();
            self.give_back(member, overtaken);
        }
        let m = &self.members[member];
        match Writing::of(ours.as_ref(), lease, m.in_redis) {
            Writing::Share(ours, lease) => {
                let call = Call::share(&ours, &lease, self.seconds_to_live(&ours));
                self.send(member, &call, Purpose::Share { ours, lease });
            }
            Writing::Commit(ours, lease) => {
                let times = (self.timestamp(), self.seconds_to_live(&ours));
                let call = Call::commit(&ours, lease.as_ref(), m.seen.as_ref(), times);
                self.send(member, &call, Purpose::Commit { ours, lease });
            }
            Writing::Wait | Writing::Complete => self.saved(member, Saving::Done),
        }
    }

    fn seconds_to_live(&self, published: &Published) -> u64 {
        let end = published.token.expires_at().map_or(u64::MAX, |at| at.0);
        (end.saturating_sub(self.timestamp().0) / 1_000).clamp(1, 80_000)
    }

    fn saved(&mut self, member: usize, saving: Saving) {
        if saving == Saving::Done {
            self.give_back_doubtful(member);
        }
        let m = &mut self.members[member];
        m.keeping = false;
        let pause = m.pace.after(saving);
        if std::mem::take(&mut m.keep_news) {
            self.keep_in(member, Duration::ZERO);
        } else if pause < Duration::MAX {
            self.keep_in(member, pause);
        }
    }

    fn give_back(&mut self, member: usize, lease: Option<Lease>) {
        if let Some(lease) = lease {
            self.members[member].fleet.settled(&lease);
            self.send(member, &Call::release(&lease.owner), Purpose::Nothing);
        }
    }

    pub(super) fn give_back_doubtful(&mut self, member: usize) {
        if let Some(owner) = self.members[member].fleet.take_doubtful() {
            self.send(member, &Call::release(&owner), Purpose::GiveBack(owner));
        }
    }

    pub(super) fn shared(
        &mut self,
        member: usize,
        ours: &Published,
        lease: Lease,
        answer: Option<&Answer>,
    ) {
        if answer.is_none() {
            return self.saved(member, Saving::Failed);
        }
        self.give_back(member, Some(lease.clone()));
        self.members[member].fleet.note_shown(&ours.token, lease);
        self.saved(member, Saving::Done);
    }

    pub(super) fn committed(
        &mut self,
        member: usize,
        ours: Arc<Published>,
        lease: Option<Lease>,
        answer: Option<&Answer>,
    ) {
        let Some(Answer::Outcome(outcome)) = answer else {
            return self.saved(member, Saving::Failed);
        };
        let outcome = committed(outcome).unwrap();
        if matches!(outcome, Commit::Committed | Commit::Older) {
            self.redis_is_back(member);
        }
        if outcome != Commit::Committed {
            let purpose = Purpose::RefusedLook { ours, refusal: outcome, lease };
            return self.look(member, purpose);
        }
        let m = &mut self.members[member];
        m.in_redis = ours.generation.0;
        m.seen = None;
        lease.inspect(|lease| m.fleet.settled(lease));
        self.saved(member, Saving::Done);
    }

    pub(super) fn considered_refusal(
        &mut self,
        member: usize,
        ours: &Published,
        refusal: Commit,
        lease: Option<Lease>,
        entrance: Option<Entrance>,
    ) {
        let Some(entrance) = entrance else { return self.saved(member, Saving::Failed) };
        let considered = self.consider(member, &entrance, false);
        let next = after_refusal(refusal, considered, lease.is_some());
        if next != (Next::Replace { with_lease: true }) {
            self.give_back(member, lease);
        }
        if next == Next::Leave {
            self.members[member].in_redis = ours.generation.0;
            self.saved(member, Saving::Done);
        } else {
            self.members[member].seen = entrance.value;
            self.saved(member, Saving::Refused);
        }
        self.overtake(member);
    }
}
