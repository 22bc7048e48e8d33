//! token-sidecar: a forward HTTP proxy that keeps an API token fresh for unchanged parsers.

// The future of a run is many futures deep, down to a socket's.
#![recursion_limit = "256"]

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
