//! One request to its upstream: with the token, held when that is refused or
//! the anti-bot wall is in the way, sent once more with the next one.

use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, MAX_FORWARDS, TRANSFER_ENCODING};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, response};
use hyper::body::Incoming;
use hyper::ext::on_informational;
use hyper::upgrade::OnUpgrade;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::body::{AnswerBody, UpstreamBody};
use super::credentials::{OwnCookies, OwnToken, has_token_cookie};
use super::error::{PROXY_STATUS, PassedOn, ProxyError, mark_passed_on};
use super::headers::{
    Rewrite, expects_continue, for_client, for_switching_client, for_upstream, has_one_length,
    is_coding_known, switches_to_websocket, take_back,
};
use super::hold::Deadline;
use super::replay::{Replay, ReplayBody};
use super::service::{Answer, ClientConnection, Next};
use super::tunnel::Switched;
use super::way::Coming;
use super::{Proxy, Settings};
use crate::hints::{Hint, Hints};
use crate::metrics::{Limit, ReplayOutcome};
use crate::net::{Place, Reach, Spelling, Upstream, UpstreamKey};
use crate::refresh::{Endpoint, FailureReason, Objection, Refusal, Verdict};
use crate::token::{Published, Timestamp};

/// Bytes of a refusal that are kept during a hold, so that its connection is free.
const KEPT_ANSWER: usize = 64 * 1024;

/// How long a client that waits to be asked for its body waits for the upstream
/// to ask (RFC 9110 §10.1.1: not indefinitely).
const CONTINUE_LIMIT: Duration = Duration::from_secs(1);

const CHUNKED: HeaderValue = HeaderValue::from_static("chunked");

/// Where a request goes, and how.
pub(super) struct Outbound {
    /// The upstream's connections.
    pub(super) upstream: Rc<Upstream<ReplayBody>>,
    /// `Host` for the upstream; `None`: the client's own.
    pub(super) host: Option<HeaderValue>,
    /// Whether the token goes there.
    pub(super) with_token: bool,
    /// Whether the request only looks on: it moves the refresher to nothing,
    /// and waits for nothing.
    pub(super) observed: bool,
}

/// What becomes of the client's credentials.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Credentials {
    /// They are the client's own affair, and a 401 on them is, too.
    Keep,
    /// Ours take their place; `add`: also where the client brought none.
    Replace { add: bool },
}

/// Counts this hop in `Max-Forwards`, and answers a request that was meant to
/// end here (RFC 9110 §7.6.2).
///
/// # Errors
///
/// [`ProxyError::TraceEndsHere`].
pub(super) fn count_hop(parts: &mut Parts) -> Result<Option<Answer>, ProxyError> {
    if parts.method != Method::OPTIONS && parts.method != Method::TRACE {
        return Ok(None);
    }
    let Some(value) = parts.headers.get_mut(MAX_FORWARDS) else {
        return Ok(None);
    };
    let digits = value.as_bytes().iter().all(u8::is_ascii_digit);
    match value.to_str().ok().filter(|_| digits).and_then(|hops| hops.parse::<u64>().ok()) {
        Some(0) if parts.method == Method::TRACE => return Err(ProxyError::TraceEndsHere),
        Some(0) => return Ok(Some(options_of_this_hop())),
        Some(hops) => *value = HeaderValue::from(hops - 1),
        None => {}
    }
    Ok(None)
}

/// The answer to an OPTIONS that was meant for this hop. It names no methods:
/// which of them the target takes, only the upstream knows.
fn options_of_this_hop() -> Answer {
    let mut answer = Response::new(AnswerBody::made(""));
    answer.headers_mut().insert(PROXY_STATUS, HeaderValue::from_static("token-sidecar"));
    answer
}

/// The way to the client's connection, if the request asks for WebSocket.
fn upgrade_of(parts: &mut Parts) -> Option<OnUpgrade> {
    // hyper has put it there where the connection may be had.
    let upgrade = parts.extensions.remove::<OnUpgrade>();
    upgrade.filter(|_| parts.method == Method::GET && switches_to_websocket(&parts.headers))
}

