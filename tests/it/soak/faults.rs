//! Half an hour of mixed traffic at a steady pace, in which the token dies every minute and
//! something breaks every ten seconds.
//!
//! Whose shop is alive gets 200, whatever else is broken, and whose shop is away is told so; memory
//! and descriptors stay where they are. It lasts `SOAK_SECONDS` (1800), at `SOAK_RATE` requests a second (200).

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;
use std::{fmt, io};

use futures_util::future::join_all;
use tokio::join;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

use super::seconds;
use crate::support::client::{API, Request, Session, Way};
use crate::support::http::{End, Response, Wire};
use crate::support::origin::{Greeting, pattern_bytes};
use crate::support::redis::Redis;
use crate::support::solver::Mode;
use crate::support::{Stage, World};

/// Clients that ask at once.
const CLIENTS: u64 = 16;
const DEATH: Duration = Duration::from_mins(1);
const FAULT: Duration = Duration::from_secs(10);

/// What breaks.
#[derive(Clone, Copy, Debug)]
enum Fault {
    ShopDropsIdleConnections,
    ShopBreaksItsAnswers,
    ShopIsAway,
    RedisDies,
    RedisFreezes,
    SolverFails,
    HeadsStayHalf,
    ClientsLeaveAmidAnswers,
    UploadsBreakOff,
}

impl Fault {
    const ALL: [Self; 9] = [
        Self::ShopDropsIdleConnections,
        Self::ShopBreaksItsAnswers,
        Self::ShopIsAway,
        Self::RedisDies,
        Self::RedisFreezes,
        Self::SolverFails,
        Self::HeadsStayHalf,
        Self::ClientsLeaveAmidAnswers,
        Self::UploadsBreakOff,
    ];

    /// Breaks it, and mends what would not mend by itself.
    async fn strike(self, world: &World, redis: &mut Redis, outage: &Outage) {
        match self {
            Self::ShopDropsIdleConnections => world.origin.start_dropping_idle_connections(),
            Self::ShopBreaksItsAnswers => break_answers(world).await,
            Self::ShopIsAway => outage.last(world).await,
            Self::RedisDies => {
                redis.kill();
                sleep(FAULT / 2).await;
                redis.restart().await;
            }
            Self::RedisFreezes => {
                redis.freeze();
                sleep(FAULT / 2).await;
                redis.thaw();
            }
            Self::SolverFails => {
                let modes = [Mode::Error, Mode::NoCookie, Mode::HangsUp, Mode::Never];
                world.solver.set(fastrand::choice(modes).expect("a mode"));
                return;
            }
            Self::HeadsStayHalf => leave(world, 100, "GET /web/api/v2/x HTTP/1.1\r\nHost: a").await,
            Self::ClientsLeaveAmidAnswers => {
                let request =
                    format!("GET /web/api/v2/big/8000000 HTTP/1.1\r\nHost: {API}\r\n\r\n");
                leave(world, 20, &request).await;
            }
            Self::UploadsBreakOff => {
                let request = format!(
                    "POST /web/api/v2/echo HTTP/1.1\r\nHost: {API}\r\nContent-Length: 9999\r\n\r\nx"
                );
                leave(world, 20, &request).await;
            }
        }
        world.solver.set(Mode::Solves);
    }
}

/// The last time in which the shop was away.
struct Outage {
    began: Cell<Instant>,
    ended: Cell<Instant>,
}

impl Outage {
    /// One that is over.
    fn of_the_past() -> Self {
        Self { began: Cell::new(Instant::now()), ended: Cell::new(Instant::now()) }
    }

    /// Takes the shop away for half of the time to the next fault, in one way or another.
    async fn last(&self, world: &World) {
        let greetings = [
            Greeting::Silence,
            Greeting::PlainText,
            Greeting::HalfHandshake,
            Greeting::Ends(End::Close),
            Greeting::Ends(End::Cut),
            Greeting::Ends(End::Reset),
        ];
        let greeting = fastrand::choice(greetings).expect("a greeting");
        // A solver that fails at the same time would leave a back-off behind.
        world.solver.set(Mode::Solves);
        self.began.set(Instant::now());
        self.ended.set(Instant::now() + FAULT);
        world.origin.set_greeting(greeting);
        world.origin.start_dropping_idle_connections();
        sleep(FAULT / 2).await;
        world.origin.set_greeting(Greeting::Usual);
        self.ended.set(Instant::now());
    }

