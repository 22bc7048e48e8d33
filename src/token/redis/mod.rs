//! The token in Redis, shared with other sidecars and with older programs.
//!
//! Two keys that other programs share: the bare JWT, and the cookies that came
//! with it as a JSON object. Beside them keys of ours, by which the sidecars of
//! a fleet share one solve: metadata, the lease and what else is in `script.rs`.
//!
//! # Invariants
//!
//! - Token, cookies and metadata are written together or not at all, with the
//!   same time to live.
//! - What others may have written there is read with tolerance; nothing in it
//!   can fail a load.
//! - No operation lasts much longer than a second, and none panics.

#[cfg(test)]
mod conformance;
mod fleet;
mod link;
#[cfg(test)]
pub(crate) mod model;
mod notices;
mod pause;
mod place;
mod probe;
mod script;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_address;
#[cfg(test)]
mod tests_notices;
#[cfg(test)]
mod tests_sentinel;

use std::{
    collections::HashSet,
    str,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use redis::pipe;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tracing::warn;

use super::{Clearance, Cookies, Published, StoreError, Timestamp, Token};
use crate::config::RedisSettings;
use link::Link;
use script::{Keys, Scripts};

#[cfg(test)]
pub(crate) use fleet::{RawEntrance, committed};
#[cfg(test)]
pub(crate) use script::{Call, Operation};

pub use fleet::{
    Commit, Denials, Entrance, LEASE, Lack, Lease, Owner, Request, SharedBackoff, Standing,
    ValueId, Wish,
};
pub use probe::RedisFacts;

/// The cookie from which older programs read the token.
const TOKEN_COOKIE: &str = "access-token";

/// Unreadable values that are remembered as reported.
const MAX_REPORTED: usize = 64;

/// What a load has found.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Stored {
    /// The token.
    pub token: Token,
    /// The cookies beside it, the token's own among them, and the user-agent
    /// that goes with them.
    pub clearance: Clearance,
    /// Where it was saved the token worked only with these.
    pub needs_clearance: bool,
    /// Another program has put the token there: no metadata of ours fits it.
    pub foreign: bool,
    /// Somebody has put it there by hand, be it that a sidecar has adopted it since.
    pub by_hand: bool,
    /// The sidecar that saved the token had it verified.
    pub verified: bool,
    /// The cookies are readable and hold the same token.
    pub cookies_agree: bool,
}

/// What we note about a token that we save. No secret is in it.
#[derive(Serialize, Deserialize)]
struct Metadata {
    sha256: String,
    #[serde(default)]
    source: String,
    #[serde(default)]
    iat: Option<u64>,
    #[serde(default)]
    exp: Option<u64>,
    #[serde(default)]
    verified: bool,
    #[serde(default)]
    clearance: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    by_hand: bool,
    #[serde(default)]
    user_agent: Option<String>,
    #[serde(default)]
    saved_at: u64,
}

/// The keys in Redis. Connects when first used.
pub struct RedisStore {
    link: Link,
    scripts: Scripts,
    key: String,
    cookies_key: String,
    keys: Keys,
    notices: watch::Sender<u64>,
    ttl: Duration,
    /// Digests of unreadable values that have been reported.
    reported: Mutex<HashSet<[u8; 32]>>,
}

impl RedisStore {
    /// Checks the settings and reads the TLS files. Does not connect.
    ///
    /// # Errors
    ///
    /// [`StoreError`] for settings that cannot work.
    pub fn new(settings: RedisSettings) -> Result<Self, StoreError> {
        let keys = Keys::new(&settings.key, &settings.cookies_key);
        if !keys.are_distinct() {
            return Err(StoreError::RedisCookiesKey);
        }
        Ok(Self {
            link: Link::new(&settings)?,
            scripts: Scripts::new(),
            keys,
            notices: watch::Sender::new(0),
            key: settings.key,
            cookies_key: settings.cookies_key,
            ttl: settings.ttl,
            reported: Mutex::default(),
        })
    }

    /// Reads the token and what lies beside it.
    ///
    /// `None`: there is no token, or its value cannot be read, which is
    /// reported once for each such value.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when the server cannot be asked, after about 1 s at most.
    pub async fn load(&self) -> Result<Option<Stored>, StoreError> {
        // One command, so that the values belong together. A key of another
        // type counts as absent.
        let mut commands = pipe();
        commands.cmd("MGET").arg(&self.key).arg(&self.cookies_key).arg(self.keys.meta());
        let answer: Result<([Option<Vec<u8>>; 3],), _> = self.link.run(&commands).await;
        let [token, cookies, metadata] = match answer {
            Ok((values,)) => values,
            Err(error) => return Err(self.plainer(error).await),
        };
        let token = token.and_then(|value| self.read_token(&value));
        Ok(token.map(|token| self.stored(token, cookies.as_deref(), metadata.as_deref())))
    }

