//! A Sentinel group fails over under traffic.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use redis::AsyncCommands as _;
use redis::aio::MultiplexedConnection;
use tempfile::TempDir;
use tokio::time::sleep;

use super::{Fleet, PATH, SPREAD, TOKEN_KEY, all_well};
use crate::support::token::fingerprint;
use crate::support::{Stage, until, until_within};

/// A primary, a replica, and three Sentinels that watch them. All end when this is dropped.
struct Group {
    servers: Vec<Server>,
    sentinels: Vec<Server>,
}

/// A `redis-server` of any kind.
struct Server {
    child: Child,
    port: u16,
    _dir: TempDir,
}

impl Group {
    async fn start() -> Self {
        let primary = Server::start(|_| Vec::new()).await;
        let to = primary.port;
        let replica = Server::start(|_| vec![format!("replicaof 127.0.0.1 {to}")]).await;
        let mut sentinels = Vec::new();
        for _ in 0..3 {
            sentinels.push(Server::start_sentinel(to).await);
        }
        let group = Self { servers: vec![primary, replica], sentinels };
        group.is_complete().await;
        group
    }

    /// Waits until each Sentinel knows the replica and the others: sooner none can fail over.
    async fn is_complete(&self) {
        for sentinel in &self.sentinels {
            until("the Sentinels to know each other", async || {
                let known = sentinel.ask("SENTINEL MASTER shop").await;
                known.contains("num-slaves 1 ") && known.contains("num-other-sentinels 2 ")
            })
            .await;
        }
    }

    fn url(&self) -> String {
        let hosts: Vec<_> =
            self.sentinels.iter().map(|s| format!("127.0.0.1:{}", s.port)).collect();
        format!("redis+sentinel://{}/shop/0", hosts.join(","))
    }

    /// Kills the primary and waits until the replica has its place.
    async fn fail_over(&mut self) {
        self.servers[0].kill();
        let port = self.servers[1].port.to_string();
        until_within(Duration::from_secs(30), "the fail-over", async || {
            let primary = self.sentinels[0].ask("SENTINEL GET-MASTER-ADDR-BY-NAME shop").await;
            primary.contains(&port)
        })
        .await;
    }

    /// The value of `key` at the server that was the replica.
    async fn get(&self, key: &str) -> Option<String> {
        self.servers[1].connect().await?.get(key).await.unwrap()
    }
}

impl Server {
    async fn start(settings: impl Fn(u16) -> Vec<String>) -> Self {
        Self::start_as(&[], settings).await
    }

    async fn start_sentinel(primary: u16) -> Self {
        let settings = |_| {
            vec![
                format!("sentinel monitor shop 127.0.0.1 {primary} 2"),
                "sentinel down-after-milliseconds shop 1000".to_owned(),
                "sentinel failover-timeout shop 10000".to_owned(),
            ]
        };
        Self::start_as(&["--sentinel"], settings).await
    }

    /// A Sentinel writes its settings, so they are a file of its own.
    async fn start_as(arguments: &[&str], settings: impl Fn(u16) -> Vec<String>) -> Self {
        // Another process may take the port between its choice and the start: then another one.
        for _ in 0..10 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("server.conf");
            let own = [format!("port {port}"), "bind 127.0.0.1".into(), "save \"\"".into()];
            let folder = format!("dir {}", dir.path().display());
            let lines = [&own[..], &[folder], &settings(port)].concat();
            std::fs::write(&file, lines.join("\n") + "\n").unwrap();
            let child = Command::new("redis-server")
                .arg(&file)
                .args(arguments)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("redis-server is installed: tests/run.sh installs it");
            let mut server = Self { child, port, _dir: dir };
            if server.is_up().await {
                return server;
            }
        }
        panic!("redis-server does not start");
    }

    /// Waits for its first answer; false if it ends instead.
    async fn is_up(&mut self) -> bool {
        loop {
            if self.connect().await.is_some() {
                return true;
            }
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn connect(&self) -> Option<MultiplexedConnection> {
        let client = redis::Client::open(("127.0.0.1", self.port)).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.ok()?;
        redis::cmd("PING").exec_async(&mut connection).await.ok()?;
        Some(connection)
    }

    /// The answer to a command, its words between blanks.
    async fn ask(&self, command: &str) -> String {
        let Some(mut connection) = self.connect().await else { return String::new() };
        let words: Vec<&str> = command.split(' ').collect();
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        let answer: Vec<String> = command.query_async(&mut connection).await.unwrap_or_default();
        answer.join(" ") + " "
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Each sidecar asks again and again until `over`; every answer is 200.
async fn traffic(fleet: &Fleet, over: &AtomicBool) -> usize {
    let clients = fleet.members.iter().map(|member| async {
        let mut count = 0;
        while !over.load(Ordering::Relaxed) {
            all_well([&member.get(PATH).await]);
            count += 1;
            // A pace, not a wait: the machine has the fail-over to do as well.
            sleep(Duration::from_millis(10)).await;
        }
        count
    });
    join_all(clients).await.into_iter().sum()
}

/// Kills the token; returns the next one, once all have it.
async fn renewed(fleet: &Fleet) -> String {
    let before = fleet.stage.tokens.issued().len();
    fleet.kill_token();
    until_within(SPREAD, "a new token", async || fleet.stage.tokens.issued().len() > before).await;
    let token = fleet.stage.tokens.latest();
    fleet.all_have(&token).await;
    token
}

#[tokio::test]
async fn fail_over_under_traffic_is_not_seen_by_clients() {
    let mut group = Group::start().await;
    let mut stage = Stage::new().await;
    stage.set("REDIS_URL", group.url());
    let fleet = Fleet::start_on(stage, 3).await;
    let (history, over) = (fleet.watch(), AtomicBool::new(false));
    let story = async {
        renewed(&fleet).await;
        assert_eq!(fleet.solves(), 1);
        group.fail_over().await;
        // The new primary gets the token in force, whether or not the old one had passed it on.
        until_within(SPREAD, "the token at the new primary", async || {
            let stored = group.get(TOKEN_KEY).await.map(|token| fingerprint(&token));
            let status = fleet.members[0].sidecar.status().await;
            stored.is_some_and(|stored| status["token"]["fingerprint"] == stored.as_str())
        })
        .await;
        for member in &fleet.members {
            let well = |status: &serde_json::Value| status["redis"]["ok"] == true;
            member.sidecar.status_where("Redis to be well again", well).await;
        }
        let before = fleet.solves();
        let token = renewed(&fleet).await;
        assert_eq!(fleet.solves(), before + 1, "one for all at the new primary");
        until("it at the new primary", async || {
            group.get(TOKEN_KEY).await.as_ref() == Some(&token)
        })
        .await;
        over.store(true, Ordering::Relaxed);
    };
    let (count, ()) = tokio::join!(traffic(&fleet, &over), story);
    println!("{count} requests, all 200");
    history.check();
}
