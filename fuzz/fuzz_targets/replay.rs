//! A request body that is sent twice: any split of the client's writes, the
//! upstream's reads, and the moment of the refusal. What comes the second time
//! is what came the first; a body that broke off never looks whole; no more
//! is kept than may be, and nothing in the end.
//!
//! A real connection of hyper gives the body: its client is this input.
#![no_main]

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::future::poll_immediate;
use http::{HeaderMap, Response};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use libfuzzer_sys::fuzz_target;
use token_sidecar::fuzzing::{BodyError, ReplayBody, Replaying, has_room};
use token_sidecar::proxy::Memory;
use tokio::io::{AsyncWriteExt, DuplexStream, duplex};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::task::{LocalSet, spawn_local, yield_now};

/// What is decided before the first byte.
struct Plan {
    length: usize,
    chunked: bool,
    /// Read ahead before the first sending, step by step.
    ahead: bool,
    replayable: bool,
    /// `REPLAY_BODY_LIMIT`.
    limit: usize,
    /// `REPLAY_MEMORY`.
    memory: usize,
}

impl Plan {
    fn read(data: &[u8]) -> Option<(Self, &[u8])> {
        let (head, steps) = data.split_first_chunk::<7>()?;
        let number = |at: usize| usize::from(u16::from_le_bytes([head[at], head[at + 1]]));
        let plan = Self {
            chunked: head[0] & 1 == 1,
            ahead: head[0] & 2 == 2,
            replayable: head[0] & 4 == 0,
            length: number(1) % 3000,
            limit: number(3) % 3000,
            memory: number(5) % 3000,
        };
        Some((plan, steps))
    }

    fn body(&self) -> Vec<u8> {
        (0..self.length).map(|index| (index * 7 + index / 256) as u8).collect()
    }

    fn head(&self) -> String {
        let framing = match self.chunked {
            true => "Transfer-Encoding: chunked\r\nTrailer: x-sum".to_owned(),
            false => format!("Content-Length: {}", self.length),
        };
        format!("POST / HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n")
    }
}

/// The client's side.
struct Client {
    stream: Option<DuplexStream>,
    body: Vec<u8>,
    chunked: bool,
    written: usize,
    ended: bool,
    broken: bool,
}

impl Client {
    async fn write(&mut self, count: usize) {
        let from = self.written;
        let to = (from + count).min(self.body.len());
        let part = self.body[from..to].to_vec();
        if part.is_empty() || self.broken {
            return;
        }
        self.written = to;
        if self.chunked {
            self.send(format!("{:x}\r\n", part.len()).as_bytes()).await;
        }
        self.send(&part).await;
        if self.chunked {
            self.send(b"\r\n").await;
        }
    }

    /// The rest of the body, and what ends it.
    async fn finish(&mut self) {
        self.write(usize::MAX / 2).await;
        if self.chunked && !self.ended && !self.broken {
            self.send(b"0\r\nx-sum: 1\r\nAuthorization: x\r\n\r\n").await;
        }
        self.ended = !self.broken;
    }

    /// Hangs up, or writes what is no chunk.
    async fn break_off(&mut self, rudely: bool) {
        let whole = self.ended || (!self.chunked && self.written == self.body.len());
        if whole || self.broken {
            return;
        }
        self.broken = true;
        if self.chunked && rudely {
            self.send(b"no chunk\r\n").await;
        } else {
            self.stream = None;
        }
    }

    async fn send(&mut self, bytes: &[u8]) {
        if let Some(stream) = &mut self.stream {
            // The pipe holds more than any body here.
            let _ = stream.write_all(bytes).await;
        }
    }
}

/// One sending, and what has come of it.
#[derive(Default)]
struct Sent {
    data: Vec<u8>,
    trailers: Option<HeaderMap>,
    ended: bool,
    failed: bool,
}

