//! Tests of the whole: what a scrape says about what was counted.

use super::{Limit, Metrics, ReplayOutcome, Route};
use std::thread;
use std::time::Duration;

const NAMES: [&str; 15] = [
    "sidecar_requests_total",
    "sidecar_request_seconds",
    "sidecar_held",
    "sidecar_hold_seconds",
    "sidecar_replays_total",
    "sidecar_refreshes_total",
    "sidecar_refresh_seconds",
    "sidecar_token_expiry_timestamp_seconds",
    "sidecar_token_generation",
    "sidecar_store_errors_total",
    "sidecar_upstream_connections",
    "sidecar_connections",
    "sidecar_limited_total",
    "sidecar_verifier_trusted",
    "sidecar_build_info",
];

/// Metrics on which everything has happened once.
fn busy() -> Metrics {
    let metrics = Metrics::new(2);
    let shard = metrics.shard(1);
    shard.request(Route::Intercept, 200, Duration::from_millis(3));
    shard.connection_opened();
    shard.upstream_active(1);
    drop(metrics.hold().try_enter(1));
    metrics.replay(ReplayOutcome::Answered);
    metrics.limited(Limit::Held);
    metrics.store_error("redis");
    metrics.refresh_finished("direct", "ok", Duration::from_millis(700));
    metrics.token(3, Some(1_700_000_000));
    metrics.verifier_trusted(false);
    metrics
}

/// Checks that `text` has each of these samples.
fn check(text: &str, samples: &[(&str, &str)]) {
    for (series, value) in samples {
        let line = format!("{series} {value}");
        assert!(text.lines().any(|l| l == line), "no `{line}` in\n{text}");
    }
}

/// Checks one sample line: `name{label="value",…} number`.
fn check_sample(line: &str) {
    let (series, value) = line.rsplit_once(' ').expect("a value");
    assert!(value.parse::<f64>().is_ok(), "value: {line}");
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "name: {line}");
    let labels = labels.strip_suffix('}').expect("a closed brace");
    for label in labels.split(',').filter(|label| !label.is_empty()) {
        let (key, value) = label.split_once('=').expect("key=value");
        assert!(key.bytes().all(|b| b.is_ascii_lowercase()), "label: {line}");
        assert!(
            value.len() >= 2 && value.starts_with('"') && value.ends_with('"'),
            "label: {line}"
        );
    }
}

#[test]
fn every_line_of_a_scrape_is_well_formed() {
    let text = busy().encode();
    assert!(text.ends_with("# EOF\n"));
    for line in text.lines() {
        match line.strip_prefix("# ") {
            Some(comment) => assert!(
                ["HELP ", "TYPE ", "EOF"].iter().any(|word| comment.starts_with(word)),
                "{line}"
            ),
            None => check_sample(line),
        }
    }
}

#[test]
fn a_scrape_holds_every_name_of_the_contract_and_no_other() {
    let text = busy().encode();
    let sampled = |line: &str| line.split(['{', ' ']).next().map(str::to_owned);
    let base = |name: String| {
        let parts = ["_bucket", "_sum", "_count"];
        parts.iter().find_map(|part| name.strip_suffix(part).map(str::to_owned)).unwrap_or(name)
    };
    let mut found: Vec<_> =
        text.lines().filter(|line| !line.starts_with('#')).filter_map(sampled).map(base).collect();
    found.sort();
    found.dedup();
    let mut wanted = NAMES.map(str::to_owned);
    wanted.sort();
    assert_eq!(found, wanted);
}

#[test]
fn each_family_is_described_once() {
    let text = busy().encode();
    for name in NAMES.map(|name| name.trim_end_matches("_total").trim_end_matches("_info")) {
        assert_eq!(text.matches(&format!("# HELP {name} ")).count(), 1, "{name}");
        assert_eq!(text.matches(&format!("# TYPE {name} ")).count(), 1, "{name}");
    }
}

#[test]
fn a_scrape_tells_what_was_counted() {
    let samples = [
        (r#"sidecar_requests_total{route="intercept",status="200"}"#, "1"),
        (r#"sidecar_request_seconds_bucket{le="0.002",route="intercept"}"#, "0"),
        (r#"sidecar_request_seconds_bucket{le="0.005",route="intercept"}"#, "1"),
        (r#"sidecar_request_seconds_bucket{le="+Inf",route="intercept"}"#, "1"),
        (r#"sidecar_request_seconds_sum{route="intercept"}"#, "0.003"),
        ("sidecar_hold_seconds_count", "1"),
        (r#"sidecar_replays_total{outcome="answered"}"#, "1"),
        (r#"sidecar_limited_total{limit="held"}"#, "1"),
        (r#"sidecar_refreshes_total{source="direct",outcome="ok"}"#, "1"),
        (r#"sidecar_refresh_seconds_count{source="direct"}"#, "1"),
        (r#"sidecar_store_errors_total{store="redis"}"#, "1"),
        (r#"sidecar_upstream_connections{state="active"}"#, "1"),
        ("sidecar_connections", "1"),
        ("sidecar_token_generation", "3"),
        ("sidecar_token_expiry_timestamp_seconds", "1700000000"),
        ("sidecar_verifier_trusted", "0"),
    ];
    check(&busy().encode(), &samples);
}

#[test]
fn series_without_a_request_are_left_out() {
    let text = Metrics::new(1).encode();
    assert!(!text.contains("sidecar_requests_total{"));
    assert!(!text.contains("sidecar_request_seconds_bucket"));
    assert!(text.contains("# TYPE sidecar_requests counter"));
}

#[test]
fn counts_add_up_over_shards_and_threads() {
    let metrics = Metrics::new(4);
    thread::scope(|scope| {
        for worker in 0..4 {
            let (shard, metrics) = (metrics.shard(worker), &metrics);
            scope.spawn(move || {
                for status in [200, 200, 401].repeat(1_000) {
                    shard.request(Route::Absolute, status, Duration::from_millis(1));
                    metrics.replay(ReplayOutcome::RefusedAgain);
                }
                shard.connection_opened();
            });
        }
    });
    let samples = [
        (r#"sidecar_requests_total{route="absolute",status="200"}"#, "8000"),
        (r#"sidecar_requests_total{route="absolute",status="401"}"#, "4000"),
        (r#"sidecar_request_seconds_count{route="absolute"}"#, "12000"),
        (r#"sidecar_replays_total{outcome="refused_again"}"#, "12000"),
    ];
    check(&metrics.encode(), &samples);
    assert_eq!(metrics.connections(), 4);
    assert!(metrics.requests_by_route().contains(&(Route::Absolute, 12_000)));
}
