//! Answers made here: why a request got one, and how it looks.
//!
//! The only place that turns an error into a status. Each such answer has a
//! JSON body `{"error","message","hint"}` and a `Proxy-Status` field
//! (RFC 9209), so that a client can tell it from the shop's own.

use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CONNECTION, CONTENT_TYPE, HeaderName, PROXY_AUTHENTICATE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use serde_json::json;
use thiserror::Error;

use super::body::AnswerBody;
use crate::hints::LocalHost;
use crate::net::{DialError, Found, ParentError, Refusals, ResolveError, SendError};
use crate::refresh::{FailureReason, RefreshFailure};

/// The field that tells who made or changed an answer.
pub(super) const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// Why a request got an answer made here and not by the upstream.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// The client's fault: the request is malformed.
    #[error("{0}")]
    BadRequest(&'static str),
    /// The client's fault: a transfer coding that is not `chunked`.
    #[error("the transfer coding is not supported, only chunked is")]
    UnknownCoding,
    /// The client's fault: a TRACE that was meant to end here. It would give back
    /// what it carried, credentials among it, and nobody needs that; only the
    /// upstream may do so.
    #[error("Max-Forwards ends the TRACE here, and it is not answered here")]
    TraceEndsHere,
    /// The client's fault: too many fields, or too large ones.
    #[error("the head has more than {fields} fields or {bytes} bytes")]
    HeaderTooLarge {
        /// Fields allowed.
        fields: usize,
        /// Bytes allowed.
        bytes: usize,
    },
    /// The client's fault: inside a tunnel, a `Host` other than the tunnel's.
    #[error("the Host field names another host than the CONNECT request")]
    Misdirected,
    /// The client must present the credentials of `PROXY_AUTH`.
    #[error("{}", if *.given { "the credentials are wrong" } else { "credentials are required" })]
    AuthRequired {
        /// At the gateway we are the origin: 401 instead of 407.
        gateway: bool,
        /// It has presented others.
        given: bool,
    },
    /// The gateway has no API origin for the host or path.
    #[error("no API origin matches {path}")]
    NoSuchOrigin {
        /// The request's path.
        path: String,
    },
    /// No live token, and no refresh gave one.
    #[error("there is no token and none could be had")]
    TokenUnavailable(RefreshFailure),
    /// No live token, and the request only looks on.
    #[error("there is no token, and this request starts no refresh")]
    NoToken {
        /// When a refresh may start.
        retry_after: Duration,
    },
    /// `HOLD_TIMEOUT` passed while the refresh went on.
    #[error("the refresh takes longer than {}", humantime::format_duration(*.limit))]
    HoldTimeout {
        /// The time allowed.
        limit: Duration,
        /// `RETRY_STATUS`.
        status: StatusCode,
        /// When to come back.
        retry_after: Duration,
    },
    /// `MAX_HELD` requests are held already.
    #[error("too many requests wait for a token")]
    TooManyHeld {
        /// When to come back.
        retry_after: Duration,
    },
    /// All connections to the upstream were in use for `UPSTREAM_TIMEOUT`.
    #[error("no connection to the upstream came free within {}", humantime::format_duration(*.0))]
    UpstreamBusy(Duration),
    /// `MAX_CONNECTIONS` is reached.
    #[error("the sidecar has as many clients as MAX_CONNECTIONS lets in")]
    TooManyConnections,
    /// `MAX_CLIENT_CONNECTIONS` is reached.
    #[error("this address has as many connections as MAX_CLIENT_CONNECTIONS lets it have")]
    TooManyOfClient,
    /// The open files that are left are for the clients that are in.
    #[error("the last open files of the sidecar are for the clients that are in")]
    TooFewFiles,
    /// No connection to the upstream, or the egress policy forbids it.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The upstream's connection broke, or it does not speak HTTP.
    #[error("the upstream broke off or sent what is no HTTP: {0}")]
    Protocol(hyper::Error),
    /// The upstream's answer has a transfer coding that is not `chunked`.
    #[error("the upstream answered in a transfer coding other than chunked")]
    UnknownAnswerCoding,
    /// The upstream's answer tells its length in more than one way.
    #[error("the upstream told the length of its answer twice")]
    TwoAnswerLengths,
    /// The upstream switched protocols although nobody asked it to.
    #[error("the upstream switched protocols unasked")]
    UnexpectedUpgrade,
    /// The client's fault: the target alone is too long.
    #[error("the target has more than {limit} bytes")]
    TargetTooLong {
        /// Bytes allowed.
        limit: usize,
    },
    /// The client broke off its own body, or it is no valid one.
    #[error("the request body ended early or is malformed")]
    ClientBody,
    /// The client stopped giving its own body.
    #[error("no more of the request body came within {}", humantime::format_duration(*.0))]
    ClientStalled(Duration),
    /// The client gave its own body slowly, and others waited for the connection.
    #[error("the request body came too slowly while other requests waited")]
    ClientTooSlow,
    /// No response head within `UPSTREAM_TIMEOUT`.
    #[error("no answer from the upstream within {}", humantime::format_duration(*.0))]
    UpstreamTimeout(Duration),
    /// The process is stopping.
    #[error("the proxy is stopping")]
    Draining,
}

