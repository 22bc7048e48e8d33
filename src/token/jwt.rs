//! The text forms of a token, and the claims in it.
//!
//! # Invariants
//!
//! - Claims are read, never verified: there is no key to verify them with.
//! - No error carries any part of the text that was read.

use std::{borrow::Cow, time::Duration};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value};
use thiserror::Error;

use super::Timestamp;

/// Longest text that is looked at, in bytes. The shop's tokens have about 300.
pub(super) const MAX_LENGTH: usize = 8 * 1024;

/// How often a text may have been percent-encoded.
const MAX_DECODINGS: usize = 2;

/// Whoever wrote the token, padding and stray last bits do no harm here.
const BASE64URL: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// Why a text is not a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TokenError {
    /// Nothing but white space, quotes or the word `Bearer`.
    #[error("the token is empty")]
    Empty,
    /// The text exceeds 8 KiB.
    #[error("the token is longer than {MAX_LENGTH} bytes")]
    TooLong,
    /// Not three parts of base64url with dots between them.
    #[error("the token is not a JWT (three base64url parts with dots between them)")]
    NotJwt,
    /// The middle part is not base64url of a JSON object.
    #[error("the token's claims are not a JSON object")]
    Claims,
}

/// The claims that matter here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Claims {
    pub(super) issued_at: Option<Timestamp>,
    pub(super) expires_at: Option<Timestamp>,
    pub(super) kind: Option<u64>,
}

impl Claims {
    /// Reads the claims of a bare JWT.
    pub(super) fn read(bare: &str) -> Result<Self, TokenError> {
        let claims = payload(bare)?;
        Ok(Self {
            issued_at: number(&claims, "iat").map(Timestamp),
            expires_at: number(&claims, "exp").map(Timestamp),
            kind: number(&claims, "type"),
        })
    }
}

/// The bare JWT in `text`, without the decoration that cookies, headers and
/// env files put around it.
pub(super) fn bare(text: &str) -> Result<Cow<'_, str>, TokenError> {
    if text.len() > MAX_LENGTH {
        return Err(TokenError::TooLong);
    }
    let bare = match percent_decoded(text)? {
        Cow::Borrowed(decoded) => Cow::Borrowed(undecorated(decoded)),
        Cow::Owned(decoded) => Cow::Owned(undecorated(&decoded).to_owned()),
    };
    if bare.is_empty() {
        return Err(TokenError::Empty);
    }
    Ok(bare)
}

/// A JWT has no `%` in it, so decoding cannot spoil one.
fn percent_decoded(text: &str) -> Result<Cow<'_, str>, TokenError> {
    let mut text = Cow::Borrowed(text);
    for _ in 0..MAX_DECODINGS {
        if !text.contains('%') {
            break;
        }
        let decoded = percent_decode_str(&text).decode_utf8();
        text = Cow::Owned(decoded.map_err(|_| TokenError::NotJwt)?.into_owned());
    }
    Ok(text)
}

fn undecorated(text: &str) -> &str {
    let mut rest = match text.split_once(';') {
        Some((value, _attributes)) => unquoted(value),
        None => unquoted(text),
    };
    while let Some(value) = without_scheme(rest) {
        rest = unquoted(value);
    }
    rest
}

fn unquoted(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || matches!(c, '"' | '\''))
}

/// What follows the word `Bearer`, even glued to it: no JWT starts like that.
/// `None` where the text does not start with the word.
fn without_scheme(text: &str) -> Option<&str> {
    const SCHEME: &str = "bearer";
    let (word, rest) = text.split_at_checked(SCHEME.len())?;
    let scheme = word.eq_ignore_ascii_case(SCHEME);
    scheme.then(|| rest.trim_start_matches('+'))
}

fn payload(bare: &str) -> Result<Map<String, Value>, TokenError> {
    let mut parts = bare.split('.');
    let (Some(header), Some(payload), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(TokenError::NotJwt);
    };
    if ![header, payload, signature].into_iter().all(is_base64url) {
        return Err(TokenError::NotJwt);
    }
    let json = BASE64URL.decode(payload).map_err(|_| TokenError::Claims)?;
    serde_json::from_slice(&json).map_err(|_| TokenError::Claims)
}

fn is_base64url(part: &str) -> bool {
    let digits = part.trim_end_matches('=');
    let digit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    !digits.is_empty() && digits.bytes().all(digit)
}

/// A whole number, written as an integer, a fraction or a string of either.
fn number(claims: &Map<String, Value>, name: &str) -> Option<u64> {
    let value = claims.get(name)?;
    if let Some(whole) = value.as_u64() {
        return Some(whole);
    }
    let text = value.as_str().map(str::trim);
    if let Some(whole) = text.and_then(|text| text.parse().ok()) {
        return Some(whole);
    }
    let fraction = value.as_f64().or_else(|| text?.parse().ok())?;
    // What lies before the epoch is as much past as the epoch itself.
    let seconds = Duration::try_from_secs_f64(fraction.max(0.0)).ok()?;
    fraction.is_finite().then_some(seconds.as_secs())
}
