//! API origins.

use http::Uri;

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
        if uri.scheme_str() != Some("https") || authority.host().is_empty() || !plain {
            return Err(problem());
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
