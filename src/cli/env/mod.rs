//! `env`: what a parser's shell or container needs to go through the sidecar.
//!
//! Reads the settings, looks whether the trust files are there, and prints;
//! makes, writes and asks nothing.

mod doubt;
mod format;
mod needs;
mod self_test;

use std::process::ExitCode;

pub(super) use format::Format;

use crate::config::Config;
use needs::Needs;

/// Prints the variables, with comments for people; what may keep them from
/// being of use goes to stderr, too.
pub(super) fn execute(config: &Config, format: Format) -> ExitCode {
    let doubt = doubt::of(config, format);
    if let Some(doubt) = &doubt {
        eprintln!("token-sidecar: {doubt}");
    }
    print!("{}", format.render(&Needs::of(config), doubt.as_deref()));
    ExitCode::SUCCESS
}
