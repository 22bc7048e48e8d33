//! Large reads beneath TLS.
//!
//! rustls asks for 4 KiB at a time; each would be a system call. Here one read
//! takes what there is, up to [`SIZE`] bytes, and rustls is given of that.
//!
//! # Invariants
//!
//! - A stream has a buffer only while bytes are in it: one that rests holds none.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::buffers::{Buffer, SIZE};

/// A stream that is read in large pieces, whatever is asked for.
#[derive(Debug)]
pub struct ReadAhead<S> {
    stream: S,
    rest: Option<Rest>,
}

/// What was read and not yet given.
#[derive(Debug)]
struct Rest {
    buffer: Buffer,
    from: usize,
    to: usize,
}

impl<S> ReadAhead<S> {
    /// Reads `stream`.
    pub fn new(stream: S) -> Self {
        Self { stream, rest: None }
    }
}

impl<S: AsyncRead + Unpin> ReadAhead<S> {
    /// Reads into a buffer, which stays only if more comes than `out` can take.
    fn poll_chunk(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut buffer = Buffer::take();
        let mut read = ReadBuf::new(&mut buffer);
        let outcome = Pin::new(&mut self.stream).poll_read(cx, &mut read);
        let to = read.filled().len();
        let from = to.min(out.remaining());
        out.put_slice(&buffer[..from]);
        if from < to {
            self.rest = Some(Rest { buffer, from, to });
        }
        outcome
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Some(rest) = &mut this.rest else {
            if out.remaining() >= SIZE {
                return Pin::new(&mut this.stream).poll_read(cx, out);
            }
            return this.poll_chunk(cx, out);
        };
        let given = (rest.to - rest.from).min(out.remaining());
        out.put_slice(&rest.buffer[rest.from..][..given]);
        rest.from += given;
        if rest.from == rest.to {
            this.rest = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    #[tokio::test]
    async fn all_bytes_come_in_order_in_pieces_of_any_size() {
        let (mut far, near) = duplex(100_000);
        let sent: Vec<u8> = (0..90_000_u32).map(|number| number.to_le_bytes()[0] ^ 7).collect();
        far.write_all(&sent).await.unwrap();
        drop(far);
        let mut reader = ReadAhead::new(near);
        let mut came = Vec::new();
        for size in [1, 4096, 40_000, 7, SIZE].into_iter().cycle() {
            let mut piece = vec![0; size];
            let count = reader.read(&mut piece).await.unwrap();
            if count == 0 {
                break;
            }
            came.extend_from_slice(&piece[..count]);
        }
        assert!(came == sent);
    }

    #[tokio::test]
    async fn a_stream_that_rests_holds_no_buffer() {
        let (mut far, near) = duplex(1000);
        let mut reader = ReadAhead::new(near);
        far.write_all(b"0123456789").await.unwrap();
        let mut piece = [0; 4];
        for (expected, holds) in [(&b"0123"[..], true), (b"4567", true), (b"89", false)] {
            let count = reader.read(&mut piece).await.unwrap();
            assert_eq!((&piece[..count], reader.rest.is_some()), (expected, holds));
        }
        assert!(futures_util::FutureExt::now_or_never(reader.read(&mut piece)).is_none());
        assert!(reader.rest.is_none());
    }
}
