//! Whether a 401 means that the token is dead, and a 403 that the wall is up,
//! or only that endpoint's own no.
//!
//! # Invariants
//!
//! - One judgement at a time, at most one a second, shared by all who may use it.
//! - A request is excused only by a verdict that was asked for after it was
//!   sent: the token may have died in between.
//! - A good verdict excuses the requests sent before it, and for a minute the
//!   endpoints of those it excused. Nothing else: a real death must show.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::coalesce::{Coalesce, Entered};
use super::verifier::{Finding, Opinion, Passage, Trust, Verifier};
use super::{Endpoint, Objection, Refusal, lock};
use crate::token::{Generation, Published};

/// The least time from one judgement to the next.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long a good verdict excuses an endpoint.
const EXCUSE: Duration = Duration::from_mins(1);
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

    /// What to think of the token that `refusal` is about. A blind verifier
    /// is only asked about the wall.
    pub(super) async fn judge(&self, refusal: &Refusal, refused: &Arc<Published>) -> Finding {
        if refusal.objection == Objection::Token && self.verifier.trust() == Trust::Blind {
            return Finding::NOTHING;
        }
        loop {
            let entered = self.flights.enter(
                |running| lock(&self.docket).rule(refusal, running, Instant::now()),
                || self.ask(Arc::clone(refused)),
            );
            match entered {
                Entered::Settled(Ruling::Final(finding)) => return finding,
                Entered::Settled(Ruling::NotBefore(moment)) => sleep_until(moment).await,
                Entered::Joined(flight) | Entered::Started(flight) => {
                    if flight.outcome().await.is_none() {
                        return Finding::NOTHING;
                    }
                }
            }
        }
    }

    /// Called under the lock of the flights.
    fn ask(&self, refused: Arc<Published>) -> impl Future<Output = ()> + Send + 'static {
        let (verifier, docket) = (Arc::clone(&self.verifier), Arc::clone(&self.docket));
        let asked_at = Instant::now();
        async move {
            let finding = verifier.judge(&refused).await;
            debug!(generation = refused.generation.0, ?finding, "refused token judged");
            let (generation, with_clearance) = (refused.generation, refused.needs_clearance);
            lock(&docket).record(Judgement { generation, with_clearance, asked_at, finding });
        }
    }
}

/// What the docket says of a refusal without asking anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ruling {
    /// The verdict is there.
    Final(Finding),
    /// It is too soon to ask again.
    NotBefore(Instant),
}

#[derive(Clone, Copy, Debug)]
struct Judgement {
    generation: Generation,
    /// Requests carry the clearance along with this token.
    with_clearance: bool,
    asked_at: Instant,
    finding: Finding,
}

impl Judgement {
    fn covers(&self, refusal: &Refusal, now: Instant) -> bool {
        let before = refusal.sent_at <= self.asked_at;
        let in_time = match self.finding.opinion {
            // The dead do not rise again.
            Opinion::Bad => true,
            _ if self.excuses(refusal.objection) => before,
            // No telling a moment ago: asking again would only cost time.
            _ => before || now < self.next(),
        };
        self.generation == refusal.generation && in_time
    }

    /// Whether the verifier gets through where the request did not: then the
    /// refusal is the endpoint's own.
    fn excuses(&self, objection: Objection) -> bool {
        match (objection, self.finding.passage) {
            (Objection::Token, _) => self.finding.opinion == Opinion::Good,
            (Objection::Wall, Passage::Open) => true,
            (Objection::Wall, Passage::Cleared) => self.with_clearance,
            (Objection::Wall, Passage::Walled | Passage::Unknown) => false,
        }
    }

    /// When the next one may be asked for.
    fn next(&self) -> Instant {
        self.asked_at + INTERVAL
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
    objection: Objection,
    endpoint: Endpoint,
    until: Instant,
}

impl Docket {
    /// `None`: the verifier is to be asked, or the one asking to be joined.
    fn rule(&mut self, refusal: &Refusal, running: bool, now: Instant) -> Option<Ruling> {
        if self.is_excused(refusal, now) {
            let finding = Finding { opinion: Opinion::Good, passage: Passage::Open };
            return Some(Ruling::Final(finding));
        }
        match self.last {
            Some(last) if last.covers(refusal, now) => {
                if last.excuses(refusal.objection) {
                    self.excuse(refusal, now, last.asked_at + EXCUSE);
                }
                Some(Ruling::Final(last.finding))
            }
            Some(last) if !running && now < last.next() => Some(Ruling::NotBefore(last.next())),
            _ => None,
        }
    }

    fn record(&mut self, judgement: Judgement) {
        self.last = Some(judgement);
    }

    fn is_excused(&self, refusal: &Refusal, now: Instant) -> bool {
        self.excused.iter().any(|excuse| {
            excuse.generation == refusal.generation
                && excuse.objection == refusal.objection
                && excuse.endpoint == refusal.endpoint
                && now < excuse.until
        })
    }

    fn excuse(&mut self, refusal: &Refusal, now: Instant, until: Instant) {
        let Refusal { generation, objection, endpoint, .. } = *refusal;
        self.excused.retain(|excuse| now < excuse.until && excuse.generation == generation);
        if self.excused.len() == MAX_EXCUSED {
            self.excused.pop_front();
        }
        self.excused.push_back(Excuse { generation, objection, endpoint, until });
    }
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;

