//! Endpoints that refused even a new token, while the verifier could not tell.
//!
//! Such a 401 may be the endpoint's own. Without a verdict only the rest of the
//! traffic can show it: where the new token works elsewhere, another one would
//! be refused there too, and a run for each 401 would never end.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use super::{Endpoint, lock};

/// How long an endpoint is known for it.
const MEMORY: Duration = Duration::from_mins(10);
/// The most that are known at once; the oldest gives way.
const MOST: usize = 256;

/// A small set of endpoints.
#[derive(Default)]
pub(super) struct Stubborn(Mutex<VecDeque<(Endpoint, Instant)>>);

impl Stubborn {
    /// `endpoint` has refused a new token.
    pub(super) fn add(&self, endpoint: Endpoint, now: Instant) {
        let mut known = lock(&self.0);
        known.retain(|(other, until)| *other != endpoint && now < *until);
        if known.len() == MOST {
            known.pop_front();
        }
        known.push_back((endpoint, now + MEMORY));
    }

    /// `endpoint` takes a token: its refusals count again.
    pub(super) fn remove(&self, endpoint: Endpoint) {
        lock(&self.0).retain(|(other, _)| *other != endpoint);
    }

    /// Whether `endpoint` is known for it.
    pub(super) fn contains(&self, endpoint: Endpoint, now: Instant) -> bool {
        lock(&self.0).iter().any(|(other, until)| *other == endpoint && now < *until)
    }
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;

    fn endpoint(path: &str) -> Endpoint {
        Endpoint::new(&Method::GET, path)
    }

    #[test]
    fn an_endpoint_is_known_for_ten_minutes_or_until_it_takes_a_token() {
        let (stubborn, now) = (Stubborn::default(), Instant::now());
        stubborn.add(endpoint("/a"), now);
        assert!(stubborn.contains(endpoint("/a"), now));
        assert!(!stubborn.contains(endpoint("/b"), now));
        assert!(!stubborn.contains(endpoint("/a"), now + MEMORY));
        stubborn.remove(endpoint("/a"));
        assert!(!stubborn.contains(endpoint("/a"), now));
    }

    #[test]
    fn the_set_is_bounded() {
        let (stubborn, now) = (Stubborn::default(), Instant::now());
        for number in 0..=MOST {
            stubborn.add(endpoint(&number.to_string()), now);
        }
        assert!(!stubborn.contains(endpoint("0"), now));
        assert_eq!(lock(&stubborn.0).len(), MOST);
    }
}
