//! Request streams as attackers send them: each made from a seed, and what must become of each
//! message in it.

use fastrand::Rng;

/// How a stream comes to the sidecar, and thus how its targets are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// `GET http://address/…` for a host that is not the API's.
    Passthrough,
    /// `GET https://api/…`
    Absolute,
    /// `GET /prefix/…`
    Gateway,
    /// CONNECT to the API, then TLS.
    Intercept,
    /// CONNECT to port 80 of the API, then plain HTTP.
    PlainTunnel,
}

/// Where a stream goes.
#[derive(Clone, Debug)]
pub(crate) struct Goal {
    /// Host and port of the server as another host.
    pub(crate) address: String,
    /// Its name as an API host, and the prefix of its paths.
    pub(crate) api: &'static str,
    pub(crate) prefix: &'static str,
}

/// What must become of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fate {
    /// It arrives, and the next message starts where this one ends.
    Arrives,
    /// Whatever the sidecar takes it for, the server takes it for the same.
    Agreed,
    /// Its head may arrive; nothing that comes after it may.
    Breaks,
    /// It does not arrive; what comes after it may.
    Declined,
    /// It does not arrive, nor does anything that comes after it.
    Refused,
}

/// A message as it is sent.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) key: String,
    pub(crate) fate: Fate,
    /// Its body without its coding; `None` where that is in doubt.
    pub(crate) body: Option<Vec<u8>>,
    /// What was done to it.
    pub(crate) changes: Vec<String>,
}

/// A connection's worth of messages.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    pub(crate) seed: u64,
    pub(crate) way: Way,
    pub(crate) messages: Vec<Message>,
    pub(crate) bytes: Vec<u8>,
    /// Where the bytes are cut into writes.
    pub(crate) cuts: Vec<usize>,
    /// Heads in it, those inside bodies among them.
    pub(crate) heads: usize,
}

const WAYS: [Way; 8] = [
    Way::Passthrough,
    Way::Passthrough,
    Way::Passthrough,
    Way::Intercept,
    Way::Intercept,
    Way::Absolute,
    Way::Gateway,
    Way::PlainTunnel,
];

const METHODS: [&str; 8] = ["GET", "GET", "POST", "POST", "PUT", "PATCH", "DELETE", "HEAD"];

/// Lines that no server may ever see: each lets two readers see two messages.
const REFUSED_LINES: [&[u8]; 40] = [
    b"X-Space : 1",
    b"Content-Length : 3",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding\t: chunked",
    b"X-Fold: 1\r\n 2",
    b"X-Fold: 1\r\n\tTransfer-Encoding: chunked",
    b"X-Null: a\0b",
    b"X-Null: a\0\r\nTransfer-Encoding: chunked\0",
    b"X-Cr: a\rb",
    b"X-Cr: a\rContent-Length: 3",
    b"X-Cr: 1\r\r\nX-Next: 2",
    b"X\0Null: 1",
    b"no colon here",
    b"GET /smuggled HTTP/1.1",
    b": no name",
    b"X-Bell: \x07",
    b"X-Del: \x7f",
    b"X-Tab\x0b: 1",
    b"Na me: 1",
    b"X-\xffn: 1",
    b"Content-Length: -1",
    b"Content-Length: +5",
    b"Content-Length: 0x5",
    b"Content-Length: 5 5",
    b"Content-Length: 5;x",
    b"Content-Length: 5,6",
    b"Content-Length: 18446744073709551617",
    b"Content-Length:",
    b"Content-Length: \x0b5",
    b"Host: second.test",
    b"hOST: second.test",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunked;x",
    b"Transfer-Encoding: \"chunked\"",
    b"Transfer-Encoding: chunked, gzip",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding: chu\xffnked",
];

