//! Real clients, unchanged: nothing but their environment is set, and the token dies under them.
//!
//! Their programs are in `tests/clients`, written as a parser's author would.
//! Each gets only the variables that the README's table names for it
//! ([`matrix`]), so the table is proved, too. A client that is not installed is
//! skipped by name, or fails; `tests/run.sh` installs them all.

mod curl;
mod go;
mod impatient;
mod java;
mod matrix;
mod node;
mod php;
mod python;

use std::ops::Deref;
use std::process::{Command, Output};

use self::matrix::Client;
use crate::support::World;
use crate::support::alias::AliasWorld;
use crate::support::client::{API, GATE};
use crate::support::origin::Recorded;
use crate::support::parser::in_container;
use crate::support::sidecar::output;

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
}

/// Where a client runs.
enum Site {
    /// Where the API's names lead nowhere.
    Plain(World),
    /// Where they lead to the sidecar.
    Alias(AliasWorld),
}

impl Site {
    /// What `way` needs; `None`, with a word on why, where this machine does not allow it.
    async fn start(way: Way) -> Option<Self> {
        match way {
            Way::Proxy | Way::Gateway => Some(Self::Plain(World::start().await)),
            Way::Alias => AliasWorld::start().await.map(Self::Alias),
        }
    }

    /// `command` as it is run here.
    fn place(&self, command: Command) -> Command {
        match self {
            Self::Plain(_) => command,
            Self::Alias(alias) => {
                let mut placed = alias.command(command.get_program());
                placed.args(command.get_args());
                placed
            }
        }
    }
}

impl Deref for Site {
    type Target = World;

    fn deref(&self) -> &World {
        match self {
            Self::Plain(world) => world,
            Self::Alias(alias) => alias,
        }
    }
}

/// Runs a client with what its container gives it, and nothing else.
async fn run(world: &World, client: &Client, way: Way, command: Command) -> Output {
    output(in_container(command, client.environment(way, world))).await
}

/// A shop whose token dies at a client's fifth and ninth request; the death adds a send each.
async fn dying_site(way: Way) -> Option<Site> {
    let site = Site::start(way).await?;
    site.origin.die_at(&[5, 9]);
    Some(site)
}

/// Runs a program, which gets the two base URLs and the count, while the token dies twice.
async fn check(client: &Client, way: Way, command: Command) {
    if let Some(site) = dying_site(way).await {
        check_at(&site, client, way, command).await;
    }
}

/// The same where the program needs something of its site.
async fn check_at(site: &Site, client: &Client, way: Way, mut command: Command) {
    command.args(way.bases(site)).arg(REQUESTS.to_string());
    let output = run(site, client, way, site.place(command)).await;
    check_said(client, &output);
    check_sends(site);
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
