//! What may keep the printed variables from being of use.

use std::net::IpAddr;
use std::path::{Path, PathBuf, absolute};

use super::Format;
use crate::config::{Config, normalize_host};

/// A line for people that says what to do, where there is a doubt.
pub(super) fn of(config: &Config, format: Format) -> Option<String> {
    match format {
        Format::Shell => no_files(config),
        Format::Compose | Format::K8s => own_loopback(config),
    }
}

/// In a container, a loopback address leads to the container itself.
fn own_loopback(config: &Config) -> Option<String> {
    let host = config.advertise.url.host().filter(|host| is_loopback(host))?;
    let trust_dir = if config.advertise.trust_dir == absolute_or_same(&config.ca.trust_dir) {
        ", and ADVERTISE_TRUST_DIR to the folder of the trust files there, such as /certs"
    } else {
        ""
    };
    Some(format!(
        "{host} is the parser's own container, unless it shares the sidecar's network (a pod does): \
         set ADVERTISE_URL to the sidecar as the parser reaches it, such as \
         http://token-sidecar:8080{trust_dir}."
    ))
}

fn is_loopback(host: &str) -> bool {
    let host = normalize_host(host);
    host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.to_canonical().is_loopback())
}

/// The trust files are made by the sidecar.
fn no_files(config: &Config) -> Option<String> {
    let folder = &config.ca.trust_dir;
    let missing = ["ca.pem", "ca-bundle.pem"].into_iter().find(|name| !folder.join(name).is_file());
    missing.map(|name| {
        let folder = absolute_or_same(folder);
        format!(
            "there is no {name} in {} (yet): the first `token-sidecar run` makes it; clients that \
             start before will not trust the sidecar.",
            folder.display()
        )
    })
}

/// Without a working folder there is no better name for `path`.
fn absolute_or_same(path: &Path) -> PathBuf {
    absolute(path).unwrap_or_else(|_| path.to_owned())
}
