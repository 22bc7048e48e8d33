//! What sidecars said of their token all along.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::support::http::Wire;

/// From one look to the next.
const PACE: Duration = Duration::from_millis(20);

/// A token as `/status` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sighting {
    generation: u64,
    /// RFC 3339, which sorts by time.
    issued_at: String,
    fingerprint: String,
}

/// Each change of each sidecar's token. It is looked for until this is dropped.
pub(super) struct History {
    seen: Vec<Arc<Mutex<Vec<Sighting>>>>,
    _stop: DropGuard,
}

impl History {
    /// Looks at `/status` of these admin ports from now on.
    pub(super) fn of(admins: impl Iterator<Item = SocketAddr>) -> Self {
        let stop = CancellationToken::new();
        let look = |admin| {
            let seen = Arc::<Mutex<Vec<Sighting>>>::default();
            tokio::spawn(stop.clone().run_until_cancelled_owned(follow(admin, seen.clone())));
            seen
        };
        Self { seen: admins.map(look).collect(), _stop: stop.drop_guard() }
    }

    /// Neither generation nor time of issue has ever gone backwards, at any of them.
    pub(super) fn check(&self) {
        for (number, seen) in self.seen.iter().enumerate() {
            let seen = seen.lock().unwrap();
            assert!(!seen.is_empty(), "sidecar {number} was never seen");
            let back = |pair: &[Sighting]| {
                pair[1].generation < pair[0].generation || pair[1].issued_at < pair[0].issued_at
            };
            let back = seen.windows(2).find(|pair| back(pair));
            assert!(back.is_none(), "sidecar {number} went back: {back:?}");
        }
    }

    /// Whether any of them ever had the token of this fingerprint in force.
    pub(super) fn has(&self, fingerprint: &str) -> bool {
        let is_it = |sighting: &Sighting| sighting.fingerprint == fingerprint;
        self.seen.iter().any(|seen| seen.lock().unwrap().iter().any(is_it))
    }
}

/// A sidecar that is dead or frozen shows nothing, which is not what this is about.
async fn follow(admin: SocketAddr, seen: Arc<Mutex<Vec<Sighting>>>) {
    loop {
        if let Ok(sighting) = look(admin).await {
            let mut seen = seen.lock().unwrap();
            if seen.last() != Some(&sighting) {
                seen.push(sighting);
            }
        }
        sleep(PACE).await;
    }
}

async fn look(admin: SocketAddr) -> io::Result<Sighting> {
    let mut wire = Wire::new(TcpStream::connect(admin).await?);
    wire.try_send(format!("GET /status HTTP/1.1\r\nHost: {admin}\r\n\r\n")).await?;
    let status: Value = wire.try_response("GET").await?.json();
    let token = &status["token"];
    let text = |field: &str| token[field].as_str().unwrap_or_default().to_owned();
    Ok(Sighting {
        generation: token["generation"].as_u64().unwrap_or_default(),
        issued_at: text("issued_at"),
        fingerprint: text("fingerprint"),
    })
}
