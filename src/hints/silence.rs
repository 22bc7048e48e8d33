//! No request to the API has come: what that says of the parser's settings.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{info, warn};

use super::Hints;
use crate::metrics::{Metrics, Route};

/// How long after the start the log tells that no request to the API has come.
pub const FIRST_LOOK: Duration = Duration::from_mins(5);

/// What came instead of requests to the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// Nothing.
    Complete,
    /// Requests in the form in which `http://` comes to a proxy.
    PlainHttp,
    /// Tunnels to other hosts, at least.
    OtherHosts,
}

impl Silence {
    /// What `requests`, counted by route, tell; `None` where the API was asked.
    fn of(requests: &[(Route, u64)]) -> Option<Self> {
        let any = |which: fn(Route) -> bool| {
            requests.iter().any(|(route, count)| which(*route) && *count > 0)
        };
        if any(is_api) {
            None
        } else if any(|route| route == Route::Tunnel) {
            Some(Self::OtherHosts)
        } else if any(|route| route == Route::Passthrough) {
            Some(Self::PlainHttp)
        } else {
            Some(Self::Complete)
        }
    }

    /// For a person: what it means and what to do.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Complete => "no request to the API seen; is HTTPS_PROXY set?",
            Self::PlainHttp => {
                "no request to the API seen, only plain http to other hosts; only HTTP_PROXY seems \
                 to be set in the parser, set HTTPS_PROXY, too"
            }
            Self::OtherHosts => {
                "no request to the API seen, only to other hosts; is the API's host in API_ORIGINS?"
            }
        }
    }

    fn log(self) {
        let (kind, hint) = ("no_api_request", self.text());
        match self {
            // Maybe the parser has not been started yet.
            Self::Complete => info!(kind, hint, "hint"),
            Self::PlainHttp | Self::OtherHosts => warn!(kind, hint, "hint"),
        }
    }
}

/// Whether requests of this route go to the API.
fn is_api(route: Route) -> bool {
    match route {
        Route::Intercept | Route::Absolute | Route::Gateway | Route::Sni => true,
        Route::Tunnel | Route::Passthrough => false,
    }
}

impl Hints {
    /// The silence so far; `None` also where a client came to the API and left
    /// for want of trust: that one is led here.
    #[must_use]
    pub fn silence(&self, requests: &[(Route, u64)]) -> Option<Silence> {
        if self.knows_distrust() { None } else { Silence::of(requests) }
    }

    /// Looks once, `after` a time, and logs the silence that is still there.
    /// Dropped before, it logs nothing.
    pub async fn watch(self: Arc<Self>, metrics: Arc<Metrics>, after: Duration) {
        sleep(after).await;
        if let Some(silence) = self.silence(&metrics.requests_by_route()) {
            silence.log();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::time::timeout;

    use super::*;
    use crate::hints::Hint;

    #[test]
    fn one_request_to_the_api_breaks_the_silence() {
        for route in [Route::Intercept, Route::Absolute, Route::Gateway, Route::Sni] {
            assert_eq!(
                Silence::of(&[(route, 1), (Route::Tunnel, 7), (Route::Passthrough, 7)]),
                None
            );
        }
    }

    #[test]
    fn silence_is_told_by_what_came_instead() {
        let silence = |tunnels, passed| {
            Silence::of(&[
                (Route::Intercept, 0),
                (Route::Tunnel, tunnels),
                (Route::Passthrough, passed),
            ])
        };
        assert_eq!(silence(0, 0), Some(Silence::Complete));
        assert_eq!(silence(0, 2), Some(Silence::PlainHttp));
        assert_eq!(silence(1, 0), Some(Silence::OtherHosts));
        assert_eq!(silence(1, 2), Some(Silence::OtherHosts), "tunnels come by HTTPS_PROXY");
    }

    #[test]
    fn client_that_came_in_vain_breaks_the_silence() {
        let hints = Hints::new();
        assert_eq!(hints.silence(&[]), Some(Silence::Complete));
        hints.tell(&Hint::distrust([10, 0, 0, 1].into()));
        assert_eq!(hints.silence(&[]), None);
    }

    /// What the log has after the watch of a sidecar that served `route`.
    async fn logged(route: Option<Route>) -> String {
        let log = tempfile::NamedTempFile::new().unwrap();
        let writer = Arc::new(log.reopen().unwrap());
        let subscriber = tracing_subscriber::fmt().json().with_writer(writer).finish();
        let _set = tracing::subscriber::set_default(subscriber);
        let metrics = Arc::new(Metrics::new(1));
        let watch = Arc::new(Hints::new()).watch(Arc::clone(&metrics), FIRST_LOOK);
        let mut watch = std::pin::pin!(watch);
        let early = FIRST_LOOK.checked_sub(Duration::from_millis(1)).unwrap();
        assert!(timeout(early, watch.as_mut()).await.is_err(), "not before its time");
        assert_eq!(fs::read_to_string(&log).unwrap(), "");
        if let Some(route) = route {
            metrics.shard(0).request(route, 200, Duration::ZERO);
        }
        watch.await;
        fs::read_to_string(&log).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn silence_of_five_minutes_is_logged_once() {
        let log = logged(None).await;
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.contains("INFO") && log.contains(r#""message":"hint""#), "{log}");
        assert!(log.contains("no request to the API seen; is HTTPS_PROXY set?"), "{log}");
        let log = logged(Some(Route::Passthrough)).await;
        assert!(log.contains("WARN") && log.contains("only HTTP_PROXY"), "{log}");
    }

    #[tokio::test(start_paused = true)]
    async fn request_to_the_api_spares_the_log() {
        assert_eq!(logged(Some(Route::Gateway)).await, "");
    }
}
