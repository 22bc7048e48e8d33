//! Opening of connections to upstreams: where to, whether at all, and TLS.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Egress;
use super::descriptors::{are_exhausted, is_shortage};
use super::parent::{Parent, ParentError, is_loopback, is_odd_address};
use super::read_ahead::ReadAhead;
use super::resolve::{Place, Places, ResolveError, Resolver};
use crate::config::{ConnectTo, ParentProxy};
use crate::metrics::{Limit, Metrics};

/// Head start of one address before the next is tried beside it (RFC 8305 §5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Longest look at the addresses of a name that the parent will resolve; at
/// most a quarter of the time for the connection.
const LOOK_LIMIT: Duration = Duration::from_secs(2);

/// Why no connection came about. All but the first four are the fault of the
/// upstream, or of what leads there.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DialError {
    /// The egress policy forbids the destination.
    #[error("{host}:{port} is not a public address")]
    NotAllowed {
        /// The destination as the client named it.
        host: String,
        /// Its port.
        port: u16,
    },
    /// The destination is this process itself.
    #[error("{host}:{port} is this sidecar itself{found}")]
    OwnListener {
        /// The destination as it was dialled.
        host: String,
        /// Its port.
        port: u16,
        /// Who says so.
        found: Found,
    },
    /// The system gives this process no more file descriptors.
    #[error("no connection to {host}:{port}: the sidecar is at its own limit of open files")]
    NoDescriptor {
        /// The destination.
        host: String,
        /// Its port.
        port: u16,
    },
    /// The system is still looking up too many other names.
    #[error("too many names are being looked up to look up {host}, too")]
    TooManyLookups {
        /// The name.
        host: String,
    },
    /// The name does not resolve.
    #[error("cannot resolve {host}: {error}")]
    Resolve {
        /// The name.
        host: String,
        /// What was said, and by whom.
        error: ResolveError,
    },
    /// No address took the connection, or the one that did broke it off in the
    /// TLS handshake.
    #[error("cannot connect to {host}:{port}: {error}")]
    Connect {
        /// The destination as it was dialled.
        host: String,
        /// Its port.
        port: u16,
        /// The last address's error.
        error: io::Error,
    },
    /// `CONNECT_TIMEOUT` passed.
    #[error(
        "no connection to {host}:{port}{} within {}",
        if *.by_parent { " by UPSTREAM_PROXY" } else { "" },
        humantime::format_duration(*.limit)
    )]
    Timeout {
        /// The destination.
        host: String,
        /// Its port.
        port: u16,
        /// The time allowed.
        limit: Duration,
        /// Whether the way leads through the parent proxy.
        by_parent: bool,
    },
    /// The parent proxy did not lead there.
    #[error("no way to {host}:{port}: the proxy of UPSTREAM_PROXY, {parent}, {error}")]
    Parent {
        /// The destination.
        host: String,
        /// Its port.
        port: u16,
        /// `host:port` of the parent.
        parent: String,
        /// What went wrong there.
        error: ParentError,
    },
    /// The TLS handshake failed; the certificate, mostly.
    #[error("TLS with {host} failed: {error}")]
    Tls {
        /// The name that was to be proved.
        host: String,
        /// What rustls says.
        error: io::Error,
    },
}

impl DialError {
    /// Whether the reason is that no descriptor was to be had. The resolvers
    /// do not tell, so after their errors one is tried.
    fn is_shortage(&self) -> bool {
        match self {
            Self::Connect { error, .. }
            | Self::Parent { error: ParentError::Unreachable(error), .. } => is_shortage(error),
            Self::Resolve { .. } | Self::Parent { error: ParentError::Unresolved(_), .. } => {
                are_exhausted()
            }
            _ => false,
        }
    }
}

