//! Parsers: every way into the sidecar, on raw sockets.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;

use super::World;
use super::certificates::{connector, handshake};
use super::http::{Response, Wire, chunk, head, last_chunk, message};

/// The API host that most tests talk to.
pub(crate) const API: &str = "web-agr.chitai-gorod.ru";
/// The other one.
pub(crate) const GATE: &str = "web-gate.chitai-gorod.ru";

/// The ways to the API through one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Way {
    /// CONNECT, then TLS with a certificate of the sidecar's CA.
    Intercept,
    /// CONNECT to port 80, then plain HTTP.
    PlainTunnel,
    /// `GET http://host/…`
    AbsoluteHttp,
    /// `GET https://host/…`
    AbsoluteHttps,
    /// `GET /web/api/…`, found by prefix.
    Gateway,
    /// `GET /web/api/…`, found by `Host`.
    GatewayByHost,
}

impl Way {
    pub(crate) const ALL: [Self; 6] = [
        Self::Intercept,
        Self::PlainTunnel,
        Self::AbsoluteHttp,
        Self::AbsoluteHttps,
        Self::Gateway,
        Self::GatewayByHost,
    ];

    /// The name of the route in metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Intercept | Self::PlainTunnel => "intercept",
            Self::AbsoluteHttp | Self::AbsoluteHttps => "absolute",
            Self::Gateway | Self::GatewayByHost => "gateway",
        }
    }

    fn target(self, path: &str) -> String {
        match self {
            Self::AbsoluteHttp => format!("http://{API}{path}"),
            Self::AbsoluteHttps => format!("https://{API}{path}"),
            _ => path.to_owned(),
        }
    }

    fn host(self) -> &'static str {
        if self == Self::Gateway { "sidecar.test:8080" } else { API }
    }
}

/// A request to be written exactly so.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    method: String,
    path: String,
    fields: Vec<(String, String)>,
    body: Vec<u8>,
    chunks: Option<Vec<Vec<u8>>>,
    trailers: Vec<(&'static str, &'static str)>,
}

impl Request {
    pub(crate) fn new(method: &str, path: &str) -> Self {
        Self {
            method: method.to_owned(),
            path: path.to_owned(),
            fields: Vec::new(),
            body: Vec::new(),
            chunks: None,
            trailers: Vec::new(),
        }
    }

    pub(crate) fn get(path: &str) -> Self {
        Self::new("GET", path)
    }

    pub(crate) fn post(path: &str, body: impl Into<Vec<u8>>) -> Self {
        Self::new("POST", path).body(body)
    }

    pub(crate) fn field(mut self, name: &str, value: &str) -> Self {
        self.fields.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A body told by its length.
    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        let length = self.body.len().to_string();
        self.field("Content-Length", &length)
    }

    /// A body in chunks, with trailer fields.
    pub(crate) fn chunked(
        mut self,
        chunks: &[&[u8]],
        trailers: &[(&'static str, &'static str)],
    ) -> Self {
        self.chunks = Some(chunks.iter().map(|chunk| chunk.to_vec()).collect());
        self.trailers = trailers.to_vec();
        let mut request = self.field("Transfer-Encoding", "chunked");
        for (name, _) in trailers {
            request = request.field("Trailer", name);
        }
        request
    }

    fn bytes(&self, way: Way) -> Vec<u8> {
        let start = format!("{} {} HTTP/1.1", self.method, way.target(&self.path));
        let mut fields = vec![("Host".to_owned(), way.host().to_owned())];
        fields.extend(self.fields.iter().cloned());
        let Some(chunks) = &self.chunks else {
            return message(&start, &fields, &self.body);
        };
        let mut out = head(&start, &fields);
        for part in chunks {
            out.extend_from_slice(&chunk(part));
        }
        out.extend_from_slice(&last_chunk(&self.trailers));
        out
    }
}

/// A keep-alive connection by one way.
pub(crate) struct Session {
    pub(crate) wire: Wire,
    way: Way,
}

