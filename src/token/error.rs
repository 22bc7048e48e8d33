//! What can go wrong with the places where tokens rest.

use std::{io, path::PathBuf, sync::Arc};

use thiserror::Error;

/// Why a store could not be read or written.
///
/// No variant carries a token, a password or a URL, and none carries a text of
/// the Redis server: some of its errors repeat the arguments of a command.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The settings: not a URL that can be used.
    #[error(
        "not of the form redis://[user@]host[:port][/db], rediss://…, unix:///path or \
         redis+sentinel://host[:port],…/service[/db] (a password with special characters belongs \
         in REDIS_PASSWORD)"
    )]
    RedisUrl,
    /// The settings: words after a `?` that nobody would read.
    #[error(
        "only unix:// takes a query (?db=…&user=…&pass=…); elsewhere the database is the path, as \
         in redis://host:6379/3, and a password with special characters belongs in REDIS_PASSWORD"
    )]
    RedisUrlQuery,
    /// The settings: a login that is not the one of the servers.
    #[error(
        "the user stands once, before the first Sentinel: redis+sentinel://user@host,host/service \
         (a password with special characters belongs in REDIS_PASSWORD)"
    )]
    RedisUrlLogin,
    /// The settings: a key that is another's already.
    #[error(
        "it must differ from REDIS_KEY, and from {{REDIS_KEY}}:meta, :lease, :epoch, :unverified, \
         :backoff, :denied, :tries and :waiting, which sidecars share"
    )]
    RedisCookiesKey,
    /// The settings: certificates without encryption.
    #[error("REDIS_TLS_CA, REDIS_TLS_CERT and REDIS_TLS_KEY need a REDIS_URL with rediss://")]
    RedisTlsScheme,
    /// The settings: half of a pair.
    #[error("REDIS_TLS_CERT and REDIS_TLS_KEY need each other")]
    RedisTlsPair,
    /// The settings: a file that cannot be read.
    #[error("cannot read {path}, named by {variable}: {reason}")]
    RedisTlsFile {
        /// The variable that names the file.
        variable: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: Arc<io::Error>,
    },
    /// The settings: files that hold no certificates, or no key for them.
    #[error(
        "the files named by REDIS_TLS_CA, REDIS_TLS_CERT and REDIS_TLS_KEY are not PEM \
         certificates and the key that belongs to them"
    )]
    RedisTlsContent,
    /// The settings: a file without what it is there for.
    #[error("there is no certificate in {path}, named by {variable}")]
    RedisTlsNoCertificate {
        /// The variable that names the file.
        variable: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The server wants another password, or one at all, or none.
    #[error(
        "Redis refused the password: check REDIS_PASSWORD or REDIS_PASSWORD_FILE, and the user \
         name in REDIS_URL; for Sentinels, REDIS_SENTINEL_PASSWORD"
    )]
    RedisPassword,
    /// The file that should hold the password does not, yet.
    #[error("cannot read the password in {path}, named by REDIS_PASSWORD_FILE: {reason}")]
    RedisPasswordFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: Arc<io::Error>,
    },
    /// The server was silent for too long.
    #[error("Redis did not answer in time: check REDIS_URL and the server")]
    RedisTimeout,
    /// There was no connection, or it broke.
    #[error("no connection to Redis: {reason} (check REDIS_URL and the server)")]
    RedisConnection {
        /// What the system or TLS said.
        reason: String,
    },
    /// The Sentinels answered, but none of them has a primary for us.
    #[error(
        "no Sentinel names a primary that is up: check the service in REDIS_URL, or wait for the \
         fail-over to end"
    )]
    RedisNoPrimary,
    /// A server answers where there should be a Sentinel.
    #[error(
        "no Sentinel answers at the address in REDIS_URL but a Redis server: redis+sentinel:// \
         wants the Sentinels' ports, mostly 26379"
    )]
    RedisNoSentinel,
    /// A Sentinel answers where there should be a server.
    #[error(
        "a Sentinel answers at the address in REDIS_URL and no Redis server: write \
         redis+sentinel://host:26379/service/0"
    )]
    RedisIsSentinel,
    /// The server cannot switch to that database.
    #[error("Redis has no database of the number in REDIS_URL")]
    RedisNoDatabase,
    /// The server answered with an error.
    #[error("Redis refused the command: {code}")]
    RedisRefused {
        /// The first word of the server's error, as `NOPERM` or `OOM`.
        code: String,
    },
    /// The server answered with something that makes no sense.
    #[error("Redis gave an answer that cannot be used: {category}")]
    RedisAnswer {
        /// In which way.
        category: String,
    },
    /// The env file could not be read or written.
    #[error("cannot {action} the env file {path}, named by ENV_FILE: {reason}")]
    EnvFile {
        /// `read` or `write`.
        action: &'static str,
        /// The file as it was named.
        path: PathBuf,
        /// What the system said.
        reason: Arc<io::Error>,
    },
}

/// What is wrong with Redis, as far as a person has to do something else about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisTrouble {
    /// It gives no answer that can be used.
    Away,
    /// Something else is there than `REDIS_URL` says.
    Address,
    /// It wants another password.
    Password,
    /// It answers, and refuses what is asked of it.
    Refusal,
}

impl StoreError {
    /// The variable whose value is wrong, as far as that is known at the start.
    #[must_use]
    pub fn variable(&self) -> &'static str {
        match self {
            Self::RedisCookiesKey => "REDIS_COOKIES_KEY",
            Self::EnvFile { .. } => "ENV_FILE",
            _ => "REDIS_URL",
        }
    }

    /// What is wrong with Redis.
    #[must_use]
    pub fn redis_trouble(&self) -> RedisTrouble {
        match self {
            Self::RedisPassword | Self::RedisPasswordFile { .. } => RedisTrouble::Password,
            Self::RedisRefused { .. } | Self::RedisAnswer { .. } => RedisTrouble::Refusal,
            Self::RedisNoSentinel | Self::RedisIsSentinel | Self::RedisNoDatabase => {
                RedisTrouble::Address
            }
            _ => RedisTrouble::Away,
        }
    }

    /// Whether the server gave no sign of life, so that the next try had better
    /// wait a moment.
    pub(super) fn is_silence(&self) -> bool {
        matches!(self, Self::RedisTimeout | Self::RedisConnection { .. } | Self::RedisNoPrimary)
    }
}
