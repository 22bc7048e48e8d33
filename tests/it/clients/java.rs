//! Java's `HttpClient`.

use std::process::Command;

use super::matrix::{JAVA, TRUST_STORE};
use super::{Way, check_at, dying_site};
use crate::support::World;
use crate::support::parser::{is_installed, program};
use crate::support::sidecar::{output, stdout};

/// Makes the trust store, which the JVM does not read from PEM.
async fn make_trust_store(world: &World) {
    let (store, password) = TRUST_STORE;
    let mut keytool = Command::new("keytool");
    keytool.args(["-importcert", "-noprompt", "-alias", "sidecar", "-storepass", password]);
    keytool.arg("-file").arg(world.ca_file()).arg("-keystore").arg(world.path(store));
    let made = output(keytool).await;
    assert!(made.status.success(), "{}", stdout(&made));
}

async fn check_java(way: Way) {
    if !is_installed(JAVA.name, "javac", &["-version"]) {
        return;
    }
    let Some(site) = dying_site(way).await else {
        return;
    };
    if way != Way::Gateway {
        make_trust_store(&site).await;
    }
    let mut command = Command::new("java");
    // Short-lived: the compiler that optimizes and a collector with threads do not pay.
    command.args(["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]);
    command.arg(program("HttpClientParser.java"));
    check_at(&site, &JAVA, way, command).await;
}

#[tokio::test]
async fn http_client_sees_no_401_through_the_proxy() {
    check_java(Way::Proxy).await;
}

#[tokio::test]
async fn http_client_sees_no_401_behind_the_alias() {
    check_java(Way::Alias).await;
}

#[tokio::test]
async fn http_client_sees_no_401_at_the_gateway() {
    check_java(Way::Gateway).await;
}
