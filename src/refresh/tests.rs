//! The refresher among real neighbours: an API with its verifier and its
//! anonymous door, and a FlareSolverr, all on loopback.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};

use futures_util::future::{join_all, poll_immediate};
use http::Response;
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::fleet::Saving;
use super::run::Cause;
use super::testing::{self, Origin, Redis, Seen, jwt};
use super::*;
use crate::metrics::Metrics;
use crate::token::{
    Candidate, Clock, Entrance, Lack, Lease, Owner, RedisTrouble, Request, SharedBackoff, Standing,
    Stored, TokenCache, ValueId, Wish,
};

const ANONYMOUS: &str = "POST /api/v1/auth/anonymous";
const VERIFY: &str = "GET /verify";
const SOLVE: &str = "POST /v1";

/// What the API thinks and does.
#[derive(Default)]
struct Api {
    /// The tokens it takes.
    good: Mutex<HashSet<String>>,
    /// Whether the anonymous door is open.
    open: AtomicBool,
    /// Whether what that door gives is good.
    lies: AtomicBool,
    /// What the verifier says whatever it is asked; 0: the truth.
    says: AtomicU16,
    minted: AtomicUsize,
}

impl Api {
    fn accept(&self, token: &str) {
        lock(&self.good).insert(token.to_owned());
    }

    fn forget(&self) {
        lock(&self.good).clear();
    }

    fn answer(&self, request: &Seen) -> Response<Full<bytes::Bytes>> {
        match request.target.as_str() {
            VERIFY => testing::json(self.verdict(request), &json!({})),
            ANONYMOUS if self.open.load(Ordering::Relaxed) => {
                let number = self.minted.fetch_add(1, Ordering::Relaxed);
                let token = jwt(&format!("minted-{number}"), 3600);
                if !self.lies.load(Ordering::Relaxed) {
                    self.accept(&token);
                }
                let token = json!({ "accessToken": format!("Bearer {token}") });
                testing::json(201, &json!({ "token": token }))
            }
            _ => testing::json(503, &json!({ "message": "closed" })),
        }
    }

    fn verdict(&self, request: &Seen) -> u16 {
        let good = request.bearer().is_some_and(|token| lock(&self.good).contains(token));
        match self.says.load(Ordering::Relaxed) {
            0 if good => 200,
            0 => 401,
            status => status,
        }
    }
}

struct World {
    rules: Arc<Api>,
    api: Origin,
    solver: Origin,
    /// What the solver replies; it hangs while there is nothing.
    reply: watch::Sender<Option<(u16, Value)>>,
    cache: Arc<TokenCache>,
    refresher: Arc<Refresher>,
}

impl World {
    /// An API whose doors are open and a solver that hangs, with these sources.
    async fn new(sources: &[SourceKind]) -> Self {
        Self::with(sources, |_| {}).await
    }

    async fn with(sources: &[SourceKind], adjust: impl FnOnce(&mut RefreshSettings)) -> Self {
        let rules = Arc::new(Api { open: true.into(), ..Api::default() });
        let answering = Arc::clone(&rules);
        let api = Origin::start(move |request| {
            let response = answering.answer(&request);
            async move { response }
        })
        .await;
        let (reply, replies) = watch::channel(None::<(u16, Value)>);
        let solver = Origin::start(move |_| {
            let mut replies = replies.clone();
            async move {
                let reply = replies.wait_for(Option::is_some).await.unwrap().clone();
                let (status, body) = reply.unwrap();
                testing::json(status, &body)
            }
        })
        .await;
        let mut settings = settings(&api, &solver, sources);
        adjust(&mut settings);
        let cache = Arc::new(TokenCache::new());
        let parts = Parts {
            cache: Arc::clone(&cache),
            clock: Arc::new(Clock::new()),
            dialer: testing::dialer(),
            metrics: Arc::new(Metrics::new(1)),
        };
        let refresher = Refresher::new(settings, parts, Handle::current()).unwrap();
        Self { rules, api, solver, reply, cache, refresher }
    }

    /// Puts a verified token in force; `good` says whether the API takes it.
    fn publish(&self, good: bool) -> Arc<Published> {
        let text = jwt("first", 3600);
        if good {
            self.rules.accept(&text);
        }
        let token = Token::parse(&text).unwrap();
        self.refresher.publish(Candidate::new(token, Source::Direct).verified(true))
    }

    async fn refuse(&self, generation: Generation, path: &str) -> Verdict {
        self.refresher.refused(refusal(generation, path)).await
    }

    fn close_door(&self) {
        self.rules.open.store(false, Ordering::Relaxed);
    }

    fn open_door(&self) {
        self.rules.open.store(true, Ordering::Relaxed);
    }

    fn verifier_says(&self, status: u16) {
        self.rules.says.store(status, Ordering::Relaxed);
    }

