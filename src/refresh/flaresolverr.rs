//! The source that has FlareSolverr open the shop's page in a browser.
//!
//! `maxTimeout` is no bound for it, and a caller that hangs up cancels
//! nothing: the call has a time limit of its own, and never more than one
//! runs, which is the business of [`Sources`](super::sources::Sources).

use std::time::Duration;

use reqwest::{Client, Response, redirect};
use serde_json::json;
use tokio::time::timeout;
use url::Url;

use super::RefreshSettings;
use super::error::{SourceError, with_causes};
use super::solution::{self, Found};

/// What a solve may take beyond `maxTimeout`: queue, start and end of the browser.
const SLACK: Duration = Duration::from_mins(1);
/// `/health` starts no browser but waits in the same queue.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(55);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The most that is read of a reply.
const LARGEST_REPLY: usize = 32 * 1024 * 1024;

/// A client of one FlareSolverr.
pub(super) struct FlareSolverr {
    client: Client,
    endpoint: Url,
    health: Url,
    shop_url: Url,
    solve_timeout: Duration,
    cookie_names: Vec<String>,
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
        let client = Client::builder()
            .no_proxy()
            .redirect(redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            // Calls are hours apart: a kept connection would only be stale.
            .pool_max_idle_per_host(0)
            .tls_backend_preconfigured(settings.solver_tls.clone())
            .build()?;
        Ok(Some(Self {
            client,
            endpoint: at(url, "/v1"),
            health: at(url, "/health"),
            shop_url: settings.shop_url.clone(),
            solve_timeout: settings.solve_timeout,
            cookie_names: settings.token_cookies.clone(),
        }))
    }

    /// Has the page opened once and reads the token out of its cookies.
    ///
    /// Lasts at most `SOLVE_TIMEOUT` + 60 s.
    pub(super) async fn solve(&self) -> Result<Found, SourceError> {
        let limit = self.solve_timeout.saturating_add(SLACK);
        timeout(limit, self.call()).await.unwrap_or(Err(SourceError::TimedOut(limit)))
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

    async fn call(&self) -> Result<Found, SourceError> {
        let body = json!({
            "cmd": "request.get",
            "url": self.shop_url.as_str(),
            "maxTimeout": u64::try_from(self.solve_timeout.as_millis()).unwrap_or(u64::MAX),
            "disableMedia": true,
            "returnOnlyCookies": true,
        });
        let request = self.client.post(self.endpoint.clone()).json(&body);
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status().as_u16();
        let body = read(response).await?;
        solution::read(status, &body, &self.cookie_names)
    }
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

    fn client(url: &str, solve_timeout: Duration) -> FlareSolverr {
        let mut settings = testing::settings("https://shop.test/");
        settings.flaresolverr_url = Some(Url::parse(url).unwrap());
        settings.solve_timeout = solve_timeout;
        FlareSolverr::from_settings(&settings).unwrap().unwrap()
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
        let reply = testing::solved(&token);
        let origin = Origin::start(move |_| {
            let reply = reply.clone();
            async move { testing::json(200, &reply) }
        })
        .await;
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
}
