//! Hosts that a client should reach without a proxy: its neighbours, itself.

use std::fmt;
use std::net::IpAddr;

/// Longest part of a name that is kept, in bytes.
const LONGEST: usize = 63;

/// A loopback address, or a name of a single label such as `redis`; printable
/// and short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalHost(String);

impl LocalHost {
    /// `host`, normalized, if it is local.
    #[must_use]
    pub fn of(host: &str) -> Option<Self> {
        is_local(host).then(|| Self(printable(host)))
    }
}

impl fmt::Display for LocalHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_local(host: &str) -> bool {
    if let Ok(address) = host.parse::<IpAddr>() {
        return address.to_canonical().is_loopback();
    }
    // An IPv6 literal with a zone does not parse.
    let is_single = !host.is_empty() && !host.contains(['.', ':']);
    is_single || host.ends_with(".localhost")
}

fn printable(host: &str) -> String {
    let shown = |c: char| if c.is_ascii_graphic() { c } else { '?' };
    host.chars().take(LONGEST).map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_and_the_client_itself_are_local() {
        for host in ["redis", "flaresolverr", "localhost", "a.localhost", "127.0.0.1", "127.8.9.1"]
        {
            assert_eq!(LocalHost::of(host).map(|host| host.to_string()).as_deref(), Some(host));
        }
        assert!(LocalHost::of("::1").is_some() && LocalHost::of("::ffff:127.0.0.1").is_some());
    }

    #[test]
    fn other_hosts_are_not_local() {
        for host in
            ["", "www.example.org", "redis.lan", "10.0.0.1", "2001:db8::1", "fe80::1%25eth0"]
        {
            assert_eq!(LocalHost::of(host), None, "{host}");
        }
    }

    #[test]
    fn what_is_kept_is_short_and_printable() {
        let host = LocalHost::of(&format!("a\n\u{1b}é{}", "x".repeat(500))).unwrap().to_string();
        assert_eq!(host, format!("a???{}", "x".repeat(LONGEST - 4)));
    }
}
