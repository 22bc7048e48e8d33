//! What `/ready` and `/status` say.

use serde::{Serialize, Serializer};

use super::AdminState;
use crate::hints::Silence;
use crate::metrics::Route;
use crate::refresh::RefreshStatus;
use crate::token::{Published, RedisTrouble, Timestamp};

/// Whether requests can be served now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Readiness {
    pub(super) ready: bool,
    /// Why not.
    reason: Option<&'static str>,
}

/// All that `/status` shows.
#[derive(Serialize)]
pub(super) struct Status {
    version: &'static str,
    uptime_s: u64,
    #[serde(flatten)]
    readiness: Readiness,
    token: Option<TokenStatus>,
    #[serde(flatten)]
    renewal: RefreshStatus,
    held: usize,
    connections: usize,
    #[serde(serialize_with = "by_route")]
    requests: Vec<(Route, u64)>,
    hints: Vec<String>,
}

/// A token without its secret.
#[derive(Serialize)]
struct TokenStatus {
    fingerprint: String,
    generation: u64,
    source: &'static str,
    issued_at: Option<String>,
    expires_at: Option<String>,
    verified: bool,
    clearance: bool,
}

impl Readiness {
    pub(super) fn of(state: &AdminState) -> Self {
        let usable = state.refresher.usable().is_some();
        let current = state.cache.current();
        let draining = state.draining.is_cancelled();
        Self::judge(draining, current.as_deref(), usable, state.clock.now())
    }

    fn judge(draining: bool, current: Option<&Published>, usable: bool, now: Timestamp) -> Self {
        let reason = match current {
            _ if draining => Some("draining"),
            _ if usable => None,
            None => Some("no_token"),
            Some(published) if !published.token.is_live(now) => Some("token_expired"),
            Some(_) => Some("token_refused"),
        };
        Self { ready: reason.is_none(), reason }
    }
}

impl Status {
    pub(super) fn of(state: &AdminState) -> Self {
        let current = state.cache.current();
        let renewal = state.refresher.status();
        let requests = state.metrics.requests_by_route();
        let facts = Facts {
            silence: state.hints.silence(&requests),
            token: TokenFact::of(current.as_deref()),
            redis: renewal.redis.as_ref().and_then(|redis| redis.trouble),
            env_file: StoreFact::of(renewal.env_file.as_ref().is_none_or(|file| file.ok)),
            verifier_blind: !renewal.verifier.trusted,
            walled: renewal.refresh.walled_s > 0.0,
        };
        Self {
            version: state.version,
            uptime_s: state.started.elapsed().as_secs(),
            readiness: Readiness::of(state),
            token: current.as_deref().map(TokenStatus::of),
            hints: facts.hints().chain(state.hints.texts()).collect(),
            renewal,
            held: state.metrics.held(),
            connections: state.metrics.connections(),
            requests,
        }
    }
}

impl TokenStatus {
    fn of(published: &Published) -> Self {
        let token = &published.token;
        Self {
            fingerprint: token.fingerprint().to_string(),
            generation: published.generation.0,
            source: published.source.as_str(),
            issued_at: token.issued_at().map(|at| at.to_string()),
            expires_at: token.expires_at().map(|at| at.to_string()),
            verified: published.is_verified(),
            clearance: published.needs_clearance,
        }
    }
}

