//! The spelling of field names, kept on the way through.
//!
//! `http` knows names in lower case only, and that is how hyper writes them here.
//! A head is remembered as it came, and beneath hyper its names are put back as it
//! goes out; those that it did not have are put into Title-Case, as most clients and
//! servers spell them. hyper can keep names itself (`preserve_header_case`), for a
//! fifth of what a request costs.
//!
//! # Invariants
//!
//! - Nothing but names is changed, and of them nothing but the case: a head goes
//!   out as long as hyper made it.
//! - Only bytes of heads are respelled: a head before which something is still
//!   being written goes out in lower case.

use std::fmt;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use smallvec::SmallVec;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::head::{end_of_head, is_blank, lines};

/// Longest head of an answer whose spelling is kept if it comes in pieces.
const MAX_PARTIAL: usize = 64 * 1024;

/// Longest head that is remembered with its values.
const MAX_WHOLE: usize = 2 * 1024;

/// Fields of a head whose spelling is kept: no less than hyper takes.
const MOST_FIELDS: usize = 128;

/// Pieces that go out in one write, a respelled head among them: as many as hyper gives.
const MAX_PIECES: usize = 64;

/// How the names in a head are spelled; by default, in Title-Case.
#[derive(Clone, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Spelling {
    /// The head as it came, or the names alone, in lines of their own.
    head: Option<Arc<[u8]>>,
}

impl Spelling {
    /// The spelling of `head`.
    #[must_use]
    pub fn of(head: &[u8]) -> Self {
        if head.len() <= MAX_WHOLE {
            return Self { head: Some(head.into()) };
        }
        let mut names = b"\n".to_vec();
        for name in names_of(head) {
            names.extend_from_slice(name);
            names.extend_from_slice(b":\n");
        }
        Self { head: Some(names.into()) }
    }

    /// `heads`, whose names are in lower case, so spelled.
    fn respell(&self, heads: &[u8]) -> Vec<u8> {
        let mut known = Known::of(self.head.as_deref().unwrap_or_default());
        let mut respelled = heads.to_vec();
        let (mut rest, mut is_start_line) = (&mut respelled[..], true);
        while let Some(end) = memchr::memchr(b'\n', rest) {
            let (line, behind) = rest.split_at_mut(end + 1);
            // Another head may follow.
            let is_last = is_blank(line);
            if !is_start_line && !is_last {
                known.respell(line);
            }
            (rest, is_start_line) = (behind, is_last);
        }
        respelled
    }
}

impl fmt::Debug for Spelling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The values are nobody's business.
        let names = self.head.as_deref().into_iter().flat_map(names_of);
        f.debug_list().entries(names.map(String::from_utf8_lossy)).finish()
    }
}

fn names_of(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    let name = |line: &[u8]| line.iter().position(|byte| *byte == b':');
    lines(head).skip(1).filter_map(move |line| Some(&line[..name(line)?])).take(MOST_FIELDS)
}

fn title_case(name: &mut [u8]) {
    let mut begins = true;
    for byte in name {
        if begins {
            byte.make_ascii_uppercase();
        }
        begins = *byte == b'-';
    }
}

/// The names of a head that are still to be put back.
struct Known<'a> {
    /// Lines that were not looked at.
    lines: &'a [u8],
    /// Those that were, and had another name: those that are not passed on, as a rule.
    left: SmallVec<[&'a [u8]; 4]>,
}

impl<'a> Known<'a> {
    fn of(head: &'a [u8]) -> Self {
        let mut known = Self { lines: head, left: SmallVec::new() };
        known.next_line();
        known
    }

    /// Puts the name in `line` into its spelling, or else into Title-Case.
    fn respell(&mut self, line: &mut [u8]) {
        if let Some(name) = self.take(line) {
            line[..name.len()].copy_from_slice(name);
        } else if let Some(colon) = line.iter().position(|byte| *byte == b':') {
            title_case(&mut line[..colon]);
        }
    }

