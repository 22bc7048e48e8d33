//! `token`: what the stores hold.

use std::process::ExitCode;

use super::{EXIT_FAILED, fail};
use crate::app::{AppError, StoredToken, stored_tokens};
use crate::config::Config;
use crate::token::{Clock, Token};

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
        let code = if failed { EXIT_FAILED } else { 1 };
        return Ok(fail("no store has a token; `token-sidecar refresh` gets one", code));
    };
    if reveal {
        println!("{}", newest.expose());
    } else {
        found.for_each(|(stored, token)| print_state(&stored.store, token));
    }
    Ok(if failed { ExitCode::from(EXIT_FAILED) } else { ExitCode::SUCCESS })
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
