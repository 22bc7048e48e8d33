//! Asks the API whether it takes a token.
//!
//! # Invariants
//!
//! - Only a 401 says that a token is bad, and only a 200 that it is good.
//! - A verifier that answers 200 without a token is blind: its 200 says nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, warn};
use url::Url;

use super::browser;
use crate::metrics::Metrics;
use crate::net::Dialer;
use crate::token::{Clock, Token};

/// For a new token: in all, and how often within that.
const CANDIDATE_TIMEOUT: Duration = Duration::from_secs(5);
const CANDIDATE_TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(300);
/// For a token that was refused: clients are waiting.
const JUDGE_TIMEOUT: Duration = Duration::from_secs(2);
/// One product page, with room to spare.
const LARGEST_ANSWER: usize = 4 * 1024 * 1024;

/// What the API thinks of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opinion {
    /// It takes it.
    Good,
    /// It refuses it.
    Bad,
    /// No telling.
    Unknown,
}

/// What the calibration found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// Not calibrated yet; its 200 and 401 count meanwhile.
    Pending,
    /// Without a token it says 401.
    Trusted,
    /// Without a token it says 200: it cannot tell.
    Blind,
}

impl Trust {
    /// The name in `/status`.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Trusted => "trusted",
            Self::Blind => "blind",
        }
    }
}

/// Asks `VERIFY_URL`.
pub(super) struct Verifier {
    dialer: Arc<Dialer>,
    clock: Arc<Clock>,
    metrics: Arc<Metrics>,
    url: Url,
    user_id: String,
    trust: AtomicU8,
}

impl Verifier {
    /// Trusted until it is calibrated.
    pub(super) fn new(
        dialer: Arc<Dialer>,
        clock: Arc<Clock>,
        metrics: Arc<Metrics>,
        url: Url,
    ) -> Self {
        metrics.verifier_trusted(true);
        let trust = AtomicU8::new(Trust::Pending as u8);
        Self { dialer, clock, metrics, url, user_id: browser::user_id(), trust }
    }

    /// Judges a new token: 5 s in all, up to 3 tries while there is no telling.
    pub(super) async fn examine(&self, token: &Token) -> Opinion {
        let deadline = Instant::now() + CANDIDATE_TIMEOUT;
        let tries = async {
            for _ in 1..CANDIDATE_TRIES {
                let opinion = self.ask(token).await;
                if opinion != Opinion::Unknown || self.trust() == Trust::Blind {
                    return opinion;
                }
                sleep(PAUSE).await;
            }
            self.ask(token).await
        };
        timeout_at(deadline, tries).await.unwrap_or(Opinion::Unknown)
    }

    /// Judges a refused token: one try of 2 s.
    pub(super) async fn judge(&self, token: &Token) -> Opinion {
        timeout(JUDGE_TIMEOUT, self.ask(token)).await.unwrap_or(Opinion::Unknown)
    }

    /// What is known of it.
    pub(super) fn trust(&self) -> Trust {
        let trust = self.trust.load(Ordering::Relaxed);
        let all = [Trust::Pending, Trust::Trusted, Trust::Blind];
        all.into_iter().find(|one| *one as u8 == trust).unwrap_or(Trust::Pending)
    }

    /// Asks without a token, to see whether it can tell.
    pub(super) async fn calibrate(&self) -> Trust {
        let status = timeout(CANDIDATE_TIMEOUT, self.status(None)).await.ok().flatten();
        let trust = match status {
            Some(401) => Trust::Trusted,
            Some(200) => Trust::Blind,
            _ => Trust::Pending,
        };
        if trust == Trust::Blind && self.trust() != Trust::Blind {
            warn!(url = %self.url, "the verifier says 200 without a token: it cannot tell tokens apart");
        }
        debug!(status, trust = trust.as_str(), "verifier calibrated");
        self.trust.store(trust as u8, Ordering::Relaxed);
        self.metrics.verifier_trusted(trust != Trust::Blind);
        trust
    }

