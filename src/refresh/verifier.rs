//! Asks the API whether it takes a token.
//!
//! # Invariants
//!
//! - Only a 401 says that a token is bad, and only a 200 that it is good.
//! - A 403 is the anti-bot wall's; the question is asked once more with the
//!   clearance that goes with the token.
//! - A verifier that answers 200 without a token is blind: its 200 says nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, header};
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, warn};
use url::Url;

use super::browser;
use crate::metrics::Metrics;
use crate::net::{Dialer, FetchError};
use crate::token::{Candidate, Clearance, Clock, Published, Token};

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

/// How a question fared at the anti-bot wall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passage {
    /// It passed as it was.
    Open,
    /// It passed with the clearance.
    Cleared,
    /// It did not even pass with that.
    Walled,
    /// No telling.
    Unknown,
}

/// What a question brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) opinion: Opinion,
    pub(super) passage: Passage,
}

impl Finding {
    /// Nothing came.
    pub(super) const NOTHING: Self = Self { opinion: Opinion::Unknown, passage: Passage::Unknown };
    const WALLED: Self = Self { opinion: Opinion::Unknown, passage: Passage::Walled };

    /// `candidate` with what was found about it.
    pub(super) fn of(self, candidate: Candidate) -> Candidate {
        let clearance = Arc::clone(&candidate.clearance);
        candidate
            .verified(self.opinion == Opinion::Good)
            .with_clearance(clearance, self.passage == Passage::Cleared)
    }

    /// Whether there is anything that asking again could change.
    fn is_undecided(self) -> bool {
        self.opinion == Opinion::Unknown && self.passage != Passage::Walled
    }
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
    /// What an answer to a question without a token means.
    fn of(status: Option<u16>) -> Self {
        match status {
            Some(401) => Self::Trusted,
            Some(200) => Self::Blind,
            _ => Self::Pending,
        }
    }

    /// The name in `/status`.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Trusted => "trusted",
            Self::Blind => "blind",
        }
    }
}

