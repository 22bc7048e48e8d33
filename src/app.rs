//! The one place that builds the parts and wires them; start, drain, stop.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Uri;
use thiserror::Error;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::info;
use url::Url;

use crate::admin::{self, AdminState};
use crate::config::{self, Config, ConfigError};
use crate::hints::{FIRST_LOOK, Hints};
use crate::metrics::Metrics;
use crate::net::{
    self, ClientLimits, Dialer, Door, Egress, Resolver, Servers, Ways, Worker, Workers,
};
use crate::proxy::{Bounds, Memory, Origins, Proxy, ProxyError, Service, Settings};
use crate::refresh::{Parts, RefreshSettings, Refresher, SetupError};
use crate::tls::{self, Authority, Leaves, TlsError, TrustBundle};
use crate::token::{Clock, EnvFile, RedisStore, Token, TokenCache};

/// Held requests give up this long before the drain ends.
const RELEASE_BEFORE_END: Duration = Duration::from_secs(5);

/// Why the sidecar could not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AppError {
    /// A setting that cannot be used; exit code 2.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The address is taken, or not this machine's, or the port is for root.
    #[error("{variable}: cannot listen on {address}: {error}{}", advice(*.address, .error))]
    Listen {
        /// The variable that names the address.
        variable: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: io::Error,
    },
    /// The refresher cannot be built.
    #[error(transparent)]
    Refresher(#[from] SetupError),
    /// No threads.
    #[error("cannot start the workers: {0}")]
    Workers(io::Error),
}

/// A running sidecar.
pub struct App {
    proxy_address: SocketAddr,
    admin_address: SocketAddr,
    workers: Workers,
    admin: JoinHandle<()>,
    refresher: Arc<Refresher>,
    cache: Arc<TokenCache>,
    drain: CancellationToken,
    release_held: CancellationToken,
    stop_admin: CancellationToken,
    drain_timeout: Duration,
}

impl App {
    /// Starts everything: the ports answer when this returns. The present
    /// runtime becomes the control runtime. The token is loaded in the
    /// background; requests that come before it wait for it.
    ///
    /// # Errors
    ///
    /// [`AppError`]; nothing is left running then.
    pub fn start(config: &Config) -> Result<Self, AppError> {
        net::raise_descriptor_limit();
        let doors = open_doors(&config.listen)?;
        let admin_listener = listen("ADMIN_LISTEN", config.listen.admin)?;
        let admin_address = address_of(&admin_listener)?;
        let addresses = doors.iter().map(|(_, listener)| address_of(listener));
        let mut own = addresses.collect::<Result<Vec<_>, _>>()?;
        let (proxy_address, sni_address) = (own[0], own.get(1).copied());
        own.push(admin_address);
        let core = Core::new(config, own)?;
        // After the files that are only read: it may make a CA.
        let trust = Trust::open(config)?;
        let refresher = core.refresher(config, Some(&config.stores))?;

        let drain = CancellationToken::new();
        let release_held = CancellationToken::new();
        let stop_admin = CancellationToken::new();
        let state = core.admin_state(config, &refresher, &drain);
        let admin = spawn_admin(admin_listener, state, stop_admin.clone())?;
        // Before the first request is let in: it joins the run that loads the stores.
        refresher.start();
        let drain_timeout = config.listen.drain_timeout;
        let cache = Arc::clone(&core.cache);
        core.watch_silence(FIRST_LOOK, &drain);
        let proxy = core.proxy(config, trust, &refresher, &release_held)?;
        let workers = start_workers(config, &doors, &proxy, &drain)?;
        net::check_descriptor_limit(config.limits.connections);
        info!(
            proxy = %proxy_address,
            admin = %admin_address,
            sni = sni_address.map(display),
            workers = config.listen.workers,
            version = env!("CARGO_PKG_VERSION"),
            "listening"
        );
        Ok(Self {
            proxy_address,
            admin_address,
            workers,
            admin,
            refresher,
            cache,
            drain,
            release_held,
            stop_admin,
            drain_timeout,
        })
    }

    /// Where the proxy listens.
    #[must_use]
    pub fn proxy_address(&self) -> SocketAddr {
        self.proxy_address
    }

