//! A private resolver over UDP and TCP that records what it is asked and can fail in each way.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use hickory_resolver::proto::op::{Message, ResponseCode};
use hickory_resolver::proto::rr::{RData, Record, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// What it knows, else NXDOMAIN.
    Answers,
    /// The same, but over UDP each answer is cut.
    Cuts,
    /// Not at all.
    Silent,
    /// Always this code.
    Says(ResponseCode),
}

/// One question as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    /// The name without its final dot.
    pub(crate) name: String,
    pub(crate) kind: RecordType,
    pub(crate) by_tcp: bool,
    /// The same in each copy of a question that was sent again.
    id: u16,
}

struct Shared {
    manner: Mutex<Manner>,
    ttl: Mutex<u32>,
    /// What each name has, and then has next.
    names: Mutex<HashMap<String, VecDeque<Vec<IpAddr>>>>,
    questions: Mutex<Vec<Question>>,
}

/// A running stand-in. Stops when dropped.
pub(crate) struct Dns {
    addr: SocketAddr,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

impl Dns {
    /// One on a free port of loopback.
    pub(crate) async fn start() -> Self {
        loop {
            let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
            // The port is free for TCP; for UDP it need not be.
            if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
                return Self::run(udp, tcp);
            }
        }
    }

    /// One on this port, for TCP and for UDP.
    ///
    /// # Errors
    ///
    /// The port is taken, or not to be had.
    pub(crate) async fn start_at(addr: SocketAddr) -> std::io::Result<Self> {
        let tcp = TcpListener::bind(addr).await?;
        Ok(Self::run(UdpSocket::bind(addr).await?, tcp))
    }

    fn run(udp: UdpSocket, tcp: TcpListener) -> Self {
        let addr = tcp.local_addr().unwrap();
        let shared = Arc::new(Shared {
            manner: Mutex::new(Manner::Answers),
            ttl: Mutex::new(300),
            names: Mutex::default(),
            questions: Mutex::default(),
        });
        let stop = CancellationToken::new();
        tokio::spawn(stop.clone().run_until_cancelled_owned(serve_udp(udp, shared.clone())));
        tokio::spawn(stop.clone().run_until_cancelled_owned(serve_tcp(tcp, shared.clone())));
        Self { addr, shared, _stop: stop.drop_guard() }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub(crate) fn set(&self, manner: Manner) {
        *self.shared.manner.lock().unwrap() = manner;
    }

    /// Seconds that answers may be kept.
    pub(crate) fn set_ttl(&self, seconds: u32) {
        *self.shared.ttl.lock().unwrap() = seconds;
    }

    /// Lets `name` have exactly these addresses.
    pub(crate) fn knows(&self, name: &str, addresses: &[&str]) {
        self.knows_in_turn(name, &[addresses]);
    }

    /// Lets `name` have the first of these lists of addresses until it was asked for IPv4, then
    /// the next one, and the last one for good.
    pub(crate) fn knows_in_turn(&self, name: &str, turns: &[&[&str]]) {
        let parse = |turn: &&[&str]| turn.iter().map(|address| address.parse().unwrap()).collect();
        let turns = turns.iter().map(parse).collect();
        self.shared.names.lock().unwrap().insert(name.to_owned(), turns);
    }

    pub(crate) fn questions(&self) -> Vec<Question> {
        self.shared.questions.lock().unwrap().clone()
    }

    /// How often it was asked for the addresses of this kind, not counting copies.
    pub(crate) fn asked(&self, name: &str, kind: RecordType) -> usize {
        let questions = self.questions();
        let same = questions.iter().filter(|asked| asked.name == name && asked.kind == kind);
        same.map(|asked| asked.id).collect::<HashSet<_>>().len()
    }
}

async fn serve_udp(socket: UdpSocket, shared: Arc<Shared>) {
    let mut buffer = [0; 4096];
    loop {
        let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
        if let Some(answer) = shared.answer(&buffer[..length], false) {
            socket.send_to(&answer, client).await.unwrap();
        }
    }
}

async fn serve_tcp(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(serve_stream(stream, shared.clone()));
    }
}

async fn serve_stream(mut stream: TcpStream, shared: Arc<Shared>) -> std::io::Result<()> {
    loop {
        let length = stream.read_u16().await?;
        let mut query = vec![0; usize::from(length)];
        stream.read_exact(&mut query).await?;
        if let Some(answer) = shared.answer(&query, true) {
            stream.write_u16(u16::try_from(answer.len()).unwrap()).await?;
            stream.write_all(&answer).await?;
        }
    }
}

impl Shared {
    fn answer(&self, query: &[u8], by_tcp: bool) -> Option<Vec<u8>> {
        let query = Message::from_vec(query).unwrap();
        let asked = query.queries[0].clone();
        let name = asked.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
        let kind = asked.query_type();
        let id = query.metadata.id;
        let question = Question { name: name.clone(), kind, by_tcp, id };
        self.questions.lock().unwrap().push(question);
        let manner = *self.manner.lock().unwrap();
        let mut answer = Message::response(id, query.metadata.op_code);
        answer.add_query(asked.clone());
        match manner {
            Manner::Silent => return None,
            Manner::Says(code) => answer.metadata.response_code = code,
            Manner::Cuts if !by_tcp => answer.metadata.truncation = true,
            Manner::Answers | Manner::Cuts => match self.names.lock().unwrap().get_mut(&name) {
                Some(turns) => {
                    let addresses = turns[0].clone();
                    if kind == RecordType::A && turns.len() > 1 {
                        turns.pop_front();
                    }
                    let ttl = *self.ttl.lock().unwrap();
                    let of_kind = addresses.iter().map(|ip| RData::from(*ip));
                    let of_kind = of_kind.filter(|data| data.record_type() == kind);
                    let records =
                        of_kind.map(|data| Record::from_rdata(asked.name().clone(), ttl, data));
                    answer.add_answers(records);
                }
                None => answer.metadata.response_code = ResponseCode::NXDomain,
            },
        }
        Some(answer.to_vec().unwrap())
    }
}
