//! The Redis store against a real `redis-server`.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Instant,
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;

use super::*;
use crate::config::Secret;
use crate::token::{
    Candidate, Clearance, Source, TokenCache,
    test_support::{jwt, token},
};

pub(super) const NOW: Timestamp = Timestamp(1_000_000);
pub(super) const LIFE: u64 = 168_000;

/// What an operation may last at most, with room for a busy machine.
pub(super) const BOUND: Duration = Duration::from_secs(2);

/// A `redis-server` on a port of its own, killed on drop.
pub(super) struct Server {
    pub(super) port: u16,
    folder: TempDir,
    pub(super) arguments: Vec<String>,
    process: Child,
}

impl Server {
    pub(super) async fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let arguments = arguments.iter().map(ToString::to_string).collect();
        let mut server =
            Self { port, process: spawn(port, folder.path(), &arguments), folder, arguments };
        server.wait_until_up().await;
        server
    }

    pub(super) async fn restart(&mut self) {
        self.process = spawn(self.port, self.folder.path(), &self.arguments);
        self.wait_until_up().await;
    }

    async fn wait_until_up(&mut self) {
        // It listens there first, and on a Unix socket afterwards.
        let socket =
            self.arguments.iter().skip_while(|argument| *argument != "--unixsocket").nth(1);
        let socket = socket.map(PathBuf::from);
        while tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.is_err()
            || socket.as_ref().is_some_and(|socket| !socket.exists())
        {
            let ended = self.process.try_wait().unwrap();
            assert!(ended.is_none(), "redis-server has ended: {ended:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(super) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    pub(super) fn signal(&self, signal: &str) {
        let mut kill = Command::new("kill");
        kill.arg(signal).arg(self.process.id().to_string());
        assert!(kill.status().unwrap().success());
    }

    pub(super) fn settings(&self) -> RedisSettings {
        settings(&format!("redis://127.0.0.1:{}", self.port))
    }

    pub(super) fn store(&self) -> RedisStore {
        RedisStore::new(self.settings()).unwrap()
    }

    /// Runs a command as an operator or another program would.
    pub(super) async fn command<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        let client = redis::Client::open(("127.0.0.1", self.port)).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        command.query_async(&mut connection).await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn spawn(port: u16, folder: &Path, arguments: &Vec<String>) -> Child {
    Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
        .args(["--save", "", "--appendonly", "no", "--dir"])
        .arg(folder)
        .args(arguments)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed")
}

pub(super) fn settings(url: &str) -> RedisSettings {
    RedisSettings {
        url: Secret::new(url),
        password: None,
        password_file: None,
        sentinel_password: None,
        key: "chitai_gorod_token".into(),
        cookies_key: "chitai_gorod_cookies".into(),
        ttl: Duration::from_hours(24),
        tls_ca: None,
        tls_cert: None,
        tls_key: None,
    }
}

/// A token of full life, published with the cookies of a shop's page.
pub(super) fn published(verified: bool) -> Arc<Published> {
    let cookies = Cookies::from_pairs([
        ("__ddg9_", "127.0.0.1"),
        ("access-token", "stale"),
        ("odd", "a%20\"b\"; \u{439}"),
    ]);
    let token = token(NOW.0 + LIFE);
    let clearance = Arc::new(Clearance::new(cookies, Some("Browser/1")));
    let candidate = Candidate::new(token, Source::Direct).verified(verified);
    TokenCache::new().publish(candidate.with_clearance(clearance, true), NOW)
}

/// Waits until the store works again: after the pause that follows on silence.
pub(super) async fn found_again(store: &RedisStore) {
    let again = async {
        while timed(store.ping()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(pause::LONGEST + BOUND, again).await.unwrap();
}

pub(super) async fn timed<T>(operation: impl Future<Output = T>) -> T {
    let started = Instant::now();
    let outcome = operation.await;
    assert!(started.elapsed() < BOUND, "took {:?}", started.elapsed());
    outcome
}

#[tokio::test]
async fn what_is_saved_is_loaded() {
    let server = Server::start(&[]).await;
    let store = server.store();
    store.ping().await.unwrap();
    assert!(store.load().await.unwrap().is_none());
    for verified in [true, false] {
        let published = published(verified);
        store.save(&published, NOW).await.unwrap();
        let stored = store.load().await.unwrap().unwrap();
        assert_eq!(stored.token, published.token);
        assert_eq!(stored.verified, verified);
        assert!(stored.cookies_agree && !stored.foreign);
        assert!(stored.needs_clearance);
        assert_eq!(stored.clearance.user_agent().unwrap(), "Browser/1");
        let expected = published.clearance.cookies().with_token(TOKEN_COOKIE, &published.token);
        assert_eq!(
            stored.clearance.cookies().iter().collect::<Vec<_>>(),
            expected.iter().collect::<Vec<_>>()
        );
    }
}

#[tokio::test]
async fn the_keys_have_the_form_that_older_programs_read() {
    let server = Server::start(&[]).await;
    let published = published(true);
    let bare = published.token.expose();
    server.store().save(&published, NOW).await.unwrap();
    let value: String = server.command(&["GET", "chitai_gorod_token"]).await;
    assert_eq!(value, bare);
    let cookies: String = server.command(&["GET", "chitai_gorod_cookies"]).await;
    let expected = format!(
        r#"{{"__ddg9_":"127.0.0.1","access-token":"Bearer%20{bare}","odd":"a%20\"b\"; й"}}"#
    );
    assert_eq!(cookies, expected);
    let metadata: String = server.command(&["GET", "{chitai_gorod_token}:meta"]).await;
    let expected = serde_json::json!({
        "sha1": sha1_hex(bare.as_bytes()),
        "epoch": 0,
        "sha256": published.token.digest_hex(),
        "source": "direct",
        "iat": 1,
        "exp": NOW.0 + LIFE,
        "verified": true,
        "clearance": true,
        "user_agent": "Browser/1",
        "saved_at": NOW.0,
    });
    assert_eq!(metadata, expected.to_string());
}

#[tokio::test]
async fn the_keys_live_no_longer_than_the_token() {
    let server = Server::start(&[]).await;
    let store = server.store();
    let published = published(true);
    let end = NOW.0 + LIFE;
    for (now, ttl) in [(NOW.0, 86_400), (end - 100, 100), (end - 1, 1)] {
        store.save(&published, Timestamp(now)).await.unwrap();
        for key in ["chitai_gorod_token", "chitai_gorod_cookies", "{chitai_gorod_token}:meta"] {
            let found: u64 = server.command(&["PTTL", key]).await;
            assert!(found <= ttl * 1000 && found + 900 > ttl * 1000, "{key} {found}");
        }
    }
    let _: () = server.command(&["FLUSHALL"]).await;
    store.save(&published, Timestamp(end)).await.unwrap();
    assert_eq!(server.command::<u64>(&["DBSIZE"]).await, 0);
    let eternal = Token::parse(&jwt("{}")).unwrap();
    assert_eq!(store.seconds_to_live(&eternal, NOW), 86_400);
}

#[tokio::test]
async fn what_another_program_put_there_is_foreign() {
    let server = Server::start(&[]).await;
    let store = server.store();
    store.save(&published(true), NOW).await.unwrap();
    let other = token(5);
    for form in ["{}", "Bearer {}", "\"Bearer%20{}\"", "Bearer+{}\n"] {
        let value = form.replace("{}", other.expose());
        let _: () = server.command(&["SET", "chitai_gorod_token", &value]).await;
        let stored = store.load().await.unwrap().unwrap();
        assert_eq!(stored.token, other);
        assert!(stored.foreign && !stored.verified && !stored.cookies_agree);
        assert_eq!(stored.clearance.cookies().get("__ddg9_"), Some("127.0.0.1"));
    }
    let cookies = format!(r#"{{"access-token":"Bearer {}","n":1}}"#, other.expose());
    let _: () = server.command(&["SET", "chitai_gorod_cookies", &cookies]).await;
    let stored = store.load().await.unwrap().unwrap();
    assert!(stored.foreign && stored.cookies_agree);
    assert_eq!(stored.clearance.cookies().iter().count(), 1);
}

#[tokio::test]
async fn unreadable_values_fail_no_load_and_are_reported_once() {
    let server = Server::start(&[]).await;
    let store = server.store();
    for key in ["chitai_gorod_cookies", "{chitai_gorod_token}:meta"] {
        for value in ["", "[]", "null", "{", "{\"access-token\":[]}", "\u{0}"] {
            store.save(&published(true), NOW).await.unwrap();
            let _: () = server.command(&["SET", key, value]).await;
            let stored = store.load().await.unwrap().unwrap();
            assert_eq!(stored.cookies_agree, key != "chitai_gorod_cookies");
            assert_eq!(stored.foreign, key != "chitai_gorod_cookies");
        }
    }
    store.reported.lock().unwrap().clear();
    for value in ["", "garbage", "a.b.c"] {
        let _: () = server.command(&["SET", "chitai_gorod_token", value]).await;
        for _ in 0..2 {
            assert!(store.load().await.unwrap().is_none());
        }
    }
    assert_eq!(store.reported.lock().unwrap().len(), 3);
    for n in 0..=MAX_REPORTED {
        store.report_unreadable("key", &n.to_be_bytes());
    }
    assert!(store.reported.lock().unwrap().len() <= MAX_REPORTED);
}

#[tokio::test]
async fn a_personal_token_is_read_as_none_and_reported_once() {
    let server = Server::start(&[]).await;
    let store = server.store();
    let claims = format!(r#"{{"exp":{},"iat":1,"type":20}}"#, NOW.0 + LIFE);
    let personal = jwt(&claims);
    for value in [&personal, &format!("Bearer {personal}")] {
        let _: () = server.command(&["SET", "chitai_gorod_token", value]).await;
        let request = Request { owner: Owner::random(), wish: Wish::None, known: Vec::new() };
        for _ in 0..2 {
            assert!(store.load().await.unwrap().is_none());
            assert!(store.enter(&request, 0).await.unwrap().stored.is_none());
        }
    }
    assert_eq!(store.reported.lock().unwrap().len(), 2);
    store.save(&published(true), NOW).await.unwrap();
    assert!(!store.load().await.unwrap().unwrap().foreign);
}

#[tokio::test]
async fn keys_of_another_type_count_as_absent_and_are_replaced() {
    let server = Server::start(&[]).await;
    for key in ["chitai_gorod_token", "chitai_gorod_cookies", "{chitai_gorod_token}:meta"] {
        let _: () = server.command(&["LPUSH", key, "x"]).await;
    }
    let store = server.store();
    assert!(store.load().await.unwrap().is_none());
    store.save(&published(true), NOW).await.unwrap();
    assert!(store.load().await.unwrap().unwrap().cookies_agree);
}

#[tokio::test]
async fn a_server_that_was_down_is_found_again() {
    let mut server = Server::start(&[]).await;
    let store = server.store();
    for _ in 0..3 {
        timed(store.save(&published(true), NOW)).await.unwrap();
        server.kill();
        for _ in 0..3 {
            let error = timed(store.load()).await.unwrap_err();
            assert!(matches!(error, StoreError::RedisConnection { .. }), "{error}");
            timed(store.save(&published(true), NOW)).await.unwrap_err();
            timed(store.ping()).await.unwrap_err();
        }
        server.restart().await;
        found_again(&store).await;
        assert!(timed(store.load()).await.unwrap().is_none());
    }
    // A restart that went unnoticed costs no error either.
    server.kill();
    server.restart().await;
    timed(store.save(&published(true), NOW)).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_down_at_first_is_found() {
    let mut server = Server::start(&[]).await;
    server.kill();
    let store = server.store();
    timed(store.ping()).await.unwrap_err();
    server.restart().await;
    found_again(&store).await;
}

#[tokio::test]
async fn a_server_that_hangs_costs_a_second_and_is_found_again() {
    let server = Server::start(&[]).await;
    for connected_before in [true, false] {
        let store = server.store();
        if connected_before {
            store.ping().await.unwrap();
        }
        server.signal("-STOP");
        for _ in 0..2 {
            let error = timed(store.load()).await.unwrap_err();
            assert!(matches!(error, StoreError::RedisTimeout), "{error}");
        }
        let (one, two) = tokio::join!(timed(store.ping()), timed(store.load()));
        assert!(one.is_err() && two.is_err());
        server.signal("-CONT");
        found_again(&store).await;
        timed(store.save(&published(true), NOW)).await.unwrap();
    }
}

#[tokio::test]
async fn an_abandoned_operation_spoils_nothing() {
    let server = Server::start(&[]).await;
    let store = server.store();
    server.signal("-STOP");
    let abandoned = tokio::time::timeout(Duration::from_millis(50), store.ping());
    abandoned.await.unwrap_err();
    server.signal("-CONT");
    timed(store.ping()).await.unwrap();
}

#[tokio::test]
async fn operations_at_once_share_a_connection() {
    let server = Server::start(&[]).await;
    let store = server.store();
    let pings = (0..50).map(|_| store.ping());
    for outcome in futures_util::future::join_all(pings).await {
        outcome.unwrap();
    }
    let clients: String = server.command(&["CLIENT", "LIST"]).await;
    assert_eq!(clients.lines().count(), 2, "{clients}");
}

const PASSWORD: &str = "p@ss:w/rd#%20?&=+ \u{439}'\"";

#[tokio::test]
async fn a_password_may_have_any_characters() {
    let server = Server::start(&["--requirepass", "p@ss:w/rd#%20?&=+"]).await;
    let mut settings = server.settings();
    settings.password = Some(Secret::new("p@ss:w/rd#%20?&=+"));
    RedisStore::new(settings.clone()).unwrap().ping().await.unwrap();
    // The one apart counts more than the one in the URL.
    settings.url = Secret::new(format!("redis://:wrong@127.0.0.1:{}", server.port));
    RedisStore::new(settings.clone()).unwrap().ping().await.unwrap();
    settings.password = None;
    settings.url =
        Secret::new(format!("redis://:p%40ss%3Aw%2Frd%23%2520%3F&=+@127.0.0.1:{}/2", server.port));
    RedisStore::new(settings).unwrap().ping().await.unwrap();
}

#[tokio::test]
async fn a_wrong_password_is_said_and_not_shown() {
    let mut server = Server::start(&["--requirepass", "right"]).await;
    let mut settings = server.settings();
    for (url_password, password) in [("", None), ("", Some(PASSWORD)), (":hidden@", None)] {
        settings.url = Secret::new(format!("redis://{url_password}127.0.0.1:{}", server.port));
        settings.password = password.map(Secret::new);
        let store = RedisStore::new(settings.clone()).unwrap();
        let error = timed(store.ping()).await.unwrap_err();
        assert!(matches!(error, StoreError::RedisPassword), "{error}");
        let shown = format!("{error} {error:?}");
        assert!(shown.contains("REDIS_PASSWORD"));
        assert!(!shown.contains(PASSWORD) && !shown.contains("hidden"));
        let error = timed(store.save(&published(true), NOW)).await.unwrap_err();
        assert!(matches!(error, StoreError::RedisPassword), "{error}");
    }
    // It is tried again, for the server may have been wrong.
    let store = RedisStore::new(settings).unwrap();
    store.ping().await.unwrap_err();
    server.kill();
    server.arguments = vec!["--requirepass".into(), "hidden".into()];
    server.restart().await;
    store.ping().await.unwrap();
}

#[tokio::test]
async fn a_password_file_may_come_after_the_start_and_may_change() {
    let mut server = Server::start(&["--requirepass", "p@ss:w/rd# %"]).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    let mut settings = server.settings();
    settings.password_file = Some(file.clone());
    let store = RedisStore::new(settings).unwrap();
    let error = store.ping().await.unwrap_err();
    assert!(error.to_string().contains("named by REDIS_PASSWORD_FILE: No such file"), "{error}");
    fs::write(&file, "\n").unwrap();
    let error = store.ping().await.unwrap_err();
    assert!(error.to_string().contains("named by REDIS_PASSWORD_FILE: it is empty"), "{error}");
    fs::remove_file(&file).unwrap();
    assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
    let error = timed(store.ping()).await.unwrap_err();
    assert!(error.to_string().ends_with("it is not a regular file"), "{error}");
    fs::remove_file(&file).unwrap();
    fs::write(&file, "p@ss:w/rd# %\n").unwrap();
    store.ping().await.unwrap();
    server.kill();
    server.arguments = vec!["--requirepass".into(), "new".into()];
    server.restart().await;
    let error = store.ping().await.unwrap_err();
    assert!(matches!(error, StoreError::RedisPassword), "{error}");
    fs::write(&file, "new").unwrap();
    store.ping().await.unwrap();
}

#[tokio::test]
async fn a_password_or_one_in_the_url_goes_before_its_file() {
    let server = Server::start(&["--requirepass", "right"]).await;
    let mut settings = server.settings();
    settings.password_file = Some("/nonexistent".into());
    settings.password = Some(Secret::new("right"));
    RedisStore::new(settings.clone()).unwrap().ping().await.unwrap();
    settings.password = None;
    settings.url = Secret::new(format!("redis://:right@127.0.0.1:{}", server.port));
    RedisStore::new(settings).unwrap().ping().await.unwrap();
}

#[tokio::test]
async fn a_refused_command_shows_the_code_and_no_secret() {
    let server = Server::start(&[]).await;
    let _: () = server.command(&["ACL", "SETUSER", "default", "-set"]).await;
    let published = published(true);
    let error = server.store().save(&published, NOW).await.unwrap_err();
    assert!(matches!(&error, StoreError::RedisRefused { code } if code == "NOPERM"), "{error:?}");
    assert!(!format!("{error} {error:?}").contains(published.token.expose()));
    assert!(server.store().load().await.unwrap().is_none());
    let _: () = server.command(&["ACL", "SETUSER", "default", "+set", "-evalsha"]).await;
    let error = server.store().save(&published, NOW).await.unwrap_err();
    assert!(matches!(&error, StoreError::RedisRefused { code } if code == "NOPERM"), "{error:?}");
}

#[tokio::test]
async fn a_server_without_memory_keeps_all_or_nothing() {
    let server = Server::start(&["--maxmemory", "1"]).await;
    let error = server.store().save(&published(true), NOW).await.unwrap_err();
    assert!(matches!(&error, StoreError::RedisRefused { code } if code == "OOM"), "{error:?}");
    assert_eq!(server.command::<u64>(&["DBSIZE"]).await, 0);
}

#[tokio::test]
async fn the_database_is_the_one_of_the_url() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("redis.sock");
    let server =
        Server::start(&["--unixsocket", socket.to_str().unwrap(), "--bind", "127.0.0.1", "::1"])
            .await;
    let urls = [
        (2, format!("redis://127.0.0.1:{}/2", server.port)),
        (3, format!("redis://[::1]:{}/3", server.port)),
        (4, format!("unix://{}?db=4", socket.display())),
        (5, format!("redis://localhost:{}/5", server.port)),
    ];
    for (database, url) in urls {
        let store = RedisStore::new(settings(&url)).unwrap();
        store.save(&published(true), NOW).await.unwrap();
        let info: String = server.command(&["INFO", "keyspace"]).await;
        assert!(info.contains(&format!("db{database}:keys=3")), "{info}");
    }
}

#[tokio::test]
async fn an_acl_user_logs_in_by_the_name_in_the_url() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("redis.sock");
    let server = Server::start(&["--unixsocket", socket.to_str().unwrap()]).await;
    let user = ["ACL", "SETUSER", "side@car", "on", ">p@ss:w/rd#%", "~*", "&*", "+@all"];
    let _: () = server.command(&user).await;
    let _: () = server.command(&["ACL", "SETUSER", "default", "off"]).await;
    let (address, socket) = (format!("127.0.0.1:{}", server.port), socket.display());
    let with_password = |url: String| {
        let mut settings = settings(&url);
        settings.password = Some(Secret::new("p@ss:w/rd#%"));
        settings
    };
    for settings in [
        with_password(format!("redis://side%40car@{address}/1")),
        settings(&format!("redis://side%40car:p%40ss%3Aw%2Frd%23%25@{address}/1")),
        with_password(format!("unix://{socket}?user=side%40car&db=1")),
        settings(&format!("unix://{socket}?user=side%40car&pass=p%40ss%3Aw%2Frd%23%25")),
    ] {
        RedisStore::new(settings).unwrap().ping().await.unwrap();
    }
    let nobody = with_password(format!("redis://nobody@{address}"));
    let error = RedisStore::new(nobody).unwrap().ping().await.unwrap_err();
    assert!(matches!(error, StoreError::RedisPassword), "{error}");
}

/// What the store sends first on a connection made for `operation`.
async fn first_words<T>(operation: impl AsyncFnOnce(&RedisStore) -> T) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    let store = RedisStore::new(settings(&url)).unwrap();
    let first = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut first = [0; 512];
        let length = stream.read(&mut first).await.unwrap();
        String::from_utf8_lossy(&first[..length]).into_owned()
    };
    tokio::join!(first, operation(&store)).0
}

#[tokio::test]
async fn a_connection_begins_with_no_command_that_nobody_needs() {
    // A user without the right to name the library would be in `ACL LOG` again and again.
    let first = first_words(async |store| store.ping().await).await;
    assert!(first.starts_with("*1\r\n$4\r\nPING"), "{first}");
    let first = first_words(async |store| store.link.follow("channel").await.is_ok()).await;
    assert!(first.starts_with("*2\r\n$9\r\nSUBSCRIBE"), "{first}");
}

#[tokio::test]
async fn a_unix_socket_will_do() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("redis.sock");
    let _server = Server::start(&["--unixsocket", socket.to_str().unwrap()]).await;
    let store = RedisStore::new(settings(&format!("unix://{}", socket.display()))).unwrap();
    store.ping().await.unwrap();
}

#[test]
fn settings_that_cannot_work_are_refused_without_being_shown() {
    for url in [
        "",
        "hidden",
        "http://:hidden@host",
        "redis+sentinel://:hidden@host",
        "redis+sentinel://:hidden@host/",
        "redis+sentinel://:hidden@/service",
        "redis+sentinel://:hidden@host,/service",
        "redis+sentinel://:hidden@host:port/service",
        "redis+sentinel://:hidden@host/service/db",
        "redis+sentinel://:hid#den@host/service",
        "redis+sentinel://::1/service",
        "rediss+sentinel://:hidden@host/service#insecure",
        "redis://:hid/den@host",
        "redis://:hid#den@host",
        "redis://:hidden@host/db",
        "redis://:hidden@",
        "rediss://:hidden@host/#insecure",
        "rediss://:hidden@host/#hidden",
    ] {
        let error = RedisStore::new(settings(url)).err().expect(url);
        assert!(matches!(error, StoreError::RedisUrl), "{url}");
        assert!(!format!("{error} {error:?}").contains("hid"), "{url}");
        assert!(error.to_string().contains("redis://"));
    }
}

/// An authority and a leaf signed by it, as PEM files in a folder.
pub(super) struct Certificates {
    folder: TempDir,
}

impl Certificates {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        let name = &mut authority.distinguished_name;
        name.push(rcgen::DnType::CommonName, "authority");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap());
        let authority = authority.unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec!["127.0.0.1".into(), "localhost".into()]).unwrap();
        let leaf = leaf.signed_by(&key, &authority).unwrap();
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text);
        write("ca.pem", authority.pem()).unwrap();
        write("leaf.pem", leaf.pem()).unwrap();
        write("leaf.key", key.serialize_pem()).unwrap();
        Self { folder }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
}

