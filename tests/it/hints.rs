//! What people get wrong in the first hour: in `/status`, and once in the log however often it
//! happens.

use std::process::Command;

use serde_json::Value;
use tokio::net::TcpListener;

use crate::support::certificates::{TestCa, client_hello, connector, handshake};
use crate::support::client::{API, Request, Way};
use crate::support::http::Wire;
use crate::support::parser::{in_container, is_installed};
use crate::support::sidecar::{output, stderr};
use crate::support::token::Jwt;
use crate::support::{Stage, World, nobody, until};

const PATH: &str = "/web/api/v2/x";

/// What `/status` hints at.
async fn shown(world: &World) -> Vec<String> {
    let status = world.sidecar.status().await;
    let hints = status["hints"].as_array().unwrap().iter();
    hints.map(|hint| hint.as_str().unwrap().to_owned()).collect()
}

/// The log lines of hints of `kind`.
fn logged(world: &World, kind: &str) -> Vec<Value> {
    let events = world.sidecar.events().into_iter();
    events.filter(|event| event["message"] == "hint" && event["kind"] == kind).collect()
}

/// Waits until `who` is told of in the log, which must be at `level` and once, and in `/status`
/// by a text that holds each of `parts`.
async fn check_is_told(world: &World, kind: &str, who: &str, level: &str, parts: &[&str]) {
    let of = || {
        let mut told = logged(world, kind);
        told.retain(|event| event["who"] == who);
        told
    };
    until(kind, async || !of().is_empty()).await;
    let told = of();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0]["level"], level);
    let hints = shown(world).await;
    let texts = [told[0]["hint"].as_str().unwrap(), &hints.join("\n")];
    for part in [&[who], parts].concat() {
        assert!(texts.iter().all(|text| text.contains(part)), "{part} in {texts:?}");
    }
}

/// Waits until the log has a line for each of `count` failed handshakes.
async fn check_failed_handshakes(world: &World, count: usize) {
    let failed = |event: &Value| event["message"] == "TLS with the client failed";
    until("the handshakes to fail", async || {
        world.sidecar.events().iter().filter(|event| failed(event)).count() == count
    })
    .await;
}

/// No hint of this kind in the log, and none in `/status` with this part.
async fn check_is_not_told(world: &World, kind: &str, part: &str) {
    assert_eq!(logged(world, kind), Vec::<Value>::new());
    let hints = shown(world).await;
    assert!(!hints.iter().any(|hint| hint.contains(part)), "{hints:?}");
}

const CA_VARIABLES: [&str; 6] = [
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "ca-bundle.pem of TRUST_DIR",
    "NODE_EXTRA_CA_CERTS to its ca.pem",
    "`token-sidecar env`",
];

async fn check_distrust_is_told(world: &World, who: &str) {
    check_is_told(world, "ca_not_trusted", who, "WARN", &CA_VARIABLES).await;
}

/// That the client does not trust the CA is told as a guess.
async fn check_hang_up_is_told(world: &World) {
    let parts = [&CA_VARIABLES[..], &["seems", "probe"]].concat();
    check_is_told(world, "ca_seems_not_trusted", "127.0.0.1", "WARN", &parts).await;
}

async fn check_no_distrust_is_told(world: &World) {
    for kind in ["ca_not_trusted", "ca_seems_not_trusted"] {
        check_is_not_told(world, kind, "TLS").await;
    }
}

/// Runs a client that is led here, trusts what its system does, and must fail.
async fn fail(world: &World, mut command: Command, arguments: &[&str], complaint: &str) {
    let proxy = format!("http://{}", world.sidecar.proxy());
    command.args(arguments);
    let output = output(in_container(command, vec![("https_proxy", proxy)])).await;
    assert!(!output.status.success());
    let said = stderr(&output);
    assert!(said.contains(complaint), "{said}");
}

