//! The places where tokens rest: the env file and Redis.

use std::path::Path;
use std::time::Duration;

use rustix::fs::{Access, access};

use super::report::Check;
use super::{Patient, now, readable};
use crate::config::{RedisSettings, Stores};
use crate::token::{RedisFacts, RedisStore, StoreError, Stored, Token};

const REFRESH: &str = "start the sidecar, or `token-sidecar refresh`";
const KEEP: &str =
    "set ENV_FILE (or `cp .env.example .env`), or REDIS_URL, so that the token outlives a restart";

/// The checks of `ENV_FILE`.
pub(super) fn env_file(patient: &Patient) -> Vec<Check> {
    let path = patient.probes.env_file.path();
    let tried = format!("token in {}", path.display());
    let token = match patient.probes.env_file.load() {
        Err(error) => {
            return vec![Check::failed("env_file", tried, error, "see its owner and mode")];
        }
        Ok(Some(token)) => token_check("env_file", tried, &token, ""),
        Ok(None) if path.exists() => {
            Check::warning("env_file", tried, "there is no readable token in it", REFRESH)
        }
        Ok(None) => Check::warning(
            "env_file",
            tried,
            "there is no such file",
            missing(&patient.config.stores),
        ),
    };
    vec![token, writable(path)]
}

/// What to do where there is no env file. Only a file that was asked for is made.
fn missing(stores: &Stores) -> &'static str {
    if stores.create_env_file || stores.redis.is_some() { REFRESH } else { KEEP }
}

/// Whether the sidecar could save a token; asks for the permission alone.
fn writable(path: &Path) -> Check {
    let tried = format!("permission to write {}", path.display());
    // The file that a symbolic link leads to is the one that is replaced.
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let folder = match real.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let may_write = |path: &Path| access(path, Access::WRITE_OK);
    match may_write(folder) {
        Ok(()) => Check::ok("env_file_write", tried, "this user may"),
        Err(_) if may_write(&real).is_ok() => {
            Check::ok("env_file_write", tried, "this user may write the file, but not its folder")
        }
        Err(error) => {
            let found = format!("this user may not: {}: {error}", folder.display());
            let advice = "tokens are kept, but not in the file: give the sidecar's user the folder, \
                          or name another ENV_FILE";
            Check::warning("env_file_write", tried, found, advice)
        }
    }
}

/// The checks of the keys in Redis.
pub(super) async fn redis(patient: &Patient) -> Vec<Check> {
    let (Some(store), Some(settings)) = (&patient.probes.redis, &patient.config.stores.redis)
    else {
        return vec![Check::skipped("redis", "Redis", "REDIS_URL is not set")];
    };
    let keys = format!("keys {} and {}", settings.key, settings.cookies_key);
    match read(store).await {
        Err(error) => {
            let advice =
                "see REDIS_URL and REDIS_PASSWORD; the token is kept without Redis meanwhile";
            vec![Check::failed("redis", keys, error, advice)]
        }
        Ok((None, facts)) => {
            let none = Check::warning("redis", keys, "Redis answers; there is no token", REFRESH);
            vec![none, role(&facts)]
        }
        Ok((Some(stored), facts)) => vec![
            token_check("redis", keys, &stored.token, &times_to_live(&facts)),
            in_step(settings, &stored),
            role(&facts),
        ],
    }
}

async fn read(store: &RedisStore) -> Result<(Option<Stored>, RedisFacts), StoreError> {
    Ok((store.load().await?, store.probe().await))
}

fn times_to_live(facts: &RedisFacts) -> String {
    let life = |seconds: Option<u64>| {
        seconds.map_or("none".to_owned(), |left| readable(Duration::from_secs(left)).to_string())
    };
    format!(", TTL {} and {}", life(facts.token_ttl), life(facts.cookies_ttl))
}

fn in_step(settings: &RedisSettings, stored: &Stored) -> Check {
    let tried = format!("token in {}", settings.cookies_key);
    if stored.cookies_agree {
        return Check::ok("redis_in_step", tried, "the same");
    }
    let advice =
        "older programs read the token there: a running sidecar brings it in step within 30 s";
    Check::warning("redis_in_step", tried, "another one, or none", advice)
}

fn role(facts: &RedisFacts) -> Check {
    let tried = "role of the Redis server, for writing";
    if facts.replica {
        let advice = "point REDIS_URL to the primary server";
        return Check::failed("redis_write", tried, "a replica, which refuses writes", advice);
    }
    Check::ok("redis_write", tried, "no replica")
}

/// A stored token with its age, and whether it has expired.
fn token_check(name: &'static str, tried: String, token: &Token, more: &str) -> Check {
    let (now, id) = (now(), token.fingerprint());
    let age = token.issued_at().map(|at| readable(Duration::from_secs(now.0.saturating_sub(at.0))));
    let age = age.map_or("of unknown age".to_owned(), |age| format!("issued {age} ago"));
    let end = token.expires_at().map_or("without an end".to_owned(), |at| format!("expires {at}"));
    let found = format!("{id}, {age}, {end}{more}");
    if token.is_live(now) {
        return Check::ok(name, tried, found);
    }
    Check::warning(name, tried, format!("{found}: expired"), REFRESH)
}
