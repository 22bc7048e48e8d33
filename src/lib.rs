//! token-sidecar: a forward HTTP proxy that keeps an API token fresh for unchanged parsers.

pub mod config;
pub mod metrics;
pub mod net;
pub mod telemetry;
