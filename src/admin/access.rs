//! Who may do what: rules over a request's head, without side effects.
//!
//! A browser on the operator's machine is the danger. A page of another site
//! can make it send requests here, and with a rebound DNS name even read the
//! answers. `Host` gives away the one, `Origin` and `Sec-Fetch-Site` the other.

use std::net::{IpAddr, SocketAddr};

use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderName, Uri, Version, header};

use super::error::AdminError;
use crate::config::Secret;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Checks that the request was meant for this port: for any of its addresses,
/// for localhost or for a name that no stranger can register.
pub(super) fn check_host(head: &Parts) -> Result<(), AdminError> {
    if let Some(authority) = head.uri.authority() {
        check_authority(authority)?;
    }
    match host(&head.headers)? {
        Some(authority) => check_authority(&authority),
        // HTTP/1.0 has no such field, and no browser speaks it.
        None if head.version == Version::HTTP_10 => Ok(()),
        None => Err(AdminError::BadHost),
    }
}

/// Checks that `head`, that of a POST, may act.
pub(super) fn check_post(
    head: &Parts,
    peer: SocketAddr,
    admin_token: Option<&Secret>,
) -> Result<(), AdminError> {
    if is_cross_site(&head.headers)? {
        return Err(AdminError::CrossSite);
    }
    match admin_token {
        Some(token) if is_authorized(&head.headers, token) => Ok(()),
        Some(_) => Err(AdminError::Unauthorized),
        None if peer.ip().to_canonical().is_loopback() => Ok(()),
        None => Err(AdminError::NotLoopback),
    }
}

/// The one `Host` field, if there is any.
fn host(headers: &HeaderMap) -> Result<Option<Authority>, AdminError> {
    let mut values = headers.get_all(header::HOST).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let authority: Option<Authority> = value.to_str().ok().and_then(|value| value.parse().ok());
    match authority {
        Some(authority) if values.next().is_none() => Ok(Some(authority)),
        _ => Err(AdminError::BadHost),
    }
}

fn check_authority(authority: &Authority) -> Result<(), AdminError> {
    if authority.as_str().contains('@') {
        return Err(AdminError::BadHost);
    }
    if is_own(authority.host()) { Ok(()) } else { Err(AdminError::ForeignHost) }
}

/// An address cannot be rebound. A name without a dot, `localhost` among them,
/// is resolved by the local network or the container engine.
fn is_own(host: &str) -> bool {
    let name = host.strip_suffix('.').unwrap_or(host);
    is_address(host) || (!name.is_empty() && !name.contains('.'))
}

fn is_address(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    bare.unwrap_or(host).parse::<IpAddr>().is_ok()
}

fn is_cross_site(headers: &HeaderMap) -> Result<bool, AdminError> {
    let own = host(headers)?;
    let foreign_origin = headers
        .get_all(header::ORIGIN)
        .iter()
        .any(|origin| !own.as_ref().is_some_and(|own| is_origin_of(origin.as_bytes(), own)));
    let foreign_fetch =
        headers.get_all(SEC_FETCH_SITE).iter().any(|site| site != "same-origin" && site != "none");
    Ok(foreign_origin || foreign_fetch)
}

/// Whether `origin` is that of a page which came from `host`. `null` is not.
fn is_origin_of(origin: &[u8], host: &Authority) -> bool {
    let origin = Uri::try_from(origin).ok();
    origin.is_some_and(|origin| origin.scheme().is_some() && origin.authority() == Some(host))
}

