//! Counters, gauges and histograms, in the text format of `OpenMetrics`.
//!
//! What happens on every request is counted in a [`Shard`], one per worker and
//! written by that worker alone. What happens rarely is counted in one place
//! for the whole process. A scrape sums the shards.
//!
//! # Invariants
//!
//! - Counting a request takes no lock, allocates nothing and hashes nothing.
//! - A label value comes from a closed set, never from what a client sent.
//! - No metric holds a secret.

mod exposition;
mod histogram;
mod hold;
mod labels;
mod shard;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram as RareHistogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

pub use hold::{Held, HoldGauge};
pub use labels::{Limit, ReplayOutcome, Route};
pub use shard::Shard;

/// The `Content-Type` of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of `sidecar_refresh_seconds`: from a direct call to a solver that hangs.
const REFRESH_SECONDS: [f64; 12] =
    [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0];

type Labels<const N: usize> = [(&'static str, &'static str); N];

/// All metrics of the process.
pub struct Metrics {
    counts: Arc<Counts>,
    refreshes: Family<Labels<2>, Counter>,
    refresh_seconds: Family<Labels<1>, RareHistogram, fn() -> RareHistogram>,
    store_errors: Family<Labels<1>, Counter>,
    registry: Registry,
}

/// What the sidecar counts by itself; the collector reads it.
struct Counts {
    shards: Vec<Arc<Shard>>,
    hold: HoldGauge,
    replays: [AtomicU64; ReplayOutcome::ALL.len()],
    limited: [AtomicU64; Limit::ALL.len()],
    token_generation: AtomicU64,
    /// Seconds since the epoch; 0: no token, or one without an expiry.
    token_expires_at: AtomicU64,
    verifier_trusted: AtomicBool,
}

impl Metrics {
    /// Metrics with one shard for each of `workers` threads.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        let mut metrics = Self {
            counts: Arc::new(Counts::new(workers)),
            refreshes: Family::default(),
            refresh_seconds: Family::new_with_constructor(|| RareHistogram::new(REFRESH_SECONDS)),
            store_errors: Family::default(),
            registry: Registry::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register_collector(Box::new(Arc::clone(&self.counts)));
        registry.register(
            "sidecar_refreshes",
            "Attempts to get a token, by source and outcome",
            self.refreshes.clone(),
        );
        registry.register(
            "sidecar_refresh_seconds",
            "Time that a source took for an attempt to get a token",
            self.refresh_seconds.clone(),
        );
        registry.register(
            "sidecar_store_errors",
            "Failed reads and writes of a place where tokens rest",
            self.store_errors.clone(),
        );
        registry.register(
            "sidecar_build",
            "Version of the program",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
    }

    /// The shard that belongs to `worker`, counted from 0.
    ///
    /// # Panics
    ///
    /// If there is no such worker.
    #[must_use]
    pub fn shard(&self, worker: usize) -> Arc<Shard> {
        Arc::clone(&self.counts.shards[worker])
    }

    /// The requests that wait for a token now.
    #[must_use]
    pub fn hold(&self) -> &HoldGauge {
        &self.counts.hold
    }

    /// Counts how a replay, or the wish for one, ended.
    pub fn replay(&self, outcome: ReplayOutcome) {
        self.counts.replays[outcome as usize].fetch_add(1, Relaxed);
    }

    /// Counts something that a limit turned away.
    pub fn limited(&self, limit: Limit) {
        self.counts.limited[limit as usize].fetch_add(1, Relaxed);
    }

    /// Counts a failed operation of a store, such as `redis`.
    pub fn store_error(&self, store: &'static str) {
        self.store_errors.get_or_create(&[("store", store)]).inc();
    }

    /// Counts a source's attempt to get a token; `outcome` is `ok` or `failed`.
    pub fn refresh_finished(&self, source: &'static str, outcome: &'static str, took: Duration) {
        self.refreshes.get_or_create(&[("source", source), ("outcome", outcome)]).inc();
        self.refresh_seconds.get_or_create(&[("source", source)]).observe(took.as_secs_f64());
    }

    /// Records the token in use; `expires_at` in seconds since the epoch.
    pub fn token(&self, generation: u64, expires_at: Option<u64>) {
        self.counts.token_generation.store(generation, Relaxed);
        self.counts.token_expires_at.store(expires_at.unwrap_or(0), Relaxed);
    }

    /// Records whether the verifier can tell a good token from a bad one.
    pub fn verifier_trusted(&self, trusted: bool) {
        self.counts.verifier_trusted.store(trusted, Relaxed);
    }

    /// Requests so far, for each route.
    #[must_use]
    pub fn requests_by_route(&self) -> Vec<(Route, u64)> {
        Route::ALL.map(|route| (route, self.counts.requests(route))).to_vec()
    }

    /// Requests that wait for a token now.
    #[must_use]
    pub fn held(&self) -> usize {
        self.counts.hold.count()
    }

    /// Client connections open now.
    #[must_use]
    pub fn connections(&self) -> usize {
        usize::try_from(self.counts.sum(Shard::connections)).unwrap_or(0)
    }

    /// The text of a scrape, of type [`CONTENT_TYPE`].
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(16 * 1024);
        // Writing to a `String` does not fail.
        _ = text::encode(&mut text, &self.registry);
        text
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("counts", &self.counts).finish_non_exhaustive()
    }
}

impl Counts {
    fn new(workers: usize) -> Self {
        Self {
            shards: (0..workers).map(|_| Arc::default()).collect(),
            hold: HoldGauge::default(),
            replays: Default::default(),
            limited: Default::default(),
            token_generation: AtomicU64::new(0),
            token_expires_at: AtomicU64::new(0),
            // It counts as trusted until the calibration says otherwise.
            verifier_trusted: AtomicBool::new(true),
        }
    }

    fn requests(&self, route: Route) -> u64 {
        self.shards.iter().map(|shard| shard.requests(route)).sum()
    }

    /// The sum of a gauge over all shards; a scrape between two changes may see less than 0.
    fn sum(&self, gauge: impl Fn(&Shard) -> i64) -> i64 {
        self.shards.iter().map(|shard| gauge(shard)).sum::<i64>().max(0)
    }
}

impl fmt::Debug for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counts").field("shards", &self.shards.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
