//! The commands' side of the admin port.

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder};

use super::fail;
use crate::config::{Config, reachable};

/// Longest wait for a health check's answer.
const HEALTH_LIMIT: Duration = Duration::from_secs(5);

/// A request to the admin port of the sidecar that `config` describes.
///
/// # Errors
///
/// The HTTP client cannot be made.
pub(super) fn request(
    config: &Config,
    method: Method,
    path: &str,
) -> reqwest::Result<RequestBuilder> {
    let client = Client::builder().no_proxy().build()?;
    let url = format!("http://{}{path}", reachable(config.listen.admin));
    let request = client.request(method, url);
    Ok(match &config.access.admin_token {
        Some(token) => request.bearer_auth(token.expose()),
        None => request,
    })
}

/// `healthcheck`: asks `/live` or `/ready`.
pub(super) async fn healthcheck(config: &Config, ready: bool) -> ExitCode {
    let path = if ready { "/ready" } else { "/live" };
    let asked = async {
        let request = request(config, Method::GET, path)?.timeout(HEALTH_LIMIT);
        let answer = request.send().await?;
        Ok::<_, reqwest::Error>((answer.status(), answer.text().await?))
    };
    match asked.await {
        Ok((status, text)) if status.is_success() => {
            println!("{}", text.trim());
            ExitCode::SUCCESS
        }
        Ok((_, text)) => fail(text.trim(), 1),
        Err(error) => {
            let at = config.listen.admin;
            fail(&format!("no answer from the admin port at {at}: {}", root_cause(&error)), 1)
        }
    }
}

/// What is at the bottom of it: connection refused, mostly.
pub(super) fn root_cause(error: &dyn Error) -> String {
    error.source().map_or_else(|| error.to_string(), root_cause)
}
