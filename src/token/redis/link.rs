//! The connection to the Redis server.
//!
//! # Invariants
//!
//! - No operation lasts longer than [`WHOLE_LIMIT`], and after one that the
//!   server left without an answer the next ones fail at once for a moment: see
//!   [`Pause`].
//! - A connection that failed in any way is not used again: the next operation
//!   begins with a new one. So a server that was down, hung, or had another
//!   password is found as soon as it is well again.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use redis::{
    Client, ErrorKind, FromRedisValue, Pipeline, RedisError, RedisResult,
    aio::{ConnectionManager, ConnectionManagerConfig, PubSub},
};
use tokio::time::timeout;

use super::{StoreError, pause::Pause, place::Place, script::code_within};
use crate::config::RedisSettings;

/// Bounds the connecting, and each answer.
pub(super) const STEP_LIMIT: Duration = Duration::from_secs(1);

/// Bounds an operation. A little more than a step, so that a step that hangs
/// can say so itself.
const WHOLE_LIMIT: Duration = Duration::from_millis(1_100);

/// A connection that is made when it is first needed, and again after a failure.
pub(super) struct Link {
    place: Place,
    pause: Pause,
    /// Made inside an operation, since a manager needs a runtime around it.
    manager: Mutex<Option<Arc<ConnectionManager>>>,
}

impl Link {
    /// Checks the settings and reads the TLS files. Does not connect.
    pub(super) fn new(settings: &RedisSettings) -> Result<Self, StoreError> {
        let place = Place::new(settings)?;
        Ok(Self { place, pause: Pause::default(), manager: Mutex::new(None) })
    }

    /// Runs `commands` and gives their answers. Fails at once, with the last
    /// error, for a moment after the server was silent.
    ///
    /// The commands may run twice, so they must bear that.
    pub(super) async fn run<T: FromRedisValue>(
        &self,
        commands: &Pipeline,
    ) -> Result<T, StoreError> {
        self.pause.check()?;
        let answer = timeout(WHOLE_LIMIT, self.try_twice(commands)).await;
        let answer = answer.unwrap_or_else(|_| {
            *self.slot() = None;
            Err(StoreError::RedisTimeout)
        });
        self.pause.note(&answer);
        answer
    }

    /// Requests wait for the next operation: see [`Pause::cut_short`].
    pub(super) fn cut_pause_short(&self) {
        self.pause.cut_short();
    }

    /// The server has taken too long altogether.
    pub(super) fn note_silence(&self) -> StoreError {
        let error = StoreError::RedisTimeout;
        self.pause.note::<()>(&Err(error.clone()));
        error
    }

    /// Whether the server has not answered in time, and may only be busy.
    pub(super) fn is_late(&self) -> bool {
        self.pause.is_late()
    }

    /// A connection of its own that follows `channel`.
    ///
    /// That it could be made ends the pause of [`Link::run`].
    pub(super) async fn follow(&self, channel: &str) -> Result<PubSub, StoreError> {
        let connect = async {
            let client = self.place.client().await?;
            let mut subscription = client.get_async_pubsub().await.map_err(|e| explained(&e))?;
            subscription.subscribe(channel).await.map_err(|error| explained(&error))?;
            Ok(subscription)
        };
        let subscription = timeout(WHOLE_LIMIT, connect).await;
        let subscription = subscription.map_err(|_| StoreError::RedisTimeout)??;
        self.pause.end();
        Ok(subscription)
    }

    /// What connections are made by.
    #[cfg(test)]
    pub(super) async fn client(&self) -> Result<Client, StoreError> {
        self.place.client().await
    }

    async fn try_twice<T: FromRedisValue>(&self, commands: &Pipeline) -> Result<T, StoreError> {
        let answer = match self.try_once(commands).await? {
            Err(error) if self.is_worth_another(&error) => self.try_once(commands).await?,
            answer => answer,
        };
        answer.map_err(|error| explained(&error))
    }

