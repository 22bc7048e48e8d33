//! The played shop: bodies of the size that the path names, for whoever brings
//! the token.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio_rustls::TlsAcceptor;

use super::{NAMES, TOKEN};

/// The largest body.
static BODY: [u8; 64 * 1024] = [b'x'; 64 * 1024];

pub(super) struct Shop {
    plain: SocketAddr,
    tls: SocketAddr,
    ca_pem: String,
}

impl Shop {
    /// Serves from a thread of its own until the process ends.
    pub(super) fn start() -> Self {
        let (config, ca_pem) = certificate();
        let [plain, tls] = [(), ()].map(|()| {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        });
        let shop =
            Self { plain: plain.local_addr().unwrap(), tls: tls.local_addr().unwrap(), ca_pem };
        thread::spawn(move || serve(plain, tls, &TlsAcceptor::from(Arc::new(config))));
        shop
    }

    pub(super) fn plain_address(&self) -> SocketAddr {
        self.plain
    }

    pub(super) fn tls_address(&self) -> SocketAddr {
        self.tls
    }

    pub(super) fn ca_pem(&self) -> &str {
        &self.ca_pem
    }
}

fn serve(plain: std::net::TcpListener, tls: std::net::TcpListener, acceptor: &TlsAcceptor) {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (plain, tls) =
            (TcpListener::from_std(plain).unwrap(), TcpListener::from_std(tls).unwrap());
        let plain = accept(&plain, |stream| async { talk(stream).await });
        let tls = accept(&tls, |stream| {
            let acceptor = acceptor.clone();
            async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    talk(stream).await;
                }
            }
        });
        tokio::join!(plain, tls)
    });
}

async fn accept<F>(listener: &TcpListener, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        tokio::spawn(serve(stream));
    }
}

async fn talk<I: AsyncRead + AsyncWrite + Unpin>(stream: I) {
    let service = service_fn(async |request| Ok::<_, Infallible>(answer(&request)));
    // A connection that breaks is its client's affair.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

/// `/2048`: so many bytes. Any other path: a few.
fn answer(request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let token = request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes);
    let known = token.and_then(|field| field.strip_prefix(b"Bearer ")) == Some(TOKEN.as_bytes());
    let size = request.uri().path().trim_start_matches('/').parse().unwrap_or(100);
    let mut answer = Response::new(Full::from(&BODY[..size]));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if !known {
        *answer.status_mut() = StatusCode::UNAUTHORIZED;
    }
    answer
}

/// TLS for the shop's names, and the CA that vouches for it.
fn certificate() -> (ServerConfig, String) {
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(NAMES.map(str::to_owned)).unwrap();
    let leaf = leaf.signed_by(&key, &ca).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(super::client::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], key)
        .unwrap();
    (config, ca.pem())
}
