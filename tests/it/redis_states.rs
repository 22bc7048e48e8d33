//! What state Redis may be in: requests go on from memory, `/status` and the log say what it is, and
//! when it is well again it has the token.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::support::redis::Redis;
use crate::support::sidecar::stderr;
use crate::support::{Stage, World, until, until_within};

const PATH: &str = "/web/api/v2/x";
const TOKEN_KEY: &str = "chitai_gorod_token";

/// Long enough for several looks, 10 s apart, and for several tries to write.
const LOOKS: Duration = Duration::from_secs(45);

/// What a state looks like.
struct Looks {
    error: &'static str,
    hint: &'static str,
}

const AWAY: Looks = Looks { error: "", hint: "Redis cannot be reached" };
const FULL: Looks = Looks { error: "OOM", hint: "it is full, a replica" };
const REPLICA: Looks = Looks { error: "READONLY", hint: "it is full, a replica" };
const ELSEWHERE: Looks = Looks { error: "no database", hint: "REDIS_URL does not fit" };
const LOCKED: Looks = Looks { error: "refused the password", hint: "Redis refuses the password" };

async fn with_redis() -> World {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    let world = stage.start().await;
    let token = world.token.clone();
    world.redis().becomes(TOKEN_KEY, &token).await;
    world
}

/// The log lines about Redis with this message.
fn told(world: &World, message: &str) -> Vec<Value> {
    let events = world.sidecar.events().into_iter();
    events.filter(|event| event["message"] == message && event["store"] == "redis").collect()
}

/// Lets the token die and be renewed; returns the new one.
async fn renew(world: &World) -> String {
    let start = Instant::now();
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    // A solve of the stand-in takes no time; one look into Redis may take a second.
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    world.tokens.latest()
}

/// Requests go on, none of them waits for Redis.
async fn check_traffic(world: &World) {
    let start = Instant::now();
    for _ in 0..50 {
        assert_eq!(world.get(PATH).await.status, 200);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

/// `/status` and the log say what it is, the log once, through several looks.
async fn check_is_told(world: &World, looks: &Looks) {
    until_within(LOOKS, "the trouble to be seen again and again", async || {
        world.sidecar.metric("sidecar_store_errors_total", &["redis"]).await >= 3.0
    })
    .await;
    check_traffic(world).await;
    let status = world.sidecar.status().await;
    assert_eq!(status["redis"]["ok"], false);
    assert!(status["redis"]["last_error"].as_str().unwrap().contains(looks.error), "{status}");
    let hints: Vec<_> = status["hints"].as_array().unwrap().iter().collect();
    let hints = hints.iter().filter_map(|hint| hint.as_str()).filter(|hint| hint.contains("Redis"));
    let hints: Vec<_> = hints.collect();
    assert!(hints.len() == 1 && hints[0].contains(looks.hint), "{hints:?}");
    let told = told(world, "store out of order");
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0]["level"], "WARN");
    assert!(told[0]["error"].as_str().unwrap().contains(looks.error), "{told:?}");
    assert_eq!(self::told(world, "store in order again"), Vec::<Value>::new());
}

/// Redis has the token, `/status` says that it is well, the log says so once.
async fn check_is_well_again(world: &World, token: &str) {
    // A pause of up to 30 s goes before a try to write.
    until_within(LOOKS, "the token in Redis", async || {
        world.redis().get(TOKEN_KEY).await.as_deref() == Some(token)
    })
    .await;
    until_within(LOOKS, "Redis to be well", async || {
        world.sidecar.status().await["redis"]["ok"] == true
    })
    .await;
    until("the log to say so", async || told(world, "store in order again").len() == 1).await;
    assert_eq!(told(world, "store out of order").len(), 1);
    assert!(!world.sidecar.status().await["hints"].to_string().contains("Redis"));
    check_traffic(world).await;
}

#[tokio::test]
async fn redis_that_was_killed_gets_the_newest_token() {
    let mut world = with_redis().await;
    world.redis_mut().kill();
    // The one that is due at once; the next could follow after five minutes.
    let token = renew(&world).await;
    check_is_told(&world, &AWAY).await;
    world.redis_mut().restart().await;
    check_is_well_again(&world, &token).await;
}

#[tokio::test]
async fn redis_that_is_down_at_the_start_gets_the_token_when_it_comes() {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    stage.redis_mut().kill();
    let mut world = stage.start().await;
    check_is_told(&world, &AWAY).await;
    let token = renew(&world).await;
    world.redis_mut().restart().await;
    check_is_well_again(&world, &token).await;
}

#[tokio::test]
async fn redis_that_is_frozen_is_as_good_as_dead() {
    let world = with_redis().await;
    world.redis().freeze();
    let token = renew(&world).await;
    check_traffic(&world).await;
    check_is_told(&world, &AWAY).await;
    world.redis().thaw();
    check_is_well_again(&world, &token).await;
}

#[tokio::test]
async fn redis_that_comes_back_empty_is_written_again() {
    let mut world = with_redis().await;
    let token = world.token.clone();
    world.redis_mut().kill();
    world.redis_mut().restart().await;
    // The subscription is lost and made again, and with it comes a look.
    until_within(LOOKS, "the token in Redis", async || {
        world.redis().get(TOKEN_KEY).await.as_ref() == Some(&token)
    })
    .await;
    assert_eq!(world.solver.solves(), 0);
    check_traffic(&world).await;
}

