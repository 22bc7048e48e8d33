//! The dependencies are none that deny.toml bans: the floors hold without
//! cargo-deny too.

use std::path::Path;

fn read(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// A crate that must not be there, or only from this version on.
struct Ban {
    name: String,
    floor: Option<[u64; 3]>,
}

/// What stands between the first quotes after `key`.
fn quoted<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(key)?;
    rest.split('"').nth(1)
}

fn version(text: &str) -> [u64; 3] {
    let (core, _) = text.split_once(['-', '+']).unwrap_or((text, ""));
    let numbers: Vec<u64> = core.split('.').map(|number| number.parse().unwrap()).collect();
    numbers.try_into().unwrap_or_else(|_| panic!("{text} is not of the form 1.2.3"))
}

fn bans(deny: &str) -> Vec<Ban> {
    let (_, bans) = deny.split_once("\ndeny = [\n").unwrap();
    let (bans, _) = bans.split_once("\n]").unwrap();
    let crates = bans.lines().filter_map(|line| quoted(line, "{ crate = "));
    let ban = |text: &str| match text.split_once(":<") {
        Some((name, floor)) => Ban { name: name.to_owned(), floor: Some(version(floor)) },
        None => Ban { name: text.to_owned(), floor: None },
    };
    crates.map(ban).collect()
}

fn packages(lock: &str) -> Vec<(String, [u64; 3])> {
    let package = |text: &str| {
        (quoted(text, "name = ").unwrap().to_owned(), version(quoted(text, "version = ").unwrap()))
    };
    lock.split("[[package]]").skip(1).map(package).collect()
}

fn banned(deny: &str, lock: &str) -> Vec<String> {
    let bans = bans(deny);
    let hits = packages(lock).into_iter().filter(|(name, version)| {
        let mut bans = bans.iter().filter(|ban| ban.name == *name);
        bans.any(|ban| ban.floor.is_none_or(|floor| *version < floor))
    });
    hits.map(|(name, [a, b, c])| format!("{name} {a}.{b}.{c}")).collect()
}

#[test]
fn no_dependency_is_banned_or_below_its_floor() {
    let deny = read("deny.toml");
    let lock = read("Cargo.lock");
    assert!(bans(&deny).len() >= 15 && packages(&lock).len() > 100);
    assert_eq!(banned(&deny, &lock), Vec::<String>::new());
}

#[test]
fn an_old_version_and_a_banned_crate_are_told() {
    let entry = |name: &str, version: &str| {
        format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n")
    };
    let lock = [
        entry("h2", "0.4.15"),
        entry("h2", "0.4.16"),
        entry("dotenv", "0.15.0"),
        entry("aws-lc-sys", "0.38.0+x"),
        entry("bytes", "1.11.1"),
    ];
    let expected = ["h2 0.4.15", "dotenv 0.15.0", "aws-lc-sys 0.38.0"];
    assert_eq!(banned(&read("deny.toml"), &lock.concat()), expected);
}
