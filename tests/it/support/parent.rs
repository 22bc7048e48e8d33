//! A parent proxy that knows CONNECT and nothing else, and can fail in each way.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::http::Head;

/// What it does when it is asked for a way.
#[derive(Clone, Debug)]
pub(crate) enum Manner {
    /// Leads to the address that it knows for the target, else 502.
    Leads,
    /// The same for those who send this `Proxy-Authorization`, else 407.
    Asks(String),
    /// Answers these bytes and closes.
    Says(Vec<u8>),
    /// Takes the request and never answers.
    Hangs,
}

struct Shared {
    manner: Mutex<Manner>,
    ways: Mutex<HashMap<String, SocketAddr>>,
    asked: Mutex<Vec<Head>>,
}

/// A running stand-in. Stops when dropped.
pub(crate) struct ParentProxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

impl ParentProxy {
    pub(crate) async fn start(manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            manner: Mutex::new(manner),
            ways: Mutex::default(),
            asked: Mutex::default(),
        });
        let stop = CancellationToken::new();
        let accept = accept(listener, shared.clone(), stop.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept));
        Self { addr, shared, _stop: stop.drop_guard() }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its address as the variable takes it.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Lets `target`, such as `host:443`, lead to `addr`.
    pub(crate) fn knows(&self, target: &str, addr: SocketAddr) {
        self.shared.ways.lock().unwrap().insert(target.to_owned(), addr);
    }

    /// The heads of what it was asked.
    pub(crate) fn asked(&self) -> Vec<Head> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// The targets that it was asked for.
    pub(crate) fn targets(&self) -> Vec<String> {
        self.asked().iter().map(|head| head.word(1).to_owned()).collect()
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let serve = serve(stream, shared.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(serve));
    }
}

async fn serve(mut client: TcpStream, shared: Arc<Shared>) {
    let Some(head) = read_head(&mut client).await else {
        return;
    };
    shared.asked.lock().unwrap().push(head.clone());
    let manner = shared.manner.lock().unwrap().clone();
    match manner {
        Manner::Leads => lead(client, &head, &shared).await,
        Manner::Asks(expected) if head.values("proxy-authorization") == [expected.as_str()] => {
            lead(client, &head, &shared).await;
        }
        Manner::Asks(_) => say(client, REFUSAL).await,
        Manner::Says(bytes) => say(client, &bytes).await,
        Manner::Hangs => std::future::pending().await,
    }
}

/// What a proxy says to those whom it does not know.
pub(crate) const REFUSAL: &[u8] = b"HTTP/1.1 407 Proxy Authentication Required\r\n\
    Proxy-Authenticate: Basic realm=\"parent\"\r\nContent-Length: 0\r\n\r\n";

async fn say(mut client: TcpStream, bytes: &[u8]) {
    let _ = client.write_all(bytes).await;
    let _ = client.shutdown().await;
    // Closed by the other side: else what was said might be lost in a reset.
    let _ = client.read(&mut [0; 64]).await;
}

async fn lead(mut client: TcpStream, head: &Head, shared: &Shared) {
    let known = shared.ways.lock().unwrap().get(head.word(1)).copied();
    let Some(addr) = known else {
        return say(client, b"HTTP/1.1 502 Bad Gateway\r\n\r\n").await;
    };
    let mut upstream = TcpStream::connect(addr).await.unwrap();
    let _ =
        client.write_all(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 parent\r\n\r\n").await;
    let _ = copy_bidirectional(&mut client, &mut upstream).await;
}

/// The request's head, byte by byte: what follows is not for the proxy.
async fn read_head(client: &mut TcpStream) -> Option<Head> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        bytes.push(client.read_u8().await.ok()?);
    }
    let text = String::from_utf8(bytes).unwrap();
    let mut lines = text.lines();
    let start = lines.next()?.to_owned();
    let fields = lines.filter_map(|line| line.split_once(": "));
    let fields = fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    Some(Head { start, fields })
}
