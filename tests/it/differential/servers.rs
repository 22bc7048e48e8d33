//! Two real servers that tell what they saw, and taps before them.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::strict::{self, Seen};
use crate::support::http::Duplex;
use crate::support::until;

/// A server and the log that it writes: a JSON line for each request.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    child: Child,
    log: PathBuf,
    door: Door,
}

#[derive(Clone)]
enum Door {
    Socket(PathBuf),
    Port(u16),
}

impl Server {
    /// nginx, on a socket in `dir`: it cannot be asked for a free port.
    pub(crate) async fn nginx(dir: &Path) -> Self {
        let (log, socket) = (dir.join("nginx.log"), dir.join("nginx.sock"));
        let config = dir.join("nginx.conf");
        std::fs::write(&config, nginx_config(dir)).unwrap();
        let child = Command::new(nginx_program())
            .args(["-p".as_ref(), dir.as_os_str(), "-c".as_ref(), config.as_os_str()])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { name: "nginx", child, log, door: Door::Socket(socket.clone()) };
        until("nginx", async || UnixStream::connect(&socket).await.is_ok()).await;
        server
    }

    /// Python's own server.
    pub(crate) fn python(dir: &Path) -> Self {
        let log = dir.join("python.log");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/differential/server.py");
        let mut child = Command::new("python3")
            .args([script.as_ref(), log.as_os_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim().parse().expect("the port of the Python server");
        Self { name: "python", child, log, door: Door::Port(port) }
    }

    /// What it says it saw so far.
    pub(crate) fn seen(&self) -> Vec<serde_json::Value> {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let lines = log.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let read = |line: &[u8]| {
            let line = String::from_utf8_lossy(line);
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
        };
        lines.map(read).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where Debian keeps it, not all users look.
pub(crate) fn nginx_program() -> &'static str {
    const SBIN: &str = "/usr/sbin/nginx";
    if Path::new(SBIN).exists() { SBIN } else { "nginx" }
}

/// It answers once the body has come, as most servers do; with `X-Early`, before.
fn nginx_config(dir: &Path) -> String {
    let dir = dir.display();
    let fields = [
        "proxy_authorization",
        "proxy_connection",
        "keep_alive",
        "connection",
        "te",
        "upgrade",
        "transfer_encoding",
        "x_named_1",
        "x_named_2",
        "x_named_3",
        "x_named_4",
        "x_named_5",
        "x_named_6",
    ];
    let fields: String = fields.map(|name| format!(",\"{name}\":\"$http_{name}\"")).concat();
    format!(
        r#"daemon off; master_process off; worker_processes 1;
pid {dir}/nginx.pid; error_log {dir}/nginx-error.log crit;
events {{ worker_connections 2048; }}
http {{
  log_format seen escape=json '{{"request":"$request","status":$status,"id":"$request_id","length":"$http_content_length"{fields}}}';
  access_log {dir}/nginx.log seen;
  client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
  client_header_buffer_size 64k; large_client_header_buffers 8 128k; client_max_body_size 0;
  keepalive_requests 1000000; keepalive_timeout 300s; ignore_invalid_headers off; underscores_in_headers on;
  server {{
    listen unix:{dir}/nginx.sock;
    add_header X-Id $request_id always;
    add_header X-Seen "$request_method $request_uri" always;
    location / {{
      if ($http_x_early) {{ return 200 "$request_method $request_uri"; }}
      proxy_pass http://unix:{dir}/inner.sock;
    }}
  }}
  server {{ listen unix:{dir}/inner.sock; access_log off; location / {{ return 200 "$request_uri"; }} }}
}}
"#
    )
}

/// What came on one connection.
type Record = Arc<Mutex<Vec<u8>>>;

/// Passes connections on to a server and keeps what the sidecar wrote.
pub(crate) struct Tap {
    pub(crate) addr: SocketAddr,
    records: Arc<Mutex<Vec<Record>>>,
    _stop: DropGuard,
}

impl Tap {
    /// Before `server`; with `tls`, that ends here.
    pub(crate) async fn before(server: &Server, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (door, stop) = (server.door.clone(), CancellationToken::new());
        let records = Arc::<Mutex<Vec<Record>>>::default();
        let (kept, stopped) = (records.clone(), stop.clone());
        let accept = async move {
            while let Ok((stream, _)) = listener.accept().await {
                let record = Record::default();
                kept.lock().unwrap().push(record.clone());
                let pass = pass(stream, tls.clone(), door.clone(), record);
                tokio::spawn(stopped.clone().run_until_cancelled_owned(pass));
            }
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept));
        Self { addr, records, _stop: stop.drop_guard() }
    }

    /// The requests of all connections, or where they can be read in two ways.
    pub(crate) fn requests(&self) -> Result<Vec<Seen>, String> {
        let records = self.records.lock().unwrap().clone();
        let mut seen = Vec::new();
        for record in records {
            seen.extend(strict::requests(&record.lock().unwrap())?);
        }
        Ok(seen)
    }
}

async fn pass(stream: TcpStream, tls: Option<TlsAcceptor>, door: Door, record: Record) {
    let _ = stream.set_nodelay(true);
    let client: Box<dyn Duplex> = match tls {
        None => Box::new(stream),
        Some(tls) => match tls.accept(stream).await {
            Ok(stream) => Box::new(stream),
            Err(_) => return,
        },
    };
    let server: Box<dyn Duplex> = match door {
        Door::Socket(path) => Box::new(UnixStream::connect(path).await.unwrap()),
        Door::Port(port) => Box::new(TcpStream::connect(("127.0.0.1", port)).await.unwrap()),
    };
    let (client_reads, mut client_writes) = tokio::io::split(client);
    let (mut server_reads, mut server_writes) = tokio::io::split(server);
    let up = async {
        keep(client_reads, &mut server_writes, &record).await;
        let _ = server_writes.shutdown().await;
    };
    let down = async {
        let _ = copy(&mut server_reads, &mut client_writes).await;
        let _ = client_writes.shutdown().await;
    };
    tokio::join!(up, down);
}

async fn keep(
    mut from: impl AsyncRead + Unpin,
    to: &mut (impl AsyncWriteExt + Unpin),
    record: &Record,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        record.lock().unwrap().extend_from_slice(&buffer[..count]);
        if to.write_all(&buffer[..count]).await.is_err() {
            // What the server no longer takes, it has not seen.
            break;
        }
    }
}
