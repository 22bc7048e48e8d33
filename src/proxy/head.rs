//! What hyper does not tell of a head.
//!
//! hyper cuts a fragment off the target, and drops `Content-Length` beside
//! `Transfer-Encoding`, before the service sees the head. Both are signs of a
//! client that is broken or up to something, so both are refused here: the
//! bytes are looked at on their way to hyper.
//!
//! hyper gets one message at a time, so that each head is looked at: what
//! came with an earlier request (pipelining) waits here for its answer. A head with too
//! many fields it gets without those, so that the client can be told; how names are
//! spelled is kept for the upstream.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures_util::task::AtomicWaker;
use http::Uri;
use memchr::memmem;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::error::ProxyError;
use super::gate::{MAX_FIELDS, MAX_HEAD};
use super::replay::{Memory, Reserved};
use super::watch::Watch;
use crate::net::{NextHead, Respelled, Slot, Spelling, end_of_head, is_blank, lines, origin_form};

/// A half head lies here and in hyper's own buffer.
const COPIES: usize = 2;

/// Blanks before a head that are not counted: some clients send a line end too
/// many behind a body (RFC 9112 §2.2).
const FREE_BLANKS: usize = 16;

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// What its target names.
    Resource,
    /// The host as a whole: an OPTIONS whose absolute target has no path. `Uri`
    /// takes it for one of `/`; the host has to see `*` (RFC 9112 §3.2.4).
    Host,
}

impl Subject {
    /// What the next hop is asked for, where it is the last: the target without
    /// its scheme and host.
    pub(super) fn target(self, uri: &Uri) -> Uri {
        match self {
            Self::Resource => origin_form(uri),
            Self::Host => Uri::from_static("*"),
        }
    }
}

/// What is odd about a head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
enum Oddity {
    #[default]
    None,
    /// See [`Subject::Host`].
    NoPath,
    Fragment,
    TwoLengths,
    /// Too large as it came, blanks included, which the gate does not count.
    TooLarge,
}

/// What is known of a head that hyper does not tell.
pub(super) struct Head {
    pub(super) subject: Subject,
    pub(super) spelling: Spelling,
}

impl Oddity {
    const ALL: [Self; 5] =
        [Self::None, Self::NoPath, Self::Fragment, Self::TwoLengths, Self::TooLarge];

    fn judge(self) -> Result<Subject, ProxyError> {
        Err(match self {
            Self::None => return Ok(Subject::Resource),
            Self::NoPath => return Ok(Subject::Host),
            Self::Fragment => ProxyError::BadRequest("the target has a fragment"),
            Self::TwoLengths => {
                ProxyError::BadRequest("Content-Length and Transfer-Encoding exclude each other")
            }
            Self::TooLarge => ProxyError::HeaderTooLarge { fields: MAX_FIELDS, bytes: MAX_HEAD },
        })
    }
}

/// What the service tells the stream, and the other way. Used by one thread;
/// atomics since hyper wants it to be `Send`.
#[derive(Default)]
pub(super) struct HeadWatch {
    /// Amid a message: what comes after its body is not wanted yet.
    busy: AtomicBool,
    /// The connection is another protocol's.
    switched: AtomicBool,
    seen: AtomicU8,
    /// How the request is spelled.
    spelling: Slot,
    /// The answer's.
    answer: Arc<NextHead>,
    reader: AtomicWaker,
}

impl HeadWatch {
    /// The head was parsed: says what is known of it, or what is wrong with it.
    pub(super) fn take(&self) -> Result<Head, ProxyError> {
        self.busy.store(true, Ordering::Relaxed);
        let seen = self.seen.swap(Oddity::None as u8, Ordering::Relaxed);
        let spelling = self.spelling.take().unwrap_or_default();
        let subject = Oddity::ALL[usize::from(seen)].judge()?;
        Ok(Head { subject, spelling })
    }

    /// The answer that will be written is spelled so.
    pub(super) fn set_answer_spelling(&self, spelling: Spelling) {
        self.answer.set_spelling(spelling);
    }

