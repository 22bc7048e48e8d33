//! Reading of what FlareSolverr, or a server that speaks like it, replies.
//!
//! Only the cookie tells success: `status: "ok"` comes without it too, and
//! dialects differ in nearly everything else.

use serde_json::Value;

use super::error::{SourceError, cut};
use crate::token::{Cookies, Token};

/// A token and the cookies that came with it.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) token: Token,
    pub(super) cookies: Cookies,
    /// The browser's, which the cookies may be bound to.
    pub(super) user_agent: Option<String>,
}

/// Reads a reply; `names` are the token's cookie names, the preferred first.
pub(super) fn read(status: u16, body: &[u8], names: &[String]) -> Result<Found, SourceError> {
    let reply: Value = serde_json::from_slice(body).map_err(|_| unreadable(status, body))?;
    if !is_success(status, &reply) {
        let message = message(&reply).unwrap_or_default();
        return Err(SourceError::Failed { status, message });
    }
    let cookies = reply.pointer("/solution/cookies").and_then(Value::as_array);
    let cookies: Vec<_> = cookies.into_iter().flatten().filter_map(SolvedCookie::read).collect();
    let mut found = choose(&cookies, names)?;
    let user_agent = reply.pointer("/solution/userAgent").and_then(Value::as_str);
    found.user_agent = user_agent.map(str::to_owned);
    Ok(found)
}

/// Picks the token out of `cookies`.
pub(super) fn choose(cookies: &[SolvedCookie], names: &[String]) -> Result<Found, SourceError> {
    let found = names.iter().find_map(|name| {
        let token = the_one(cookies, name)?;
        let all = Cookies::from_pairs(by_rank(cookies).map(|c| (&*c.name, &*c.value)));
        Some(Found { token, cookies: all, user_agent: None })
    });
    found.ok_or_else(|| {
        let is_there =
            |cookie: &SolvedCookie| !cookie.value.is_empty() && names.contains(&cookie.name);
        if cookies.iter().any(is_there) { SourceError::NoToken } else { SourceError::NoCookie }
    })
}

/// What counts of a cookie. No `Debug`: the value is secret.
pub(super) struct SolvedCookie {
    pub(super) name: String,
    pub(super) value: String,
    /// Whether its path is `/`, as the shop's is.
    pub(super) at_root: bool,
}

impl SolvedCookie {
    fn read(cookie: &Value) -> Option<Self> {
        let text = |field: &str| cookie.get(field).and_then(Value::as_str);
        Some(Self {
            name: text("name")?.to_owned(),
            value: text("value")?.to_owned(),
            at_root: text("path").is_none_or(|path| path == "/"),
        })
    }
}

/// Of several of one name: path `/` before others, the last valid one.
fn the_one(cookies: &[SolvedCookie], name: &str) -> Option<Token> {
    by_rank(cookies)
        .filter(|cookie| cookie.name == name)
        .filter_map(|cookie| Token::parse(&cookie.value).ok())
        .last()
}

/// All cookies, the better ones later.
fn by_rank(cookies: &[SolvedCookie]) -> impl Iterator<Item = &SolvedCookie> {
    let others = cookies.iter().filter(|cookie| !cookie.at_root);
    others.chain(cookies.iter().filter(|cookie| cookie.at_root))
}

/// Some servers tell errors by the HTTP status, some by `status`, some by both.
fn is_success(status: u16, reply: &Value) -> bool {
    let said = reply.get("status").and_then(Value::as_str);
    (200..300).contains(&status)
        && said.is_none_or(|said| said.eq_ignore_ascii_case("ok"))
        && reply.get("solution").is_some()
}

/// The server's own words, wherever it puts them.
fn message(reply: &Value) -> Option<String> {
    let said = ["message", "error", "detail"]
        .iter()
        .filter_map(|field| reply.get(field))
        .find(|said| !said.is_null() && said.as_str() != Some(""))?;
    Some(cut(&said.as_str().map_or_else(|| said.to_string(), str::to_owned)))
}

