//! The tokens that the API has refused, so that none comes back by a detour.

use std::collections::VecDeque;
use std::sync::Mutex;

use super::lock;
use crate::token::{Entrance, Token};

/// Enough for days of refusals; the oldest gives way.
const MAX_DENIED: usize = 256;

/// Two small sets of digests.
#[derive(Default)]
pub(super) struct Denied {
    /// What the API has refused from here.
    own: Digests,
    /// What it has refused elsewhere, as other sidecars say. Enough to adopt
    /// none of these; whether one in force here works shows by itself.
    heard: Digests,
}

#[derive(Default)]
struct Digests(Mutex<VecDeque<[u8; 32]>>);

impl Denied {
    /// Remembers that the API refused `token`. Returns whether that was news.
    pub(super) fn add(&self, token: &Token) -> bool {
        self.own.add(token.digest())
    }

    /// Other sidecars say in Redis what the API refuses.
    pub(super) fn hear(&self, entrance: &Entrance) {
        // The numbers of refusals begin anew when Redis loses them.
        let stored = entrance.stored.iter().filter(|_| entrance.is_denied);
        let unverified = entrance.unverified.iter().filter(|_| entrance.is_unverified_denied);
        let lying_there = stored.chain(unverified).map(|stored| stored.token.digest());
        for digest in entrance.denials.digests.iter().chain(lying_there) {
            self.heard.add(digest);
        }
    }

    /// Whether the API has refused `token` from here.
    pub(super) fn contains(&self, token: &Token) -> bool {
        self.own.contains(token.digest())
    }

    /// Whether the API has refused `token` anywhere.
    pub(super) fn contains_anywhere(&self, token: &Token) -> bool {
        self.contains(token) || self.heard.contains(token.digest())
    }
}

impl Digests {
    fn add(&self, digest: &[u8; 32]) -> bool {
        let mut digests = lock(&self.0);
        if digests.contains(digest) {
            return false;
        }
        if digests.len() == MAX_DENIED {
            digests.pop_front();
        }
        digests.push_back(*digest);
        true
    }

    fn contains(&self, digest: &[u8; 32]) -> bool {
        lock(&self.0).contains(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::token;
    use super::*;
    use crate::token::{Denials, Standing};

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
        assert_eq!(lock(&denied.own.0).len(), MAX_DENIED);
    }

    #[test]
    fn what_is_heard_is_told_apart_from_what_is_seen() {
        let denied = Denied::default();
        let token = token("heard", 60);
        denied.hear(&Entrance {
            stored: None,
            value: None,
            is_denied: false,
            unverified: None,
            unverified_value: None,
            is_unverified_denied: false,
            backoff: None,
            turn: Standing::Free,
            denials: Denials { last: 1, digests: vec![*token.digest()] },
        });
        assert!(denied.contains_anywhere(&token));
        assert!(!denied.contains(&token));
        assert!(denied.add(&token));
        assert!(denied.contains(&token));
    }
}
