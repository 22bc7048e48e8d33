//! How the sidecars that share one Redis share one solve.
//!
//! [`turn`] and [`keeping`] decide, without I/O; `drive.rs` does what they say.
//!
//! # Invariants
//!
//! - Redis delays no answer: a token is published before it is committed.
//! - What decides is what Redis holds, never the clock of another host.

mod drive;
mod keeping;
#[cfg(test)]
mod simulation;
mod turn;
#[cfg(test)]
mod turn_tests;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::lock;
use crate::token::{Generation, Lease, Owner, SharedBackoff, Token};

pub(super) use keeping::{Considered, Next, Pace, Saving, Writing, after_refusal};
pub(super) use turn::ALONE_PAUSE;
use turn::Past;

/// What the run in flight does among the sidecars.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// It asks the sources, for all or without Redis.
    Solving,
    /// It waits for another sidecar's run, or for Redis.
    Waiting,
}

impl Part {
    /// The word in `/status`.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Solving => "solving",
            Self::Waiting => "waiting",
        }
    }
}

/// What a sidecar remembers of its part in the fleet.
#[derive(Default)]
pub(super) struct Fleet {
    past: Mutex<Past>,
    /// The lease of the run in flight.
    lease: Mutex<Option<Lease>>,
    /// The token that is to be committed with a lease.
    owed: Mutex<Option<(Token, Lease)>>,
    /// The last token that was shown to the others without a verdict.
    shown: Mutex<Option<(Token, Lease)>>,
    /// The generation that came from another sidecar without a verdict.
    unproven: AtomicU64,
    /// Who asked for the lease without an answer, and may have got it.
    doubtful: Mutex<Option<Owner>>,
    /// The failure that was last told here: an own one, or another sidecar's.
    told: Mutex<Option<(u64, String)>>,
    /// The back-off that is on is there for want of Redis.
    pauses_alone: AtomicBool,
    /// The run in flight waits for others, and looks by itself.
    waits: AtomicBool,
    part: Mutex<Option<Part>>,
}

impl Fleet {
    /// The solver, which was away, is back.
    pub(super) fn solver_is_back(&self) {
        lock(&self.past).solver_is_back();
    }

    /// A back-off has begun, for want of Redis.
    pub(super) fn pause_alone(&self) {
        self.pauses_alone.store(true, Ordering::Relaxed);
    }

    /// Redis takes writes. Returns whether a back-off was on for want of it.
    fn redis_is_back(&self) -> bool {
        lock(&self.past).redis_is_back();
        self.pauses_alone.swap(false, Ordering::Relaxed)
    }

    /// Whether this sidecar has gone without Redis, which is not known to take
    /// writes since.
    fn is_alone(&self) -> bool {
        lock(&self.past).is_alone()
    }

    /// Whether the run in flight looks into Redis by itself.
    pub(super) fn waits(&self) -> bool {
        self.waits.load(Ordering::Relaxed)
    }

    /// What the run in flight does, as far as it has got.
    pub(super) fn part(&self) -> Option<Part> {
        *lock(&self.part)
    }

    fn set_part(&self, part: Option<Part>) {
        *lock(&self.part) = part;
    }

    /// A turn has ended with a question that Redis has not answered. It may yet
    /// grant the lease to `owner`, where others would wait for it to lapse.
    fn doubt(&self, owner: Owner) {
        *lock(&self.doubtful) = Some(owner);
    }

    /// Such an owner, for the next turn to go on as that one, or for its lease to
    /// be given back.
    fn take_doubtful(&self) -> Option<Owner> {
        lock(&self.doubtful).take()
    }

    /// The lease of the run, for whoever gives it back.
    pub(super) fn take_lease(&self) -> Option<Lease> {
        self.waits.store(false, Ordering::Relaxed);
        lock(&self.lease).take()
    }

    /// `token` is to be committed with the run's lease.
    fn owe(&self, token: &Token) {
        let lease = self.take_lease();
        *lock(&self.owed) = lease.map(|lease| (token.clone(), lease));
    }

    /// The lease that `token` is to be committed with.
    pub(super) fn owed_with(&self, token: &Token) -> Option<Lease> {
        lock(&self.owed).as_ref().filter(|(owed, _)| owed == token).map(|(_, lease)| lease.clone())
    }

    /// `token`, which nobody could verify, has been shown with this lease.
    pub(super) fn note_shown(&self, token: &Token, lease: Lease) {
        *lock(&self.shown) = Some((token.clone(), lease));
    }

    /// The lease that `token` was shown with, once.
    fn take_shown(&self, token: &Token) -> Option<Lease> {
        lock(&self.shown).take_if(|(shown, _)| shown == token).map(|(_, lease)| lease)
    }

    /// This generation is another sidecar's, which could not verify it.
    pub(super) fn note_unproven(&self, generation: Generation) {
        self.unproven.store(generation.0, Ordering::Relaxed);
    }

    /// Whether this generation came from another sidecar without a verdict.
    pub(super) fn is_unproven(&self, generation: Generation) -> bool {
        self.unproven.load(Ordering::Relaxed) == generation.0
    }

    /// The failure that goes with this back-off is told here. Returns whether
    /// that is news.
    fn tell(&self, backoff: &SharedBackoff) -> bool {
        let failure = Some((backoff.epoch, backoff.error.clone()));
        let told = std::mem::replace(&mut *lock(&self.told), failure.clone());
        told != failure
    }

    /// Nothing is owed any more. Returns the lease of what was.
    pub(super) fn settle(&self) -> Option<Lease> {
        lock(&self.owed).take().map(|(_, lease)| lease)
    }

    /// This lease is not owed any more; one of a later run may be.
    pub(super) fn settled(&self, lease: &Lease) {
        lock(&self.owed).take_if(|(_, owed)| owed == lease);
    }
}
