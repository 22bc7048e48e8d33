//! What a thousand sidecars cost one Redis, measured.
//!
//! They are the library's own refreshers with a store each, in this process and without proxies.
//! `FLEET_SIZE` (1000) says how many, `FLEET_REST_SECONDS` (60) how long they are watched at rest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use http::Method;
use token_sidecar::config::{Config, Env, SourceKind};
use token_sidecar::metrics::Metrics;
use token_sidecar::net::{Dialer, Egress, Ways, raise_descriptor_limit};
use token_sidecar::refresh::{
    Endpoint, Objection, Parts, RefreshSettings, Refresher, Refusal, Verdict,
};
use token_sidecar::tls::client_config;
use token_sidecar::token::{Clock, RedisStore, TokenCache};
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};
use url::Url;

use super::notices::Notices;
use crate::support::origin::Origin;
use crate::support::redis::{Calls, Redis};
use crate::support::solver::Solver;
use crate::support::token::{Tokens, fingerprint};
use crate::support::until_within;

/// Everybody has the token by then.
const PATIENCE: Duration = Duration::from_mins(2);
/// The first time after a token's death that is counted by itself.
const RUSH: Duration = Duration::from_secs(10);

/// From one start to the next.
const PACE: Duration = Duration::from_millis(10);

/// A sidecar without its ports.
struct Member {
    cache: Arc<TokenCache>,
    refresher: Arc<Refresher>,
}

/// What all members have in common.
struct Ground {
    tokens: Tokens,
    origin: Origin,
    solver: Solver,
    redis: Redis,
    dialer: Arc<Dialer>,
    metrics: Arc<Metrics>,
}

impl Ground {
    async fn new() -> Self {
        let (tokens, metrics) = (Tokens::default(), Arc::new(Metrics::new(1)));
        let egress = Egress::new(Vec::new(), Vec::new());
        let (tls, limit) = (client_config(None).unwrap(), Duration::from_secs(30));
        let dialer = Dialer::new(egress, Ways::default(), tls, limit, Arc::clone(&metrics));
        Self {
            origin: Origin::start_plain(tokens.clone()).await,
            solver: Solver::start(tokens.clone()).await,
            redis: Redis::start().await,
            dialer: Arc::new(dialer),
            metrics,
            tokens,
        }
    }

    fn member(&self) -> Member {
        let (cache, clock) = (Arc::new(TokenCache::new()), Arc::new(Clock::new()));
        let (dialer, metrics) = (Arc::clone(&self.dialer), Arc::clone(&self.metrics));
        let parts = Parts { cache: Arc::clone(&cache), clock, dialer, metrics };
        let refresher = Refresher::new(self.settings(), parts, Handle::current()).unwrap();
        Member { cache, refresher }
    }

    fn settings(&self) -> RefreshSettings {
        let shop = Url::parse(&format!("http://{}/", self.origin.addr())).unwrap();
        let env = Env::from_pairs([("REDIS_URL", self.redis.url())]);
        let config = Config::from_env(&env).unwrap();
        let redis = RedisStore::new(config.stores.redis.unwrap()).unwrap();
        RefreshSettings {
            verify_url: shop.join("/web/api/v2/search/product").unwrap(),
            shop_url: shop,
            api_origins: Vec::new(),
            token_cookies: config.api.token_cookies,
            sources: vec![SourceKind::FlareSolverr],
            flaresolverr_url: Some(Url::parse(&self.solver.url()).unwrap()),
            solver_tls: (*client_config(None).unwrap()).clone(),
            solver_proxy: None,
            source_patience: config.refresh.patience,
            solve_timeout: config.refresh.solve_timeout,
            refresh_every: config.refresh.every,
            redis: Some(redis),
            env_file: None,
            environment: None,
        }
    }

