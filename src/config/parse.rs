//! Values with a small grammar of their own: destinations and networks.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv6Net};

use super::normalize_host;

/// A destination that is dialled elsewhere: an entry of `CONNECT_TO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectTo {
    /// Host as the request names it, normalized.
    pub host: String,
    /// Port as the request names it.
    pub port: u16,
    /// Name or address to dial instead.
    pub to_host: String,
    /// Port to dial instead.
    pub to_port: u16,
}

impl ConnectTo {
    /// Reads `host:port=addr:port`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let problem = || format!("{text:?} is not usable, expected host:port=addr:port");
        let (from, to) = text.split_once('=').ok_or_else(problem)?;
        let (host, port) = host_port(from).ok_or_else(problem)?;
        let (to_host, to_port) = host_port(to).ok_or_else(problem)?;
        Ok(Self { host, port, to_host, to_port })
    }
}

/// A destination that is allowed although it is not public.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedHost {
    /// Which names or addresses.
    pub name: AllowedName,
    /// Which port; `None`: any.
    pub port: Option<u16>,
}

/// The name part of an entry of `ALLOW_HOSTS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedName {
    /// One name, or an address as the client writes it.
    Exact(String),
    /// Every name below this one: `*.suffix`.
    Suffix(String),
    /// Every address of a network.
    Network(IpNet),
}

impl AllowedHost {
    /// Reads a name, `*.suffix`, address or CIDR, with `:port` if wanted.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (name, port) = match host_port(text) {
            Some((name, port)) if !is_bare_ipv6(text) => (name, Some(port)),
            _ => (normalize_host(text), None),
        };
        let suffix = name.strip_prefix("*.");
        let is_usable = is_name(suffix.unwrap_or(&name)) && port != Some(0);
        let name = match (network(&name)?, suffix) {
            (Some(network), _) if port != Some(0) => AllowedName::Network(network),
            (None, Some(suffix)) if is_usable => AllowedName::Suffix(format!(".{suffix}")),
            (None, None) if is_usable => AllowedName::Exact(name),
            _ => {
                return Err(format!(
                    "{text:?} is not usable, expected a name, *.suffix, address or CIDR, each \
                     with :port if wanted"
                ));
            }
        };
        Ok(Self { name, port })
    }
}

/// Whether `text` can be a name on the wire. One that a client's resolver
/// would first have to encode (IDNA) is not, nor is an address cut short.
fn is_name(text: &str) -> bool {
    let is_label = |label: &str| {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        !label.is_empty() && label.bytes().all(known)
    };
    let last = text.rsplit('.').next().unwrap_or_default();
    text.split('.').all(is_label) && !last.bytes().all(|byte| byte.is_ascii_digit())
}

/// Reads a CIDR or address, or `private`: loopback, RFC 1918, link-local and
/// ULA.
pub(super) fn networks(text: &str) -> Result<Vec<IpNet>, String> {
    const PRIVATE: [&str; 8] = [
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "::1/128",
        "fe80::/10",
        "fc00::/7",
    ];
    if text == "private" {
        return Ok(PRIVATE.iter().filter_map(|net| net.parse().ok()).collect());
    }
    network(text)?.map(|net| vec![net]).ok_or_else(|| {
        format!("{text:?} is no network, expected a CIDR such as 10.0.0.0/8, or private")
    })
}

/// Reads a resolver's `ip[:port]`; an IPv6 address with a port is in brackets.
pub(super) fn dns_server(text: &str) -> Result<SocketAddr, String> {
    const DNS_PORT: u16 = 53;
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let with_default = bare.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, DNS_PORT));
    let server = with_default.or_else(|_| text.parse::<SocketAddr>()).ok();
    server.filter(|server| server.port() != 0).ok_or_else(|| {
        format!(
            "{text:?} is not usable, expected resolvers such as 192.0.2.53 or [2001:db8::53]:53"
        )
    })
}

/// Reads a CIDR or address; `None` where it is neither. An address with the
/// length of a network is more often a slip than a wish for all of that.
fn network(text: &str) -> Result<Option<IpNet>, String> {
    let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
    match text.parse::<IpNet>() {
        Ok(net) if net.addr() != net.network() => Err(format!(
            "{text:?} is an address within a network, expected the network, {}, or the address \
             alone",
            net.trunc()
        )),
        Ok(net) => Ok(Some(net)),
        Err(_) => Ok(address()),
    }
}

