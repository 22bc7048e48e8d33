//! Where the proxy must not lead, however it is spelt, by whatever name, by whichever way in.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use hickory_resolver::proto::rr::RecordType;
use tokio::net::TcpListener;

use crate::support::certificates::client_hello;
use crate::support::dns::Dns;
use crate::support::http::{PATIENCE, Response, Wire};
use crate::support::parent::{Manner, ParentProxy};
use crate::support::sidecar::stderr;
use crate::support::{Stage, World, nobody, skip, until};

/// Every way to write an address that is not public, as the host of a target.
const PRIVATE: [&str; 56] = [
    // Loopback and the unspecified address, in the spellings of inet_aton(3).
    "127.0.0.1",
    "127.0.0.1.",
    "127.9.9.9",
    "127.1",
    "127.0.1",
    "2130706433",
    "017700000001",
    "0177.0.0.1",
    "0177.1",
    "0x7f.1",
    "0X7F.0.0.1",
    "0x7f000001",
    "0x7F000001.",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "0.0.0.0",
    "0",
    "0x0",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[0000:0000:0000:0000:0000:0000:0000:0001]",
    // Forms of IPv6 that carry IPv4: mapped, compatible, translated, NAT64, 6to4, Teredo.
    "[::ffff:127.0.0.1]",
    "[::FFFF:7F00:1]",
    "[::ffff:0.0.0.0]",
    "[::127.0.0.1]",
    "[::ffff:0:127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::127.0.0.1]",
    "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::1]",
    "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
    // Networks of others: private, link-local, shared, reserved, multicast.
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "100.64.0.1",
    "198.18.0.1",
    "192.0.2.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "[fc00::1]",
    "[fe80::1]",
    "[fec0::1]",
    "[ff02::1]",
    "[100::1]",
    "[5f00::1]",
    "[2001:db8::1]",
    // The metadata of clouds.
    "169.254.169.254",
    "[::ffff:169.254.169.254]",
    "[fd00:ec2::254]",
    "100.100.100.200",
    "168.63.129.16",
];

/// What is no host at all, or a name that nobody has.
const ODD: [&str; 10] = [
    "127.0.0.1..",
    "[127.0.0.1]",
    "[::1%25lo]",
    "[fe80::1%lo]",
    "%31%32%37.0.0.1",
    "127%2e0%2e0%2e1",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "127.0.0.1%00.test",
    "[::ffff:127.0.0.1",
];

fn check_is_not_allowed(response: &Response, case: &str) {
    let seen = (response.status, response.code());
    assert_eq!(seen, (403, "target_not_allowed".into()), "{case}: {response:?}");
}

/// What an absolute-form request for `authority` gets.
async fn absolute(world: &World, scheme: &str, authority: &str) -> Response {
    world.raw(format!("GET {scheme}://{authority}/ HTTP/1.1\r\nHost: x\r\n\r\n")).await
}

