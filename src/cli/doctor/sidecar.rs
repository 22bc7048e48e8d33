//! The running sidecar: what it says of itself, a request through it, and
//! whether any parser has come.

use std::time::{Duration, Instant};

use reqwest::{Certificate, Client, Method, Proxy, Response, header};
use serde_json::Value;

use super::report::Check;
use super::{Patient, readable, verifier};
use crate::cli::client::{request, root_cause};
use crate::config::{Config, Secret, reachable};
use crate::hints;

/// Longest wait for the admin port.
const STATUS_LIMIT: Duration = Duration::from_secs(5);
/// What a request through the sidecar may take beyond `HOLD_TIMEOUT`.
const SLACK: Duration = Duration::from_secs(15);

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
    checks.push(match reason_against(patient, &status).await {
        Some(reason) => Check::skipped("request", through_what(config), reason),
        None => through(config).await,
    });
    // Of the status before the request above, which is none of a parser's.
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

/// Why no request may go through the sidecar: it would begin a refresh.
async fn reason_against(patient: &Patient, status: &Value) -> Option<&'static str> {
    let fingerprint = status["token"]["fingerprint"].as_str().unwrap_or_default();
    if patient.solve {
        None
    } else if status["ready"] != true {
        Some("it is not ready, so this could start a solve: only with --solve")
    } else if verifier::refuses(patient, fingerprint).await {
        Some("its token is refused, so this could start a solve: only with --solve")
    } else {
        None
    }
}

fn through_what(config: &Config) -> String {
    let address = reachable(config.listen.proxy);
    format!("VERIFY_URL through the proxy at {address}, trusting TRUST_DIR's ca.pem")
}

/// A request to the API as a parser makes it.
async fn through(config: &Config) -> Check {
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
            let found = described(response).await;
            Check::failed(
                "request",
                tried,
                found,
                "README.md, «When it does not», says what it means",
            )
        }
    }
}

async fn ask_through(config: &Config) -> Result<Response, String> {
    let path = config.ca.trust_dir.join("ca.pem");
    let pem = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let limit = config.refresh.hold_timeout.saturating_add(SLACK);
    let asked = async {
        let request = parser(config, &pem)?.get(config.api.verify_url.to_string()).timeout(limit);
        // Some is needed where AUTHORIZATION=present; it is replaced by the token.
        request.header(header::AUTHORIZATION, "Bearer x").send().await
    };
    asked.await.map_err(|error| {
        if error.is_timeout() {
            format!("no answer within {}", readable(limit))
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
    Check::ok("parsers", tried, format!("{}, those of earlier doctors included", seen.join(", ")))
}
