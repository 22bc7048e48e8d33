//! Where the proxy may lead.
//!
//! What is not globally routable is refused unless `ALLOW_HOSTS` lists it:
//! the IANA special-purpose address registries (RFC 6890 and its updates),
//! multicast, and IPv6 forms that carry an IPv4 address, judged by that
//! address. The process's own listeners are refused whatever is listed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::config::{AllowedHost, AllowedName};

const SPECIAL_V4: [(Ipv4Addr, u8); 16] = [
    (Ipv4Addr::UNSPECIFIED, 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 31, 196, 0), 24),
    (Ipv4Addr::new(192, 52, 193, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 3),
];

const GLOBAL_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
const NAT64: (Ipv6Addr, u8) = (Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);
const SPECIAL_V6: [(Ipv6Addr, u8); 4] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0), 48),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// The egress policy.
#[derive(Debug)]
pub struct Egress {
    allowed: Vec<AllowedHost>,
    listeners: Vec<SocketAddr>,
}

impl Egress {
    /// A policy that lets public addresses pass, and those of `allowed`, but
    /// never `listeners`.
    #[must_use]
    pub fn new(allowed: Vec<AllowedHost>, listeners: Vec<SocketAddr>) -> Self {
        Self { allowed, listeners }
    }

    /// Whether a request for `host` may go to `address`.
    #[must_use]
    pub fn permits(&self, host: &str, address: SocketAddr) -> bool {
        is_public(address.ip()) || self.lists(host, address)
    }

    /// Whether `address` is one of the process's own listeners, by whatever
    /// address of this machine.
    #[must_use]
    pub fn is_own(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        self.listeners.iter().any(|listener| {
            let wide = listener.ip().is_unspecified() && is_local(ip);
            // Connecting to the unspecified address leads to this machine.
            listener.port() == address.port()
                && (listener.ip() == ip || ip.is_unspecified() || wide)
        })
    }

    fn lists(&self, host: &str, address: SocketAddr) -> bool {
        self.allowed.iter().any(|allowed| {
            allowed.port.is_none_or(|port| port == address.port())
                && match &allowed.name {
                    AllowedName::Exact(name) => name == host,
                    AllowedName::Suffix(suffix) => host.ends_with(suffix.as_str()),
                    AllowedName::Network(net) => {
                        net.contains(&address.ip()) || net.contains(&address.ip().to_canonical())
                    }
                }
        })
    }
}

/// Whether the IANA registries call `ip` globally reachable.
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => embedded_v4(ip).map_or_else(|| is_public_v6(ip), is_public_v4),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    !SPECIAL_V4.iter().any(|&(net, bits)| Ipv4Net::new_assert(net, bits).contains(&ip))
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    let within = |&(net, bits): &(Ipv6Addr, u8)| Ipv6Net::new_assert(net, bits).contains(&ip);
    within(&GLOBAL_V6) && !SPECIAL_V6.iter().any(within)
}

/// The IPv4 address that a mapped, NAT64 or 6to4 address leads to.
fn embedded_v4(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let last =
        |ip: Ipv6Addr| Ipv4Addr::from_octets(ip.octets()[12..].try_into().unwrap_or_default());
    let six_to_four = ip.segments()[0] == 0x2002;
    if six_to_four {
        return Some(Ipv4Addr::from_octets(ip.octets()[2..6].try_into().unwrap_or_default()));
    }
    let nat64 = IpNet::from(Ipv6Net::new_assert(NAT64.0, NAT64.1)).contains(&IpAddr::V6(ip));
    ip.to_ipv4_mapped().or_else(|| nat64.then(|| last(ip)))
}

/// Whether this machine has `ip`: only then can a socket be bound to it.
fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified() || UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(ip: &str, public: bool) {
        assert_eq!(is_public(ip.parse().unwrap()), public, "{ip}");
    }

    #[test]
    fn only_globally_reachable_addresses_are_public() {
        for ip in [
            "127.0.0.1",
            "10.1.2.3",
            "172.31.0.1",
            "192.168.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001:db8::1",
            "100::1",
            "fec0::1",
            "64:ff9b:1::1",
            "::7f00:1",
        ] {
            check(ip, false);
        }
        for ip in
            ["1.1.1.1", "2a00:1450::1", "64:ff9b::101:101", "::ffff:1.1.1.1", "2002:101:101::"]
        {
            check(ip, true);
        }
    }

    #[test]
    fn own_listeners_are_known_by_any_local_address() {
        let egress = Egress::new(vec![], vec!["0.0.0.0:8080".parse().unwrap()]);
        assert!(egress.is_own("127.0.0.1:8080".parse().unwrap()));
        assert!(egress.is_own("[::ffff:127.0.0.1]:8080".parse().unwrap()));
        let loopback = Egress::new(vec![], vec!["127.0.0.1:8080".parse().unwrap()]);
        assert!(loopback.is_own("0.0.0.0:8080".parse().unwrap()));
        assert!(loopback.is_own("[::ffff:0.0.0.0]:8080".parse().unwrap()));
        assert!(loopback.is_own("[::]:8080".parse().unwrap()));
        assert!(!egress.is_own("127.0.0.1:8081".parse().unwrap()));
        assert!(!egress.is_own("203.0.113.9:8080".parse().unwrap()));
    }
}