    /// The answer is on its way: what comes now is the next head.
    pub(super) fn await_head(&self) {
        self.busy.store(false, Ordering::Relaxed);
        self.reader.wake();
    }

    /// The answer is on its way: what comes now is of another protocol.
    pub(super) fn look_away(&self) {
        self.switched.store(true, Ordering::Relaxed);
        self.await_head();
    }

    fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed)
    }
}

/// A connection that can be broken off.
pub(super) trait Resettable {
    /// Lets the connection end by a reset: the other side must not take its
    /// end for the end of what it was reading.
    fn reset(&self);
}

impl Resettable for TcpStream {
    fn reset(&self) {
        // It may be gone already.
        let _ = self.set_zero_linger();
    }
}

impl<I: Resettable> Resettable for TlsStream<I> {
    fn reset(&self) {
        self.get_ref().0.reset();
    }
}

/// A client's stream whose heads are looked at.
pub(super) struct Inspected<I: Resettable> {
    /// There until it is taken out or dropped.
    stream: Option<I>,
    head: Arc<HeadWatch>,
    watch: Arc<Watch>,
    due: Due,
    /// Line ends that have come before a head.
    blanks: usize,
    /// The beginning of a head that comes in several reads.
    partial: Vec<u8>,
    /// Line ends in it.
    line_ends: usize,
    reserved: Reserved,
    /// Read together with an earlier message.
    early: Bytes,
    out: Respelled,
}

/// What the next bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Head,
    /// So many bytes of a body.
    Body(u64),
    /// A body in chunks.
    Chunks(Chunks),
    /// What hyper refuses.
    Anything,
    /// The rest of what hyper got the beginning of: it must not see that.
    Nothing,
}

impl<I: Resettable> Inspected<I> {
    /// `stream`, looked at; half heads take `memory`.
    pub(super) fn new(
        stream: I,
        head: &Arc<HeadWatch>,
        watch: &Arc<Watch>,
        memory: &Memory,
    ) -> Self {
        Self {
            stream: Some(stream),
            head: Arc::clone(head),
            watch: Arc::clone(watch),
            due: Due::Head,
            blanks: 0,
            partial: Vec::new(),
            line_ends: 0,
            reserved: memory.reserve_none(),
            early: Bytes::new(),
            out: Respelled::new(&head.answer),
        }
    }

    /// The stream itself, for another protocol, and what was read of that.
    pub(super) fn into_parts(mut self) -> (I, Bytes) {
        (self.stream.take().expect("it is taken out once"), std::mem::take(&mut self.early))
    }

    fn stream(&mut self) -> Pin<&mut I>
    where
        I: Unpin,
    {
        pinned(&mut self.stream)
    }

    /// Looks at `bytes`, and says how many of them hyper may have now.
    fn look(&mut self, bytes: &mut [u8]) -> usize {
        if self.head.switched.load(Ordering::Relaxed) {
            return bytes.len();
        }
        let passed = match &mut self.due {
            Due::Head => 0,
            Due::Body(left) => {
                let passed = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= passed as u64;
                passed
            }
            Due::Chunks(chunks) => chunks.pass(bytes),
            Due::Anything => bytes.len(),
            Due::Nothing => return 0,
        };
        let rest = &mut bytes[passed..];
        if rest.is_empty() || self.head.is_busy() {
            return passed;
        }
        self.due = Due::Head;
        passed + self.look_at_head(rest)
    }

    fn look_at_head(&mut self, bytes: &mut [u8]) -> usize {
        if !self.partial.is_empty() {
            return self.look_at_rest(bytes);
        }
        let blank = bytes.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        let bytes = &mut bytes[blank..];
        if let Some(head) = WholeHead::of(bytes) {
            let end = head.end;
            let passed = self.head_came(bytes, &head).map_or(end, |cut| end_at(cut, bytes));
            return blank + passed + self.look(&mut bytes[passed..]);
        }
        self.blanks += blank;
        if !bytes.is_empty() || self.blanks > FREE_BLANKS {
            self.watch.head_begun();
            self.reserve(blank);
            return blank + self.look_at_rest(bytes);
        }
        blank + bytes.len()
    }

