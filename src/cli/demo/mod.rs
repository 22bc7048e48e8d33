//! `demo`: the whole story on loopback, with stand-ins for the shop and the
//! solver.
//!
//! The sidecar is the real one, started as `run` starts it; only its
//! neighbours are played. Nothing outside 127.0.0.1 is asked, and nothing is
//! left behind.

mod stand_ins;
mod timeline;

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::{Certificate, Client, Proxy, StatusCode};
use tempfile::TempDir;
use tokio::time::timeout;

use self::stand_ins::{API_HOST, SHOP_HOST, Shop, Solver};
use self::timeline::Timeline;
use super::fail;
use super::refresh::progress;
use crate::app::App;
use crate::config::{Config, Env};

/// Requests that are under way when the token dies.
const PARALLEL: usize = 50;

/// Time that the played solver takes for a page.
const SOLVE_TIME: Duration = Duration::from_millis(1500);

/// Longest time until the sidecar has its first token.
const READY_LIMIT: Duration = Duration::from_secs(20);

const SEARCH: &str = "/web/api/v2/search/product?phrase=python&products[page]=1";

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Tells the story; exit code 0 only if every request got its 200.
pub(super) async fn execute() -> ExitCode {
    match tell().await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => fail("not every request got its 200", 1),
        Err(error) => fail(&format!("the demo broke off: {error}"), 1),
    }
}

async fn tell() -> Outcome<bool> {
    let timeline = Timeline::start();
    let folder = TempDir::new()?;
    let shop = Shop::start(folder.path(), &timeline).await?;
    let solver = Solver::start(Arc::clone(&shop), SOLVE_TIME, &timeline).await?;
    timeline.note("a shop and a solver are played on loopback");

    let app = App::start(&config(&folder, &shop, &solver)?)?;
    timeline.note(format!("token-sidecar listens on {}", app.proxy_address()));
    wait_for_token(&app).await?;
    timeline.note(format!("first token in force: {}", token_of(&app)));

    let parser = Parser::new(&app, &folder)?;
    let mut answers = vec![
        parser.ask(Way::Connect).await,
        parser.ask(Way::Absolute).await,
        parser.ask(Way::Gateway).await,
    ];
    for answer in &answers {
        timeline.note(format!("a request by {}: {}", answer.way.name(), answer.status()));
    }

    let sent_before = shop.requests();
    shop.kill_tokens();
    timeline.note(format!("the token dies; {PARALLEL} requests go out at once"));
    let progress = progress("held until the next token");
    let started = Instant::now();
    let storm = (0..PARALLEL).map(|index| parser.ask(Way::ALL[index % Way::ALL.len()]));
    let storm = join_all(storm).await;
    progress.finish_and_clear();
    let took = started.elapsed();
    timeline.note(format!("all {PARALLEL} answered; in force now: {}", token_of(&app)));

    let figures = Figures {
        good: storm.iter().filter(|answer| answer.is_good()).count(),
        took,
        longest: storm.iter().map(|answer| answer.took).max().unwrap_or_default(),
        refused: shop.refused(),
        sends: shop.requests() - sent_before,
        solves: solver.solves() - 1,
    };
    answers.extend(storm);
    app.drain().await;
    timeline.note("token-sidecar drained and stopped");
    figures.print();
    Ok(answers.iter().all(Answer::is_good))
}

/// The settings that an operator would make, with everything on loopback.
fn config(folder: &TempDir, shop: &Shop, solver: &Solver) -> Outcome<Config> {
    let in_folder = |name: &str| folder.path().join(name).display().to_string();
    let shop_at = shop.address();
    let env = Env::from_pairs([
        ("PROXY_LISTEN", "127.0.0.1:0".to_owned()),
        ("ADMIN_LISTEN", "127.0.0.1:0".to_owned()),
        ("CONNECT_TO", format!("{API_HOST}:443={shop_at},{SHOP_HOST}:443={shop_at}")),
        ("UPSTREAM_CA_FILE", shop.ca_file().display().to_string()),
        ("FLARESOLVERR_URL", format!("http://{}/v1", solver.address())),
        ("ENV_FILE", in_folder("token.env")),
        ("CA_DIR", in_folder("certs")),
    ]);
    Ok(Config::from_env(&env)?)
}