    /// Where the admin port listens.
    #[must_use]
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// The current token.
    #[must_use]
    pub fn cache(&self) -> &Arc<TokenCache> {
        &self.cache
    }

    /// Reads the stores again: an operator's SIGHUP.
    pub fn reload_stores(&self) {
        let refresher = Arc::clone(&self.refresher);
        tokio::spawn(async move { refresher.reload_stores().await });
    }

    /// Stops accepting, lets running answers end within `DRAIN_TIMEOUT`, and
    /// stops.
    pub async fn drain(self) {
        info!(limit = %humantime::format_duration(self.drain_timeout), "draining");
        self.drain.cancel();
        let release_after = self.drain_timeout.saturating_sub(RELEASE_BEFORE_END);
        let release_held = self.release_held;
        let release = tokio::spawn(async move {
            tokio::time::sleep(release_after).await;
            release_held.cancel();
        });
        let workers = self.workers;
        // A panic inside was logged; the process ends either way.
        let _ = tokio::task::spawn_blocking(move || workers.join()).await;
        release.abort();
        self.refresher.close().await;
        self.stop_admin.cancel();
        let _ = self.admin.await;
        info!("stopped");
    }
}

/// What a refresh gave that was made without a running sidecar.
pub struct Refreshed {
    /// The token, with its source and expiry.
    pub published: Arc<crate::token::Published>,
    /// Stores that could not be written, in words.
    pub unsaved: Vec<String>,
    /// Whether there is any store to keep it.
    pub kept: bool,
}

/// One refresh without a sidecar: asks the sources, verifies, saves.
///
/// # Errors
///
/// [`AppError`] for settings; the inner error tells why no token came.
pub async fn refresh_once(
    config: &Config,
) -> Result<Result<Refreshed, crate::refresh::RefreshFailure>, AppError> {
    let core = Core::new(config, Vec::new())?;
    let refresher = core.refresher(config, None)?;
    let outcome = refresher.refresh_now().await;
    refresher.close().await;
    let published = match outcome {
        Ok(published) => published,
        Err(failure) => return Ok(Err(failure)),
    };
    let mut unsaved = Vec::new();
    if let Some(redis) = redis_store(&config.stores)?
        && let Err(error) = redis.save(&published, core.clock.now()).await
    {
        unsaved.push(error.to_string());
    }
    let env_file = env_file(&config.stores);
    if let Err(error) = env_file.save(&published.token) {
        unsaved.push(error.to_string());
    }
    let kept = config.stores.redis.is_some() || env_file.keeps();
    Ok(Ok(Refreshed { published, unsaved, kept }))
}

/// A token as a store holds it.
pub struct StoredToken {
    /// Which store.
    pub store: String,
    /// Its token; `None`: it has none, or an error in words.
    pub token: Result<Option<Token>, String>,
}

/// What each store holds.
///
/// # Errors
///
/// [`AppError::Config`] for unusable settings.
pub async fn stored_tokens(config: &Config) -> Result<Vec<StoredToken>, AppError> {
    let mut stored = Vec::new();
    if let Some(redis) = redis_store(&config.stores)? {
        let token = redis.load().await.map(|stored| stored.map(|stored| stored.token));
        stored.push(StoredToken {
            store: format!("redis key {}", config.stores.redis.as_ref().map_or("", |r| &r.key)),
            token: token.map_err(|error| error.to_string()),
        });
    }
    let file = env_file(&config.stores);
    stored.push(StoredToken {
        store: file.path().display().to_string(),
        token: file.load().map_err(|error| error.to_string()),
    });
    Ok(stored)
}

/// The parts of a sidecar, for asking them one by one. They publish, save and
/// make nothing.
pub struct Probes {
    /// How upstreams are reached.
    pub dialer: Arc<Dialer>,
    /// Verifier and sources; it has no stores.
    pub refresher: Arc<Refresher>,
    /// The keys in Redis, if it is set.
    pub redis: Option<RedisStore>,
    /// The line in the env file.
    pub env_file: EnvFile,
}

