//! Bounds that last for minutes, on a clock that jumps ahead where all wait, and
//! one that takes much load, with less of it.

use std::io::ErrorKind;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, LocalSet, spawn_local, yield_now};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use url::Url;

use super::handshakes::Handshakes;
use super::{Bounds, Memory, Origins, Proxy, Service, Settings};
use crate::config::{AllowedHost, AllowedName, Authorization};
use crate::metrics::{Limit, Metrics};
use crate::net::{Dialer, Egress, Ways, Worker};
use crate::refresh::{Parts, RefreshSettings, Refresher};
use crate::tls::{Authority, Leaves, client_config};
use crate::token::{Clock, TokenCache};

const PEM: &str = "the certificate";
const SECOND: Duration = Duration::from_secs(1);

/// The service of one worker, without a token and without an API.
struct Stage {
    proxy: Arc<Proxy>,
    service: Rc<Service>,
    _dir: TempDir,
}

impl Stage {
    fn start() -> Self {
        Self::start_within(Bounds::default())
    }

    fn start_within(bounds: Bounds) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let proxy = Arc::new(proxy(&dir, bounds));
        let worker =
            Worker { index: 0, drain: CancellationToken::new(), tasks: TaskTracker::new() };
        let service = Service::start(&proxy, &worker);
        Self { proxy, service, _dir: dir }
    }

    /// A client, and the task that serves it.
    async fn connect(&self) -> (TcpStream, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, address) = listener.accept().await.unwrap();
        let service = Rc::clone(&self.service);
        (client, spawn_local(async move { service.serve_proxy(stream, address).await }))
    }

    /// Waits until the memory for half heads has less than `bytes` left.
    async fn until_heads_leave_less_than(&self, bytes: usize) {
        while self.proxy.bounds.heads.reserve_none().grow(bytes) {
            yield_now().await;
        }
    }

    /// How often `limit` turned something away.
    fn limited(&self, limit: Limit) -> String {
        let name = format!("sidecar_limited_total{{limit=\"{}\"}} ", limit.as_str());
        let text = self.proxy.metrics.encode();
        text.lines().find_map(|line| line.strip_prefix(&name)).unwrap().to_owned()
    }
}

fn proxy(dir: &TempDir, bounds: Bounds) -> Proxy {
    let metrics = Arc::new(Metrics::new(1));
    let loopback = AllowedName::Network("127.0.0.0/8".parse().unwrap());
    let egress = Egress::new(vec![AllowedHost { name: loopback, port: None }], Vec::new());
    let tls = client_config(None).unwrap();
    let dialer = Dialer::new(egress, Ways::default(), tls, SECOND * 10, Arc::clone(&metrics));
    let parts = Parts {
        cache: Arc::new(TokenCache::new()),
        clock: Arc::new(Clock::new()),
        dialer: Arc::new(dialer),
        metrics,
    };
    let hosts = ["api.test".to_owned()];
    let authority = Arc::new(Authority::open(dir.path(), &hosts).unwrap());
    Proxy {
        origins: Origins::new(Vec::new()).unwrap(),
        cache: Arc::clone(&parts.cache),
        clock: Arc::clone(&parts.clock),
        dialer: Arc::clone(&parts.dialer),
        leaves: Leaves::new(authority, &hosts).unwrap(),
        metrics: Arc::clone(&parts.metrics),
        refresher: Refresher::new(refresh_settings(), parts, Handle::current()).unwrap(),
        hints: Arc::default(),
        memory: Memory::new(0),
        bounds,
        release_held: CancellationToken::new(),
        settings: settings(),
    }
}

fn settings() -> Settings {
    Settings {
        authorization: Authorization { always: true, keep_personal: true },
        token_cookies: Vec::new(),
        proxy_auth: None,
        hold_timeout: SECOND * 60,
        retry_status: StatusCode::SERVICE_UNAVAILABLE,
        max_held: 1,
        replay_body: 0,
        upstream_timeout: SECOND * 60,
        upstream_connections: vec![1],
        ca_pem: Bytes::from_static(PEM.as_bytes()),
        bundle_pem: Bytes::new(),
    }
}

/// A refresher is there, and nobody asks it for anything.
fn refresh_settings() -> RefreshSettings {
    let url = Url::parse("http://127.0.0.1:9/").unwrap();
    RefreshSettings {
        shop_url: url.clone(),
        verify_url: url,
        api_origins: Vec::new(),
        token_cookies: Vec::new(),
        sources: Vec::new(),
        flaresolverr_url: None,
        solver_tls: (*client_config(None).unwrap()).clone(),
        solver_proxy: None,
        source_patience: SECOND,
        solve_timeout: SECOND,
        refresh_every: SECOND * 3600,
        redis: None,
        env_file: None,
        environment: None,
    }
}