/// A listener that nobody may reach, on all addresses of loopback.
async fn forbidden() -> (TcpListener, u16) {
    let listener = TcpListener::bind("[::]:0").await;
    let listener = match listener {
        Ok(listener) => listener,
        Err(_) => TcpListener::bind("0.0.0.0:0").await.unwrap(),
    };
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Nobody has come to `listener`, and nobody waits there.
async fn check_nobody_came(listener: &TcpListener) {
    let came = tokio::time::timeout(std::time::Duration::from_millis(50), listener.accept()).await;
    assert!(came.is_err(), "{came:?}");
}

#[tokio::test]
async fn no_spelling_of_a_private_address_is_reached() {
    let (listener, port) = forbidden().await;
    let world = World::start().await;
    for host in PRIVATE {
        let authority = format!("{host}:{port}");
        check_is_not_allowed(&world.connect(&authority).await.0, &authority);
        for scheme in ["http", "https"] {
            check_is_not_allowed(&absolute(&world, scheme, &authority).await, &authority);
        }
    }
    check_nobody_came(&listener).await;
    assert!(world.origin.requests().is_empty());
}

#[tokio::test]
async fn what_is_hardly_a_host_leads_nowhere() {
    let (listener, port) = forbidden().await;
    let world = World::start().await;
    for host in ODD {
        let authority = format!("{host}:{port}");
        let answers =
            [world.connect(&authority).await.0, absolute(&world, "http", &authority).await];
        for answer in answers {
            assert!([400, 403, 502].contains(&answer.status), "{authority}: {answer:?}");
        }
    }
    check_nobody_came(&listener).await;
}

#[tokio::test]
async fn userinfo_before_a_private_address_does_not_hide_it() {
    let (listener, port) = forbidden().await;
    let world = World::start().await;
    for authority in [
        format!("example.com@127.0.0.1:{port}"),
        format!("example.com:80@127.0.0.1:{port}"),
        format!("127.0.0.1:{port}#@example.com"),
        format!("127.0.0.1:{port}\\@example.com"),
    ] {
        for answer in
            [world.connect(&authority).await.0, absolute(&world, "http", &authority).await]
        {
            assert!([400, 403].contains(&answer.status), "{authority}: {answer:?}");
        }
    }
    check_nobody_came(&listener).await;
}

/// The hello of a client that asks for `name`, which may be what rustls would not send.
fn hello_for(name: &str) -> Vec<u8> {
    let stand_in = format!("{}.x", "a".repeat(name.len() - 2));
    let mut hello = client_hello(&stand_in);
    let at = hello.windows(name.len()).position(|bytes| bytes == stand_in.as_bytes()).unwrap();
    hello[at..at + name.len()].copy_from_slice(name.as_bytes());
    hello
}

#[tokio::test]
async fn no_spelling_in_a_client_hello_leads_to_a_private_address() {
    let mut stage = Stage::new().await;
    stage.set("SNI_LISTEN", "127.0.0.1:0");
    let world = stage.start().await;
    let names = PRIVATE.iter().chain(&ODD).filter(|name| name.len() > 3 && !name.starts_with('['));
    for name in names {
        let mut wire = Wire::connect(world.sidecar.sni()).await;
        wire.send(hello_for(name)).await;
        assert!(wire.closed().await.is_empty(), "{name}");
    }
    let refused = async || {
        world
            .sidecar
            .metric("sidecar_requests_total", &["route=\"tunnel\"", "status=\"403\""])
            .await
    };
    assert!(refused().await > 2.5, "names such as localhost get as far as the policy");
    let led =
        world.sidecar.metric("sidecar_requests_total", &["route=\"tunnel\"", "\"200\""]).await;
    assert!(led < 0.5, "{led}");
}

/// Somebody comes to `listener`.
async fn comes_to(listener: &TcpListener) {
    tokio::time::timeout(PATIENCE, listener.accept()).await.expect("a connection").unwrap();
}

/// Two listeners on one port: of an address that is not allowed, and of one that is.
async fn neighbours() -> (TcpListener, TcpListener, u16) {
    loop {
        let forbidden = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = forbidden.local_addr().unwrap().port();
        if let Ok(allowed) = TcpListener::bind(("127.0.0.2", port)).await {
            return (forbidden, allowed, port);
        }
    }
}

/// A stage in which `dns` alone knows names, and 127.0.0.2 may be reached.
async fn named_by(dns: &Dns) -> Stage {
    let mut stage = Stage::new().await;
    stage.set("UPSTREAM_DNS", dns.addr());
    stage.set("ALLOW_HOSTS", "127.0.0.2");
    stage
}

#[tokio::test]
async fn of_a_names_addresses_only_the_permitted_ones_are_dialled() {
    let (forbidden, allowed, port) = neighbours().await;
    let dns = Dns::start().await;
    dns.knows("mixed.test", &["127.0.0.1", "10.0.0.1", "127.0.0.2", "::1"]);
    let world = named_by(&dns).await.start().await;
    for _ in 0..5 {
        let _tunnel = world.tunnel(&format!("mixed.test:{port}")).await;
        comes_to(&allowed).await;
    }
    check_nobody_came(&forbidden).await;
}

/// The parent chooses among the addresses, so each must be permitted.
#[tokio::test]
async fn name_with_one_private_address_is_not_asked_of_a_parent() {
    let parent = ParentProxy::start(Manner::Leads).await;
    let (listener, port) = forbidden().await;
    let dns = Dns::start().await;
    dns.knows("mixed.test", &["127.0.0.2", "127.0.0.1"]);
    dns.knows("public.test", &["127.0.0.2", "93.184.215.14"]);
    let mut stage = named_by(&dns).await;
    stage.set("UPSTREAM_PROXY", parent.url());
    let world = stage.start().await;
    let mixed = format!("mixed.test:{port}");
    check_is_not_allowed(&world.connect(&mixed).await.0, "CONNECT");
    check_is_not_allowed(&absolute(&world, "http", &mixed).await, "absolute");
    let public = format!("public.test:{port}");
    parent.knows(&public, SocketAddr::from(([127, 0, 0, 1], port)));
    let _tunnel = world.tunnel(&public).await;
    assert_eq!(parent.targets().iter().filter(|target| **target == mixed).count(), 0);
    assert!(parent.targets().contains(&public));
    comes_to(&listener).await;
}

/// DNS rebinding: a second look would see another address than the one that was checked.
#[tokio::test]
async fn checked_address_is_the_one_that_is_dialled() {
    let (forbidden, allowed, port) = neighbours().await;
    let dns = Dns::start().await;
    dns.set_ttl(0);
    dns.knows_in_turn("rebound.test", &[&["127.0.0.2"], &["127.0.0.1"]]);
    let world = named_by(&dns).await.start().await;
    let target = format!("rebound.test:{port}");
    let _tunnel = world.tunnel(&target).await;
    comes_to(&allowed).await;
    assert_eq!(dns.asked("rebound.test", RecordType::A), 1, "one look for check and dial");
    check_is_not_allowed(&world.connect(&target).await.0, "the second answer");
    assert_eq!(dns.asked("rebound.test", RecordType::A), 2);
    check_is_not_allowed(&absolute(&world, "http", &target).await, "absolute");
    check_nobody_came(&forbidden).await;
}

#[tokio::test]
async fn entries_of_allow_hosts_open_what_they_name_and_nothing_beside() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dns = Dns::start().await;
    let names = [
        ("a.x.test", true),
        ("B.A.X.test.", true),
        ("x.test", false),
        ("evilx.test", false),
        ("a.x.test.evil.test", false),
        ("one.test", true),
        ("a.one.test", false),
        ("notone.test", false),
    ];
    for (name, _) in names {
        dns.knows(&name.trim_end_matches('.').to_lowercase(), &["127.0.0.1"]);
    }
    let mut stage = Stage::new().await;
    stage.set("UPSTREAM_DNS", dns.addr());
    stage.set("ALLOW_HOSTS", format!("*.x.test:{port}, ONE.test.:{port}"));
    let world = stage.start().await;
    for (name, allowed) in names {
        let (response, _wire) = world.connect(&format!("{name}:{port}")).await;
        assert_eq!(response.status, if allowed { 200 } else { 403 }, "{name}");
        let elsewhere = format!("{name}:{}", other.local_addr().unwrap().port());
        check_is_not_allowed(&world.connect(&elsewhere).await.0, &elsewhere);
    }
    check_is_not_allowed(&world.connect(&format!("127.0.0.1:{port}")).await.0, "by address");
    check_nobody_came(&other).await;
}

