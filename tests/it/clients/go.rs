//! Go's net/http.

use std::path::Path;
use std::process::Command;

use super::matrix::GO;
use super::{Way, check_at, dying_site};
use crate::support::World;
use crate::support::parser::{is_installed, program};
use crate::support::sidecar::{output, stderr};

/// Builds the program in the world's folder. What it compiles is kept for the next time.
async fn build(world: &World) -> Command {
    let binary = world.path("go-client");
    let mut compiler = Command::new("go");
    compiler.arg("build").arg("-o").arg(&binary).arg(program("http_client.go"));
    compiler.env("GOCACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("go"));
    compiler.env("GOTOOLCHAIN", "local");
    let built = output(compiler).await;
    assert!(built.status.success(), "{}", stderr(&built));
    Command::new(binary)
}

async fn check_go(way: Way) {
    if !is_installed(GO.name, "go", &["version"]) {
        return;
    }
    let Some(site) = dying_site(way).await else {
        return;
    };
    let command = build(&site).await;
    check_at(&site, &GO, way, command).await;
}

#[tokio::test]
async fn net_http_sees_no_401_through_the_proxy() {
    check_go(Way::Proxy).await;
}

#[tokio::test]
async fn net_http_sees_no_401_at_the_gateway() {
    check_go(Way::Gateway).await;
}

#[tokio::test]
async fn net_http_sees_no_401_behind_the_alias() {
    check_go(Way::Alias).await;
}
