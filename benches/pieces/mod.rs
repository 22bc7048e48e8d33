//! The pieces of code that each request goes through, one by one.

use std::hint::black_box;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, COOKIE, HOST, USER_AGENT};
use http::request::Parts;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use token_sidecar::config::Authorization;
use token_sidecar::hints::Hints;
use token_sidecar::proxy::bench::{Ground, kept_for_replay, passes_gate};
use token_sidecar::proxy::{Memory, Settings};
use token_sidecar::token::{Candidate, Clock, Source, Token, TokenCache};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Builder;

/// `{"alg":"HS256"}.{"exp":9999999999,"type":10}.sig`: lives until the year 2286.
const LIVE: &str = "eyJhbGciOiJIUzI1NiJ9.eyJleHAiOjk5OTk5OTk5OTksInR5cGUiOjEwfQ.c2ln";

/// The same with `"exp":1700000000`.
const EXPIRED: &str = "eyJhbGciOiJIUzI1NiJ9.eyJleHAiOjE3MDAwMDAwMDAsInR5cGUiOjEwfQ.c2ln";

/// The default of `REPLAY_BODY_LIMIT`.
const REPLAY_BODY_LIMIT: usize = 8 * 1024 * 1024;

/// One piece.
pub(crate) struct Piece {
    /// Group and variant.
    pub(crate) name: &'static str,
    /// Goes through it so often, and tells how long that took.
    pub(crate) run: fn(rounds: u64) -> Duration,
}

/// All of them.
pub(crate) const PIECES: [Piece; 7] = [
    Piece { name: "gate/check", run: check_gate },
    Piece { name: "head/no-token", run: |rounds| authorize(rounds, &head()) },
    Piece { name: "head/expired-token", run: |rounds| authorize(rounds, &head_with_token()) },
    // A hundred, since one is too short to be told from what surrounds it.
    Piece { name: "cache/100-loads", run: load_token },
    Piece { name: "body/0", run: |rounds| keep_body(rounds, 0) },
    Piece { name: "body/2KiB", run: |rounds| keep_body(rounds, 2 * 1024) },
    Piece { name: "body/1MiB", run: |rounds| keep_body(rounds, 1024 * 1024) },
];

fn timed(rounds: u64, mut once: impl FnMut()) -> Duration {
    let began = Instant::now();
    for _ in 0..rounds {
        once();
    }
    began.elapsed()
}

fn check_gate(rounds: u64) -> Duration {
    let head = head_with_token();
    timed(rounds, || assert!(passes_gate(black_box(&head))))
}

fn authorize(rounds: u64, head: &Parts) -> Duration {
    let ground = ground();
    timed(rounds, || {
        let to = ground.authorize(black_box(&head.headers));
        assert!(black_box(to).contains_key(AUTHORIZATION));
    })
}

fn load_token(rounds: u64) -> Duration {
    let cache = cache();
    timed(rounds, || {
        for _ in 0..100 {
            assert!(black_box(&cache).load().is_some());
        }
    })
}

/// A request as Python's requests writes it.
fn head() -> Parts {
    let request = Request::get("/web/api/v2/search/product?phrase=python&products[page]=1")
        .header(HOST, "web-agr.chitai-gorod.ru")
        .header(USER_AGENT, "python-requests/2.32.3")
        .header(ACCEPT_ENCODING, "gzip, deflate")
        .header(ACCEPT, "*/*")
        .header(CONNECTION, "keep-alive");
    request.body(()).unwrap().into_parts().0
}

/// The same of a parser that brings an old token, and brings it twice.
fn head_with_token() -> Parts {
    let mut parts = head();
    let value = |text: String| HeaderValue::try_from(text).unwrap();
    parts.headers.insert(AUTHORIZATION, value(format!("Bearer {EXPIRED}")));
    let cookies = format!("_ym_uid=1; access-token=Bearer%20{EXPIRED}; city=39");
    parts.headers.insert(COOKIE, value(cookies));
    parts
}

fn ground() -> Ground {
    Ground {
        settings: settings(),
        clock: Clock::new(),
        hints: Hints::new(),
        cache: cache(),
        host: HeaderValue::from_static("web-agr.chitai-gorod.ru"),
    }
}

fn cache() -> TokenCache {
    let cache = TokenCache::new();
    let token = Token::parse(LIVE).unwrap();
    cache.publish(Candidate::new(token, Source::Direct).verified(true), Clock::new().now());
    cache
}

/// The defaults, as far as the pieces read them.
fn settings() -> Settings {
    Settings {
        authorization: Authorization { always: true, keep_personal: true },
        token_cookies: ["access-token", "bearer_token"].map(str::to_owned).to_vec(),
        proxy_auth: None,
        hold_timeout: Duration::from_mins(1),
        retry_status: StatusCode::SERVICE_UNAVAILABLE,
        max_held: 1,
        replay_body: REPLAY_BODY_LIMIT,
        upstream_timeout: Duration::from_mins(1),
        upstream_connections: vec![1],
        ca_pem: Bytes::new(),
        bundle_pem: Bytes::new(),
    }
}

/// Requests on one connection, each with a body of so many bytes, which is
/// kept while it is read. The figures hold what hyper does for a request, too:
/// it alone makes such bodies.
fn keep_body(rounds: u64, bytes: usize) -> Duration {
    let stream = Requests::new(rounds, bytes);
    let memory = Memory::new(2 * REPLAY_BODY_LIMIT);
    let service = service_fn(|request: Request<Incoming>| {
        let mut body = kept_for_replay(request.into_body(), REPLAY_BODY_LIMIT, &memory);
        async move {
            let mut read = 0;
            while let Some(frame) = body.frame().await {
                read += black_box(frame)?.data_ref().map_or(0, Bytes::len);
            }
            assert_eq!(read, bytes);
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(Response::new(String::new()))
        }
    });
    let serve = async {
        http1::Builder::new().serve_connection(TokioIo::new(stream), service).await.unwrap();
    };
    let runtime = Builder::new_current_thread().build().unwrap();
    let began = Instant::now();
    runtime.block_on(serve);
    began.elapsed()
}

/// A client that sends the same request so often, never two at once, and drops
/// the answers.
struct Requests {
    one: Vec<u8>,
    sent: usize,
    left: u64,
    /// The answer to the last one has come.
    answered: bool,
    waits: Option<Waker>,
}

impl Requests {
    fn new(count: u64, bytes: usize) -> Self {
        let head = format!("POST /basket HTTP/1.1\r\nHost: x\r\nContent-Length: {bytes}\r\n\r\n");
        let one = [head.into_bytes(), vec![b'x'; bytes]].concat();
        Self { one, sent: 0, left: count, answered: true, waits: None }
    }
}

impl AsyncRead for Requests {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.sent == 0 && !this.answered {
            this.waits = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if this.left > 0 {
            let part = &this.one[this.sent..];
            let part = &part[..part.len().min(buf.remaining())];
            buf.put_slice(part);
            this.sent += part.len();
        }
        if this.sent == this.one.len() {
            (this.sent, this.left, this.answered) = (0, this.left - 1, false);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Requests {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.answered = true;
        this.waits.take().into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