    /// Takes the first name that is the one in `line`, but for its spelling. Of a name
    /// that the head has several times, the values keep their order on their way.
    fn take(&mut self, line: &[u8]) -> Option<&'a [u8]> {
        for at in 0..self.left.len() {
            if let Some(name) = same_name(line, self.left[at]) {
                self.left.remove(at);
                return Some(name);
            }
        }
        loop {
            if let Some(name) = same_name(line, self.lines) {
                // Most lines are as they were.
                match self.lines.split_at_checked(line.len()) {
                    Some((same, rest)) if same[name.len()..] == line[name.len()..] => {
                        self.lines = rest;
                    }
                    _ => drop(self.next_line()),
                }
                return Some(name);
            }
            let other = self.next_line()?;
            self.left.push(other);
        }
    }

    fn next_line(&mut self) -> Option<&'a [u8]> {
        let end = memchr::memchr(b'\n', self.lines)?;
        let (line, rest) = self.lines.split_at(end + 1);
        self.lines = rest;
        Some(line)
    }
}

/// The name that `known` begins with, if it is the one that `line` does, but for its
/// spelling, which is lower case there.
fn same_name<'a>(line: &[u8], known: &'a [u8]) -> Option<&'a [u8]> {
    let ends = |(byte, known): (&u8, &u8)| {
        let same = byte == known || byte.is_ascii_lowercase() && *byte == known | 0x20;
        !same || *byte == b':'
    };
    let end = line.iter().zip(known).position(ends)?;
    (known[end] == b':' && line[end] == b':').then(|| &known[..end])
}

/// Where a spelling waits for whoever needs it. Used by one thread; `Sync` since
/// hyper wants it to be.
#[derive(Debug, Default)]
pub struct Slot(Mutex<Option<Spelling>>);

impl Slot {
    /// Puts `spelling` in place of what was there.
    pub fn set(&self, spelling: Option<Spelling>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = spelling;
    }

    /// Takes what is there.
    pub fn take(&self) -> Option<Spelling> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// How the next head that goes out on a connection is spelled: whoever sends it
/// tells the stream.
#[derive(Debug, Default)]
pub struct NextHead {
    spelling: Slot,
    /// Of what came before, something may still have to be written.
    is_writing: AtomicBool,
}

impl NextHead {
    /// The next head to be written is spelled so.
    pub fn set_spelling(&self, spelling: Spelling) {
        let is_writing = self.is_writing.load(Ordering::Relaxed);
        self.spelling.set((!is_writing).then_some(spelling));
    }
}

/// The writing side of a stream whose heads are respelled.
///
/// The stream must tell hyper that it writes vectored: then hyper keeps heads in
/// the first slice, without bytes of a body, and begins none while such bytes
/// wait.
pub struct Respelled {
    next: Arc<NextHead>,
    /// A respelled head, and how much of it is written; empty: all.
    head: Vec<u8>,
    written: usize,
}

impl Respelled {
    /// Respells what `next` tells of.
    #[must_use]
    pub fn new(next: &Arc<NextHead>) -> Self {
        Self { next: Arc::clone(next), head: Vec::new(), written: 0 }
    }

    /// Writes `slices` to `stream`, the head in its spelling.
    ///
    /// # Errors
    ///
    /// Those of `stream`; and where another protocol follows a head that was not
    /// written whole.
    pub fn poll_write_vectored<S: AsyncWrite>(
        &mut self,
        stream: Pin<&mut S>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.next.is_writing.store(true, Ordering::Relaxed);
        let first = slices.first().map(|slice| &**slice).unwrap_or_default();
        if let Some(spelling) = self.next.spelling.take() {
            self.head = spelling.respell(first);
            self.written = 0;
        }
        let rest = &self.head[self.written..];
        if rest.is_empty() {
            return stream.poll_write_vectored(cx, slices);
        }
        if first.len() < rest.len() {
            return Poll::Ready(Err(io::Error::other("the head before was not written whole")));
        }
        // Another head may have joined what is left of this one.
        let is_alone = first.len() == rest.len();
        let count = if is_alone { slices.len().min(MAX_PIECES) } else { 1 };
        let mut pieces = [IoSlice::new(&[]); MAX_PIECES];
        pieces[..count].copy_from_slice(&slices[..count]);
        pieces[0] = IoSlice::new(rest);
        let written = ready!(stream.poll_write_vectored(cx, &pieces[..count]))?;
        if written < rest.len() {
            self.written += written;
        } else {
            (self.head, self.written) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(written))
    }

