//! Why no new token came. No error holds a secret.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::SourceKind;
use super::fleet::ALONE_PAUSE;
use crate::token::SharedBackoff;

/// The most that is repeated of what another program said.
const LONGEST_MESSAGE: usize = 200;

/// Why a run ended without a new token.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RefreshError {
    /// Every source failed; what each said.
    #[error("{}", SourceFailure::list(.0))]
    Sources(Vec<SourceFailure>),
    /// The verifier, or the API in its stead, refused the new token at once.
    #[error("the API refuses the new token too")]
    RefusedAgain,
    /// The anti-bot wall let no token pass, a while ago.
    #[error("the anti-bot wall lets no token pass")]
    Walled,
    /// Another sidecar of the fleet has failed, and this one is not to try yet.
    #[error("another sidecar's refresh failed: {}", .0.error)]
    Elsewhere(SharedBackoff),
    /// A failure that is known here, whose back-off still holds for the fleet.
    #[error("{0}")]
    Still(Arc<Self>, SharedBackoff),
    /// Redis is out of order, and not long ago a token was got without it.
    #[error(
        "Redis is out of order, and without it a token is got every {} at most",
        humantime::format_duration(ALONE_PAUSE)
    )]
    Alone(Duration),
    /// Our own fault: the run panicked.
    #[error("the refresh panicked")]
    Panicked,
    /// The process is ending.
    #[error("the refresh was stopped")]
    Stopped,
}

impl RefreshError {
    /// Whether there were new tokens and the API refused them all: no source
    /// is out of order, the API wants none of what they give.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::RefusedAgain => true,
            Self::Still(error, _) => error.is_refusal(),
            Self::Sources(failures) => {
                !failures.is_empty() && failures.iter().all(|failure| failure.error.is_refusal())
            }
            Self::Walled | Self::Elsewhere(_) | Self::Alone(_) | Self::Panicked | Self::Stopped => {
                false
            }
        }
    }

    /// Whether a token came that met the anti-bot wall.
    pub(super) fn meets_wall(&self) -> bool {
        let Self::Sources(failures) = self else {
            return false;
        };
        failures.iter().any(|failure| matches!(failure.error, SourceError::Walled))
    }

    /// Whether a source refuses connections, or breaks them. One that hangs does
    /// not: to find that out takes long, for whoever tries next as well.
    pub(super) fn is_down(&self, source: SourceKind) -> bool {
        let Self::Sources(failures) = self else {
            return false;
        };
        failures.iter().any(|failure| failure.kind == source && failure.error.is_down())
    }

    /// Whether a source could not even be reached, so that its coming back
    /// changes matters.
    pub(super) fn is_unreachable(&self, source: SourceKind) -> bool {
        let Self::Sources(failures) = self else {
            return false;
        };
        failures.iter().any(|failure| failure.kind == source && failure.error.is_unreachable())
    }
}

/// What one source had to say.
#[derive(Debug, Error)]
#[error("{}: {error}", .kind.as_str())]
pub struct SourceFailure {
    /// Which one.
    pub(super) kind: SourceKind,
    /// Its error.
    pub(super) error: SourceError,
}

impl SourceFailure {
    fn list(failures: &[Self]) -> String {
        let parts: Vec<_> = failures.iter().map(Self::to_string).collect();
        if parts.is_empty() {
            return "no source is set".to_owned();
        }
        parts.join("; ")
    }
}

