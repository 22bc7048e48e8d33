//! The token in force.
//!
//! # Invariants
//!
//! - Reading takes no lock.
//! - Generations rise by one with each publication and never go back.
//! - Whoever sees a change of [`TokenCache::changes`] sees the token that made it.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::{ArcSwapOption, Guard};
use tokio::sync::watch;

use super::{Clearance, Source, Timestamp, Token};

/// Local number of a publication, rising from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A token that is to be put in force, and what is known of it.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The token itself.
    pub token: Token,
    /// Where it came from.
    pub source: Source,
    /// Cookies and user-agent that came with it.
    pub clearance: Arc<Clearance>,
    /// Whether it works only with these.
    pub needs_clearance: bool,
    /// Whether the verifier has confirmed it.
    pub verified: bool,
    /// Whether somebody has put it into Redis by hand.
    pub by_hand: bool,
    /// Since when it is in force, if it is already.
    since: Option<Generation>,
}

impl Candidate {
    /// A token of which no more is known than where it came from.
    #[must_use]
    pub fn new(token: Token, source: Source) -> Self {
        let clearance = Arc::default();
        let (needs_clearance, verified, by_hand) = (false, false, false);
        Self { token, source, clearance, needs_clearance, verified, by_hand, since: None }
    }

    /// The same with what the verifier says.
    #[must_use]
    pub fn verified(self, verified: bool) -> Self {
        Self { verified, ..self }
    }

    /// The same, put into Redis by hand or not.
    #[must_use]
    pub fn by_hand(self, by_hand: bool) -> Self {
        Self { by_hand, ..self }
    }

    /// The same with cookies and user-agent, which it may need or not.
    #[must_use]
    pub fn with_clearance(self, clearance: Arc<Clearance>, needed: bool) -> Self {
        Self { clearance, needs_clearance: needed, ..self }
    }
}

/// A token in force, and where it came from.
#[derive(Debug)]
pub struct Published {
    /// The token itself.
    pub token: Token,
    /// Its number in this process.
    pub generation: Generation,
    /// The generation with which this very token came into force: an earlier
    /// one where it was put in force anew, with its clearance.
    pub since: Generation,
    /// Where it came from.
    pub source: Source,
    /// Cookies and user-agent that came with it.
    pub clearance: Arc<Clearance>,
    /// Whether it works only with these.
    pub needs_clearance: bool,
    /// Whether somebody has put it into Redis by hand: then it counts whatever its
    /// age.
    pub by_hand: bool,
    /// When it was published.
    pub published_at: Timestamp,
    /// Set by the publisher, or later by [`TokenCache::confirm`]; never unset.
    verified: AtomicBool,
}

impl Published {
    /// Whether the verifier or a real answer has confirmed the token.
    #[must_use]
    pub fn is_verified(&self) -> bool {
        self.verified.load(Ordering::Acquire)
    }

    /// The same once more, as it may be put in force anew.
    #[must_use]
    pub fn candidate(&self) -> Candidate {
        Candidate {
            token: self.token.clone(),
            source: self.source,
            clearance: Arc::clone(&self.clearance),
            needs_clearance: self.needs_clearance,
            verified: self.is_verified(),
            by_hand: self.by_hand,
            since: Some(self.since),
        }
    }

    /// What has to go along with the token.
    #[must_use]
    pub fn needed_clearance(&self) -> Option<&Clearance> {
        self.needs_clearance.then_some(&*self.clearance)
    }
}

/// Holds the token in force and tells of its changes.
#[derive(Debug, Default)]
pub struct TokenCache {
    current: ArcSwapOption<Published>,
    /// The last generation given out. Held while a change is made, so that
    /// changes are seen in the order of their generations.
    last: Mutex<u64>,
    changes: watch::Sender<u64>,
}

impl TokenCache {
    /// An empty cache.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The token in force, for the hot path: no lock, no reference count.
    pub fn load(&self) -> Guard<Option<Arc<Published>>> {
        self.current.load()
    }

