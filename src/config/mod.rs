//! Settings: every variable once, and the only reader of the environment.
//!
//! [`VARIABLES`] is the registry: name, default, unit and meaning. `--help`,
//! the example files and the README table are checked against it.
//! [`Config::from_env`] turns the raw texts into usable values in one step and
//! names the variable in every error.
//!
//! # Invariants
//!
//! - An empty value counts as unset.
//! - A value in the process environment goes before the same name in the env
//!   file, so a shared `.env` can be overridden per process.
//! - Variables of other programs are ignored; a near miss of one of ours is
//!   reported by [`Env::near_misses`].

mod advertise;
mod env;
mod listen;
mod origin;
mod parent;
mod parse;
mod secret;
mod variables;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use http::{StatusCode, Uri};
use ipnet::IpNet;
use thiserror::Error;
use url::Url;

pub use advertise::{Advertise, reachable};
pub use env::Env;
pub use listen::Listen;
pub use origin::{ApiOrigin, is_address, normalize_host};
pub use parent::ParentProxy;
pub use parse::{AllowedHost, AllowedName, ConnectTo};
pub use secret::Secret;
pub use variables::{VARIABLES, Variable};

/// A setting that cannot be used. Ends the start with exit code 2.
#[derive(Debug, Error)]
#[error("{variable}: {problem}")]
pub struct ConfigError {
    /// The variable's name.
    pub variable: &'static str,
    /// What is wrong and what would be right.
    pub problem: String,
}

impl ConfigError {
    /// An error of `variable` with a text that says what would be right.
    pub fn new(variable: &'static str, problem: impl Into<String>) -> Self {
        Self { variable, problem: problem.into() }
    }
}

/// All settings of one sidecar.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen and with how many threads.
    pub listen: Listen,
    /// The shop's API and pages.
    pub api: Api,
    /// Which requests get the token.
    pub authorization: Authorization,
    /// Where tokens come from and when.
    pub refresh: Refresh,
    /// Where tokens rest.
    pub stores: Stores,
    /// Bounds on what one process takes on.
    pub limits: Limits,
    /// The own CA and the roots for parsers.
    pub ca: Ca,
    /// How upstreams are reached.
    pub upstream: Upstream,
    /// Who may use the proxy, and where it may lead.
    pub access: Access,
    /// What parsers are told.
    pub advertise: Advertise,
    /// Log filter and format.
    pub log: Log,
}

/// The shop: its API origins, its page, its cookie, the request that tells a
/// good token from a bad one.
#[derive(Clone, Debug)]
pub struct Api {
    /// API origins with the gateway's prefixes. `API_ORIGINS`, never empty.
    pub origins: Vec<ApiOrigin>,
    /// The page that sets the token's cookie. `SHOP_URL`.
    pub shop_url: Uri,
    /// Names of the token's cookie, best first. `TOKEN_COOKIE`.
    pub token_cookies: Vec<String>,
    /// The request that judges a token. `VERIFY_URL`, always at an API host.
    pub verify_url: Uri,
}

impl Api {
    /// The API hosts, each once, in order of appearance.
    #[must_use]
    pub fn hosts(&self) -> Vec<String> {
        let mut hosts: Vec<String> = Vec::new();
        for origin in &self.origins {
            if !hosts.contains(&origin.host) {
                hosts.push(origin.host.clone());
            }
        }
        hosts
    }
}

/// Which requests get the token.
#[derive(Clone, Copy, Debug)]
pub struct Authorization {
    /// Add `Authorization` also where the client sent none.
    /// `AUTHORIZATION=always`.
    pub always: bool,
    /// Leave a client's own live personal token alone.
    /// `PERSONAL_TOKENS=keep`.
    pub keep_personal: bool,
}

/// A place that tokens come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// A browser that opens the shop's page.
    FlareSolverr,
    /// The API's own anonymous sign-in.
    Direct,
}

impl SourceKind {
    /// The name in settings, logs and answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::FlareSolverr => "flaresolverr",
            Self::Direct => "direct",
        }
    }
}