#[tokio::test]
async fn tls_is_verified_by_the_given_authority_and_shows_our_certificate() {
    let files = Certificates::new();
    let (ca, leaf, key) = (files.text("ca.pem"), files.text("leaf.pem"), files.text("leaf.key"));
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let _server = Server::start(&[
        "--tls-port",
        &port.to_string(),
        "--tls-auth-clients",
        "yes",
        "--tls-ca-cert-file",
        &ca,
        "--tls-cert-file",
        &leaf,
        "--tls-key-file",
        &key,
    ])
    .await;
    let mut settings = settings(&format!("rediss://127.0.0.1:{port}"));
    settings.tls_ca = Some(files.path("ca.pem"));
    settings.tls_cert = Some(files.path("leaf.pem"));
    settings.tls_key = Some(files.path("leaf.key"));
    let store = RedisStore::new(settings.clone()).unwrap();
    store.save(&published(true), NOW).await.unwrap();
    assert!(store.load().await.unwrap().is_some());

    let mut without_own = settings.clone();
    (without_own.tls_cert, without_own.tls_key) = (None, None);
    RedisStore::new(without_own).unwrap().ping().await.unwrap_err();

    settings.tls_ca = Some(Certificates::new().path("ca.pem"));
    let error = RedisStore::new(settings.clone()).err().map(|error| error.to_string());
    assert!(error.unwrap().contains("named by REDIS_TLS_CA")); // Gone with its folder.
    let stranger = Certificates::new();
    settings.tls_ca = Some(stranger.path("ca.pem"));
    let error = RedisStore::new(settings).unwrap().ping().await.unwrap_err();
    assert!(matches!(error, StoreError::RedisConnection { .. }), "{error}");
}

