//! Long runs, ignored unless asked for: `tests/run.sh -- --ignored --nocapture soak::parsers` and
//! `… soak::faults`.

mod faults;
mod parsers;

use std::time::Duration;

/// A number of seconds from the environment of the test run.
fn seconds(variable: &str, default: u64) -> Duration {
    let seconds = std::env::var(variable).map_or(default, |value| value.parse().expect(variable));
    Duration::from_secs(seconds)
}
