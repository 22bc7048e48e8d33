//! The `token-sidecar` binary.

fn main() {}
