//! CONNECT to an API host, or TLS that names one: TLS ends here, or there is
//! none, and the inner requests are forwarded with the token.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures_util::FutureExt as _;
use http::header::HOST;
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderValue, Method, Request};
use hyper::body::Incoming;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use rustls::AlertDescription;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::debug;

use super::error::ProxyError;
use super::forward::Outbound;
use super::head::{Head, Inspected, Resettable, Subject};
use super::service::{Answer, ClientConnection, Next, Seen, Service, answer_of, log};
use super::way::{Coming, passed};
use crate::config::normalize_host;
use crate::hints::Hint;
use crate::metrics::{Limit, Route};

/// Longest time until a client has begun, and until it has finished, its TLS
/// handshake.
pub(super) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// First byte of a TLS connection: the content type `handshake`
/// (RFC 8446 §5.1). No HTTP method starts with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// How a client looks that went without a word.
const HANG_UPS: [io::ErrorKind; 3] =
    [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];

/// The tunnel that a client asked for.
#[derive(Clone)]
pub(super) struct Tunnelled {
    /// Host of the CONNECT request or the SNI, normalized.
    pub(super) host: String,
    /// The API origin that it names.
    pub(super) origin: usize,
    /// What the inner requests count as.
    pub(super) route: Route,
    /// Whether `doctor` asked for it, or says so: it only looks on. What fails
    /// there is no client's mistake, and what comes is no traffic.
    pub(super) by_doctor: bool,
}

impl Service {
    /// Serves what comes inside the tunnel.
    pub(super) async fn intercept(
        &self,
        on_upgrade: OnUpgrade,
        tunnelled: Tunnelled,
        client: SocketAddr,
    ) {
        let begun = tokio::select! {
            begun = timeout(HANDSHAKE_LIMIT, begin(on_upgrade)) => begun,
            () = self.newcomers_time_is_up() => return,
        };
        let (stream, first) = match begun {
            Ok(Ok(Some(begun))) => begun,
            Ok(Ok(None)) => return,
            Ok(Err(error)) => return debug!(%error, client.addr = %client, "tunnel was not used"),
            Err(_) => {
                self.proxy.metrics.limited(Limit::HandshakeTime);
                return debug!(client.addr = %client, "tunnel was not used in time");
            }
        };
        if first == TLS_HANDSHAKE {
            self.intercept_tls(stream, &tunnelled, client).await;
        } else {
            self.serve_inner(stream, &tunnelled, client).await;
        }
    }

    /// Ends TLS with the leaf of the tunnel's host, and serves what comes
    /// inside.
    pub(super) async fn intercept_tls(
        &self,
        stream: Rewound,
        tunnelled: &Tunnelled,
        client: SocketAddr,
    ) {
        // In a box: the memory of a handshake goes when it is over.
        let Some(stream) = Box::pin(self.accept_tls(stream, tunnelled, client)).await else {
            return;
        };
        self.serve_inner(stream, tunnelled, client).await;
    }

    /// Ends TLS with the leaf of the tunnel's host; `None` where that failed.
    async fn accept_tls(
        &self,
        stream: Rewound,
        tunnelled: &Tunnelled,
        client: SocketAddr,
    ) -> Option<TlsStream<Rewound>> {
        let Some(config) = self.proxy.leaves.server_config(&tunnelled.host).await else {
            debug!(host = tunnelled.host, "no certificate for an API host");
            return None;
        };
        let Some(place) = self.proxy.bounds.handshakes.begin(client.ip()) else {
            self.proxy.metrics.limited(Limit::Handshakes);
            debug!(client.addr = %client, "too many TLS handshakes at once");
            return None;
        };
        let handshake = TlsAcceptor::from(config).accept(stream).into_fallible();
        let accepted = tokio::select! {
            accepted = timeout(HANDSHAKE_LIMIT, handshake) => accepted,
            () = self.newcomers_time_is_up() => return None,
        };
        drop(place);
        match accepted {
            Ok(Ok(stream)) => return Some(stream),
            Ok(Err((error, stream))) => {
                debug!(%error, client.addr = %client, "TLS with the client failed");
                let hint = distrust(&error, stream.answered, client.ip());
                if let Some(hint) = hint.filter(|_| !tunnelled.by_doctor) {
                    self.proxy.hints.tell(&hint);
                }
            }
            Err(_) => {
                self.proxy.metrics.limited(Limit::HandshakeTime);
                debug!(client.addr = %client, "TLS with the client took too long");
            }
        }
        None
    }

