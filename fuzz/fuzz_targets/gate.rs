//! Heads of requests: the verdict does not depend on how the bytes are cut
//! into reads, and nothing passes that no proxy may forward. What hyper reads
//! is read here a second time, by its parser alone.
//!
//! Input: how many cuts, padding, the cuts, then the bytes of the connection.
#![no_main]

use httparse::Status;
use libfuzzer_sys::fuzz_target;
use token_sidecar::fuzzing::{Judged, judge_heads};
use tokio::runtime::{Builder, Runtime};

/// The bytes, whole and in reads.
fn plan(data: &[u8]) -> Option<(Vec<u8>, Vec<Vec<u8>>)> {
    let [count, padding, data @ ..] = data else {
        return None;
    };
    let (cuts, bytes) = data.split_at_checked(usize::from(count % 8) * 2)?;
    let bytes = padded(bytes, *padding);
    let (mut reads, mut rest) = (Vec::new(), &bytes[..]);
    for at in cuts.chunks(2) {
        let at = usize::from(u16::from_le_bytes([at[0], at[1]])) % (rest.len() + 1);
        let (read, after) = rest.split_at(at);
        reads.push(read.to_vec());
        rest = after;
    }
    reads.push(rest.to_vec());
    // An empty read would be the end of the stream.
    reads.retain(|read| !read.is_empty());
    Some((bytes, reads))
}

/// The bytes with some KiB of blanks before the first value, which no parser
/// counts as part of it.
fn padded(bytes: &[u8], padding: u8) -> Vec<u8> {
    let place = bytes.windows(2).position(|pair| pair == b": ").filter(|_| padding > 0x7f);
    let (before, after) = bytes.split_at(place.map_or(0, |at| at + 2));
    let blanks = place.map_or(0, |_| usize::from(padding & 0x7f) * 1024);
    [before, &vec![b' '; blanks], after].concat()
}

fn parse<'a, 'b>(
    bytes: &'a [u8],
    fields: &'b mut [httparse::Header<'a>],
) -> Option<(httparse::Request<'b, 'a>, usize)> {
    let mut request = httparse::Request::new(fields);
    match request.parse(bytes) {
        Ok(Status::Complete(length)) => Some((request, length)),
        _ => None,
    }
}

/// All values of the field `name`.
fn values<'a>(request: &httparse::Request<'_, 'a>, name: &str) -> Vec<&'a [u8]> {
    let named = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case(name));
    named.map(|field| field.value.trim_ascii()).collect()
}

fn check_passed(request: &httparse::Request<'_, '_>, judged: &Judged) {
    let (method, target) = (request.method.expect("a method"), request.path.expect("a target"));
    assert!(!target.contains('#'), "a fragment passed: {target}");
    let url = target.split_once("://").filter(|_| !target.starts_with('/'));
    let authority = url.map_or("", |(_, rest)| rest);
    let authority = authority.split(['/', '?']).next().unwrap_or_default();
    assert!(!authority.contains('@'), "credentials passed: {target}");
    check_authority(authority);
    let (codings, lengths) =
        (values(request, "transfer-encoding"), values(request, "content-length"));
    // Of equal lengths hyper keeps one.
    let fields = request.headers.len() - lengths.len().saturating_sub(1);
    assert!(fields <= 100 && target.len() <= 33 * 1024);
    assert!(codings.is_empty() || lengths.is_empty(), "two lengths passed");
    assert!(codings.is_empty() || (codings.len() == 1 && request.version == Some(1)));
    assert!(codings.iter().all(|coding| coding.eq_ignore_ascii_case(b"chunked")));
    assert!(lengths.windows(2).all(|pair| pair[0] == pair[1]));
    let hosts = values(request, "host");
    if method != "CONNECT" {
        let wanted = if request.version == Some(1) { 1..=1 } else { 0..=1 };
        assert!(wanted.contains(&hosts.len()), "{} Host fields passed", hosts.len());
        hosts.iter().for_each(|host| check_authority(&String::from_utf8_lossy(host)));
    }
    let is_url = !authority.is_empty();
    let fits = match method {
        "CONNECT" => !is_url && judged.address.is_some(),
        "OPTIONS" => is_url || target.starts_with('/') || target == "*",
        _ => is_url || target.starts_with('/'),
    };
    assert!(fits, "{method} {target}");
}

/// A host is a name or an IPv6 address in brackets; behind it is nothing but
/// a port.
fn check_authority(text: &str) {
    let end = if text.starts_with('[') { text.find(']').map(|at| at + 1) } else { text.find(':') };
    let (host, port) = text.split_at(end.unwrap_or(text.len()));
    assert!(!text.contains(['@', '/', '?', '#', '\\', ' ']), "{text}");
    assert!(port.is_empty() || port[1..].bytes().all(|byte| byte.is_ascii_digit()), "{text}");
    let inner = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    assert!(inner.is_none_or(|it| it.parse::<std::net::Ipv6Addr>().is_ok()), "{text}");
    assert!(inner.is_some() || !host.contains(['[', ']', ':']), "{text}");
}

/// Checks what passed, head after head, and says of how many the verdict must
/// not depend on the cuts: behind a chunked body, or where another protocol
/// may begin, it may.
fn check_all(bytes: &[u8], judged: &[Judged]) -> usize {
    let mut at = 0;
    for (index, one) in judged.iter().enumerate() {
        let mut fields = [httparse::EMPTY_HEADER; 200];
        if one.status != 200 {
            return index + 1;
        }
        let (request, length) = parse(&bytes[at..], &mut fields).expect("hyper took it");
        check_passed(&request, one);
        let opaque = request.method == Some("CONNECT")
            || !values(&request, "transfer-encoding").is_empty()
            || !values(&request, "upgrade").is_empty();
        if opaque {
            return index + 1;
        }
        let body = values(&request, "content-length")
            .first()
            .map_or(0, |length| str::from_utf8(length).expect("digits").parse().expect("a number"));
        at += length;
        match bytes.len().checked_sub(at) {
            Some(left) if left > body => at += body,
            _ => break,
        }
    }
    judged.len()
}

fn run(runtime: &Runtime, reads: Vec<Vec<u8>>) -> Vec<Judged> {
    runtime.block_on(judge_heads(reads))
}

fuzz_target!(|data: &[u8]| {
    let Some((bytes, reads)) = plan(data).filter(|(bytes, _)| !bytes.is_empty()) else {
        return;
    };
    let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
    let whole = run(&runtime, vec![bytes.clone()]);
    let in_pieces = run(&runtime, reads.clone());
    let count = check_all(&bytes, &whole);
    let first = |judged: &[Judged]| judged.iter().take(count).cloned().collect::<Vec<_>>();
    assert_eq!(first(&whole), first(&in_pieces), "cut like this: {:?}", Shown(&reads));
});

struct Shown<'a>(&'a [Vec<u8>]);

impl std::fmt::Debug for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|read| String::from_utf8_lossy(read))).finish()
    }
}