/// Lines with which a message arrives; most of them must not.
const PASSED_LINES: [&[u8]; 36] = [
    b"Proxy-Authorization: Basic eDp5",
    b"Proxy-Connection: keep-alive",
    b"PROXY-CONNECTION: close",
    b"Proxy-Authenticate: Basic",
    b"Proxy-Authentication-Info: x",
    b"Keep-Alive: timeout=5",
    b"TE: trailers",
    b"TE: trailers, deflate;q=0.5",
    b"TE: deflate\r\nTE: trailers",
    b"te: trailers;q=1",
    b"Connection: keep-alive, X-Named-1\r\nX-Named-1: 1",
    b"Connection: x-named-1\t,\tX-NAMED-2\r\nX-Named-1: 1\r\nx-named-2: 2",
    b"X-Named-3: 1\r\nConnection: keep-alive\r\nConnection: ,,x-named-3,",
    b"Connection: \xff, x-named-4\r\nX-Named-4: 1",
    b"Connection: x-named-5, \"a, b\"\r\nX-Named-5: 1",
    b"Connection: content-length, host",
    b"Connection: authorization, cookie\r\nAuthorization: Basic eDp5\r\nCookie: a=1",
    b"Connection: proxy-authorization, transfer-encoding",
    b"Connection: TE\r\nTE: trailers",
    b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nConnection: Upgrade, HTTP2-Settings",
    b"Upgrade: TLS/1.2",
    b"Trailer: X-Sum, Authorization",
    b"Transfer_Encoding: chunked",
    b"Content_Length: 3",
    b"X-Transfer-Encoding: chunked",
    b"X-Text: \xff\xfe caf\xc3\xa9",
    b"X-Empty:",
    b"X-Empty:   ",
    b"X-Tabs:\ta\t\t",
    b"x-colons: a:b: c",
    b"Authorization: Basic eDp5",
    b"Cookie: access-token=Bearer%20x; a=1\r\nCookie: b=2",
    b"Via: 1.0 somebody\r\nX-Forwarded-For: 10.0.0.1",
    b"Max-Forwards: 0",
    b"Range: bytes=0-1\r\nIf-Range: \"x\"",
    b"X-Http-Method-Override: DELETE\r\nX-Original-Url: /smuggled",
];

/// Lines of which the two sides need only think the same.
const AGREED_LINES: [&[u8]; 15] = [
    b"Content-Length: 05",
    b"Content-Length: 5,5",
    b"Content-Length: 5, 5",
    b"Content-Length: \t5\t",
    b"Transfer-Encoding: chunked,",
    b"Transfer-Encoding: , chunked",
    b"Transfer-Encoding:",
    b"Expect: 100-continue",
    b"Expect: 200-ok",
    b"Connection: close",
    b"Connection: close, X-Named-6\r\nX-Named-6: 1",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA==",
    b"X-Lf: a\nX-More: b",
    b"X-Early: 1",
    b"Authorization: Bearer one\r\nauthorization: Bearer two",
];

/// What may stand before the query of a target that arrives as it is.
const ODD_PATHS: [&str; 12] = [
    "/%zz",
    "/%",
    "/%00",
    "/%0d%0aX:1",
    "//x",
    "/../../x",
    "/./x",
    "/\\x",
    "/|x",
    "/;a=1",
    "/%2e%2e/",
    "/?a=b?c&%%",
];

struct Draft {
    method: String,
    target: Vec<u8>,
    version: &'static str,
    /// Instead of the three above.
    request_line: Option<Vec<u8>>,
    host: Option<Vec<u8>>,
    lines: Vec<Vec<u8>>,
    before: Vec<u8>,
    after: Vec<u8>,
    body: Body,
    content: Option<Vec<u8>>,
    fate: Fate,
    changes: Vec<String>,
    /// Which line, if any, ends in a bare LF.
    bare: Option<usize>,
    /// No more changes: they might undo each other.
    done: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Framing {
    None,
    Length,
    Chunked,
}

struct Body {
    framing: Framing,
    coding: &'static [u8],
    /// The body as it is sent, chunks and all.
    bytes: Vec<u8>,
    length: i64,
}

impl Stream {
    /// The stream of this seed, for `goal`.
    pub(crate) fn new(seed: u64, goal: &Goal) -> Self {
        let mut rng = Rng::with_seed(seed);
        let way = *rng.choice(WAYS.iter()).expect("ways");
        let mut stream =
            Self { seed, way, messages: Vec::new(), bytes: Vec::new(), cuts: Vec::new(), heads: 0 };
        for index in 0..rng.usize(1..=3) {
            stream.add(index, goal, &mut rng);
        }
        stream.end(goal);
        let length = stream.bytes.len();
        stream.cuts = (0..rng.usize(0..=4)).map(|_| rng.usize(0..length)).collect();
        stream.cuts.sort_unstable();
        stream
    }