fn is_bare_ipv6(text: &str) -> bool {
    text.parse::<Ipv6Addr>().is_ok() || text.parse::<Ipv6Net>().is_ok()
}

fn host_port(text: &str) -> Option<(String, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let host = normalize_host(host);
    (!host.is_empty()).then_some((host, port.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_allowed(text: &str, name: AllowedName, port: Option<u16>) {
        assert_eq!(AllowedHost::parse(text), Ok(AllowedHost { name, port }), "{text}");
    }

    #[test]
    fn allowed_hosts_are_names_suffixes_and_networks_with_ports() {
        check_allowed("Redis", AllowedName::Exact("redis".into()), None);
        check_allowed("redis.:6379", AllowedName::Exact("redis".into()), Some(6379));
        check_allowed("*.lan:80", AllowedName::Suffix(".lan".into()), Some(80));
        check_allowed("10.0.0.0/8", AllowedName::Network("10.0.0.0/8".parse().unwrap()), None);
        check_allowed(
            "10.0.0.0/8:81",
            AllowedName::Network("10.0.0.0/8".parse().unwrap()),
            Some(81),
        );
        check_allowed("::1", AllowedName::Network("::1/128".parse().unwrap()), None);
        check_allowed("[::1]:9", AllowedName::Network("::1/128".parse().unwrap()), Some(9));
        check_allowed("127.0.0.1", AllowedName::Network("127.0.0.1/32".parse().unwrap()), None);
    }

    #[test]
    fn an_allowed_host_that_could_never_match_is_refused() {
        for text in [
            "a/b",
            "*",
            "*.",
            "*.*.lan",
            "a*b",
            "*lan",
            ".lan",
            "a..lan",
            "*..lan",
            "redis:",
            "redis:x",
            "redis:0",
            "redis:65536",
            "10.0.0.0/33",
            "10.0.0.0/8:0",
            "10.0.0",
            "127.1",
            "*.10.0.0.0/8",
            "http://redis",
            "user@redis",
            "[::1",
            "[::1]:x",
            "fd00::/129",
            "редис.test",
            "a b",
            "*.a b",
        ] {
            assert!(AllowedHost::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_address_within_a_network_is_neither() {
        for (text, network) in [
            ("10.0.0.1/8", "10.0.0.0/8"),
            ("10.0.0.1/8:80", "10.0.0.0/8"),
            ("fd00::1/8", "fd00::/8"),
            ("[fd00::1/8]:80", "fd00::/8"),
        ] {
            let problem = AllowedHost::parse(text).unwrap_err();
            assert!(problem.contains(&format!("the network, {network}, or")), "{problem}");
        }
        assert!(networks("172.17.0.1/16").unwrap_err().contains("172.17.0.0/16"));
        assert_eq!(networks("172.17.0.1/32").unwrap(), ["172.17.0.1/32".parse().unwrap()]);
    }

    #[test]
    fn a_resolver_is_an_address_with_a_port_if_wanted() {
        let check = |text, expected: &str| {
            assert_eq!(dns_server(text), Ok(expected.parse().unwrap()), "{text}");
        };
        check("192.0.2.1", "192.0.2.1:53");
        check("192.0.2.1:5353", "192.0.2.1:5353");
        check("2001:db8::1", "[2001:db8::1]:53");
        check("[2001:db8::1]", "[2001:db8::1]:53");
        check("[2001:db8::1]:5353", "[2001:db8::1]:5353");
        for text in ["dns.test", "192.0.2.1:x", "192.0.2.1:0", "[2001:db8::1]:0"] {
            assert!(dns_server(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_connect_to_entry_has_two_destinations() {
        let entry = ConnectTo::parse("API.test.:443=[::1]:8443").unwrap();
        assert_eq!((entry.host.as_str(), entry.port), ("api.test", 443));
        assert_eq!((entry.to_host.as_str(), entry.to_port), ("::1", 8443));
        assert!(ConnectTo::parse("api.test=127.0.0.1:1").is_err());
    }
}
