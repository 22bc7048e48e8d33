//! The scripts, each an operation that happens as a whole.
//!
//! # Invariants
//!
//! - A script may run twice, since a connection may break before its answer:
//!   that does no harm, and who has the lease is told so again.
//! - No script asks for the time: what must end has a time to live.

use std::{collections::HashSet, time::Duration};

use redis::{FromRedisValue, Pipeline, Role, pipe};
use tokio::time::timeout;

use super::{RedisStore, StoreError, sha1_hex};

/// Bounds an operation, with the script sent once more where need be.
const LIMIT: Duration = Duration::from_millis(1_150);

/// Which script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Enter,
    Renew,
    Release,
    Commit,
    Share,
    HandOn,
    Fail,
    Deny,
}

/// A script to be run, and what it is told beside the keys and the channel.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) operation: Operation,
    pub(crate) arguments: Vec<String>,
}

impl Call {
    pub(super) fn new<const N: usize>(operation: Operation, arguments: [&str; N]) -> Self {
        Self { operation, arguments: arguments.map(str::to_owned).to_vec() }
    }
}

/// A script and its name in Redis.
struct Script {
    source: &'static str,
    sha1: String,
}

impl Script {
    fn new(source: &'static str) -> Self {
        Self { source, sha1: sha1_hex(source.as_bytes()) }
    }
}

/// All of them.
pub(super) struct Scripts {
    enter: Script,
    renew: Script,
    release: Script,
    commit: Script,
    share: Script,
    hand_on: Script,
    fail: Script,
    deny: Script,
}

macro_rules! script {
    ($file:literal) => {
        Script::new(concat!(include_str!("scripts/common.lua"), include_str!($file)))
    };
}

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            enter: script!("scripts/enter.lua"),
            renew: script!("scripts/renew.lua"),
            release: script!("scripts/release.lua"),
            commit: script!("scripts/commit.lua"),
            share: script!("scripts/share.lua"),
            hand_on: script!("scripts/hand_on.lua"),
            fail: script!("scripts/fail.lua"),
            deny: script!("scripts/deny.lua"),
        }
    }

    fn of(&self, operation: Operation) -> &Script {
        match operation {
            Operation::Enter => &self.enter,
            Operation::Renew => &self.renew,
            Operation::Release => &self.release,
            Operation::Commit => &self.commit,
            Operation::Share => &self.share,
            Operation::HandOn => &self.hand_on,
            Operation::Fail => &self.fail,
            Operation::Deny => &self.deny,
        }
    }
}

/// The names of all that the scripts touch, in the order of their `KEYS`.
pub(super) struct Keys {
    names: [String; 10],
    channel: String,
}

impl Keys {
    pub(super) fn new(key: &str, cookies_key: &str) -> Self {
        let beside = |suffix: &str| format!("{{{key}}}:{suffix}");
        let own = ["meta", "lease", "epoch", "unverified", "backoff", "denied", "tries", "waiting"];
        let [meta, lease, epoch, unverified, backoff, denied, tries, waiting] = own.map(beside);
        let (token, cookies) = (key.to_owned(), cookies_key.to_owned());
        let names =
            [token, cookies, meta, lease, epoch, unverified, backoff, denied, tries, waiting];
        Self { names, channel: beside("events") }
    }

    /// Where sidecars tell each other to look.
    pub(super) fn channel(&self) -> &str {
        &self.channel
    }

    /// Whether no name stands for two things.
    pub(super) fn are_distinct(&self) -> bool {
        let different: HashSet<_> = self.names.iter().collect();
        different.len() == self.names.len()
    }

    pub(super) fn meta(&self) -> &str {
        &self.names[2]
    }

    #[cfg(test)]
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }
}

impl RedisStore {
    /// Runs a script by its name, and sends it where the server does not know it.
    pub(super) async fn call<T: FromRedisValue>(&self, call: Call) -> Result<T, StoreError> {
        let (script, arguments) = (self.scripts.of(call.operation), &call.arguments);
        let both = async {
            let by_name = self.invocation("EVALSHA", &script.sha1, arguments);
            match self.link.run(&by_name).await {
                Err(StoreError::RedisRefused { code }) if code == "NOSCRIPT" => {
                    let in_full = self.invocation("EVAL", script.source, arguments);
                    self.link.run(&in_full).await
                }
                answer => answer,
            }
        };
        let answer = timeout(LIMIT, both).await;
        match answer.unwrap_or_else(|_| Err(self.link.note_silence())) {
            Ok((answer,)) => Ok(answer),
            Err(error) => Err(self.plainer(error).await),
        }
    }

    /// Before the log-in a server takes no command of this length, and does
    /// not say that it wants a password. A Sentinel knows none of our commands.
    pub(super) async fn plainer(&self, error: StoreError) -> StoreError {
        match error {
            StoreError::RedisRefused { code } if code == "ERR" => match self.ping().await {
                Err(password @ StoreError::RedisPassword) => password,
                _ if self.is_at_sentinel().await => StoreError::RedisIsSentinel,
                _ => StoreError::RedisRefused { code },
            },
            error => error,
        }
    }

    async fn is_at_sentinel(&self) -> bool {
        let mut commands = pipe();
        commands.cmd("ROLE");
        let role: Result<(Role,), _> = self.link.run(&commands).await;
        matches!(role, Ok((Role::Sentinel { .. },)))
    }

    fn invocation(&self, command: &str, script: &str, arguments: &[String]) -> Pipeline {
        let mut commands = pipe();
        let invocation = commands.cmd(command).arg(script).arg(self.keys.names.len());
        let invocation = invocation.arg(&self.keys.names).arg(&self.keys.channel);
        invocation.arg(arguments);
        commands
    }
}

/// The code of the command that failed inside a script, which servers wrap in
/// an `ERR` of the script's.
pub(super) fn code_within<'a>(code: &'a str, detail: &'a str) -> &'a str {
    if code != "ERR" {
        return code;
    }
    if detail.contains("executing the script can't") || detail.contains("ACL failure in script") {
        return "NOPERM";
    }
    let wrapped = detail.split_once(": -").filter(|_| detail.contains("@user_script"));
    let inner = wrapped.and_then(|(_, error)| error.split(' ').next());
    inner.unwrap_or(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_of_a_command_inside_a_script_is_found_in_every_dialect() {
        for (code, detail, expected) in [
            (
                "OOM",
                "command not allowed when used memory > 'maxmemory'. script: 1, on @user_script:1.",
                "OOM",
            ),
            (
                "ERR",
                "Error running script (call to f_1): @user_script:1: -OOM command not allowed",
                "OOM",
            ),
            (
                "ERR",
                "Error running script (call to f_1): @user_script: 5: -READONLY You can't write",
                "READONLY",
            ),
            (
                "ERR",
                "The user executing the script can't run this command or subcommand script: 1, on @user_script:1.",
                "NOPERM",
            ),
            (
                "ERR",
                "Error running script (call to f_1): @user_script:1: @user_script: 1: The user executing the script can't run this command or subcommand",
                "NOPERM",
            ),
            (
                "ERR",
                "ACL failure in script: User x has no permissions to run the 'set' command",
                "NOPERM",
            ),
            ("ERR", "user_script:1: bad argument", "ERR"),
        ] {
            assert_eq!(code_within(code, detail), expected, "{detail}");
        }
    }
}
