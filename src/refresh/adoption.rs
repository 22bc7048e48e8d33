//! What to do about the value that lies in Redis.
//!
//! A pure decision: what is stored and what is in force go in, what to do
//! comes out.

use super::verifier::Opinion;
use crate::token::{Published, Source, Stored, Token};

/// Whether `source` is a store and not a door of the shop's.
pub(super) fn is_store(source: Source) -> bool {
    !matches!(source, Source::FlareSolverr | Source::Direct)
}

/// What is known at the moment of looking.
pub(super) struct View<'a> {
    /// What lies in Redis.
    pub(super) stored: Option<&'a Stored>,
    /// It has not expired and was never refused.
    pub(super) stored_usable: bool,
    /// What is in force here.
    pub(super) ours: Option<&'a Published>,
    /// It has not expired, was never refused, and is not in doubt.
    pub(super) ours_usable: bool,
}

/// What follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Adoption {
    /// Both are in step, or theirs is no better.
    Nothing,
    /// Ours belongs there.
    WriteOurs,
    /// Theirs is newer, or of the same second, so that all agree; and it comes
    /// from a sidecar that had it verified, where it works without clearance.
    Take,
    /// Theirs may be better, which the verifier has to say.
    Examine {
        /// Whether to take it even if the verifier cannot tell.
        newer: bool,
    },
}

/// Whether a stored token that was examined may be put in force.
pub(super) fn is_acceptable(opinion: Opinion, newer: bool) -> bool {
    opinion == Opinion::Good || opinion == Opinion::Unknown && newer
}

/// Whether `stored` says of the token in force that it works, and how: there is
/// nothing to write.
pub(super) fn is_in_step(stored: &Stored, ours: &Published) -> bool {
    let is_whole = stored.verified && !stored.foreign && stored.cookies_agree;
    is_whole && !stored.needs_clearance && stored.token == ours.token
}

impl<'a> View<'a> {
    /// The view of whoever has `ours` in force, `in_doubt` or not.
    pub(super) fn of(
        stored: Option<&'a Stored>,
        ours: Option<&'a Published>,
        in_doubt: bool,
        is_usable: impl Fn(&Token) -> bool,
    ) -> Self {
        Self {
            stored,
            stored_usable: stored.is_some_and(|stored| is_usable(&stored.token)),
            ours,
            ours_usable: !in_doubt && ours.is_some_and(|ours| is_usable(&ours.token)),
        }
    }

    /// Decides.
    pub(super) fn decide(&self) -> Adoption {
        let Some(stored) = self.stored else {
            return self.write_ours();
        };
        if self.ours.is_some_and(|ours| ours.token == stored.token) {
            let in_step = stored.cookies_agree && !stored.foreign;
            return if in_step { Adoption::Nothing } else { self.write_ours() };
        }
        if !self.stored_usable {
            return self.write_ours();
        }
        // `None` is older than anything, and so is no token at all.
        let ours_issued = self.ours.and_then(|ours| ours.token.issued_at());
        let newer = self.ours.is_none() || stored.token.issued_at() > ours_issued;
        // What passes there need not pass the wall here.
        let wall = stored.needs_clearance || self.ours.is_some_and(|ours| ours.needs_clearance);
        let proven = stored.verified && !stored.foreign && !wall;
        match (newer, stored.by_hand || !self.ours_usable, proven) {
            (true, _, true) => Adoption::Take,
            (true, _, false) | (false, true, _) => Adoption::Examine { newer },
            // Redis has lost the newer one.
            (false, false, _) if stored.token.issued_at() < ours_issued => self.write_ours(),
            // The same second: what is stored is what all may have.
            (false, false, true) if ours_issued.is_some() => Adoption::Take,
            (false, false, _) => Adoption::Nothing,
        }
    }