    /// All was given to the stream: hyper flushes it only then.
    pub fn all_written(&self) {
        self.next.is_writing.store(false, Ordering::Relaxed);
    }
}

/// What an upstream's connection and those who send on it tell each other.
#[derive(Debug, Default)]
pub(super) struct Heads {
    request: Arc<NextHead>,
    /// A request is under way.
    answer_is_due: AtomicBool,
    answer: Slot,
}

impl Heads {
    /// A request is being sent, spelled so.
    pub(super) fn await_answer(&self, request: Spelling) {
        self.request.set_spelling(request);
        self.answer_is_due.store(true, Ordering::Relaxed);
    }

    /// How the answer that has come is spelled.
    pub(super) fn take_answer(&self) -> Spelling {
        self.answer.take().unwrap_or_default()
    }

    fn answer_came(&self, spelling: Spelling) {
        self.answer_is_due.store(false, Ordering::Relaxed);
        self.answer.set(Some(spelling));
    }
}

/// An upstream's stream: requests go out as they were spelled, and the spelling
/// of answers is noted.
pub(super) struct Spelled<S> {
    stream: S,
    heads: Arc<Heads>,
    out: Respelled,
    /// The beginning of a head that comes in several reads.
    partial: Vec<u8>,
}

impl<S> Spelled<S> {
    pub(super) fn new(stream: S, heads: &Arc<Heads>) -> Self {
        let out = Respelled::new(&heads.request);
        Self { stream, heads: Arc::clone(heads), out, partial: Vec::new() }
    }

    /// Looks for the head of the answer that is due. Says which part of `bytes`
    /// hyper need not see.
    fn look(&mut self, bytes: &[u8]) -> Option<Range<usize>> {
        let (mut at, mut needless) = (0, None);
        while at < bytes.len() && self.heads.answer_is_due.load(Ordering::Relaxed) {
            let (end, persists) = self.look_at_head(&bytes[at..]);
            needless = persists.map(|line| at + line.start..at + line.end);
            at += end;
        }
        needless
    }

    /// Looks at the head that begins with `bytes`, or goes on with them. Returns
    /// where it ends, and where in `bytes` it says that the connection persists.
    fn look_at_head(&mut self, bytes: &[u8]) -> (usize, Option<Range<usize>>) {
        if self.partial.is_empty() {
            // Line ends too many before it are no head (RFC 9112 §2.2).
            let blank = bytes.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
            let head = Answer::read(&bytes[blank..]);
            let Some(end) = head.end else {
                self.partial.extend_from_slice(&bytes[blank..]);
                return (bytes.len(), None);
            };
            self.head_came(&bytes[blank..][..end]);
            let persists = head.persists.map(|line| blank + line.start..blank + line.end);
            return (blank + end, persists);
        }
        let known = self.partial.len();
        self.partial.extend_from_slice(bytes);
        // The last line end may be cut in two.
        let from = known.saturating_sub(2);
        let Some(end) = end_of_head(&self.partial[from..]).map(|end| from + end) else {
            if self.partial.len() > MAX_PARTIAL {
                self.partial = Vec::new();
                self.heads.answer_came(Spelling::default());
            }
            return (bytes.len(), None);
        };
        let partial = std::mem::take(&mut self.partial);
        self.head_came(&partial[..end]);
        (end - known, None)
    }

