//! The curl of the command line.

use std::process::Command;

use super::matrix::CURL;
use super::{Way, check, run};
use crate::support::World;
use crate::support::client::API;
use crate::support::origin::pattern_bytes;
use crate::support::parser::{is_installed, program};
use crate::support::sidecar::{stderr, stdout};

async fn check_curl(way: Way) {
    if !is_installed(CURL.name, "curl", &["--version"]) {
        return;
    }
    let mut command = Command::new("sh");
    command.arg(program("curl_client.sh"));
    check(&CURL, way, command).await;
}

#[tokio::test]
async fn curl_sees_no_401_through_the_proxy() {
    check_curl(Way::Proxy).await;
}

#[tokio::test]
async fn curl_sees_no_401_at_the_gateway() {
    check_curl(Way::Gateway).await;
}

#[tokio::test]
async fn curl_sees_no_401_behind_the_alias() {
    check_curl(Way::Alias).await;
}

#[tokio::test]
async fn curl_uploads_two_megabytes_through_a_token_death() {
    if !is_installed(CURL.name, "curl", &["--version"]) {
        return;
    }
    let world = World::start().await;
    let upload = world.path("upload");
    let body = pattern_bytes(2_000_000);
    std::fs::write(&upload, &body).unwrap();
    world.kill_token();
    let mut command = Command::new("curl");
    command.args(["-sS", "-o", "-", "-m", "30", "-H", "Content-Type: application/octet-stream"]);
    command.args(["--data-binary", &format!("@{}", upload.display())]);
    command.arg(format!("https://{API}/web/api/v2/echo"));
    let output = run(&world, &CURL, Way::Proxy, command).await;
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(output.stdout == body, "{} bytes came back", output.stdout.len());
    assert_eq!(world.origin.requests().len(), 2);
}

#[tokio::test]
async fn curl_with_plain_http_and_with_http_2_offered_sees_no_401() {
    if !is_installed(CURL.name, "curl", &["--version"]) {
        return;
    }
    let world = World::start().await;
    let urls = [format!("http://{API}/web/api/v2/plain"), format!("https://{API}/web/api/v2/tls")];
    for (url, option) in urls.iter().zip(["--http1.1", "--http2"]) {
        world.kill_token();
        let mut command = Command::new("curl");
        command.args([option, "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-m", "20", url]);
        let output = run(&world, &CURL, Way::Proxy, command).await;
        assert_eq!(stdout(&output), "200", "{}", stderr(&output));
    }
}
