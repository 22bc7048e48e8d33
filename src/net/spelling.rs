//! The spelling of field names, kept on the way through.
//!
//! `http` knows names in lower case only, and hyper writes them in Title-Case
//! here, as most clients and servers do. A head that is spelled otherwise is
//! noted as it comes, and put back into its own spelling as it goes out. hyper
//! can keep names itself (`preserve_header_case`), but of each head, which is a
//! fifth of what a request costs.
//!
//! # Invariants
//!
//! - Nothing but names is changed, and of them nothing but the case: a head goes
//!   out as long as hyper made it.
//! - Only bytes of heads are respelled: a head that follows one that is still
//!   being written goes out in Title-Case.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::head::{end_of_head, lines};

/// Longest head of an answer whose spelling is kept if it comes in pieces.
const MAX_PARTIAL: usize = 64 * 1024;

/// Pieces of a body that may go out with a respelled head in one write.
const MAX_PIECES: usize = 8;

/// The names in a head that are not in Title-Case.
///
/// One line for each name; a colon before it for each field of the same name that
/// stands before it, however that is spelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spelling(Arc<[u8]>);

impl Spelling {
    /// The spelling of `head`; `None`: Title-Case throughout.
    #[must_use]
    pub fn of(head: &[u8]) -> Option<Self> {
        let mut names = Names::of(head);
        lines(head).skip(1).for_each(|line| names.see(line));
        names.spelling()
    }

    /// `heads` with the names that were noted.
    fn put_back(&self, heads: &[u8]) -> Vec<u8> {
        let mut noted: Vec<_> = lines(&self.0).map(split_note).collect();
        let mut respelled = heads.to_vec();
        let mut line_at = 0;
        for line in lines(heads) {
            noted.retain_mut(|(before, name)| {
                if !begins_with(line, name) {
                    return true;
                }
                let is_it = *before == 0;
                if is_it {
                    respelled[line_at..][..name.len()].copy_from_slice(name);
                }
                *before = before.saturating_sub(1);
                !is_it
            });
            line_at += line.len() + 1;
        }
        respelled
    }
}

/// The names of a head whose lines are looked at one after the other.
#[derive(Debug)]
pub struct Names<'a> {
    head: &'a [u8],
    noted: Vec<u8>,
    /// Of all that were seen: see [`kind`].
    kinds: u64,
}

impl<'a> Names<'a> {
    /// Those of `head`, none of which was seen.
    #[must_use]
    pub fn of(head: &'a [u8]) -> Self {
        Self { head, noted: Vec::new(), kinds: 0 }
    }

    /// Looks at the next line behind the first.
    pub fn see(&mut self, line: &[u8]) {
        let (name, is_odd) = name(line);
        let kind = kind(name);
        if is_odd {
            // Few have a double, and fewer a different one.
            let is_new = self.kinds & kind == 0;
            let before = if is_new { 0 } else { count_before(line, name, self.head) };
            self.noted.extend(std::iter::repeat_n(b':', before));
            self.noted.extend_from_slice(name);
            self.noted.push(b'\n');
        }
        self.kinds |= kind;
    }

    /// How they are spelled; `None`: in Title-Case throughout.
    #[must_use]
    pub fn spelling(self) -> Option<Spelling> {
        (!self.noted.is_empty()).then(|| Spelling(self.noted.into()))
    }
}

/// The name that `line` begins with, and whether hyper would spell it otherwise.
fn name(line: &[u8]) -> (&[u8], bool) {
    let (mut is_odd, mut before) = (false, b'-');
    for (at, &byte) in line.iter().enumerate() {
        if byte == b':' {
            return (&line[..at], is_odd);
        }
        let wrong =
            if before == b'-' { byte.is_ascii_lowercase() } else { byte.is_ascii_uppercase() };
        is_odd |= wrong;
        before = byte;
    }
    (line, false)
}

