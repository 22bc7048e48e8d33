//! The gate: refuses what hyper lets through and no proxy may forward.
//!
//! hyper itself refuses obsolete line folding, space before a colon, NUL and
//! bare CR, and a bad or differing `Content-Length`. What it hides from its
//! service, `head` sees.

use http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::request::Parts;
use http::uri::Authority;
use http::{Method, Version};

use super::error::ProxyError;
use crate::config::is_address;

/// Fields in the head of a request. hyper takes no more by itself, and `head` sees that it
/// gets no more.
pub(super) const MAX_FIELDS: usize = 100;

/// Bytes of a head: its target and all its fields.
pub(super) const MAX_HEAD: usize = 64 * 1024;

/// Bytes of a target.
const MAX_TARGET: usize = 32 * 1024;

/// Passes a request that is safe to forward.
///
/// # Errors
///
/// [`ProxyError::BadRequest`], [`ProxyError::UnknownCoding`],
/// [`ProxyError::HeaderTooLarge`] or [`ProxyError::TargetTooLong`].
pub(super) fn check(parts: &Parts) -> Result<(), ProxyError> {
    check_size(parts)?;
    check_framing(parts)?;
    check_target(parts)?;
    check_host(parts)
}

fn check_size(parts: &Parts) -> Result<(), ProxyError> {
    let target = parts.uri.path().len() + parts.uri.query().map_or(0, str::len);
    if target > MAX_TARGET {
        return Err(ProxyError::TargetTooLong { limit: MAX_TARGET });
    }
    let fields: usize =
        parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if parts.headers.len() > MAX_FIELDS || target + fields > MAX_HEAD {
        return Err(ProxyError::HeaderTooLarge { fields: MAX_FIELDS, bytes: MAX_HEAD });
    }
    Ok(())
}

/// RFC 9112 §6.1 and §6.3: one way to tell the body's length, and only one.
fn check_framing(parts: &Parts) -> Result<(), ProxyError> {
    let mut codings = parts.headers.get_all(TRANSFER_ENCODING).iter();
    let Some(coding) = codings.next() else {
        return Ok(());
    };
    if parts.headers.contains_key(CONTENT_LENGTH) {
        return Err(ProxyError::BadRequest(
            "Content-Length and Transfer-Encoding exclude each other",
        ));
    }
    if parts.version != Version::HTTP_11 {
        return Err(ProxyError::BadRequest("Transfer-Encoding needs HTTP/1.1"));
    }
    let coding = coding.as_bytes().to_ascii_lowercase();
    if codings.next().is_some() || coding.split(|byte| *byte == b',').count() > 1 {
        let repeated = parts.headers.get_all(TRANSFER_ENCODING).iter().all(|value| {
            value
                .as_bytes()
                .split(|byte| *byte == b',')
                .all(|one| one.trim_ascii().eq_ignore_ascii_case(b"chunked"))
        });
        return Err(if repeated {
            ProxyError::BadRequest("the chunked coding is applied twice")
        } else {
            ProxyError::UnknownCoding
        });
    }
    if coding != b"chunked" {
        return Err(ProxyError::UnknownCoding);
    }
    Ok(())
}

/// The forms of RFC 9112 §3.2, each with its methods.
fn check_target(parts: &Parts) -> Result<(), ProxyError> {
    let uri = &parts.uri;
    let is_plain = uri.authority().is_some_and(|authority| is_plain(authority.as_str().as_bytes()));
    let is_http = matches!(uri.scheme_str(), Some("http" | "https"));
    if is_plain && is_http && parts.method != Method::CONNECT {
        return Ok(());
    }
    let has_userinfo = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
    if has_userinfo {
        return Err(ProxyError::BadRequest("the target holds credentials"));
    }
    match (uri.scheme_str(), uri.authority()) {
        (None, Some(authority)) if parts.method == Method::CONNECT => check_connect(authority),
        _ if parts.method == Method::CONNECT => {
            Err(ProxyError::BadRequest("CONNECT takes host:port as its target"))
        }
        (None, Some(_)) => {
            Err(ProxyError::BadRequest("only CONNECT takes host:port as its target"))
        }
        (None, None) if uri.path() == "*" && parts.method != Method::OPTIONS => {
            Err(ProxyError::BadRequest("only OPTIONS takes * as its target"))
        }
        (None, None) => Ok(()),
        (Some("http" | "https"), Some(authority)) if is_address(authority) => check_port(authority),
        _ => Err(ProxyError::BadRequest("the target is neither an http nor an https URL")),
    }
}

fn check_connect(authority: &Authority) -> Result<(), ProxyError> {
    if !is_address(authority) || authority.port_u16().is_none_or(|port| port == 0) {
        return Err(ProxyError::BadRequest("CONNECT takes host:port as its target"));
    }
    Ok(())
}

fn check_port(authority: &Authority) -> Result<(), ProxyError> {
    let written = authority.as_str().len() > authority.host().len();
    if written && authority.port_u16().is_none_or(|port| port == 0) {
        return Err(ProxyError::BadRequest("the target's port is no port"));
    }
    Ok(())
}

/// RFC 9112 §3.2: one `Host` in HTTP/1.1, at most one before it. CONNECT's is
/// not looked at.
fn check_host(parts: &Parts) -> Result<(), ProxyError> {
    if parts.method == Method::CONNECT {
        return Ok(());
    }
    let mut hosts = parts.headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (_, Some(_)) => Err(ProxyError::BadRequest("there is more than one Host field")),
        (None, None) if parts.version == Version::HTTP_11 => {
            Err(ProxyError::BadRequest("the Host field is missing"))
        }
        (Some(host), None) if !is_host(host.as_bytes()) => {
            Err(ProxyError::BadRequest("the Host field is not a host"))
        }
        _ => Ok(()),
    }
}