/// Where tokens come from, and the limits of waiting for one.
#[derive(Clone, Debug)]
pub struct Refresh {
    /// Sources in order of preference. `TOKEN_SOURCES`, never empty.
    pub sources: Vec<SourceKind>,
    /// The solver's address. `FLARESOLVERR_URL`.
    pub flaresolverr_url: Option<Uri>,
    /// Wait for a source before the next one is started beside it.
    /// `SOURCE_PATIENCE`.
    pub patience: Duration,
    /// The solver's own limit for one page. `SOLVE_TIMEOUT`.
    pub solve_timeout: Duration,
    /// Longest time between two refreshes. `REFRESH_EVERY`.
    pub every: Duration,
    /// Longest time that a request is held. `HOLD_TIMEOUT`.
    pub hold_timeout: Duration,
    /// Status of a request whose hold ran out. `RETRY_STATUS`, 503 or 429.
    pub retry_status: StatusCode,
}

/// Where tokens rest between two runs of the process.
#[derive(Clone, Debug)]
pub struct Stores {
    /// The shared store, if there is one.
    pub redis: Option<RedisSettings>,
    /// The file with the token's line. `ENV_FILE`.
    pub env_file: PathBuf,
    /// Whether a missing file is created: only if `ENV_FILE` was set.
    pub create_env_file: bool,
    /// A token from the process environment. `CHITAI_GOROD_BEARER_TOKEN`.
    pub initial_token: Option<Secret>,
}

/// The Redis store. `REDIS_URL` and what goes with it.
#[derive(Clone, Debug)]
pub struct RedisSettings {
    /// `redis://`, `rediss://`, `unix://`, `redis+sentinel://` or
    /// `rediss+sentinel://`; may hold a password.
    pub url: Secret,
    /// `REDIS_PASSWORD`, which goes before one in the URL.
    pub password: Option<Secret>,
    /// File that holds the password, read for each connection, where neither
    /// `REDIS_PASSWORD` nor the URL has one. `REDIS_PASSWORD_FILE`.
    pub password_file: Option<PathBuf>,
    /// The password of the Sentinels themselves, if they have one.
    /// `REDIS_SENTINEL_PASSWORD`.
    pub sentinel_password: Option<Secret>,
    /// Key of the bare token. `REDIS_KEY`.
    pub key: String,
    /// Key of the cookies. `REDIS_COOKIES_KEY`.
    pub cookies_key: String,
    /// Longest life of the keys. `TOKEN_TTL`.
    pub ttl: Duration,
    /// PEM file with the server's CA. `REDIS_TLS_CA`.
    pub tls_ca: Option<PathBuf>,
    /// PEM file with the client certificate. `REDIS_TLS_CERT`.
    pub tls_cert: Option<PathBuf>,
    /// PEM file with the client key. `REDIS_TLS_KEY`.
    pub tls_key: Option<PathBuf>,
}

/// Bounds on what one process takes on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Open client connections. `MAX_CONNECTIONS`.
    pub connections: usize,
    /// Open connections of one client address. `MAX_CLIENT_CONNECTIONS`.
    pub client_connections: usize,
    /// Held requests. `MAX_HELD`.
    pub held: usize,
    /// Bytes kept of one request body. `REPLAY_BODY_LIMIT`.
    pub replay_body: usize,
    /// Bytes kept of all of them. `REPLAY_MEMORY`.
    pub replay_memory: usize,
}

/// The own CA and the roots for parsers.
#[derive(Clone, Debug)]
pub struct Ca {
    /// Folder of `ca.pem` and `ca.key`. `CA_DIR`.
    pub dir: PathBuf,
    /// Folder of `ca.pem` and `ca-bundle.pem`, for parsers. `TRUST_DIR`.
    pub trust_dir: PathBuf,
    /// Roots that the bundle gets besides the public ones. `EXTRA_CA_FILE`.
    pub extra_file: Option<PathBuf>,
}

/// How upstreams are reached.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Roots that upstreams may have besides the public ones.
    /// `UPSTREAM_CA_FILE`.
    pub ca_file: Option<PathBuf>,
    /// Destinations that are dialled elsewhere. `CONNECT_TO`.
    pub connect_to: Vec<ConnectTo>,
    /// Resolvers that are asked instead of the system. `UPSTREAM_DNS`, empty
    /// for the system.
    pub dns: Vec<SocketAddr>,
    /// The only parent proxy, for FlareSolverr's browser too. `UPSTREAM_PROXY`.
    pub proxy: Option<ParentProxy>,
    /// Longest time until a connection stands. `CONNECT_TIMEOUT`.
    pub connect_timeout: Duration,
    /// Longest time until the head of an answer. `UPSTREAM_TIMEOUT`.
    pub timeout: Duration,
    /// Open connections per origin. `UPSTREAM_CONNECTIONS`.
    pub connections: usize,
}

