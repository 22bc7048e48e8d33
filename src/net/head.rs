//! The bytes of a message's head.

/// Where the head ends, its empty line included; lines may end in a bare LF
/// (RFC 9112 §2.2).
#[must_use]
pub fn end_of_head(bytes: &[u8]) -> Option<usize> {
    memchr::memchr_iter(b'\n', bytes).find_map(|at| match bytes[at + 1..] {
        [b'\n', ..] => Some(at + 2),
        [b'\r', b'\n', ..] => Some(at + 3),
        _ => None,
    })
}

/// The lines of `head`, without the line feeds.
pub fn lines(head: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut from = 0;
    memchr::memchr_iter(b'\n', head).map(move |at| &head[std::mem::replace(&mut from, at + 1)..at])
}

/// Whether `line`, with or without its line feed, is the empty one that ends a head.
#[must_use]
pub fn is_blank(line: &[u8]) -> bool {
    matches!(line, b"" | b"\r" | b"\n" | b"\r\n")
}