    fn solver_gives(&self, token: &str) {
        self.reply.send_replace(Some((200, testing::solved(token))));
    }
}

fn settings(api: &Origin, solver: &Origin, sources: &[SourceKind]) -> RefreshSettings {
    RefreshSettings {
        api_origins: vec![Url::parse(&api.url("/api")).unwrap()],
        flaresolverr_url: Some(Url::parse(&solver.url("/v1")).unwrap()),
        sources: sources.to_vec(),
        ..testing::settings(&api.url("/"))
    }
}

fn refusal(generation: Generation, path: &str) -> Refusal {
    let endpoint = Endpoint::new(&Method::GET, path);
    Refusal { objection: Objection::Token, generation, sent_at: Instant::now(), endpoint }
}

fn replayed(verdict: Verdict) -> Arc<Published> {
    match verdict {
        Verdict::Replay(newer) => newer,
        other => panic!("{other:?}"),
    }
}

fn failed(verdict: Verdict) -> RefreshFailure {
    match verdict {
        Verdict::Failed(failure) => failure,
        other => panic!("{other:?}"),
    }
}

/// Waits for what happens in the background.
async fn eventually(mut happened: impl FnMut() -> bool) {
    let wait = async {
        while !happened() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(10), wait).await.unwrap();
}

use SourceKind::{Direct, FlareSolverr};

#[tokio::test]
async fn a_hundred_refusals_at_once_are_one_judgement_and_one_run() {
    let world = World::new(&[Direct]).await;
    let dead = world.publish(false);
    let refusals = (0..100).map(|n| {
        let (refresher, path) = (Arc::clone(&world.refresher), format!("/{n}"));
        tokio::spawn(async move { refresher.refused(refusal(Generation(1), &path)).await })
    });
    for verdict in join_all(refusals).await {
        assert_eq!(replayed(verdict.unwrap()).generation, Generation(2));
    }
    assert_eq!(world.api.count(ANONYMOUS), 1);
    let asked_about = |token: &Token| {
        let requests = world.api.requests();
        let about = |seen: &&Seen| seen.bearer() == Some(token.expose());
        requests.iter().filter(about).count()
    };
    assert_eq!(asked_about(&dead.token), 1);
    assert_eq!(asked_about(&world.cache.current().unwrap().token), 1);
}

#[tokio::test]
async fn a_401_on_a_token_that_was_put_in_force_anew_is_one_on_that_token() {
    let world = World::new(&[Direct]).await;
    let dead = world.publish(false);
    let anew = world.refresher.add_clearance(&dead, true);
    assert_eq!((anew.generation, anew.since), (Generation(2), Generation(1)));
    let newer = replayed(world.refuse(dead.generation, "/a").await);
    assert_eq!(newer.generation, Generation(3));
    assert_ne!(newer.token, dead.token);
}

#[tokio::test]
async fn a_straggler_gets_the_newer_token_and_starts_nothing() {
    let world = World::new(&[Direct]).await;
    world.publish(false);
    world.publish(true);
    let newer = replayed(world.refuse(Generation(1), "/").await);
    assert_eq!(newer.generation, Generation(2));
    assert!(world.api.requests().is_empty());
}

#[tokio::test]
async fn waiters_of_a_failed_run_share_its_error_and_then_it_is_back_off() {
    let world = World::new(&[Direct]).await;
    world.close_door();
    world.publish(false);
    let verdicts = join_all((0..10).map(|_| world.refuse(Generation(1), "/"))).await;
    let failures: Vec<_> = verdicts.into_iter().map(failed).collect();
    for failure in &failures {
        assert_eq!(failure.reason, FailureReason::RefreshFailed);
        assert!(Arc::ptr_eq(&failure.error, &failures[0].error));
        assert!(failure.retry_after > Duration::from_secs(4), "{:?}", failure.retry_after);
    }
    let asked = world.api.requests().len();
    let next = failed(world.refuse(Generation(1), "/").await);
    assert_eq!(next.reason, FailureReason::Backoff);
    assert!(Arc::ptr_eq(&next.error, &failures[0].error));
    assert_eq!(world.api.requests().len(), asked);
    let status = world.refresher.status().refresh;
    assert_eq!(status.last_outcome, Some("failed"));
    assert!(status.backoff_s > 4.0);
}

#[tokio::test]
async fn the_others_may_try_again_before_the_one_that_has_failed() {
    let redis = Redis::start().await;
    let world = world_with(&redis).await;
    world.close_door();
    world.publish(false);
    failed(world.refuse(Generation(1), "/").await);
    let own = world.refresher.status().refresh.backoff_s;
    let (store, owner) = (redis.store(), Owner::random());
    let request = Request { owner, wish: Wish::None, known: Vec::new() };
    let shared = async || store.enter(&request, 0).await.unwrap().backoff;
    eventually_held_back(&redis).await;
    let left = shared().await.unwrap().left.as_secs_f64();
    assert!(left < own * 0.96, "{left} of {own}");
    assert!(left > own * 0.75, "{left} of {own}");
}

