//! `doctor`: every fault that it names, made in earnest, and that it changes nothing.

use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};
use rustix::process::geteuid;
use serde_json::Value;

use crate::support::certificates::TestCa;
use crate::support::client::{API, GATE, Request, Way};
use crate::support::origin::{Door, Page, Verification, Wall};
use crate::support::redis::Redis;
use crate::support::sidecar::{stderr, stdout};
use crate::support::solver::Mode;
use crate::support::token::Jwt;
use crate::support::{Stage, World, skip, until};

const TOKEN_KEY: &str = "chitai_gorod_token";
const COOKIES_KEY: &str = "chitai_gorod_cookies";

/// What `doctor --json` reported.
struct Report {
    json: Value,
    exit: i32,
}

impl Report {
    async fn of(stage: &Stage) -> Self {
        Self::with(stage, &[]).await
    }

    async fn with(stage: &Stage, arguments: &[&str]) -> Self {
        let output = stage.run(&[&["doctor", "--json"], arguments].concat()).await;
        let said = stdout(&output);
        let json = serde_json::from_str(&said);
        let json = json.unwrap_or_else(|error| panic!("{error}: {said}{}", stderr(&output)));
        Self { json, exit: output.status.code().unwrap() }
    }

    fn checks(&self) -> &Vec<Value> {
        self.json["checks"].as_array().unwrap()
    }

    fn failures(&self) -> Vec<&str> {
        let failed = self.checks().iter().filter(|check| check["status"] == "failed");
        failed.map(|check| check["name"].as_str().unwrap()).collect()
    }

    /// Has a check of this name and status whose finding or advice holds `part`.
    #[track_caller]
    fn check(&self, name: &str, status: &str, part: &str) {
        let found = self.checks().iter().any(|check| {
            let said = format!("{} {} {}", check["tried"], check["found"], check["advice"]);
            check["name"] == name && check["status"] == status && said.contains(part)
        });
        assert!(found, "no {status} {name} with {part:?} in {:#}", self.json);
        if status == "failed" {
            assert_eq!((self.exit, &self.json["ok"]), (1, &Value::Bool(false)));
        }
    }
}

/// A stage whose command finds no sidecar.
async fn alone() -> Stage {
    let mut stage = Stage::new().await;
    stage.set("PROXY_LISTEN", "127.0.0.2:9");
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    stage
}

/// Settings of a command that lead to this running sidecar.
fn beside(world: &mut World) {
    let (proxy, admin) = (world.sidecar.proxy(), world.sidecar.admin());
    world.set("PROXY_LISTEN", proxy);
    world.set("ADMIN_LISTEN", admin);
}

async fn world() -> World {
    let mut world = World::start().await;
    beside(&mut world);
    world
}

/// A stage that has a CA, since a sidecar has run there.
async fn with_ca() -> Stage {
    let mut stage = World::start().await.stop();
    stage.set("PROXY_LISTEN", "127.0.0.2:9");
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    stage
}

/// A port where nobody listens.
fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

// The whole

#[tokio::test]
async fn healthy_world_has_no_failure_and_its_checks_come_in_order() {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    let mut world = stage.start().await;
    beside(&mut world);
    world.redis().becomes(TOKEN_KEY, &world.token).await;
    world.get("/web/api/v2/x").await;
    let report = Report::of(&world).await;
    assert_eq!((report.failures(), report.exit), (Vec::new(), 0), "{:#}", report.json);
    assert_eq!(report.json["ok"], true);
    let mut names: Vec<_> =
        report.checks().iter().map(|check| check["name"].as_str().unwrap()).collect();
    names.dedup();
    let expected = [
        "settings",
        "ca",
        "ca_key",
        "trust",
        "env_file",
        "env_file_write",
        "redis",
        "redis_in_step",
        "redis_write",
        "flaresolverr",
        "dns",
        "upstream",
        "dns",
        "upstream",
        "dns",
        "upstream",
        "clock",
        "verifier",
        "token",
        "sidecar",
        "request",
        "parsers",
        "solve",
    ];
    assert_eq!(names, expected, "{:#}", report.json);
    report.check("request", "ok", "HTTP 200");
    report.check("parsers", "ok", "1 by absolute");
    report.check("solve", "skipped", "--solve");
}