    /// Serves HTTP inside the tunnel.
    fn serve_inner<'a, I>(
        &'a self,
        stream: I,
        tunnelled: &'a Tunnelled,
        client: SocketAddr,
    ) -> impl Future<Output = ()> + use<'a, I>
    where
        I: AsyncRead + AsyncWrite + Resettable + Unpin + Send + 'static,
    {
        let connection = ClientConnection::new(client);
        let of_requests = Rc::clone(&connection);
        let served = self.serve_http(stream, client, move |request, head| {
            self.inner(request, head, tunnelled, &of_requests)
        });
        // An async block that awaits `served` would be twice as large.
        served.then(async move |()| {
            if let Some((on_upgrade, Next::Switched(switched))) = connection.take_next() {
                Box::pin(self.tunnel_switched(on_upgrade, switched)).await;
            }
        })
    }

    /// One request inside the tunnel.
    fn inner<'a>(
        &'a self,
        request: Request<Incoming>,
        head: Result<Head, ProxyError>,
        tunnelled: &'a Tunnelled,
        client: &Rc<ClientConnection>,
    ) -> impl Future<Output = Answer> + use<'a> {
        let started = Instant::now();
        let seen = Seen::of(&request, client.address);
        let client = Rc::clone(client);
        let coming = self.inner_answer(request, head, tunnelled, &client);
        async move {
            let answer = answer_of(coming, &client).await;
            if !tunnelled.by_doctor {
                self.count(tunnelled.route, &answer, started);
            }
            log(tunnelled.route, &seen, &answer, started);
            answer
        }
    }

    /// The answer to it, of the origin that the tunnel is for.
    fn inner_answer(
        &self,
        request: Request<Incoming>,
        head: Result<Head, ProxyError>,
        tunnelled: &Tunnelled,
        client: &Rc<ClientConnection>,
    ) -> Result<Coming<'_>, ProxyError> {
        let (mut parts, body, head) = passed(request, head, client)?;
        if parts.method == Method::CONNECT {
            return Err(ProxyError::BadRequest("there is no CONNECT inside a tunnel"));
        }
        let upstream = Rc::clone(self.api(tunnelled.origin));
        let names_it = |field| names_host(field, &tunnelled.host, upstream.key().port);
        let host =
            if parts.uri.authority().is_none() && parts.headers.get(HOST).is_some_and(names_it) {
                None
            } else {
                self.inner_host(&mut parts, head.subject, tunnelled)?
            };
        let to = Outbound { upstream, host, with_token: true, observed: tunnelled.by_doctor };
        self.to_upstream(parts, head.spelling, body, to, client)
    }

    /// The `Host` that the origin is to see; `None`: the client's own. An
    /// absolute-form target is made one in origin-form.
    fn inner_host(
        &self,
        parts: &mut Parts,
        subject: Subject,
        tunnelled: &Tunnelled,
    ) -> Result<Option<HeaderValue>, ProxyError> {
        // RFC 9112 §3.2.2: an absolute-form target goes before `Host`.
        let named = parts.uri.authority().cloned();
        let in_field =
            || parts.headers.get(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
        let authority = named.clone().or_else(in_field);
        if authority.as_ref().is_some_and(|named| normalize_host(named.host()) != tunnelled.host) {
            return Err(ProxyError::Misdirected);
        }
        if named.is_some() {
            parts.uri = subject.target(&parts.uri);
        }
        // The client's own spelling of the host stays; without one, ours. A
        // port that is not the origin's does not mean another place: some
        // clients write the one by which they came here, or 80.
        let port = authority.and_then(|named| named.port_u16());
        let foreign_port = port.is_some_and(|port| port != self.api(tunnelled.origin).key().port);
        let none = parts.headers.get(HOST).is_none_or(HeaderValue::is_empty);
        let ours = named.is_some() || none || foreign_port;
        Ok(ours.then(|| self.proxy.origins.host_field(tunnelled.origin).clone()))
    }
}

