//! Where the Redis server is: by its URL, or by the word of Sentinels.
//!
//! # Invariants
//!
//! - Who is the primary is asked anew for each connection, of all Sentinels at
//!   once: one that hangs costs nothing while another answers.
//! - A server that a Sentinel names is believed only if it says itself that it
//!   is the primary.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use futures_util::future::select_ok;
use redis::{
    Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo as _,
    RedisConnectionInfo, RedisError, RedisResult, TlsCertificates, TlsMode,
    io::tcp::TcpSettings,
    sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType},
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use rustls::sign::CertifiedKey;
use tokio::task::spawn_blocking;

use super::link::explained;
use crate::config::{RedisSettings, Secret};
use crate::token::StoreError;

/// The port of a Sentinel whose address names none.
const SENTINEL_PORT: u16 = 26_379;

/// A server, or what is needed to find it.
pub(super) struct Place {
    way: Way,
    certificates: Option<TlsCertificates>,
    /// Read for each connection, since it may come or change after the start.
    password_file: Option<PathBuf>,
}

enum Way {
    Server(ConnectionInfo),
    Sentinels(Sentinels),
}

/// A group of Sentinels, and what it watches.
struct Sentinels {
    nodes: Vec<ConnectionAddr>,
    /// Their own password; the servers have another.
    password: Option<Secret>,
    service: String,
    /// User, password and database at the servers.
    login: RedisConnectionInfo,
    tls: bool,
}

impl Place {
    /// Checks the settings and reads the TLS files. Does not connect.
    pub(super) fn new(settings: &RedisSettings) -> Result<Self, StoreError> {
        let mut way = way(settings)?;
        if let Some(password) = &settings.password {
            way.log_in_by(password.expose());
        }
        let certificates = certificates(settings, way.is_encrypted())?;
        let password_file = match way.login().password() {
            Some(_) => None,
            None => settings.password_file.clone(),
        };
        let place = Self { way, certificates, password_file };
        place.check()?;
        Ok(place)
    }

    /// Makes what [`Place::client`] makes, as far as that goes without the net.
    fn check(&self) -> Result<(), StoreError> {
        match &self.way {
            Way::Server(info) => self.server(info.clone()).map(|_| ()),
            Way::Sentinels(sentinels) => {
                let mut nodes = sentinels.nodes.iter();
                nodes
                    .try_for_each(|node| self.asking(sentinels, node, &sentinels.login).map(|_| ()))
            }
        }
    }

    /// Whether another server may be in charge by the next connection.
    pub(super) fn may_move(&self) -> bool {
        matches!(self.way, Way::Sentinels(_))
    }

    /// A client of the server, with the password as it is now. Asks the
    /// Sentinels, where there are some, and is not bounded in time then.
    pub(super) async fn client(&self) -> Result<Client, StoreError> {
        let login = self.login().await?;
        match &self.way {
            Way::Server(info) => self.server(info.clone().set_redis_settings(login)),
            Way::Sentinels(sentinels) => self.primary(sentinels, &login).await,
        }
    }

    fn server(&self, info: ConnectionInfo) -> Result<Client, StoreError> {
        match &self.certificates {
            None => Client::open(info).map_err(|_| StoreError::RedisUrl),
            Some(certificates) => Client::build_with_tls(info, certificates.clone())
                .map_err(|_| StoreError::RedisTlsContent),
        }
    }

    /// Of all answers, the first that leads to a primary.
    async fn primary(
        &self,
        sentinels: &Sentinels,
        login: &RedisConnectionInfo,
    ) -> Result<Client, StoreError> {
        let mut asked = Vec::with_capacity(sentinels.nodes.len());
        for node in &sentinels.nodes {
            let mut sentinel = self.asking(sentinels, node, login)?;
            asked.push(Box::pin(async move { sentinel.async_get_client().await }));
        }
        match select_ok(asked).await {
            Ok((client, _slower)) => by_this_login(&client, login),
            Err(error) if is_of_no_sentinel(&error) => Err(StoreError::RedisNoSentinel),
            Err(error) => Err(explained(&error)),
        }
    }

    /// The crate asks Sentinels in their order, and a first one that hangs
    /// would use up an operation's time. So each is asked by itself.
    fn asking(
        &self,
        sentinels: &Sentinels,
        node: &ConnectionAddr,
        login: &RedisConnectionInfo,
    ) -> Result<SentinelClient, StoreError> {
        let client = sentinels.client(node, login, self.certificates.as_ref());
        client.map_err(|_| StoreError::RedisTlsContent)
    }

