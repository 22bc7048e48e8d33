//! HTTP/1.1 by hand, so that tests see and send exact bytes.
//!
//! A [`Wire`] reads and writes messages on any stream, for the stand-ins and
//! for the clients alike. Bytes become text one to one (Latin-1), so nothing is
//! lost or normalised on the way into an assertion.

use std::io;
use std::os::fd::AsFd as _;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use socket2::Socket;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long a test waits for anything that must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A stream of either kind, plain or TLS.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// The socket below a stream, for [`Wire::above`].
pub(crate) fn socket_of(stream: &TcpStream) -> Socket {
    Socket::from(stream.as_fd().try_clone_to_owned().unwrap())
}

/// Bytes as text, one character per byte.
pub(crate) fn text(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| char::from(byte)).collect()
}

/// Start line and fields as they came: case, order and repeats.
#[derive(Clone, Debug, Default)]
pub(crate) struct Head {
    pub(crate) start: String,
    pub(crate) fields: Vec<(String, String)>,
}

impl Head {
    /// The values of `name` in order.
    pub(crate) fn values(&self, name: &str) -> Vec<&str> {
        let same = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
        self.fields.iter().filter(same).map(|(_, value)| value.as_str()).collect()
    }

    /// The first value of `name`.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.values(name).first().copied()
    }

    /// The `index`th word of the start line.
    pub(crate) fn word(&self, index: usize) -> &str {
        self.start.split(' ').nth(index).unwrap_or_default()
    }

    fn is_chunked(&self) -> bool {
        self.value("transfer-encoding")
            .is_some_and(|value| value.to_ascii_lowercase().ends_with("chunked"))
    }

    fn length(&self) -> Option<usize> {
        self.value("content-length").and_then(|value| value.parse().ok())
    }
}

/// How the end of a body is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Length(usize),
    Chunked,
    Close,
}

impl Framing {
    /// The framing of a request with this head.
    pub(crate) fn of_request(head: &Head) -> Self {
        if head.is_chunked() { Self::Chunked } else { Self::Length(head.length().unwrap_or(0)) }
    }

    /// The framing of the answer to a `method` request.
    pub(crate) fn of_response(head: &Head, method: &str) -> Self {
        let status = head.word(1);
        if method == "HEAD" || status == "204" || status == "304" {
            return Self::Length(0);
        }
        if head.is_chunked() {
            return Self::Chunked;
        }
        head.length().map_or(Self::Close, Self::Length)
    }
}

/// Body bytes and trailer fields.
#[derive(Clone, Debug, Default)]
pub(crate) struct Body {
    pub(crate) bytes: Vec<u8>,
    pub(crate) trailers: Vec<(String, String)>,
}

/// An answer, read to its end.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<(String, String)>,
    /// Statuses of the 1xx answers before it.
    pub(crate) interim: Vec<u16>,
    /// How its body was framed.
    pub(crate) framing: Framing,
}

impl Response {
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.head.value(name)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("no JSON ({error}): {self:?}"))
    }

    /// The `error` code of an answer that the sidecar made.
    pub(crate) fn code(&self) -> String {
        self.json()["error"].as_str().unwrap_or_default().to_owned()
    }
}

/// How a stand-in leaves a connection after what it has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It says no more, and waits for the other side.
    Stall,
    /// It closes in order: over TLS with `close_notify`.
    Close,
    /// TCP ends, and TLS, if there is any, without a word.
    Cut,
    /// TCP is reset.
    Reset,
}

/// A connection with what has been read ahead on it.
pub(crate) struct Wire {
    io: Box<dyn Duplex>,
    buffer: BytesMut,
    /// The socket below, where it may have to be reset.
    socket: Option<Socket>,
}

impl Wire {
    pub(crate) fn new(io: impl Duplex + 'static) -> Self {
        Self { io: Box::new(io), buffer: BytesMut::new(), socket: None }
    }

