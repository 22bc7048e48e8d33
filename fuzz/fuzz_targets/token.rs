//! A token out of any text: what is read is a bare JWT, and each of its own
//! forms reads back as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use token_sidecar::token::{Timestamp, Token};

fuzz_target!(|text: &str| {
    let Ok(token) = Token::parse(text) else {
        return;
    };
    let bare = token.expose();
    assert_eq!(bare.split('.').count(), 3);
    let is_digit = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '=' | '.');
    assert!(bare.chars().all(is_digit), "{bare:?}");
    assert!(!bare.to_ascii_lowercase().starts_with("bearer"));
    assert!(bare.len() <= text.len());
    let authorization = token.authorization();
    assert!(authorization.is_sensitive());
    let authorization = authorization.to_str().expect("ASCII");
    assert_eq!(authorization, format!("Bearer {bare}"));
    assert_eq!(token.cookie_value(), format!("Bearer%20{bare}"));
    for form in [
        bare.to_owned(),
        authorization.to_owned(),
        token.cookie_value().to_owned(),
        format!("\"{}\"", token.cookie_value()),
        format!("{authorization}; path=/"),
    ] {
        // At the very limit of length, the decoration is too much.
        let again = Token::parse(&form);
        assert!(again.as_ref() == Ok(&token) || form.len() > 8 * 1024, "{form}: {again:?}");
    }
    // What is shown is not the token.
    let shown = format!("{token:?} {}", token.fingerprint());
    assert!(bare.len() < 9 || !shown.contains(bare));
    if let Some(end) = token.expires_at() {
        assert!(!token.is_live(end));
        assert!(end.0 == 0 || token.is_live(Timestamp(end.0 - 1)));
    }
});
