//! Work that many may want at once and that is done once for all of them.
//!
//! # Invariants
//!
//! - At most one task is in flight per [`Coalesce`].
//! - The task belongs to no waiter: one that goes away does not cancel it.
//! - Looking, joining and starting happen under one lock, so nobody starts
//!   a second task because of what was true a moment ago.
//! - A task that panics leaves nobody waiting.

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::lock;

type Slot<T> = Mutex<Option<Task<T>>>;

/// The task in flight.
struct Task<T> {
    outcome: watch::Sender<Option<T>>,
    started: Instant,
}

/// One task at a time, with an outcome that all its waiters share.
pub(super) struct Coalesce<T> {
    handle: Handle,
    slot: Arc<Slot<T>>,
    /// Takes the outcomes that nobody waited for any more.
    unclaimed: Option<mpsc::UnboundedSender<T>>,
}

/// What [`Coalesce::enter`] led to.
pub(super) enum Entered<T, R> {
    /// There was nothing to wait for.
    Settled(R),
    /// A task was in flight already.
    Joined(Flight<T>),
    /// A task was started.
    Started(Flight<T>),
}

/// A share in the outcome of a task.
pub(super) struct Flight<T>(watch::Receiver<Option<T>>);

impl<T: Clone + Send + Sync + 'static> Coalesce<T> {
    /// Tasks run on `handle`; an outcome without a waiter is dropped.
    pub(super) fn new(handle: Handle) -> Self {
        Self { handle, slot: Arc::default(), unclaimed: None }
    }

    /// Tasks run on `handle`; an outcome without a waiter goes to `unclaimed`.
    pub(super) fn keeping(handle: Handle, unclaimed: mpsc::UnboundedSender<T>) -> Self {
        Self { unclaimed: Some(unclaimed), ..Self::new(handle) }
    }

    /// Whether a task is in flight.
    pub(super) fn is_running(&self) -> bool {
        lock(&self.slot).is_some()
    }

    /// How long the task in flight has lasted; `None` without one.
    pub(super) fn running_for(&self) -> Option<Duration> {
        lock(&self.slot).as_ref().map(|task| task.started.elapsed())
    }

    /// Settles by `look`, else joins the task in flight, else starts one.
    ///
    /// `look` is told whether a task is in flight. It and `start` are called
    /// under the lock and must be quick.
    pub(super) fn enter<R, F>(
        &self,
        look: impl FnOnce(bool) -> Option<R>,
        start: impl FnOnce() -> F,
    ) -> Entered<T, R>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut slot = lock(&self.slot);
        if let Some(settled) = look(slot.is_some()) {
            return Entered::Settled(settled);
        }
        if let Some(task) = slot.as_ref() {
            return Entered::Joined(Flight(task.outcome.subscribe()));
        }
        let (sender, receiver) = watch::channel(None);
        let work = start();
        *slot = Some(Task { outcome: sender.clone(), started: Instant::now() });
        // Unlocked before it is spawned: a runtime that is shutting down
        // drops the task at once, and the landing takes the lock.
        drop(slot);
        let landing = Landing { slot: Arc::clone(&self.slot), sender };
        let unclaimed = self.unclaimed.clone();
        self.handle.spawn(async move {
            let outcome = work.await;
            landing.land(outcome, unclaimed.as_ref());
        });
        Entered::Started(Flight(receiver))
    }
}

impl<T: Clone> Flight<T> {
    /// Waits for the outcome; `None` if the task panicked or was stopped.
    pub(super) async fn outcome(mut self) -> Option<T> {
        let outcome = self.0.wait_for(Option::is_some).await.ok()?;
        outcome.clone()
    }
}

/// Clears the slot when the task ends, in whatever way.
struct Landing<T> {
    slot: Arc<Slot<T>>,
    sender: watch::Sender<Option<T>>,
}

impl<T> Landing<T> {
    /// Clears the slot, then wakes the waiters: one that finds the outcome
    /// too old for it can start the next task at once.
    fn land(self, outcome: T, unclaimed: Option<&mpsc::UnboundedSender<T>>) {
        let sender = self.sender.clone();
        drop(self);
        let undelivered = sender.send(Some(outcome)).err().and_then(|error| error.0);
        if let (Some(outcome), Some(unclaimed)) = (undelivered, unclaimed) {
            unclaimed.send(outcome).ok();
        }
    }
}

impl<T> Drop for Landing<T> {
    fn drop(&mut self) {
        lock(&self.slot).take();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn flight<T, R>(entered: Entered<T, R>) -> Flight<T> {
        match entered {
            Entered::Joined(flight) | Entered::Started(flight) => flight,
            Entered::Settled(_) => panic!("settled"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn waiters_share_one_task_and_its_outcome() {
        let started = Arc::new(AtomicUsize::new(0));
        let coalesce = Coalesce::new(Handle::current());
        let flights: Vec<_> = (0..100)
            .map(|_| {
                let started = Arc::clone(&started);
                flight(coalesce.enter(
                    |_| None::<()>,
                    || async move {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        started.fetch_add(1, Ordering::Relaxed) + 1
                    },
                ))
            })
            .collect();
        assert!(coalesce.is_running());
        tokio::time::advance(Duration::from_millis(400)).await;
        assert_eq!(coalesce.running_for(), Some(Duration::from_millis(400)));
        for flight in flights {
            assert_eq!(flight.outcome().await, Some(1));
        }
        assert!(!coalesce.is_running());
        assert_eq!(coalesce.running_for(), None);
    }

    #[tokio::test]
    async fn what_the_look_finds_starts_nothing() {
        let coalesce = Coalesce::<u8>::new(Handle::current());
        let entered = coalesce.enter(Some, || async { 1 });
        assert!(matches!(entered, Entered::Settled(false)));
        assert!(!coalesce.is_running());
    }

    #[tokio::test]
    async fn a_panic_leaves_nobody_waiting_and_the_slot_free() {
        let coalesce = Coalesce::<u8>::new(Handle::current());
        let first = flight(coalesce.enter(|_| None::<()>, || async { panic!("boom") }));
        assert_eq!(first.outcome().await, None);
        let second = flight(coalesce.enter(|_| None::<()>, || async { 2 }));
        assert_eq!(second.outcome().await, Some(2));
    }

    #[tokio::test]
    async fn a_waiter_that_leaves_cancels_nothing_and_the_outcome_is_kept() {
        let (unclaimed, mut kept) = mpsc::unbounded_channel();
        let coalesce = Coalesce::keeping(Handle::current(), unclaimed);
        drop(flight(coalesce.enter(|_| None::<()>, || async { 3 })));
        assert_eq!(kept.recv().await, Some(3));
    }

    #[tokio::test]
    async fn a_runtime_that_is_gone_blocks_nobody() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let coalesce = Coalesce::<u8>::new(runtime.handle().clone());
        tokio::task::spawn_blocking(move || drop(runtime)).await.unwrap();
        let gone = flight(coalesce.enter(|_| None::<()>, || async { 4 }));
        assert_eq!(gone.outcome().await, None);
        assert!(!coalesce.is_running());
    }
}
