//! The whole way behind an alias: a client that knows of no proxy, its resolver, the sidecar, and
//! the sidecar's own resolver.

use std::path::Path;
use std::process::{Command, Output};

use hickory_resolver::proto::rr::RecordType;

use crate::support::alias::{AliasWorld, OTHER};
use crate::support::client::{API, GATE};
use crate::support::parser::is_installed;
use crate::support::sidecar::{output, stderr, stdout};

/// curl as a parser would run it, but for the CA that it trusts. It shows each status and body.
fn curl(alias: &AliasWorld, ca: &Path) -> Option<Command> {
    if !is_installed("curl", "curl", &["--version"]) {
        return None;
    }
    let mut command = alias.command("curl");
    command.args(["-sS", "-m", "15", "-w", "\n%{http_code} %{remote_ip}\n", "--cacert"]).arg(ca);
    Some(command)
}

fn check_said(output: &Output, lines: &[String]) {
    let said = stdout(output);
    assert!(output.status.success(), "{said}\n{}", stderr(output));
    let said: Vec<&str> = said.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(said, lines);
}

#[tokio::test]
async fn curl_without_a_proxy_gets_the_token_through_a_death() {
    let Some(alias) = AliasWorld::start().await else {
        return;
    };
    let Some(mut curl) = curl(&alias, &alias.bundle()) else {
        return;
    };
    alias.kill_token();
    for host in [API, GATE] {
        curl.arg(format!("https://{host}/web/api/v2/x?host={host}"));
    }
    let ip = alias.sidecar.sni().ip();
    let lines = [API, GATE]
        .map(|host| [format!("/web/api/v2/x?host={host}"), format!("200 {ip}")])
        .concat();
    check_said(&output(curl).await, &lines);
    assert_eq!(alias.solver.solves(), 1);
    for host in [API, GATE] {
        assert!(alias.client_dns.asked(host, RecordType::A) >= 1, "{host} by the client");
        assert!(alias.upstream_dns.asked(host, RecordType::A) >= 1, "{host} by the sidecar");
    }
}

#[tokio::test]
async fn other_host_behind_the_alias_shows_its_own_certificate() {
    let Some(alias) = AliasWorld::start().await else {
        return;
    };
    let Some(mut curl) = curl(&alias, &alias.path("shop-ca.pem")) else {
        return;
    };
    curl.arg(format!("https://{OTHER}/inside"));
    let ip = alias.sidecar.sni().ip();
    check_said(&output(curl).await, &["/inside".to_owned(), format!("200 {ip}")]);
    assert!(alias.other.only_request().head.value("authorization").is_none());
}

#[tokio::test]
async fn alias_that_the_sidecars_servers_know_too_is_told_of() {
    let Some(alias) = AliasWorld::start().await else {
        return;
    };
    let Some(mut curl) = curl(&alias, &alias.bundle()) else {
        return;
    };
    let here = alias.sidecar.sni().ip().to_string();
    alias.upstream_dns.knows(GATE, &[&here]);
    curl.arg(format!("https://{GATE}/api/v2/x"));
    let said = stdout(&output(curl).await);
    assert!(said.contains("\n403 "), "{said}");
    assert!(said.contains("say the servers of UPSTREAM_DNS: they know the alias, too"), "{said}");
}
