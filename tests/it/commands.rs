//! The commands, their output and their exit codes.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Output;

use crate::support::client::{API, GATE};
use crate::support::origin::Verification;
use crate::support::sidecar::{command, stderr, stdout};
use crate::support::solver::Mode;
use crate::support::token::{Jwt, fingerprint};
use crate::support::{Stage, World};

/// Every variable that the program has.
const VARIABLES: [&str; 48] = [
    "PROXY_LISTEN",
    "ADMIN_LISTEN",
    "WORKERS",
    "API_ORIGINS",
    "SHOP_URL",
    "TOKEN_COOKIE",
    "VERIFY_URL",
    "AUTHORIZATION",
    "PERSONAL_TOKENS",
    "TOKEN_SOURCES",
    "FLARESOLVERR_URL",
    "SOURCE_PATIENCE",
    "REDIS_URL",
    "REDIS_PASSWORD",
    "REDIS_KEY",
    "REDIS_COOKIES_KEY",
    "REDIS_TLS_CA",
    "REDIS_TLS_CERT",
    "REDIS_TLS_KEY",
    "TOKEN_TTL",
    "ENV_FILE",
    "CHITAI_GOROD_BEARER_TOKEN",
    "REFRESH_EVERY",
    "HOLD_TIMEOUT",
    "RETRY_STATUS",
    "SOLVE_TIMEOUT",
    "MAX_CONNECTIONS",
    "MAX_CLIENT_CONNECTIONS",
    "MAX_HELD",
    "REPLAY_BODY_LIMIT",
    "REPLAY_MEMORY",
    "UPSTREAM_CONNECTIONS",
    "CA_DIR",
    "TRUST_DIR",
    "EXTRA_CA_FILE",
    "CONNECT_TIMEOUT",
    "UPSTREAM_TIMEOUT",
    "UPSTREAM_CA_FILE",
    "CONNECT_TO",
    "ALLOW_HOSTS",
    "CLIENT_NETWORKS",
    "PROXY_AUTH",
    "ADMIN_TOKEN",
    "ADVERTISE_URL",
    "ADVERTISE_TRUST_DIR",
    "DRAIN_TIMEOUT",
    "RUST_LOG",
    "LOG_FORMAT",
];

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("ended by a signal: {}", stderr(output)))
}

fn check_code(output: &Output, expected: i32) {
    assert_eq!(code(output), expected, "stdout: {}\nstderr: {}", stdout(output), stderr(output));
}

#[tokio::test]
async fn help_lists_every_variable_and_command() {
    let stage = Stage::new().await;
    let output = stage.run(&["--help"]).await;
    check_code(&output, 0);
    let help = stdout(&output);
    let missing: Vec<&str> = VARIABLES.into_iter().filter(|name| !help.contains(name)).collect();
    assert!(missing.is_empty(), "not in --help: {missing:?}");
    for name in ["run", "demo", "refresh", "token", "ca", "doctor", "env", "status", "healthcheck"]
    {
        assert!(help.contains(name), "{name} is not in --help");
    }
}

#[tokio::test]
async fn version_is_printed() {
    let stage = Stage::new().await;
    let output = stage.run(&["--version"]).await;
    check_code(&output, 0);
    assert!(stdout(&output).contains(env!("CARGO_PKG_VERSION")));
}

#[tokio::test]
async fn unknown_command_is_a_usage_error() {
    let stage = Stage::new().await;
    check_code(&stage.run(&["frobnicate"]).await, 2);
    check_code(&stage.run(&["run", "--frobnicate"]).await, 2);
}

