//! Tests that cannot run here: what is skipped, and why, is said where nobody captures it.
//!
//! With `TOKEN_SIDECAR_TEST_NO_SKIP` a skip is a failure: `1` for what could be installed, `all`
//! for what this machine does not permit, too.

use std::fmt::Display;
use std::io::Write;

/// What a test lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lack {
    /// A program or a package, which `tests/run.sh` installs.
    Tool,
    /// A right or a feature of the machine, which nobody can install.
    Permission,
}

/// Tells that this test is skipped for want of a program or a package.
///
/// # Panics
///
/// If `TOKEN_SIDECAR_TEST_NO_SKIP` is `1` or `all`.
pub(crate) fn not_installed(reason: impl Display) {
    skip(Lack::Tool, &reason.to_string());
}

/// Tells that this test is skipped since the machine does not permit `what`.
///
/// # Panics
///
/// If `TOKEN_SIDECAR_TEST_NO_SKIP` is `all`.
pub(crate) fn not_permitted(what: impl Display) {
    skip(Lack::Permission, &format!("not permitted here: {what}"));
}

fn skip(lack: Lack, reason: &str) {
    let setting = std::env::var("TOKEN_SIDECAR_TEST_NO_SKIP").unwrap_or_default();
    assert!(!is_failure(lack, &setting), "must not be skipped: {reason}");
    // The test harness names the thread after the test.
    let thread = std::thread::current();
    let line = format!("skipped: {}: {reason}\n", thread.name().unwrap_or("a test"));
    // `eprintln!` would be captured, and shown only if the test failed.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

fn is_failure(lack: Lack, setting: &str) -> bool {
    match lack {
        Lack::Tool => matches!(setting, "1" | "all"),
        Lack::Permission => setting == "all",
    }
}

#[test]
fn skip_for_want_of_a_tool_fails_sooner_than_one_for_want_of_a_right() {
    let failures = |setting| [Lack::Tool, Lack::Permission].map(|lack| is_failure(lack, setting));
    assert_eq!(failures(""), [false, false]);
    assert_eq!(failures("1"), [true, false]);
    assert_eq!(failures("all"), [true, true]);
}
