//! Who may use the proxy, and that what proves it stays here.

use crate::support::World;
use crate::support::client::{API, Request, Way};
use crate::support::token::Jwt;

const PATH: &str = "/web/api/v2/books";

/// `user:pa$s word`, as the settings have it and as Basic credentials.
const PAIR: &str = "user:pa$s word";
const BASIC: &str = "Basic dXNlcjpwYSRzIHdvcmQ=";

/// Written into the env file, where a space and a dollar sign are literal.
async fn guarded() -> World {
    let stage = crate::support::Stage::new().await;
    let line = format!("CHITAI_GOROD_BEARER_TOKEN={}\nPROXY_AUTH={PAIR}\n", stage.token);
    stage.write_env_file(&line);
    stage.start().await
}

#[tokio::test]
async fn without_credentials_a_proxy_asks_for_them() {
    let world = guarded().await;
    let (connect, _) = world.connect(&format!("{API}:443")).await;
    let absolute = world.call(Way::AbsoluteHttp, &Request::get(PATH)).await;
    for response in [connect, absolute] {
        assert_eq!((response.status, response.code().as_str()), (407, "proxy_auth_required"));
        assert!(response.head.value("proxy-authenticate").unwrap().starts_with("Basic"));
    }
    let gateway = world.call(Way::Gateway, &Request::get(PATH)).await;
    assert_eq!((gateway.status, gateway.code().as_str()), (401, "proxy_auth_required"));
    assert!(gateway.head.value("www-authenticate").unwrap().starts_with("Basic"));
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn with_credentials_it_serves_and_keeps_them_to_itself() {
    let world = guarded().await;
    let absolute = Request::get(PATH).field("Proxy-Authorization", BASIC);
    assert_eq!(world.call(Way::AbsoluteHttp, &absolute).await.status, 200);
    let gateway = Request::get(PATH).field("Authorization", BASIC);
    assert_eq!(world.call(Way::Gateway, &gateway).await.status, 200);
    assert_eq!(world.origin.requests().len(), 2);
    for request in world.origin.requests() {
        assert!(request.token().is_some());
        assert!(!format!("{request:?}").contains("dXNlcjpw"), "{request:?}");
    }
}

#[tokio::test]
async fn personal_token_beside_the_gateways_credentials_goes_alone() {
    let world = guarded().await;
    let personal = Jwt::personal().make();
    world.tokens.accept(&personal);
    let own = format!("Bearer {personal}");
    let both = Request::get(PATH).field("Authorization", BASIC).field("Authorization", &own);
    assert_eq!(world.call(Way::Gateway, &both).await.status, 200);
    assert_eq!(world.origin.requests()[0].head.values("authorization"), [own]);
}

#[tokio::test]
async fn own_listeners_are_not_reached_by_any_address() {
    let world = World::with(&[("ALLOW_HOSTS", "0.0.0.0/0,::/0")]).await;
    let port = world.sidecar.admin().port();
    for host in ["127.0.0.1", "0.0.0.0", "[::ffff:127.0.0.1]", "[::ffff:0.0.0.0]", "localhost"] {
        let (response, _) = world.connect(&format!("{host}:{port}")).await;
        assert_eq!(
            (response.status, response.code().as_str()),
            (403, "target_not_allowed"),
            "{host}"
        );
    }
}
