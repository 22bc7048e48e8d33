//! What one worker counts.
//!
//! # Invariants
//!
//! - One thread writes a shard; any thread may read it. So a load and a store
//!   suffice where several writers would need a locked instruction.

use std::fmt;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::Route;
use super::histogram::{Histogram, add_alone};

/// The statuses that HTTP's grammar allows.
pub(super) const STATUSES: std::ops::RangeInclusive<u16> = 100..=999;
const STATUS_COUNT: usize = 900;

/// The counts of one worker, written by its thread alone.
#[derive(Default)]
pub struct Shard {
    routes: [ByRoute; Route::ALL.len()],
    connections: AtomicI64,
    upstream_active: AtomicI64,
    upstream_idle: AtomicI64,
}

struct ByRoute {
    statuses: [AtomicU64; STATUS_COUNT],
    seconds: Histogram,
}

impl Shard {
    /// Counts a request that was answered with `status` after `took`.
    pub fn request(&self, route: Route, status: u16, took: Duration) {
        let of_route = &self.routes[route as usize];
        add_alone(&of_route.statuses[index(status)], 1);
        of_route.seconds.observe_alone(took);
    }

    /// Counts a client connection in.
    pub fn connection_opened(&self) {
        shift_alone(&self.connections, 1);
    }

    /// Counts a client connection out.
    pub fn connection_closed(&self) {
        shift_alone(&self.connections, -1);
    }

    /// Changes the number of upstream connections with a request on them.
    pub fn upstream_active(&self, delta: isize) {
        shift_alone(&self.upstream_active, delta);
    }

    /// Changes the number of upstream connections that wait for a request.
    pub fn upstream_idle(&self, delta: isize) {
        shift_alone(&self.upstream_idle, delta);
    }

    pub(super) fn requests(&self, route: Route) -> u64 {
        self.routes[route as usize].statuses.iter().map(|count| count.load(Relaxed)).sum()
    }

    pub(super) fn requests_with(&self, route: Route, status: u16) -> u64 {
        self.routes[route as usize].statuses[index(status)].load(Relaxed)
    }

    pub(super) fn seconds(&self, route: Route) -> &Histogram {
        &self.routes[route as usize].seconds
    }

    pub(super) fn connections(&self) -> i64 {
        self.connections.load(Relaxed)
    }

    pub(super) fn active(&self) -> i64 {
        self.upstream_active.load(Relaxed)
    }

    pub(super) fn idle(&self) -> i64 {
        self.upstream_idle.load(Relaxed)
    }
}

impl fmt::Debug for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shard").field("connections", &self.connections).finish_non_exhaustive()
    }
}

impl Default for ByRoute {
    fn default() -> Self {
        Self { statuses: std::array::from_fn(|_| AtomicU64::new(0)), seconds: Histogram::default() }
    }
}

/// A status outside the grammar counts as the nearest one inside.
fn index(status: u16) -> usize {
    usize::from(status.clamp(*STATUSES.start(), *STATUSES.end()) - STATUSES.start())
}

fn shift_alone(gauge: &AtomicI64, delta: isize) {
    let delta = i64::try_from(delta).unwrap_or(0);
    gauge.store(gauge.load(Relaxed) + delta, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::{STATUS_COUNT, STATUSES, Shard, index};
    use crate::metrics::Route;
    use std::time::Duration;

    #[test]
    fn every_status_has_a_slot() {
        assert_eq!(STATUSES.count(), STATUS_COUNT);
        assert_eq!([index(0), index(100), index(999), index(u16::MAX)], [0, 0, 899, 899]);
    }

    #[test]
    fn gauges_go_up_and_down() {
        let shard = Shard::default();
        shard.connection_opened();
        shard.connection_opened();
        shard.connection_closed();
        shard.upstream_active(3);
        shard.upstream_active(-2);
        shard.upstream_idle(2);
        assert_eq!((shard.connections(), shard.active(), shard.idle()), (1, 1, 2));
    }

    #[test]
    fn requests_are_kept_apart_by_route_and_status() {
        let shard = Shard::default();
        shard.request(Route::Gateway, 200, Duration::ZERO);
        shard.request(Route::Gateway, 401, Duration::ZERO);
        shard.request(Route::Sni, 401, Duration::ZERO);
        assert_eq!(shard.requests(Route::Gateway), 2);
        assert_eq!(shard.requests_with(Route::Sni, 401), 1);
        assert_eq!(shard.requests(Route::Tunnel), 0);
    }
}