#[tokio::test]
async fn curl_without_the_ca_is_told_once() {
    if !is_installed("curl", "curl", &["--version"]) {
        return;
    }
    let world = World::start().await;
    let url = format!("https://{API}{PATH}");
    for _ in 0..2 {
        let arguments = ["-sS", "-m", "20", "--interface", "127.0.0.2", &url];
        fail(&world, Command::new("curl"), &arguments, "certificate").await;
    }
    check_failed_handshakes(&world, 2).await;
    check_distrust_is_told(&world, "127.0.0.2").await;
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn urllib_without_the_ca_is_told_once() {
    if !is_installed("urllib", "python3", &["--version"]) {
        return;
    }
    let world = World::start().await;
    let program =
        format!("import urllib.request as u\nu.urlopen('https://{API}{PATH}', timeout=20)");
    for _ in 0..2 {
        let complaint = "CERTIFICATE_VERIFY_FAILED";
        fail(&world, Command::new("python3"), &["-c", &program], complaint).await;
    }
    check_failed_handshakes(&world, 2).await;
    check_distrust_is_told(&world, "127.0.0.1").await;
}

#[tokio::test]
async fn node_without_the_ca_is_told_once() {
    if !is_installed("Node", "node", &["--version"]) {
        return;
    }
    let mut stage = Stage::new().await;
    stage.set("SNI_LISTEN", "127.0.0.1:0");
    let world = stage.start().await;
    let port = world.sidecar.sni().port();
    // As behind an alias. It hangs up without an alert.
    let program = format!(
        "require('https').get({{host: '127.0.0.1', port: {port}, servername: '{API}', path: '{PATH}'}})"
    );
    for _ in 0..2 {
        let complaint = "unable to verify the first certificate";
        fail(&world, Command::new("node"), &["-e", &program], complaint).await;
    }
    check_failed_handshakes(&world, 2).await;
    check_hang_up_is_told(&world).await;
}

#[tokio::test]
async fn client_that_ends_its_connection_in_order_is_not_told_of() {
    let world = World::start().await;
    let mut session = world.open(Way::Intercept).await;
    session.wire.try_finish().await.unwrap();
    assert!(session.wire.closed().await.is_empty());
    check_no_distrust_is_told(&world).await;
}

#[tokio::test]
async fn client_that_hangs_up_at_the_certificate_is_told_once() {
    let world = World::start().await;
    for _ in 0..2 {
        let mut tunnel = world.tunnel(&format!("{API}:443")).await;
        tunnel.send(client_hello(API)).await;
        assert_eq!(tunnel.exactly(1).await.unwrap(), [0x16], "a ServerHello");
    }
    check_failed_handshakes(&world, 2).await;
    check_hang_up_is_told(&world).await;
    let hints = shown(&world).await;
    assert!(!hints.iter().any(|hint| hint.contains("HTTPS_PROXY")), "it is set: {hints:?}");
}

#[tokio::test]
async fn client_that_hangs_up_before_the_certificate_is_not_told_of() {
    let world = World::start().await;
    let mut tunnel = world.tunnel(&format!("{API}:443")).await;
    tunnel.send(&client_hello(API)[..50]).await;
    drop(tunnel);
    check_failed_handshakes(&world, 1).await;
    check_no_distrust_is_told(&world).await;
}

#[tokio::test]
async fn client_behind_an_alias_without_the_ca_is_told() {
    let mut stage = Stage::new().await;
    stage.set("SNI_LISTEN", "127.0.0.1:0");
    let world = stage.start().await;
    let stranger = world.path("stranger.pem");
    std::fs::write(&stranger, TestCa::new().pem()).unwrap();
    let wire = Wire::connect(world.sidecar.sni()).await;
    let trusting = connector(&stranger, &[b"http/1.1"]);
    assert!(handshake(wire.into_inner(), API, &trusting).await.is_err());
    check_distrust_is_told(&world, "127.0.0.1").await;
}

#[tokio::test]
async fn doctor_that_does_not_trust_the_ca_is_not_told_of() {
    let mut world = World::start().await;
    let (proxy, admin) = (world.sidecar.proxy(), world.sidecar.admin());
    world.set("PROXY_LISTEN", proxy);
    world.set("ADMIN_LISTEN", admin);
    let trust = world.path("trust");
    std::fs::create_dir(&trust).unwrap();
    std::fs::write(trust.join("ca.pem"), TestCa::new().pem()).unwrap();
    world.set("TRUST_DIR", trust.display());
    assert!(!world.run(&["doctor"]).await.status.success());
    assert!(world.run(&["healthcheck"]).await.status.success());
    check_failed_handshakes(&world, 1).await;
    check_no_distrust_is_told(&world).await;
}

/// Sends what needs a CONNECT and one that needs none, each with this field, by which the client
/// shows a token of its own.
async fn bring(world: &World, name: &str, value: &str) {
    for way in [Way::Intercept, Way::AbsoluteHttp, Way::Gateway] {
        let response = world.call(way, &Request::get(PATH).field(name, value)).await;
        assert_eq!(response.status, 200, "{response:?}");
    }
}

#[tokio::test]
async fn expired_token_of_the_clients_own_is_told_once() {
    let world = World::start().await;
    let expired = Jwt::anonymous().expires_in(-10).make();
    bring(&world, "Authorization", &format!("Bearer {expired}")).await;
    bring(&world, "Cookie", &format!("a=1; access-token=Bearer%20{expired}")).await;
    let parts = ["out of date and is replaced", "it can go"];
    check_is_told(&world, "own_token_expired", "127.0.0.1", "INFO", &parts).await;
    assert!(!world.sidecar.log().contains(&expired));
    check_is_not_told(&world, "own_login_expired", "anonymous").await;
}

#[tokio::test]
async fn expired_login_is_told_once() {
    let world = World::start().await;
    let expired = Jwt::personal().expires_in(-10).make();
    bring(&world, "Authorization", &format!("Bearer {expired}")).await;
    let parts = ["login has expired", "as anonymous"];
    check_is_told(&world, "own_login_expired", "127.0.0.1", "INFO", &parts).await;
    check_is_not_told(&world, "own_token_expired", "it can go").await;
}

#[tokio::test]
async fn live_token_of_the_clients_own_is_not_told_of() {
    let world = World::start().await;
    let personal = Jwt::personal().make();
    world.tokens.accept(&personal);
    for token in [Jwt::anonymous().make(), personal] {
        bring(&world, "Authorization", &format!("Bearer {token}")).await;
    }
    bring(&world, "Authorization", "Bearer x").await;
    assert!(shown(&world).await.is_empty(), "{:?}", shown(&world).await);
    assert!(!world.sidecar.events().iter().any(|event| event["message"] == "hint"));
}

#[tokio::test]
async fn neighbours_asked_for_by_proxy_are_told_once_each() {
    let world = World::start().await;
    for host in ["redis:6379", "localhost:9", "127.0.0.1:9", "[::1]:9"] {
        for _ in 0..2 {
            assert_ne!(world.connect(host).await.0.status, 200, "{host}");
        }
    }
    for _ in 0..2 {
        let head = "GET http://flaresolverr:8191/v1 HTTP/1.1\r\nHost: flaresolverr:8191\r\n\r\n";
        assert_ne!(world.raw(head).await.status, 200);
    }
    for host in ["redis", "localhost", "127.0.0.1", "::1", "flaresolverr"] {
        check_is_told(&world, "no_proxy_missing", host, "WARN", &["NO_PROXY"]).await;
    }
    assert_eq!(logged(&world, "no_proxy_missing").len(), 5);
}

#[tokio::test]
async fn name_that_a_client_makes_up_is_cut() {
    let world = World::start().await;
    let name = "x".repeat(300);
    assert_ne!(world.connect(&format!("{name}:80")).await.0.status, 200);
    check_is_told(&world, "no_proxy_missing", &name[..63], "WARN", &[]).await;
    assert!(!shown(&world).await.join("").contains(&name[..64]));
}

#[tokio::test]
async fn neighbour_that_the_operator_allows_is_not_told_of() {
    let neighbour = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = neighbour.local_addr().unwrap();
    let (_kept, down) = nobody();
    let world = World::with(&[("ALLOW_HOSTS", "127.0.0.1,localhost")]).await;
    assert_eq!(world.connect(&address.to_string()).await.0.status, 200);
    assert_eq!(world.connect(&down.to_string()).await.0.status, 502, "it is down");
    check_is_not_told(&world, "no_proxy_missing", "NO_PROXY").await;
}

#[tokio::test]
async fn silence_is_hinted_at_by_what_came_instead() {
    let mut stage = Stage::new().await;
    let other = crate::support::origin::Origin::start_other(None).await;
    stage.add("CONNECT_TO", format!("other.test:80={}", other.addr()));
    let world = stage.start().await;
    assert_eq!(shown(&world).await, ["no request to the API seen; is HTTPS_PROXY set?"]);
    let plain = "GET http://other.test/ HTTP/1.1\r\nHost: other.test\r\n\r\n";
    assert_eq!(world.raw(plain).await.status, 200);
    let hints = shown(&world).await;
    assert!(hints.len() == 1 && hints[0].contains("only HTTP_PROXY seems to be set"), "{hints:?}");
    drop(world.tunnel("other.test:80").await);
    let hints = shown(&world).await;
    assert!(hints.len() == 1 && hints[0].contains("API_ORIGINS"), "{hints:?}");
    assert_eq!(world.get(PATH).await.status, 200);
    assert!(shown(&world).await.is_empty());
}
