//! Several sidecars that share one Redis: one token, one solve.
//!
//! Each has a solver of its own, so that it is seen who solves; what they find is for all.

mod failures;
mod history;
mod holder;
mod notices;
mod one_solve;
mod outage;
mod sentinel;
mod thousand;

use std::io;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::net::TcpSocket;
use tokio::time::Instant;

use self::history::History;
use crate::support::client::get_at;
use crate::support::http::Response;
use crate::support::sidecar::Sidecar;
use crate::support::solver::Solver;
use crate::support::token::{Jwt, fingerprint};
use crate::support::{Stage, nobody, until_within};

const TOKEN_KEY: &str = "chitai_gorod_token";
const EVENTS: &str = "{chitai_gorod_token}:events";
const PATH: &str = "/web/api/v2/x";
/// A held request has its answer by then: the lease of a dead holder (15 s), the next one's solve,
/// and a slow machine.
const HELD: Duration = Duration::from_secs(55);
/// A lease that nobody renews has lapsed by then, and somebody has noticed.
const TAKE_OVER: Duration = Duration::from_secs(25);
/// What one has put in force has come to the others by then, even by the slow way.
const SPREAD: Duration = Duration::from_secs(35);

/// A sidecar of the fleet, and the solver that it alone asks.
struct Member {
    sidecar: Sidecar,
    solver: Solver,
    /// Where it looks for the solver instead, so that it finds none.
    _nobody: Option<TcpSocket>,
}

/// Sidecars with one shop and one Redis. All have the same token in force, issued an hour ago.
struct Fleet {
    members: Vec<Member>,
    stage: Stage,
}

/// An answer, or why there is none, and when it came.
struct Answer {
    response: io::Result<Response>,
    at: Instant,
}

impl Fleet {
    /// `count` sidecars that are ready and settled.
    async fn start(count: usize) -> Self {
        let mut stage = Stage::new().await;
        stage.with_redis().await;
        Self::start_on(stage, count).await
    }

    /// The same on a stage whose Redis is set.
    async fn start_on(mut stage: Stage, count: usize) -> Self {
        stage.token = Jwt::anonymous().issued_ago(3600).make();
        stage.tokens.accept(&stage.token);
        stage.write_env_file(&format!("CHITAI_GOROD_BEARER_TOKEN=\"{}\"\n", stage.token));
        let fleet = Self::launch(stage, count).await;
        fleet.settled().await;
        fleet
    }

    /// `count` sidecars that listen, with the stage's token or with none.
    async fn launch(mut stage: Stage, count: usize) -> Self {
        stage.set("WORKERS", 1);
        stage.set("TOKEN_SOURCES", "flaresolverr");
        let members = join_all((0..count).map(|number| Member::launch(&stage, number))).await;
        Self { members, stage }
    }

    async fn settled(&self) {
        for member in &self.members {
            let settled = |status: &serde_json::Value| {
                status["token"]["verified"] == true && status["verifier"]["state"] == "trusted"
            };
            member.sidecar.status_where("the first verification", settled).await;
        }
    }

    /// Solves of all together.
    fn solves(&self) -> usize {
        self.members.iter().map(|member| member.solver.solves()).sum()
    }

    /// The only one that solves, once it does.
    async fn holder(&self) -> usize {
        until_within(HELD, "a solve", async || self.solves() > 0).await;
        let solving = |&number: &usize| self.members[number].solver.solves() > 0;
        let holders: Vec<usize> = (0..self.members.len()).filter(solving).collect();
        assert_eq!(holders.len(), 1, "who solves: {holders:?}");
        holders[0]
    }

    /// Everybody but `number`.
    fn others(&self, number: usize) -> impl Iterator<Item = &Member> + Clone {
        self.members.iter().enumerate().filter(move |(other, _)| *other != number).map(|(_, m)| m)
    }

    fn pause_solvers(&self) {
        self.members.iter().for_each(|member| member.solver.pause());
    }

    fn resume_solvers(&self) {
        self.members.iter().for_each(|member| member.solver.resume());
    }

    /// The shop forgets all tokens.
    fn kill_token(&self) {
        self.stage.tokens.kill_all();
    }

    /// Lets `each` requests of every sidecar reach the shop with the token, kills it, and lets them
    /// all be refused together. Their answers are by sidecar.
    async fn refused_at_once(&self, each: usize) -> Vec<Vec<Answer>> {
        let calls = self.members.iter().map(|member| {
            join_all((0..each).map(|number| member.get(format!("/web/api/v2/gate/{number}"))))
        });
        let refuse = async {
            self.stage.origin.arrived(self.members.len() * each).await;
            self.kill_token();
            self.stage.origin.open_gate();
        };
        tokio::join!(join_all(calls), refuse).0
    }

    /// Waits until all have `token` in force.
    async fn all_have(&self, token: &str) {
        for number in 0..self.members.len() {
            self.member_has(number, token).await;
        }
    }

    async fn member_has(&self, number: usize, token: &str) {
        let (expected, sidecar) = (fingerprint(token), &self.members[number].sidecar);
        until_within(SPREAD, &format!("the token to come to sidecar {number}"), async || {
            sidecar.status().await["token"]["fingerprint"] == expected.as_str()
        })
        .await;
    }

    /// Looks at each sidecar's `/status` all along, from now on.
    fn watch(&self) -> History {
        History::of(self.members.iter().map(|member| member.sidecar.admin()))
    }
}

impl Member {
    async fn launch(stage: &Stage, number: usize) -> Self {
        let solver = Solver::start(stage.tokens.clone()).await;
        let url = solver.url();
        Self { sidecar: Self::run(stage, number, &url).await, solver, _nobody: None }
    }

    /// One whose solver refuses connections.
    async fn launch_without_solver(stage: &Stage, number: usize) -> Self {
        let solver = Solver::start(stage.tokens.clone()).await;
        let (socket, address) = nobody();
        let url = format!("http://{address}");
        Self { sidecar: Self::run(stage, number, &url).await, solver, _nobody: Some(socket) }
    }

    async fn run(stage: &Stage, number: usize, solver: &str) -> Sidecar {
        let env_file = stage.path(&format!("{number}.env"));
        std::fs::write(&env_file, stage.read_env_file()).unwrap();
        let mut variables = stage.variables().clone();
        variables.push(("ENV_FILE".to_owned(), env_file.display().to_string()));
        variables.push(("FLARESOLVERR_URL".to_owned(), solver.to_owned()));
        Sidecar::start(&variables, stage.dir()).await
    }

    /// One request on a connection of its own, which may be held long.
    async fn get(&self, path: impl AsRef<str>) -> Answer {
        let response = get_at(self.sidecar.proxy(), HELD, path.as_ref()).await;
        Answer { response, at: Instant::now() }
    }
}

impl Answer {
    /// 0 without an answer.
    fn status(&self) -> u16 {
        self.response.as_ref().map_or(0, |response| response.status)
    }
}

/// All of `answers` are 200.
fn all_well<'a>(answers: impl IntoIterator<Item = &'a Answer>) {
    let ill = |answer: &&Answer| answer.status() != 200;
    let ill: Vec<_> = answers.into_iter().filter(ill).map(|answer| &answer.response).collect();
    assert!(ill.is_empty(), "{} answers are not 200, such as {:?}", ill.len(), ill[0]);
}