    /// Waits until all `members` have the token that was issued last.
    async fn all_have_the_latest(&self, members: &[Member]) {
        until_within(PATIENCE, "the last one to have the token", async || {
            let latest = self.tokens.issued().pop().map(|token| fingerprint(&token));
            latest.is_some_and(|latest| members.iter().all(|member| member.has(&latest)))
        })
        .await;
    }
}

impl Member {
    fn has(&self, fingerprint: &str) -> bool {
        let current = self.cache.current();
        current.is_some_and(|current| current.token.fingerprint().to_string() == fingerprint)
    }

    /// A request of it is refused; it is to get a newer token.
    async fn refused(&self) -> bool {
        let refusal = Refusal {
            objection: Objection::Token,
            generation: self.cache.current().expect("a token").generation,
            sent_at: Instant::now(),
            endpoint: Endpoint::new(&Method::GET, "/web/api/v2/x"),
        };
        matches!(self.refresher.refused(refusal).await, Verdict::Replay(_))
    }
}

/// What has been called between two looks, most often called first, each with the microseconds that
/// all its calls took together.
fn told(before: &BTreeMap<String, Calls>, after: &BTreeMap<String, Calls>) -> String {
    let since = |(name, calls): (&String, &Calls)| {
        let before = before.get(name).copied().unwrap_or_default();
        (calls.count - before.count, calls.micros - before.micros, name.clone())
    };
    let mut calls: Vec<_> = after.iter().map(since).collect();
    calls.retain(|(count, _, name)| *count > 0 && name != "info");
    calls.sort();
    let words =
        calls.iter().rev().map(|(count, micros, name)| format!("{name} {count} ({micros} us)"));
    words.collect::<Vec<_>>().join(", ")
}

/// Commands so far, those of scripts too.
async fn processed(redis: &Redis) -> u64 {
    redis.info("stats", "total_commands_processed").await
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().expect(variable))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, of minutes"]
async fn thousand_sidecars_on_one_redis() {
    raise_descriptor_limit();
    let (size, rest) = (number("FLEET_SIZE", 1000), number("FLEET_REST_SECONDS", 60));
    let ground = Ground::new().await;
    let (redis, empty) = (&ground.redis, ground.redis.info("memory", "used_memory").await);

    let members: Vec<Member> = (0..size).map(|_| ground.member()).collect();
    for member in &members {
        member.refresher.start();
        // They share two threads, which must not be what holds Redis up.
        sleep(PACE).await;
    }
    ground.all_have_the_latest(&members).await;
    println!("start: {size} in a row, {} solves", ground.solver.solves());

    let (calls, before) = (redis.calls().await, processed(redis).await);
    sleep(Duration::from_secs(rest)).await;
    let (count, calls_then) = (processed(redis).await - before, redis.calls().await);
    println!("at rest: {count} commands in {rest} s ({})", told(&calls, &calls_then));
    let used = redis.info("memory", "used_memory").await - empty;
    let clients = redis.info("clients", "connected_clients").await;
    println!("memory: {} bytes of Redis for each, {clients} connections", used / size);

    let notices = Notices::on(redis).await;
    let (solves, calls, before) =
        (ground.solver.solves(), redis.calls().await, processed(redis).await);
    ground.tokens.kill_all();
    let start = Instant::now();
    let rush = async {
        sleep(RUSH).await;
        (processed(redis).await - before, redis.calls().await)
    };
    let served = async {
        let served = join_all(members.iter().map(Member::refused)).await;
        (served.into_iter().all(|served| served), start.elapsed())
    };
    let ((all_served, took), (count, calls_then)) = tokio::join!(served, rush);
    println!("death: {count} commands in {RUSH:?} ({})", told(&calls, &calls_then));
    let (commits, solves) = (notices.times_of("committed"), ground.solver.solves() - solves);
    let committed = commits[0].duration_since(start);
    println!(
        "death: {solves} solves, {} commits, the first after {committed:?}; the last one served after {took:?}",
        commits.len()
    );
    assert!(all_served);
    assert_eq!((solves, commits.len()), (1, 1), "{}", notices.text());
}
