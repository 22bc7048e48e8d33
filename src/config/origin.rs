//! API origins.

use std::net::Ipv6Addr;

use http::Uri;
use http::uri::Authority;

/// An origin of the shop's API, with the prefix that the gateway maps to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiOrigin {
    /// Host name or IP literal (without brackets), lower case, no final dot.
    pub host: String,
    /// Port, 443 where none is given.
    pub port: u16,
    /// Path prefix without a final slash; empty for the whole host.
    pub prefix: String,
}

impl ApiOrigin {
    /// Reads `https://host[:port][/prefix]`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        // What is no URL is not shown: it may hold credentials.
        let problem =
            || "expected origins such as https://host/prefix, without credentials".to_owned();
        let uri: Uri = text.parse().map_err(|_| problem())?;
        let authority = uri.authority().ok_or_else(problem)?;
        let plain = uri.query().is_none() && !authority.as_str().contains('@');
        if uri.scheme_str() != Some("https") || !plain || !is_address(authority) {
            return Err(problem());
        }
        if !has_usable_port(authority) {
            return Err(format!("the port of {authority} is not usable, expected 1 to 65535"));
        }
        Ok(Self {
            host: normalize_host(authority.host()),
            port: authority.port_u16().unwrap_or(443),
            prefix: uri.path().trim_end_matches('/').to_owned(),
        })
    }

    /// `host` or `host:port`, as a `Host` field carries it.
    #[must_use]
    pub fn authority(&self) -> String {
        let host = bracketed(&self.host);
        if self.port == 443 { host } else { format!("{host}:{}", self.port) }
    }

    /// `https://host[:port]`.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("https://{}", self.authority())
    }
}

/// Whether this is a host, perhaps with a port, and nothing else. `http` lets
/// brackets stand anywhere (`a:1[::1]:2` has host `a` and port 2), and a sign
/// before the port. Without credentials, which are refused before.
#[must_use]
pub fn is_address(authority: &Authority) -> bool {
    let (host, port) = authority.as_str().split_at(authority.host().len());
    let is_number = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    let is_host = match host.strip_prefix('[') {
        Some(ip) => ip.strip_suffix(']').is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok()),
        // The final dot goes, and must leave something.
        None => !matches!(host, "" | ".") && !host.contains(['[', ']']),
    };
    is_host && (port.is_empty() || port.strip_prefix(':').is_some_and(is_number))
}

/// Whether it is one, and its port, if it has any, can be connected to.
pub(super) fn has_usable_port(authority: &Authority) -> bool {
    let written = authority.as_str().len() > authority.host().len();
    is_address(authority) && (!written || authority.port_u16().is_some_and(|port| port != 0))
}

/// A host name in the form that all comparisons use: lower case, no brackets
/// around an IPv6 literal, no final dot.
#[must_use]
pub fn normalize_host(host: &str) -> String {
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase()
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_a_host_with_a_port_that_can_be_connected_to() {
        let origin = ApiOrigin::parse("https://A.test:8443/api/").unwrap();
        assert_eq!((&*origin.host, origin.port, &*origin.prefix), ("a.test", 8443, "/api"));
        assert_eq!(ApiOrigin::parse("https://[::1]").unwrap().authority(), "[::1]");
        for port in ["99999", "0", ""] {
            let problem = ApiOrigin::parse(&format!("https://a.test:{port}/api")).unwrap_err();
            let expected = format!("the port of a.test:{port} is not usable, expected 1 to 65535");
            assert_eq!(problem, expected);
        }
        for text in [
            "https://a:1[::1]:2",
            "https://.",
            "https://u@a.test",
            "https://u@a.test:0",
            "http://a.test",
        ] {
            let problem = ApiOrigin::parse(text).unwrap_err();
            assert!(problem.starts_with("expected origins such as"), "{text}: {problem}");
        }
    }
}
