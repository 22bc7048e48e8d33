//! The sources in their order, and the race between them.
//!
//! # Invariants
//!
//! - A source that fails hands over at once; one that is slow gets the next
//!   one beside it. The first token that passes the check wins.
//! - Never two solves at once. A solve belongs to no run, so it outlives one
//!   that another source has won, and what it brings is used by the next.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::coalesce::{Coalesce, Entered};
use super::direct::Direct;
use super::error::{SourceError, SourceFailure};
use super::flaresolverr::FlareSolverr;
use super::solution::Found;
use super::{RefreshSettings, SourceKind, lock};
use crate::metrics::Metrics;
use crate::net::Dialer;

/// The outcome of a solve, which its waiters share.
pub(super) type Solved = Result<Arc<Found>, SourceError>;

/// All sources.
pub(super) struct Sources {
    order: Vec<SourceKind>,
    patience: Duration,
    direct: Direct,
    solver: Option<Solver>,
    metrics: Arc<Metrics>,
    reports: Mutex<Vec<Report>>,
}

/// How a source's last attempt went.
#[derive(Clone, Debug)]
pub(super) struct Report {
    pub(super) source: SourceKind,
    /// None if it gave a token that passed the check.
    pub(super) error: Option<String>,
    pub(super) took: Duration,
}

/// FlareSolverr, asked once at a time.
struct Solver {
    client: Arc<FlareSolverr>,
    flights: Coalesce<Solved>,
    /// A solve that came when no run was waiting for it.
    late: Mutex<Option<Arc<Found>>>,
}

/// What a source gave, before any check.
struct Offer {
    found: Solved,
    /// Asked for by this run, and not by an earlier one.
    fresh: bool,
}

impl Sources {
    /// Solves run on `handle`; one that nobody waits for any more goes to `late`.
    ///
    /// # Errors
    ///
    /// Whatever keeps FlareSolverr's HTTP client from being made.
    pub(super) fn new(
        settings: &RefreshSettings,
        dialer: Arc<Dialer>,
        metrics: Arc<Metrics>,
        handle: Handle,
        late: mpsc::UnboundedSender<Solved>,
    ) -> Result<Self, reqwest::Error> {
        let is_source = settings.sources.contains(&SourceKind::FlareSolverr);
        let client = if is_source { FlareSolverr::from_settings(settings)? } else { None };
        let solver = client.map(|client| Solver {
            client: Arc::new(client),
            flights: Coalesce::keeping(handle, late),
            late: Mutex::default(),
        });
        let there = |kind: &SourceKind| *kind != SourceKind::FlareSolverr || solver.is_some();
        Ok(Self {
            order: settings.sources.iter().copied().filter(there).collect(),
            patience: settings.source_patience,
            direct: Direct::from_settings(settings, dialer),
            solver,
            metrics,
            reports: Mutex::default(),
        })
    }

    /// Which there are, in order.
    pub(super) fn order(&self) -> &[SourceKind] {
        &self.order
    }

    /// How the last attempt of `source` went.
    pub(super) fn report(&self, source: SourceKind) -> Option<Report> {
        lock(&self.reports).iter().find(|report| report.source == source).cloned()
    }

    /// Keeps a late solve for the next run; `None` forgets it.
    pub(super) fn keep(&self, found: Option<Arc<Found>>) {
        if let Some(solver) = &self.solver {
            *lock(&solver.late) = found;
        }
    }

    /// Whether FlareSolverr answers its health check. Lasts at most 55 s.
    pub(super) async fn solver_answers(&self) -> bool {
        self.solver_health().await.is_some_and(|health| health.is_ok())
    }

    /// FlareSolverr's health; `None` where it is no source. Lasts at most 55 s.
    pub(super) async fn solver_health(&self) -> Option<Result<(), SourceError>> {
        match &self.solver {
            Some(solver) => Some(solver.client.health().await),
            None => None,
        }
    }

    /// Ends a solve that is under way; see [`FlareSolverr::close`].
    pub(super) async fn close(&self) {
        if let Some(solver) = &self.solver {
            solver.client.close().await;
        }
    }

