//! `token`: what the stores hold.

use std::process::ExitCode;
use std::time::Duration;

use reqwest::Method;
use serde_json::Value;

use super::client::request;
use super::{EXIT_FAILED, NO_STORE, fail};
use crate::app::{AppError, StoredToken, stored_tokens};
use crate::config::Config;
use crate::token::{Clock, Token};

/// Longest wait for the running sidecar.
const LIMIT: Duration = Duration::from_secs(2);

/// Prints each store's token without the secret, or with `reveal` the newest
/// one bare. Exit code 1 where there is none, 3 where a store failed.
pub(super) async fn execute(config: &Config, reveal: bool) -> Result<ExitCode, AppError> {
    let stored = stored_tokens(config).await?;
    for StoredToken { store, token } in &stored {
        if let Err(error) = token {
            eprintln!("token-sidecar: {store}: {error}");
        }
    }
    let failed = stored.iter().any(|stored| stored.token.is_err());
    let found =
        stored.iter().filter_map(|stored| Some((stored, stored.token.as_ref().ok()?.as_ref()?)));
    let newest = found.clone().max_by_key(|(_, token)| token.issued_at());
    let Some((_, newest)) = newest else {
        return Ok(without_stores(config, failed).await);
    };
    if reveal {
        println!("{}", newest.expose());
    } else {
        found.for_each(|(stored, token)| print_state(&stored.store, token));
    }
    Ok(if failed { ExitCode::from(EXIT_FAILED) } else { ExitCode::SUCCESS })
}

/// No store has a token: the running sidecar may, in its memory alone.
async fn without_stores(config: &Config, failed: bool) -> ExitCode {
    let code = if failed { EXIT_FAILED } else { 1 };
    let Some(token) = in_memory(config).await else {
        return fail("no store has a token; `token-sidecar refresh` gets one", code);
    };
    let text = |name: &str| token[name].as_str().unwrap_or("unknown").to_owned();
    println!("store        memory of the running sidecar");
    for name in ["fingerprint", "issued_at", "expires_at"] {
        println!("{name:<12} {}", text(name));
    }
    fail(&format!("no store has the token, it is lost at a restart: {NO_STORE}"), code)
}

/// The token in `/status` of the running sidecar, without its secret.
async fn in_memory(config: &Config) -> Option<Value> {
    let request = request(config, Method::GET, "/status").ok()?.timeout(LIMIT);
    let mut status: Value = request.send().await.ok()?.json().await.ok()?;
    Some(status["token"].take()).filter(Value::is_object)
}

fn print_state(store: &str, token: &Token) {
    let time =
        |at: Option<crate::token::Timestamp>| at.map_or("unknown".to_owned(), |at| at.to_string());
    println!("store        {store}");
    println!("fingerprint  {}", token.fingerprint());
    println!("issued_at    {}", time(token.issued_at()));
    println!("expires_at   {}", time(token.expires_at()));
    println!(
        "live         {}",
        if token.is_live(Clock::new().now()) { "yes" } else { "no, expired" }
    );
}