/// How one error looks from outside.
struct Face {
    status: StatusCode,
    code: &'static str,
    /// Error type of RFC 9209 §2.3.
    kind: &'static str,
    hint: &'static str,
}

const fn face(
    status: StatusCode,
    code: &'static str,
    kind: &'static str,
    hint: &'static str,
) -> Face {
    Face { status, code, kind, hint }
}

impl From<SendError> for ProxyError {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Dial(error) => Self::Dial(error),
            // The only user code in an upstream connection is the body that
            // streams from the client.
            SendError::Http(error) if error.is_user() => Self::ClientBody,
            SendError::Http(error) => Self::Protocol(error),
            SendError::TooSlow => Self::ClientTooSlow,
        }
    }
}

impl ProxyError {
    /// The answer for the client.
    #[must_use]
    pub fn into_response(self) -> Response<AnswerBody> {
        let face = self.face();
        let mut response = Response::new(AnswerBody::made(self.body(&face)));
        *response.status_mut() = face.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        add_proxy_status(headers, face.kind, face.code);
        self.add_fields(headers);
        response
    }

    /// What clients over a limit are told.
    #[must_use]
    pub fn refusals() -> Refusals {
        Refusals {
            connections: Self::TooManyConnections.into_farewell(),
            client_connections: Self::TooManyOfClient.into_farewell(),
            descriptors: Self::TooFewFiles.into_farewell(),
        }
    }

    /// The last answer on a connection, in bytes.
    fn into_farewell(self) -> Bytes {
        let face = self.face();
        let body = self.body(&face);
        Bytes::from(format!(
            "HTTP/1.1 {}\r\ncontent-type: application/json\r\n\
             proxy-status: token-sidecar; error={}; details=\"{}\"\r\nretry-after: 1\r\n\
             connection: close\r\ncontent-length: {}\r\n\r\n{body}",
            face.status,
            face.kind,
            face.code,
            body.len(),
        ))
    }

    fn body(&self, face: &Face) -> String {
        let body = json!({
            "error": face.code,
            "message": self.to_string(),
            "hint": face.hint,
        });
        format!("{body}\n")
    }

    fn face(&self) -> Face {
        match self {
            Self::Dial(error) => dial_face(error),
            Self::TokenUnavailable(_)
            | Self::NoToken { .. }
            | Self::HoldTimeout { .. }
            | Self::TooManyHeld { .. }
            | Self::UpstreamBusy(_)
            | Self::Draining => self.waiting_face(),
            Self::TooManyConnections | Self::TooManyOfClient | Self::TooFewFiles => {
                self.full_face()
            }
            Self::Protocol(_)
            | Self::UnknownAnswerCoding
            | Self::TwoAnswerLengths
            | Self::UnexpectedUpgrade => face(
                StatusCode::BAD_GATEWAY,
                "upstream_protocol",
                "http_protocol_error",
                "Try again; if it stays, look at the upstream.",
            ),
            Self::UpstreamTimeout(_) => face(
                StatusCode::GATEWAY_TIMEOUT,
                "upstream_timeout",
                "http_response_timeout",
                "Try again; UPSTREAM_TIMEOUT sets the limit.",
            ),
            _ => self.client_face(),
        }
    }