#[tokio::test]
async fn redis_that_is_a_replica_is_told_of_once() {
    let world = with_redis().await;
    world.redis().become_replica().await;
    let token = renew(&world).await;
    check_is_told(&world, &REPLICA).await;
    world.redis().command::<()>(&["REPLICAOF", "NO", "ONE"]).await;
    check_is_well_again(&world, &token).await;
}

#[tokio::test]
async fn redis_that_is_full_is_told_of_once() {
    let world = with_redis().await;
    world.redis().command::<()>(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let token = renew(&world).await;
    check_is_told(&world, &FULL).await;
    world.redis().command::<()>(&["CONFIG", "SET", "maxmemory", "0"]).await;
    check_is_well_again(&world, &token).await;
}

#[tokio::test]
async fn redis_with_another_password_is_told_of_once() {
    let mut stage = Stage::new().await;
    let redis = Redis::start_with(Some("another")).await;
    stage.set("REDIS_URL", redis.url());
    stage.set("REDIS_PASSWORD", "hunter2");
    stage.redis = Some(redis);
    let mut world = stage.start().await;
    let token = renew(&world).await;
    check_is_told(&world, &LOCKED).await;
    world.redis_mut().change_password("hunter2").await;
    check_is_well_again(&world, &token).await;
    assert!(!world.sidecar.log().contains("hunter2"));
}

#[tokio::test]
async fn redis_that_changes_its_trouble_is_told_of_again() {
    let mut world = with_redis().await;
    world.redis().command::<()>(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let token = renew(&world).await;
    check_is_told(&world, &FULL).await;
    world.redis_mut().kill();
    until_within(LOOKS, "the second trouble", async || {
        told(&world, "store out of order").len() == 2
    })
    .await;
    let hints = world.sidecar.status().await["hints"].to_string();
    assert!(hints.contains(AWAY.hint) && !hints.contains(FULL.hint), "{hints}");
    world.redis_mut().restart().await;
    until_within(LOOKS, "the token in Redis", async || {
        world.redis().get(TOKEN_KEY).await.as_ref() == Some(&token)
    })
    .await;
}

#[tokio::test]
async fn redis_is_looked_into_at_each_notice() {
    let world = with_redis().await;
    let foreign = world.tokens.issue();
    let channel = "{chitai_gorod_token}:events";
    until("the sidecar to listen", async || {
        let (_, listeners): (String, u64) =
            world.redis().command(&["PUBSUB", "NUMSUB", channel]).await;
        listeners == 1
    })
    .await;
    let reads = async || {
        let stats: String = world.redis().command(&["INFO", "commandstats"]).await;
        let line = stats.lines().find(|line| line.starts_with("cmdstat_mget:calls="));
        let count = line.and_then(|line| line.split(['=', ',']).nth(1)?.parse::<u64>().ok());
        count.unwrap_or(0)
    };
    world.redis().set(TOKEN_KEY, &foreign).await;
    let (before, start) = (reads().await, Instant::now());
    // So many that the looks now and then, 10 s apart, cannot account for them.
    for seen in 1..=5 {
        world.redis().command::<u64>(&["PUBLISH", channel, "{}"]).await;
        until("a look at the notice", async || reads().await >= before + seen).await;
    }
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    world
        .sidecar
        .status_where("the token to be adopted", |status| status["token"]["source"] == "redis")
        .await;
}

#[tokio::test]
async fn certificate_file_without_a_certificate_ends_the_start() {
    let mut stage = Stage::new().await;
    let file = stage.path("empty.pem");
    std::fs::write(&file, "no certificate\n").unwrap();
    for (url, variable) in [
        ("rediss://127.0.0.1:1", "REDIS_TLS_CA"),
        ("rediss+sentinel://127.0.0.1:1/shop", "REDIS_TLS_CA"),
    ] {
        stage.set("REDIS_URL", url);
        stage.set(variable, file.display());
        let output = stage.run(&["run"]).await;
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(variable) && said.contains("no certificate"), "{said}");
    }
}

#[tokio::test]
async fn setting_that_leads_elsewhere_ends_the_start() {
    for (url, cookies_key, variable) in [
        ("redis://127.0.0.1:1", "chitai_gorod_token", "REDIS_COOKIES_KEY: "),
        ("redis://127.0.0.1:1", "{chitai_gorod_token}:lease", "REDIS_COOKIES_KEY: "),
        ("redis://127.0.0.1:1/-1", "", "REDIS_URL: "),
        ("redis://127.0.0.1:1/?db=3", "", "REDIS_URL: "),
        ("redis+sentinel://a@127.0.0.1:1,b@127.0.0.1:2/shop", "", "REDIS_URL: "),
    ] {
        let mut stage = Stage::new().await;
        stage.set("REDIS_URL", url);
        stage.set("REDIS_COOKIES_KEY", cookies_key);
        let output = stage.run(&["run"]).await;
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{url}: {said}");
        assert!(said.contains(variable), "{url}: {said}");
    }
}

#[tokio::test]
async fn database_that_redis_does_not_have_is_told_of_once() {
    let mut stage = Stage::new().await;
    let redis = Redis::start().await;
    stage.set("REDIS_URL", format!("{}/99", redis.url()));
    stage.redis = Some(redis);
    let world = stage.start().await;
    check_is_told(&world, &ELSEWHERE).await;
}
