//! Reading of what FlareSolverr, or a server that speaks like it, replies.
//!
//! Only the cookie tells success: `status: "ok"` comes without it too, and
//! dialects differ in nearly everything else.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::error::{SourceError, cut};
use crate::token::{Cookies, Token};

/// Moments above this many seconds, the year 5138, are told in milliseconds.
const MOST_SECONDS: f64 = 1e11;

/// A token and what came with it.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) token: Token,
    pub(crate) cookies: Cookies,
    /// The `User-Agent` of the browser that got them.
    pub(crate) user_agent: Option<String>,
}

/// The JSON of a reply that tells of no failure.
pub(crate) fn parse(status: u16, body: &[u8]) -> Result<Value, SourceError> {
    let reply: Value = serde_json::from_slice(body).map_err(|_| unreadable(status, body))?;
    if is_success(status, &reply) { Ok(reply) } else { Err(failed(status, &reply)) }
}

/// Reads the reply to a `request.get`; `names` are the token's cookie names,
/// the preferred first.
pub(crate) fn read(status: u16, reply: &Value, names: &[String]) -> Result<Found, SourceError> {
    let solution = reply.get("solution").ok_or_else(|| failed(status, reply))?;
    let now = moment(reply.get("endTimestamp")).unwrap_or_else(now);
    let cookies = solution.get("cookies").and_then(Value::as_array).into_iter().flatten();
    let cookies: Vec<_> = cookies.filter_map(|cookie| SolvedCookie::read(cookie, now)).collect();
    let user_agent = solution.get("userAgent").and_then(Value::as_str);
    let user_agent = user_agent.filter(|text| !text.is_empty()).map(str::to_owned);
    choose(&cookies, names).map(|found| Found { user_agent, ..found })
}

/// The name of the session that a `sessions.create` made; `ours` where the
/// reply leaves it out.
pub(crate) fn session_name(status: u16, reply: &Value, ours: &str) -> Result<String, SourceError> {
    let said = |field| reply.get(field).and_then(Value::as_str).filter(|text| !text.is_empty());
    match (said("session"), said("status")) {
        (Some(name), _) => Ok(name.to_owned()),
        (None, Some(_)) => Ok(ours.to_owned()),
        (None, None) => {
            Err(SourceError::Garbled { status, problem: "it does not speak of a session" })
        }
    }
}

/// Picks the token out of `cookies`.
pub(super) fn choose(cookies: &[SolvedCookie], names: &[String]) -> Result<Found, SourceError> {
    let ranked = by_rank(cookies);
    if let Some(token) = names.iter().find_map(|name| the_one(&ranked, name)) {
        let cookies = Cookies::from_pairs(ranked.iter().map(|c| (&*c.name, &*c.value)));
        return Ok(Found { token, cookies, user_agent: None });
    }
    let is_there = |cookie: &SolvedCookie| !cookie.value.is_empty() && names.contains(&cookie.name);
    Err(if cookies.iter().any(is_there) { SourceError::NoToken } else { SourceError::NoCookie })
}

/// What counts of a cookie. No `Debug`: the value is secret.
pub(super) struct SolvedCookie {
    pub(super) name: String,
    pub(super) value: String,
    /// Whether its path is `/`, as the shop's is.
    pub(super) at_root: bool,
    /// Whether its own time is over.
    pub(super) expired: bool,
}

impl SolvedCookie {
    /// `now` in seconds since the epoch, by the solver's clock.
    fn read(cookie: &Value, now: f64) -> Option<Self> {
        let text = |field: &str| cookie.get(field).and_then(Value::as_str);
        let expiry = ["expiry", "expires"].into_iter().find_map(|field| moment(cookie.get(field)));
        Some(Self {
            name: text("name")?.to_owned(),
            value: text("value")?.to_owned(),
            at_root: text("path").is_none_or(|path| path == "/"),
            expired: expiry.is_some_and(|expiry| expiry < now),
        })
    }
}

