//! How many instructions the hot pieces and whole requests take, by valgrind's
//! callgrind, held against `benches/instructions.txt`: 5 % more of any fails,
//! on whatever machine and under whatever load.
//!
//!     cargo bench --features bench --bench instructions             # compares
//!     cargo bench --features bench --bench instructions -- --renew  # writes the file
//!
//! Each thing is done twice, once `ROUNDS` times more often, and the difference
//! counts: what comes before and after is in both. A compiler or a valgrind other
//! than those that the file names may count otherwise, and so may a processor
//! with other features.

#![allow(clippy::unwrap_used, reason = "a bench that cannot be set up measures nothing")]
#![allow(clippy::disallowed_methods, reason = "the environment here is that of the bench")]
#![allow(clippy::cast_precision_loss, reason = "the figures are for people")]

mod pieces;
#[allow(dead_code, reason = "the rest is for the bench that makes load")]
mod world;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use clap::Parser;
use tokio::runtime::Builder;

use self::pieces::PIECES;
use self::world::World;
use self::world::client::Way;

/// So much more is a failure, and so much less is told.
const TOLERANCE: f64 = 0.05;

/// Rounds of a piece that are counted; the counts hardly differ.
const ROUNDS: u64 = 200;

/// Requests that are counted: so many that the start of a sidecar, which differs
/// by some 3 million instructions each time, does not matter.
const REQUESTS: u64 = 4000;

/// Rounds and requests that come first.
const WARM_UP: u64 = 20;

#[derive(Parser)]
#[command(
    about = "Compares instruction counts with benches/instructions.txt",
    bin_name = "instructions"
)]
struct Options {
    /// Writes the file instead.
    #[arg(long)]
    renew: bool,
    /// Runs one piece and counts nothing: what valgrind is given.
    #[arg(long, hide = true, requires = "rounds")]
    piece: Option<String>,
    /// How often.
    #[arg(long, hide = true)]
    rounds: Option<u64>,
    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Instructions of one round, by name.
type Counts = BTreeMap<String, u64>;

fn main() -> ExitCode {
    let options = Options::parse();
    if let (Some(name), Some(rounds)) = (options.piece, options.rounds) {
        let piece = PIECES.into_iter().find(|piece| piece.name == name);
        (piece.expect("a piece of that name").run)(rounds);
        return ExitCode::SUCCESS;
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.txt");
    let counts = count_all();
    if options.renew {
        fs::write(&file, written(&counts)).unwrap();
        return ExitCode::SUCCESS;
    }
    let kept = fs::read_to_string(&file).unwrap_or_default();
    if !kept.starts_with(&tools()) {
        println!("the file was made with other tools; these are\n{}", tools());
    }
    compare(&read(&kept), &counts)
}

fn count_all() -> Counts {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("callgrind.out");
    let pieces = PIECES.iter().map(|piece| {
        let count = |rounds| count_piece(piece.name, rounds, &out);
        (piece.name.to_owned(), (count(WARM_UP + ROUNDS) - count(WARM_UP)) / ROUNDS)
    });
    let world = World::start();
    let ways = [("request/absolute", Way::Absolute), ("request/intercepted", Way::Intercepted)];
    // Once uncounted, since the first sidecar makes the CA.
    world.sidecar(&[], &[]).stop();
    let requests = ways.into_iter().map(|(name, way)| {
        let count = |requests| count_requests(&world, way, requests, &out);
        (name.to_owned(), (count(WARM_UP + REQUESTS) - count(WARM_UP)) / REQUESTS)
    });
    let counts = pieces.chain(requests);
    counts.inspect(|(name, count)| println!("{name} {count}")).collect()
}

fn count_piece(name: &str, rounds: u64, out: &Path) -> u64 {
    let valgrind = valgrind(out);
    let ended = Command::new(&valgrind[0])
        .args(&valgrind[1..])
        .arg(env::current_exe().unwrap())
        .args(["--piece", name, "--rounds", &format!("{rounds:06}")])
        .stderr(Stdio::null())
        .status()
        .unwrap_or_else(|error| panic!("cannot start valgrind, please install it: {error}"));
    assert!(ended.success(), "{name}: {ended}");
    total(out)
}

/// Instructions of a whole sidecar that has answered so many requests of 2 KB,
/// one after the other on one connection.
fn count_requests(world: &World, way: Way, requests: u64, out: &Path) -> u64 {
    let valgrind = valgrind(out);
    let runner: Vec<&str> = valgrind.iter().map(String::as_str).collect();
    let sidecar = world.sidecar(&runner, &[("WORKERS", "1")]);
    let client = world.client(way, &sidecar);
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut connection = client.connect().await;
        for _ in 0..requests {
            connection.ask(2 * 1024, 0).await;
        }
    });
    drop(runtime);
    sidecar.stop();
    total(out)
}

fn valgrind(out: &Path) -> Vec<String> {
    let out = format!("--callgrind-out-file={}", out.display());
    vec!["valgrind".to_owned(), "--tool=callgrind".to_owned(), out]
}

/// What callgrind wrote as the sum.
fn total(out: &Path) -> u64 {
    let text = fs::read_to_string(out).unwrap();
    fs::remove_file(out).unwrap();
    let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
    total.expect("callgrind's totals").trim().parse().unwrap()
}

/// What the counts depend on besides the code.
fn tools() -> String {
    let version = |program: &str| {
        let output = Command::new(program).arg("--version").output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    format!("# {}, {}, {}\n", version("rustc"), version("valgrind"), env::consts::ARCH)
}

fn written(counts: &Counts) -> String {
    let lines = counts.iter().map(|(name, count)| format!("{name} {count}\n"));
    let head = "# Instructions of one round; benches/instructions.rs counts them, `--renew` writes them here.\n";
    [tools(), head.to_owned()].into_iter().chain(lines).collect()
}

fn read(kept: &str) -> Counts {
    let lines = kept.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.filter_map(|line| line.split_once(' '));
    pairs.map(|(name, count)| (name.to_owned(), count.parse().unwrap())).collect()
}

/// Tells what differs; fails where anything takes more, or is not in both.
fn compare(kept: &Counts, counts: &Counts) -> ExitCode {
    let mut failed = kept.keys().any(|name| !counts.contains_key(name));
    let mut renew = failed;
    for (name, &now) in counts {
        let Some(&before) = kept.get(name) else {
            println!("{name}: {now}, and none in the file");
            (failed, renew) = (true, true);
            continue;
        };
        let change = now as f64 / before as f64 - 1.0;
        println!("{name}: {before} before, {now} now, {:+.1} %", change * 100.0);
        failed |= change > TOLERANCE;
        renew |= change < -TOLERANCE;
    }
    if renew {
        println!("please renew the file (--renew): it is not what the code does any more");
    }
    if failed {
        println!(
            "FAILED: there is more than {:.0} % more, or a name without a count",
            TOLERANCE * 100.0
        );
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
