//! The whole proxy under load on loopback, beside the same requests without it:
//! `cargo bench --features bench --bench proxy`, with `-- growth` how its cost
//! grows with connections and heads, with `-- idle` what idle clients cost.
//! `-- --help` names the rest.
//!
//! Clients, shop and sidecar share the machine: where it has few cores, rates
//! and latencies are those of all three together. The sidecar's processor time
//! is its own. Each client asks again as soon as it has its answer, so a
//! latency holds the wait for all others.

#![allow(clippy::unwrap_used, reason = "a bench that cannot be set up measures nothing")]
#![allow(clippy::disallowed_methods, reason = "the environment here is that of the bench")]
#![allow(clippy::cast_precision_loss, reason = "the figures are for people")]

mod world;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use clap::{Parser, ValueEnum};
use futures_util::StreamExt;
use futures_util::stream;
use tokio::runtime::Builder;
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::{Instant, sleep};

use self::world::World;
use self::world::client::{Client, Connection, Way};
use self::world::sidecar::Sidecar;

/// Connections that are opened at once.
const OPENING: usize = 32;

/// Load before the figures begin.
const WARM_UP: Duration = Duration::from_secs(1);

/// A head as Python's requests writes it.
const USUAL_HEAD: usize = 0;

#[derive(Parser)]
#[command(about = "Measures the sidecar under load on loopback", bin_name = "proxy")]
struct Options {
    /// What is measured.
    #[arg(value_enum, default_value = "compare")]
    what: What,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// So often is each one made; the medians count.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Connections of `compare` and of heads.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Rate, latency and processor time beside direct requests.
    Compare,
    /// Processor time at 1 to 4,096 connections, and with heads of 1 to 4 KB.
    Growth,
    /// Memory with 100 to 10,000 idle clients.
    Idle,
}

/// What is asked for.
#[derive(Clone, Copy)]
struct Load {
    way: Way,
    size: usize,
    head: usize,
    connections: usize,
}

/// What came of it, for the requests of one measurement.
struct Figures {
    rate: f64,
    median: Duration,
    slow: Duration,
    /// The sidecar's, for each request.
    cpu: Duration,
}

fn main() {
    let options = Options::parse();
    token_sidecar::net::raise_descriptor_limit();
    println!("{}\n", machine());
    let world = World::start();
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let measure = async {
        match options.what {
            What::Compare => compare(&world, &options).await,
            What::Growth => growth(&world, &options).await,
            What::Idle => idle(&world).await,
        }
    };
    LocalSet::new().block_on(&runtime, measure);
}

