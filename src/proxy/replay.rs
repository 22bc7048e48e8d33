//! Request bodies that can be sent twice.
//!
//! A body streams to the upstream as it comes and is kept on the way, up to
//! `REPLAY_BODY_LIMIT` each and `REPLAY_MEMORY` in all. Above either limit
//! nothing of it is kept any more, and the request cannot be replayed.
//!
//! # Invariants
//!
//! - Only the newest [`ReplayBody`] of a request reads from the client; an
//!   older one that is still being sent fails, and its connection with it.
//! - What is kept is given back when the answer is there.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use thiserror::Error;
use tokio::time::Instant;

use super::headers::retain_allowed_trailers;
use crate::metrics::Limit;

/// Why a request body ended early.
#[derive(Debug, Error)]
#[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "the fuzz targets reach it"))]
pub enum BodyError {
    /// The client broke off.
    #[error("the client's body broke off: {0}")]
    Client(#[from] hyper::Error),
    /// The request is being replayed on another connection.
    #[error("the request is sent again elsewhere")]
    Superseded,
}

/// The bytes that all requests of the process together may keep.
#[derive(Clone, Debug)]
pub struct Memory {
    used: Arc<AtomicUsize>,
    limit: usize,
}

impl Memory {
    /// Room for `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { used: Arc::default(), limit }
    }

    /// A reservation of nothing, to grow.
    pub(super) fn reserve_none(&self) -> Reserved {
        Reserved { memory: self.clone(), bytes: 0 }
    }
}

/// Bytes taken from [`Memory`]; given back when dropped.
#[derive(Debug)]
pub(super) struct Reserved {
    memory: Memory,
    bytes: usize,
}

impl Reserved {
    /// Takes `bytes` more; `false`, and nothing taken, where they are not left.
    pub(super) fn grow(&mut self, bytes: usize) -> bool {
        let limit = self.memory.limit;
        let taken = self.memory.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes).filter(|sum| *sum <= limit)
        });
        self.bytes += if taken.is_ok() { bytes } else { 0 };
        taken.is_ok()
    }

    /// Gives everything back.
    pub(super) fn release(&mut self) {
        self.memory.used.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.release();
    }
}

/// A request body on its way to the upstream. In a box: few requests have one, and
/// each is moved many times.
#[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "the fuzz targets reach it"))]
pub struct ReplayBody(Option<Box<Sending>>);

struct Sending {
    recording: Rc<Recording>,
    epoch: u32,
    /// What was kept, of an earlier sending or ahead of this one, and is still to
    /// be sent.
    again: Option<Bytes>,
    again_trailers: Option<HeaderMap>,
    remaining: Option<u64>,
    /// Before this ends the client is asked for nothing.
    invitation: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

/// A client's body and what is kept of it; the forwarder's side.
#[derive(Clone)]
pub(super) struct Replay(Option<Rc<Recording>>);

struct Recording {
    state: RefCell<State>,
    progress: Cell<Instant>,
    /// The client was asked for more, and has not given it.
    owed: Cell<bool>,
    length: Option<u64>,
    limit: usize,
}

struct State {
    /// `None`: the body was given up.
    source: Option<Incoming>,
    /// The client was asked for it.
    asked: bool,
    /// What was read ahead of the first sending.
    ahead: Bytes,
    /// What was kept of that sending.
    kept: BytesMut,
    trailers: Option<HeaderMap>,
    reserved: Reserved,
    keeping: bool,
    /// Why nothing is kept, where that is so.
    limit: Limit,
    ended: bool,
    epoch: u32,
}

impl Replay {
    /// Takes over the client's body, of which up to `limit` bytes may lie in
    /// memory; `replayable`: that much of it is kept for a second sending.
    pub(super) fn new(source: Incoming, limit: usize, replayable: bool, memory: &Memory) -> Self {
        if source.is_end_stream() {
            return Self(None);
        }
        let length = source.size_hint().exact();
        let state = State {
            source: Some(source),
            asked: false,
            ahead: Bytes::new(),
            kept: BytesMut::new(),
            trailers: None,
            reserved: memory.reserve_none(),
            keeping: replayable && length.is_none_or(|length| length <= limit as u64),
            limit: Limit::ReplayBody,
            ended: false,
            epoch: 0,
        };
        Self(Some(Rc::new(Recording {
            state: RefCell::new(state),
            progress: Cell::new(Instant::now()),
            owed: Cell::new(false),
            length,
            limit,
        })))
    }

