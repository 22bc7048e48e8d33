//! An alias for the API's names that leads to the sidecar, for one program alone.
//!
//! What a container's network does for all is done here by libnss_wrapper: it
//! answers the program's look-ups from a hosts file. The port stays the
//! client's own, 443, so the sidecar listens there, on a loopback address by chance.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::client::{API, GATE};
use crate::support::{Stage, World};

const HOSTS: &str = "hosts";

/// Whether this machine lets tests have an alias; if not, says that `client` is skipped.
pub(super) fn is_possible(client: &str) -> bool {
    let may_listen = TcpListener::bind(address()).is_ok();
    if !may_listen {
        eprintln!("skipped: {client} behind the alias: no right to listen on port 443");
    }
    may_listen && is_wrapper_installed(client)
}

fn is_wrapper_installed(client: &str) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let hosts = dir.path().join(HOSTS);
    write_hosts(&hosts, address());
    let mut look_up = Command::new("getent");
    let found = look_up.args(["ahosts", API]).envs(wrapper(hosts)).output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("skipped: {client} behind the alias: libnss-wrapper is not installed");
    }
    found
}

/// Any of 127.1.0.0 to 127.254.255.255, on the port of https.
fn address() -> SocketAddr {
    let address = Ipv4Addr::new(127, fastrand::u8(1..255), fastrand::u8(..), fastrand::u8(1..255));
    (address, 443).into()
}

fn write_hosts(path: &Path, address: SocketAddr) {
    fs::write(path, format!("{0} {API}\n{0} {GATE}\n", address.ip())).unwrap();
}

fn wrapper(hosts: PathBuf) -> [(&'static str, String); 2] {
    [
        ("LD_PRELOAD", "libnss_wrapper.so".to_owned()),
        ("NSS_WRAPPER_HOSTS", hosts.display().to_string()),
    ]
}

/// Lets the sidecar listen where the alias leads.
pub(super) fn set(stage: &mut Stage) {
    let address = address();
    stage.set("SNI_LISTEN", address);
    write_hosts(&stage.path(HOSTS), address);
}

/// The variables that put a program behind the alias.
pub(super) fn variables(world: &World) -> [(&'static str, String); 2] {
    wrapper(world.path(HOSTS))
}
