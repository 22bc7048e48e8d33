//! Clients of the shop, directly or through a sidecar.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::Request;
use http::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, COOKIE, HOST, USER_AGENT};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{API, TOKEN};

/// Bytes of a request's head without its cookies.
const SMALLEST_HEAD: usize = 260;

/// How a request gets to the shop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Directly, without TLS.
    Plain,
    /// Directly, with TLS.
    Tls,
    /// Through the sidecar, in absolute-form; with TLS from there on.
    Absolute,
    /// Through the sidecar by CONNECT, with TLS on both sides of it.
    Intercepted,
}

impl Way {
    /// As the tables have it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "direct, http",
            Self::Tls => "direct, https",
            Self::Absolute => "absolute-form",
            Self::Intercepted => "CONNECT, intercepted",
        }
    }
}

/// Opens connections by one way.
#[derive(Clone)]
pub(crate) struct Client {
    way: Way,
    to: SocketAddr,
    tls: Arc<ClientConfig>,
}

/// A connection that stays open from request to request.
pub(crate) struct Connection {
    way: Way,
    sender: SendRequest<Empty<Bytes>>,
}

impl Client {
    pub(super) fn new(way: Way, to: SocketAddr, ca_pem: &str) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca_pem.as_bytes()).unwrap()).unwrap();
        let tls = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { way, to, tls: Arc::new(tls) }
    }

    /// A new connection. Needs the runtime that it is to live on.
    pub(crate) async fn connect(&self) -> Connection {
        let mut stream = TcpStream::connect(self.to).await.unwrap();
        stream.set_nodelay(true).unwrap();
        if self.way == Way::Intercepted {
            ask_for_tunnel(&mut stream).await;
        }
        let sender = match self.way {
            Way::Plain | Way::Absolute => speak(stream).await,
            Way::Tls | Way::Intercepted => {
                let name = ServerName::try_from(API).unwrap();
                let tls = TlsConnector::from(Arc::clone(&self.tls));
                speak(tls.connect(name, stream).await.unwrap()).await
            }
        };
        Connection { way: self.way, sender }
    }
}

async fn ask_for_tunnel(stream: &mut TcpStream) {
    let connect = format!("CONNECT {API}:443 HTTP/1.1\r\nHost: {API}:443\r\n\r\n");
    stream.write_all(connect.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer));
}

async fn speak<I>(stream: I) -> SendRequest<Empty<Bytes>>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

impl Connection {
    /// Asks for `size` bytes, with a head of some `head` bytes, and reads them.
    /// Panics if it gets anything else.
    pub(crate) async fn ask(&mut self, size: usize, head: usize) {
        self.sender.ready().await.unwrap();
        let mut answer = self.sender.send_request(self.request(size, head)).await.unwrap();
        assert_eq!(answer.status(), 200, "by {:?}", self.way);
        let mut read = 0;
        while let Some(frame) = answer.frame().await {
            read += frame.unwrap().data_ref().map_or(0, Bytes::len);
        }
        assert_eq!(read, size, "by {:?}", self.way);
    }

    fn request(&self, size: usize, head: usize) -> Request<Empty<Bytes>> {
        let request = match self.way {
            Way::Absolute => Request::get(format!("http://{API}/{size}")),
            _ => Request::get(format!("/{size}")),
        };
        // It brings a token of its own, so that the shop sees one by all ways.
        let request = request
            .header(HOST, API)
            .header(USER_AGENT, "python-requests/2.32.3")
            .header(ACCEPT_ENCODING, "gzip, deflate")
            .header(ACCEPT, "*/*")
            .header(AUTHORIZATION, format!("Bearer {TOKEN}"))
            .header(COOKIE, cookies(head.saturating_sub(SMALLEST_HEAD)));
        request.body(Empty::new()).unwrap()
    }
}

/// Cookies of so many bytes, to the nearest hundred.
fn cookies(bytes: usize) -> String {
    let value = "x".repeat(100 - "one=; ".len());
    (0..bytes / 100).flat_map(|_| ["one=", &value, "; "]).collect()
}

/// The cryptography that the sidecar has, too.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
