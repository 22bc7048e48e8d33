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
        assert_eq!(response.json()["message"], "credentials are required");
    }
    let gateway = world.call(Way::Gateway, &Request::get(PATH)).await;
    assert_eq!((gateway.status, gateway.code().as_str()), (401, "proxy_auth_required"));
    assert!(gateway.head.value("www-authenticate").unwrap().starts_with("Basic"));
    assert_eq!(gateway.json()["message"], "credentials are required");
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn wrong_credentials_are_called_wrong() {
    let world = guarded().await;
    let answer = async |way: Way, field: &str, value: &str| {
        let response = world.call(way, &Request::get(PATH).field(field, value)).await;
        (response.status, response.json()["message"].as_str().unwrap_or_default().to_owned())
    };
    let (wrong, required) = ("the credentials are wrong", "credentials are required");
    let basic = WRONG[1];
    for (way, field, value, status, message) in [
        (Way::AbsoluteHttp, "Proxy-Authorization", basic, 407, wrong),
        // Those are for the shop.
        (Way::AbsoluteHttp, "Authorization", basic, 407, required),
        (Way::Gateway, "Proxy-Authorization", basic, 401, wrong),
        (Way::Gateway, "Authorization", basic, 401, wrong),
        (Way::Gateway, "Authorization", "Bearer own", 401, required),
    ] {
        let seen = answer(way, field, value).await;
        assert_eq!(seen, (status, message.to_owned()), "{way:?} {field}: {value}");
    }
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

/// The pair in every form that is not quite right.
const WRONG: [&str; 7] = [
    "Basic dXNlcjpwYSRzIHdvcmQ",   // without its padding
    "Basic dXNlcjpwYSRzIHdvcmRz",  // one letter more
    "Basic dXNlcjpwYSRzIHdvcg==",  // one less
    "Basic VXNlcjpwYSRzIHdvcmQ=",  // another case
    "Bearer dXNlcjpwYSRzIHdvcmQ=", // another scheme
    "user:pa$s word",
    "Basic",
];

/// A request by `way` with this credential, where `way` has its own place for it.
async fn status_with(world: &World, way: Way, field: &str, value: &str) -> u16 {
    let request = Request::get(PATH);
    if matches!(way, Way::Intercept | Way::PlainTunnel) {
        let port = if way == Way::Intercept { 443 } else { 80 };
        let mut wire = world.wire().await;
        wire.send(format!("CONNECT {API}:{port} HTTP/1.1\r\n{field}: {value}\r\n\r\n")).await;
        return wire.response_head().await.unwrap().0.word(1).parse().unwrap();
    }
    world.call(way, &request.field(field, value)).await.status
}

#[tokio::test]
async fn every_way_in_takes_the_whole_pair_and_nothing_else() {
    let world = guarded().await;
    for way in Way::ALL {
        let gateway = matches!(way, Way::Gateway | Way::GatewayByHost);
        assert_eq!(status_with(&world, way, "Proxy-Authorization", BASIC).await, 200, "{way:?}");
        let refusal = if gateway { 401 } else { 407 };
        for wrong in WRONG {
            for field in ["Proxy-Authorization", "Authorization"] {
                let status = status_with(&world, way, field, wrong).await;
                assert_eq!(status, refusal, "{way:?} {field}: {wrong}");
            }
        }
        let as_origin = status_with(&world, way, "Authorization", BASIC).await;
        assert_eq!(as_origin, if gateway { 200 } else { refusal }, "{way:?}");
    }
    // Nor a tunnel to another host, nor a request to one.
    let (response, _) = world.connect("other.test:443").await;
    assert_eq!(response.status, 407);
    let passing = world.raw("GET http://other.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n").await;
    assert_eq!(passing.status, 407);
}

#[tokio::test]
async fn requests_inside_a_tunnel_need_no_pair_of_their_own() {
    let world = guarded().await;
    let mut wire = world.wire().await;
    wire.send(format!("CONNECT {API}:443 HTTP/1.1\r\nProxy-Authorization: {BASIC}\r\n\r\n")).await;
    assert_eq!(wire.response_head().await.unwrap().0.word(1), "200");
    let mut tls = world.tls_over(wire, API).await;
    tls.send(format!("GET {PATH} HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
    assert_eq!(tls.response("GET").await.status, 200);
    // On a connection without a tunnel each request is asked.
    let mut wire = world.wire().await;
    let head = format!("GET http://{API}{PATH} HTTP/1.1\r\nHost: {API}\r\n");
    wire.send(format!("{head}Proxy-Authorization: {BASIC}\r\n\r\n")).await;
    assert_eq!(wire.response("GET").await.status, 200);
    wire.send(format!("{head}\r\n")).await;
    assert_eq!(wire.response("GET").await.status, 407);
}
