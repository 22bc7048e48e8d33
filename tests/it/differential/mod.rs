//! Request smuggling, searched for: thousands of damaged request streams go through the sidecar to
//! two different real servers, and all three must have seen the same requests.
//!
//! | variable | default | |
//! |---|---|---|
//! | `DIFFERENTIAL_STREAMS` | 1500 | how many streams |
//! | `DIFFERENTIAL_SEED` | by chance | seed of the first; the others follow it by one each |
//!
//! A failure names the seed of each stream that it is about:
//! `DIFFERENTIAL_SEED=<that> DIFFERENTIAL_STREAMS=1` runs it alone.

mod judge;
mod servers;
mod streams;
mod strict;

use std::cell::Cell;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use self::judge::Judge;
use self::servers::{Server, Tap, nginx_program};
use self::streams::{Goal, Message, Stream, Way};
use crate::support::client::{API, GATE};
use crate::support::http::{Duplex, PATIENCE, text};
use crate::support::{Stage, World, skip};

/// Streams under way at once.
const AT_ONCE: usize = 24;

/// How long a stream whose end is in doubt may be quiet before the client ends its half.
const QUIET: Duration = Duration::from_secs(2);

/// The API host behind which the Python server is.
const PYTHON: &str = "other.test";

/// One server with its taps, as another host and as an API host.
struct Side {
    server: Server,
    goal: Goal,
    plain: Tap,
    tls: Tap,
}

/// What came of a stream at the client.
struct Outcome {
    stream: Stream,
    answers: Result<Vec<Answer>, String>,
    /// The client ended its half since nothing more came.
    cut: bool,
    /// The sidecar ended the connection.
    ended: bool,
}

impl Outcome {
    /// The messages that must arrive: the sound ones, up to one that a server takes for
    /// malformed. Where that one's body was still on the way, the connection ends with it.
    fn certain(&self) -> &[Message] {
        let sound = self.stream.sound();
        let mut answers = self.answers.as_deref().unwrap_or_default().iter();
        let malformed = answers.position(|answer| answer.from_server && answer.status == 400);
        &sound[..malformed.map_or(sound.len(), |at| sound.len().min(at + 1))]
    }
}

struct Answer {
    /// What the server says it was asked.
    seen: String,
    id: Option<String>,
    status: u16,
    from_server: bool,
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().expect(variable))
}

#[tokio::test]
async fn damaged_streams_mean_the_same_to_the_sidecar_and_to_two_servers() {
    for program in [nginx_program(), "python3"] {
        if std::process::Command::new(program).arg("-V").output().is_err() {
            return skip::not_installed(format!("no {program}"));
        }
    }
    let first = number("DIFFERENTIAL_SEED", fastrand::u64(..1 << 40));
    let count = number("DIFFERENTIAL_STREAMS", 1500);
    println!("DIFFERENTIAL_SEED={first} DIFFERENTIAL_STREAMS={count}");
    let (world, sides) = world().await;
    let sides = &sides;
    let runs = (first..first + count).map(|seed| {
        let side = &sides[usize::try_from(seed % 2).unwrap()];
        run(&world, Stream::new(seed, &side.goal))
    });
    let outcomes: Vec<Outcome> = stream::iter(runs).buffer_unordered(AT_ONCE).collect().await;
    let mut judge = Judge::new(&world).await;
    for (index, side) in (0..).zip(sides) {
        let outcomes: Vec<&Outcome> =
            outcomes.iter().filter(|outcome| outcome.stream.seed % 2 == index).collect();
        judge.judge(side, &outcomes).await;
    }
    judge.tell(&outcomes);
}

/// A sidecar whose other API hosts are the two servers.
async fn world() -> (World, [Side; 2]) {
    let mut stage = Stage::new().await;
    let nginx = Server::nginx(stage.dir()).await;
    let python = Server::python(stage.dir());
    let sides =
        [side(&stage, nginx, GATE, "/api").await, side(&stage, python, PYTHON, "/py").await];
    let origins = format!("https://{API}/web/api,https://{GATE}/api,https://{PYTHON}/py");
    stage.set("API_ORIGINS", origins);
    let port = stage.origin.addr().port();
    let redirect = |side: &Side| format!("{}:443={}", side.goal.api, side.tls.addr);
    let redirects = sides.iter().map(redirect).collect::<Vec<_>>().join(",");
    stage.set(
        "CONNECT_TO",
        format!("{API}:443=127.0.0.1:{port},www.chitai-gorod.ru:443=127.0.0.1:{port},{redirects}"),
    );
    stage.set("ALLOW_HOSTS", "127.0.0.1");
    (stage.start().await, sides)
}