    fn head_came(&self, head: &[u8]) {
        if !is_interim(head) {
            self.heads.answer_came(Spelling::of(head));
        }
    }
}

/// An answer's head.
struct Answer {
    /// `None`: not all of it has come.
    end: Option<usize>,
    /// The bytes that say that the connection persists, where that goes without saying
    /// (RFC 9112 §9.3). No client gets to see it, and to take it out of a `HeaderMap`
    /// would take a new one; blanks at the end of the field before it mean nothing (§5.1).
    persists: Option<Range<usize>>,
}

impl Answer {
    fn read(bytes: &[u8]) -> Self {
        let (mut at, mut before, mut persists) = (0, &bytes[..0], None);
        for (number, line) in lines(bytes).enumerate() {
            let start = at;
            at += line.len() + 1;
            if is_blank(line) {
                let persists = persists.filter(|_| bytes.starts_with(b"HTTP/1.1 "));
                return Self { end: Some(at), persists };
            }
            if number > 1 && line.eq_ignore_ascii_case(b"connection: keep-alive\r") {
                persists = end_of_field(before).map(|end| start - 1 - before.len() + end..at - 2);
            }
            before = line;
        }
        Self { end: None, persists: None }
    }
}

/// Where the field in `line` ends, if it is a sound one: what is wrong with it, hyper must
/// see.
fn end_of_field(line: &[u8]) -> Option<usize> {
    let field = line.strip_suffix(b"\r").unwrap_or(line);
    let is_sound = field.first()?.is_ascii_alphanumeric()
        && field.iter().all(|byte| matches!(byte, b' '..=b'~'));
    is_sound.then_some(field.len())
}

/// Whether another head follows this one (RFC 9110 §15.2).
fn is_interim(head: &[u8]) -> bool {
    let status = head.split(|byte| *byte == b' ').nth(1).and_then(|rest| rest.get(..3));
    status.is_some_and(|status| status[0] == b'1' && status != b"101")
}

impl<S: AsyncRead + Unpin> AsyncRead for Spelled<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        let read = &mut buf.filled_mut()[before..];
        if let Some(needless) = this.look(read) {
            read[needless].fill(b' ');
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Spelled<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.out.poll_write_vectored(Pin::new(&mut this.stream), cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.out.all_written();
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    fn spelled(head: &str) -> Spelling {
        Spelling::of(head.as_bytes())
    }

    /// How the fields `from` come out where the head had the fields `known`.
    fn respelled(known: &str, from: &str) -> String {
        let respell = |known: &str, start: &str| {
            let spelling = spelled(&format!("GET http://a:1/ HTTP/1.1\r\n{known}\r\n"));
            let head = format!("{start}\r\n{from}\r\n");
            let respelled = String::from_utf8(spelling.respell(head.as_bytes())).unwrap();
            let fields = respelled.strip_prefix(&format!("{start}\r\n")).unwrap();
            fields.strip_suffix("\r\n").unwrap().to_owned()
        };
        let short = respell(known, "get http://a:1/ HTTP/1.1");
        // So long that its values are not remembered.
        let long =
            respell(&format!("X-Long: {}\r\n{known}", "a:".repeat(MAX_WHOLE)), "HTTP/1.1 200 o:k");
        assert_eq!(short, long);
        short
    }

    #[test]
    fn names_are_put_back_whatever_their_order() {
        let same = "host: a:b\r\nETag: x\r\nX-Y:1\r\nDNT: 1\r\n_a: 1\r\nx: \r\n";
        assert_eq!(respelled(same, &same.to_ascii_lowercase()), same);
        assert_eq!(
            respelled(
                "host: a\r\nETag: 1\r\nX-gone: 1\r\n",
                "etag: ETag: etag\r\nnew-one: host\r\nhost: Host:\r\n",
            ),
            "ETag: ETag: etag\r\nNew-One: host\r\nhost: Host:\r\n",
        );
        // Values of one name stand together on their way out.
        assert_eq!(
            respelled(
                "set-cookie: a\r\nB: 1\r\nSet-Cookie: b\r\nSET-COOKIE: c\r\n",
                "set-cookie: a\r\nset-cookie: b\r\nset-cookie: c\r\nset-cookie: d\r\nb: 1\r\n",
            ),
            "set-cookie: a\r\nSet-Cookie: b\r\nSET-COOKIE: c\r\nSet-Cookie: d\r\nB: 1\r\n",
        );
        assert_eq!(
            respelled(
                "a: 1\r\nDNT: 1\r\nA: 2\r\ndnt: 2\r\n",
                "a: 1\r\na: 2\r\ndnt: 1\r\ndnt: 2\r\n",
            ),
            "a: 1\r\nA: 2\r\nDNT: 1\r\ndnt: 2\r\n",
        );
    }

    #[test]
    fn names_that_a_head_did_not_have_are_in_title_case() {
        let fields = "accept-encoding: gzip\r\nx--1a: x\r\n-: y\r\n";
        let title = "Accept-Encoding: gzip\r\nX--1a: x\r\n-: y\r\n";
        assert_eq!(respelled("Accept: 1\r\nx-: 1\r\n", fields), title);
        let both = format!("HTTP/1.1 100 continue\r\n\r\nhttp/1.1 200 o:k\r\n{fields}\r\n");
        assert_eq!(
            Spelling::default().respell(both.as_bytes()),
            format!("HTTP/1.1 100 continue\r\n\r\nhttp/1.1 200 o:k\r\n{title}\r\n").as_bytes()
        );
    }

    #[test]
    fn what_is_remembered_of_a_head_has_a_bound() {
        let of_many = spelled(&"a:\n".repeat(2_000_000));
        assert_eq!(of_many.head.unwrap().len(), 1 + 3 * MOST_FIELDS);
        let debug = format!("{:?}", spelled("GET / HTTP/1.1\r\nA: secret\r\n\r\n"));
        assert_eq!(debug, r#"["A"]"#);
    }

    /// A stream that takes as many bytes a write as it is told.
    struct Takes {
        sizes: VecDeque<usize>,
        taken: Vec<u8>,
    }

    impl AsyncWrite for Takes {
        fn poll_write(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.poll_write_vectored(cx, &[IoSlice::new(buf)])
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            let count = self.sizes.pop_front().unwrap_or(usize::MAX).min(all.len());
            self.taken.extend_from_slice(&all[..count]);
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn head_that_goes_out_in_pieces_is_respelled_whole_and_its_body_is_not() {
        let head = "HTTP/1.1 200 OK\r\netag: 1\r\nx-y: 2\r\n\r\n";
        let body = "etag: body\r\n";
        for size in 1..head.len() + body.len() {
            let next = Arc::new(NextHead::default());
            next.set_spelling(spelled("HTTP/1.1 200 OK\r\nETag: 1\r\nx-y: 2\r\n\r\n"));
            let mut out = Respelled::new(&next);
            let mut stream = Takes { sizes: [size; 60].into(), taken: Vec::new() };
            let mut done = 0;
            // As hyper does it: what was not taken is offered again.
            while done < head.len() + body.len() {
                let heads = &head.as_bytes()[done.min(head.len())..];
                let bodies = &body.as_bytes()[done.saturating_sub(head.len())..];
                let slices = [IoSlice::new(heads), IoSlice::new(bodies)];
                let slices = if heads.is_empty() { &slices[1..] } else { &slices };
                done += poll_fn(|cx| out.poll_write_vectored(Pin::new(&mut stream), cx, slices))
                    .await
                    .unwrap();
            }
            let taken = String::from_utf8(stream.taken).unwrap();
            assert_eq!(
                taken, "HTTP/1.1 200 OK\r\nETag: 1\r\nx-y: 2\r\n\r\netag: body\r\n",
                "{size}"
            );
        }
    }

    #[tokio::test]
    async fn what_follows_an_unfinished_write_stays_as_it_is() {
        let next = Arc::new(NextHead::default());
        let mut out = Respelled::new(&next);
        let mut stream = Takes { sizes: VecDeque::new(), taken: Vec::new() };
        let mut write = async |out: &mut Respelled, text: &str| {
            let slices = [IoSlice::new(text.as_bytes())];
            poll_fn(|cx| out.poll_write_vectored(Pin::new(&mut stream), cx, &slices))
                .await
                .unwrap();
            std::mem::take(&mut stream.taken)
        };
        write(&mut out, "etag: the end of a body").await;
        next.set_spelling(spelled("GET\nETag: 1\n"));
        assert_eq!(write(&mut out, "GET\netag: 1\n").await, b"GET\netag: 1\n");
        out.all_written();
        next.set_spelling(spelled("GET\nETag: 1\n"));
        assert_eq!(write(&mut out, "GET\netag: 1\n").await, b"GET\nETag: 1\n");
    }

    #[tokio::test]
    async fn bytes_of_another_protocol_do_not_take_the_place_of_a_head() {
        let next = Arc::new(NextHead::default());
        next.set_spelling(spelled("GET\nETag: 1\n"));
        let mut out = Respelled::new(&next);
        let mut stream = Takes { sizes: [3].into(), taken: Vec::new() };
        let mut write = async |text: &str| {
            let slices = [IoSlice::new(text.as_bytes())];
            poll_fn(|cx| out.poll_write_vectored(Pin::new(&mut stream), cx, &slices)).await
        };
        assert_eq!(write("GET\netag: 1\n").await.unwrap(), 3);
        write("ws").await.unwrap_err();
    }

    #[tokio::test]
    async fn answers_are_noted_behind_interim_ones_and_in_any_pieces() {
        let interim = "HTTP/1.1 100\n\n".repeat(20);
        let text = format!(
            "HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n{interim}\r\n\r\nHTTP/1.1 101\r\nETag: 1\r\n\r\nx-y: 1\r\n\r\n"
        );
        for size in 1..=text.len() {
            let (mut far, near) = duplex(1000);
            let heads = Arc::new(Heads::default());
            let mut stream = Spelled::new(near, &heads);
            heads.await_answer(Spelling::default());
            far.write_all(text.as_bytes()).await.unwrap();
            let mut read = 0;
            while read < text.len() {
                let mut piece = vec![0; size];
                read += stream.read(&mut piece).await.unwrap();
            }
            assert_eq!(heads.take_answer(), spelled("HTTP/1.1 101\r\nETag: 1\r\n\r\n"), "{size}");
            assert_eq!(heads.take_answer(), Spelling::default());
            assert!(stream.partial.is_empty());
        }
    }

    /// What hyper gets to see of an answer that comes at once.
    async fn seen_by_hyper(answer: &str) -> String {
        let (mut far, near) = duplex(1000);
        let heads = Arc::new(Heads::default());
        let mut stream = Spelled::new(near, &heads);
        heads.await_answer(Spelling::default());
        far.write_all(answer.as_bytes()).await.unwrap();
        let mut piece = vec![0; 1000];
        let read = stream.read(&mut piece).await.unwrap();
        String::from_utf8(piece[..read].to_vec()).unwrap()
    }

    #[tokio::test]
    async fn that_a_connection_persists_is_kept_back_where_it_goes_without_saying() {
        let interim = "HTTP/1.1 103 Early Hints\r\nConnection: keep-alive\r\n\r\n\r\n";
        for before in ["", interim] {
            for line in ["Connection: keep-alive", "connection: Keep-Alive"] {
                for field in ["A: b\r\n", "A: b\n", "A: \r\n", "A:\r\n"] {
                    let head = |before: &str, line: &str, end: &str| {
                        format!("{before}HTTP/1.1 200 OK\r\n{field}{line}{end}C: d\r\n\r\nbody")
                    };
                    let seen = seen_by_hyper(&head(before, line, "\r\n")).await;
                    let unpadded: Vec<_> = seen.lines().map(str::trim_ascii_end).collect();
                    let expected = head(before, "", "");
                    let expected: Vec<_> = expected.lines().map(str::trim_ascii_end).collect();
                    assert_eq!(unpadded, expected);
                    assert_eq!(seen.len(), head(before, line, "\r\n").len());
                }
            }
        }
        for answer in [
            "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\r\n \r\nConnection: keep-alive\r\n\r\n",
            "HTTP/1.1 200 OK\r\n \t\r\nConnection: keep-alive\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\r\r\nConnection: keep-alive\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\x0c\r\nConnection: keep-alive\r\n\r\n",
            "HTTP/1.0 200 OK\r\nA: b\r\nConnection: keep-alive\r\n\r\n",
            "HTTP/1.1 200 OK\r\nA: b\r\nConnection: keep-alive, x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nX-Connection: keep-alive\r\n\r\nConnection: keep-alive\r\n",
        ] {
            assert_eq!(seen_by_hyper(answer).await, answer);
        }
    }
}
