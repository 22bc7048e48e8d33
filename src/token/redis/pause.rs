//! A pause after an operation that the server left without an answer.
//!
//! # Invariants
//!
//! - An operation that falls into the pause fails at once, with the error that
//!   the pause was made for: a server that hangs costs its second now and then,
//!   not each time.
//! - The pause is random, so that many sidecars do not come back at one moment,
//!   and never longer than [`LONGEST`].
//! - What requests wait for need not wait for it, until the silence is [`OLD`].

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::token::StoreError;

/// The pause after one failure is shorter than this, after two shorter than
/// twice this, and so on.
const FIRST: Duration = Duration::from_millis(500);

/// No pause is longer.
pub(super) const LONGEST: Duration = Duration::from_secs(5);

/// A server that has been silent for so long counts as gone. Until then it may
/// only be busy.
const OLD: Duration = Duration::from_secs(15);

/// See the module.
#[derive(Default)]
pub(super) struct Pause {
    failures: Mutex<Option<Failures>>,
}

struct Failures {
    count: u32,
    since: Instant,
    until: Instant,
    last: StoreError,
}

impl Pause {
    /// Lets an operation begin, unless the pause lasts.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        match &*self.failures() {
            Some(failures) if Instant::now() < failures.until => Err(failures.last.clone()),
            _ => Ok(()),
        }
    }

    /// Requests wait for the next operation: it may begin at once, unless the
    /// silence is old.
    pub(super) fn cut_short(&self) {
        if let Some(failures) = &mut *self.failures()
            && failures.since.elapsed() < OLD
        {
            failures.until = Instant::now();
        }
    }

    /// Whether the server has not answered in time, and may only be busy.
    pub(super) fn is_late(&self) -> bool {
        self.failures().as_ref().is_some_and(|failures| {
            failures.since.elapsed() < OLD && matches!(failures.last, StoreError::RedisTimeout)
        })
    }

    /// Notes how an operation ended. An error that the server sent is a sign of
    /// life, too.
    pub(super) fn note<T>(&self, outcome: &Result<T, StoreError>) {
        match outcome {
            Err(error) if error.is_silence() => self.extend(error),
            _ => self.end(),
        }
    }

    /// The server has been heard of.
    pub(super) fn end(&self) {
        *self.failures() = None;
    }

    fn extend(&self, error: &StoreError) {
        let mut failures = self.failures();
        let now = Instant::now();
        // Operations that failed together count once.
        if failures.as_ref().is_some_and(|failures| now < failures.until) {
            return;
        }
        let (count, since) =
            failures.as_ref().map_or((0, now), |failures| (failures.count, failures.since));
        let count = count.saturating_add(1);
        let until = now + random(longest(count));
        *failures = Some(Failures { count, since, until, last: error.clone() });
    }

    fn failures(&self) -> MutexGuard<'_, Option<Failures>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long the pause after so many failures may be.
fn longest(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(8);
    (FIRST * 2_u32.pow(doublings)).min(LONGEST)
}

/// A time up to `longest`.
pub(super) fn random(longest: Duration) -> Duration {
    longest.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silence() -> Result<(), StoreError> {
        Err(StoreError::RedisTimeout)
    }

    #[test]
    fn pauses_grow_to_five_seconds_and_are_spread() {
        let longest: Vec<_> = (1..7).map(|count| longest(count).as_millis()).collect();
        assert_eq!(longest, [500, 1_000, 2_000, 4_000, 5_000, 5_000]);
        assert_eq!(super::longest(u32::MAX), LONGEST);
        let pauses: Vec<_> = (0..1_000).map(|_| random(LONGEST)).collect();
        // Of a thousand sidecars no tenth comes back within a tenth of a second.
        for tenth in 0..50 {
            let from = Duration::from_millis(tenth * 100);
            let together = pauses.iter().filter(|pause| **pause >= from);
            let together = together.filter(|pause| **pause < from + Duration::from_millis(100));
            assert!(together.count() < 100);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn operations_fail_at_once_while_the_pause_lasts() {
        let pause = Pause::default();
        pause.check().unwrap();
        for _ in 0..50 {
            pause.note(&silence());
            let waits = async {
                while let Err(error) = pause.check() {
                    assert!(matches!(error, StoreError::RedisTimeout));
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(LONGEST + FIRST, waits).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn operations_that_fail_together_count_once() {
        let pause = Pause::default();
        while pause.check().is_ok() {
            pause.note(&silence());
        }
        for _ in 0..100 {
            pause.note(&silence());
        }
        assert_eq!(pause.failures().as_ref().map(|failures| failures.count), Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_requests_wait_for_may_begin_until_the_silence_is_old() {
        let pause = Pause::default();
        let began = Instant::now();
        while began.elapsed() < OLD {
            pause.note(&silence());
            pause.cut_short();
            pause.check().unwrap();
            assert!(pause.is_late());
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert!(!pause.is_late());
        while pause.check().is_ok() {
            pause.note(&silence());
        }
        pause.cut_short();
        pause.check().unwrap_err();
    }

    #[test]
    fn only_a_server_that_does_not_answer_is_late() {
        let pause = Pause::default();
        assert!(!pause.is_late());
        pause.note::<()>(&Err(StoreError::RedisConnection { reason: "refused".into() }));
        assert!(!pause.is_late());
        pause.note(&silence());
        pause.note(&Ok(()));
        assert!(!pause.is_late());
    }

    #[test]
    fn an_answer_ends_the_pause_even_a_refusal() {
        let refused = Err(StoreError::RedisRefused { code: "OOM".into() });
        for answer in [Ok(()), refused, Err(StoreError::RedisPassword)] {
            let pause = Pause::default();
            pause.note(&silence());
            pause.note(&answer);
            pause.check().unwrap();
        }
    }
}