impl Session {
    pub(crate) async fn send(&mut self, request: &Request) {
        self.wire.send(request.bytes(self.way)).await;
    }

    pub(crate) async fn try_call(&mut self, request: &Request) -> io::Result<Response> {
        self.wire.try_send(request.bytes(self.way)).await?;
        self.wire.try_response(&request.method).await
    }

    pub(crate) async fn call(&mut self, request: &Request) -> Response {
        let answer = self.try_call(request).await;
        answer.unwrap_or_else(|error| panic!("{:?} {}: no answer: {error}", self.way, request.path))
    }

    pub(crate) async fn get(&mut self, path: &str) -> Response {
        self.call(&Request::get(path)).await
    }
}

/// One GET in absolute form at the proxy port `proxy`, on a connection of its own, which is given
/// `patience` once it stands.
pub(crate) async fn get_at(
    proxy: SocketAddr,
    patience: Duration,
    path: &str,
) -> io::Result<Response> {
    let mut wire = Wire::new(TcpStream::connect(proxy).await?);
    wire.try_send(Request::get(path).bytes(Way::AbsoluteHttp)).await?;
    wire.try_response_within(patience, "GET").await
}

impl World {
    /// A connection to the proxy port.
    pub(crate) async fn wire(&self) -> Wire {
        Wire::connect(self.sidecar.proxy()).await
    }

    /// Sends `bytes` to the proxy port and reads the answer.
    pub(crate) async fn raw(&self, bytes: impl AsRef<[u8]>) -> Response {
        let mut wire = self.wire().await;
        wire.send(bytes).await;
        wire.response("GET").await
    }

    /// What `CONNECT authority` gets, and the connection it came on.
    pub(crate) async fn connect(&self, authority: &str) -> (Response, Wire) {
        let mut wire = self.wire().await;
        wire.send(format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n")).await;
        let (head, interim) = wire.response_head().await.unwrap();
        let status = head.word(1).parse().unwrap();
        let framing = super::http::Framing::of_response(&head, "CONNECT");
        let body = if status == 200 { Vec::new() } else { wire.body(framing).await.unwrap().bytes };
        let response = Response { status, head, body, trailers: Vec::new(), interim, framing };
        (response, wire)
    }

    /// An open tunnel to `authority`.
    pub(crate) async fn tunnel(&self, authority: &str) -> Wire {
        let (response, wire) = self.connect(authority).await;
        assert_eq!(response.status, 200, "CONNECT {authority}: {response:?}");
        wire
    }

    /// TLS inside a tunnel that is open, trusting the sidecar's CA alone.
    pub(crate) async fn tls_over(&self, tunnel: Wire, name: &str) -> Wire {
        let connector = connector(&self.ca_file(), &[b"h2", b"http/1.1"]);
        handshake(tunnel.into_inner(), name, &connector)
            .await
            .expect("a handshake with the sidecar's leaf")
    }

    /// TLS straight to `SNI_LISTEN`, as a client does whom an alias has led there.
    pub(crate) async fn by_sni(&self, name: &str) -> Session {
        let wire = Wire::connect(self.sidecar.sni()).await;
        Session { wire: self.tls_over(wire, name).await, way: Way::Intercept }
    }

    /// An open connection by `way`.
    pub(crate) async fn open(&self, way: Way) -> Session {
        let wire = match way {
            Way::Intercept => {
                let tunnel = self.tunnel(&format!("{API}:443")).await;
                self.tls_over(tunnel, API).await
            }
            Way::PlainTunnel => self.tunnel(&format!("{API}:80")).await,
            _ => self.wire().await,
        };
        Session { wire, way }
    }

    /// One request on a connection of its own.
    pub(crate) async fn call(&self, way: Way, request: &Request) -> Response {
        self.open(way).await.call(request).await
    }

    /// One GET by the way that needs the least.
    pub(crate) async fn get(&self, path: &str) -> Response {
        self.call(Way::AbsoluteHttp, &Request::get(path)).await
    }
}
