//! The source that has FlareSolverr open the shop's page in a browser.
//!
//! # Invariants
//!
//! - `maxTimeout` is no bound for it, and a caller that hangs up cancels
//!   nothing: each call has a time limit of its own, and never more than one
//!   solve runs, which is the business of [`Sources`](super::sources::Sources).
//! - A reply without the cookie is asked again once, in a [`session`].
//! - A server that names a time to be left alone for is left alone that long.

use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use http::{HeaderMap, header};
use reqwest::{Client, Response, redirect};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use url::Url;

use super::error::{SourceError, with_causes};
use super::solution::{self, Found};
use super::{RefreshSettings, lock, session};
use crate::config::{ParentProxy, Secret};

/// What a call may take beyond `maxTimeout`: queue, start and end of the browser.
const SLACK: Duration = Duration::from_mins(1);
/// `/health` starts no browser but waits in the same queue.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(55);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The most that is read of a reply.
const LARGEST_REPLY: usize = 32 * 1024 * 1024;
/// The longest that a `Retry-After` is obeyed.
const LONGEST_REST: Duration = Duration::from_mins(10);
/// How long the end of the process waits for a session to be destroyed.
const CLOSING_LIMIT: Duration = Duration::from_secs(3);

/// A client of one FlareSolverr.
pub(super) struct FlareSolverr {
    client: Client,
    endpoint: Url,
    health: Url,
    shop_url: Url,
    solve_timeout: Duration,
    /// The longest that one call lasts.
    pub(super) call_limit: Duration,
    proxy: Option<ParentProxy>,
    cookie_names: Vec<String>,
    /// Until when it wants to be left alone.
    rests_until: Mutex<Option<Instant>>,
    /// Cancelled when the process ends.
    closing: CancellationToken,
    /// Solves, and the ends of sessions.
    pub(super) tasks: TaskTracker,
}

impl FlareSolverr {
    /// `None` without a URL, which may end in `/v1` or not. Does no I/O.
    ///
    /// # Errors
    ///
    /// Whatever keeps the HTTP client from being made.
    pub(super) fn from_settings(
        settings: &RefreshSettings,
    ) -> Result<Option<Self>, reqwest::Error> {
        let Some(url) = &settings.flaresolverr_url else {
            return Ok(None);
        };
        Ok(Some(Self {
            client: http_client(settings)?,
            endpoint: at(url, "/v1"),
            health: at(url, "/health"),
            shop_url: settings.shop_url.clone(),
            solve_timeout: settings.solve_timeout,
            call_limit: settings.solve_timeout.saturating_add(SLACK),
            proxy: settings.solver_proxy.clone(),
            cookie_names: settings.token_cookies.clone(),
            rests_until: Mutex::default(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }))
    }

    /// Has the page opened and reads the token out of its cookies; where a
    /// reply has no such cookie, once more in a session.
    ///
    /// Each of its calls lasts at most `SOLVE_TIMEOUT` + 60 s. Dropping the
    /// future destroys the session too. After [`Self::close`] it never ends.
    ///
    /// # Errors
    ///
    /// [`SourceError`]; during a rest that the server asked for, at once.
    pub(super) async fn solve(self: &Arc<Self>) -> Result<Found, SourceError> {
        let under_way = self.tasks.token();
        if let Some(solved) = self.closing.run_until_cancelled(self.try_solve()).await {
            return solved;
        }
        drop(under_way);
        // The process ends: that is no failure of the source.
        pending().await
    }

    async fn try_solve(self: &Arc<Self>) -> Result<Found, SourceError> {
        self.check_rest()?;
        match self.get(&json!({ "returnOnlyCookies": true })).await {
            Err(SourceError::NoCookie) => session::solve(self)
                .await
                .map_err(|error| SourceError::NoCookieEither(Box::new(error))),
            solved => solved,
        }
    }

    /// Asks whether it is well; starts no browser. Lasts at most 55 s.
    pub(super) async fn health(&self) -> Result<(), SourceError> {
        let request = self.client.get(self.health.clone()).timeout(HEALTH_TIMEOUT);
        let status = request.send().await.map_err(unreachable)?.status();
        if status.is_server_error() {
            let message = "it is not well".to_owned();
            return Err(SourceError::Failed { status: status.as_u16(), message });
        }
        Ok(())
    }

    /// Ends a solve that is under way, and waits for its session to be
    /// destroyed, for at most 3 s.
    pub(super) async fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        // Whatever is left then ends with the process.
        let _ = timeout(CLOSING_LIMIT, self.tasks.wait()).await;
    }