/// Whether `field` is `host` as nearly all write it, with `port` or without one.
fn names_host(field: &HeaderValue, host: &str, port: u16) -> bool {
    match field.as_bytes().strip_prefix(host.as_bytes()) {
        Some([]) => true,
        Some([b':', digits @ ..]) => {
            str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()) == Some(port)
        }
        _ => false,
    }
}

/// What a failed handshake says of the trust of the client at `address`: it
/// refuses our certificate or, as Node does, is gone without a word once it has
/// been `answered` with it.
fn distrust(error: &io::Error, answered: bool, address: IpAddr) -> Option<Hint> {
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(rustls::Error::AlertReceived(
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown,
        )) => Some(Hint::distrust(address)),
        Some(_) => None,
        None => (answered && HANG_UPS.contains(&error.kind())).then(|| Hint::hang_up(address)),
    }
}

/// The client's stream after the CONNECT, and its first byte; `None` where it
/// ended before one came.
async fn begin(on_upgrade: OnUpgrade) -> io::Result<Option<(Rewound, u8)>> {
    let stream = Rewound::from_upgrade(on_upgrade).await?;
    if let Some(first) = stream.early.first() {
        let first = *first;
        return Ok(Some((stream, first)));
    }
    let mut first = [0];
    let read = stream.stream.peek(&mut first).await?;
    Ok((read > 0).then_some((stream, first[0])))
}

/// A client's socket, and what was read from it too early.
pub(super) struct Rewound {
    early: Bytes,
    stream: TcpStream,
    /// Whether anything was written to it.
    answered: bool,
}

impl Rewound {
    /// A `stream` that begins with what was read from it before.
    pub(super) fn new(early: Bytes, stream: TcpStream) -> Self {
        Self { early, stream, answered: false }
    }

    /// What was read too early, and the socket.
    pub(super) fn into_parts(self) -> (Bytes, TcpStream) {
        (self.early, self.stream)
    }

    /// Takes the socket back from hyper.
    ///
    /// # Errors
    ///
    /// The connection ended before the answer to the CONNECT was written.
    pub(super) async fn from_upgrade(on_upgrade: OnUpgrade) -> io::Result<Self> {
        let upgraded: Upgraded = on_upgrade.await.map_err(io::Error::other)?;
        let parts = upgraded.downcast::<TokioIo<Inspected<TcpStream>>>();
        let parts =
            parts.map_err(|_| io::Error::other("the upgraded stream is of another kind"))?;
        let (stream, early) = parts.io.into_inner().into_parts();
        // Even an empty `read_buf` would keep the buffer that it was cut from.
        Ok(Self::new([parts.read_buf, early].concat().into(), stream))
    }
}

impl Resettable for Rewound {
    fn reset(&self) {
        self.stream.reset();
    }
}

impl AsyncRead for Rewound {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.early.is_empty() {
            return Pin::new(&mut this.stream).poll_read(cx, buf);
        }
        let count = this.early.len().min(buf.remaining());
        buf.put_slice(&this.early[..count]);
        this.early.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewound {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.answered = true;
        Pin::new(&mut this.stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.answered = true;
        Pin::new(&mut this.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alert(alert: AlertDescription) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(alert))
    }

    fn check(error: &io::Error, answered: bool, expected: Option<fn(IpAddr) -> Hint>) {
        let address = IpAddr::from([10, 0, 0, 1]);
        let expected = expected.map(|hint| hint(address));
        assert_eq!(distrust(error, answered, address), expected, "{error}");
    }

    #[test]
    fn alerts_about_the_certificate_are_distrust() {
        for description in [
            AlertDescription::UnknownCA,
            AlertDescription::BadCertificate,
            AlertDescription::CertificateUnknown,
        ] {
            check(&alert(description), true, Some(Hint::distrust));
        }
        check(&alert(AlertDescription::ProtocolVersion), true, None);
        check(&alert(AlertDescription::UserCanceled), true, None);
    }

    #[test]
    fn hanging_up_is_told_of_only_once_the_certificate_is_out() {
        for kind in HANG_UPS {
            check(&kind.into(), true, Some(Hint::hang_up));
            check(&kind.into(), false, None);
        }
        check(&io::ErrorKind::TimedOut.into(), true, None);
    }
}
