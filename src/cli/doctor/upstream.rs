//! The shop as it is reached from here: names, connections, trust, clock.

use std::error::Error;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, Request, Response, Uri, header};
use tokio::time::timeout;

use super::report::Check;
use super::{Patient, readable};
use crate::config::normalize_host;
use crate::net::{DialError, Dialer, FetchError, Reach};

/// Longest wait for the answer to one question.
const LIMIT: Duration = Duration::from_secs(15);
/// A page, or the API's refusal of one.
const LARGEST_ANSWER: usize = 8 * 1024 * 1024;
/// Difference of the clocks from which on a person should look.
const CLOCK_WARNING: Duration = Duration::from_secs(5);
const NETWORK: &str = "see the network, a firewall, CONNECT_TO";

/// The checks of each API host and of the shop, side by side.
pub(super) async fn examine(patient: &Patient) -> Vec<Check> {
    let dialer = &*patient.probes.dialer;
    let places = places(patient);
    let visits = join_all(places.iter().map(|place| place.visit(dialer))).await;
    let (mut checks, mut date) = (Vec::new(), None);
    for visit in visits {
        date = date.or(visit.date);
        checks.extend(visit.checks);
    }
    checks.push(clock(date));
    checks
}

/// A server that the sidecar needs.
struct Place {
    host: String,
    port: u16,
    url: String,
}

/// What a visit gave.
struct Visit {
    checks: Vec<Check>,
    /// How far the server's clock is ahead of ours, or ours of the server's.
    date: Option<Offset>,
}

/// A difference of clocks.
#[derive(Clone, Copy)]
struct Offset {
    by: Duration,
    ours_is_ahead: bool,
}

/// The API hosts, then the shop, each once.
fn places(patient: &Patient) -> Vec<Place> {
    let api = &patient.config.api;
    let origins = api.origins.iter().map(|origin| Place {
        host: origin.host.clone(),
        port: origin.port,
        url: format!("{}{}/", origin.base_url(), origin.prefix),
    });
    let mut places: Vec<Place> = Vec::new();
    for place in origins.chain([shop(&api.shop_url)]) {
        if !places.iter().any(|known| (&known.host, known.port) == (&place.host, place.port)) {
            places.push(place);
        }
    }
    places
}

fn shop(url: &Uri) -> Place {
    let default = if url.scheme_str() == Some("https") { 443 } else { 80 };
    Place {
        host: url.host().map(normalize_host).unwrap_or_default(),
        port: url.port_u16().unwrap_or(default),
        url: url.to_string(),
    }
}

impl Place {
    async fn visit(&self, dialer: &Dialer) -> Visit {
        let dns = self.dial(dialer).await;
        if dns.is_failure() {
            return Visit { checks: vec![dns], date: None };
        }
        let (reached, headers) = self.ask(dialer).await;
        let date = headers.as_ref().and_then(offset);
        Visit { checks: vec![dns, reached], date }
    }

    /// The name, and a connection to what it leads to.
    async fn dial(&self, dialer: &Dialer) -> Check {
        let tried = format!("address of {}", self.host);
        match timeout(LIMIT, dialer.tcp(&self.host, self.port, Reach::Operator)).await {
            Err(_) => Check::failed("upstream", tried, silence(), NETWORK),
            Ok(Ok(stream)) => {
                let to = stream.peer_addr();
                let to = to.map_or("unknown".to_owned(), |address| address.to_string());
                Check::ok("dns", tried, format!("connected to {to}"))
            }
            Ok(Err(error)) => {
                let (name, advice) = undialled(&error);
                Check::failed(name, tried, error, advice)
            }
        }
    }

    /// A request without a token; any answer will do. Gives its header, too.
    async fn ask(&self, dialer: &Dialer) -> (Check, Option<HeaderMap>) {
        let tried = format!("HEAD {} without a token", self.url);
        let started = Instant::now();
        match timeout(LIMIT, head(dialer, &self.url)).await {
            Err(_) => (Check::failed("upstream", tried, silence(), NETWORK), None),
            Ok(Err(error)) => {
                let found = with_causes(&error);
                (Check::failed("upstream", tried, found, unanswered(&error)), None)
            }
            Ok(Ok(response)) => {
                let (status, took) = (response.status().as_u16(), readable(started.elapsed()));
                let found = format!("HTTP {status} after {took}{}", self.trusted());
                (Check::ok("upstream", tried, found), Some(response.into_parts().0.headers))
            }
        }
    }

    fn trusted(&self) -> &'static str {
        if self.url.starts_with("https:") { ", its certificate is trusted" } else { "" }
    }
}

fn silence() -> String {
    format!("no answer within {}", readable(LIMIT))
}

fn unanswered(error: &FetchError) -> &'static str {
    match error {
        FetchError::Dial(DialError::Tls { .. }) => {
            "is a proxy or test server in between? its CA goes into UPSTREAM_CA_FILE"
        }
        _ => NETWORK,
    }
}

/// Which check a failed connection belongs to, and what to do.
fn undialled(error: &DialError) -> (&'static str, &'static str) {
    match error {
        DialError::Resolve { .. } => {
            ("dns", "see UPSTREAM_DNS, or without it the name servers of this machine")
        }
        DialError::OwnListener { .. } => (
            "dns",
            "the name leads back to the sidecar: UPSTREAM_DNS names servers that know better, or CONNECT_TO an address",
        ),
        DialError::Parent { .. } => ("upstream", "see UPSTREAM_PROXY, and that proxy's own rules"),
        _ => ("upstream", NETWORK),
    }
}

async fn head(dialer: &Dialer, url: &str) -> Result<Response<Bytes>, FetchError> {
    let request = Request::head(url).body(Bytes::new()).map_err(|_| FetchError::NoHost)?;
    dialer.fetch(request, LARGEST_ANSWER).await
}

/// The error and what lies below it, each once.
pub(super) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(below) = cause {
        let said = below.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = below.source();
    }
    text
}

fn offset(headers: &HeaderMap) -> Option<Offset> {
    let date = headers.get(header::DATE)?.to_str().ok()?;
    let theirs = httpdate::parse_http_date(date).ok()?;
    Some(match theirs.duration_since(SystemTime::now()) {
        Ok(by) => Offset { by, ours_is_ahead: false },
        Err(behind) => Offset { by: behind.duration(), ours_is_ahead: true },
    })
}

fn clock(offset: Option<Offset>) -> Check {
    let tried = "this machine's clock against the shop's Date";
    match offset {
        None => Check::skipped("clock", tried, "no answer had a Date"),
        Some(Offset { by, .. }) if by < CLOCK_WARNING => {
            Check::ok("clock", tried, format!("less than {} apart", readable(CLOCK_WARNING)))
        }
        Some(Offset { by, ours_is_ahead }) => {
            let way = if ours_is_ahead { "ahead" } else { "behind" };
            let found = format!("{} {way}", readable(Duration::from_secs(by.as_secs())));
            let advice = "the sidecar allows for it, parsers and certificates may not: switch time synchronization on";
            Check::warning("clock", tried, found, advice)
        }
    }
}
