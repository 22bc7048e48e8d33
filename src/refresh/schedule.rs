//! When the next run is due, and until when none may start.
//!
//! A pure state machine: it is told what happened and when, and says what
//! follows. Two back-offs are kept apart: the one after a run that somebody
//! needed holds up everybody; the one after a run that was merely due while
//! the old token worked holds up the schedule alone.

use std::time::Duration;

use tokio::time::Instant;

use super::backoff::Backoff;
use crate::token::{Generation, Timestamp};

/// The share of a token's remaining life after which it is renewed.
const SHARE: f64 = 0.8;
/// Not even tokens that live for moments are renewed more often than this.
const SHORTEST: Duration = Duration::from_secs(1);
/// After a run that did not get past the wall, the next one for its sake.
pub(super) const WALL_PAUSE: Duration = Duration::from_mins(10);
/// A bound within what clocks can count, whatever a token or a setting says.
const LONGEST: Duration = Duration::from_hours(365 * 24);

/// The timetable of the runs.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    next: Option<Planned>,
    needed: Backoff,
    routine: Backoff,
    /// The last failed run could not reach FlareSolverr.
    solver_away: bool,
    /// The last generation that was refused without ever having worked, and
    /// how many such there were in a row.
    disappointment: Option<Generation>,
    disappointments: u32,
    /// The end of the pause after a run that did not get past the wall.
    wall: Option<Instant>,
}

/// The renewal of a token that works.
#[derive(Clone, Copy, Debug)]
struct Planned {
    due: Instant,
    at: Timestamp,
}

/// The pause after the last failed run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pause {
    /// How many have failed in a row.
    pub(super) failures: u32,
    /// It holds up the schedule alone.
    pub(super) routine: bool,
    /// How long it lasts.
    pub(super) left: Duration,
}

/// How a run failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failed {
    /// Somebody waited for it, or there is no usable token.
    pub(super) needed: bool,
    /// FlareSolverr could not be reached.
    pub(super) solver_away: bool,
}

impl Schedule {
    /// Plans the renewal of a token that was just put in force with `life` left.
    pub(super) fn published(
        &mut self,
        now: (Instant, Timestamp),
        life: Option<Duration>,
        every: Duration,
        jitter: f64,
    ) {
        let delay = delay(life, every, jitter);
        let at = Timestamp(now.1.0.saturating_add(delay.as_secs()));
        self.next = Some(Planned { due: now.0 + delay, at });
        self.needed.lift();
        self.routine.lift();
    }

    /// The token in force is known to work: the failures are history.
    pub(super) fn proven(&mut self) {
        self.needed.reset();
        self.routine.reset();
        self.disappointments = 0;
    }

    /// Counts a failed run.
    pub(super) fn failed(&mut self, now: Instant, how: Failed, jitter: f64) {
        let backoff = if how.needed { &mut self.needed } else { &mut self.routine };
        backoff.failed(now, jitter);
        self.solver_away = how.solver_away;
    }

    /// Takes over the outcome of a run that another sidecar has made, after
    /// `failures` in a row.
    pub(super) fn failed_elsewhere(&mut self, until: Instant, needed: bool, failures: u32) {
        let backoff = if needed { &mut self.needed } else { &mut self.routine };
        backoff.take_over(failures, until);
    }

    /// The pause that is on: the one for everybody, else the schedule's.
    pub(super) fn pause(&self, now: Instant) -> Option<Pause> {
        let pause = |backoff: &Backoff, routine| {
            let left = backoff.until(now)? - now;
            Some(Pause { failures: backoff.failures(), routine, left })
        };
        pause(&self.needed, false).or_else(|| pause(&self.routine, true))
    }

    /// Counts a run whose token nobody could verify and that was refused; once
    /// per generation. From the second in a row it is as good as a failed run:
    /// returns whether it is.
    pub(super) fn disappointed(&mut self, now: Instant, by: Generation, jitter: f64) -> bool {
        if self.disappointment >= Some(by) {
            return false;
        }
        self.disappointment = Some(by);
        self.disappointments += 1;
        if self.disappointments == 1 {
            return false;
        }
        self.needed.failed(now, jitter);
        true
    }

    /// A run has ended, and the wall still lets nobody pass: no other one for
    /// its sake for a while.
    pub(super) fn wall_stands(&mut self, now: Instant) {
        self.wall = Some(now + WALL_PAUSE);
    }