/// Why `VERIFY_URL` gave no answer.
#[derive(Debug, Error)]
pub enum Unanswered {
    /// None came in time.
    #[error("no answer within {}", humantime::format_duration(*.0))]
    Late(Duration),
    /// None came at all.
    #[error(transparent)]
    Fetch(#[from] FetchError),
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

    /// Judges a new token, and says whether it needs the clearance that came
    /// with it: 5 s in all, up to 3 tries while there is no telling.
    pub(super) async fn examine(&self, token: &Token, clearance: &Clearance) -> Finding {
        let deadline = Instant::now() + CANDIDATE_TIMEOUT;
        let tries = async {
            for _ in 1..CANDIDATE_TRIES {
                let finding = self.ask(token, clearance).await;
                if !finding.is_undecided() || self.trust() == Trust::Blind {
                    return finding;
                }
                sleep(PAUSE).await;
            }
            self.ask(token, clearance).await
        };
        timeout_at(deadline, tries).await.unwrap_or(Finding::NOTHING)
    }

    /// Judges a refused token as requests carry it: one try of 2 s.
    pub(super) async fn judge(&self, refused: &Published) -> Finding {
        let (token, clearance) = (&refused.token, &*refused.clearance);
        let asked = async {
            if refused.needs_clearance {
                self.ask_with(token, clearance).await
            } else {
                self.ask(token, clearance).await
            }
        };
        timeout(JUDGE_TIMEOUT, asked).await.unwrap_or(Finding::NOTHING)
    }

    /// What is known of it.
    pub(super) fn trust(&self) -> Trust {
        let trust = self.trust.load(Ordering::Relaxed);
        let all = [Trust::Pending, Trust::Trusted, Trust::Blind];
        all.into_iter().find(|one| *one as u8 == trust).unwrap_or(Trust::Pending)
    }

    /// Asks without a token, to see whether it can tell.
    pub(super) async fn calibrate(&self) -> Trust {
        Trust::of(self.probe().await.ok())
    }

    /// Calibrates it, too, and returns the status of its answer: within 5 s.
    ///
    /// # Errors
    ///
    /// [`Unanswered`].
    pub(super) async fn probe(&self) -> Result<u16, Unanswered> {
        let answer = timeout(CANDIDATE_TIMEOUT, self.answer(None, None)).await;
        let answer = answer
            .map_err(|_| Unanswered::Late(CANDIDATE_TIMEOUT))
            .and_then(|answer| Ok(answer?))
            .inspect_err(|error| debug!(%error, "the verifier does not answer"));
        self.learn(answer.as_ref().ok().copied());
        answer
    }

    /// Keeps what an answer to a question without a token means.
    fn learn(&self, status: Option<u16>) {
        let trust = Trust::of(status);
        if trust == Trust::Blind && self.trust() != Trust::Blind {
            warn!(url = %self.url, "the verifier says 200 without a token: it cannot tell tokens apart");
        }
        debug!(status, trust = trust.as_str(), "verifier calibrated");
        self.trust.store(trust as u8, Ordering::Relaxed);
        self.metrics.verifier_trusted(trust != Trust::Blind);
    }

    /// Asks without the clearance, and where the wall is in the way, with it.
    async fn ask(&self, token: &Token, clearance: &Clearance) -> Finding {
        match self.status(Some(token), None).await {
            Some(403) if clearance.is_empty() => Finding::WALLED,
            Some(403) => self.ask_with(token, clearance).await,
            status => self.finding(status, Passage::Open),
        }
    }

    async fn ask_with(&self, token: &Token, clearance: &Clearance) -> Finding {
        match self.status(Some(token), Some(clearance)).await {
            Some(403) => Finding::WALLED,
            status => self.finding(status, Passage::Cleared),
        }
    }

    fn finding(&self, status: Option<u16>, passage: Passage) -> Finding {
        let opinion = match status {
            Some(401) => Opinion::Bad,
            Some(200) if self.trust() != Trust::Blind => Opinion::Good,
            _ => Opinion::Unknown,
        };
        let passed = matches!(status, Some(200 | 401));
        Finding { opinion, passage: if passed { passage } else { Passage::Unknown } }
    }

    /// The status of its answer, if there is one.
    async fn status(&self, token: Option<&Token>, clearance: Option<&Clearance>) -> Option<u16> {
        let answer = self.answer(token, clearance).await;
        answer.inspect_err(|error| debug!(%error, "the verifier does not answer")).ok()
    }

    /// The status of its answer. Not bounded in time.
    async fn answer(
        &self,
        token: Option<&Token>,
        clearance: Option<&Clearance>,
    ) -> Result<u16, FetchError> {
        let request = self.request(token, clearance).map_err(|_| FetchError::NoHost)?;
        let response = self.dialer.fetch(request, LARGEST_ANSWER).await?;
        if let Some(date) = response.headers().get(header::DATE) {
            self.clock.learn(date);
        }
        Ok(response.status().as_u16())
    }

    fn request(
        &self,
        token: Option<&Token>,
        clearance: Option<&Clearance>,
    ) -> http::Result<Request<Bytes>> {
        let mut request = browser::api(Request::get(self.url.as_str()));
        request = request.header("user-id", &self.user_id);
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, token.authorization());
        }
        let mut request = request.body(Bytes::new())?;
        if let Some(clearance) = clearance {
            show(clearance, request.headers_mut());
        }
        Ok(request)
    }
}

