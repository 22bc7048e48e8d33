//! Node's clients, without packages: what axios does is done with the modules that it uses.

use std::process::Command;

use super::matrix::{Client, NODE_AXIOS_OLD, NODE_FETCH, NODE_HTTPS};
use super::{Way, check};
use crate::support::parser::{is_installed, program};

async fn check_node(client: &Client, way: Way, name: &str) {
    if !is_installed(client.name, "node", &["-e", "process.exit(globalThis.fetch ? 0 : 1)"]) {
        return;
    }
    let mut command = Command::new("node");
    command.arg(program(name));
    check(client, way, command).await;
}

#[tokio::test]
async fn fetch_sees_no_401_at_the_gateway() {
    check_node(&NODE_FETCH, Way::Gateway, "fetch_client.mjs").await;
}

#[tokio::test]
async fn fetch_sees_no_401_behind_the_alias() {
    check_node(&NODE_FETCH, Way::Alias, "fetch_client.mjs").await;
}

#[tokio::test]
async fn https_sees_no_401_through_the_proxy() {
    check_node(&NODE_HTTPS, Way::Proxy, "https_client.mjs").await;
}

#[tokio::test]
async fn https_sees_no_401_at_the_gateway() {
    check_node(&NODE_HTTPS, Way::Gateway, "https_client.mjs").await;
}

#[tokio::test]
async fn https_sees_no_401_behind_the_alias() {
    check_node(&NODE_HTTPS, Way::Alias, "https_client.mjs").await;
}

#[tokio::test]
async fn axios_up_to_1_7_sees_no_401_through_the_proxy() {
    check_node(&NODE_AXIOS_OLD, Way::Proxy, "axios_old_client.mjs").await;
}
