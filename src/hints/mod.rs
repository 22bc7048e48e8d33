//! What people get wrong in the first hour, told once in the log and shown in
//! `/status` for as long as the process lives.
//!
//! # Invariants
//!
//! - What is known is told no second time, and asking for it takes no lock.
//! - The record is bounded whatever clients do, and what comes from them is
//!   short and printable before it gets here.

mod local;
mod silence;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use http::HeaderValue;
use tracing::{info, warn};

pub use local::LocalHost;
pub use silence::{FIRST_LOOK, Silence};

/// The `User-Agent` of a CONNECT by `doctor`: whatever goes wrong there is no
/// parser's mistake.
pub const DOCTOR: HeaderValue = HeaderValue::from_static("token-sidecar-doctor");

/// How many clients, or hosts, are told of one mistake.
const MOST: usize = 16;

/// How a client is made to trust the CA.
const CA_VARIABLES: &str = "set REQUESTS_CA_BUNDLE, SSL_CERT_FILE or CURL_CA_BUNDLE to the \
                            ca-bundle.pem of TRUST_DIR, NODE_EXTRA_CA_CERTS to its ca.pem; \
                            `token-sidecar env` prints them";

/// A mistake, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hint {
    /// The client at this address does not trust the CA.
    Distrust(IpAddr),
    /// The client at this address hangs up once it has seen our certificate.
    HangUp(IpAddr),
    /// The client at this address brings an anonymous token that has expired.
    StaleToken(IpAddr),
    /// The client at this address brings a personal token that has expired.
    StaleLogin(IpAddr),
    /// A client takes the proxy to a host beside it.
    NoProxy(LocalHost),
}

/// What a hint is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Distrust,
    HangUp,
    StaleToken,
    StaleLogin,
    NoProxy,
}

impl Hint {
    /// That the client at `address` does not trust the CA.
    #[must_use]
    pub fn distrust(address: IpAddr) -> Self {
        Self::Distrust(address.to_canonical())
    }

    /// That the client at `address` hangs up on our certificate: for want of
    /// trust, mostly.
    #[must_use]
    pub fn hang_up(address: IpAddr) -> Self {
        Self::HangUp(address.to_canonical())
    }

    /// That the client at `address` brings an expired token of its own.
    #[must_use]
    pub fn stale(address: IpAddr, personal: bool) -> Self {
        let address = address.to_canonical();
        if personal { Self::StaleLogin(address) } else { Self::StaleToken(address) }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Distrust(_) => Kind::Distrust,
            Self::HangUp(_) => Kind::HangUp,
            Self::StaleToken(_) => Kind::StaleToken,
            Self::StaleLogin(_) => Kind::StaleLogin,
            Self::NoProxy(_) => Kind::NoProxy,
        }
    }

    fn who(&self) -> &dyn fmt::Display {
        match self {
            Self::Distrust(address)
            | Self::HangUp(address)
            | Self::StaleToken(address)
            | Self::StaleLogin(address) => address,
            Self::NoProxy(host) => host,
        }
    }

    fn log(&self) {
        let (kind, who) = (self.kind(), self.who());
        let hint = kind.text(&who.to_string());
        match kind {
            Kind::Distrust | Kind::HangUp | Kind::NoProxy => {
                warn!(kind = kind.as_str(), %who, hint, "hint");
            }
            Kind::StaleToken | Kind::StaleLogin => info!(kind = kind.as_str(), %who, hint, "hint"),
        }
    }
}

impl Kind {
    /// Every kind, what hurts most first.
    const ALL: [Self; 5] =
        [Self::Distrust, Self::HangUp, Self::NoProxy, Self::StaleLogin, Self::StaleToken];

    fn as_str(self) -> &'static str {
        match self {
            Self::Distrust => "ca_not_trusted",
            Self::HangUp => "ca_seems_not_trusted",
            Self::StaleToken => "own_token_expired",
            Self::StaleLogin => "own_login_expired",
            Self::NoProxy => "no_proxy_missing",
        }
    }

    /// For a person: what is wrong with `who`, one or several, and what to do.
    fn text(self, who: &str) -> String {
        match self {
            Self::Distrust => {
                format!("TLS was refused by {who}: the CA is not trusted there; {CA_VARIABLES}")
            }
            Self::HangUp => format!(
                "TLS was broken off by {who} without a word: the CA seems not to be trusted there, \
                 unless it was only a probe; {CA_VARIABLES}"
            ),
            Self::StaleToken => format!(
                "an expired token comes from {who}: the parser's own is out of date and is \
                 replaced; it can go"
            ),
            Self::StaleLogin => format!(
                "an expired personal token comes from {who}: its login has expired, and requests \
                 go as anonymous; log in again, or leave it out"
            ),
            Self::NoProxy => format!(
                "the parser takes the proxy to {who}, which it can reach by itself; add to its \
                 NO_PROXY: {who}"
            ),
        }
    }
}

