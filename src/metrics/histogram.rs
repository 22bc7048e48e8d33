//! A histogram of durations, made of atomics.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds of the buckets in milliseconds, 1 ms to 60 s; one more bucket has none.
const BOUNDS: [u64; 16] =
    [1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 15_000, 30_000, 60_000];

/// How many durations fell between which bounds.
#[derive(Debug, Default)]
pub(super) struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanos: AtomicU64,
}

impl Histogram {
    /// Adds `took`. Only for a histogram that one thread writes.
    pub(super) fn observe_alone(&self, took: Duration) {
        add_alone(&self.buckets[bucket(took)], 1);
        add_alone(&self.nanos, nanos(took));
    }

    /// Adds `took`, from any thread.
    pub(super) fn observe(&self, took: Duration) {
        self.buckets[bucket(took)].fetch_add(1, Relaxed);
        self.nanos.fetch_add(nanos(took), Relaxed);
    }
}

/// The sum of some histograms, as a scrape needs it.
#[derive(Debug, Default)]
pub(super) struct Sum {
    buckets: [u64; BOUNDS.len() + 1],
    nanos: u64,
}

impl Sum {
    pub(super) fn of<'a>(histograms: impl IntoIterator<Item = &'a Histogram>) -> Self {
        let mut sum = Self::default();
        for histogram in histograms {
            for (total, bucket) in sum.buckets.iter_mut().zip(&histogram.buckets) {
                *total += bucket.load(Relaxed);
            }
            sum.nanos = sum.nanos.wrapping_add(histogram.nanos.load(Relaxed));
        }
        sum
    }

    /// Counted from the buckets, so that the two never disagree within a scrape.
    pub(super) fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    pub(super) fn seconds(&self) -> f64 {
        Duration::from_nanos(self.nanos).as_secs_f64()
    }

    /// Upper bounds in seconds with the count of each bucket, not cumulative.
    pub(super) fn buckets(&self) -> Vec<(f64, u64)> {
        let bounds = BOUNDS.iter().map(|&millis| Duration::from_millis(millis).as_secs_f64());
        bounds.chain([f64::MAX]).zip(self.buckets).collect()
    }
}

/// Adds to a counter that one thread writes: no locked instruction is needed.
pub(super) fn add_alone(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(more), Relaxed);
}

fn bucket(took: Duration) -> usize {
    BOUNDS.partition_point(|&millis| Duration::from_millis(millis) < took)
}

fn nanos(took: Duration) -> u64 {
    u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::{Histogram, Sum};
    use std::time::Duration;

    #[test]
    fn a_duration_on_a_bound_belongs_to_the_bucket_below_it() {
        let histogram = Histogram::default();
        for micros in [0, 1_000, 1_001, 60_000_000, 60_000_001] {
            histogram.observe(Duration::from_micros(micros));
        }
        let buckets = Sum::of([&histogram]).buckets();
        assert_eq!(buckets[0], (0.001, 2));
        assert_eq!(buckets[1], (0.002, 1));
        assert_eq!(buckets[15], (60.0, 1));
        assert_eq!(buckets[16], (f64::MAX, 1));
    }

    #[test]
    fn a_sum_covers_both_ways_of_writing() {
        let (alone, shared) = (Histogram::default(), Histogram::default());
        alone.observe_alone(Duration::from_millis(1_500));
        shared.observe(Duration::from_millis(500));
        let sum = Sum::of([&alone, &shared]);
        assert_eq!(sum.count(), 2);
        assert!((sum.seconds() - 2.0).abs() < f64::EPSILON);
    }
}
