//! Redis and the env file: what is written, what is read, and what happens when they fail.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use serde_json::Value;

use crate::support::origin::Verification;
use crate::support::sidecar::{BINARY, Sidecar};
use crate::support::token::{Jwt, LIFE, fingerprint};
use crate::support::{Stage, World, skip, until, until_within};

const PATH: &str = "/web/api/v2/x";
const TOKEN_KEY: &str = "chitai_gorod_token";
const COOKIES_KEY: &str = "chitai_gorod_cookies";

async fn with_redis() -> Stage {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    stage
}

/// Lets the token die and be renewed; returns the new one.
async fn renew(world: &World) -> String {
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    world.tokens.latest()
}

async fn current(world: &World, token: &str) {
    let expected = fingerprint(token);
    until_within(Duration::from_secs(35), "the token to be adopted", async || {
        world.sidecar.status().await["token"]["fingerprint"] == expected.as_str()
    })
    .await;
}

// Redis.

#[tokio::test]
async fn redis_gets_both_keys_with_their_ttl() {
    let world = with_redis().await.start().await;
    let token = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &token).await;
    let cookies: Value =
        serde_json::from_str(&world.redis().get(COOKIES_KEY).await.unwrap()).unwrap();
    assert_eq!(cookies["access-token"], format!("Bearer%20{token}"));
    assert_eq!(cookies["tid"], "session-cookie", "all the solver's cookies are there");
    for key in [TOKEN_KEY, COOKIES_KEY] {
        let ttl = world.redis().ttl(key).await;
        assert!((86_000..=86_400).contains(&ttl), "{key}: {ttl}");
    }
}

#[tokio::test]
async fn redis_ttl_is_never_longer_than_the_tokens_life() {
    let mut stage = with_redis().await;
    stage.set("TOKEN_TTL", "500h");
    let world = stage.start().await;
    let token = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &token).await;
    let ttl = u64::try_from(world.redis().ttl(TOKEN_KEY).await).unwrap();
    assert!(ttl <= LIFE && ttl > LIFE - 100, "{ttl}");
}

#[tokio::test]
async fn redis_ttl_is_a_setting() {
    let mut stage = with_redis().await;
    stage.set("TOKEN_TTL", "10m");
    let world = stage.start().await;
    let token = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &token).await;
    assert!((500..=600).contains(&world.redis().ttl(TOKEN_KEY).await));
}

#[tokio::test]
async fn redis_keys_are_settings() {
    let mut stage = with_redis().await;
    stage.set("REDIS_KEY", "my_token");
    stage.set("REDIS_COOKIES_KEY", "my_cookies");
    let world = stage.start().await;
    let token = renew(&world).await;
    world.redis().becomes("my_token", &token).await;
    assert!(world.redis().get("my_cookies").await.is_some());
    assert_eq!(world.redis().get(TOKEN_KEY).await, None);
}

#[tokio::test]
async fn redis_holds_metadata_without_a_secret() {
    let world = with_redis().await.start().await;
    let token = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &token).await;
    let meta = world.redis().get("{chitai_gorod_token}:meta").await.expect("metadata");
    let meta: Value = serde_json::from_str(&meta).unwrap();
    assert!(meta.to_string().contains(&fingerprint(&token)), "{meta}");
    assert!(!meta.to_string().contains(&token));
}

#[tokio::test]
async fn redis_password_stands_apart_from_the_url() {
    let password = "p@ss:w/rd#1?&%";
    let redis = crate::support::redis::Redis::start_with(Some(password)).await;
    let mut stage = Stage::new().await;
    stage.set("REDIS_URL", redis.url());
    stage.set("REDIS_PASSWORD", password);
    stage.redis = Some(redis);
    let world = stage.start().await;
    let token = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &token).await;
    assert!(!world.sidecar.log().contains(password));
}

#[tokio::test]
async fn redis_that_is_down_at_the_start_delays_and_fails_nothing() {
    let mut stage = with_redis().await;
    stage.redis_mut().kill();
    let start = tokio::time::Instant::now();
    let mut world = stage.start().await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(world.get(PATH).await.status, 200);
    let token = renew(&world).await;
    world.redis_mut().restart().await;
    world.redis().becomes(TOKEN_KEY, &token).await;
    assert!(world.sidecar.metric("sidecar_store_errors_total", &["redis"]).await >= 1.0);
}

