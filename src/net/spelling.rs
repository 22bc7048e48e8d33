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
//! - Only bytes of heads are respelled: a head before which something is still
//!   being written goes out in Title-Case.
//! - A head is noted before hyper has refused it, so what that costs has a bound.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::head::{end_of_head, lines};

/// Longest head of an answer whose spelling is kept if it comes in pieces.
const MAX_PARTIAL: usize = 64 * 1024;

/// Fields of a head whose spelling is kept: no less than hyper takes.
const MOST_FIELDS: u16 = 256;

/// Pieces of a body that may go out with a respelled head in one write.
const MAX_PIECES: usize = 8;

/// The names in a head that are not in Title-Case.
///
/// Of each: how many fields of the same name, however spelled, stand before it,
/// in one byte; its length, in two; and the name.
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

    fn notes(&self) -> impl Iterator<Item = (u8, &[u8])> {
        let mut rest = &*self.0;
        std::iter::from_fn(move || {
            let ([before, long, short], notes) = rest.split_first_chunk()?;
            let (name, notes) = notes.split_at(u16::from_be_bytes([*long, *short]).into());
            rest = notes;
            Some((*before, name))
        })
    }

    /// `heads` with the names that were noted.
    fn put_back(&self, heads: &[u8]) -> Vec<u8> {
        let mut noted: Vec<_> = self.notes().collect();
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
    count: u16,
    noted: Vec<u8>,
    /// Of all that were seen: see [`kind`].
    kinds: u64,
}

impl<'a> Names<'a> {
    /// Those of `head`, none of which was seen.
    #[must_use]
    pub fn of(head: &'a [u8]) -> Self {
        Self { head, count: 0, noted: Vec::new(), kinds: 0 }
    }

    /// Looks at the next line of the head behind the first.
    pub fn see(&mut self, line: &'a [u8]) {
        if line.trim_ascii_end().is_empty() {
            return;
        }
        if self.count == MOST_FIELDS {
            // hyper will refuse it.
            return self.noted.clear();
        }
        let (name, is_odd) = name(line);
        let kind = kind(name);
        if is_odd {
            // Few have a double, and fewer a different one.
            let before = if self.kinds & kind == 0 { 0 } else { self.count_before(line, name) };
            self.note(before, name);
        }
        self.kinds |= kind;
        self.count += 1;
    }

    fn note(&mut self, before: u8, name: &[u8]) {
        let Ok(length) = u16::try_from(name.len()) else {
            return;
        };
        self.noted.push(before);
        self.noted.extend_from_slice(&length.to_be_bytes());
        self.noted.extend_from_slice(name);
    }

    /// How many fields of this `name` stand before `line`.
    fn count_before(&self, line: &[u8], name: &[u8]) -> u8 {
        let seen = lines(self.head).skip(1).take(self.count.into());
        let same = seen.take_while(|seen| !std::ptr::eq(*seen, line));
        same.fold(0, |count, seen| count + u8::from(begins_with(seen, name)))
    }

    /// How they are spelled; `None`: in Title-Case throughout.
    #[must_use]
    pub fn spelling(self) -> Option<Spelling> {
        (!self.noted.is_empty()).then(|| Spelling(self.noted.into()))
    }
}

/// The name that `line` begins with, and whether hyper would spell it otherwise.
fn name(line: &[u8]) -> (&[u8], bool) {
    let (mut is_odd, mut begins) = (false, true);
    for (at, &byte) in line.iter().enumerate() {
        if byte == b':' {
            return (&line[..at], is_odd);
        }
        // The letter's case is told by one bit.
        is_odd |= (byte & 0x20 != 0) == begins && byte.is_ascii_alphabetic();
        begins = byte == b'-';
    }
    (line, false)
}

/// One bit for `name`, the same in each spelling; others may have it, too.
fn kind(name: &[u8]) -> u64 {
    let first = name.first().map_or(0, u8::to_ascii_lowercase);
    1 << ((usize::from(first) ^ name.len() << 1) % 64)
}

/// Whether `line` is a field of this `name`, however spelled.
fn begins_with(line: &[u8], name: &[u8]) -> bool {
    line.get(name.len()) == Some(&b':') && line[..name.len()].eq_ignore_ascii_case(name)
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
    pub fn set_spelling(&self, spelling: Option<Spelling>) {
        self.spelling.set(spelling.filter(|_| !self.is_writing.load(Ordering::Relaxed)));
    }
}

