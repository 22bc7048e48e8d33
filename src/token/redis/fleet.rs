//! What a fleet of sidecars says to each other by way of Redis.
//!
//! The lease only saves work: whoever has it solves, the others wait. What
//! keeps the stored token right is the commit, which refuses whoever has lost
//! the lease, and what is older than what is stored.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::script::{Call, Operation};
use super::{Metadata, RedisStore, StoreError, Stored, TOKEN_COOKIE, json, sha1_hex};
use crate::token::{Clearance, Published, Timestamp, Token};

/// How long a lease lives that is not renewed.
pub const LEASE: Duration = Duration::from_secs(15);
/// No back-off holds for longer, whoever has left it there: somewhat more than
/// the longest that a sidecar makes.
const LONGEST_BACKOFF: Duration = Duration::from_mins(11);
/// Letters of a failure's text that are taken from Redis.
const LONGEST_ERROR: usize = 1000;
/// Owners without a solver, in a row, before the run counts as failed; by the
/// [`Lack::weight`] of each.
const MOST_TRIES: u32 = 64;
/// How long these count.
const TRIES_MEMORY: Duration = Duration::from_secs(30);
/// How long a sidecar that was told to wait counts as waiting: longer than the
/// longest pause before it looks again.
const WAITING: Duration = Duration::from_secs(4);
/// How long a refused token is remembered: somewhat longer than the shop's live.
const DENIED_MEMORY: Duration = Duration::from_hours(48);
/// The most refused tokens that are remembered; the oldest gives way.
const MOST_DENIED: u32 = 256;

/// A name that nobody else has, for one turn at the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner(String);

impl Owner {
    /// A new one.
    #[must_use]
    pub fn random() -> Self {
        Self(format!("{:032x}", fastrand::u128(..)))
    }

    /// As it stands in Redis.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    #[cfg(test)]
    pub(crate) fn named(name: impl Into<String>) -> Self {
        Self(name.into())
    }
}

/// The lease of an owner, and the number of its acquisition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Whose it is.
    pub owner: Owner,
    /// Rises with each acquisition by anybody.
    pub epoch: u64,
}

/// How much the lease is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wish {
    /// Not at all: it is only looked.
    None,
    /// The token in force still works.
    Routine,
    /// Requests wait.
    Needed,
    /// Somebody said so: whatever is stored, and whatever failed before.
    Force,
}

impl Wish {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Routine => "routine",
            Self::Needed => "needed",
            Self::Force => "force",
        }
    }
}

/// Tells stored values apart, whatever they are: the SHA-1 in hex.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueId(String);

impl ValueId {
    /// Of a value as it is stored.
    pub(crate) fn of(value: &[u8]) -> Self {
        Self(sha1_hex(value))
    }

    /// Of the token as we store it.
    #[must_use]
    pub fn of_token(token: &Token) -> Self {
        Self::of(token.expose().as_bytes())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A wish to come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Whose lease it is to be.
    pub owner: Owner,
    /// How much it is wanted.
    pub wish: Wish,
    /// Stored values that the caller has found useless.
    pub known: Vec<ValueId>,
}

/// What is there, and whose turn it is.
#[derive(Clone, Debug)]
pub struct Entrance {
    /// The stored token, if it can be read.
    pub stored: Option<Stored>,
    /// What lies where the token should, readable or not.
    pub value: Option<ValueId>,
    /// A sidecar has seen the stored token refused.
    pub is_denied: bool,
    /// A token that a sidecar has put in force without a verdict.
    pub unverified: Option<Stored>,
    /// What lies where that should, readable here or not.
    pub unverified_value: Option<ValueId>,
    /// A sidecar has seen that one refused.
    pub is_unverified_denied: bool,
    /// What the last run failed with, while no other one may begin.
    pub backoff: Option<SharedBackoff>,
    /// Whose turn it is.
    pub turn: Standing,
    /// Refused tokens that were not known to the caller.
    pub denials: Denials,
}

impl Entrance {
    /// Whether the caller has the lease.
    pub fn is_granted(&self) -> bool {
        matches!(self.turn, Standing::Granted { .. })
    }
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The caller's.
    Granted {
        /// The number of the acquisition.
        epoch: u64,
    },
    /// Somebody else's, for so long unless it is renewed.
    Held(Duration),
    /// Nobody's.
    Free,
}

/// Refused tokens.
#[derive(Clone, Debug, Default)]
pub struct Denials {
    /// The number of the last one.
    pub last: u64,
    /// The SHA-256 of each.
    pub digests: Vec<[u8; 32]>,
}

/// The outcome of a failed run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SharedBackoff {
    /// What it failed with; no secret is in it.
    pub error: String,
    /// How many have failed in a row.
    pub failures: u32,
    /// The token in force worked on: whoever needs one may try.
    pub routine: bool,
    /// The number of the acquisition.
    pub epoch: u64,
    /// How long it holds on.
    #[serde(skip)]
    pub left: Duration,
}

