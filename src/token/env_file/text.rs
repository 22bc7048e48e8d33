//! The line of an env file that sets the token, in a text of bytes.
//!
//! # Invariants
//!
//! - Bytes of other lines are never changed, in whatever encoding they are.
//! - A line is found in any notation that dotenv readers accept: with `export`,
//!   spaces around `=`, either quote or none, a comment behind.

use std::{ops::Range, str};

use super::Token;

/// The variable that the line sets.
pub(super) const VARIABLE: &str = "CHITAI_GOROD_BEARER_TOKEN";

const SCHEME: &[u8] = b"Bearer ";
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// How long a rewritten line is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Length {
    /// As long as it comes out.
    Natural,
    /// Filled with spaces, so as not to be shorter than the line it replaces.
    /// A new value of the same or a lesser length then moves no other byte.
    AtLeastOld,
}

/// A line that sets the variable, cut into pieces.
struct Assignment<'a> {
    /// Up to the value or its opening quote.
    before: &'a [u8],
    /// The value without quotes.
    value: &'a [u8],
    /// With the blanks before it, or empty.
    comment: &'a [u8],
    /// `\n`, `\r\n` or nothing.
    ending: &'a [u8],
}

/// The value that is in effect, of several the last.
pub(crate) fn value(content: &[u8]) -> Option<&[u8]> {
    let assignments = lines(content).filter_map(Assignment::read);
    assignments.last().map(|assignment| assignment.value)
}

/// The content with every line of the variable set to `token`; a line is added
/// where there was none. `None` where all of them have that token already.
///
/// Dotenv readers differ on which of several lines counts, so all are set.
pub(crate) fn with_token(content: &[u8], token: &Token, length: Length) -> Option<Vec<u8>> {
    let assignments: Vec<_> = lines(content).filter_map(Assignment::read).collect();
    if assignments.is_empty() {
        return Some(with_line_added(content, token));
    }
    if assignments.iter().all(|a| parsed(a.value).as_ref() == Some(token)) {
        return None;
    }
    let mut new = Vec::with_capacity(content.len() + token.expose().len());
    for line in lines(content) {
        match Assignment::read(line) {
            Some(assignment) => assignment.write(token, line.len(), length, &mut new),
            None => new.extend_from_slice(line),
        }
    }
    Some(new)
}

/// The token in a value.
pub(crate) fn parsed(value: &[u8]) -> Option<Token> {
    Token::parse(str::from_utf8(value).ok()?).ok()
}

/// The bytes of `new` that differ from `old`, which is not longer.
pub(crate) fn changed(old: &[u8], new: &[u8]) -> Range<usize> {
    let same = |(a, b): &(&u8, &u8)| a == b;
    let start = old.iter().zip(new).take_while(same).count();
    if old.len() != new.len() {
        return start..new.len();
    }
    let tail = old[start..].iter().rev().zip(new[start..].iter().rev());
    start..new.len() - tail.take_while(same).count()
}

impl<'a> Assignment<'a> {
    fn read(line: &'a [u8]) -> Option<Self> {
        let (text, ending) = split_ending(line);
        let name = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
        let name = without_export(name.trim_ascii_start());
        let equals = name.strip_prefix(VARIABLE.as_bytes())?.trim_ascii_start();
        let rest = equals.strip_prefix(b"=")?.trim_ascii_start();
        let (value, after) = split_value(rest);
        let is_comment = after.trim_ascii_start().starts_with(b"#");
        Some(Self {
            before: &text[..text.len() - rest.len()],
            value,
            comment: if is_comment { after.trim_ascii_end() } else { b"" },
            ending,
        })
    }

    fn write(&self, token: &Token, old_length: usize, length: Length, new: &mut Vec<u8>) {
        let start = new.len();
        new.extend_from_slice(self.before);
        new.push(b'"');
        if starts_with_scheme(self.value) {
            new.extend_from_slice(SCHEME);
        }
        new.extend_from_slice(token.expose().as_bytes());
        new.push(b'"');
        if self.comment.starts_with(b"#") {
            new.push(b' ');
        }
        new.extend_from_slice(self.comment);
        if length == Length::AtLeastOld {
            let filled = start + old_length - self.ending.len();
            new.resize(filled.max(new.len()), b' ');
        }
        new.extend_from_slice(self.ending);
    }
}

fn lines(content: &[u8]) -> impl Iterator<Item = &[u8]> {
    content.split_inclusive(|byte| *byte == b'\n')
}

fn split_ending(line: &[u8]) -> (&[u8], &[u8]) {
    let text = line.strip_suffix(b"\n").unwrap_or(line);
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    line.split_at(text.len())
}

fn without_export(text: &[u8]) -> &[u8] {
    match text.strip_prefix(b"export") {
        Some(rest) if rest.starts_with(b" ") || rest.starts_with(b"\t") => rest.trim_ascii_start(),
        _ => text,
    }
}

/// The value without its quotes, and what follows it.
fn split_value(rest: &[u8]) -> (&[u8], &[u8]) {
    let Some((quote @ (b'"' | b'\''), inner)) = rest.split_first() else {
        let value = rest[..comment_start(rest)].trim_ascii_end();
        return (value, &rest[value.len()..]);
    };
    match inner.iter().position(|byte| byte == quote) {
        Some(end) => (&inner[..end], &inner[end + 1..]),
        None => (inner.trim_ascii_end(), b""),
    }
}

/// Where a comment behind a value without quotes begins: a `#` after a blank.
fn comment_start(rest: &[u8]) -> usize {
    if rest.starts_with(b"#") {
        return 0;
    }
    let blank = |pair: &[u8]| pair[0].is_ascii_whitespace() && pair[1] == b'#';
    rest.windows(2).position(blank).unwrap_or(rest.len())
}

fn starts_with_scheme(value: &[u8]) -> bool {
    let word = value.get(..SCHEME.len());
    word.is_some_and(|word| word.eq_ignore_ascii_case(SCHEME))
}

fn with_line_added(content: &[u8], token: &Token) -> Vec<u8> {
    let ending: &str = match lines(content).next().map(split_ending) {
        Some((_, b"\r\n")) => "\r\n",
        _ => "\n",
    };
    let mut new = content.to_vec();
    if !content.is_empty() && !content.ends_with(b"\n") {
        new.extend_from_slice(ending.as_bytes());
    }
    let line = format!("{VARIABLE}=\"{}\"{ending}", token.expose());
    new.extend_from_slice(line.as_bytes());
    new
}