#[tokio::test]
async fn lines_say_what_was_tried_what_came_and_what_to_do() {
    let stage = alone().await;
    let output = stage.run(&["doctor"]).await;
    assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
    let said = stdout(&output);
    let line = said.lines().find(|line| line.starts_with("FAILED   sidecar")).unwrap();
    assert_eq!(line.split(" · ").count(), 3, "{line}");
    assert!(line.contains("refused"), "{line}");
}

#[tokio::test]
async fn no_secret_is_shown() {
    let mut stage = Stage::new().await;
    stage.set("PROXY_AUTH", "user:hunter2");
    stage.set("ADMIN_TOKEN", "swordfish");
    let mut world = stage.start().await;
    beside(&mut world);
    for arguments in [&["doctor"][..], &["doctor", "--json", "--solve"]] {
        let output = world.run(arguments).await;
        let said = stdout(&output) + &stderr(&output);
        for secret in ["hunter2", "swordfish", "eyJ"] {
            assert!(!said.contains(secret), "{said}");
        }
    }
}

/// Names, times and contents of all files below `dir`.
fn files(dir: &Path) -> Vec<(String, SystemTime, i64, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.metadata().unwrap();
        if path.is_dir() {
            found.extend(files(&path));
        }
        let content = std::fs::read(&path).unwrap_or_default();
        let changed = metadata.ctime() * 1_000_000_000 + metadata.ctime_nsec();
        found.push((path.display().to_string(), metadata.modified().unwrap(), changed, content));
    }
    found.sort();
    found
}

#[tokio::test]
async fn nothing_is_changed_and_no_token_asked_for() {
    let mut stage = Stage::new().await;
    stage.with_redis().await;
    let mut world = stage.start().await;
    beside(&mut world);
    world.redis().becomes(TOKEN_KEY, &world.token).await;
    let before = (files(world.dir()), world.redis().contents().await);
    let solves = world.solver.solves();
    Report::of(&world).await;
    assert_eq!((files(world.dir()), world.redis().contents().await), before);
    assert_eq!((world.solver.solves(), world.origin.door_knocks()), (solves, 0));
    assert_eq!(world.sidecar.generation().await, 1);
}

#[tokio::test]
async fn nothing_is_made_where_nothing_is() {
    let mut stage = alone().await;
    stage.with_redis().await;
    stage.without_token();
    let before = files(stage.dir());
    let report = Report::of(&stage).await;
    assert_eq!(files(stage.dir()), before);
    assert_eq!(stage.redis().contents().await, []);
    report.check("ca", "warning", "there is none yet");
    report.check("env_file", "warning", "no such file");
    report.check("redis", "warning", "no token");
    report.check("token", "warning", "there is none");
}

// Settings

#[tokio::test]
async fn near_miss_of_a_setting_is_a_warning_and_a_bad_one_ends_with_2() {
    let mut stage = alone().await;
    stage.set("HOLD_TIMOUT", "1s");
    Report::of(&stage).await.check("settings", "warning", "HOLD_TIMEOUT");
    stage.set("HOLD_TIMEOUT", "soon");
    let output = stage.run(&["doctor"]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("HOLD_TIMEOUT"));
    let report = Report::of(&stage).await;
    assert_eq!((report.exit, report.checks().len()), (2, 1), "{:#}", report.json);
    assert_eq!((&report.json["ok"], report.failures()), (&Value::Bool(false), vec!["settings"]));
    let found = report.checks()[0]["found"].as_str().unwrap();
    assert!(found.starts_with("HOLD_TIMEOUT: "), "{found}");
}

// Certificates