/// Why a sidecar hands its lease on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lack {
    /// Its FlareSolverr cannot be reached. That shows at once, mostly.
    Away,
    /// It has none, and its other sources have failed. That takes longer, and
    /// others without one fare no better.
    None,
}

impl Lack {
    fn weight(self) -> u32 {
        match self {
            Self::Away => 1,
            Self::None => MOST_TRIES / 4,
        }
    }
}

/// What came of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// It is stored.
    Committed,
    /// The lease is no longer the caller's.
    Lost,
    /// A later acquisition has committed.
    Fenced,
    /// A token at least as new is stored.
    Older,
    /// Another program's value is stored, which the caller has not seen.
    Foreign,
}

/// A token on its way to the others that nobody could verify.
#[derive(Serialize, Deserialize)]
struct Unverified {
    token: String,
    sha256: String,
    #[serde(default)]
    cookies: Map<String, Value>,
    #[serde(default)]
    user_agent: Option<String>,
    #[serde(default)]
    clearance: bool,
    #[serde(default)]
    iat: Option<u64>,
    epoch: u64,
}

/// What the script that enters answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RawEntrance {
    pub(crate) token: Option<Vec<u8>>,
    pub(crate) cookies: Option<Vec<u8>>,
    pub(crate) metadata: Option<Vec<u8>>,
    pub(crate) is_denied: bool,
    pub(crate) unverified: Option<Vec<u8>>,
    pub(crate) is_unverified_denied: bool,
    pub(crate) backoff: Option<Vec<u8>>,
    pub(crate) backoff_ms: u64,
    pub(crate) state: String,
    /// The epoch, or the milliseconds that the lease has left.
    pub(crate) detail: u64,
    pub(crate) last_denial: u64,
    pub(crate) denials: Vec<String>,
}

pub(super) type Bytes = Option<Vec<u8>>;
pub(super) type Answer =
    (Bytes, Bytes, Bytes, bool, Bytes, bool, Bytes, u64, String, u64, u64, Vec<String>);

impl From<Answer> for RawEntrance {
    fn from(answer: Answer) -> Self {
        Self {
            token: answer.0,
            cookies: answer.1,
            metadata: answer.2,
            is_denied: answer.3,
            unverified: answer.4,
            is_unverified_denied: answer.5,
            backoff: answer.6,
            backoff_ms: answer.7,
            state: answer.8,
            detail: answer.9,
            last_denial: answer.10,
            denials: answer.11,
        }
    }
}

impl RedisStore {
    /// Reads all there is, and takes the lease where nobody has it and nothing
    /// speaks against it: neither something stored that the caller does not
    /// know, nor a back-off that holds for its wish.
    ///
    /// `last_denial` is the number of the last refusal that the caller knows of.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when there was no answer, after about 1 s at most. The
    /// lease may have been granted all the same.
    pub async fn enter(&self, request: &Request, last_denial: u64) -> Result<Entrance, StoreError> {
        if matches!(request.wish, Wish::Needed | Wish::Force) {
            self.link.cut_pause_short();
        }
        let answer: Answer = self.call(Call::enter(request, last_denial)).await?;
        Ok(self.entrance(answer.into()))
    }

    /// Whether Redis did not answer in time when it was last asked, and has not
    /// been silent for long: it may only be busy.
    pub fn is_late(&self) -> bool {
        self.link.is_late()
    }

    /// Prolongs the lease. Returns whether it was still the owner's.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when there was no answer, after about 1 s at most.
    pub async fn renew(&self, owner: &Owner) -> Result<bool, StoreError> {
        self.call(Call::renew(owner)).await
    }

    /// Gives the lease back. Returns whether it was still the owner's.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when there was no answer, after about 1 s at most.
    pub async fn release(&self, owner: &Owner) -> Result<bool, StoreError> {
        self.call(Call::release(owner)).await
    }

