//! The ClientHello: the name is the one that is written there, however the
//! bytes are cut into reads, and nothing that is no name passes.
//!
//! Input: a byte that says how it goes on; the cuts; then either the bytes of
//! the connection, or the name and extensions of a hello that is made here.
#![no_main]

use libfuzzer_sys::fuzz_target;
use token_sidecar::fuzzing::hello_name;

/// `text` with its length before it.
fn sized(width: usize, text: &[u8]) -> Vec<u8> {
    let length = (text.len() as u64).to_be_bytes();
    [&length[8 - width..], text].concat()
}

/// A whole ClientHello in records of at most `longest` bytes.
fn hello(name: &[u8], extension: &[u8], longest: usize) -> Vec<u8> {
    let entry = [&[0][..], &sized(2, name)].concat();
    let names = [&[0, 0][..], &sized(2, &sized(2, &entry))].concat();
    // signature_algorithms and supported_groups, without which rustls reads on to no end.
    let algorithms = [&[0, 13][..], &sized(2, &sized(2, &[4, 3, 8, 4]))].concat();
    let groups = [&[0, 10][..], &sized(2, &sized(2, &[0, 29]))].concat();
    let other = match extension.split_first_chunk::<2>() {
        Some((kind, rest)) => [kind, &sized(2, rest)[..]].concat(),
        None => Vec::new(),
    };
    let extensions = [names, algorithms, groups, other].concat();
    let body = [
        &[3, 3][..],
        &[7; 32],
        &sized(1, &[]),
        &sized(2, &[0x13, 1, 0xc0, 0x2f]),
        &sized(1, &[0]),
        &sized(2, &extensions),
    ]
    .concat();
    let message = [&[1][..], &sized(3, &body)].concat();
    let records = message.chunks(longest).map(|part| [&[22, 3, 1][..], &sized(2, part)].concat());
    records.collect::<Vec<_>>().concat()
}

fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|byte| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_')
            })
    };
    name.len() <= 253 && name.split('.').all(label)
}

fn check(bytes: &[u8], cuts: &[u8]) -> Result<Option<String>, String> {
    let whole = hello_name(&[bytes]);
    let (mut reads, mut rest) = (Vec::new(), bytes);
    for cut in cuts {
        let (read, after) = rest.split_at(usize::from(*cut).min(rest.len()));
        reads.push(read);
        rest = after;
    }
    reads.push(rest);
    assert_eq!(hello_name(&reads), whole, "cut by {cuts:?}");
    if let Ok(Some(name)) = &whole {
        assert!(is_name(name), "{name:?}");
        let written = bytes.to_ascii_lowercase();
        let is_there = written.windows(name.len()).any(|part| part == name.as_bytes());
        // A name may lie across two records.
        assert!(is_there || bytes.windows(3).filter(|part| part[..2] == [22, 3]).count() > 1);
    }
    whole
}

fuzz_target!(|data: &[u8]| {
    let [how, count, rest @ ..] = data else {
        return;
    };
    let Some((cuts, rest)) = rest.split_at_checked(usize::from(count % 16)) else {
        return;
    };
    if how % 2 == 0 {
        let _ = check(rest, cuts);
        return;
    }
    let mut parts = rest.splitn(2, |byte| *byte == 0);
    let name = parts.next().unwrap_or_default();
    let extension = parts.next().unwrap_or_default();
    let longest = if how % 4 == 1 { 1 << 14 } else { usize::from(how / 4) + 1 };
    if name.len() > 1000 || extension.len() > 10_000 {
        return;
    }
    let found = check(&hello(name, extension, longest), cuts);
    if let Ok(found) = found {
        let found = found.expect("the hello is whole");
        let written = std::str::from_utf8(name).expect("a name is ASCII").to_ascii_lowercase();
        assert_eq!(found, written.strip_suffix('.').unwrap_or(&written));
    } else if extension.is_empty() && name.len() > 3 {
        let text = std::str::from_utf8(name).unwrap_or_default();
        let plain = |c: char| c.is_ascii_lowercase();
        assert!(!text.chars().all(plain) || text.is_empty() || text.len() > 63, "{found:?}");
    }
});
