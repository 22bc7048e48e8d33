//! Redis as its `StatefulSet` starts it, on a real `redis-server`.

use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::{containers, documents, from_secret, object, pod, strings, text};
use crate::support::sidecar::{output, stderr, stdout};
use crate::support::{Stage, until};

/// A password that no quoting may spoil.
const ODD: &str = "p@ss w#o\"r'd $HOME \\n`id` {ü}";

fn container() -> Value {
    let redis = object("StatefulSet", "redis");
    containers(pod(&redis)).next().unwrap().clone()
}

/// A free port of loopback.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The command of the container with folders and a port of the test's own, and nothing else changed.
fn start_command(dir: &TempDir, port: u16, password: &str) -> Command {
    let container = container();
    let command: Vec<&str> = strings(&container["command"]).collect();
    let (script, shell) = command.split_last().unwrap();
    let data = dir.path().display().to_string();
    let mut script = (*script).to_owned();
    for (from, to) in [
        ("/run/redis/", format!("{data}/")),
        ("--dir /data", format!("--dir {data}")),
        ("exec redis-server ", format!("exec redis-server --port {port} --bind 127.0.0.1 ")),
    ] {
        assert!(script.contains(from), "{from}: {script}");
        script = script.replace(from, &to);
    }
    let mut command = Command::new(shell[0]);
    command.args(&shell[1..]).arg(script).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap()).env("REDIS_PASSWORD", password);
    command.stdin(Stdio::null());
    command
}

/// A running server. Killed when dropped.
struct Server {
    child: Child,
    port: u16,
    dir: TempDir,
}

impl Server {
    async fn start() -> Self {
        // Another process may take the port between its choice and the start: then another one.
        for _ in 0..10 {
            let dir = TempDir::new().unwrap();
            let port = free_port();
            let child = start_command(&dir, port, ODD).stdout(Stdio::null()).spawn().unwrap();
            let mut server = Self { child, port, dir };
            if server.comes_up().await {
                return server;
            }
        }
        panic!("Redis does not start");
    }

    /// Waits until it is ready, or has ended.
    async fn comes_up(&mut self) -> bool {
        let mut ready = false;
        until("Redis to be ready", async || {
            ready = self.is_ready().await;
            ready || self.child.try_wait().unwrap().is_some()
        })
        .await;
        ready
    }

    /// The probe of the container, with the password of its environment.
    async fn is_ready(&self) -> bool {
        let container = container();
        let command: Vec<&str> = strings(&container["readinessProbe"]["exec"]["command"]).collect();
        assert_eq!(command[0], "redis-cli");
        self.cli(ODD, &command[1..]).await.status.success()
    }

    async fn cli(&self, password: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new("redis-cli");
        command.args(["-p", &self.port.to_string()]).args(arguments).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap()).env("REDISCLI_AUTH", password);
        output(command).await
    }

    async fn says(&self, arguments: &[&str]) -> String {
        let output = self.cli(ODD, arguments).await;
        (stdout(&output) + &stderr(&output)).trim().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn probe_has_the_password_of_the_server() {
    let container = container();
    let variables = from_secret(&container);
    let key = |name: &str| {
        let found =
            variables.iter().find(|(variable, _)| *variable == name).expect("from the Secret");
        text(&found.1["key"]).to_owned()
    };
    assert_eq!(key("REDISCLI_AUTH"), key("REDIS_PASSWORD"));
}

#[tokio::test]
async fn sidecar_keeps_its_token_in_redis_as_it_is_deployed() {
    let server = Server::start().await;
    let mut stage = Stage::new().await;
    stage.set("REDIS_URL", format!("redis://127.0.0.1:{}/0", server.port));
    stage.set("REDIS_PASSWORD", ODD);
    let world = stage.start().await;
    world.kill_token();
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    let token = world.tokens.latest();
    until("the token in Redis", async || {
        server.says(&["get", "chitai_gorod_token"]).await == token
    })
    .await;
    assert!(server.says(&["get", "{chitai_gorod_token}:meta"]).await.contains("sha256"));
    assert!(!world.sidecar.log().contains("NOPERM"));
}

#[tokio::test]
async fn redis_answers_nobody_without_the_password() {
    let server = Server::start().await;
    for password in ["", "x", "p@ss w#o"] {
        let output = server.cli(password, &["-e", "get", "chitai_gorod_token"]).await;
        let said = stdout(&output) + &stderr(&output);
        assert!(!output.status.success() && said.contains("NOAUTH"), "{said}");
    }
}

#[tokio::test]
async fn redis_refuses_other_keys_and_channels_and_what_is_dangerous() {
    let server = Server::start().await;
    for command in [
        &["get", "other"][..],
        &["set", "other", "x"],
        &["publish", "other", "x"],
        &["keys", "*"],
        &["flushall"],
        &["config", "get", "*"],
        &["config", "set", "dir", "/tmp"],
        &["acl", "list"],
        &["shutdown"],
        &["replicaof", "127.0.0.1", "1"],
        &["client", "list"],
        &["module", "list"],
    ] {
        let said = server.says(command).await;
        assert!(said.contains("NOPERM"), "{command:?}: {said}");
    }
    for command in [
        &["set", "{chitai_gorod_token}:lease", "x", "nx", "px", "1000"][..],
        &["publish", "{chitai_gorod_token}:events", "x"],
        &["eval", "return redis.call('get', KEYS[1])", "1", "chitai_gorod_token"],
        &["ttl", "chitai_gorod_cookies"],
        &["info", "replication"],
    ] {
        let said = server.says(command).await;
        assert!(!said.contains("NOPERM") && !said.contains("ERR"), "{command:?}: {said}");
    }
}

#[tokio::test]
async fn redis_keeps_its_keys_and_only_the_hash_of_its_password_on_disk() {
    let server = Server::start().await;
    assert_eq!(server.says(&["set", "chitai_gorod_token", "x"]).await, "OK");
    let command_line = std::fs::read(format!("/proc/{}/cmdline", server.child.id())).unwrap();
    assert!(!String::from_utf8_lossy(&command_line).contains("p@ss"));
    let dir = server.dir.path();
    assert!(dir.join("appendonlydir").is_dir());
    let rules = std::fs::read_to_string(dir.join("users.acl")).unwrap();
    assert!(rules.starts_with("user default on #") && !rules.contains("p@ss"), "{rules}");
}

#[tokio::test]
async fn redis_does_not_start_with_a_placeholder_or_without_a_password() {
    let secret = documents("secret.example.yaml").remove(0);
    for password in [text(&secret["stringData"]["REDIS_PASSWORD"]), ""] {
        let dir = TempDir::new().unwrap();
        let output = output(start_command(&dir, free_port(), password)).await;
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("REDIS_PASSWORD") && said.contains("openssl rand -hex 32"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}
