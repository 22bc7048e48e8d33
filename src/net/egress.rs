//! Where the proxy may lead.
//!
//! What is not globally routable is refused unless `ALLOW_HOSTS` lists it:
//! the IANA special-purpose address registries (RFC 6890 and its updates, as
//! of October 2025), multicast, and IPv6 forms that carry an IPv4 address,
//! judged by that address where the Internet knows the form. A NAT64 prefix of
//! the network's own is not known here. The process's own listeners are
//! refused whatever is listed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::descriptors::is_shortage;
use crate::config::{AllowedHost, AllowedName};

const SPECIAL_V4: [(Ipv4Addr, u8); 18] = [
    (Ipv4Addr::UNSPECIFIED, 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    // Azure's host, in public clothes: it has the machine's secrets.
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 31, 196, 0), 24),
    (Ipv4Addr::new(192, 52, 193, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(192, 175, 48, 0), 24),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// All unicast that IANA has given out; what lies outside is refused: loopback,
/// unique-local, link-local, multicast, the local NAT64 prefix, segment routing, forms that
/// carry IPv4 and are long dead.
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
        let leads_here = |listener: &&SocketAddr, ip: IpAddr| {
            let bound = listener.ip().to_canonical();
            // Connecting to the unspecified address leads to this machine.
            bound == ip || ip.is_unspecified() || (bound.is_unspecified() && is_local(ip))
        };
        let on_port = self.listeners.iter().filter(|own| own.port() == address.port());
        let ways = [Some(address.ip().to_canonical()), translated(address.ip())];
        on_port.into_iter().any(|own| ways.into_iter().flatten().any(|ip| leads_here(&own, ip)))
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

/// The same as an address, where there is one.
fn translated(ip: IpAddr) -> Option<IpAddr> {
    match ip {
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) => embedded_v4(ip).map(IpAddr::V4),
    }
}

/// Whether this machine has `ip`: only then can a socket be bound to it. If
/// that cannot be tried, for want of a descriptor, it may have it.
fn is_local(ip: IpAddr) -> bool {
    let bound = || UdpSocket::bind((ip, 0));
    ip.is_loopback() || ip.is_unspecified() || bound().map_or_else(|e| is_shortage(&e), |_| true)
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
            "168.63.129.16",
            "100.100.100.200",
            "192.0.0.192",
            "192.175.48.1",
            "240.0.0.1",
            "fd00:ec2::254",
            // IPv4-mapped, -compatible, -translated; 6to4, Teredo, NAT64.
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "::ffff:0:169.254.169.254",
            "2002:a9fe:a9fe::1",
            "2001:0:4136:e378:8000:63bf:5601:5601",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::8.8.8.8",
            "64:ff9b:1:a00:0:100::",
            // The registries' latest.
            "100:0:0:1::1",
            "2001:20::1",
            "3fff::1",
            "5f00::1",
            "2620:4f:8000::1",
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
        assert!(egress.is_own("[64:ff9b::127.0.0.1]:8080".parse().unwrap()));
        assert!(egress.is_own("[2002:7f00:1::]:8080".parse().unwrap()));
        let mapped = Egress::new(vec![], vec!["[::ffff:127.0.0.1]:8080".parse().unwrap()]);
        assert!(mapped.is_own("127.0.0.1:8080".parse().unwrap()));
        assert!(!mapped.is_own("127.0.0.2:8080".parse().unwrap()));
        assert!(!egress.is_own("127.0.0.1:8081".parse().unwrap()));
        assert!(!egress.is_own("203.0.113.9:8080".parse().unwrap()));
    }

    fn check_lists(entry: &AllowedName, host: &str, address: &str, listed: bool) {
        let allowed = AllowedHost { name: entry.clone(), port: Some(80) };
        let egress = Egress::new(vec![allowed], vec![]);
        assert_eq!(egress.permits(host, address.parse().unwrap()), listed, "{entry:?} {host}");
    }

    #[test]
    fn an_entry_lists_its_names_addresses_and_port_and_no_others() {
        let private = "10.0.0.1:80";
        let exact = AllowedName::Exact("x.test".into());
        check_lists(&exact, "x.test", private, true);
        check_lists(&exact, "x.test", "10.0.0.1:81", false);
        check_lists(&exact, "a.x.test", private, false);
        check_lists(&exact, "evilx.test", private, false);
        let suffix = AllowedName::Suffix(".x.test".into());
        check_lists(&suffix, "a.x.test", private, true);
        check_lists(&suffix, "b.a.x.test", private, true);
        check_lists(&suffix, "x.test", private, false);
        check_lists(&suffix, "evilx.test", private, false);
        check_lists(&suffix, "a.x.test.evil", private, false);
        let network = AllowedName::Network("10.0.0.0/8".parse().unwrap());
        check_lists(&network, "any", private, true);
        check_lists(&network, "any", "[::ffff:10.0.0.1]:80", true);
        check_lists(&network, "any", "11.0.0.1:80", true); // public
        check_lists(&network, "any", "192.168.0.1:80", false);
        check_lists(&network, "any", "[2002:a00:1::]:80", false);
        let v6 = AllowedName::Network("fd00::/8".parse().unwrap());
        check_lists(&v6, "any", "[fd12::1]:80", true);
        check_lists(&v6, "any", "[fc00::1]:80", false);
    }
}
