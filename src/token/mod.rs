//! What a token is, and where it rests: in memory, in Redis, in an env file.
//!
//! # Invariants
//!
//! - A [`Token`] is a well-formed bare JWT and fits into a header field.
//! - Neither a token nor a cookie's value shows in a `Debug` or `Display` form;
//!   a token shows as its [`Fingerprint`].

mod cache;
mod clearance;
mod clock;
pub(crate) mod env_file;
mod error;
mod jwt;
pub(crate) mod redis;

use std::{fmt, sync::Arc};

use http::HeaderValue;
use sha2::{Digest as _, Sha256};

pub use cache::{Candidate, Generation, Published, TokenCache};
pub use clearance::Clearance;
pub use clock::{Clock, Timestamp};
pub use env_file::EnvFile;
pub use error::{RedisTrouble, StoreError};
pub use jwt::TokenError;
pub use redis::{
    Commit, Denials, Entrance, LEASE, Lack, Lease, Owner, RedisFacts, RedisStore, Request,
    SharedBackoff, Standing, Stored, ValueId, Wish,
};

use jwt::Claims;

/// What precedes the JWT in the shop's cookie.
const COOKIE_PREFIX: &str = "Bearer%20";

/// The `type` claim of a logged-in visitor's token.
const PERSONAL: u64 = 20;

/// A bare JWT with what its claims say. The signature is never verified: there
/// is no key. Cheap to clone. Its `Debug` form is the fingerprint.
#[derive(Clone)]
pub struct Token(Arc<Parts>);

struct Parts {
    /// `Bearer%20<jwt>`.
    cookie_value: String,
    /// `Bearer <jwt>`.
    authorization: HeaderValue,
    digest: [u8; 32],
    claims: Claims,
}

impl Token {
    /// Reads any form in which the shop, its clients or an operator write a
    /// token: a bare JWT, `Bearer x`, `Bearer%20x` or `Bearer+x` (in any case,
    /// even doubled), quotes or white space around these, a `; name=value` tail.
    ///
    /// # Errors
    ///
    /// [`TokenError`] for anything but three base64url parts of which the
    /// second is a JSON object. The error holds nothing of the text.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let bare = jwt::bare(text)?;
        let claims = Claims::read(&bare)?;
        let mut authorization =
            HeaderValue::try_from(format!("Bearer {bare}")).map_err(|_| TokenError::NotJwt)?;
        authorization.set_sensitive(true);
        Ok(Self(Arc::new(Parts {
            cookie_value: format!("{COOKIE_PREFIX}{bare}"),
            authorization,
            digest: Sha256::digest(bare.as_bytes()).into(),
            claims,
        })))
    }

    /// The bare JWT, for the wire and the stores.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0.cookie_value[COOKIE_PREFIX.len()..]
    }

    /// `Bearer <jwt>`, marked as sensitive.
    #[must_use]
    pub fn authorization(&self) -> &HeaderValue {
        &self.0.authorization
    }

    /// `Bearer%20<jwt>`, as the shop writes its cookie.
    #[must_use]
    pub fn cookie_value(&self) -> &str {
        &self.0.cookie_value
    }

    /// The SHA-256 of the bare JWT.
    #[must_use]
    pub fn digest(&self) -> &[u8; 32] {
        &self.0.digest
    }

    /// The digest in hex digits, as the stores write it.
    fn digest_hex(&self) -> String {
        let half = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum << 8 | u128::from(*byte));
        let (high, low) = self.digest().split_at(16);
        format!("{:032x}{:032x}", half(high), half(low))
    }

    /// What may be shown of the token.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        let [a, b, c, d, ..] = self.0.digest;
        Fingerprint([a, b, c, d])
    }

    /// The `iat` claim.
    #[must_use]
    pub fn issued_at(&self) -> Option<Timestamp> {
        self.0.claims.issued_at
    }

    /// The `exp` claim.
    #[must_use]
    pub fn expires_at(&self) -> Option<Timestamp> {
        self.0.claims.expires_at
    }

    /// Whether `exp` is still ahead. A token without that claim never expires.
    #[must_use]
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.expires_at().is_none_or(|expires_at| now < expires_at)
    }

    /// Whether it is the token of a logged-in visitor.
    #[must_use]
    pub fn is_personal(&self) -> bool {
        self.0.claims.kind == Some(PERSONAL)
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.expose() == other.expose()
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.fingerprint())
    }
}

/// The first 8 hex digits of a token's SHA-256: enough to tell tokens apart,
/// useless to anyone else.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 4]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", u32::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where a token came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// A page opened by FlareSolverr.
    FlareSolverr,
    /// The shop itself, asked without a browser.
    Direct,
    /// The keys in Redis.
    Redis,
    /// The line in the env file.
    EnvFile,
    /// The variable in the environment at start.
    Environment,
}