    /// Looks at what comes of a head behind its known part, if there is one.
    fn look_at_rest(&mut self, bytes: &mut [u8]) -> usize {
        let known = self.partial.len();
        self.reserve(COPIES * bytes.len());
        self.partial.extend_from_slice(bytes);
        self.line_ends += memchr::memchr_iter(b'\n', bytes).count();
        // The last line end may be cut in two.
        let from = known.saturating_sub(2);
        let Some(end) = end_of_head(&self.partial[from..]).map(|end| from + end) else {
            let too_many = self.line_ends > MAX_FIELDS;
            let cut = if too_many { beyond_fields(&self.partial) } else { None };
            if let Some(cut) = cut.and_then(|cut| cut.checked_sub(known)) {
                self.give_up(Due::Nothing);
                return end_at(cut, bytes);
            }
            if self.partial.len() > MAX_HEAD {
                // hyper may take as much again before it refuses the rest.
                self.give_up(Due::Anything);
            }
            return bytes.len();
        };
        let partial = std::mem::take(&mut self.partial);
        let cut = WholeHead::of(&partial).and_then(|head| self.head_came(&partial, &head));
        if let Some(cut) = cut.and_then(|cut| cut.checked_sub(known)) {
            return end_at(cut, bytes);
        }
        let used = end - known;
        used + self.look(&mut bytes[used..])
    }

    /// The head that has begun is too large.
    fn give_up(&mut self, due: Due) {
        self.partial = Vec::new();
        self.tell(Oddity::TooLarge, due);
    }

    fn reserve(&mut self, bytes: usize) {
        if !self.reserved.grow(bytes) {
            self.watch.head_is_crowded_out();
        }
    }

    /// A head has come whole, with which `bytes` begin. Returns where hyper has to see it
    /// end, if not where it does.
    fn head_came(&mut self, bytes: &[u8], head: &WholeHead) -> Option<usize> {
        (self.blanks, self.line_ends) = (0, 0);
        self.reserved.release();
        let bytes = &bytes[..head.end];
        self.head.spelling.set(Some(Spelling::of(bytes)));
        if head.fields > MAX_FIELDS {
            self.tell(Oddity::TooLarge, Due::Nothing);
            return beyond_fields(bytes);
        }
        self.tell(if head.end > MAX_HEAD { Oddity::TooLarge } else { head.oddity }, head.due);
        None
    }

    fn tell(&mut self, oddity: Oddity, due: Due) {
        self.due = due;
        self.head.busy.store(true, Ordering::Relaxed);
        self.head.seen.store(oddity as u8, Ordering::Relaxed);
    }
}

impl<I: AsyncRead + Resettable + Unpin> AsyncRead for Inspected<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        if this.early.is_empty() {
            ready!(this.stream().poll_read(cx, buf))?;
        } else if this.head.is_busy() {
            this.head.reader.register(cx.waker());
            return Poll::Pending;
        } else {
            let count = this.early.len().min(buf.remaining());
            buf.put_slice(&this.early[..count]);
            this.early.advance(count);
        }
        let read = &mut buf.filled_mut()[before..];
        if read.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let passed = this.look(read);
        if passed < read.len() {
            this.early = [&read[passed..], &this.early].concat().into();
            buf.set_filled(before + passed);
        }
        if passed == 0 {
            // Nothing, not even the end, is what hyper may know of now.
            this.head.reader.register(cx.waker());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Resettable + Unpin> AsyncWrite for Inspected<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { stream, out, watch, .. } = self.get_mut();
        let written = out.poll_write_vectored(pinned(stream), cx, bufs);
        match &written {
            Poll::Ready(Ok(_)) => watch.taken(),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => watch.not_taken(),
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.out.all_written();
        let flushed = this.stream().poll_flush(cx);
        match &flushed {
            Poll::Ready(_) => this.watch.all_taken(),
            Poll::Pending => this.watch.not_taken(),
        }
        flushed
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.watch.closing();
        this.stream().poll_shutdown(cx)
    }
}