fn is_authorized(headers: &HeaderMap, admin_token: &Secret) -> bool {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let credentials = values.next().and_then(|value| value.as_bytes().split_first_chunk::<7>());
    let presented = credentials
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "))
        .is_some_and(|(_, token)| admin_token.is(token.trim_ascii()));
    presented && values.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::{check_host, check_post};
    use crate::admin::error::AdminError;
    use crate::config::Secret;
    use http::request::{Builder, Parts};
    use http::{Request, Version};

    fn head(fields: &[(&str, &str)]) -> Parts {
        parts(Request::post("/refresh"), fields)
    }

    fn parts(request: Builder, fields: &[(&str, &str)]) -> Parts {
        let request =
            fields.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        request.body(()).unwrap().into_parts().0
    }

    fn post(fields: &[(&str, &str)], peer: &str, token: Option<&str>) -> Result<(), AdminError> {
        check_post(&head(fields), peer.parse().unwrap(), token.map(Secret::new).as_ref())
    }

    const LOOPBACK: &str = "127.0.0.1:50000";

    #[test]
    fn own_hosts_are_answered() {
        for host in [
            "localhost",
            "LOCALHOST:9090",
            "localhost.",
            "127.0.0.1:9090",
            "127.8.9.1",
            "[::1]:9090",
            "10.1.2.3:9090",
            "8.8.8.8",
            "[2001:db8::1]",
            "token-sidecar:9090",
            "token_sidecar",
        ] {
            assert!(check_host(&head(&[("host", host)])).is_ok(), "{host}");
        }
    }

    #[test]
    fn foreign_hosts_are_refused() {
        for host in [
            "evil.example",
            "evil.example:9090",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil.example.",
            "1.2.3",
            "127.0.0.1.",
        ] {
            let outcome = check_host(&head(&[("host", host)]));
            assert!(matches!(outcome, Err(AdminError::ForeignHost)), "{host}: {outcome:?}");
        }
    }

    #[test]
    fn one_usable_host_is_required() {
        let cases: [&[(&str, &str)]; 5] = [
            &[],
            &[("host", "")],
            &[("host", "user@localhost")],
            &[("host", "a b")],
            &[("host", "localhost"), ("host", "localhost")],
        ];
        for fields in cases {
            let outcome = check_host(&head(fields));
            assert!(matches!(outcome, Err(AdminError::BadHost)), "{fields:?}: {outcome:?}");
        }
        let old = parts(Request::get("/live").version(Version::HTTP_10), &[]);
        assert!(check_host(&old).is_ok(), "HTTP/1.0 has no Host field");
    }

    #[test]
    fn an_absolute_target_counts_as_a_host() {
        let fields = [("host", "localhost")];
        let foreign = parts(Request::get("http://evil.example/status"), &fields);
        assert!(matches!(check_host(&foreign), Err(AdminError::ForeignHost)));
        let own = parts(Request::get("http://localhost/status"), &fields);
        assert!(check_host(&own).is_ok());
    }

    #[test]
    fn a_post_from_another_site_is_refused() {
        let host = ("host", "localhost:9090");
        for field in [
            ("origin", "https://evil.example"),
            ("origin", "http://localhost:3000"),
            ("origin", "http://localhost"),
            ("origin", "null"),
            ("origin", ""),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            let outcome = post(&[host, field], LOOPBACK, None);
            assert!(matches!(outcome, Err(AdminError::CrossSite)), "{field:?}: {outcome:?}");
        }
        let with_token = [host, ("origin", "null"), ("authorization", "Bearer s3cret")];
        assert!(matches!(post(&with_token, LOOPBACK, Some("s3cret")), Err(AdminError::CrossSite)));
    }

    #[test]
    fn a_post_from_the_own_page_or_a_tool_is_taken() {
        let host = ("host", "localhost:9090");
        let page = [host, ("origin", "http://LOCALHOST:9090"), ("sec-fetch-site", "same-origin")];
        assert!(post(&page, LOOPBACK, None).is_ok());
        assert!(post(&[host, ("sec-fetch-site", "none")], LOOPBACK, None).is_ok());
        assert!(post(&[host], LOOPBACK, None).is_ok());
    }

    #[test]
    fn without_an_admin_token_only_loopback_may_post() {
        let host = [("host", "localhost")];
        for peer in ["127.0.0.1:1", "127.1.2.3:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            assert!(post(&host, peer, None).is_ok(), "{peer}");
        }
        for peer in ["10.0.0.1:1", "[fe80::1]:1", "[::ffff:10.0.0.1]:1"] {
            let outcome = post(&host, peer, None);
            assert!(matches!(outcome, Err(AdminError::NotLoopback)), "{peer}: {outcome:?}");
        }
    }

    #[test]
    fn with_an_admin_token_everyone_must_present_it() {
        let host = ("host", "10.0.0.2");
        for right in ["Bearer s3cret", "bearer s3cret", "Bearer  s3cret "] {
            let fields = [host, ("authorization", right)];
            assert!(post(&fields, "10.0.0.1:1", Some("s3cret")).is_ok(), "{right}");
        }
        for wrong in
            ["Bearer s3cre", "Bearer s3crets", "Bearer", "Bearer ", "Basic s3cret", "s3cret"]
        {
            let outcome = post(&[host, ("authorization", wrong)], LOOPBACK, Some("s3cret"));
            assert!(matches!(outcome, Err(AdminError::Unauthorized)), "{wrong}: {outcome:?}");
        }
        assert!(matches!(post(&[host], LOOPBACK, Some("s3cret")), Err(AdminError::Unauthorized)));
        let twice = [host, ("authorization", "Bearer s3cret"), ("authorization", "Bearer x")];
        assert!(matches!(post(&twice, LOOPBACK, Some("s3cret")), Err(AdminError::Unauthorized)));
    }
}
