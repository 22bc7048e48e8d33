//! What else there is to know of the keys, for a person; only reads.

use redis::pipe;

use super::RedisStore;

/// How long the keys live on, and whether the server takes writes.
#[derive(Clone, Debug)]
pub struct RedisFacts {
    /// Seconds that the token's key has left; `None`: no key, one without an
    /// end, or no telling.
    pub token_ttl: Option<u64>,
    /// The same of the cookies' key.
    pub cookies_ttl: Option<u64>,
    /// The server is a replica, which refuses writes.
    pub replica: bool,
}

impl RedisStore {
    /// Reads what [`RedisStore::load`] does not. What the server does not let
    /// us ask is not known; lasts about 2 s at most.
    pub async fn probe(&self) -> RedisFacts {
        let mut commands = pipe();
        commands.cmd("TTL").arg(&self.key).cmd("TTL").arg(&self.cookies_key);
        let left: Result<[i64; 2], _> = self.link.run(&commands).await;
        let [token_ttl, cookies_ttl] = left.unwrap_or([-1; 2]).map(|left| u64::try_from(left).ok());
        let mut commands = pipe();
        commands.cmd("INFO").arg("replication");
        let info: Result<(String,), _> = self.link.run(&commands).await;
        let replica = info.is_ok_and(|(info,)| info.lines().any(|line| line == "role:slave"));
        RedisFacts { token_ttl, cookies_ttl, replica }
    }
}