impl Source {
    /// The name in logs, metrics and answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FlareSolverr => "flaresolverr",
            Self::Direct => "direct",
            Self::Redis => "redis",
            Self::EnvFile => "env_file",
            Self::Environment => "environment",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The cookies that came with a token: names and raw values, in order.
/// The `Debug` form hides the values.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Cookies(Vec<(String, String)>);

impl Cookies {
    /// Keeps the pairs in their order. Of one name that comes twice, the last
    /// value counts, in the place of the first.
    pub fn from_pairs<N, V>(pairs: impl IntoIterator<Item = (N, V)>) -> Self
    where
        N: Into<String>,
        V: Into<String>,
    {
        let mut cookies = Self::default();
        for (name, value) in pairs {
            cookies.set(name.into(), value.into());
        }
        cookies
    }

    /// Names and raw values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }

    /// The raw value of the cookie `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find_map(|(n, value)| (n == name).then_some(value))
    }

    /// The same cookies with `name` set to the token, as the shop writes it.
    #[must_use]
    pub fn with_token(&self, name: &str, token: &Token) -> Self {
        let mut cookies = self.clone();
        cookies.set(name.to_owned(), token.cookie_value().to_owned());
        cookies
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn set(&mut self, name: String, value: String) {
        match self.0.iter_mut().find(|(n, _)| *n == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name, value)),
        }
    }
}

impl fmt::Debug for Cookies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hidden = self.iter().map(|(name, _)| (name, format_args!("***")));
        f.debug_map().entries(hidden).finish()
    }
}

#[cfg(test)]
mod test_support {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

    use super::Token;

