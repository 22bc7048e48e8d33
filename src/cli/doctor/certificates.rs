//! The CA, who can read its key, and what parsers get to trust it.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::process::geteuid;

use super::readable;
use super::report::Check;
use crate::config::Config;
use crate::tls::Authority;

/// How long before its end a CA draws a warning.
const WARN_BEFORE: Duration = Duration::from_hours(720);
const RENEW: &str = "`token-sidecar ca --renew`, then restart the sidecar and the parsers";

/// The checks of `CA_DIR` and `TRUST_DIR`.
pub(super) fn examine(config: &Config) -> Vec<Check> {
    let dir = &config.ca.dir;
    let tried = format!("CA in {}", dir.display());
    let authority = match Authority::load(dir) {
        Ok(Some(authority)) => authority,
        Ok(None) => {
            let advice = "the first `token-sidecar run` makes one";
            return vec![Check::warning("ca", tried, "there is none yet", advice)];
        }
        Err(error) => return vec![Check::failed("ca", tried, error, RENEW)],
    };
    vec![
        ca(config, &authority, &tried),
        key(&dir.join("ca.key")),
        trust_file(config, &authority, "ca.pem"),
        trust_file(config, &authority, "ca-bundle.pem"),
    ]
}

fn ca(config: &Config, authority: &Authority, tried: &str) -> Check {
    let now = SystemTime::now();
    if let Err(error) = authority.vouches_for(&config.api.hosts(), now) {
        return Check::failed("ca", tried, error, RENEW);
    }
    let summary = authority.summary();
    let left = summary.not_after.duration_since(now).unwrap_or_default();
    let until = humantime::format_rfc3339_seconds(summary.not_after);
    if now < summary.not_before {
        let from = humantime::format_rfc3339_seconds(summary.not_before);
        let found = format!("valid from {from} on only");
        return Check::warning("ca", tried, found, "check the clock of this machine");
    }
    if left < WARN_BEFORE {
        return Check::warning("ca", tried, format!("valid only until {until}"), RENEW);
    }
    let hosts = match summary.hosts.as_slice() {
        [] => "any host".to_owned(),
        hosts => hosts.join(", "),
    };
    Check::ok("ca", tried, format!("valid until {until}, for {hosts}"))
}

fn key(path: &Path) -> Check {
    let tried = format!("who can read {}", path.display());
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => return Check::failed("ca_key", tried, error, "restore it"),
    };
    let mode = metadata.mode() & 0o7777;
    let found = format!("mode {mode:04o}, owner {}", metadata.uid());
    if mode & 0o077 != 0 {
        let advice = format!("other users can read it: chmod 600 {}", path.display());
        return Check::failed("ca_key", tried, found, advice);
    }
    if is_strangers(&metadata) {
        let advice =
            "it is another user's: run doctor as the user that runs the sidecar, or chown it";
        return Check::warning("ca_key", tried, found, advice);
    }
    Check::ok("ca_key", tried, found)
}

fn is_strangers(metadata: &Metadata) -> bool {
    metadata.uid() != geteuid().as_raw()
}

/// Whether parsers find our CA in a file of `TRUST_DIR`.
fn trust_file(config: &Config, authority: &Authority, name: &'static str) -> Check {
    let path = config.ca.trust_dir.join(name);
    let tried = format!("{} for parsers", path.display());
    let advice = "start the sidecar once, it writes the file; parsers must be restarted after that";
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) => return Check::failed("trust", tried, error, advice),
    };
    if !text.contains(authority.certificate_pem().trim_end()) {
        return Check::failed("trust", tried, "the sidecar's CA is not in it", advice);
    }
    let mode = fs::metadata(&path).map_or(0, |metadata| metadata.mode());
    if mode & 0o004 == 0 {
        let advice = format!("parsers of other users cannot read it: chmod 644 {}", path.display());
        return Check::warning(
            "trust",
            tried,
            "holds the sidecar's CA, not readable by all",
            advice,
        );
    }
    let age = fs::metadata(&path).and_then(|metadata| metadata.modified());
    let age = age.ok().and_then(|modified| modified.elapsed().ok()).unwrap_or_default();
    Check::ok("trust", tried, format!("holds the sidecar's CA, written {} ago", readable(age)))
}
