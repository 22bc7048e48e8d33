//! The end of a sidecar: what is running ends, what waits is told.

use rustix::process::Signal;

use crate::support::client::{API, Request, Way};
use crate::support::http::Wire;
use crate::support::{Stage, World, until};

async fn held_request(drain: &str) -> (World, crate::support::client::Session) {
    let mut stage = Stage::new().await;
    stage.set("TOKEN_SOURCES", "flaresolverr");
    stage.set("DRAIN_TIMEOUT", drain);
    let world = stage.start().await;
    world.solver.pause();
    world.kill_token();
    let mut session = world.open(Way::Intercept).await;
    session.send(&Request::get("/web/api/v2/x")).await;
    until("it to be held", async || world.sidecar.status().await["held"] == 1).await;
    (world, session)
}

#[tokio::test]
async fn idle_sidecar_ends_at_once_with_success() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut world = World::start().await;
        let mut idle = world.open(Way::Intercept).await;
        assert_eq!(idle.get("/web/api/v2/x").await.status, 200);
        let mut plain = world.wire().await;
        let start = tokio::time::Instant::now();
        world.sidecar.signal(signal);
        assert!(world.sidecar.ended().await.success());
        assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
        idle.wire.closed().await;
        plain.closed().await;
    }
}

#[tokio::test]
async fn running_answers_end_before_the_sidecar_does() {
    let mut world = World::start().await;
    let mut running = Vec::new();
    for (number, way) in Way::ALL.into_iter().enumerate() {
        let mut session = world.open(way).await;
        session.send(&Request::get(&format!("/web/api/v2/gate/{number}"))).await;
        running.push(session);
    }
    world.origin.arrived(running.len()).await;
    world.sidecar.terminate();
    world.sidecar.logged("draining").await;
    world.origin.open_gate();
    for mut session in running {
        assert_eq!(session.wire.response("GET").await.status, 200);
    }
    assert!(world.sidecar.ended().await.success());
}

#[tokio::test]
async fn new_connections_are_refused_during_a_drain() {
    let mut world = World::start().await;
    let mut running = world.open(Way::AbsoluteHttp).await;
    running.send(&Request::get("/web/api/v2/gate/1")).await;
    world.origin.arrived(1).await;
    world.sidecar.terminate();
    let proxy = world.sidecar.proxy();
    until("new connections to be refused", async || {
        tokio::net::TcpStream::connect(proxy).await.is_err()
    })
    .await;
    assert!(!world.sidecar.has_ended());
    world.origin.open_gate();
    assert_eq!(running.wire.response("GET").await.status, 200);
    assert!(world.sidecar.ended().await.success());
}

#[tokio::test]
async fn clients_that_have_just_come_still_get_their_answer() {
    let mut world = World::with(&[("SNI_LISTEN", "127.0.0.1:0")]).await;
    let connected = [world.wire().await, Wire::connect(world.sidecar.sni()).await];
    let granted = world.tunnel(&format!("{API}:443")).await;
    let mut in_the_clear = world.open(Way::PlainTunnel).await;
    let mut secured = world.open(Way::Intercept).await;
    until("all to be accepted", async || world.sidecar.status().await["connections"] == 5).await;
    world.sidecar.terminate();
    world.sidecar.logged("draining").await;
    let get = format!("GET /web/api/v2/x HTTP/1.1\r\nHost: {API}\r\n\r\n");
    let [mut plain, by_sni] = connected;
    let ask = async |wire: &mut Wire| {
        wire.send(&get).await;
        wire.response("GET").await
    };
    let answers = tokio::join!(
        ask(&mut plain),
        async { ask(&mut world.tls_over(by_sni, API).await).await },
        async { ask(&mut world.tls_over(granted, API).await).await },
        in_the_clear.get("/web/api/v2/x"),
        secured.get("/web/api/v2/x"),
    );
    let answers = [answers.0, answers.1, answers.2, answers.3, answers.4];
    assert_eq!(answers.map(|answer| answer.status), [200; 5]);
    assert!(world.sidecar.ended().await.success());
}