/// What becomes of the credentials in `headers`; a hint tells of a token of the
/// `client` that has expired by `now`.
pub(super) fn credentials_of(
    headers: &HeaderMap,
    settings: &Settings,
    now: Timestamp,
    hints: &Hints,
    client: IpAddr,
) -> Credentials {
    let Settings { authorization, token_cookies, .. } = settings;
    // Only where a personal one may stay is the client's own token read.
    let own = authorization.keep_personal.then(|| OwnToken::of(headers, token_cookies, now));
    if let Some(OwnToken::Expired { personal }) = own {
        hints.tell(&Hint::stale(client, personal));
    }
    let add = authorization.always;
    if own == Some(OwnToken::Personal) {
        Credentials::Keep
    } else if add || headers.contains_key(AUTHORIZATION) || has_token_cookie(headers, token_cookies)
    {
        Credentials::Replace { add }
    } else {
        Credentials::Keep
    }
}

/// What becomes of a head where `credentials` are due and the token, if any, is
/// that of `with`.
pub(super) fn rewrite_of<'a>(
    settings: &'a Settings,
    now: Timestamp,
    credentials: Credentials,
    with: Option<&'a Published>,
) -> Rewrite<'a> {
    Rewrite {
        token: with.map(|published| &published.token),
        clearance: with.and_then(Published::needed_clearance),
        add: credentials == Credentials::Replace { add: true },
        own: OwnCookies {
            names: &settings.token_cookies,
            keep_personal_at: settings.authorization.keep_personal.then_some(now),
        },
        host: None,
        expect: true,
        upgrade: false,
    }
}

/// A request with all that it takes to send it twice.
pub(super) struct Exchange<'a> {
    proxy: &'a Proxy,
    to: Outbound,
    parts: Parts,
    /// How the names of its fields are spelled.
    spelling: Spelling,
    body: Replay,
    /// Its `Expect` asks for a 100.
    expects_continue: bool,
    /// When it came; whether the client's own token lives is judged by that.
    came: Timestamp,
    credentials: Credentials,
    /// The client's side of a switch to WebSocket, if that was asked for.
    upgrade: Option<OnUpgrade>,
    client: Rc<ClientConnection>,
    deadline: Deadline,
}

impl<'a> Exchange<'a> {
    /// For a request of `client` whose target is in origin-form or `*`.
    pub(super) fn new(
        proxy: &'a Proxy,
        mut parts: Parts,
        spelling: Spelling,
        body: Incoming,
        to: Outbound,
        client: &Rc<ClientConnection>,
    ) -> Self {
        let came = proxy.clock.now();
        // TRACE gives back what it carried (RFC 9110 §9.3.8: no credentials).
        let credentials = if to.with_token && parts.method != Method::TRACE {
            let Proxy { settings, hints, .. } = proxy;
            credentials_of(&parts.headers, settings, came, hints, client.address.ip())
        } else {
            Credentials::Keep
        };
        let (limit, replayable) = (proxy.settings.replay_body, credentials != Credentials::Keep);
        let body = Replay::new(body, limit, replayable, &proxy.memory);
        let upgrade = upgrade_of(&mut parts).filter(|_| !body.is_any());
        Self {
            proxy,
            to,
            expects_continue: expects_continue(&parts.headers),
            parts,
            spelling,
            body,
            came,
            credentials,
            upgrade,
            client: Rc::clone(client),
            deadline: Deadline::default(),
        }
    }