impl Probes {
    /// Builds the parts as a sidecar has them. Does no I/O but reading the
    /// files that the settings name.
    ///
    /// # Errors
    ///
    /// [`AppError`] for settings that cannot be used.
    pub fn new(config: &Config) -> Result<Self, AppError> {
        let listen = &config.listen;
        let own = [Some(listen.proxy), Some(listen.admin), listen.sni];
        let core = Core::new(config, own.into_iter().flatten().collect())?;
        Ok(Self {
            refresher: core.refresher(config, None)?,
            dialer: core.dialer,
            redis: redis_store(&config.stores)?,
            env_file: env_file(&config.stores),
        })
    }
}

/// The CA and what goes with it.
struct Trust {
    leaves: Leaves,
    bundle: TrustBundle,
}

impl Trust {
    fn open(config: &Config) -> Result<Self, ConfigError> {
        let at_ca = |error: TlsError| ConfigError::new("CA_DIR", error.to_string());
        let hosts = config.api.hosts();
        let authority = Arc::new(Authority::open(&config.ca.dir, &hosts).map_err(at_ca)?);
        let bundle = write_bundle(config, &authority)?;
        let leaves = Leaves::new(authority, &hosts).map_err(at_ca)?;
        Ok(Self { leaves, bundle })
    }
}

/// Writes what parsers need to trust the CA.
///
/// # Errors
///
/// [`ConfigError`] that names `EXTRA_CA_FILE` or `TRUST_DIR`.
pub fn write_bundle(config: &Config, authority: &Authority) -> Result<TrustBundle, ConfigError> {
    let extra: Option<&Path> = config.ca.extra_file.as_deref();
    let bundle = TrustBundle::build(authority, extra)
        .map_err(|error| ConfigError::new("EXTRA_CA_FILE", error.to_string()))?;
    bundle
        .write(&config.ca.trust_dir)
        .map_err(|error| ConfigError::new("TRUST_DIR", error.to_string()))?;
    Ok(bundle)
}

/// Parts that a sidecar and a lone refresh have in common.
struct Core {
    cache: Arc<TokenCache>,
    clock: Arc<Clock>,
    metrics: Arc<Metrics>,
    hints: Arc<Hints>,
    dialer: Arc<Dialer>,
}

impl Core {
    fn new(config: &Config, listeners: Vec<SocketAddr>) -> Result<Self, ConfigError> {
        let upstream = &config.upstream;
        let tls = tls::client_config(upstream.ca_file.as_deref())
            .map_err(|error| ConfigError::new("UPSTREAM_CA_FILE", error.to_string()))?;
        let egress = Egress::new(config.access.allow_hosts.clone(), listeners);
        let ways = Ways {
            connect_to: upstream.connect_to.clone(),
            parent: upstream.proxy.clone(),
            resolver: resolver(upstream)?,
        };
        let metrics = Arc::new(Metrics::new(config.listen.workers.get()));
        let limit = upstream.connect_timeout;
        Ok(Self {
            cache: Arc::new(TokenCache::new()),
            clock: Arc::new(Clock::new()),
            hints: Arc::new(Hints::new()),
            dialer: Arc::new(Dialer::new(egress, ways, tls, limit, Arc::clone(&metrics))),
            metrics,
        })
    }

    fn refresher(
        &self,
        config: &Config,
        stores: Option<&config::Stores>,
    ) -> Result<Arc<Refresher>, AppError> {
        let refresh = &config.refresh;
        let solver_tls = tls::client_config(None)
            .map_err(|error| ConfigError::new("FLARESOLVERR_URL", error.to_string()))?;
        let settings = RefreshSettings {
            shop_url: url("SHOP_URL", &config.api.shop_url)?,
            verify_url: url("VERIFY_URL", &config.api.verify_url)?,
            api_origins: api_urls(config)?,
            token_cookies: config.api.token_cookies.clone(),
            sources: refresh.sources.clone(),
            flaresolverr_url: match &refresh.flaresolverr_url {
                Some(address) => Some(url("FLARESOLVERR_URL", address)?),
                None => None,
            },
            solver_tls: (*solver_tls).clone(),
            solver_proxy: config.upstream.proxy.clone(),
            source_patience: refresh.patience,
            solve_timeout: refresh.solve_timeout,
            refresh_every: refresh.every,
            redis: match stores {
                Some(stores) => redis_store(stores)?,
                None => None,
            },
            env_file: stores.map(env_file),
            environment: match stores {
                Some(stores) => initial_token(stores)?,
                None => None,
            },
        };
        let parts = Parts {
            cache: Arc::clone(&self.cache),
            clock: Arc::clone(&self.clock),
            dialer: Arc::clone(&self.dialer),
            metrics: Arc::clone(&self.metrics),
        };
        Ok(Refresher::new(settings, parts, Handle::current())?)
    }

