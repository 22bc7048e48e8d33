//! Whom the CA may vouch for: hosts, and the name constraints made of them.
//!
//! A constraint binds only names of its own kind (RFC 5280 §4.2.1.10): a list of permitted DNS names says nothing
//! about IP addresses. So a kind that has no permitted name is excluded as a whole.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rcgen::{CidrSubnet, GeneralSubtree, NameConstraints};
use rustls::pki_types::DnsName;
use x509_parser::extensions::{
    GeneralName, GeneralSubtree as ParsedSubtree, NameConstraints as Parsed,
};

use super::TlsError;

/// A host as certificates name it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Host {
    /// A DNS name: lower case, no trailing dot.
    Dns(String),
    /// An IP address.
    Ip(IpAddr),
}

impl Host {
    /// Reads a DNS name or an IP literal, the latter with or without the brackets of a URL.
    pub(super) fn parse(text: &str) -> Result<Self, TlsError> {
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse() {
            return Ok(Self::Ip(address));
        }
        let name = bare.strip_suffix('.').unwrap_or(bare).to_ascii_lowercase();
        match DnsName::try_from(name.as_str()) {
            Ok(_) => Ok(Self::Dns(name)),
            Err(_) => Err(TlsError::BadHost { host: text.to_owned() }),
        }
    }

    /// Reads all of `texts`.
    pub(super) fn parse_all(texts: &[String]) -> Result<Vec<Self>, TlsError> {
        texts.iter().map(|text| Self::parse(text)).collect()
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Ip(address) => address.fmt(f),
        }
    }
}

/// The constraint that permits `hosts` and no other DNS name or IP address.
pub(super) fn constraints(hosts: &[Host]) -> NameConstraints {
    let mut excluded_subtrees = Vec::new();
    if !hosts.iter().any(|host| matches!(host, Host::Dns(_))) {
        excluded_subtrees.push(GeneralSubtree::DnsName(String::new()));
    }
    if !hosts.iter().any(|host| matches!(host, Host::Ip(_))) {
        let everything: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        excluded_subtrees.extend(everything.map(|address| subnet(address, 0)));
    }
    NameConstraints { permitted_subtrees: hosts.iter().map(permitted).collect(), excluded_subtrees }
}

fn permitted(host: &Host) -> GeneralSubtree {
    match host {
        Host::Dns(name) => GeneralSubtree::DnsName(name.clone()),
        Host::Ip(address) => subnet(*address, if address.is_ipv4() { 32 } else { 128 }),
    }
}

fn subnet(address: IpAddr, prefix: u8) -> GeneralSubtree {
    GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address, prefix))
}

/// What the name constraints of a certificate allow.
#[derive(Clone, Default, Debug)]
pub(super) struct Scope {
    permitted: Vec<Subtree>,
    excluded: Vec<Subtree>,
}

impl Scope {
    /// Takes over what concerns hosts from a certificate's extension.
    pub(super) fn from_extension(extension: &Parsed<'_>) -> Self {
        let subtrees = |list: &Option<Vec<ParsedSubtree<'_>>>| {
            list.iter().flatten().filter_map(|subtree| Subtree::read(&subtree.base)).collect()
        };
        Self {
            permitted: subtrees(&extension.permitted_subtrees),
            excluded: subtrees(&extension.excluded_subtrees),
        }
    }

    /// Whether the certificate may vouch for `host`.
    pub(super) fn allows(&self, host: &Host) -> bool {
        let mut same_kind =
            self.permitted.iter().filter(|subtree| subtree.is_kind_of(host)).peekable();
        let permitted = same_kind.peek().is_none() || same_kind.any(|subtree| subtree.holds(host));
        permitted && !self.excluded.iter().any(|subtree| subtree.holds(host))
    }

    /// The permitted hosts, for people.
    pub(super) fn hosts(&self) -> Vec<String> {
        self.permitted.iter().map(ToString::to_string).collect()
    }
}

#[derive(Clone, Debug)]
enum Subtree {
    /// A name with all names below it; the empty one holds every name.
    Dns(String),
    Ip(IpNet),
}

impl Subtree {
    fn read(name: &GeneralName<'_>) -> Option<Self> {
        match name {
            GeneralName::DNSName(name) => Some(Self::Dns(name.to_ascii_lowercase())),
            GeneralName::IPAddress(octets) => Self::read_net(octets),
            _ => None,
        }
    }

    /// An address and its mask, one after the other.
    fn read_net(octets: &[u8]) -> Option<Self> {
        let (address, mask) = octets.split_at_checked(octets.len() / 2)?;
        IpNet::with_netmask(read_address(address)?, read_address(mask)?).ok().map(Self::Ip)
    }

    fn is_kind_of(&self, host: &Host) -> bool {
        matches!((self, host), (Self::Dns(_), Host::Dns(_)) | (Self::Ip(_), Host::Ip(_)))
    }

    fn holds(&self, host: &Host) -> bool {
        match (self, host) {
            (Self::Dns(base), Host::Dns(name)) => name
                .strip_suffix(base.as_str())
                .is_some_and(|head| base.is_empty() || head.is_empty() || head.ends_with('.')),
            (Self::Ip(net), Host::Ip(address)) => net.contains(address),
            _ => false,
        }
    }
}

impl fmt::Display for Subtree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Ip(net) if net.prefix_len() == net.max_prefix_len() => net.addr().fmt(f),
            Self::Ip(net) => net.fmt(f),
        }
    }
}

fn read_address(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok()
}