    fn add(&mut self, index: usize, goal: &Goal, rng: &mut Rng) {
        let key = format!("stream-{}-{index}", self.seed);
        let mut draft = Draft::new(self.way, goal, &key, rng);
        if rng.u8(..) < 150 {
            for _ in 0..rng.usize(1..=2) {
                draft.change(self.way, goal, rng);
            }
        }
        self.push(key, draft);
    }

    /// A last message that asks for the end of the connection.
    fn end(&mut self, goal: &Goal) {
        let key = format!("stream-{}-end", self.seed);
        let mut draft = Draft::plain(self.way, goal, &key);
        draft.lines.push(b"Connection: close".to_vec());
        self.push(key, draft);
    }

    fn push(&mut self, key: String, draft: Draft) {
        let bytes = draft.bytes();
        self.heads += 1 + count(&bytes, b"HTTP/1.").saturating_sub(1);
        self.bytes.extend_from_slice(&bytes);
        let body = draft.content;
        self.messages.push(Message { key, fate: draft.fate, body, changes: draft.changes });
    }

    /// The messages up to the first whose end two readers may see differently, that one left out.
    pub(crate) fn sound(&self) -> &[Message] {
        let end = self.messages.iter().position(|message| message.fate != Fate::Arrives);
        &self.messages[..end.unwrap_or(self.messages.len())]
    }

    /// Every message arrives.
    pub(crate) fn is_sound(&self) -> bool {
        self.sound().len() == self.messages.len()
    }

    /// From which message on nothing may arrive.
    pub(crate) fn barred(&self) -> &[Message] {
        match &self.messages[self.sound().len()..] {
            [first, ..] if first.fate == Fate::Refused => &self.messages[self.sound().len()..],
            [first, ..] if first.fate == Fate::Declined => std::slice::from_ref(first),
            [first, rest @ ..] if first.fate == Fate::Breaks => rest,
            _ => &[],
        }
    }
}

impl Draft {
    fn plain(way: Way, goal: &Goal, key: &str) -> Self {
        let (target, host) = address(way, goal, key);
        Self {
            method: "GET".to_owned(),
            target: target.into_bytes(),
            version: "HTTP/1.1",
            request_line: None,
            host: Some(host.into_bytes()),
            lines: Vec::new(),
            before: Vec::new(),
            after: Vec::new(),
            body: Body { framing: Framing::None, coding: b"", bytes: Vec::new(), length: 0 },
            content: Some(Vec::new()),
            fate: Fate::Arrives,
            changes: Vec::new(),
            bare: None,
            done: false,
        }
    }

    fn new(way: Way, goal: &Goal, key: &str, rng: &mut Rng) -> Self {
        let mut draft = Self::plain(way, goal, key);
        (*rng.choice(METHODS.iter()).expect("methods")).clone_into(&mut draft.method);
        let content = content(way, goal, key, rng);
        let framing = rng.u8(0..4);
        if framing > 0 {
            draft.content = Some(content.clone());
        }
        match framing {
            0 => {}
            1 | 2 => draft.set_length(content),
            _ => draft.set_chunks(&content, &[]),
        }
        draft
    }

    fn set_length(&mut self, content: Vec<u8>) {
        let length = i64::try_from(content.len()).expect("a short body");
        self.body = Body { framing: Framing::Length, coding: b"", bytes: content, length };
    }

    fn set_chunks(&mut self, content: &[u8], trailers: &[u8]) {
        let mut bytes = Vec::new();
        for part in content.chunks(40) {
            bytes.extend_from_slice(format!("{:x}\r\n", part.len()).as_bytes());
            bytes.extend_from_slice(part);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"0\r\n");
        bytes.extend_from_slice(trailers);
        bytes.extend_from_slice(b"\r\n");
        self.body = Body { framing: Framing::Chunked, coding: b"chunked", bytes, length: 0 };
    }

