//! The world in which a sidecar is tested: its neighbours on real sockets.

pub(crate) mod alias;
pub(crate) mod certificates;
pub(crate) mod client;
pub(crate) mod dns;
pub(crate) mod http;
pub(crate) mod origin;
pub(crate) mod parent;
pub(crate) mod parser;
pub(crate) mod redis;
pub(crate) mod sidecar;
pub(crate) mod skip;
pub(crate) mod solver;
pub(crate) mod token;

use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpSocket;
use tokio::time::{Instant, sleep};

use self::certificates::TestCa;
use self::client::{API, GATE};
use self::http::PATIENCE;
use self::origin::Origin;
use self::redis::Redis;
use self::sidecar::{Sidecar, Variables};
use self::solver::Solver;
use self::token::Tokens;

/// An address that refuses connections for as long as the socket is kept: nobody else can take it.
pub(crate) fn nobody() -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// Waits until `check` holds, asking every few milliseconds.
pub(crate) async fn until(what: &str, check: impl AsyncFnMut() -> bool) {
    until_within(PATIENCE, what, check).await;
}

/// The same with a time of its own.
pub(crate) async fn until_within(
    patience: Duration,
    what: &str,
    mut check: impl AsyncFnMut() -> bool,
) {
    let deadline = Instant::now() + patience;
    while !check().await {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// The neighbours of a sidecar that has not been started yet, and its variables.
pub(crate) struct Stage {
    pub(crate) tokens: Tokens,
    pub(crate) ca: TestCa,
    pub(crate) origin: Origin,
    pub(crate) solver: Solver,
    pub(crate) redis: Option<Redis>,
    /// The token in the env file at the start, accepted by the shop.
    pub(crate) token: String,
    variables: Variables,
    dir: TempDir,
}

impl Stage {
    /// A shop, a solver and an env file with a good token; no Redis.
    pub(crate) async fn new() -> Self {
        let tokens = Tokens::default();
        let ca = TestCa::new();
        let acceptor = ca.acceptor(&[
            API,
            GATE,
            "www.chitai-gorod.ru",
            "other.test",
            "localhost",
            "127.0.0.1",
        ]);
        let origin = Origin::start(tokens.clone(), acceptor).await;
        let solver = Solver::start(tokens.clone()).await;
        let token = tokens.issue();
        let dir = tempfile::tempdir().unwrap();
        let mut stage =
            Self { tokens, ca, origin, solver, redis: None, token, variables: Vec::new(), dir };
        stage.write_variables();
        stage.write_env_file(&format!("CHITAI_GOROD_BEARER_TOKEN=\"{}\"\n", stage.token));
        stage
    }

    fn write_variables(&mut self) {
        let ca_file = self.path("shop-ca.pem");
        std::fs::write(&ca_file, self.ca.pem()).unwrap();
        let port = self.origin.addr().port();
        let redirect = |host: &str| format!("{host}:443=127.0.0.1:{port}");
        let redirects = [redirect(API), redirect(GATE), redirect("www.chitai-gorod.ru")].join(",");
        let solver = self.solver.url();
        self.set("PROXY_LISTEN", "127.0.0.1:0");
        self.set("ADMIN_LISTEN", "127.0.0.1:0");
        self.set("WORKERS", "2");
        self.set("LOG_FORMAT", "json");
        self.set("RUST_LOG", "info,token_sidecar=debug");
        self.set("CA_DIR", self.path("certs").display());
        self.set("ENV_FILE", self.env_file().display());
        self.set("UPSTREAM_CA_FILE", ca_file.display());
        self.set("CONNECT_TO", redirects);
        self.set("FLARESOLVERR_URL", solver);
    }

    /// Sets a variable of the sidecar.
    #[expect(clippy::needless_pass_by_value, reason = "callers hand over what they have just made")]
    pub(crate) fn set(&mut self, name: &str, value: impl ToString) {
        self.unset(name);
        self.variables.push((name.to_owned(), value.to_string()));
    }

    pub(crate) fn unset(&mut self, name: &str) {
        self.variables.retain(|(present, _)| present != name);
    }

    /// Adds to the variable's list.
    pub(crate) fn add(&mut self, name: &str, value: impl std::fmt::Display) {
        let present = self
            .variables
            .iter()
            .find(|(present, _)| present == name)
            .map(|(_, value)| value.clone());
        self.set(name, present.map_or(value.to_string(), |present| format!("{present},{value}")));
    }

    pub(crate) fn variables(&self) -> &Variables {
        &self.variables
    }

    /// Starts a Redis and points the sidecar to it.
    pub(crate) async fn with_redis(&mut self) {
        let redis = Redis::start().await;
        self.set("REDIS_URL", redis.url());
        self.redis = Some(redis);
    }

    pub(crate) fn redis(&self) -> &Redis {
        self.redis.as_ref().expect("a stage with Redis")
    }

    pub(crate) fn redis_mut(&mut self) -> &mut Redis {
        self.redis.as_mut().expect("a stage with Redis")
    }

    /// A path in the folder of this test.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn env_file(&self) -> PathBuf {
        self.path("shop.env")
    }

    pub(crate) fn write_env_file(&self, text: &str) {
        std::fs::write(self.env_file(), text).unwrap();
    }

    pub(crate) fn read_env_file(&self) -> String {
        std::fs::read_to_string(self.env_file()).unwrap_or_default()
    }

    /// Waits until the env file names this token.
    pub(crate) async fn saved(&self, token: &str) {
        until("the env file to be written", async || self.read_env_file().contains(token)).await;
    }

    /// Takes the env file away, so that no store holds a token.
    pub(crate) fn without_token(&self) {
        let _ = std::fs::remove_file(self.env_file());
    }

    /// The sidecar's own CA certificate.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.path("certs").join("ca.pem")
    }

    /// Runs a command of the program with the variables of this stage.
    pub(crate) async fn run(&self, arguments: &[&str]) -> std::process::Output {
        sidecar::run(arguments, &self.variables, self.dir()).await
    }

    /// Starts the sidecar and waits until it is ready and settled: from then on only a test's own
    /// doing changes its mind.
    pub(crate) async fn start(self) -> World {
        let world = self.launch().await;
        world.sidecar.ready().await;
        world.settled().await;
        world
    }

    /// Starts the sidecar and waits only until it listens.
    pub(crate) async fn launch(self) -> World {
        self.launch_by(&[]).await
    }

    /// The same, by the command `runner`, which becomes the program.
    pub(crate) async fn launch_by(self, runner: &[&str]) -> World {
        let sidecar = Sidecar::start_by(runner, &self.variables, self.dir.path()).await;
        World { sidecar, stage: self }
    }
}

