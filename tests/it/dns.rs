//! Names are resolved by `UPSTREAM_DNS` alone, and what goes wrong there is said.

use std::time::Duration;

use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RecordType;
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::routes::check_is_made_here;
use crate::support::client::API;
use crate::support::dns::{Dns, Manner};
use crate::support::http::Response;
use crate::support::origin::Origin;
use crate::support::parent::{Manner as ParentManner, ParentProxy};
use crate::support::sidecar::stderr;
use crate::support::{Stage, World, skip, until};

const PATH: &str = "/web/api/v2/x";
const OTHER: &str = "other.test";

/// A stage whose API has its name from `dns` alone.
async fn named_by(dns: &Dns) -> Stage {
    let mut stage = Stage::new().await;
    let api = format!("https://{API}:{}/web/api", stage.origin.addr().port());
    stage.unset("CONNECT_TO");
    stage.set("TOKEN_SOURCES", "direct");
    stage.set("VERIFY_URL", format!("{api}/v2/search/product?phrase=python"));
    stage.set("API_ORIGINS", api);
    stage.set("ALLOW_HOSTS", format!("127.0.0.1,[::1],{OTHER}"));
    stage.set("UPSTREAM_DNS", dns.addr());
    dns.knows(API, &["127.0.0.1"]);
    stage
}

async fn world_named_by(dns: &Dns) -> World {
    named_by(dns).await.start().await
}

/// Some other host and its `CONNECT` target by name.
async fn other() -> (Origin, String) {
    let other = Origin::start_other(None).await;
    let target = format!("{OTHER}:{}", other.addr().port());
    (other, target)
}

#[tokio::test]
async fn traffic_verifier_and_direct_source_ask_the_servers_and_nobody_else() {
    let dns = Dns::start().await;
    let world = world_named_by(&dns).await;
    world.kill_token();
    assert_eq!(world.get(PATH).await.status, 200);
    assert_eq!(world.sidecar.generation().await, 2);
    for kind in [RecordType::A, RecordType::AAAA] {
        assert!(dns.asked(API, kind) >= 1, "{kind} was not asked for");
    }
    let searched = dns.questions().into_iter().find(|question| question.name != API);
    assert_eq!(searched, None, "a search domain was used");
}

#[tokio::test]
async fn answer_serves_all_threads_for_as_long_as_its_ttl() {
    let dns = Dns::start().await;
    let (_other, target) = other().await;
    dns.knows(OTHER, &["127.0.0.1"]);
    let world = world_named_by(&dns).await;
    let mut tunnels = Vec::new();
    for _ in 0..6 {
        tunnels.push(world.tunnel(&target).await);
    }
    assert_eq!(dns.asked(OTHER, RecordType::A), 1);
}

