//! Requests that wait: their bounds, and clients that do not wait along.

use crate::routes::check_is_made_here;
use crate::support::client::{Request, Way};
use crate::support::solver::Mode;
use crate::support::{Stage, World, until};

const PATH: &str = "/web/api/v2/x";

async fn held(world: &World, count: u64) {
    until(&format!("{count} held"), async || world.sidecar.status().await["held"] == count).await;
}

#[tokio::test]
async fn requests_beyond_max_held_get_503_at_once() {
    let world = World::paused(&[("MAX_HELD", "2")]).await;
    let mut first = world.open(Way::Intercept).await;
    let mut second = world.open(Way::AbsoluteHttp).await;
    first.send(&Request::get(PATH)).await;
    second.send(&Request::get(PATH)).await;
    held(&world, 2).await;
    let third = world.get(PATH).await;
    assert_eq!((third.status, third.code().as_str()), (503, "too_many_held"));
    check_is_made_here(&third);
    assert!(third.value("retry-after").is_some_and(|value| value.parse::<u64>().unwrap() >= 1));
    world.solver.resume();
    assert_eq!(first.wire.response("GET").await.status, 200);
    assert_eq!(second.wire.response("GET").await.status, 200);
    assert!(world.sidecar.metric("sidecar_limited_total", &["held"]).await >= 1.0);
}

#[tokio::test]
async fn client_that_hangs_up_ends_its_hold_and_not_the_run() {
    let world = World::paused(&[]).await;
    for way in [Way::Intercept, Way::AbsoluteHttp] {
        let mut session = world.open(way).await;
        session.send(&Request::get(PATH)).await;
        held(&world, 1).await;
        world.solver.asked(1).await;
        drop(session);
        held(&world, 0).await;
    }
    let sends = world.origin.requests().len();
    world.solver.resume();
    world.sidecar.status_where("the run to end", |status| status["token"]["generation"] == 2).await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.origin.requests().len(), sends + 1, "nothing was sent for those who left");
    assert_eq!(world.solver.solves(), 1);
}

#[tokio::test]
async fn others_of_the_same_hold_outlive_one_that_hangs_up() {
    let world = World::paused(&[]).await;
    let mut leaver = world.open(Way::Intercept).await;
    let mut stayer = world.open(Way::Intercept).await;
    leaver.send(&Request::get(PATH)).await;
    held(&world, 1).await;
    stayer.send(&Request::get(PATH)).await;
    held(&world, 2).await;
    drop(leaver);
    held(&world, 1).await;
    world.solver.resume();
    assert_eq!(stayer.wire.response("GET").await.status, 200);
}

#[tokio::test]
async fn run_goes_on_after_every_hold_has_timed_out() {
    let world = World::paused(&[("HOLD_TIMEOUT", "200ms")]).await;
    for _ in 0..3 {
        let response = world.get(PATH).await;
        assert_eq!((response.status, response.code().as_str()), (503, "hold_timeout"));
        check_is_made_here(&response);
    }
    assert_eq!(world.solver.solves(), 1);
    world.solver.resume();
    world.sidecar.status_where("the run to end", |status| status["token"]["generation"] == 2).await;
    assert_eq!(world.get(PATH).await.status, 200);
}

#[tokio::test]
async fn request_without_any_token_gets_503_when_the_run_fails() {
    let stage = Stage::new().await;
    stage.without_token();
    stage.origin.close_doors();
    stage.solver.set(Mode::Error);
    let world = stage.launch().await;
    for way in Way::ALL {
        let response = world.call(way, &Request::get(PATH)).await;
        assert_eq!(
            (response.status, response.code().as_str()),
            (503, "token_unavailable"),
            "{way:?}"
        );
        check_is_made_here(&response);
        assert!(
            response.value("retry-after").is_some_and(|value| value.parse::<u64>().unwrap() >= 1)
        );
    }
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn request_without_any_token_gets_503_at_once_during_back_off() {
    let stage = Stage::new().await;
    stage.without_token();
    stage.origin.close_doors();
    stage.solver.set(Mode::Error);
    let world = stage.launch().await;
    assert_eq!(world.get(PATH).await.status, 503);
    let solves = world.solver.solves();
    let start = tokio::time::Instant::now();
    assert_eq!(world.get(PATH).await.code(), "token_unavailable");
    assert!(start.elapsed() < std::time::Duration::from_secs(2));
    assert_eq!(world.solver.solves(), solves);
}

#[tokio::test]
async fn nothing_but_the_answer_is_sent_after_a_hold() {
    let world = World::paused(&[]).await;
    for way in Way::ALL {
        world.solver.pause();
        world.kill_token();
        let mut session = world.open(way).await;
        session.send(&Request::get(PATH)).await;
        held(&world, 1).await;
        world.solver.resume();
        let response = session.wire.response("GET").await;
        assert_eq!((response.status, response.interim.len()), (200, 0), "{way:?}");
    }
}

#[tokio::test]
async fn hold_is_measured() {
    let world = World::paused(&[]).await;
    let mut session = world.open(Way::Intercept).await;
    session.send(&Request::get(PATH)).await;
    held(&world, 1).await;
    assert!((world.sidecar.metric("sidecar_held", &[]).await - 1.0).abs() < f64::EPSILON);
    world.solver.resume();
    assert_eq!(session.wire.response("GET").await.status, 200);
    until("the hold to be observed", async || {
        world.sidecar.metric("sidecar_hold_seconds_count", &[]).await > 0.0
    })
    .await;
    assert!(world.sidecar.metric("sidecar_held", &[]).await.abs() < f64::EPSILON);
}

#[tokio::test]
async fn tunnels_and_other_hosts_are_not_held() {
    let mut stage = Stage::new().await;
    let other = crate::support::origin::Origin::start_other(None).await;
    stage.set("ALLOW_HOSTS", other.addr());
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let world = stage.start().await;
    world.solver.pause();
    world.kill_token();
    let mut waiting = world.open(Way::Intercept).await;
    waiting.send(&Request::get(PATH)).await;
    held(&world, 1).await;
    let mut tunnel = world.tunnel(&other.addr().to_string()).await;
    tunnel.send("GET /free HTTP/1.1\r\nHost: other\r\n\r\n").await;
    assert_eq!(tunnel.response("GET").await.text(), "/free");
    world.solver.resume();
    assert_eq!(waiting.wire.response("GET").await.status, 200);
}
