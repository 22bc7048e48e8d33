//! The `token-sidecar` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    token_sidecar::cli::main()
}
