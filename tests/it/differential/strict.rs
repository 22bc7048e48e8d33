//! What the sidecar wrote to a server, read by the letter of RFC 9112: nothing that two readers
//! could take for different things is let pass.

use crate::support::http::text;

/// One request as the sidecar wrote it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) start: String,
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<(String, String)>,
    /// The body came to its end.
    pub(crate) whole: bool,
}

impl Seen {
    pub(crate) fn values(&self, name: &str) -> Vec<&str> {
        let same = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
        self.fields.iter().filter(same).map(|(_, value)| value.as_str()).collect()
    }
}

/// How the body of a request ends.
enum Length {
    Bytes(usize),
    Chunks,
}

/// The requests on a connection. Only the last may be cut short, and only in its body.
pub(crate) fn requests(bytes: &[u8]) -> Result<Vec<Seen>, String> {
    let mut reader = Reader { rest: bytes };
    let mut seen: Vec<Seen> = Vec::new();
    while !reader.rest.is_empty() {
        if seen.last().is_some_and(|last| !last.whole) {
            return Err(format!("bytes after a broken body: {:?}", text(reader.rest)));
        }
        seen.push(reader.request()?);
    }
    Ok(seen)
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn line(&mut self) -> Result<Option<String>, String> {
        let Some(end) = self.rest.windows(2).position(|pair| pair == b"\r\n") else {
            return Ok(None);
        };
        let line = &self.rest[..end];
        self.rest = &self.rest[end + 2..];
        let is_odd = |byte: &u8| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f;
        if line.iter().any(is_odd) {
            return Err(format!("a control byte in {:?}", text(line)));
        }
        Ok(Some(text(line)))
    }

    fn request(&mut self) -> Result<Seen, String> {
        let start = self.line()?.ok_or("a head without an end")?;
        check_start(&start)?;
        let fields = self.fields()?.ok_or("a head without an end")?;
        let mut seen = Seen { start, fields, ..Seen::default() };
        match length(&seen)? {
            Length::Bytes(length) => {
                let count = length.min(self.rest.len());
                let (body, rest) = self.rest.split_at(count);
                (seen.body, self.rest) = (body.to_vec(), rest);
                seen.whole = count == length;
            }
            Length::Chunks => seen.whole = self.chunks(&mut seen)?,
        }
        Ok(seen)
    }

    fn fields(&mut self) -> Result<Option<Vec<(String, String)>>, String> {
        let mut fields = Vec::new();
        while let Some(line) = self.line()? {
            if line.is_empty() {
                return Ok(Some(fields));
            }
            let (name, value) = line.split_once(':').ok_or(format!("no field: {line:?}"))?;
            if !is_token(name) {
                return Err(format!("no name of a field: {line:?}"));
            }
            fields.push((name.to_owned(), value.trim_matches([' ', '\t']).to_owned()));
        }
        Ok(None)
    }

    /// Whether the body came to its end.
    fn chunks(&mut self, seen: &mut Seen) -> Result<bool, String> {
        while let Some(line) = self.line()? {
            if line.is_empty() || !line.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(format!("no size of a chunk: {line:?}"));
            }
            let size = usize::from_str_radix(&line, 16).map_err(|error| error.to_string())?;
            if size == 0 {
                let trailers = self.fields()?;
                let whole = trailers.is_some();
                seen.trailers = trailers.unwrap_or_default();
                return Ok(whole);
            }
            if self.rest.len() < size + 2 {
                break;
            }
            let (chunk, rest) = self.rest.split_at(size);
            seen.body.extend_from_slice(chunk);
            self.rest = rest.strip_prefix(b"\r\n").ok_or("a chunk that does not end")?;
        }
        self.rest = &[];
        Ok(false)
    }
}

fn check_start(start: &str) -> Result<(), String> {
    let words: Vec<&str> = start.split(' ').collect();
    match words[..] {
        [method, target, "HTTP/1.1"] if is_token(method) && !target.is_empty() => Ok(()),
        _ => Err(format!("no request line: {start:?}")),
    }
}

fn length(seen: &Seen) -> Result<Length, String> {
    match (&seen.values("content-length")[..], &seen.values("transfer-encoding")[..]) {
        ([], []) => Ok(Length::Bytes(0)),
        ([], ["chunked"]) => Ok(Length::Chunks),
        ([length], []) if length.bytes().all(|byte| byte.is_ascii_digit()) => {
            length.parse().map(Length::Bytes).map_err(|error| format!("{length:?}: {error}"))
        }
        (lengths, codings) => Err(format!("lengths {lengths:?}, codings {codings:?}")),
    }
}

fn is_token(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

#[test]
fn strict_reader_lets_nothing_pass_that_can_be_read_in_two_ways() {
    let count = |bytes: &str| requests(bytes.as_bytes()).map(|seen| seen.len());
    let two = "POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nGETGET / HTTP/1.1\r\n\r\n";
    assert_eq!(count(two), Ok(2));
    let chunked =
        "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: 1\r\n\r\n";
    assert_eq!(count(chunked), Ok(1));
    for odd in [
        "GET / HTTP/1.1\r\nA : 1\r\n\r\n",
        "GET / HTTP/1.1\nHost: x\r\n\r\n",
        "GET / HTTP/1.1\r\nA: 1\r\n 2\r\n\r\n",
        "GET / HTTP/1.1\r\nA: 1\rB: 2\r\n\r\n",
        "GET  / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        "POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;x\r\na\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost",
    ] {
        assert!(count(odd).is_err(), "{odd:?}");
    }
}
