//! The admin port over real sockets.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{AdminState, serve};
use crate::config::Secret;
use crate::config::SourceKind;
use crate::metrics::Metrics;
use crate::net::{Dialer, Egress, Ways};
use crate::refresh::{Parts, RefreshSettings, Refresher};
use crate::tls::client_config;
use crate::token::{Candidate, Clock, Source, Token, TokenCache};

/// A bare JWT that expires in the year 2100.
const JWT: &str = "e30.eyJpYXQiOjE3MDAwMDAwMDAsImV4cCI6NDEwMjQ0NDgwMH0.c2ln";

/// A running admin port.
struct Port {
    address: SocketAddr,
    state: Arc<AdminState>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Port {
    /// One whose refreshes fail: it has no source.
    async fn start(admin_token: Option<&str>) -> Self {
        Self::run(admin_token, None).await
    }

    async fn run(admin_token: Option<&str>, api: Option<SocketAddr>) -> Self {
        let egress = Egress::new(Vec::new(), Vec::new());
        let (tls, limit) = (client_config(None).unwrap(), Duration::from_secs(5));
        let metrics = Arc::new(Metrics::new(1));
        let dialer = Dialer::new(egress, Ways::default(), tls, limit, Arc::clone(&metrics));
        let parts = Parts {
            cache: Arc::new(TokenCache::new()),
            clock: Arc::new(Clock::new()),
            dialer: Arc::new(dialer),
            metrics,
        };
        let state = Arc::new(AdminState {
            cache: Arc::clone(&parts.cache),
            metrics: Arc::clone(&parts.metrics),
            clock: Arc::clone(&parts.clock),
            hints: Arc::default(),
            refresher: refresher(parts, api),
            version: "1.2.3",
            started: Instant::now(),
            draining: CancellationToken::new(),
            admin_token: admin_token.map(Secret::new),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(serve(listener, Arc::clone(&state), shutdown.clone()));
        Self { address, state, shutdown, task }
    }

    fn publish(&self) {
        let token = Token::parse(JWT).unwrap();
        let now = self.state.clock.now();
        self.state.cache.publish(Candidate::new(token, Source::Redis).verified(true), now);
    }

    /// Sends `head` and `body` on a connection of their own.
    async fn ask(&self, head: &str, body: &str) -> Reply {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let text = format!("{head} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n{body}");
        // The answer may come, and the connection close, before all is written.
        _ = stream.write_all(text.as_bytes()).await;
        Reply::read(stream).await
    }

    async fn get(&self, path: &str) -> Reply {
        self.ask(&format!("GET {path}"), "").await
    }
}

/// An answer as it came over the wire.
#[derive(Debug)]
struct Reply {
    head: String,
    body: String,
}

impl Reply {
    async fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        _ = stream.read_to_end(&mut bytes).await;
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        Self { head: head.to_lowercase(), body: body.to_owned() }
    }

    fn status(&self) -> u16 {
        self.head.split(' ').nth(1).unwrap().parse().unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

#[tokio::test]
async fn every_path_answers_and_none_may_be_cached() {
    let port = Port::start(None).await;
    port.publish();
    for (path, kind) in [
        ("/live", "application/json"),
        ("/ready", "application/json"),
        ("/status", "application/json"),
        ("/metrics", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        ("/", "text/html; charset=utf-8"),
    ] {
        let reply = port.get(path).await;
        assert_eq!(reply.status(), 200, "{path}");
        for field in ["cache-control: no-store", "x-content-type-options: nosniff"] {
            assert!(reply.head.contains(field), "{path}: {}", reply.head);
        }
        assert!(reply.head.contains(&format!("content-type: {kind}\r\n")), "{}", reply.head);
        let head_only = port.ask(&format!("HEAD {path}"), "").await;
        assert_eq!((head_only.status(), &*head_only.body), (200, ""), "{path}");
    }
}

#[tokio::test]
async fn ready_waits_for_a_token_and_ends_with_the_drain() {
    let port = Port::start(None).await;
    assert_eq!(port.get("/live").await.json()["status"], "live");
    let before = port.get("/ready").await;
    assert_eq!((before.status(), &before.json()["reason"]), (503, &"no_token".into()));
    port.publish();
    let ready = port.get("/ready").await;
    assert_eq!(ready.status(), 200);
    assert_eq!(ready.body, r#"{"ready":true,"reason":null}"#);
    port.state.draining.cancel();
    let draining = port.get("/ready").await;
    assert_eq!((draining.status(), &draining.json()["reason"]), (503, &"draining".into()));
}

#[tokio::test]
async fn status_has_the_names_of_the_contract_and_no_secret() {
    let port = Port::start(None).await;
    assert!(port.get("/status").await.json()["token"].is_null());
    port.publish();
    let reply = port.get("/status").await;
    let status = reply.json();
    let names: Vec<_> = status.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "version",
            "uptime_s",
            "ready",
            "reason",
            "token",
            "refresh",
            "sources",
            "redis",
            "env_file",
            "verifier",
            "held",
            "connections",
            "requests",
            "hints",
        ]
    );
    let token = &status["token"];
    assert_eq!(token["generation"], 1);
    assert_eq!(token["source"], "redis");
    assert_eq!(token["issued_at"], "2023-11-14T22:13:20Z");
    assert_eq!(token["expires_at"], "2100-01-01T00:00:00Z");
    assert_eq!(token["verified"], true);
    assert_eq!(token["clearance"], false);
    assert_eq!(token["fingerprint"].as_str().map(str::len), Some(8));
    assert_eq!(status["requests"]["intercept"], 0);
    assert!(!reply.body.contains("eyJ"), "{}", reply.body);
}

#[tokio::test]
async fn wrong_paths_and_methods_are_named() {
    let port = Port::start(None).await;
    let missing = port.get("/nothing").await;
    assert_eq!((missing.status(), &missing.json()["error"]), (404, &"not_found".into()));
    for (head, allow) in [("POST /status", "get, head"), ("GET /refresh", "post")] {
        let reply = port.ask(head, "").await;
        assert_eq!(reply.status(), 405);
        assert!(reply.head.contains(&format!("allow: {allow}\r\n")), "{}", reply.head);
    }
}

#[tokio::test]
async fn a_foreign_host_gets_nothing() {
    let port = Port::start(None).await;
    let mut stream = TcpStream::connect(port.address).await.unwrap();
    let text = "GET /status HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    stream.write_all(text.as_bytes()).await.unwrap();
    let reply = Reply::read(stream).await;
    assert_eq!((reply.status(), &reply.json()["error"]), (403, &"host_not_allowed".into()));
}

#[tokio::test]
async fn a_refresh_needs_the_admin_token_if_one_is_set() {
    let port = Port::start(Some("s3cret")).await;
    let without = port.ask("POST /refresh", "").await;
    assert_eq!((without.status(), &without.json()["error"]), (401, &"unauthorized".into()));
    assert!(without.head.contains("www-authenticate: bearer"));
    assert!(!without.body.contains("s3cret"));
}

#[tokio::test]
async fn a_large_body_is_refused_and_the_connection_closed() {
    let port = Port::start(None).await;
    let mut stream = TcpStream::connect(port.address).await.unwrap();
    let text = "POST /refresh HTTP/1.1\r\nHost: localhost\r\nContent-Length: 65537\r\n\r\n";
    stream.write_all(text.as_bytes()).await.unwrap();
    let reply = Reply::read(stream).await;
    assert_eq!((reply.status(), &reply.json()["error"]), (413, &"too_large".into()));
}

#[tokio::test]
async fn shutdown_ends_idle_connections_and_returns() {
    let port = Port::start(None).await;
    let mut idle = TcpStream::connect(port.address).await.unwrap();
    idle.write_all(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    assert!(idle.read(&mut [0; 1024]).await.unwrap() > 0);
    port.shutdown.cancel();
    timeout(Duration::from_secs(10), port.task).await.unwrap().unwrap();
    assert_eq!(idle.read(&mut [0; 1024]).await.unwrap(), 0, "the connection is closed");
    assert!(TcpStream::connect(port.address).await.is_err(), "the listener is closed");
}

#[tokio::test]
async fn a_refresh_by_hand_tells_of_the_new_token() {
    let port = Port::run(None, Some(start_api().await)).await;
    let reply = port.ask("POST /refresh", "").await;
    assert_eq!(reply.status(), 200, "{reply:?}");
    assert_eq!(
        reply.body,
        r#"{"generation":1,"source":"direct","expires_at":"2100-01-01T00:00:00Z"}"#
    );
    assert_eq!(port.get("/ready").await.status(), 200);
    let status = port.get("/status").await.json();
    assert_eq!(status["refresh"]["last_outcome"], "ok");
    assert_eq!(status["token"]["verified"], true);
}

#[tokio::test]
async fn a_failed_refresh_is_502_and_says_when_to_try_again() {
    let port = Port::start(None).await;
    let reply = port.ask("POST /refresh", "").await;
    assert_eq!((reply.status(), &reply.json()["error"]), (502, &"refresh_failed".into()));
    assert!(reply.head.contains("retry-after: "), "{}", reply.head);
}

/// An API that gives [`JWT`] and accepts it; its address.
async fn start_api() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let http = http1::Builder::new();
            tokio::spawn(http.serve_connection(TokioIo::new(stream), service_fn(answer_as_api)));
        }
    });
    address
}

async fn answer_as_api(request: Request<Incoming>) -> Result<Response<String>, Infallible> {
    let authorization = request.headers().get(header::AUTHORIZATION);
    let (status, body) = match request.uri().path() {
        "/api/v1/auth/anonymous" => {
            (201, json!({ "token": { "accessToken": format!("Bearer {JWT}") } }).to_string())
        }
        _ if authorization.is_some() => (200, String::new()),
        _ => (401, String::new()),
    };
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    Ok(response)
}

/// A refresher whose one source is the API at `api`; without it, none.
fn refresher(parts: Parts, api: Option<SocketAddr>) -> Arc<Refresher> {
    let base = api.map_or("http://127.0.0.1:9".to_owned(), |address| format!("http://{address}"));
    let url = |path: &str| Url::parse(&format!("{base}{path}")).unwrap();
    let settings = RefreshSettings {
        shop_url: url("/"),
        verify_url: url("/api/verify"),
        api_origins: vec![url("/api")],
        token_cookies: vec!["access-token".to_owned()],
        sources: api.map(|_| SourceKind::Direct).into_iter().collect(),
        flaresolverr_url: None,
        solver_tls: (*client_config(None).unwrap()).clone(),
        solver_proxy: None,
        source_patience: Duration::from_secs(8),
        solve_timeout: Duration::from_secs(45),
        refresh_every: Duration::from_hours(1),
        redis: None,
        env_file: None,
        environment: None,
    };
    Refresher::new(settings, parts, Handle::current()).unwrap()
}