#[tokio::test]
async fn entry_of_allow_hosts_that_cannot_be_used_ends_the_start() {
    for entry in ["*", "10.0.0.0/33", "redis:port", "http://redis", "127.1", "*.*.x"] {
        let mut stage = Stage::new().await;
        stage.set("ALLOW_HOSTS", format!("redis:6379, {entry}"));
        let output = stage.run(&["run"]).await;
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{entry}: {text}");
        assert!(text.contains("ALLOW_HOSTS:") && text.contains(entry), "{entry}: {text}");
    }
}

#[tokio::test]
async fn setting_that_a_slip_would_widen_or_spoil_ends_the_start_with_what_is_wrong() {
    for (name, value, told) in [
        ("ALLOW_HOSTS", "10.0.0.1/8", "expected the network, 10.0.0.0/8, or the address alone"),
        ("CLIENT_NETWORKS", "10.0.0.1/8", "expected the network, 10.0.0.0/8, or the address alone"),
        ("API_ORIGINS", "https://a.test:0/api", "the port of a.test:0 is not usable"),
        ("API_ORIGINS", "https://a.test:99999", "the port of a.test:99999 is not usable"),
    ] {
        let mut stage = Stage::new().await;
        stage.set(name, value);
        let output = stage.run(&["run"]).await;
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{value}: {text}");
        assert!(text.contains(&format!("{name}:")) && text.contains(told), "{value}: {text}");
    }
}