    /// Faces of what the client did wrong.
    fn client_face(&self) -> Face {
        match self {
            Self::HeaderTooLarge { .. } => face(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "header_too_large",
                "http_request_error",
                "Send fewer or smaller fields; cookies, mostly.",
            ),
            Self::TargetTooLong { .. } => face(
                StatusCode::URI_TOO_LONG,
                "header_too_large",
                "http_request_error",
                "Put long values into the body.",
            ),
            Self::ClientStalled(_) => face(
                StatusCode::REQUEST_TIMEOUT,
                "bad_request",
                "http_request_error",
                "Send the whole body; UPSTREAM_TIMEOUT sets the limit of a pause.",
            ),
            Self::ClientTooSlow => face(
                StatusCode::REQUEST_TIMEOUT,
                "bad_request",
                "http_request_error",
                "Send it at 4 KiB a second or more, or raise UPSTREAM_CONNECTIONS.",
            ),
            Self::Misdirected => face(
                StatusCode::MISDIRECTED_REQUEST,
                "misdirected",
                "http_request_error",
                "Open a tunnel of its own for each host.",
            ),
            Self::AuthRequired { gateway: false, .. } => face(
                StatusCode::PROXY_AUTHENTICATION_REQUIRED,
                "proxy_auth_required",
                "http_request_denied",
                "Put user and password into the proxy's URL: http://user:password@host:port.",
            ),
            Self::AuthRequired { gateway: true, .. } => face(
                StatusCode::UNAUTHORIZED,
                "proxy_auth_required",
                "http_request_denied",
                "Put user and password into the base URL: http://user:password@host:port/…",
            ),
            Self::NoSuchOrigin { .. } => face(
                StatusCode::NOT_FOUND,
                "no_such_origin",
                "http_request_error",
                "Paths start with a prefix of API_ORIGINS, or Host names an API host. As a \
                 proxy, send absolute-form or CONNECT.",
            ),
            Self::UnknownCoding => face(
                StatusCode::NOT_IMPLEMENTED,
                "bad_request",
                "http_request_error",
                "Send the body by length or chunked.",
            ),
            Self::TraceEndsHere => face(
                StatusCode::NOT_IMPLEMENTED,
                "bad_request",
                "http_request_error",
                "Send a Max-Forwards above 0, or none: the upstream is the next hop.",
            ),
            _ => face(
                StatusCode::BAD_REQUEST,
                "bad_request",
                "http_request_error",
                "The request is not valid HTTP for a proxy; see the message.",
            ),
        }
    }

    /// Faces of what may pass with time.
    fn waiting_face(&self) -> Face {
        match self {
            Self::HoldTimeout { status, .. } => face(
                *status,
                "hold_timeout",
                "http_response_timeout",
                "Try again after Retry-After: the refresh goes on. HOLD_TIMEOUT sets the limit.",
            ),
            Self::TooManyHeld { .. } => face(
                StatusCode::SERVICE_UNAVAILABLE,
                "too_many_held",
                "connection_limit_reached",
                "Try again after Retry-After; MAX_HELD sets the limit.",
            ),
            Self::UpstreamBusy(_) => face(
                StatusCode::SERVICE_UNAVAILABLE,
                "too_many_connections",
                "connection_limit_reached",
                "Try again after Retry-After; UPSTREAM_CONNECTIONS sets the limit.",
            ),
            Self::Draining => face(
                StatusCode::SERVICE_UNAVAILABLE,
                "draining",
                "proxy_internal_response",
                "Try again: another instance, or this one after its restart.",
            ),
            _ => face(
                StatusCode::SERVICE_UNAVAILABLE,
                "token_unavailable",
                "proxy_internal_error",
                "See /status on the admin port and the log: the token's sources fail.",
            ),
        }
    }

