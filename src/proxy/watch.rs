//! How long a client's connection may stay as it is.
//!
//! # Invariants
//!
//! - A connection that speaks HTTP is in one phase at a time, and each phase
//!   has its bound; while a request is served, who serves it keeps the time.
//! - One look a second finds the connections beyond their bound. Neither a
//!   connection nor a request has a timer of its own.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::metrics::Limit;

/// Longest rest between two requests.
const REST_LIMIT: Duration = Duration::from_secs(90);

/// Longest time from the first byte of a head to its last.
const HEAD_LIMIT: Duration = Duration::from_secs(10);

/// Longest time in which a client takes nothing of an answer that is there. The
/// system says that something was taken only when a third of its buffer is
/// free again, megabytes perhaps, so a slow reader must have a lot of time.
const UNREAD_LIMIT: Duration = Duration::from_mins(10);

/// A moment that never comes.
const NEVER: u64 = u64::MAX;

/// What a connection waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    /// A request.
    Rest,
    /// The rest of a head.
    Head,
    /// The rest of a head for which there is no memory.
    CrowdedHead,
    /// An answer's head.
    Served,
    /// The rest of an answer: the upstream gives none, or the client takes none.
    Answer,
}

impl Phase {
    const ALL: [Self; 5] = [Self::Rest, Self::Head, Self::CrowdedHead, Self::Served, Self::Answer];

    /// How long a client may take for it.
    fn limit_of_client(self) -> Option<Duration> {
        match self {
            Self::Rest => Some(REST_LIMIT),
            Self::Head => Some(HEAD_LIMIT),
            Self::CrowdedHead => Some(Duration::ZERO),
            Self::Served | Self::Answer => None,
        }
    }

    /// What a connection ran into that was ended in this phase.
    fn limit(self) -> Limit {
        match self {
            Self::Rest | Self::Served => Limit::ClientIdle,
            Self::Head => Limit::HeadTime,
            Self::CrowdedHead => Limit::HeadMemory,
            Self::Answer => Limit::AnswerStall,
        }
    }
}

/// One connection's phase. Used by one thread; atomics since hyper wants it
/// to be `Send`.
pub(super) struct Watch {
    base: Instant,
    phase: AtomicU8,
    /// Milliseconds after `base` at which the phase lasts too long.
    due: AtomicU64,
    /// Milliseconds that an answer may stand still.
    patience: AtomicU64,
    /// The client does not take what there is of the answer.
    unread: AtomicBool,
    /// A part of a head has come.
    half_head: AtomicBool,
    /// No head has come whole.
    newcomer: AtomicBool,
    /// Only the connection's end tells the client that it has the whole answer.
    ends_by_closing: AtomicBool,
    greeted: Notify,
    expired: Notify,
}

impl Watch {
    fn new() -> Self {
        let watch = Self {
            base: Instant::now(),
            phase: AtomicU8::new(Phase::Rest as u8),
            due: AtomicU64::new(NEVER),
            patience: AtomicU64::new(NEVER),
            unread: AtomicBool::new(false),
            half_head: AtomicBool::new(false),
            newcomer: AtomicBool::new(true),
            ends_by_closing: AtomicBool::new(false),
            greeted: Notify::new(),
            expired: Notify::new(),
        };
        watch.enter(Phase::Rest);
        watch
    }

    /// A head has begun, and its end has not come with it.
    pub(super) fn head_begun(&self) {
        self.half_head.store(true, Ordering::Relaxed);
        if self.phase() == Phase::Rest {
            self.go_on_to(Phase::Head);
        }
    }

    /// There is no memory for the rest of the head.
    pub(super) fn head_is_crowded_out(&self) {
        self.enter(Phase::CrowdedHead);
        self.expired.notify_one();
    }

    /// A head was parsed: an answer is being made.
    pub(super) fn head_parsed(&self) {
        self.half_head.store(false, Ordering::Relaxed);
        self.enter(Phase::Served);
        if self.newcomer.swap(false, Ordering::Relaxed) {
            self.greeted.notify_one();
        }
    }