/// How a name turned out to be this process itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// By its address.
    AsAddress,
    /// By the system's resolver, which knows an alias, perhaps.
    BySystem,
    /// By `UPSTREAM_DNS`, which should not know the alias.
    ByServers,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AsAddress => "",
            Self::BySystem => {
                ", says the system's resolver; if an alias leads the name here, set UPSTREAM_DNS"
            }
            Self::ByServers => {
                ", say the servers of UPSTREAM_DNS: they know the alias, too, so name others"
            }
        })
    }
}

/// Whose word a destination is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// The operator's: named in the settings, not subject to the egress policy.
    Operator,
    /// A client's: checked.
    Client,
}

/// A connection to an upstream, in the clear or not.
#[derive(Debug)]
pub enum UpstreamStream {
    /// Plain TCP.
    Plain(TcpStream),
    /// TLS with a verified certificate.
    Tls(Box<TlsStream<ReadAhead<TcpStream>>>),
}

/// The ways that the operator has laid.
#[derive(Default)]
pub struct Ways {
    /// Destinations that are dialled elsewhere, before all else.
    pub connect_to: Vec<ConnectTo>,
    /// The proxy that leads to all others but loopback.
    pub parent: Option<ParentProxy>,
    /// Who is asked for the addresses of destinations.
    pub resolver: Resolver,
}

/// Opens connections. Shared by all threads.
pub struct Dialer {
    egress: Egress,
    connect_to: HashMap<(String, u16), (String, u16)>,
    parent: Option<Parent>,
    resolver: Resolver,
    /// Lookups that clients may cause.
    lookups: Places,
    tls: TlsConnector,
    limit: Duration,
    metrics: Arc<Metrics>,
}

impl Dialer {
    /// A dialer that gives each connection `limit` in all, TLS included.
    #[must_use]
    pub fn new(
        egress: Egress,
        ways: Ways,
        tls: Arc<rustls::ClientConfig>,
        limit: Duration,
        metrics: Arc<Metrics>,
    ) -> Self {
        let entry = |to: ConnectTo| ((to.host, to.port), (to.to_host, to.to_port));
        Self {
            egress,
            connect_to: ways.connect_to.into_iter().map(entry).collect(),
            parent: ways.parent.map(Parent::new),
            resolver: ways.resolver,
            lookups: Places::new(),
            tls: TlsConnector::from(tls),
            limit,
            metrics,
        }
    }

    /// Opens a TCP connection to `host` (normalized).
    ///
    /// # Errors
    ///
    /// [`DialError`]; never [`DialError::Tls`].
    pub async fn tcp(&self, host: &str, port: u16, reach: Reach) -> Result<TcpStream, DialError> {
        self.bounded(host, port, self.open(host, port, reach)).await
    }

    /// Opens a connection, with TLS proved for `host` where `tls` is set.
    ///
    /// # Errors
    ///
    /// [`DialError`].
    pub async fn stream(
        &self,
        host: &str,
        port: u16,
        reach: Reach,
        tls: bool,
    ) -> Result<UpstreamStream, DialError> {
        let open = async {
            let tcp = self.open(host, port, reach).await?;
            if !tls {
                return Ok(UpstreamStream::Plain(tcp));
            }
            let failed = |error| DialError::Tls { host: host.to_owned(), error };
            let name = ServerName::try_from(host.to_owned())
                .map_err(|error| failed(io::Error::other(error)))?;
            let stream = self.tls.connect(name, ReadAhead::new(tcp)).await.map_err(|error| {
                if is_of_tls(&error) {
                    failed(error)
                } else {
                    DialError::Connect { host: host.to_owned(), port, error }
                }
            })?;
            Ok(UpstreamStream::Tls(Box::new(stream)))
        };
        self.bounded(host, port, open).await
    }

    async fn bounded<T>(
        &self,
        host: &str,
        port: u16,
        open: impl Future<Output = Result<T, DialError>>,
    ) -> Result<T, DialError> {
        timeout(self.limit, open).await.unwrap_or_else(|_| {
            let by_parent = self.parent_of(host, port).is_some();
            Err(DialError::Timeout { host: host.to_owned(), port, limit: self.limit, by_parent })
        })
    }