#[test]
fn tls_files_must_fit_together() {
    let files = Certificates::new();
    let mut plain = settings("redis://host");
    plain.tls_ca = Some(files.path("ca.pem"));
    let error = RedisStore::new(plain).err();
    assert!(matches!(error, Some(StoreError::RedisTlsScheme)));
    let mut half = settings("rediss://host");
    half.tls_cert = Some(files.path("leaf.pem"));
    let error = RedisStore::new(half.clone()).err();
    assert!(matches!(error, Some(StoreError::RedisTlsPair)));
    half.tls_key = Some(files.path("leaf.pem"));
    for url in ["rediss://host", "rediss+sentinel://host/service"] {
        half.url = Secret::new(url);
        let error = RedisStore::new(half.clone()).err();
        assert!(matches!(error, Some(StoreError::RedisTlsContent)));
    }
    // The key of another certificate.
    half.tls_cert = Some(files.path("ca.pem"));
    half.tls_key = Some(files.path("leaf.key"));
    let error = RedisStore::new(half).err();
    assert!(matches!(error, Some(StoreError::RedisTlsContent)));
    let mut plain = settings("redis+sentinel://host/service");
    plain.tls_ca = Some(files.path("ca.pem"));
    let error = RedisStore::new(plain).err();
    assert!(matches!(error, Some(StoreError::RedisTlsScheme)));
}

#[test]
fn a_file_without_a_certificate_is_refused_and_named() {
    let files = Certificates::new();
    for content in
        ["", "\n", "no certificate", &fs::read_to_string(files.path("leaf.key")).unwrap()]
    {
        fs::write(files.path("empty.pem"), content).unwrap();
        for scheme in ["rediss://host", "rediss+sentinel://host/service"] {
            let mut settings = settings(scheme);
            settings.tls_ca = Some(files.path("empty.pem"));
            let error = RedisStore::new(settings.clone()).err().unwrap().to_string();
            assert!(error.contains("no certificate in"), "{error}");
            assert!(error.ends_with("empty.pem, named by REDIS_TLS_CA"), "{error}");
            settings.tls_ca = Some(files.path("ca.pem"));
            settings.tls_cert = Some(files.path("empty.pem"));
            settings.tls_key = Some(files.path("leaf.key"));
            let error = RedisStore::new(settings).err().unwrap().to_string();
            assert!(error.ends_with("empty.pem, named by REDIS_TLS_CERT"), "{error}");
        }
    }
}
