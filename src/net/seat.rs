//! Who is in one of an origin's places, and how far the client keeps up.
//!
//! A request needs its place for as long as the exchange lasts, and that may be
//! up to the client: it gives its body as it likes, and takes the answer as it
//! likes. Where others wait, one that keeps nobody's pace gives its place away.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::metrics::{Limit, Shard};

/// Bytes a second that a client is expected to give or take.
const LEAST_RATE: u32 = 4 * 1024;

/// How far behind that a client may fall before it counts as slow.
const PATIENCE: Duration = Duration::from_secs(10);

/// How far a client is behind the least rate.
#[derive(Default)]
struct Pace {
    /// Since when the exchange waits for the client; `None`: it does not.
    waiting_since: Cell<Option<Instant>>,
    behind: Cell<Duration>,
}

impl Pace {
    /// The exchange waits for the client now, if it did not before.
    fn clients_turn(&self) {
        if self.waiting_since.get().is_none() {
            self.waiting_since.set(Some(Instant::now()));
        }
    }

    /// The client gave or took `bytes`. What it does in advance is no credit.
    fn moved(&self, bytes: usize) {
        self.behind.set(self.behind());
        self.waiting_since.set(None);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let due = Duration::from_secs(1) * bytes / LEAST_RATE;
        self.behind.set(self.behind.get().saturating_sub(due));
    }

    fn behind(&self) -> Duration {
        let waiting = self.waiting_since.get().map(|since| since.elapsed()).unwrap_or_default();
        self.behind.get() + waiting
    }
}

/// One place and the exchange that is in it.
pub(super) struct Seat {
    pace: Pace,
    /// The request's body is not out.
    sending: Cell<bool>,
    connection: RefCell<Option<AbortHandle>>,
    /// `None`: it was given away.
    taken: RefCell<Option<Taken>>,
    slow: Rc<Slow>,
    /// `slow` knows it.
    listed: Cell<bool>,
}

/// A place that is in use, until it is dropped.
pub(super) struct Taken {
    shard: Arc<Shard>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Taken {
    pub(super) fn new(shard: Arc<Shard>, permit: Option<OwnedSemaphorePermit>) -> Self {
        shard.upstream_active(1);
        Self { shard, _permit: permit }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.shard.upstream_active(-1);
    }
}

impl Seat {
    pub(super) fn new(taken: Taken, slow: &Rc<Slow>) -> Rc<Self> {
        Rc::new(Self {
            pace: Pace::default(),
            sending: Cell::new(false),
            connection: RefCell::default(),
            taken: RefCell::new(Some(taken)),
            slow: Rc::clone(slow),
            listed: Cell::new(false),
        })
    }

    /// The exchange uses this connection, which ends when the place is given away.
    pub(super) fn uses(&self, connection: AbortHandle) {
        *self.connection.borrow_mut() = Some(connection);
    }

    /// Whether the request's body is still being sent.
    pub(super) fn is_sending(&self) -> bool {
        self.sending.get()
    }

    /// Whether the place was given away, and the connection ended.
    pub(super) fn is_given_away(&self) -> bool {
        self.taken.borrow().is_none()
    }

    /// The exchange waits for the client.
    pub(super) fn clients_turn(self: &Rc<Self>) {
        self.pace.clients_turn();
        if !self.listed.replace(true) {
            self.slow.list(self);
        }
    }

    /// The client gave or took `bytes`.
    pub(super) fn moved(&self, bytes: usize) {
        self.pace.moved(bytes);
    }

    fn give_away(&self) -> Limit {
        if let Some(connection) = self.connection.take() {
            connection.abort();
        }
        self.taken.take();
        if self.sending.get() { Limit::BodyStall } else { Limit::AnswerStall }
    }
}

/// Exchanges of one origin that have waited for their clients.
#[derive(Default)]
pub(super) struct Slow(RefCell<Vec<Weak<Seat>>>);

impl Slow {
    fn list(&self, seat: &Rc<Seat>) {
        let mut seats = self.0.borrow_mut();
        if seats.len() == seats.capacity() {
            seats.retain(|seat| seat.strong_count() > 0);
        }
        seats.push(Rc::downgrade(seat));
    }