    /// A token passes the verifier.
    pub(super) fn wall_passed(&mut self) {
        self.wall = None;
    }

    /// The end of the pause for runs for the wall's sake, if it is on.
    pub(super) fn walled_until(&self, now: Instant) -> Option<Instant> {
        self.wall.filter(|until| now < *until)
    }

    /// Something has changed for the better: the next run may start at once.
    pub(super) fn lift(&mut self) {
        self.wall = None;
        self.needed.lift();
        self.routine.lift();
        self.solver_away = false;
    }

    /// Somebody wants a run now, whatever failed before.
    pub(super) fn by_hand(&mut self) {
        self.proven();
        self.solver_away = false;
    }

    /// The end of the back-off, if it is on.
    pub(super) fn held_until(&self, now: Instant) -> Option<Instant> {
        self.needed.until(now)
    }

    /// Whether the back-off is on because FlareSolverr was away.
    pub(super) fn awaits_solver(&self, now: Instant) -> bool {
        let paused = [self.needed.until(now), self.routine.until(now), self.walled_until(now)];
        self.solver_away && paused.iter().any(Option::is_some)
    }

    /// When the next run is due; with a `usable` token in force as planned,
    /// without one as soon as the back-off allows.
    pub(super) fn due(&self, now: Instant, usable: bool) -> Instant {
        if !usable {
            return self.held_until(now).unwrap_or(now);
        }
        let planned = self.next.map(|planned| planned.due);
        let pauses = [self.routine.until(now), self.needed.until(now), self.walled_until(now)];
        pauses.into_iter().chain([planned]).flatten().max().unwrap_or(now)
    }

    /// The same moment for people, with a usable token or without.
    pub(super) fn next_at(&self, now: (Instant, Timestamp), usable: bool) -> Timestamp {
        let due = self.due(now.0, usable);
        match self.next {
            Some(planned) if planned.due == due => planned.at,
            _ => Timestamp(now.1.0.saturating_add((due - now.0).as_secs())),
        }
    }
}