#[tokio::test]
async fn a_client_that_leaves_before_the_verdict_leaves_a_run_behind() {
    let world = World::new(&[Direct]).await;
    let dead = world.publish(false);
    let mut waiting = Box::pin(world.refuse(dead.generation, "/a"));
    assert!(poll_immediate(waiting.as_mut()).await.is_none());
    drop(waiting);
    eventually(|| world.cache.newer_than(Some(dead.generation)).is_some()).await;
}

#[tokio::test]
async fn a_run_goes_on_when_its_only_waiter_leaves() {
    let world = World::new(&[FlareSolverr]).await;
    world.publish(false);
    let waiter = timeout(Duration::from_millis(200), world.refuse(Generation(1), "/"));
    assert!(waiter.await.is_err());
    let token = jwt("solved", 3600);
    world.rules.accept(&token);
    world.solver_gives(&token);
    eventually(|| world.cache.current().unwrap().generation == Generation(2)).await;
    assert_eq!(world.solver.count(SOLVE), 1);
}

#[tokio::test]
async fn a_wedged_solver_costs_only_the_patience() {
    let world = World::new(&[FlareSolverr, Direct]).await;
    world.publish(false);
    let newer = replayed(world.refuse(Generation(1), "/").await);
    assert_eq!(newer.source, Source::Direct);
    assert_eq!(world.solver.count(SOLVE), 1);
}

#[tokio::test]
async fn a_solver_that_is_still_wedged_costs_no_patience_again() {
    let slow = |settings: &mut RefreshSettings| {
        settings.source_patience = Duration::from_secs(1);
    };
    let world = World::with(&[FlareSolverr, Direct], slow).await;
    world.publish(false);
    replayed(world.refuse(Generation(1), "/").await);
    world.rules.forget();
    let started = Instant::now();
    assert_eq!(replayed(world.refuse(Generation(2), "/").await).source, Source::Direct);
    assert!(started.elapsed() < Duration::from_millis(800), "{:?}", started.elapsed());
    assert_eq!(world.solver.count(SOLVE), 1);
}

#[tokio::test]
async fn a_solver_that_fails_hands_over_at_once() {
    let patient = |settings: &mut RefreshSettings| {
        settings.source_patience = Duration::from_mins(1);
    };
    let world = World::with(&[FlareSolverr, Direct], patient).await;
    world.reply.send_replace(Some((500, json!({ "status": "error", "message": "Error: no" }))));
    world.publish(false);
    let refused = timeout(Duration::from_secs(5), world.refuse(Generation(1), "/"));
    assert_eq!(replayed(refused.await.unwrap()).source, Source::Direct);
    let sources = world.refresher.status().sources;
    assert_eq!(sources[0].last_error.as_deref(), Some("HTTP 500: Error: no"));
    assert_eq!(sources[1].last_outcome, Some("ok"));
}

#[tokio::test]
async fn the_next_run_uses_the_solve_that_the_last_one_left_behind() {
    let world = World::new(&[FlareSolverr, Direct]).await;
    world.publish(false);
    replayed(world.refuse(Generation(1), "/").await);
    world.rules.forget();
    world.close_door();
    let refresher = Arc::clone(&world.refresher);
    let next = tokio::spawn(async move { refresher.refused(refusal(Generation(2), "/")).await });
    eventually(|| world.api.count(ANONYMOUS) == 2).await;
    let token = jwt("late", 3600);
    world.rules.accept(&token);
    world.solver_gives(&token);
    let newer = replayed(next.await.unwrap());
    assert_eq!((newer.source, newer.token.expose()), (Source::FlareSolverr, &*token));
    assert_eq!(newer.clearance.cookies().get("tid"), Some("t-1"));
    assert_eq!(world.solver.count(SOLVE), 1);
}

#[tokio::test]
async fn a_solve_that_nobody_waits_for_is_used_if_there_is_no_token() {
    let world = World::new(&[FlareSolverr, Direct]).await;
    let late = lock(&world.refresher.late).take().unwrap();
    tokio::spawn(Arc::clone(&world.refresher).use_late_solves(late));
    world.publish(false);
    let second = replayed(world.refuse(Generation(1), "/").await);
    world.refresher.deny(&second.token);
    let token = jwt("late", 3600);
    world.rules.accept(&token);
    world.solver_gives(&token);
    eventually(|| world.cache.current().unwrap().token.expose() == token).await;
    assert_eq!(world.solver.count(SOLVE), 1);
}

