//! Replies of FlareSolverr and its like: what is found is what a cookie of
//! the reply says, a failure is never a success, and no error shows a cookie.
//!
//! Input: two bytes for the HTTP status, then the body.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use token_sidecar::fuzzing::{read_solution, session_name};
use token_sidecar::token::{Cookies, Token};

fn cookies(reply: &Value) -> impl Iterator<Item = (&str, &str)> {
    let cookies = reply["solution"]["cookies"].as_array().into_iter().flatten();
    cookies.filter_map(|cookie| Some((cookie["name"].as_str()?, cookie["value"].as_str()?)))
}

fn check_found(status: u16, body: &[u8], token: &Token, found: &Cookies, names: &[String]) {
    let reply: Value = serde_json::from_slice(body).expect("JSON");
    assert!((200..300).contains(&status));
    let said = reply["status"].as_str();
    assert!(said.is_none_or(|said| said.eq_ignore_ascii_case("ok")));
    let is_source = |(name, value): (&str, &str)| {
        names.iter().any(|known| known == name) && Token::parse(value).as_ref() == Ok(token)
    };
    assert!(cookies(&reply).any(is_source), "a token out of nowhere");
    // The preferred name goes first.
    let preferred = |(name, value): (&str, &str)| name == names[0] && Token::parse(value).is_ok();
    let from_preferred =
        |(name, value): (&str, &str)| name == names[0] && Token::parse(value).as_ref() == Ok(token);
    assert!(!cookies(&reply).any(preferred) || cookies(&reply).any(from_preferred));
    for (name, value) in found.iter() {
        assert!(cookies(&reply).any(|pair| pair == (name, value)));
        assert_eq!(found.iter().filter(|(other, _)| *other == name).count(), 1);
    }
    for (name, _) in cookies(&reply) {
        assert!(found.get(name).is_some());
    }
}

fn check_error(body: &[u8], error: &str) {
    // The server's words are cut to 200 characters.
    assert!(error.chars().count() < 400, "{error}");
    assert!(!error.contains(['\n', '\r']), "{error:?}");
    let Ok(reply) = serde_json::from_slice::<Value>(body) else {
        return;
    };
    let words = ["message", "error", "detail"].map(|field| reply[field].to_string()).concat();
    for (_, value) in cookies(&reply).filter(|(_, value)| value.len() > 20) {
        assert!(!error.contains(value) || words.contains(value), "{error}");
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((status, body)) = data.split_first_chunk() else {
        return;
    };
    let status = u16::from_be_bytes(*status) % 1000;
    let names = ["access-token".to_owned(), "bearer_token".to_owned()];
    match read_solution(status, body, &names) {
        Ok((token, found, user_agent)) => {
            check_found(status, body, &token, &found, &names);
            assert!(user_agent.is_none_or(|name| !name.is_empty()));
        }
        Err(error) => check_error(body, &error.to_string()),
    }
    match session_name(status, body, "ours") {
        Ok(name) => assert!(!name.is_empty() && (200..300).contains(&status)),
        Err(error) => check_error(body, &error.to_string()),
    }
});
