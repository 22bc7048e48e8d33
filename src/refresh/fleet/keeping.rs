//! What Redis is to be told of the token in force, and what follows when it has
//! not taken it.

use std::sync::Arc;
use std::time::Duration;

use crate::token::{Commit, Lease, Published};

/// Pauses between tries to write to Redis.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Refusals in a row that are answered without a pause.
const MOST_REFUSALS: u32 = 3;

/// What is to be written to Redis.
#[derive(Clone, Debug)]
pub(in crate::refresh) enum Writing {
    /// It works: for all, with the lease that it was got with, if there is one.
    Commit(Arc<Published>, Option<Lease>),
    /// Nobody could verify it yet: it is only shown to the others.
    Share(Arc<Published>, Lease),
    /// Nothing, until there is a token that is known to work.
    Wait,
    /// Nothing: it is there, or something better.
    Complete,
}

impl Writing {
    /// `ours` is in force and usable, `lease` what it is to be committed with,
    /// and `saved` the generation that lies in Redis.
    pub(in crate::refresh) fn of(
        ours: Option<&Arc<Published>>,
        lease: Option<Lease>,
        saved: u64,
    ) -> Self {
        let Some(ours) = ours.map(Arc::clone) else { return Self::Wait };
        match (lease, ours.is_verified()) {
            (Some(lease), false) => Self::Share(ours, lease),
            (None, false) => Self::Wait,
            (None, true) if ours.generation.0 <= saved => Self::Complete,
            (lease, true) => Self::Commit(ours, lease),
        }
    }
}

/// How a try to write to Redis went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::refresh) enum Saving {
    /// There is nothing more to do.
    Done,
    /// Redis gave no answer.
    Failed,
    /// Redis holds something else, which is known now: to be tried again.
    Refused,
}

/// How soon a try to write to Redis is made again.
#[derive(Debug)]
pub(in crate::refresh) struct Pace {
    pause: Duration,
    refusals: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { pause: FIRST_PAUSE, refusals: 0 }
    }
}

impl Pace {
    /// The pause after a try, unless something new is to be written.
    pub(in crate::refresh) fn after(&mut self, saving: Saving) -> Duration {
        self.refusals = if saving == Saving::Refused { self.refusals + 1 } else { 0 };
        match saving {
            Saving::Done => {
                self.pause = FIRST_PAUSE;
                Duration::MAX
            }
            Saving::Refused if self.refusals <= MOST_REFUSALS => Duration::ZERO,
            Saving::Refused | Saving::Failed => {
                let doubled = (self.pause * 2).min(LONGEST_PAUSE);
                std::mem::replace(&mut self.pause, doubled)
            }
        }
    }
}

/// What became of a stored value that was considered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::refresh) enum Considered {
    /// It is in force now.
    Adopted,
    /// Ours belongs there.
    WriteOurs,
    /// Neither: both are in step, or there is no telling.
    Nothing,
}

/// What to do about a token that is not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::refresh) enum Next {
    /// It need not be.
    Leave,
    /// Commit it in place of what has been considered.
    Replace {
        /// The lease is still worth showing.
        with_lease: bool,
    },
}

/// What follows from a refusal, once what is stored has been considered.
pub(in crate::refresh) fn after_refusal(
    refusal: Commit,
    considered: Considered,
    with_lease: bool,
) -> Next {
    match (refusal, considered) {
        (Commit::Foreign, Considered::WriteOurs) => Next::Replace { with_lease },
        // A new token of ours goes before one of which there is no telling.
        (Commit::Foreign, Considered::Nothing) if with_lease => Next::Replace { with_lease },
        (_, Considered::WriteOurs) => Next::Replace { with_lease: false },
        (_, Considered::Adopted | Considered::Nothing) => Next::Leave,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refresh::testing::issued;
    use crate::token::{Candidate, Owner, Source, Timestamp, TokenCache};

    #[test]
    fn tries_are_made_ever_less_often_and_refusals_are_answered_at_once() {
        let mut pace = Pace::default();
        let pauses: Vec<_> = (0..6).map(|_| pace.after(Saving::Failed).as_secs()).collect();
        assert_eq!(pauses, [2, 4, 8, 16, 30, 30]);
        assert_eq!(pace.after(Saving::Done), Duration::MAX);
        for _ in 0..MOST_REFUSALS {
            assert_eq!(pace.after(Saving::Refused), Duration::ZERO);
        }
        assert_eq!(pace.after(Saving::Refused), FIRST_PAUSE);
        assert_eq!(pace.after(Saving::Failed), FIRST_PAUSE * 2);
    }

    #[test]
    fn only_what_works_is_committed_and_only_what_a_lease_is_owed_for_is_shown() {
        let lease = || Some(Lease { owner: Owner::named("me"), epoch: 1 });
        let (proven, unproven) = (published(true), published(false));
        let writing = |ours, lease, saved| Writing::of(ours, lease, saved);
        assert!(matches!(writing(None, None, 0), Writing::Wait));
        assert!(matches!(writing(Some(&unproven), lease(), 1), Writing::Share(..)));
        assert!(matches!(writing(Some(&unproven), None, 0), Writing::Wait));
        assert!(matches!(writing(Some(&proven), None, 1), Writing::Complete));
        assert!(matches!(writing(Some(&proven), None, 0), Writing::Commit(_, None)));
        assert!(matches!(writing(Some(&proven), lease(), 1), Writing::Commit(_, Some(_))));
    }

    fn published(verified: bool) -> Arc<Published> {
        let candidate = Candidate::new(issued("ours", 1), Source::Direct).verified(verified);
        TokenCache::new().publish(candidate, Timestamp(0))
    }

    #[test]
    fn a_refused_token_is_written_only_where_it_belongs() {
        use Commit::{Fenced, Foreign, Lost, Older};
        use Considered::{Adopted, Nothing, WriteOurs};
        let with_lease = Next::Replace { with_lease: true };
        let without = Next::Replace { with_lease: false };
        for (refusal, considered, had_lease, next) in [
            (Foreign, WriteOurs, true, with_lease),
            (Foreign, WriteOurs, false, without),
            (Foreign, Nothing, true, with_lease),
            (Foreign, Nothing, false, Next::Leave),
            (Foreign, Adopted, true, Next::Leave),
            (Lost, WriteOurs, true, without),
            (Fenced, WriteOurs, true, without),
            (Older, WriteOurs, true, without),
            (Lost, Nothing, true, Next::Leave),
            (Older, Adopted, false, Next::Leave),
        ] {
            assert_eq!(after_refusal(refusal, considered, had_lease), next);
        }
    }
}