#[tokio::test]
async fn bad_setting_ends_the_start_with_one_line_that_names_it() {
    let bad = [
        ("PROXY_LISTEN", "nowhere"),
        ("ADMIN_LISTEN", "127.0.0.1:99999"),
        ("WORKERS", "many"),
        ("API_ORIGINS", "not a url"),
        ("SHOP_URL", "ftp://x/"),
        ("VERIFY_URL", "https://elsewhere.test/x"),
        ("AUTHORIZATION", "sometimes"),
        ("PERSONAL_TOKENS", "maybe"),
        ("TOKEN_SOURCES", "magic"),
        ("FLARESOLVERR_URL", "::"),
        ("SOURCE_PATIENCE", "8"),
        ("REDIS_URL", "http://x"),
        ("TOKEN_TTL", "-1h"),
        ("REFRESH_EVERY", "often"),
        ("HOLD_TIMEOUT", "60 parsecs"),
        ("RETRY_STATUS", "200"),
        ("SOLVE_TIMEOUT", "x"),
        ("MAX_HELD", "-1"),
        ("REPLAY_BODY_LIMIT", "8 elephants"),
        ("REPLAY_MEMORY", "x"),
        ("UPSTREAM_CONNECTIONS", "0x"),
        ("CONNECT_TO", "nonsense"),
        ("CONNECT_TIMEOUT", "x"),
        ("UPSTREAM_TIMEOUT", "x"),
        ("UPSTREAM_CA_FILE", "/does/not/exist.pem"),
        ("ALLOW_HOSTS", "10.0.0.0/99"),
        ("ADVERTISE_URL", "https://proxy:8080"),
        ("ADVERTISE_TRUST_DIR", "certs"),
        ("DRAIN_TIMEOUT", "x"),
        ("LOG_FORMAT", "xml"),
    ];
    for (name, value) in bad {
        let mut stage = Stage::new().await;
        stage.set(name, value);
        let output = stage.run(&["run"]).await;
        check_code(&output, 2);
        let message = stderr(&output);
        assert!(message.contains(name), "{name}={value}: {message}");
        assert_eq!(message.trim().lines().count(), 1, "{name}: {message}");
    }
}

#[tokio::test]
async fn source_that_needs_a_url_says_so() {
    let mut stage = Stage::new().await;
    stage.unset("FLARESOLVERR_URL");
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let output = stage.run(&["run"]).await;
    check_code(&output, 2);
    assert!(stderr(&output).contains("FLARESOLVERR_URL"));
}

#[tokio::test]
async fn empty_setting_counts_as_unset() {
    let mut stage = Stage::new().await;
    for name in [
        "REDIS_URL",
        "REDIS_PASSWORD",
        "HOLD_TIMEOUT",
        "WORKERS",
        "ALLOW_HOSTS",
        "CHITAI_GOROD_BEARER_TOKEN",
    ] {
        stage.set(name, "");
    }
    let world = stage.start().await;
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
}

#[tokio::test]
async fn near_miss_of_a_setting_is_a_warning_and_others_are_ignored() {
    let mut stage = Stage::new().await;
    stage.set("HOLD_TIMOUT", "1s");
    stage.set("POSTGRES_PASSWORD", "secret-of-another");
    let world = stage.start().await;
    let events = world.sidecar.events();
    let warnings: Vec<String> =
        events.iter().filter(|event| event["level"] == "WARN").map(ToString::to_string).collect();
    assert!(warnings.iter().any(|line| line.contains("HOLD_TIMOUT")), "{warnings:?}");
    assert!(!world.sidecar.log().contains("POSTGRES_PASSWORD"));
}

#[tokio::test]
async fn run_is_the_default_command() {
    let stage = Stage::new().await;
    let mut child = command(&[], stage.variables(), stage.dir())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = child.stderr.take().unwrap();
    let line = tokio::task::spawn_blocking(move || {
        use std::io::BufRead as _;
        std::io::BufReader::new(stderr)
            .lines()
            .map_while(Result::ok)
            .find(|line| line.contains("listening"))
    });
    let line = tokio::time::timeout(crate::support::http::PATIENCE, line).await.unwrap().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(line.is_some());
}

#[tokio::test]
async fn second_sidecar_on_the_same_port_fails() {
    let world = World::start().await;
    for (name, addr) in
        [("PROXY_LISTEN", world.sidecar.proxy()), ("ADMIN_LISTEN", world.sidecar.admin())]
    {
        let mut stage = Stage::new().await;
        stage.set(name, addr);
        let output = stage.run(&["run"]).await;
        assert_ne!(code(&output), 0, "{name}");
        let message = stderr(&output);
        assert!(message.contains(&addr.to_string()) || message.contains(name), "{message}");
    }
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
}

// refresh

/// The variables of a command that talks to this running sidecar.
fn beside(world: &mut World) {
    let admin = world.sidecar.admin();
    world.set("ADMIN_LISTEN", admin);
}

