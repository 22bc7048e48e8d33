//! What follows when Redis has not taken a token that was to be committed.

use crate::token::Commit;

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