    /// `request.get` for the shop's page, with the fields of `more`.
    pub(super) async fn get(&self, more: &Value) -> Result<Found, SourceError> {
        let mut command = json!({
            "cmd": "request.get",
            "url": self.shop_url.as_str(),
            "maxTimeout": u64::try_from(self.solve_timeout.as_millis()).unwrap_or(u64::MAX),
            "disableMedia": true,
        });
        add(&mut command, more);
        let (status, reply) = self.command(self.proxied(command)).await?;
        solution::read(status, &reply, &self.cookie_names)
    }

    /// `command` with the parent proxy, where there is one. FlareSolverr takes
    /// that of a session from its creation alone and ignores it later, which
    /// a dialect may do the other way round: so both get it.
    pub(super) fn proxied(&self, mut command: Value) -> Value {
        if let Some(proxy) = &self.proxy {
            add(&mut command, &json!({ "proxy": proxy_json(proxy) }));
        }
        command
    }

    /// Sends a command and returns the status and the JSON of a reply that
    /// tells of no failure.
    pub(super) async fn command(&self, command: Value) -> Result<(u16, Value), SourceError> {
        let limit = self.call_limit;
        timeout(limit, self.call(&command)).await.unwrap_or(Err(SourceError::TimedOut(limit)))
    }

    async fn call(&self, command: &Value) -> Result<(u16, Value), SourceError> {
        let request = self.client.post(self.endpoint.clone()).json(command);
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status().as_u16();
        let rest = matches!(status, 429 | 503).then(|| retry_after(response.headers())).flatten();
        let reply = solution::parse(status, &read(response).await?);
        let Some(rest) = rest.map(|rest| rest.min(LONGEST_REST)) else {
            return Ok((status, reply?));
        };
        let until = Some(Instant::now() + rest);
        let mut rests_until = lock(&self.rests_until);
        *rests_until = until.max(*rests_until);
        drop(rests_until);
        reply.map(|reply| (status, reply)).map_err(|error| error.with_rest(rest))
    }

    fn check_rest(&self) -> Result<(), SourceError> {
        let until = *lock(&self.rests_until);
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        left.filter(|left| !left.is_zero()).map_or(Ok(()), |left| Err(SourceError::Resting(left)))
    }
}

fn http_client(settings: &RefreshSettings) -> Result<Client, reqwest::Error> {
    Client::builder()
        .no_proxy()
        .redirect(redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        // Calls are hours apart: a kept connection would only be stale.
        .pool_max_idle_per_host(0)
        .tls_backend_preconfigured(settings.solver_tls.clone())
        .build()
}

/// Adds the fields of `more`; both are objects.
fn add(command: &mut Value, more: &Value) {
    if let (Some(command), Some(more)) = (command.as_object_mut(), more.as_object()) {
        command.extend(more.clone());
    }
}

/// The parent proxy as FlareSolverr is told of it; it heeds a user only with a
/// password.
fn proxy_json(proxy: &ParentProxy) -> Value {
    let Some(user) = &proxy.user else {
        return json!({ "url": proxy.url() });
    };
    let password = proxy.password.as_ref().map_or("", Secret::expose);
    json!({ "url": proxy.url(), "username": user.expose(), "password": password })
}

/// The pause that the server asks for, in seconds or as a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    httpdate::parse_http_date(value).ok()?.duration_since(SystemTime::now()).ok()
}

