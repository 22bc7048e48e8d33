//! The source that asks the shop itself, without a browser: each API origin
//! for an anonymous token, then the shop's page for its cookie.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cookie::Cookie;
use http::{HeaderMap, Request, Response, header};
use serde_json::Value;
use tokio::time::timeout;
use url::Url;

use super::error::{SourceError, cut, with_causes};
use super::solution::{self, Found, SolvedCookie};
use super::{RefreshSettings, browser};
use crate::net::Dialer;
use crate::token::{Cookies, Token};

const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const LARGEST_ANSWER: usize = 64 * 1024;
const LARGEST_PAGE: usize = 8 * 1024 * 1024;

/// The shop's own doors.
pub(super) struct Direct {
    dialer: Arc<Dialer>,
    doors: Vec<Url>,
    shop_url: Url,
    cookie_names: Vec<String>,
}

impl Direct {
    /// Asks by way of `dialer`.
    pub(super) fn from_settings(settings: &RefreshSettings, dialer: Arc<Dialer>) -> Self {
        Self {
            dialer,
            doors: settings.api_origins.iter().map(anonymous_door).collect(),
            shop_url: settings.shop_url.clone(),
            cookie_names: settings.token_cookies.clone(),
        }
    }

    /// Tries the doors in turn; the first token counts.
    pub(super) async fn ask(&self) -> Result<Found, SourceError> {
        let mut failures = Vec::new();
        for door in &self.doors {
            match self.anonymous(door).await {
                Ok(found) => return Ok(found),
                Err(error) => failures.push((name_of(door), error)),
            }
        }
        match self.page().await {
            Ok(found) => Ok(found),
            Err(error) => {
                failures.push((name_of(&self.shop_url), error));
                Err(SourceError::Doors(failures))
            }
        }
    }

    async fn anonymous(&self, door: &Url) -> Result<Found, SourceError> {
        let request = browser::api(Request::post(door.as_str()))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Bytes::from_static(b"{}"));
        let response = self.fetch(request, LARGEST_ANSWER).await?;
        let status = response.status().as_u16();
        if !matches!(status, 200 | 201) {
            let message = cut(&String::from_utf8_lossy(response.body()));
            return Err(SourceError::Failed { status, message });
        }
        let token = access_token(status, response.body())?;
        Ok(Found { token, cookies: Cookies::default(), user_agent: None })
    }

    async fn page(&self) -> Result<Found, SourceError> {
        let request = browser::page(Request::get(self.shop_url.as_str())).body(Bytes::new());
        let response = self.fetch(request, LARGEST_PAGE).await?;
        let status = response.status();
        let found = solution::choose(&set_cookies(response.headers()), &self.cookie_names);
        let as_asked = |found| Found { user_agent: Some(browser::USER_AGENT.to_owned()), ..found };
        found.map(as_asked).map_err(|error| match error {
            SourceError::NoCookie if !status.is_success() => {
                SourceError::Failed { status: status.as_u16(), message: "no cookie".to_owned() }
            }
            other => other,
        })
    }

    async fn fetch(
        &self,
        request: Result<Request<Bytes>, http::Error>,
        limit: usize,
    ) -> Result<Response<Bytes>, SourceError> {
        let request = request.map_err(|error| SourceError::Unreachable(error.to_string()))?;
        timeout(REQUEST_TIMEOUT, self.dialer.fetch(request, limit))
            .await
            .map_err(|_| SourceError::TimedOut(REQUEST_TIMEOUT))?
            .map_err(|error| SourceError::Unreachable(with_causes(&error)))
    }
}

fn anonymous_door(origin: &Url) -> Url {
    let mut door = origin.clone();
    door.set_path(&format!("{}/v1/auth/anonymous", origin.path().trim_end_matches('/')));
    door
}

/// A URL without what could be secret in it.
fn name_of(url: &Url) -> String {
    format!("{}{}", url.origin().ascii_serialization(), url.path())
}

