//! Real clients, unchanged: nothing but their environment is set, and the token dies under them.
//!
//! The Python ones run from the environment that `tests/run.sh` makes (`.venv`,
//! or where `TOKEN_SIDECAR_TEST_VENV` points). A client that is not installed is
//! skipped by name.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::support::World;
use crate::support::client::{API, GATE};
use crate::support::origin::Recorded;
use crate::support::sidecar::output;

/// The Python of the test environment.
fn python() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let venv = std::env::var_os("TOKEN_SIDECAR_TEST_VENV")
        .map_or_else(|| root.join(".venv"), PathBuf::from);
    Some(venv.join("bin/python")).filter(|python| python.is_file())
}

/// What a parser's container gets, and nothing else.
fn environment(world: &World) -> Vec<(&'static str, String)> {
    let proxy = format!("http://{}", world.sidecar.proxy());
    let bundle = world.path("certs").join("ca-bundle.pem").display().to_string();
    let mut variables = vec![("PATH", std::env::var("PATH").unwrap_or_default())];
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
        variables.push((name, proxy.clone()));
    }
    for name in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
        variables.push((name, bundle.clone()));
    }
    variables
}

async fn run(world: &World, mut command: Command) -> Output {
    command.env_clear().envs(environment(world)).stdin(Stdio::null());
    output(command).await
}

/// How many requests a script makes.
const REQUESTS: usize = 12;

/// A shop whose token dies at a client's fifth and ninth request; the death adds a send each.
async fn dying_world() -> World {
    let world = World::start().await;
    world.origin.die_at(&[5, 9]);
    world
}

fn check_said(output: &Output, client: &str) {
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{client}: {said}\n{complaint}");
    let statuses: Vec<&str> = said.lines().filter(|line| line.starts_with("status ")).collect();
    assert_eq!(statuses, vec!["status 200"; REQUESTS], "{client}: {complaint}");
}

/// Runs a script of `tests/clients` while the token dies twice.
async fn check_python(script: &str, package: Option<&str>) {
    let Some(python) = python() else {
        eprintln!("skipped: {script}: no Python environment, tests/run.sh makes it");
        return;
    };
    if let Some(package) = package {
        let present = Command::new(&python).args(["-c", &format!("import {package}")]).output();
        if !present.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: {script}: {package} is not installed");
            return;
        }
    }
    let world = dying_world().await;
    let mut command = Command::new(python);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(script));
    command.args([API, GATE, &REQUESTS.to_string()]);
    let output = run(&world, command).await;
    check_said(&output, script);
    check_world(&world);
}

/// One solve for each death, and no request sent more than twice.
fn check_world(world: &World) {
    assert_eq!(world.solver.solves(), 2);
    let sends = world.origin.requests();
    let mut targets: Vec<&str> = sends.iter().map(Recorded::target).collect();
    targets.sort_unstable();
    targets.dedup();
    assert_eq!(targets.len(), REQUESTS, "{targets:?}");
    assert_eq!(sends.len(), REQUESTS + 2);
}

#[tokio::test]
async fn requests_without_a_session_sees_no_401() {
    check_python("requests_plain.py", Some("requests")).await;
}

#[tokio::test]
async fn requests_with_a_session_sees_no_401() {
    check_python("requests_session.py", Some("requests")).await;
}

#[tokio::test]
async fn urllib_sees_no_401() {
    check_python("urllib_client.py", None).await;
}

#[tokio::test]
async fn httpx_sees_no_401() {
    check_python("httpx_client.py", Some("httpx")).await;
}

#[tokio::test]
async fn aiohttp_with_trust_env_sees_no_401() {
    check_python("aiohttp_client.py", Some("aiohttp")).await;
}

#[tokio::test]
async fn python_api_client_of_the_old_system_sees_no_401_at_the_gateway() {
    let Some(python) = python() else {
        eprintln!("skipped: gateway_client.py: no Python environment, tests/run.sh makes it");
        return;
    };
    let world = dying_world().await;
    let mut command = Command::new(python);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/gateway_client.py"));
    command.args([format!("http://{}/web/api/v2", world.sidecar.proxy()), REQUESTS.to_string()]);
    let output = run(&world, command).await;
    if String::from_utf8_lossy(&output.stderr).contains("ModuleNotFoundError") {
        eprintln!("skipped: gateway_client.py: aiohttp is not installed");
        return;
    }
    check_said(&output, "gateway_client.py");
    check_world(&world);
}

fn has_curl() -> bool {
    let found = Command::new("curl").arg("--version").stdout(Stdio::null()).status();
    let found = found.is_ok_and(|status| status.success());
    if !found {
        eprintln!("skipped: curl is not installed");
    }
    found
}

#[tokio::test]
async fn curl_sees_no_401() {
    if !has_curl() {
        return;
    }
    let world = dying_world().await;
    for number in 0..REQUESTS {
        let mut command = Command::new("curl");
        command.args(["-gsS", "-o", "/dev/null", "-w", "%{http_code}", "-m", "20"]);
        command.arg(format!("https://{API}/web/api/v2/curl?products[page]={number}"));
        let output = run(&world, command).await;
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(said, "200", "{}", String::from_utf8_lossy(&output.stderr));
    }
    check_world(&world);
}

#[tokio::test]
async fn curl_uploads_two_megabytes_through_a_token_death() {
    if !has_curl() {
        return;
    }
    let world = World::start().await;
    let upload = world.path("upload");
    let body = crate::support::origin::pattern_bytes(2_000_000);
    std::fs::write(&upload, &body).unwrap();
    world.kill_token();
    let mut command = Command::new("curl");
    command.args([
        "-sS",
        "-o",
        "-",
        "-m",
        "30",
        "-H",
        "Content-Type: application/octet-stream",
        "--data-binary",
    ]);
    command.arg(format!("@{}", upload.display())).arg(format!("https://{API}/web/api/v2/echo"));
    let output = run(&world, command).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == body, "{} bytes came back", output.stdout.len());
    assert_eq!(world.origin.requests().len(), 2);
}

#[tokio::test]
async fn curl_with_plain_http_and_with_http_2_offered_sees_no_401() {
    if !has_curl() {
        return;
    }
    let world = World::start().await;
    let urls = [format!("http://{API}/web/api/v2/plain"), format!("https://{API}/web/api/v2/tls")];
    for (url, option) in urls.iter().zip(["--http1.1", "--http2"]) {
        world.kill_token();
        let mut command = Command::new("curl");
        command.args([option, "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-m", "20", url]);
        let output = run(&world, command).await;
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "200",
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