/// An address of this machine that is not loopback; nothing is sent for it.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip()).filter(|ip| !ip.is_loopback())
}

#[tokio::test]
async fn own_listeners_are_not_reached_by_any_address_of_the_machine() {
    let mut hosts: Vec<String> =
        ["127.0.0.1", "127.9.9.9", "127.1", "0.0.0.0", "0", "localhost", "[::1]", "[::]"]
            .map(str::to_owned)
            .to_vec();
    let mut forms = vec!["127.0.0.1".to_owned()];
    match own_address() {
        Some(ip) => forms.push(ip.to_string()),
        None => skip::not_permitted("an address that is not loopback"),
    }
    for ip in forms {
        hosts.extend([format!("[::ffff:{ip}]"), format!("[64:ff9b::{ip}]"), ip]);
    }
    let mut stage = Stage::new().await;
    stage.set("PROXY_LISTEN", "0.0.0.0:0");
    stage.set("ADMIN_LISTEN", "0.0.0.0:0");
    stage.set("SNI_LISTEN", "0.0.0.0:0");
    stage.set("ALLOW_HOSTS", "0.0.0.0/0,::/0,localhost");
    let world = stage.start().await;
    let sidecar = &world.sidecar;
    for port in [sidecar.proxy(), sidecar.admin(), sidecar.sni()].map(|own| own.port()) {
        for host in &hosts {
            let authority = format!("{host}:{port}");
            let answers =
                [world.connect(&authority).await.0, absolute(&world, "http", &authority).await];
            for answer in answers {
                check_is_not_allowed(&answer, &authority);
                let status = answer.value("proxy-status").unwrap_or_default().to_owned();
                assert!(status.contains("proxy_loop_detected"), "{authority}: {status}");
            }
        }
    }
}

#[tokio::test]
async fn own_listener_is_not_reached_by_sni_even_if_connect_to_says_so() {
    // The port has to be known beforehand: it is kept, on an address of loopback of its own.
    let (_kept, kept) = nobody();
    let admin = SocketAddr::from(([127, 0, 0, 3], kept.port()));
    let mut stage = Stage::new().await;
    stage.set("SNI_LISTEN", "127.0.0.1:0");
    stage.set("ADMIN_LISTEN", admin);
    stage.add("CONNECT_TO", format!("own.test:443={admin}"));
    let world = stage.start().await;
    let mut wire = Wire::connect(world.sidecar.sni()).await;
    wire.send(client_hello("own.test")).await;
    assert!(wire.closed().await.is_empty());
    let why = format!("{admin} is this sidecar itself");
    until(&why, async || world.sidecar.log().contains(&why)).await;
}
