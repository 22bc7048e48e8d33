//! Writes the sums of all shards, and the process-wide counts, for a scrape.
//!
//! Names lack the `_total` of counters: the encoder appends it.

use std::fmt::Result;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::histogram::Sum;
use super::shard::STATUSES;
use super::{Counts, Limit, ReplayOutcome, Route, Shard};

impl Collector for Counts {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result {
        let encoder = &mut encoder;
        self.requests_total(encoder)?;
        self.request_seconds(encoder)?;
        self.holds(encoder)?;
        self.replays_total(encoder)?;
        self.limited_total(encoder)?;
        self.connection_gauges(encoder)?;
        self.token_gauges(encoder)
    }
}

impl Counts {
    fn requests_total(&self, encoder: &mut DescriptorEncoder) -> Result {
        let mut family = encoder.encode_descriptor(
            "sidecar_requests",
            "Requests answered, by route and status.",
            None,
            MetricType::Counter,
        )?;
        for route in Route::ALL {
            for status in STATUSES {
                let count =
                    self.shards.iter().map(|shard| shard.requests_with(route, status)).sum();
                if count > 0 {
                    let labels = ([("route", route.as_str())], [("status", status)]);
                    write_counter(&mut family.encode_family(&labels)?, count)?;
                }
            }
        }
        Ok(())
    }

    fn request_seconds(&self, encoder: &mut DescriptorEncoder) -> Result {
        let mut family = encoder.encode_descriptor(
            "sidecar_request_seconds",
            "Time from a request's head to its answer's head, holds included.",
            None,
            MetricType::Histogram,
        )?;
        for route in Route::ALL {
            let sum = Sum::of(self.shards.iter().map(|shard| shard.seconds(route)));
            if sum.count() > 0 {
                write_histogram(&mut family.encode_family(&[("route", route.as_str())])?, &sum)?;
            }
        }
        Ok(())
    }

    fn holds(&self, encoder: &mut DescriptorEncoder) -> Result {
        let held = i64::try_from(self.hold.count()).unwrap_or(i64::MAX);
        gauge(encoder, "sidecar_held", "Requests that wait for a token.", held)?;
        let mut seconds = encoder.encode_descriptor(
            "sidecar_hold_seconds",
            "Time that requests waited for a token.",
            None,
            MetricType::Histogram,
        )?;
        write_histogram(&mut seconds, &Sum::of([self.hold.seconds()]))
    }

    fn replays_total(&self, encoder: &mut DescriptorEncoder) -> Result {
        let family = encoder.encode_descriptor(
            "sidecar_replays",
            "Requests to be sent again after a refused token, by outcome.",
            None,
            MetricType::Counter,
        )?;
        let names = ReplayOutcome::ALL.map(ReplayOutcome::as_str);
        write_counters(family, "outcome", &names, &self.replays)
    }

    fn limited_total(&self, encoder: &mut DescriptorEncoder) -> Result {
        let family = encoder.encode_descriptor(
            "sidecar_limited",
            "Connections, holds and bodies that a limit turned away.",
            None,
            MetricType::Counter,
        )?;
        let names = Limit::ALL.map(Limit::as_str);
        write_counters(family, "limit", &names, &self.limited)
    }

    fn connection_gauges(&self, encoder: &mut DescriptorEncoder) -> Result {
        let clients = self.sum(Shard::connections);
        gauge(encoder, "sidecar_connections", "Client connections open.", clients)?;
        let mut upstream = encoder.encode_descriptor(
            "sidecar_upstream_connections",
            "Upstream connections open, with a request on them (active) or without (idle).",
            None,
            MetricType::Gauge,
        )?;
        for (state, count) in [("active", self.sum(Shard::active)), ("idle", self.sum(Shard::idle))]
        {
            upstream.encode_family(&[("state", state)])?.encode_gauge(&count)?;
        }
        Ok(())
    }

    fn token_gauges(&self, encoder: &mut DescriptorEncoder) -> Result {
        gauge(
            encoder,
            "sidecar_token_expiry_timestamp_seconds",
            "When the token in use expires, in seconds since the epoch; 0 without one.",
            i64::try_from(self.token_expires_at.load(Relaxed)).unwrap_or(i64::MAX),
        )?;
        gauge(
            encoder,
            "sidecar_token_generation",
            "Number of the token in use, counted from 1 since the start; 0 without one.",
            i64::try_from(self.token_generation.load(Relaxed)).unwrap_or(i64::MAX),
        )?;
        gauge(
            encoder,
            "sidecar_verifier_trusted",
            "1 if the verifier can tell a good token from a bad one.",
            i64::from(self.verifier_trusted.load(Relaxed)),
        )
    }
}

fn gauge(encoder: &mut DescriptorEncoder, name: &str, help: &str, value: i64) -> Result {
    encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
}

fn write_counters(
    mut family: MetricEncoder,
    label: &str,
    names: &[&str],
    counts: &[AtomicU64],
) -> Result {
    for (name, count) in names.iter().zip(counts) {
        write_counter(&mut family.encode_family(&[(label, *name)])?, count.load(Relaxed))?;
    }
    Ok(())
}

fn write_counter(series: &mut MetricEncoder, count: u64) -> Result {
    series.encode_counter::<NoLabelSet, _, f64>(&count, None)
}

fn write_histogram(series: &mut MetricEncoder, sum: &Sum) -> Result {
    series.encode_histogram::<NoLabelSet>(sum.seconds(), sum.count(), &sum.buckets(), None)
}
