//! Tokens as the shop makes them, and the list of those that it accepts.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::json;
use sha2::{Digest, Sha256};

/// The life of every anonymous token seen, in seconds.
pub(crate) const LIFE: u64 = 168_000;

/// Seconds since the epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// A JWT to be made; every one is different, even within a second.
pub(crate) struct Jwt {
    issued: u64,
    expires: u64,
    kind: u64,
}

impl Jwt {
    /// An anonymous token issued now.
    pub(crate) fn anonymous() -> Self {
        Self { issued: now(), expires: now() + LIFE, kind: 10 }
    }

    /// A logged-in customer's token issued now.
    pub(crate) fn personal() -> Self {
        Self { issued: now(), expires: now() + 3600, kind: 20 }
    }

    /// Moves the issue `seconds` into the past; the life stays.
    pub(crate) fn issued_ago(mut self, seconds: u64) -> Self {
        self.issued -= seconds;
        self.expires -= seconds;
        self
    }

    /// Moves the issue into the future, as a clock that is ahead would.
    pub(crate) fn issued_in(mut self, seconds: u64) -> Self {
        self.issued += seconds;
        self.expires += seconds;
        self
    }

    /// Lets it end `seconds` from now; negative is past.
    pub(crate) fn expires_in(mut self, seconds: i64) -> Self {
        self.expires = now().checked_add_signed(seconds).unwrap();
        self.issued = self.issued.min(self.expires.saturating_sub(60));
        self
    }

    /// The bare JWT.
    pub(crate) fn make(&self) -> String {
        let issuer = if self.kind == 10 { "/api/v1/auth/anonymous" } else { "https://user-right" };
        let subject: String =
            (0..64).map(|_| char::from(b"0123456789abcdef"[fastrand::usize(..16)])).collect();
        let claims = json!({"exp": self.expires, "iat": self.issued, "iss": issuer, "sub": subject, "type": self.kind});
        let signature: Vec<u8> = (0..32).map(|_| fastrand::u8(..)).collect();
        format!(
            "{}.{}.{}",
            URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","typ":"JWT"}"#),
            URL_SAFE_NO_PAD.encode(claims.to_string()),
            URL_SAFE_NO_PAD.encode(signature)
        )
    }
}

/// What logs, `/status` and commands call a token.
pub(crate) fn fingerprint(token: &str) -> String {
    use std::fmt::Write as _;
    Sha256::digest(token).iter().take(4).fold(String::new(), |mut out, byte| {
        write!(out, "{byte:02x}").unwrap();
        out
    })
}

/// The tokens that the shop accepts at the moment, shared by its stand-ins.
#[derive(Clone, Default)]
pub(crate) struct Tokens(Arc<Mutex<Book>>);

#[derive(Default)]
struct Book {
    accepted: HashSet<String>,
    issued: Vec<String>,
}

impl Tokens {
    /// A fresh anonymous token, accepted from now on.
    pub(crate) fn issue(&self) -> String {
        let token = Jwt::anonymous().make();
        self.accept(&token);
        self.0.lock().unwrap().issued.push(token.clone());
        token
    }

    pub(crate) fn accept(&self, token: &str) {
        self.0.lock().unwrap().accepted.insert(token.to_owned());
    }

    /// Refuses every token issued so far.
    pub(crate) fn kill_all(&self) {
        self.0.lock().unwrap().accepted.clear();
    }

    /// Is this the value of an `Authorization` field that the shop accepts?
    pub(crate) fn authorizes(&self, authorization: &str) -> bool {
        let bare = authorization.strip_prefix("Bearer ").unwrap_or_default();
        self.0.lock().unwrap().accepted.contains(bare)
    }

    /// Every token issued by [`Self::issue`], in order.
    pub(crate) fn issued(&self) -> Vec<String> {
        self.0.lock().unwrap().issued.clone()
    }

    /// The token issued last.
    pub(crate) fn latest(&self) -> String {
        self.issued().pop().expect("a token was issued")
    }
}
