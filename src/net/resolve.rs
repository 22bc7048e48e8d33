//! From a name to addresses: by the system, or by the servers of
//! `UPSTREAM_DNS`.
//!
//! # Invariants
//!
//! - With servers set, nothing else is asked: neither the system's resolver
//!   nor its hosts file and search domains.
//! - Answers are kept as long as their TTL says, once for all threads.
//! - Lookups by servers run on the control runtime: what they share outlives
//!   each worker, and a caller that leaves cancels nothing that others wait for.
//! - Lookups by the system block a thread, for as long as the system likes. Of
//!   those that clients cause there are never so many that none is left.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig,
    ResolverOpts,
};
use hickory_resolver::lookup_ip::LookupIp;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use thiserror::Error;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

use super::workers::BLOCKING_THREADS;

/// Longest wait for the servers, per try.
const TRY_LIMIT: Duration = Duration::from_secs(2);

/// Head start of one server before the next is asked beside it.
const HEAD_START: Duration = Duration::from_millis(250);

/// Further tries after a failed one.
const RETRIES: usize = 1;

/// Lookups by the system for clients' destinations, at once in the process.
const CLIENT_LOOKUPS: usize = 24;
const _: () = assert!(CLIENT_LOOKUPS < BLOCKING_THREADS, "API names and keys need some, too");

/// Longest wait for one of them.
const PLACE_WAIT: Duration = Duration::from_secs(1);

/// Why a name has no addresses.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// The system's resolver says so.
    #[error("{0}")]
    System(io::Error),
    /// The servers of `UPSTREAM_DNS` gave none.
    #[error("UPSTREAM_DNS ({servers}) {why}")]
    Servers {
        /// The servers that were asked.
        servers: Arc<str>,
        /// What they said, or that they did not.
        why: NoAnswer,
    },
}

/// What came from DNS servers instead of addresses.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NoAnswer {
    /// There is no such name.
    #[error("says that there is no such name (NXDOMAIN)")]
    NoName,
    /// The name has neither IPv4 nor IPv6 addresses.
    #[error("says that the name has no address")]
    NoAddress,
    /// The servers failed or refused.
    #[error("answers with the error {0}")]
    Code(ResponseCode),
    /// Nothing came in time: the servers are down, or not reached.
    #[error("did not answer in time: down, or not reached")]
    Silent,
    /// The question could not be asked, or the answer not be read.
    #[error("failed: {0}")]
    Failed(Box<NetError>),
}

impl NoAnswer {
    /// Whether it is the server's word on the name, not a failure.
    fn is_answer(&self) -> bool {
        matches!(self, Self::NoName | Self::NoAddress)
    }
}

/// Who is asked for addresses.
#[derive(Clone, Default)]
pub enum Resolver {
    /// The system.
    #[default]
    System,
    /// The servers of `UPSTREAM_DNS`.
    Servers(Servers),
}

impl Resolver {
    /// All addresses of `host` with `port`, in the order in which they should
    /// be tried; never none.
    ///
    /// # Errors
    ///
    /// [`ResolveError`].
    pub(super) async fn resolve(
        &self,
        host: &str,
        port: u16,
        place: Option<Place>,
    ) -> Result<Vec<SocketAddr>, ResolveError> {
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        match self {
            Self::System => by_system(host, port, place).await.map_err(ResolveError::System),
            Self::Servers(servers) => servers.resolve(host, port).await,
        }
    }

    /// Whether a look at `host` blocks a thread.
    pub(super) fn blocks(&self, host: &str) -> bool {
        matches!(self, Self::System) && host.parse::<IpAddr>().is_err()
    }
}

/// Keeps `place` until the system has answered, also if the caller has left.
async fn by_system(host: &str, port: u16, place: Option<Place>) -> io::Result<Vec<SocketAddr>> {
    let host = host.to_owned();
    let lookup = tokio::task::spawn_blocking(move || {
        let found = (host.as_str(), port).to_socket_addrs().map(Vec::from_iter);
        drop(place);
        found
    });
    let found = lookup.await.map_err(io::Error::other)??;
    if found.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    }
    Ok(found)
}

/// One of the lookups that clients may cause at a time.
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
}

/// Those that are free.
pub(super) struct Places(Arc<Semaphore>);