    /// Only what is known to work is written.
    fn write_ours(&self) -> Adoption {
        let worthy = self.ours_usable && self.ours.is_some_and(Published::is_verified);
        if worthy { Adoption::WriteOurs } else { Adoption::Nothing }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::testing::issued;
    use super::*;
    use crate::token::{Candidate, Clearance, Timestamp, TokenCache};

    fn ours(iat: u64, verified: bool) -> Arc<Published> {
        let token = issued("ours", iat);
        TokenCache::new()
            .publish(Candidate::new(token, Source::Direct).verified(verified), Timestamp(0))
    }

    fn stored(iat: u64, foreign: bool, verified: bool) -> Stored {
        Stored {
            token: issued("theirs", iat),
            clearance: Clearance::default(),
            needs_clearance: false,
            foreign,
            by_hand: foreign,
            verified,
            cookies_agree: true,
        }
    }

    fn decide(stored: Option<&Stored>, ours: Option<&Published>, ours_usable: bool) -> Adoption {
        View { stored, stored_usable: true, ours, ours_usable }.decide()
    }

    #[test]
    fn an_empty_redis_gets_ours_if_it_is_known_to_work() {
        assert_eq!(decide(None, Some(&ours(5, true)), true), Adoption::WriteOurs);
        assert_eq!(decide(None, Some(&ours(5, false)), true), Adoption::Nothing);
        assert_eq!(decide(None, Some(&ours(5, true)), false), Adoption::Nothing);
        assert_eq!(decide(None, None, false), Adoption::Nothing);
    }

    #[test]
    fn a_value_of_another_sidecar_is_taken_if_it_is_newer() {
        let ours = ours(5, true);
        assert_eq!(decide(Some(&stored(6, false, true)), Some(&ours), true), Adoption::Take);
        assert_eq!(decide(Some(&stored(5, false, false)), Some(&ours), true), Adoption::Nothing);
        // Of the same second, so that all have the same one in the end.
        assert_eq!(decide(Some(&stored(5, false, true)), Some(&ours), true), Adoption::Take);
        // What was lost is written again.
        assert_eq!(decide(Some(&stored(4, false, true)), Some(&ours), true), Adoption::WriteOurs);
        assert_eq!(decide(Some(&stored(4, false, true)), None, false), Adoption::Take);
    }

    #[test]
    fn an_older_value_is_worth_a_look_when_ours_is_of_no_use() {
        let older = decide(Some(&stored(4, false, true)), Some(&ours(5, true)), false);
        assert_eq!(older, Adoption::Examine { newer: false });
    }

    #[test]
    fn a_foreign_value_is_examined_whatever_its_age() {
        let ours = ours(5, true);
        for (iat, newer) in [(4, false), (6, true)] {
            let decision = decide(Some(&stored(iat, true, false)), Some(&ours), true);
            assert_eq!(decision, Adoption::Examine { newer });
        }
    }

    #[test]
    fn a_value_that_needs_clearance_is_examined_here() {
        let mut theirs = stored(6, false, true);
        theirs.needs_clearance = true;
        let decision = decide(Some(&theirs), Some(&ours(5, true)), true);
        assert_eq!(decision, Adoption::Examine { newer: true });
        // Nor is one taken unseen where ours needs it.
        let ours = TokenCache::new()
            .publish(ours(5, true).candidate().with_clearance(Arc::default(), true), Timestamp(0));
        let decision = decide(Some(&stored(6, false, true)), Some(&ours), true);
        assert_eq!(decision, Adoption::Examine { newer: true });
    }

    #[test]
    fn an_unverified_value_of_another_sidecar_is_examined() {
        let decision = decide(Some(&stored(6, false, false)), Some(&ours(5, true)), true);
        assert_eq!(decision, Adoption::Examine { newer: true });
    }

    #[test]
    fn a_refused_or_expired_value_gives_way_to_ours() {
        let ours = ours(5, true);
        let stored = stored(6, true, true);
        let (stored, ours) = (Some(&stored), Some(&*ours));
        let view = View { stored, stored_usable: false, ours, ours_usable: true };
        assert_eq!(view.decide(), Adoption::WriteOurs);
        let view = View { ours: None, ours_usable: false, ..view };
        assert_eq!(view.decide(), Adoption::Nothing);
    }

    #[test]
    fn our_own_value_is_written_again_when_the_keys_disagree() {
        let ours = ours(5, true);
        let mut same = stored(5, false, true);
        same.token = ours.token.clone();
        assert_eq!(decide(Some(&same), Some(&ours), true), Adoption::Nothing);
        same.cookies_agree = false;
        assert_eq!(decide(Some(&same), Some(&ours), true), Adoption::WriteOurs);
        same.foreign = true;
        same.cookies_agree = true;
        assert_eq!(decide(Some(&same), Some(&ours), true), Adoption::WriteOurs);
    }
}
