//! What a client brings to prove who it is: its own tokens, and the proxy's
//! password.

use std::cell::RefCell;
use std::collections::HashMap;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::header::{AUTHORIZATION, COOKIE, HeaderMap, HeaderName, HeaderValue};

use crate::config::Secret;
use crate::token::{Clearance, Timestamp, Token};

/// Clients' tokens that one worker remembers.
const MOST_REMEMBERED: usize = 128;

/// Bytes of a value that may be remembered. The shop's tokens have about 300.
const LONGEST_REMEMBERED: usize = 1024;

thread_local! {
    /// Clients' tokens, by the values in which they came.
    static REMEMBERED: RefCell<HashMap<Box<[u8]>, Token>> = RefCell::default();
}

/// What the client's own tokens amount to, the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum OwnToken {
    /// None that has expired, and none that is worth more.
    Absent,
    /// At best one that has expired.
    Expired { personal: bool },
    /// A live anonymous one.
    Anonymous,
    /// A live personal one.
    Personal,
}

impl OwnToken {
    /// Reads the client's tokens in `Authorization` or, without that field, in
    /// its cookie; the best one counts.
    pub(super) fn of(headers: &HeaderMap, cookies: &[String], now: Timestamp) -> Self {
        let judge = |token: Token| Self::judge(&token, now);
        let mut fields = headers.get_all(AUTHORIZATION).iter().peekable();
        let best = if fields.peek().is_some() {
            fields.filter_map(read_token).map(judge).max()
        } else {
            let values = headers.get_all(COOKIE).iter();
            let pairs = values.flat_map(|value| token_cookies(value, cookies));
            pairs.filter_map(|pair| read(pair.value)).map(judge).max()
        };
        best.unwrap_or(Self::Absent)
    }

    fn judge(token: &Token, now: Timestamp) -> Self {
        match (token.is_live(now), token.is_personal()) {
            (false, personal) => Self::Expired { personal },
            (true, false) => Self::Anonymous,
            (true, true) => Self::Personal,
        }
    }
}

/// Whether one of the client's cookies is a token's.
pub(super) fn has_token_cookie(headers: &HeaderMap, cookies: &[String]) -> bool {
    let mut values = headers.get_all(COOKIE).iter();
    values.any(|value| token_cookies(value, cookies).next().is_some())
}

/// Which of the client's cookies hold a token of its own.
#[derive(Clone, Copy)]
pub(super) struct OwnCookies<'a> {
    /// Names of the token's cookie.
    pub(super) names: &'a [String],
    /// When a personal token has to live for it to stay; `None`: none stays.
    pub(super) keep_personal_at: Option<Timestamp>,
}

impl OwnCookies<'_> {
    fn keeps(&self, value: &[u8]) -> bool {
        self.keep_personal_at.is_some_and(|now| {
            read(value).is_some_and(|token| OwnToken::judge(&token, now) == OwnToken::Personal)
        })
    }
}

