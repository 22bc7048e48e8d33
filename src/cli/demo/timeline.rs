//! What happened, and when.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Instant;

/// Prints events with the time since the start. Cheap to clone.
#[derive(Clone)]
pub(super) struct Timeline(Arc<Instant>);

impl Timeline {
    pub(super) fn start() -> Self {
        Self(Arc::new(Instant::now()))
    }

    pub(super) fn note(&self, event: impl Display) {
        println!("{:>8.3} s  {event}", self.0.elapsed().as_secs_f64());
    }
}