    /// Lets [`Self::end`] reset the `socket` below.
    pub(crate) fn above(mut self, socket: Socket) -> Self {
        self.socket = Some(socket);
        self
    }

    /// Leaves the connection so; the error says that it is to be dropped.
    pub(crate) async fn end(&mut self, end: End) -> io::Result<()> {
        match end {
            End::Stall => self.until_end().await.map(drop),
            End::Close => self.try_finish().await,
            End::Cut => Err(io::ErrorKind::ConnectionAborted.into()),
            End::Reset => {
                let socket = self.socket.as_ref().expect("a wire above a socket");
                socket.set_linger(Some(Duration::ZERO))?;
                Err(io::ErrorKind::ConnectionReset.into())
            }
        }
    }

    /// Opens a TCP connection.
    pub(crate) async fn connect(addr: std::net::SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self::new(stream)
    }

    /// The stream itself, for TLS on top. Nothing may have been read ahead.
    pub(crate) fn into_inner(self) -> Box<dyn Duplex> {
        assert!(self.buffer.is_empty(), "bytes before the TLS handshake: {:?}", self.buffer);
        self.io
    }

    pub(crate) async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.io.write_all(bytes.as_ref()).await?;
        self.io.flush().await
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).await.unwrap();
    }

    /// Ends the sending half.
    pub(crate) async fn try_finish(&mut self) -> io::Result<()> {
        self.io.shutdown().await
    }

    async fn fill(&mut self) -> io::Result<usize> {
        self.buffer.reserve(16 * 1024);
        self.io.read_buf(&mut self.buffer).await
    }

    async fn need(&mut self) -> io::Result<()> {
        match self.fill().await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    async fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\r\n") {
                let line = text(&self.buffer[..end]);
                self.buffer.advance(end + 2);
                return Ok(line);
            }
            self.need().await?;
        }
    }

    /// The trailer fields after the last chunk.
    pub(crate) async fn trailers(&mut self) -> io::Result<Vec<(String, String)>> {
        self.fields().await
    }

    async fn fields(&mut self) -> io::Result<Vec<(String, String)>> {
        let mut fields = Vec::new();
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Ok(fields);
            }
            let (name, value) = line.split_once(':').ok_or(io::ErrorKind::InvalidData)?;
            fields.push((name.to_owned(), value.trim().to_owned()));
        }
    }

    /// The next head; `None` when the other side has closed between messages.
    pub(crate) async fn head(&mut self) -> io::Result<Option<Head>> {
        while self.buffer.is_empty() {
            if self.fill().await? == 0 {
                return Ok(None);
            }
        }
        let start = self.line().await?;
        let fields = self.fields().await?;
        Ok(Some(Head { start, fields }))
    }

    /// Exactly `count` bytes.
    pub(crate) async fn exactly(&mut self, count: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < count {
            self.need().await?;
        }
        Ok(self.buffer.split_to(count).to_vec())
    }

    /// The next chunk of a chunked body; `None` is the last one, its trailers unread.
    pub(crate) async fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = self.line().await?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).map_err(|_| io::ErrorKind::InvalidData)?;
        if size == 0 {
            return Ok(None);
        }
        let chunk = self.exactly(size).await?;
        self.exactly(2).await?;
        Ok(Some(chunk))
    }

    /// The next bytes, whatever they are; `None` at the end of the stream.
    pub(crate) async fn some(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.buffer.is_empty() && self.fill().await? == 0 {
            return Ok(None);
        }
        Ok(Some(self.buffer.split().to_vec()))
    }

    /// Whether anything comes within `time`.
    pub(crate) async fn speaks_within(&mut self, time: Duration) -> bool {
        let comes = async { !self.buffer.is_empty() || self.fill().await.is_ok_and(|n| n > 0) };
        tokio::time::timeout(time, comes).await.unwrap_or(false)
    }

    /// Everything up to the end of the stream.
    pub(crate) async fn until_end(&mut self) -> io::Result<Vec<u8>> {
        while self.fill().await? > 0 {}
        Ok(self.buffer.split().to_vec())
    }

    /// The rest of a message.
    pub(crate) async fn body(&mut self, framing: Framing) -> io::Result<Body> {
        let mut body = Body::default();
        match framing {
            Framing::Length(length) => body.bytes = self.exactly(length).await?,
            Framing::Close => body.bytes = self.until_end().await?,
            Framing::Chunked => {
                while let Some(chunk) = self.chunk().await? {
                    body.bytes.extend_from_slice(&chunk);
                }
                body.trailers = self.fields().await?;
            }
        }
        Ok(body)
    }

    /// The head of the next final answer, and the 1xx statuses before it.
    pub(crate) async fn response_head(&mut self) -> io::Result<(Head, Vec<u16>)> {
        let mut interim = Vec::new();
        loop {
            let head = self.head().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
            let status: u16 = head.word(1).parse().map_err(|_| io::ErrorKind::InvalidData)?;
            if !(100..200).contains(&status) {
                return Ok((head, interim));
            }
            interim.push(status);
        }
    }

    /// The answer to a `method` request, if the connection lets it come whole.
    pub(crate) async fn try_response(&mut self, method: &str) -> io::Result<Response> {
        self.try_response_within(PATIENCE, method).await
    }

    /// The same with a time of its own.
    pub(crate) async fn try_response_within(
        &mut self,
        patience: Duration,
        method: &str,
    ) -> io::Result<Response> {
        let read = async {
            let (head, interim) = self.response_head().await?;
            let framing = Framing::of_response(&head, method);
            let Body { bytes, trailers } = self.body(framing).await?;
            let status = head.word(1).parse().map_err(|_| io::ErrorKind::InvalidData)?;
            Ok(Response { status, head, body: bytes, trailers, interim, framing })
        };
        tokio::time::timeout(patience, read).await.map_err(|_| io::ErrorKind::TimedOut)?
    }

    /// The answer to a `method` request.
    pub(crate) async fn response(&mut self, method: &str) -> Response {
        self.try_response(method).await.expect("an answer")
    }

    /// Waits until the other side has closed; whatever it still sent is returned.
    pub(crate) async fn closed(&mut self) -> Vec<u8> {
        let rest = tokio::time::timeout(PATIENCE, self.until_end())
            .await
            .expect("the connection to be closed");
        rest.unwrap_or_default()
    }
}

