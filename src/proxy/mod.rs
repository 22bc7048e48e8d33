//! The life of a request: from a client's connection to its answer.
//!
//! `service` serves a connection, `way` picks the route of a request, `sni` does
//! where no HTTP comes before TLS; `tunnel` leads bytes both ways, `intercept`
//! ends TLS and hands the inner requests on, `forward` sends a request with the token, holds it when the token is
//! refused, and replays it. Each request passes each of these files once.
//!
//! # Invariants
//!
//! - The token goes only to a destination that is an API host by the name
//!   that was dialled, over TLS that was verified for it.
//! - A request that is answered is sent at most twice.
//! - A panic ends the connection that it happened on, and no other.

#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench;
mod body;
mod credentials;
mod error;
mod forward;
#[cfg(fuzzing)]
#[path = "../fuzzing.rs"]
pub mod fuzzing;
mod gate;
mod handshakes;
mod head;
mod headers;
mod hold;
mod intercept;
mod origins;
mod replay;
mod service;
mod sni;
mod tunnel;
mod watch;
mod way;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use tokio_util::sync::CancellationToken;

pub use error::ProxyError;
pub use origins::Origins;
pub use replay::Memory;
pub use service::Service;

use self::handshakes::Handshakes;
use crate::config::{Authorization, Secret};
use crate::hints::Hints;
use crate::metrics::Metrics;
use crate::net::Dialer;
use crate::refresh::Refresher;
use crate::tls::Leaves;
use crate::token::{Clock, TokenCache};

/// Bytes that half heads of all clients together may take.
const HEAD_MEMORY: usize = 64 * 1024 * 1024;

/// TLS handshakes of clients at once; one address may have half of them.
const MAX_HANDSHAKES: usize = 4096;

/// What the workers share: parts that are safe on all threads, and settings.
pub struct Proxy {
    /// The API origins and their prefixes.
    pub origins: Origins,
    /// The current token.
    pub cache: Arc<TokenCache>,
    /// Tells whether the token is still live.
    pub clock: Arc<Clock>,
    /// Gets a new one.
    pub refresher: Arc<Refresher>,
    /// Opens connections.
    pub dialer: Arc<Dialer>,
    /// Certificates for intercepted hosts.
    pub leaves: Leaves,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What clients get wrong.
    pub hints: Arc<Hints>,
    /// Bytes that may be kept for replay.
    pub memory: Memory,
    /// What no variable sets.
    pub bounds: Bounds,
    /// Cancelled shortly before the drain ends: held requests give up.
    pub release_held: CancellationToken,
    /// Numbers and choices.
    pub settings: Settings,
}

/// Bounds of the whole process that no variable sets.
pub struct Bounds {
    heads: Memory,
    handshakes: Handshakes,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { heads: Memory::new(HEAD_MEMORY), handshakes: Handshakes::new(MAX_HANDSHAKES) }
    }
}

/// Settings of the request path.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which requests get the token.
    pub authorization: Authorization,
    /// Names of the token's cookie.
    pub token_cookies: Vec<String>,
    /// Credentials that clients must present.
    pub proxy_auth: Option<Secret>,
    /// Longest hold.
    pub hold_timeout: Duration,
    /// Status of a request whose hold ran out.
    pub retry_status: StatusCode,
    /// Requests held at once.
    pub max_held: usize,
    /// Bytes kept of one request body.
    pub replay_body: usize,
    /// Longest time until an answer's head.
    pub upstream_timeout: Duration,
    /// Open connections per origin on one worker, by the worker's number.
    pub upstream_connections: Vec<usize>,
    /// The CA certificate, PEM.
    pub ca_pem: Bytes,
    /// Public roots and the CA certificate, PEM.
    pub bundle_pem: Bytes,
}

#[cfg(test)]
mod tests;
