//! What the shop gets to see as `Authorization` and `access-token`.

use crate::support::client::{Request, Way};
use crate::support::origin::Recorded;
use crate::support::token::Jwt;
use crate::support::{Stage, World};

const PATH: &str = "/web/api/v2/x";

/// Sends one request with these fields and returns what the shop saw.
async fn seen(world: &World, way: Way, fields: &[(&str, &str)]) -> Recorded {
    let before = world.origin.requests().len();
    let request =
        fields.iter().fold(Request::get(PATH), |request, (name, value)| request.field(name, value));
    let response = world.call(way, &request).await;
    assert_eq!(response.status, 200, "{way:?} {fields:?}: {response:?}");
    let mut requests = world.origin.requests();
    assert_eq!(requests.len(), before + 1, "sent more than once");
    requests.remove(before)
}

async fn check_is_replaced(world: &World, way: Way, fields: &[(&str, &str)]) {
    let request = seen(world, way, fields).await;
    assert_eq!(
        request.head.values("authorization"),
        [format!("Bearer {}", world.token)],
        "{way:?} {fields:?}"
    );
}

#[tokio::test]
async fn every_damaged_form_of_authorization_is_replaced() {
    let world = World::start().await;
    let stale = Jwt::anonymous().issued_ago(100_000).make();
    let expired_personal = Jwt::personal().expires_in(-10).make();
    let forms = [
        format!("Bearer {stale}"),
        format!("Bearer%20{stale}"),
        format!("Bearer+{stale}"),
        format!("bearer {stale}"),
        format!("Bearer Bearer {stale}"),
        format!("\"Bearer {stale}\""),
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
        format!("Bearer {expired_personal}"),
    ];
    for form in &forms {
        for way in [Way::Intercept, Way::AbsoluteHttp, Way::Gateway] {
            check_is_replaced(&world, way, &[("Authorization", form)]).await;
        }
    }
}

#[tokio::test]
async fn missing_authorization_is_added() {
    let world = World::start().await;
    for way in Way::ALL {
        check_is_replaced(&world, way, &[]).await;
    }
}

#[tokio::test]
async fn several_authorization_fields_become_one() {
    let world = World::start().await;
    let fields = [("Authorization", "Bearer a"), ("authorization", "Bearer b"), ("X-Other", "1")];
    check_is_replaced(&world, Way::Intercept, &fields).await;
}

#[tokio::test]
async fn authorization_present_adds_none_where_there_was_none() {
    let world = World::with(&[("AUTHORIZATION", "present")]).await;
    let response = world.get(PATH).await;
    assert_eq!(response.status, 401);
    for request in world.origin.requests() {
        assert!(request.head.value("authorization").is_none());
    }
}

#[tokio::test]
async fn authorization_present_replaces_what_is_there() {
    let world = World::with(&[("AUTHORIZATION", "present")]).await;
    check_is_replaced(&world, Way::Intercept, &[("Authorization", "Bearer stale")]).await;
    check_is_replaced(&world, Way::Intercept, &[("Authorization", "")]).await;
}

#[tokio::test]
async fn live_personal_token_is_left_alone() {
    let world = World::start().await;
    let personal = Jwt::personal().make();
    world.tokens.accept(&personal);
    for way in Way::ALL {
        let value = format!("Bearer {personal}");
        let request = seen(&world, way, &[("Authorization", &value)]).await;
        assert_eq!(request.head.values("authorization"), [value], "{way:?}");
    }
}

#[tokio::test]
async fn live_personal_token_in_the_cookie_is_left_alone() {
    let mut stage = Stage::new().await;
    // The shop's stand-in wants a field; this customer has only the cookie.
    let other = crate::support::origin::Origin::start_other(Some(
        stage.ca.acceptor(&[crate::support::client::API]),
    ))
    .await;
    let redirect = format!("{}:443=127.0.0.1:{}", crate::support::client::API, other.addr().port());
    stage.set("CONNECT_TO", redirect);
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.launch().await;
    let personal = Jwt::personal().make();
    let cookie = format!("a=1; access-token=Bearer%20{personal}; b=2");
    let response =
        world.call(Way::AbsoluteHttp, &Request::get(PATH).field("Cookie", &cookie)).await;
    assert_eq!(response.status, 200, "{response:?}");
    let request = other.requests_for(PATH).remove(0);
    assert_eq!(request.head.values("cookie"), [cookie]);
    assert!(request.head.value("authorization").is_none(), "{request:?}");
}

#[tokio::test]
async fn refusal_of_a_personal_token_is_the_clients_own() {
    let world = World::start().await;
    let personal = Jwt::personal().make();
    let request = Request::get(PATH).field("Authorization", &format!("Bearer {personal}"));
    let response = world.call(Way::Intercept, &request).await;
    assert_eq!(response.status, 401);
    assert_eq!(world.origin.requests().len(), 1);
    assert_eq!(world.solver.solves(), 0);
    assert_eq!(world.sidecar.generation().await, 1);
}

#[tokio::test]
async fn personal_tokens_can_be_replaced_by_order() {
    let world = World::with(&[("PERSONAL_TOKENS", "replace")]).await;
    let personal = Jwt::personal().make();
    check_is_replaced(&world, Way::Intercept, &[("Authorization", &format!("Bearer {personal}"))])
        .await;
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
        for way in [Way::Intercept, Way::AbsoluteHttp, Way::Gateway] {
            let cookie = format!("__ddg1_=x; access-token={value}; city=39; q=\"a b\"");
            let request = seen(&world, way, &[("Cookie", &cookie)]).await;
            let expected =
                format!("__ddg1_=x; access-token=Bearer%20{}; city=39; q=\"a b\"", world.token);
            assert_eq!(request.head.values("cookie"), [expected], "{way:?}");
        }
    }
}

#[tokio::test]
async fn cookie_is_replaced_anew_for_the_replay() {
    let world = World::start().await;
    world.kill_token();
    let stale = Jwt::anonymous().make();
    let request =
        Request::get(PATH).field("Cookie", &format!("a=1; access-token=Bearer%20{stale}"));
    assert_eq!(world.call(Way::Intercept, &request).await.status, 200);
    let sends = world.origin.requests();
    assert_eq!(sends.len(), 2);
    assert_eq!(
        sends[1].head.values("cookie"),
        [format!("a=1; access-token=Bearer%20{}", world.tokens.latest())]
    );
}

#[tokio::test]
async fn cookie_without_a_token_passes_unchanged() {
    let world = World::start().await;
    for cookie in ["a=1", "access-token2=x; my-access-token=y", "a=b=c; ; d", "refresh-token="] {
        let request = seen(&world, Way::Intercept, &[("Cookie", cookie)]).await;
        assert_eq!(request.head.values("cookie"), [cookie]);
    }
}

#[tokio::test]
async fn no_cookie_is_added() {
    let world = World::start().await;
    let request = seen(&world, Way::Intercept, &[]).await;
    assert!(request.head.value("cookie").is_none());
}
