//! What a client brings to prove who it is: its own tokens, and the proxy's
//! password.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::header::{AUTHORIZATION, COOKIE, HeaderMap, HeaderName, HeaderValue};
use sha2::{Digest, Sha256};

use crate::config::Secret;
use crate::token::{Timestamp, Token};

/// Whether the client comes with a live personal token of its own, in
/// `Authorization` or, without that field, in its cookie.
pub(super) fn has_personal_token(headers: &HeaderMap, cookies: &[String], now: Timestamp) -> bool {
    let is_personal = |token: Token| token.is_personal() && token.is_live(now);
    let mut fields = headers.get_all(AUTHORIZATION).iter().peekable();
    if fields.peek().is_some() {
        return fields.filter_map(read_token).any(is_personal);
    }
    let mut values = headers.get_all(COOKIE).iter();
    values.any(|value| {
        token_cookies(value, cookies).filter_map(|pair| read(pair.value)).any(is_personal)
    })
}

/// Whether one of the client's cookies is a token's.
pub(super) fn has_token_cookie(headers: &HeaderMap, cookies: &[String]) -> bool {
    let mut values = headers.get_all(COOKIE).iter();
    values.any(|value| token_cookies(value, cookies).next().is_some())
}

/// The `Cookie` value with `token` in place of each token's cookie, but for
/// personal ones with `keep_personal`; `None` where nothing changes. All other
/// bytes stay.
pub(super) fn replace_in_cookies(
    value: &HeaderValue,
    cookies: &[String],
    token: &Token,
    keep_personal: bool,
) -> Option<HeaderValue> {
    let bytes = value.as_bytes();
    let mut replaced = Vec::with_capacity(bytes.len());
    let mut copied = 0;
    for pair in token_cookies(value, cookies) {
        if keep_personal && read(pair.value).is_some_and(|own| own.is_personal()) {
            continue;
        }
        replaced.extend_from_slice(&bytes[copied..pair.start]);
        replaced.extend_from_slice(token.cookie_value().as_bytes());
        copied = pair.start + pair.value.len();
    }
    if copied == 0 {
        return None;
    }
    replaced.extend_from_slice(&bytes[copied..]);
    let mut replaced = HeaderValue::from_bytes(&replaced).ok()?;
    replaced.set_sensitive(true);
    Some(replaced)
}

/// Whether `field` of `headers` holds the Basic credentials `expected`
/// (`user:password`). Takes the same time for any wrong answer of one length.
pub(super) fn presents(headers: &HeaderMap, field: &HeaderName, expected: &Secret) -> bool {
    headers.get_all(field).iter().any(|value| is_basic(value, expected))
}

/// `headers` without the `Authorization` fields that hold `expected`: they
/// were for this proxy.
pub(super) fn without_basic(headers: &HeaderMap, expected: &Secret) -> HeaderMap {
    let ours = |name: &HeaderName, value| name == AUTHORIZATION && is_basic(value, expected);
    let theirs = headers.iter().filter(|(name, value)| !ours(name, value));
    theirs.map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn is_basic(value: &HeaderValue, expected: &Secret) -> bool {
    let given = value.to_str().ok();
    let given = given.and_then(|text| text.split_once(' '));
    let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("basic"));
    let given = given.and_then(|(_, pair)| BASE64_STANDARD.decode(pair.trim()).ok());
    // Digests differ everywhere at once, so where they differ tells nothing.
    given.is_some_and(|pair| Sha256::digest(pair) == Sha256::digest(expected.expose()))
}

struct TokenCookie<'a> {
    start: usize,
    value: &'a [u8],
}

/// The pairs of a `Cookie` value whose name is that of a token's cookie.
fn token_cookies<'a>(
    value: &'a HeaderValue,
    names: &'a [String],
) -> impl Iterator<Item = TokenCookie<'a>> {
    let bytes = value.as_bytes();
    bytes.split(|byte| *byte == b';').filter_map(move |pair| {
        let equals = pair.iter().position(|byte| *byte == b'=')?;
        let name = pair[..equals].trim_ascii();
        names.iter().any(|known| known.as_bytes() == name).then(|| {
            let value = &pair[equals + 1..];
            TokenCookie { start: value.as_ptr().addr() - bytes.as_ptr().addr(), value }
        })
    })
}

fn read_token(value: &HeaderValue) -> Option<Token> {
    read(value.as_bytes())
}

fn read(value: &[u8]) -> Option<Token> {
    Token::parse(std::str::from_utf8(value).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        // {"alg":"none"} . {"exp":9999999999,"type":10} . x
        Token::parse("eyJhbGciOiJub25lIn0.eyJleHAiOjk5OTk5OTk5OTksInR5cGUiOjEwfQ.eA").unwrap()
    }

    #[test]
    fn only_the_tokens_cookie_is_replaced() {
        let names = ["access-token".to_owned()];
        let check = |from: &'static str, to: Option<String>| {
            let replaced =
                replace_in_cookies(&HeaderValue::from_static(from), &names, &token(), true);
            assert_eq!(replaced.map(|value| value.to_str().unwrap().to_owned()), to, "{from}");
        };
        let ours = token().cookie_value().to_owned();
        check("a=1; access-token=old; b=2", Some(format!("a=1; access-token={ours}; b=2")));
        check("access-token=", Some(format!("access-token={ours}")));
        check(
            "access-token=a;access-token=b",
            Some(format!("access-token={ours};access-token={ours}")),
        );
        check("my-access-token=1; x", None);
    }

    #[test]
    fn basic_credentials_must_match_whole() {
        let expected = Secret::new("user:pass:word");
        let check = |value: &str, right: bool| {
            let headers =
                [(AUTHORIZATION, HeaderValue::from_str(value).unwrap())].into_iter().collect();
            assert_eq!(presents(&headers, &AUTHORIZATION, &expected), right, "{value}");
        };
        check("Basic dXNlcjpwYXNzOndvcmQ=", true);
        check("basic dXNlcjpwYXNzOndvcmQ=", true);
        check("Basic dXNlcjpwYXNz", false);
        check("Bearer dXNlcjpwYXNzOndvcmQ=", false);
        check("Basic", false);
    }
}