/// A running sidecar among its neighbours.
pub(crate) struct World {
    pub(crate) sidecar: Sidecar,
    stage: Stage,
}

impl World {
    /// The plain one of [`Stage::new`].
    pub(crate) async fn start() -> Self {
        Stage::new().await.start().await
    }

    /// One with these variables.
    pub(crate) async fn with(variables: &[(&str, &str)]) -> Self {
        let mut stage = Stage::new().await;
        for (name, value) in variables {
            stage.set(name, value);
        }
        stage.start().await
    }

    /// One whose token has died, and whose solver, with no other source, waits
    /// for a word before it gives the next.
    pub(crate) async fn paused(variables: &[(&str, &str)]) -> Self {
        let sources = [("TOKEN_SOURCES", "flaresolverr")];
        let world = Self::with(&[&sources, variables].concat()).await;
        world.solver.pause();
        world.kill_token();
        world
    }

    /// What the sidecar does by itself at first is done: the token of the env
    /// file is verified, the verifier calibrated.
    async fn settled(&self) {
        let settled = |status: &serde_json::Value| {
            status["token"]["verified"] == true && status["verifier"]["state"] == "trusted"
        };
        self.sidecar.status_where("the first verification", settled).await;
    }

    /// Ends the sidecar at once and hands its neighbours back.
    pub(crate) fn stop(self) -> Stage {
        let Self { sidecar, stage } = self;
        drop(sidecar);
        stage
    }

    /// The shop forgets all tokens; the one in use is dead from now on.
    pub(crate) fn kill_token(&self) {
        self.tokens.kill_all();
    }
}

impl Deref for World {
    type Target = Stage;

    fn deref(&self) -> &Stage {
        &self.stage
    }
}

impl DerefMut for World {
    fn deref_mut(&mut self) -> &mut Stage {
        &mut self.stage
    }
}