#[tokio::test]
async fn answer_is_asked_for_anew_after_its_ttl() {
    let dns = Dns::start().await;
    let (_other, target) = other().await;
    dns.knows(OTHER, &["127.0.0.1"]);
    dns.set_ttl(1);
    let world = world_named_by(&dns).await;
    let begun = Instant::now();
    until("a second question", async || {
        world.tunnel(&target).await;
        dns.asked(OTHER, RecordType::A) == 2
    })
    .await;
    assert!(begun.elapsed() >= Duration::from_millis(900), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn both_families_are_tried() {
    let Ok(listener) = TcpListener::bind("[::1]:0").await else {
        return skip::not_permitted("an IPv6 loopback");
    };
    let dns = Dns::start().await;
    // Nothing listens on the IPv4 address.
    dns.knows(OTHER, &["127.0.0.1", "::1"]);
    let world = world_named_by(&dns).await;
    let target = format!("{OTHER}:{}", listener.local_addr().unwrap().port());
    let _tunnel = world.tunnel(&target).await;
    listener.accept().await.unwrap();
}

#[tokio::test]
async fn answer_that_is_cut_is_asked_for_over_tcp() {
    let dns = Dns::start().await;
    dns.set(Manner::Cuts);
    let world = world_named_by(&dns).await;
    assert_eq!(world.get(PATH).await.status, 200);
    let by_tcp = dns.questions().into_iter().filter(|question| question.by_tcp).count();
    assert!(by_tcp >= 2, "{:?}", dns.questions());
}

fn check_fails(response: &Response, dns: &str, why: &str) {
    assert_eq!((response.status, response.code().as_str()), (502, "upstream_unreachable"));
    let message = response.json()["message"].as_str().unwrap_or_default().to_owned();
    assert!(message.contains(&format!("UPSTREAM_DNS ({dns}) {why}")), "{message}");
    let field = response.value("proxy-status").unwrap_or_default();
    assert!(field.contains("error=dns_error;"), "{field}");
    check_is_made_here(response);
}

/// Requests to the API and a refresh fail for this reason, within the time for a connection.
async fn check_servers_that(mut stage: Stage, dns: &str, why: &str) {
    stage.set("UPSTREAM_DNS", dns);
    stage.set("CONNECT_TIMEOUT", "800ms");
    let world = stage.launch().await;
    let begun = Instant::now();
    check_fails(&world.get(PATH).await, &dns.replace(',', ", "), why);
    assert!(begun.elapsed() < Duration::from_millis(1600), "{:?}", begun.elapsed());
    assert_eq!(world.sidecar.ask("POST", "/refresh").await.status, 502);
    let error = world.sidecar.status().await["refresh"]["last_error"].to_string();
    assert!(error.contains("UPSTREAM_DNS") && error.contains(why), "{error}");
}

async fn check_server_that(manner: Manner, why: &str) {
    let dns = Dns::start().await;
    dns.set(manner);
    check_servers_that(named_by(&dns).await, &dns.addr().to_string(), why).await;
}

#[tokio::test]
async fn servers_that_do_not_run_are_named() {
    let dns = Dns::start().await;
    let stage = named_by(&dns).await;
    let nobody = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    check_servers_that(stage, &format!("{nobody},127.0.0.2:{}", nobody.port()), "did not answer")
        .await;
}

#[tokio::test]
async fn server_that_is_silent_is_named() {
    check_server_that(Manner::Silent, "did not answer in time").await;
}

#[tokio::test]
async fn name_that_the_server_does_not_know_is_told_of() {
    check_server_that(Manner::Says(ResponseCode::NXDomain), "says that there is no such name")
        .await;
}

#[tokio::test]
async fn name_without_an_address_is_told_of() {
    check_server_that(Manner::Says(ResponseCode::NoError), "says that the name has no address")
        .await;
}

#[tokio::test]
async fn failure_of_the_server_is_told_of() {
    check_server_that(Manner::Says(ResponseCode::ServFail), "answers with the error").await;
}

#[tokio::test]
async fn refusal_of_the_server_is_told_of() {
    check_server_that(Manner::Says(ResponseCode::Refused), "answers with the error").await;
}

#[tokio::test]
async fn second_server_helps_where_the_first_does_not() {
    let codes = [ResponseCode::ServFail, ResponseCode::Refused, ResponseCode::NotImp];
    for manner in [Manner::Silent].into_iter().chain(codes.map(Manner::Says)) {
        let (broken, dns) = (Dns::start().await, Dns::start().await);
        broken.set(manner);
        let mut stage = named_by(&dns).await;
        stage.set("UPSTREAM_DNS", format!("{},{}", broken.addr(), dns.addr()));
        let world = stage.start().await;
        assert_eq!(world.get(PATH).await.status, 200, "{manner:?}");
    }
}

#[tokio::test]
async fn first_servers_word_on_a_name_counts() {
    let (first, second) = (Dns::start().await, Dns::start().await);
    second.knows(OTHER, &["127.0.0.1"]);
    let mut stage = named_by(&first).await;
    stage.set("UPSTREAM_DNS", format!("{},{}", first.addr(), second.addr()));
    let world = stage.start().await;
    let (response, _) = world.connect(&format!("{OTHER}:443")).await;
    let servers = format!("{}, {}", first.addr(), second.addr());
    check_fails(&response, &servers, "says that there is no such name");
    assert_eq!(second.asked(OTHER, RecordType::A), 0);
}

#[tokio::test]
async fn server_that_comes_back_is_believed_at_once() {
    let dns = Dns::start().await;
    dns.set(Manner::Says(ResponseCode::ServFail));
    let world = named_by(&dns).await.launch().await;
    assert_eq!(world.get(PATH).await.status, 502);
    dns.set(Manner::Answers);
    assert_eq!(world.get(PATH).await.status, 200);
}

#[tokio::test]
async fn answer_that_leads_back_here_is_called_a_lie() {
    let dns = Dns::start().await;
    dns.knows("alias.test", &["127.0.0.1"]);
    let world = world_named_by(&dns).await;
    let target = format!("alias.test:{}", world.sidecar.proxy().port());
    let (response, _) = world.connect(&target).await;
    check_loops(&response, "the servers of UPSTREAM_DNS: they know the alias");
}

#[tokio::test]
async fn name_that_the_system_leads_back_here_wants_upstream_dns() {
    let world = World::start().await;
    let target = format!("localhost:{}", world.sidecar.proxy().port());
    let (response, _) = world.connect(&target).await;
    check_loops(&response, "set UPSTREAM_DNS");
}

fn check_loops(response: &Response, why: &str) {
    assert_eq!((response.status, response.code().as_str()), (403, "target_not_allowed"));
    let message = response.json()["message"].as_str().unwrap_or_default().to_owned();
    assert!(message.contains(why), "{message}");
    let field = response.value("proxy-status").unwrap_or_default();
    assert!(field.contains("error=proxy_loop_detected;"), "{field}");
}

#[tokio::test]
async fn private_answer_is_refused_with_and_without_a_parent() {
    let parent = ParentProxy::start(ParentManner::Leads).await;
    for url in ["", &parent.url()] {
        let dns = Dns::start().await;
        dns.knows("inside.test", &["10.0.0.1", "fd00::1"]);
        let mut stage = named_by(&dns).await;
        stage.set("UPSTREAM_PROXY", url);
        let world = stage.launch().await;
        let (response, _) = world.connect("inside.test:443").await;
        assert_eq!((response.status, response.code().as_str()), (403, "target_not_allowed"));
        assert!(!parent.targets().contains(&"inside.test:443".to_owned()));
    }
}

#[tokio::test]
async fn silent_servers_do_not_keep_a_client_from_the_parent() {
    let (dns, parent) = (Dns::start().await, ParentProxy::start(ParentManner::Leads).await);
    dns.set(Manner::Silent);
    let (other, target) = other().await;
    parent.knows(&target, other.addr());
    let mut stage = named_by(&dns).await;
    stage.set("UPSTREAM_PROXY", parent.url());
    stage.set("CONNECT_TIMEOUT", "2s");
    let world = stage.launch().await;
    let _tunnel = world.tunnel(&target).await;
    assert!(dns.asked(OTHER, RecordType::AAAA) >= 1);
}

#[tokio::test]
async fn neighbour_that_the_servers_do_not_know_is_led_to_no_proxy() {
    let dns = Dns::start().await;
    let world = world_named_by(&dns).await;
    for (target, advice) in [("redis:6379", "NO_PROXY"), ("unknown.test:80", "UPSTREAM_DNS")] {
        let response = world.connect(target).await.0;
        check_fails(&response, &dns.addr().to_string(), "says that there is no such name");
        let hint = response.json()["hint"].as_str().unwrap_or_default().to_owned();
        assert!(hint.contains(advice), "{hint}");
    }
}

#[tokio::test]
async fn unusable_server_ends_the_start() {
    for servers in ["192.0.2.1,dns.test", "192.0.2.1:0", ","] {
        let mut stage = Stage::new().await;
        stage.set("UPSTREAM_DNS", servers);
        let output = stage.run(&["run"]).await;
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("UPSTREAM_DNS:"), "{}", stderr(&output));
    }
}