    /// Stores the token for whoever looks, as a program does that belongs to no
    /// fleet: another program's value is replaced, a newer token of a sidecar's
    /// is not.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when the server did not confirm it, after about 3 s at
    /// most.
    pub async fn save(&self, published: &Published, now: Timestamp) -> Result<(), StoreError> {
        let outcome = self.commit(published, None, None, now).await?;
        if outcome == Commit::Foreign {
            let look = Request { owner: Owner::random(), wish: Wish::None, known: Vec::new() };
            let seen = self.enter(&look, 0).await?.value;
            self.commit(published, None, seen.as_ref(), now).await?;
        }
        Ok(())
    }

    /// Asks the server for a sign of life.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when there was none, after about 1 s at most.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let mut commands = pipe();
        commands.cmd("PING").ignore();
        self.link.run(&commands).await
    }

    fn stored(&self, token: Token, cookies: Option<&[u8]>, metadata: Option<&[u8]>) -> Stored {
        let metadata = metadata
            .and_then(|value| serde_json::from_slice::<Metadata>(value).ok())
            .filter(|metadata| metadata.sha256 == token.digest_hex());
        let cookies = cookies.and_then(|value| self.read_cookies(value));
        let cookies_agree = cookies.as_ref().is_some_and(|cookies| {
            let beside = cookies.get(TOKEN_COOKIE).map(Token::parse);
            beside.is_some_and(|beside| beside.as_ref() == Ok(&token))
        });
        let user_agent = metadata.as_ref().and_then(|metadata| metadata.user_agent.as_deref());
        Stored {
            token,
            clearance: Clearance::new(cookies.unwrap_or_default(), user_agent),
            needs_clearance: metadata.as_ref().is_some_and(|metadata| metadata.clearance),
            foreign: metadata.is_none(),
            by_hand: metadata.as_ref().is_none_or(|metadata| metadata.by_hand),
            verified: metadata.is_some_and(|metadata| metadata.verified),
            cookies_agree,
        }
    }

    /// A logged-in visitor's token is none for us: it must not become everybody's.
    fn read_token(&self, value: &[u8]) -> Option<Token> {
        let token = str::from_utf8(value).ok().map(Token::parse);
        let token = token.and_then(Result::ok).filter(|token| !token.is_personal());
        if token.is_none() {
            self.report_unreadable(&self.key, value);
        }
        token
    }

    fn read_cookies(&self, value: &[u8]) -> Option<Cookies> {
        let Ok(pairs) = serde_json::from_slice::<Map<String, Value>>(value) else {
            self.report_unreadable(&self.cookies_key, value);
            return None;
        };
        Some(cookies(pairs))
    }

    fn report_unreadable(&self, key: &str, value: &[u8]) {
        // The value may be a secret with a slip in it, so only its digest is kept.
        let digest = Sha256::new_with_prefix(key).chain_update([0]).chain_update(value);
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.len() >= MAX_REPORTED {
            reported.clear();
        }
        if reported.insert(digest.finalize().into()) {
            warn!(key, length = value.len(), "unreadable value in Redis ignored");
        }
    }

    fn seconds_to_live(&self, token: &Token, now: Timestamp) -> u64 {
        let longest = self.ttl.as_secs();
        let left = token.expires_at().map(|end| end.0.saturating_sub(now.0));
        left.map_or(longest, |left| left.min(longest)).max(1)
    }
}

impl Metadata {
    fn of(published: &Published, now: Timestamp) -> Self {
        let token = &published.token;
        let user_agent = published.clearance.user_agent().and_then(|agent| agent.to_str().ok());
        Self {
            sha256: token.digest_hex(),
            source: published.source.as_str().to_owned(),
            iat: token.issued_at().map(|time| time.0),
            exp: token.expires_at().map(|time| time.0),
            verified: published.is_verified(),
            clearance: published.needs_clearance,
            by_hand: published.by_hand,
            user_agent: user_agent.map(str::to_owned),
            saved_at: now.0,
        }
    }

    fn json(&self) -> String {
        serde_json::json!(self).to_string()
    }
}

fn json(cookies: &Cookies) -> String {
    let pairs = cookies.iter().map(|(name, value)| (name.to_owned(), value.into()));
    Value::Object(pairs.collect()).to_string()
}

/// What in a JSON object is a cookie.
fn cookies(pairs: Map<String, Value>) -> Cookies {
    let raw = |(name, value)| match value {
        Value::String(value) => Some((name, value)),
        _ => None, // No cookie's value.
    };
    Cookies::from_pairs(pairs.into_iter().filter_map(raw))
}

fn sha1_hex(bytes: &[u8]) -> String {
    let digest = Sha1::digest(bytes);
    digest.iter().fold(String::with_capacity(40), |text, byte| format!("{text}{byte:02x}"))
}
