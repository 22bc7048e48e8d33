//! TLS straight to `SNI_LISTEN`: the name in the ClientHello decides.

use tokio::net::{TcpListener, TcpStream};

use crate::support::certificates::{client_hello, connector, handshake};
use crate::support::client::{API, GATE, Request};
use crate::support::http::Wire;
use crate::support::origin::Origin;
use crate::support::sidecar::stderr;
use crate::support::{Stage, World, until};

const PATH: &str = "/web/api/v2/x";

async fn stage() -> Stage {
    let mut stage = Stage::new().await;
    stage.set("SNI_LISTEN", "127.0.0.1:0");
    stage
}

async fn world() -> World {
    stage().await.start().await
}

async fn wire(world: &World) -> Wire {
    Wire::connect(world.sidecar.sni()).await
}

/// Sends `bytes`, which must get the connection closed without a word, and the log line for it.
async fn check_is_closed(world: &World, bytes: &[u8], why: &str) {
    let mut wire = wire(world).await;
    wire.send(bytes).await;
    assert!(wire.closed().await.is_empty());
    let says_why = |event: serde_json::Value| {
        event["message"] == "closed: no name to go by"
            && event["error"].as_str().is_some_and(|error| error.contains(why))
            && event["client.addr"].as_str().is_some_and(|addr| addr.starts_with("127.0.0.1:"))
    };
    until(why, async || world.sidecar.events().into_iter().any(says_why)).await;
}

/// Waits for the log to say this.
async fn check_logs(world: &World, text: &str) {
    until(text, async || world.sidecar.log().contains(text)).await;
}

#[tokio::test]
async fn api_host_gets_the_token_through_a_death() {
    let world = world().await;
    world.kill_token();
    for name in [API, GATE] {
        let mut session = world.by_sni(name).await;
        let request = Request::get(PATH);
        session.wire.send(format!("GET {PATH} HTTP/1.1\r\nHost: {name}\r\n\r\n")).await;
        assert_eq!(session.wire.response("GET").await.status, 200, "{name}");
        if name == API {
            assert_eq!(session.call(&request).await.status, 200, "kept alive");
        }
    }
    assert_eq!(world.solver.solves(), 1);
    let sni = world.sidecar.metric("sidecar_requests_total", &["route=\"sni\"", "200"]).await;
    assert!((sni - 3.0).abs() < 0.5, "{sni}");
    let status = world.sidecar.status().await;
    assert_eq!(status["requests"]["sni"], 3, "{status}");
}

#[tokio::test]
async fn case_of_the_name_does_not_matter() {
    let world = world().await;
    let mut hello = client_hello(API);
    let at = hello.windows(API.len()).position(|bytes| bytes == API.as_bytes()).unwrap();
    hello[at..at + API.len()].make_ascii_uppercase();
    let mut wire = wire(&world).await;
    wire.send(hello).await;
    assert_eq!(wire.exactly(1).await.unwrap(), [0x16], "a ServerHello");
}

#[tokio::test]
async fn other_name_is_a_blind_tunnel() {
    let mut stage = stage().await;
    let other = Origin::start_other(Some(stage.ca.acceptor(&["other.test"]))).await;
    stage.add("CONNECT_TO", format!("other.test:443={}", other.addr()));
    let world = stage.start().await;
    let connector = connector(&world.path("shop-ca.pem"), &[b"h2", b"http/1.1"]);
    let tcp = wire(&world).await.into_inner();
    let mut tls = handshake(tcp, "other.test", &connector).await.expect("the other host's leaf");
    tls.send("GET /inside HTTP/1.1\r\nHost: other.test\r\n\r\n").await;
    assert_eq!(tls.response("GET").await.text(), "/inside");
    assert!(other.only_request().head.value("authorization").is_none());
    let tunnels = world.sidecar.metric("sidecar_requests_total", &["tunnel", "200"]).await;
    assert!((tunnels - 1.0).abs() < 0.5, "{tunnels}");
}

