//! Turns step by step.

use std::time::Duration;

use fastrand::Rng;
use tokio::time::Instant;

use super::turn::*;
use crate::token::{LEASE, Lack, Lease, Owner, SharedBackoff, Standing, ValueId, Wish};

const AWAY: Option<Lack> = Some(Lack::Away);

struct Script {
    turn: Turn,
    now: Instant,
}

impl Script {
    fn new(wish: Wish) -> Self {
        Self::after(wish, Past::default(), Instant::now())
    }

    fn after(wish: Wish, past: Past, now: Instant) -> Self {
        let (owner, dice) = (Owner::named("me"), Rng::with_seed(1));
        let mut turn = Turn::new(wish, owner, Some(value("ours")), past, dice, now);
        assert!(matches!(turn.begin(now), Action::Enter(_)));
        Self { turn, now }
    }

    fn step(&mut self, event: Event) -> Action {
        self.turn.step(self.now, event)
    }

    fn find(&mut self, turn: Standing) -> Action {
        self.step(Event::Entered(Some(situation(turn, &[], None))))
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    /// Waits as told, and asks again.
    fn wait(&mut self, action: &Action) {
        let Action::Wait(until) = action else { panic!("{action:?}") };
        self.now = *until;
        assert!(matches!(self.step(Event::Timer), Action::Enter(_)));
    }
}

fn value(text: &str) -> ValueId {
    ValueId::of(text.as_bytes())
}

fn situation(turn: Standing, values: &[&str], backoff: Option<SharedBackoff>) -> Situation {
    Situation { values: values.iter().map(|text| value(text)).collect(), backoff, turn }
}

fn lease(epoch: u64) -> Lease {
    Lease { owner: Owner::named("me"), epoch }
}

fn backoff(routine: bool) -> SharedBackoff {
    SharedBackoff { routine, left: Duration::from_secs(9), ..SharedBackoff::default() }
}

/// A lease that was confirmed so long ago still lives.
const LAST_MOMENT: Duration = Duration::from_millis(14_999);
const GRANTED: Standing = Standing::Granted { epoch: 7 };
const HELD: Standing = Standing::Held(Duration::from_secs(15));
const FREE: Standing = Standing::Free;

fn published() -> Action {
    Action::End(End::Publish(Some(lease(7))))
}

#[test]
fn who_has_the_lease_solves_and_publishes_with_it() {
    let mut script = Script::new(Wish::Needed);
    assert_eq!(script.find(GRANTED), Action::Solve);
    assert_eq!(script.turn.renew_at(), Some(script.now + LEASE / 3));
    script.pass(LAST_MOMENT);
    assert_eq!(script.step(Event::Solved), published());
}

#[test]
fn a_renewal_counts_from_when_it_was_sent() {
    let mut script = Script::new(Wish::Needed);
    script.find(GRANTED);
    script.pass(LEASE / 3);
    script.turn.renewed(script.now, Some(true));
    script.pass(LAST_MOMENT);
    assert_eq!(script.step(Event::Solved), published());
}

#[test]
fn a_lease_that_may_have_lapsed_leads_to_another_look_before_anything_is_published() {
    for frozen in [true, false] {
        let mut script = Script::new(Wish::Needed);
        script.find(GRANTED);
        if frozen {
            script.pass(LEASE);
        } else {
            script.turn.renewed(script.now, Some(false));
        }
        let Action::Enter(request) = script.step(Event::Solved) else { panic!() };
        assert_eq!(request.wish, Wish::Force, "back-off does not concern who has a token");
        // Another one has the lease: its outcome is awaited.
        let waiting = script.find(HELD);
        script.wait(&waiting);
        let newer = situation(HELD, &["newer"], None);
        assert_eq!(script.step(Event::Entered(Some(newer))), Action::Consider);
        assert_eq!(script.step(Event::Considered { adopted: true }), Action::End(End::Adopted));
    }
}

#[test]
fn a_token_that_waits_is_published_once_the_lease_is_free_or_redis_out() {
    for (situation, end) in
        [(Some(situation(Standing::Granted { epoch: 9 }, &[], None)), Some(lease(9))), (None, None)]
    {
        let mut script = Script::new(Wish::Needed);
        script.find(GRANTED);
        script.pass(LEASE);
        script.step(Event::Solved);
        assert_eq!(script.step(Event::Entered(situation)), Action::End(End::Publish(end)));
    }
}

#[test]
fn what_is_stored_is_considered_once_and_before_any_solve() {
    let mut script = Script::new(Wish::Needed);
    let refused = situation(FREE, &["stale"], None);
    assert_eq!(script.step(Event::Entered(Some(refused))), Action::Consider);
    let Action::Enter(request) = script.step(Event::Considered { adopted: false }) else {
        panic!()
    };
    assert_eq!(request.known, [value("ours"), value("stale")]);
    let granted = situation(GRANTED, &["stale"], None);
    assert_eq!(script.step(Event::Entered(Some(granted))), Action::Solve);
}

#[test]
fn who_waits_looks_again_at_each_notice_and_ever_more_seldom_without() {
    let mut script = Script::new(Wish::Needed);
    let mut waiting = script.find(HELD);
    assert!(matches!(script.step(Event::Notice), Action::Enter(_)));
    let mut pauses = Vec::new();
    for _ in 0..8 {
        waiting = script.find(HELD);
        let before = script.now;
        script.wait(&waiting);
        pauses.push(script.now - before);
    }
    assert!(pauses[0] < Duration::from_millis(320), "{pauses:?}");
    assert!(pauses.iter().all(|pause| *pause <= Duration::from_millis(2_500)), "{pauses:?}");
    assert!(pauses[7] >= Duration::from_millis(1_500), "{pauses:?}");
    assert!(matches!(waiting, Action::Wait(_)));
}

#[test]
fn a_lapsed_lease_is_taken_over() {
    let mut script = Script::new(Wish::Needed);
    let waiting = script.find(HELD);
    script.wait(&waiting);
    assert_eq!(script.find(GRANTED), Action::Solve);
}

#[test]
fn a_shared_back_off_ends_a_turn_unless_it_is_by_hand_or_the_failure_was_routine() {
    for (wish, routine, ends) in [
        (Wish::Needed, false, true),
        (Wish::Routine, false, true),
        (Wish::Routine, true, true),
        (Wish::Needed, true, false),
        (Wish::Force, false, false),
    ] {
        let mut script = Script::new(wish);
        let situation = situation(FREE, &[], Some(backoff(routine)));
        let action = script.step(Event::Entered(Some(situation)));
        let ended = action == Action::End(End::Elsewhere(backoff(routine)));
        assert_eq!(ended, ends, "{wish:?} {routine} {action:?}");
    }
}

#[test]
fn a_holder_whose_solver_is_away_hands_on_and_waits_for_the_others() {
    let mut script = Script::new(Wish::Needed);
    script.find(GRANTED);
    assert_eq!(
        script.step(Event::SolveFailed { lack: AWAY }),
        Action::HandOn(lease(7), Lack::Away)
    );
    let waiting = script.step(Event::HandedOn(Some(true)));
    let Action::Wait(until) = waiting else { panic!("{waiting:?}") };
    script.now = until;
    let Action::Enter(request) = script.step(Event::Timer) else { panic!() };
    assert_eq!(request.wish, Wish::None);
    let waiting = script.find(HELD);
    script.wait(&waiting);
    let newer = situation(FREE, &["newer"], None);
    assert_eq!(script.step(Event::Entered(Some(newer))), Action::Consider);
    assert_eq!(script.step(Event::Considered { adopted: true }), Action::End(End::Adopted));
}

#[test]
fn where_nobody_takes_it_the_failure_stands() {
    for handed in [Some(false), None] {
        let mut script = Script::new(Wish::Needed);
        script.find(GRANTED);
        script.step(Event::SolveFailed { lack: AWAY });
        assert_eq!(script.step(Event::HandedOn(handed)), Action::End(End::Failed));
    }
    let mut script = Script::new(Wish::Needed);
    script.find(GRANTED);
    script.step(Event::SolveFailed { lack: AWAY });
    let mut action = script.step(Event::HandedOn(Some(true)));
    let began = script.now;
    while action != Action::End(End::Failed) {
        if !matches!(action, Action::Enter(_)) {
            script.wait(&action);
        }
        action = script.step(Event::Entered(Some(situation(FREE, &[], None))));
    }
    assert!(script.now - began < Duration::from_secs(6), "{:?}", script.now - began);
}

#[test]
fn who_finds_that_nobody_takes_it_takes_it_back_to_tell_of_the_failure() {
    let mut script = Script::new(Wish::Needed);
    script.find(GRANTED);
    script.step(Event::SolveFailed { lack: AWAY });
    let mut action = script.step(Event::HandedOn(Some(true)));
    loop {
        let Action::Wait(until) = action else { panic!("{action:?}") };
        script.now = until;
        let Action::Enter(mut request) = script.step(Event::Timer) else { panic!() };
        action = script.step(Event::Entered(Some(situation(FREE, &[], None))));
        if let Action::Enter(again) = &action {
            request = again.clone();
        }
        if request.wish == Wish::Needed {
            break;
        }
    }
    assert_eq!(script.find(GRANTED), Action::End(End::Failed));
    assert_eq!(script.turn.lease(), Some(&lease(7)));
}

#[test]
fn a_solve_that_failed_otherwise_is_not_handed_on() {
    let mut script = Script::new(Wish::Needed);
    script.find(GRANTED);
    assert_eq!(script.step(Event::SolveFailed { lack: None }), Action::End(End::Failed));
    assert_eq!(script.turn.lease(), Some(&lease(7)));
}

#[test]
fn whose_solver_is_away_leaves_the_lease_to_others_unless_none_takes_it() {
    let mut script = Script::new(Wish::Needed);
    script.find(GRANTED);
    script.step(Event::SolveFailed { lack: AWAY });
    script.step(Event::HandedOn(Some(true)));
    let past = script.turn.past();
    let mut next = Script::after(Wish::Needed, past, script.now);
    let mut action = next.find(FREE);
    let began = next.now;
    while let Action::Wait(until) = action {
        next.now = until;
        let Action::Enter(request) = next.step(Event::Timer) else { panic!() };
        assert_eq!(request.wish, Wish::None);
        action = next.find(FREE);
    }
    let Action::Enter(request) = action else { panic!("{action:?}") };
    assert_eq!(request.wish, Wish::Needed);
    assert!(next.now - began < Duration::from_secs(6));
    let mut past = script.turn.past();
    past.solver_is_back();
    let now = script.now;
    let mut back = Turn::new(Wish::Needed, Owner::named("me"), None, past, Rng::with_seed(1), now);
    let Action::Enter(request) = back.begin(now) else { panic!() };
    assert_eq!(request.wish, Wish::Needed);
}

#[test]
fn without_redis_a_token_is_got_at_once_and_then_every_five_minutes() {
    let mut script = Script::new(Wish::Needed);
    assert_eq!(script.step(Event::Entered(None)), Action::Solve);
    assert_eq!(script.step(Event::Solved), Action::End(End::Publish(None)));
    let (past, now) = (script.turn.past(), script.now);
    let minute = Duration::from_mins(1);
    let mut next = Script::after(Wish::Needed, past, now + minute);
    assert_eq!(next.step(Event::Entered(None)), Action::End(End::TooSoon(4 * minute)));
    let mut by_hand = Script::after(Wish::Force, past, now + minute);
    assert_eq!(by_hand.step(Event::Entered(None)), Action::Solve);
    let mut later = Script::after(Wish::Needed, past, now + 5 * minute);
    assert_eq!(later.step(Event::Entered(None)), Action::Solve);
}

#[test]
fn redis_is_back_once_it_gives_a_lease_or_a_token_and_not_when_it_can_only_be_read() {
    let mut script = Script::new(Wish::Needed);
    script.step(Event::Entered(None));
    script.step(Event::Solved);
    let (past, now) = (script.turn.past(), script.now);
    let mut full = Script::after(Wish::Needed, past, now);
    let stored = situation(FREE, &["refused, which could not be told"], None);
    assert_eq!(full.step(Event::Entered(Some(stored.clone()))), Action::Consider);
    assert!(matches!(full.step(Event::Considered { adopted: false }), Action::Enter(_)));
    assert_eq!(full.step(Event::Entered(None)), Action::End(End::TooSoon(ALONE_PAUSE)));
    assert!(full.turn.past().is_alone());
    let mut granted = Script::after(Wish::Needed, past, now);
    granted.find(GRANTED);
    assert!(!granted.turn.past().is_alone());
    let mut adopted = Script::after(Wish::Needed, past, now);
    adopted.step(Event::Entered(Some(stored)));
    adopted.step(Event::Considered { adopted: true });
    assert!(!adopted.turn.past().is_alone());
}

#[test]
fn what_changed_during_a_turn_stays_unless_the_turn_has_changed_it() {
    let mut script = Script::new(Wish::Needed);
    script.step(Event::Entered(None));
    script.step(Event::Solved);
    let alone = script.turn.past();
    let mut meanwhile = alone;
    meanwhile.redis_is_back();
    meanwhile.take_over(alone, alone);
    assert!(!meanwhile.is_alone(), "the turn knew nothing of it");
    meanwhile.take_over(Past::default(), alone);
    assert!(meanwhile.is_alone());
}

#[test]
fn redis_that_is_late_is_asked_once_more_before_a_solve_alone() {
    let mut script = Script::new(Wish::Needed);
    for standing in [HELD, HELD] {
        let Action::Wait(until) = script.step(Event::Late) else { panic!() };
        assert!(until > script.now && until <= script.now + Duration::from_secs(1));
        script.now = until;
        assert!(matches!(script.step(Event::Timer), Action::Enter(_)));
        assert!(matches!(script.find(standing), Action::Wait(_)), "it has answered since");
    }
    assert!(matches!(script.step(Event::Late), Action::Wait(_)));
    assert!(matches!(script.step(Event::Timer), Action::Enter(_)));
    assert_eq!(script.step(Event::Late), Action::Solve);
}

#[test]
fn nobody_is_waited_for_for_ever() {
    let mut script = Script::new(Wish::Needed);
    let mut action = script.find(HELD);
    let began = script.now;
    while action != Action::Solve {
        script.wait(&action);
        action = script.find(HELD);
    }
    assert!(script.now - began < WAIT_LIMIT + Duration::from_secs(3));
}