fn is_host(value: &[u8]) -> bool {
    let is_clean = |host: Authority| {
        !host.as_str().contains('@') && is_address(&host) && check_port(&host).is_ok()
    };
    value.is_empty() || is_plain(value) || Authority::try_from(value).is_ok_and(is_clean)
}

/// Whether this is a host as nearly all are, a name or an IPv4 address with or
/// without a port: what is not may still be a host, at more cost.
fn is_plain(authority: &[u8]) -> bool {
    let (host, port) = match memchr::memchr(b':', authority) {
        Some(colon) => (&authority[..colon], Some(&authority[colon + 1..])),
        None => (authority, None),
    };
    let is_port = |port: &[u8]| {
        let number = || port.iter().fold(0, |sum, digit| 10 * sum + u32::from(digit - b'0'));
        let is_number = port.iter().all(u8::is_ascii_digit) && port.len() <= 5;
        is_number && (1..=u32::from(u16::MAX)).contains(&number())
    };
    host.first().is_some_and(u8::is_ascii_alphanumeric)
        && host.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'))
        && port.is_none_or(is_port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn check_one(request: http::request::Builder, status: u16) {
        let shown = format!("{request:?}");
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let got =
            check(&parts).map_or_else(|error| error.into_response().status().as_u16(), |()| 200);
        assert_eq!(got, status, "{shown}");
    }

    #[test]
    fn targets_must_fit_their_method() {
        let with_host = |builder: http::request::Builder| builder.header(HOST, "h");
        check_one(with_host(Request::get("/x")), 200);
        check_one(with_host(Request::get("http://h/x")), 200);
        check_one(with_host(Request::options("*")), 200);
        check_one(with_host(Request::get("*")), 400);
        check_one(with_host(Request::get("ftp://h/x")), 400);
        check_one(with_host(Request::get("http://user@h/x")), 400);
        check_one(with_host(Request::get("h:80")), 400);
        check_one(with_host(Request::get("http://h:0/")), 400);
        check_one(Request::connect("h:443").version(Version::HTTP_10), 200);
        check_one(Request::connect("h:443"), 200);
        check_one(Request::connect("h"), 400);
        check_one(Request::connect("http://h/"), 400);
    }

    #[test]
    fn there_is_one_host_and_it_is_one() {
        check_one(Request::get("/"), 400);
        check_one(Request::get("/").version(Version::HTTP_10), 200);
        check_one(Request::get("/").header(HOST, "a").header(HOST, "a"), 400);
        check_one(Request::get("/").header(HOST, "a b"), 400);
        check_one(Request::get("/").header(HOST, "u@a"), 400);
        check_one(Request::get("/").header(HOST, "[::1]:80"), 200);
        check_one(Request::get("/").header(HOST, "a:99999"), 400);
    }

    #[test]
    fn an_address_is_a_host_and_a_port_and_nothing_else() {
        for good in ["h:1", "[::1]:1", "a_b.test.:65535", "1.2.3.4:080"] {
            check_one(Request::connect(good), 200);
            check_one(Request::get(format!("http://{good}/")).header(HOST, good), 200);
        }
        for bad in [
            "a:1[::1]:2",
            "a[::1]:2",
            ",[::1]:2",
            "[::1]x:2",
            "[a]:2",
            "[]:2",
            "[::1%25eth0]:2",
            "h:+2",
            "h:65536",
            "h:-2",
            ".:2",
        ] {
            // What `http` itself refuses never comes here.
            if bad.parse::<Authority>().is_ok() {
                check_one(Request::connect(bad), 400);
                check_one(Request::get(format!("http://{bad}/")).header(HOST, "h"), 400);
            }
            check_one(Request::get("/").header(HOST, bad), 400);
        }
    }

    #[test]
    fn bodies_have_one_length() {
        let coded =
            |coding: &str| Request::post("/").header(HOST, "h").header(TRANSFER_ENCODING, coding);
        check_one(coded("chunked"), 200);
        check_one(coded("Chunked"), 200);
        check_one(coded("gzip, chunked"), 501);
        check_one(coded("identity"), 501);
        check_one(coded("chunked, chunked"), 400);
        check_one(coded("chunked").header(TRANSFER_ENCODING, "chunked"), 400);
        check_one(coded("chunked").header(CONTENT_LENGTH, "3"), 400);
        check_one(coded("chunked").version(Version::HTTP_10), 400);
    }

    #[test]
    fn heads_have_a_size() {
        let with_host = || Request::get("/").header(HOST, "h");
        let many = |count| {
            (0..count).fold(with_host(), |request, i| request.header(format!("x-{i}"), "1"))
        };
        check_one(many(99), 200);
        check_one(many(100), 431);
        check_one(with_host().header("x", "y".repeat(64 * 1024)), 431);
        let target = |length: usize| format!("/{}", "x".repeat(length - 1));
        check_one(Request::get(target(MAX_TARGET)).header(HOST, "h"), 200);
        check_one(Request::get(target(MAX_TARGET + 1)).header(HOST, "h"), 414);
        let long = Request::get(target(MAX_TARGET)).header(HOST, "h");
        check_one(long.header("x", "y".repeat(40_000)), 431);
    }
}