/// Who may use the proxy, and where it may lead.
#[derive(Clone, Debug)]
pub struct Access {
    /// Destinations allowed although not public. `ALLOW_HOSTS`.
    pub allow_hosts: Vec<AllowedHost>,
    /// Networks that clients may come from. `CLIENT_NETWORKS`.
    pub client_networks: Vec<IpNet>,
    /// `user:password` that clients must present. `PROXY_AUTH`.
    pub proxy_auth: Option<Secret>,
    /// Token that every POST on the admin port must present. `ADMIN_TOKEN`.
    pub admin_token: Option<Secret>,
}

/// Log filter and format.
#[derive(Clone, Debug)]
pub struct Log {
    /// Filter directives. `RUST_LOG`.
    pub filter: String,
    /// Lines of JSON instead of text. `LOG_FORMAT=json`.
    pub json: bool,
}

impl Config {
    /// Reads every section.
    ///
    /// # Errors
    ///
    /// Returns the first [`ConfigError`]: a value that does not parse, or
    /// values that do not go together.
    pub fn from_env(env: &Env) -> Result<Self, ConfigError> {
        let upstream = Upstream::from_env(env)?;
        let listen = Listen::from_env(env, upstream.connections)?;
        let access = Access::from_env(env)?;
        if listen.sni.is_some() && access.proxy_auth.is_some() {
            return Err(ConfigError::new(
                "SNI_LISTEN",
                "does not go with PROXY_AUTH: a client that comes by SNI cannot present credentials",
            ));
        }
        let ca = Ca::from_env(env);
        Ok(Self {
            advertise: Advertise::from_env(env, listen.proxy, &ca.trust_dir)?,
            listen,
            api: Api::from_env(env)?,
            authorization: Authorization::from_env(env)?,
            refresh: Refresh::from_env(env)?,
            stores: Stores::from_env(env)?,
            limits: Limits::from_env(env)?,
            ca,
            upstream,
            access,
            log: Log::from_env(env)?,
        })
    }
}

impl Api {
    /// Reads the section.
    fn from_env(env: &Env) -> Result<Self, ConfigError> {
        let origins = env.list("API_ORIGINS", ApiOrigin::parse)?;
        let verify_url = env.web_url("VERIFY_URL")?;
        let verify_host = verify_url.host().map(normalize_host).unwrap_or_default();
        if verify_url.scheme_str() != Some("https")
            || !origins.iter().any(|origin| origin.host == verify_host)
        {
            return Err(ConfigError::new(
                "VERIFY_URL",
                "must be an https:// URL at one of the API_ORIGINS, the token goes nowhere else",
            ));
        }
        let token_cookies = env.list("TOKEN_COOKIE", |name| {
            let named = !name.contains([';', '=', ' ', '"']);
            named
                .then(|| name.to_owned())
                .ok_or("expected cookie names, separated by commas".into())
        })?;
        Ok(Self { origins, shop_url: env.web_url("SHOP_URL")?, token_cookies, verify_url })
    }
}

impl Authorization {
    /// Reads the section.
    fn from_env(env: &Env) -> Result<Self, ConfigError> {
        Ok(Self {
            always: env.choice("AUTHORIZATION", &[("always", true), ("present", false)])?,
            keep_personal: env.choice("PERSONAL_TOKENS", &[("keep", true), ("replace", false)])?,
        })
    }
}

impl Refresh {
    /// Reads the section.
    fn from_env(env: &Env) -> Result<Self, ConfigError> {
        let flaresolverr_url = match env.given("FLARESOLVERR_URL") {
            Some(_) => Some(env.web_url("FLARESOLVERR_URL")?),
            None => None,
        };
        Ok(Self {
            sources: Self::sources(env, flaresolverr_url.is_some())?,
            flaresolverr_url,
            patience: env.duration("SOURCE_PATIENCE")?,
            solve_timeout: env.duration("SOLVE_TIMEOUT")?,
            every: env.duration("REFRESH_EVERY")?,
            hold_timeout: env.duration("HOLD_TIMEOUT")?,
            retry_status: env.choice(
                "RETRY_STATUS",
                &[("503", StatusCode::SERVICE_UNAVAILABLE), ("429", StatusCode::TOO_MANY_REQUESTS)],
            )?,
        })
    }