fn access_token(status: u16, body: &[u8]) -> Result<Token, SourceError> {
    let garbled = |problem| SourceError::Garbled { status, problem };
    let answer: Value = serde_json::from_slice(body).map_err(|_| garbled("it is not JSON"))?;
    let token = answer.pointer("/token/accessToken").and_then(Value::as_str);
    let token = token.ok_or_else(|| garbled("it has no token.accessToken"))?;
    Token::parse(token).map_err(|_| SourceError::NoToken)
}

/// The cookies that the answer sets; those that it deletes are empty or over.
fn set_cookies(headers: &HeaderMap) -> Vec<SolvedCookie> {
    let fields = headers.get_all(header::SET_COOKIE).iter();
    fields
        .filter_map(|field| Cookie::parse(field.to_str().ok()?).ok())
        .filter(|cookie| cookie.max_age().is_none_or(cookie::time::Duration::is_positive))
        .map(|cookie| SolvedCookie {
            name: cookie.name().to_owned(),
            value: cookie.value().to_owned(),
            at_root: cookie.path().is_none_or(|path| path == "/"),
            expired: false,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::{self, Origin, jwt};
    use super::*;

    fn direct(origins: &[&Origin], shop: &Origin) -> Direct {
        let url = |origin: &&Origin| Url::parse(&origin.url("/web/api")).unwrap();
        let mut settings = testing::settings(&shop.url("/"));
        settings.api_origins = origins.iter().map(url).collect();
        Direct::from_settings(&settings, testing::dialer())
    }

    async fn answering(status: u16, body: Value) -> Origin {
        Origin::start(move |_| {
            let body = body.clone();
            async move { testing::json(status, &body) }
        })
        .await
    }

    #[tokio::test]
    async fn the_api_is_asked_for_an_anonymous_token() {
        let token = jwt("a", 600);
        let body =
            json!({ "token": { "accessToken": format!("Bearer {token}"), "expAccessToken": 1 } });
        let api = answering(201, body).await;
        let found = direct(&[&api], &api).ask().await.unwrap();
        assert_eq!(found.token.expose(), token);
        let [request] = &api.requests()[..] else { panic!("one request") };
        assert_eq!(request.target, "POST /web/api/v1/auth/anonymous");
        assert_eq!(request.headers["content-type"], "application/json");
        assert_eq!(&request.body[..], b"{}");
    }

    #[tokio::test]
    async fn a_closed_door_leads_to_the_next_and_then_to_the_page() {
        let closed = answering(403, json!({ "message": "no" })).await;
        let odd = answering(200, json!({})).await;
        let token = jwt("a", 600);
        let cookie = format!("access-token=Bearer%20{token}; Path=/; Domain=.shop.test");
        let shop = Origin::start(move |_| {
            let mut response = testing::reply(200, "<html></html>".into());
            for cookie in ["tid=1; Path=/", &cookie] {
                response.headers_mut().append("set-cookie", cookie.parse().unwrap());
            }
            async move { response }
        })
        .await;
        let found = direct(&[&closed, &odd], &shop).ask().await.unwrap();
        assert_eq!(found.token.expose(), token);
        assert_eq!(found.cookies.get("tid"), Some("1"));
    }

    #[tokio::test]
    async fn the_error_names_every_door() {
        let closed = answering(403, json!({ "message": "no" })).await;
        let shop = answering(503, json!({})).await;
        let error = direct(&[&closed], &shop).ask().await.unwrap_err().to_string();
        let expected = format!(
            "{}: HTTP 403: {{\"message\":\"no\"}}, {}: HTTP 503: no cookie",
            closed.url("/web/api/v1/auth/anonymous"),
            shop.url("/"),
        );
        assert_eq!(error, expected);
    }

    #[test]
    fn a_deleted_cookie_is_none() {
        let mut headers = HeaderMap::new();
        headers.append("set-cookie", "access-token=x; Max-Age=0".parse().unwrap());
        assert!(set_cookies(&headers).is_empty());
    }
}