async fn side(stage: &Stage, server: Server, api: &'static str, prefix: &'static str) -> Side {
    let plain = Tap::before(&server, None).await;
    let tls = Tap::before(&server, Some(stage.ca.acceptor(&[api]))).await;
    let goal = Goal { address: plain.addr.to_string(), api, prefix };
    Side { server, goal, plain, tls }
}

/// Sends a stream and reads what comes.
async fn run(world: &World, stream: Stream) -> Outcome {
    let api = if stream.seed.is_multiple_of(2) { GATE } else { PYTHON };
    let wire = match stream.way {
        Way::Intercept => {
            let tunnel = world.tunnel(&format!("{api}:443")).await;
            world.tls_over(tunnel, api).await
        }
        Way::PlainTunnel => world.tunnel(&format!("{api}:80")).await,
        _ => world.wire().await,
    };
    let (bytes, cut, ended) = exchange(wire.into_inner(), &stream).await;
    Outcome { answers: answers(&bytes), stream, cut, ended }
}

async fn exchange(io: Box<dyn Duplex>, stream: &Stream) -> (Vec<u8>, bool, bool) {
    let (mut reads, mut writes) = tokio::io::split(io);
    let (written, finish) = (Cell::new(false), Notify::new());
    let write = async {
        let mut from = 0;
        for to in stream.cuts.iter().copied().chain([stream.bytes.len()]) {
            // The sidecar may have hung up on what came before.
            if writes.write_all(&stream.bytes[from..to]).await.is_err() {
                break;
            }
            let _ = writes.flush().await;
            from = to;
            sleep(Duration::from_millis(1)).await;
        }
        written.set(true);
        finish.notified().await;
        let _ = writes.shutdown().await;
        std::future::pending::<()>().await;
    };
    let read = async {
        let (mut bytes, mut cut) = (Vec::new(), false);
        loop {
            let limit = if stream.is_sound() || cut { PATIENCE } else { QUIET };
            match timeout(limit, reads.read_buf(&mut bytes)).await {
                Ok(Ok(0) | Err(_)) => return (bytes, cut, true),
                Err(_) if cut || stream.is_sound() => return (bytes, cut, false),
                Err(_) if written.get() => {
                    cut = true;
                    finish.notify_one();
                }
                Ok(Ok(_)) | Err(_) => {}
            }
        }
    };
    tokio::select! {
        () = write => unreachable!("it waits"),
        outcome = read => outcome,
    }
}

/// The final answers in what a client got; one cut short at the end is left out.
fn answers(mut rest: &[u8]) -> Result<Vec<Answer>, String> {
    let mut answers = Vec::new();
    while !rest.is_empty() {
        let Some(end) = rest.windows(4).position(|window| window == b"\r\n\r\n") else {
            break;
        };
        let head = text(&rest[..end]);
        rest = &rest[end + 4..];
        let (start, fields) = head.split_once("\r\n").unwrap_or((&head, ""));
        let status = start.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
        let status: u16 = status.ok_or(format!("no answer: {head:?}"))?;
        if status < 200 {
            continue;
        }
        let field = |name: &str| {
            let mut fields = fields.split("\r\n").filter_map(|line| line.split_once(": "));
            fields
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.to_owned())
        };
        let seen = field("x-seen").unwrap_or_default();
        let length: usize = field("content-length").map_or(0, |value| value.parse().unwrap_or(0));
        // No body here starts like an answer, but the answer to a HEAD has none.
        let has_body = !seen.starts_with("HEAD ") && !rest.starts_with(b"HTTP/1.");
        rest = rest.get(if has_body { length } else { 0 }..).unwrap_or_default();
        let from_server = field("server").is_some() && field("proxy-status").is_none();
        answers.push(Answer { seen, id: field("x-id"), status, from_server });
    }
    Ok(answers)
}