#[tokio::test]
async fn redis_that_is_frozen_delays_no_answer() {
    let world = with_redis().await.start().await;
    world.redis().freeze();
    let start = tokio::time::Instant::now();
    let token = renew(&world).await;
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    world.redis().thaw();
    world.redis().becomes(TOKEN_KEY, &token).await;
}

#[tokio::test]
async fn redis_that_is_frozen_at_the_start_delays_little() {
    let stage = with_redis().await;
    stage.redis().freeze();
    let start = tokio::time::Instant::now();
    let world = stage.start().await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(world.get(PATH).await.status, 200);
    world.redis().thaw();
}

#[tokio::test]
async fn redis_killed_and_back_under_traffic_is_written_again() {
    let mut world = with_redis().await.start().await;
    let first = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &first).await;
    world.redis_mut().kill();
    renew(&world).await;
    for _ in 0..10 {
        assert_eq!(world.get(PATH).await.status, 200);
    }
    // Without Redis that was the one for the next five minutes.
    world.kill_token();
    let refused = world.get(PATH).await;
    assert_eq!(refused.status, 401);
    assert_eq!(world.get(PATH).await.status, 401);
    world.redis_mut().restart().await;
    until("a token once Redis is back", async || world.get(PATH).await.status == 200).await;
    let last = world.tokens.latest();
    world.redis().becomes(TOKEN_KEY, &last).await;
    let cookies: Value =
        serde_json::from_str(&world.redis().get(COOKIES_KEY).await.unwrap()).unwrap();
    assert_eq!(cookies["access-token"], format!("Bearer%20{last}"));
}

#[tokio::test]
async fn foreign_token_that_is_good_is_adopted_and_the_cookies_brought_in_step() {
    let world = with_redis().await.start().await;
    let ours = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &ours).await;
    // Older by `iat`, as another machine's clock may have it.
    let foreign = Jwt::anonymous().issued_ago(3600).make();
    world.tokens.accept(&foreign);
    world.redis().set(TOKEN_KEY, &foreign).await;
    current(&world, &foreign).await;
    let status = world.sidecar.status().await;
    assert_eq!(status["token"]["source"], "redis");
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests().last().unwrap().token(), Some(foreign.as_str()));
    until("the cookies key to be in step", async || {
        let cookies = world.redis().get(COOKIES_KEY).await.unwrap_or_default();
        cookies.contains(&foreign)
    })
    .await;
    assert_eq!(world.redis().get(TOKEN_KEY).await, Some(foreign));
}

#[tokio::test]
async fn foreign_token_that_is_bad_is_not_adopted() {
    let world = with_redis().await.start().await;
    let ours = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &ours).await;
    let bad = Jwt::anonymous().make();
    world.redis().set(TOKEN_KEY, &bad).await;
    until_within(Duration::from_secs(35), "the foreign token to be judged", async || {
        world.origin.verifications_of(&bad) > 0
    })
    .await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.sidecar.status().await["token"]["fingerprint"], fingerprint(&ours));
    assert!(world.origin.requests().iter().all(|request| request.token() != Some(&bad)));
}

#[tokio::test]
async fn foreign_value_that_is_no_token_is_ignored() {
    for value in ["", "not a token", "a.b.c", "Bearer"] {
        let stage = with_redis().await;
        stage.redis().set(TOKEN_KEY, value).await;
        let world = stage.start().await;
        assert_eq!(world.get(PATH).await.status, 200, "{value:?}");
        assert_eq!(world.origin.requests()[0].token(), Some(world.token.as_str()));
    }
}

#[tokio::test]
async fn keys_that_disagree_count_by_the_token_key() {
    let stage = with_redis().await;
    stage.without_token();
    let right = stage.tokens.issue();
    let wrong = Jwt::anonymous().make();
    stage.redis().set(TOKEN_KEY, &right).await;
    stage.redis().set(COOKIES_KEY, &format!(r#"{{"access-token":"Bearer%20{wrong}"}}"#)).await;
    let world = stage.start().await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests()[0].token(), Some(right.as_str()));
    assert_eq!(world.solver.solves(), 0);
}

#[tokio::test]
async fn keys_that_vanish_harm_nothing() {
    let world = with_redis().await.start().await;
    let token = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &token).await;
    world.redis().delete(TOKEN_KEY).await;
    world.redis().delete(COOKIES_KEY).await;
    assert_eq!(world.get(PATH).await.status, 200);
    let next = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &next).await;
}