    /// The sources in order; the solver is left out of the default where its
    /// address is not known, and an error where it was asked for.
    fn sources(env: &Env, solver: bool) -> Result<Vec<SourceKind>, ConfigError> {
        let mut sources = env.list("TOKEN_SOURCES", |name| match name {
            "flaresolverr" => Ok(SourceKind::FlareSolverr),
            "direct" => Ok(SourceKind::Direct),
            other => Err(format!("{other:?} is no source, expected flaresolverr or direct")),
        })?;
        // The second mention of one could not be tried again.
        let mut known = Vec::new();
        sources.retain(|source| {
            let is_new = !known.contains(source);
            known.push(*source);
            is_new
        });
        if !solver && sources.contains(&SourceKind::FlareSolverr) {
            if env.given("TOKEN_SOURCES").is_some() {
                return Err(ConfigError::new(
                    "TOKEN_SOURCES",
                    "flaresolverr needs FLARESOLVERR_URL, such as http://flaresolverr:8191/v1",
                ));
            }
            sources.retain(|source| *source != SourceKind::FlareSolverr);
        }
        Ok(sources)
    }
}

impl Stores {
    /// Reads the section.
    fn from_env(env: &Env) -> Result<Self, ConfigError> {
        // Read in any case: a bad value is one, whether it is used today or not.
        let ttl = env.duration("TOKEN_TTL")?;
        Ok(Self {
            redis: match env.given("REDIS_URL") {
                Some(url) => Some(RedisSettings::from_env(env, url, ttl)?),
                None => None,
            },
            env_file: env.path("ENV_FILE").unwrap_or_default(),
            create_env_file: env.given("ENV_FILE").is_some(),
            initial_token: env.in_process("CHITAI_GOROD_BEARER_TOKEN").map(Secret::new),
        })
    }
}

impl RedisSettings {
    /// Reads the section.
    fn from_env(env: &Env, url: &str, ttl: Duration) -> Result<Self, ConfigError> {
        const SCHEMES: [&str; 5] =
            ["redis://", "rediss://", "unix://", "redis+sentinel://", "rediss+sentinel://"];
        if !SCHEMES.iter().any(|scheme| url.starts_with(scheme)) {
            return Err(ConfigError::new(
                "REDIS_URL",
                "expected redis://host:6379/0, rediss://host:6379/0, unix:///path or \
                 redis+sentinel://host:26379,…/service/0",
            ));
        }
        Ok(Self {
            url: Secret::new(url),
            password: env.verbatim("REDIS_PASSWORD").map(Secret::new),
            password_file: env.path("REDIS_PASSWORD_FILE"),
            sentinel_password: env.verbatim("REDIS_SENTINEL_PASSWORD").map(Secret::new),
            key: env.text("REDIS_KEY").to_owned(),
            cookies_key: env.text("REDIS_COOKIES_KEY").to_owned(),
            ttl,
            tls_ca: env.path("REDIS_TLS_CA"),
            tls_cert: env.path("REDIS_TLS_CERT"),
            tls_key: env.path("REDIS_TLS_KEY"),
        })
    }
}

impl RedisSettings {
    /// The hosts that the URL names: the server, or the Sentinels; none for a
    /// socket.
    #[must_use]
    pub fn hosts(&self) -> Vec<String> {
        let rest = self.url.expose().split_once("://").map_or("", |(_, rest)| rest);
        let authority = rest.split_once('/').map_or(rest, |(authority, _)| authority);
        let hosts = authority.rsplit_once('@').map_or(authority, |(_, hosts)| hosts);
        let host =
            |host| Url::parse(&format!("redis://{host}")).ok()?.host_str().map(str::to_owned);
        hosts.split(',').filter_map(host).collect()
    }
}