/// The writing side of a stream whose heads are respelled.
///
/// The stream must tell hyper that it writes vectored: then hyper keeps heads in
/// the first slice, without bytes of a body, and begins none while such bytes
/// wait.
#[derive(Debug)]
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
            self.head = spelling.put_back(first);
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
    pub(super) fn await_answer(&self, request: Option<Spelling>) {
        self.request.set_spelling(request);
        self.answer_is_due.store(true, Ordering::Relaxed);
    }

    /// How the answer that has come is spelled.
    pub(super) fn take_answer(&self) -> Option<Spelling> {
        self.answer.take()
    }

    fn answer_came(&self, spelling: Option<Spelling>) {
        self.answer_is_due.store(false, Ordering::Relaxed);
        self.answer.set(spelling);
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
        let mut rest = bytes;
        while !rest.is_empty() && self.heads.answer_is_due.load(Ordering::Relaxed) {
            rest = self.look_at_head(rest);
        }
    }

    /// Looks at the head that begins with `bytes`, or goes on with them; returns
    /// what follows it.
    fn look_at_head<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        if self.partial.is_empty() {
            // Line ends too many before it are no head (RFC 9112 §2.2).
            let blank = bytes.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
            let bytes = &bytes[blank..];
            let Some(end) = end_of_head(bytes) else {
                self.partial.extend_from_slice(bytes);
                return &[];
            };
            self.head_came(&bytes[..end]);
            return &bytes[end..];
        }
        let known = self.partial.len();
        self.partial.extend_from_slice(bytes);
        // The last line end may be cut in two.
        let from = known.saturating_sub(2);
        let Some(end) = end_of_head(&self.partial[from..]).map(|end| from + end) else {
            if self.partial.len() > MAX_PARTIAL {
                self.partial = Vec::new();
                self.heads.answer_came(None);
            }
            return &[];
        };
        let partial = std::mem::take(&mut self.partial);
        self.head_came(&partial[..end]);
        &bytes[end - known..]
    }

    fn head_came(&self, head: &[u8]) {
        if !is_interim(head) {
            self.heads.answer_came(Spelling::of(head));
        }
    }
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
        this.look(&buf.filled()[before..]);
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

    fn spelled(head: &str) -> Option<Spelling> {
        Spelling::of(head.as_bytes())
    }

    #[test]
    fn only_what_hyper_would_spell_otherwise_is_noted() {
        let check = |fields: &str, noted: Option<&str>| {
            let spelling = spelled(&format!("GET /a:b HTTP/1.1\r\n{fields}\r\n"));
            let text = spelling.as_ref().map(|spelling| {
                let note = |(before, name)| format!("{before}{}", String::from_utf8_lossy(name));
                spelling.notes().map(note).collect::<Vec<_>>().join(" ")
            });
            assert_eq!(text.as_deref(), noted);
        };
        check("", None);
        check("Host: a:b\r\nAccept-Encoding:gzip\r\nDnt: 1\r\nX-1a: API\r\nX--A: 1\r\n", None);
        check("Host: API.example\r\nETag: b\r\nx-a: 1\r\n_A: 1\r\n", Some("0ETag 0x-a 0_A"));
        check("host: a\r\nDnt: 1\r\nDNT: 1\r\nDnt: 1\r\ndnt: 1\r\n", Some("0host 1DNT 3dnt"));
        check("ETag: 1\n", Some("0ETag"));
        check(
            &"a:\n".repeat(256),
            Some(&(0..256).map(|i| format!("{i}a")).collect::<Vec<_>>().join(" ")),
        );
        check(&"a:\n".repeat(257), None);
        check(&"a:\n".repeat(2_000_000), None);
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
            poll_fn(|cx| out.poll_write_vectored(Pin::new(&mut stream), cx, &slices))
                .await
                .unwrap();
            std::mem::take(&mut stream.taken)
        };
        write(&mut out, "Etag: the end of a body").await;
        next.set_spelling(spelled("\nETag: 1\n"));
        assert_eq!(write(&mut out, "Etag: 1\n").await, b"Etag: 1\n");
        out.all_written();
        next.set_spelling(spelled("\nETag: 1\n"));
        assert_eq!(write(&mut out, "Etag: 1\n").await, b"ETag: 1\n");
    }

    #[tokio::test]
    async fn bytes_of_another_protocol_do_not_take_the_place_of_a_head() {
        let next = Arc::new(NextHead::default());
        next.set_spelling(spelled("\nETag: 1\n"));
        let mut out = Respelled::new(&next);
        let mut stream = Takes { sizes: [3].into(), taken: Vec::new() };
        let mut write = async |text: &str| {
            let slices = [IoSlice::new(text.as_bytes())];
            poll_fn(|cx| out.poll_write_vectored(Pin::new(&mut stream), cx, &slices)).await
        };
        assert_eq!(write("Etag: 1\n").await.unwrap(), 3);
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
            heads.await_answer(None);
            far.write_all(text.as_bytes()).await.unwrap();
            let mut read = 0;
            while read < text.len() {
                let mut piece = vec![0; size];
                read += stream.read(&mut piece).await.unwrap();
            }
            assert_eq!(heads.take_answer(), spelled("\nETag: 1\r\n"), "{size}");
            assert_eq!(heads.take_answer(), None);
            assert!(stream.partial.is_empty());
        }
    }
}