impl Sent {
    /// Takes one frame, if there is one.
    async fn read(&mut self, body: &mut ReplayBody, plan: &Plan) -> bool {
        if self.ended || self.failed {
            return false;
        }
        if !plan.chunked {
            let left = (plan.length - self.data.len()) as u64;
            assert_eq!(body.size_hint().exact(), Some(left));
            assert_eq!(body.is_end_stream(), left == 0);
        }
        let Some(frame) = frame(body).await else {
            return false;
        };
        match frame.map(|frame| frame.map(Frame::into_data)) {
            None => self.ended = true,
            Some(Ok(Ok(data))) => {
                assert!(self.trailers.is_none(), "data after the trailers");
                self.data.extend_from_slice(&data);
            }
            Some(Ok(Err(frame))) => self.trailers = frame.into_trailers().ok(),
            Some(Err(_)) => self.failed = true,
        }
        true
    }
}

/// The next frame, if it is there; hyper needs some turns to bring it.
async fn frame(body: &mut ReplayBody) -> Option<Option<Result<Frame<Bytes>, BodyError>>> {
    for _ in 0..4 {
        let next = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx));
        if let Some(frame) = poll_immediate(next).await {
            return Some(frame);
        }
        yield_now().await;
    }
    None
}

/// The forwarder's side.
struct Proxy {
    plan: Plan,
    memory: Memory,
    replaying: Option<Replaying>,
    first: (Option<ReplayBody>, Sent),
    second: (Option<ReplayBody>, Sent),
    replayed: bool,
    read_ahead: bool,
    /// The client broke off before the first sending.
    refused: bool,
}

impl Proxy {
    fn new(plan: Plan, source: Incoming) -> Self {
        let memory = Memory::new(plan.memory);
        let replaying = Replaying::new(source, plan.limit, plan.replayable, &memory);
        let first = ((!plan.ahead).then(|| replaying.body()), Sent::default());
        let second = (None, Sent::default());
        let (read_ahead, replaying) = (plan.ahead, Some(replaying));
        let (replayed, refused) = (false, false);
        Self { plan, memory, replaying, first, second, replayed, read_ahead, refused }
    }

    /// Whether the first sending has not begun.
    fn is_ahead(&self) -> bool {
        self.plan.ahead
    }

    /// Reads ahead what there is, and gives up in the middle.
    async fn read_ahead(&mut self) {
        if let Some(replaying) = self.replaying.as_ref().filter(|_| !self.refused) {
            let done = poll_immediate(replaying.read_ahead()).await;
            self.refused = matches!(done, Some(Err(_)));
            yield_now().await;
        }
    }

    /// Reads ahead to the end, then sends.
    async fn read_ahead_if_due(&mut self) {
        for _ in 0..8 {
            if self.is_ahead() {
                self.read_ahead().await;
            }
        }
        if self.is_ahead() {
            self.send();
        }
    }

    /// The first sending begins.
    fn send(&mut self) {
        self.plan.ahead = false;
        if let Some(replaying) = self.replaying.as_ref().filter(|_| !self.refused) {
            self.first.0 = Some(replaying.body());
        }
    }

    async fn read(&mut self) -> bool {
        if self.is_ahead() {
            self.read_ahead().await;
            return false;
        }
        let Self { plan, first, second, replayed, .. } = self;
        let (body, sent) = if *replayed { second } else { first };
        match body {
            Some(body) => sent.read(body, plan).await,
            None => false,
        }
    }

    /// The upstream refused: again, where that is possible.
    fn refuse(&mut self) {
        if self.is_ahead() {
            return self.send();
        }
        let Some(replaying) = self.replaying.as_ref().filter(|_| !self.replayed && !self.refused)
        else {
            return;
        };
        // Where nothing was read, one sending is as good as another.
        let whole = self.plan.length == 0 || replaying.is_untouched();
        assert!(self.plan.replayable || whole || !replaying.is_replayable());
        if replaying.is_replayable() {
            self.second.0 = Some(replaying.body());
            self.replayed = true;
            let whole = self.plan.length == 0 || replaying.is_untouched();
            assert!(!replaying.is_replayable() || whole, "a third sending");
        }
    }

    /// The first sending goes on although there is a second: it gets what was
    /// read ahead for it, and nothing more.
    async fn read_old(&mut self) {
        let (body, sent) = &mut self.first;
        if let (true, Some(old)) = (self.replayed && self.plan.length > 0, body) {
            let mut next = frame(old).await.expect("the older one waits");
            if let (true, Some(Ok(frame))) = (self.read_ahead && sent.data.is_empty(), &next) {
                sent.data.extend_from_slice(frame.data_ref().expect("what was kept"));
                next = self::frame(old).await.expect("the older one waits");
            }
            assert!(matches!(next, Some(Err(BodyError::Superseded))), "the older one reads on");
        }
    }

