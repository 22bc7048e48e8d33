//! What the shop gets to see as `Authorization` and `access-token`.

use futures_util::future::{join, join_all};

use crate::support::client::{API, Request, Session, Way};
use crate::support::http::Response;
use crate::support::origin::{Origin, Recorded};
use crate::support::token::Jwt;
use crate::support::{Stage, World};

const PATH: &str = "/web/api/v2/x";

/// Fields of a request.
type Fields = Vec<(&'static str, String)>;

fn authorization(value: impl Into<String>) -> Fields {
    vec![("Authorization", value.into())]
}

fn cookie(value: impl Into<String>) -> Fields {
    vec![("Cookie", value.into())]
}

fn request_to(path: &str, fields: &Fields) -> Request {
    fields.iter().fold(Request::get(path), |request, (name, value)| request.field(name, value))
}

/// Sends one request with these fields; returns the answer and what the shop saw.
async fn exchange(world: &World, session: &mut Session, fields: &Fields) -> (Response, Recorded) {
    let before = world.origin.requests().len();
    let response = session.call(&request_to(PATH, fields)).await;
    let mut requests = world.origin.requests();
    assert_eq!(requests.len(), before + 1, "not sent once: {fields:?}");
    (response, requests.remove(before))
}

/// What the shop saw of a request that it answered.
async fn seen(world: &World, session: &mut Session, fields: &Fields) -> Recorded {
    let (response, request) = exchange(world, session, fields).await;
    assert_eq!(response.status, 200, "{fields:?}: {response:?}");
    request
}

/// Exactly one `Authorization` with `token`, and no other token in a cookie.
fn check_carries(request: &Recorded, token: &str, case: &str) {
    assert_eq!(request.head.values("authorization"), [format!("Bearer {token}")], "{case}");
    for value in request.head.values("cookie") {
        let tokens = value.split("; ").filter_map(|pair| pair.split_once("token="));
        for (name, value) in tokens {
            assert_eq!(value, format!("Bearer%20{token}"), "{case}: {name}");
        }
    }
}

/// The client's fields arrive with nothing but the current token, by every way.
async fn check_is_replaced(world: &World, fields: &Fields) {
    for way in Way::ALL {
        let request = seen(world, &mut world.open(way).await, fields).await;
        check_carries(&request, &world.token, &format!("{way:?} {fields:?}"));
    }
}

/// Every form in which parsers send a token that is not a good one.
fn damaged_forms() -> Vec<Fields> {
    let stale = Jwt::anonymous().issued_ago(100_000).make();
    let expired = Jwt::anonymous().expires_in(-10).make();
    let expired_personal = Jwt::personal().expires_in(-10).make();
    let values = [
        format!("Bearer {stale}"),
        format!("Bearer {expired}"),
        format!("Bearer {expired_personal}"),
        format!("Bearer%20{stale}"),
        format!("Bearer+{stale}"),
        format!("bearer {stale}"),
        format!("Bearer Bearer {stale}"),
        format!("\"Bearer {stale}\""),
        format!("Bearer \"{stale}\""),
        stale.clone(),
        String::new(),
        "Bearer".to_owned(),
        "Bearer ".to_owned(),
        format!("Bearer {}", &stale[..stale.len() / 2]),
        format!("Bearer {stale}; Path=/"),
        "Bearer null".to_owned(),
        "Bearer undefined".to_owned(),
        "Basic eDp5".to_owned(),
        "none of \u{e9} this".to_owned(),
    ];
    let mut forms: Vec<Fields> = values.into_iter().map(authorization).collect();
    forms.push(Vec::new());
    forms.push(vec![("Authorization", "Bearer a".into()), ("authorization", "Bearer b".into())]);
    for name in ["access-token", "bearer_token"] {
        forms.push(cookie(format!("{name}=Bearer%20{stale}")));
        forms.push(cookie(format!("a=1; {name}=Bearer%20{expired_personal}; b=2")));
    }
    let both = [authorization(&stale), cookie(format!("access-token={stale}"))];
    forms.push(both.concat());
    forms
}

#[tokio::test]
async fn every_damaged_form_is_replaced_by_every_way() {
    let world = World::start().await;
    for way in Way::ALL {
        let mut session = world.open(way).await;
        for fields in damaged_forms() {
            let request = seen(&world, &mut session, &fields).await;
            check_carries(&request, &world.token, &format!("{way:?} {fields:?}"));
        }
    }
}

#[tokio::test]
async fn every_damaged_form_is_replaced_anew_for_the_replay_by_every_way() {
    let world = World::start().await;
    world.kill_token();
    world.solver.pause();
    let forms = damaged_forms();
    let all = Way::ALL.into_iter().flat_map(|way| forms.iter().map(move |form| (way, form)));
    let calls = all.enumerate().map(async |(number, (way, fields))| {
        let path = format!("{PATH}?{number}");
        let response = world.call(way, &request_to(&path, fields)).await;
        (path, format!("{way:?} {fields:?}"), response.status)
    });
    let count = Way::ALL.len() * forms.len();
    let resume = async {
        world.sidecar.status_where("all to be held", |status| status["held"] == count).await;
        world.solver.resume();
    };
    let (answers, ()) = join(join_all(calls), resume).await;
    for (path, case, status) in answers {
        assert_eq!(status, 200, "{case}");
        let sends = world.origin.requests_for(&path);
        assert_eq!(sends.len(), 2, "{case}");
        check_carries(&sends[0], &world.token, &case);
        check_carries(&sends[1], &world.tokens.latest(), &case);
    }
    assert_eq!(world.sidecar.generation().await, 2, "one death, one token");
}

#[tokio::test]
async fn byte_that_is_no_text_is_replaced() {
    let world = World::start().await;
    let mut bytes = format!("GET http://{API}{PATH} HTTP/1.1\r\nHost: {API}\r\n").into_bytes();
    bytes.extend_from_slice(b"Authorization: Bearer \xe9\xff\r\nCookie: access-token=\xe9\r\n\r\n");
    assert_eq!(world.raw(bytes).await.status, 200);
    check_carries(&world.origin.only_request(), &world.token, "Latin-1");
}

#[tokio::test]
async fn authorization_present_adds_none_where_there_was_none() {
    let world = World::with(&[("AUTHORIZATION", "present")]).await;
    for way in Way::ALL {
        for fields in [Vec::new(), cookie("a=1; refresh-token=")] {
            let (response, request) = exchange(&world, &mut world.open(way).await, &fields).await;
            assert_eq!(response.status, 401);
            check_is_the_shops_own(&response);
            assert!(request.head.value("authorization").is_none(), "{way:?} {fields:?}");
        }
    }
    assert_eq!(world.sidecar.generation().await, 1);
}

#[tokio::test]
async fn authorization_present_replaces_what_is_there() {
    let world = World::with(&[("AUTHORIZATION", "present")]).await;
    for value in ["Bearer stale", ""] {
        check_is_replaced(&world, &authorization(value)).await;
    }
}

#[tokio::test]
async fn authorization_present_takes_a_cookie_for_a_token_too() {
    let world = World::with(&[("AUTHORIZATION", "present")]).await;
    world.kill_token();
    let fields = cookie(format!("a=1; access-token={}", Jwt::anonymous().make()));
    // The shop wants the field and refuses this anyhow; it is the replay that counts.
    assert_eq!(world.call(Way::Intercept, &request_to(PATH, &fields)).await.status, 401);
    let sends = world.origin.requests();
    let cookies: Vec<_> = sends.iter().map(|request| request.head.values("cookie")).collect();
    let with = |token: &str| vec![format!("a=1; access-token=Bearer%20{token}")];
    assert_eq!(cookies, [with(&world.token), with(&world.tokens.latest())]);
    assert!(sends.iter().all(|request| request.head.value("authorization").is_none()));
}

/// Each form of a live personal token, in the field and in the cookie.
fn personal_forms(personal: &str) -> [Fields; 7] {
    [
        authorization(format!("Bearer {personal}")),
        authorization(format!("bearer  {personal}")),
        authorization(format!("Bearer%20{personal}")),
        authorization(personal),
        cookie(format!("a=1; access-token=Bearer%20{personal}; b=\"2\"")),
        cookie(format!("bearer_token=\"{personal}\"")),
        [authorization(format!("Bearer {personal}")), cookie("access-token=x")].concat(),
    ]
}

fn check_is_untouched(request: &Recorded, fields: &Fields, case: &str) {
    for name in ["authorization", "cookie"] {
        let sent = fields.iter().filter(|(field, _)| field.eq_ignore_ascii_case(name));
        let sent: Vec<_> = sent.map(|(_, value)| value.as_str()).collect();
        assert_eq!(request.head.values(name), sent, "{case}");
    }
}

/// Nothing in the answer says that the sidecar had anything to do with it.
fn check_is_the_shops_own(response: &Response) {
    for name in ["proxy-status", "retry-after"] {
        assert_eq!(response.value(name), None, "{response:?}");
    }
}

#[tokio::test]
async fn refusal_of_a_personal_token_is_the_clients_own_by_every_way() {
    let world = World::start().await;
    let verifications = world.origin.verifications().len();
    let personal = Jwt::personal().make();
    for way in Way::ALL {
        let mut session = world.open(way).await;
        for fields in personal_forms(&personal) {
            let case = format!("{way:?} {fields:?}");
            let (response, request) = exchange(&world, &mut session, &fields).await;
            assert_eq!(response.status, 401, "{case}");
            check_is_the_shops_own(&response);
            check_is_untouched(&request, &fields, &case);
        }
    }
    assert_eq!((world.solver.solves(), world.origin.door_knocks()), (0, 0));
    assert_eq!(world.origin.verifications().len(), verifications, "our token is not in doubt");
    assert_eq!(world.sidecar.generation().await, 1);
}

#[tokio::test]
async fn live_personal_token_that_the_shop_accepts_is_left_alone() {
    let mut stage = Stage::new().await;
    // The stand-in wants a field; this customer may have the cookie alone.
    let other = Origin::start_other(Some(stage.ca.acceptor(&[API]))).await;
    stage.set("CONNECT_TO", format!("{API}:443=127.0.0.1:{}", other.addr().port()));
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.launch().await;
    for (number, fields) in personal_forms(&Jwt::personal().make()).iter().enumerate() {
        for way in Way::ALL {
            let (path, case) = (format!("{PATH}?{number}{way:?}"), format!("{way:?} {fields:?}"));
            let response = world.call(way, &request_to(&path, fields)).await;
            assert_eq!(response.status, 200, "{case}: {response:?}");
            check_is_untouched(&other.requests_for(&path)[0], fields, &case);
        }
    }
}

#[tokio::test]
async fn live_personal_token_needs_no_token_of_ours() {
    let stage = Stage::new().await;
    stage.without_token();
    stage.solver.pause();
    let world = stage.launch().await;
    let personal = Jwt::personal().make();
    world.tokens.accept(&personal);
    let fields = authorization(format!("Bearer {personal}"));
    seen(&world, &mut world.open(Way::Intercept).await, &fields).await;
}

#[tokio::test]
async fn personal_tokens_can_be_replaced_by_order() {
    let world = World::with(&[("PERSONAL_TOKENS", "replace")]).await;
    for fields in personal_forms(&Jwt::personal().make()) {
        check_is_replaced(&world, &fields).await;
    }
}

/// The field decides what the request is; the cart that hangs on the cookie stays the client's.
#[tokio::test]
async fn personal_cookie_stays_beside_an_anonymous_field_that_is_replaced() {
    let world = World::start().await;
    let kept = format!("a=1; access-token=Bearer%20{}", Jwt::personal().make());
    let stale = Jwt::anonymous().issued_ago(100_000).make();
    let fields = [authorization(format!("Bearer {stale}")), cookie(&kept)].concat();
    for way in Way::ALL {
        let request = seen(&world, &mut world.open(way).await, &fields).await;
        let token = format!("Bearer {}", world.token);
        assert_eq!(request.head.values("authorization"), [token], "{way:?}");
        assert_eq!(request.head.values("cookie"), [kept.as_str()], "{way:?}");
    }
}

#[tokio::test]
async fn anonymous_cookie_is_replaced_and_the_others_stay() {
    let world = World::start().await;
    let stale = Jwt::anonymous().issued_ago(100_000).make();
    for value in [
        format!("Bearer%20{stale}"),
        format!("Bearer {stale}"),
        format!("\"Bearer+{stale}\""),
        stale.clone(),
    ] {
        for way in Way::ALL {
            let fields = cookie(format!("__ddg1_=x; access-token={value}; city=39; q=\"a b\""));
            let request = seen(&world, &mut world.open(way).await, &fields).await;
            let expected =
                format!("__ddg1_=x; access-token=Bearer%20{}; city=39; q=\"a b\"", world.token);
            assert_eq!(request.head.values("cookie"), [expected], "{way:?}");
        }
    }
}

#[tokio::test]
async fn cookie_without_a_token_passes_unchanged() {
    let world = World::start().await;
    let mut session = world.open(Way::Intercept).await;
    for unchanged in ["a=1", "access-token2=x; my-access-token=y", "a=b=c; ; d", "refresh-token="] {
        let request = seen(&world, &mut session, &cookie(unchanged)).await;
        assert_eq!(request.head.values("cookie"), [unchanged]);
    }
}

#[tokio::test]
async fn no_cookie_is_added() {
    let world = World::start().await;
    let request = seen(&world, &mut world.open(Way::Intercept).await, &Vec::new()).await;
    assert!(request.head.value("cookie").is_none());
}
