//! One request on a connection of its own: what the verifier and the direct
//! source ask, by the same dialling and trust as the traffic.

use bytes::Bytes;
use http::header::{HOST, HeaderValue};
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper_util::rt::TokioIo;
use thiserror::Error;

use super::{DialError, Dialer, Reach};
use crate::config::normalize_host;

/// Why a request of the sidecar's own got no answer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FetchError {
    /// No connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The connection broke, or what came is no HTTP.
    #[error("no answer: {0}")]
    Http(#[from] hyper::Error),
    /// The answer is larger than asked for.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
    /// The request's URL names no host.
    #[error("the URL names no host")]
    NoHost,
}

impl Dialer {
    /// Sends `request`, whose URI is absolute, and reads the answer up to
    /// `limit` bytes of body. `Host` is set where it is missing. Redirects are
    /// not followed. Not bounded in time; dropping the future closes the
    /// connection.
    ///
    /// # Errors
    ///
    /// [`FetchError`].
    pub async fn fetch(
        &self,
        request: Request<Bytes>,
        limit: usize,
    ) -> Result<Response<Bytes>, FetchError> {
        let (mut parts, body) = request.into_parts();
        let authority = parts.uri.authority().cloned().ok_or(FetchError::NoHost)?;
        let tls = parts.uri.scheme_str() == Some("https");
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| FetchError::NoHost)?;
        parts.headers.entry(HOST).or_insert(host);
        parts.uri = origin_form(&parts.uri);
        let name = normalize_host(authority.host());
        let stream = self.stream(&name, port, Reach::Operator, tls).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let exchange = async {
            let response = sender.send_request(Request::from_parts(parts, Full::new(body))).await?;
            collect(response, limit).await
        };
        tokio::pin!(exchange, connection);
        tokio::select! {
            biased;
            answer = &mut exchange => answer,
            // The connection's end may come just before the answer's is seen.
            _ = &mut connection => exchange.await,
        }
    }
}

async fn collect(
    response: Response<hyper::body::Incoming>,
    limit: usize,
) -> Result<Response<Bytes>, FetchError> {
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, limit).collect().await.map_err(|error| {
        match error.downcast::<hyper::Error>() {
            Ok(error) => FetchError::Http(*error),
            Err(error) => {
                debug_assert!(error.is::<LengthLimitError>());
                FetchError::TooLarge(limit)
            }
        }
    })?;
    Ok(Response::from_parts(parts, body.to_bytes()))
}

/// The path and query alone, as an origin server is asked (RFC 9112 §3.2.1).
#[must_use]
pub fn origin_form(uri: &Uri) -> Uri {
    let Some(path) = uri.path_and_query() else {
        return Uri::from_static("/");
    };
    if path.as_str().starts_with('/') {
        return path.clone().into();
    }
    // `http://host?query` has no path: an origin-form target needs one.
    let rooted = format!("/{}", path.as_str());
    Uri::try_from(rooted).unwrap_or_else(|_| Uri::from_static("/"))
}
