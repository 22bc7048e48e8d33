//! Whether a 401 means that the token is dead, or only that endpoint's own no.
//!
//! # Invariants
//!
//! - One judgement at a time, at most one a second, shared by all who may use it.
//! - A request may use only a judgement that was asked for after it was sent:
//!   the token may have died in between.
//! - A good verdict excuses the requests sent before it, and for a minute the
//!   endpoints of those it excused. Nothing else: a real death must show.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::coalesce::{Coalesce, Entered};
use super::verifier::{Opinion, Trust, Verifier};
use super::{Endpoint, Refusal};
use crate::token::{Generation, Published};

/// The least time from one judgement to the next.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long a good verdict excuses an endpoint.
const EXCUSE: Duration = Duration::from_secs(60);
/// The most endpoints that are excused at once; the oldest gives way.
const MAX_EXCUSED: usize = 256;

/// Judges refused tokens by the verifier.
pub(super) struct Judge {
    verifier: Arc<Verifier>,
    docket: Arc<Mutex<Docket>>,
    flights: Coalesce<()>,
}

impl Judge {
    /// Judgements run on `handle`.
    pub(super) fn new(verifier: Arc<Verifier>, handle: Handle) -> Self {
        Self { verifier, docket: Arc::default(), flights: Coalesce::new(handle) }
    }

    /// What to think of the token that `refusal` is about.
    pub(super) async fn judge(&self, refusal: &Refusal, refused: &Arc<Published>) -> Opinion {
        if self.verifier.trust() == Trust::Blind {
            return Opinion::Unknown;
        }
        loop {
            let entered = self
                .flights
                .enter(|running| self.look(refusal, running), || self.ask(Arc::clone(refused)));
            match entered {
                Entered::Settled(Next::Settled(opinion)) => return opinion,
                Entered::Settled(Next::Wait(until)) => sleep_until(until).await,
                Entered::Settled(Next::Ask) => {}
                Entered::Joined(flight) | Entered::Started(flight) => {
                    if flight.outcome().await.is_none() {
                        return Opinion::Unknown;
                    }
                }
            }
        }
    }

    fn look(&self, refusal: &Refusal, running: bool) -> Option<Next> {
        let next = lock(&self.docket).next(refusal, running, Instant::now());
        Some(next).filter(|next| *next != Next::Ask)
    }

    /// Called under the lock of the flights.
    fn ask(&self, refused: Arc<Published>) -> impl Future<Output = ()> + Send + 'static {
        let (verifier, docket) = (Arc::clone(&self.verifier), Arc::clone(&self.docket));
        let asked_at = Instant::now();
        async move {
            let opinion = verifier.judge(&refused.token).await;
            debug!(generation = refused.generation.0, ?opinion, "refused token judged");
            let generation = refused.generation;
            lock(&docket).record(Judgement { generation, asked_at, opinion });
        }
    }
}

/// What a refusal has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The verdict is there.
    Settled(Opinion),
    /// Too soon to ask again.
    Wait(Instant),
    /// Ask, or wait for the one who is asking.
    Ask,
}

#[derive(Clone, Copy, Debug)]
struct Judgement {
    generation: Generation,
    asked_at: Instant,
    opinion: Opinion,
}

impl Judgement {
    fn covers(&self, refusal: &Refusal) -> bool {
        self.generation == refusal.generation && refusal.sent_at <= self.asked_at
    }
}

/// What has been judged and excused. Knows no clock and asks nobody.
#[derive(Debug, Default)]
struct Docket {
    last: Option<Judgement>,
    excused: VecDeque<Excuse>,
}

#[derive(Debug)]
struct Excuse {
    generation: Generation,
    endpoint: Endpoint,
    until: Instant,
}

impl Docket {
    fn next(&mut self, refusal: &Refusal, running: bool, now: Instant) -> Next {
        if self.is_excused(refusal, now) {
            return Next::Settled(Opinion::Good);
        }
        match self.last {
            Some(last) if last.covers(refusal) => {
                if last.opinion == Opinion::Good {
                    self.excuse(refusal, now);
                }
                Next::Settled(last.opinion)
            }
            Some(last) if !running && now < last.asked_at + INTERVAL => {
                Next::Wait(last.asked_at + INTERVAL)
            }
            _ => Next::Ask,
        }
    }

    fn record(&mut self, judgement: Judgement) {
        self.last = Some(judgement);
    }