    /// A body for the next sending. An earlier one is cut off.
    pub(super) fn body(&self) -> ReplayBody {
        ReplayBody(self.0.as_ref().map(|recording| {
            let mut state = recording.state.borrow_mut();
            state.epoch += 1;
            // One replay at most: what was kept moves into it.
            let kept = if state.epoch == 1 { state.take_ahead() } else { state.take_kept() };
            state.keeping &= state.epoch == 1;
            Box::new(Sending {
                epoch: state.epoch,
                again: Some(kept).filter(|kept| !kept.is_empty()),
                again_trailers: state.trailers.clone(),
                remaining: recording.length,
                recording: Rc::clone(recording),
                invitation: None,
            })
        }))
    }

    /// Before the first sending, reads the body until it is whole, if it fits into
    /// memory; what does not fit any more streams on. Nothing is lost when the
    /// future is dropped.
    ///
    /// # Errors
    ///
    /// [`BodyError`]: the client broke off.
    pub(super) async fn read_ahead(&self) -> Result<(), BodyError> {
        match &self.0 {
            Some(recording) => poll_fn(|cx| recording.poll_ahead(cx)).await,
            None => Ok(()),
        }
    }

    /// Whether there is a body at all.
    pub(super) fn is_any(&self) -> bool {
        self.0.is_some()
    }

    /// Whether there is a body whose length nobody has told.
    pub(super) fn is_of_unknown_length(&self) -> bool {
        self.0.as_ref().is_some_and(|recording| recording.length.is_none())
    }

    /// Whether there is a body for which the client was not asked yet.
    pub(super) fn is_untouched(&self) -> bool {
        self.0.as_ref().is_some_and(|recording| !recording.state.borrow().asked)
    }

    /// Gives the body up: the client is not asked for it any more, and who is
    /// sending it waits in vain.
    pub(super) fn abandon(&self) {
        if let Some(recording) = &self.0 {
            recording.state.borrow_mut().source = None;
        }
    }

    /// Whether the client owes the next bytes.
    pub(super) fn is_owed(&self) -> bool {
        self.0.as_ref().is_some_and(|recording| recording.owed.get())
    }

    /// Whether everything read so far was kept.
    pub(super) fn is_replayable(&self) -> bool {
        self.0.as_ref().is_none_or(|recording| {
            let state = recording.state.borrow();
            state.keeping || !state.asked
        })
    }

    /// Which limit keeps the body from being replayable.
    pub(super) fn limit(&self) -> Limit {
        self.0.as_ref().map_or(Limit::ReplayBody, |recording| recording.state.borrow().limit)
    }

    /// The last moment at which the client gave bytes of its body, if it has
    /// any to give.
    pub(super) fn progress(&self) -> Option<Instant> {
        self.0.as_ref().map(|recording| recording.progress.get())
    }
}

impl State {
    /// What was read ahead, and is kept as far as anything is.
    fn take_ahead(&mut self) -> Bytes {
        let ahead = self.kept.split().freeze();
        if self.keeping {
            self.ahead = ahead.clone();
        }
        ahead
    }

