//! Worker threads and their accept loops.
//!
//! Each worker is a current-thread runtime. All of them accept from the same
//! listening sockets, which are not shared by `SO_REUSEPORT`: a second process
//! on the same port fails to start. A worker that is ahead of the others hands
//! the new connection to the one with the fewest.
//!
//! # Invariants
//!
//! - A connection stays on the worker that serves it.
//! - Errors of `accept` never end the loop. One that is not of a single
//!   connection pauses it.
//! - When the drain begins, what has connected by then is still accepted, and
//!   nothing after it. A worker ends when its last connection has, or when its
//!   time is up.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytes::Bytes;
use ipnet::IpNet;
use rustix::io::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::LocalSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::descriptors::{Shortage, is_of_reserve, is_shortage, reserve};
use crate::metrics::{Limit, Metrics};

/// Pause after a failed `accept`: out of descriptors, mostly; let some close.
/// Meanwhile clients wait in the listener's queue.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Time for a client that is turned away to read why and to close.
const PARTING: Duration = Duration::from_secs(1);

/// Clients that have this time at once; others are closed without a word.
const PARTINGS: usize = 32;

/// Threads per worker for what blocks: name resolution and key making.
pub(super) const BLOCKING_THREADS: usize = 32;

/// Rest of a blocking thread before it ends.
const BLOCKING_IDLE: Duration = Duration::from_secs(10);

/// Which clients are served, and how many.
#[derive(Clone, Debug)]
pub struct ClientLimits {
    /// Open connections of the whole process.
    pub connections: usize,
    /// Open connections of one address.
    pub client_connections: usize,
    /// Networks that clients may come from.
    pub networks: Vec<IpNet>,
    /// What a client over one of the limits is told.
    pub refusals: Refusals,
}

/// What a client that is one too many is told before it is closed, by the limit
/// it ran into: each a whole answer.
#[derive(Clone, Debug, Default)]
pub struct Refusals {
    /// `MAX_CONNECTIONS`.
    pub connections: Bytes,
    /// `MAX_CLIENT_CONNECTIONS`.
    pub client_connections: Bytes,
    /// The system's limit of open files.
    pub descriptors: Bytes,
}

/// A worker as its handler sees it.
#[derive(Clone)]
pub struct Worker {
    /// Its number, from 0.
    pub index: usize,
    /// Cancelled when the drain begins.
    pub drain: CancellationToken,
    /// The worker's tasks: it ends when they have.
    pub tasks: TaskTracker,
}

/// The listener that a connection came in by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// `PROXY_LISTEN`: HTTP comes first.
    Proxy,
    /// `SNI_LISTEN`: TLS comes first.
    Sni,
}

/// An accepted connection.
pub struct Client {
    /// The socket.
    pub stream: TcpStream,
    /// The client's address.
    pub address: SocketAddr,
    /// Where it came in.
    pub door: Door,
    /// Counts the connection for as long as it is kept.
    pub admitted: Admitted,
}