    /// An answer goes out, until what is returned is dropped; the upstream may be
    /// silent for `patience`. `ends_by_closing`: only the connection's end tells
    /// the client that it has the whole.
    pub(super) fn answer_begun(
        self: &Arc<Self>,
        patience: Duration,
        ends_by_closing: bool,
    ) -> Answering {
        self.ends_by_closing.store(ends_by_closing, Ordering::Relaxed);
        self.patience.store(millis(patience), Ordering::Relaxed);
        self.unread.store(false, Ordering::Relaxed);
        self.enter(Phase::Answer);
        self.due_in(millis(patience));
        Answering(Arc::clone(self))
    }

    /// The client took some bytes. Amid an answer it is the upstream's turn.
    pub(super) fn taken(&self) {
        let was_unread = self.unread.swap(false, Ordering::Relaxed);
        match self.phase() {
            Phase::Answer => self.due_in(self.patience.load(Ordering::Relaxed)),
            phase if was_unread => self.enter(phase),
            _ => {}
        }
    }

    /// The client took all that was there for it.
    pub(super) fn all_taken(&self) {
        if self.unread.load(Ordering::Relaxed) {
            self.taken();
        }
    }

    /// The client takes nothing for now; it is the client's turn. What is left of
    /// an answer may lie here when the upstream has given all of it.
    pub(super) fn not_taken(&self) {
        let waits = matches!(self.phase(), Phase::Answer | Phase::Rest | Phase::Head);
        if waits && !self.unread.swap(true, Ordering::Relaxed) {
            self.due_in(millis(UNREAD_LIMIT));
        }
    }

    /// The upstream has given all of the answer, or it broke off.
    fn answer_over(&self) {
        let half_head = self.half_head.load(Ordering::Relaxed);
        self.go_on_to(if half_head { Phase::Head } else { Phase::Rest });
    }

    /// The connection is being ended in order.
    pub(super) fn closing(&self) {
        self.ends_by_closing.store(false, Ordering::Relaxed);
    }

    /// Whether an end of the connection would look like the answer's.
    pub(super) fn ends_by_closing(&self) -> bool {
        self.ends_by_closing.load(Ordering::Relaxed)
    }

    /// Ends when a head has been parsed, at once where that was before. To be
    /// asked once.
    pub(super) async fn first_head(&self) {
        self.greeted.notified().await;
    }

    /// Ends when the connection is beyond a bound, and says which.
    pub(super) async fn expired(&self) -> Limit {
        loop {
            self.expired.notified().await;
            // Something may have come since.
            if self.is_overdue() {
                let unread = self.unread.load(Ordering::Relaxed);
                let phase = if unread { Phase::Answer } else { self.phase() };
                return phase.limit();
            }
        }
    }

    /// Whose turn it is.
    pub(super) fn waits_for(&self) -> &'static str {
        let upstream = self.phase() == Phase::Answer && !self.unread.load(Ordering::Relaxed);
        if upstream { "upstream" } else { "client" }
    }

    fn is_overdue(&self) -> bool {
        self.due.load(Ordering::Relaxed) <= self.now()
    }

    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
        self.due_in(phase.limit_of_client().map_or(NEVER, millis));
    }

    /// Enters `phase`, whose time begins when the client has taken what there is.
    fn go_on_to(&self, phase: Phase) {
        if self.unread.load(Ordering::Relaxed) {
            self.phase.store(phase as u8, Ordering::Relaxed);
        } else {
            self.enter(phase);
        }
    }

    fn due_in(&self, millis: u64) {
        // Most phases have no bound: the clock is not asked for them.
        let due = if millis == NEVER { NEVER } else { self.now().saturating_add(millis) };
        self.due.store(due, Ordering::Relaxed);
    }

    fn phase(&self) -> Phase {
        Phase::ALL[usize::from(self.phase.load(Ordering::Relaxed))]
    }

    fn now(&self) -> u64 {
        millis(self.base.elapsed())
    }
}

/// An answer on its way to the client; it is over when this is dropped.
pub(super) struct Answering(Arc<Watch>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.answer_over();
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(NEVER)
}

/// The connections of one worker that speak HTTP.
#[derive(Default)]
pub(super) struct Watches(RefCell<Vec<Weak<Watch>>>);

impl Watches {
    /// One more connection, at rest.
    pub(super) fn open(&self) -> Arc<Watch> {
        let watch = Arc::new(Watch::new());
        self.0.borrow_mut().push(Arc::downgrade(&watch));
        watch
    }