impl Places {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(CLIENT_LOOKUPS)))
    }

    /// A place, if one comes free soon.
    pub(super) async fn take(&self) -> Option<Place> {
        let permit = timeout(PLACE_WAIT, Arc::clone(&self.0).acquire_owned()).await;
        // The semaphore is never closed.
        permit.ok()?.ok().map(|permit| Place { _permit: permit })
    }
}

/// DNS servers, asked over UDP and, where an answer is cut, over TCP.
#[derive(Clone)]
pub struct Servers {
    names: Arc<str>,
    /// One for each server: a resolver with several of them takes the first
    /// one's failure for an answer.
    resolvers: Arc<[TokioResolver]>,
    runtime: Handle,
}

impl Servers {
    /// The `servers`, to be asked in this order on `runtime`, with all tries
    /// of one within half of `limit`.
    ///
    /// # Errors
    ///
    /// The resolver's own words.
    pub fn new(servers: &[SocketAddr], limit: Duration, runtime: Handle) -> Result<Self, NetError> {
        let names: Vec<String> = servers.iter().map(SocketAddr::to_string).collect();
        let resolver = |address| {
            let config = ResolverConfig::from_name_servers(vec![server(address)]);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::new())
                .with_options(options(limit))
                .build()
        };
        let resolvers = servers.iter().map(resolver).collect::<Result<_, _>>()?;
        Ok(Self { names: names.join(", ").into(), resolvers, runtime })
    }

    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, ResolveError> {
        let resolvers = Arc::clone(&self.resolvers);
        // The final dot keeps search domains out.
        let name = format!("{host}.");
        let lookup = self.runtime.spawn(async move { first_answer(&resolvers, &name).await });
        // A task fails only by a panic, or when the process ends.
        let found = lookup.await.unwrap_or(Err(NoAnswer::Silent));
        match found {
            Ok(found) => Ok(found.iter().map(|ip| SocketAddr::new(ip, port)).collect()),
            Err(why) => Err(ResolveError::Servers { servers: Arc::clone(&self.names), why }),
        }
    }
}

/// The first server's answer; each server that fails makes way for the next
/// at once, and each that is slow gets the next beside it.
async fn first_answer(resolvers: &[TokioResolver], name: &str) -> Result<LookupIp, NoAnswer> {
    let mut waiting = resolvers.iter();
    let mut attempts = FuturesUnordered::new();
    let mut last = NoAnswer::Silent;
    loop {
        attempts.extend(waiting.next().map(|resolver| resolver.lookup_ip(name)));
        tokio::select! {
            attempt = attempts.next() => match attempt.map(judge) {
                Some(Err(failure)) if !failure.is_answer() => last = failure,
                Some(answer) => return answer,
                None => return Err(last),
            },
            () = sleep(HEAD_START), if waiting.len() > 0 => {}
        }
    }
}

fn judge(answer: Result<LookupIp, NetError>) -> Result<LookupIp, NoAnswer> {
    match answer {
        Ok(found) if found.iter().next().is_none() => Err(NoAnswer::NoAddress),
        answer => answer.map_err(no_answer),
    }
}

fn server(address: &SocketAddr) -> NameServerConfig {
    let at_port = |mut connection: ConnectionConfig| {
        connection.port = address.port();
        connection
    };
    let connections = vec![at_port(ConnectionConfig::udp()), at_port(ConnectionConfig::tcp())];
    NameServerConfig::new(address.ip(), true, connections)
}

fn options(limit: Duration) -> ResolverOpts {
    let mut options = ResolverOpts::default();
    options.timeout = TRY_LIMIT.min(limit / 4);
    options.attempts = RETRIES;
    options.use_hosts_file = ResolveHosts::Never;
    // The address by which the shop knows this host should not change with
    // each connection, so one family comes first.
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options
}

fn no_answer(error: NetError) -> NoAnswer {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(none)) => match none.response_code {
            ResponseCode::NXDomain => NoAnswer::NoName,
            ResponseCode::NoError => NoAnswer::NoAddress,
            code => NoAnswer::Code(code),
        },
        NetError::Dns(DnsError::ResponseCode(code)) => NoAnswer::Code(code),
        NetError::Timeout | NetError::NoConnections => NoAnswer::Silent,
        error => NoAnswer::Failed(Box::new(error)),
    }
}