impl Limits {
    /// Reads the section.
    fn from_env(env: &Env) -> Result<Self, ConfigError> {
        Ok(Self {
            connections: env.count("MAX_CONNECTIONS", 1..=10_000_000)?,
            client_connections: env.count("MAX_CLIENT_CONNECTIONS", 1..=10_000_000)?,
            held: env.count("MAX_HELD", 0..=10_000_000)?,
            replay_body: env.size("REPLAY_BODY_LIMIT")?,
            replay_memory: env.size("REPLAY_MEMORY")?,
        })
    }
}

impl Ca {
    /// Reads the section.
    fn from_env(env: &Env) -> Self {
        let dir = env.path("CA_DIR").unwrap_or_default();
        Self {
            trust_dir: env.path("TRUST_DIR").unwrap_or_else(|| dir.clone()),
            dir,
            extra_file: env.path("EXTRA_CA_FILE"),
        }
    }
}

impl Upstream {
    /// Reads the section.
    fn from_env(env: &Env) -> Result<Self, ConfigError> {
        Ok(Self {
            ca_file: env.path("UPSTREAM_CA_FILE"),
            connect_to: env.list("CONNECT_TO", ConnectTo::parse)?,
            dns: env.list("UPSTREAM_DNS", parse::dns_server)?,
            proxy: env.parsed("UPSTREAM_PROXY", ParentProxy::parse)?,
            connect_timeout: env.duration("CONNECT_TIMEOUT")?,
            timeout: env.duration("UPSTREAM_TIMEOUT")?,
            connections: env.count("UPSTREAM_CONNECTIONS", 1..=1_000_000)?,
        })
    }
}

impl Access {
    /// Reads the section.
    fn from_env(env: &Env) -> Result<Self, ConfigError> {
        let proxy_auth = env.verbatim("PROXY_AUTH");
        if proxy_auth.is_some_and(|pair| !pair.contains(':')) {
            return Err(ConfigError::new("PROXY_AUTH", "expected user:password"));
        }
        Ok(Self {
            allow_hosts: env.list("ALLOW_HOSTS", AllowedHost::parse)?,
            client_networks: env.list("CLIENT_NETWORKS", parse::networks)?.concat(),
            proxy_auth: proxy_auth.map(Secret::new),
            admin_token: env.given("ADMIN_TOKEN").map(Secret::new),
        })
    }
}

impl Log {
    /// Reads the section.
    ///
    /// # Errors
    ///
    /// Returns [`ConfigError`] for an unknown `LOG_FORMAT`.
    pub fn from_env(env: &Env) -> Result<Self, ConfigError> {
        Ok(Self {
            filter: env.text("RUST_LOG").to_owned(),
            json: env.choice("LOG_FORMAT", &[("text", false), ("json", true)])?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::from_env(&Env::from_pairs(variables.iter().copied()))
    }

    #[test]
    fn hosts_of_redis_are_those_that_the_url_names() {
        for (url, hosts) in [
            ("redis://host", &["host"][..]),
            ("redis://user:p%40ss@[::1]:6379/2", &["[::1]"]),
            ("unix:///run/redis.sock?db=1", &[]),
            ("redis+sentinel://one:1,two/service/0", &["one", "two"]),
            ("rediss+sentinel://user:p%2Css@one,two:2,[::1]/service", &["one", "two", "[::1]"]),
        ] {
            let config = read(&[("REDIS_URL", url)]).unwrap();
            assert_eq!(config.stores.redis.unwrap().hosts(), hosts, "{url}");
        }
    }

    #[test]
    fn a_source_is_asked_once_however_often_it_is_named() {
        let config = read(&[
            ("TOKEN_SOURCES", "direct,flaresolverr,direct"),
            ("FLARESOLVERR_URL", "http://solver:8191/v1"),
        ]);
        let sources = config.unwrap().refresh.sources;
        assert_eq!(sources, [SourceKind::Direct, SourceKind::FlareSolverr]);
    }

    #[test]
    fn a_url_with_a_port_that_is_none_is_an_error() {
        for url in ["http://solver:99999/v1", "http://solver:0/v1", "http://a:1[::1]:2/"] {
            let error = read(&[("FLARESOLVERR_URL", url)]).unwrap_err();
            assert_eq!(error.variable, "FLARESOLVERR_URL", "{url}");
        }
    }
}
