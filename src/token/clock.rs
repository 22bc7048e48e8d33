//! Time as the upstream sees it.
//!
//! A token's `exp` is a moment of the upstream's clock. Where ours is wrong,
//! the `Date` of the upstream's answers says by how much.

use std::{
    fmt,
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::HeaderValue;

/// `Date` counts whole seconds and arrives late, so less than this tells nothing.
const SMALLEST_OFFSET: i64 = 2;

/// The last second of the year 9999, after which RFC 3339 has no form.
const LAST_PRINTABLE: u64 = 253_402_300_799;

/// Seconds since the Unix epoch. Displayed as RFC 3339.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Timestamp(pub u64);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = UNIX_EPOCH + Duration::from_secs(self.0.min(LAST_PRINTABLE));
        humantime::format_rfc3339_seconds(time).fmt(f)
    }
}

/// The upstream's clock as far as we know it: the system's plus an offset
/// learnt from `Date`.
#[derive(Debug, Default)]
pub struct Clock {
    /// Seconds to add to the system's time.
    offset: AtomicI64,
}

impl Clock {
    /// A clock that trusts the system's until it learns better.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The present moment on the upstream's clock.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        Timestamp(system_seconds().saturating_add_signed(self.offset()))
    }

    /// Sets the offset by the `Date` field of an answer that has just come.
    ///
    /// A difference under 2 s counts as none. A value that is no HTTP date is
    /// ignored.
    pub fn learn(&self, date: &HeaderValue) {
        let Some(theirs) = seconds_of(date) else {
            return;
        };
        let ours = i64::try_from(system_seconds()).unwrap_or(i64::MAX);
        let difference = theirs.saturating_sub(ours);
        let offset = if difference.abs() < SMALLEST_OFFSET { 0 } else { difference };
        self.offset.store(offset, Ordering::Relaxed);
    }

    /// Seconds by which the upstream's clock is ahead of ours.
    pub fn offset(&self) -> i64 {
        self.offset.load(Ordering::Relaxed)
    }
}

/// Zero for a system whose clock stands before 1970.
fn system_seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn seconds_of(date: &HeaderValue) -> Option<i64> {
    let time = httpdate::parse_http_date(date.to_str().ok()?).ok()?;
    i64::try_from(time.duration_since(UNIX_EPOCH).ok()?.as_secs()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn date_in(seconds: i64) -> HeaderValue {
        let time =
            UNIX_EPOCH + Duration::from_secs(system_seconds().saturating_add_signed(seconds));
        HeaderValue::from_str(&httpdate::fmt_http_date(time)).unwrap()
    }

    #[test]
    fn the_offset_follows_the_date_field() {
        let clock = Clock::new();
        for offset in [3600, -3600] {
            clock.learn(&date_in(offset));
            assert!((clock.offset() - offset).abs() <= 1);
            let expected = system_seconds().saturating_add_signed(offset);
            assert!(clock.now().0.abs_diff(expected) <= 1);
        }
    }

    #[test]
    fn a_small_difference_counts_as_none() {
        let clock = Clock::new();
        clock.learn(&date_in(-100));
        assert_ne!(clock.offset(), 0);
        clock.learn(&date_in(0));
        assert_eq!(clock.offset(), 0);
    }

    #[test]
    fn what_is_no_date_is_ignored() {
        let clock = Clock::new();
        clock.learn(&date_in(500));
        let learnt = clock.offset();
        for bad in ["", "yesterday", "2026-01-01T00:00:00Z"] {
            clock.learn(&HeaderValue::from_static(bad));
        }
        clock.learn(&HeaderValue::from_bytes(b"\xff").unwrap());
        assert_eq!(clock.offset(), learnt);
    }

    #[test]
    fn a_timestamp_shows_as_rfc_3339_and_never_panics() {
        assert_eq!(Timestamp(0).to_string(), "1970-01-01T00:00:00Z");
        assert_eq!(Timestamp(1_700_000_000).to_string(), "2023-11-14T22:13:20Z");
        assert_eq!(Timestamp(u64::MAX).to_string(), "9999-12-31T23:59:59Z");
    }
}
