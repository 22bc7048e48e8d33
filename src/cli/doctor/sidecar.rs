//! The running sidecar: what it says of itself, a request through it, and
//! whether any parser has come.

use std::time::{Duration, Instant};

use reqwest::{Certificate, Client, Method, Proxy, Response, StatusCode, header};
use serde_json::Value;

use super::report::Check;
use super::verifier::past_the_wall;
use super::{Patient, readable};
use crate::cli::client::{request, root_cause};
use crate::config::{Config, Secret, reachable};
use crate::hints;

/// Longest wait for the admin port.
const STATUS_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for the answer to a request through the sidecar, which holds
/// none of ours.
const REQUEST_LIMIT: Duration = Duration::from_secs(15);

/// The checks of the sidecar that these settings describe.
pub(super) async fn examine(patient: &Patient) -> Vec<Check> {
    let config = &patient.config;
    let tried = format!("/status of the running sidecar at {}", config.listen.admin);
    let status = match status(config).await {
        Ok(status) => status,
        Err(problem) => {
            let advice = "is it running, with the same ADMIN_LISTEN as doctor has?";
            return vec![Check::failed("sidecar", tried, problem, advice)];
        }
    };
    let mut checks = vec![readiness(tried, &status)];
    checks.extend(hints(&status));
    checks.push(through(patient).await);
    checks.push(parsers(&status));
    checks
}

async fn status(config: &Config) -> Result<Value, String> {
    let asked = async {
        let request = request(config, Method::GET, "/status")?.timeout(STATUS_LIMIT);
        request.send().await?.error_for_status()?.json().await
    };
    asked.await.map_err(|error| root_cause(&error))
}

fn readiness(tried: String, status: &Value) -> Check {
    if status["ready"] == true {
        let (version, uptime) = (&status["version"], status["uptime_s"].as_u64());
        let uptime = readable(Duration::from_secs(uptime.unwrap_or_default()));
        let version = version.as_str().unwrap_or("unknown");
        return Check::ok("sidecar", tried, format!("ready, version {version}, up {uptime}"));
    }
    let reason = status["reason"].as_str().unwrap_or("without a reason");
    let error = status["refresh"]["last_error"].as_str();
    let found = match error {
        Some(error) => format!("not ready: {reason}; the last refresh failed: {error}"),
        None => format!("not ready: {reason}"),
    };
    let advice = match reason {
        "draining" => "it is ending: start it again",
        _ => "the checks of sources and verifier say why; `token-sidecar refresh` tries at once",
    };
    Check::failed("sidecar", tried, found, advice)
}

/// What the sidecar itself would tell a person.
fn hints(status: &Value) -> Vec<Check> {
    let hints = status["hints"].as_array().into_iter().flatten().filter_map(Value::as_str);
    hints.map(|hint| Check::warning("hint", "hints of /status", hint, "")).collect()
}

fn through_what(config: &Config) -> String {
    let address = reachable(config.listen.proxy);
    format!("VERIFY_URL through the proxy at {address}, trusting TRUST_DIR's ca.pem")
}

/// A request to the API as a parser makes it, which starts no refresh.
async fn through(patient: &Patient) -> Check {
    let config = &patient.config;
    let tried = through_what(config);
    let started = Instant::now();
    match ask_through(config).await {
        Err(problem) => {
            let advice = "see PROXY_LISTEN, PROXY_AUTH and CLIENT_NETWORKS of the running sidecar, and TRUST_DIR: \
                          has its CA been renewed since the start?";
            Check::failed("request", tried, problem, advice)
        }
        Ok(response) if response.status().is_success() => {
            let (status, took) = (response.status().as_u16(), readable(started.elapsed()));
            Check::ok("request", tried, format!("HTTP {status} after {took}"))
        }
        Ok(response) => {
            let advice = remedy(patient, response.status());
            Check::failed("request", tried, described(response).await, advice)
        }
    }
}

/// What to do about an answer that is none.
fn remedy(patient: &Patient, status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => {
            "the sidecar's token is refused: a parser's next request has it renewed, \
             `token-sidecar refresh` does it at once"
        }
        StatusCode::FORBIDDEN => past_the_wall(patient),
        _ => "TOKEN_UPDATE_GUIDE.md, «When something fails», says what it means",
    }
}

async fn ask_through(config: &Config) -> Result<Response, String> {
    let path = config.ca.trust_dir.join("ca.pem");
    let pem = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let asked = async {
        let request =
            parser(config, &pem)?.get(config.api.verify_url.to_string()).timeout(REQUEST_LIMIT);
        // Some is needed where AUTHORIZATION=present; it is replaced by the token.
        request.header(header::AUTHORIZATION, "Bearer x").send().await
    };
    asked.await.map_err(|error| {
        if error.is_timeout() {
            format!("no answer within {}", readable(REQUEST_LIMIT))
        } else {
            root_cause(&error)
        }
    })
}

/// A client that uses the proxy and trusts nothing but `ca_pem`.
fn parser(config: &Config, ca_pem: &[u8]) -> reqwest::Result<Client> {
    let mut proxy = Proxy::all(format!("http://{}", reachable(config.listen.proxy)))?;
    let pair = config.access.proxy_auth.as_ref().map(Secret::expose);
    if let Some((user, password)) = pair.and_then(|pair| pair.split_once(':')) {
        proxy = proxy.basic_auth(user, password);
    }
    // Goes with the CONNECT alone.
    proxy = proxy.headers([(header::USER_AGENT, hints::DOCTOR)].into_iter().collect());
    let trusted = Certificate::from_pem(ca_pem)?;
    Client::builder().proxy(proxy).tls_certs_only([trusted]).build()
}

/// An answer that is none: its status, and what the sidecar says of it.
async fn described(response: Response) -> String {
    let status = response.status().as_u16();
    let said = response.headers().get("proxy-status").and_then(|value| value.to_str().ok());
    let said = said.unwrap_or("from the shop").to_owned();
    let body: Value = response.json().await.unwrap_or_default();
    match (body["error"].as_str(), body["message"].as_str()) {
        (Some(code), Some(message)) => format!("HTTP {status} {code}: {message}"),
        _ => format!("HTTP {status}, {said}"),
    }
}

fn parsers(status: &Value) -> Check {
    let tried = "requests to the API that have come to the sidecar";
    let count = |route: &str| status["requests"][route].as_u64().unwrap_or_default();
    let routes = ["intercept", "absolute", "gateway", "sni"];
    let seen: Vec<_> = routes.into_iter().filter(|route| count(route) > 0).collect();
    if seen.is_empty() {
        let advice = "no parser has come: `token-sidecar env` prints what it needs, and a self-test for its container";
        return Check::warning("parsers", tried, "none", advice);
    }
    let seen: Vec<_> = seen.iter().map(|route| format!("{} by {route}", count(route))).collect();
    Check::ok("parsers", tried, seen.join(", "))
}