/// One bit for `name`, the same in each spelling; others may have it, too.
fn kind(name: &[u8]) -> u64 {
    let first = name.first().map_or(0, u8::to_ascii_lowercase);
    1 << ((usize::from(first) ^ name.len() << 1) % 64)
}

/// How many fields of `head` with this `name` stand before `line`.
fn count_before(line: &[u8], name: &[u8], head: &[u8]) -> usize {
    let before = lines(head).skip(1).take_while(|other| other.as_ptr() != line.as_ptr());
    before.filter(|other| begins_with(other, name)).count()
}

/// Whether `line` is a field of this `name`, however spelled.
fn begins_with(line: &[u8], name: &[u8]) -> bool {
    line.get(name.len()) == Some(&b':') && line[..name.len()].eq_ignore_ascii_case(name)
}

/// How many fields of the same name stand before the noted one, and its name.
fn split_note(note: &[u8]) -> (usize, &[u8]) {
    let before = note.iter().take_while(|byte| **byte == b':').count();
    (before, &note[before..])
}

/// How the next head that goes out on a connection is spelled: whoever sends it
/// tells the stream. Used by one thread; `Sync` since hyper wants it to be.
#[derive(Debug, Default)]
pub struct NextHead {
    spelling: Mutex<Option<Spelling>>,
    /// Of what came before, something may still have to be written.
    is_writing: AtomicBool,
}

impl NextHead {
    /// The next head to be written is spelled so.
    pub fn is_spelled(&self, spelling: Option<Spelling>) {
        let spelling = spelling.filter(|_| !self.is_writing.load(Ordering::Relaxed));
        *self.spelling.lock().unwrap_or_else(PoisonError::into_inner) = spelling;
    }

    fn take(&self) -> Option<Spelling> {
        self.spelling.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The writing side of a stream whose heads are respelled. hyper must write to it
/// vectored: then a head begins a write, and no slice holds both it and a body.
#[derive(Debug)]
pub struct Respelled {
    next: Arc<NextHead>,
    /// What is still to be written of a respelled head.
    rest: Bytes,
}

impl Respelled {
    /// Respells what `next` tells of.
    #[must_use]
    pub fn new(next: &Arc<NextHead>) -> Self {
        Self { next: Arc::clone(next), rest: Bytes::new() }
    }

    /// Writes `slices` to `stream`, the head in its spelling.
    ///
    /// # Errors
    ///
    /// Those of `stream`.
    pub fn poll_write<S: AsyncWrite>(
        &mut self,
        stream: Pin<&mut S>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.next.is_writing.store(true, Ordering::Relaxed);
        if let Some(spelling) = self.next.take() {
            let heads = slices.first().map(|slice| &**slice).unwrap_or_default();
            self.rest = spelling.put_back(heads).into();
        }
        if self.rest.is_empty() {
            return stream.poll_write_vectored(cx, slices);
        }
        // Another head may have joined what is left of this one.
        let is_alone = slices.first().is_some_and(|slice| slice.len() == self.rest.len());
        let count = if is_alone { slices.len().min(MAX_PIECES) } else { 1 };
        let mut pieces = [IoSlice::new(&[]); MAX_PIECES];
        pieces[..count].copy_from_slice(&slices[..count]);
        pieces[0] = IoSlice::new(&self.rest);
        let written = ready!(stream.poll_write_vectored(cx, &pieces[..count]))?;
        // An empty rest would keep the memory of the whole.
        self.rest = self.rest.slice(written.min(self.rest.len())..);
        Poll::Ready(Ok(written))
    }

    /// All was given to the stream: hyper flushes it only then.
    pub fn flushing(&self) {
        self.next.is_writing.store(false, Ordering::Relaxed);
    }
}

/// What an upstream's connection and those who send on it tell each other.
#[derive(Debug, Default)]
pub(super) struct Heads {
    request: Arc<NextHead>,
    /// A request is under way.
    answer_is_due: AtomicBool,
    answer: Mutex<Option<Spelling>>,
}

impl Heads {
    /// A request will be sent, spelled so.
    pub(super) fn request(&self, spelling: Option<Spelling>) {
        self.request.is_spelled(spelling);
        self.answer_is_due.store(true, Ordering::Relaxed);
    }

    /// How the answer that has come is spelled.
    pub(super) fn answer(&self) -> Option<Spelling> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn note(&self, head: &[u8]) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = Spelling::of(head);
    }
}

/// An upstream's stream: requests go out as they were spelled, and the spelling
/// of answers is noted.
#[derive(Debug)]
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

