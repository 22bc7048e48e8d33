//! The refresher's parts, asked for a person's sake.
//!
//! # Invariants
//!
//! - Nothing that is learnt here is published, saved or held against a token.

use std::time::Duration;

use tokio::time::Instant;

use super::SourceKind;
use super::error::{RefreshError, SourceError};
use super::refresher::Refresher;
use super::run::candidate;
use super::sources::Solved;
use super::verifier::{Finding, Opinion, Passage, Unanswered};
use crate::token::{Clearance, Token};

/// What the verifier thinks of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// The API takes it.
    Good,
    /// The API takes it together with its clearance.
    Cleared,
    /// The API refuses it.
    Bad,
    /// The anti-bot wall is in between, clearance or not.
    Walled,
    /// No telling.
    Unknown,
}

impl From<Finding> for Judgement {
    fn from(finding: Finding) -> Self {
        match (finding.opinion, finding.passage) {
            (Opinion::Good, Passage::Cleared) => Self::Cleared,
            (Opinion::Good, _) => Self::Good,
            (Opinion::Bad, _) => Self::Bad,
            (Opinion::Unknown, Passage::Walled) => Self::Walled,
            (Opinion::Unknown, _) => Self::Unknown,
        }
    }
}

/// What a refresh would have given.
#[derive(Debug)]
pub struct Rehearsal {
    /// The source that was first.
    pub source: SourceKind,
    /// Its token.
    pub token: Token,
    /// Neither [`Judgement::Bad`] nor [`Judgement::Walled`].
    pub judgement: Judgement,
    /// How long it took, the verification included.
    pub took: Duration,
}

impl Refresher {
    /// Asks the verifier without a token, and returns the status of its answer.
    /// Lasts at most 5 s.
    ///
    /// # Errors
    ///
    /// [`Unanswered`].
    pub async fn probe_verifier(&self) -> Result<u16, Unanswered> {
        self.verifier.probe().await
    }

    /// Asks the verifier about `token`. Lasts at most 5 s.
    pub async fn probe_token(&self, token: &Token, clearance: &Clearance) -> Judgement {
        self.verifier.examine(token, clearance).await.into()
    }

    /// Asks FlareSolverr's `/health`; `None` where it is no source. Lasts at
    /// most 55 s.
    pub async fn probe_solver(&self) -> Option<Result<(), SourceError>> {
        self.sources.solver_health().await
    }

    /// Asks the sources for a token as a run does, and has it verified. Lasts
    /// as long as the sources do: minutes with a wedged solver.
    ///
    /// # Errors
    ///
    /// [`RefreshError::Sources`] with what each said.
    pub async fn rehearse(&self) -> Result<Rehearsal, RefreshError> {
        let started = Instant::now();
        let race = self.sources.race(|source, offer| self.audition(source, offer)).await;
        let (source, token, judgement) = race.map_err(RefreshError::Sources)?;
        Ok(Rehearsal { source, token, judgement, took: started.elapsed() })
    }

    async fn audition(
        &self,
        source: SourceKind,
        offer: Solved,
    ) -> Result<(SourceKind, Token, Judgement), SourceError> {
        let found = offer?;
        if !found.token.is_live(self.clock.now()) {
            return Err(SourceError::Expired);
        }
        let candidate = candidate(&found, source);
        match self.probe_token(&candidate.token, &candidate.clearance).await {
            Judgement::Bad => Err(SourceError::Rejected),
            Judgement::Walled => Err(SourceError::Walled),
            judgement => Ok((source, candidate.token, judgement)),
        }
    }
}