    /// Forwards the request.
    pub(super) fn run(mut self) -> Coming<'a> {
        Box::pin(async move {
            let answer = self.answer().await;
            let UpstreamKey { host, reach, .. } = self.to.upstream.key();
            if let (Reach::Client, Err(ProxyError::Dial(error))) = (reach, &answer) {
                self.proxy.hint_at_local(host, error);
            }
            if self.waits() {
                self.body.abandon();
            } else {
                self.client.body_asked_for();
            }
            take_back(self.parts.headers);
            answer
        })
    }

    async fn answer(&mut self) -> Result<Answer, ProxyError> {
        if self.credentials == Credentials::Keep {
            let place = match self.place_at_once() {
                Some(place) => place,
                None => Box::pin(self.place()).await?,
            };
            let answer = self.send(place, None, Instant::now()).await?;
            return Ok(self.deliver(answer));
        }
        if self.to.observed {
            return self.observe().await;
        }
        let token = self.live_token().await?;
        let sent = self.send_with_token(token).await?;
        if let Some(objection) = objection(&sent.answer) {
            let refusal = self.refusal(objection, &sent);
            return Box::pin(self.recover(sent.answer, refusal)).await;
        }
        self.confirm(&sent);
        Ok(self.deliver(sent.answer))
    }

    /// One sending with the token as it is. Whatever comes is the client's answer.
    async fn observe(&mut self) -> Result<Answer, ProxyError> {
        let Some(current) = self.current() else {
            let retry_after = self.proxy.refresher.retry_after();
            return Err(ProxyError::NoToken { retry_after });
        };
        let sent = self.send_with_token(current).await?;
        Ok(self.deliver(sent.answer))
    }

    /// The current token, if it lives.
    fn current(&self) -> Option<Arc<Published>> {
        self.current_at(self.proxy.clock.now())
    }

    fn current_at(&self, now: Timestamp) -> Option<Arc<Published>> {
        self.proxy.cache.current().filter(|current| current.token.is_live(now))
    }

    /// The current token, or, where there is none that lives, the next.
    async fn live_token(&mut self) -> Result<Arc<Published>, ProxyError> {
        if let Some(current) = self.current_at(self.came) {
            return Ok(current);
        }
        let proxy = self.proxy;
        let acquired = proxy.hold(&mut self.deadline, proxy.refresher.acquire());
        let acquired = Box::pin(acquired).await?;
        acquired.map_err(ProxyError::TokenUnavailable)
    }

    /// A 401 on our token, or the wall's 403: waits for the next token, or for
    /// the news that there is none.
    async fn recover(
        &mut self,
        answer: Response<UpstreamBody>,
        refusal: Refusal,
    ) -> Result<Answer, ProxyError> {
        let proxy = self.proxy;
        if !self.body.is_replayable() {
            proxy.refresher.report(refusal);
            return Ok(self.not_replayable(Refused::unread(answer)));
        }
        let wait = async {
            let refused = Refused::read(answer, proxy).await;
            (refused, proxy.refresher.refused(refusal).await)
        };
        let held = proxy.hold(&mut self.deadline, wait).await;
        let (mut refused, verdict) =
            held.inspect_err(|_| proxy.metrics.replay(ReplayOutcome::Failed))?;
        if !matches!(verdict, Verdict::Replay(_)) {
            refused.check_whole()?;
        }
        match verdict {
            // The body may have gone on, and outgrown its limit, meanwhile.
            Verdict::Replay(_) if !self.body.is_replayable() => Ok(self.not_replayable(refused)),
            Verdict::Replay(next) => self.replay(next, refusal.objection).await,
            Verdict::PassOn => Ok(refused.into_answer()),
            Verdict::Failed(failure) => {
                // During back-off there was no wish for a replay.
                if failure.reason == FailureReason::RefreshFailed {
                    proxy.metrics.replay(ReplayOutcome::Failed);
                }
                Ok(refused.pass_on(failure.reason.into(), failure.retry_after))
            }
        }
    }

    /// The second sending. Whatever comes is the client's answer.
    async fn replay(
        &mut self,
        next: Arc<Published>,
        after: Objection,
    ) -> Result<Answer, ProxyError> {
        let sent = self.send_with_token(next).await;
        let sent = sent.inspect_err(|_| self.proxy.metrics.replay(ReplayOutcome::Failed))?;
        if let Some(objection) = objection(&sent.answer) {
            self.proxy.refresher.refused_again(self.refusal(objection, &sent));
            self.proxy.metrics.replay(ReplayOutcome::RefusedAgain);
        } else {
            if after == Objection::Wall {
                self.proxy.refresher.passed_wall(sent.used.generation);
            }
            self.confirm(&sent);
            self.proxy.metrics.replay(ReplayOutcome::Answered);
        }
        Ok(self.deliver(sent.answer))
    }

    /// Sends the request with `token`, or with a newer one that came while the
    /// request waited for a connection.
    async fn send_with_token(&self, token: Arc<Published>) -> Result<Sent, ProxyError> {
        let (place, used) = match self.place_at_once() {
            Some(place) => (place, token),
            None => (Box::pin(self.place()).await?, self.current().unwrap_or(token)),
        };
        let at = Instant::now();
        let answer = self.send(place, Some(&used), at).await?;
        Ok(Sent { used, at, answer })
    }

    /// A place among the upstream's connections, where they are not crowded.
    fn place_at_once(&self) -> Option<Place<ReplayBody>> {
        let upstream = &self.to.upstream;
        if upstream.is_crowded() { None } else { upstream.free_place() }
    }

    /// A place among the upstream's connections, as soon as there is one.
    async fn place(&self) -> Result<Place<ReplayBody>, ProxyError> {
        let limit = self.proxy.settings.upstream_timeout;
        if self.to.upstream.is_crowded() {
            self.read_ahead(limit).await?;
        }
        if let Some(place) = self.to.upstream.free_place() {
            return Ok(place);
        }
        timeout(limit, self.to.upstream.place()).await.map_err(|_| {
            self.proxy.metrics.limited(Limit::UpstreamConnections);
            ProxyError::UpstreamBusy(limit)
        })
    }

    /// Sends the request and waits for the answer's head; `at` is the time now. A
    /// client that is still giving its body is no silent upstream.
    async fn send(
        &self,
        place: Place<ReplayBody>,
        with: Option<&Published>,
        at: Instant,
    ) -> Result<Response<UpstreamBody>, ProxyError> {
        let limit = self.proxy.settings.upstream_timeout;
        let mut quiet_since = at;
        // What changes nothing may be seen twice.
        let again = || self.is_safe().then(|| self.request(with));
        let mut send = pin!(place.send(self.request(with), &self.spelling, again));
        loop {
            tokio::select! {
                biased;
                answer = send.as_mut() => return self.expect_answer(answer?),
                () = sleep_until(quiet_since + limit) => {}
            }
            match self.body.progress() {
                Some(progress) if progress > quiet_since => quiet_since = progress,
                _ if self.body.is_owed() => {
                    self.proxy.metrics.limited(Limit::BodyStall);
                    return Err(ProxyError::ClientStalled(limit));
                }
                _ => return Err(ProxyError::UpstreamTimeout(limit)),
            }
        }
    }

    /// Whether the client waits to be asked for its body.
    fn waits(&self) -> bool {
        let is_told = self.expects_continue && self.parts.version == Version::HTTP_11;
        is_told && self.body.is_untouched()
    }

    fn is_safe(&self) -> bool {
        self.parts.method.is_safe() && !self.body.is_any()
    }

    /// Waits for the whole body, if it is one that can be kept: where connections
    /// are few, a client that gives it slowly must not hold one.
    async fn read_ahead(&self, limit: Duration) -> Result<(), ProxyError> {
        let mut quiet_since = Instant::now();
        let mut read = pin!(self.body.read_ahead());
        loop {
            if let Ok(read) = timeout_at(quiet_since + limit, read.as_mut()).await {
                return read.map_err(|_| ProxyError::ClientBody);
            }
            match self.body.progress() {
                Some(progress) if progress > quiet_since => quiet_since = progress,
                _ => {
                    self.proxy.metrics.limited(Limit::BodyStall);
                    return Err(ProxyError::ClientStalled(limit));
                }
            }
        }
    }

    /// The request as the upstream gets it.
    fn request(&self, with: Option<&Published>) -> Request<ReplayBody> {
        let waits = self.waits();
        let expect = waits || !self.expects_continue;
        let mut request = Request::new(self.body.body());
        *request.method_mut() = self.parts.method.clone();
        *request.uri_mut() = self.parts.uri.clone();
        *request.version_mut() = Version::HTTP_11;
        *request.headers_mut() = for_upstream(&self.parts.headers, &self.rewrite(with, expect));
        if self.body.is_of_unknown_length() {
            // Else hyper takes a GET or HEAD for one without a body.
            request.headers_mut().insert(TRANSFER_ENCODING, CHUNKED);
        }
        if waits { when_asked_for(request) } else { request }
    }

    fn rewrite<'b>(&'b self, with: Option<&'b Published>, expect: bool) -> Rewrite<'b> {
        let (host, upgrade) = (self.to.host.as_ref(), self.upgrade.is_some());
        let rewrite = rewrite_of(&self.proxy.settings, self.came, self.credentials, with);
        Rewrite { host, expect, upgrade, ..rewrite }
    }

    fn refusal(&self, objection: Objection, sent: &Sent) -> Refusal {
        let (generation, sent_at) = (sent.used.generation, sent.at);
        Refusal { objection, generation, sent_at, endpoint: self.endpoint() }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::new(&self.parts.method, self.parts.uri.path())
    }

    /// An answer that only a good token gets is as good as a verdict.
    fn confirm(&self, sent: &Sent) {
        if !sent.used.is_verified() && sent.answer.status().is_success() {
            self.proxy.refresher.confirm(sent.used.generation, self.endpoint());
        }
    }

    fn expect_answer(
        &self,
        answer: Response<UpstreamBody>,
    ) -> Result<Response<UpstreamBody>, ProxyError> {
        let headers = answer.headers();
        let agreed = self.upgrade.is_some() && switches_to_websocket(headers);
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS && !agreed {
            return Err(ProxyError::UnexpectedUpgrade);
        }
        if !is_coding_known(headers) {
            return Err(ProxyError::UnknownAnswerCoding);
        }
        if !has_one_length(headers) {
            return Err(ProxyError::TwoAnswerLengths);
        }
        Ok(answer)
    }

    /// The upstream's answer, for the client; a switch of protocols begins when
    /// it is out.
    fn deliver(&mut self, mut answer: Response<UpstreamBody>) -> Answer {
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Refused::unread(answer).into_answer();
        }
        let Some(client) = self.upgrade.take() else {
            return Refused::unread(answer).into_answer();
        };
        let upstream = hyper::upgrade::on(&mut answer);
        let (mut parts, mut body) = answer.into_parts();
        parts.headers = for_switching_client(parts.headers);
        let spelling = body.take_spelling();
        let switched = Switched { upstream, place: body.into_place() };
        self.client.becomes(client, Next::Switched(switched));
        Response::from_parts(parts, AnswerBody::none_of_upstream(spelling))
    }

    fn not_replayable(&self, refused: Refused) -> Answer {
        self.proxy.metrics.limited(self.body.limit());
        self.proxy.metrics.replay(ReplayOutcome::NotReplayable);
        refused.pass_on(PassedOn::NotReplayable, self.proxy.refresher.retry_after())
    }
}