/// Reads until what came ends in `end`.
async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut text = String::new();
    while !text.ends_with(end) {
        let byte = stream.read_u8().await.unwrap();
        text.push(char::from(byte));
    }
    text
}

/// One request that is answered by the service itself.
async fn check_is_served(client: &mut TcpStream) {
    let request = "GET /.well-known/token-sidecar/ca.pem HTTP/1.1\r\nHost: x\r\n\r\n";
    client.write_all(request.as_bytes()).await.unwrap();
    let answer = read_until(client, PEM).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// The time since `began` is `limit`, and at most a look of the sweep longer.
fn check_took(began: Instant, limit: Duration) {
    let took = began.elapsed();
    assert!(took >= limit && took <= limit + 3 * SECOND, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn client_that_rests_is_closed_after_a_minute_and_a_half() {
    let test = async {
        let stage = Stage::start();
        let (mut client, served) = stage.connect().await;
        check_is_served(&mut client).await;
        sleep(80 * SECOND).await;
        check_is_served(&mut client).await;
        assert_eq!(stage.limited(Limit::ClientIdle), "0");
        let began = Instant::now();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "closed in order");
        check_took(began, 90 * SECOND);
        served.await.unwrap();
        assert_eq!(stage.limited(Limit::ClientIdle), "1");
        let (mut next, _served) = stage.connect().await;
        check_is_served(&mut next).await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test(start_paused = true)]
async fn tunnel_that_rests_is_reset_toward_both_sides_after_ten_minutes() {
    let test = async {
        let stage = Stage::start();
        let (mut client, served) = stage.connect().await;
        let peer = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connect = format!("CONNECT {} HTTP/1.1\r\n\r\n", peer.local_addr().unwrap());
        client.write_all(connect.as_bytes()).await.unwrap();
        let (mut far, _) = peer.accept().await.unwrap();
        let answer = read_until(&mut client, "\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        // What moves by one of the two ways is enough.
        for _ in 0..2 {
            sleep(590 * SECOND).await;
            far.write_all(b"x").await.unwrap();
            assert_eq!(client.read_u8().await.unwrap(), b'x');
        }
        assert_eq!(stage.limited(Limit::TunnelIdle), "0");
        let began = Instant::now();
        let ended = client.read_u8().await.unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::ConnectionReset);
        check_took(began, 600 * SECOND);
        assert_eq!(far.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        served.await.unwrap();
        assert_eq!(stage.limited(Limit::TunnelIdle), "1");
        let (mut next, _served) = stage.connect().await;
        check_is_served(&mut next).await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn half_head_that_finds_no_memory_is_closed_until_another_has_ended() {
    const HALF: &str = "GET /.well-known/token-sidecar/ca.pem HTTP/1.1\r\nHost: x\r\nX-A: ";
    let test = async {
        // Room for the half heads of two clients; each lies there twice.
        let (most, handshakes) = (2 * 2 * HALF.len() + 8, Handshakes::new(1));
        let bounds = Bounds { heads: Memory::new(most), handshakes };
        let stage = Stage::start_within(bounds);
        let (mut first, _) = stage.connect().await;
        let (mut second, _) = stage.connect().await;
        for client in [&mut first, &mut second] {
            client.write_all(HALF.as_bytes()).await.unwrap();
        }
        stage.until_heads_leave_less_than(2 * HALF.len()).await;
        for number in 1..=3 {
            let (mut third, served) = stage.connect().await;
            third.write_all(HALF.as_bytes()).await.unwrap();
            assert_eq!(third.read(&mut [0]).await.unwrap_or_default(), 0);
            served.await.unwrap();
            assert_eq!(stage.limited(Limit::HeadMemory), number.to_string());
        }
        first.write_all(b"1\r\n\r\n").await.unwrap();
        assert!(read_until(&mut first, PEM).await.starts_with("HTTP/1.1 200"), "it was in time");
        let (mut next, _served) = stage.connect().await;
        next.write_all(HALF.as_bytes()).await.unwrap();
        stage.until_heads_leave_less_than(2 * HALF.len()).await;
        next.write_all(b"1\r\n\r\n").await.unwrap();
        assert!(read_until(&mut next, PEM).await.starts_with("HTTP/1.1 200"));
        assert_eq!(stage.limited(Limit::HeadMemory), "3");
    };
    LocalSet::new().run_until(test).await;
}
