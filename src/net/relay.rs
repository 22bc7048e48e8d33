//! Bytes from one socket to another, both ways.
//!
//! What comes in small pieces is copied, which costs least. Of a flood the bytes
//! never come here: `splice(2)` leads them from socket to socket by a pipe.
//!
//! # Invariants
//!
//! - Buffers and pipes are held only while bytes are in them: a relay that rests
//!   costs two sockets.
//! - A worker has 64 pipes of 256 KiB at most. Where there is none, it is copied.

use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;

use super::buffers::{Buffer, SIZE};

/// How it goes on after some bytes.
enum Flow {
    /// There is nothing more for now, or not much.
    Trickle,
    /// There is more than a buffer takes.
    Flood,
    /// There will be nothing more.
    End,
}

/// Relays both ways until both sides have ended their sending; each end is passed
/// on at once. `ahead` was read from `client` before, and goes out first. `moved`
/// is called whenever bytes have come.
///
/// Returns the bytes to `upstream` and those to `client`. Dropping the future
/// loses what was read and not yet written.
///
/// # Errors
///
/// One of the two is broken.
pub async fn relay(
    client: &mut TcpStream,
    ahead: &[u8],
    upstream: &mut TcpStream,
    moved: &impl Fn(),
) -> io::Result<(u64, u64)> {
    let ((from_client, to_client), (from_upstream, to_upstream)) =
        (client.split(), upstream.split());
    let up = async {
        write_all(to_upstream.as_ref(), ahead).await?;
        Ok(one_way(from_client, to_upstream.as_ref(), moved).await? + ahead.len() as u64)
    };
    tokio::try_join!(up, one_way(from_upstream, to_client.as_ref(), moved))
}

async fn one_way(mut from: ReadHalf<'_>, to: &TcpStream, moved: &impl Fn()) -> io::Result<u64> {
    let (mut total, mut flooded) = (0, false);
    loop {
        let pipe = if flooded {
            from.readable().await?;
            pipes::take()
        } else {
            None
        };
        let (bytes, flow) = match pipe {
            Some(pipe) => pipes::drain(pipe, from.as_ref(), to, moved).await?,
            None => copy(&mut from, to, moved).await?,
        };
        total += bytes;
        match flow {
            Flow::Trickle => flooded = false,
            Flow::Flood => flooded = true,
            Flow::End => break,
        }
    }
    SockRef::from(to).shutdown(Shutdown::Write)?;
    Ok(total)
}

/// Copies what one read brings.
async fn copy(
    from: &mut ReadHalf<'_>,
    to: &TcpStream,
    moved: &impl Fn(),
) -> io::Result<(u64, Flow)> {
    let (buffer, count) = poll_fn(|cx| poll_read(Pin::new(from), cx)).await?;
    if count == 0 {
        return Ok((0, Flow::End));
    }
    moved();
    write_all(to, &buffer[..count]).await?;
    Ok((count as u64, if count == SIZE { Flow::Flood } else { Flow::Trickle }))
}