#[tokio::test]
async fn refresh_through_a_running_sidecar_prints_what_it_got() {
    let mut world = World::start().await;
    beside(&mut world);
    let output = world.run(&["refresh"]).await;
    check_code(&output, 0);
    assert_eq!(world.sidecar.generation().await, 2);
    let said = stdout(&output);
    assert!(said.contains("flaresolverr") && said.contains('2'), "{said}");
    assert!(!said.contains(&world.tokens.latest()), "no secret");
}

#[tokio::test]
async fn refresh_through_a_running_sidecar_fails_with_it() {
    let mut world = World::start().await;
    beside(&mut world);
    world.origin.close_doors();
    world.solver.set(Mode::Error);
    check_code(&world.run(&["refresh"]).await, 3);
    assert_eq!(world.sidecar.generation().await, 1);
}

#[tokio::test]
async fn refresh_by_itself_writes_the_stores() {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    let output = stage.run(&["refresh"]).await;
    check_code(&output, 0);
    let token = stage.tokens.latest();
    assert_ne!(token, stage.token);
    assert!(stdout(&output).contains("flaresolverr"), "{}", stdout(&output));
    assert_eq!(stage.redis().get("chitai_gorod_token").await, Some(token.clone()));
    assert!(stage.read_env_file().contains(&token));
    assert!(!stdout(&output).contains(&token) && !stderr(&output).contains(&token), "no secret");
}

/// The default of a first try: no env file, no Redis.
#[tokio::test]
async fn where_no_store_keeps_the_token_the_commands_say_so() {
    let mut stage = Stage::new().await;
    stage.without_token();
    stage.unset("ENV_FILE");
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    let output = stage.run(&["refresh"]).await;
    check_code(&output, 0);
    assert!(stderr(&output).contains("not saved: there is no store; set ENV_FILE"), "{output:?}");
    check_code(&stage.run(&["token"]).await, 1);
    stage.set("ADMIN_LISTEN", "127.0.0.1:0");
    let mut world = stage.start().await;
    beside(&mut world);
    let output = world.run(&["token"]).await;
    check_code(&output, 1);
    let shown = fingerprint(&world.tokens.latest());
    assert!(stdout(&output).contains(&shown), "{}", stdout(&output));
    assert!(stderr(&output).contains("lost at a restart"), "{}", stderr(&output));
}

#[tokio::test]
async fn refresh_by_itself_that_finds_no_source_exits_with_3() {
    let mut stage = Stage::new().await;
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    stage.origin.close_doors();
    stage.solver.set(Mode::Error);
    let output = stage.run(&["refresh"]).await;
    check_code(&output, 3);
    assert!(!stderr(&output).trim().is_empty());
}

#[tokio::test]
async fn refresh_by_itself_whose_token_is_refused_exits_with_1() {
    let mut stage = Stage::new().await;
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    stage.origin.set_verification(Verification::Always(401));
    check_code(&stage.run(&["refresh"]).await, 1);
}

// token

#[tokio::test]
async fn token_shows_its_state_without_the_secret() {
    let mut world = World::start().await;
    beside(&mut world);
    let output = world.run(&["token"]).await;
    check_code(&output, 0);
    let said = stdout(&output);
    assert!(said.contains(&fingerprint(&world.token)), "{said}");
    assert!(!said.contains(&world.token) && !said.contains("eyJ"), "{said}");
}

#[tokio::test]
async fn token_is_revealed_on_demand_alone() {
    let mut stage = Stage::new().await;
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    let output = stage.run(&["token", "--reveal"]).await;
    check_code(&output, 0);
    assert!(stdout(&output).contains(&stage.token));
    let output = stage.run(&["token"]).await;
    check_code(&output, 0);
    assert!(stdout(&output).contains(&fingerprint(&stage.token)));
    assert!(!stdout(&output).contains(&stage.token));
}

#[tokio::test]
async fn token_in_redis_is_found_too() {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    stage.without_token();
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    let token = Jwt::anonymous().make();
    stage.redis().set("chitai_gorod_token", &token).await;
    let output = stage.run(&["token", "--reveal"]).await;
    check_code(&output, 0);
    assert!(stdout(&output).contains(&token));
}

#[tokio::test]
async fn token_that_is_nowhere_is_said_so() {
    let mut stage = Stage::new().await;
    stage.without_token();
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    let output = stage.run(&["token"]).await;
    assert_ne!(code(&output), 0, "{}", stdout(&output));
    assert_eq!(stage.solver.solves(), 0, "showing is not getting");
}

