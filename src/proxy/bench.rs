//! What the benches in `benches/` reach of the inside. Compiled for them alone,
//! by the feature `bench`.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderValue};
use http_body::Body;
use hyper::body::Incoming;

use super::forward::{Credentials, credentials_of, rewrite_of};
use super::headers::{Rewrite, for_upstream};
use super::replay::Replay;
use super::{Memory, Settings, gate};
use crate::hints::Hints;
use crate::token::{Clock, TokenCache};

/// Whether the gate lets the head pass.
#[must_use]
pub fn passes_gate(parts: &Parts) -> bool {
    gate::check(parts).is_ok()
}

/// What the head of a request for the API depends on.
pub struct Ground {
    /// Which requests get the token.
    pub settings: Settings,
    /// Tells whether tokens are live.
    pub clock: Clock,
    /// Is told of a client's own token that has expired.
    pub hints: Hints,
    /// The current token.
    pub cache: TokenCache,
    /// The API's `Host`.
    pub host: HeaderValue,
}

impl Ground {
    /// `from` with the credentials that the API is to see, as it gets them.
    #[must_use]
    pub fn authorize(&self, from: &HeaderMap) -> HeaderMap {
        let Self { settings, clock, hints, cache, host } = self;
        let client = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let now = clock.now();
        let credentials = credentials_of(from, settings, now, hints, client);
        let current = cache.current().filter(|current| current.token.is_live(now));
        let with = current.as_deref().filter(|_| credentials != Credentials::Keep);
        let rewrite = rewrite_of(settings, now, credentials, with);
        for_upstream(from, &Rewrite { host: Some(host), ..rewrite })
    }
}

/// `source` on its first sending, up to `limit` bytes of it kept for a second
/// one.
#[must_use]
pub fn kept_for_replay(
    source: Incoming,
    limit: usize,
    memory: &Memory,
) -> impl Body<Data = Bytes, Error = impl Error + Send + Sync + use<>> + use<> {
    Replay::new(source, limit, true, memory).body()
}