    /// Connects by the way that the operator laid: `CONNECT_TO`, else the
    /// parent, else directly.
    async fn open(&self, host: &str, port: u16, reach: Reach) -> Result<TcpStream, DialError> {
        let stream = match (self.elsewhere(host, port), self.parent_of(host, port)) {
            (Some((host, port)), _) => self.direct(host, *port, Reach::Operator).await,
            (None, Some(parent)) => self.by_parent(parent, host, port, reach).await,
            (None, None) => self.direct(host, port, reach).await,
        };
        let stream = stream.map_err(|error| self.blame(error, host, port))?;
        // Small writes must not wait for acknowledgements; failure costs only speed.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    /// The error for a client: what was our own limit is told so, and counted.
    fn blame(&self, error: DialError, host: &str, port: u16) -> DialError {
        if !error.is_shortage() {
            return error;
        }
        self.metrics.limited(Limit::Descriptors);
        DialError::NoDescriptor { host: host.to_owned(), port }
    }

    /// The entry of `CONNECT_TO`: the operator's word, whoever asks.
    fn elsewhere(&self, host: &str, port: u16) -> Option<&(String, u16)> {
        self.connect_to.get(&(host.to_owned(), port))
    }

    fn parent_of(&self, host: &str, port: u16) -> Option<&Parent> {
        let direct = is_loopback(host) || self.elsewhere(host, port).is_some();
        self.parent.as_ref().filter(|_| !direct)
    }

    async fn direct(&self, host: &str, port: u16, reach: Reach) -> Result<TcpStream, DialError> {
        let place = self.place(host, reach).await?;
        let found = self.resolver.resolve(host, port, place).await;
        let found = found.map_err(|error| DialError::Resolve { host: host.to_owned(), error })?;
        let allowed = self.allowed(found, host, port, reach)?;
        let connected = connect_any(interleave(allowed)).await;
        connected.map_err(|error| DialError::Connect { host: host.to_owned(), port, error })
    }

    async fn by_parent(
        &self,
        parent: &Parent,
        host: &str,
        port: u16,
        reach: Reach,
    ) -> Result<TcpStream, DialError> {
        self.check_for_parent(host, port, reach).await?;
        let failed = |error| DialError::Parent {
            host: host.to_owned(),
            port,
            parent: parent.address().authority(),
            error,
        };
        let stream = self.reach_parent(parent.address()).await.map_err(failed)?;
        parent.lead(stream, host, port).await.map_err(failed)
    }

    /// Connects to the parent: a neighbour, whose name the system knows.
    async fn reach_parent(&self, parent: &ParentProxy) -> Result<TcpStream, ParentError> {
        let found = Resolver::System.resolve(&parent.host, parent.port, None).await;
        let mut found = found.map_err(ParentError::Unresolved)?;
        found.retain(|address| !self.egress.is_own(*address));
        if found.is_empty() {
            return Err(ParentError::Itself);
        }
        connect_any(interleave(found)).await.map_err(ParentError::Unreachable)
    }

    /// Applies the egress policy to what can be known here: the parent
    /// resolves the name. A client's destination that resolves here is judged
    /// by these addresses, all of which must be permitted, since the parent
    /// takes which it likes; one that does not resolve is left to the parent,
    /// unless it is an address in disguise.
    async fn check_for_parent(&self, host: &str, port: u16, reach: Reach) -> Result<(), DialError> {
        if reach == Reach::Operator {
            return Ok(());
        }
        let not_allowed = || DialError::NotAllowed { host: host.to_owned(), port };
        let look = LOOK_LIMIT.min(self.limit / 4);
        // Not within the look: who waits in vain is no name that does not resolve.
        let place = self.place(host, reach).await?;
        match timeout(look, self.resolver.resolve(host, port, place)).await {
            Ok(Ok(found)) => {
                let count = found.len();
                let allowed = self.allowed(found, host, port, reach)?;
                if allowed.len() == count { Ok(()) } else { Err(not_allowed()) }
            }
            _ if is_odd_address(host) => Err(not_allowed()),
            _ => Ok(()),
        }
    }

    /// What a look at `host` needs: a place, if a client wants it and it blocks.
    async fn place(&self, host: &str, reach: Reach) -> Result<Option<Place>, DialError> {
        if reach == Reach::Operator || !self.resolver.blocks(host) {
            return Ok(None);
        }
        let place = self.lookups.take().await;
        if place.is_none() {
            self.metrics.limited(Limit::Lookups);
            return Err(DialError::TooManyLookups { host: host.to_owned() });
        }
        Ok(place)
    }

    /// Those of `found` that may be dialled; never none.
    fn allowed(
        &self,
        mut found: Vec<SocketAddr>,
        host: &str,
        port: u16,
        reach: Reach,
    ) -> Result<Vec<SocketAddr>, DialError> {
        found.retain(|address| !self.egress.is_own(*address));
        if found.is_empty() {
            let found = self.found(host);
            return Err(DialError::OwnListener { host: host.to_owned(), port, found });
        }
        found.retain(|address| reach == Reach::Operator || self.egress.permits(host, *address));
        if found.is_empty() {
            return Err(DialError::NotAllowed { host: host.to_owned(), port });
        }
        Ok(found)
    }

    /// Who said where `host` is.
    fn found(&self, host: &str) -> Found {
        match &self.resolver {
            _ if host.parse::<IpAddr>().is_ok() => Found::AsAddress,
            Resolver::System => Found::BySystem,
            Resolver::Servers(_) => Found::ByServers,
        }
    }
}

/// Families in turn, the first address's family first (RFC 8305 §4).
fn interleave(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let mut second = second.into_iter();
    let mut ordered = Vec::new();
    for address in first {
        ordered.push(address);
        ordered.extend(second.next());
    }
    ordered.extend(second);
    ordered
}

/// The first connection that stands; each address gets a head start.
async fn connect_any(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut waiting = addresses.into_iter();
    let mut attempts = FuturesUnordered::new();
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    loop {
        attempts.extend(waiting.next().map(TcpStream::connect));
        tokio::select! {
            attempt = attempts.next() => match attempt {
                Some(Ok(stream)) => return Ok(stream),
                Some(Err(error)) => last = error,
                None => return Err(last),
            },
            () = sleep(ATTEMPT_DELAY), if waiting.len() > 0 => {}
        }
    }
}

impl AsyncRead for UpstreamStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for UpstreamStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

/// Whether a handshake failed by what was said in it. A connection that broke
/// says nothing of a certificate.
fn is_of_tls(error: &io::Error) -> bool {
    matches!(error.get_ref(), Some(inner) if inner.is::<rustls::Error>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_connection_is_no_matter_of_certificates() {
        let bad = rustls::Error::InvalidCertificate(rustls::CertificateError::Expired);
        assert!(is_of_tls(&io::Error::new(io::ErrorKind::InvalidData, bad)));
        assert!(!is_of_tls(&io::ErrorKind::ConnectionReset.into()));
        let end = io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof");
        assert!(!is_of_tls(&end));
    }

    #[tokio::test]
    async fn an_address_that_refuses_makes_way_for_the_next() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let open = listener.local_addr().unwrap();
        let stream = connect_any(vec![closed, open]).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), open);
        assert!(connect_any(vec![closed]).await.is_err());
    }

    #[test]
    fn families_take_turns() {
        let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (a, b, c) = (parse("[::1]:1"), parse("[::2]:1"), parse("1.1.1.1:1"));
        assert_eq!(interleave(vec![a, b, c]), vec![a, c, b]);
    }
}