    fn note(&mut self, change: impl Into<String>, fate: Fate) {
        self.changes.push(change.into());
        // A body of doubtful length may well hide what would break it.
        self.fate = match (self.fate.min(fate), self.fate.max(fate)) {
            (Fate::Agreed, Fate::Breaks) => Fate::Agreed,
            (_, worse) => worse,
        };
    }

    /// A coding beside a length, whatever is wrong with the latter.
    fn note_two_lengths(&mut self, change: &str) {
        self.changes.push(change.to_owned());
        (self.fate, self.done) = (Fate::Refused, true);
    }

    /// Whether a change of this kind was made: a second one could undo it.
    fn has(&self, kind: &str) -> bool {
        self.changes.iter().any(|change| change.starts_with(kind))
    }

    fn change(&mut self, way: Way, goal: &Goal, rng: &mut Rng) {
        if self.done {
            return;
        }
        match rng.u8(0..20) {
            0..=2 => self.add_line(&REFUSED_LINES, Fate::Refused, rng),
            3..=6 => self.add_line(&PASSED_LINES, Fate::Arrives, rng),
            7 | 8 => self.add_line(&AGREED_LINES, Fate::Agreed, rng),
            9 => self.change_target(way, rng),
            10 => self.change_host(way, goal, rng),
            11 => self.change_request_line(rng),
            12 | 13 => self.change_length(rng),
            14 | 15 => self.change_coding(rng),
            16 | 17 => self.change_chunks(rng),
            18 => self.change_size(rng),
            _ => self.change_ends(rng),
        }
    }

    fn add_line(&mut self, from: &[&[u8]], fate: Fate, rng: &mut Rng) {
        let line = rng.choice(from.iter()).expect("lines").to_vec();
        let hidden = self.body.framing == Framing::Chunked && line.starts_with(b"Content-Length:");
        let fate = if hidden { Fate::Refused } else { fate };
        let at = rng.usize(0..=self.lines.len());
        self.note(format!("line {:?}", String::from_utf8_lossy(&line)), fate);
        self.lines.insert(at, line);
    }

    fn change_target(&mut self, way: Way, rng: &mut Rng) {
        if self.has("target") {
            return;
        }
        let text = String::from_utf8_lossy(&self.target).into_owned();
        let absolute = way == Way::Passthrough || way == Way::Absolute;
        let (target, fate) = match rng.u8(0..12) {
            0..=2 => {
                (format!("{text}{}", rng.choice(ODD_PATHS.iter()).expect("paths")), Fate::Arrives)
            }
            3 => (format!("{text}#fragment"), Fate::Refused),
            4 => (format!("{text}/a b"), Fate::Refused),
            5 => (format!("{text}\u{1}"), Fate::Refused),
            6 if absolute => (text.replace("://", "://user:secret@"), Fate::Refused),
            7 if absolute => (text.replace("http", "ftp"), Fate::Refused),
            8 if absolute => ("*".to_owned(), Fate::Refused),
            9 => ("second.test:443".to_owned(), Fate::Refused),
            10 => (format!("{text}/\u{e9}"), Fate::Agreed),
            11 if !absolute && way != Way::Gateway => {
                (format!("http://second.test{text}"), Fate::Declined)
            }
            _ => (text.replacen("http", "HTTP", 1), Fate::Agreed),
        };
        if fate == Fate::Arrives {
            // A server that refuses it may do so before the body has come.
            self.content = None;
        }
        self.note(format!("target {target:?}"), fate);
        self.target = target.into_bytes();
    }