    /// The outer error: there was nothing to ask by.
    async fn try_once<T: FromRedisValue>(
        &self,
        commands: &Pipeline,
    ) -> Result<RedisResult<T>, StoreError> {
        let manager = self.manager().await?;
        let mut connection = ConnectionManager::clone(&manager);
        let answer = commands.query_async(&mut connection).await;
        if answer.as_ref().is_err_and(|error| !is_for_the_script_alone(error)) {
            // By itself the manager would keep the outcome of a failed log-in
            // for ever, and a hung connection until the kernel gives it up.
            self.forget(&manager);
        }
        Ok(answer)
    }

    /// A kept connection may have ended long ago, with a server that has been
    /// restarted since; or lead to a server that is the primary no more.
    fn is_worth_another(&self, error: &RedisError) -> bool {
        let code = server_code(error);
        let demoted = matches!(code.as_deref(), Some("READONLY" | "MASTERDOWN"));
        error.is_connection_dropped() || demoted && self.place.may_move()
    }

    async fn manager(&self) -> Result<Arc<ConnectionManager>, StoreError> {
        if let Some(manager) = &*self.slot() {
            return Ok(Arc::clone(manager));
        }
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(0)
            .set_connection_timeout(Some(STEP_LIMIT))
            .set_response_timeout(Some(STEP_LIMIT));
        let client: Client = self.place.client().await?;
        let manager = ConnectionManager::new_lazy_with_config(client, config)
            .map_err(|error| explained(&error))?;
        // Another operation may have been faster.
        Ok(Arc::clone(self.slot().get_or_insert(Arc::new(manager))))
    }

    fn forget(&self, failed: &Arc<ConnectionManager>) {
        let mut slot = self.slot();
        // Another operation may have put a newer one there.
        if slot.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, failed)) {
            *slot = None;
        }
    }

    fn slot(&self) -> MutexGuard<'_, Option<Arc<ConnectionManager>>> {
        self.manager.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server does not know the script yet. The connection is as good as before.
fn is_for_the_script_alone(error: &RedisError) -> bool {
    server_code(error).as_deref() == Some("NOSCRIPT")
}

/// What `error` means, without any text of the server's.
pub(super) fn explained(error: &RedisError) -> StoreError {
    if let Some(refusal) = of_select(error) {
        return refusal;
    }
    let code = server_code(error);
    match (error.kind(), code) {
        _ if error.is_timeout() => StoreError::RedisTimeout,
        (ErrorKind::AuthenticationFailed, _) => StoreError::RedisPassword,
        (_, Some(code)) if matches!(&*code, "NOAUTH" | "WRONGPASS") => StoreError::RedisPassword,
        (_, Some(code)) => StoreError::RedisRefused { code },
        (ErrorKind::Io, None) => StoreError::RedisConnection { reason: error.to_string() },
        (ErrorKind::InvalidClientConfig, None) => StoreError::RedisTlsContent,
        (ErrorKind::MasterNameNotFoundBySentinel, None) => StoreError::RedisNoPrimary,
        (_, None) => StoreError::RedisAnswer { category: error.category().to_owned() },
    }
}

/// The crate keeps the text with which a server refuses to switch to the
/// database, and puts another code before it.
fn of_select(error: &RedisError) -> Option<StoreError> {
    if !error.to_string().starts_with("Redis server refused to switch database") {
        return None;
    }
    let is_about = |words| error.detail().is_some_and(|detail| detail.contains(words));
    Some(if is_about("Authentication required") {
        StoreError::RedisPassword
    } else if is_about("no permissions") {
        StoreError::RedisRefused { code: "NOPERM".to_owned() }
    } else if is_about("unknown command") {
        StoreError::RedisIsSentinel
    } else {
        StoreError::RedisNoDatabase
    })
}

/// The code of the command that failed, rather than that of the whole batch.
fn server_code(error: &RedisError) -> Option<String> {
    let commands = error.clone().into_server_errors();
    let (code, detail) = match commands.as_deref().and_then(<[_]>::first) {
        Some((_, error)) => (error.code(), error.details()),
        None => (error.code()?, error.detail()),
    };
    Some(code_within(code, detail.unwrap_or_default()).to_owned())
}
