//! The tokens that the API has refused, so that none comes back by a detour.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::lock;
use crate::token::Token;

/// Enough for days of refusals; the oldest gives way.
const MAX_DENIED: usize = 256;

/// A small set of digests.
#[derive(Default)]
pub(super) struct Denied(Mutex<VecDeque<[u8; 32]>>);

impl Denied {
    /// Remembers that the API refused `token`. Returns whether that was news.
    pub(super) fn add(&self, token: &Token) -> bool {
        let mut digests = lock(&self.0);
        if digests.contains(token.digest()) {
            return false;
        }
        if digests.len() == MAX_DENIED {
            digests.pop_front();
        }
        digests.push_back(*token.digest());
        true
    }

    /// Whether the API has refused `token`.
    pub(super) fn contains(&self, token: &Token) -> bool {
        lock(&self.0).contains(token.digest())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::token;
    use super::*;

    #[test]
    fn the_set_is_bounded_and_forgets_the_oldest() {
        let denied = Denied::default();
        let first = token("first", 60);
        assert!(denied.add(&first));
        assert!(!denied.add(&first));
        assert!(denied.contains(&first));
        for n in 0..MAX_DENIED {
            denied.add(&token(&n.to_string(), 60));
        }
        assert!(!denied.contains(&first));
        assert_eq!(lock(&denied.0).len(), MAX_DENIED);
    }
}
