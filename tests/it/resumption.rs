//! TLS on both faces: versions, the application protocol, and sessions that are taken up again.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use rustls::pki_types::ServerName;
use rustls::server::Acceptor;
use rustls::version::{TLS12, TLS13};
use rustls::{HandshakeKind, ProtocolVersion, ServerConfig, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::support::certificates::{connector, connector_in};
use crate::support::client::{API, Request, Way};
use crate::support::http::{Duplex, Wire};
use crate::support::{Stage, World};

const PATH: &str = "/web/api/v2/x";
const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS12, &TLS13];

/// A request inside a tunnel of its own, which stays open; tickets come with the answer.
async fn visit(world: &World, connector: &TlsConnector) -> TlsStream<Box<dyn Duplex>> {
    let tunnel = world.tunnel(&format!("{API}:443")).await.into_inner();
    let name = ServerName::try_from(API).unwrap();
    let mut tls = connector.connect(name, tunnel).await.unwrap();
    let request = format!("GET {PATH} HTTP/1.1\r\nHost: {API}\r\n\r\n");
    tls.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(PATH.as_bytes()) {
        assert!(tls.read_buf(&mut answer).await.unwrap() > 0, "an early end");
    }
    tls
}

fn kind_of(stream: &TlsStream<Box<dyn Duplex>>) -> HandshakeKind {
    stream.get_ref().1.handshake_kind().unwrap()
}

#[tokio::test]
async fn clients_sessions_are_taken_up_again_by_every_worker() {
    let world = World::with(&[("WORKERS", "3")]).await;
    for version in VERSIONS {
        let connector = connector_in(&[version], &world.ca_file(), &[b"http/1.1"]);
        let first = visit(&world, &connector).await;
        assert_eq!(kind_of(&first), HandshakeKind::Full, "{version:?}");
        assert_eq!(first.get_ref().1.protocol_version(), Some(version.version));
        // All stay open, so each worker has its share of them.
        let mut open = vec![first];
        for _ in 0..6 {
            let next = visit(&world, &connector).await;
            assert_eq!(kind_of(&next), HandshakeKind::Resumed, "{version:?}");
            open.push(next);
        }
    }
}

#[tokio::test]
async fn client_that_offers_http_2_alone_is_told_that_there_is_none() {
    let world = World::start().await;
    let connector = connector(&world.ca_file(), &[b"h2"]);
    let tunnel = world.tunnel(&format!("{API}:443")).await.into_inner();
    let outcome = connector.connect(ServerName::try_from(API).unwrap(), tunnel).await;
    let error = outcome.err().expect("no protocol in common").to_string();
    assert!(error.contains("NoApplicationProtocol"), "{error}");
    assert!(world.origin.requests().is_empty());
}

/// What a shop saw of one handshake.
#[derive(Clone, Debug)]
struct Greeting {
    kind: HandshakeKind,
    version: ProtocolVersion,
    offered: Vec<Vec<u8>>,
}

/// A shop that answers one request per connection, and notes how each began.
struct Shop {
    addr: SocketAddr,
    greetings: Arc<Mutex<Vec<Greeting>>>,
    _stop: DropGuard,
}

impl Shop {
    async fn start(config: ServerConfig) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let greetings = Arc::<Mutex<Vec<Greeting>>>::default();
        let stop = CancellationToken::new();
        let accept = accept(listener, Arc::new(config), greetings.clone(), stop.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept));
        Self { addr, greetings, _stop: stop.drop_guard() }
    }

    fn greetings(&self) -> Vec<Greeting> {
        self.greetings.lock().unwrap().clone()
    }
}

async fn accept(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    greetings: Arc<Mutex<Vec<Greeting>>>,
    stop: CancellationToken,
) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let serve = serve(stream, config.clone(), greetings.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(serve));
    }
}

async fn serve(
    stream: TcpStream,
    config: Arc<ServerConfig>,
    greetings: Arc<Mutex<Vec<Greeting>>>,
) -> Option<()> {
    let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await.ok()?;
    let offered = start.client_hello().alpn().into_iter().flatten().map(<[u8]>::to_vec).collect();
    let stream = start.into_stream(config).await.ok()?;
    let server = stream.get_ref().1;
    let (kind, version) = (server.handshake_kind()?, server.protocol_version()?);
    greetings.lock().unwrap().push(Greeting { kind, version, offered });
    let mut wire = Wire::new(stream);
    wire.head().await.ok()??;
    let answer = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";
    wire.try_send(answer).await.ok()?;
    wire.try_finish().await.ok()
}

/// A sidecar, with two workers, before a shop with this configuration.
async fn before(shape: impl FnOnce(&Stage) -> ServerConfig) -> (World, Shop) {
    let mut stage = Stage::new().await;
    let shop = Shop::start(shape(&stage)).await;
    stage.set("CONNECT_TO", format!("{API}:443={}", shop.addr));
    stage.set("TOKEN_SOURCES", "flaresolverr");
    (stage.launch().await, shop)
}

#[tokio::test]
async fn sessions_with_the_shop_are_taken_up_again_by_every_worker() {
    for version in VERSIONS {
        let (world, shop) = before(|stage| stage.ca.server_config(&[API], &[version])).await;
        let mut open = Vec::new();
        for _ in 0..8 {
            let mut session = world.open(Way::Gateway).await;
            assert_eq!(session.get(PATH).await.status, 200);
            open.push(session);
        }
        let greetings = shop.greetings();
        // The verifier's questions may come at the same time as the first request.
        let full = greetings.iter().filter(|seen| seen.kind == HandshakeKind::Full).count();
        assert!(greetings.len() >= 8 && full <= 4, "{greetings:?}");
        for seen in greetings {
            assert_eq!(seen.version, version.version);
            assert_eq!(seen.offered, [b"http/1.1".to_vec()]);
        }
    }
}

#[tokio::test]
async fn shop_that_speaks_http_2_alone_is_not_spoken_to() {
    let (world, shop) = before(|stage| {
        let mut config = stage.ca.server_config(&[API], rustls::DEFAULT_VERSIONS);
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    })
    .await;
    let response = world.call(Way::Intercept, &Request::get(PATH)).await;
    assert_eq!((response.status, response.code()), (502, "upstream_tls".into()));
    assert!(shop.greetings().is_empty());
}

#[tokio::test]
async fn shop_without_a_word_on_the_protocol_is_spoken_to() {
    let (world, _shop) = before(|stage| {
        let mut config = stage.ca.server_config(&[API], rustls::DEFAULT_VERSIONS);
        config.alpn_protocols.clear();
        config
    })
    .await;
    assert_eq!(world.call(Way::Intercept, &Request::get(PATH)).await.status, 200);
}