/// Of several of one name the best that is valid; `ranked` by [`by_rank`].
fn the_one(ranked: &[&SolvedCookie], name: &str) -> Option<Token> {
    let mut named = ranked.iter().rev().filter(|cookie| cookie.name == name);
    named.find_map(|cookie| Token::parse(&cookie.value).ok())
}

/// All cookies, the better ones later: one that lives before one that does
/// not, path `/` before others, the last of the rest.
fn by_rank(cookies: &[SolvedCookie]) -> Vec<&SolvedCookie> {
    let mut ranked: Vec<_> = cookies.iter().collect();
    ranked.sort_by_key(|cookie| (!cookie.expired, cookie.at_root));
    ranked
}

/// A moment in seconds since the epoch, told in seconds or milliseconds;
/// -1, 0, `null` and words are none: such a cookie ends with its session.
fn moment(told: Option<&Value>) -> Option<f64> {
    let told = told?.as_f64().filter(|told| *told > 0.0)?;
    Some(if told > MOST_SECONDS { told / 1000.0 } else { told })
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

/// Some servers tell errors by the HTTP status, some by `status`, some by both.
fn is_success(status: u16, reply: &Value) -> bool {
    let said = reply.get("status").and_then(Value::as_str);
    (200..300).contains(&status) && said.is_none_or(|said| said.eq_ignore_ascii_case("ok"))
}

fn failed(status: u16, reply: &Value) -> SourceError {
    SourceError::Failed { status, message: message(reply).unwrap_or_default() }
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

    use super::super::testing::{issued, jwt};
    use super::*;

    const REPLIES: &str = include_str!("../../tests/fixtures/flaresolverr-replies.json");

    fn names() -> Vec<String> {
        vec!["access-token".into(), "bearer_token".into()]
    }

    fn read_bytes(status: u16, body: &[u8]) -> Result<Found, SourceError> {
        read(status, &parse(status, body)?, &names())
    }

    fn read_json(status: u16, reply: &Value) -> Result<Found, SourceError> {
        read_bytes(status, reply.to_string().as_bytes())
    }

    fn recorded() -> Vec<(String, u16, Value)> {
        let replies: Value = serde_json::from_str(REPLIES).unwrap();
        let cases = replies["cases"].as_object().unwrap().iter();
        let status = |case: &Value| u16::try_from(case["http_status"].as_u64().unwrap()).unwrap();
        cases.map(|(name, case)| (name.clone(), status(case), case["json"].clone())).collect()
    }

    /// What the reply came to: `token`, or the start of the error.
    fn outcome(read: &Result<Found, SourceError>) -> String {
        read.as_ref().map_or_else(ToString::to_string, |_| "token".to_owned())
    }

    #[test]
    fn every_recorded_reply_is_read_as_what_it_is() {
        let refused = "HTTP 500: Error: Error solving the challenge. ";
        let unsolved = format!("{refused}Timeout after 8.0 seconds.");
        let denied = format!("{refused}Cloudflare has blocked this request.");
        let no_name = format!("{refused}Message: unknown error: net::ERR_NAME_NOT_RESOLVED");
        let no_browser = format!("{refused}Message: invalid session id: session deleted");
        let no_driver = format!("{refused}HTTPConnectionPool(host='localhost', port=38201)");
        let table: &[(&str, &str)] = &[
            ("index_GET_/", "HTTP 200: "),
            ("health_GET_/health", "HTTP 200: "),
            ("ok_set_cookie_header", "token"),
            ("ok_cookie_by_sync_js", "token"),
            ("ok_returnOnlyCookies", "token"),
            ("domain_cookie", "token"),
            ("self_signed_https", "token"),
            ("no_cookie_page", "no cookie"),
            ("late_js_cookie_3s", "no cookie"),
            ("challenge_solved", "token"),
            ("challenge_unsolved_maxTimeout8000", &unsolved),
            ("access_denied", &denied),
            ("unreachable_refused", "no cookie"),
            ("unreachable_dns", &no_name),
            ("server_closes", "no cookie"),
            ("site_503_without_cookie", "no cookie"),
            ("site_403_with_cookie", "token"),
            ("cookie_path_scoped_api", "no cookie"),
            ("cookie_dup_names", "token"),
            ("cookie_empty", "no cookie"),
            ("cookie_odd", "what it gave is no token"),
            ("bad_cmd", "HTTP 500: Error: Request parameter 'cmd' = 'request.getx' is invalid."),
            ("missing_cmd", "HTTP 500: Error: Request parameter 'cmd' is mandatory."),
            ("missing_url", "HTTP 500: Error: Request parameter 'url' is mandatory"),
            ("invalid_json", "HTTP 500: (400, 'Invalid JSON')"),
            ("json_array", "HTTP 500: cannot convert dictionary update sequence"),
            ("no_content_type", "HTTP 500: Error: Request parameter 'cmd' is mandatory."),
            ("GET_/v1", "HTTP 405: Method not allowed."),
            ("POST_/v1/", "HTTP 404: Not found: '/v1/'"),
            ("sessions_list_empty", "HTTP 200: "),
            ("sessions_create", "HTTP 200: Session created successfully."),
            ("sessions_create_again", "HTTP 200: Session already exists."),
            ("sessions_destroy", "HTTP 200: The session has been removed."),
            ("sessions_destroy_missing", "HTTP 500: Error: The session doesn't exist."),
            ("two_step_1_create", "HTTP 200: Session created successfully."),
            ("two_step_2_late3s_wait5", "no cookie"),
            ("two_step_3_read_cookies", "token"),
            ("two_step_4_destroy", "HTTP 200: The session has been removed."),
            ("browser_killed_mid_solve", &no_browser),
            ("chromedriver_killed_mid_solve", &no_driver),
            ("russian_challenge_title_not_recognised", "no cookie"),
            ("token_only_in_localStorage", "no cookie"),
            ("request_headers_seen_by_site", "no cookie"),
        ];
        let recorded = recorded();
        assert_eq!(recorded.len(), table.len());
        for ((name, status, reply), (case, expected)) in recorded.iter().zip(table) {
            assert_eq!(name, case);
            let outcome = outcome(&read_json(*status, reply));
            assert!(outcome.starts_with(expected), "{name}: {outcome}");
        }
    }

    #[test]
    fn all_cookies_of_a_reply_are_kept_and_the_browsers_name() {
        let (_, status, reply) = recorded().swap_remove(2);
        let found = read_json(status, &reply).unwrap();
        let names: Vec<_> = found.cookies.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["refresh-token", "access-token", "tid"]);
        assert_eq!(found.cookies.get("tid"), Some("session-cookie"));
        assert_eq!(found.cookies.get("access-token"), Some(found.token.cookie_value()));
        assert!(found.user_agent.is_some_and(|agent| agent.starts_with("Mozilla/5.0 (X11; ")));
    }

    #[test]
    fn a_session_has_the_name_that_the_server_gives() {
        let recorded = recorded();
        let (_, status, created) =
            recorded.iter().find(|(name, ..)| name == "sessions_create").unwrap();
        assert_eq!(session_name(*status, created, "ours").unwrap(), "shop");
        for (reply, expected) in [
            (json!({ "session": "theirs" }), Some("theirs")),
            (json!({ "status": "ok", "session": null }), Some("ours")),
            (json!({ "status": "ok", "session": "" }), Some("ours")),
            (json!({}), None),
            (json!([1]), None),
        ] {
            assert_eq!(session_name(200, &reply, "ours").ok().as_deref(), expected, "{reply}");
        }
    }

    /// A bare JWT that is the same whenever it is made.
    fn named(subject: &str) -> String {
        issued(subject, 1).expose().to_owned()
    }

    /// A reply at second 1,800,000,000 with cookies `access-token`, told by
    /// subject, path and expiry.
    fn reply(end: &Value, cookies: &[(&str, &str, Value)]) -> Value {
        let cookie = |(subject, path, expiry): &(&str, &str, Value)| {
            let value = if subject.is_empty() { "rubbish".into() } else { named(subject) };
            json!({ "name": "access-token", "value": value, "path": path, "expiry": expiry })
        };
        let cookies: Vec<_> = cookies.iter().map(cookie).collect();
        json!({ "status": "ok", "endTimestamp": end, "solution": { "cookies": cookies } })
    }

    #[test]
    fn of_several_cookies_of_one_name_the_best_is_taken() {
        let (end, end_s) = (json!(1_800_000_000_000_u64), json!(1_800_000_000.5));
        let (past, ahead) = (json!(1_799_999_999), json!(1_800_000_100));
        let none = || Value::Null;
        let of = |cookies: &[(&str, &str, Value)]| reply(&end, cookies);
        let table = [
            ("the last of two", of(&[("a", "/", none()), ("b", "/", none())]), "b"),
            ("path / before another", of(&[("a", "/", none()), ("b", "/x", none())]), "a"),
            ("another where there is none", of(&[("a", "/x", none())]), "a"),
            ("the last valid one", of(&[("a", "/", none()), ("", "/", none())]), "a"),
            ("valid before path /", of(&[("a", "/x", none()), ("", "/", none())]), "a"),
            ("one that lives", of(&[("a", "/", ahead.clone()), ("b", "/", past.clone())]), "a"),
            ("life before path /", of(&[("a", "/x", none()), ("b", "/", past.clone())]), "a"),
            ("an old one where no other is", of(&[("a", "/", past.clone())]), "a"),
            ("-1 lives", of(&[("a", "/", json!(-1)), ("b", "/", past.clone())]), "a"),
            ("0 lives", of(&[("a", "/", json!(0)), ("b", "/", past.clone())]), "a"),
            (
                "milliseconds",
                of(&[("a", "/", json!(1_800_000_100_000_u64)), ("b", "/", past.clone())]),
                "a",
            ),
            (
                "past in milliseconds",
                of(&[("a", "/", none()), ("b", "/", json!(1_799_999_999_000_u64))]),
                "a",
            ),
            (
                "a clock in seconds",
                reply(&end_s, &[("a", "/", ahead), ("b", "/", past.clone())]),
                "a",
            ),
            ("our clock", reply(&none(), &[("a", "/", none()), ("b", "/", json!(1.5))]), "a"),
        ];
        for (case, reply, expected) in table {
            let token = read_json(200, &reply).unwrap().token;
            assert_eq!(token.expose(), named(expected), "{case}");
        }
    }

    #[test]
    fn the_end_of_a_cookie_is_understood_in_every_dialect() {
        // The better path is taken unless that cookie's own time is over.
        let is_over = |end: Value| {
            let mut cookie = json!({ "name": "access-token", "value": named("b"), "path": "/" });
            cookie.as_object_mut().unwrap().extend(end.as_object().unwrap().clone());
            let other = json!({ "name": "access-token", "value": named("a"), "path": "/x" });
            let solution = json!({ "cookies": [cookie, other] });
            let reply =
                json!({ "status": "ok", "endTimestamp": 1_800_000_000.25, "solution": solution });
            read_json(200, &reply).unwrap().token.expose() == named("a")
        };
        for (end, expected) in [
            (json!({}), false),
            (json!({ "expiry": 1_800_000_001 }), false),
            (json!({ "expiry": 1_799_999_999 }), true),
            (json!({ "expires": 1_800_000_000.5 }), false),
            (json!({ "expires": 1_799_999_999.5 }), true),
            (json!({ "expires": 1_799_999_999_500.0 }), true),
            (json!({ "expires": -1 }), false),
            (json!({ "expires": -1.0 }), false),
            (json!({ "expires": null }), false),
            (json!({ "expires": "Session" }), false),
            (json!({ "expiry": null, "expires": 1_799_999_999.5 }), true),
            (json!({ "expiry": -1, "expires": null }), false),
        ] {
            assert_eq!(is_over(end.clone()), expected, "{end}");
        }
    }

    #[test]
    fn the_preferred_name_wins_and_the_other_is_a_stand_in() {
        let (a, b) = (jwt("a", 60), jwt("b", 60));
        let chosen = |preferred: &str| {
            let cookies = json!([
                { "name": "bearer_token", "value": b }, { "name": "access-token", "value": preferred },
            ]);
            let reply = json!({ "status": "ok", "solution": { "cookies": cookies } });
            read_json(200, &reply).unwrap().token.expose().to_owned()
        };
        assert_eq!(chosen(&a), a);
        assert_eq!(chosen(""), b);
    }

    #[test]
    fn dialects_are_understood() {
        let value = format!("\"Bearer {}\"", jwt("a", 60));
        let cookie = |field: &str, expires: Value| {
            json!([
                { "name": "access-token", "value": value, "path": "/", field: expires },
                { "name": "nameless" }, "not an object",
            ])
        };
        let with = |cookies: Value| {
            json!({
                "status": "ok", "message": null, "startTimestamp": 1.5, "endTimestamp": 2.5,
                "solution": { "status": 200, "cookies": cookies, "userAgent": null },
            })
        };
        let table = [
            ("expires as a float", with(cookie("expires", json!(1_797_944_278.5)))),
            ("expires -1", with(cookie("expires", json!(-1)))),
            ("expires null", with(cookie("expires", Value::Null))),
            ("expires in words", with(cookie("expires", json!("Session")))),
            ("expiry", with(cookie("expiry", json!(1_797_944_278)))),
            ("no status", json!({ "solution": { "cookies": cookie("expires", json!(-1)) } })),
            (
                "STATUS in capitals",
                json!({ "status": "OK", "solution": { "cookies": cookie("expires", json!(-1)) } }),
            ),
        ];
        for (case, reply) in table {
            let found = read_json(200, &reply);
            assert!(found.is_ok_and(|found| found.user_agent.is_none()), "{case}");
        }
    }

    #[test]
    fn failures_are_told_in_every_dialect() {
        let error = json!({ "status": "error", "message": "timed out", "solution": null });
        let no_solution = json!({ "status": "ok", "solution": null });
        let no_cookies = json!({ "status": "ok", "solution": { "cookies": null } });
        let list = || json!({ "detail": [{ "msg": "bad" }] });
        let with_cookie = |status: &Value| {
            let cookie = json!({ "name": "access-token", "value": jwt("a", 60) });
            json!({ "status": status, "message": "half done", "solution": { "cookies": [cookie] } })
        };
        let table = [
            ("error as HTTP 200", 200, error, "HTTP 200: timed out"),
            ("408", 408, json!({ "detail": "Request Timeout" }), "HTTP 408: Request Timeout"),
            ("408 with a list", 408, list(), r#"HTTP 408: [{"msg":"bad"}]"#),
            ("422", 422, json!({ "detail": "no url" }), "HTTP 422: no url"),
            ("422 with a list", 422, list(), r#"HTTP 422: [{"msg":"bad"}]"#),
            ("error beside a cookie", 200, with_cookie(&json!("error")), "HTTP 200: half done"),
            ("500 beside a cookie", 500, with_cookie(&json!("ok")), "HTTP 500: half done"),
            ("429", 429, json!({ "error": "slow down" }), "HTTP 429: slow down"),
            ("503", 503, json!({ "detail": "no browser free" }), "HTTP 503: no browser free"),
            ("solution null", 200, no_solution, "no cookie"),
            ("cookies null", 200, no_cookies, "no cookie"),
            ("an array", 200, json!([1]), "HTTP 200: "),
        ];
        for (case, status, reply, expected) in table {
            assert_eq!(outcome(&read_json(status, &reply)), expected, "{case}");
        }
    }

    #[test]
    fn what_is_no_json_is_told_too() {
        let garbled = "HTTP 200, an answer that cannot be read: ";
        for (case, status, body, expected) in [
            ("nothing", 200, "", format!("{garbled}it is empty")),
            ("a page", 200, "<html>", format!("{garbled}it is not JSON")),
            ("a gateway's word", 503, "upstream down\n", "HTTP 503: upstream down".into()),
        ] {
            assert_eq!(outcome(&read_bytes(status, body.as_bytes())), expected, "{case}");
        }
    }
}