    fn is_excused(&self, refusal: &Refusal, now: Instant) -> bool {
        self.excused.iter().any(|excuse| {
            excuse.generation == refusal.generation
                && excuse.endpoint == refusal.endpoint
                && now < excuse.until
        })
    }

    fn excuse(&mut self, refusal: &Refusal, now: Instant) {
        let (generation, endpoint) = (refusal.generation, refusal.endpoint);
        self.excused.retain(|excuse| now < excuse.until && excuse.generation == generation);
        if self.excused.len() == MAX_EXCUSED {
            self.excused.pop_front();
        }
        self.excused.push_back(Excuse { generation, endpoint, until: now + EXCUSE });
    }
}

fn lock(docket: &Mutex<Docket>) -> MutexGuard<'_, Docket> {
    docket.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;

    fn refusal(path: &str, sent_at: Instant) -> Refusal {
        let endpoint = Endpoint::new(&Method::GET, path);
        Refusal { generation: Generation(1), sent_at, endpoint }
    }

    fn judged(asked_at: Instant, opinion: Opinion) -> Docket {
        let mut docket = Docket::default();
        docket.record(Judgement { generation: Generation(1), asked_at, opinion });
        docket
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn the_first_refusal_asks_and_the_others_join() {
        let now = Instant::now();
        let mut docket = Docket::default();
        assert_eq!(docket.next(&refusal("/a", now), false, now), Next::Ask);
        assert_eq!(docket.next(&refusal("/b", now), true, now), Next::Ask);
    }

    #[test]
    fn a_verdict_counts_for_what_was_sent_before_it_was_asked_for() {
        let now = Instant::now();
        for opinion in [Opinion::Good, Opinion::Bad, Opinion::Unknown] {
            let mut docket = judged(now, opinion);
            let earlier = refusal("/a", now - ms(1));
            assert_eq!(docket.next(&earlier, false, now + ms(5)), Next::Settled(opinion));
        }
    }

    #[test]
    fn what_was_sent_later_waits_for_the_next_verdict() {
        let now = Instant::now();
        let mut docket = judged(now, Opinion::Good);
        let later = refusal("/b", now + ms(1));
        assert_eq!(docket.next(&later, false, now + ms(5)), Next::Wait(now + INTERVAL));
        assert_eq!(docket.next(&later, false, now + INTERVAL), Next::Ask);
        // One that is asking already may be joined at any time.
        assert_eq!(docket.next(&later, true, now + ms(5)), Next::Ask);
    }

    #[test]
    fn a_good_verdict_excuses_its_endpoints_for_a_minute_and_no_others() {
        let now = Instant::now();
        let mut docket = judged(now, Opinion::Good);
        docket.next(&refusal("/own", now), false, now);
        let (soon, late) = (now + ms(59_999), now + EXCUSE);
        let settled = Next::Settled(Opinion::Good);
        assert_eq!(docket.next(&refusal("/own", soon), false, soon), settled);
        assert_eq!(docket.next(&refusal("/other", soon), false, soon), Next::Ask);
        assert_eq!(docket.next(&refusal("/own", late), false, late), Next::Ask);
        let mut post = refusal("/own", soon);
        post.endpoint = Endpoint::new(&Method::POST, "/own");
        assert_eq!(docket.next(&post, false, soon), Next::Ask);
    }

    #[test]
    fn an_excuse_is_not_for_the_next_token() {
        let now = Instant::now();
        let mut docket = judged(now, Opinion::Good);
        docket.next(&refusal("/own", now), false, now);
        let mut next = refusal("/own", now + ms(2000));
        next.generation = Generation(2);
        assert_eq!(docket.next(&next, false, now + ms(2000)), Next::Ask);
    }

    #[test]
    fn a_bad_verdict_excuses_nothing() {
        let now = Instant::now();
        let mut docket = judged(now, Opinion::Bad);
        docket.next(&refusal("/a", now), false, now);
        assert!(docket.excused.is_empty());
    }

    #[test]
    fn excuses_are_bounded() {
        let now = Instant::now();
        let mut docket = judged(now, Opinion::Good);
        for path in 0..1000 {
            docket.next(&refusal(&path.to_string(), now), false, now);
        }
        assert_eq!(docket.excused.len(), MAX_EXCUSED);
        assert!(docket.is_excused(&refusal("999", now), now));
    }
}
