//! What hyper does not tell of a head.
//!
//! hyper cuts a fragment off the target, and drops `Content-Length` beside
//! `Transfer-Encoding`, before the service sees the head. Both are signs of a
//! client that is broken or up to something, so both are refused here: the
//! bytes are looked at on their way to hyper.
//!
//! A head that comes in one read with an earlier request (pipelining) is not
//! looked at. It is read as hyper reads it, which is safe, too.
//!
//! The same look tells when a head was begun, so that one that does not end
//! can be given up.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memchr::memmem;
use tokio::io::AsyncRead;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::io::InspectReader;

use super::error::ProxyError;

/// The largest head that is looked at; the gate refuses larger ones.
const MAX_HEAD: usize = 64 * 1024;

/// Longest time from the first byte of a head to its last.
const HEAD_LIMIT: Duration = Duration::from_secs(10);

const PLAIN: u8 = 0;
const FRAGMENT: u8 = 1;
const TWO_LENGTHS: u8 = 2;

/// A client's stream whose heads are looked at.
pub(super) type Inspected<I> = InspectReader<I, Box<dyn FnMut(&[u8]) + Send>>;

/// What was seen of the head that comes next. Used by one thread at a time.
#[derive(Default)]
pub(super) struct HeadWatch {
    /// Inside a message: what is read is no head.
    busy: AtomicBool,
    seen: AtomicU8,
    /// The beginning of a head that comes in several reads.
    partial: Mutex<Partial>,
    begun: Notify,
    /// Told of a head that was parsed, and keeps that until it is asked.
    parsed: Notify,
}

#[derive(Default)]
struct Partial {
    bytes: Vec<u8>,
    since: Option<Instant>,
}

impl HeadWatch {
    /// `stream`, looked at.
    pub(super) fn inspect<I: AsyncRead>(self: &Arc<Self>, stream: I) -> Inspected<I> {
        let watch = Arc::clone(self);
        InspectReader::new(stream, Box::new(move |bytes: &[u8]| watch.look(bytes)))
    }

    /// The head was parsed: says what was odd about it, and looks away until
    /// [`HeadWatch::await_head`].
    pub(super) fn take(&self) -> Result<(), ProxyError> {
        self.busy.store(true, Ordering::Relaxed);
        *self.partial() = Partial::default();
        self.parsed.notify_one();
        match self.seen.swap(PLAIN, Ordering::Relaxed) {
            FRAGMENT => Err(ProxyError::BadRequest("the target has a fragment")),
            TWO_LENGTHS => Err(ProxyError::BadRequest(
                "Content-Length and Transfer-Encoding exclude each other",
            )),
            _ => Ok(()),
        }
    }

    /// The answer is on its way: what comes now is the next head.
    pub(super) fn await_head(&self) {
        self.busy.store(false, Ordering::Relaxed);
    }

    /// Ends when a head has been parsed, at once where that was before. To be
    /// asked once.
    pub(super) async fn first_head(&self) {
        self.parsed.notified().await;
    }

    /// Ends when a head was begun and has not come whole within its time.
    pub(super) async fn overdue(&self) {
        loop {
            self.begun.notified().await;
            sleep(HEAD_LIMIT).await;
            if self.partial().since.is_some_and(|since| since.elapsed() >= HEAD_LIMIT) {
                return;
            }
        }
    }

    fn look(&self, bytes: &[u8]) {
        if self.busy.load(Ordering::Relaxed) || bytes.is_empty() {
            return;
        }
        let mut partial = self.partial();
        if partial.bytes.is_empty() {
            if let Some(end) = end_of_head(bytes) {
                return self.judge(&bytes[..end]);
            }
            if !may_begin_a_head(bytes) {
                return;
            }
            partial.since = Some(Instant::now());
            self.begun.notify_one();
        }
        partial.bytes.extend_from_slice(bytes);
        let end = end_of_head(&partial.bytes);
        if let Some(end) = end {
            self.judge(&partial.bytes[..end]);
        }
        if end.is_some() || partial.bytes.len() > MAX_HEAD {
            self.busy.store(true, Ordering::Relaxed);
            *partial = Partial::default();
        }
    }

    fn partial(&self) -> MutexGuard<'_, Partial> {
        self.partial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn judge(&self, head: &[u8]) {
        self.busy.store(true, Ordering::Relaxed);
        self.seen.store(oddity(head), Ordering::Relaxed);
    }
}