    /// Whether it has touched a request of this time.
    fn touched(&self, began: Instant) -> bool {
        began <= self.ended.get() && self.began.get() <= Instant::now()
    }
}

/// Whether the client was told that it is the shop's fault.
fn blames_the_shop(response: &Response) -> bool {
    let code = response.code();
    [502, 504].contains(&response.status) && code.starts_with("upstream_")
}

/// Asks for answers that break, each of which must be told as the shop's fault.
async fn break_answers(world: &World) {
    for (path, status) in [("reset", 502), ("garbage", 502), ("hang", 504)] {
        let response = world.get(&format!("/web/api/v2/{path}")).await;
        assert_eq!(response.status, status, "{path}");
    }
    let mut session = world.open(Way::Intercept).await;
    let short = session.try_call(&Request::get("/web/api/v2/short")).await;
    assert!(short.is_err(), "{short:?}");
}

/// Opens `count` connections, sends `bytes` on each, and hangs up a little later.
async fn leave(world: &World, count: usize, bytes: &str) {
    let mut open = Vec::new();
    for _ in 0..count {
        let mut wire: Wire = world.wire().await;
        wire.send(bytes).await;
        open.push(wire);
    }
    sleep(FAULT / 5).await;
}

/// What the clients saw.
#[derive(Default)]
struct Tally {
    good: u64,
    /// The shop was away, and they were told so.
    away: u64,
    others: BTreeMap<String, u64>,
    longest: Duration,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.good += other.good;
        self.away += other.away;
        for (what, count) in other.others {
            *self.others.entry(what).or_default() += count;
        }
        self.longest = self.longest.max(other.longest);
    }

    /// Requests whose shop was alive.
    fn asked(&self) -> u64 {
        self.good + self.others.values().sum::<u64>()
    }
}

/// One client: asks at its pace until `end`, on connections that it mostly keeps.
async fn ask(world: &World, outage: &Outage, seed: u64, pace: Duration, end: Instant) -> Tally {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut tally = Tally::default();
    let mut sessions: HashMap<Way, Session> = HashMap::new();
    let mut ticks = interval(pace);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while Instant::now() < end {
        ticks.tick().await;
        let way = random.choice(Way::ALL).expect("a way");
        let session = sessions.remove(&way).filter(|_| random.u8(..) > 50);
        let began = Instant::now();
        let outcome = ask_once(world, way, session, &mut random).await;
        tally.longest = tally.longest.max(began.elapsed());
        match outcome {
            Ok(session) => {
                tally.good += 1;
                sessions.insert(way, session);
            }
            Err(Bad::Answer(answer)) if outage.touched(began) && blames_the_shop(&answer) => {
                tally.away += 1;
            }
            Err(bad) => *tally.others.entry(bad.to_string()).or_default() += 1,
        }
    }
    tally
}

/// What a client got that it did not want.
enum Bad {
    Answer(Response),
    Body,
    Connection(io::Error),
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answer(answer) => write!(f, "{} {}", answer.status, answer.text()),
            Self::Body => f.write_str("200 with another body"),
            Self::Connection(error) => write!(f, "{:?}", error.kind()),
        }
    }
}

/// One request whose answer is known. Returns the connection, or what was wrong.
async fn ask_once(
    world: &World,
    way: Way,
    session: Option<Session>,
    random: &mut fastrand::Rng,
) -> Result<Session, Bad> {
    let mut session = match session {
        Some(session) => session,
        None => world.open(way).await,
    };
    let (request, expected) = match random.u8(..10) {
        0 => {
            let body = vec![b'b'; random.usize(..4000)];
            (Request::post("/web/api/v2/echo", body.clone()), body)
        }
        1 => (Request::get("/web/api/v2/big/200000"), pattern_bytes(200_000)),
        2 => (Request::get("/web/api/v2/big-chunked/50000"), pattern_bytes(50_000)),
        3 => (Request::get("/web/api/v2/slow/100"), b"late".to_vec()),
        _ => (Request::get("/web/api/v2/x?q=1"), b"/web/api/v2/x?q=1".to_vec()),
    };
    match session.try_call(&request).await {
        Ok(response) if response.status == 200 && response.body == expected => Ok(session),
        Ok(response) if response.status == 200 => Err(Bad::Body),
        Ok(response) => Err(Bad::Answer(response)),
        Err(error) => Err(Bad::Connection(error)),
    }
}