impl<I: Resettable> Drop for Inspected<I> {
    fn drop(&mut self) {
        // hyper ends what is whole by a shutdown.
        if let Some(stream) = self.stream.as_ref().filter(|_| self.watch.ends_by_closing()) {
            stream.reset();
        }
    }
}

fn pinned<I: Unpin>(stream: &mut Option<I>) -> Pin<&mut I> {
    Pin::new(stream.as_mut().expect("a stream that is not taken out"))
}

/// Where a chunked body is (RFC 9112 §7.1). Only its end is of interest here:
/// what is wrong with it, hyper refuses. As to hyper, lines end in CR LF alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunks {
    /// In the size of a chunk, so far.
    Size(u64),
    /// Behind the size, in what extends it.
    Extension(u64),
    /// Before the line feed behind the size.
    SizeEnd(u64),
    /// So many bytes before the next size.
    Data(u64),
    /// At the beginning of a line behind the last chunk.
    Line,
    /// In a trailer field.
    Trailer,
    /// Before the line feed behind a trailer field.
    TrailerEnd,
    /// Before the last line feed.
    End,
    Over,
}

impl Chunks {
    /// How many of `bytes` belong to the body.
    fn pass(&mut self, bytes: &[u8]) -> usize {
        let mut passed = 0;
        while passed < bytes.len() && *self != Self::Over {
            if let Self::Data(left) = self {
                let part = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len() - passed);
                *left -= part as u64;
                passed += part;
                if *left == 0 {
                    *self = Self::Size(0);
                }
            } else {
                *self = self.after(bytes[passed]);
                passed += 1;
            }
        }
        passed
    }

    fn after(self, byte: u8) -> Self {
        match (self, byte) {
            (Self::Size(size) | Self::Extension(size), b'\r') => Self::SizeEnd(size),
            (Self::Size(size), _) => match char::from(byte).to_digit(16) {
                Some(digit) => Self::Size(size.saturating_mul(16).saturating_add(digit.into())),
                None => Self::Extension(size),
            },
            (Self::SizeEnd(0) | Self::TrailerEnd, _) => Self::Line,
            // The data's own line end is no part of its size.
            (Self::SizeEnd(size), _) => Self::Data(size.saturating_add(2)),
            (Self::Line, b'\r') => Self::End,
            (Self::Trailer, b'\r') => Self::TrailerEnd,
            (Self::Line, _) => Self::Trailer,
            (Self::End, _) => Self::Over,
            (other, _) => other,
        }
    }
}

/// Where a line follows the last field that a head may have; hyper takes no more
/// either, but would answer without a word.
fn beyond_fields(head: &[u8]) -> Option<usize> {
    let next = memchr::memchr_iter(b'\n', head).nth(MAX_FIELDS)? + 1;
    head.get(next).filter(|byte| !matches!(byte, b'\r' | b'\n')).map(|_| next)
}

/// Lets the head end at `at` in `bytes`, and says how many of them are left.
fn end_at(at: usize, bytes: &mut [u8]) -> usize {
    bytes[at] = b'\n';
    at + 1
}

/// What the bytes of a head say.
struct WholeHead {
    /// How many there are.
    end: usize,
    fields: usize,
    oddity: Oddity,
    /// What follows it.
    due: Due,
}

impl WholeHead {
    /// What is known of the head that `bytes` begin with, if they hold all of it.
    fn of(bytes: &[u8]) -> Option<Self> {
        let mut lines = lines(bytes);
        let request_line = lines.next()?;
        let mut end = request_line.len() + 1;
        let (mut fields, mut length, mut coding) = (0, None, false);
        for line in lines {
            end += line.len() + 1;
            if is_blank(line) {
                let (oddity, due) = judge(request_line.trim_ascii_end(), length, coding);
                return Some(Self { end, fields, oddity, due });
            }
            fields += 1;
            if matches!(line.first(), Some(b'c' | b'C' | b't' | b'T')) {
                length = value_of(line, b"content-length:").or(length);
                coding |= value_of(line, b"transfer-encoding:").is_some();
            }
        }
        None
    }
}

