//! The commands' side of the admin port.

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder};
use serde_json::Value;

use super::fail;
use crate::config::{Config, reachable};

/// Longest wait for the answer to a question.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

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
    print_answer(ask(config, path).await)
}

/// `status`: prints `/status` for people, or `/metrics`.
pub(super) async fn status(config: &Config, metrics: bool) -> ExitCode {
    if metrics {
        return print_answer(ask(config, "/metrics").await);
    }
    print_answer(ask(config, "/status").await.map(indented))
}

fn print_answer(answer: Result<String, ExitCode>) -> ExitCode {
    match answer {
        Ok(text) => {
            println!("{}", text.trim_end());
            ExitCode::SUCCESS
        }
        Err(code) => code,
    }
}

fn indented(json: String) -> String {
    let value: Option<Value> = serde_json::from_str(&json).ok();
    value.map_or(json, |value| format!("{value:#}"))
}

/// What the running sidecar answers at `path`.
///
/// # Errors
///
/// The exit code, where it does not answer, or not with a success; what was
/// wrong has been said.
async fn ask(config: &Config, path: &str) -> Result<String, ExitCode> {
    let asked = async {
        let request = request(config, Method::GET, path)?.timeout(ANSWER_LIMIT);
        let answer = request.send().await?;
        Ok::<_, reqwest::Error>((answer.status(), answer.text().await?))
    };
    match asked.await {
        Ok((status, text)) if status.is_success() => Ok(text),
        Ok((_, text)) => Err(fail(text.trim(), 1)),
        Err(error) => {
            let at = config.listen.admin;
            Err(fail(&format!("no answer from the admin port at {at}: {}", root_cause(&error)), 1))
        }
    }
}

/// What is at the bottom of it: connection refused, mostly.
pub(super) fn root_cause(error: &dyn Error) -> String {
    error.source().map_or_else(|| error.to_string(), root_cause)
}