#[tokio::test]
async fn start_takes_the_newest_of_redis_and_the_file() {
    for redis_is_newer in [true, false] {
        let stage = with_redis().await;
        let older = Jwt::anonymous().issued_ago(600).make();
        let newer = Jwt::anonymous().issued_ago(10).make();
        let (in_redis, in_file) = if redis_is_newer { (&newer, &older) } else { (&older, &newer) };
        stage.tokens.accept(&older);
        stage.tokens.accept(&newer);
        stage.redis().set(TOKEN_KEY, in_redis).await;
        stage.write_env_file(&format!("CHITAI_GOROD_BEARER_TOKEN=\"{in_file}\"\n"));
        let world = stage.start().await;
        let expected = fingerprint(&newer);
        let status = world
            .sidecar
            .status_where("the newest", |status| status["token"]["fingerprint"] == expected)
            .await;
        assert_eq!(status["token"]["source"], if redis_is_newer { "redis" } else { "env_file" });
        assert_eq!(world.get(PATH).await.status, 200);
        assert_eq!(world.solver.solves(), 0);
    }
}

#[tokio::test]
async fn restart_continues_with_the_token_in_redis() {
    let world = with_redis().await.start().await;
    let token = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &token).await;
    world.saved(&token).await;
    let stage = world.stop();
    stage.without_token();
    let world = stage.start().await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests().last().unwrap().token(), Some(token.as_str()));
    assert_eq!(world.solver.solves(), 1, "the one before the restart");
    assert_eq!(world.sidecar.status().await["token"]["source"], "redis");
}

#[tokio::test]
async fn restart_continues_with_the_token_in_the_file() {
    let world = World::start().await;
    let token = renew(&world).await;
    world.saved(&token).await;
    let world = world.stop().start().await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests().last().unwrap().token(), Some(token.as_str()));
    assert_eq!(world.solver.solves(), 1, "the one before the restart");
    assert_eq!(world.sidecar.status().await["token"]["source"], "env_file");
}

#[tokio::test]
async fn start_takes_the_token_of_the_environment_last() {
    let mut stage = Stage::new().await;
    stage.without_token();
    let token = stage.tokens.issue();
    stage.set("CHITAI_GOROD_BEARER_TOKEN", format!("Bearer {token}"));
    let world = stage.start().await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests()[0].token(), Some(token.as_str()));
    assert_eq!(world.sidecar.status().await["token"]["source"], "environment");
}

/// It would become everybody's.
#[tokio::test]
async fn start_takes_no_token_of_a_logged_in_visitor() {
    let mut stage = Stage::new().await;
    let personal = Jwt::personal().make();
    stage.tokens.accept(&personal);
    stage.set("CHITAI_GOROD_BEARER_TOKEN", &personal);
    stage.write_env_file(&format!("CHITAI_GOROD_BEARER_TOKEN=\"{personal}\"\n"));
    let world = stage.start().await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_ne!(world.origin.requests()[0].token(), Some(personal.as_str()));
    assert_eq!(world.sidecar.status().await["token"]["source"], "flaresolverr");
}

#[tokio::test]
async fn token_of_the_environment_yields_to_the_file() {
    let mut stage = Stage::new().await;
    let newer = stage.tokens.issue();
    stage.set("CHITAI_GOROD_BEARER_TOKEN", newer);
    let world = stage.start().await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests()[0].token(), Some(world.token.as_str()));
}

#[tokio::test]
async fn start_without_any_token_gets_one_in_the_background() {
    let stage = Stage::new().await;
    stage.without_token();
    let world = stage.start().await;
    assert_eq!(world.solver.solves(), 1);
    assert_eq!(world.get(PATH).await.status, 200);
}

#[tokio::test]
async fn hangup_signal_reads_the_stores_again() {
    let world = World::start().await;
    let newer = Jwt::anonymous().issued_in(60).make();
    world.tokens.accept(&newer);
    world.write_env_file(&format!("CHITAI_GOROD_BEARER_TOKEN={newer}\n"));
    world.sidecar.signal(rustix::process::Signal::HUP);
    current(&world, &newer).await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.solver.solves(), 0);
}

// The env file.

