//! The sidecar as a black box: the real binary among real neighbours on loopback.

#![allow(
    clippy::unwrap_used,
    reason = "in a test an unmet expectation is a failure"
)]

mod support;