#[tokio::test]
async fn bytes_of_a_slow_hello_go_on_as_they_came() {
    let peer = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut stage = stage().await;
    stage.add("CONNECT_TO", format!("raw.test:443={}", peer.local_addr().unwrap()));
    let world = stage.start().await;
    let hello = client_hello("raw.test");
    let mut client = wire(&world).await;
    for byte in &hello {
        client.send([*byte]).await;
    }
    let (stream, _) = peer.accept().await.unwrap();
    let mut peer = Wire::new(stream);
    assert_eq!(peer.exactly(hello.len()).await.unwrap(), hello);
    peer.send(b"pong").await;
    assert_eq!(client.exactly(4).await.unwrap(), b"pong");
    client.send(b"more").await;
    assert_eq!(peer.exactly(4).await.unwrap(), b"more");
}

/// The hello in records of `size` bytes each.
fn in_records(hello: &[u8], size: usize) -> Vec<u8> {
    let (head, message) = hello.split_at(5);
    let record = |part: &[u8]| {
        let length = u16::try_from(part.len()).unwrap().to_be_bytes();
        [&head[..3], &length, part].concat()
    };
    message.chunks(size).flat_map(record).collect()
}

#[tokio::test]
async fn hello_in_many_records_and_segments_is_understood() {
    let world = world().await;
    let hello = client_hello(API);
    for size in [1, 50, hello.len() - 6] {
        let mut wire = wire(&world).await;
        for part in in_records(&hello, size).chunks(7) {
            wire.send(part).await;
        }
        assert_eq!(wire.exactly(1).await.unwrap(), [0x16], "records of {size}");
    }
}

#[tokio::test]
async fn what_names_no_host_is_closed_at_once() {
    let world = world().await;
    check_is_closed(&world, &client_hello("192.0.2.1"), "names no host").await;
    let request = format!("GET http://{API}/ HTTP/1.1\r\nHost: {API}\r\n\r\n");
    check_is_closed(&world, request.as_bytes(), "no TLS").await;
    check_is_closed(&world, b"\x00\xff\x80garbage\r\n", "no TLS").await;
}

#[tokio::test]
async fn hello_that_is_too_large_is_closed() {
    let world = world().await;
    // A ClientHello of 60,000 bytes, said and begun.
    let mut message = vec![1, 0, 0xea, 0x60, 3, 3];
    message.resize(20_000, 0);
    let hello = in_records(&[&[0x16, 3, 1, 0, 0], &message[..]].concat(), 4000);
    let mut wire = wire(&world).await;
    // It may be closed before all is written.
    let _ = wire.try_send(hello).await;
    wire.closed().await;
    check_logs(&world, "larger than 16384 bytes").await;
}

#[tokio::test]
async fn half_a_hello_and_the_end_is_closed() {
    let world = world().await;
    let hello = client_hello(API);
    let mut wire = wire(&world).await;
    wire.send(&hello[..hello.len() / 2]).await;
    wire.try_finish().await.unwrap();
    assert!(wire.closed().await.is_empty());
    check_logs(&world, "hung up before its ClientHello").await;
}

#[tokio::test]
async fn unfinished_hellos_hold_nobody_up() {
    let world = world().await;
    let mut unfinished = Vec::new();
    for _ in 0..50 {
        let mut wire = wire(&world).await;
        wire.send(&client_hello(API)[..100]).await;
        unfinished.push(wire);
    }
    assert_eq!(world.by_sni(API).await.get(PATH).await.status, 200);
}

