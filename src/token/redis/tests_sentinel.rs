//! Sentinels: real ones, with real servers.

use std::{
    fmt::Write as _,
    fs,
    net::TcpListener,
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use super::tests::{BOUND, Certificates, NOW, Server, published, settings, timed};
use super::tests_notices::Follower;
use super::*;
use crate::config::Secret;

const SERVICE: &str = "shop";

/// A Sentinel on a port of its own, killed on drop.
pub(super) struct Sentinel {
    pub(super) port: u16,
    _folder: TempDir,
    process: Child,
}

impl Sentinel {
    pub(super) async fn of(primary: u16) -> Self {
        Self::with(primary, "").await
    }

    async fn with(primary: u16, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let listen = if more.contains("tls-port") { 0 } else { port };
        let (own, shared): (Vec<_>, Vec<_>) =
            more.lines().partition(|line| line.starts_with("sentinel "));
        let text = format!(
            "port {listen}\nbind 127.0.0.1\ndir {}\n{}\n\
             sentinel monitor {SERVICE} 127.0.0.1 {primary} 1\n{}\n",
            folder.path().display(),
            shared.join("\n").replace("tls-port", &format!("tls-port {port}")),
            own.join("\n"),
        );
        let file = folder.path().join("sentinel.conf");
        fs::write(&file, text).unwrap();
        let process = Command::new("redis-server")
            .arg(file)
            .arg("--sentinel")
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        let mut sentinel = Self { port, _folder: folder, process };
        while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            let ended = sentinel.process.try_wait().unwrap();
            assert!(ended.is_none(), "the Sentinel has ended: {ended:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        sentinel
    }

    fn freeze(&self) {
        let mut kill = Command::new("kill");
        kill.arg("-STOP").arg(self.process.id().to_string());
        assert!(kill.status().unwrap().success());
    }

    async fn ask<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        let client = redis::Client::open(("127.0.0.1", self.port)).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        redis::cmd("SENTINEL").arg(words).query_async(&mut connection).await.unwrap()
    }

    /// From now on it names another server.
    async fn point_to(&self, primary: u16) {
        let () = self.ask(&["REMOVE", SERVICE]).await;
        let () = self.ask(&["MONITOR", SERVICE, "127.0.0.1", &primary.to_string(), "1"]).await;
    }

    /// How many replicas it could put in the primary's place.
    async fn replicas(&self) -> usize {
        let replicas: Vec<std::collections::HashMap<String, String>> =
            self.ask(&["REPLICAS", SERVICE]).await;
        replicas.iter().filter(|replica| replica["master-link-status"] == "ok").count()
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The settings for these Sentinels' ports.
fn by(ports: &[u16]) -> RedisSettings {
    let nodes: Vec<_> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    settings(&format!("redis+sentinel://{}/{SERVICE}", nodes.join(",")))
}

/// A port at which nobody listens while the socket lives.
fn nobody() -> (tokio::net::TcpSocket, u16) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

#[tokio::test]
async fn the_primary_is_the_one_that_a_sentinel_names() {
    let server = Server::start(&[]).await;
    let sentinel = Sentinel::of(server.port).await;
    let mut settings = by(&[sentinel.port]);
    let store = RedisStore::new(settings.clone()).unwrap();
    timed(store.save(&published(true), NOW)).await.unwrap();
    assert!(timed(store.load()).await.unwrap().unwrap().verified);
    settings.url = Secret::new(format!("{}/3", settings.url.expose()));
    timed(RedisStore::new(settings).unwrap().save(&published(true), NOW)).await.unwrap();
    let info: String = server.command(&["INFO", "keyspace"]).await;
    assert!(info.contains("db0:keys=3") && info.contains("db3:keys=3"), "{info}");
}

#[tokio::test]
async fn sentinels_that_are_down_or_hang_cost_nothing_while_one_answers() {
    let server = Server::start(&[]).await;
    let (_kept, down) = nobody();
    let [hung, well] = [Sentinel::of(server.port).await, Sentinel::of(server.port).await];
    hung.freeze();
    let store = RedisStore::new(by(&[hung.port, down, hung.port, down, well.port])).unwrap();
    store.ping().await.unwrap();
    drop(well);
    store.ping().await.expect("no Sentinel is needed while the connection lasts");
    let store = RedisStore::new(by(&[hung.port, down])).unwrap();
    let error = timed(store.ping()).await.unwrap_err();
    assert!(error.is_silence(), "{error}");
}

#[tokio::test]
async fn a_demoted_primary_is_left_at_its_first_refusal() {
    let old = Server::start(&[]).await;
    let new = Server::start(&[]).await;
    let sentinel = Sentinel::of(old.port).await;
    let store = RedisStore::new(by(&[sentinel.port])).unwrap();
    timed(store.save(&published(true), NOW)).await.unwrap();
    sentinel.point_to(new.port).await;
    // It ends no connection, and refuses writes from now on.
    let _: () = old.command(&["REPLICAOF", "127.0.0.1", &new.port.to_string()]).await;
    timed(store.save(&published(true), NOW)).await.unwrap();
    assert_eq!(new.command::<u64>(&["DBSIZE"]).await, 3);
}

/// A primary and its replica, and a Sentinel that fails over within a second or two.
async fn group() -> (Server, Server, Sentinel) {
    let primary = Server::start(&[]).await;
    let port = primary.port.to_string();
    let replica = Server::start(&["--replicaof", "127.0.0.1", &port]).await;
    let settings = format!(
        "sentinel down-after-milliseconds {SERVICE} 500\nsentinel failover-timeout {SERVICE} 3000"
    );
    let sentinel = Sentinel::with(primary.port, &settings).await;
    while sentinel.replicas().await == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (primary, replica, sentinel)
}

/// Saves until it is done; the time bounds a fail-over and the pauses in it.
async fn saved(store: &RedisStore) {
    let save = async {
        while timed(store.save(&published(true), NOW)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), save).await.expect("a primary");
}

#[tokio::test]
async fn a_primary_that_freezes_is_left_for_its_replica_and_not_used_when_it_wakes() {
    let (old, new, sentinel) = group().await;
    let store = RedisStore::new(by(&[sentinel.port])).unwrap();
    let mut follower = Follower::of(by(&[sentinel.port]));
    saved(&store).await;
    follower.signal_within(BOUND).await;
    old.signal("-STOP");
    saved(&store).await;
    let _: () = new.command(&["CONFIG", "RESETSTAT"]).await;
    // It takes itself for the primary still.
    old.signal("-CONT");
    for _ in 0..20 {
        timed(store.save(&published(true), NOW)).await.unwrap();
        assert!(timed(store.load()).await.unwrap().is_some());
    }
    let stats: String = new.command(&["INFO", "commandstats"]).await;
    assert!(stats.contains("cmdstat_evalsha:calls=20,"), "{stats}");
    // The subscription was at the old one, too.
    let subscribed = async {
        while new.command::<u64>(&["PUBLISH", "{chitai_gorod_token}:events", "{}"]).await == 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let limit = notices::SILENCE + pause::LONGEST + BOUND;
    tokio::time::timeout(limit, subscribed).await.expect("a subscription at the new one");
    follower.signal_within(BOUND).await;
}

#[tokio::test]
async fn a_server_without_sentinels_that_refuses_writes_is_said_to() {
    let server = Server::start(&[]).await;
    let store = server.store();
    store.save(&published(true), NOW).await.unwrap();
    let _: () = server.command(&["REPLICAOF", "127.0.0.1", "1"]).await;
    let error = store.save(&published(true), NOW).await.unwrap_err();
    assert!(matches!(&error, StoreError::RedisRefused { code } if code == "READONLY"), "{error:?}");
}

#[tokio::test]
async fn a_named_server_that_is_no_primary_is_not_used() {
    let server = Server::start(&[]).await;
    let _: () = server.command(&["REPLICAOF", "127.0.0.1", "1"]).await;
    let sentinel = Sentinel::of(server.port).await;
    let error = timed(RedisStore::new(by(&[sentinel.port])).unwrap().load()).await.unwrap_err();
    assert!(matches!(error, StoreError::RedisNoPrimary), "{error:?}");
}

#[tokio::test]
async fn a_service_that_no_sentinel_knows_is_said_to_be_missing() {
    let server = Server::start(&[]).await;
    let sentinel = Sentinel::of(server.port).await;
    let url = format!("redis+sentinel://127.0.0.1:{}/another", sentinel.port);
    let error = timed(RedisStore::new(settings(&url)).unwrap().ping()).await.unwrap_err();
    assert!(matches!(error, StoreError::RedisNoPrimary), "{error:?}");
    assert!(error.to_string().contains("service in REDIS_URL"));
}

#[tokio::test]
async fn servers_and_sentinels_have_passwords_of_their_own() {
    let password = "p@ss:w/rd#%";
    let server = Server::start(&["--requirepass", password]).await;
    let more = "requirepass \"sentinel's\"";
    let sentinel = Sentinel::with(server.port, more).await;
    let mut settings = by(&[sentinel.port]);
    settings.password = Some(Secret::new(password));
    settings.sentinel_password = Some(Secret::new("sentinel's"));
    RedisStore::new(settings.clone()).unwrap().ping().await.unwrap();

    let mut in_url = settings.clone();
    in_url.password = None;
    let url = settings.url.expose().replace("://", "://default:p%40ss%3Aw%2Frd%23%25@");
    in_url.url = Secret::new(url);
    RedisStore::new(in_url).unwrap().ping().await.unwrap();

    let folder = tempfile::tempdir().unwrap();
    let mut in_file = settings.clone();
    in_file.password = None;
    in_file.password_file = Some(folder.path().join("password"));
    fs::write(folder.path().join("password"), format!("{password}\n")).unwrap();
    RedisStore::new(in_file).unwrap().ping().await.unwrap();

    for (of_server, of_sentinel) in [
        (Some("wrong"), Some("sentinel's")),
        (Some(password), Some("wrong")),
        (Some(password), None),
    ] {
        settings.password = of_server.map(Secret::new);
        settings.sentinel_password = of_sentinel.map(Secret::new);
        let error = timed(RedisStore::new(settings.clone()).unwrap().ping()).await.unwrap_err();
        assert!(matches!(error, StoreError::RedisPassword), "{error:?}");
        assert!(error.to_string().contains("REDIS_SENTINEL_PASSWORD"));
        assert!(!format!("{error} {error:?}").contains(password));
    }
}

#[tokio::test]
async fn operations_name_no_library_to_the_server_that_a_sentinel_names() {
    let server = Server::start(&[]).await;
    let sentinel = Sentinel::of(server.port).await;
    let store = RedisStore::new(by(&[sentinel.port])).unwrap();
    let client = store.link.client().await.unwrap();
    assert!(client.get_connection_info().redis_settings().skip_set_lib_name());
}

#[tokio::test]
async fn notices_come_from_the_new_primary() {
    let mut old = Server::start(&[]).await;
    let new = Server::start(&[]).await;
    let sentinel = Sentinel::of(old.port).await;
    let mut follower = Follower::of(by(&[sentinel.port]));
    follower.signal_within(BOUND).await;
    sentinel.point_to(new.port).await;
    old.kill();
    follower.signal_within(pause::LONGEST + BOUND).await;
    let heard: u64 = new.command(&["PUBLISH", "{chitai_gorod_token}:events", "{}"]).await;
    assert_eq!(heard, 1);
    follower.signal_within(BOUND).await;
}

#[tokio::test]
async fn tls_goes_to_sentinels_and_servers_alike() {
    let files = Certificates::new();
    let text = |name: &str| files.text(name);
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let tls = [
        ("tls-auth-clients", "yes".to_owned()),
        ("tls-ca-cert-file", text("ca.pem")),
        ("tls-cert-file", text("leaf.pem")),
        ("tls-key-file", text("leaf.key")),
    ];
    let mut arguments = vec!["--tls-port".to_owned(), port.to_string()];
    let mut lines = String::from("tls-port\ntls-replication yes\n");
    for (name, value) in tls {
        writeln!(lines, "{name} {value}").unwrap();
        arguments.extend([format!("--{name}"), value]);
    }
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let _server = Server::start(&arguments).await;
    let sentinel = Sentinel::with(port, &lines).await;
    let url = format!("rediss+sentinel://127.0.0.1:{}/{SERVICE}", sentinel.port);
    let mut settings = settings(&url);
    settings.tls_ca = Some(files.path("ca.pem"));
    settings.tls_cert = Some(files.path("leaf.pem"));
    settings.tls_key = Some(files.path("leaf.key"));
    let store = RedisStore::new(settings.clone()).unwrap();
    timed(store.save(&published(true), NOW)).await.unwrap();
    let mut follower = Follower::of(settings.clone());
    follower.signal_within(BOUND).await;

    let mut without_own = settings.clone();
    (without_own.tls_cert, without_own.tls_key) = (None, None);
    timed(RedisStore::new(without_own).unwrap().ping()).await.unwrap_err();
    let stranger = Certificates::new();
    settings.tls_ca = Some(stranger.path("ca.pem"));
    timed(RedisStore::new(settings).unwrap().ping()).await.unwrap_err();
}

#[test]
fn addresses_of_sentinels_have_a_port_of_their_own_by_default() {
    for (url, port) in [
        ("redis+sentinel://host/service", 26_379),
        ("redis+sentinel://host:1,[::1]/service/0", 26_379),
        ("redis+sentinel://user:pass@host,[::1]:7/service/0", 7),
        ("rediss+sentinel://host,host:7/service", 7),
    ] {
        let addresses = place::nodes(&settings(url)).unwrap();
        let found = match addresses.last().unwrap() {
            redis::ConnectionAddr::Tcp(_, port) | redis::ConnectionAddr::TcpTls { port, .. } => {
                *port
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(found, port, "{url}");
    }
}
