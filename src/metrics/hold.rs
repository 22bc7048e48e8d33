//! The requests that wait for a token: how many, for how long, at most how many.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use super::histogram::Histogram;

/// The number of held requests in the whole process.
#[derive(Clone, Debug, Default)]
pub struct HoldGauge(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    count: AtomicUsize,
    seconds: Histogram,
}

impl HoldGauge {
    /// A place among the held requests; `None` if `max` are held already.
    #[must_use]
    pub fn try_enter(&self, max: usize) -> Option<Held> {
        let inner = &self.0;
        inner
            .count
            .fetch_update(Relaxed, Relaxed, |count| (count < max).then_some(count + 1))
            .ok()?;
        Some(Held { inner: Arc::clone(inner), since: Instant::now() })
    }

    /// Requests held now.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.count.load(Relaxed)
    }

    pub(super) fn seconds(&self) -> &Histogram {
        &self.0.seconds
    }
}

/// One held request. Dropping it ends the hold and records how long it was.
#[derive(Debug)]
#[must_use = "the hold ends when this is dropped"]
pub struct Held {
    inner: Arc<Inner>,
    since: Instant,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.inner.count.fetch_sub(1, Relaxed);
        self.inner.seconds.observe(self.since.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::HoldGauge;
    use crate::metrics::histogram::Sum;

    #[test]
    fn no_more_than_the_maximum_are_held() {
        let gauge = HoldGauge::default();
        let first = gauge.try_enter(2);
        let second = gauge.try_enter(2);
        assert!(first.is_some() && second.is_some());
        assert!(gauge.try_enter(2).is_none());
        drop(first);
        assert_eq!(gauge.count(), 1);
        assert!(gauge.try_enter(2).is_some());
        assert_eq!(Sum::of([gauge.seconds()]).count(), 2, "each ended hold is recorded");
    }

    #[test]
    fn the_maximum_holds_when_threads_race() {
        let gauge = HoldGauge::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        let held = gauge.try_enter(3);
                        assert!(gauge.count() <= 3);
                        drop(held);
                    }
                });
            }
        });
        assert_eq!(gauge.count(), 0);
    }
}