    /// Ends the exchange whose client is the slowest, if one is too slow, and says
    /// what it ran into.
    pub(super) fn end_slowest(&self) -> Option<Limit> {
        let seats = self.0.borrow();
        let seats = seats.iter().filter_map(Weak::upgrade);
        let behind = seats.filter(|seat| !seat.is_given_away());
        let slowest = behind.max_by_key(|seat| seat.pace.behind())?;
        (slowest.pace.behind() > PATIENCE).then(|| slowest.give_away())
    }
}

/// A request's body, of which its seat knows how it goes out.
pub(super) struct Seated<B> {
    body: B,
    seat: Option<Rc<Seat>>,
}

impl<B: Body> Seated<B> {
    pub(super) fn new(body: B, seat: &Rc<Seat>) -> Self {
        let seat = (!body.is_end_stream()).then(|| Rc::clone(seat));
        if let Some(seat) = &seat {
            seat.sending.set(true);
        }
        Self { body, seat }
    }
}

impl<B> Drop for Seated<B> {
    fn drop(&mut self) {
        // hyper drops it when it is out, and when its connection has ended.
        if let Some(seat) = &self.seat {
            seat.sending.set(false);
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Seated<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.get_mut();
        let frame = Pin::new(&mut this.body).poll_frame(cx);
        if let Some(seat) = &this.seat {
            match &frame {
                Poll::Pending => seat.clients_turn(),
                Poll::Ready(Some(Ok(frame))) => seat.moved(data_length(frame)),
                Poll::Ready(_) => {}
            }
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Bytes of data in a frame.
pub(super) fn data_length(frame: &Frame<Bytes>) -> usize {
    frame.data_ref().map_or(0, Bytes::len)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A seat that nobody waits for yet.
    fn seat(slow: &Rc<Slow>) -> Rc<Seat> {
        let shard = Arc::default();
        Seat::new(Taken::new(shard, None), slow)
    }

    #[tokio::test(start_paused = true)]
    async fn client_that_keeps_the_rate_is_never_behind() {
        let slow = Rc::default();
        let seat = seat(&slow);
        for _ in 0..100 {
            seat.clients_turn();
            advance(SECOND).await;
            seat.moved(4096);
            assert_eq!(seat.pace.behind(), Duration::ZERO);
        }
        assert_eq!(slow.end_slowest(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn upstream_that_is_slow_is_not_the_clients_fault() {
        let slow = Rc::default();
        let seat = seat(&slow);
        seat.clients_turn();
        seat.moved(1);
        advance(SECOND * 100).await;
        assert_eq!(slow.end_slowest(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_came_fast_at_first_is_no_credit() {
        let slow = Rc::default();
        let seat = seat(&slow);
        seat.moved(100_000_000);
        seat.clients_turn();
        advance(SECOND * 11).await;
        assert_eq!(slow.end_slowest(), Some(Limit::AnswerStall));
    }

    #[tokio::test(start_paused = true)]
    async fn slowest_ends_first_and_once() {
        let slow = Rc::default();
        let seats = [seat(&slow), seat(&slow), seat(&slow)];
        for _ in 0..20 {
            for (seat, bytes) in seats.iter().zip([1000, 1, 4000]) {
                seat.clients_turn();
                advance(SECOND / 3).await;
                seat.moved(bytes / 3);
            }
        }
        assert_eq!(slow.end_slowest(), None, "4 KiB a second is enough of each");
        for (seat, wait) in seats.iter().zip([11, 12, 0]) {
            seat.clients_turn();
            advance(SECOND * wait).await;
        }
        let ended = || seats.iter().map(|seat| seat.is_given_away()).collect::<Vec<_>>();
        slow.end_slowest().unwrap();
        assert_eq!(ended(), [true, false, false], "its turn came first");
        slow.end_slowest().unwrap();
        assert_eq!(ended(), [true, true, false]);
        assert_eq!(slow.end_slowest(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn exchanges_that_have_ended_are_forgotten() {
        let slow = Rc::<Slow>::default();
        for _ in 0..1000 {
            seat(&slow).clients_turn();
        }
        assert!(slow.0.borrow().len() < 10);
        advance(SECOND * 100).await;
        assert_eq!(slow.end_slowest(), None);
    }
}
