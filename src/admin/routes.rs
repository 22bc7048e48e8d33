//! From a request to its answer.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, Method, Request, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::Serialize;
use tokio::time::timeout;
use tracing::debug;

use super::answer::{self, Answer};
use super::error::AdminError;
use super::status::{Readiness, Status};
use super::{Admin, AdminState, access};
use crate::metrics;
use crate::token::Published;

const BODY_SIZE: usize = 64 * 1024;
const BODY_TIME: Duration = Duration::from_secs(10);

/// What the admin port offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    Live,
    Ready,
    Metrics,
    Status,
    Page,
    Refresh,
}

/// The answer to `request`, whatever happens.
pub(super) async fn respond<B>(admin: &Admin, peer: SocketAddr, request: Request<B>) -> Answer
where
    B: Body<Data = Bytes, Error: std::error::Error + Send + Sync + 'static>,
{
    let (head, body) = request.into_parts();
    let answer = handle(admin, peer, &head, body).await.unwrap_or_else(|error| error.answer());
    debug!(
        client.addr = %peer,
        http.method = %head.method,
        http.path = head.uri.path(),
        http.status = answer.status().as_u16(),
        "admin request"
    );
    answer
}

async fn handle<B>(
    admin: &Admin,
    peer: SocketAddr,
    head: &Parts,
    body: B,
) -> Result<Answer, AdminError>
where
    B: Body<Data = Bytes, Error: std::error::Error + Send + Sync + 'static>,
{
    access::check_host(head)?;
    let route = Route::of(head.uri.path())?;
    route.check_method(&head.method)?;
    let state = &*admin.state;
    Ok(match route {
        Route::Live => answer::json(StatusCode::OK, &Live { status: "live" }),
        Route::Ready => ready(state),
        Route::Metrics => metrics(state),
        Route::Status => answer::json(StatusCode::OK, &Status::of(state)),
        Route::Page => admin.page.answer(),
        Route::Refresh => {
            access::check_post(head, peer, state.admin_token.as_ref())?;
            discard(body).await?;
            refresh(state).await?
        }
    })
}

impl Route {
    fn of(path: &str) -> Result<Self, AdminError> {
        match path {
            "/live" => Ok(Self::Live),
            "/ready" => Ok(Self::Ready),
            "/metrics" => Ok(Self::Metrics),
            "/status" => Ok(Self::Status),
            "/" => Ok(Self::Page),
            "/refresh" => Ok(Self::Refresh),
            _ => Err(AdminError::NotFound),
        }
    }

    fn check_method(self, method: &Method) -> Result<(), AdminError> {
        match self {
            Self::Refresh if method == Method::POST => Ok(()),
            Self::Refresh => Err(AdminError::MethodNotAllowed { allow: "POST" }),
            _ if method == Method::GET || method == Method::HEAD => Ok(()),
            _ => Err(AdminError::MethodNotAllowed { allow: "GET, HEAD" }),
        }
    }
}

#[derive(Serialize)]
struct Live {
    status: &'static str,
}

/// The answer to a refresh that gave a token.
#[derive(Serialize)]
struct Refreshed {
    generation: u64,
    source: &'static str,
    expires_at: Option<String>,
}

impl Refreshed {
    fn of(published: &Published) -> Self {
        Self {
            generation: published.generation.0,
            source: published.source.as_str(),
            expires_at: published.token.expires_at().map(|at| at.to_string()),
        }
    }
}

fn ready(state: &AdminState) -> Answer {
    let readiness = Readiness::of(state);
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    answer::json(status, &readiness)
}

fn metrics(state: &AdminState) -> Answer {
    let kind = HeaderValue::from_static(metrics::CONTENT_TYPE);
    answer::new(StatusCode::OK, kind, state.metrics.encode())
}

async fn refresh(state: &AdminState) -> Result<Answer, AdminError> {
    let published =
        state.refresher.refresh_now().await.map_err(|failure| AdminError::RefreshFailed {
            refused: failure.error.is_refusal(),
            error: failure.error.to_string(),
            retry_after: failure.retry_after,
        })?;
    Ok(answer::json(StatusCode::OK, &Refreshed::of(&published)))
}

/// Reads `body` to its end and forgets it, within bounds.
async fn discard<B>(body: B) -> Result<(), AdminError>
where
    B: Body<Data = Bytes, Error: std::error::Error + Send + Sync + 'static>,
{
    if body.size_hint().lower() > BODY_SIZE as u64 {
        return Err(AdminError::TooLarge);
    }
    match timeout(BODY_TIME, Limited::new(body, BODY_SIZE).collect()).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(AdminError::TooLarge),
        Ok(Err(_)) | Err(_) => Err(AdminError::BadBody),
    }
}

#[cfg(test)]
mod tests {
    use super::{BODY_SIZE, Route, discard};
    use crate::admin::error::AdminError;
    use futures_util::stream;
    use http::Method;
    use http_body_util::{Full, StreamBody};
    use hyper::body::Frame;
    use std::convert::Infallible;

    #[test]
    fn each_path_takes_its_methods() {
        for path in ["/", "/live", "/ready", "/metrics", "/status"] {
            let route = Route::of(path).unwrap();
            assert!(route.check_method(&Method::GET).is_ok(), "{path}");
            assert!(route.check_method(&Method::HEAD).is_ok(), "{path}");
            let wrong = route.check_method(&Method::POST);
            assert!(matches!(wrong, Err(AdminError::MethodNotAllowed { allow: "GET, HEAD" })));
        }
        assert!(Route::Refresh.check_method(&Method::POST).is_ok());
        let wrong = Route::Refresh.check_method(&Method::GET);
        assert!(matches!(wrong, Err(AdminError::MethodNotAllowed { allow: "POST" })));
        assert!(matches!(Route::of("/Live"), Err(AdminError::NotFound)));
    }

    #[tokio::test]
    async fn a_body_is_ignored_up_to_its_limit() {
        assert!(discard(Full::from(vec![0; BODY_SIZE])).await.is_ok());
        let outcome = discard(Full::from(vec![0; BODY_SIZE + 1])).await;
        assert!(matches!(outcome, Err(AdminError::TooLarge)));
    }

    #[tokio::test]
    async fn a_body_of_unknown_length_is_limited_too() {
        let chunk = || Ok::<_, Infallible>(Frame::data(vec![0; BODY_SIZE / 2 + 1].into()));
        let outcome = discard(StreamBody::new(stream::iter([chunk(), chunk()]))).await;
        assert!(matches!(outcome, Err(AdminError::TooLarge)));
    }
}