    fn admin_state(
        &self,
        config: &Config,
        refresher: &Arc<Refresher>,
        draining: &CancellationToken,
    ) -> AdminState {
        AdminState {
            cache: Arc::clone(&self.cache),
            refresher: Arc::clone(refresher),
            metrics: Arc::clone(&self.metrics),
            hints: Arc::clone(&self.hints),
            clock: Arc::clone(&self.clock),
            version: env!("CARGO_PKG_VERSION"),
            started: Instant::now(),
            draining: draining.clone(),
            admin_token: config.access.admin_token.clone(),
        }
    }

    /// Tells the log, `after` a time, that no request to the API has come, if so.
    fn watch_silence(&self, after: Duration, drain: &CancellationToken) {
        let watch = Arc::clone(&self.hints).watch(Arc::clone(&self.metrics), after);
        tokio::spawn(drain.clone().run_until_cancelled_owned(watch));
    }

    fn proxy(
        self,
        config: &Config,
        trust: Trust,
        refresher: &Arc<Refresher>,
        release_held: &CancellationToken,
    ) -> Result<Arc<Proxy>, AppError> {
        let origins = Origins::new(config.api.origins.clone())
            .map_err(|error| ConfigError::new("API_ORIGINS", error.to_string()))?;
        Ok(Arc::new(Proxy {
            origins,
            cache: self.cache,
            clock: self.clock,
            refresher: Arc::clone(refresher),
            dialer: self.dialer,
            leaves: trust.leaves,
            metrics: self.metrics,
            hints: self.hints,
            memory: Memory::new(config.limits.replay_memory),
            bounds: Bounds::default(),
            release_held: release_held.clone(),
            settings: Settings {
                authorization: config.authorization,
                token_cookies: config.api.token_cookies.clone(),
                proxy_auth: config.access.proxy_auth.clone(),
                hold_timeout: config.refresh.hold_timeout,
                retry_status: config.refresh.retry_status,
                max_held: config.limits.held,
                replay_body: config.limits.replay_body,
                upstream_timeout: config.upstream.timeout,
                upstream_connections: shares(
                    config.upstream.connections,
                    config.listen.workers.get(),
                ),
                ca_pem: trust.bundle.ca_pem,
                bundle_pem: trust.bundle.bundle_pem,
            },
        }))
    }
}

fn start_workers(
    config: &Config,
    doors: &[(Door, TcpListener)],
    proxy: &Arc<Proxy>,
    drain: &CancellationToken,
) -> Result<Workers, AppError> {
    let limits = ClientLimits {
        connections: config.limits.connections,
        client_connections: config.limits.client_connections,
        networks: config.access.client_networks.clone(),
        refusals: ProxyError::refusals(),
    };
    let make = {
        let proxy = Arc::clone(proxy);
        move |worker: &Worker| {
            let service = Service::start(&proxy, worker);
            move |client| std::rc::Rc::clone(&service).serve(client)
        }
    };
    let count = config.listen.workers;
    let timeout = config.listen.drain_timeout;
    Workers::start(count, doors, limits, &proxy.metrics, drain, timeout, make)
        .map_err(AppError::Workers)
}

fn spawn_admin(
    listener: TcpListener,
    state: AdminState,
    stop: CancellationToken,
) -> Result<JoinHandle<()>, AppError> {
    let address = address_of(&listener)?;
    let failed = |error| AppError::Listen { variable: "ADMIN_LISTEN", address, error };
    listener.set_nonblocking(true).map_err(failed)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
    Ok(tokio::spawn(admin::serve(listener, Arc::new(state), stop)))
}