/// How long a token with `life` left serves before it is renewed.
fn delay(life: Option<Duration>, every: Duration, jitter: f64) -> Duration {
    let share = life.map_or(every, |life| life.mul_f64(SHARE));
    share.min(every).min(LONGEST).mul_f64(jitter).max(SHORTEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_hours(3);
    const NEEDED: Failed = Failed { needed: true, solver_away: false };
    const ROUTINE: Failed = Failed { needed: false, solver_away: false };

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn planned(now: Instant) -> Schedule {
        let mut schedule = Schedule::default();
        schedule.published((now, Timestamp(1000)), Some(secs(1000)), EVERY, 1.0);
        schedule
    }

    #[test]
    fn a_token_is_renewed_at_four_fifths_of_its_life_or_after_the_interval() {
        assert_eq!(delay(Some(secs(1000)), EVERY, 1.0), secs(800));
        assert_eq!(delay(Some(secs(168_000)), EVERY, 1.0), EVERY);
        assert_eq!(delay(None, EVERY, 1.0), EVERY);
        assert_eq!(delay(Some(secs(1000)), EVERY, 0.9), secs(720));
        assert_eq!(delay(Some(secs(1000)), EVERY, 1.1), secs(880));
        assert_eq!(delay(Some(Duration::ZERO), EVERY, 1.0), SHORTEST);
        assert_eq!(delay(Some(Duration::MAX), Duration::MAX, 1.0), LONGEST);
    }

    #[test]
    fn the_pause_before_the_wall_lasts_ten_minutes_unless_something_changes() {
        let now = Instant::now();
        let walled = || {
            let mut schedule = planned(now);
            schedule.wall_stands(now);
            schedule
        };
        let end = now + WALL_PAUSE;
        assert_eq!(walled().walled_until(now), Some(end));
        assert_eq!(walled().walled_until(end), None);
        assert_eq!(walled().held_until(now), None, "a dead token is not its business");
        let mut due = walled();
        due.published((now, Timestamp(1000)), Some(secs(10)), EVERY, 1.0);
        assert_eq!(due.due(now, true), end, "a scheduled run would meet it too");
        let ends: [fn(&mut Schedule); 2] = [Schedule::lift, Schedule::wall_passed];
        for change in ends {
            let mut schedule = walled();
            change(&mut schedule);
            assert_eq!(schedule.walled_until(now), None);
        }
        // Another endpoint's answer says nothing, and a run by hand has to succeed first.
        let stays: [fn(&mut Schedule); 2] = [Schedule::proven, Schedule::by_hand];
        for event in stays {
            let mut schedule = walled();
            event(&mut schedule);
            assert_eq!(schedule.walled_until(now), Some(end));
        }
    }

    #[test]
    fn a_solver_that_was_away_as_the_wall_went_up_is_looked_for() {
        let now = Instant::now();
        let mut schedule = planned(now);
        schedule.wall_stands(now);
        schedule.failed(now, Failed { needed: false, solver_away: true }, 1.0);
        let later = now + secs(300);
        assert_eq!(schedule.routine.until(later), None);
        assert!(schedule.awaits_solver(later));
        assert!(!schedule.awaits_solver(now + WALL_PAUSE));
    }

    #[test]
    fn the_next_run_is_due_as_planned_while_the_token_works() {
        let now = Instant::now();
        let schedule = planned(now);
        assert_eq!(schedule.due(now, true), now + secs(800));
        assert_eq!(schedule.next_at((now, Timestamp(1000)), true), Timestamp(1800));
    }

    #[test]
    fn without_a_usable_token_a_run_is_due_when_the_back_off_ends() {
        let now = Instant::now();
        let mut schedule = planned(now);
        assert_eq!(schedule.due(now, false), now);
        schedule.failed(now, NEEDED, 1.0);
        assert_eq!(schedule.due(now, false), now + secs(5));
        assert_eq!(schedule.next_at((now, Timestamp(1000)), false), Timestamp(1005));
    }

    #[test]
    fn a_routine_failure_holds_up_the_schedule_alone() {
        let now = Instant::now();
        let mut schedule = planned(now);
        let due = now + secs(800);
        schedule.failed(due, ROUTINE, 1.0);
        assert_eq!(schedule.held_until(due), None);
        assert_eq!(schedule.due(due, true), due + secs(5));
        schedule.failed(due + secs(5), ROUTINE, 1.0);
        assert_eq!(schedule.due(due + secs(5), true), due + secs(15));
    }

    #[test]
    fn a_publication_ends_the_pause_and_a_proof_forgets_the_failures() {
        let now = Instant::now();
        let mut schedule = Schedule::default();
        schedule.failed(now, NEEDED, 1.0);
        schedule.published((now, Timestamp(0)), None, EVERY, 1.0);
        assert_eq!(schedule.held_until(now), None);
        schedule.failed(now, NEEDED, 1.0);
        assert_eq!(schedule.held_until(now), Some(now + secs(10)));
        schedule.proven();
        schedule.failed(now, NEEDED, 1.0);
        assert_eq!(schedule.held_until(now), Some(now + secs(5)));
    }

    #[test]
    fn the_solver_is_awaited_only_during_a_pause_that_it_caused() {
        let now = Instant::now();
        let mut schedule = Schedule::default();
        schedule.failed(now, NEEDED, 1.0);
        assert!(!schedule.awaits_solver(now));
        schedule.failed(now, Failed { solver_away: true, ..NEEDED }, 1.0);
        assert!(schedule.awaits_solver(now));
        assert!(!schedule.awaits_solver(now + secs(10)));
        schedule.lift();
        assert!(!schedule.awaits_solver(now));
        assert_eq!(schedule.due(now, false), now);
    }

    #[test]
    fn a_manual_refresh_clears_the_pause() {
        let now = Instant::now();
        let mut schedule = Schedule::default();
        schedule.failed(now, NEEDED, 1.0);
        schedule.by_hand();
        assert_eq!(schedule.held_until(now), None);
    }

    #[test]
    fn the_second_refused_token_that_nobody_verified_counts_once_as_a_failure() {
        let now = Instant::now();
        let mut schedule = planned(now);
        assert!(!schedule.disappointed(now, Generation(1), 1.0));
        assert!(!schedule.disappointed(now, Generation(1), 1.0));
        assert_eq!(schedule.held_until(now), None);
        assert!(schedule.disappointed(now, Generation(3), 1.0));
        assert_eq!(schedule.held_until(now), Some(now + secs(5)));
        assert!(!schedule.disappointed(now, Generation(3), 1.0));
        assert!(!schedule.disappointed(now, Generation(2), 1.0));
        assert!(schedule.disappointed(now, Generation(4), 1.0));
        assert_eq!(schedule.held_until(now), Some(now + secs(10)));
        schedule.proven();
        assert!(!schedule.disappointed(now, Generation(5), 1.0));
    }
}