    /// The login, with the password as it is now.
    async fn login(&self) -> Result<RedisConnectionInfo, StoreError> {
        let login = self.way.login().clone();
        let Some(path) = self.password_file.clone() else {
            return Ok(login);
        };
        let file = path.clone();
        // It may lie on a disk that hangs.
        let read = spawn_blocking(move || password_in(&file)).await;
        let password = read
            .unwrap_or_else(|died| Err(died.into()))
            .map_err(|reason| StoreError::RedisPasswordFile { path, reason: reason.into() })?;
        Ok(login.set_password(password))
    }
}

impl Way {
    fn login(&self) -> &RedisConnectionInfo {
        match self {
            Self::Server(info) => info.redis_settings(),
            Self::Sentinels(sentinels) => &sentinels.login,
        }
    }

    fn log_in_by(&mut self, password: &str) {
        let login = self.login().clone().set_password(password);
        match self {
            Self::Server(info) => *info = info.clone().set_redis_settings(login),
            Self::Sentinels(sentinels) => sentinels.login = login,
        }
    }

    fn is_encrypted(&self) -> bool {
        match self {
            Self::Server(info) => matches!(info.addr(), ConnectionAddr::TcpTls { .. }),
            Self::Sentinels(sentinels) => sentinels.tls,
        }
    }
}

impl Sentinels {
    fn client(
        &self,
        node: &ConnectionAddr,
        login: &RedisConnectionInfo,
        certificates: Option<&TlsCertificates>,
    ) -> RedisResult<SentinelClient> {
        let server = SentinelServerType::Master;
        let mut asking = SentinelClientBuilder::new([node.clone()], &self.service, server)?
            .set_client_to_redis_db(login.db())
            .set_client_to_redis_protocol(login.protocol())
            .set_client_to_redis_tcp_settings(tcp_settings())
            .set_client_to_sentinel_tcp_settings(tcp_settings());
        if let Some(user) = login.username() {
            asking = asking.set_client_to_redis_username(user);
        }
        if let Some(password) = login.password() {
            asking = asking.set_client_to_redis_password(password);
        }
        if let Some(password) = &self.password {
            asking = asking.set_client_to_sentinel_password(password.expose());
        }
        if self.tls {
            asking = asking.set_client_to_redis_tls_mode(TlsMode::Secure);
        }
        if let Some(certificates) = certificates {
            asking = asking
                .set_client_to_redis_certificates(certificates.clone())
                .set_client_to_sentinel_certificates(certificates.clone());
        }
        asking.build()
    }
}

fn way(settings: &RedisSettings) -> Result<Way, StoreError> {
    let url = settings.url.expose();
    let (scheme, rest) = url.split_once("://").ok_or(StoreError::RedisUrl)?;
    // `#insecure` would switch the check of the server's certificate off.
    if url.ends_with("#insecure") {
        return Err(StoreError::RedisUrl);
    }
    check_query(url)?;
    match scheme {
        "redis" | "rediss" | "unix" => server(url).map(Way::Server),
        "redis+sentinel" => sentinels(settings, rest, false).map(Way::Sentinels),
        "rediss+sentinel" => sentinels(settings, rest, true).map(Way::Sentinels),
        _ => Err(StoreError::RedisUrl),
    }
}

/// The crate passes over what it does not know.
fn check_query(url: &str) -> Result<(), StoreError> {
    let (address, query) = url.split_once('?').unwrap_or((url, ""));
    let is_known = |pair: &str| {
        let name = pair.split_once('=').map_or(pair, |(name, _)| name);
        ["db", "user", "pass", "protocol"].contains(&name)
    };
    let mut pairs = query.split('&').filter(|pair| !pair.is_empty());
    let is_read = if address.starts_with("unix:") { pairs.all(is_known) } else { query.is_empty() };
    if is_read { Ok(()) } else { Err(StoreError::RedisUrlQuery) }
}

fn server(url: &str) -> Result<ConnectionInfo, StoreError> {
    let info = url.into_connection_info().map_err(|_| StoreError::RedisUrl)?;
    if info.redis_settings().db() < 0 {
        return Err(StoreError::RedisUrl);
    }
    // The user may lack the right to say which library this is, and each try
    // would be in the server's `ACL LOG`.
    let login = info.redis_settings().clone().set_skip_set_lib_name();
    Ok(info.set_redis_settings(login).set_tcp_settings(tcp_settings()))
}

/// The crate's builder for Sentinels knows only parts of a login.
fn by_this_login(client: &Client, login: &RedisConnectionInfo) -> Result<Client, StoreError> {
    let info = client.get_connection_info().clone().set_redis_settings(login.clone());
    Client::open(info).map_err(|_| StoreError::RedisUrl)
}

/// The crate has no kind of its own for it.
fn is_of_no_sentinel(error: &RedisError) -> bool {
    error.kind() == ErrorKind::InvalidClientConfig
        && error.to_string().contains("not point to a sentinel")
}