/// Why a source gave no token that can be used.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum SourceError {
    /// No connection, or one that broke before the answer.
    #[error("not reachable: {0}")]
    Unreachable(String),
    /// It took the request and did not answer.
    #[error("no answer within {}", humantime::format_duration(*.0))]
    TimedOut(Duration),
    /// It answered that it is busy, and for how long it wants to be left alone.
    #[error("HTTP {status}: {message}; it asks for a rest of {}", readable(*.rest))]
    Busy {
        /// The status of its answer, 429 or 503.
        status: u16,
        /// Its own words, cut.
        message: String,
        /// From its `Retry-After`, at most 10 min.
        rest: Duration,
    },
    /// It was not asked, since it wants to be left alone so much longer.
    #[error("not asked: it wants to be left alone for another {}", readable(*.0))]
    Resting(Duration),
    /// It answered that it failed.
    #[error("HTTP {status}: {message}")]
    Failed {
        /// The status of its answer.
        status: u16,
        /// Its own words, cut.
        message: String,
    },
    /// Its answer cannot be read.
    #[error("HTTP {status}, an answer that cannot be read: {problem}")]
    Garbled {
        /// The status of its answer.
        status: u16,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Its answer is larger than what is read.
    #[error("an answer above {0} bytes")]
    TooLarge(usize),
    /// Its answer has no cookie of the wanted names.
    #[error("no cookie")]
    NoCookie,
    /// The same, and what asking once more in a session led to.
    #[error("no cookie; asked again in a session: {0}")]
    NoCookieEither(Box<SourceError>),
    /// The cookie or field is there and holds no token.
    #[error("what it gave is no token")]
    NoToken,
    /// The token's time is over already.
    #[error("its token has expired already")]
    Expired,
    /// The token is one that the API has refused before.
    #[error("its token is one that the API has refused")]
    KnownRefused,
    /// The verifier refuses the token.
    #[error("the API refuses its token")]
    Rejected,
    /// The verifier meets the anti-bot wall, with the token's cookies too.
    #[error("its token meets the anti-bot wall (403), with its cookies too")]
    Walled,
    /// Several doors were tried.
    #[error("{}", list_doors(.0))]
    Doors(Vec<(String, SourceError)>),
}

impl SourceError {
    fn is_refusal(&self) -> bool {
        matches!(self, Self::KnownRefused | Self::Rejected)
    }

    fn is_down(&self) -> bool {
        match self {
            Self::NoCookieEither(error) => error.is_down(),
            other => matches!(other, Self::Unreachable(_)),
        }
    }

    fn is_unreachable(&self) -> bool {
        match self {
            Self::NoCookieEither(error) => error.is_unreachable(),
            other => matches!(other, Self::TimedOut(_)) || other.is_down(),
        }
    }

    /// Whether the token that came is dead.
    pub(super) fn is_of_dead_token(&self) -> bool {
        matches!(self, Self::KnownRefused | Self::Rejected | Self::Expired)
    }

    /// The same failure with the rest that its answer asked for.
    pub(super) fn with_rest(self, rest: Duration) -> Self {
        match self {
            Self::Failed { status, message } => Self::Busy { status, message, rest },
            other => other,
        }
    }
}

fn list_doors(doors: &[(String, SourceError)]) -> String {
    let parts: Vec<_> = doors.iter().map(|(door, error)| format!("{door}: {error}")).collect();
    parts.join(", ")
}

/// An error with its causes, since the outermost one seldom says much.
pub(super) fn with_causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = cause.source();
    }
    cut(&text)
}

/// One printable line of at most 200 characters.
pub(super) fn cut(text: &str) -> String {
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let mut line: String = text.trim().chars().take(LONGEST_MESSAGE).map(printable).collect();
    if text.trim().chars().nth(LONGEST_MESSAGE).is_some() {
        line.push('…');
    }
    line
}

/// Shows a duration as people write it, down to milliseconds.
pub(super) fn readable(duration: Duration) -> impl fmt::Display {
    humantime::format_duration(Duration::from_millis(
        u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_run_names_every_source() {
        let error = RefreshError::Sources(vec![
            SourceFailure {
                kind: SourceKind::FlareSolverr,
                error: SourceError::TimedOut(Duration::from_secs(105)),
            },
            SourceFailure {
                kind: SourceKind::Direct,
                error: SourceError::Doors(vec![
                    ("https://api".into(), SourceError::Rejected),
                    ("https://shop".into(), SourceError::NoCookie),
                ]),
            },
        ]);
        let expected = "flaresolverr: no answer within 1m 45s; \
                        direct: https://api: the API refuses its token, https://shop: no cookie";
        assert_eq!(error.to_string(), expected);
        assert!(error.is_unreachable(SourceKind::FlareSolverr));
        assert!(!error.is_unreachable(SourceKind::Direct));
        assert!(!error.is_down(SourceKind::FlareSolverr));
    }

    #[test]
    fn foreign_words_are_cut_to_one_line() {
        assert_eq!(cut(" a\nb\u{7}c "), "a b c");
        assert_eq!(cut(&"я".repeat(500)).chars().count(), 201);
    }
}
