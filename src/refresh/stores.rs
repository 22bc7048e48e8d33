//! The stores beside the runs: read at start and now and then, written after
//! each verified publication, never waited for.
//!
//! # Invariants
//!
//! - Only a verified token is written, and only the latest one.
//! - A store that is down delays nothing: it is tried again until it is back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::adoption::{Adoption, View};
use super::health::{Access, RedisHealth};
use super::lock;
use super::refresher::Refresher;
use super::schedule::WALL_PAUSE;
use super::verifier::{Opinion, Passage};
use crate::metrics::Metrics;
use crate::token::{
    Candidate, EnvFile, Generation, Published, RedisStore, RedisTrouble, Source, StoreError,
    Stored, Timestamp, Token,
};

/// What a look into a store may take.
const LOOK: Duration = Duration::from_secs(1);
/// From one look into Redis to the next: a value set by hand counts within 30 s.
const POLL: Duration = Duration::from_secs(10);
/// Pauses between tries to write to Redis.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The stores that are set, and what is known of them.
pub(super) struct Stores {
    redis: Option<RedisStore>,
    env_file: Option<Arc<EnvFile>>,
    metrics: Arc<Metrics>,
    redis_health: Mutex<RedisHealth>,
    env_file_error: Mutex<Option<String>>,
    /// The generation that lies in Redis.
    in_redis: AtomicU64,
    /// Redis has lost what was written.
    lost: Notify,
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
            redis,
            env_file: env_file.map(Arc::new),
            metrics,
            redis_health: Mutex::default(),
            env_file_error: Mutex::default(),
            in_redis: AtomicU64::new(0),
            lost: Notify::new(),
            walled: Mutex::default(),
        }
    }

    /// Whether the same token with the same clearance has met the wall from
    /// here a while ago.
    fn is_walled(&self, candidate: &Candidate) -> bool {
        lock(&self.walled).as_ref().is_some_and(|(walled, at)| {
            at.elapsed() < WALL_PAUSE
                && walled.token == candidate.token
                && walled.clearance == candidate.clearance
        })
    }

    fn note_walled(&self, candidate: Candidate) {
        *lock(&self.walled) = Some((candidate, Instant::now()));
    }

    /// What lies in Redis.
    pub(super) async fn load_redis(&self) -> Result<Option<Stored>, NoAnswer> {
        let redis = self.redis.as_ref().ok_or(NoAnswer)?;
        let loaded = timeout(LOOK, redis.load()).await;
        let loaded = loaded.unwrap_or(Err(StoreError::RedisTimeout));
        self.note_redis(Access::Reading, loaded).ok_or(NoAnswer)
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

    /// Writes to Redis; whether that worked.
    async fn save_redis(&self, published: &Published, now: Timestamp) -> bool {
        let Some(redis) = &self.redis else {
            return true;
        };
        let saved = redis.save(published, now).await;
        let saved = self.note_redis(Access::Writing, saved).is_some();
        if saved {
            self.mark_in_redis(published.generation);
            debug!(generation = published.generation.0, "token saved to redis");
        }
        saved
    }

    async fn save_env_file(&self, token: Token) {
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
    fn mark_in_redis(&self, generation: Generation) {
        self.in_redis.store(generation.0, Ordering::Relaxed);
    }

    /// Redis has lost it, or has it in part: it is to be written again.
    fn lost(&self) {
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

    /// What is wrong with Redis.
    pub(super) fn redis_trouble(&self) -> Option<RedisTrouble> {
        lock(&self.redis_health).trouble()
    }

    /// Nothing waits to be written to Redis, so that no write can be amiss.
    fn note_redis_complete(&self) {
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

impl Refresher {
    /// At start: the newest usable token of Redis and the env file, the
    /// environment's if there is none; in force at once.
    pub(super) async fn load_stores(&self) -> Option<Arc<Published>> {
        let (redis, env_file) = tokio::join!(self.stores.load_redis(), self.stores.load_env_file());
        let redis = redis.ok().flatten().filter(|stored| self.is_usable(&stored.token));
        let env_file = env_file.filter(|token| self.is_usable(token));
        let newer_file = env_file.filter(|token| {
            redis.as_ref().is_none_or(|stored| token.issued_at() > stored.token.issued_at())
        });
        if let Some(token) = newer_file {
            return Some(self.publish(Candidate::new(token, Source::EnvFile)));
        }
        if let Some(stored) = redis
            && let Some(loaded) = self.load_stored(stored).await
        {
            return Some(loaded);
        }
        let token = self.environment.clone().filter(|token| self.is_usable(token))?;
        Some(self.publish(Candidate::new(token, Source::Environment)))
    }

    /// At start a stored token is believed, but for the clearance: it may come
    /// from a host with another address.
    async fn load_stored(&self, stored: Stored) -> Option<Arc<Published>> {
        let candidate = if stored.needs_clearance {
            self.examine_stored(stored_candidate(&stored), true).await?
        } else {
            stored_candidate(&stored).verified(stored.verified && !stored.foreign)
        };
        Some(self.adopt(&stored, candidate))
    }

    /// Reads the stores again, as an operator asks for: adopts what is better.
    pub async fn reload_stores(&self) {
        let (redis, env_file) = tokio::join!(self.stores.load_redis(), self.stores.load_env_file());
        if let Ok(stored) = redis {
            self.consider(stored, false).await;
        }
        if let Some(token) = env_file {
            self.consider_env_file(token).await;
        }
    }

    /// Decides about what lies in Redis. With the token in force `in_doubt`,
    /// an older one is worth a look too. Returns what was put in force.
    pub(super) async fn consider(
        &self,
        stored: Option<Stored>,
        in_doubt: bool,
    ) -> Option<Arc<Published>> {
        let ours = self.cache.current();
        let view = View {
            stored: stored.as_ref(),
            stored_usable: stored.as_ref().is_some_and(|stored| self.is_usable(&stored.token)),
            ours: ours.as_deref(),
            ours_usable: !in_doubt && ours.as_ref().is_some_and(|ours| self.is_usable(&ours.token)),
        };
        let decision = view.decide();
        let before = ours.map(|ours| ours.generation);
        match (decision, stored) {
            (Adoption::Take, Some(stored)) => {
                let candidate = stored_candidate(&stored).verified(true);
                self.adopt_unless_newer(&stored, candidate, before)
            }
            (Adoption::Examine { newer }, Some(stored)) => {
                let candidate = self.examine_stored(stored_candidate(&stored), newer).await?;
                self.adopt_unless_newer(&stored, candidate, before)
            }
            (Adoption::WriteOurs, _) => {
                self.stores.lost();
                None
            }
            _ => None,
        }
    }

    /// The stored token as it may be published, if it may.
    async fn examine_stored(&self, candidate: Candidate, newer: bool) -> Option<Candidate> {
        if self.stores.is_walled(&candidate) {
            return None;
        }
        let finding = self.examine(&candidate).await;
        if finding.passage == Passage::Walled {
            // A solve from here is better than what passes elsewhere.
            self.stores.note_walled(candidate);
            return None;
        }
        let acceptable =
            finding.opinion == Opinion::Good || finding.opinion == Opinion::Unknown && newer;
        acceptable.then(|| finding.of(candidate))
    }

    async fn consider_env_file(&self, token: Token) {
        let usable = self.usable();
        let ours = usable.as_ref().map(|ours| &ours.token);
        let better = ours.is_none_or(|ours| token.issued_at() > ours.issued_at());
        if !better || ours == Some(&token) || !self.is_usable(&token) {
            return;
        }
        let candidate = Candidate::new(token, Source::EnvFile);
        if let Some(candidate) = self.examine_stored(candidate, true).await {
            tell_adopted(&self.publish(candidate));
        }
    }

    fn adopt_unless_newer(
        &self,
        stored: &Stored,
        candidate: Candidate,
        before: Option<Generation>,
    ) -> Option<Arc<Published>> {
        if self.cache.newer_than(before).is_some() {
            return None; // A run was faster than the verifier.
        }
        let adopted = self.adopt(stored, candidate);
        tell_adopted(&adopted);
        Some(adopted)
    }

    fn adopt(&self, stored: &Stored, candidate: Candidate) -> Arc<Published> {
        let adopted = self.publish(candidate);
        if stored.cookies_agree && !stored.foreign {
            self.stores.mark_in_redis(adopted.generation);
        }
        adopted
    }

    /// Follows the notices in Redis for as long as the process lives.
    pub(super) async fn follow_redis(self: Arc<Self>) {
        if let Some(redis) = &self.stores.redis {
            redis.follow_notices().await;
        }
    }

    /// Looks into Redis at each notice, and now and then, for as long as the
    /// process lives.
    pub(super) async fn poll_redis(self: Arc<Self>) {
        let Some(redis) = &self.stores.redis else {
            return;
        };
        let mut notices = redis.notices();
        let mut is_first = true;
        loop {
            let is_told = timeout(POLL, notices.changed()).await.is_ok();
            // The start has read Redis by itself, unless it could not.
            if std::mem::take(&mut is_first) && is_told && self.stores.redis_error().is_none() {
                continue;
            }
            if let Ok(stored) = self.stores.load_redis().await {
                self.consider(stored, false).await;
            }
        }
    }

    /// Writes the latest verified token to Redis, again and again until it is there.
    pub(super) async fn keep_redis(self: Arc<Self>) {
        let mut changes = self.cache.changes();
        let mut pause = FIRST_PAUSE;
        loop {
            changes.borrow_and_update();
            let missing = self.worth_saving(self.stores.in_redis.load(Ordering::Relaxed));
            let saved = if let Some(published) = missing {
                self.stores.save_redis(&published, self.clock.now()).await
            } else {
                self.stores.note_redis_complete();
                true
            };
            let again = if saved { Duration::MAX } else { pause };
            pause = if saved { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
            tokio::select! {
                news = changes.changed() => if news.is_err() { return },
                () = self.stores.lost.notified() => {}
                () = sleep(again) => {}
            }
        }
    }

    /// Writes each verified token to the env file, once.
    pub(super) async fn keep_env_file(self: Arc<Self>) {
        let mut changes = self.cache.changes();
        let mut written = 0;
        loop {
            changes.borrow_and_update();
            if let Some(published) = self.worth_saving(written) {
                written = published.generation.0;
                self.stores.save_env_file(published.token.clone()).await;
            }
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// The token in force, if it is known to work and newer than `saved`.
    fn worth_saving(&self, saved: u64) -> Option<Arc<Published>> {
        self.usable().filter(|usable| usable.is_verified() && usable.generation.0 > saved)
    }
}

fn stored_candidate(stored: &Stored) -> Candidate {
    let clearance = Arc::new(stored.clearance.clone());
    Candidate::new(stored.token.clone(), Source::Redis).with_clearance(clearance, false)
}

fn tell_adopted(published: &Published) {
    info!(
        generation = published.generation.0,
        source = published.source.as_str(),
        token = %published.token.fingerprint(),
        verified = published.is_verified(),
        "token adopted"
    );
}
