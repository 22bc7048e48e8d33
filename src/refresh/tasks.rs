//! What runs beside the requests for as long as the process lives.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::debug;

use super::SourceKind;
use super::adoption::is_store;
use super::lock;
use super::refresher::Refresher;
use super::run::Cause;
use super::sources::Solved;
use super::verifier::{Opinion, Passage, Trust};
use crate::token::Published;

/// The wall clock may jump, and `exp` is a moment of it: look at least so often.
const GLANCE: Duration = Duration::from_secs(30);
/// From one look at FlareSolverr's health to the next, while it is missed.
const PROBE: Duration = Duration::from_secs(30);
/// Pauses between tries to calibrate.
const CALIBRATE_FIRST: Duration = Duration::from_secs(5);
const CALIBRATE_LONGEST: Duration = Duration::from_mins(5);
/// Pauses between tries to verify a published token.
const VERIFY_FIRST: Duration = Duration::from_secs(5);
const VERIFY_LONGEST: Duration = Duration::from_mins(1);

impl Refresher {
    /// Starts everything and returns at once: the stores are read by a first
    /// run in the background, which goes on to the sources if they have no
    /// usable token. Call it before the first request is let in: requests
    /// that need a token join that run. Call it once.
    pub fn start(self: &Arc<Self>) {
        // Entered here and not in a task, so that no request comes first.
        // Nobody has to wait for it.
        drop(self.runs.enter(|_| None::<()>, || Arc::clone(self).run(Cause::Start)));
        let handle = &self.handle;
        handle.spawn(Arc::clone(self).follow_schedule());
        handle.spawn(Arc::clone(self).calibrate());
        handle.spawn(Arc::clone(self).verify_late());
        handle.spawn(Arc::clone(self).keep_env_file());
        if self.stores.has_redis() {
            handle.spawn(Arc::clone(self).keep_redis());
            handle.spawn(Arc::clone(self).poll_redis());
            handle.spawn(Arc::clone(self).follow_redis());
        }
        if self.sources.order().contains(&SourceKind::FlareSolverr) {
            handle.spawn(Arc::clone(self).miss_solver());
        }
        if let Some(late) = lock(&self.late).take() {
            handle.spawn(Arc::clone(self).use_late_solves(late));
        }
    }

    /// When the next run is due as things stand.
    pub(super) fn due(&self, now: Instant) -> Instant {
        let usable = self.usable().is_some();
        self.schedule().due(now, usable)
    }

    async fn follow_schedule(self: Arc<Self>) {
        loop {
            let now = Instant::now();
            let due = self.due(now);
            if due <= now {
                // What comes of it is logged by the run, and moves `due`.
                let _ = self.renew(self.generation(), Cause::Due).await;
                continue;
            }
            tokio::select! {
                () = sleep_until(due.min(now + GLANCE)) => {}
                () = self.woken.notified() => {}
            }
        }
    }

    async fn calibrate(self: Arc<Self>) {
        let mut pause = CALIBRATE_FIRST;
        while self.verifier.calibrate().await == Trust::Pending {
            sleep(pause).await;
            pause = (pause * 2).min(CALIBRATE_LONGEST);
        }
        // The answer's date may have moved the clock, past `exp` perhaps.
        self.woken.notify_one();
    }

    /// Has tokens verified that were published without a verdict.
    async fn verify_late(self: Arc<Self>) {
        let mut changes = self.cache.changes();
        loop {
            changes.borrow_and_update();
            let unproven = self.usable().filter(|usable| !usable.is_verified());
            let verify = async {
                if let Some(published) = unproven {
                    self.verify(&published).await;
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                news = changes.changed() => if news.is_err() { return },
                () = verify => {}
            }
        }
    }

    /// Asks until there is a verdict. A blind verifier will never have one.
    async fn verify(&self, published: &Published) {
        let fresh = !is_store(published.source);
        let mut pause = if fresh { VERIFY_FIRST } else { Duration::ZERO };
        while self.verifier.trust() != Trust::Blind {
            sleep(pause).await;
            let finding = self.examine(&published.candidate()).await;
            match finding.opinion {
                Opinion::Good if finding.passage == Passage::Cleared => {
                    self.add_clearance(published, true);
                    return self.schedule().proven();
                }
                Opinion::Good => return self.prove(published.generation),
                Opinion::Bad => return,
                Opinion::Unknown => pause = (pause * 2).clamp(VERIFY_FIRST, VERIFY_LONGEST),
            }
        }
    }

    /// Ends the back-off early when FlareSolverr, which was away, is back.
    pub(super) async fn miss_solver(self: Arc<Self>) {
        loop {
            sleep(PROBE).await;
            let missed = self.schedule().awaits_solver(Instant::now());
            if missed && self.sources.solver_answers().await {
                debug!("flaresolverr answers again");
                self.schedule().lift();
                self.fleet.solver_is_back();
                self.woken.notify_one();
            }
        }
    }

    /// Uses what a solve brought after its run had ended, if it is needed.
    pub(super) async fn use_late_solves(
        self: Arc<Self>,
        mut late: mpsc::UnboundedReceiver<Solved>,
    ) {
        while let Some(solved) = late.recv().await {
            let (Ok(found), None) = (solved, self.usable()) else {
                continue;
            };
            self.sources.keep(Some(found));
            self.schedule().lift();
            let _ = self.renew(self.generation(), Cause::Missing).await;
            self.sources.keep(None); // Another source may have been faster.
        }
    }
}
