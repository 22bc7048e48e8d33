//! The real binary as a child process.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::sync::watch;

use super::http::{PATIENCE, Response, Wire};
use super::until;

/// The program under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_token-sidecar");

/// Variables of a process, in order; a later one wins.
pub(crate) type Variables = Vec<(String, String)>;

/// A command that runs the program with exactly these variables.
pub(crate) fn command(arguments: &[&str], variables: &Variables, dir: &Path) -> Command {
    command_by(&[BINARY], arguments, variables, dir)
}

/// The same, run by the words of `program`, the last of which is the program itself.
fn command_by(program: &[&str], arguments: &[&str], variables: &Variables, dir: &Path) -> Command {
    let mut command = Command::new(program[0]);
    command.args(&program[1..]).args(arguments).current_dir(dir).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null());
    command
}

/// Runs the program to its end.
pub(crate) async fn run(arguments: &[&str], variables: &Variables, dir: &Path) -> Output {
    output(command(arguments, variables, dir)).await
}

/// Runs a command to its end off the runtime's threads, so that the stand-ins go on answering.
/// One that does not end is killed, and what it said is shown.
pub(crate) async fn output(command: Command) -> Output {
    output_within(PATIENCE * 2, command).await
}

/// The same with a time of its own.
pub(crate) async fn output_within(patience: Duration, mut command: Command) -> Output {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let pid = Pid::from_child(&child);
    let mut run = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    if let Ok(output) = tokio::time::timeout(patience, &mut run).await {
        return output.unwrap();
    }
    let _ = kill_process(pid, Signal::KILL);
    let output = run.await.unwrap();
    panic!("{command:?} did not end: {}{}", stdout(&output), stderr(&output));
}

/// Standard output as text.
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Standard error as text.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A running sidecar. Killed when dropped, which fails the test if it has panicked.
pub(crate) struct Sidecar {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    seen: watch::Receiver<usize>,
    proxy: SocketAddr,
    admin: SocketAddr,
    sni: Option<SocketAddr>,
}

impl Sidecar {
    /// Starts `run` and waits until it listens.
    pub(crate) async fn start(variables: &Variables, dir: &Path) -> Self {
        Self::start_by(&[], variables, dir).await
    }

    /// The same as the child of `runner`, a command that becomes the program at its end.
    pub(crate) async fn start_by(runner: &[&str], variables: &Variables, dir: &Path) -> Self {
        let program = [runner, &[BINARY]].concat();
        let mut child = command_by(&program, &["run"], variables, dir)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (sender, seen) = watch::channel(0);
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let kept = lines.clone();
        std::thread::spawn(move || {
            for line in stderr.split(b'\n').map_while(Result::ok) {
                kept.lock().unwrap().push(String::from_utf8_lossy(&line).into_owned());
                sender.send_modify(|count| *count += 1);
            }
        });
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        let mut sidecar = Self { child, lines, seen, proxy: nowhere, admin: nowhere, sni: None };
        let listening = sidecar.logged("listening").await;
        let addr = |field: &str| {
            listening[field].as_str().and_then(|addr| addr.parse().ok()).expect("an address")
        };
        (sidecar.proxy, sidecar.admin) = (addr("proxy"), addr("admin"));
        sidecar.sni = listening["sni"].as_str().map(|addr| addr.parse().unwrap());
        sidecar
    }

    pub(crate) fn proxy(&self) -> SocketAddr {
        self.proxy
    }

    pub(crate) fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Where it takes TLS by SNI.
    pub(crate) fn sni(&self) -> SocketAddr {
        self.sni.expect("a sidecar with SNI_LISTEN")
    }

    /// The log so far.
    pub(crate) fn log(&self) -> String {
        self.lines.lock().unwrap().join("\n")
    }

    /// The log so far as JSON events, each with its fields at the top.
    pub(crate) fn events(&self) -> Vec<Value> {
        let lines = self.lines.lock().unwrap();
        lines.iter().filter_map(|line| serde_json::from_str(line).ok()).map(flatten).collect()
    }

    /// Waits for a JSON log line with this message and returns its fields.
    pub(crate) async fn logged(&mut self, message: &str) -> Value {
        let wait = async {
            loop {
                let found = self.events().into_iter().find(|event| event["message"] == message);
                if let Some(event) = found {
                    return Some(event);
                }
                if self.seen.changed().await.is_err() {
                    return None;
                }
            }
        };
        let event = tokio::time::timeout(PATIENCE, wait).await.ok().flatten();
        event.unwrap_or_else(|| panic!("`{message}` was not logged"))
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Asks it to drain.
    pub(crate) fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Has it ended?
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for the end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        until("the sidecar to end", async || self.child.try_wait().unwrap().is_some()).await;
        self.child.wait().unwrap()
    }

    /// Its resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Its open files and sockets.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// A request to the admin port.
    pub(crate) async fn ask(&self, method: &str, path: &str) -> Response {
        self.ask_with(method, path, "").await
    }

    /// The same with more header lines, each ended by CRLF.
    pub(crate) async fn ask_with(&self, method: &str, path: &str, more: &str) -> Response {
        let mut wire = Wire::connect(self.admin).await;
        let host = self.admin;
        wire.send(format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n{more}\r\n"
        ))
        .await;
        wire.response(method).await
    }

    pub(crate) async fn status(&self) -> Value {
        let response = self.ask("GET", "/status").await;
        assert_eq!(response.status, 200, "{response:?}");
        response.json()
    }

    /// Waits until `/status` satisfies `check`.
    pub(crate) async fn status_where(&self, what: &str, check: impl Fn(&Value) -> bool) -> Value {
        until(what, async || check(&self.status().await)).await;
        self.status().await
    }

    pub(crate) async fn ready(&self) {
        until("/ready", async || self.ask("GET", "/ready").await.status == 200).await;
    }

    pub(crate) async fn metrics(&self) -> String {
        self.ask("GET", "/metrics").await.text()
    }

    /// The sum of the samples of `name` whose labels contain each of `labels`.
    pub(crate) async fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        sample(&self.metrics().await, name, labels)
    }

    /// The generation of the current token, 0 without one.
    pub(crate) async fn generation(&self) -> u64 {
        self.status().await["token"]["generation"].as_u64().unwrap_or(0)
    }

    /// Ends it without a farewell.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.kill();
        let log = self.log();
        if std::thread::panicking() {
            let mut note = String::new();
            let told = log.lines().filter(|line| !line.contains("admin request"));
            for line in told.rev().take(200).collect::<Vec<_>>().iter().rev() {
                let _ = writeln!(note, "    {line}");
            }
            eprintln!("log of the sidecar:\n{note}");
        } else {
            assert!(!log.contains("panicked"), "the sidecar panicked:\n{log}");
        }
    }
}

/// Lifts the fields of a `tracing` event to the top.
fn flatten(mut event: Value) -> Value {
    let fields = event["fields"].take();
    if let (Some(event), Value::Object(fields)) = (event.as_object_mut(), fields) {
        event.remove("fields");
        event.extend(fields);
    }
    event
}

/// See [`Sidecar::metric`].
pub(crate) fn sample(metrics: &str, name: &str, labels: &[&str]) -> f64 {
    let matches = |line: &&str| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| {
            rest.starts_with(['{', ' ']) && labels.iter().all(|label| rest.contains(label))
        })
    };
    let value = |line: &str| {
        line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()).unwrap_or(0.0)
    };
    metrics.lines().filter(matches).map(value).sum()
}