/// A message with this start line, these fields, a `Content-Length` where there is a body, and the body.
pub(crate) fn message(start: &str, fields: &[(String, String)], body: &[u8]) -> Vec<u8> {
    let mut out = head(start, fields);
    out.extend_from_slice(body);
    out
}

/// A start line and fields, closed by the empty line.
pub(crate) fn head(start: &str, fields: &[(String, String)]) -> Vec<u8> {
    let mut out = String::from(start);
    out.push_str("\r\n");
    for (name, value) in fields {
        out.push_str(name);
        out.push_str(": ");
        out.push_str(value);
        out.push_str("\r\n");
    }
    out.push_str("\r\n");
    out.chars().map(|c| u8::try_from(u32::from(c)).expect("Latin-1 only")).collect()
}

/// One chunk of a chunked body.
pub(crate) fn chunk(bytes: &[u8]) -> Vec<u8> {
    let mut out = format!("{:x}\r\n", bytes.len()).into_bytes();
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
    out
}

/// The last chunk, with trailer fields.
pub(crate) fn last_chunk(trailers: &[(&str, &str)]) -> Vec<u8> {
    let mut out = String::from("0\r\n");
    for (name, value) in trailers {
        out.push_str(name);
        out.push_str(": ");
        out.push_str(value);
        out.push_str("\r\n");
    }
    out.push_str("\r\n");
    out.into_bytes()
}