/// What is odd about a head, and what follows it.
fn judge(request_line: &[u8], length: Option<&[u8]>, coding: bool) -> (Oddity, Due) {
    if !request_line.ends_with(b" HTTP/1.1") && !request_line.ends_with(b" HTTP/1.0") {
        return (Oddity::None, Due::Anything);
    }
    let oddity = if memchr::memchr(b'#', request_line).is_some() {
        Oddity::Fragment
    } else if length.is_some() && coding {
        Oddity::TwoLengths
    } else if is_about_host(request_line) {
        Oddity::NoPath
    } else {
        Oddity::None
    };
    let due = match length {
        _ if coding => Due::Chunks(Chunks::Size(0)),
        None => Due::Body(0),
        Some(value) => {
            let value = str::from_utf8(value).ok().and_then(|value| value.parse().ok());
            value.map_or(Due::Anything, Due::Body)
        }
    };
    (oddity, due)
}

/// Whether this is an OPTIONS with an absolute target that has neither a path
/// nor a query.
fn is_about_host(request_line: &[u8]) -> bool {
    let Some(target) = request_line.strip_prefix(b"OPTIONS ") else {
        return false;
    };
    let target = target.split(|byte| *byte == b' ').next().unwrap_or_default();
    let behind_scheme = memmem::find(target, b"://").map(|at| &target[at + 3..]);
    behind_scheme.is_some_and(|rest| memchr::memchr2(b'/', b'?', rest).is_none())
}

