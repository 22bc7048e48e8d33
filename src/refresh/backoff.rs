//! How long to leave the sources alone after failures.

use std::time::Duration;

use tokio::time::Instant;

/// The pause after the first failure.
const FIRST: Duration = Duration::from_secs(5);
/// The longest pause, before the jitter.
const LONGEST: Duration = Duration::from_mins(10);

/// Pauses that double from 5 s to 10 min. Knows no clock.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    until: Option<Instant>,
}

impl Backoff {
    /// Counts a failure and starts the pause that follows it.
    ///
    /// `jitter` is the factor that keeps a fleet out of step.
    pub(super) fn failed(&mut self, now: Instant, jitter: f64) {
        let doubled = FIRST.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + doubled.min(LONGEST).mul_f64(jitter));
    }

    /// Others have failed `failures` times in a row, and their pause holds here
    /// too.
    pub(super) fn take_over(&mut self, failures: u32, until: Instant) {
        self.failures = self.failures.max(failures);
        self.until = Some(until);
    }

    /// How many failures there were in a row.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// Ends the pause; the next failure still doubles it.
    pub(super) fn lift(&mut self) {
        self.until = None;
    }

    /// Forgets all failures.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// When the pause ends, if one is on at `now`.
    pub(super) fn until(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| *until > now)
    }
}

/// A random factor from 0.9 to 1.1.
pub(super) fn jitter() -> f64 {
    0.9 + fastrand::f64() * 0.2
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pause(backoff: &mut Backoff, now: Instant, jitter: f64) -> Duration {
        backoff.failed(now, jitter);
        backoff.until(now).map_or(Duration::ZERO, |until| until - now)
    }

    #[test]
    fn pauses_double_from_five_seconds_to_ten_minutes() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        let pauses: Vec<_> = (0..9).map(|_| pause(&mut backoff, now, 1.0).as_secs()).collect();
        assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 320, 600, 600]);
    }

    #[test]
    fn jitter_stretches_the_pause_by_a_tenth_at_most() {
        let now = Instant::now();
        assert_eq!(pause(&mut Backoff::default(), now, 1.1), Duration::from_millis(5500));
        assert!((0..1000).map(|_| jitter()).all(|factor| (0.9..=1.1).contains(&factor)));
    }

    #[test]
    fn a_pause_ends_by_itself() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        backoff.failed(now, 1.0);
        assert!(backoff.until(now + Duration::from_millis(4999)).is_some());
        assert_eq!(backoff.until(now + FIRST), None);
    }

    #[test]
    fn lifting_keeps_the_count_and_a_reset_forgets_it() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        backoff.failed(now, 1.0);
        backoff.lift();
        assert_eq!(backoff.until(now), None);
        assert_eq!(pause(&mut backoff, now, 1.0), Duration::from_secs(10));
        backoff.reset();
        assert_eq!(pause(&mut backoff, now, 1.0), FIRST);
    }

    #[test]
    fn thousands_of_failures_do_not_overflow() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        (0..10_000).for_each(|_| backoff.failed(now, 1.0));
        assert_eq!(backoff.until(now), Some(now + LONGEST));
    }
}