/// Where the fields end; lines may end in a bare LF (RFC 9112 §2.2).
fn end_of_head(bytes: &[u8]) -> Option<usize> {
    memmem::find(bytes, b"\n\r\n").into_iter().chain(memmem::find(bytes, b"\n\n")).min()
}

/// Whether this may be the beginning of a method. The rest of an earlier
/// message's body seldom is.
fn may_begin_a_head(bytes: &[u8]) -> bool {
    let method =
        bytes.iter().take_while(|byte| byte.is_ascii_uppercase() || **byte == b'-').count();
    method == bytes.len() || (method > 0 && bytes[method] == b' ')
}

fn oddity(head: &[u8]) -> u8 {
    let mut lines = head.split(|byte| *byte == b'\n');
    let request_line = lines.next().unwrap_or_default().trim_ascii_end();
    if !request_line.ends_with(b" HTTP/1.1") && !request_line.ends_with(b" HTTP/1.0") {
        return PLAIN; // The rest of something else.
    }
    if memchr::memchr(b'#', request_line).is_some() {
        return FRAGMENT;
    }
    let (mut length, mut coding) = (false, false);
    for line in lines {
        length |= has_name(line, b"content-length:");
        coding |= has_name(line, b"transfer-encoding:");
    }
    if length && coding { TWO_LENGTHS } else { PLAIN }
}

fn has_name(line: &[u8], name: &[u8]) -> bool {
    line.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(reads: &[&str], odd: bool) {
        let watch = HeadWatch::default();
        for read in reads {
            watch.look(read.as_bytes());
        }
        assert_eq!(watch.take().is_err(), odd, "{reads:?}");
    }

    #[test]
    fn odd_heads_are_seen_however_they_are_cut() {
        check(&["GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n"], true);
        check(&["GET /a", "#b HTTP/1.1\r\nHost: x\r\n", "\r\n"], true);
        check(
            &["POST / HTTP/1.1\r\ncontent-LENGTH: 1\r\nTransfer-Encoding: chunked\r\n\r\n"],
            true,
        );
        check(
            &["POST / HTTP/1.1\r\nContent-Len", "gth: 1\r\nTransfer-Encoding: chunked\r\n\r", "\n"],
            true,
        );
    }

    #[test]
    fn usual_heads_and_bodies_are_not_odd() {
        check(&["GET /a HTTP/1.1\r\nHost: x\r\nReferer: http://x/#a\r\n\r\n"], false);
        check(
            &[
                "POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nGET /#a\r\nTransfer-Encoding: a\r\n\r\n",
            ],
            false,
        );
        check(&["POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n", "GET /#a HTTP/1.1\r\n\r\n"], false);
    }

    #[test]
    fn bare_line_feeds_end_lines_too() {
        check(&["GET /a#b HTTP/1.1\nHost: x\n\n"], true);
        check(&["GET /a HTTP/1.1\nContent-Length: 0\n\n"], false);
    }

    #[test]
    fn the_rest_of_a_pipelined_head_is_no_head() {
        check(&["rer: http://x/#frag\r\n\r\n"], false);
        check(&["{\"a\": 1}", "GET /a#b HTTP/1.1\r\n\r\n"], true);
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_head_that_does_not_end_is_overdue() {
        let watch = HeadWatch::default();
        watch.look(b"GET /a HTTP/1.1\r\nHost:");
        watch.look(b" x\r\n\r\n");
        assert!(watch.take().is_ok());
        assert!(tokio::time::timeout(HEAD_LIMIT * 9, watch.overdue()).await.is_err());
        watch.await_head();
        watch.look(b"GET /a HTTP");
        let began = Instant::now();
        watch.overdue().await;
        assert!(began.elapsed() >= HEAD_LIMIT && began.elapsed() < HEAD_LIMIT * 3);
    }

    #[test]
    fn each_head_is_looked_at_in_turn() {
        let watch = HeadWatch::default();
        watch.look(b"GET /a HTTP/1.1\r\n\r\n");
        assert!(watch.take().is_ok());
        watch.await_head();
        watch.look(b"GET /a#b HTTP/1.1\r\n\r\n");
        assert!(watch.take().is_err());
    }
}