/// `url` without a trailing `/v1`, and with `path` instead.
fn at(url: &Url, path: &str) -> Url {
    let base = url.path().trim_end_matches('/');
    let base = base.strip_suffix("/v1").unwrap_or(base).trim_end_matches('/');
    let path = format!("{base}{path}");
    let mut url = url.clone();
    url.set_path(&path);
    url.set_query(None);
    url.set_fragment(None);
    url
}

async fn read(mut response: Response) -> Result<Vec<u8>, SourceError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
        if body.len() + chunk.len() > LARGEST_REPLY {
            return Err(SourceError::TooLarge(LARGEST_REPLY));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn unreachable(error: reqwest::Error) -> SourceError {
    // The URL may hold a password.
    SourceError::Unreachable(with_causes(&error.without_url()))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{self, Origin, jwt};
    use super::*;

    fn client(url: &str, solve_timeout: Duration) -> Arc<FlareSolverr> {
        let mut settings = testing::settings("https://shop.test/");
        settings.flaresolverr_url = Some(Url::parse(url).unwrap());
        settings.solve_timeout = solve_timeout;
        Arc::new(FlareSolverr::from_settings(&settings).unwrap().unwrap())
    }

    /// A solver that always gives this token.
    async fn giving(token: &str) -> Origin {
        let reply = testing::solved(token);
        Origin::start(move |_| {
            let reply = reply.clone();
            async move { testing::json(200, &reply) }
        })
        .await
    }

    #[test]
    fn the_url_may_come_with_v1_or_without() {
        for url in ["http://s:8191", "http://s:8191/", "http://s:8191/v1", "http://s:8191/v1/"] {
            let url = Url::parse(url).unwrap();
            assert_eq!(at(&url, "/v1").as_str(), "http://s:8191/v1");
            assert_eq!(at(&url, "/health").as_str(), "http://s:8191/health");
        }
        let url = Url::parse("https://u:p@s/solver/v1?x=1").unwrap();
        assert_eq!(at(&url, "/v1").as_str(), "https://u:p@s/solver/v1");
    }

    #[tokio::test]
    async fn the_page_is_asked_for_as_documented() {
        let token = jwt("a", 600);
        let origin = giving(&token).await;
        let solver = client(&origin.url("/v1"), Duration::from_secs(45));
        assert_eq!(solver.solve().await.unwrap().token.expose(), token);
        let [request] = &origin.requests()[..] else { panic!("one request") };
        assert_eq!(request.target, "POST /v1");
        assert_eq!(request.headers["content-type"], "application/json");
        let body: serde_json::Value = serde_json::from_slice(&request.body).unwrap();
        let expected = json!({
            "cmd": "request.get", "url": "https://shop.test/", "maxTimeout": 45000,
            "disableMedia": true, "returnOnlyCookies": true,
        });
        assert_eq!(body, expected);
    }

    #[tokio::test]
    async fn a_solver_that_is_not_there_is_unreachable_and_the_error_hides_the_password() {
        let address = testing::unused_address().await;
        let solver = client(&format!("http://user:hunter2@{address}"), Duration::from_secs(1));
        let error = solver.solve().await.unwrap_err();
        assert!(matches!(error, SourceError::Unreachable(_)), "{error}");
        assert!(error.to_string().contains("refused"), "{error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
        assert!(solver.health().await.is_err());
    }

    #[tokio::test]
    async fn an_endless_reply_is_given_up() {
        let huge = bytes::Bytes::from(vec![b' '; LARGEST_REPLY + 1]);
        let origin = Origin::start(move |_| {
            let huge = huge.clone();
            async move { testing::reply(200, huge) }
        })
        .await;
        let solver = client(&origin.url(""), Duration::from_secs(5));
        assert!(matches!(solver.solve().await, Err(SourceError::TooLarge(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_wedged_solver_is_given_up_a_minute_after_its_own_limit() {
        let origin = Origin::start(|_| std::future::pending()).await;
        let solver = client(&origin.url(""), Duration::from_secs(45));
        let error = solver.solve().await.unwrap_err();
        assert_eq!(error.to_string(), "no answer within 1m 45s");
    }

    /// A solver that always replies thus, and the error of a first solve.
    async fn busy(status: u16, rest: &'static str) -> (Origin, Arc<FlareSolverr>, SourceError) {
        let origin = Origin::start(move |_| async move {
            let mut reply = testing::json(status, &json!({ "detail": "busy" }));
            reply.headers_mut().insert("retry-after", rest.parse().unwrap());
            reply
        })
        .await;
        let solver = client(&origin.url(""), Duration::from_secs(5));
        let error = solver.solve().await.unwrap_err();
        (origin, solver, error)
    }

    #[tokio::test]
    async fn a_solver_that_asks_for_a_rest_is_left_alone() {
        for status in [429, 503] {
            let (origin, solver, error) = busy(status, "30").await;
            assert_eq!(
                error.to_string(),
                format!("HTTP {status}: busy; it asks for a rest of 30s")
            );
            let error = solver.solve().await.unwrap_err();
            assert!(matches!(error, SourceError::Resting(_)), "{error}");
            assert!(
                error
                    .to_string()
                    .starts_with("not asked: it wants to be left alone for another 29s"),
                "{error}"
            );
            assert_eq!(origin.requests().len(), 1);
        }
    }

    #[tokio::test]
    async fn a_rest_lasts_ten_minutes_at_most_and_may_be_a_date() {
        let (_, _, error) = busy(503, "86400").await;
        assert!(error.to_string().ends_with("a rest of 10m"), "{error}");
        let (_, _, error) = busy(429, "Fri, 31 Dec 9999 23:59:59 GMT").await;
        assert!(error.to_string().ends_with("a rest of 10m"), "{error}");
    }

    #[tokio::test]
    async fn without_a_rest_that_can_be_read_the_solver_is_asked_again() {
        for (status, rest) in [
            (429, "soon"),
            (503, "-1"),
            (429, "0"),
            (503, "Fri, 31 Dec 1999 23:59:59 GMT"),
            (500, "30"),
            (408, "30"),
        ] {
            let (origin, solver, error) = busy(status, rest).await;
            assert!(error.to_string().starts_with(&format!("HTTP {status}: busy")), "{error}");
            solver.solve().await.unwrap_err();
            assert_eq!(origin.requests().len(), 2, "{status} {rest}");
        }
    }

    #[tokio::test]
    async fn the_solver_is_told_of_the_parent_proxy() {
        let origin = giving(&jwt("a", 600)).await;
        let parent = |user: Option<&str>, password: Option<&str>| ParentProxy {
            host: "parent.test".to_owned(),
            port: 3128,
            user: user.map(Secret::new),
            password: password.map(Secret::new),
        };
        for (proxy, expected) in [
            (parent(None, None), json!({ "url": "http://parent.test:3128" })),
            (
                parent(Some("u"), Some("p@:")),
                json!({ "url": "http://parent.test:3128", "username": "u", "password": "p@:" }),
            ),
            (
                parent(Some("u"), None),
                json!({ "url": "http://parent.test:3128", "username": "u", "password": "" }),
            ),
        ] {
            let mut settings = testing::settings("https://shop.test/");
            settings.flaresolverr_url = Some(Url::parse(&origin.url("")).unwrap());
            settings.solver_proxy = Some(proxy);
            let solver = Arc::new(FlareSolverr::from_settings(&settings).unwrap().unwrap());
            solver.solve().await.unwrap();
            let body = origin.requests().pop().unwrap().body;
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["proxy"], expected);
        }
    }
}