    /// Looks for the head of the answer that is due.
    fn look(&mut self, bytes: &[u8]) {
        if self.partial.is_empty()
            && let Some(end) = end_of_head(bytes)
        {
            return self.head_came(&bytes[..end], &bytes[end..]);
        }
        // The last line end may be cut in two.
        let from = self.partial.len().saturating_sub(2);
        self.partial.extend_from_slice(bytes);
        if let Some(end) = end_of_head(&self.partial[from..]).map(|end| from + end) {
            let partial = std::mem::take(&mut self.partial);
            self.head_came(&partial[..end], &partial[end..]);
        } else if self.partial.len() > MAX_PARTIAL {
            self.partial = Vec::new();
            self.heads.answer_is_due.store(false, Ordering::Relaxed);
        }
    }

    fn head_came(&mut self, head: &[u8], rest: &[u8]) {
        if !is_interim(head) {
            self.heads.answer_is_due.store(false, Ordering::Relaxed);
            self.heads.note(head);
        } else if !rest.is_empty() {
            self.look(rest);
        }
    }
}

/// Whether another head follows this one (RFC 9110 §15.2).
fn is_interim(head: &[u8]) -> bool {
    let status = head.splitn(3, |byte| *byte == b' ').nth(1).unwrap_or_default();
    status.first() == Some(&b'1') && status != b"101"
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
        if this.heads.answer_is_due.load(Ordering::Relaxed) {
            this.look(&buf.filled()[before..]);
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
        this.out.poll_write(Pin::new(&mut this.stream), cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.out.flushing();
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

    fn spelled(head: &str) -> Option<Spelling> {
        Spelling::of(head.as_bytes())
    }

    #[test]
    fn only_what_hyper_would_spell_otherwise_is_noted() {
        let check = |fields: &str, noted: Option<&str>| {
            let spelling = spelled(&format!("GET /a:b HTTP/1.1\r\n{fields}\r\n"));
            let text = spelling.map(|it| String::from_utf8(it.0.to_vec()).unwrap());
            assert_eq!(text.as_deref(), noted, "{fields}");
        };
        check("", None);
        check("Host: a:b\r\nAccept-Encoding:gzip\r\nDnt: 1\r\nX-1a: API\r\nX--A: 1\r\n", None);
        check("Host: API.example\r\nETag: b\r\nx-a: 1\r\n_A: 1\r\n", Some("ETag\nx-a\n_A\n"));
        check("host: a\r\nDnt: 1\r\nDNT: 1\r\nDnt: 1\r\ndnt: 1\r\n", Some("host\n:DNT\n:::dnt\n"));
        check("ETag: 1\n", Some("ETag\n"));
    }

    #[test]
    fn names_are_put_back_whatever_their_order() {
        let check = |noted: &str, from: &str, to: &str| {
            let spelling = spelled(&format!("HTTP/1.1 200 OK\r\n{noted}\r\n")).unwrap();
            let put_back = spelling.put_back(from.as_bytes());
            assert_eq!(String::from_utf8(put_back).unwrap(), to);
        };
        check(
            "host: a\r\nETag: 1\r\nX-gone: 1\r\n",
            "HTTP/1.1 200 OK\r\nEtag: ETag: etag\r\nNew: host\r\nHost: Host:\r\n\r\n",
            "HTTP/1.1 200 OK\r\nETag: ETag: etag\r\nNew: host\r\nhost: Host:\r\n\r\n",
        );
        // Values of one name stand together on their way out.
        check(
            "set-cookie: a\r\nB: 1\r\nSet-Cookie: b\r\nSET-COOKIE: c\r\n",
            "X\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nSet-Cookie: c\r\nSet-Cookie: d\r\nB: 1\r\n\r\n",
            "X\r\nset-cookie: a\r\nSet-Cookie: b\r\nSET-COOKIE: c\r\nSet-Cookie: d\r\nB: 1\r\n\r\n",
        );
        check(
            "Dnt: 1\r\nDNT: 2\r\nDnt: 3\r\ndnt: 4\r\n",
            "Dnt: 1\r\nDnt: 2\r\nDnt: 3\r\nDnt: 4\r\nDnt: 5\r\n\r\n",
            "Dnt: 1\r\nDNT: 2\r\nDnt: 3\r\ndnt: 4\r\nDnt: 5\r\n\r\n",
        );
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
        let head = "HTTP/1.1 200 OK\r\nEtag: 1\r\nX-Y: 2\r\n\r\n";
        let body = "Etag: body\r\n";
        for size in 1..head.len() + body.len() {
            let next = Arc::new(NextHead::default());
            next.is_spelled(spelled("HTTP/1.1 200 OK\r\nETag: 1\r\nx-y: 2\r\n\r\n"));
            let mut out = Respelled::new(&next);
            let mut stream = Takes { sizes: [size; 60].into(), taken: Vec::new() };
            let mut done = 0;
            // As hyper does it: what was not taken is offered again.
            while done < head.len() + body.len() {
                let heads = &head.as_bytes()[done.min(head.len())..];
                let bodies = &body.as_bytes()[done.saturating_sub(head.len())..];
                let slices = [IoSlice::new(heads), IoSlice::new(bodies)];
                let slices = if heads.is_empty() { &slices[1..] } else { &slices };
                done +=
                    poll_fn(|cx| out.poll_write(Pin::new(&mut stream), cx, slices)).await.unwrap();
            }
            let taken = String::from_utf8(stream.taken).unwrap();
            assert_eq!(
                taken, "HTTP/1.1 200 OK\r\nETag: 1\r\nx-y: 2\r\n\r\nEtag: body\r\n",
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
            poll_fn(|cx| out.poll_write(Pin::new(&mut stream), cx, &slices)).await.unwrap();
            std::mem::take(&mut stream.taken)
        };
        write(&mut out, "Etag: the end of a body").await;
        next.is_spelled(spelled("\nETag: 1\n"));
        assert_eq!(write(&mut out, "Etag: 1\n").await, b"Etag: 1\n");
        out.flushing();
        next.is_spelled(spelled("\nETag: 1\n"));
        assert_eq!(write(&mut out, "Etag: 1\n").await, b"ETag: 1\n");
    }

    #[tokio::test]
    async fn answers_are_noted_behind_interim_ones_and_in_any_pieces() {
        let text = "HTTP/1.1 100 Continue\r\nlink: a\r\n\r\nHTTP/1.1 200 OK\r\nETag: 1\r\n\r\nx-y: 1\r\n\r\n";
        for size in 1..=text.len() {
            let (mut far, near) = duplex(1000);
            let heads = Arc::new(Heads::default());
            let mut stream = Spelled::new(near, &heads);
            heads.request(None);
            far.write_all(text.as_bytes()).await.unwrap();
            let mut read = 0;
            while read < text.len() {
                let mut piece = vec![0; size];
                read += stream.read(&mut piece).await.unwrap();
            }
            assert_eq!(heads.answer(), spelled("\nETag: 1\r\n"), "{size}");
            assert_eq!(heads.answer(), None);
            assert!(stream.partial.is_empty());
        }
    }
}
