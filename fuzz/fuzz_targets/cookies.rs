//! The client's `Cookie` field: our token takes the place of each token in it
//! that is not kept, and no other byte changes; with a clearance no name of
//! the clearance comes twice.
#![no_main]

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use http::header::{AUTHORIZATION, COOKIE};
use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use token_sidecar::fuzzing::{brings_personal_token, cleared_cookies, replace_in_cookies};
use token_sidecar::token::{Clearance, Cookies, Timestamp, Token};

const NOW: Timestamp = Timestamp(1_800_000_000);

fn jwt(claims: &str) -> String {
    format!("e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(claims))
}

/// Tokens cannot be guessed, so `@p`, `@e` and `@a` stand for a personal, an
/// expired personal and an anonymous one.
fn with_tokens(data: &[u8]) -> Vec<u8> {
    let mut value = Vec::new();
    let mut bytes = data.iter();
    while let Some(byte) = bytes.next() {
        match (byte, bytes.as_slice().first()) {
            (b'@', Some(b'p')) => value.extend(jwt(r#"{"type":20}"#).bytes()),
            (b'@', Some(b'e')) => value.extend(jwt(r#"{"type":20,"exp":1}"#).bytes()),
            (b'@', Some(b'a')) => value.extend(jwt(r#"{"type":10}"#).bytes()),
            _ => {
                value.push(*byte);
                continue;
            }
        }
        bytes.next();
    }
    value
}

fn pairs(value: &[u8]) -> Vec<&[u8]> {
    value.split(|byte| *byte == b';').collect()
}

fn name_and_value(pair: &[u8]) -> (&[u8], Option<&[u8]>) {
    match pair.iter().position(|byte| *byte == b'=') {
        Some(equals) => (pair[..equals].trim_ascii(), Some(&pair[equals + 1..])),
        None => (pair.trim_ascii(), None),
    }
}

fn is_live_personal(value: &[u8]) -> bool {
    let token = std::str::from_utf8(value).ok().and_then(|text| Token::parse(text).ok());
    token.is_some_and(|token| token.is_personal() && token.is_live(NOW))
}

fn check_replaced(value: &HeaderValue, names: &[String], keep: bool, token: &Token) {
    let new = replace_in_cookies(value, names, keep.then_some(NOW), token);
    if let Some(new) = &new {
        assert!(new.is_sensitive());
    }
    let new = new.as_ref().unwrap_or(value);
    let (old, new) = (pairs(value.as_bytes()), pairs(new.as_bytes()));
    assert_eq!(old.len(), new.len());
    for (old, new) in old.into_iter().zip(new) {
        let (name, value) = name_and_value(old);
        let is_tokens = names.iter().any(|known| known.as_bytes() == name);
        match value {
            Some(value) if is_tokens && !(keep && is_live_personal(value)) => {
                let before = &old[..old.len() - value.len()];
                assert_eq!(new, [before, token.cookie_value().as_bytes()].concat());
            }
            _ => assert_eq!(old, new),
        }
    }
}

fn check_cleared(headers: &HeaderMap, names: &[String], keep: bool, token: &Token) {
    let cookies = Cookies::from_pairs([("cf", "1"), ("__ddg1_", "a b"), ("bad", "x;y")]);
    let clearance = Clearance::new(cookies.with_token("access-token", token), Some("Browser/1"));
    let field = cleared_cookies(headers, names, keep.then_some(NOW), &clearance);
    let field = field.expect("the clearance is never empty");
    let new: Vec<_> = pairs(field.as_bytes()).into_iter().map(<[u8]>::trim_ascii).collect();
    let count = |name: &[u8]| new.iter().filter(|pair| name_and_value(pair).0 == name).count();
    assert_eq!((count(b"cf"), count(b"__ddg1_")), (1, 1));
    assert!(new.contains(&&b"cf=1"[..]) && new.contains(&&b"__ddg1_=a b"[..]));
    let ours = [b"access-token=", token.cookie_value().as_bytes()].concat();
    let mut kept = 0;
    for pair in headers.get_all(COOKIE).iter().flat_map(|value| pairs(value.as_bytes())) {
        let (name, value) = name_and_value(pair);
        let personal = value.is_some_and(is_live_personal);
        match name {
            b"cf" | b"__ddg1_" => {}
            b"access-token" if keep && personal => kept += 1,
            b"access-token" => {}
            _ => assert!(pair.trim_ascii().is_empty() || new.contains(&pair.trim_ascii())),
        }
    }
    assert_eq!(new.contains(&&ours[..]), kept == 0, "{new:?}");
}

fuzz_target!(|data: &[u8]| {
    let Some((flags, data)) = data.split_first() else {
        return;
    };
    let names = ["access-token".to_owned(), "bearer_token".to_owned()];
    let token = Token::parse(&jwt(r#"{"type":10,"sub":"ours"}"#)).expect("a token");
    let keep = flags & 1 == 1;
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n') {
        let Ok(value) = HeaderValue::from_bytes(&with_tokens(line)) else {
            continue;
        };
        check_replaced(&value, &names, keep, &token);
        headers.append(COOKIE, value);
    }
    check_cleared(&headers, &names, keep, &token);
    // Whoever brings a personal token by one way keeps it by the other.
    let in_cookie = brings_personal_token(&headers, &names, NOW);
    let expected =
        headers.get_all(COOKIE).iter().flat_map(|value| pairs(value.as_bytes())).any(|pair| {
            match name_and_value(pair) {
                (b"access-token" | b"bearer_token", Some(value)) => is_live_personal(value),
                _ => false,
            }
        });
    assert_eq!(in_cookie, expected);
    // The field goes before the cookie.
    headers.insert(AUTHORIZATION, token.authorization().clone());
    assert!(!brings_personal_token(&headers, &names, NOW));
});