    /// All that was kept.
    fn take_kept(&mut self) -> Bytes {
        let ahead = std::mem::take(&mut self.ahead);
        let kept = self.kept.split().freeze();
        match (ahead.is_empty(), kept.is_empty()) {
            (_, true) => ahead,
            (true, _) => kept,
            _ => [ahead, kept].concat().into(),
        }
    }
}

impl Recording {
    fn keep(&self, state: &mut State, data: &Bytes) {
        if !state.keeping {
            return;
        }
        if self.fits(state, data.len()) {
            state.kept.extend_from_slice(data);
        } else {
            state.ahead = Bytes::new();
            state.kept = BytesMut::new();
            state.reserved.release();
        }
    }

    /// Takes memory for `bytes` more; where there is none, nothing is kept from
    /// now on.
    fn fits(&self, state: &mut State, bytes: usize) -> bool {
        let fits = state.ahead.len() + state.kept.len() + bytes <= self.limit;
        if fits && state.reserved.grow(bytes) {
            return true;
        }
        state.keeping = false;
        state.limit = if fits { Limit::ReplayMemory } else { Limit::ReplayBody };
        false
    }

    /// The client's next frame.
    fn poll_client(
        &self,
        state: &mut State,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if state.ended {
            return Poll::Ready(None);
        }
        let Some(source) = &mut state.source else {
            return Poll::Pending;
        };
        state.asked = true;
        self.owed.set(true);
        let frame = ready!(Pin::new(source).poll_frame(cx));
        self.owed.set(false);
        self.progress.set(Instant::now());
        // After an error the source only ends: sent again, the body would look
        // whole.
        let frame = frame.transpose().inspect_err(|_| state.keeping = false)?;
        let Some(frame) = frame else {
            state.ended = true;
            return Poll::Ready(None);
        };
        let frame = frame.into_data().map_or_else(
            |frame| {
                let mut trailers = frame.into_trailers().unwrap_or_default();
                retain_allowed_trailers(&mut trailers);
                state.ended = true;
                state.trailers = Some(trailers.clone());
                Frame::trailers(trailers)
            },
            Frame::data,
        );
        Poll::Ready(Some(Ok(frame)))
    }

    /// The next frame for the sending `epoch`.
    fn poll_source(
        &self,
        epoch: u32,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let state = &mut *self.state.borrow_mut();
        if state.epoch != epoch {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        let frame = ready!(self.poll_client(state, cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.keep(state, data);
        }
        Poll::Ready(frame)
    }

    fn poll_ahead(&self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let state = &mut *self.state.borrow_mut();
        // A body known to be too large streams from the first byte.
        let mut room = self.length.is_none_or(|length| length <= self.limit as u64);
        while room && state.epoch == 0 && !state.ended {
            let frame = ready!(self.poll_client(state, cx)).transpose()?;
            if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
                room = self.fits(state, data.len());
                state.kept.extend_from_slice(data);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl ReplayBody {
    /// The same body, for which the client is not asked before `invitation`
    /// ends.
    pub(super) fn after(mut self, invitation: impl Future<Output = ()> + 'static) -> Self {
        if let Some(sending) = &mut self.0 {
            sending.invitation = Some(Box::pin(invitation));
        }
        self
    }
}

impl Body for ReplayBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(sending) = &mut self.get_mut().0 else {
            return Poll::Ready(None);
        };
        if let Some(invitation) = &mut sending.invitation {
            ready!(invitation.as_mut().poll(cx));
            sending.invitation = None;
        }
        let frame = match sending.again.take() {
            Some(kept) => Some(Ok(Frame::data(kept))),
            None => ready!(sending.recording.poll_source(sending.epoch, cx))
                .or_else(|| Some(Ok(Frame::trailers(sending.again_trailers.take()?)))),
        };
        if let (Some(Ok(frame)), Some(remaining)) = (&frame, &mut sending.remaining) {
            let sent = frame.data_ref().map_or(0, Bytes::len);
            *remaining = remaining.saturating_sub(sent as u64);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|sending| sending.remaining == Some(0))
    }

    fn size_hint(&self) -> SizeHint {
        let exact = self.0.as_ref().map_or(Some(0), |sending| sending.remaining);
        exact.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}
