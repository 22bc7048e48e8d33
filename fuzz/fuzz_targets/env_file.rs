//! The env file: setting the token leaves all other lines as they are, byte
//! for byte; the value reads back, here and as a setting; doing it twice does
//! nothing more; in place no other byte moves.
#![no_main]

use libfuzzer_sys::fuzz_target;
use token_sidecar::fuzzing::{changed_bytes, env_of, env_token, with_env_token};
use token_sidecar::token::Token;

const VARIABLE: &[u8] = b"CHITAI_GOROD_BEARER_TOKEN";
const ONE: &str = "eyJhIjoxfQ.eyJleHAiOjF9.c2ln";
const OTHER: &str = "eyJiIjoyfQ.eyJleHAiOjJ9.b3Ro";

/// `@1` and `@2` stand for the tokens, `@v` for the variable.
fn with_words(data: &[u8]) -> Vec<u8> {
    let mut content = Vec::new();
    let mut bytes = data.iter();
    while let Some(byte) = bytes.next() {
        match (byte, bytes.as_slice().first()) {
            (b'@', Some(b'1')) => content.extend(ONE.bytes()),
            (b'@', Some(b'2')) => content.extend(OTHER.bytes()),
            (b'@', Some(b'v')) => content.extend(VARIABLE),
            _ => {
                content.push(*byte);
                continue;
            }
        }
        bytes.next();
    }
    content
}

fn lines(content: &[u8]) -> Vec<&[u8]> {
    content.split_inclusive(|byte| *byte == b'\n').collect()
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn ending(line: &[u8]) -> &[u8] {
    let text = line.strip_suffix(b"\n").unwrap_or(line);
    &line[text.strip_suffix(b"\r").unwrap_or(text).len()..]
}

/// What of a changed line must stay: all up to the `=`, the end of the line,
/// and a comment behind a quoted value.
fn check_changed(old: &[u8], new: &[u8], token: &Token) {
    let equals = old.iter().position(|byte| *byte == b'=').expect("an assignment");
    assert!(contains(&old[..equals], VARIABLE), "{:?}", String::from_utf8_lossy(old));
    assert!(new.starts_with(&old[..=equals]));
    assert_eq!(ending(old), ending(new));
    assert!(contains(new, token.expose().as_bytes()));
}

fn check_lines(old: &[u8], new: &[u8], token: &Token) {
    let (old_lines, new_lines) = (lines(old), lines(new));
    let added = new_lines.len() - old_lines.len();
    assert!(added <= 1);
    for (index, (old, new)) in old_lines.iter().zip(&new_lines).enumerate() {
        // A last line without an end gets one when a line is added.
        let grown = added == 1 && index + 1 == old_lines.len() && !old.ends_with(b"\n");
        if !grown && old != new {
            assert_eq!(added, 0, "a line is added only where there was none");
            check_changed(old, new, token);
        }
        let end = new.strip_prefix(*old);
        assert!(!grown || end == Some(b"\n") || end == Some(b"\r\n"));
    }
    if added == 1 {
        let expected = [VARIABLE, b"=\"", token.expose().as_bytes(), b"\""].concat();
        assert!(new_lines.last().is_some_and(|line| line.starts_with(&expected)));
    }
}

fn check_as_a_setting(content: &[u8], token: &Token) {
    let text = String::from_utf8_lossy(content);
    // What only Unicode takes for a blank, the two need not agree on.
    if text.contains(|c: char| c.is_whitespace() && !c.is_ascii_whitespace()) {
        return;
    }
    // A line of another of our variables may be broken.
    if let Ok(env) = env_of(&[], &text) {
        let given = env.given("CHITAI_GOROD_BEARER_TOKEN").and_then(|it| Token::parse(it).ok());
        assert_eq!(given.as_ref(), Some(token), "{text:?}");
    }
}

fn check(content: &[u8], token: &Token, other: &Token, in_place: bool) {
    let Some(new) = with_env_token(content, token, in_place) else {
        assert_eq!(env_token(content).as_ref(), Some(token));
        return;
    };
    assert_eq!(env_token(&new).as_ref(), Some(token), "{:?}", String::from_utf8_lossy(&new));
    check_lines(content, &new, token);
    check_as_a_setting(&new, token);
    assert_eq!(with_env_token(&new, token, in_place), None);
    if !in_place {
        return;
    }
    assert!(new.len() >= content.len());
    let changed = changed_bytes(content, &new);
    let mut written = content.to_vec();
    written.resize(written.len().max(changed.end), 0);
    written[changed.clone()].copy_from_slice(&new[changed]);
    assert_eq!(written, new);
    // A token of the same length then moves nothing.
    let next = with_env_token(&new, other, true).expect("another token");
    assert_eq!(next.len(), new.len());
}

fuzz_target!(|data: &[u8]| {
    let content = with_words(data);
    let token = |text| Token::parse(text).expect("a token");
    let (one, other) = (token(ONE), token(OTHER));
    check(&content, &one, &other, false);
    check(&content, &one, &other, true);
});