    /// Faces of what a client is told that is not let in.
    fn full_face(&self) -> Face {
        let hint = match self {
            Self::TooManyOfClient => {
                "Close connections that are not used, or raise MAX_CLIENT_CONNECTIONS of the \
                 sidecar. Behind a published port all clients have one address."
            }
            Self::TooFewFiles => {
                "Close connections that are not used, or raise the sidecar's limit of open files \
                 (ulimit -n, nofile)."
            }
            _ => "Close connections that are not used, or raise MAX_CONNECTIONS of the sidecar.",
        };
        face(
            StatusCode::SERVICE_UNAVAILABLE,
            "too_many_connections",
            "connection_limit_reached",
            hint,
        )
    }

    fn add_fields(&self, headers: &mut HeaderMap) {
        const BASIC: HeaderValue = HeaderValue::from_static("Basic realm=\"token-sidecar\"");
        match self {
            Self::AuthRequired { gateway: false, .. } => {
                headers.insert(PROXY_AUTHENTICATE, BASIC);
            }
            Self::AuthRequired { gateway: true, .. } => {
                headers.insert(WWW_AUTHENTICATE, BASIC);
            }
            Self::TokenUnavailable(failure) => add_retry_after(headers, failure.retry_after),
            Self::NoToken { retry_after }
            | Self::HoldTimeout { retry_after, .. }
            | Self::TooManyHeld { retry_after } => {
                add_retry_after(headers, *retry_after);
            }
            Self::Draining
            | Self::UpstreamBusy(_)
            | Self::Dial(DialError::NoDescriptor { .. } | DialError::TooManyLookups { .. }) => {
                add_retry_after(headers, Duration::from_secs(1));
            }
            // The rest of such a message cannot be trusted to be framed.
            Self::BadRequest(_)
            | Self::UnknownCoding
            | Self::HeaderTooLarge { .. }
            | Self::TargetTooLong { .. }
            | Self::ClientBody
            | Self::ClientStalled(_)
            | Self::ClientTooSlow => {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
    }
}

fn dial_face(error: &DialError) -> Face {
    let unreachable =
        |kind| face(StatusCode::BAD_GATEWAY, "upstream_unreachable", kind, unreachable_hint(error));
    match error {
        DialError::NotAllowed { .. } => face(
            StatusCode::FORBIDDEN,
            "target_not_allowed",
            "destination_ip_prohibited",
            "List the host in ALLOW_HOSTS of the sidecar, or better, in NO_PROXY of the client.",
        ),
        DialError::OwnListener { found: Found::ByServers, .. } => face(
            StatusCode::FORBIDDEN,
            "target_not_allowed",
            "proxy_loop_detected",
            "Name resolvers in UPSTREAM_DNS of the sidecar that do not know the alias.",
        ),
        DialError::OwnListener { .. } => face(
            StatusCode::FORBIDDEN,
            "target_not_allowed",
            "proxy_loop_detected",
            "Ask the sidecar directly, not through itself: list its host in NO_PROXY of the \
             client. Behind an alias for the API's name, set UPSTREAM_DNS of the sidecar.",
        ),
        DialError::NoDescriptor { .. } => face(
            StatusCode::SERVICE_UNAVAILABLE,
            "too_many_connections",
            "connection_limit_reached",
            "Try again after Retry-After. The upstream is not at fault: raise the sidecar's limit \
             of open files (ulimit -n, nofile), or see who holds so many connections.",
        ),
        DialError::TooManyLookups { .. } => face(
            StatusCode::SERVICE_UNAVAILABLE,
            "too_many_connections",
            "connection_limit_reached",
            "Try again after Retry-After: the system's resolver is slow, or down. UPSTREAM_DNS of \
             the sidecar names others.",
        ),
        DialError::Resolve { .. } => unreachable("dns_error"),
        DialError::Timeout { .. } => unreachable("connection_timeout"),
        DialError::Parent { error, .. } => parent_face(error),
        DialError::Tls { error, .. } if is_about_certificate(error) => face(
            StatusCode::BAD_GATEWAY,
            "upstream_tls",
            "tls_certificate_error",
            "The upstream's certificate did not verify; UPSTREAM_CA_FILE adds roots.",
        ),
        DialError::Tls { .. } => face(
            StatusCode::BAD_GATEWAY,
            "upstream_tls",
            "tls_protocol_error",
            "The upstream does not speak TLS on this port, or none that we speak.",
        ),
        _ => unreachable("connection_refused"),
    }
}

/// Whether a handshake failed for the upstream's certificate.
fn is_about_certificate(error: &std::io::Error) -> bool {
    let cause = error.get_ref().and_then(|inner| inner.downcast_ref());
    matches!(cause, Some(rustls::Error::InvalidCertificate(_)))
}

const CHECK_UPSTREAM: &str = "Check the name, the network and the upstream itself.";

/// What to do where nothing is found, or nothing answers.
fn unreachable_hint(error: &DialError) -> &'static str {
    let (host, by_servers) = match error {
        DialError::Resolve { host, error } => (host, matches!(error, ResolveError::Servers { .. })),
        DialError::Connect { host, .. } | DialError::Timeout { host, .. } => (host, false),
        _ => return CHECK_UPSTREAM,
    };
    match (LocalHost::of(host).is_some(), by_servers) {
        (false, false) => CHECK_UPSTREAM,
        (false, true) => "Check the name, and the resolvers in UPSTREAM_DNS of the sidecar.",
        (true, false) => {
            "Check the name and the network; a neighbour of the client belongs in NO_PROXY of the \
             client."
        }
        (true, true) => {
            "A neighbour of the client belongs in NO_PROXY of the client: the resolvers in \
             UPSTREAM_DNS of the sidecar do not know it."
        }
    }
}

fn parent_face(error: &ParentError) -> Face {
    let kind = match error {
        ParentError::Credentials => "proxy_configuration_error",
        ParentError::Itself => "proxy_loop_detected",
        ParentError::Unresolved(_) => "dns_error",
        ParentError::Refused(_) => "destination_unavailable",
        ParentError::Broken(_) => "connection_terminated",
        ParentError::NotHttp => "http_protocol_error",
        _ => "connection_refused",
    };
    face(
        StatusCode::BAD_GATEWAY,
        "upstream_unreachable",
        kind,
        "Check UPSTREAM_PROXY of the sidecar: address, credentials, and whether it may lead there.",
    )
}

/// Adds our own member to `Proxy-Status`; the upstream's stay.
fn add_proxy_status(headers: &mut HeaderMap, kind: &str, details: &str) {
    let member = format!("token-sidecar; error={kind}; details=\"{details}\"");
    if let Ok(member) = HeaderValue::try_from(member) {
        headers.append(PROXY_STATUS, member);
    }
}

fn add_retry_after(headers: &mut HeaderMap, wait: Duration) {
    let seconds = wait.as_millis().div_ceil(1000).max(1);
    if let Ok(seconds) = HeaderValue::try_from(seconds.to_string()) {
        headers.insert(RETRY_AFTER, seconds);
    }
}

/// Why the upstream's own 401 is passed on although the token was ours.
#[derive(Clone, Copy, Debug)]
pub(super) enum PassedOn {
    /// The refresh failed.
    RefreshFailed,
    /// An earlier refresh failed and the next may not start yet.
    Backoff,
    /// The request's body was too large to be kept.
    NotReplayable,
}

impl From<FailureReason> for PassedOn {
    fn from(reason: FailureReason) -> Self {
        match reason {
            FailureReason::Backoff => Self::Backoff,
            FailureReason::RefreshFailed => Self::RefreshFailed,
        }
    }
}

/// Marks a 401 that is passed on: why, and when the next try makes sense.
pub(super) fn mark_passed_on(headers: &mut HeaderMap, why: PassedOn, retry_after: Duration) {
    let details = match why {
        PassedOn::RefreshFailed => "refresh_failed",
        PassedOn::Backoff => "backoff",
        PassedOn::NotReplayable => "not_replayable",
    };
    add_proxy_status(headers, "proxy_internal_error", details);
    add_retry_after(headers, retry_after);
}