// ca

#[tokio::test]
async fn ca_shows_the_certificate_and_its_names() {
    let mut world = World::start().await;
    beside(&mut world);
    let output = world.run(&["ca"]).await;
    check_code(&output, 0);
    let said = stdout(&output);
    assert!(said.contains(API) && said.contains(GATE), "{said}");
    assert!(!said.contains("PRIVATE KEY"));
}

#[tokio::test]
async fn ca_that_does_not_exist_yet_is_said_so_and_not_made() {
    let stage = Stage::new().await;
    let output = stage.run(&["ca"]).await;
    assert!(stdout(&output).len() + stderr(&output).len() > 0);
    assert!(!stage.path("certs").join("ca.key").exists());
}

#[tokio::test]
async fn ca_renew_makes_another_and_keeps_the_old_one() {
    let stage = World::start().await.stop();
    let certs = stage.path("certs");
    let read = |name: &str| std::fs::read_to_string(certs.join(name)).unwrap();
    let (old, old_key) = (read("ca.pem"), read("ca.key"));
    check_code(&stage.run(&["ca", "--renew"]).await, 0);
    assert_ne!(read("ca.pem"), old);
    assert_ne!(read("ca.key"), old_key);
    assert_eq!((read("ca.pem.old"), read("ca.key.old")), (old, old_key));
    for name in ["ca.key", "ca.key.old"] {
        let mode = std::fs::metadata(certs.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let world = stage.start().await;
    let response = world
        .call(
            crate::support::client::Way::Intercept,
            &crate::support::client::Request::get("/web/api/v2/x"),
        )
        .await;
    assert_eq!(response.status, 200);
}

// healthcheck

#[tokio::test]
async fn healthcheck_asks_live_and_with_ready_asks_ready() {
    let mut stage = Stage::new().await;
    stage.without_token();
    stage.origin.close_doors();
    stage.solver.pause();
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let mut world = stage.launch().await;
    beside(&mut world);
    check_code(&world.run(&["healthcheck"]).await, 0);
    assert_ne!(code(&world.run(&["healthcheck", "--ready"]).await), 0);
    world.solver.resume();
    world.sidecar.ready().await;
    check_code(&world.run(&["healthcheck", "--ready"]).await, 0);
}

#[tokio::test]
async fn status_shows_the_state_indented_and_with_metrics_the_metrics() {
    let mut world = Stage::new().await.launch().await;
    beside(&mut world);
    world.sidecar.ready().await;
    let shown = world.run(&["status"]).await;
    check_code(&shown, 0);
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(text.starts_with("{\n  \"version\": "), "{text}");
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status["ready"], true, "{text}");
    let shown = world.run(&["status", "--metrics"]).await;
    check_code(&shown, 0);
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(text.lines().any(|line| line == "sidecar_token_generation 1"), "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
}

#[tokio::test]
async fn status_without_a_sidecar_fails_and_names_the_port() {
    let mut stage = Stage::new().await;
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    let failed = stage.run(&["status"]).await;
    assert_eq!(code(&failed), 1);
    assert!(String::from_utf8_lossy(&failed.stderr).contains("127.0.0.1:9"));
}

#[tokio::test]
async fn healthcheck_without_a_sidecar_fails() {
    let mut stage = Stage::new().await;
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    assert_ne!(code(&stage.run(&["healthcheck"]).await), 0);
}

// demo

#[tokio::test]
async fn demo_needs_nothing_and_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let output = crate::support::sidecar::run(&["demo"], &Vec::new(), dir.path()).await;
    check_code(&output, 0);
    let said = stdout(&output);
    assert!(said.contains("200"), "{said}");
    assert!(said.contains("50"), "{said}");
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[tokio::test]
async fn demo_ignores_the_settings_of_a_real_one() {
    let mut stage = Stage::new().await;
    stage.set("PROXY_LISTEN", "127.0.0.1:1");
    stage.set("REDIS_URL", "redis://127.0.0.1:9");
    let output = stage.run(&["demo"]).await;
    check_code(&output, 0);
    assert_eq!(stage.solver.solves(), 0);
    assert!(stage.read_env_file().contains(&stage.token));
}
