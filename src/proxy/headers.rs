//! Fields of a message on its way through.
//!
//! A head is rebuilt field by field rather than edited: removal from
//! `http::HeaderMap` would change the order of the others.
//!
//! # Invariants
//!
//! - Hop-by-hop fields (RFC 9110 §7.6.1), those that `Connection` names, and
//!   proxy credentials never cross, either way.
//! - Nothing is added but `Authorization`, and where the token needs it, the
//!   clearance: its cookies and user-agent.

use std::cell::RefCell;

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE,
    COOKIE, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, MAX_FORWARDS, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, USER_AGENT,
    WWW_AUTHENTICATE,
};

use super::credentials::{OwnCookies, cleared_cookies, replace_in_cookies};
use crate::token::{Clearance, Token};

/// Hop-by-hop by definition, whatever `Connection` says.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-authentication-info"),
    HeaderName::from_static("proxy-connection"),
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Fields that no trailer section may hold (RFC 9110 §6.5.1): framing,
/// routing, authentication and what says how to read the body.
const NOT_IN_TRAILERS: [HeaderName; 12] = [
    AUTHORIZATION,
    COOKIE,
    CONTENT_ENCODING,
    CONTENT_LENGTH,
    CONTENT_RANGE,
    CONTENT_TYPE,
    HOST,
    SET_COOKIE,
    TRAILER,
    WWW_AUTHENTICATE,
    MAX_FORWARDS,
    HeaderName::from_static("expect"),
];

/// What `Connection` says where the protocol is to be switched.
const UPGRADE_OPTION: HeaderValue = HeaderValue::from_static("Upgrade");

/// The only protocol that may be switched to. Others, `h2c` above all, would
/// lead requests past the gate.
const WEBSOCKET: &str = "websocket";

/// Maps that a worker keeps for the next requests.
const MOST_SPARE: usize = 64;

/// Names that such a map may have room for.
const MOST_SPARE_FIELDS: usize = 48;

thread_local! {
    static SPARE: RefCell<Vec<HeaderMap>> = const { RefCell::new(Vec::new()) };
}

/// What becomes of the client's credentials.
pub(super) struct Rewrite<'a> {
    /// The token to put in; `None`: credentials stay as they are.
    pub(super) token: Option<&'a Token>,
    /// What goes along with the token where it does not work alone.
    pub(super) clearance: Option<&'a Clearance>,
    /// Whether a missing `Authorization` is added.
    pub(super) add: bool,
    /// The client's cookies that may hold a token.
    pub(super) own: OwnCookies<'a>,
    /// The value of `Host` for the upstream; `None`: the client's own.
    pub(super) host: Option<&'a HeaderValue>,
    /// Whether the client's `Expect` is true of this sending.
    pub(super) expect: bool,
    /// Whether the switch to WebSocket that the client asks for is asked for.
    pub(super) upgrade: bool,
}

/// The fields of a request as the upstream gets them.
pub(super) fn for_upstream(from: &HeaderMap, rewrite: &Rewrite<'_>) -> HeaderMap {
    let mut to = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
    to.reserve(from.len() + 1);
    let named = Named::of(from);
    for (name, value) in from {
        if named.stops(name) {
            if name == TE && is_trailers(value) {
                to.append(name, value.clone());
            } else if rewrite.upgrade && name == CONNECTION {
                to.insert(name, UPGRADE_OPTION);
            } else if rewrite.upgrade && name == UPGRADE {
                to.insert(name, value.clone());
            }
        } else if name == EXPECT && !rewrite.expect {
            // It was met, or does not count.
        } else if name == HOST {
            to.insert(name, rewrite.host.unwrap_or(value).clone());
        } else if name == AUTHORIZATION {
            match rewrite.token {
                Some(token) => drop(to.insert(name, token.authorization().clone())),
                None => drop(to.append(name, value.clone())),
            }
        } else if name == COOKIE && rewrite.clearance.is_none() {
            let ours =
                rewrite.token.and_then(|token| replace_in_cookies(value, rewrite.own, token));
            to.append(name, ours.unwrap_or_else(|| value.clone()));
        } else if name == COOKIE && to.contains_key(COOKIE) {
            // All of them went into the first.
        } else {
            to.append(name, value.clone());
        }
    }
    if let (Some(host), false) = (rewrite.host, to.contains_key(HOST)) {
        to.insert(HOST, host.clone());
    }
    if let (Some(token), true) = (rewrite.token, rewrite.add) {
        to.entry(AUTHORIZATION).or_insert_with(|| token.authorization().clone());
    }
    if let Some(clearance) = rewrite.clearance {
        show(clearance, from, rewrite.own, &mut to);
    }
    to
}