    /// Stores a token with its cookies and metadata, all or nothing, and gives
    /// the lease back. They live as long as the token does, but no longer than
    /// the settings say. Without a lease it takes more to replace what is
    /// stored: see [`Commit`]. `seen` is a stored value to be replaced
    /// whatever it is.
    ///
    /// A token that has expired by `now` is not written, and counts as stored.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when the server did not confirm it, after about 1 s at
    /// most.
    pub async fn commit(
        &self,
        published: &Published,
        lease: Option<&Lease>,
        seen: Option<&ValueId>,
        now: Timestamp,
    ) -> Result<Commit, StoreError> {
        let token = &published.token;
        if !token.is_live(now) {
            return Ok(Commit::Committed);
        }
        let ttl = self.seconds_to_live(token, now);
        let answer: String = self.call(Call::commit(published, lease, seen, (now, ttl))).await?;
        committed(&answer)
    }

    /// Shows the others a token that nobody could verify, and gives the lease
    /// back.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when the server did not confirm it, after about 1 s at
    /// most.
    pub async fn share(
        &self,
        published: &Published,
        lease: &Lease,
        now: Timestamp,
    ) -> Result<Commit, StoreError> {
        let token = &published.token;
        if !token.is_live(now) {
            return Ok(Commit::Committed);
        }
        let ttl = self.seconds_to_live(token, now);
        let answer: String = self.call(Call::share(published, lease, ttl)).await?;
        committed(&answer)
    }

    /// The owner has no solver that answers: gives the lease to whoever waits for
    /// it, or listens. Returns whether somebody else may have it; else it is still
    /// the owner's.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when there was no answer, after about 1 s at most.
    pub async fn hand_on(&self, lease: &Lease, lack: Lack) -> Result<bool, StoreError> {
        self.call(Call::hand_on(lease, lack)).await
    }

    /// Tells the others that the run has failed, and gives the lease back.
    /// Returns whether that still concerned anybody.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when there was no answer, after about 1 s at most.
    pub async fn fail(&self, lease: &Lease, backoff: &SharedBackoff) -> Result<bool, StoreError> {
        self.call(Call::fail(lease, backoff)).await
    }

    /// Tells the others that the API refuses `token`. Returns whether that was
    /// news.
    ///
    /// # Errors
    ///
    /// [`StoreError`] when there was no answer, after about 1 s at most.
    pub async fn deny(&self, token: &Token) -> Result<bool, StoreError> {
        self.call(Call::deny(token)).await
    }

    /// What the answer of the script means.
    pub(crate) fn entrance(&self, raw: RawEntrance) -> Entrance {
        let value = raw.token.as_deref().map(ValueId::of);
        let token = raw.token.and_then(|value| self.read_token(&value));
        let stored =
            token.map(|token| self.stored(token, raw.cookies.as_deref(), raw.metadata.as_deref()));
        Entrance {
            stored,
            value,
            is_denied: raw.is_denied,
            unverified_value: raw.unverified.as_deref().and_then(Unverified::id_of),
            unverified: raw.unverified.and_then(|value| Unverified::read(&value)),
            is_unverified_denied: raw.is_unverified_denied,
            backoff: raw.backoff.map(|value| SharedBackoff::read(&value, raw.backoff_ms)),
            turn: match &*raw.state {
                "granted" => Standing::Granted { epoch: raw.detail },
                "held" => Standing::Held(Duration::from_millis(raw.detail)),
                _ => Standing::Free,
            },
            denials: Denials {
                last: raw.last_denial,
                digests: raw.denials.iter().filter_map(|digits| digest(digits)).collect(),
            },
        }
    }
}

impl Call {
    pub(crate) fn enter(request: &Request, last_denial: u64) -> Self {
        let (lease, pause, waiting) = (millis(LEASE), millis(LONGEST_BACKOFF), millis(WAITING));
        let (owner, wish) = (request.owner.as_str(), request.wish.as_str());
        let fixed = [owner, &lease, wish, &last_denial.to_string(), &pause, &waiting];
        let mut call = Self::new(Operation::Enter, fixed);
        call.arguments.extend(request.known.iter().map(|value| value.as_str().to_owned()));
        call
    }

    pub(crate) fn renew(owner: &Owner) -> Self {
        Self::new(Operation::Renew, [owner.as_str(), &millis(LEASE)])
    }

    pub(crate) fn release(owner: &Owner) -> Self {
        Self::new(Operation::Release, [owner.as_str()])
    }

    /// The last argument is the time, and the seconds that the keys are to live.
    pub(crate) fn commit(
        published: &Published,
        lease: Option<&Lease>,
        seen: Option<&ValueId>,
        (now, ttl): (Timestamp, u64),
    ) -> Self {
        let token = &published.token;
        let cookies = published.clearance.cookies().with_token(TOKEN_COOKIE, token);
        let arguments = [
            lease.map_or("", |lease| lease.owner.as_str()),
            &lease.map_or(0, |lease| lease.epoch).to_string(),
            token.expose(),
            &json(&cookies),
            &Metadata::of(published, now).json(),
            &ttl.to_string(),
            &issued(token),
            seen.map_or("", ValueId::as_str),
        ];
        Self::new(Operation::Commit, arguments)
    }

