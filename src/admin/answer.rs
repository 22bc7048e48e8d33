//! Builds answers. None may be cached or guessed at by a browser.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::Full;
use serde::Serialize;

/// An answer with its whole body.
pub(super) type Answer = Response<Full<Bytes>>;

/// An answer with `value` as JSON.
pub(super) fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(body) => new(status, HeaderValue::from_static("application/json"), body),
        Err(error) => {
            tracing::error!(%error, "an answer could not be written as JSON");
            new(StatusCode::INTERNAL_SERVER_ERROR, HeaderValue::from_static("text/plain"), "")
        }
    }
}

/// An answer with `body` as it is.
pub(super) fn new(status: StatusCode, kind: HeaderValue, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}
