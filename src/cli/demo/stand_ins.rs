//! Stand-ins for the shop and for FlareSolverr, as far as the story needs
//! them.

use std::collections::HashSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;

use super::Outcome;
use super::timeline::Timeline;

/// The API's name, as the default settings have it.
pub(super) const API_HOST: &str = "web-agr.chitai-gorod.ru";
/// The shop page's name.
pub(super) const SHOP_HOST: &str = "www.chitai-gorod.ru";

/// Life of a token, as the shop's have it: 46 h 40 min.
const TOKEN_LIFE: u64 = 168_000;

type Reply = Response<Full<Bytes>>;

/// The shop: an API behind TLS that knows which tokens are good.
pub(super) struct Shop {
    address: SocketAddr,
    ca_file: PathBuf,
    good: Mutex<HashSet<String>>,
    issued: AtomicUsize,
    requests: AtomicUsize,
    refused: AtomicUsize,
    timeline: Timeline,
}

impl Shop {
    /// Listens on a free port; its CA's certificate is put into `folder`.
    pub(super) async fn start(folder: &Path, timeline: &Timeline) -> Outcome<Arc<Self>> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (tls, ca_pem) = certificate()?;
        let ca_file = folder.join("shop-ca.pem");
        std::fs::write(&ca_file, ca_pem)?;
        let shop = Arc::new(Self {
            address: listener.local_addr()?,
            ca_file,
            good: Mutex::default(),
            issued: AtomicUsize::default(),
            requests: AtomicUsize::default(),
            refused: AtomicUsize::default(),
            timeline: timeline.clone(),
        });
        tokio::spawn(Arc::clone(&shop).listen(listener, TlsAcceptor::from(Arc::new(tls))));
        Ok(shop)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn ca_file(&self) -> &Path {
        &self.ca_file
    }

    /// Requests seen so far.
    pub(super) fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// Requests refused although they brought a token.
    pub(super) fn refused(&self) -> usize {
        self.refused.load(Ordering::Relaxed)
    }

    /// From now on every token so far is refused.
    pub(super) fn kill_tokens(&self) {
        self.good.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// A new token, good from now on.
    fn issue(&self) -> String {
        let token = anonymous_jwt(self.issued.fetch_add(1, Ordering::Relaxed));
        self.good.lock().unwrap_or_else(PoisonError::into_inner).insert(token.clone());
        token
    }

    async fn listen(self: Arc<Self>, listener: TcpListener, tls: TlsAcceptor) {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            let (shop, tls) = (Arc::clone(&self), tls.clone());
            tokio::spawn(async move {
                if let Ok(stream) = tls.accept(stream).await {
                    serve(stream, |request| std::future::ready(shop.answer(&request))).await;
                }
            });
        }
    }

    fn answer(&self, request: &Request<Incoming>) -> Reply {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if request.uri().path().ends_with("/auth/anonymous") {
            return reply(StatusCode::FORBIDDEN, &json!({"message": "only for browsers"}));
        }
        if self.knows(request.headers()) {
            return reply(
                StatusCode::OK,
                &json!({"data": [{"title": "Python. К вершинам мастерства"}]}),
            );
        }
        if request.headers().contains_key(AUTHORIZATION)
            && self.refused.fetch_add(1, Ordering::Relaxed) == 0
        {
            self.timeline.note("the shop answers 401 to the first of them; they are held");
        }
        reply(StatusCode::UNAUTHORIZED, &json!({"message": "Authorization обязательное поле"}))
    }

    fn knows(&self, headers: &HeaderMap) -> bool {
        let field = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = field.and_then(|value| value.strip_prefix("Bearer "));
        let good = self.good.lock().unwrap_or_else(PoisonError::into_inner);
        token.is_some_and(|token| good.contains(token))
    }
}

/// FlareSolverr: takes its time, then gives a page's cookies.
pub(super) struct Solver {
    address: SocketAddr,
    shop: Arc<Shop>,
    pace: Duration,
    solves: AtomicUsize,
    timeline: Timeline,
}

impl Solver {
    /// Listens on a free port.
    pub(super) async fn start(
        shop: Arc<Shop>,
        pace: Duration,
        timeline: &Timeline,
    ) -> Outcome<Arc<Self>> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let solver = Arc::new(Self {
            address: listener.local_addr()?,
            shop,
            pace,
            solves: AtomicUsize::default(),
            timeline: timeline.clone(),
        });
        tokio::spawn(Arc::clone(&solver).listen(listener));
        Ok(solver)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Pages opened so far.
    pub(super) fn solves(&self) -> usize {
        self.solves.load(Ordering::Relaxed)
    }

    async fn listen(self: Arc<Self>, listener: TcpListener) {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            let solver = Arc::clone(&self);
            tokio::spawn(async move { serve(stream, |_| solver.solve()).await });
        }
    }

    async fn solve(&self) -> Reply {
        self.timeline.note("the solver opens the shop's page");
        sleep(self.pace).await;
        self.solves.fetch_add(1, Ordering::Relaxed);
        self.timeline.note("the solver has the page's cookies");
        let value = format!("Bearer%20{}", self.shop.issue());
        reply(
            StatusCode::OK,
            &json!({
                "status": "ok",
                "message": "Challenge not detected!",
                "solution": {
                    "url": format!("https://{SHOP_HOST}/"),
                    "status": 200,
                    "cookies": [{
                        "name": "access-token", "value": value,
                        "domain": ".chitai-gorod.ru", "path": "/",
                    }],
                    "userAgent": "Mozilla/5.0",
                    "headers": {},
                },
                "version": "3.5.2",
            }),
        )
    }
}

async fn serve<I, F>(stream: I, answer: impl Fn(Request<Incoming>) -> F)
where
    I: AsyncRead + AsyncWrite + Unpin,
    F: Future<Output = Reply>,
{
    let service = service_fn(|request| {
        let reply = answer(request);
        async move { Ok::<_, Infallible>(reply.await) }
    });
    // A connection that breaks is its client's affair.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

fn reply(status: StatusCode, body: &serde_json::Value) -> Reply {
    let mut reply = Response::new(Full::from(body.to_string()));
    *reply.status_mut() = status;
    reply
}

/// An anonymous token with the claims that the shop's have.
fn anonymous_jwt(number: usize) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let part = |value: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let header = part(json!({"alg": "HS256", "typ": "JWT"}));
    let claims = part(json!({
        "exp": now + TOKEN_LIFE, "iat": now, "iss": "/api/v1/auth/anonymous",
        "sub": format!("{number:064x}"), "type": 10,
    }));
    format!("{header}.{claims}.{}", BASE64_URL_SAFE_NO_PAD.encode(number.to_be_bytes()))
}

/// TLS for the shop's names, and the CA that vouches for it.
fn certificate() -> Outcome<(rustls::ServerConfig, String)> {
    let mut ca = CertificateParams::new(Vec::new())?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let names = vec![API_HOST.to_owned(), SHOP_HOST.to_owned()];
    let leaf = CertificateParams::new(names)?.signed_by(&key, &ca)?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)?;
    Ok((tls, ca.pem()))
}