    /// Tells the connections that are beyond their bound, and forgets those
    /// that have ended.
    pub(super) fn look(&self) {
        self.0.borrow_mut().retain(|watch| {
            let Some(watch) = watch.upgrade() else {
                return false;
            };
            if watch.is_overdue() {
                watch.expired.notify_one();
            }
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// What the connection ran into after `time` in which nothing happened.
    async fn after(watches: &Watches, watch: &Watch, time: Duration) -> Option<Limit> {
        advance(time).await;
        watches.look();
        watch.expired().now_or_never()
    }

    #[tokio::test(start_paused = true)]
    async fn each_phase_has_its_bound() {
        let watches = Watches::default();
        let watch = watches.open();
        assert_eq!(after(&watches, &watch, SECOND * 89).await, None);
        watch.head_begun();
        assert_eq!(after(&watches, &watch, SECOND * 9).await, None);
        assert_eq!(after(&watches, &watch, SECOND).await, Some(Limit::HeadTime));
        watch.head_parsed();
        assert_eq!(after(&watches, &watch, REST_LIMIT * 10).await, None);
        let answer = watch.answer_begun(SECOND * 5, false);
        assert_eq!(after(&watches, &watch, SECOND * 4).await, None);
        watch.taken();
        assert_eq!(watch.waits_for(), "upstream");
        assert_eq!(after(&watches, &watch, SECOND * 4).await, None);
        watch.not_taken();
        assert_eq!(watch.waits_for(), "client");
        assert_eq!(after(&watches, &watch, SECOND * 590).await, None);
        watch.not_taken();
        assert_eq!(after(&watches, &watch, SECOND * 10).await, Some(Limit::AnswerStall));
        watch.taken();
        assert_eq!(after(&watches, &watch, SECOND * 5).await, Some(Limit::AnswerStall));
        drop(answer);
        assert_eq!(after(&watches, &watch, REST_LIMIT).await, Some(Limit::ClientIdle));
    }

    #[tokio::test(start_paused = true)]
    async fn head_that_began_amid_an_answer_has_its_time_from_the_answers_end() {
        let watches = Watches::default();
        let watch = watches.open();
        watch.head_parsed();
        let answer = watch.answer_begun(SECOND * 60, false);
        watch.head_begun();
        assert_eq!(after(&watches, &watch, HEAD_LIMIT * 2).await, None);
        drop(answer);
        assert_eq!(after(&watches, &watch, HEAD_LIMIT).await, Some(Limit::HeadTime));
    }

    #[tokio::test(start_paused = true)]
    async fn end_of_an_answer_that_is_not_read_has_an_answers_time() {
        let watches = Watches::default();
        let watch = watches.open();
        watch.head_parsed();
        let answer = watch.answer_begun(SECOND * 60, false);
        watch.not_taken();
        drop(answer);
        assert_eq!(after(&watches, &watch, SECOND * 590).await, None);
        watch.head_begun();
        assert_eq!(after(&watches, &watch, SECOND * 9).await, None);
        watch.all_taken();
        assert_eq!(after(&watches, &watch, SECOND * 9).await, None);
        assert_eq!(after(&watches, &watch, SECOND).await, Some(Limit::HeadTime));
        // Also where it turns out only after the upstream's part is over.
        let watch = watches.open();
        watch.head_parsed();
        drop(watch.answer_begun(SECOND * 60, false));
        watch.not_taken();
        assert_eq!(after(&watches, &watch, SECOND * 599).await, None);
        assert_eq!(after(&watches, &watch, SECOND).await, Some(Limit::AnswerStall));
        watch.all_taken();
        assert_eq!(after(&watches, &watch, SECOND * 90).await, Some(Limit::ClientIdle));
    }

    #[tokio::test]
    async fn crowded_head_ends_at_once() {
        let watch = Watch::new();
        watch.head_begun();
        watch.head_is_crowded_out();
        assert_eq!(watch.expired().await, Limit::HeadMemory);
    }

    #[test]
    fn connections_that_have_ended_are_forgotten() {
        let watches = Watches::default();
        let open = watches.open();
        drop(watches.open());
        watches.look();
        assert_eq!(watches.0.borrow().len(), 1);
        drop(open);
        watches.look();
        assert!(watches.0.borrow().is_empty());
    }
}
