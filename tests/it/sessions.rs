//! The solver's session in which a late cookie is waited for, and that nothing is left of it.

use serde_json::{Value, json};

use crate::support::solver::Mode;
use crate::support::{Stage, World, until};

const PATH: &str = "/web/api/v2/x";

/// A world without a token that only the solver can give, as late as this.
async fn late(end: Mode, prepare: impl FnOnce(&mut Stage)) -> World {
    let mut stage = Stage::new().await;
    stage.without_token();
    stage.origin.close_doors();
    stage.solver.set(Mode::Late(Box::new(end)));
    prepare(&mut stage);
    stage.launch().await
}

/// Nobody would ever close the browser of a session that was forgotten.
async fn check_leaves_no_session(world: &World) {
    let created = world.solver.commands().iter().any(|sent| sent["cmd"] == "sessions.create");
    assert!(created, "there was one");
    until("the session to be destroyed", async || world.solver.open_sessions().is_empty()).await;
}

#[tokio::test]
async fn late_cookie_is_waited_for_in_a_session_of_which_nothing_is_left() {
    let world = late(Mode::Solves, |_| {}).await;
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.sidecar.status().await["token"]["source"], "flaresolverr");
    check_leaves_no_session(&world).await;
    let commands = world.solver.commands();
    let words: Vec<_> = commands.iter().map(|sent| sent["cmd"].as_str().unwrap()).collect();
    let expected =
        ["request.get", "sessions.create", "request.get", "request.get", "sessions.destroy"];
    assert_eq!(words, expected);
    assert_eq!(commands[2]["waitInSeconds"], 5);
    assert_eq!(commands[3]["returnOnlyCookies"], true);
    assert!(commands[1..].iter().all(|sent| sent["session"] == commands[1]["session"]));
    assert_eq!(world.solver.most_at_once(), 1);
}

#[tokio::test]
async fn failure_in_a_session_is_told_and_leaves_no_session() {
    for (end, why) in [
        (Mode::Error, "HTTP 500: Error: Error solving the challenge"),
        (Mode::NoCookie, "no cookie"),
        (Mode::Garbage, "it is not JSON"),
        (Mode::HangsUp, "asked again in a session: "),
    ] {
        let world = late(end, |_| {}).await;
        let failed = |status: &Value| status["refresh"]["last_error"].is_string();
        let status = world.sidecar.status_where("the failure", failed).await;
        let error = status["refresh"]["last_error"].as_str().unwrap();
        assert!(error.contains("no cookie; asked again in a session: "), "{error}");
        assert!(error.contains(why), "{error}");
        check_leaves_no_session(&world).await;
    }
}

#[tokio::test]
async fn end_of_the_sidecar_in_mid_session_leaves_no_session() {
    let mut world = late(Mode::Never, |_| {}).await;
    // Without a cookie, the wait in the session, and the look that never ends.
    world.solver.asked(3).await;
    assert_eq!(world.solver.open_sessions().len(), 1);
    world.sidecar.terminate();
    assert!(world.sidecar.ended().await.success());
    assert_eq!(world.solver.open_sessions(), Vec::<String>::new());
}

#[tokio::test]
async fn browser_is_led_through_the_parent_and_its_password_shows_nowhere() {
    // CONNECT_TO goes before the parent, so nobody needs to be there.
    let parent = "http://us%20er:p%40ss%3Aw%2Ford@127.0.0.1:9";
    let world = late(Mode::Solves, |stage| {
        stage.set("UPSTREAM_PROXY", parent);
        stage.set("RUST_LOG", "trace");
    })
    .await;
    assert_eq!(world.get(PATH).await.status, 200);
    check_leaves_no_session(&world).await;
    let expected =
        json!({"url": "http://127.0.0.1:9", "username": "us er", "password": "p@ss:w/ord"});
    for sent in world.solver.commands() {
        let is_told = sent["cmd"] != "sessions.destroy";
        assert_eq!(sent.get("proxy"), is_told.then_some(&expected), "{sent}");
    }
    let status = world.sidecar.status().await.to_string();
    for text in [status, world.sidecar.metrics().await, world.sidecar.log()] {
        for secret in ["p@ss", "p%40ss", "w/ord", "w%2Ford", "us er", "us%20er", "dXMgZXI6"] {
            let line = text.lines().find(|line| line.contains(secret));
            assert!(line.is_none(), "{secret} in: {}", line.unwrap_or_default());
        }
    }
}