/// Binds what clients come in by: `PROXY_LISTEN`, then `SNI_LISTEN` where it is
/// set.
fn open_doors(addresses: &config::Listen) -> Result<Vec<(Door, TcpListener)>, AppError> {
    let mut doors = vec![(Door::Proxy, listen("PROXY_LISTEN", addresses.proxy)?)];
    if let Some(sni) = addresses.sni {
        doors.push((Door::Sni, listen("SNI_LISTEN", sni)?));
    }
    Ok(doors)
}

/// Binds without `SO_REUSEPORT`, so that a second sidecar cannot share the port.
fn listen(variable: &'static str, address: SocketAddr) -> Result<TcpListener, AppError> {
    TcpListener::bind(address).map_err(|error| AppError::Listen { variable, address, error })
}

/// What to do where only root may listen on a port.
fn advice(address: SocketAddr, error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied && address.port() < 1024 {
        "; a port below 1024 needs CAP_NET_BIND_SERVICE or the sysctl \
         net.ipv4.ip_unprivileged_port_start, or take a port from 1024 up and lead this one to it \
         (a redirect, or the container's port mapping)"
    } else {
        ""
    }
}

fn address_of(listener: &TcpListener) -> Result<SocketAddr, AppError> {
    listener.local_addr().map_err(AppError::Workers)
}

/// The resolver for upstreams; its servers are asked on the present runtime.
fn resolver(upstream: &config::Upstream) -> Result<Resolver, ConfigError> {
    if upstream.dns.is_empty() {
        return Ok(Resolver::System);
    }
    let servers = Servers::new(&upstream.dns, upstream.connect_timeout, Handle::current());
    servers
        .map(Resolver::Servers)
        .map_err(|error| ConfigError::new("UPSTREAM_DNS", error.to_string()))
}

fn redis_store(stores: &config::Stores) -> Result<Option<RedisStore>, ConfigError> {
    let Some(redis) = &stores.redis else {
        return Ok(None);
    };
    let store = RedisStore::new(redis.clone());
    store.map(Some).map_err(|error| ConfigError::new(error.variable(), error.to_string()))
}

fn env_file(stores: &config::Stores) -> EnvFile {
    EnvFile::new(stores.env_file.clone(), stores.create_env_file)
}

fn initial_token(stores: &config::Stores) -> Result<Option<Token>, ConfigError> {
    let parsed = stores.initial_token.as_ref().map(|text| Token::parse(text.expose()));
    parsed
        .transpose()
        .map_err(|error| ConfigError::new("CHITAI_GOROD_BEARER_TOKEN", error.to_string()))
}

fn api_urls(config: &Config) -> Result<Vec<Url>, ConfigError> {
    let urls = config.api.origins.iter().map(|origin| {
        let text = format!("{}{}", origin.base_url(), origin.prefix);
        Url::parse(&text).map_err(|error| ConfigError::new("API_ORIGINS", error.to_string()))
    });
    urls.collect()
}

fn url(variable: &'static str, uri: &Uri) -> Result<Url, ConfigError> {
    Url::parse(&uri.to_string()).map_err(|error| ConfigError::new(variable, error.to_string()))
}

/// `total` in as equal parts as can be.
fn shares(total: usize, parts: usize) -> Vec<usize> {
    (0..parts).map(|index| total / parts + usize::from(index < total % parts)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_for_root_comes_with_advice() {
        let message = |kind: io::ErrorKind, port| {
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            AppError::Listen { variable: "SNI_LISTEN", address, error: kind.into() }.to_string()
        };
        let denied = message(io::ErrorKind::PermissionDenied, 443);
        assert!(denied.starts_with("SNI_LISTEN: cannot listen on 127.0.0.1:443: "), "{denied}");
        for way in ["CAP_NET_BIND_SERVICE", "ip_unprivileged_port_start", "from 1024 up"] {
            assert!(denied.contains(way), "{denied}");
        }
        for other in
            [message(io::ErrorKind::AddrInUse, 443), message(io::ErrorKind::PermissionDenied, 8443)]
        {
            assert!(!other.contains("1024"), "{other}");
        }
    }

    #[test]
    fn shares_add_up() {
        assert_eq!(shares(256, 4), [64; 4]);
        assert_eq!(shares(5, 2), [3, 2]);
    }
}
