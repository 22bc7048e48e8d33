//! A world in which the API's name leads to the sidecar, for clients that know of no proxy.
//!
//! Client programs run in a mount namespace whose `/etc/resolv.conf` names a private resolver,
//! which leads the API's names to the sidecar. The sidecar asks another one, by `UPSTREAM_DNS`,
//! which leads them to the shop. All ports are the real ones, 443 and 53, on random addresses of
//! loopback, so that tests do not meet.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tokio::net::TcpListener;

use super::client::{API, GATE};
use super::dns::{Dns, Manner};
use super::origin::Origin;
use super::parser::is_installed;
use super::{Stage, World, skip};

/// Some host that is not the API's, which an alias leads to the sidecar, too.
pub(crate) const OTHER: &str = "other.test";
const SHOP: &str = "www.chitai-gorod.ru";

/// Tries to find an address whose port is free.
const TRIES: usize = 20;

/// Gives the rest of the arguments their own resolver, and runs them.
const SCRIPT: &str = r#"set -e
mount --bind "$1/resolv.conf" /etc/resolv.conf
[ ! -e /etc/nsswitch.conf ] || mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
shift
exec "$@""#;

/// The running world. Derefs to the [`World`] of the sidecar and its shop.
pub(crate) struct AliasWorld {
    world: World,
    /// The other host, at [`OTHER`].
    pub(crate) other: Origin,
    /// What the clients ask.
    pub(crate) client_dns: Dns,
    /// What the sidecar asks.
    pub(crate) upstream_dns: Dns,
}

impl AliasWorld {
    /// A ready sidecar behind an alias; `None`, with a word on why, where this machine does not
    /// allow it.
    pub(crate) async fn start() -> Option<Self> {
        if !is_installed("a client behind an alias", "unshare", &["--version"]) {
            return None;
        }
        if let Err(why) = check_namespace() {
            skip::not_permitted(format_args!("a mount namespace for a client: {why}"));
            return None;
        }
        match Self::try_start().await {
            Ok(world) => Some(world),
            Err(error) => {
                skip::not_permitted(format_args!("ports 443 and 53 for an alias: {error}"));
                None
            }
        }
    }

    async fn try_start() -> io::Result<Self> {
        let mut stage = Stage::new().await;
        let shop = stage.ca.acceptor(&[API, GATE, SHOP]);
        stage.origin = Origin::start_on(listener().await?, stage.tokens.clone(), shop);
        let other = Origin::start_other_on(listener().await?, stage.ca.acceptor(&[OTHER]));
        let upstream_dns = Dns::start().await;
        for name in [API, GATE, SHOP] {
            upstream_dns.knows(name, &[&stage.origin.addr().ip().to_string()]);
        }
        upstream_dns.knows(OTHER, &[&other.addr().ip().to_string()]);
        // Freed for the sidecar: nobody else draws the same address.
        let alias = listener().await?.local_addr()?;
        let client_dns = dns().await?;
        for name in [API, GATE, OTHER] {
            client_dns.knows(name, &[&alias.ip().to_string()]);
        }
        write_resolver(&stage, client_dns.addr());
        stage.unset("CONNECT_TO");
        stage.set("SNI_LISTEN", alias);
        stage.set("UPSTREAM_DNS", upstream_dns.addr());
        stage.set("ALLOW_HOSTS", OTHER);
        Ok(Self { world: stage.start().await, other, client_dns, upstream_dns })
    }

    /// A command that runs `program` where the API's names lead to the sidecar. Its environment is
    /// empty but for `PATH`: no proxy; the caller adds what makes the client trust
    /// [`AliasWorld::bundle`].
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = namespace();
        command.args(["sh", "-c", SCRIPT, "sh"]).arg(self.dir()).arg(program);
        command.stdin(Stdio::null());
        command
    }

    /// What a client must trust: the public roots and the sidecar's CA.
    pub(crate) fn bundle(&self) -> PathBuf {
        self.path("certs").join("ca-bundle.pem")
    }
}

impl Deref for AliasWorld {
    type Target = World;

    fn deref(&self) -> &World {
        &self.world
    }
}

fn write_resolver(stage: &Stage, dns: SocketAddr) {
    let resolver = format!("nameserver {}\noptions timeout:2 attempts:2\n", dns.ip());
    std::fs::write(stage.path("resolv.conf"), resolver).unwrap();
    std::fs::write(stage.path("nsswitch.conf"), "hosts: files dns\n").unwrap();
}

/// The words of a command that becomes a program whose resolver is silent: names that `/etc/hosts`
/// does not know take seconds. `None`, with a word on why, where this machine does not allow it.
pub(crate) async fn with_a_dead_resolver(stage: &Stage) -> Option<(Vec<String>, Dns)> {
    if !is_installed("a process with a dead resolver", "unshare", &["--version"]) {
        return None;
    }
    if let Err(why) = check_namespace() {
        skip::not_permitted(format_args!("a mount namespace for a process: {why}"));
        return None;
    }
    let dns = match dns().await {
        Ok(dns) => dns,
        Err(error) => {
            skip::not_permitted(format_args!("port 53 for a dead resolver: {error}"));
            return None;
        }
    };
    dns.set(Manner::Silent);
    write_resolver(stage, dns.addr());
    let dir = stage.dir().display().to_string();
    let words = ["unshare", namespace_flags(), "sh", "-c", SCRIPT, "sh", &dir];
    Some((words.map(str::to_owned).to_vec(), dns))
}

/// The beginning of a command in a mount namespace; without root, as root of a user namespace.
fn namespace() -> Command {
    let mut command = Command::new("unshare");
    command
        .arg(namespace_flags())
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

fn namespace_flags() -> &'static str {
    if rustix::process::geteuid().is_root() { "-m" } else { "-rm" }
}

/// Whether a client can be given a resolver of its own here.
fn check_namespace() -> Result<(), String> {
    let mount = ["mount", "--bind", "/etc/hosts", "/etc/resolv.conf"];
    let output = namespace().args(mount).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    output.status.success().then_some(()).ok_or(said)
}

fn random_address(port: u16) -> SocketAddr {
    let [a, b, c] = [fastrand::u8(1..), fastrand::u8(..), fastrand::u8(1..255)];
    SocketAddr::from((Ipv4Addr::new(127, a, b, c), port))
}

/// Port 443 of some address.
async fn listener() -> io::Result<TcpListener> {
    anywhere(443, TcpListener::bind).await
}

/// A resolver on port 53 of some address: the port that `resolv.conf` cannot change.
async fn dns() -> io::Result<Dns> {
    anywhere(53, Dns::start_at).await
}

/// What `bind` gives for an address whose `port` is free.
async fn anywhere<T>(port: u16, bind: impl AsyncFn(SocketAddr) -> io::Result<T>) -> io::Result<T> {
    let mut bound = bind(random_address(port)).await;
    for _ in 1..TRIES {
        match &bound {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            _ => break,
        }
        bound = bind(random_address(port)).await;
    }
    bound
}