#[tokio::test]
async fn env_file_keeps_other_lines_comments_and_mode() {
    let stage = Stage::new().await;
    let before = format!(
        "# top\nREDIS_URL_OTHER=redis://x\n\nexport A='b c'\nCHITAI_GOROD_BEARER_TOKEN=\"Bearer {}\" # old\nZ=1\n# end",
        stage.token
    );
    stage.write_env_file(&before);
    std::fs::set_permissions(stage.env_file(), std::fs::Permissions::from_mode(0o640)).unwrap();
    let world = stage.start().await;
    let token = renew(&world).await;
    world.saved(&token).await;
    let after = world.read_env_file();
    let kept = |text: &str| -> Vec<String> {
        text.lines().filter(|line| !line.contains("BEARER_TOKEN")).map(str::to_owned).collect()
    };
    assert_eq!(kept(&after), kept(&before));
    assert_eq!(after.matches("CHITAI_GOROD_BEARER_TOKEN=").count(), 1);
    let line = after.lines().find(|line| line.starts_with("CHITAI_GOROD_BEARER_TOKEN=\"")).unwrap();
    assert!(line.contains(&format!("{token}\"")), "{after}");
    let mode = std::fs::metadata(world.env_file()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
    assert_eq!(leftovers(&world), Vec::<String>::new());
}

/// Files beside the env file that a writer left behind.
fn leftovers(stage: &Stage) -> Vec<String> {
    let names = std::fs::read_dir(stage.dir()).unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.map(|name| name.to_string_lossy().into_owned());
    names.filter(|name| name.contains("shop.env") && name.contains("tmp")).collect()
}

#[tokio::test]
async fn env_file_forms_of_the_line_are_all_read() {
    for form in ["T", "\"T\"", "'T'", "\"Bearer T\"", "Bearer%20T", "Bearer T"] {
        let stage = Stage::new().await;
        let line = form.replace('T', &stage.token);
        stage.write_env_file(&format!("CHITAI_GOROD_BEARER_TOKEN={line}\n"));
        let world = stage.start().await;
        assert_eq!(world.get(PATH).await.status, 200, "{form}");
        assert_eq!(world.solver.solves(), 0, "{form}");
    }
}

#[tokio::test]
async fn env_file_that_is_absent_is_created_for_the_owner_alone() {
    let stage = Stage::new().await;
    stage.without_token();
    let world = stage.start().await;
    let token = world.tokens.latest();
    world.saved(&token).await;
    let mode = std::fs::metadata(world.env_file()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn env_file_that_is_absent_and_was_not_asked_for_is_not_created() {
    let mut stage = Stage::new().await;
    stage.without_token();
    stage.unset("ENV_FILE");
    stage.with_redis().await;
    let world = stage.start().await;
    let token = world.tokens.latest();
    // Once Redis has it, the file's turn has come too.
    world.redis().becomes(TOKEN_KEY, &token).await;
    let next = renew(&world).await;
    world.redis().becomes(TOKEN_KEY, &next).await;
    assert!(!world.path(".env").exists());
}

#[tokio::test]
async fn env_file_in_the_working_folder_is_read_and_written_by_default() {
    let mut stage = Stage::new().await;
    stage.unset("ENV_FILE");
    std::fs::rename(stage.env_file(), stage.path(".env")).unwrap();
    let world = stage.start().await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests()[0].token(), Some(world.token.as_str()));
    let token = renew(&world).await;
    let file = world.path(".env");
    until("it to be written", async || std::fs::read_to_string(&file).unwrap().contains(&token))
        .await;
}

#[tokio::test]
async fn env_file_folder_that_is_not_writable_is_warned_of_once() {
    let mut stage = Stage::new().await;
    // No writer, root or not, can make a file there.
    stage.set("ENV_FILE", "/proc/taken.env");
    let world = stage.start().await;
    for _ in 0..3 {
        renew(&world).await;
    }
    until("a warning", async || warnings_of(&world.sidecar, "taken") > 0).await;
    renew(&world).await;
    assert_eq!(warnings_of(&world.sidecar, "taken"), 1);
    assert!(world.sidecar.metric("sidecar_store_errors_total", &["env_file"]).await >= 1.0);
    let hints = world.sidecar.status().await["hints"].to_string();
    assert!(hints.contains("ENV_FILE is not kept up to date"), "{hints}");
}

fn warnings_of(sidecar: &Sidecar, word: &str) -> usize {
    let about = |event: &&Value| event["level"] == "WARN" && event.to_string().contains(word);
    sidecar.events().iter().filter(about).count()
}

#[tokio::test]
async fn env_file_that_is_a_bind_mount_is_written_in_place() {
    let stage = Stage::new().await;
    let source = stage.path("mounted.env");
    std::fs::copy(stage.env_file(), &source).unwrap();
    let mounted = mount("--bind", &source, &stage.env_file());
    let Some(_mount) = mounted else { return };
    let world = stage.start().await;
    let token = renew(&world).await;
    until("the mounted file to be written", async || {
        std::fs::read_to_string(&source).unwrap().contains(&token)
    })
    .await;
    let text = std::fs::read_to_string(&source).unwrap();
    assert_eq!(text.matches("CHITAI_GOROD_BEARER_TOKEN=").count(), 1, "{text}");
    let world = world.stop().start().await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.solver.solves(), 1, "the restart reads what was written");
}

#[tokio::test]
async fn env_file_on_a_read_only_mount_is_read_and_warned_of_once() {
    let stage = Stage::new().await;
    let Some(_mount) = mount("--bind", &stage.env_file(), &stage.env_file()) else {
        return;
    };
    let remounted = std::process::Command::new("mount")
        .args(["-o", "remount,bind,ro"])
        .arg(stage.env_file())
        .status();
    if !remounted.is_ok_and(|status| status.success()) {
        skip::not_permitted("a read-only bind mount");
        return;
    }
    let world = stage.start().await;
    assert_eq!(world.get(PATH).await.status, 200, "it was read");
    for _ in 0..3 {
        renew(&world).await;
    }
    until("a warning", async || warnings_of(&world.sidecar, "shop.env") > 0).await;
    assert_eq!(warnings_of(&world.sidecar, "shop.env"), 1);
    assert!(world.read_env_file().contains(&world.token));
}

/// A mount that ends with the test.
struct Mount(std::path::PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Mounts `source` over `target`; `None`, with a word about it, where that is not allowed.
fn mount(how: &str, source: &std::path::Path, target: &std::path::Path) -> Option<Mount> {
    let done = std::process::Command::new("mount").arg(how).arg(source).arg(target).output();
    if done.is_ok_and(|output| output.status.success()) {
        return Some(Mount(target.to_owned()));
    }
    skip::not_permitted("a mount");
    None
}

#[tokio::test]
async fn env_file_written_a_thousand_times_under_kill_9_is_never_torn() {
    let mut stage = Stage::new().await;
    stage.unset("FLARESOLVERR_URL");
    let filler = "OTHER=a value of another program\n".repeat(200);
    stage
        .write_env_file(&format!("{filler}CHITAI_GOROD_BEARER_TOKEN=\"{}\"\n# end\n", stage.token));
    let file = stage.env_file();
    let whole = move || {
        let text = std::fs::read_to_string(&file).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 202, "{text}");
        assert_eq!(lines[201], "# end");
        let token = lines[200]
            .strip_prefix("CHITAI_GOROD_BEARER_TOKEN=\"")
            .and_then(|line| line.strip_suffix('"'));
        let token = token.unwrap_or_else(|| panic!("torn: {}", lines[200]));
        assert_eq!(token.split('.').count(), 3, "torn: {token}");
        token.to_owned()
    };
    let mut writes = std::collections::HashSet::new();
    while writes.len() < 1000 {
        let mut sidecar = Sidecar::start(stage.variables(), stage.dir()).await;
        // Refreshes as fast as they go, and the end in the middle of one of them.
        let storm = async {
            for _ in 0..fastrand::usize(60..180) {
                let response = sidecar.ask("POST", "/refresh").await;
                assert_eq!(response.status, 200, "{response:?}");
                writes.insert(whole());
            }
        };
        storm.await;
        let mut wire = crate::support::http::Wire::connect(sidecar.admin()).await;
        wire.send("POST /refresh HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await;
        tokio::time::sleep(Duration::from_micros(fastrand::u64(0..8000))).await;
        sidecar.kill();
        writes.insert(whole());
    }
    let world = stage.start().await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert!(leftovers(&world).len() <= 12, "{:?}", leftovers(&world));
}

#[tokio::test]
async fn unverified_token_of_a_store_serves_until_it_is_refused() {
    let stage = Stage::new().await;
    stage.origin.set_verification(Verification::Always(503));
    let world = stage.launch().await;
    world.sidecar.ready().await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.solver.solves(), 0);
}

#[test]
fn binary_under_test_is_the_built_one() {
    assert!(std::path::Path::new(BINARY).is_file());
}
