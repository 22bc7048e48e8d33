//! A real `redis-server` on a free port, without persistence.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncCommands as _, IntoConnectionInfo as _};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::http::PATIENCE;

/// What a command has cost a server.
#[derive(Clone, Copy, Default)]
pub(crate) struct Calls {
    pub(crate) count: u64,
    /// The time of all of them together.
    pub(crate) micros: u64,
}

/// A running server. Killed when dropped.
pub(crate) struct Redis {
    child: Option<Child>,
    port: u16,
    password: Option<String>,
    dir: TempDir,
}

impl Redis {
    pub(crate) async fn start() -> Self {
        Self::start_with(None).await
    }

    /// Starts one that asks for `password`.
    pub(crate) async fn start_with(password: Option<&str>) -> Self {
        // Another process may take the port between its choice and the start: then another one.
        for _ in 0..10 {
            let mut redis = Self {
                child: None,
                port: free_port(),
                password: password.map(str::to_owned),
                dir: tempfile::tempdir().unwrap(),
            };
            if redis.spawn().await {
                return redis;
            }
        }
        panic!("redis-server does not start");
    }

    /// Where it is or, for a test of its absence, was.
    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again, empty, on the same port.
    pub(crate) async fn restart(&mut self) {
        assert!(self.spawn().await, "redis-server does not start again");
    }

    /// Freezes it: connections are accepted and nothing is answered.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().expect("a running server");
        kill_process(Pid::from_child(pid), signal).unwrap();
    }

    async fn spawn(&mut self) -> bool {
        let port = self.port.to_string();
        let mut command = Command::new("redis-server");
        command.args([
            "--port",
            &port,
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
        ]);
        command.arg(self.dir.path()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some(password) = &self.password {
            command.args(["--requirepass", password]);
        }
        self.child =
            Some(command.spawn().expect("redis-server is installed: tests/run.sh installs it"));
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while tokio::time::Instant::now() < deadline {
            if self.connect().await.is_ok() {
                return true;
            }
            if self.child.as_mut().unwrap().try_wait().unwrap().is_some() {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }

    async fn connect(&self) -> redis::RedisResult<MultiplexedConnection> {
        let mut info = format!("redis://127.0.0.1:{}", self.port).into_connection_info()?;
        if let Some(password) = &self.password {
            let settings = info.redis_settings().clone().set_password(password);
            info = info.set_redis_settings(settings);
        }
        let client = redis::Client::open(info)?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        let (): () = redis::cmd("PING").query_async(&mut connection).await?;
        Ok(connection)
    }

    pub(crate) async fn get(&self, key: &str) -> Option<String> {
        self.connect().await.unwrap().get(key).await.unwrap()
    }

    pub(crate) async fn set(&self, key: &str, value: &str) {
        let (): () = self.connect().await.unwrap().set_ex(key, value, 86_400).await.unwrap();
    }

    pub(crate) async fn delete(&self, key: &str) {
        let (): () = self.connect().await.unwrap().del(key).await.unwrap();
    }

    /// Makes it a replica of a server that does not exist.
    pub(crate) async fn become_replica(&self) {
        self.command::<()>(&["REPLICAOF", "127.0.0.1", "1"]).await;
    }

    /// Runs the words as a command.
    pub(crate) async fn command<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        let mut connection = self.connect().await.unwrap();
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]).query_async(&mut connection).await.unwrap()
    }

    /// Runs the words as a command of another user; the error as text.
    pub(crate) async fn command_as(
        &self,
        user: &str,
        password: &str,
        words: &[&str],
    ) -> Result<redis::Value, String> {
        let info = self.url().into_connection_info().unwrap();
        let login = info.redis_settings().clone().set_username(user).set_password(password);
        let client = redis::Client::open(info.set_redis_settings(login)).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let mut command = redis::cmd(words[0]);
        let answer = command.arg(&words[1..]).query_async(&mut connection).await;
        answer.map_err(|error| error.to_string())
    }

    /// The text at `key` in another database.
    pub(crate) async fn get_in(&self, database: u32, key: &str) -> Option<String> {
        let mut commands = redis::pipe();
        commands.cmd("SELECT").arg(database).ignore().cmd("GET").arg(key);
        let mut connection = self.connect().await.unwrap();
        let (value,) = commands.query_async(&mut connection).await.unwrap();
        value
    }

    /// Puts a text there.
    pub(crate) async fn set_in(&self, database: u32, key: &str, value: &str) {
        let mut commands = redis::pipe();
        commands.cmd("SELECT").arg(database).ignore().cmd("SET").arg(key).arg(value).ignore();
        let mut connection = self.connect().await.unwrap();
        let (): () = commands.query_async(&mut connection).await.unwrap();
    }

    /// Asks for this password from now on.
    pub(crate) async fn change_password(&mut self, password: &str) {
        self.command::<()>(&["CONFIG", "SET", "requirepass", password]).await;
        self.password = Some(password.to_owned());
    }

    /// Every key with its value, in order.
    pub(crate) async fn contents(&self) -> Vec<(String, String)> {
        let mut connection = self.connect().await.unwrap();
        let mut keys: Vec<String> = connection.keys("*").await.unwrap();
        keys.sort();
        let mut contents = Vec::new();
        for key in keys {
            let value = connection.get(&key).await.unwrap();
            contents.push((key, value));
        }
        contents
    }

    /// The number after `field:` in `INFO section`.
    pub(crate) async fn info(&self, section: &str, field: &str) -> u64 {
        let mut connection = self.connect().await.unwrap();
        let text: String =
            redis::cmd("INFO").arg(section).query_async(&mut connection).await.unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value.unwrap_or_else(|| panic!("no {field} in {text}")).parse().unwrap()
    }

    /// Calls of each command so far.
    pub(crate) async fn calls(&self) -> BTreeMap<String, Calls> {
        let mut connection = self.connect().await.unwrap();
        let text: String =
            redis::cmd("INFO").arg("commandstats").query_async(&mut connection).await.unwrap();
        let calls = |line: &str| {
            let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
            let (count, rest) = rest.split_once(",usec=")?;
            let micros = rest.split(',').next()?.parse().ok()?;
            Some((name.to_owned(), Calls { count: count.parse().ok()?, micros }))
        };
        text.lines().filter_map(calls).collect()
    }

    /// Seconds that `key` has left.
    pub(crate) async fn ttl(&self, key: &str) -> i64 {
        self.connect().await.unwrap().ttl(key).await.unwrap()
    }

    /// Waits until `key` has this value.
    pub(crate) async fn becomes(&self, key: &str, value: &str) {
        super::until(&format!("{key} in Redis"), async || {
            self.get(key).await.as_deref() == Some(value)
        })
        .await;
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
