//! What the fuzz targets in `fuzz/` reach of the inside. Compiled for them
//! alone: cargo-fuzz sets `cfg(fuzzing)`.
//!
//! A child of `proxy`, so that nothing there must be more visible for its sake.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{HeaderMap, HeaderValue};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub use super::replay::{BodyError, ReplayBody};

use super::credentials::{self, OwnCookies, OwnToken};
use super::head::{Head, HeadWatch, Inspected, Resettable};
use super::replay::Replay;
use super::watch::Watches;
use super::way::address_of;
use super::{Memory, ProxyError, gate, sni};
use crate::config::{ConfigError, Env};
use crate::refresh::{SourceError, solution};
use crate::token::env_file::text::{self, Length};
use crate::token::{Clearance, Cookies, Timestamp, Token};

/// What became of a head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// 200 where it may be forwarded, else the status of the refusal.
    pub status: u16,
    /// The normalized host and the port that its target leads to.
    pub address: Option<(String, u16)>,
}

/// Gives `reads`, one after the other, to hyper as the service does, and tells
/// what became of each head. A refusal ends the connection, and so does what
/// hyper refuses by itself.
pub async fn judge_heads(reads: Vec<Vec<u8>>) -> Vec<Judged> {
    let judged = RefCell::new(Vec::new());
    let (watch, head) = (Watches::default().open(), Arc::new(HeadWatch::default()));
    let memory = Memory::new(usize::MAX);
    let stream = Inspected::new(Reads(reads.into()), &head, &watch, &memory);
    let service = service_fn(|request| {
        watch.head_parsed();
        let (seen, body) = judge(head.take(), request);
        let passed = seen.status == 200;
        judged.borrow_mut().push(seen);
        let head = &head;
        async move {
            if !passed {
                return Err(io::Error::other("refused"));
            }
            body.collect().await.map_err(io::Error::other)?;
            head.await_head();
            Ok(http::Response::new(String::new()))
        }
    });
    let mut http = http1::Builder::new();
    http.max_buf_size(128 * 1024).header_read_timeout(None);
    // How it ends is hyper's affair.
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
    judged.into_inner()
}

fn judge(head: Result<Head, ProxyError>, request: http::Request<Incoming>) -> (Judged, Incoming) {
    let (parts, body) = request.into_parts();
    let checked = head.and_then(|_| gate::check(&parts));
    let status = checked.map_or_else(|error| error.into_response().status().as_u16(), |()| 200);
    let default_port = parts.uri.scheme_str().map(|it| if it == "https" { 443 } else { 80 });
    (Judged { status, address: address_of(&parts.uri, default_port) }, body)
}

/// A client that writes these pieces and nothing more, and reads what it gets.
struct Reads(VecDeque<Vec<u8>>);

impl Resettable for Reads {
    fn reset(&self) {}
}

impl AsyncRead for Reads {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let reads = &mut self.get_mut().0;
        if let Some(mut next) = reads.pop_front() {
            let rest = next.split_off(next.len().min(buf.remaining()));
            buf.put_slice(&next);
            if !rest.is_empty() {
                reads.push_front(rest);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Reads {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The name in the ClientHello that comes in `reads`; `None` where it does not
/// end in them.
///
/// # Errors
///
/// Why there is no name to go by.
pub fn hello_name(reads: &[&[u8]]) -> Result<Option<String>, String> {
    let mut acceptor = Acceptor::default();
    for read in reads {
        if let Some(name) = sni::feed(&mut acceptor, read).map_err(|error| error.to_string())? {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The `Cookie` value with `token` in place of the client's own; `None` where
/// nothing changes.
#[must_use]
pub fn replace_in_cookies(
    value: &HeaderValue,
    names: &[String],
    keep_personal_at: Option<Timestamp>,
    token: &Token,
) -> Option<HeaderValue> {
    credentials::replace_in_cookies(value, OwnCookies { names, keep_personal_at }, token)
}

/// One `Cookie` value of the client's cookies and the clearance's.
#[must_use]
pub fn cleared_cookies(
    headers: &HeaderMap,
    names: &[String],
    keep_personal_at: Option<Timestamp>,
    clearance: &Clearance,
) -> Option<HeaderValue> {
    credentials::cleared_cookies(headers, OwnCookies { names, keep_personal_at }, clearance)
}

/// Whether the client's own token is a live personal one.
#[must_use]
pub fn brings_personal_token(headers: &HeaderMap, names: &[String], now: Timestamp) -> bool {
    OwnToken::of(headers, names, now) == OwnToken::Personal
}

/// A body on its way through the proxy.
pub struct Replaying(Replay);

impl Replaying {
    /// Keeps up to `limit` bytes of `source`, for a second sending or not.
    #[must_use]
    pub fn new(source: Incoming, limit: usize, replayable: bool, memory: &Memory) -> Self {
        Self(Replay::new(source, limit, replayable, memory))
    }

    /// Reads ahead of the first sending.
    ///
    /// # Errors
    ///
    /// The client broke off.
    pub async fn read_ahead(&self) -> Result<(), BodyError> {
        self.0.read_ahead().await
    }

    /// The body of the next sending.
    #[must_use]
    pub fn body(&self) -> ReplayBody {
        self.0.body()
    }

    /// Whether another sending would be whole.
    #[must_use]
    pub fn is_replayable(&self) -> bool {
        self.0.is_replayable()
    }

    /// Whether the client was asked for nothing yet.
    #[must_use]
    pub fn is_untouched(&self) -> bool {
        self.0.is_untouched()
    }
}

/// Whether `bytes` of `memory` are free.
#[must_use]
pub fn has_room(memory: &Memory, bytes: usize) -> bool {
    memory.reserve_none().grow(bytes)
}

/// What a reply of FlareSolverr to a `request.get` gives: the token, the
/// cookies, the user-agent.
///
/// # Errors
///
/// Why it gives none.
pub fn read_solution(
    status: u16,
    body: &[u8],
    names: &[String],
) -> Result<(Token, Cookies, Option<String>), SourceError> {
    let found = solution::read(status, &solution::parse(status, body)?, names)?;
    Ok((found.token, found.cookies, found.user_agent))
}

/// The name of the session in a reply of FlareSolverr to a `sessions.create`.
///
/// # Errors
///
/// Why there is none.
pub fn session_name(status: u16, body: &[u8], ours: &str) -> Result<String, SourceError> {
    solution::session_name(status, &solution::parse(status, body)?, ours)
}

/// The token in an env file.
#[must_use]
pub fn env_token(content: &[u8]) -> Option<Token> {
    text::value(content).and_then(text::parsed)
}

/// An env file with its token set. `at_least_old`: as it is done where the
/// file must be written in place.
#[must_use]
pub fn with_env_token(content: &[u8], token: &Token, at_least_old: bool) -> Option<Vec<u8>> {
    text::with_token(
        content,
        token,
        if at_least_old { Length::AtLeastOld } else { Length::Natural },
    )
}

/// Which bytes of `new` are written over `old` in place.
#[must_use]
pub fn changed_bytes(old: &[u8], new: &[u8]) -> std::ops::Range<usize> {
    text::changed(old, new)
}

/// The settings that these variables and an env file of this text give.
///
/// # Errors
///
/// A line of the file that names a variable and cannot be read.
pub fn env_of(variables: &[(String, String)], file: &str) -> Result<Env, ConfigError> {
    Env::from_pairs(variables.iter().cloned()).with_file(file)
}