    /// The token in force, to keep.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Published>> {
        self.current.load_full()
    }

    /// The token in force if it is newer than the `refused` one; any, if none was.
    #[must_use]
    pub fn newer_than(&self, refused: Option<Generation>) -> Option<Arc<Published>> {
        // `None` is less than every generation.
        self.current().filter(|current| Some(current.generation) > refused)
    }

    /// Puts `candidate` in force under the next generation and tells the watchers.
    pub fn publish(&self, candidate: Candidate, now: Timestamp) -> Arc<Published> {
        let mut last = self.lock();
        *last += 1;
        let published = Arc::new(Published {
            token: candidate.token,
            generation: Generation(*last),
            since: candidate.since.unwrap_or(Generation(*last)),
            source: candidate.source,
            clearance: candidate.clearance,
            needs_clearance: candidate.needs_clearance,
            by_hand: candidate.by_hand,
            published_at: now,
            verified: AtomicBool::new(candidate.verified),
        });
        self.current.store(Some(Arc::clone(&published)));
        self.changed();
        published
    }

    /// Marks the token in force as verified, if it is of that generation.
    ///
    /// Returns whether that was news; if so, the watchers are told.
    pub fn confirm(&self, generation: Generation) -> bool {
        if !self.awaits_confirmation(generation) {
            return false; // The usual case costs no lock.
        }
        let _last = self.lock();
        let current = self.current.load();
        let news = current.as_ref().is_some_and(|current| {
            current.generation == generation && !current.verified.swap(true, Ordering::AcqRel)
        });
        if news {
            self.changed();
        }
        news
    }

    /// A counter that rises with each publication and each confirmation.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn awaits_confirmation(&self, generation: Generation) -> bool {
        let current = self.current.load();
        current
            .as_ref()
            .is_some_and(|current| current.generation == generation && !current.is_verified())
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        // The counter is valid at every moment, so a panic elsewhere spoils nothing.
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::token::test_support::jwt;

    fn publish(cache: &TokenCache, claims: &str, verified: bool) -> Arc<Published> {
        let token = Token::parse(&jwt(claims)).unwrap();
        cache.publish(Candidate::new(token, Source::Direct).verified(verified), Timestamp(1))
    }

    #[test]
    fn an_empty_cache_has_nothing_newer() {
        let cache = TokenCache::new();
        assert!(cache.load().is_none());
        assert!(cache.current().is_none());
        assert!(cache.newer_than(None).is_none());
        assert!(!cache.confirm(Generation(1)));
    }

    #[test]
    fn generations_rise_from_one() {
        let cache = TokenCache::new();
        let first = publish(&cache, "{}", true);
        assert_eq!(first.generation, Generation(1));
        assert_eq!(cache.newer_than(None).unwrap().generation, Generation(1));
        assert!(cache.newer_than(Some(Generation(1))).is_none());
        publish(&cache, "{}", true);
        let newer = cache.newer_than(Some(Generation(1))).unwrap();
        assert_eq!(newer.generation, Generation(2));
    }

    #[test]
    fn a_confirmation_is_news_once_and_only_for_the_present_token() {
        let cache = TokenCache::new();
        let old = publish(&cache, "{}", false);
        let new = publish(&cache, "{}", false);
        let mut changes = cache.changes();
        assert!(!cache.confirm(old.generation));
        assert!(!changes.has_changed().unwrap());
        assert!(cache.confirm(new.generation));
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        assert!(!cache.confirm(new.generation));
        assert!(!changes.has_changed().unwrap());
        assert!(new.is_verified() && !old.is_verified());
    }

    #[test]
    fn a_verified_publication_needs_no_confirmation() {
        let cache = TokenCache::new();
        let published = publish(&cache, "{}", true);
        assert!(published.is_verified());
        assert!(!cache.confirm(published.generation));
    }

    #[test]
    fn publications_from_many_threads_get_distinct_generations_in_order() {
        const THREADS: u64 = 8;
        const EACH: u64 = 200;
        let cache = TokenCache::new();
        let changes = cache.changes();
        let confirmed = thread::scope(|scope| {
            let writers: Vec<_> = (0..THREADS)
                .map(|_| {
                    scope.spawn(|| {
                        let mut confirmed = 0;
                        for _ in 0..EACH {
                            let mine = publish(&cache, "{}", false).generation;
                            // Ours, or a later one: what a reader sees never goes back.
                            assert!(cache.current().unwrap().generation >= mine);
                            assert!(cache.newer_than(Some(Generation(mine.0 - 1))).is_some());
                            confirmed += u64::from(cache.confirm(mine));
                        }
                        confirmed
                    })
                })
                .collect();
            writers.into_iter().map(|w| w.join().unwrap()).sum::<u64>()
        });
        assert_eq!(cache.current().unwrap().generation, Generation(THREADS * EACH));
        assert_eq!(*changes.borrow(), THREADS * EACH + confirmed);
    }

    #[test]
    fn many_threads_confirm_one_generation_once() {
        let cache = TokenCache::new();
        let generation = publish(&cache, "{}", false).generation;
        let news = thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| cache.confirm(generation))).collect();
            threads.into_iter().filter_map(|t| t.join().ok()).filter(|news| *news).count()
        });
        assert_eq!(news, 1);
    }

    #[tokio::test]
    async fn a_watcher_sees_the_token_that_made_the_change() {
        let cache = Arc::new(TokenCache::new());
        let mut changes = cache.changes();
        let publisher = Arc::clone(&cache);
        let task = tokio::spawn(async move { publish(&publisher, "{}", true).generation });
        changes.changed().await.unwrap();
        assert_eq!(cache.current().unwrap().generation, Generation(1));
        assert_eq!(task.await.unwrap(), Generation(1));
    }
}
