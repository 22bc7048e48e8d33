//! The parent proxy.

use http::Uri;
use percent_encoding::percent_decode_str;

use super::{Secret, is_address, normalize_host};

/// The proxy that leads to the shop: `UPSTREAM_PROXY`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentProxy {
    /// Host name or IP literal (without brackets), normalized.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// User name for Basic credentials, decoded.
    pub user: Option<Secret>,
    /// The password that goes with it, decoded.
    pub password: Option<Secret>,
}

impl ParentProxy {
    /// Reads `http://[user:pass@]host:port`. The error never shows the text:
    /// it may hold credentials.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let uri: Uri = text.parse().map_err(|_| problem())?;
        let authority = uri.authority().ok_or_else(problem)?;
        let bare = uri.path() == "/" && uri.query().is_none();
        if uri.scheme_str() != Some("http") || !bare {
            return Err(problem());
        }
        let (user, password, address) = match authority.as_str().rsplit_once('@') {
            Some((pair, address)) => {
                let (user, password) = credentials(pair)?;
                (user, password, address.parse().map_err(|_| problem())?)
            }
            None => (None, None, authority.clone()),
        };
        if !is_address(&address) {
            return Err(problem());
        }
        Ok(Self {
            host: normalize_host(authority.host()),
            port: authority.port_u16().filter(|port| *port != 0).ok_or_else(problem)?,
            user,
            password,
        })
    }

    /// `host:port`, without the credentials.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// `http://host:port`, without the credentials: as FlareSolverr takes it
    /// beside `username` and `password`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.authority())
    }
}

fn problem() -> String {
    "expected http://host:port or http://user:password@host:port, credentials percent-encoded"
        .to_owned()
}

/// User and password of `user[:password]`, percent-decoded.
fn credentials(pair: &str) -> Result<(Option<Secret>, Option<Secret>), String> {
    let decode = |text: &str| {
        if has_broken_escape(text) {
            return Err(problem());
        }
        let decoded = percent_decode_str(text).decode_utf8().map_err(|_| problem())?;
        Ok::<_, String>(Secret::new(decoded))
    };
    let (user, password) = pair.split_once(':').map_or((pair, None), |(u, p)| (u, Some(p)));
    let user = decode(user)?;
    // RFC 7617 §2: Basic credentials end the user's name at the first colon.
    if user.expose().contains(':') {
        return Err("the user's name must not hold a colon".to_owned());
    }
    Ok((Some(user), password.map(decode).transpose()?))
}

/// Whether a `%` lacks its two digits; decoding would leave it as it is.
fn has_broken_escape(text: &str) -> bool {
    let is_whole = |rest: &str| {
        let digits = rest.bytes().take(2).filter(u8::is_ascii_hexdigit);
        digits.count() == 2
    };
    !text.split('%').skip(1).all(is_whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, authority: &str, user: Option<&str>, password: Option<&str>) {
        let parent = ParentProxy::parse(text).unwrap();
        assert_eq!(parent.authority(), authority, "{text}");
        assert_eq!(parent.user.as_ref().map(Secret::expose), user, "{text}");
        assert_eq!(parent.password.as_ref().map(Secret::expose), password, "{text}");
    }

    #[test]
    fn credentials_are_decoded_and_may_be_missing() {
        check("http://Squid.test:3128", "squid.test:3128", None, None);
        check("http://[::1]:3128/", "[::1]:3128", None, None);
        check("http://u%40x:p%3A%2F%20@10.0.0.1:1", "10.0.0.1:1", Some("u@x"), Some("p:/ "));
        check("http://u@squid:1", "squid:1", Some("u"), None);
        check("http://u:@squid:1", "squid:1", Some("u"), Some(""));
    }

    #[test]
    fn what_is_no_such_url_is_an_error_that_does_not_show_it() {
        for text in [
            "squid:3128",
            "http://squid",
            "https://u:hunter2@squid:3128",
            "socks5://u:hunter2@squid:1080",
            "http://u:hunter2@squid:3128/path",
            "http://u:hunter2@squid:3128?q",
            "http://u:hunter2#@squid:3128",
            "http://u%3Ax:hunter2@squid:3128",
            "http://%ff:hunter2@squid:3128",
            "http://u:hunter2%ZZ@squid:3128",
            "http://u:hunter2%4@squid:3128",
            "http://u%%40:hunter2@squid:3128",
            "http://u:hunter2@squid:0",
            "http://u:hunter2@squid:65536",
            "http://u:hunter2@squid:1[::1]:2",
        ] {
            let error = ParentProxy::parse(text).unwrap_err();
            assert!(!error.contains("hunter2") && !error.contains("squid"), "{text}: {error}");
        }
    }
}