/// What has been told so far.
#[derive(Debug, Default)]
pub struct Hints {
    told: ArcSwap<Vec<Hint>>,
}

impl Hints {
    /// Nothing has been told.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Logs `hint`, where it is news.
    pub fn tell(&self, hint: &Hint) {
        if self.note(hint) {
            hint.log();
        }
    }

    /// Records `hint` and returns whether it is news: not told before, and one
    /// of the first [`MOST`] of its kind.
    fn note(&self, hint: &Hint) -> bool {
        if !is_news(&self.told.load(), hint) {
            return false;
        }
        let before = self.told.rcu(|told| {
            if is_news(told, hint) {
                Arc::new(told.iter().chain([hint]).cloned().collect())
            } else {
                Arc::clone(told)
            }
        });
        // Of all that came at once, one has replaced a record without it.
        is_news(&before, hint)
    }

    /// For a person: one text for each kind of mistake.
    #[must_use]
    pub fn texts(&self) -> Vec<String> {
        let told = self.told.load();
        let text = |kind: Kind| {
            let who: Vec<_> = of_kind(&told, kind).map(|hint| hint.who().to_string()).collect();
            (!who.is_empty()).then(|| kind.text(&who.join(", ")))
        };
        Kind::ALL.into_iter().filter_map(text).collect()
    }

    /// Whether a client has come to the API and gone again for want of trust.
    fn knows_distrust(&self) -> bool {
        let told = self.told.load();
        told.iter().any(|hint| matches!(hint.kind(), Kind::Distrust | Kind::HangUp))
    }
}

fn of_kind(told: &[Hint], kind: Kind) -> impl Iterator<Item = &Hint> {
    told.iter().filter(move |hint| hint.kind() == kind)
}

fn is_news(told: &[Hint], hint: &Hint) -> bool {
    !told.contains(hint) && of_kind(told, hint.kind()).count() < MOST
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn news_is_news_once() {
        let hints = Hints::new();
        assert!(hints.note(&Hint::distrust(address(1))));
        assert!(!hints.note(&Hint::distrust(address(1))));
        assert!(!hints.note(&Hint::distrust("::ffff:10.0.0.1".parse().unwrap())), "the same");
        assert!(hints.note(&Hint::distrust(address(2))), "another client");
        assert!(hints.note(&Hint::hang_up(address(1))), "another mistake");
        assert!(hints.note(&Hint::stale(address(1), false)), "and another");
        assert!(hints.note(&Hint::stale(address(1), true)), "and another");
    }

    #[test]
    fn news_that_comes_at_once_is_news_to_one() {
        let hints = Hints::new();
        let note =
            || (1..=200).filter(|last| hints.note(&Hint::distrust(address(last % 8)))).count();
        let counts: usize = thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(note)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(counts, 8);
    }

    #[test]
    fn many_of_one_kind_leave_room_for_the_others() {
        let hints = Hints::new();
        let news = (0..=255).filter(|last| hints.note(&Hint::distrust(address(*last)))).count();
        assert_eq!(news, MOST);
        assert!(hints.note(&Hint::stale(address(0), false)));
    }

    #[test]
    fn clients_of_one_mistake_share_a_text() {
        let hints = Hints::new();
        assert!(hints.texts().is_empty() && !hints.knows_distrust());
        hints.note(&Hint::stale(address(3), false));
        assert!(!hints.knows_distrust());
        hints.note(&Hint::distrust(address(1)));
        hints.note(&Hint::distrust(address(2)));
        assert!(hints.knows_distrust());
        let texts = hints.texts();
        assert_eq!(texts.len(), 2, "{texts:?}");
        assert!(texts[0].contains("10.0.0.1, 10.0.0.2:"), "{texts:?}");
        assert!(texts[1].contains("10.0.0.3"), "{texts:?}");
    }
}