/// What the figures depend on.
fn machine() -> String {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model
        .map_or("a processor without a name", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().unwrap();
    let date = httpdate::fmt_http_date(SystemTime::now());
    format!("{model}, {cores} cores, {date}")
}

async fn compare(world: &World, options: &Options) {
    println!(
        "| way | body | requests/s | p50 | p99 | the sidecar's CPU per request | rate, of direct |"
    );
    println!("|---|---|---|---|---|---|---|");
    for size in [2 * 1024, 40 * 1024] {
        for (direct, through) in [(Way::Plain, Way::Absolute), (Way::Tls, Way::Intercepted)] {
            let load = |way| Load { way, size, head: USUAL_HEAD, connections: options.connections };
            let loads = [load(direct), load(through)];
            let [direct, through] = medians(world, loads, options).await;
            let ratio = through.rate / direct.rate;
            show(loads[0], &direct, None);
            show(loads[1], &through, Some(ratio));
        }
    }
}

fn show(load: Load, figures: &Figures, of_direct: Option<f64>) {
    let Figures { rate, median, slow, cpu } = figures;
    let [median, slow] = [median, slow].map(|time| time.as_secs_f64() * 1e3);
    let (cpu, ratio) = of_direct.map_or_else(Default::default, |ratio| {
        (format!("{} µs", cpu.as_micros()), format!("{ratio:.2}"))
    });
    let (way, size) = (load.way.name(), load.size / 1024);
    println!("| {way} | {size} KB | {rate:.0} | {median:.2} ms | {slow:.2} ms | {cpu} | {ratio} |");
}

async fn growth(world: &World, options: &Options) {
    let load =
        |head, connections| Load { way: Way::Intercepted, size: 2 * 1024, head, connections };
    println!("| connections | the sidecar's CPU per request | p50 | p99 |\n|---|---|---|---|");
    for connections in [1, 16, 64, 512, 4096] {
        let [figures] = medians(world, [load(USUAL_HEAD, connections)], options).await;
        let [median, slow] = [figures.median, figures.slow].map(|time| time.as_secs_f64() * 1e3);
        let cpu = figures.cpu.as_micros();
        println!("| {connections} | {cpu} µs | {median:.2} ms | {slow:.2} ms |");
    }
    println!("\n| head | the sidecar's CPU per request |\n|---|---|");
    for head in [1, 2, 4] {
        let load = load(head * 1024, options.connections);
        let [figures] = medians(world, [load], options).await;
        println!("| {head} KB | {} µs |", figures.cpu.as_micros());
    }
}

async fn idle(world: &World) {
    println!("| idle clients (intercepted) | the sidecar's memory | of each |\n|---|---|---|");
    for clients in [100, 1000, 10_000] {
        let sidecar = world.sidecar(&[], &[]);
        let client = world.client(Way::Intercepted, &sidecar);
        drop(open(&client, 1, 2 * 1024, USUAL_HEAD).await);
        let before = sidecar.memory();
        let open = open(&client, clients, 2 * 1024, USUAL_HEAD).await;
        let memory = sidecar.memory();
        let each = memory.saturating_sub(before) / open.len() as u64;
        println!("| {clients} | {} MB | {:.1} KB |", memory >> 20, each as f64 / 1024.0);
        drop(open);
        sidecar.stop();
    }
}

/// Connections that each have had one answer.
async fn open(client: &Client, count: usize, size: usize, head: usize) -> Vec<Connection> {
    let connect = async |_| {
        let mut connection = client.connect().await;
        connection.ask(size, head).await;
        connection
    };
    stream::iter(0..count).map(connect).buffer_unordered(OPENING).collect().await
}

/// Makes each measurement in turn, and that so often: what the machine does
/// besides meets all of them alike.
async fn medians<const N: usize>(
    world: &World,
    loads: [Load; N],
    options: &Options,
) -> [Figures; N] {
    let mut all = [(); N].map(|()| Vec::new());
    for _ in 0..options.rounds.max(1) {
        for (load, figures) in loads.iter().zip(&mut all) {
            let sidecar = world.sidecar(&[], &[]);
            let client = world.client(load.way, &sidecar);
            let length = Duration::from_secs_f64(options.seconds);
            figures.push(measure(&client, &sidecar, *load, length).await);
            sidecar.stop();
        }
    }
    all.map(|figures| Figures {
        rate: median(figures.iter().map(|one| one.rate)),
        median: median(figures.iter().map(|one| one.median)),
        slow: median(figures.iter().map(|one| one.slow)),
        cpu: median(figures.iter().map(|one| one.cpu)),
    })
}

fn median<T: PartialOrd>(values: impl Iterator<Item = T>) -> T {
    let mut values: Vec<T> = values.collect();
    values.sort_by(|a, b| a.partial_cmp(b).unwrap());
    values.swap_remove(values.len() / 2)
}

async fn measure(client: &Client, sidecar: &Sidecar, load: Load, length: Duration) -> Figures {
    let connections = open(client, load.connections, load.size, load.head).await;
    let latencies = Rc::new(RefCell::new(Vec::new()));
    let clients = connections.into_iter().map(|connection| ask_on(connection, load, &latencies));
    let clients: Vec<JoinHandle<()>> = clients.collect();
    sleep(WARM_UP).await;
    latencies.borrow_mut().clear();
    let (began, cpu_before) = (Instant::now(), sidecar.cpu_time());
    sleep(length).await;
    let (took, cpu) = (began.elapsed(), sidecar.cpu_time().saturating_sub(cpu_before));
    let mut latencies = latencies.take();
    assert!(clients.iter().all(|client| !client.is_finished()), "a client broke off");
    clients.iter().for_each(JoinHandle::abort);
    latencies.sort_unstable();
    Figures {
        rate: latencies.len() as f64 / took.as_secs_f64(),
        median: latencies[latencies.len() / 2],
        slow: latencies[latencies.len() * 99 / 100],
        cpu: cpu / u32::try_from(latencies.len()).unwrap(),
    }
}

/// One request after the other, until it is aborted.
fn ask_on(
    mut connection: Connection,
    load: Load,
    latencies: &Rc<RefCell<Vec<Duration>>>,
) -> JoinHandle<()> {
    let latencies = Rc::clone(latencies);
    spawn_local(async move {
        loop {
            let began = Instant::now();
            connection.ask(load.size, load.head).await;
            latencies.borrow_mut().push(began.elapsed());
        }
    })
}