/// The `Cookie` value with `token` in place of each token's cookie that is not
/// kept; `None` where nothing changes. All other bytes stay.
pub(super) fn replace_in_cookies(
    value: &HeaderValue,
    own: OwnCookies<'_>,
    token: &Token,
) -> Option<HeaderValue> {
    let bytes = value.as_bytes();
    let mut replaced = Vec::with_capacity(bytes.len());
    let mut copied = 0;
    for pair in token_cookies(value, own.names) {
        if own.keeps(pair.value) {
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

/// One `Cookie` value with the client's cookies, and those of the clearance in
/// place of its own of the same names, but for a token that is kept.
pub(super) fn cleared_cookies(
    headers: &HeaderMap,
    own: OwnCookies<'_>,
    clearance: &Clearance,
) -> Option<HeaderValue> {
    let mut ours: Vec<(&str, String)> = clearance.pairs().collect();
    let mut pairs: Vec<&[u8]> = Vec::new();
    let values = headers.get_all(COOKIE).iter();
    for pair in values.flat_map(|value| value.as_bytes().split(|byte| *byte == b';')) {
        let pair = pair.trim_ascii();
        let (name, value) = split_pair(pair).unwrap_or((pair, b""));
        let is_tokens = own.names.iter().any(|known| known.as_bytes() == name);
        if is_tokens && own.keeps(value) {
            ours.retain(|(ours, _)| ours.as_bytes() != name);
        } else if ours.iter().any(|(ours, _)| ours.as_bytes() == name) {
            continue;
        }
        pairs.push(pair);
    }
    pairs.extend(ours.iter().map(|(_, pair)| pair.as_bytes()));
    pairs.retain(|pair| !pair.is_empty());
    let mut value = HeaderValue::from_bytes(&pairs.join(&b"; "[..])).ok()?;
    value.set_sensitive(true);
    (!value.is_empty()).then_some(value)
}

/// Name and value of a cookie.
fn split_pair(pair: &[u8]) -> Option<(&[u8], &[u8])> {
    let equals = pair.iter().position(|byte| *byte == b'=')?;
    Some((pair[..equals].trim_ascii(), &pair[equals + 1..]))
}

/// Whether `field` of `headers` holds the Basic credentials `expected`
/// (`user:password`).
pub(super) fn presents(headers: &HeaderMap, field: &HeaderName, expected: &Secret) -> bool {
    headers.get_all(field).iter().any(|value| is_basic(value, expected))
}

/// Whether `field` of `headers` holds Basic credentials, right or wrong.
pub(super) fn presents_any(headers: &HeaderMap, field: &HeaderName) -> bool {
    headers.get_all(field).iter().any(|value| basic(value).is_some())
}

/// `headers` without the `Authorization` fields that hold `expected`: they
/// were for this proxy.
pub(super) fn without_basic(headers: &HeaderMap, expected: &Secret) -> HeaderMap {
    let ours = |name: &HeaderName, value| name == AUTHORIZATION && is_basic(value, expected);
    let theirs = headers.iter().filter(|(name, value)| !ours(name, value));
    theirs.map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn is_basic(value: &HeaderValue, expected: &Secret) -> bool {
    let given = basic(value).and_then(|pair| BASE64_STANDARD.decode(pair.trim()).ok());
    given.is_some_and(|pair| expected.is(&pair))
}

/// What stands behind the scheme, where that is Basic.
fn basic(value: &HeaderValue) -> Option<&str> {
    let (scheme, pair) = value.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("basic").then_some(pair)
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
        let (name, value) = split_pair(pair)?;
        names
            .iter()
            .any(|known| known.as_bytes() == name)
            .then(|| TokenCookie { start: value.as_ptr().addr() - bytes.as_ptr().addr(), value })
    })
}

fn read_token(value: &HeaderValue) -> Option<Token> {
    read(value.as_bytes())
}

/// The token in `value`. Parsers bring the same one with each request, and to
/// read it costs as much as half of all else: each worker remembers some.
fn read(value: &[u8]) -> Option<Token> {
    // Where there is a sidecar, many bring a word in its place. A JWT has dots, or
    // what stands for them.
    memchr::memchr2(b'.', b'%', value)?;
    if let Some(known) = REMEMBERED.with_borrow(|remembered| remembered.get(value).cloned()) {
        return Some(known);
    }
    let token = Token::parse(std::str::from_utf8(value).ok()?).ok()?;
    if value.len() <= LONGEST_REMEMBERED {
        REMEMBERED.with_borrow_mut(|remembered| {
            if remembered.len() >= MOST_REMEMBERED {
                let any = remembered.keys().next().cloned();
                any.and_then(|any| remembered.remove(&any));
            }
            remembered.insert(value.into(), token.clone());
        });
    }
    Some(token)
}

#[cfg(test)]
mod tests {
    use base64::prelude::BASE64_URL_SAFE_NO_PAD;

    use super::*;

    fn token() -> Token {
        // {"alg":"none"} . {"exp":9999999999,"type":10} . x
        Token::parse("eyJhbGciOiJub25lIn0.eyJleHAiOjk5OTk5OTk5OTksInR5cGUiOjEwfQ.eA").unwrap()
    }

    #[test]
    fn best_of_the_clients_own_tokens_counts() {
        let jwt = |claims: &str| format!("e30.{}.eA", BASE64_URL_SAFE_NO_PAD.encode(claims));
        let [old, live] = [900, 1100].map(|exp| jwt(&format!(r#"{{"exp":{exp},"type":10}}"#)));
        let [old_login, login] =
            [900, 1100].map(|exp| jwt(&format!(r#"{{"exp":{exp},"type":20}}"#)));
        let check = |fields: &[(HeaderName, String)], expected| {
            let value = |value: &String| HeaderValue::from_str(value).unwrap();
            let headers = fields.iter().map(|(name, text)| (name.clone(), value(text))).collect();
            let names = ["a".to_owned(), "b".to_owned()];
            assert_eq!(OwnToken::of(&headers, &names, Timestamp(1000)), expected, "{fields:?}");
        };
        let in_field = |token: &str| (AUTHORIZATION, format!("Bearer {token}"));
        let expired = |personal| OwnToken::Expired { personal };
        check(&[], OwnToken::Absent);
        check(&[in_field("x")], OwnToken::Absent);
        check(&[in_field(&login.replace('.', "%2E"))], OwnToken::Personal);
        check(&[in_field(&login.replace('.', "%252e"))], OwnToken::Personal);
        check(&[in_field(&old)], expired(false));
        check(&[in_field(&old_login)], expired(true));
        check(&[in_field(&live)], OwnToken::Anonymous);
        check(&[in_field(&old_login), in_field(&login)], OwnToken::Personal);
        check(&[(COOKIE, format!("a={old}"))], expired(false));
        check(&[(COOKIE, format!("a={old}; b={live}"))], OwnToken::Anonymous);
        check(&[in_field("x"), (COOKIE, format!("a={old}"))], OwnToken::Absent);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_stays_right() {
        let jwt = |exp: usize| {
            format!("e30.{}.eA", BASE64_URL_SAFE_NO_PAD.encode(format!(r#"{{"exp":{exp}}}"#)))
        };
        let remembered = || REMEMBERED.with_borrow(HashMap::len);
        for exp in (0..1000).chain(0..1000) {
            let token = read(jwt(exp).as_bytes()).unwrap();
            assert_eq!(token.expires_at(), Some(Timestamp(exp as u64)));
            assert!(read(format!("x{exp}").as_bytes()).is_none());
            assert!((1..=MOST_REMEMBERED).contains(&remembered()));
        }
        assert_eq!(remembered(), MOST_REMEMBERED);
    }

    #[test]
    fn only_the_tokens_cookie_is_replaced() {
        let names = ["access-token".to_owned()];
        let check = |from: &'static str, to: Option<String>| {
            let own = OwnCookies { names: &names, keep_personal_at: Some(Timestamp(0)) };
            let replaced = replace_in_cookies(&HeaderValue::from_static(from), own, &token());
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
