//! Bodies of answers: the upstream's, streaming; one that was kept during a
//! hold; one made here.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};

use super::headers::retain_allowed_trailers;
use super::replay::{Memory, ReplayBody, Reserved};
use crate::net::{PooledBody, Spelling};

/// The upstream's body of an answer.
pub(super) type UpstreamBody = PooledBody<ReplayBody>;

/// The body of an answer to a client, and how the head before it is spelled.
pub struct AnswerBody {
    source: Source,
    spelling: Spelling,
}

enum Source {
    /// As it comes from the upstream.
    Streaming(UpstreamBody),
    /// Read during a hold, and passed on after all.
    Kept(Box<KeptBody>),
    /// Made here.
    Made(Full<Bytes>),
}

impl AnswerBody {
    /// A body made here.
    pub(super) fn made(body: impl Into<Bytes>) -> Self {
        let source = Source::Made(Full::new(body.into()));
        Self { source, spelling: Spelling::default() }
    }

    /// None, behind a head that is the upstream's.
    pub(super) fn none_of_upstream(spelling: Spelling) -> Self {
        Self { spelling, ..Self::made("") }
    }

    /// The upstream's, as it comes.
    pub(super) fn streaming(mut body: UpstreamBody) -> Self {
        let spelling = body.take_spelling();
        Self { source: Source::Streaming(body), spelling }
    }

    /// The upstream's, of which up to `limit` bytes are read into `memory` first.
    pub(super) async fn kept(mut body: UpstreamBody, limit: usize, memory: &Memory) -> Self {
        let spelling = body.take_spelling();
        let kept = KeptBody::read(body, limit, memory).await;
        Self { source: Source::Kept(Box::new(kept)), spelling }
    }

    /// Takes out how the head is spelled.
    pub(super) fn take_spelling(&mut self) -> Spelling {
        std::mem::take(&mut self.spelling)
    }

    /// What the upstream broke it off with, if that was seen and is not told yet.
    pub(super) fn take_failure(&mut self) -> Option<hyper::Error> {
        match &mut self.source {
            Source::Kept(kept) => kept.failed.take(),
            Source::Streaming(_) | Source::Made(_) => None,
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.get_mut().source {
            Source::Streaming(body) => {
                Pin::new(body).poll_frame(cx).map_ok(without_forbidden_trailers)
            }
            Source::Kept(body) => Pin::new(body).poll_frame(cx),
            Source::Made(body) => Pin::new(body).poll_frame(cx).map_err(|never| match never {}),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Streaming(body) => body.is_end_stream(),
            Source::Kept(body) => body.is_end_stream(),
            Source::Made(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Streaming(body) => body.size_hint(),
            Source::Kept(body) => body.size_hint(),
            Source::Made(body) => body.size_hint(),
        }
    }
}

fn without_forbidden_trailers(mut frame: Frame<Bytes>) -> Frame<Bytes> {
    if let Some(trailers) = frame.trailers_mut() {
        retain_allowed_trailers(trailers);
    }
    frame
}

/// The beginning of a body in memory, and the rest of it where it is longer.
struct KeptBody {
    start: Bytes,
    rest: Option<UpstreamBody>,
    failed: Option<hyper::Error>,
    trailers: Option<HeaderMap>,
    /// Given back with the body.
    memory: Reserved,
}

impl KeptBody {
    /// Reads up to `limit` bytes of `body` into `memory`. A body that ends
    /// within them gives its connection back at once; a longer one, or one
    /// for which there is no memory, is streamed on later.
    async fn read(mut body: UpstreamBody, limit: usize, memory: &Memory) -> Self {
        let mut start = BytesMut::new();
        let mut kept = Self {
            start: Bytes::new(),
            rest: None,
            failed: None,
            trailers: None,
            memory: memory.reserve_none(),
        };
        let mut room = true;
        while room && let Some(frame) = body.frame().await {
            match frame.map(Frame::into_data) {
                Ok(Ok(data)) => {
                    room = kept.memory.grow(data.len()) && start.len() + data.len() <= limit;
                    start.extend_from_slice(&data);
                }
                Ok(Err(frame)) => {
                    kept.trailers = without_forbidden_trailers(frame).into_trailers().ok();
                }
                Err(error) => kept.failed = Some(error),
            }
        }
        kept.start = start.freeze();
        kept.rest = (!room).then_some(body);
        if let Some(rest) = &kept.rest {
            rest.set_aside();
        }
        kept
    }
}

impl Body for KeptBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        if !this.start.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut this.start)))));
        }
        if let Some(rest) = &mut this.rest {
            return Pin::new(rest).poll_frame(cx);
        }
        if let Some(error) = this.failed.take() {
            return Poll::Ready(Some(Err(error)));
        }
        Poll::Ready(this.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        let over = self.rest.as_ref().is_none_or(Body::is_end_stream);
        self.start.is_empty() && over && self.failed.is_none() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let start = self.start.len() as u64;
        match &self.rest {
            // What broke off must not look whole.
            _ if self.failed.is_some() => SizeHint::new(),
            Some(rest) => rest
                .size_hint()
                .exact()
                .map_or_else(SizeHint::new, |rest| SizeHint::with_exact(start + rest)),
            None if self.trailers.is_some() => SizeHint::new(),
            None => SizeHint::with_exact(start),
        }
    }
}
