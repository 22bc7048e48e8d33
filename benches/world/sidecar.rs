//! The sidecar's process, and what it has used.

use std::env;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::param::clock_ticks_per_second;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_token-sidecar");

/// A running sidecar, killed when dropped.
pub(crate) struct Sidecar {
    child: Child,
    address: SocketAddr,
}

impl Sidecar {
    /// Starts it in `folder` and waits until it listens.
    pub(super) fn start<'a>(
        folder: &Path,
        runner: &[&str],
        variables: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Self {
        let command = [runner, &[BINARY, "run"]].concat();
        let mut child = Command::new(command[0])
            .args(&command[1..])
            .current_dir(folder)
            // Settings of whoever runs this are not those that are measured.
            .env_clear()
            .envs(env::var_os("PATH").map(|path| ("PATH", path)))
            .envs(variables)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", command[0]));
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines.by_ref().map_while(Result::ok).find_map(|line| listening(&line));
        // Whoever reads no more would stop it.
        thread::spawn(move || lines.for_each(drop));
        Self { child, address: address.expect("the sidecar does not listen") }
    }

    /// Where it takes proxy requests.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Processor time used so far, in ticks of 10 ms.
    pub(crate) fn cpu_time(&self) -> Duration {
        let stat = self.read("stat");
        let (_, fields) = stat.rsplit_once(')').unwrap();
        // The 14th and the 15th of all (proc(5)): user and system time.
        let ticks: u64 =
            fields.split_whitespace().skip(11).take(2).flat_map(str::parse::<u64>).sum();
        Duration::from_secs(ticks) / u32::try_from(clock_ticks_per_second()).unwrap()
    }

    /// Memory that it has now, in bytes.
    pub(crate) fn memory(&self) -> u64 {
        let status = self.read("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap()
    }

    /// Ends it in order.
    pub(crate) fn stop(mut self) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::TERM).unwrap();
        let ended = self.child.wait().unwrap();
        assert!(ended.success(), "{ended}");
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        // After `stop` there is nothing left to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address in the log's line that tells it.
fn listening(line: &str) -> Option<SocketAddr> {
    let event: Value = serde_json::from_str(line).ok()?;
    let fields = event.get("fields").unwrap_or(&event);
    fields.get("proxy")?.as_str()?.parse().ok()
}
