//! What must never be seen: tokens, cookies and passwords, at any level of the log.

use crate::support::client::{API, Request, Way};
use crate::support::solver::Mode;
use crate::support::token::{Jwt, fingerprint};
use crate::support::{Stage, World, until};

/// Every route, a death, failures and stores, at the most talkative level.
async fn a_full_life(format: &str) -> (World, Vec<String>) {
    let password = "redis-password-a1b2c3";
    let redis = crate::support::redis::Redis::start_with(Some(password)).await;
    let mut stage = Stage::new().await;
    stage.set("REDIS_URL", redis.url());
    stage.set("REDIS_PASSWORD", password);
    stage.redis = Some(redis);
    stage.set("RUST_LOG", "trace");
    stage.set("LOG_FORMAT", format);
    stage.set("ADMIN_TOKEN", "admin-word-d4e5f6");
    let world = stage.start().await;
    let personal = Jwt::personal().make();
    world.tokens.accept(&personal);
    for way in Way::ALL {
        let request = Request::get("/web/api/v2/x")
            .field("Cookie", "a=cookie-of-the-client-77; access-token=Bearer%20stale")
            .field("Proxy-Authorization", "Basic cHJveHktcGFzc3dvcmQ=")
            .field("Authorization", &format!("Bearer {}", Jwt::anonymous().issued_ago(9).make()));
        assert_eq!(world.call(way, &request).await.status, 200);
        let request =
            Request::get("/web/api/v2/x").field("Authorization", &format!("Bearer {personal}"));
        assert_eq!(world.call(way, &request).await.status, 200);
    }
    world.kill_token();
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    world.redis().becomes("chitai_gorod_token", &world.tokens.latest()).await;
    world.solver.set(Mode::Cookie(format!("Bearer%20{}", Jwt::anonymous().make())));
    world.origin.close_doors();
    world.kill_token();
    assert_eq!(world.get("/web/api/v2/x").await.status, 401);
    let mut secrets = world.tokens.issued();
    secrets.extend([
        personal,
        password.to_owned(),
        "admin-word-d4e5f6".to_owned(),
        "cookie-of-the-client-77".to_owned(),
        "session-cookie".to_owned(),
        "cHJveHktcGFzc3dvcmQ=".to_owned(),
        "eyJhbGciOi".to_owned(),
    ]);
    (world, secrets)
}

fn check_hides(log: &str, secrets: &[String]) {
    for secret in secrets {
        let line = log.lines().find(|line| line.contains(secret.as_str()));
        assert!(line.is_none(), "{secret} in: {}", line.unwrap_or_default());
        // Bytes as Rust prints them, and the claims alone.
        let claims = secret.split('.').nth(1).unwrap_or(secret);
        assert!(!log.contains(claims), "the claims of {secret}");
    }
}

#[tokio::test]
async fn trace_log_in_json_holds_no_secret() {
    let (world, secrets) = a_full_life("json").await;
    let log = world.sidecar.log();
    check_hides(&log, &secrets);
    assert!(log.contains(&fingerprint(&world.token)), "a token shows as its fingerprint");
    assert!(log.contains("TRACE") || log.contains("DEBUG"));
}

#[tokio::test]
async fn trace_log_as_text_holds_no_secret() {
    let dir = Stage::new().await;
    let password = "redis-password-a1b2c3";
    let redis = crate::support::redis::Redis::start_with(Some(password)).await;
    let mut stage = dir;
    stage.set("REDIS_URL", redis.url());
    stage.set("REDIS_PASSWORD", password);
    stage.set("RUST_LOG", "trace");
    stage.set("LOG_FORMAT", "text");
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    // By a command, whose log and output come whole.
    let output = stage.run(&["refresh"]).await;
    let said = crate::support::sidecar::stdout(&output) + &crate::support::sidecar::stderr(&output);
    assert!(output.status.success(), "{said}");
    let mut secrets = stage.tokens.issued();
    secrets.extend([password.to_owned(), "session-cookie".to_owned(), "eyJhbGciOi".to_owned()]);
    check_hides(&said, &secrets);
    drop(redis);
}

#[tokio::test]
async fn error_about_a_url_hides_its_password() {
    let mut stage = Stage::new().await;
    stage.set("REDIS_URL", "redis://:url-password-99@127.0.0.1:bad");
    let output = stage.run(&["run"]).await;
    let said = crate::support::sidecar::stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("REDIS_URL") && !said.contains("url-password-99"), "{said}");
}

#[tokio::test]
async fn status_and_metrics_hold_no_secret() {
    let (world, secrets) = a_full_life("json").await;
    check_hides(&world.sidecar.status().await.to_string(), &secrets);
    check_hides(&world.sidecar.metrics().await, &secrets);
}

#[tokio::test]
async fn one_info_line_per_refresh_and_debug_per_request() {
    let world = World::start().await;
    let count = |level: &str, word: &str| {
        let about = |event: &&serde_json::Value| {
            event["level"] == level && event.to_string().contains(word)
        };
        world.sidecar.events().iter().filter(about).count()
    };
    let before = world.sidecar.events().iter().filter(|event| event["level"] == "INFO").count();
    for _ in 0..5 {
        assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    }
    let after = world.sidecar.events().iter().filter(|event| event["level"] == "INFO").count();
    assert_eq!(before, after, "requests are not INFO");
    until("requests at DEBUG", async || count("DEBUG", API) >= 5).await;
    world.kill_token();
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    let fresh = fingerprint(&world.tokens.latest());
    until("the refresh in the log", async || count("INFO", &fresh) >= 1).await;
    assert_eq!(count("INFO", &fresh), 1);
}

#[tokio::test]
async fn log_at_info_has_no_query_of_a_client() {
    let mut stage = Stage::new().await;
    stage.set("RUST_LOG", "info");
    let world = stage.start().await;
    world.kill_token();
    assert_eq!(world.get("/web/api/v2/x?phone=79990000000").await.status, 200);
    assert!(!world.sidecar.log().contains("79990000000"));
}

#[tokio::test]
async fn credentials_in_a_target_are_refused_and_not_logged() {
    let world = World::start().await;
    let target = "GET http://user:s3cretpw@other.test/abc HTTP/1.1\r\nHost: other.test\r\n\r\n";
    assert_eq!(world.raw(target).await.status, 400);
    crate::support::until("the request's log line", async || {
        world.sidecar.log().contains("other.test/abc")
    })
    .await;
    assert!(!world.sidecar.log().contains("s3cretpw"));
}