/// What hints are drawn from, beside those that have been told.
#[derive(Clone, Copy, Default)]
struct Facts {
    silence: Option<Silence>,
    token: TokenFact,
    redis: Option<RedisTrouble>,
    env_file: StoreFact,
    verifier_blind: bool,
    walled: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum TokenFact {
    None,
    Unverified,
    #[default]
    Verified,
}

impl TokenFact {
    fn of(current: Option<&Published>) -> Self {
        match current {
            None => Self::None,
            Some(published) if published.is_verified() => Self::Verified,
            Some(_) => Self::Unverified,
        }
    }
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum StoreFact {
    #[default]
    InOrder,
    Failing,
}

impl StoreFact {
    fn of(in_order: bool) -> Self {
        if in_order { Self::InOrder } else { Self::Failing }
    }
}

impl Facts {
    /// What a person should know, what hurts most first.
    fn hints(self) -> impl Iterator<Item = String> {
        let hints = [
            (self.token == TokenFact::None).then_some(NO_TOKEN),
            self.walled.then_some(WALLED),
            self.verifier_blind.then_some(BLIND_VERIFIER),
            (self.token == TokenFact::Unverified).then_some(UNVERIFIED),
            self.redis.map(of_redis),
            (self.env_file == StoreFact::Failing).then_some(ENV_FILE_DOWN),
            self.silence.map(Silence::text),
        ];
        hints.into_iter().flatten().map(str::to_owned)
    }
}

const NO_TOKEN: &str =
    "no token yet; refresh says whether a run is under way, or why the last failed";
const WALLED: &str = "the anti-bot wall is up and no source gives a token that passes it; is \
    FLARESOLVERR_URL set, and does FlareSolverr go out by the same address?";
const BLIND_VERIFIER: &str = "VERIFY_URL answers without a token too, so it cannot tell a good one \
    from a bad one; set it to an address that needs a token";
const UNVERIFIED: &str =
    "the token is not verified yet; VERIFY_URL gave no verdict, and no real answer has come";
const REDIS_DOWN: &str = "Redis cannot be reached; the token is kept without it meanwhile";
const REDIS_ELSEWHERE: &str = "REDIS_URL does not fit the Redis that it leads to; redis says why";
const REDIS_LOCKED: &str = "Redis refuses the password; is REDIS_PASSWORD or REDIS_PASSWORD_FILE \
    that of the server, and of the user in REDIS_URL?";
const REDIS_REFUSES: &str = "Redis answers and refuses what is asked of it: it is full, a replica, \
    or the user lacks a permission; redis says which";
const ENV_FILE_DOWN: &str =
    "the token's line in ENV_FILE is not kept up to date; env_file says why";

fn of_redis(trouble: RedisTrouble) -> &'static str {
    match trouble {
        RedisTrouble::Away => REDIS_DOWN,
        RedisTrouble::Address => REDIS_ELSEWHERE,
        RedisTrouble::Password => REDIS_LOCKED,
        RedisTrouble::Refusal => REDIS_REFUSES,
    }
}

fn by_route<S: Serializer>(requests: &[(Route, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(requests.iter().map(|(route, count)| (route.as_str(), count)))
}

#[cfg(test)]
mod tests {
    use super::{Facts, Readiness, StoreFact, TokenFact};
    use crate::hints::Silence;
    use crate::token::{Candidate, Published, RedisTrouble, Source, Timestamp, Token, TokenCache};
    use std::collections::HashSet;
    use std::sync::Arc;

    /// A token with `exp` 1000.
    fn published() -> Arc<Published> {
        let token = Token::parse("e30.eyJleHAiOjEwMDB9.c2ln").unwrap();
        TokenCache::new()
            .publish(Candidate::new(token, Source::Direct).verified(true), Timestamp(1))
    }

    #[test]
    fn readiness_names_the_first_reason_against_it() {
        let published = published();
        let token = Some(&*published);
        let cases = [
            (false, token, true, 999, None),
            (false, None, false, 999, Some("no_token")),
            (false, token, false, 1000, Some("token_expired")),
            (false, token, false, 999, Some("token_refused")),
            (true, token, true, 999, Some("draining")),
            (true, None, false, 999, Some("draining")),
        ];
        for (draining, token, usable, now, reason) in cases {
            let readiness = Readiness::judge(draining, token, usable, Timestamp(now));
            assert_eq!(readiness, Readiness { ready: reason.is_none(), reason });
        }
    }

    #[test]
    fn a_working_sidecar_gives_no_hint() {
        assert_eq!(Facts::default().hints().count(), 0);
    }

    #[test]
    fn each_trouble_has_its_hint() {
        let well = Facts::default();
        let trouble = [
            Facts { token: TokenFact::None, ..well },
            Facts { token: TokenFact::Unverified, ..well },
            Facts { redis: Some(RedisTrouble::Away), ..well },
            Facts { redis: Some(RedisTrouble::Address), ..well },
            Facts { redis: Some(RedisTrouble::Password), ..well },
            Facts { redis: Some(RedisTrouble::Refusal), ..well },
            Facts { env_file: StoreFact::Failing, ..well },
            Facts { verifier_blind: true, ..well },
            Facts { walled: true, ..well },
            Facts { silence: Some(Silence::Complete), ..well },
        ];
        let hints: HashSet<_> = trouble.into_iter().flat_map(Facts::hints).collect();
        assert_eq!(hints.len(), trouble.len());
    }
}