#[tokio::test]
async fn a_token_that_the_verifier_refuses_is_that_sources_failure() {
    let world = World::new(&[FlareSolverr, Direct]).await;
    let rejected = jwt("rejected", 3600);
    world.solver_gives(&rejected);
    world.publish(false);
    let newer = replayed(world.refuse(Generation(1), "/").await);
    assert_eq!(newer.source, Source::Direct);
    assert!(world.refresher.is_denied(&Token::parse(&rejected).unwrap()));
    let sources = world.refresher.status().sources;
    assert_eq!(sources[0].last_error.as_deref(), Some("the API refuses its token"));
}

#[tokio::test]
async fn an_expired_token_and_the_refused_one_are_failures_too() {
    let world = World::new(&[FlareSolverr]).await;
    let dead = world.publish(false);
    world.solver_gives(dead.token.expose());
    let failure = failed(world.refuse(Generation(1), "/").await);
    let expected = "flaresolverr: its token is one that the API has refused";
    assert_eq!(failure.error.to_string(), expected);
    world.solver_gives(&jwt("expired", -5));
    let failure = world.refresher.refresh_now().await.unwrap_err();
    assert_eq!(failure.error.to_string(), "flaresolverr: its token has expired already");
}

#[tokio::test]
async fn without_a_verdict_a_token_is_published_and_saved_only_when_confirmed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("token.env");
    let env_file = |settings: &mut RefreshSettings| {
        settings.env_file = Some(EnvFile::new(path.clone(), true));
    };
    let world = World::with(&[Direct], env_file).await;
    world.verifier_says(500);
    tokio::spawn(Arc::clone(&world.refresher).keep_env_file());
    let published = world.refresher.acquire().await.unwrap();
    assert!(!published.is_verified());
    assert!(!path.exists());
    world.refresher.prove(published.generation);
    eventually(|| path.exists()).await;
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(published.token.expose()));
}

#[tokio::test]
async fn a_second_refused_token_that_nobody_could_verify_starts_the_back_off() {
    let world = World::new(&[Direct]).await;
    world.verifier_says(500);
    let unproven = world.refresher.acquire().await.unwrap();
    let next = replayed(world.refuse(unproven.generation, "/").await);
    let failure = failed(world.refuse(next.generation, "/").await);
    assert_eq!(failure.reason, FailureReason::Backoff);
    assert_eq!(world.api.count(ANONYMOUS), 2);
}

#[tokio::test]
async fn an_endpoints_own_401_is_passed_on_and_excused() {
    let world = World::new(&[Direct]).await;
    world.publish(true);
    for _ in 0..5 {
        assert!(matches!(world.refuse(Generation(1), "/own").await, Verdict::PassOn));
    }
    assert_eq!(world.api.count(VERIFY), 1);
    assert_eq!(world.api.count(ANONYMOUS), 0);
}

#[tokio::test]
async fn a_real_death_shows_beside_an_excused_endpoint() {
    let world = World::new(&[Direct]).await;
    world.publish(true);
    assert!(matches!(world.refuse(Generation(1), "/own").await, Verdict::PassOn));
    world.rules.forget();
    let newer = replayed(world.refuse(Generation(1), "/other").await);
    assert_eq!(newer.generation, Generation(2));
}

#[tokio::test]
async fn an_undecided_verifier_lets_the_run_start() {
    let world = World::new(&[Direct]).await;
    world.publish(true);
    world.verifier_says(500);
    assert_eq!(replayed(world.refuse(Generation(1), "/").await).generation, Generation(2));
}

#[tokio::test]
async fn a_blind_verifier_is_not_asked_about_refusals() {
    let world = World::new(&[Direct]).await;
    world.verifier_says(200);
    assert_eq!(world.refresher.verifier.calibrate().await, super::verifier::Trust::Blind);
    let first = world.publish(true);
    let newer = replayed(world.refuse(Generation(1), "/").await);
    assert!(!newer.is_verified());
    let about_first = |seen: &Seen| seen.bearer() == Some(first.token.expose());
    assert!(!world.api.requests().iter().any(about_first));
    assert!(!world.refresher.status().verifier.trusted);
}

#[tokio::test]
async fn a_failed_routine_run_does_not_make_the_first_refusal_pass() {
    let world = World::new(&[Direct]).await;
    world.publish(true);
    world.close_door();
    let routine = world.refresher.renew(Some(Generation(1)), Cause::Due).await;
    assert_eq!(routine.unwrap_err().reason, FailureReason::RefreshFailed);
    world.rules.forget();
    world.open_door();
    assert_eq!(replayed(world.refuse(Generation(1), "/").await).generation, Generation(2));
}

