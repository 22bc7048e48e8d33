//! Redis and the env file, and what is known of them.
//!
//! Each trouble is counted, and told once; what to do about what lies there, and
//! when to write, `in_step.rs` decides.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};
use tracing::{debug, info, warn};

use super::health::{Access, RedisHealth};
use super::lock;
use super::schedule::WALL_PAUSE;
use crate::metrics::Metrics;
use crate::token::{
    Candidate, Commit, Entrance, EnvFile, Generation, Lack, Lease, Owner, Published, RedisStore,
    RedisTrouble, Request, SharedBackoff, StoreError, Timestamp, Token, ValueId, Wish,
};

/// What a look into the env file may take; Redis has its own bound.
const LOOK: Duration = Duration::from_secs(1);

/// The stores that are set, and what is known of them.
pub(super) struct Stores {
    pub(super) redis: Option<Arc<RedisStore>>,
    env_file: Option<Arc<EnvFile>>,
    metrics: Arc<Metrics>,
    redis_health: Mutex<RedisHealth>,
    env_file_error: Mutex<Option<String>>,
    /// The generation that lies in Redis.
    pub(super) in_redis: AtomicU64,
    /// Redis has lost what was written.
    pub(super) lost: Notify,
    /// The stored value that ours is to replace, whatever it is.
    pub(super) seen: Mutex<Option<ValueId>>,
    /// The generation that was asked about since others say it is refused.
    pub(super) doubted: AtomicU64,
    /// A foreign value that the env file's token was preferred to at start.
    pub(super) passed_over: Mutex<Option<ValueId>>,
    /// The number of the last refusal in Redis that is known here.
    last_denial: AtomicU64,
    /// The stored token that last met the wall from here, and when.
    walled: Mutex<Option<(Candidate, Instant)>>,
}

/// Redis is not set, or it is down.
pub(super) struct NoAnswer;

