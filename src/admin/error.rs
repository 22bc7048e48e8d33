//! Why the admin port did not do what was asked, and how it says so.

use std::time::Duration;

use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use thiserror::Error;

use super::answer::{self, Answer};

/// Why a request got an error.
#[derive(Debug, Error)]
pub(super) enum AdminError {
    /// No such path.
    #[error("there is nothing at this path")]
    NotFound,
    /// The path does not take this method.
    #[error("this path takes {allow} only")]
    MethodNotAllowed {
        /// The value of `Allow`.
        allow: &'static str,
    },
    /// `Host` is missing, doubled or malformed.
    #[error("the request has no usable Host field")]
    BadHost,
    /// `Host` is a name that is not ours: a rebound DNS name, perhaps.
    #[error("the Host field names a host that this port does not answer for")]
    ForeignHost,
    /// A page of another site sent it.
    #[error("the request was sent by a page of another site")]
    CrossSite,
    /// Without an admin token, only loopback may act.
    #[error("without ADMIN_TOKEN, POST is for clients on loopback only")]
    NotLoopback,
    /// The admin token is missing or wrong.
    #[error("the admin token is missing or wrong")]
    Unauthorized,
    /// The body is over the limit.
    #[error("the body is larger than 64 KiB")]
    TooLarge,
    /// The body broke off or took too long.
    #[error("the body did not arrive whole and in time")]
    BadBody,
    /// The refresh that was asked for failed.
    #[error("no new token: {error}")]
    RefreshFailed {
        /// What went wrong, without secrets.
        error: String,
        /// Whether the API refused what the sources gave.
        refused: bool,
        /// When the next try may help.
        retry_after: Duration,
    },
}

/// The body of an error.
#[derive(Serialize)]
struct Body {
    error: &'static str,
    message: String,
    hint: &'static str,
    /// Of a failed refresh: the API refused what the sources gave.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<bool>,
}

impl AdminError {
    /// The answer that tells the client.
    pub(super) fn answer(&self) -> Answer {
        let refused = match self {
            Self::RefreshFailed { refused, .. } => Some(*refused),
            _ => None,
        };
        let body =
            Body { error: self.code(), message: self.to_string(), hint: self.hint(), refused };
        let mut answer = answer::json(self.status(), &body);
        if let Some((name, value)) = self.field() {
            answer.headers_mut().insert(name, value);
        }
        answer
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::BadHost | Self::BadBody => StatusCode::BAD_REQUEST,
            Self::ForeignHost | Self::CrossSite | Self::NotLoopback => StatusCode::FORBIDDEN,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::RefreshFailed { .. } => StatusCode::BAD_GATEWAY,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::BadHost | Self::BadBody => "bad_request",
            Self::ForeignHost => "host_not_allowed",
            Self::CrossSite => "cross_site",
            Self::NotLoopback => "client_not_allowed",
            Self::Unauthorized => "unauthorized",
            Self::TooLarge => "too_large",
            Self::RefreshFailed { .. } => "refresh_failed",
        }
    }

    fn hint(&self) -> &'static str {
        match self {
            Self::NotFound => "Try /status, /live, /ready, /metrics or the page at /.",
            Self::MethodNotAllowed { .. } => "Use a method from the Allow field.",
            Self::BadHost => "Send one Host field with the address of this port.",
            Self::ForeignHost => "Use localhost, an IP address or a name without a dot.",
            Self::CrossSite => "Send it from the page at / or by a tool such as curl.",
            Self::NotLoopback => "Set ADMIN_TOKEN and send it, or send this from loopback.",
            Self::Unauthorized => "Send Authorization: Bearer with the value of ADMIN_TOKEN.",
            Self::TooLarge | Self::BadBody => "No body is needed here.",
            Self::RefreshFailed { .. } => "See refresh and sources in /status, and the log.",
        }
    }

    /// The field that belongs to this error.
    fn field(&self) -> Option<(header::HeaderName, HeaderValue)> {
        match self {
            Self::MethodNotAllowed { allow } => {
                Some((header::ALLOW, HeaderValue::from_static(allow)))
            }
            Self::Unauthorized => {
                Some((header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")))
            }
            // The rest of the body is not read.
            Self::TooLarge | Self::BadBody => {
                Some((header::CONNECTION, HeaderValue::from_static("close")))
            }
            Self::RefreshFailed { retry_after, .. } => {
                Some((header::RETRY_AFTER, whole_seconds(*retry_after).into()))
            }
            _ => None,
        }
    }
}

/// Rounded up, at least 1.
fn whole_seconds(wait: Duration) -> u64 {
    (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1)
}

#[cfg(test)]
mod tests {
    use super::{AdminError, whole_seconds};
    use http::{StatusCode, header};
    use std::time::Duration;

    #[test]
    fn a_failed_refresh_says_when_to_try_again() {
        let retry_after = Duration::from_millis(4_200);
        let answer = AdminError::RefreshFailed {
            error: "no source".to_owned(),
            refused: false,
            retry_after,
        }
        .answer();
        assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
        assert_eq!(answer.headers()[header::RETRY_AFTER], "5");
    }

    #[test]
    fn retry_after_is_never_zero() {
        assert_eq!(whole_seconds(Duration::ZERO), 1);
        assert_eq!(whole_seconds(Duration::from_secs(7)), 7);
    }

    #[test]
    fn a_wrong_method_learns_the_right_ones() {
        let answer = AdminError::MethodNotAllowed { allow: "GET, HEAD" }.answer();
        assert_eq!(answer.headers()[header::ALLOW], "GET, HEAD");
    }
}
