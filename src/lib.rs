//! token-sidecar: a forward HTTP proxy that keeps an API token fresh for unchanged parsers.

pub mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub mod hints;
pub mod metrics;
pub mod net;
pub mod proxy;
pub mod refresh;
pub mod telemetry;
pub mod tls;
pub mod token;

#[cfg(fuzzing)]
pub use proxy::fuzzing;