fn tcp_settings() -> TcpSettings {
    TcpSettings::default().set_nodelay(true)
}

/// Reads `[user[:password]@]host[:port],…/service[/db]`.
fn sentinels(settings: &RedisSettings, rest: &str, tls: bool) -> Result<Sentinels, StoreError> {
    let (authority, path) = rest.split_once('/').ok_or(StoreError::RedisUrl)?;
    let (login, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (service, db) = path.split_once('/').unwrap_or((path, ""));
    if service.is_empty() || rest.contains(['?', '#']) {
        return Err(StoreError::RedisUrl);
    }
    // Whatever stands before it would be taken for the name, other hosts with it.
    if login.contains(['@', ',']) {
        return Err(StoreError::RedisUrlLogin);
    }
    let nodes: Result<Vec<_>, _> = hosts.split(',').map(|host| node(host, tls)).collect();
    Ok(Sentinels {
        nodes: nodes?,
        password: settings.sentinel_password.clone(),
        service: service.to_owned(),
        login: server(&format!("redis://{login}@host/{db}"))?.redis_settings().clone(),
        tls,
    })
}

fn node(host: &str, tls: bool) -> Result<ConnectionAddr, StoreError> {
    let has_port = host.contains(':') && !host.ends_with(']');
    let port = if has_port { String::new() } else { format!(":{SENTINEL_PORT}") };
    let scheme = if tls { "rediss" } else { "redis" };
    let info = server(&format!("{scheme}://{host}{port}"))?;
    Ok(info.addr().clone())
}

/// The addresses of the Sentinels.
#[cfg(test)]
pub(super) fn nodes(settings: &RedisSettings) -> Result<Vec<ConnectionAddr>, StoreError> {
    match way(settings)? {
        Way::Server(_) => Ok(Vec::new()),
        Way::Sentinels(sentinels) => Ok(sentinels.nodes),
    }
}

/// The file's text without the end of its line, as editors and `echo` leave it.
fn password_in(file: &Path) -> io::Result<String> {
    // A pipe would make us wait.
    if !fs::metadata(file)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let text = fs::read_to_string(file)?;
    let password = text.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        return Err(io::Error::other("it is empty"));
    }
    Ok(password.to_owned())
}

fn certificates(
    settings: &RedisSettings,
    encrypted: bool,
) -> Result<Option<TlsCertificates>, StoreError> {
    let root_cert = certificate(settings.tls_ca.as_deref(), "REDIS_TLS_CA")?;
    let client_cert = certificate(settings.tls_cert.as_deref(), "REDIS_TLS_CERT")?;
    let client_key = file(settings.tls_key.as_deref(), "REDIS_TLS_KEY")?;
    let client_tls = match (client_cert, client_key) {
        (None, None) => None,
        (Some(client_cert), Some(client_key)) => {
            check_pair(&client_cert, &client_key)?;
            Some(ClientTlsConfig { client_cert, client_key })
        }
        _ => return Err(StoreError::RedisTlsPair),
    };
    if client_tls.is_none() && root_cert.is_none() {
        return Ok(None);
    }
    if !encrypted {
        return Err(StoreError::RedisTlsScheme);
    }
    Ok(Some(TlsCertificates { client_tls, root_cert }))
}

/// A file that must hold a certificate: without one the crate would trust
/// nobody, and say so only when it connects.
fn certificate(path: Option<&Path>, variable: &'static str) -> Result<Option<Vec<u8>>, StoreError> {
    let content = file(path, variable)?;
    let (Some(content), Some(path)) = (&content, path) else {
        return Ok(content);
    };
    let mut found = CertificateDer::pem_slice_iter(content);
    if found.next().is_none() {
        return Err(StoreError::RedisTlsNoCertificate { variable, path: path.to_owned() });
    }
    Ok(Some(content.clone()))
}

/// The crate would find out when it connects, and the server's refusal says little.
fn check_pair(certificates: &[u8], key: &[u8]) -> Result<(), StoreError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificates).collect();
    let (Ok(chain), Ok(key)) = (chain, PrivateKeyDer::from_pem_slice(key)) else {
        return Err(StoreError::RedisTlsContent);
    };
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let pair = CertifiedKey::from_der(chain, key, &provider);
    pair.map(drop).map_err(|_| StoreError::RedisTlsContent)
}

fn file(path: Option<&Path>, variable: &'static str) -> Result<Option<Vec<u8>>, StoreError> {
    let Some(path) = path else { return Ok(None) };
    let content = fs::read(path).map_err(|reason| StoreError::RedisTlsFile {
        variable,
        path: path.to_owned(),
        reason: reason.into(),
    })?;
    Ok(Some(content))
}
