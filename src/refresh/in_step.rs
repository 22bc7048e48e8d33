//! Keeps the stores and the token in force in step, beside the runs: read at
//! start and now and then, written after each verified publication, never
//! waited for.
//!
//! # Invariants
//!
//! - Only a verified token is written, and only the latest one; one that
//!   nobody could verify is shown to the fleet apart.
//! - A store that is down delays nothing: it is tried again until it is back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tracing::{debug, info};

use super::adoption::{Adoption, View, is_acceptable, is_in_step};
use super::fleet::{Considered, Next, Pace, Saving, Writing, after_refusal};
use super::lock;
use super::refresher::Refresher;
use super::stores::NoAnswer;
use super::verifier::Passage;
use crate::token::{
    Candidate, Commit, Entrance, Generation, Lease, Published, Source, Stored, Token,
};

/// From one look into Redis to the next: a value set by hand counts within 30 s.
const POLL: Duration = Duration::from_secs(10);

impl Refresher {
    /// At start: the newest usable token of Redis and the env file, the
    /// environment's if there is none; in force at once.
    pub(super) async fn load_stores(&self) -> Option<Arc<Published>> {
        let (redis, env_file) = tokio::join!(self.look_into_redis(), self.stores.load_env_file());
        let (redis, value) =
            redis.map_or((None, None), |entrance| (entrance.stored, entrance.value));
        let redis = redis.filter(|stored| self.is_usable(&stored.token));
        let env_file = env_file.filter(|token| self.is_usable(token));
        let newer_file = env_file.filter(|token| {
            redis.as_ref().is_none_or(|stored| token.issued_at() > stored.token.issued_at())
        });
        if let Some(token) = newer_file {
            *lock(&self.stores.passed_over) = value;
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
        let (redis, env_file) = tokio::join!(self.look_into_redis(), self.stores.load_env_file());
        if let Ok(entrance) = redis {
            self.consider(&entrance, false).await;
        }
        if let Some(token) = env_file {
            self.consider_env_file(token).await;
        }
    }

    /// Decides about all that lies in Redis, what nobody could verify too: for
    /// whoever needs a token.
    pub(super) async fn consider_all(
        &self,
        entrance: &Entrance,
        in_doubt: bool,
    ) -> Option<Arc<Published>> {
        if let (_, Some(adopted)) = self.consider(entrance, in_doubt).await {
            return Some(adopted);
        }
        let unverified = entrance.unverified.as_ref().filter(|_| !entrance.is_unverified_denied)?;
        let adopted = self.weigh(Some(unverified), in_doubt).await.1?;
        self.fleet.note_unproven(adopted.generation);
        Some(adopted)
    }

    /// Decides about what lies in Redis. With the token in force `in_doubt`,
    /// an older one is worth a look too. Returns what was put in force.
    pub(super) async fn consider(
        &self,
        entrance: &Entrance,
        in_doubt: bool,
    ) -> (Considered, Option<Arc<Published>>) {
        let mut stored = entrance.stored.clone();
        if let Some(stored) = &mut stored
            && *lock(&self.stores.passed_over) == entrance.value
        {
            // Older than ours, as was seen at start.
            (stored.foreign, stored.by_hand) = (false, false);
        }
        let stored = stored.as_ref();
        if let Some(stored) = stored {
            self.note_in_step(stored, in_doubt);
            if self.denied.contains(&stored.token) && !entrance.is_denied {
                self.deny_in_redis(&stored.token);
            }
        }
        let (considered, adopted) = self.weigh(stored, in_doubt).await;
        if considered == Considered::WriteOurs {
            self.stores.lost(entrance.value.clone());
        }
        (considered, adopted)
    }

    /// The token in force is stored as one that works.
    fn note_in_step(&self, stored: &Stored, in_doubt: bool) {
        let ours = self.usable().filter(|ours| !in_doubt && is_in_step(stored, ours));
        let Some(ours) = ours else { return };
        self.stores.mark_in_redis(ours.generation);
        if !ours.needs_clearance {
            self.prove(ours.generation);
        }
    }

    async fn weigh(
        &self,
        stored: Option<&Stored>,
        in_doubt: bool,
    ) -> (Considered, Option<Arc<Published>>) {
        let ours = self.cache.current();
        let view = View::of(stored, ours.as_deref(), in_doubt, |token| self.is_usable(token));
        let before = ours.as_ref().map(|ours| ours.generation);
        let adopted = match (view.decide(), stored) {
            (Adoption::WriteOurs, _) => return (Considered::WriteOurs, None),
            (Adoption::Take, Some(stored)) => {
                let candidate = stored_candidate(stored).verified(true);
                self.adopt_unless_newer(stored, candidate, before)
            }
            (Adoption::Examine { newer }, Some(stored)) => {
                match self.examine_stored(stored_candidate(stored), newer).await {
                    Some(candidate) => self.adopt_unless_newer(stored, candidate, before),
                    None => None,
                }
            }
            _ => None,
        };
        let considered = if adopted.is_some() { Considered::Adopted } else { Considered::Nothing };
        (considered, adopted)
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
        is_acceptable(finding.opinion, newer).then(|| finding.of(candidate))
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
        self.redis_is_back();
        if stored.cookies_agree && !stored.foreign && stored.verified {
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
        let Some(mut notices) = self.stores.notices() else {
            return;
        };
        loop {
            // Not all sidecars at one moment, as a notice would have it.
            let pause = POLL.mul_f64(0.75 + 0.5 * fastrand::f64());
            let is_news = timeout(pause, notices.changed()).await.is_ok();
            // A run that waits for others looks by itself.
            if is_news && self.fleet.waits() {
                continue;
            }
            if let Ok(entrance) = self.look_into_redis().await {
                let (_, adopted) = self.consider(&entrance, false).await;
                if adopted.is_none() {
                    self.doubt_ours().await;
                    self.try_redis().await;
                }
            }
        }
    }

    /// Another sidecar has seen our token refused: asks about it, once. So the
    /// fleet stands ready to solve for one that cannot, without traffic too.
    async fn doubt_ours(&self) {
        let heard = |ours: &Arc<Published>| self.is_denied(&ours.token);
        let Some(ours) = self.usable().filter(heard) else { return };
        let asked_about = self.stores.doubted.swap(ours.generation.0, Ordering::Relaxed);
        if asked_about != ours.generation.0 {
            self.examine(&ours.candidate()).await;
        }
    }

    /// Writes the latest verified token to Redis, again and again until it is
    /// there, or something better.
    pub(super) async fn keep_redis(self: Arc<Self>) {
        let mut changes = self.cache.changes();
        let mut pace = Pace::default();
        loop {
            changes.borrow_and_update();
            let saving = self.save_to_redis().await;
            if saving == Saving::Done {
                self.give_back_doubtful().await;
            }
            tokio::select! {
                news = changes.changed() => if news.is_err() { return },
                () = self.stores.lost.notified() => {}
                () = sleep(pace.after(saving)) => {}
            }
        }
    }

    pub(super) async fn save_to_redis(&self) -> Saving {
        let ours = self.usable().filter(|usable| self.is_usable(&usable.token));
        let lease = ours.as_ref().and_then(|ours| self.fleet.owed_with(&ours.token));
        if lease.is_none() {
            // Nothing is owed, or what was has been overtaken.
            self.give_back(self.fleet.settle()).await;
        }
        let saved = self.stores.in_redis.load(Ordering::Relaxed);
        match Writing::of(ours.as_ref(), lease, saved) {
            Writing::Share(ours, lease) => self.share_with_fleet(&ours, lease).await,
            Writing::Commit(ours, lease) => self.commit_to_redis(&ours, lease).await,
            Writing::Complete => {
                self.stores.note_redis_complete();
                Saving::Done
            }
            Writing::Wait => {
                self.stores.note_redis_idle();
                Saving::Done
            }
        }
    }

    async fn share_with_fleet(&self, ours: &Published, lease: Lease) -> Saving {
        if self.stores.share(ours, &lease, self.clock.now()).await.is_err() {
            return Saving::Failed;
        }
        self.give_back(Some(lease.clone())).await;
        self.fleet.note_shown(&ours.token, lease);
        Saving::Done
    }

    async fn commit_to_redis(&self, ours: &Published, lease: Option<Lease>) -> Saving {
        let outcome = self.stores.commit(ours, lease.as_ref(), self.clock.now()).await;
        // A newer token than the one that was got without it has been written too.
        if matches!(outcome, Ok(Commit::Committed | Commit::Older)) {
            self.redis_is_back();
        }
        match outcome {
            Ok(Commit::Committed) => {
                lease.inspect(|lease| self.fleet.settled(lease));
                Saving::Done
            }
            Ok(refusal) => self.after_refusal(ours, refusal, lease).await,
            Err(NoAnswer) => Saving::Failed,
        }
    }

    /// Nothing is to be committed with the lease any more, if there is one.
    async fn give_back(&self, lease: Option<Lease>) {
        if let Some(lease) = lease {
            self.fleet.settled(&lease);
            // Where it was given back already, or Redis is out, it needs no more.
            let _ = self.stores.release(&lease.owner).await;
        }
    }

    /// Something is stored that Redis would not replace: considers that.
    async fn after_refusal(
        &self,
        ours: &Published,
        refusal: Commit,
        lease: Option<Lease>,
    ) -> Saving {
        debug!(generation = ours.generation.0, ?refusal, "token not saved to redis");
        let Ok(entrance) = self.look_into_redis().await else {
            return Saving::Failed;
        };
        let (considered, _) = self.consider(&entrance, false).await;
        match after_refusal(refusal, considered, lease.is_some()) {
            Next::Leave => {
                self.give_back(lease).await;
                self.stores.mark_in_redis(ours.generation);
                Saving::Done
            }
            Next::Replace { with_lease } => {
                *lock(&self.stores.seen) = entrance.value;
                if !with_lease {
                    self.give_back(lease).await;
                }
                Saving::Refused
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
    let candidate = Candidate::new(stored.token.clone(), Source::Redis).by_hand(stored.by_hand);
    candidate.with_clearance(clearance, false)
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