impl Stores {
    /// Does no I/O.
    pub(super) fn new(
        redis: Option<RedisStore>,
        env_file: Option<EnvFile>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            redis: redis.map(Arc::new),
            env_file: env_file.map(Arc::new),
            metrics,
            redis_health: Mutex::default(),
            env_file_error: Mutex::default(),
            in_redis: AtomicU64::new(0),
            lost: Notify::new(),
            seen: Mutex::default(),
            doubted: AtomicU64::new(0),
            passed_over: Mutex::default(),
            last_denial: AtomicU64::new(0),
            walled: Mutex::default(),
        }
    }

    /// Whether the same token with the same clearance has met the wall from
    /// here a while ago.
    pub(super) fn is_walled(&self, candidate: &Candidate) -> bool {
        lock(&self.walled).as_ref().is_some_and(|(walled, at)| {
            at.elapsed() < WALL_PAUSE
                && walled.token == candidate.token
                && walled.clearance == candidate.clearance
        })
    }

    pub(super) fn note_walled(&self, candidate: Candidate) {
        *lock(&self.walled) = Some((candidate, Instant::now()));
    }

    /// Changes when another sidecar says that there is something to see; none
    /// without Redis.
    pub(super) fn notices(&self) -> Option<watch::Receiver<u64>> {
        self.redis.as_ref().map(|redis| redis.notices())
    }

    /// Asks Redis what it holds and whose turn it is.
    pub(super) async fn enter(&self, request: &Request) -> Result<Entrance, NoAnswer> {
        let redis = self.redis.as_ref().ok_or(NoAnswer)?;
        let last_denial = self.last_denial.load(Ordering::Relaxed);
        let entrance = match redis.enter(request, last_denial).await {
            // It can be read, but gives no lease.
            Err(error @ StoreError::RedisRefused { .. }) if request.wish != Wish::None => {
                self.note_redis(Access::Writing, Err(error))
            }
            entered => self.note_redis(Access::Reading, entered),
        };
        if entrance.as_ref().is_some_and(Entrance::is_granted) {
            lock(&self.redis_health).note(Access::Writing, None);
        }
        // What comes back after a failure may be another server.
        let last_denial = entrance.as_ref().map_or(0, |entrance| entrance.denials.last);
        self.last_denial.store(last_denial, Ordering::Relaxed);
        entrance.ok_or(NoAnswer)
    }

    /// Prolongs a lease.
    pub(super) async fn renew(&self, owner: &Owner) -> Result<bool, NoAnswer> {
        let redis = self.redis.as_ref().ok_or(NoAnswer)?;
        self.written(redis.renew(owner).await, |renewed| *renewed)
    }

    /// Gives a lease to whoever waits for it.
    pub(super) async fn hand_on(&self, lease: &Lease, lack: Lack) -> Result<bool, NoAnswer> {
        let redis = self.redis.as_ref().ok_or(NoAnswer)?;
        self.written(redis.hand_on(lease, lack).await, |_| false)
    }

    /// Gives a lease back.
    pub(super) async fn release(&self, owner: &Owner) -> Result<bool, NoAnswer> {
        let redis = self.redis.as_ref().ok_or(NoAnswer)?;
        self.written(redis.release(owner).await, |released| *released)
    }

    /// Tells the others of a failed run.
    pub(super) async fn fail(
        &self,
        lease: &Lease,
        backoff: &SharedBackoff,
    ) -> Result<bool, NoAnswer> {
        let redis = self.redis.as_ref().ok_or(NoAnswer)?;
        self.written(redis.fail(lease, backoff).await, |told| *told)
    }

    /// Tells the others of a refused token, and says whether Redis has taken
    /// it; `None` without Redis. What does not reach Redis is told again when
    /// such a token is found there.
    pub(super) fn deny(
        &self,
        token: &Token,
    ) -> Option<impl Future<Output = bool> + Send + 'static> {
        let (redis, token) = (Arc::clone(self.redis.as_ref()?), token.clone());
        Some(async move {
            let denied = redis.deny(&token).await;
            if let Err(error) = &denied {
                debug!(%error, "refused token not told to redis");
            }
            denied.is_ok()
        })
    }

    /// The line of the env file, if there is a token in it.
    pub(super) async fn load_env_file(&self) -> Option<Token> {
        let env_file = Arc::clone(self.env_file.as_ref()?);
        let load = spawn_blocking(move || env_file.load());
        let loaded = match timeout(LOOK, load).await {
            Ok(Ok(loaded)) => loaded.map_err(|error| error.to_string()),
            Ok(Err(_)) | Err(_) => Err("cannot be read".to_owned()),
        };
        self.note_env_file(loaded)?
    }

    /// Stores a token in Redis; with a `lease` for the whole fleet.
    pub(super) async fn commit(
        &self,
        published: &Published,
        lease: Option<&Lease>,
        now: Timestamp,
    ) -> Result<Commit, NoAnswer> {
        let Some(redis) = &self.redis else {
            return Ok(Commit::Committed);
        };
        let seen = lock(&self.seen).clone();
        let outcome = redis.commit(published, lease, seen.as_ref(), now).await;
        let outcome = self.written(outcome, |outcome| *outcome == Commit::Committed)?;
        if outcome == Commit::Committed {
            self.mark_in_redis(published.generation);
            lock(&self.seen).take();
            debug!(generation = published.generation.0, "token saved to redis");
        }
        Ok(outcome)
    }

    /// Shows the fleet a token that nobody could verify.
    pub(super) async fn share(
        &self,
        published: &Published,
        lease: &Lease,
        now: Timestamp,
    ) -> Result<(), NoAnswer> {
        let redis = self.redis.as_ref().ok_or(NoAnswer)?;
        let outcome = self.written(redis.share(published, lease, now).await, |outcome| {
            *outcome == Commit::Committed
        })?;
        debug!(generation = published.generation.0, ?outcome, "unverified token shared");
        Ok(())
    }

    pub(super) async fn save_env_file(&self, token: Token) {
        let Some(env_file) = self.env_file.clone() else {
            return;
        };
        let saved = spawn_blocking(move || env_file.save(&token)).await;
        let saved = match saved {
            Ok(saved) => saved.map_err(|error| error.to_string()),
            Err(_) => Err("cannot be written".to_owned()),
        };
        if self.note_env_file(saved) == Some(true) {
            debug!("token saved to the env file");
        }
    }

    /// Redis has this generation already.
    pub(super) fn mark_in_redis(&self, generation: Generation) {
        self.in_redis.store(generation.0, Ordering::Relaxed);
    }

    /// Redis has lost it, or has it in part, or something worse: it is to be
    /// written again, in place of what has been `seen`.
    pub(super) fn lost(&self, seen: Option<ValueId>) {
        *lock(&self.seen) = seen;
        self.in_redis.store(0, Ordering::Relaxed);
        self.lost.notify_one();
    }

    /// The path of the env file and its last error; `None` if it is not set.
    pub(super) fn env_file_state(&self) -> Option<(String, Option<String>)> {
        let path = self.env_file.as_ref()?.path().display().to_string();
        Some((path, lock(&self.env_file_error).clone()))
    }

    /// Whether Redis is set.
    pub(super) fn has_redis(&self) -> bool {
        self.redis.is_some()
    }

    /// The last error of Redis, while it is down.
    pub(super) fn redis_error(&self) -> Option<String> {
        lock(&self.redis_health).error().map(ToString::to_string)
    }

    /// Whether Redis did not answer in time, and may only be busy.
    pub(super) fn is_redis_late(&self) -> bool {
        self.redis.as_ref().is_some_and(|redis| redis.is_late())
    }

    /// What is wrong with Redis.
    pub(super) fn redis_trouble(&self) -> Option<RedisTrouble> {
        lock(&self.redis_health).trouble()
    }

    /// Only an answer that `is_proof` shows that Redis takes writes: the scripts
    /// read first, and what they read may keep them from writing.
    fn written<T>(
        &self,
        result: Result<T, StoreError>,
        is_proof: impl Fn(&T) -> bool,
    ) -> Result<T, NoAnswer> {
        match result {
            Ok(answer) if !is_proof(&answer) => Ok(answer),
            result => self.note_redis(Access::Writing, result).ok_or(NoAnswer),
        }
    }

    /// Nothing waits to be written to Redis.
    pub(super) fn note_redis_idle(&self) {
        lock(&self.redis_health).note_idle();
    }

    /// Redis holds the latest token, or a better one, whoever has written it.
    pub(super) fn note_redis_complete(&self) {
        lock(&self.redis_health).note(Access::Writing, None);
    }

    /// Counts an error, and warns of each trouble once.
    fn note_redis<T>(&self, access: Access, result: Result<T, StoreError>) -> Option<T> {
        let (value, error) = match result {
            Ok(value) => (Some(value), None),
            Err(error) => (None, Some(error)),
        };
        lock(&self.redis_health).note(access, error);
        if value.is_none() {
            self.metrics.store_error("redis");
        }
        value
    }

    /// Counts an error, and warns of the first one in a row.
    fn note_env_file<T>(&self, result: Result<T, String>) -> Option<T> {
        let (store, last) = ("env_file", &self.env_file_error);
        let (value, error) = match result {
            Ok(value) => (Some(value), None),
            Err(error) => (None, Some(error)),
        };
        let before = std::mem::replace(&mut *lock(last), error.clone());
        match (before, error) {
            (None, Some(error)) => warn!(store, error, "store out of order"),
            (Some(_), None) => info!(store, "store in order again"),
            _ => {}
        }
        if value.is_none() {
            self.metrics.store_error(store);
        }
        value
    }
}
