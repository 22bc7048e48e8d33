//! The parent proxy: how a destination is reached through it.
//!
//! # Invariants
//!
//! - Nothing that follows the head of the parent's answer is read here: it
//!   belongs to the destination.
//! - The credentials are in no error and no log.

use std::io;
use std::net::IpAddr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::StatusCode;
use memchr::memmem;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::ResolveError;
use crate::config::{ParentProxy, Secret};

/// Longest head of the parent's answer.
const MAX_HEAD: usize = 16 * 1024;

/// Fields in it.
const MAX_FIELDS: usize = 100;

/// Why the parent proxy did not lead to the destination.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ParentError {
    /// Its name does not resolve.
    #[error("cannot be found: {0}")]
    Unresolved(ResolveError),
    /// It is this process: a loop.
    #[error("is this sidecar itself")]
    Itself,
    /// It could not be reached.
    #[error("cannot be reached: {0}")]
    Unreachable(io::Error),
    /// It asks for credentials, or for others.
    #[error("answered 407: check the credentials of UPSTREAM_PROXY")]
    Credentials,
    /// It does not lead there.
    #[error("answered {0}")]
    Refused(StatusCode),
    /// It closed or broke the connection before its answer was whole.
    #[error("broke off: {0}")]
    Broken(io::Error),
    /// What it sent is no answer of a proxy.
    #[error("sent what is no HTTP answer")]
    NotHttp,
}

/// The parent proxy, ready to be asked.
pub(super) struct Parent {
    address: ParentProxy,
    /// The `Proxy-Authorization` line, or nothing.
    authorization: Secret,
}

impl Parent {
    pub(super) fn new(address: ParentProxy) -> Self {
        let authorization = Secret::new(authorization(&address));
        Self { address, authorization }
    }

    /// Where it is.
    pub(super) fn address(&self) -> &ParentProxy {
        &self.address
    }

    /// Asks the parent, at the other end of `stream`, for a way to
    /// `host:port`. Not bounded in time.
    ///
    /// # Errors
    ///
    /// [`ParentError`] of what the parent said.
    pub(super) async fn lead(
        &self,
        mut stream: TcpStream,
        host: &str,
        port: u16,
    ) -> Result<TcpStream, ParentError> {
        let target = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let request = format!(
            "CONNECT {target}:{port} HTTP/1.1\r\nHost: {target}:{port}\r\n{}\r\n",
            self.authorization.expose()
        );
        stream.write_all(request.as_bytes()).await.map_err(ParentError::Broken)?;
        let head = read_head(&mut stream).await?;
        match status(&head)? {
            status if status.is_success() => Ok(stream),
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => Err(ParentError::Credentials),
            status => Err(ParentError::Refused(status)),
        }
    }
}

fn authorization(address: &ParentProxy) -> String {
    let Some(user) = &address.user else {
        return String::new();
    };
    let password = address.password.as_ref().map_or("", Secret::expose);
    let pair = BASE64_STANDARD.encode(format!("{}:{password}", user.expose()));
    format!("Proxy-Authorization: Basic {pair}\r\n")
}

/// The head of the answer, up to and with its empty line.
async fn read_head(stream: &mut TcpStream) -> Result<Vec<u8>, ParentError> {
    let mut head = Vec::new();
    let mut ahead = [0; 1024];
    while head.len() < MAX_HEAD {
        // Looked at before it is taken, so that not one byte too many is.
        let seen = stream.peek(&mut ahead).await.map_err(ParentError::Broken)?;
        if seen == 0 {
            return Err(ParentError::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
        let before = head.len();
        head.extend_from_slice(&ahead[..seen]);
        let end = memmem::find(&head, b"\r\n\r\n").map(|at| at + 4);
        let take = end.unwrap_or(head.len()) - before;
        stream.read_exact(&mut ahead[..take]).await.map_err(ParentError::Broken)?;
        if let Some(end) = end {
            head.truncate(end);
            return Ok(head);
        }
    }
    Err(ParentError::NotHttp)
}

fn status(head: &[u8]) -> Result<StatusCode, ParentError> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut answer = httparse::Response::new(&mut fields);
    answer.parse(head).map_err(|_| ParentError::NotHttp)?;
    let code = answer.code.ok_or(ParentError::NotHttp)?;
    StatusCode::from_u16(code).map_err(|_| ParentError::NotHttp)
}

/// Whether `host` (normalized) is this machine by its very name: that is never
/// the parent's affair.
pub(super) fn is_loopback(host: &str) -> bool {
    let literal = host.parse::<IpAddr>().map(|ip| ip.to_canonical());
    literal.is_ok_and(|ip| ip.is_loopback() || ip.is_unspecified())
        || host == "localhost"
        || host.ends_with(".localhost")
}

/// Whether `host` is an IPv4 address in one of the old spellings (`127.1`,
/// `0x7f000001`), which some resolvers take for one and others for a name.
pub(super) fn is_odd_address(host: &str) -> bool {
    let last = host.rsplit('.').next().unwrap_or_default();
    let hexadecimal = last
        .strip_prefix("0x")
        .is_some_and(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
    hexadecimal || (!last.is_empty() && last.bytes().all(|digit| digit.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_known_by_name_and_by_address() {
        for host in ["localhost", "a.localhost", "127.9.9.9", "::1", "::ffff:127.0.0.1", "0.0.0.0"]
        {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.test", "10.0.0.1", "127.test"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn old_spellings_of_addresses_are_no_names() {
        for host in ["127.1", "2130706433", "0x7f000001", "127.0.0.0x1"] {
            assert!(is_odd_address(host), "{host}");
        }
        for host in ["a1", "1.test", "0xg"] {
            assert!(!is_odd_address(host), "{host}");
        }
    }
}