    fn change_host(&mut self, way: Way, goal: &Goal, rng: &mut Rng) {
        if self.has("host") {
            return;
        }
        let absolute = way == Way::Passthrough || way == Way::Absolute;
        let other = match way {
            Way::Intercept | Way::PlainTunnel => Fate::Declined,
            // By prefix all the same.
            _ => Fate::Arrives,
        };
        let (host, fate) = match rng.u8(0..11) {
            // A second `Host` would then be the only one.
            0 if self.has("line") => return,
            0 => (None, Fate::Refused),
            1 => (Some("second.test"), other),
            2 => (Some("user@second.test"), Fate::Refused),
            3 => (Some("a b"), Fate::Refused),
            4 => (Some("second.test:0"), Fate::Refused),
            5 => (Some("second.test, third.test"), Fate::Refused),
            6 => (Some("second.test/path"), Fate::Refused),
            7 => (Some(""), if absolute { Fate::Arrives } else { Fate::Agreed }),
            8 => (Some("second.test:99999"), Fate::Refused),
            9 => (Some("se\x0bcond.test"), Fate::Refused),
            _ => (Some(goal.api), if absolute { Fate::Arrives } else { Fate::Agreed }),
        };
        self.note(format!("host {host:?}"), fate);
        self.host = host.map(|host| host.as_bytes().to_vec());
        self.done = self.host.is_none();
    }

    fn change_request_line(&mut self, rng: &mut Rng) {
        let (method, target) =
            (self.method.clone(), String::from_utf8_lossy(&self.target).into_owned());
        let (line, fate) = match rng.u8(0..16) {
            0 => (format!("{method} {target} HTTP/1.0"), Fate::Agreed),
            1 => (format!("{method} {target}"), Fate::Refused),
            2 => (format!("{method} {target} HTTP/0.9"), Fate::Refused),
            3 => (format!("{method} {target} HTTP/2.0"), Fate::Refused),
            4 => (format!("{method} {target} HTTP/1.2"), Fate::Refused),
            5 => (format!("{method} {target} HTTP/1.10"), Fate::Refused),
            6 => (format!("{method} {target} http/1.1"), Fate::Refused),
            7 => (format!("{method} {target} HTTP/1.1 x"), Fate::Refused),
            8 => (format!("{method}  {target} HTTP/1.1"), Fate::Agreed),
            9 => (format!("{method}\t{target}\tHTTP/1.1"), Fate::Refused),
            10 => (format!("{method} {target} HTTP/1.1 "), Fate::Agreed),
            11 => (format!(" {method} {target} HTTP/1.1"), Fate::Refused),
            12 => (format!("GE(T {target} HTTP/1.1"), Fate::Refused),
            13 => (format!("get {target} HTTP/1.1"), Fate::Agreed),
            14 => (format!("PURGE {target} HTTP/1.1"), Fate::Agreed),
            _ => ("PRI * HTTP/2.0\r\n\r\nSM\r\n".to_owned(), Fate::Refused),
        };
        self.note(format!("request line {line:?}"), fate);
        self.request_line = Some(line.into_bytes());
        self.done = true;
    }

    /// Another length than that of the body.
    fn change_length(&mut self, rng: &mut Rng) {
        if self.has("length") {
            return;
        }
        if self.body.framing != Framing::Length {
            let both = self.body.framing == Framing::Chunked;
            let fate = if both { Fate::Refused } else { Fate::Agreed };
            let length = rng.u8(0..20);
            self.note(format!("length {length} that is not its own"), fate);
            return self.lines.push(format!("Content-Length: {length}").into_bytes());
        }
        let length = self.body.length;
        match rng.u8(0..5) {
            0 => {
                self.note("lengths that differ", Fate::Refused);
                self.lines.push(format!("Content-Length: {}", length + 1).into_bytes());
            }
            1 => {
                self.note("lengths that are the same", Fate::Agreed);
                self.lines.push(format!("Content-Length: {length}").into_bytes());
            }
            2 => {
                self.note("length too short", Fate::Agreed);
                self.body.length = rng.i64(0..=length);
            }
            3 => {
                self.note("length too long", Fate::Agreed);
                self.body.length = length + rng.i64(1..60);
            }
            _ => {
                self.note_two_lengths("length and a coding");
                self.lines.push(b"Transfer-Encoding: chunked".to_vec());
            }
        }
    }