/// Proxies in between answer in HTML or plain text, which may say why.
fn unreadable(status: u16, body: &[u8]) -> SourceError {
    if (200..300).contains(&status) {
        let problem = if body.is_empty() { "it is empty" } else { "it is not JSON" };
        return SourceError::Garbled { status, problem };
    }
    SourceError::Failed { status, message: cut(&String::from_utf8_lossy(body)) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::jwt;
    use super::*;

    const REPLIES: &str = include_str!("../../tests/fixtures/flaresolverr-replies.json");

    fn names() -> Vec<String> {
        vec!["access-token".into(), "bearer_token".into()]
    }

    fn read_json(status: u16, reply: &Value) -> Result<Found, SourceError> {
        read(status, reply.to_string().as_bytes(), &names())
    }

    fn recorded(case: &str) -> Result<Found, SourceError> {
        let replies: Value = serde_json::from_str(REPLIES).unwrap();
        let case = &replies["cases"][case];
        let status = u16::try_from(case["http_status"].as_u64().unwrap()).unwrap();
        read_json(status, &case["json"])
    }

    #[test]
    fn every_recorded_reply_is_read_as_what_it_is() {
        let replies: Value = serde_json::from_str(REPLIES).unwrap();
        let with_token = [
            "ok_set_cookie_header",
            "ok_cookie_by_sync_js",
            "ok_returnOnlyCookies",
            "domain_cookie",
            "self_signed_https",
            "challenge_solved",
            "site_403_with_cookie",
            "cookie_dup_names",
            "two_step_3_read_cookies",
        ];
        for (case, reply) in replies["cases"].as_object().unwrap() {
            let outcome = recorded(case);
            let has_solution = reply["json"].get("solution").is_some();
            match &outcome {
                Ok(found) => assert!(found.token.expires_at().is_some(), "{case}"),
                Err(SourceError::NoCookie) => assert!(has_solution, "{case}"),
                Err(SourceError::NoToken) => assert_eq!(case, "cookie_odd"),
                Err(SourceError::Failed { .. }) => assert!(!has_solution, "{case}"),
                Err(other) => panic!("{case}: {other}"),
            }
            assert_eq!(outcome.is_ok(), with_token.contains(&&**case), "{case}");
        }
    }

    #[test]
    fn all_cookies_of_a_reply_are_kept() {
        let found = recorded("ok_set_cookie_header").unwrap();
        let names: Vec<_> = found.cookies.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["refresh-token", "access-token", "tid"]);
        assert_eq!(found.cookies.get("tid"), Some("session-cookie"));
        assert_eq!(found.cookies.get("access-token"), Some(found.token.cookie_value()));
    }

    #[test]
    fn the_solvers_own_words_are_passed_on() {
        let error = recorded("unreachable_dns").unwrap_err().to_string();
        assert!(error.starts_with("HTTP 500: Error: Error solving the challenge. Message: unknown error: net::ERR_NAME_NOT_RESOLVED"), "{error}");
        let error = recorded("invalid_json").unwrap_err().to_string();
        assert_eq!(error, "HTTP 500: (400, 'Invalid JSON')");
    }

    fn cookie(name: &str, value: &str, path: &str) -> Value {
        json!({ "name": name, "value": value, "path": path })
    }

    fn chosen(cookies: &[Value]) -> Result<Token, SourceError> {
        let reply = json!({ "status": "ok", "solution": { "cookies": cookies } });
        read_json(200, &reply).map(|found| found.token)
    }

    #[test]
    fn of_two_cookies_of_one_name_path_root_and_the_last_valid_count() {
        let (a, b, c) = (jwt("a", 60), jwt("b", 60), jwt("c", 60));
        let name = "access-token";
        let token = chosen(&[cookie(name, &a, "/"), cookie(name, &b, "/"), cookie(name, &c, "/x")]);
        assert_eq!(token.unwrap().expose(), b);
        let token = chosen(&[cookie(name, &a, "/"), cookie(name, "rubbish", "/")]);
        assert_eq!(token.unwrap().expose(), a);
        assert_eq!(chosen(&[cookie(name, &c, "/x")]).unwrap().expose(), c);
    }

    #[test]
    fn the_preferred_name_wins_and_the_other_is_a_stand_in() {
        let (a, b) = (jwt("a", 60), jwt("b", 60));
        let both = [cookie("bearer_token", &b, "/"), cookie("access-token", &a, "/")];
        assert_eq!(chosen(&both).unwrap().expose(), a);
        let broken = [cookie("bearer_token", &b, "/"), cookie("access-token", "", "/")];
        assert_eq!(chosen(&broken).unwrap().expose(), b);
    }

    #[test]
    fn dialects_are_understood() {
        let value = format!("\"Bearer {}\"", jwt("a", 60));
        for expires in [json!(1_797_944_278.5), json!(-1), Value::Null, json!("Session")] {
            let reply = json!({
                "status": "ok", "message": null, "startTimestamp": 1.5,
                "solution": { "status": 200, "cookies": [
                    { "name": "access-token", "value": value, "path": "/", "expires": expires },
                    { "name": "nameless" }, "not an object",
                ] },
            });
            assert!(read_json(200, &reply).is_ok(), "{expires}");
        }
    }

    #[test]
    fn failures_are_told_in_every_dialect() {
        let cases = [
            (
                200,
                json!({ "status": "error", "message": "timed out", "solution": null }),
                "HTTP 200: timed out",
            ),
            (408, json!({ "detail": "Request Timeout" }), "HTTP 408: Request Timeout"),
            (422, json!({ "detail": [{ "msg": "bad" }] }), r#"HTTP 422: [{"msg":"bad"}]"#),
            (429, json!({ "error": "slow down" }), "HTTP 429: slow down"),
            (200, json!({ "status": "ok", "solution": null }), "no cookie"),
            (200, json!({ "status": "ok", "solution": { "cookies": null } }), "no cookie"),
            (200, json!([1]), "HTTP 200: "),
        ];
        for (status, reply, expected) in cases {
            assert_eq!(read_json(status, &reply).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn what_is_no_json_is_told_too() {
        let error = |status, body: &[u8]| read(status, body, &names()).unwrap_err().to_string();
        assert_eq!(error(200, b""), "HTTP 200, an answer that cannot be read: it is empty");
        assert_eq!(
            error(200, b"<html>"),
            "HTTP 200, an answer that cannot be read: it is not JSON"
        );
        assert_eq!(error(503, b"upstream down\n"), "HTTP 503: upstream down");
    }
}
