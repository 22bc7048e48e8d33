//! The connection to the Redis server.
//!
//! # Invariants
//!
//! - No operation lasts longer than [`WHOLE_LIMIT`].
//! - A connection that failed in any way is not used again: the next operation
//!   begins with a new one. So a server that was down, hung, or had another
//!   password is found as soon as it is well again.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use redis::{
    Client, ClientTlsConfig, ConnectionInfo, ErrorKind, FromRedisValue, IntoConnectionInfo as _,
    Pipeline, RedisError, RedisResult, TlsCertificates,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use tokio::{task::spawn_blocking, time::timeout};

use super::{StoreError, script::code_within};
use crate::config::RedisSettings;

/// Bounds the connecting, and each answer.
const STEP_LIMIT: Duration = Duration::from_secs(1);

/// Bounds an operation. A little more than a step, so that a step that hangs
/// can say so itself.
const WHOLE_LIMIT: Duration = Duration::from_millis(1_100);

/// A connection that is made when it is first needed, and again after a failure.
pub(super) struct Link {
    info: ConnectionInfo,
    certificates: Option<TlsCertificates>,
    /// Read for each connection, since it may come or change after the start.
    password_file: Option<PathBuf>,
    /// Made inside an operation, since a manager needs a runtime around it.
    manager: Mutex<Option<Arc<ConnectionManager>>>,
}

impl Link {
    /// Checks the settings and reads the TLS files. Does not connect.
    pub(super) fn new(settings: &RedisSettings) -> Result<Self, StoreError> {
        let info = connection_info(settings)?;
        let certificates = certificates(settings)?;
        client(info.clone(), certificates.clone())?;
        let password_file = match info.redis_settings().password() {
            Some(_) => None,
            None => settings.password_file.clone(),
        };
        Ok(Self { info, certificates, password_file, manager: Mutex::new(None) })
    }

    /// Runs `commands` and gives their answers.
    ///
    /// The commands may run twice, so they must bear that.
    pub(super) async fn run<T: FromRedisValue>(
        &self,
        commands: &Pipeline,
    ) -> Result<T, StoreError> {
        let Ok(answer) = timeout(WHOLE_LIMIT, self.try_twice(commands)).await else {
            *self.slot() = None;
            return Err(StoreError::RedisTimeout);
        };
        answer
    }

    async fn try_twice<T: FromRedisValue>(&self, commands: &Pipeline) -> Result<T, StoreError> {
        let answer = match self.try_once(commands).await? {
            // A kept connection may have ended long ago, with a server that
            // has been restarted since.
            Err(error) if error.is_connection_dropped() => self.try_once(commands).await?,
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
        if answer.is_err() {
            // By itself the manager would keep the outcome of a failed log-in
            // for ever, and a hung connection until the kernel gives it up.
            self.forget(&manager);
        }
        Ok(answer)
    }

    async fn manager(&self) -> Result<Arc<ConnectionManager>, StoreError> {
        if let Some(manager) = &*self.slot() {
            return Ok(Arc::clone(manager));
        }
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(0)
            .set_connection_timeout(Some(STEP_LIMIT))
            .set_response_timeout(Some(STEP_LIMIT));
        let client = client(self.login().await?, self.certificates.clone())?;
        let manager = ConnectionManager::new_lazy_with_config(client, config)
            .map_err(|error| explained(&error))?;
        // Another operation may have been faster.
        Ok(Arc::clone(self.slot().get_or_insert(Arc::new(manager))))
    }

    /// Where to connect, with the password as it is now.
    async fn login(&self) -> Result<ConnectionInfo, StoreError> {
        let info = self.info.clone();
        let Some(path) = self.password_file.clone() else {
            return Ok(info);
        };
        let file = path.clone();
        // It may lie on a disk that hangs.
        let read = spawn_blocking(move || password_in(&file)).await;
        let password = read
            .unwrap_or_else(|died| Err(died.into()))
            .map_err(|reason| StoreError::RedisPasswordFile { path, reason })?;
        Ok(with_password(info, &password))
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

fn client(
    info: ConnectionInfo,
    certificates: Option<TlsCertificates>,
) -> Result<Client, StoreError> {
    match certificates {
        None => Client::open(info).map_err(|_| StoreError::RedisUrl),
        Some(certificates) => {
            Client::build_with_tls(info, certificates).map_err(|_| StoreError::RedisTlsContent)
        }
    }
}

fn connection_info(settings: &RedisSettings) -> Result<ConnectionInfo, StoreError> {
    let url = settings.url.expose();
    let known = ["redis://", "rediss://", "unix://"];
    // `#insecure` would switch the check of the server's certificate off.
    if !known.iter().any(|scheme| url.starts_with(scheme)) || url.ends_with("#insecure") {
        return Err(StoreError::RedisUrl);
    }
    let info = url.into_connection_info().map_err(|_| StoreError::RedisUrl)?;
    Ok(match &settings.password {
        None => info,
        Some(password) => with_password(info, password.expose()),
    })
}

fn with_password(info: ConnectionInfo, password: &str) -> ConnectionInfo {
    let login = info.redis_settings().clone();
    info.set_redis_settings(login.set_password(password))
}

/// The file's text without the end of its line, as editors and `echo` leave it.
fn password_in(file: &Path) -> io::Result<String> {
    // A pipe would make us wait.
    if !fs::metadata(file)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let text = fs::read_to_string(file)?;
    let password = text.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        return Err(io::Error::other("it is empty"));
    }
    Ok(password.to_owned())
}

fn certificates(settings: &RedisSettings) -> Result<Option<TlsCertificates>, StoreError> {
    let root_cert = file(settings.tls_ca.as_deref(), "REDIS_TLS_CA")?;
    let client_cert = file(settings.tls_cert.as_deref(), "REDIS_TLS_CERT")?;
    let client_key = file(settings.tls_key.as_deref(), "REDIS_TLS_KEY")?;
    let client_tls = match (client_cert, client_key) {
        (None, None) => None,
        (Some(client_cert), Some(client_key)) => Some(ClientTlsConfig { client_cert, client_key }),
        _ => return Err(StoreError::RedisTlsPair),
    };
    if client_tls.is_none() && root_cert.is_none() {
        return Ok(None);
    }
    if !settings.url.expose().starts_with("rediss://") {
        return Err(StoreError::RedisTlsScheme);
    }
    Ok(Some(TlsCertificates { client_tls, root_cert }))
}

fn file(path: Option<&Path>, variable: &'static str) -> Result<Option<Vec<u8>>, StoreError> {
    let Some(path) = path else { return Ok(None) };
    let content = fs::read(path).map_err(|reason| StoreError::RedisTlsFile {
        variable,
        path: path.to_owned(),
        reason,
    })?;
    Ok(Some(content))
}

fn explained(error: &RedisError) -> StoreError {
    let code = server_code(error);
    match (error.kind(), code) {
        _ if error.is_timeout() => StoreError::RedisTimeout,
        (ErrorKind::AuthenticationFailed, _) => StoreError::RedisPassword,
        (_, Some(code)) if matches!(&*code, "NOAUTH" | "WRONGPASS") => StoreError::RedisPassword,
        (_, Some(code)) => StoreError::RedisRefused { code },
        (ErrorKind::Io, None) => StoreError::RedisConnection { reason: error.to_string() },
        (ErrorKind::InvalidClientConfig, None) => StoreError::RedisTlsContent,
        (_, None) => StoreError::RedisAnswer { category: error.category().to_owned() },
    }
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