    /// Another spelling of `chunked`.
    fn change_coding(&mut self, rng: &mut Rng) {
        if self.has("coding") {
            return;
        }
        if self.body.framing != Framing::Chunked {
            if self.body.framing == Framing::Length {
                self.note_two_lengths("coding that is not its own");
            } else {
                self.note("coding that is not its own", Fate::Agreed);
            }
            return self.lines.push(b"Transfer-Encoding: chunked".to_vec());
        }
        let (coding, fate): (&[u8], Fate) = match rng.u8(0..14) {
            0 => (b"Chunked", Fate::Arrives),
            1 => (b"CHUNKED", Fate::Arrives),
            2 => (b"\tchunked", Fate::Arrives),
            3 => (b"chunked \t", Fate::Arrives),
            4 => (b"chunked\r\nTransfer-Encoding: chunked", Fate::Refused),
            5 => (b"chunked\r\nTransfer-Encoding: identity", Fate::Refused),
            6 => (b"gzip\r\nTransfer-Encoding: chunked", Fate::Refused),
            7 => (b"\r\n chunked", Fate::Refused),
            8 => (b"chunked\r\n , x", Fate::Refused),
            9 => (b"chunked\0", Fate::Refused),
            10 => (b"chunked\x0b", Fate::Refused),
            11 => (b"chunked;q=1", Fate::Refused),
            12 => (b"chunked, identity", Fate::Refused),
            _ => (b"ch\xc5\xbfnked", Fate::Refused),
        };
        self.note(format!("coding {:?}", String::from_utf8_lossy(coding)), fate);
        self.body.coding = coding;
    }

    fn change_chunks(&mut self, rng: &mut Rng) {
        if self.has("chunks") {
            return;
        }
        if self.body.framing != Framing::Chunked {
            return;
        }
        let smuggled = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";
        let (chunks, fate): (String, Fate) = match rng.u8(0..20) {
            0 => ("3;a=b\r\nabc\r\n0\r\n\r\n".into(), Fate::Arrives),
            1 => ("3;a=\"b;c\" ; d\r\nabc\r\n0;last\r\n\r\n".into(), Fate::Arrives),
            2 => ("A\r\n0123456789\r\n000\r\n\r\n".into(), Fate::Arrives),
            3 => ("0003\r\nabc\r\n0\r\n\r\n".into(), Fate::Arrives),
            4 => ("3\r\nabc\r\n0\r\nX-Sum: 1\r\nAuthorization: x\r\nContent-Length: 3\r\n\r\n".into(), Fate::Arrives),
            5 => ("3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\nHost: x\r\nProxy-Authorization: x\r\nTE: x\r\n\r\n".into(), Fate::Arrives),
            6 => ("3 \r\nabc\r\n0\t\r\n\r\n".into(), Fate::Agreed),
            7 => (format!("3;\n{smuggled}abc\r\n0\r\n\r\n"), Fate::Breaks),
            8 => (" 3\r\nabc\r\n0\r\n\r\n".into(), Fate::Breaks),
            9 => (format!("3\nabc\n0\n\n{smuggled}"), Fate::Breaks),
            10 => ("0x3\r\nabc\r\n0\r\n\r\n".into(), Fate::Agreed),
            11 => ("+3\r\nabc\r\n0\r\n\r\n".into(), Fate::Breaks),
            12 => ("-3\r\nabc\r\n0\r\n\r\n".into(), Fate::Breaks),
            13 => (format!("3\r\nabc0\r\n\r\n{smuggled}"), Fate::Breaks),
            14 => (format!("2\r\nabc\r\n0\r\n\r\n{smuggled}"), Fate::Breaks),
            15 => (format!("fffffffffffffffff3\r\nabc\r\n0\r\n\r\n{smuggled}"), Fate::Breaks),
            16 => ("g\r\nabc\r\n0\r\n\r\n".into(), Fate::Breaks),
            17 => ("3\r\nabc\r\n0\r\nno colon\r\n\r\n".into(), Fate::Breaks),
            18 => (format!("3;{}\r\nabc\r\n0\r\n\r\n", "x".repeat(40_000)), Fate::Breaks),
            _ => ("3\r\nabc\r\n0\r\nX-A: 1\nX-B : 2\r\n\r\n".into(), Fate::Agreed),
        };
        self.note(format!("chunks {chunks:.60?}"), fate);
        self.body.bytes = chunks.into_bytes();
        self.content = None;
    }

