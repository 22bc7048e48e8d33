//! TLS straight to `SNI_LISTEN`: the name in the ClientHello decides where it
//! leads. For clients that ignore proxy settings, behind a network alias.
//!
//! # Invariants
//!
//! - No more is read than a ClientHello may hold, and in bounded time.
//! - Toward a host that is not the API's, each byte goes on as it came.

use std::io;
use std::net::SocketAddr;

use bytes::{BufMut, BytesMut};
use http::Response;
use rustls::server::Acceptor;
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::body::AnswerBody;
use super::error::ProxyError;
use super::intercept::{HANDSHAKE_LIMIT, Rewound, Tunnelled};
use super::service::Service;
use crate::config::normalize_host;
use crate::metrics::{Limit, Route};
use crate::net::Reach;

/// Largest ClientHello, its records' heads included.
const MAX_HELLO: usize = 16 * 1024;

/// Where a client that was led here by an alias wanted to go.
const TLS_PORT: u16 = 443;

/// Why a connection has no name to go by.
#[derive(Debug, Error)]
pub(super) enum HelloError {
    /// It broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// It ended before the ClientHello did.
    #[error("the client hung up before its ClientHello was whole")]
    Ended,
    /// What came is no TLS.
    #[error("this is no TLS: {0}")]
    NoTls(rustls::Error),
    /// The ClientHello names no host.
    #[error("the ClientHello names no host (no SNI)")]
    NoName,
    /// The ClientHello is longer than any honest one.
    #[error("the ClientHello is larger than {MAX_HELLO} bytes")]
    TooLarge,
}

impl Service {
    /// Serves a connection to `SNI_LISTEN` to its end.
    pub(super) async fn serve_sni(&self, stream: TcpStream, client: SocketAddr) {
        let read = tokio::select! {
            read = timeout(HANDSHAKE_LIMIT, read_hello(stream)) => read,
            () = self.newcomers_time_is_up() => return,
        };
        let (stream, name) = match read {
            Ok(Ok(hello)) => hello,
            Ok(Err(error)) => {
                return debug!(%error, client.addr = %client, "closed: no name to go by");
            }
            Err(_) => {
                self.proxy.metrics.limited(Limit::HandshakeTime);
                return debug!(client.addr = %client, "closed: the ClientHello took too long");
            }
        };
        match self.proxy.origins.by_name(&name) {
            Some(origin) => {
                let route = Route::Sni;
                let tunnelled = Tunnelled { host: name, origin, route, by_doctor: false };
                self.intercept_tls(stream, &tunnelled, client).await;
            }
            None => self.pass_on(stream, &name, client).await,
        }
    }

    /// Leads to a host that is not the API's. Without HTTP there is no way to
    /// tell the client why it cannot: the log does.
    async fn pass_on(&self, stream: Rewound, name: &str, client: SocketAddr) {
        let started = Instant::now();
        match self.proxy.dialer.tcp(name, TLS_PORT, Reach::Client).await {
            Ok(upstream) => {
                self.count(Route::Tunnel, &Response::new(AnswerBody::made("")), started);
                self.tunnel_to(stream, upstream).await;
            }
            Err(error) => {
                debug!(%error, client.addr = %client, "closed: the SNI leads nowhere");
                self.count(Route::Tunnel, &ProxyError::from(error).into_response(), started);
            }
        }
    }
}

/// The client's stream, as if nothing had been read from it, and the name that
/// its ClientHello asks for, normalized.
async fn read_hello(mut stream: TcpStream) -> Result<(Rewound, String), HelloError> {
    let mut acceptor = Acceptor::default();
    let mut early = BytesMut::new();
    loop {
        let known = early.len();
        if known == MAX_HELLO {
            return Err(HelloError::TooLarge);
        }
        if stream.read_buf(&mut (&mut early).limit(MAX_HELLO - known)).await? == 0 {
            return Err(HelloError::Ended);
        }
        if let Some(name) = feed(&mut acceptor, &early[known..])? {
            return Ok((Rewound::new(early.freeze(), stream), name));
        }
    }
}

/// The name, once the ClientHello is whole.
pub(super) fn feed(
    acceptor: &mut Acceptor,
    mut bytes: &[u8],
) -> Result<Option<String>, HelloError> {
    while !bytes.is_empty() {
        acceptor.read_tls(&mut bytes)?;
        if let Some(accepted) = acceptor.accept().map_err(|(error, _)| HelloError::NoTls(error))? {
            let hello = accepted.client_hello();
            return hello.server_name().map(normalize_host).map(Some).ok_or(HelloError::NoName);
        }
    }
    Ok(None)
}
