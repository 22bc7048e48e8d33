//! A bound that no variable sets: load reaches it, and it lets go again.

use futures_util::future::join_all;
use token_sidecar::net::raise_descriptor_limit;

use crate::bounds::{limited, wire_from};
use crate::support::client::API;
use crate::support::http::Wire;
use crate::support::{World, until};

const PATH: &str = "/web/api/v2/x";

/// TLS handshakes at once that one address may be amid: half of 4096.
const HANDSHAKES_OF_ONE: usize = 2048;

/// What load goes beyond a bound by.
const MORE: u32 = 10;

/// This bound turns so many away, and no more.
async fn check_counted(world: &World, limit: &str, count: u32) {
    let count = f64::from(count);
    until(&format!("{count} beyond {limit}"), async || limited(world, limit).await >= count).await;
    let counted = limited(world, limit).await;
    assert!((counted - count).abs() < 0.5, "{limit}: {counted}");
}

/// Opens a tunnel to the API host from this address of loopback.
async fn tunnel_from(world: &World, address: &str) -> Wire {
    let mut wire = wire_from(world, address).await;
    wire.send(format!("CONNECT {API}:443 HTTP/1.1\r\n\r\n")).await;
    let (head, _) = wire.response_head().await.unwrap();
    assert_eq!(head.word(1), "200", "{head:?}");
    wire
}

/// The same, with a TLS handshake begun in it that does not go on.
async fn begin_handshake_from(world: &World, address: &str) -> Wire {
    let mut wire = tunnel_from(world, address).await;
    wire.send(b"\x16").await;
    wire
}

/// Whether TLS in a new tunnel from this address gets as far as an answer.
async fn check_is_served(world: &World, address: &str) {
    let tunnel = tunnel_from(world, address).await;
    let mut tls = world.tls_over(tunnel, API).await;
    tls.send(format!("GET {PATH} HTTP/1.1\r\nHost: {API}\r\n\r\n")).await;
    assert_eq!(tls.response("GET").await.status, 200, "{address}");
}

#[tokio::test]
async fn one_address_takes_half_of_the_handshakes_and_others_are_served() {
    raise_descriptor_limit();
    let world = World::start().await;
    let count = HANDSHAKES_OF_ONE + MORE as usize;
    let begun = join_all((0..count).map(|_| begin_handshake_from(&world, "127.0.0.1"))).await;
    check_counted(&world, "handshakes", MORE).await;
    check_is_served(&world, "127.0.0.2").await;
    assert!(begin_handshake_from(&world, "127.0.0.1").await.closed().await.is_empty());
    check_counted(&world, "handshakes", MORE + 1).await;
    assert!(limited(&world, "handshake_time").await < 0.5, "too slow to tell");
    drop(begun);
    until("the handshakes to be over", async || {
        world.sidecar.metric("sidecar_connections", &[]).await < 1.0
    })
    .await;
    check_is_served(&world, "127.0.0.1").await;
    check_counted(&world, "handshakes", MORE + 1).await;
}
