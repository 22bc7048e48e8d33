//! A text that must never be printed.

use std::fmt;

use sha2::{Digest as _, Sha256};

/// A text that must never be printed: its `Debug` and `Display` forms hide it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text`.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Whether `given` is this text. Takes the same time wherever they differ:
    /// digests are compared, to the end.
    #[must_use]
    pub fn is(&self, given: &[u8]) -> bool {
        let (given, own) = (Sha256::digest(given), Sha256::digest(&self.0));
        given.iter().zip(&own).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
    }

    /// The text itself, for the wire.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_text_is_the_secret() {
        let secret = Secret::new("pass:word");
        assert!(secret.is(b"pass:word"));
        for other in [&b""[..], b"pass:wor", b"pass:words", b"Pass:word", b"\0pass:word"] {
            assert!(!secret.is(other), "{other:?}");
        }
    }
}
