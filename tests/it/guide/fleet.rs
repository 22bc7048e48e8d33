//! The chapter on fleets: its commands do what it says, and its table has every key.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use super::{chapter, guides, spans};
use crate::support::sidecar::{output, stderr, stdout};
use crate::support::token::{Jwt, fingerprint};
use crate::support::{Stage, World, until_within};

const TOKEN_KEY: &str = "chitai_gorod_token";
/// What the guide gives a sidecar to look into Redis, and some more.
const LOOKED: Duration = Duration::from_secs(40);

/// The commands of the guide that begin so.
fn commands(start: &str) -> Vec<String> {
    let [guide, _] = guides();
    let lines = guide.blocks().concat();
    let commands: Vec<_> =
        lines.into_iter().filter(|line| line.starts_with(start)).map(str::to_owned).collect();
    assert!(!commands.is_empty(), "{start}");
    commands
}

/// The only one that begins so.
fn command(start: &str) -> String {
    let mut commands = commands(start);
    assert_eq!(commands.len(), 1, "{commands:?}");
    commands.remove(0)
}

/// Runs a command of the guide at the world's Redis; returns what it prints.
async fn run(world: &World, command: &str) -> String {
    let here = format!("redis-cli -p {}", world.redis().port());
    let mut shell = Command::new("bash");
    shell.args(["-o", "pipefail", "-c", &command.replacen("redis-cli", &here, 1)]);
    let output = output(shell).await;
    let printed = stdout(&output);
    assert!(output.status.success(), "{command}: {printed}{}", stderr(&output));
    let refused = ["ERR", "WRONGTYPE", "NOPERM"].iter().any(|word| printed.starts_with(word));
    assert!(!refused, "{command}: {printed}");
    printed.trim().to_owned()
}

/// A sidecar whose token has died once.
async fn world() -> (World, String) {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    let world = stage.start().await;
    world.kill_token();
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    let token = world.tokens.latest();
    world.redis().becomes(TOKEN_KEY, &token).await;
    (world, token)
}

#[tokio::test]
async fn commands_that_look_show_what_the_guide_says() {
    let (world, token) = world().await;
    let keys = run(&world, &command("redis-cli --scan")).await;
    assert!(keys.lines().any(|key| key == TOKEN_KEY), "{keys}");
    let shown = run(&world, &command("redis-cli get chitai_gorod_token |")).await;
    assert_eq!(shown, fingerprint(&token));
    let meta = run(&world, &command("redis-cli get '{chitai_gorod_token}:meta'")).await;
    assert!(meta.contains(&fingerprint(&token)) && meta.contains("\"epoch\":"), "{meta}");
    let ttl: u64 = run(&world, &command("redis-cli ttl")).await.parse().unwrap();
    assert!(ttl > 80_000, "{ttl}");
    for look in [commands("redis-cli pttl"), commands("redis-cli get '{")].concat() {
        run(&world, &look).await;
    }
    let denied = run(&world, &command("redis-cli zrange")).await;
    assert!(denied.lines().any(|line| line.starts_with(&fingerprint(&world.token))), "{denied}");
    until_within(LOOKED, "the sidecar to listen", async || {
        let listeners = run(&world, &command("redis-cli pubsub")).await;
        listeners.lines().last() == Some("1")
    })
    .await;
    let listen = format!("timeout 1 {} || [ $? = 124 ]", command("redis-cli subscribe"));
    let heard = run(&world, &listen).await;
    assert!(heard.starts_with("subscribe"), "{heard}");
}

#[tokio::test]
async fn commands_that_repair_do_so() {
    let (world, token) = world().await;
    let by_hand = Jwt::anonymous().make();
    world.tokens.accept(&by_hand);
    run(&world, &command("redis-cli set").replace("eyJ…", &by_hand)).await;
    until_within(LOOKED, "the token set by hand to be adopted", async || {
        world.sidecar.status().await["token"]["fingerprint"] == fingerprint(&by_hand).as_str()
    })
    .await;
    assert_ne!(token, by_hand);
    for delete in commands("redis-cli del") {
        run(&world, &delete).await;
    }
    until_within(LOOKED, "the token to be written again", async || {
        world.redis().get(TOKEN_KEY).await.as_deref() == Some(&*by_hand)
    })
    .await;
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    assert_eq!(world.solver.solves(), 1, "nothing of this needs a solve");
}

#[tokio::test]
async fn table_of_keys_has_all_that_a_sidecar_makes() {
    let [guide, _] = guides();
    let chapter = chapter(&guide, 6);
    let known: BTreeSet<_> = chapter.first_cells().into_iter().flat_map(spans).collect();
    let (world, _) = world().await;
    world.solver.set(crate::support::solver::Mode::Error);
    world.origin.close_doors();
    world.kill_token();
    assert_eq!(world.sidecar.ask("POST", "/refresh").await.status, 502);
    let keys = run(&world, "redis-cli --scan").await;
    assert!(keys.lines().count() >= 5, "{keys}");
    let unknown: Vec<_> = keys.lines().filter(|key| !known.contains(key)).collect();
    assert_eq!(unknown, [""; 0], "not in the guide");
}
