//! What hyper does not tell of a head.
//!
//! hyper cuts a fragment off the target, and drops `Content-Length` beside
//! `Transfer-Encoding`, before the service sees the head. Both are signs of a
//! client that is broken or up to something, so both are refused here: the
//! bytes are looked at on their way to hyper.
//!
//! A head that comes in one read with an earlier request (pipelining) is not
//! looked at. It is read as hyper reads it, which is safe, too.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use memchr::memmem;
use tokio::io::AsyncRead;
use tokio_util::io::InspectReader;

use super::error::ProxyError;

/// The largest head that is looked at; the gate refuses larger ones.
const MAX_HEAD: usize = 64 * 1024;

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
    partial: Mutex<Vec<u8>>,
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

    fn look(&self, bytes: &[u8]) {
        if self.busy.load(Ordering::Relaxed) || bytes.is_empty() {
            return;
        }
        let mut partial = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        if partial.is_empty()
            && let Some(end) = memmem::find(bytes, b"\r\n\r\n")
        {
            return self.judge(&bytes[..end]);
        }
        partial.extend_from_slice(bytes);
        if let Some(end) = memmem::find(&partial, b"\r\n\r\n") {
            self.judge(&partial[..end]);
        }
        if self.busy.load(Ordering::Relaxed) || partial.len() > MAX_HEAD {
            *partial = Vec::new();
            self.busy.store(true, Ordering::Relaxed);
        }
    }

    fn judge(&self, head: &[u8]) {
        self.busy.store(true, Ordering::Relaxed);
        self.seen.store(oddity(head), Ordering::Relaxed);
    }
}

fn oddity(head: &[u8]) -> u8 {
    let mut lines = head.split(|byte| *byte == b'\n');
    let request_line = lines.next().unwrap_or_default();
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
    fn each_head_is_looked_at_in_turn() {
        let watch = HeadWatch::default();
        watch.look(b"GET /a HTTP/1.1\r\n\r\n");
        assert!(watch.take().is_ok());
        watch.await_head();
        watch.look(b"GET /a#b HTTP/1.1\r\n\r\n");
        assert!(watch.take().is_err());
    }
}
