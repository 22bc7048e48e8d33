//! The API origins, by name and by path.

use http::HeaderValue;
use http::header::InvalidHeaderValue;
use http::uri::Authority;

use crate::config::{ApiOrigin, normalize_host};

/// Port of plain HTTP: what arrives for it at an API host is the API's, and
/// goes on over TLS.
const PLAIN_PORT: u16 = 80;

/// Port of https.
const TLS_PORT: u16 = 443;

/// The API origins.
pub struct Origins(Vec<Entry>);

struct Entry {
    origin: ApiOrigin,
    /// `host:port`
    address: String,
    host_field: HeaderValue,
}

impl Origins {
    /// Takes over the origins of the settings.
    ///
    /// # Errors
    ///
    /// A host that no field can hold.
    pub fn new(origins: Vec<ApiOrigin>) -> Result<Self, InvalidHeaderValue> {
        let entry = |origin: ApiOrigin| {
            let address = format!("{}:{}", origin.host, origin.port);
            Ok(Entry { host_field: HeaderValue::try_from(origin.authority())?, address, origin })
        };
        Ok(Self(origins.into_iter().map(entry).collect::<Result<_, _>>()?))
    }

    /// Each origin.
    pub(super) fn iter(&self) -> impl Iterator<Item = &ApiOrigin> {
        self.0.iter().map(|entry| &entry.origin)
    }

    /// The origin that `host` (normalized) and `port` lead to.
    pub(super) fn by_address(&self, host: &str, port: u16) -> Option<usize> {
        let exact = self.position(|origin| origin.host == host && origin.port == port);
        exact.or_else(|| self.by_host(host).filter(|_| port == PLAIN_PORT))
    }

    /// The origin that `authority` leads to, if it is spelled as nearly all spell it:
    /// what needs no normalizing is found for less.
    pub(super) fn by_plain(&self, authority: &Authority, default_port: u16) -> Option<usize> {
        let text = authority.as_str();
        let with_port = self.0.iter().position(|entry| entry.address == text);
        with_port.or_else(|| self.by_address(text, default_port))
    }

    /// The origin that `host` (normalized) alone leads to: the one on the port
    /// of https, if there are several.
    pub(super) fn by_name(&self, host: &str) -> Option<usize> {
        self.by_address(host, TLS_PORT).or_else(|| self.by_host(host))
    }

    /// The origin that the gateway maps a request to: by `Host`, or else by
    /// the longest prefix of its path.
    pub(super) fn by_gateway(&self, host: Option<&HeaderValue>, path: &str) -> Option<usize> {
        let host = host.and_then(|value| Authority::try_from(value.as_bytes()).ok());
        let named = host.and_then(|host| self.by_host(&normalize_host(host.host())));
        named.or_else(|| self.by_prefix(path))
    }

    /// `Host` as origin `index` gets it.
    pub(super) fn host_field(&self, index: usize) -> &HeaderValue {
        &self.0[index].host_field
    }

    fn by_host(&self, host: &str) -> Option<usize> {
        self.position(|origin| origin.host == host)
    }

    fn by_prefix(&self, path: &str) -> Option<usize> {
        let matching = self.0.iter().enumerate().filter(|(_, entry)| {
            let rest = path.strip_prefix(entry.origin.prefix.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        matching.max_by_key(|(_, entry)| entry.origin.prefix.len()).map(|(index, _)| index)
    }

    fn position(&self, matches: impl Fn(&ApiOrigin) -> bool) -> Option<usize> {
        self.0.iter().position(|entry| matches(&entry.origin))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins() -> Origins {
        let origin = |host: &str, port, prefix: &str| ApiOrigin {
            host: host.into(),
            port,
            prefix: prefix.into(),
        };
        Origins::new(vec![
            origin("agr.test", 443, "/web/api"),
            origin("gate.test", 443, "/api"),
            origin("gate.test", 8443, "/api/special"),
        ])
        .unwrap()
    }

    #[test]
    fn a_port_other_than_the_origins_is_another_destination() {
        assert_eq!(origins().by_address("agr.test", 443), Some(0));
        assert_eq!(origins().by_address("agr.test", 80), Some(0));
        assert_eq!(origins().by_address("agr.test", 8443), None);
        assert_eq!(origins().by_address("gate.test", 8443), Some(2));
        assert_eq!(origins().by_address("www.test", 443), None);
    }

    #[test]
    fn what_is_plain_leads_where_its_host_and_port_do() {
        let by_plain = |text: &'static str, default_port| {
            origins().by_plain(&Authority::from_static(text), default_port)
        };
        assert_eq!(by_plain("agr.test", 443), Some(0));
        assert_eq!(by_plain("agr.test", 80), Some(0));
        assert_eq!(by_plain("agr.test:443", 80), Some(0));
        assert_eq!(by_plain("gate.test:8443", 80), Some(2));
        for not_plain in ["agr.test:8443", "AGR.test", "agr.test.", "agr.test:", "x@agr.test"] {
            assert_eq!(by_plain(not_plain, 443), None, "{not_plain}");
        }
    }

    #[test]
    fn a_name_alone_leads_to_the_port_of_https_first() {
        let origin = |port| ApiOrigin { host: "a.test".into(), port, prefix: format!("/{port}") };
        let by_name =
            |ports: [u16; 2]| Origins::new(ports.map(origin).into()).unwrap().by_name("a.test");
        assert_eq!(by_name([8443, 443]), Some(1));
        assert_eq!(by_name([8443, 9443]), Some(0));
        assert_eq!(origins().by_name("www.test"), None);
    }

    #[test]
    fn the_gateway_goes_by_host_and_then_by_the_longest_prefix() {
        let check = |host: Option<&'static str>, path: &str, index: Option<usize>| {
            let host = host.map(HeaderValue::from_static);
            assert_eq!(origins().by_gateway(host.as_ref(), path), index, "{host:?} {path}");
        };
        check(Some("GATE.test.:99"), "/web/api/v1", Some(1));
        check(Some("127.0.0.1:8080"), "/web/api/v1", Some(0));
        check(None, "/api/special/x", Some(2));
        check(None, "/api/specialist", Some(1));
        check(None, "/api", Some(1));
        check(None, "/apis", None);
    }
}