/// The sidecar's memory and open files.
#[derive(Clone, Copy, Debug)]
struct Sample {
    resident: f64,
    descriptors: f64,
}

impl Sample {
    #[allow(clippy::cast_precision_loss, reason = "megabytes and files of one process")]
    fn of(world: &World) -> Self {
        Self {
            resident: world.sidecar.resident() as f64 / 1e6,
            descriptors: world.sidecar.descriptors() as f64,
        }
    }
}

/// The mean of `of` in the second and in the last third of the run. In the first one memory finds
/// its size.
fn second_and_last_third(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> (f64, f64) {
    let third = samples.len() / 3;
    let mean = |part: &[Sample]| {
        let count = u32::try_from(part.len()).expect("few samples");
        part.iter().map(&of).sum::<f64>() / f64::from(count)
    };
    (mean(&samples[third..2 * third]), mean(&samples[2 * third..]))
}

/// Lets something break every ten seconds and the token die every minute, until `end`. Returns what
/// was measured meanwhile, and how many tokens died.
async fn break_things(
    world: &World,
    redis: &mut Redis,
    outage: &Outage,
    end: Instant,
) -> (Vec<Sample>, u32) {
    let mut random = fastrand::Rng::with_seed(20_261_126);
    let (mut samples, mut deaths) = (Vec::new(), 0);
    let mut next_death = Instant::now() + DEATH;
    while Instant::now() + FAULT < end {
        let next = Instant::now() + FAULT;
        samples.push(Sample::of(world));
        if Instant::now() >= next_death {
            world.kill_token();
            deaths += 1;
            next_death += DEATH;
        }
        random.choice(Fault::ALL).expect("a fault").strike(world, redis, outage).await;
        sleep_until(next).await;
    }
    (samples, deaths)
}

#[tokio::test]
#[ignore = "lasts SOAK_SECONDS, half an hour"]
async fn traffic_goes_on_and_nothing_grows_while_things_break() {
    let length = seconds("SOAK_SECONDS", 1800);
    let rate = u32::try_from(seconds("SOAK_RATE", 200).as_secs()).expect("SOAK_RATE");
    let mut redis = Redis::start().await;
    let mut stage = Stage::new().await;
    stage.set("REDIS_URL", redis.url());
    stage.set("UPSTREAM_TIMEOUT", "3s");
    stage.set("CONNECT_TIMEOUT", "2s");
    let world = stage.start().await;
    let end = Instant::now() + length;
    let pace = Duration::from_secs(CLIENTS) / rate;
    let outage = Outage::of_the_past();
    let clients = join_all((0..CLIENTS).map(|seed| ask(&world, &outage, seed, pace, end)));
    let faults = break_things(&world, &mut redis, &outage, end);
    let (tallies, (samples, deaths)) = join!(clients, faults);
    let mut tally = Tally::default();
    for one in tallies {
        tally.add(one);
    }
    let memory = second_and_last_third(&samples, |sample| sample.resident);
    let files = second_and_last_third(&samples, |sample| sample.descriptors);
    println!("soak of {length:?}, {rate} requests a second wanted, {deaths} deaths");
    println!("  {} of {} answered 200 with the right body", tally.good, tally.asked());
    println!("  {} were told that the shop was away", tally.away);
    println!("  the rest: {:?}; longest {:.2?}", tally.others, tally.longest);
    println!("  resident MB in the second and the last third: {:.1}, {:.1}", memory.0, memory.1);
    println!("  open files: {:.1}, {:.1}", files.0, files.1);
    for sample in samples.iter().step_by(samples.len() / 20 + 1) {
        println!("    {sample:?}");
    }
    assert!(tally.good * 1000 >= tally.asked() * 999, "{:?}", tally.others);
    assert!(tally.away > 0 || length < FAULT * 30, "the shop was never away");
    assert!(memory.1 < memory.0 * 1.1, "memory grows: {memory:?}");
    assert!(files.1 < files.0 * 1.1 + 10.0, "open files grow: {files:?}");
}
