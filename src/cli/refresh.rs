//! `refresh`: renews the token now.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::ProgressBar;
use reqwest::{Method, StatusCode};
use serde_json::Value;

use super::client::request;
use super::{EXIT_FAILED, EXIT_REFUSED, NO_STORE, fail};
use crate::app::{AppError, refresh_once};
use crate::config::Config;

/// Renews the token through the running sidecar, or, where none answers, by
/// itself. Exit code 0 done, 1 refused, by the sidecar or by the API, 3 a source or
/// store failed.
pub(super) async fn execute(config: &Config) -> Result<ExitCode, AppError> {
    let progress = progress("asking the sources for a token");
    let by_sidecar = through_sidecar(config).await;
    let ended = match by_sidecar {
        Some(ended) => Ok(ended),
        None => by_itself(config).await,
    };
    progress.finish_and_clear();
    ended
}

/// A spinner with the time that has passed, on a terminal only.
pub(super) fn progress(what: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let progress = ProgressBar::new_spinner().with_message(what);
    progress.enable_steady_tick(Duration::from_millis(200));
    progress
}

/// `None`: no sidecar answers at the admin port.
async fn through_sidecar(config: &Config) -> Option<ExitCode> {
    let answer = request(config, Method::POST, "/refresh").ok()?.send().await;
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) if error.is_connect() => return None,
        Err(error) => return Some(fail(&format!("the sidecar broke off: {error}"), EXIT_FAILED)),
    };
    let status = answer.status();
    let body: Value = answer.json().await.unwrap_or_default();
    let text =
        |name: &str| body[name].as_str().map_or_else(|| body[name].to_string(), str::to_owned);
    Some(match status {
        StatusCode::OK => {
            print_result(&text("generation"), &text("source"), &text("expires_at"));
            ExitCode::SUCCESS
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => fail(
            &format!("the sidecar refused: {} ({})", text("message"), text("hint")),
            EXIT_REFUSED,
        ),
        _ => failed(&text("message"), body["refused"] == true),
    })
}

async fn by_itself(config: &Config) -> Result<ExitCode, AppError> {
    let refreshed = match refresh_once(config).await? {
        Ok(refreshed) => refreshed,
        Err(failure) => {
            return Ok(failed(&failure.error.to_string(), failure.error.is_refusal()));
        }
    };
    let published = &refreshed.published;
    let expires_at = published.token.expires_at().map_or("unknown".to_owned(), |at| at.to_string());
    print_result(&published.generation.to_string(), published.source.as_str(), &expires_at);
    for problem in &refreshed.unsaved {
        eprintln!("token-sidecar: not saved: {problem}");
    }
    if !refreshed.kept {
        eprintln!("token-sidecar: not saved: {NO_STORE}");
    }
    Ok(if refreshed.unsaved.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILED) })
}

/// 1 where the sources work and the API refuses what they give, else 3.
fn failed(message: &str, refused: bool) -> ExitCode {
    fail(
        &format!("the refresh failed: {message}"),
        if refused { EXIT_REFUSED } else { EXIT_FAILED },
    )
}

fn print_result(generation: &str, source: &str, expires_at: &str) {
    println!("generation  {generation}\nsource      {source}\nexpires_at  {expires_at}");
}
