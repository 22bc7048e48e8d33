//! The user that the guides make in Redis may do what a sidecar does, and nothing else.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use crate::support::redis::Redis;
use crate::support::{Stage, World, until, until_within};

const PATH: &str = "/web/api/v2/x";
const TOKEN_KEY: &str = "chitai_gorod_token";
const COOKIES_KEY: &str = "chitai_gorod_cookies";

/// The command of the guide, its words; the password stands as it stands there.
fn acl(guide: &str) -> Vec<String> {
    let text = std::fs::read_to_string(format!("{}/{guide}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("ACL SETUSER ")).collect();
    assert_eq!(lines.len(), 1, "{guide}: {lines:?}");
    lines[0].split(' ').map(str::to_owned).collect()
}

/// A Redis that nobody may use but the test and the user that `words` make.
async fn redis_with(words: &[String]) -> Redis {
    let redis = Redis::start_with(Some("the test's")).await;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    redis.command::<()>(&words).await;
    redis
}

/// A sidecar that comes as that user.
async fn sidecar_as(words: &[String]) -> World {
    let redis = redis_with(words).await;
    let mut stage = Stage::new().await;
    let url = redis.url().replace("://", &format!("://{}@", words[2]));
    stage.set("REDIS_URL", format!("{url}/3"));
    stage.set("REDIS_PASSWORD", "PASSWORD");
    stage.redis = Some(redis);
    stage.start().await
}

async fn get(world: &World, key: &str) -> Option<String> {
    world.redis().get_in(3, key).await
}

/// What the server has refused, as `reason object`.
async fn refused(redis: &Redis) -> BTreeSet<String> {
    let entries: Vec<redis::Value> = redis.command(&["ACL", "LOG"]).await;
    let entry = |entry: redis::Value| {
        let fields: HashMap<String, redis::Value> = redis::from_redis_value(entry).unwrap();
        let text =
            |name: &str| -> String { redis::from_redis_value(fields[name].clone()).unwrap() };
        format!("{} {}", text("reason"), text("object"))
    };
    entries.into_iter().map(entry).collect()
}

#[test]
fn both_guides_have_the_same_line() {
    assert_eq!(acl("TOKEN_UPDATE_GUIDE.md"), acl("TOKEN_UPDATE_GUIDE.ru.md"));
}

#[tokio::test]
async fn user_of_the_guide_may_do_all_that_a_sidecar_does() {
    let world = sidecar_as(&acl("TOKEN_UPDATE_GUIDE.md")).await;
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    let ours = world.tokens.latest();
    until("the token in Redis", async || get(&world, TOKEN_KEY).await.as_ref() == Some(&ours))
        .await;
    assert!(get(&world, COOKIES_KEY).await.unwrap().contains(&ours));
    // What another program puts there is adopted.
    let foreign = world.tokens.issue();
    world.redis().set_in(3, TOKEN_KEY, &foreign).await;
    let told = world.redis().command::<u64>(&["PUBLISH", "{chitai_gorod_token}:events", "{}"]);
    assert_eq!(told.await, 1, "it listens");
    until_within(Duration::from_secs(35), "the foreign token to be adopted", async || {
        world.sidecar.status().await["token"]["source"] == "redis"
    })
    .await;
    assert_eq!(world.sidecar.ask("POST", "/refresh").await.status, 200);
    let newest = world.tokens.latest();
    until("the newest token in Redis", async || {
        get(&world, TOKEN_KEY).await.as_ref() == Some(&newest)
    })
    .await;
    let doctor = world.run(&["doctor"]).await;
    let report = String::from_utf8_lossy(&doctor.stdout).into_owned();
    let line = report.lines().find(|line| line.contains("redis_write")).unwrap();
    assert!(line.starts_with("ok"), "{line}");
    assert_eq!(world.sidecar.status().await["redis"]["ok"], true);
    let warned = ["store out of order", "redis gives no notices"];
    let events = world.sidecar.events();
    assert!(!events.iter().any(|event| warned.iter().any(|text| event["message"] == *text)));
    assert_eq!(refused(world.redis()).await, BTreeSet::new());
}

#[tokio::test]
async fn user_of_the_guide_may_do_nothing_else() {
    let line = acl("TOKEN_UPDATE_GUIDE.md");
    let redis = redis_with(&line).await;
    for denied in [
        &["FLUSHALL"][..],
        &["KEYS", "*"],
        &["CONFIG", "GET", "*"],
        &["ACL", "LIST"],
        &["SCRIPT", "FLUSH"],
        &["MGET", "another"],
        &["SET", "chitai_gorod_token2", "x"],
        &["PUBLISH", "another", "x"],
        &["EVAL", "return redis.call('SET', 'another', 'x')", "0"],
        &["EVAL", "return redis.call('FLUSHALL')", "0"],
    ] {
        let error = redis.command_as(&line[2], "PASSWORD", denied).await.unwrap_err();
        // By whom a script calls it is said in words that differ from one version to the next.
        let words = ["NOPERM", "NoPerm", "permission", "can't access", "can't run"];
        assert!(words.iter().any(|word| error.contains(word)), "{denied:?}: {error}");
    }
    assert_eq!(redis.contents().await, []);
}

#[tokio::test]
async fn user_without_the_channel_is_told_of_once_and_loses_only_the_notices() {
    let mut words = acl("TOKEN_UPDATE_GUIDE.md");
    words.retain(|word| !word.starts_with('&'));
    let world = sidecar_as(&words).await;
    let told = || {
        let mut events = world.sidecar.events();
        events.retain(|event| event["message"] == "redis gives no notices");
        events
    };
    until("it to be told", async || told().len() == 1).await;
    assert_eq!(told()[0]["level"], "WARN");
    let denials = async || {
        let stats: String = world.redis().command(&["INFO", "commandstats"]).await;
        let line = stats.lines().find(|line| line.starts_with("cmdstat_subscribe:"));
        let denied = line.and_then(|line| line.split_once("rejected_calls=")?.1.split_once(','));
        denied.map_or(0, |(count, _)| count.parse::<u64>().unwrap())
    };
    // More than one try.
    let before = denials().await;
    until_within(Duration::from_secs(30), "more tries", async || denials().await >= before + 2)
        .await;
    assert_eq!(told().len(), 1);
    assert_eq!(world.get(PATH).await.status, 200);
}
