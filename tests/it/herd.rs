//! Many clients whose token dies at the same moment.

use std::cell::Cell;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use crate::support::client::{Request, Way};
use crate::support::origin::Origin;
use crate::support::{Stage, World, until};

/// Lets `count` requests reach the shop with the token, kills it and lets them be refused together.
async fn refuse_at_once(world: &World, way: Way, count: usize) -> Vec<u16> {
    let calls = (0..count).map(|number| async move {
        let mut session = world.open(way).await;
        session.get(&format!("/web/api/v2/gate/{number}")).await.status
    });
    let refuse = async {
        world.origin.arrived(count).await;
        world.kill_token();
        world.origin.open_gate();
    };
    tokio::join!(join_all(calls), refuse).0
}

async fn check_herd(way: Way, count: usize) {
    let mut stage = Stage::new().await;
    stage.set("UPSTREAM_CONNECTIONS", count);
    let world = stage.start().await;
    let statuses = refuse_at_once(&world, way, count).await;
    assert!(statuses.iter().all(|&status| status == 200), "{statuses:?}");
    assert_eq!(world.solver.solves(), 1);
    let mut sends: HashMap<String, usize> = HashMap::new();
    for request in world.origin.requests() {
        *sends.entry(request.target().to_owned()).or_default() += 1;
    }
    assert_eq!(sends.len(), count);
    assert!(sends.values().all(|&sends| sends == 2), "two sends each, no more");
    assert_eq!(world.sidecar.generation().await, 2);
    let status =
        world.sidecar.status_where("nobody to be held", |status| status["held"] == 0).await;
    assert_eq!(status["refresh"]["running"], false);
}

#[tokio::test]
async fn five_hundred_refusals_at_once_lead_to_one_solve_in_absolute_form() {
    check_herd(Way::AbsoluteHttp, 500).await;
}

#[tokio::test]
async fn two_hundred_refusals_at_once_lead_to_one_solve_in_tunnels() {
    check_herd(Way::Intercept, 200).await;
}

#[tokio::test]
async fn herd_beyond_the_upstream_connections_is_served_in_turn() {
    let mut stage = Stage::new().await;
    stage.set("UPSTREAM_CONNECTIONS", "8");
    let world = stage.start().await;
    world.kill_token();
    let calls = (0..100).map(|number| {
        let world = &world;
        async move { world.get(&format!("/web/api/v2/turn/{number}")).await.status }
    });
    let statuses = join_all(calls).await;
    assert!(statuses.iter().all(|&status| status == 200), "{statuses:?}");
    assert_eq!(world.solver.solves(), 1);
    // The verifier has connections of its own.
    assert!(
        world.origin.most_connections() <= 10,
        "{} connections",
        world.origin.most_connections()
    );
}

#[tokio::test]
async fn herd_without_any_token_waits_for_one_solve() {
    let stage = Stage::new().await;
    stage.without_token();
    stage.solver.pause();
    let world = stage.launch().await;
    let calls = (0..50).map(|number| {
        let world = &world;
        async move { world.get(&format!("/web/api/v2/first/{number}")).await.status }
    });
    let release = async {
        until("all to be held", async || world.sidecar.status().await["held"] == 50).await;
        assert!(world.origin.requests().is_empty());
        world.solver.resume();
    };
    let (statuses, ()) = tokio::join!(join_all(calls), release);
    assert!(statuses.iter().all(|&status| status == 200), "{statuses:?}");
    assert_eq!(world.solver.solves(), 1);
    assert_eq!(world.origin.requests().len(), 50, "one send each");
}

