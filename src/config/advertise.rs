//! What parsers are told: where the proxy and the trust files are, as they see it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use http::Uri;

use super::{ConfigError, Env, normalize_host};

/// What `env` prints for parsers.
#[derive(Clone, Debug)]
pub struct Advertise {
    /// The proxy as a parser reaches it, without credentials: `http://host:port`.
    /// `ADVERTISE_URL`; its port is always named, since not all clients have the
    /// same default.
    pub url: Uri,
    /// The folder of `ca.pem` and `ca-bundle.pem` as a parser sees it.
    /// `ADVERTISE_TRUST_DIR`, absolute.
    pub trust_dir: PathBuf,
}

impl Advertise {
    /// Reads the section; the defaults are where the sidecar itself listens and
    /// keeps its files.
    pub(super) fn from_env(
        env: &Env,
        proxy: SocketAddr,
        trust_dir: &Path,
    ) -> Result<Self, ConfigError> {
        Ok(Self { url: url(env, proxy)?, trust_dir: folder(env, trust_dir)? })
    }
}

fn url(env: &Env, proxy: SocketAddr) -> Result<Uri, ConfigError> {
    let given = env.parsed("ADVERTISE_URL", given_authority)?;
    let authority = given.unwrap_or_else(|| reachable(proxy).to_string());
    let url = Uri::builder().scheme("http").authority(authority).path_and_query("/").build();
    url.map_err(|error| ConfigError::new("ADVERTISE_URL", error.to_string()))
}

/// The `host:port` of `http://host[:port]`. The error never shows the text: it
/// may hold credentials.
fn given_authority(text: &str) -> Result<String, String> {
    const PROBLEM: &str = "expected http://host:port without credentials and path: the proxy \
                           speaks plain HTTP to parsers";
    let uri: Uri = text.parse().map_err(|_| PROBLEM)?;
    let authority = uri.authority().ok_or(PROBLEM)?;
    let host = authority.host();
    let bare = uri.path() == "/" && uri.query().is_none();
    if uri.scheme_str() != Some("http") || host.is_empty() || !bare {
        return Err(PROBLEM.to_owned());
    }
    if normalize_host(host).parse().is_ok_and(|ip: IpAddr| ip.is_unspecified()) {
        return Err(format!(
            "nothing can connect to {host}, expected the sidecar's name or address"
        ));
    }
    let port = match authority.as_str().strip_prefix(host).ok_or(PROBLEM)?.strip_prefix(':') {
        None => 80,
        Some(port) => port.parse().ok().filter(|port: &u16| *port != 0).ok_or(PROBLEM)?,
    };
    Ok(format!("{host}:{port}"))
}

fn folder(env: &Env, trust_dir: &Path) -> Result<PathBuf, ConfigError> {
    match env.path("ADVERTISE_TRUST_DIR") {
        // Without a working folder there is no better name for it.
        None => Ok(std::path::absolute(trust_dir).unwrap_or_else(|_| trust_dir.to_owned())),
        Some(folder) if folder.is_absolute() => Ok(folder),
        Some(_) => Err(ConfigError::new(
            "ADVERTISE_TRUST_DIR",
            "expected an absolute path, as a parser sees it",
        )),
    }
}

/// An address to connect to for one to listen on.
#[must_use]
pub fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)], proxy: &str) -> Result<Advertise, ConfigError> {
        let env = Env::from_pairs(variables.iter().copied());
        Advertise::from_env(&env, proxy.parse().unwrap(), Path::new("certs"))
    }

    #[test]
    fn the_default_is_where_the_sidecar_itself_is() {
        for (listen, url) in [
            ("127.0.0.1:8080", "http://127.0.0.1:8080/"),
            ("0.0.0.0:3128", "http://127.0.0.1:3128/"),
            ("[::]:3128", "http://[::1]:3128/"),
        ] {
            let advertise = read(&[], listen).unwrap();
            assert_eq!(advertise.url.to_string(), url);
            assert!(advertise.trust_dir.is_absolute() && advertise.trust_dir.ends_with("certs"));
        }
    }

    #[test]
    fn the_port_is_always_named() {
        for (given, url) in
            [("http://proxy", "http://proxy:80/"), ("http://proxy:8080/", "http://proxy:8080/")]
        {
            let advertise = read(&[("ADVERTISE_URL", given)], "127.0.0.1:1").unwrap();
            assert_eq!(advertise.url.to_string(), url);
        }
    }

    #[test]
    fn what_no_parser_could_use_is_an_error_that_names_the_variable() {
        for (name, value) in [
            ("ADVERTISE_URL", "https://proxy:8080"),
            ("ADVERTISE_URL", "http://user:pass@proxy:8080"),
            ("ADVERTISE_URL", "http://proxy:8080/path"),
            ("ADVERTISE_URL", "http://proxy:8080/?x"),
            ("ADVERTISE_URL", "proxy"),
            ("ADVERTISE_URL", "http://proxy:0"),
            ("ADVERTISE_URL", "http://proxy:65536"),
            ("ADVERTISE_URL", "http://0.0.0.0:8080"),
            ("ADVERTISE_URL", "http://[::]:8080"),
            ("ADVERTISE_TRUST_DIR", "certs"),
        ] {
            let error = read(&[(name, value)], "127.0.0.1:1").unwrap_err().to_string();
            assert!(error.starts_with(name) && !error.contains("pass"), "{error}");
            assert!(!error.contains("https"), "{error}");
        }
    }
}