    pub(crate) fn share(published: &Published, lease: &Lease, ttl: u64) -> Self {
        let value = ValueId::of_token(&published.token);
        let arguments = [
            lease.owner.as_str(),
            &lease.epoch.to_string(),
            &Unverified::of(published, lease.epoch).json(),
            &ttl.to_string(),
            &issued(&published.token),
            value.as_str(),
        ];
        Self::new(Operation::Share, arguments)
    }

    pub(crate) fn hand_on(lease: &Lease, lack: Lack) -> Self {
        let (epoch, weight) = (lease.epoch.to_string(), lack.weight().to_string());
        let (most, memory) = (MOST_TRIES.to_string(), millis(TRIES_MEMORY));
        let arguments = [lease.owner.as_str(), &epoch, &weight, &most, &memory];
        Self::new(Operation::HandOn, arguments)
    }

    pub(crate) fn fail(lease: &Lease, backoff: &SharedBackoff) -> Self {
        let note = serde_json::json!(SharedBackoff { epoch: lease.epoch, ..backoff.clone() });
        let left = millis(backoff.left.max(Duration::from_millis(1)));
        let arguments = [lease.owner.as_str(), &lease.epoch.to_string(), &note.to_string(), &left];
        Self::new(Operation::Fail, arguments)
    }

    pub(crate) fn deny(token: &Token) -> Self {
        let (memory, most) = (millis(DENIED_MEMORY), MOST_DENIED.to_string());
        Self::new(Operation::Deny, ["", &token.digest_hex(), &memory, &most])
    }
}

impl SharedBackoff {
    /// Whatever lies there holds as long as Redis says. Its words go into logs,
    /// so they are cut to one line.
    fn read(value: &[u8], left_ms: u64) -> Self {
        let read: Self = serde_json::from_slice(value).unwrap_or_default();
        let printable = |letter: &char| !letter.is_control();
        let error = read.error.chars().filter(printable).take(LONGEST_ERROR).collect();
        Self { error, left: Duration::from_millis(left_ms), ..read }
    }
}

impl Unverified {
    fn of(published: &Published, epoch: u64) -> Self {
        let (token, clearance) = (&published.token, &published.clearance);
        let cookies = clearance.cookies().with_token(TOKEN_COOKIE, token);
        let pairs = cookies.iter().map(|(name, value)| (name.to_owned(), value.into()));
        let user_agent = clearance.user_agent().and_then(|agent| agent.to_str().ok());
        Self {
            token: token.expose().to_owned(),
            sha256: token.digest_hex(),
            cookies: pairs.collect(),
            user_agent: user_agent.map(str::to_owned),
            clearance: published.needs_clearance,
            iat: token.issued_at().map(|time| time.0),
            epoch,
        }
    }

    fn json(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// Also of what another release has written.
    fn id_of(value: &[u8]) -> Option<ValueId> {
        let value: Value = serde_json::from_slice(value).ok()?;
        value["token"].as_str().map(|token| ValueId::of(token.as_bytes()))
    }

    fn read(value: &[u8]) -> Option<Stored> {
        let unverified: Self = serde_json::from_slice(value).ok()?;
        let token = Token::parse(&unverified.token).ok()?;
        let cookies = super::cookies(unverified.cookies);
        Some(Stored {
            token,
            clearance: Clearance::new(cookies, unverified.user_agent.as_deref()),
            needs_clearance: unverified.clearance,
            foreign: false,
            by_hand: false,
            verified: false,
            cookies_agree: true,
        })
    }
}

pub(crate) fn committed(answer: &str) -> Result<Commit, StoreError> {
    match answer {
        "committed" => Ok(Commit::Committed),
        "lost" => Ok(Commit::Lost),
        "fenced" => Ok(Commit::Fenced),
        "older" => Ok(Commit::Older),
        "foreign" => Ok(Commit::Foreign),
        _ => Err(StoreError::RedisAnswer { category: "an unknown outcome".to_owned() }),
    }
}

fn issued(token: &Token) -> String {
    token.issued_at().map(|time| time.0.to_string()).unwrap_or_default()
}

fn millis(duration: Duration) -> String {
    duration.as_millis().to_string()
}

/// The bytes that 64 hex digits stand for.
fn digest(digits: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if digits.len() != 64 || !digits.is_ascii() {
        return None;
    }
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&digits[at..at + 2], 16).ok()?;
    }
    Some(bytes)
}