#[tokio::test]
async fn deaths_under_steady_traffic_are_never_seen() {
    let world = World::start().await;
    let clients = (0..20).map(|number| {
        let world = &world;
        let way = Way::ALL[number % Way::ALL.len()];
        async move {
            let mut session = world.open(way).await;
            for round in 0..60 {
                let path = format!("/web/api/v2/steady/{number}/{round}");
                let request = if round % 2 == 0 {
                    Request::get(&path)
                } else {
                    Request::post(&path, path.clone())
                };
                let response = session.call(&request).await;
                assert_eq!((response.status, response.text()), (200, path), "{way:?}");
            }
        }
    });
    // A death comes once everybody works with the token before: one that met a request's only
    // replay as well would rightly be seen.
    let deaths = async {
        for death in 1..=3 {
            until("the token before", async || world.sidecar.generation().await == death).await;
            let before = world.origin.requests().len();
            until("some traffic", async || world.origin.requests().len() > before + 150).await;
            world.kill_token();
        }
    };
    tokio::join!(join_all(clients), deaths);
    assert_eq!(world.solver.solves(), 3);
    assert_eq!(world.solver.most_at_once(), 1);
}

/// Asks again and again, until `done`, and returns the latencies in order.
async fn latencies(mut ask: impl AsyncFnMut(), done: &Cell<bool>) -> Vec<Duration> {
    let mut latencies = Vec::new();
    while !done.get() {
        let asked = Instant::now();
        ask().await;
        latencies.push(asked.elapsed());
    }
    latencies.sort();
    latencies
}

/// The latencies of a tunnel and of another host by absolute-form while `work` lasts.
async fn unaffected<T>(
    world: &World,
    elsewhere: &Origin,
    work: impl Future<Output = T>,
) -> (T, [Vec<Duration>; 2]) {
    let host = elsewhere.addr();
    let mut tunnel = world.tunnel(&host.to_string()).await;
    let mut absolute = world.wire().await;
    let through = async || {
        tunnel.send(format!("GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(tunnel.response("GET").await.status, 200);
    };
    let forwarded = async || {
        absolute.send(format!("GET http://{host}/x HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(absolute.response("GET").await.status, 200);
    };
    let done = Cell::new(false);
    let work = async {
        let outcome = work.await;
        done.set(true);
        outcome
    };
    let (outcome, tunnel, host) =
        tokio::join!(work, latencies(through, &done), latencies(forwarded, &done));
    (outcome, [tunnel, host])
}

/// The middle and the slowest but one in a hundred, in milliseconds.
fn shown(latencies: &[Duration]) -> String {
    let at = |percent: usize| {
        latencies[(latencies.len() * percent).div_ceil(100) - 1].as_secs_f64() * 1e3
    };
    format!("p50 {:.2} ms, p99 {:.2} ms of {}", at(50), at(99), latencies.len())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a bound in time that a busy machine breaks"]
async fn storm_of_a_thousand_is_over_soon_after_the_token_is_there() {
    let mut stage = Stage::new().await;
    let elsewhere = Origin::start_other(None).await;
    // Each worker has half of them.
    stage.set("UPSTREAM_CONNECTIONS", 2000);
    stage.set("ALLOW_HOSTS", elsewhere.addr());
    let world = stage.start().await;
    let rest = tokio::time::sleep(Duration::from_secs(2));
    let ((), before) = unaffected(&world, &elsewhere, rest).await;
    let answers = (0..1000).map(|number| {
        let world = &world;
        async move {
            let mut session = world.open(Way::AbsoluteHttp).await;
            let answer = session.get(&format!("/web/api/v2/gate/{number}")).await;
            assert_eq!(answer.status, 200);
            Instant::now()
        }
    });
    let refuse = async {
        world.origin.arrived(1000).await;
        world.kill_token();
        world.origin.open_gate();
        until("the next token", async || world.sidecar.generation().await == 2).await;
        Instant::now()
    };
    let storm = async { tokio::join!(join_all(answers), refuse) };
    let ((answers, published), during) = unaffected(&world, &elsewhere, storm).await;
    let mut waits: Vec<Duration> =
        answers.iter().map(|at| at.saturating_duration_since(published)).collect();
    waits.sort();
    println!("answers after the token's publication: {}, last {:?}", shown(&waits), waits[999]);
    for (what, before, during) in
        [("tunnel", &before[0], &during[0]), ("other host", &before[1], &during[1])]
    {
        println!("{what}: {} before, {} during the storm", shown(before), shown(during));
    }
    assert!(waits[999] <= Duration::from_millis(300), "{:?}", waits[999]);
}