async fn wait_for_token(app: &App) -> Outcome<()> {
    let mut changes = app.cache().changes();
    let progress = progress("waiting for the first token");
    let wait = async {
        while app.cache().load().is_none() {
            changes.changed().await?;
        }
        Outcome::Ok(())
    };
    let waited = timeout(READY_LIMIT, wait).await;
    progress.finish_and_clear();
    waited.map_err(|_| "no token came")?
}

fn token_of(app: &App) -> String {
    app.cache().load().as_ref().map_or_else(
        || "none".to_owned(),
        |current| {
            let (token, source) = (current.token.fingerprint(), current.source);
            format!("{token}, generation {} from {source}", current.generation)
        },
    )
}

/// How a parser's request reaches the sidecar.
#[derive(Clone, Copy)]
enum Way {
    Connect,
    Absolute,
    Gateway,
}

impl Way {
    const ALL: [Self; 3] = [Self::Connect, Self::Absolute, Self::Gateway];

    fn name(self) -> &'static str {
        match self {
            Self::Connect => "CONNECT and TLS (HTTPS_PROXY)",
            Self::Absolute => "absolute-form (HTTP_PROXY)",
            Self::Gateway => "gateway (base URL)",
        }
    }
}

/// A parser that knows nothing of tokens: a proxy's address and a CA file are
/// all it has.
struct Parser {
    proxied: Client,
    plain: Client,
    gateway: String,
}

struct Answer {
    way: Way,
    result: reqwest::Result<StatusCode>,
    took: Duration,
}

impl Parser {
    fn new(app: &App, folder: &TempDir) -> Outcome<Self> {
        let base = format!("http://{}", app.proxy_address());
        let ca = std::fs::read(folder.path().join("certs/ca.pem"))?;
        Ok(Self {
            proxied: Client::builder()
                .proxy(Proxy::all(&base)?)
                .tls_certs_only([Certificate::from_pem(&ca)?])
                .build()?,
            plain: Client::builder().no_proxy().build()?,
            gateway: base,
        })
    }

    async fn ask(&self, way: Way) -> Answer {
        let started = Instant::now();
        let (client, url) = match way {
            Way::Connect => (&self.proxied, format!("https://{API_HOST}{SEARCH}")),
            Way::Absolute => (&self.proxied, format!("http://{API_HOST}{SEARCH}")),
            Way::Gateway => (&self.plain, format!("{}{SEARCH}", self.gateway)),
        };
        let read = async {
            let answer = client.get(url).send().await?;
            let status = answer.status();
            answer.bytes().await?;
            Ok(status)
        };
        let result = read.await;
        Answer { way, result, took: started.elapsed() }
    }
}

impl Answer {
    fn is_good(&self) -> bool {
        matches!(self.result, Ok(StatusCode::OK))
    }

    fn status(&self) -> String {
        match &self.result {
            Ok(status) => format!("{} in {} ms", status.as_u16(), self.took.as_millis()),
            Err(error) => error.to_string(),
        }
    }
}

/// What the storm came to.
struct Figures {
    good: usize,
    took: Duration,
    longest: Duration,
    refused: usize,
    sends: usize,
    solves: usize,
}

impl Figures {
    fn print(&self) {
        let seconds = |duration: Duration| format!("{:.2} s", duration.as_secs_f64());
        println!();
        println!("  {:>6}  of {PARALLEL} parallel requests answered 200", self.good);
        println!(
            "  {:>6}  refused by the shop (401), none of them seen by the parser",
            self.refused
        );
        println!("  {:>6}  solves for all of them together", self.solves);
        println!(
            "  {:>6}  requests at the shop for it, checks of the new token included",
            self.sends
        );
        println!("  {:>6}  from the first request to the last answer", seconds(self.took));
        println!("  {:>6}  the longest wait of one request", seconds(self.longest));
    }
}
