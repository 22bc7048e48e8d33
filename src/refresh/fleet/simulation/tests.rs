//! Histories, and faults that they have to show.

use super::*;

/// Histories of a usual run; the test that is ignored by default has the rest.
const SEEDS: u64 = 120;

/// What has to happen in these, time and again.
const HAPPENS: [&str; 10] = [
    "committed token adopted",
    "shared token adopted",
    "foreign token adopted",
    "expired token in force",
    "refusal elsewhere minded",
    "stale writer refused",
    "two believe in leases",
    "lease handed on",
    "request served",
    "request passed on",
];

fn simulate(seed: u64, fault: Fault) -> World {
    World::new(seed, fault, true).run()
}

/// What the history of a seed shows, if it does not go well.
fn shown_by(seed: u64, fault: Fault) -> Option<String> {
    let panicked = std::panic::catch_unwind(|| drop(simulate(seed, fault))).err()?;
    let text = panicked.downcast_ref::<String>().map(String::as_str);
    let text = text.or(panicked.downcast_ref::<&str>().copied());
    Some(format!("seed {seed}: {}", text.unwrap_or_default()))
}

fn check_shown(fault: Fault, invariant: &str) {
    let shown = (0..SEEDS).find_map(|seed| shown_by(seed, fault)).expect("no seed shows it");
    assert!(shown.contains(invariant), "{shown}");
}

#[test]
fn whatever_goes_wrong_nothing_goes_backwards_and_all_agree_in_the_end() {
    let mut tally = BTreeMap::new();
    for seed in 0..SEEDS {
        println!("seed {seed}");
        for (what, count) in simulate(seed, Fault::None).tally {
            *tally.entry(what).or_insert(0) += count;
        }
    }
    println!("{tally:#?}");
    for what in HAPPENS {
        assert!(tally.get(what).is_some_and(|count| *count > 2), "{what}: {tally:#?}");
    }
}

#[test]
#[ignore = "takes minutes"]
fn ten_thousand_histories_go_well() {
    let shown: Vec<_> = (0..10_000).filter_map(|seed| shown_by(seed, Fault::None)).collect();
    assert!(shown.is_empty(), "{} went wrong: {shown:#?}", shown.len());
}

#[test]
fn a_commit_without_fencing_is_found() {
    check_shown(Fault::Redis(Flaw::Unfenced), "has written after epoch");
}

#[test]
fn a_commit_in_place_of_a_newer_token_is_found() {
    check_shown(Fault::Redis(Flaw::Ageless), "gave way to the older");
}

#[test]
fn an_epoch_that_is_granted_twice_is_found() {
    check_shown(Fault::Redis(Flaw::Epochless), "two holders of epoch");
}

#[test]
fn a_lease_that_never_lapses_is_found() {
    check_shown(Fault::Redis(Flaw::Immortal), "a request has waited in vain");
}

#[test]
fn two_members_that_believe_in_the_same_lease_are_found() {
    check_shown(Fault::Usurping, "believes");
}

#[test]
fn a_member_that_forgets_refusals_is_found() {
    check_shown(Fault::Forgetful, "is adopted where it was refused");
}

#[test]
fn a_member_that_does_not_hear_of_refusals_is_found() {
    check_shown(Fault::Deaf, "is adopted where its refusal was heard of");
}

#[test]
fn a_member_that_takes_expired_tokens_is_found() {
    check_shown(Fault::Timeless, "has expired and is put in force");
}

#[test]
fn a_member_that_believes_other_programs_is_found() {
    check_shown(Fault::Credulous, "is dead and counts as verified");
}

#[test]
fn a_wait_for_notices_alone_is_found() {
    check_shown(Fault::Trusting, "a request has waited in vain");
}

#[test]
fn in_quiet_times_one_solve_serves_the_fleet() {
    for seed in 0..20 {
        let world = World::new(seed, Fault::None, false).run();
        assert_eq!(world.solves, 1, "seed {seed}");
    }
}

/// Another program writes in quiet times; half a minute later all agree again.
fn after_a_write_of(foreign: Foreign, seed: u64) -> (Option<Token>, World) {
    let mut world = World::new(seed, Fault::None, false).run_until(100_000);
    world.check_agreement();
    world.write(foreign);
    let written = stored(&world.server);
    let world = world.run_until(130_000);
    world.check_agreement();
    (written, world)
}

#[test]
fn another_programs_new_token_is_everybodys_within_half_a_minute() {
    for seed in 0..20 {
        let (written, world) = after_a_write_of(Foreign::Newer, seed);
        assert_eq!(written, stored(&world.server), "seed {seed}");
        assert_eq!(world.solves, 1, "seed {seed}");
    }
}

#[test]
fn what_another_program_spoils_is_written_again_within_half_a_minute() {
    let spoiled = [Foreign::Dead, Foreign::Expired, Foreign::Rubbish, Foreign::Deletes];
    for (seed, foreign) in (0..20).zip(spoiled.into_iter().cycle()) {
        let (written, world) = after_a_write_of(foreign, seed);
        assert_ne!(written, stored(&world.server), "seed {seed}, {foreign:?}");
        assert_eq!(world.solves, 1, "seed {seed}, {foreign:?}");
    }
}