/// A request that was sent with a token, and what came.
struct Sent {
    used: Arc<Published>,
    at: Instant,
    answer: Response<UpstreamBody>,
}

/// A refusal that may be passed on later.
struct Refused {
    parts: response::Parts,
    body: AnswerBody,
}

impl Refused {
    /// Reads the body, within limits, so that its connection is free.
    async fn read(answer: Response<UpstreamBody>, proxy: &Proxy) -> Self {
        let (parts, body) = answer.into_parts();
        let body = AnswerBody::kept(body, KEPT_ANSWER, &proxy.memory).await;
        Self { parts, body }
    }

    /// Fails where the upstream has broken off the body, while that can still be
    /// told.
    fn check_whole(&mut self) -> Result<(), ProxyError> {
        self.body.take_failure().map_or(Ok(()), |error| Err(ProxyError::Protocol(error)))
    }

    fn unread(answer: Response<UpstreamBody>) -> Self {
        let (parts, body) = answer.into_parts();
        Self { parts, body: AnswerBody::streaming(body) }
    }

    fn into_answer(mut self) -> Answer {
        self.parts.headers = for_client(self.parts.headers);
        self.parts.version = Version::HTTP_11;
        Response::from_parts(self.parts, self.body)
    }

    fn pass_on(self, why: PassedOn, retry_after: Duration) -> Answer {
        let mut answer = self.into_answer();
        mark_passed_on(answer.headers_mut(), why, retry_after);
        answer
    }
}

/// What the upstream's answer says against the token, if it does. The API
/// speaks JSON: a 403 in HTML is the anti-bot wall's.
fn objection<B>(answer: &Response<B>) -> Option<Objection> {
    match answer.status() {
        StatusCode::UNAUTHORIZED => Some(Objection::Token),
        StatusCode::FORBIDDEN => is_html(answer.headers()).then_some(Objection::Wall),
        _ => None,
    }
}

fn is_html(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    ["text/html", "application/xhtml+xml"].iter().any(|html| kind.eq_ignore_ascii_case(html))
}

/// The same request, whose body the client is asked for when the upstream asks
/// for it, or has said nothing for a while.
fn when_asked_for(request: Request<ReplayBody>) -> Request<ReplayBody> {
    let asked = Arc::new(Notify::new());
    let invitation = {
        let asked = Arc::clone(&asked);
        async move { drop(timeout(CONTINUE_LIMIT, asked.notified()).await) }
    };
    let mut request = request.map(|body| body.after(invitation));
    on_informational(&mut request, move |interim| {
        if interim.status() == StatusCode::CONTINUE {
            asked.notify_one();
        }
    });
    request
}
