//! Real clients, unchanged: nothing but their environment is set, and the token dies under them.
//!
//! Their programs are in `tests/clients`, written as a parser's author would.
//! Each gets only the variables that the README's table names for it
//! ([`matrix`]), so the table is proved, too. A client that is not installed is
//! skipped by name; `tests/run.sh` installs them all.

mod alias;
mod curl;
mod go;
mod impatient;
mod java;
mod matrix;
mod node;
mod php;
mod python;

use std::process::{Command, Output};

use self::matrix::Client;
use crate::support::client::{API, GATE};
use crate::support::origin::Recorded;
use crate::support::parser::in_container;
use crate::support::sidecar::output;
use crate::support::{Stage, World};

/// How many requests a program makes.
const REQUESTS: usize = 12;

/// How a client is led to the sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By the variables of its environment.
    Proxy,
    /// By a base URL that names the sidecar.
    Gateway,
    /// By a network in which the API's names lead to the sidecar.
    Alias,
}

impl Way {
    /// How the names of the tests of this way end.
    fn suffix(self) -> &'static str {
        match self {
            Self::Proxy => "_through_the_proxy",
            Self::Gateway => "_at_the_gateway",
            Self::Alias => "_behind_the_alias",
        }
    }

    /// The base URLs of the two API hosts.
    fn bases(self, world: &World) -> [String; 2] {
        match self {
            Self::Proxy | Self::Alias => {
                [format!("https://{API}/web/api/v2"), format!("https://{GATE}/api/v2")]
            }
            Self::Gateway => {
                let sidecar = world.sidecar.proxy();
                [format!("http://{sidecar}/web/api/v2"), format!("http://{sidecar}/api/v2")]
            }
        }
    }

    fn environment(self, world: &World, client: &Client) -> Vec<(&'static str, String)> {
        let mut variables = client.environment(self, world);
        if self == Self::Alias {
            variables.extend(alias::variables(world));
        }
        variables
    }

    /// Whether this machine can lead `client` so; if not, that it is skipped is said.
    fn is_possible(self, client: &Client) -> bool {
        self != Self::Alias || alias::is_possible(client.name)
    }
}

/// Runs a client with what its container gives it, and nothing else.
async fn run(world: &World, client: &Client, way: Way, command: Command) -> Output {
    output(in_container(command, way.environment(world, client))).await
}

/// A shop whose token dies at a client's fifth and ninth request; the death adds a send each.
async fn dying_world(way: Way) -> World {
    let mut stage = Stage::new().await;
    if way == Way::Alias {
        alias::set(&mut stage);
    }
    let world = stage.start().await;
    world.origin.die_at(&[5, 9]);
    world
}

/// Runs a program, which gets the two base URLs and the count, while the token dies twice.
async fn check(client: &Client, way: Way, command: Command) {
    if way.is_possible(client) {
        check_in(&dying_world(way).await, client, way, command).await;
    }
}

/// The same where the program needs something of the world.
async fn check_in(world: &World, client: &Client, way: Way, mut command: Command) {
    command.args(way.bases(world)).arg(REQUESTS.to_string());
    let output = run(world, client, way, command).await;
    check_said(client, &output);
    check_sends(world);
}

fn check_said(client: &Client, output: &Output) {
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}\n{complaint}", client.name);
    let statuses: Vec<&str> = said.lines().filter(|line| line.starts_with("status ")).collect();
    assert_eq!(statuses, vec!["status 200"; REQUESTS], "{}: {complaint}", client.name);
}

/// One solve for each death, and no request sent more than twice.
fn check_sends(world: &World) {
    assert_eq!(world.solver.solves(), 2);
    let sends = world.origin.requests();
    let mut targets: Vec<&str> = sends.iter().map(Recorded::target).collect();
    targets.sort_unstable();
    targets.dedup();
    assert_eq!(targets.len(), REQUESTS, "{targets:?}");
    assert_eq!(sends.len(), REQUESTS + 2);
}