/// A buffer with what there is, and how much that is. After less than a buffer
/// `poll_read` knows, and `try_read` does not, that another try would be vain.
fn poll_read(
    from: Pin<&mut ReadHalf<'_>>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<(Buffer, usize)>> {
    let mut buffer = Buffer::take();
    let mut read = ReadBuf::new(&mut buffer);
    ready!(from.poll_read(cx, &mut read))?;
    let count = read.filled().len();
    Poll::Ready(Ok((buffer, count)))
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => to.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
mod pipes {
    use std::convert::Infallible;
    use std::io;

    use tokio::net::TcpStream;

    use super::Flow;

    pub(super) fn take() -> Option<Infallible> {
        None
    }

    pub(super) async fn drain(
        none: Infallible,
        _: &TcpStream,
        _: &TcpStream,
        _: &impl Fn(),
    ) -> io::Result<(u64, Flow)> {
        match none {}
    }
}

#[cfg(target_os = "linux")]
mod pipes {
    use std::cell::{Cell, RefCell};
    use std::io::{self, ErrorKind};
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
    use tokio::io::Interest;
    use tokio::net::TcpStream;

    use super::{Flow, SIZE};

    /// Pipes of one worker: two descriptors each, which its clients do without.
    const MOST_PIPES: usize = 64;

    /// Bytes that a pipe takes; 64 KiB by itself.
    const PIPE_SIZE: usize = 256 * 1024;

    /// Bytes that are asked for at once, more than a pipe takes.
    const MOST_AT_ONCE: usize = 1 << 20;

    thread_local! {
        static EMPTY: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
        static OPEN: Cell<usize> = const { Cell::new(0) };
    }

    /// Closed when dropped, with what is in it.
    pub(super) struct Pipe {
        out: OwnedFd,
        into: OwnedFd,
    }

    impl Drop for Pipe {
        fn drop(&mut self) {
            OPEN.set(OPEN.get() - 1);
        }
    }

    /// An empty one.
    pub(super) fn take() -> Option<Pipe> {
        let empty = EMPTY.with_borrow_mut(Vec::pop);
        empty.or_else(|| {
            if OPEN.get() >= MOST_PIPES {
                return None;
            }
            let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
            // A user may have 64 MB of them: then it stays as it is.
            let _ = fcntl_setpipe_size(&into, PIPE_SIZE);
            OPEN.set(OPEN.get() + 1);
            Some(Pipe { out, into })
        })
    }

    /// How many hold bytes.
    #[cfg(test)]
    pub(super) fn used() -> usize {
        OPEN.get() - spare()
    }

    /// How many are there for the next flood.
    #[cfg(test)]
    pub(super) fn spare() -> usize {
        EMPTY.with_borrow(Vec::len)
    }

    /// Moves what there is.
    pub(super) async fn drain(
        pipe: Pipe,
        from: &TcpStream,
        to: &TcpStream,
        moved: &impl Fn(),
    ) -> io::Result<(u64, Flow)> {
        let mut total = 0;
        let flow = loop {
            match splice_from(from, &pipe) {
                Ok(0) => break Flow::End,
                Ok(count) => {
                    moved();
                    empty(&pipe, count, to).await?;
                    total += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    break if total < SIZE as u64 { Flow::Trickle } else { Flow::Flood };
                }
                Err(error) => return Err(error),
            }
            tokio::task::consume_budget().await;
        };
        EMPTY.with_borrow_mut(|empty| empty.push(pipe));
        Ok((total, flow))
    }

    fn splice_from(from: &TcpStream, pipe: &Pipe) -> io::Result<usize> {
        from.try_io(Interest::READABLE, || splice_all(from, &pipe.into, MOST_AT_ONCE))
    }

    async fn empty(pipe: &Pipe, mut left: usize, to: &TcpStream) -> io::Result<()> {
        while left > 0 {
            match to.try_io(Interest::WRITABLE, || splice_all(&pipe.out, to, left)) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => left -= count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => to.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn splice_all(from: impl AsFd, to: impl AsFd, most: usize) -> io::Result<usize> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        Ok(splice(from, None, to, None, most, flags)?)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// More than sockets, buffers and pipes take together.
    const FLOOD: usize = 16 << 20;

    /// Two ends of a connection.
    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap());
        let (near, accepted) = tokio::join!(near, listener.accept());
        (near.unwrap(), accepted.unwrap().0)
    }

    fn flood(seed: u8) -> Vec<u8> {
        let byte = |number: usize| number.wrapping_mul(31).to_le_bytes()[0] ^ seed;
        (0..FLOOD).map(byte).collect()
    }

    async fn speak(mut stream: TcpStream, bytes: Vec<u8>) -> Vec<u8> {
        let (mut read, mut write) = stream.split();
        let mut came = Vec::new();
        let say = async {
            write.write_all(&bytes).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let ((), heard) = tokio::join!(say, read.read_to_end(&mut came));
        heard.unwrap();
        came
    }

    #[tokio::test]
    async fn floods_both_ways_come_whole_and_nothing_is_held_afterwards() {
        let ((client, mut here), (mut there, upstream)) = (pair().await, pair().await);
        let calls = std::cell::Cell::new(0);
        let moved = || calls.set(calls.get() + 1);
        let (ahead, up, down) = (b"ahead".to_vec(), flood(1), flood(2));
        let (client, upstream, relayed) = tokio::join!(
            speak(client, up.clone()),
            speak(upstream, down.clone()),
            relay(&mut here, &ahead, &mut there, &moved),
        );
        assert!(client == down && upstream == [ahead, up].concat());
        assert_eq!(relayed.unwrap(), (FLOOD as u64 + 5, FLOOD as u64));
        assert!(calls.get() > 2);
        #[cfg(target_os = "linux")]
        assert!(pipes::used() == 0 && pipes::spare() > 0, "the floods went by pipes");
    }

    #[tokio::test]
    async fn what_is_small_goes_at_once_and_one_end_alone_ends_one_way() {
        let ((mut client, mut here), (mut there, mut upstream)) = (pair().await, pair().await);
        let talk = async {
            let mut answer = [0; 4];
            client.write_all(b"ping").await.unwrap();
            upstream.read_exact(&mut answer).await.unwrap();
            client.shutdown().await.unwrap();
            assert_eq!(upstream.read(&mut [0]).await.unwrap(), 0);
            upstream.write_all(b"pong").await.unwrap();
            client.read_exact(&mut answer).await.unwrap();
            upstream.shutdown().await.unwrap();
            assert_eq!((&answer, client.read(&mut [0]).await.unwrap()), (b"pong", 0));
        };
        let (relayed, ()) = tokio::join!(relay(&mut here, b"", &mut there, &|| ()), talk);
        assert_eq!(relayed.unwrap(), (4, 4));
    }

    /// The bytes that nobody takes any more go with their pipe.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn an_end_that_is_reset_ends_the_relay_and_its_pipe() {
        let ((mut client, here), (there, mut upstream)) = (pair().await, pair().await);
        let pour = async {
            let (bytes, mut taken) = (vec![7; 64 << 10], vec![0; 1 << 10]);
            // Where it was copied last, room has to come before a pipe is used.
            while pipes::used() == 0 {
                tokio::select! {
                    written = upstream.write_all(&bytes) => written.unwrap(),
                    read = client.read(&mut taken) => drop(read.unwrap()),
                }
            }
            client.set_zero_linger().unwrap();
            drop(client);
            while upstream.write_all(&bytes).await.is_ok() {}
        };
        let relayed = async {
            let (mut here, mut there) = (here, there);
            relay(&mut here, b"", &mut there, &|| ()).await
        };
        let (relayed, ()) = tokio::join!(relayed, pour);
        relayed.unwrap_err();
        assert_eq!((pipes::used(), pipes::spare()), (0, 0));
    }
}
