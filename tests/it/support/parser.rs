//! Parsers as programs: those of `tests/clients`, and what they need to run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::skip;

/// A file of `tests/clients`.
pub(crate) fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(name)
}

/// Whether `program` runs with these arguments; if not, `client` is skipped, see [`skip`].
pub(crate) fn is_installed(client: &str, program: &str, arguments: &[&str]) -> bool {
    let found = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        let call = arguments.join(" ");
        skip::not_installed(format_args!("{client}: `{program} {call}` does not run"));
    }
    found
}

/// A script of `tests/clients` in the Python environment, see [`python`].
pub(crate) fn script(client: &str, name: &str, packages: &str) -> Option<Command> {
    let mut command = python(client, packages)?;
    command.arg(program(name));
    Some(command)
}

/// Python of the environment that `tests/run.sh` makes (`.venv`, or where `TOKEN_SIDECAR_TEST_VENV`
/// points). `None` if that or a package is missing, which is said.
pub(crate) fn python(client: &str, packages: &str) -> Option<Command> {
    let python = environment().join("bin/python");
    let import = format!("import {packages}");
    is_installed(client, &python.to_string_lossy(), &["-c", &import]).then(|| Command::new(python))
}

fn environment() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::env::var_os("TOKEN_SIDECAR_TEST_VENV").map_or_else(|| root.join(".venv"), PathBuf::from)
}

/// `command` with these variables and `PATH`, and nothing else.
pub(crate) fn in_container(
    mut command: Command,
    variables: Vec<(&'static str, String)>,
) -> Command {
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.envs(variables).stdin(Stdio::null());
    command
}
