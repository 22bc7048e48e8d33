//! `env`: what a parser's shell or container needs to go through the sidecar.
//!
//! Reads the settings and prints; makes, writes and asks nothing.

mod format;
mod needs;
mod self_test;

use std::process::ExitCode;

pub(super) use format::Format;

use crate::config::Config;
use needs::Needs;

/// Prints the variables, with comments for people.
pub(super) fn execute(config: &Config, format: Format) -> ExitCode {
    print!("{}", format.render(&Needs::of(config)));
    ExitCode::SUCCESS
}