/// The running workers.
pub struct Workers {
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` threads that accept from all `listeners`. `make` runs on
    /// each of them and returns what serves a connection to its end, as a local
    /// task of that worker. When `drain` is cancelled each worker stops
    /// accepting and gets `drain_timeout` to finish.
    ///
    /// # Errors
    ///
    /// A listener cannot be shared, or a thread cannot be started.
    pub fn start<S, F>(
        count: NonZeroUsize,
        listeners: &[(Door, std::net::TcpListener)],
        limits: ClientLimits,
        metrics: &Arc<Metrics>,
        drain: &CancellationToken,
        drain_timeout: Duration,
        make: impl Fn(&Worker) -> S + Clone + Send + 'static,
    ) -> io::Result<Self>
    where
        S: Fn(Client) -> F + 'static,
        F: Future<Output = ()> + 'static,
    {
        let gate = Arc::new(Gate::new(limits, Arc::clone(metrics)));
        let (peers, inboxes): (Vec<_>, Vec<_>) = (0..count.get()).map(|_| Peer::new()).unzip();
        let peers: Arc<[Peer]> = peers.into();
        let mut threads = Vec::new();
        for (index, inbox) in inboxes.into_iter().enumerate() {
            let worker = Worker { index, drain: drain.clone(), tasks: TaskTracker::new() };
            let accept = Accept {
                listeners: clone_all(listeners)?,
                inbox,
                gate: Arc::clone(&gate),
                peers: Arc::clone(&peers),
            };
            let make = make.clone();
            let run = move || run_worker(worker, accept, drain_timeout, make);
            threads.push(thread::Builder::new().name(format!("worker-{index}")).spawn(run)?);
        }
        Ok(Self { threads })
    }

    /// Waits until all workers have ended. Blocks.
    pub fn join(self) {
        for thread in self.threads {
            // A panic was logged by the hook; the others end all the same.
            let _ = thread.join();
        }
    }
}

/// A worker as its neighbours see it.
struct Peer {
    connections: AtomicUsize,
    inbox: UnboundedSender<Handover>,
}

struct Handover {
    stream: std::net::TcpStream,
    address: SocketAddr,
    door: Door,
    admitted: Admitted,
}

impl Peer {
    fn new() -> (Self, UnboundedReceiver<Handover>) {
        let (inbox, receiver) = unbounded_channel();
        (Self { connections: AtomicUsize::new(0), inbox }, receiver)
    }
}

/// What one worker's accept loop needs.
struct Accept {
    listeners: Vec<(Door, std::net::TcpListener)>,
    inbox: UnboundedReceiver<Handover>,
    gate: Arc<Gate>,
    peers: Arc<[Peer]>,
}

fn run_worker<S, F>(
    worker: Worker,
    accept: Accept,
    drain_timeout: Duration,
    make: impl FnOnce(&Worker) -> S,
) where
    S: Fn(Client) -> F + 'static,
    F: Future<Output = ()> + 'static,
{
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_IDLE)
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "worker has no runtime");
            return;
        }
    };
    LocalSet::new().block_on(&runtime, async move {
        let serve = make(&worker);
        let serve = |client: Client| {
            // Small writes must not wait for acknowledgements; failure costs only speed.
            let _ = client.stream.set_nodelay(true);
            tokio::task::spawn_local(worker.tasks.track_future(serve(client)));
        };
        if let Err(error) = accept.run(&worker, serve).await {
            tracing::error!(%error, "worker cannot accept");
        }
        worker.tasks.close();
        if timeout(drain_timeout, worker.tasks.wait()).await.is_err() {
            warn!(connections = worker.tasks.len(), "drain timed out, closing what is left");
        }
    });
    // A name still being resolved must not keep the process.
    runtime.shutdown_background();
}

impl Accept {
    /// Accepts until the drain begins.
    async fn run(mut self, worker: &Worker, serve: impl Fn(Client)) -> io::Result<()> {
        let listeners = std::mem::take(&mut self.listeners).into_iter();
        let listeners = listeners.map(|(door, listener)| Ok((door, register(listener)?)));
        let mut listeners = listeners.collect::<io::Result<Vec<_>>>()?;
        loop {
            // Not always the same one first: it could starve the others.
            listeners.rotate_left(1);
            tokio::select! {
                biased;
                () = worker.drain.cancelled() => break,
                Some(handover) = self.inbox.recv() => take_over(handover, &serve),
                (door, accepted) = accept_any(&listeners) => match accepted {
                    Ok((stream, address)) => {
                        self.place(worker.index, (stream, address, door), &serve);
                    }
                    Err(error) if is_of_one_client(&error) => {
                        debug!(%error, "a client left before it was accepted");
                    }
                    Err(error) => {
                        self.gate.cannot_accept(&error);
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        // From now on the peers keep what they would have handed over.
        self.inbox.close();
        while let Ok(handover) = self.inbox.try_recv() {
            take_over(handover, &serve);
        }
        for (door, listener) in listeners {
            self.accept_waiting(worker.index, door, &listener.into_std()?, &serve);
        }
        Ok(())
    }

    /// Serves what waits to be accepted: to those clients the connection
    /// stands, and its end would be no refusal. The runtime may not know of
    /// them yet, so the socket itself is asked.
    fn accept_waiting(
        &self,
        own: usize,
        door: Door,
        listener: &std::net::TcpListener,
        serve: &impl Fn(Client),
    ) {
        while let Ok((stream, address)) = listener.accept() {
            match stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)) {
                Ok(stream) => self.place(own, (stream, address, door), serve),
                Err(error) => debug!(%error, "connection lost at the drain"),
            }
        }
    }

    /// Serves the connection here, or hands it to the worker with the fewest.
    fn place(
        &self,
        own: usize,
        (stream, address, door): (TcpStream, SocketAddr, Door),
        serve: &impl Fn(Client),
    ) {
        let mut admitted = match self.gate.admit(&stream, address.ip()) {
            Ok(admitted) => admitted,
            // Inside TLS there is nothing to be told.
            Err(Turned::Over(refusal)) if door == Door::Proxy => {
                return self.gate.tell(stream, refusal);
            }
            Err(_) => return,
        };
        let load = |index: usize| self.peers[index].connections.load(Ordering::Relaxed);
        let least = (0..self.peers.len()).min_by_key(|&index| load(index)).unwrap_or(own);
        let index = if load(own) > load(least) { least } else { own };
        admitted.settle(Arc::clone(&self.peers), index);
        if index == own {
            serve(Client { stream, address, door, admitted });
            return;
        }
        match stream.into_std() {
            Ok(stream) => {
                let handover = Handover { stream, address, door, admitted };
                // A closed inbox is a worker that drains.
                if let Err(refused) = self.peers[index].inbox.send(handover) {
                    take_over(refused.0, serve);
                }
            }
            Err(error) => debug!(%error, "connection lost in hand-over"),
        }
    }
}

/// The same sockets for one more worker.
fn clone_all(
    listeners: &[(Door, std::net::TcpListener)],
) -> io::Result<Vec<(Door, std::net::TcpListener)>> {
    listeners.iter().map(|(door, listener)| Ok((*door, listener.try_clone()?))).collect()
}

/// The listener for the present runtime.
fn register(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// The next connection to any of the listeners.
async fn accept_any(
    listeners: &[(Door, TcpListener)],
) -> (Door, io::Result<(TcpStream, SocketAddr)>) {
    poll_fn(|cx| {
        let accepted =
            listeners.iter().find_map(|(door, listener)| match listener.poll_accept(cx) {
                Poll::Ready(accepted) => Some((*door, accepted)),
                Poll::Pending => None,
            });
        accepted.map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

/// The half of the reserve, which serves the clients that are in.
fn reserve_for_partings() -> usize {
    usize::try_from(reserve() / 2).unwrap_or(PARTINGS)
}

/// Whether `error` of an `accept` is that of a connection which is gone with
/// it: accept(2) passes on what the network said of it.
fn is_of_one_client(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::CONNABORTED
                | Errno::CONNRESET
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::NONET
                | Errno::NOPROTOOPT
                | Errno::OPNOTSUPP
                | Errno::PROTO
                | Errno::TIMEDOUT
        )
    )
}

fn take_over(handover: Handover, serve: &impl Fn(Client)) {
    let Handover { stream, address, door, admitted } = handover;
    match TcpStream::from_std(stream) {
        Ok(stream) => serve(Client { stream, address, door, admitted }),
        Err(error) => debug!(%error, "connection lost in hand-over"),
    }
}

/// Who is let in, for the whole process.
struct Gate {
    limits: ClientLimits,
    metrics: Arc<Metrics>,
    open: AtomicUsize,
    by_address: Mutex<HashMap<IpAddr, usize>>,
    shortage: Shortage,
    partings: Arc<Semaphore>,
}

/// Why a client is not let in.
enum Turned {
    /// It is none of ours.
    Stranger,
    /// It is one too many, and this says of what.
    Over(Bytes),
}

impl Gate {
    fn new(limits: ClientLimits, metrics: Arc<Metrics>) -> Self {
        Self {
            limits,
            metrics,
            open: AtomicUsize::new(0),
            by_address: Mutex::default(),
            shortage: Shortage::default(),
            // They hold descriptors of the reserve.
            partings: Arc::new(Semaphore::new(PARTINGS.min(reserve_for_partings()))),
        }
    }

    /// Notes that `accept` failed, with a client waiting.
    fn cannot_accept(&self, error: &io::Error) {
        // Clients wait; each shortage counts once, not each try.
        if self.shortage.met(error) && is_shortage(error) {
            self.metrics.limited(Limit::Descriptors);
        }
    }

    /// Counts the connection in, or refuses it.
    fn admit(self: &Arc<Self>, stream: &TcpStream, ip: IpAddr) -> Result<Admitted, Turned> {
        let ip = ip.to_canonical();
        if !self.limits.networks.iter().any(|network| network.contains(&ip)) {
            self.metrics.limited(Limit::ClientNetworks);
            debug!(client.addr = %ip, "client is outside CLIENT_NETWORKS");
            return Err(Turned::Stranger);
        }
        let admitted = Admitted::count(self, ip);
        let (open, of_client) = (self.open.load(Ordering::Relaxed), admitted.of_client);
        let refusals = &self.limits.refusals;
        let (exceeded, refusal) = if is_of_reserve(stream) {
            let _ = self.shortage.met("the last file descriptors are for the clients that are in");
            (Limit::Descriptors, &refusals.descriptors)
        } else if open > self.limits.connections {
            (Limit::Connections, &refusals.connections)
        } else if of_client > self.limits.client_connections {
            (Limit::ClientConnections, &refusals.client_connections)
        } else {
            return Ok(admitted);
        };
        self.metrics.limited(exceeded);
        debug!(client.addr = %ip, limit = exceeded.as_str(), open, of_client, "client turned away");
        Err(Turned::Over(refusal.clone()))
    }

    /// Tells a client why it is one too many, in a local task.
    fn tell(&self, stream: TcpStream, refusal: Bytes) {
        let Ok(place) = Arc::clone(&self.partings).try_acquire_owned() else {
            return;
        };
        tokio::task::spawn_local(async move {
            let _ = timeout(PARTING, part(stream, &refusal)).await;
            drop(place);
        });
    }
}

/// Sends `refusal` and waits for the client to close: a socket that is closed
/// with bytes unread resets the connection, and the client, whose request may
/// be on its way, would see that instead.
async fn part(mut stream: TcpStream, refusal: &[u8]) -> io::Result<()> {
    stream.write_all(refusal).await?;
    stream.shutdown().await?;
    let mut unread = [0; 1024];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

/// A counted connection; counted out when dropped.
pub struct Admitted {
    gate: Arc<Gate>,
    ip: IpAddr,
    of_client: usize,
    worker: Option<(Arc<[Peer]>, usize)>,
}

impl Admitted {
    fn count(gate: &Arc<Gate>, ip: IpAddr) -> Self {
        gate.open.fetch_add(1, Ordering::Relaxed);
        let mut by_address = gate.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let of_client = by_address.entry(ip).or_default();
        *of_client += 1;
        Self { of_client: *of_client, gate: Arc::clone(gate), ip, worker: None }
    }

    fn settle(&mut self, peers: Arc<[Peer]>, index: usize) {
        peers[index].connections.fetch_add(1, Ordering::Relaxed);
        self.worker = Some((peers, index));
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.gate.open.fetch_sub(1, Ordering::Relaxed);
        if let Some((peers, index)) = &self.worker {
            peers[*index].connections.fetch_sub(1, Ordering::Relaxed);
        }
        let mut by_address = self.gate.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_client) = by_address.get_mut(&self.ip) {
            *of_client -= 1;
            if *of_client == 0 {
                by_address.remove(&self.ip);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn what_has_connected_when_the_drain_begins_is_served() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let waiting: Vec<_> =
            (0..5).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
        let drain = CancellationToken::new();
        drain.cancel();
        let limits = ClientLimits {
            connections: 10,
            client_connections: 10,
            networks: vec!["127.0.0.0/8".parse().unwrap()],
            refusals: Refusals::default(),
        };
        let (sender, served) = mpsc::channel();
        let make = move |_: &Worker| {
            let sender = sender.clone();
            move |client: Client| {
                let sender = sender.clone();
                async move { sender.send(client.address).unwrap() }
            }
        };
        let count = NonZeroUsize::new(2).unwrap();
        let doors = [(Door::Proxy, listener)];
        let metrics = Arc::new(Metrics::new(2));
        let time = Duration::from_secs(5);
        let workers = Workers::start(count, &doors, limits, &metrics, &drain, time, make).unwrap();
        workers.join();
        let mut served: Vec<_> = served.try_iter().collect();
        let mut expected: Vec<_> =
            waiting.iter().map(|stream| stream.local_addr().unwrap()).collect();
        served.sort_unstable();
        expected.sort_unstable();
        assert_eq!(served, expected);
    }
}