    async fn ask(&self, token: &Token) -> Opinion {
        match self.status(Some(token)).await {
            Some(401) => Opinion::Bad,
            Some(200) if self.trust() != Trust::Blind => Opinion::Good,
            _ => Opinion::Unknown,
        }
    }

    /// The status of its answer, if there is one.
    async fn status(&self, token: Option<&Token>) -> Option<u16> {
        let mut request = browser::api(Request::get(self.url.as_str()));
        request = request.header("user-id", &self.user_id);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, token.authorization());
        }
        let request = request.body(Bytes::new()).ok()?;
        match self.dialer.fetch(request, LARGEST_ANSWER).await {
            Ok(response) => {
                if let Some(date) = response.headers().get(header::DATE) {
                    self.clock.learn(date);
                }
                Some(response.status().as_u16())
            }
            Err(error) => {
                debug!(%error, "the verifier does not answer");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU16;

    use super::super::testing::{self, Origin, token};
    use super::*;

    /// A verifier whose API answers with `status`, and that API.
    async fn answering(status: &Arc<AtomicU16>) -> (Verifier, Origin) {
        let status = Arc::clone(status);
        let api = Origin::start(move |_| {
            let response = testing::reply(status.load(Ordering::Relaxed), "{}".into());
            async move { response }
        })
        .await;
        let url = Url::parse(&api.url("/verify?a[b]=1")).unwrap();
        let (clock, metrics) = (Arc::new(Clock::new()), Arc::new(Metrics::new(1)));
        (Verifier::new(testing::dialer(), clock, metrics, url), api)
    }

    #[tokio::test]
    async fn only_200_is_good_and_only_401_is_bad() {
        let status = Arc::new(AtomicU16::new(0));
        let (verifier, _api) = answering(&status).await;
        let cases = [
            (200, Opinion::Good),
            (401, Opinion::Bad),
            (403, Opinion::Unknown),
            (302, Opinion::Unknown),
            (500, Opinion::Unknown),
        ];
        for (answer, opinion) in cases {
            status.store(answer, Ordering::Relaxed);
            assert_eq!(verifier.judge(&token("a", 60)).await, opinion, "{answer}");
        }
    }

    #[tokio::test]
    async fn the_calibration_asks_without_a_token_and_sees_blindness() {
        let status = Arc::new(AtomicU16::new(503));
        let (verifier, api) = answering(&status).await;
        for (answer, trust) in [(503, Trust::Pending), (401, Trust::Trusted), (200, Trust::Blind)] {
            status.store(answer, Ordering::Relaxed);
            assert_eq!(verifier.calibrate().await, trust);
            assert_eq!(verifier.trust(), trust);
        }
        assert!(api.requests().iter().all(|seen| seen.bearer().is_none()));
        assert_eq!(verifier.judge(&token("a", 60)).await, Opinion::Unknown);
        status.store(401, Ordering::Relaxed);
        assert_eq!(verifier.judge(&token("a", 60)).await, Opinion::Bad);
    }

    #[tokio::test]
    async fn a_candidate_gets_three_tries_while_there_is_no_telling() {
        let status = Arc::new(AtomicU16::new(503));
        let (verifier, api) = answering(&status).await;
        assert_eq!(verifier.examine(&token("a", 60)).await, Opinion::Unknown);
        assert_eq!(api.requests().len(), 3);
    }

    #[tokio::test]
    async fn the_request_looks_like_the_sites_own() {
        let status = Arc::new(AtomicU16::new(200));
        let (verifier, api) = answering(&status).await;
        let token = token("a", 60);
        verifier.judge(&token).await;
        verifier.judge(&token).await;
        let [first, second] = &api.requests()[..] else { panic!("two requests") };
        assert_eq!(first.bearer(), Some(token.expose()));
        assert_eq!(first.headers["initial-feature"], "index");
        assert_eq!(first.headers["platform"], "desktop");
        assert_eq!(first.headers["shop-brand"], "chitaiGorod");
        assert_eq!(first.headers["user-id"], second.headers["user-id"]);
    }
}