#[tokio::test]
async fn another_host_inside_is_misdirected() {
    let world = world().await;
    let mut session = world.by_sni(API).await;
    session.wire.send(format!("GET {PATH} HTTP/1.1\r\nHost: {GATE}\r\n\r\n")).await;
    let response = session.wire.response("GET").await;
    assert_eq!((response.status, response.code().as_str()), (421, "misdirected"));
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn port_of_the_sidecar_in_the_host_field_does_not_reach_the_shop() {
    let world = world().await;
    let mut session = world.by_sni(API).await;
    let port = world.sidecar.sni().port();
    session.wire.send(format!("GET {PATH} HTTP/1.1\r\nHost: {API}.:{port}\r\n\r\n")).await;
    assert_eq!(session.wire.response("GET").await.status, 200);
    assert_eq!(world.origin.requests()[0].head.values("host"), [API]);
}

#[tokio::test]
async fn name_that_leads_to_a_private_address_is_closed() {
    let world = world().await;
    let mut wire = wire(&world).await;
    wire.send(client_hello("localhost")).await;
    assert!(wire.closed().await.is_empty());
    check_logs(&world, "localhost:443 is not a public address").await;
    let refused = world.sidecar.metric("sidecar_requests_total", &["tunnel", "403"]).await;
    assert!((refused - 1.0).abs() < 0.5, "{refused}");
}

#[tokio::test]
async fn port_is_one_of_the_own_listeners() {
    let mut stage = stage().await;
    stage.set("ALLOW_HOSTS", "127.0.0.0/8");
    let world = stage.start().await;
    let (response, _) = world.connect(&world.sidecar.sni().to_string()).await;
    assert_eq!((response.status, response.code().as_str()), (403, "target_not_allowed"));
}

#[tokio::test]
async fn clients_from_other_networks_are_closed() {
    let mut stage = stage().await;
    stage.set("CLIENT_NETWORKS", "192.0.2.0/24");
    let world = stage.start().await;
    let mut wire = wire(&world).await;
    assert!(wire.closed().await.is_empty());
}

#[tokio::test]
async fn connections_count_with_those_of_the_proxy() {
    let mut stage = stage().await;
    stage.set("MAX_CONNECTIONS", "1");
    let world = stage.start().await;
    let held = world.tunnel(&format!("{API}:443")).await;
    let mut over = wire(&world).await;
    assert!(over.closed().await.is_empty(), "no HTTP where TLS is spoken");
    drop(held);
    let limited = world.sidecar.metric("sidecar_limited_total", &["\"connections\""]).await;
    assert!((limited - 1.0).abs() < 0.5, "{limited}");
}

#[tokio::test]
async fn drain_closes_the_port_and_what_is_idle() {
    let mut world = world().await;
    let mut idle = world.by_sni(API).await;
    assert_eq!(idle.get(PATH).await.status, 200);
    let mut silent = wire(&world).await;
    let mut running = world.by_sni(API).await;
    running.send(&Request::get("/web/api/v2/gate/1")).await;
    world.origin.arrived(1).await;
    world.sidecar.terminate();
    world.sidecar.logged("draining").await;
    idle.wire.closed().await;
    silent.closed().await;
    let refused = async || TcpStream::connect(world.sidecar.sni()).await.is_err();
    until("the port to be closed", refused).await;
    world.origin.open_gate();
    assert_eq!(running.wire.response("GET").await.status, 200);
    assert!(world.sidecar.ended().await.success());
}

#[tokio::test]
async fn there_is_no_way_around_proxy_auth() {
    let mut stage = stage().await;
    stage.set("PROXY_AUTH", "user:hunter2");
    let output = stage.run(&["run"]).await;
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("SNI_LISTEN:") && text.contains("PROXY_AUTH"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}

#[tokio::test]
async fn two_listeners_on_one_address_end_the_start() {
    let mut stage = stage().await;
    stage.set("ADMIN_LISTEN", "127.0.0.1:9090");
    stage.set("SNI_LISTEN", "0.0.0.0:9090");
    let output = stage.run(&["run"]).await;
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("SNI_LISTEN:") && text.contains("ADMIN_LISTEN"), "{text}");
}

#[tokio::test]
async fn port_that_is_taken_ends_the_start() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut stage = stage().await;
    stage.set("SNI_LISTEN", taken.local_addr().unwrap());
    let output = stage.run(&["run"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("SNI_LISTEN: cannot listen on"), "{}", stderr(&output));
}