    /// Asks the sources until what one gave passes `check`.
    ///
    /// # Errors
    ///
    /// What each source failed with, when all have.
    pub(super) async fn race<T, C, F>(&self, check: C) -> Result<T, Vec<SourceFailure>>
    where
        C: Fn(SourceKind, Solved) -> F,
        F: Future<Output = Result<T, SourceError>>,
    {
        let mut waiting: VecDeque<_> = self.order.iter().copied().collect();
        let mut asked = FuturesUnordered::new();
        let mut failures = Vec::new();
        while let Some(source) = waiting.pop_front() {
            asked.push(self.attempt(source, &check));
            let patience = sleep(self.patience_with(source));
            tokio::pin!(patience);
            tokio::select! {
                biased;
                Some(outcome) = asked.next() => match outcome {
                    Ok(won) => return Ok(won),
                    Err(failure) => failures.push(failure),
                },
                () = &mut patience => if let Some(next) = waiting.front() {
                    let (source, next) = (source.as_str(), next.as_str());
                    warn!(source, next, "source is slow, the next one is asked beside it");
                },
            }
        }
        while let Some(outcome) = asked.next().await {
            match outcome {
                Ok(won) => return Ok(won),
                Err(failure) => failures.push(failure),
            }
        }
        Err(failures)
    }

    /// How long `source` may take from now on: a solve that is under way
    /// already has used up some of its time.
    fn patience_with(&self, source: SourceKind) -> Duration {
        let solver = self.solver.as_ref().filter(|_| source == SourceKind::FlareSolverr);
        let lasted = solver.and_then(|solver| solver.flights.running_for()).unwrap_or_default();
        self.patience.saturating_sub(lasted)
    }

    async fn attempt<T, C, F>(&self, source: SourceKind, check: &C) -> Result<T, SourceFailure>
    where
        C: Fn(SourceKind, Solved) -> F,
        F: Future<Output = Result<T, SourceError>>,
    {
        let started = Instant::now();
        let offer = self.ask(source).await;
        let may_be_stale = !offer.fresh && offer.found.is_ok();
        let mut outcome = check(source, offer.found).await;
        if may_be_stale && outcome.as_ref().is_err_and(SourceError::is_of_dead_token) {
            // It was asked for before this run, and the token died since.
            outcome = check(source, self.ask(source).await.found).await;
        }
        self.record(source, outcome.as_ref().err(), started.elapsed());
        outcome.map_err(|error| SourceFailure { kind: source, error })
    }

    fn record(&self, source: SourceKind, error: Option<&SourceError>, took: Duration) {
        let outcome = if error.is_none() { "ok" } else { "failed" };
        self.metrics.refresh_finished(source.as_str(), outcome, took);
        debug!(source = source.as_str(), outcome, ?took, "source finished");
        let mut reports = lock(&self.reports);
        reports.retain(|report| report.source != source);
        reports.push(Report { source, error: error.map(ToString::to_string), took });
    }

    async fn ask(&self, source: SourceKind) -> Offer {
        match (source, &self.solver) {
            (SourceKind::FlareSolverr, Some(solver)) => solver.solve().await,
            (SourceKind::FlareSolverr | SourceKind::Direct, _) => {
                Offer { found: self.direct.ask().await.map(Arc::new), fresh: true }
            }
        }
    }
}

impl Solver {
    async fn solve(&self) -> Offer {
        if let Some(found) = self.take_late() {
            return Offer { found: Ok(found), fresh: false };
        }
        let client = Arc::clone(&self.client);
        let entered = self
            .flights
            .enter(|_| None::<Offer>, || async move { client.solve().await.map(Arc::new) });
        let (flight, fresh) = match entered {
            Entered::Settled(offer) => return offer,
            Entered::Joined(flight) => (flight, false),
            Entered::Started(flight) => (flight, true),
        };
        let stopped = || Err(SourceError::Unreachable("the solve was stopped".to_owned()));
        Offer { found: flight.outcome().await.unwrap_or_else(stopped), fresh }
    }

    fn take_late(&self) -> Option<Arc<Found>> {
        lock(&self.late).take()
    }
}
