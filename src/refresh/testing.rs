//! Neighbours for the tests of this module: real servers on real sockets.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard};
use url::Url;

use super::{RefreshSettings, lock};
use crate::config::{RedisSettings, Secret};
use crate::metrics::Metrics;
use crate::net::{Dialer, Egress, Ways};
use crate::tls::client_config;
use crate::token::{RedisStore, Token};

/// A request as a server saw it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Method and path.
    pub(super) target: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Seen {
    /// The token in `Authorization`.
    pub(super) fn bearer(&self) -> Option<&str> {
        self.headers.get("authorization")?.to_str().ok()?.strip_prefix("Bearer ")
    }
}

/// An in-process HTTP server that remembers what it was asked.
pub(super) struct Origin {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    _stop: DropGuard,
}

impl Origin {
    /// Binds an ephemeral port and answers with `handler` in the background.
    pub(super) async fn start<F, R>(handler: F) -> Self
    where
        F: Fn(Seen) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Response<Full<Bytes>>> + Send + 'static,
    {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)), handler).await
    }

    /// The same on an address that a test has used before.
    pub(super) async fn start_at<F, R>(address: SocketAddr, handler: F) -> Self
    where
        F: Fn(Seen) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Response<Full<Bytes>>> + Send + 'static,
    {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, seen) = (CancellationToken::new(), Arc::default());
        let serving = serve(listener, handler, Arc::clone(&seen));
        tokio::spawn(stop.clone().run_until_cancelled_owned(serving));
        Self { address, seen, _stop: stop.drop_guard() }
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(super) fn requests(&self) -> Vec<Seen> {
        lock(&self.seen).clone()
    }

    /// How often `target` was asked for.
    pub(super) fn count(&self, target: &str) -> usize {
        self.requests().iter().filter(|seen| seen.target == target).count()
    }
}

async fn serve<F, R>(listener: TcpListener, handler: F, seen: Arc<Mutex<Vec<Seen>>>)
where
    F: Fn(Seen) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (handler, seen) = (handler.clone(), Arc::clone(&seen));
        let service = service_fn(move |request: Request<Incoming>| {
            let (handler, seen) = (handler.clone(), Arc::clone(&seen));
            async move {
                let (head, body) = request.into_parts();
                let target = format!("{} {}", head.method, head.uri.path());
                let body = body.collect().await.unwrap().to_bytes();
                let request = Seen { target, headers: head.headers, body };
                lock(&seen).push(request.clone());
                Ok::<_, Infallible>(handler(request).await)
            }
        });
        let http = hyper::server::conn::http1::Builder::new();
        tokio::spawn(http.serve_connection(TokioIo::new(stream), service));
    }
}

pub(super) fn reply(status: u16, body: Bytes) -> Response<Full<Bytes>> {
    Response::builder().status(status).body(Full::new(body)).unwrap()
}

pub(super) fn json(status: u16, body: &Value) -> Response<Full<Bytes>> {
    reply(status, body.to_string().into())
}

/// A solver's reply with the token in its cookie.
pub(super) fn solved(token: &str) -> Value {
    let value = format!("Bearer%20{token}");
    let cookies = json!([
        { "name": "tid", "value": "t-1", "path": "/" },
        { "name": "access-token", "value": value, "path": "/" },
    ]);
    json!({ "status": "ok", "message": "", "solution": { "status": 200, "cookies": cookies } })
}

/// A port on which nobody listens.
pub(super) async fn unused_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// A `redis-server` of the test's own, which ends with it.
pub(super) struct Redis {
    port: u16,
    process: Child,
    _folder: TempDir,
}

impl Redis {
    pub(super) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = unused_address().await.port();
        let process = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no", "--dir"])
            .arg(folder.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            sleep(Duration::from_millis(10)).await;
        }
        Self { port, process, _folder: folder }
    }

    /// A store of its own, as another sidecar would have.
    pub(super) fn store(&self) -> RedisStore {
        redis_store(&format!("redis://127.0.0.1:{}", self.port))
    }

    /// Runs a command as an operator or another program would.
    pub(super) async fn command(&self, words: &[&str]) {
        let client = redis::Client::open(("127.0.0.1", self.port)).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]).exec_async(&mut connection).await.unwrap();
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(super) fn redis_store(url: &str) -> RedisStore {
    let settings = RedisSettings {
        url: Secret::new(url),
        password: None,
        password_file: None,
        sentinel_password: None,
        key: "chitai_gorod_token".to_owned(),
        cookies_key: "chitai_gorod_cookies".to_owned(),
        ttl: Duration::from_hours(1),
        tls_ca: None,
        tls_cert: None,
        tls_key: None,
    };
    RedisStore::new(settings).unwrap()
}

/// Settings with nothing in them but the shop's address.
pub(super) fn settings(shop_url: &str) -> RefreshSettings {
    let shop_url = Url::parse(shop_url).unwrap();
    RefreshSettings {
        verify_url: shop_url.join("/verify").unwrap(),
        shop_url,
        api_origins: Vec::new(),
        token_cookies: vec!["access-token".into(), "bearer_token".into()],
        sources: Vec::new(),
        flaresolverr_url: None,
        solver_tls: (*client_config(None).unwrap()).clone(),
        solver_proxy: None,
        source_patience: Duration::from_millis(100),
        solve_timeout: Duration::from_secs(5),
        refresh_every: Duration::from_hours(1),
        redis: None,
        env_file: None,
        environment: None,
    }
}

pub(super) fn dialer() -> Arc<Dialer> {
    let egress = Egress::new(Vec::new(), Vec::new());
    let (tls, limit) = (client_config(None).unwrap(), Duration::from_secs(5));
    Arc::new(Dialer::new(egress, Ways::default(), tls, limit, Arc::new(Metrics::new(1))))
}

/// A JWT for `subject`, issued now, that expires in `life` seconds.
pub(super) fn jwt(subject: &str, life: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    claims(&json!({ "sub": subject, "iat": now, "exp": now.saturating_add_signed(life) }))
}

pub(super) fn token(subject: &str, life: i64) -> Token {
    Token::parse(&jwt(subject, life)).unwrap()
}

/// A token without an end, issued at `iat`.
pub(super) fn issued(subject: &str, iat: u64) -> Token {
    Token::parse(&claims(&json!({ "sub": subject, "iat": iat }))).unwrap()
}

/// A token that was issued at `iat` and lives for `life` seconds.
pub(super) fn issued_for(subject: &str, iat: u64, life: u64) -> Token {
    Token::parse(&claims(&json!({ "sub": subject, "iat": iat, "exp": iat + life }))).unwrap()
}

fn claims(claims: &Value) -> String {
    let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","typ":"JWT"}"#);
    format!("{header}.{}.c2lnbmF0dXJl", URL_SAFE_NO_PAD.encode(claims.to_string()))
}