#[tokio::test]
async fn a_refresh_by_hand_ignores_the_back_off() {
    let world = World::new(&[Direct]).await;
    world.close_door();
    assert!(world.refresher.acquire().await.is_err());
    let held = world.refresher.acquire().await.unwrap_err();
    assert_eq!(held.reason, FailureReason::Backoff);
    world.open_door();
    let published = world.refresher.refresh_now().await.unwrap();
    assert_eq!(published.generation, Generation(1));
    assert_eq!(world.refresher.status().refresh.last_outcome, Some("ok"));
    assert_eq!(world.refresher.retry_after(), Duration::from_secs(1));
}

#[tokio::test]
async fn the_back_off_ends_when_the_solver_is_back() {
    let address = testing::unused_address().await;
    let away = |settings: &mut RefreshSettings| {
        settings.flaresolverr_url = Some(Url::parse(&format!("http://{address}")).unwrap());
    };
    let world = World::with(&[FlareSolverr], away).await;
    for _ in 0..5 {
        world.refresher.schedule().lift();
        let failure = world.refresher.acquire().await.unwrap_err();
        assert!(failure.error.to_string().contains("not reachable"), "{}", failure.error);
    }
    assert!(world.refresher.retry_after() > Duration::from_mins(1));
    let back = Origin::start_at(address, |_| async { testing::reply(200, "{}".into()) }).await;
    tokio::spawn(Arc::clone(&world.refresher).miss_solver());
    tokio::task::yield_now().await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(31)).await;
    tokio::time::resume();
    eventually(|| world.refresher.retry_after() == Duration::from_secs(1)).await;
    assert_eq!(back.requests().len(), 1);
    assert_eq!(back.count("GET /health"), 1);
}

#[tokio::test]
async fn a_start_without_stores_fetches_a_token_by_itself() {
    let world = World::new(&[Direct]).await;
    world.refresher.start();
    let published = world.refresher.acquire().await.unwrap();
    assert_eq!((published.generation, published.source), (Generation(1), Source::Direct));
    assert_eq!(world.api.count(ANONYMOUS), 1);
}

#[tokio::test]
async fn a_start_uses_the_env_file_and_has_its_token_confirmed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(".env");
    let token = jwt("kept", 3600);
    std::fs::write(&path, format!("CHITAI_GOROD_BEARER_TOKEN=\"{token}\"\n")).unwrap();
    let stores = |settings: &mut RefreshSettings| {
        settings.env_file = Some(EnvFile::new(path, false));
        settings.environment = Some(Token::parse(&jwt("environment", 7200)).unwrap());
    };
    let world = World::with(&[Direct], stores).await;
    world.rules.accept(&token);
    world.refresher.start();
    let published = world.refresher.acquire().await.unwrap();
    assert_eq!((published.source, published.token.expose()), (Source::EnvFile, &*token));
    eventually(|| published.is_verified()).await;
    assert_eq!(world.api.count(ANONYMOUS), 0);
}

#[tokio::test]
async fn a_dead_token_from_the_environment_is_replaced_without_any_client() {
    let stores = |settings: &mut RefreshSettings| {
        settings.environment = Some(Token::parse(&jwt("environment", 3600)).unwrap());
    };
    let world = World::with(&[Direct], stores).await;
    world.refresher.start();
    eventually(|| world.refresher.generation() == Some(Generation(2))).await;
    assert_eq!(world.cache.current().unwrap().source, Source::Direct);
}

#[tokio::test]
async fn an_old_token_is_renewed_on_schedule_while_it_serves() {
    let often = |settings: &mut RefreshSettings| {
        settings.refresh_every = Duration::from_secs(1);
    };
    let world = World::with(&[Direct], often).await;
    world.publish(true);
    world.refresher.start();
    eventually(|| world.refresher.generation() >= Some(Generation(3))).await;
    assert!(world.refresher.status().refresh.next_at.starts_with("20"));
}

#[tokio::test]
async fn what_a_store_brings_ends_a_run_that_hangs() {
    let world = World::new(&[FlareSolverr]).await;
    world.publish(false);
    let refresher = Arc::clone(&world.refresher);
    let waiter = tokio::spawn(async move { refresher.refused(refusal(Generation(1), "/")).await });
    eventually(|| world.solver.count(SOLVE) == 1).await;
    world.publish(true);
    assert_eq!(replayed(waiter.await.unwrap()).generation, Generation(2));
}

/// A world with Redis; saves go there, as after a start.
async fn world_with(redis: &Redis) -> World {
    let store = redis.store();
    let world = World::with(&[Direct], |settings| settings.redis = Some(store)).await;
    tokio::spawn(Arc::clone(&world.refresher).keep_redis());
    world
}