/// Takes back the fields of a request that is over: their map will do for another.
pub(super) fn take_back(mut fields: HeaderMap) {
    SPARE.with_borrow_mut(|spare| {
        if spare.len() < MOST_SPARE && fields.capacity() <= MOST_SPARE_FIELDS {
            fields.clear();
            spare.push(fields);
        }
    });
}

/// Puts the clearance in, each field where the client has its own.
fn show(clearance: &Clearance, from: &HeaderMap, own: OwnCookies<'_>, to: &mut HeaderMap) {
    if let Some(cookies) = cleared_cookies(from, own, clearance) {
        to.insert(COOKIE, cookies);
    }
    if let Some(user_agent) = clearance.user_agent() {
        to.insert(USER_AGENT, user_agent.clone());
    }
}

/// The fields of an answer as the client gets them.
pub(super) fn for_client(from: HeaderMap) -> HeaderMap {
    let named = Named::of(&from);
    if !from.keys().any(|name| named.stops(name)) {
        return from;
    }
    let mut to = HeaderMap::with_capacity(from.len());
    let mut last = None;
    for (name, value) in from {
        // Further values of a name come without it.
        last = name.or(last);
        if let Some(name) = last.as_ref().filter(|name| !named.stops(name)) {
            to.append(name, value);
        }
    }
    to
}

/// Whether `headers` ask for, or agree to, a switch to WebSocket and nothing
/// else (RFC 6455 §4).
pub(super) fn switches_to_websocket(headers: &HeaderMap) -> bool {
    let mut protocols = headers.get_all(UPGRADE).iter();
    let only = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(WEBSOCKET.as_bytes());
    protocols.next().is_some_and(only)
        && protocols.next().is_none()
        && Named::of(headers).0.contains(&UPGRADE)
}

/// The fields of an answer that switches to WebSocket, as the client gets them.
pub(super) fn for_switching_client(from: HeaderMap) -> HeaderMap {
    let protocol = from.get(UPGRADE).cloned();
    let mut to = for_client(from);
    to.insert(CONNECTION, UPGRADE_OPTION);
    if let Some(protocol) = protocol {
        to.insert(UPGRADE, protocol);
    }
    to
}

/// Whether the client waits to be asked for the body (RFC 9110 §10.1.1).
pub(super) fn expects_continue(headers: &HeaderMap) -> bool {
    let value = headers.get(EXPECT);
    value.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Whether the body's coding is one that is undone here: a message with
/// another one would reach the client as if it had none.
pub(super) fn is_coding_known(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let known = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"chunked");
    codings.next().is_none_or(known) && codings.next().is_none()
}

/// Whether the length of the message is told once at most: two ways to tell it
/// are two lengths, though they may agree (RFC 9112 §6.3).
pub(super) fn has_one_length(headers: &HeaderMap) -> bool {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let Some(length) = lengths.next() else {
        return true;
    };
    lengths.next().is_none()
        && length.as_bytes().iter().all(u8::is_ascii_digit)
        && !headers.contains_key(TRANSFER_ENCODING)
}