#[tokio::test]
async fn ca_key_that_others_can_read_is_a_failure() {
    let stage = with_ca().await;
    Report::of(&stage).await.check("ca_key", "ok", "0600");
    let key = stage.path("certs").join("ca.key");
    std::fs::set_permissions(key, std::fs::Permissions::from_mode(0o644)).unwrap();
    Report::of(&stage).await.check("ca_key", "failed", "chmod 600");
}

#[tokio::test]
async fn ca_key_of_another_user_is_a_warning() {
    if !geteuid().is_root() {
        return skip::not_permitted("giving a file away, which only root can");
    }
    let stage = with_ca().await;
    chown(stage.path("certs").join("ca.key"), Some(65_532), None).unwrap();
    Report::of(&stage).await.check("ca_key", "warning", "65532");
}

#[tokio::test]
async fn ca_that_does_not_cover_the_origins_is_a_failure() {
    let mut stage = with_ca().await;
    let port = stage.origin.addr().port();
    stage.add("CONNECT_TO", format!("other.test:443=127.0.0.1:{port}"));
    stage.set("API_ORIGINS", format!("https://{API}/web/api,https://other.test/api"));
    Report::of(&stage).await.check("ca", "failed", "other.test");
}

#[tokio::test]
async fn expired_ca_is_a_failure() {
    let stage = alone().await;
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let certs = stage.path("certs");
    std::fs::create_dir(&certs).unwrap();
    std::fs::write(certs.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    std::fs::write(certs.join("ca.key"), key.serialize_pem()).unwrap();
    Report::of(&stage).await.check("ca", "failed", "expired on 2021-01-01");
}

#[tokio::test]
async fn ca_without_its_key_is_a_failure() {
    let stage = with_ca().await;
    std::fs::remove_file(stage.path("certs").join("ca.key")).unwrap();
    Report::of(&stage).await.check("ca", "failed", "ca.key");
}

#[tokio::test]
async fn bundle_that_is_missing_or_lacks_the_ca_is_a_failure() {
    let stage = with_ca().await;
    let bundle = stage.path("certs").join("ca-bundle.pem");
    Report::of(&stage).await.check("trust", "ok", "ca-bundle.pem");
    std::fs::set_permissions(&bundle, std::fs::Permissions::from_mode(0o600)).unwrap();
    Report::of(&stage).await.check("trust", "warning", "chmod 644");
    std::fs::write(&bundle, TestCa::new().pem()).unwrap();
    Report::of(&stage).await.check("trust", "failed", "is not in it");
    std::fs::remove_file(&bundle).unwrap();
    Report::of(&stage).await.check("trust", "failed", "No such file");
}

// Stores

#[tokio::test]
async fn env_file_that_cannot_be_used_is_told() {
    let mut stage = alone().await;
    Report::of(&stage).await.check("env_file", "ok", "issued");
    stage.without_token();
    Report::of(&stage).await.check("env_file", "warning", "`token-sidecar refresh`");
    let named = stage.env_file().display().to_string();
    stage.unset("ENV_FILE");
    Report::of(&stage).await.check("env_file", "warning", "cp .env.example .env");
    stage.set("ENV_FILE", named);
    stage.write_env_file("OTHER=1\n");
    Report::of(&stage).await.check("env_file", "warning", "no readable token");
    let old = Jwt::anonymous().expires_in(-60).make();
    stage.write_env_file(&format!("CHITAI_GOROD_BEARER_TOKEN={old}\n"));
    Report::of(&stage).await.check("env_file", "warning", "expired");
    stage.set("ENV_FILE", stage.path("nowhere/token.env").display());
    Report::of(&stage).await.check("env_file_write", "warning", "nowhere");
    let folder = stage.dir().display().to_string();
    stage.set("ENV_FILE", folder);
    assert_eq!(stage.run(&["doctor"]).await.status.code(), Some(2), "a folder is no file");
}

#[tokio::test]
async fn redis_that_is_down_is_a_failure() {
    let mut stage = alone().await;
    stage.with_redis().await;
    stage.redis_mut().kill();
    Report::of(&stage).await.check("redis", "failed", "REDIS_URL");
}

#[tokio::test]
async fn redis_that_hangs_is_a_failure() {
    let mut stage = alone().await;
    stage.with_redis().await;
    stage.redis().freeze();
    Report::of(&stage).await.check("redis", "failed", "in time");
    stage.redis().thaw();
}

#[tokio::test]
async fn redis_with_another_password_is_a_failure() {
    let mut stage = alone().await;
    let redis = Redis::start_with(Some("right")).await;
    stage.set("REDIS_URL", redis.url());
    stage.set("REDIS_PASSWORD", "hunter2");
    Report::of(&stage).await.check("redis", "failed", "REDIS_PASSWORD");
    stage.set("REDIS_PASSWORD", "right");
    Report::of(&stage).await.check("redis", "warning", "no token");
}

#[tokio::test]
async fn redis_keys_out_of_step_are_a_warning() {
    let mut stage = alone().await;
    stage.with_redis().await;
    stage.redis().set(TOKEN_KEY, &stage.token).await;
    let other = format!(r#"{{"access-token":"Bearer%20{}"}}"#, Jwt::anonymous().make());
    stage.redis().set(COOKIES_KEY, &other).await;
    let report = Report::of(&stage).await;
    report.check("redis", "ok", ", TTL ");
    report.check("redis_in_step", "warning", COOKIES_KEY);
}

#[tokio::test]
async fn redis_that_takes_no_writes_is_a_failure() {
    let mut stage = alone().await;
    stage.with_redis().await;
    Report::of(&stage).await.check("redis_write", "ok", "no replica");
    stage.redis().become_replica().await;
    Report::of(&stage).await.check("redis_write", "failed", "primary");
}

// Sources

#[tokio::test]
async fn solver_that_is_not_there_is_a_failure() {
    let mut stage = alone().await;
    stage.set("FLARESOLVERR_URL", format!("http://127.0.0.1:{}/v1", closed_port()));
    Report::of(&stage).await.check("flaresolverr", "failed", "refused");
}

#[tokio::test]
async fn wedged_solver_is_a_failure_within_seconds() {
    let mut stage = alone().await;
    // The kernel accepts, and nobody ever answers.
    let wedged = TcpListener::bind("127.0.0.1:0").unwrap();
    stage.set("FLARESOLVERR_URL", format!("http://{}", wedged.local_addr().unwrap()));
    let started = Instant::now();
    Report::of(&stage).await.check("flaresolverr", "failed", "no answer within 10s");
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
}

#[tokio::test]
async fn solve_that_the_other_source_overtakes_leaves_no_session() {
    let mut stage = Stage::new().await;
    stage.set("ADMIN_LISTEN", "127.0.0.1:9");
    stage.set("SOURCE_PATIENCE", "300ms");
    stage.solver.set(Mode::Late(Box::new(Mode::Never)));
    stage.run(&["doctor", "--solve"]).await;
    let sent = stage.solver.commands();
    assert!(sent.iter().any(|command| command["cmd"] == "sessions.create"), "{sent:?}");
    assert!(stage.solver.open_sessions().is_empty(), "{:?}", stage.solver.open_sessions());
}

#[tokio::test]
async fn solver_that_is_not_set_is_skipped() {
    let mut stage = alone().await;
    stage.unset("FLARESOLVERR_URL");
    Report::of(&stage).await.check("flaresolverr", "skipped", "FLARESOLVERR_URL");
}

#[tokio::test]
async fn solver_that_is_no_source_is_not_asked() {
    let mut stage = alone().await;
    stage.set("TOKEN_SOURCES", "direct");
    stage.set("FLARESOLVERR_URL", format!("http://127.0.0.1:{}/v1", closed_port()));
    Report::of(&stage).await.check("flaresolverr", "skipped", "TOKEN_SOURCES");
}

#[tokio::test]
async fn solve_asks_the_sources_and_throws_the_token_away() {
    let stage = alone().await;
    // So that the only new token is the solver's.
    stage.origin.set_page(Page::Bare);
    let before = files(stage.dir());
    let report = Report::with(&stage, &["--solve"]).await;
    report.check("solve", "ok", "from flaresolverr after");
    assert_eq!(stage.solver.solves(), 1);
    assert_eq!(stage.origin.verifications_of(&stage.tokens.latest()), 1);
    assert_eq!(files(stage.dir()), before);
}

#[tokio::test]
async fn solve_that_gives_nothing_is_a_failure_that_names_each_source() {
    let stage = alone().await;
    stage.origin.close_doors();
    stage.solver.set(Mode::NoCookie);
    let report = Report::with(&stage, &["--solve"]).await;
    report.check("solve", "failed", "flaresolverr: no cookie");
    report.check("solve", "failed", "direct: ");
}

#[tokio::test]
async fn solve_whose_token_is_refused_is_a_failure() {
    let stage = alone().await;
    stage.origin.set_door(Door::Status(403));
    stage.origin.set_verification(Verification::Always(401));
    let report = Report::with(&stage, &["--solve"]).await;
    report.check("solve", "failed", "the API refuses its token");
}

// Upstreams

#[tokio::test]
async fn api_host_that_does_not_resolve_is_a_failure() {
    let mut stage = alone().await;
    // A label that no name server would be asked for.
    let nowhere = format!("{}.test", "x".repeat(64));
    let port = stage.origin.addr().port();
    let others = [API, "www.chitai-gorod.ru"].map(|host| format!("{host}:443=127.0.0.1:{port}"));
    stage.set("CONNECT_TO", format!("{},{GATE}:443={nowhere}:443", others.join(",")));
    let report = Report::of(&stage).await;
    report.check("dns", "failed", GATE);
    report.check("dns", "ok", API);
}

#[tokio::test]
async fn api_host_that_leads_back_to_the_sidecar_is_a_failure() {
    let mut world = world().await;
    let own = world.sidecar.proxy();
    world.set(
        "CONNECT_TO",
        format!("{API}:443={own},{GATE}:443={own},www.chitai-gorod.ru:443={own}"),
    );
    Report::of(&world).await.check("dns", "failed", "leads back to the sidecar");
    // The same behind an alias, where the name leads to the other port.
    let sni = closed_port();
    world.set("SNI_LISTEN", format!("127.0.0.1:{sni}"));
    let all = [API, GATE, "www.chitai-gorod.ru"].map(|host| format!("{host}:443=127.0.0.1:{sni}"));
    world.set("CONNECT_TO", all.join(","));
    Report::of(&world).await.check("dns", "failed", "leads back to the sidecar");
}

#[tokio::test]
async fn parent_proxy_that_is_not_there_is_a_failure() {
    let mut stage = alone().await;
    // An entry of CONNECT_TO would go before the parent.
    stage.unset("CONNECT_TO");
    stage.set("UPSTREAM_PROXY", format!("http://127.0.0.1:{}", closed_port()));
    Report::of(&stage).await.check("upstream", "failed", "UPSTREAM_PROXY");
}

#[tokio::test]
async fn api_host_that_refuses_connections_is_a_failure() {
    let mut stage = alone().await;
    let port = closed_port();
    let all = [API, GATE, "www.chitai-gorod.ru"].map(|host| format!("{host}:443=127.0.0.1:{port}"));
    stage.set("CONNECT_TO", all.join(","));
    let report = Report::of(&stage).await;
    report.check("upstream", "failed", "refused");
    report.check("clock", "skipped", "Date");
}

#[tokio::test]
async fn upstream_whose_certificate_is_not_trusted_is_a_failure() {
    let mut stage = alone().await;
    let other = stage.path("other-ca.pem");
    std::fs::write(&other, TestCa::new().pem()).unwrap();
    stage.set("UPSTREAM_CA_FILE", other.display());
    Report::of(&stage).await.check("upstream", "failed", "UPSTREAM_CA_FILE");
}

#[tokio::test]
async fn clock_that_is_an_hour_off_is_a_warning() {
    let stage = alone().await;
    let hour = Duration::from_hours(1);
    for (date, word) in [(SystemTime::now() + hour, "behind"), (SystemTime::now() - hour, "ahead")]
    {
        stage.origin.set_date(&httpdate::fmt_http_date(date));
        Report::of(&stage).await.check("clock", "warning", word);
    }
    stage.origin.set_date(&httpdate::fmt_http_date(SystemTime::now()));
    Report::of(&stage).await.check("clock", "ok", "less than 5s");
}

#[tokio::test]
async fn upstream_that_hangs_is_reported_as_such() {
    let mut stage = alone().await;
    // The kernel accepts, and nobody ever speaks TLS.
    let wedged = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = wedged.local_addr().unwrap();
    let all = [API, GATE, "www.chitai-gorod.ru"].map(|host| format!("{host}:443={address}"));
    stage.set("CONNECT_TO", all.join(","));
    stage.set("CONNECT_TIMEOUT", "300ms");
    Report::of(&stage).await.check("upstream", "failed", "within 300ms");
}

// The verifier and the stored token

#[tokio::test]
async fn verifier_that_cannot_tell_is_a_warning() {
    let stage = alone().await;
    Report::of(&stage).await.check("verifier", "ok", "401");
    stage.origin.set_verification(Verification::Always(200));
    let report = Report::of(&stage).await;
    report.check("verifier", "warning", "HTTP 200");
    report.check("token", "warning", "no telling");
    stage.origin.set_verification(Verification::Always(500));
    let report = Report::of(&stage).await;
    report.check("verifier", "warning", "HTTP 500");
    report.check("verifier", "warning", "set VERIFY_URL");
}

#[tokio::test]
async fn stored_token_that_the_api_refuses_is_a_failure() {
    let stage = alone().await;
    Report::of(&stage).await.check("token", "ok", "takes it");
    stage.tokens.kill_all();
    Report::of(&stage).await.check("token", "failed", "refuses it");
}

#[tokio::test]
async fn verifier_that_cannot_be_reached_is_told_with_the_reason() {
    let mut stage = alone().await;
    let port = closed_port();
    stage.set("CONNECT_TO", format!("{API}:443=127.0.0.1:{port},{GATE}:443=127.0.0.1:{port}"));
    let report = Report::of(&stage).await;
    report.check("verifier", "warning", "refused");
    report.check("verifier", "warning", "`upstream` say");
}

#[tokio::test]
async fn wall_between_us_and_the_api_is_a_failure() {
    let mut stage = alone().await;
    stage.origin.set_wall(Wall::Closed);
    let report = Report::of(&stage).await;
    for (name, status) in [("token", "failed"), ("verifier", "warning")] {
        report.check(name, status, "anti-bot wall");
        report.check(name, status, "by FlareSolverr");
    }
    stage.unset("FLARESOLVERR_URL");
    let report = Report::of(&stage).await;
    report.check("token", "failed", "set FLARESOLVERR_URL");
    report.check("verifier", "warning", "set FLARESOLVERR_URL");
}

#[tokio::test]
async fn newest_of_the_stored_tokens_is_judged() {
    let mut stage = alone().await;
    stage.with_redis().await;
    let newer = Jwt::anonymous().issued_in(5).make();
    stage.redis().set(TOKEN_KEY, &newer).await;
    Report::of(&stage).await.check("token", "failed", "refuses it");
    stage.tokens.accept(&newer);
    Report::of(&stage).await.check("token", "ok", "takes it");
}

// The running sidecar

#[tokio::test]
async fn sidecar_that_is_not_running_is_a_failure_of_its_own() {
    let report = Report::of(&alone().await).await;
    assert_eq!(report.failures(), ["sidecar"], "{:#}", report.json);
    report.check("sidecar", "failed", "is it running");
}

#[tokio::test]
async fn request_waits_for_no_refresh() {
    let mut stage = Stage::new().await;
    stage.set("TOKEN_SOURCES", "flaresolverr");
    stage.without_token();
    stage.solver.pause();
    let mut world = stage.launch().await;
    beside(&mut world);
    until("the solve", async || world.solver.solves() == 1).await;
    Report::of(&world).await.check("request", "failed", "starts no refresh");
    assert_eq!(world.solver.solves(), 1);
}

#[tokio::test]
async fn sidecar_without_a_token_is_not_ready_and_its_hints_are_repeated() {
    let stage = Stage::new().await;
    stage.without_token();
    stage.origin.close_doors();
    stage.solver.set(Mode::Error);
    let mut world = stage.launch().await;
    beside(&mut world);
    world
        .sidecar
        .status_where("the run's end", |status| status["refresh"]["last_error"].is_string())
        .await;
    let report = Report::of(&world).await;
    report.check("sidecar", "failed", "no_token");
    report.check("hint", "warning", "no token yet");
    report.check("request", "failed", "token_unavailable");
}

#[tokio::test]
async fn sidecar_that_drains_is_a_failure() {
    let mut world = world().await;
    let mut session = world.open(Way::AbsoluteHttp).await;
    session.send(&Request::get("/web/api/v2/gate/x")).await;
    world.origin.arrived(1).await;
    world.sidecar.terminate();
    until("the drain", async || world.sidecar.status().await["reason"] == "draining").await;
    let report = Report::of(&world).await;
    report.check("sidecar", "failed", "draining");
    report.check("request", "failed", "PROXY_LISTEN");
    world.origin.open_gate();
    world.sidecar.ended().await;
}

#[tokio::test]
async fn request_with_wrong_credentials_is_a_failure() {
    let mut world = World::with(&[("PROXY_AUTH", "user:pass word$'")]).await;
    beside(&mut world);
    Report::of(&world).await.check("request", "ok", "HTTP 200");
    world.set("PROXY_AUTH", "user:other");
    Report::of(&world).await.check("request", "failed", "PROXY_AUTH");
}

#[tokio::test]
async fn request_whose_token_is_refused_is_a_failure_and_starts_no_refresh() {
    let mut stage = Stage::new().await;
    // No store: nobody but the sidecar knows the token.
    stage.unset("ENV_FILE");
    let mut world = stage.start().await;
    beside(&mut world);
    world.kill_token();
    let asked = || (world.solver.solves(), world.origin.door_knocks());
    let before = asked();
    let report = Report::of(&world).await;
    report.check("request", "failed", "HTTP 401");
    report.check("request", "failed", "token is refused");
    report.check("token", "warning", "there is none");
    assert_eq!((asked(), world.sidecar.generation().await), (before, 1));
    assert_eq!(world.get("/web/api/v2/x").await.status, 200, "a parser's request renews it");
    assert_eq!(world.sidecar.generation().await, 2);
}

#[tokio::test]
async fn request_at_the_wall_is_a_failure_and_starts_no_refresh() {
    let world = world().await;
    world.origin.set_wall(Wall::Closed);
    let report = Report::of(&world).await;
    report.check("request", "failed", "HTTP 403");
    report.check("request", "failed", "brings a clearance");
    assert_eq!((world.solver.solves(), world.sidecar.generation().await), (0, 1));
}

#[tokio::test]
async fn request_that_parsers_would_not_trust_is_a_failure() {
    let mut world = world().await;
    let trust = world.path("trust");
    std::fs::create_dir(&trust).unwrap();
    std::fs::write(trust.join("ca.pem"), TestCa::new().pem()).unwrap();
    world.set("TRUST_DIR", trust.display());
    let report = Report::of(&world).await;
    report.check("trust", "failed", "is not in it");
    report.check("request", "failed", "certificate");
}

#[tokio::test]
async fn sidecar_to_which_no_parser_has_come_is_a_warning() {
    let world = world().await;
    let report = Report::of(&world).await;
    report.check("parsers", "warning", "none");
    report.check("hint", "warning", "HTTPS_PROXY");
    assert_eq!(report.exit, 0, "a warning fails nothing: {:#}", report.json);
    let again = Report::of(&world).await;
    again.check("request", "ok", "HTTP 200");
    again.check("parsers", "warning", "none");
    again.check("hint", "warning", "HTTPS_PROXY");
}
