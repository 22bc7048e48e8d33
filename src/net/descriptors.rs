//! File descriptors: how many there may be, and what happens when they run out.
//!
//! # Invariants
//!
//! - The last descriptors are for what serves the clients that are in: no new
//!   client gets one of them.
//! - A shortage is told once when it begins and once when it is over.

use std::fmt::Display;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

/// Descriptors of the process besides two for each client: the listeners, the
/// runtimes, the admin port, the stores.
const OWN: u64 = 256;

/// Share of all descriptors that no new client gets, and the most of them.
const RESERVE_SHARE: u64 = 8;
const MAX_RESERVE: u64 = 256;

/// A shortage is over when nobody has met it for this long.
const QUIET: Duration = Duration::from_secs(1);

/// Raises the limit of open files as far as the system lets it: a proxy needs
/// two for each client, and the soft limit is often 1,024.
pub fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        warn!(%error, "cannot raise the limit of open files");
    }
}

/// Warns where the limit of open files is not enough for as many `clients` as
/// the settings allow.
pub fn check_descriptor_limit(clients: usize) {
    let needed = u64::try_from(clients).unwrap_or(u64::MAX).saturating_mul(2).saturating_add(OWN);
    let limit = soft_limit();
    if limit < needed {
        warn!(
            limit,
            needed,
            clients,
            "the limit of open files is too low for MAX_CONNECTIONS; raise it, or lower that"
        );
    }
}

/// Whether the system refused one more descriptor.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// Whether no descriptor is to be had now. For errors that do not tell, such
/// as those of the system's resolver.
pub(super) fn are_exhausted() -> bool {
    std::net::UdpSocket::bind(("127.0.0.1", 0)).is_err_and(|error| is_shortage(&error))
}

/// Whether `socket` got one of the last descriptors. The system gives the
/// lowest that is free, so all below it are in use.
pub(super) fn is_of_reserve(socket: &impl AsRawFd) -> bool {
    let limit = soft_limit();
    let first = limit - reserve_of(limit);
    u64::try_from(socket.as_raw_fd()).is_ok_and(|descriptor| descriptor >= first)
}

/// How many descriptors no new client gets.
pub(super) fn reserve() -> u64 {
    reserve_of(soft_limit())
}

fn reserve_of(limit: u64) -> u64 {
    (limit / RESERVE_SHARE).min(MAX_RESERVE)
}

fn soft_limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The time in which clients cannot be accepted, of the whole process.
#[derive(Clone, Default)]
pub(super) struct Shortage {
    /// When it was last met; `None`: there is none.
    last: Arc<Mutex<Option<Instant>>>,
}

impl Shortage {
    /// Notes that a client could not be accepted; `true` where that is new. Then
    /// a local task is started that tells of the end.
    pub(super) fn met(&self, why: impl Display) -> bool {
        let before =
            self.last.lock().unwrap_or_else(PoisonError::into_inner).replace(Instant::now());
        if before.is_none() {
            warn!(%why, "accepting no clients for now");
            tokio::task::spawn_local(self.clone().over());
        }
        before.is_none()
    }

    async fn over(self) {
        while let Some(until) = self.lasts_until() {
            sleep_until(until).await;
        }
        info!("accepting clients again");
    }

    /// `None` when it is over.
    fn lasts_until(&self) -> Option<Instant> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last + QUIET <= Instant::now()) {
            *last = is_next_of_reserve().then(Instant::now);
        }
        last.map(|last| last + QUIET)
    }
}

/// Whether a client that came now would get one of the last descriptors, or
/// none.
fn is_next_of_reserve() -> bool {
    match std::net::UdpSocket::bind(("127.0.0.1", 0)) {
        Ok(probe) => is_of_reserve(&probe),
        Err(error) => is_shortage(&error),
    }
}