/// The value of the field `name` (with its colon), if that is what `line` has.
fn value_of<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (start, value) = line.split_at_checked(name.len())?;
    start.eq_ignore_ascii_case(name).then(|| value.trim_ascii())
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::metrics::Limit;
    use crate::proxy::watch::Watches;

    struct Stage {
        memory: Memory,
        head: Arc<HeadWatch>,
        watch: Arc<Watch>,
        stream: Inspected<tokio_test_io::Reads>,
    }

    /// A stream that gives what it was told, read by read, and then waits.
    mod tokio_test_io {
        use super::*;
        use std::collections::VecDeque;

        pub(super) struct Reads(pub(super) VecDeque<Vec<u8>>);

        impl Resettable for Reads {
            fn reset(&self) {}
        }

        impl AsyncRead for Reads {
            fn poll_read(
                self: Pin<&mut Self>,
                _: &mut Context<'_>,
                buf: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                let Some(read) = self.get_mut().0.pop_front() else {
                    return Poll::Pending;
                };
                buf.put_slice(&read);
                Poll::Ready(Ok(()))
            }
        }
    }

    impl Stage {
        fn new(reads: &[&str], memory: usize) -> Self {
            let (head, watch) = (Arc::default(), Watches::default().open());
            let reads = reads.iter().map(|read| read.as_bytes().to_vec()).collect();
            let reads = tokio_test_io::Reads(reads);
            let memory = Memory::new(memory);
            let stream = Inspected::new(reads, &head, &watch, &memory);
            Self { memory, head, watch, stream }
        }

        /// All that hyper may have by now.
        async fn read(&mut self) -> String {
            let mut all = Vec::new();
            let mut buf = [0; 4096];
            while let Some(read) = poll_once(self.stream.read(&mut buf)).await {
                all.extend_from_slice(&buf[..read.unwrap()]);
            }
            String::from_utf8(all).unwrap()
        }
    }

    async fn poll_once<T>(future: impl Future<Output = T>) -> Option<T> {
        futures_util::future::poll_immediate(future).await
    }

    async fn check(reads: &[&str], odd: bool) {
        let mut stage = Stage::new(reads, 1 << 20);
        stage.read().await;
        assert_eq!(stage.head.take().is_err(), odd, "{reads:?}");
    }

    #[tokio::test]
    async fn odd_heads_are_seen_however_they_are_cut() {
        check(&["GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n"], true).await;
        check(&["GET /a", "#b HTTP/1.1\r\nHost: x\r\n", "\r\n"], true).await;
        check(
            &["POST / HTTP/1.1\r\ncontent-LENGTH: 1\r\nTransfer-Encoding: chunked\r\n\r\n"],
            true,
        )
        .await;
        check(
            &["POST / HTTP/1.1\r\nContent-Len", "gth: 1\r\nTransfer-Encoding: chunked\r\n\r", "\n"],
            true,
        )
        .await;
        check(&["\r\n\r\nGET /a#b HTTP/1.1\r\n\r\n"], true).await;
        check(&["\r\n", "\r\n", "GET /a#b HTTP/1.1\r\n\r\n"], true).await;
        check(&["get /a", "#b HTTP/1.1\r\n\r\n"], true).await;
        check(&["M_1", " /a#b HTTP/1.1\r\n\r\n"], true).await;
    }

    #[tokio::test]
    async fn a_head_padded_beyond_its_limit_is_too_large_however_it_is_cut() {
        let padded = |blanks| format!("GET /a#b HTTP/1.1\r\nHost:{}x\r\n\r\n", " ".repeat(blanks));
        for (blanks, too_large) in [(60 * 1024, false), (65 * 1024, true), (90 * 1024, true)] {
            let head = padded(blanks);
            for cut in [10, 5000, 65_000.min(head.len() - 1), head.len() - 2] {
                let mut stage = Stage::new(&[], 1 << 20);
                stage.stream.look(&mut head.as_bytes()[..cut].to_vec());
                stage.stream.look(&mut head.as_bytes()[cut..].to_vec());
                let error = stage.head.take().err().unwrap();
                let is_so = matches!(error, ProxyError::HeaderTooLarge { .. });
                assert_eq!(is_so, too_large, "{blanks} {cut}");
            }
        }
    }

    #[tokio::test]
    async fn a_field_too_many_ends_the_head_however_it_is_cut() {
        let head_of = |count| {
            let fields: Vec<_> = (0..count).map(|i| format!("X-{i}: {i}\r\n")).collect();
            format!("GET /a HTTP/1.1\r\n{}", fields.concat())
        };
        let most = head_of(MAX_FIELDS);
        for (head, too_many) in [
            (most.clone() + "\r\n", false),
            (head_of(MAX_FIELDS + 1) + "\r\n", true),
            (head_of(MAX_FIELDS + 200), true),
        ] {
            for cut in most.len() - 10..(most.len() + 10).min(head.len()) {
                let mut stage = Stage::new(&[&head[..cut], &head[cut..]], 1 << 20);
                let read = stage.read().await;
                assert_eq!(stage.head.take().is_err(), too_many, "{cut}");
                let seen = if too_many { most.clone() + "\n" } else { head.clone() };
                assert_eq!(read, seen, "{cut}");
            }
            // What follows does not count.
            let next = "a\n\n".repeat(MAX_FIELDS);
            let mut stage = Stage::new(&[&head[..30], &format!("{}{next}", &head[30..])], 1 << 20);
            stage.read().await;
            assert_eq!(stage.head.take().is_err(), too_many);
            let bytes: Vec<_> = head.split_inclusive(|_| true).collect();
            let mut stage = Stage::new(&bytes, 1 << 20);
            stage.read().await;
            assert_eq!(stage.head.take().is_err(), too_many);
        }
    }

    #[tokio::test]
    async fn usual_heads_and_bodies_are_not_odd() {
        check(&["GET /a HTTP/1.1\r\nHost: x\r\nReferer: http://x/#a\r\n\r\n"], false).await;
        check(
            &[
                "POST / HTTP/1.1\r\nContent-Length: 34\r\n\r\nGET /#a\r\nTransfer-Encoding: a\r\n\r\n",
            ],
            false,
        )
        .await;
        check(&["POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n", "GET /#a HTTP/1.1\r\n\r\n"], false)
            .await;
    }

    #[tokio::test]
    async fn bare_line_feeds_end_lines_too() {
        check(&["GET /a#b HTTP/1.1\nHost: x\n\n"], true).await;
        check(&["GET /a HTTP/1.1\nContent-Length: 0\n\n"], false).await;
    }

    #[tokio::test]
    async fn each_pipelined_head_is_looked_at_in_its_turn() {
        const FIRST: &str = "POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody";
        const CHUNKED: &str = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\
            0F;x=\"0\"\r\nGET / HTTP/1.1\n\n\r\n003\r\nabc\r\n0\r\nX-Sum: a\n0\r\n\r\n";
        const SECOND: &str = "GET /a#b HTTP/1.1\r\n\r\n";
        const THIRD: &str = "GET /c HTTP/1.1\r\n\r\n";
        let all = [FIRST, CHUNKED, SECOND, THIRD].concat();
        for cut in 1..all.len() {
            let mut stage = Stage::new(&[&all[..cut], &all[cut..]], 1 << 20);
            for (message, odd) in [(FIRST, false), (CHUNKED, false), (SECOND, true), (THIRD, false)]
            {
                assert_eq!(stage.read().await, message, "cut at {cut}");
                assert_eq!(stage.head.take().is_err(), odd, "cut at {cut}");
                assert_eq!(stage.read().await, "", "cut at {cut}");
                stage.head.await_head();
            }
        }
    }

    #[tokio::test]
    async fn what_follows_a_switch_passes_as_it_comes() {
        const NEXT: &str = "GET /a#b HTTP/1.1\r\n\r\n";
        for head in
            ["CONNECT x:443 HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n"]
        {
            let mut stage = Stage::new(&[&format!("{head}{NEXT}"), NEXT, "more"], 1 << 20);
            assert_eq!(stage.read().await, head);
            assert!(stage.head.take().is_ok());
            stage.head.look_away();
            assert_eq!(stage.read().await, format!("{NEXT}{NEXT}more"));
        }
    }

    #[tokio::test]
    async fn options_without_a_path_is_about_the_host() {
        let check = async |line: &str, subject| {
            let mut stage = Stage::new(&[line, "\r\nHost: x\r\n\r\n"], 1 << 20);
            stage.read().await;
            assert_eq!(stage.head.take().ok().unwrap().subject, subject, "{line}");
        };
        for line in ["OPTIONS http://x", "OPTIONS HTTPS://x:1", "OPTIONS http://[::1]"] {
            check(&format!("{line} HTTP/1.1"), Subject::Host).await;
        }
        for line in
            ["OPTIONS http://x/", "OPTIONS http://x?a", "OPTIONS /", "OPTIONS *", "GET http://x"]
        {
            check(&format!("{line} HTTP/1.1"), Subject::Resource).await;
        }
    }

    #[tokio::test]
    async fn half_heads_share_a_memory() {
        let half = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(1000));
        let mut stage = Stage::new(&[&half], COPIES * half.len());
        stage.read().await;
        assert_eq!(poll_once(stage.watch.expired()).await, None);
        let mut stage = Stage::new(&[&half], COPIES * half.len() - 1);
        stage.read().await;
        assert_eq!(poll_once(stage.watch.expired()).await, Some(Limit::HeadMemory));
    }

    #[tokio::test]
    async fn head_that_is_too_large_keeps_its_memory_until_its_end() {
        let half = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(2000));
        let reads = std::iter::repeat_n(&*half, 40).collect::<Vec<_>>();
        let mut stage = Stage::new(&reads, 1 << 20);
        stage.read().await;
        assert!(!stage.memory.reserve_none().grow((1 << 20) - COPIES * MAX_HEAD + 1));
        assert!(stage.stream.partial.is_empty());
        drop(stage.stream);
        assert!(stage.memory.reserve_none().grow(1 << 20));
    }

    #[tokio::test]
    async fn blanks_before_a_head_are_a_part_of_it_but_for_a_few() {
        let mut stage = Stage::new(&["\r\n\r\n", "\r\n"], 0);
        stage.read().await;
        assert_eq!(poll_once(stage.watch.expired()).await, None);
        let many = ["\r\n"; 100];
        let mut stage = Stage::new(&many, 100);
        stage.read().await;
        assert_eq!(poll_once(stage.watch.expired()).await, Some(Limit::HeadMemory));
        let reads = [&many[..], &["GET /#a HTTP/1.1\r\n\r\n"]].concat();
        check(&reads, true).await;
    }
}