    fn check(&self, client: &Client) {
        let body = &client.body;
        for sent in [&self.first.1, &self.second.1] {
            assert!(body.starts_with(&sent.data), "other bytes than the client's");
            assert!(!sent.ended || sent.data.len() == body.len(), "cut short, and looks whole");
            assert!(!sent.ended || !self.plan.chunked || client.ended, "ended before its end");
            if let Some(trailers) = &sent.trailers {
                assert_eq!((trailers.len(), trailers.contains_key("x-sum")), (1, true));
            }
        }
        let Plan { limit, memory, .. } = self.plan;
        let most = limit.min(memory).min(client.written);
        assert!(has_room(&self.memory, memory - most), "more is kept than may be");
        if let (Some(replaying), false) = (&self.replaying, self.replayed) {
            let fits = self.first.1.data.len() <= limit.min(memory);
            assert!(fits || !replaying.is_replayable());
        }
    }

    /// Reads to the end, as far as it comes.
    async fn drain(&mut self, client: &Client) {
        while self.read().await {
            self.check(client);
        }
        let (body, sent) = if self.replayed { &self.second } else { &self.first };
        if body.is_none() {
            return;
        }
        assert!(sent.ended || sent.failed, "the body hangs");
        if client.broken {
            assert!(sent.failed, "a body that broke off looks whole");
        } else {
            assert!(sent.ended && sent.data.len() == client.body.len());
            assert_eq!(sent.trailers.is_some(), self.plan.chunked, "the trailers got lost");
        }
    }
}

async fn step(step: [u8; 2], client: &mut Client, proxy: &mut Proxy) {
    let [what, how] = step;
    match what % 10 {
        0 | 1 => client.write(usize::from(how) * usize::from(what / 10 + 1)).await,
        2..=4 => drop(proxy.read().await),
        5 => proxy.refuse(),
        6 => proxy.read_old().await,
        7 if how < 40 => client.break_off(how % 2 == 0).await,
        7 => client.finish().await,
        8 if how < 40 && !proxy.is_ahead() => proxy.replaying = None,
        8 if proxy.replayed => proxy.first.0 = None,
        _ => yield_now().await,
    }
    proxy.check(client);
}

async fn run(plan: Plan, steps: &[u8]) {
    let (stream, server) = duplex(64 * 1024);
    let (body, incoming) = oneshot::channel();
    let (answer, asked) = oneshot::channel::<()>();
    let once = RefCell::new(Some((body, asked)));
    let service = service_fn(move |request: http::Request<Incoming>| {
        let (body, asked) = once.borrow_mut().take().expect("one request");
        let _ = body.send(request.into_body());
        async move {
            let _ = asked.await;
            Ok::<_, Infallible>(Response::new(String::new()))
        }
    });
    let connection = http1::Builder::new().serve_connection(TokioIo::new(server), service);
    // How it ends shows in the body.
    let connection = spawn_local(async { drop(connection.await) });
    let mut client = Client {
        stream: Some(stream),
        body: plan.body(),
        chunked: plan.chunked,
        written: 0,
        ended: !plan.chunked && plan.length == 0,
        broken: false,
    };
    client.send(plan.head().as_bytes()).await;
    let mut proxy = Proxy::new(plan, incoming.await.expect("a request"));
    for pair in steps.chunks_exact(2) {
        step([pair[0], pair[1]], &mut client, &mut proxy).await;
    }
    client.finish().await;
    proxy.read_ahead_if_due().await;
    proxy.drain(&client).await;
    let Proxy { plan, memory, replaying, first, second, .. } = proxy;
    drop((replaying, first, second));
    assert!(has_room(&memory, plan.memory), "something is kept for ever");
    drop(answer);
    client.stream = None;
    connection.await.expect("no panic");
}

fuzz_target!(|data: &[u8]| {
    let Some((plan, steps)) = Plan::read(data) else {
        return;
    };
    let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
    LocalSet::new().block_on(&runtime, run(plan, &steps[..steps.len().min(400)]));
});