    fn change_size(&mut self, rng: &mut Rng) {
        if self.has("80 fields") {
            return;
        }
        match rng.u8(0..5) {
            0 => {
                self.note("80 fields", Fate::Arrives);
                self.lines.extend((0..80).map(|i| format!("X-Many-{i}: 1").into_bytes()));
            }
            1 => {
                self.note("150 fields", Fate::Refused);
                self.lines.extend((0..150).map(|i| format!("X-Many-{i}: 1").into_bytes()));
            }
            2 => {
                self.note("300 fields", Fate::Refused);
                self.lines.extend((0..300).map(|i| format!("X-Many-{i}: 1").into_bytes()));
            }
            3 => {
                self.note("a field of 20,000 bytes", Fate::Arrives);
                self.lines.push(format!("X-Long: {}", "y".repeat(20_000)).into_bytes());
            }
            _ => {
                self.note("a field of 140,000 bytes", Fate::Refused);
                self.lines.push(format!("X-Long: {}", "y".repeat(140_000)).into_bytes());
            }
        }
    }

    fn change_ends(&mut self, rng: &mut Rng) {
        match rng.u8(0..5) {
            4 => {
                // What was to be refused may stand in another message now.
                self.lines.push(b"X-Lf: a\n\nGET /smuggled HTTP/1.1".to_vec());
                self.changes.push("a head that ends in bare LFs, and another".to_owned());
                (self.fate, self.done) = (Fate::Agreed, true);
            }
            0 => {
                self.note("empty lines before it", Fate::Agreed);
                self.before = b"\r\n\r\n".to_vec();
            }
            1 => {
                self.note("an empty line after it", Fate::Agreed);
                self.after = b"\r\n".to_vec();
            }
            _ => {
                let line = rng.usize(0..=self.lines.len() + 2);
                self.note(format!("line {line} ends in a bare LF"), Fate::Agreed);
                self.bare = Some(line);
            }
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = self.before.clone();
        let line = self.request_line.clone().unwrap_or_else(|| {
            let mut line = format!("{} ", self.method).into_bytes();
            line.extend_from_slice(&self.target);
            line.extend_from_slice(format!(" {}", self.version).as_bytes());
            line
        });
        let mut lines = vec![line];
        lines.extend(self.host.iter().map(|host| [b"Host: ", host.as_slice()].concat()));
        match self.body.framing {
            Framing::None => {}
            Framing::Length => {
                lines.push(format!("Content-Length: {}", self.body.length).into_bytes());
            }
            Framing::Chunked => lines.push([b"Transfer-Encoding: ", self.body.coding].concat()),
        }
        lines.extend(self.lines.iter().cloned());
        lines.push(Vec::new());
        for (index, line) in lines.iter().enumerate() {
            out.extend_from_slice(line);
            out.extend_from_slice(if self.bare == Some(index) { b"\n" } else { b"\r\n" });
        }
        out.extend_from_slice(&self.body.bytes);
        out.extend_from_slice(&self.after);
        out
    }
}

/// Target and `Host` of a message with this key.
fn address(way: Way, goal: &Goal, key: &str) -> (String, String) {
    let (address, api, path) = (&goal.address, goal.api, format!("{}/{key}", goal.prefix));
    match way {
        Way::Passthrough => (format!("http://{address}/{key}"), address.clone()),
        Way::Absolute => (format!("https://{api}{path}"), api.to_owned()),
        Way::Gateway => (path, "sidecar.test:8080".to_owned()),
        Way::Intercept | Way::PlainTunnel => (path, api.to_owned()),
    }
}

/// A body: often one that is a request itself.
fn content(way: Way, goal: &Goal, key: &str, rng: &mut Rng) -> Vec<u8> {
    let key = format!("{key}-smuggled");
    let (target, host) = address(way, goal, &key);
    match rng.u8(0..5) {
        0 => Vec::new(),
        1 => b"{\"page\": 1}".to_vec(),
        2 => format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes(),
        3 => format!("GET {}/{key} HTTP/1.1\r\nHost: {host}\r\n\r\n", goal.prefix).into_bytes(),
        _ => format!(
            "0\r\n\r\nPOST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 3\r\n\r\nabc"
        )
        .into_bytes(),
    }
}

fn count(bytes: &[u8], word: &[u8]) -> usize {
    bytes.windows(word.len()).filter(|part| *part == word).count()
}