    fn refusal(path: &str, sent_at: Instant) -> Refusal {
        let endpoint = Endpoint::new(&Method::GET, path);
        Refusal { objection: Objection::Token, generation: Generation(1), sent_at, endpoint }
    }

    fn judged(asked_at: Instant, opinion: Opinion) -> Docket {
        found(asked_at, finding(opinion), false)
    }

    fn finding(opinion: Opinion) -> Finding {
        Finding { opinion, passage: Passage::Open }
    }

    fn found(asked_at: Instant, finding: Finding, with_clearance: bool) -> Docket {
        let mut docket = Docket::default();
        let generation = Generation(1);
        docket.record(Judgement { generation, with_clearance, asked_at, finding });
        docket
    }

    #[test]
    fn the_walls_403_is_an_endpoints_own_only_where_the_verifier_passes_as_the_request_did() {
        let now = Instant::now();
        let walled = Refusal { objection: Objection::Wall, ..refusal("/a", now) };
        let cases = [
            (Passage::Open, false, true),
            (Passage::Open, true, true),
            (Passage::Cleared, false, false),
            (Passage::Cleared, true, true),
            (Passage::Walled, true, false),
            (Passage::Unknown, false, false),
        ];
        for (passage, with_clearance, own) in cases {
            let finding = Finding { opinion: Opinion::Unknown, passage };
            let mut docket = found(now, finding, with_clearance);
            let ruling = docket.rule(&walled, false, now);
            assert_eq!(ruling, Some(Ruling::Final(finding)));
            assert_eq!(docket.is_excused(&walled, now), own, "{passage:?} {with_clearance}");
            // A death of the token must not hide behind it.
            assert!(!docket.is_excused(&refusal("/a", now), now));
        }
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn the_first_refusal_asks_and_the_others_join() {
        let now = Instant::now();
        let mut docket = Docket::default();
        assert_eq!(docket.rule(&refusal("/a", now), false, now), None);
        assert_eq!(docket.rule(&refusal("/b", now), true, now), None);
    }

    #[test]
    fn a_verdict_counts_for_what_was_sent_before_it_was_asked_for() {
        let now = Instant::now();
        for opinion in [Opinion::Good, Opinion::Bad, Opinion::Unknown] {
            let mut docket = judged(now, opinion);
            let earlier = refusal("/a", now - ms(1));
            assert_eq!(
                docket.rule(&earlier, false, now + ms(5)),
                Some(Ruling::Final(finding(opinion)))
            );
        }
    }

    #[test]
    fn a_bad_verdict_counts_for_good_and_an_undecided_one_for_a_second() {
        let now = Instant::now();
        let later = refusal("/a", now + ms(900));
        let bad = judged(now, Opinion::Bad).rule(&later, false, now + ms(60_000));
        assert_eq!(bad, Some(Ruling::Final(finding(Opinion::Bad))));
        let mut docket = judged(now, Opinion::Unknown);
        let ruling = docket.rule(&later, false, now + ms(999));
        assert_eq!(ruling, Some(Ruling::Final(finding(Opinion::Unknown))));
        assert_eq!(docket.rule(&later, false, now + INTERVAL), None);
    }

    #[test]
    fn what_was_sent_after_a_good_verdict_waits_for_the_next() {
        let now = Instant::now();
        let mut docket = judged(now, Opinion::Good);
        let later = refusal("/b", now + ms(1));
        assert_eq!(
            docket.rule(&later, false, now + ms(5)),
            Some(Ruling::NotBefore(now + INTERVAL))
        );
        assert_eq!(docket.rule(&later, false, now + INTERVAL), None);
        // One that is asking already may be joined at any time.
        assert_eq!(docket.rule(&later, true, now + ms(5)), None);
    }

    #[test]
    fn a_good_verdict_excuses_its_endpoints_for_a_minute_and_no_others() {
        let now = Instant::now();
        let mut docket = judged(now, Opinion::Good);
        docket.rule(&refusal("/own", now), false, now);
        let (soon, late) = (now + ms(59_999), now + EXCUSE);
        let settled = Some(Ruling::Final(finding(Opinion::Good)));
        assert_eq!(docket.rule(&refusal("/own", soon), false, soon), settled);
        assert_eq!(docket.rule(&refusal("/other", soon), false, soon), None);
        assert_eq!(docket.rule(&refusal("/own", late), false, late), None);
        let mut post = refusal("/own", soon);
        post.endpoint = Endpoint::new(&Method::POST, "/own");
        assert_eq!(docket.rule(&post, false, soon), None);
    }

    #[test]
    fn an_excuse_is_not_for_the_next_token() {
        let now = Instant::now();
        let mut docket = judged(now, Opinion::Good);
        docket.rule(&refusal("/own", now), false, now);
        let mut next = refusal("/own", now + ms(2000));
        next.generation = Generation(2);
        assert_eq!(docket.rule(&next, false, now + ms(2000)), None);
    }

    #[test]
    fn a_bad_verdict_excuses_nothing() {
        let now = Instant::now();
        let mut docket = judged(now, Opinion::Bad);
        docket.rule(&refusal("/a", now), false, now);
        assert!(docket.excused.is_empty());
    }

    #[test]
    fn excuses_are_bounded() {
        let now = Instant::now();
        let mut docket = judged(now, Opinion::Good);
        for path in 0..1000 {
            docket.rule(&refusal(&path.to_string(), now), false, now);
        }
        assert_eq!(docket.excused.len(), MAX_EXCUSED);
        assert!(docket.is_excused(&refusal("999", now), now));
    }
}