/// Puts the clearance into a request's fields.
fn show(clearance: &Clearance, headers: &mut HeaderMap) {
    if let Some(cookies) = clearance.cookie_field() {
        headers.insert(header::COOKIE, cookies);
    }
    if let Some(user_agent) = clearance.user_agent() {
        headers.insert(header::USER_AGENT, user_agent.clone());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU16;

    use super::super::testing::{self, Origin, token};
    use super::*;
    use crate::token::{Cookies, Source, Timestamp, TokenCache};

    fn published() -> Arc<Published> {
        let candidate = Candidate::new(token("a", 60), Source::Direct);
        TokenCache::new().publish(candidate, Timestamp(0))
    }

    /// A verifier at a wall that opens to the cookie `pass=1` of this agent.
    async fn behind_a_wall(status: u16) -> (Verifier, Origin) {
        let api = Origin::start(move |seen| {
            let passes = seen.headers.get("cookie").is_some_and(|cookies| cookies == "pass=1")
                && seen.headers["user-agent"] == "Browser/1";
            let response = testing::reply(if passes { status } else { 403 }, "{}".into());
            async move { response }
        })
        .await;
        let url = Url::parse(&api.url("/verify")).unwrap();
        let (clock, metrics) = (Arc::new(Clock::new()), Arc::new(Metrics::new(1)));
        (Verifier::new(testing::dialer(), clock, metrics, url), api)
    }

    fn clearance(pass: &str) -> Clearance {
        Clearance::new(Cookies::from_pairs([("pass", pass)]), Some("Browser/1"))
    }

    #[tokio::test]
    async fn at_the_wall_it_asks_again_with_cookies_and_user_agent() {
        let cases = [
            ("1", 200, Opinion::Good, Passage::Cleared),
            ("1", 401, Opinion::Bad, Passage::Cleared),
            ("1", 500, Opinion::Unknown, Passage::Unknown),
            ("2", 200, Opinion::Unknown, Passage::Walled),
        ];
        for (pass, status, opinion, passage) in cases {
            let (verifier, api) = behind_a_wall(status).await;
            let finding = verifier.examine(&token("a", 60), &clearance(pass)).await;
            assert_eq!(finding, Finding { opinion, passage }, "{pass} {status}");
            let tries = if status == 500 { 3 } else { 1 };
            assert_eq!(api.requests().len(), 2 * tries, "{pass} {status}");
        }
    }

    #[tokio::test]
    async fn a_token_that_goes_with_clearance_is_judged_with_it_at_once() {
        let (verifier, api) = behind_a_wall(200).await;
        let candidate = Candidate::new(token("a", 60), Source::FlareSolverr)
            .with_clearance(Arc::new(clearance("1")), true);
        let published = TokenCache::new().publish(candidate, Timestamp(0));
        let finding = verifier.judge(&published).await;
        assert_eq!(finding, Finding { opinion: Opinion::Good, passage: Passage::Cleared });
        assert_eq!(api.requests().len(), 1);
    }

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
            assert_eq!(verifier.judge(&published()).await.opinion, opinion, "{answer}");
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
        assert_eq!(verifier.judge(&published()).await.opinion, Opinion::Unknown);
        status.store(401, Ordering::Relaxed);
        assert_eq!(verifier.judge(&published()).await.opinion, Opinion::Bad);
    }

    #[tokio::test]
    async fn a_candidate_gets_three_tries_while_there_is_no_telling() {
        let status = Arc::new(AtomicU16::new(503));
        let (verifier, api) = answering(&status).await;
        let finding = verifier.examine(&token("a", 60), &Clearance::default()).await;
        assert_eq!(finding, Finding::NOTHING);
        assert_eq!(api.requests().len(), 3);
    }

    #[tokio::test]
    async fn the_request_looks_like_the_sites_own() {
        let status = Arc::new(AtomicU16::new(200));
        let (verifier, api) = answering(&status).await;
        let published = published();
        verifier.judge(&published).await;
        verifier.judge(&published).await;
        let [first, second] = &api.requests()[..] else { panic!("two requests") };
        assert_eq!(first.bearer(), Some(published.token.expose()));
        assert_eq!(first.headers["initial-feature"], "index");
        assert_eq!(first.headers["platform"], "desktop");
        assert_eq!(first.headers["shop-brand"], "chitaiGorod");
        assert_eq!(first.headers["user-id"], second.headers["user-id"]);
    }
}