/// Drops trailer fields that would change how the message is read.
pub(super) fn retain_allowed_trailers(trailers: &mut HeaderMap) {
    let named = Named::default();
    let kept: HeaderMap = trailers
        .iter()
        .filter(|(name, _)| !NOT_IN_TRAILERS.contains(name) && !named.stops(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    *trailers = kept;
}

/// Fields that the message's `Connection` names.
#[derive(Default)]
struct Named(Vec<HeaderName>);

impl Named {
    fn of(headers: &HeaderMap) -> Self {
        let values = headers.get_all(CONNECTION).iter().map(HeaderValue::as_bytes);
        let names = values.flat_map(|value| value.split(|byte| *byte == b','));
        let names = names.map(<[u8]>::trim_ascii).filter(|name| !is_usual(name));
        let names = names.filter_map(|name| HeaderName::try_from(name).ok());
        // Without these two the message would not arrive at all; no client
        // means that.
        Self(names.filter(|name| *name != HOST && *name != CONTENT_LENGTH).collect())
    }

    fn stops(&self, name: &HeaderName) -> bool {
        // Most names are told apart by their first letter.
        let may_be =
            matches!(name.as_str().as_bytes().first(), Some(b'c' | b'k' | b'p' | b't' | b'u'));
        may_be && HOP_BY_HOP.contains(name) || self.0.contains(name)
    }
}

/// Whether this is what most values of `Connection` say: it names no field, or
/// one that is stopped anyway.
fn is_usual(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"keep-alive") || name.eq_ignore_ascii_case(b"close")
}

fn is_trailers(value: &HeaderValue) -> bool {
    value.as_bytes().eq_ignore_ascii_case(b"trailers")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::Cookies;

    fn fields(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair =
            |&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value));
        pairs.iter().map(pair).collect()
    }

    fn untouched() -> Rewrite<'static> {
        let own = OwnCookies { names: &[], keep_personal_at: None };
        Rewrite {
            token: None,
            clearance: None,
            add: false,
            own,
            host: None,
            expect: true,
            upgrade: false,
        }
    }

    #[test]
    fn clearance_takes_the_places_of_the_clients_own() {
        let from = fields(&[
            ("cookie", "cart=1; cf_clearance=stale"),
            ("user-agent", "curl"),
            ("cookie", "city=39"),
            ("accept", "*/*"),
        ]);
        let cookies = Cookies::from_pairs([("cf_clearance", "fresh"), ("__ddg1_", "x")]);
        let clearance = Clearance::new(cookies, Some("Browser/1"));
        let with = |from: &HeaderMap| {
            for_upstream(from, &Rewrite { clearance: Some(&clearance), ..untouched() })
        };
        let expected = fields(&[
            ("cookie", "cart=1; city=39; cf_clearance=fresh; __ddg1_=x"),
            ("user-agent", "Browser/1"),
            ("accept", "*/*"),
        ]);
        let to = with(&from);
        assert_eq!(to, expected);
        assert!(to.keys().eq(expected.keys()), "{to:?}");
        let bare = with(&fields(&[("accept", "*/*")]));
        assert_eq!(bare["cookie"], "cf_clearance=fresh; __ddg1_=x");
        assert_eq!(bare["user-agent"], "Browser/1");
    }

    #[test]
    fn hop_by_hop_and_named_fields_stop_and_the_rest_keeps_its_order() {
        let from = fields(&[
            ("a", "1"),
            ("connection", "close, x-mine, Host"),
            ("host", "h"),
            ("x-mine", "2"),
            ("proxy-authorization", "Basic eA=="),
            ("te", "trailers"),
            ("upgrade", "h2c"),
            ("z", "3"),
        ]);
        let to = for_upstream(&from, &untouched());
        let names: Vec<_> = to.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["a", "host", "te", "z"]);
        assert_eq!(for_client(from).keys().count(), 3);
    }

    #[test]
    fn bytes_that_are_no_text_hide_no_name() {
        let mut from = fields(&[("x-mine", "1"), ("a", "1")]);
        from.insert(CONNECTION, HeaderValue::from_bytes(b"\xff, x-mine").unwrap());
        assert_eq!(for_upstream(&from, &untouched()), fields(&[("a", "1")]));
    }

    #[test]
    fn only_websocket_may_be_switched_to() {
        let check = |connection, upgrade, expected| {
            let from = fields(&[("connection", connection), ("upgrade", upgrade)]);
            assert_eq!(switches_to_websocket(&from), expected, "{connection}, {upgrade}");
        };
        check("Upgrade", "websocket", true);
        check("keep-alive, upgrade", "WebSocket", true);
        check("keep-alive", "websocket", false);
        check("upgrade", "h2c", false);
        check("upgrade", "websocket, h2c", false);
        let twice =
            fields(&[("connection", "upgrade"), ("upgrade", "websocket"), ("upgrade", "h2c")]);
        assert!(!switches_to_websocket(&twice));
    }

    #[test]
    fn switch_goes_on_without_what_else_is_hop_by_hop() {
        let from = fields(&[
            ("connection", "keep-alive, Upgrade, x-mine"),
            ("upgrade", "websocket"),
            ("x-mine", "1"),
            ("sec-websocket-version", "13"),
        ]);
        let expected = fields(&[
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
        ]);
        assert_eq!(for_upstream(&from, &Rewrite { upgrade: true, ..untouched() }), expected);
        let to = for_switching_client(from);
        assert_eq!(
            (&to["connection"], &to["upgrade"]),
            (&expected["connection"], &expected["upgrade"])
        );
        assert!(!to.contains_key("x-mine"));
    }

    #[test]
    fn trailers_lose_what_changes_the_message() {
        let mut trailers =
            fields(&[("authorization", "x"), ("x-sum", "1"), ("content-length", "3")]);
        retain_allowed_trailers(&mut trailers);
        assert_eq!(trailers, fields(&[("x-sum", "1")]));
    }
}