#[tokio::test]
async fn held_request_gets_its_replay_during_a_drain() {
    let (mut world, mut session) = held_request("20s").await;
    world.sidecar.terminate();
    world.sidecar.logged("draining").await;
    world.solver.resume();
    assert_eq!(session.wire.response("GET").await.status, 200);
    assert!(world.sidecar.ended().await.success());
}

#[tokio::test]
async fn held_request_gets_503_before_the_drain_runs_out() {
    let (mut world, mut session) = held_request("6s").await;
    let start = tokio::time::Instant::now();
    world.sidecar.terminate();
    let response = session.wire.response("GET").await;
    assert_eq!((response.status, response.code().as_str()), (503, "draining"));
    assert!(start.elapsed() < std::time::Duration::from_secs(4), "{:?}", start.elapsed());
    assert!(world.sidecar.ended().await.success());
}

#[tokio::test]
async fn drain_that_runs_out_ends_anyway() {
    let mut world = World::with(&[("DRAIN_TIMEOUT", "1s")]).await;
    let mut stuck = world.open(Way::AbsoluteHttp).await;
    stuck.send(&Request::get("/web/api/v2/hang")).await;
    until("it at the shop", async || world.origin.requests().len() == 1).await;
    world.sidecar.terminate();
    assert!(world.sidecar.ended().await.success());
}

#[tokio::test]
async fn second_signal_ends_at_once() {
    let (mut world, _session) = held_request("60s").await;
    world.sidecar.terminate();
    world.sidecar.logged("draining").await;
    world.sidecar.terminate();
    let start = tokio::time::Instant::now();
    world.sidecar.ended().await;
    assert!(start.elapsed() < std::time::Duration::from_secs(2));
}

#[tokio::test]
async fn idle_tunnels_do_not_hold_up_the_end() {
    let mut stage = Stage::new().await;
    let other = crate::support::origin::Origin::start_other(None).await;
    stage.set("ALLOW_HOSTS", other.addr());
    let mut world = stage.start().await;
    let mut tunnel = world.tunnel(&other.addr().to_string()).await;
    tunnel.send("GET /x HTTP/1.1\r\nHost: other\r\n\r\n").await;
    assert_eq!(tunnel.response("GET").await.status, 200);
    let start = tokio::time::Instant::now();
    world.sidecar.terminate();
    assert!(world.sidecar.ended().await.success());
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    tunnel.closed().await;
}

#[tokio::test]
async fn long_answer_streams_to_its_end_during_a_drain() {
    let mut world = World::start().await;
    let length = 30_000_000;
    let mut session = world.open(Way::Intercept).await;
    session.send(&Request::get(&format!("/web/api/v2/big/{length}"))).await;
    session.wire.response_head().await.unwrap();
    session.wire.exactly(1000).await.unwrap();
    world.sidecar.terminate();
    world.sidecar.logged("draining").await;
    assert_eq!(session.wire.exactly(length - 1000).await.unwrap().len(), length - 1000);
    assert!(world.sidecar.ended().await.success());
}

#[tokio::test]
async fn not_ready_while_draining() {
    let mut world = World::start().await;
    let mut running = world.open(Way::AbsoluteHttp).await;
    running.send(&Request::get("/web/api/v2/gate/1")).await;
    world.origin.arrived(1).await;
    world.sidecar.terminate();
    world.sidecar.logged("draining").await;
    let response = world.sidecar.ask("GET", "/ready").await;
    assert_eq!(response.status, 503, "{response:?}");
    world.origin.open_gate();
    assert_eq!(running.wire.response("GET").await.status, 200);
    assert!(world.sidecar.ended().await.success());
}

#[tokio::test]
async fn start_and_stop_are_logged_once_each() {
    let mut world = World::start().await;
    assert_eq!(world.get("/web/api/v2/x").await.status, 200);
    world.sidecar.terminate();
    world.sidecar.ended().await;
    let events = world.sidecar.events();
    let count = |message: &str| events.iter().filter(|event| event["message"] == message).count();
    assert_eq!((count("listening"), count("draining"), count("stopped")), (1, 1, 1), "{API}");
}