async fn eventually_in(redis: &Redis, wanted: &Token) -> Stored {
    let store = redis.store();
    let look = async {
        loop {
            match store.load().await.unwrap() {
                Some(stored) if stored.token == *wanted && !stored.foreign => return stored,
                _ => sleep(Duration::from_millis(20)).await,
            }
        }
    };
    timeout(Duration::from_secs(10), look).await.unwrap()
}

/// A token that another program has put into Redis.
async fn set_by_hand(redis: &Redis, subject: &str) -> Token {
    let token = testing::issued(subject, 5);
    redis.command(&["SET", "chitai_gorod_token", token.expose()]).await;
    token
}

#[tokio::test]
async fn a_new_token_goes_to_redis_and_again_when_redis_has_lost_it() {
    let redis = Redis::start().await;
    let world = world_with(&redis).await;
    let published = world.refresher.acquire().await.unwrap();
    eventually_in(&redis, &published.token).await;
    redis.command(&["FLUSHALL"]).await;
    world.refresher.reload_stores().await;
    let stored = eventually_in(&redis, &published.token).await;
    assert!(stored.verified && stored.cookies_agree);
}

#[tokio::test]
async fn a_good_value_set_by_hand_is_adopted_whatever_its_age() {
    let redis = Redis::start().await;
    let world = world_with(&redis).await;
    let ours = world.publish(true);
    eventually_in(&redis, &ours.token).await;
    let token = set_by_hand(&redis, "by hand").await;
    redis.command(&["SET", "chitai_gorod_cookies", r#"{"tid":"t-1"}"#]).await;
    world.rules.accept(token.expose());
    world.refresher.reload_stores().await;
    let adopted = world.cache.current().unwrap();
    assert_eq!((&adopted.token, adopted.source), (&token, Source::Redis));
    assert!(adopted.is_verified());
    let stored = eventually_in(&redis, &token).await;
    assert!(stored.cookies_agree);
    assert_eq!(stored.clearance.cookies().get("tid"), Some("t-1"));
}

#[tokio::test]
async fn an_older_value_set_by_hand_is_adopted_by_the_whole_fleet() {
    let redis = Redis::start().await;
    let [first, second] = [world_with(&redis).await, world_with(&redis).await];
    let ours = first.publish(true);
    eventually_in(&redis, &ours.token).await;
    second.rules.accept(ours.token.expose());
    second.refresher.reload_stores().await;
    assert_eq!(second.cache.current().unwrap().token, ours.token);
    let token = set_by_hand(&redis, "by hand").await;
    for world in [&first, &second] {
        world.rules.accept(token.expose());
        world.refresher.reload_stores().await;
        assert_eq!(world.cache.current().unwrap().token, token);
        // With metadata by now, which do not make it one among others.
        let stored = eventually_in(&redis, &token).await;
        assert!(stored.by_hand && stored.verified);
    }
}

#[tokio::test]
async fn a_bad_value_set_by_hand_is_examined_once_and_replaced() {
    let redis = Redis::start().await;
    let world = world_with(&redis).await;
    let ours = world.publish(true);
    eventually_in(&redis, &ours.token).await;
    let token = set_by_hand(&redis, "bad").await;
    for _ in 0..3 {
        world.refresher.reload_stores().await;
    }
    assert_eq!(world.refresher.generation(), Some(Generation(1)));
    let about = |seen: &&Seen| seen.bearer() == Some(token.expose());
    assert_eq!(world.api.requests().iter().filter(about).count(), 1);
    eventually_in(&redis, &ours.token).await;
}

#[tokio::test]
async fn a_run_takes_what_another_sidecar_has_found() {
    let redis = Redis::start().await;
    let world = world_with(&redis).await;
    let ours = world.publish(false);
    eventually_in(&redis, &ours.token).await;
    let newer = testing::issued("other", ours.token.issued_at().unwrap().0 + 60);
    world.rules.accept(newer.expose());
    let other = TokenCache::new();
    let now = Clock::new().now();
    let theirs = other.publish(Candidate::new(newer.clone(), Source::Direct).verified(true), now);
    redis.store().save(&theirs, now).await.unwrap();
    let adopted = replayed(world.refuse(Generation(1), "/").await);
    assert_eq!((&adopted.token, adopted.source), (&newer, Source::Redis));
    assert_eq!(world.api.count(ANONYMOUS), 0);
}

/// Waits until what lies in Redis is as told.
async fn eventually_found(redis: &Redis, is_there: impl Fn(&Entrance) -> bool) {
    let store = redis.store();
    let request = Request { owner: Owner::random(), wish: Wish::None, known: Vec::new() };
    let look = async {
        while !is_there(&store.enter(&request, 0).await.unwrap()) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(10), look).await.unwrap();
}

/// Waits until `wanted` lies in Redis without a verdict.
async fn eventually_shown(redis: &Redis, wanted: &Token) {
    let shown = |found: &Entrance| found.unverified.as_ref().map(|shown| shown.token.clone());
    eventually_found(redis, |found| shown(found).as_ref() == Some(wanted)).await;
}

async fn eventually_held_back(redis: &Redis) {
    eventually_found(redis, |found| found.backoff.is_some()).await;
}

#[tokio::test]
async fn a_shared_token_that_nobody_could_verify_disappoints_all_alike() {
    let redis = Redis::start().await;
    let (solves, adopts) = (world_with(&redis).await, world_with(&redis).await);
    let comes_later = world_with(&redis).await;
    let all = [&solves, &adopts, &comes_later];
    for world in all {
        world.verifier_says(500);
    }
    let first = solves.refresher.acquire().await.unwrap();
    eventually_shown(&redis, &first.token).await;
    let same = adopts.refresher.acquire().await.unwrap();
    assert_eq!((&same.token, same.source), (&first.token, Source::Redis));

    sleep(Duration::from_millis(1100)).await; // Tokens tell their age in seconds.
    let second = replayed(solves.refuse(first.generation, "/").await);
    eventually_shown(&redis, &second.token).await;
    let same = replayed(adopts.refuse(same.generation, "/").await);
    assert_eq!(same.token, second.token);
    let failure = failed(adopts.refuse(same.generation, "/").await);
    assert_eq!(failure.reason, FailureReason::Backoff);

    // Who has shown it tells those who have seen less.
    let failure = failed(solves.refuse(second.generation, "/").await);
    assert_eq!(failure.reason, FailureReason::Backoff);
    eventually_held_back(&redis).await;
    let same = comes_later.refresher.acquire().await.unwrap();
    assert_eq!(same.token, second.token);
    let failure = failed(comes_later.refuse(same.generation, "/").await);
    assert!(matches!(*failure.error, RefreshError::Elsewhere(_)), "{}", failure.error);
    let minted: usize = all.iter().map(|world| world.api.count(ANONYMOUS)).sum();
    assert_eq!(minted, 2);
}

#[tokio::test]
async fn a_back_off_that_is_known_is_no_failure_of_another_sidecar() {
    let redis = Redis::start().await;
    let (fails, waits) = (world_with(&redis).await, world_with(&redis).await);
    fails.close_door();
    let own = fails.refresher.acquire().await.unwrap_err();
    assert!(matches!(*own.error, RefreshError::Sources(_)), "{}", own.error);
    eventually_held_back(&redis).await;
    let told = waits.refresher.acquire().await.unwrap_err();
    assert!(matches!(*told.error, RefreshError::Elsewhere(_)), "{}", told.error);
    for (world, first) in [(&fails, own), (&waits, told)] {
        for _ in 0..2 {
            world.refresher.schedule().lift(); // The own pause is over first.
            let again = world.refresher.acquire().await.unwrap_err();
            assert!(matches!(*again.error, RefreshError::Still(..)), "{}", again.error);
            assert_eq!(again.error.to_string(), first.error.to_string());
            let status = world.refresher.status().refresh;
            assert_eq!(status.last_error, Some(first.error.to_string()));
            assert!(status.backoff_s > 1.0, "{}", status.backoff_s);
        }
    }
    assert_eq!(fails.api.count(ANONYMOUS) + waits.api.count(ANONYMOUS), 1);
}

#[tokio::test]
async fn a_refusal_to_write_counts_until_a_write_succeeds() {
    let redis = Redis::start().await;
    let store = redis.store();
    let world = World::with(&[Direct], |settings| settings.redis = Some(store)).await;
    redis.command(&["REPLICAOF", "127.0.0.1", "1"]).await;
    let publish = |subject, verified| {
        let token = testing::issued(subject, 5);
        world.refresher.publish(Candidate::new(token, Source::Direct).verified(verified))
    };
    let trouble_after_saving = async || {
        world.refresher.save_to_redis().await;
        world.refresher.stores.redis_trouble()
    };
    publish("first", true);
    assert_eq!(trouble_after_saving().await, Some(RedisTrouble::Refusal));
    // Nothing waits to be written, for a moment.
    let unverified = publish("second", false);
    assert_eq!(trouble_after_saving().await, Some(RedisTrouble::Refusal));
    world.refresher.deny(&unverified.token);
    assert_eq!(trouble_after_saving().await, Some(RedisTrouble::Refusal));
    redis.command(&["REPLICAOF", "NO", "ONE"]).await;
    publish("third", true);
    assert_eq!(trouble_after_saving().await, None);
}

#[tokio::test]
async fn a_write_that_stops_at_a_stored_value_is_no_proof_that_writes_succeed() {
    let redis = Redis::start().await;
    let store = redis.store();
    let world = World::with(&[Direct], |settings| settings.redis = Some(store)).await;
    redis.command(&["SET", "another", "no token"]).await;
    redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
    world.publish(true);
    world.refresher.save_to_redis().await;
    assert_eq!(world.refresher.stores.redis_trouble(), Some(RedisTrouble::Refusal));
    redis.command(&["RENAME", "another", "chitai_gorod_token"]).await;
    // It is not overwritten before it has been seen.
    assert_eq!(world.refresher.save_to_redis().await, Saving::Refused);
    assert_eq!(world.refresher.stores.redis_trouble(), Some(RedisTrouble::Refusal));
    assert_eq!(world.refresher.save_to_redis().await, Saving::Failed);
}

#[tokio::test]
async fn a_redis_that_is_down_delays_nothing() {
    let address = testing::unused_address().await;
    let down = testing::redis_store(&format!("redis://{address}"));
    let world = World::with(&[Direct], |settings| settings.redis = Some(down)).await;
    world.refresher.start();
    let acquired = timeout(Duration::from_secs(2), world.refresher.acquire());
    assert_eq!(acquired.await.unwrap().unwrap().source, Source::Direct);
    eventually(|| world.refresher.status().redis.is_some_and(|redis| !redis.ok)).await;
}

#[tokio::test]
async fn a_refusal_that_joins_a_routine_run_is_not_held_up_by_its_failure_elsewhere() {
    let redis = Redis::start().await;
    let world = world_with(&redis).await;
    let ours = world.publish(true);
    eventually_in(&redis, &ours.token).await;
    let (other, owner) = (redis.store(), Owner::random());
    let known = vec![ValueId::of_token(&ours.token)];
    let request = Request { owner: owner.clone(), wish: Wish::Routine, known };
    let Standing::Granted { epoch } = other.enter(&request, 0).await.unwrap().turn else {
        panic!()
    };
    let refresher = Arc::clone(&world.refresher);
    let due =
        tokio::spawn(async move { refresher.renew(refresher.generation(), Cause::Due).await });
    eventually(|| world.refresher.fleet.waits()).await;
    world.rules.forget();
    let fails = async {
        eventually(|| world.refresher.needed.load(Ordering::Relaxed)).await;
        let left = Duration::from_mins(10);
        let backoff = SharedBackoff { error: "x".into(), failures: 8, routine: true, epoch, left };
        assert!(other.fail(&Lease { owner, epoch }, &backoff).await.unwrap());
    };
    let (verdict, ()) = tokio::join!(world.refuse(ours.generation, "/"), fails);
    replayed(verdict);
    due.await.unwrap().unwrap();
    assert_eq!(world.api.count(ANONYMOUS), 1);
}

#[tokio::test]
async fn a_full_redis_counts_as_out_of_order_though_nothing_is_to_be_written() {
    let redis = Redis::start().await;
    let world = world_with(&redis).await;
    let ours = world.publish(true);
    eventually_in(&redis, &ours.token).await;
    redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
    world.rules.forget();
    world.close_door();
    failed(world.refuse(ours.generation, "/").await);
    world.refresher.reload_stores().await;
    let last_error = world.refresher.status().redis.unwrap().last_error.unwrap();
    assert!(last_error.contains("OOM"), "{last_error}");
    redis.command(&["CONFIG", "SET", "maxmemory", "0"]).await;
    world.refresher.schedule().lift();
    failed(world.refuse(ours.generation, "/").await);
    assert!(world.refresher.status().redis.unwrap().ok);
}

#[tokio::test]
async fn a_fleet_without_any_solver_tries_a_few_times_for_one_death() {
    let redis = Redis::start().await;
    let worlds = join_all((0..12).map(|_| world_with(&redis))).await;
    for world in &worlds {
        world.close_door();
        world.publish(false);
    }
    let verdicts = join_all(worlds.iter().map(|world| world.refuse(Generation(1), "/"))).await;
    for verdict in verdicts {
        failed(verdict);
    }
    let tries: usize = worlds.iter().map(|world| world.api.count(ANONYMOUS)).sum();
    assert!(tries <= 5, "{tries}");
}

#[tokio::test]
async fn a_solver_that_hangs_is_a_failure_for_all_and_not_handed_on() {
    let error = |error| {
        RefreshError::Sources(vec![SourceFailure { kind: SourceKind::FlareSolverr, error }])
    };
    let world = World::with(&[SourceKind::FlareSolverr], |_| {}).await;
    let hangs = error(SourceError::TimedOut(Duration::from_secs(105)));
    assert_eq!(world.refresher.lack(&hangs), None);
    let refuses = error(SourceError::Unreachable("refused".to_owned()));
    assert_eq!(world.refresher.lack(&refuses), Some(Lack::Away));
    let without = World::with(&[Direct], |_| {}).await;
    assert_eq!(without.refresher.lack(&hangs), Some(Lack::None));
}