    /// A token that expires at the second `exp`.
    pub(super) fn token(exp: u64) -> Token {
        Token::parse(&jwt(&format!(r#"{{"exp":{exp},"iat":1,"type":10}}"#))).unwrap()
    }

    /// A bare JWT with these claims, unsigned.
    pub(super) fn jwt(claims: &str) -> String {
        let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","typ":"JWT"}"#);
        format!("{header}.{}.c2lnbmF0dXJl", URL_SAFE_NO_PAD.encode(claims))
    }
}

#[cfg(test)]
mod tests {
    use super::{test_support::jwt, *};

    const ANONYMOUS: &str =
        r#"{"exp":1168000,"iat":1000000,"iss":"/api/v1/auth/anonymous","type":10}"#;

    #[test]
    fn every_form_of_a_token_gives_the_same_bare_jwt() {
        let bare = jwt(ANONYMOUS);
        let forms = [
            "{}",
            "Bearer {}",
            "bearer {}",
            "BEARER   {}",
            "Bearer%20{}",
            "bearer%20{}",
            "Bearer+{}",
            "Bearer++{}",
            "Bearer{}",
            "Bearer%2B{}",
            "Bearer%2520{}",
            "Bearer Bearer {}",
            "Bearer%20Bearer%20{}",
            "Bearer bearer+Bearer%20{}",
            "\"{}\"",
            "'{}'",
            "\"Bearer {}\"",
            "'Bearer%20{}'",
            "%22Bearer%20{}%22",
            "Bearer \"{}\"",
            "  {}\r\n",
            "\t\"Bearer {}\"  ",
            "{}; path=/",
            "{};name=value",
            "Bearer {}; name=value",
            "Bearer%20{}; Path=/; Domain=.chitai-gorod.ru",
            "\"Bearer {}; name=value\"",
            "\"Bearer {}\"; name=value",
        ];
        for form in forms {
            let token = Token::parse(&form.replace("{}", &bare));
            assert_eq!(token.as_ref().map(Token::expose), Ok(&*bare), "{form}");
        }
    }

    #[test]
    fn what_is_no_token_is_refused() {
        use TokenError::{Claims, Empty, NotJwt, TooLong};
        let bare = jwt("{}");
        let (head, _) = bare.rsplit_once('.').unwrap();
        let cases = [
            (String::new(), Empty),
            (" \"\" ".into(), Empty),
            ("Bearer".into(), Empty),
            ("Bearer ".into(), Empty),
            ("Bearer%20".into(), Empty),
            ("; name=value".into(), Empty),
            ("garbage".into(), NotJwt),
            ("Basic dXNlcjpwYXNz".into(), NotJwt),
            (format!("Token {bare}"), NotJwt),
            (head.into(), NotJwt),
            (format!("{head}."), NotJwt),
            (format!("{bare}."), NotJwt),
            (format!("{bare}.more"), NotJwt),
            (format!("{bare} {bare}"), NotJwt),
            (format!("{bare}\r\nX-Evil: 1"), NotJwt),
            (format!("{bare}%0d%0aX-Evil:%201"), NotJwt),
            (format!("{bare}\u{439}"), NotJwt),
            (format!("{bare}%ff"), NotJwt),
            ("a..c".into(), NotJwt),
            ("a.b=c.d".into(), NotJwt),
            ("aaaa.!!!!.cccc".into(), NotJwt),
            ("aaaa.bbbb.cccc".into(), Claims),
            ("aaaa.b.cccc".into(), Claims),
            (jwt("[]"), Claims),
            (jwt("17"), Claims),
            (jwt(r#"{"exp":"#), Claims),
            (jwt(&format!("{}1{}", "[".repeat(2000), "]".repeat(2000))), Claims),
            (format!("{bare}{}", "x".repeat(jwt::MAX_LENGTH)), TooLong),
        ];
        for (text, expected) in cases {
            assert_eq!(Token::parse(&text).err(), Some(expected), "{text}");
        }
    }

    #[test]
    fn an_error_shows_nothing_of_the_text() {
        let error = Token::parse("secret.secret.secret").unwrap_err();
        assert!(!format!("{error} {error:?}").contains("secret"));
    }

    #[test]
    fn padding_and_stray_bits_do_no_harm() {
        for bare in ["eyJ0.eyJleHAiOjF9.c2ln", "eyJ0==.eyJleHAiOjEgfQ==.c2ln=", "a.e30.c"] {
            assert_eq!(Token::parse(bare).unwrap().expose(), bare);
        }
    }

    #[test]
    fn claims_may_be_integers_fractions_or_strings() {
        let cases = [
            (r#"{"exp":123}"#, Some(123)),
            (r#"{"exp":123.9}"#, Some(123)),
            (r#"{"exp":"123"}"#, Some(123)),
            (r#"{"exp":" 123.5 "}"#, Some(123)),
            (r#"{"exp":1.5e3}"#, Some(1500)),
            (r#"{"exp":-5}"#, Some(0)),
            (r#"{"exp":18446744073709551615}"#, Some(u64::MAX)),
            (r#"{"exp":1e300}"#, None),
            (r#"{"exp":"NaN"}"#, None),
            (r#"{"exp":"inf"}"#, None),
            (r#"{"exp":"soon"}"#, None),
            (r#"{"exp":null}"#, None),
            (r#"{"exp":[1]}"#, None),
            ("{}", None),
        ];
        for (claims, expected) in cases {
            let token = Token::parse(&jwt(claims)).unwrap();
            assert_eq!(token.expires_at(), expected.map(Timestamp), "{claims}");
        }
    }

    #[test]
    fn a_token_lives_until_exp() {
        let token = Token::parse(&jwt(ANONYMOUS)).unwrap();
        assert_eq!(token.issued_at(), Some(Timestamp(1_000_000)));
        assert!(token.is_live(Timestamp(1_167_999)));
        assert!(!token.is_live(Timestamp(1_168_000)));
        let eternal = Token::parse(&jwt("{}")).unwrap();
        assert!(eternal.is_live(Timestamp(u64::MAX)));
    }

    #[test]
    fn type_20_is_personal() {
        for (claims, personal) in [
            (r#"{"type":20}"#, true),
            (r#"{"type":20.0}"#, true),
            (r#"{"type":"20"}"#, true),
            (r#"{"type":10}"#, false),
            ("{}", false),
        ] {
            let token = Token::parse(&jwt(claims)).unwrap();
            assert_eq!(token.is_personal(), personal, "{claims}");
        }
    }

    #[test]
    fn a_token_goes_out_in_three_forms() {
        let bare = jwt("{}");
        let token = Token::parse(&format!("Bearer Bearer {bare}")).unwrap();
        assert_eq!(token.expose(), bare);
        assert_eq!(token.cookie_value(), format!("Bearer%20{bare}"));
        assert_eq!(token.authorization(), &format!("Bearer {bare}"));
        assert!(token.authorization().is_sensitive());
    }

    #[test]
    fn only_the_fingerprint_shows() {
        let token = Token::parse("e30.e30.e30").unwrap();
        let hex = token.digest_hex();
        assert_eq!(hex.len(), 64);
        assert_eq!(token.fingerprint().to_string(), hex[..8]);
        assert_eq!(format!("{token:?}"), format!("Token({})", &hex[..8]));
        let cookies = Cookies::default().with_token("access-token", &token);
        assert_eq!(format!("{cookies:?}"), r#"{"access-token": ***}"#);
    }

    #[test]
    fn cookies_keep_their_order_and_raw_values() {
        let token = Token::parse(&jwt("{}")).unwrap();
        let cookies =
            Cookies::from_pairs([("b", "1%20"), ("access-token", "old"), ("a", "2"), ("b", "3")]);
        let with = cookies.with_token("access-token", &token);
        let pairs: Vec<_> = with.iter().collect();
        assert_eq!(pairs, [("b", "3"), ("access-token", token.cookie_value()), ("a", "2")]);
        assert_eq!(cookies.get("access-token"), Some("old"));
        assert_eq!(with.with_token("c", &token).iter().count(), 4);
        assert!(Cookies::default().is_empty() && !with.is_empty());
    }
}
