//! Where to listen.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::time::Duration;

use super::{ConfigError, Env};

/// Addresses, threads and the end of the process.
#[derive(Clone, Debug)]
pub struct Listen {
    /// The proxy's own address. `PROXY_LISTEN`.
    pub proxy: SocketAddr,
    /// The admin port's address. `ADMIN_LISTEN`.
    pub admin: SocketAddr,
    /// Where TLS comes straight in, if anywhere. `SNI_LISTEN`.
    pub sni: Option<SocketAddr>,
    /// Worker threads. `WORKERS`.
    pub workers: NonZeroUsize,
    /// Longest time that running answers get after SIGTERM. `DRAIN_TIMEOUT`.
    pub drain_timeout: Duration,
}

impl Listen {
    /// Reads the section. There are never more workers than connections to
    /// one origin, so that each worker has at least one of its own.
    pub(super) fn from_env(env: &Env, upstream_connections: usize) -> Result<Self, ConfigError> {
        let workers = match env.given("WORKERS") {
            Some(_) => env.count("WORKERS", 1..=64)?,
            None => std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(4),
        };
        let workers = NonZeroUsize::new(workers.min(upstream_connections));
        let listen = Self {
            proxy: env.address("PROXY_LISTEN")?,
            admin: env.address("ADMIN_LISTEN")?,
            sni: match env.given("SNI_LISTEN") {
                Some(_) => Some(env.address("SNI_LISTEN")?),
                None => None,
            },
            workers: workers.unwrap_or(NonZeroUsize::MIN),
            drain_timeout: env.duration("DRAIN_TIMEOUT")?,
        };
        listen.check_apart()?;
        Ok(listen)
    }

    /// No two addresses are one.
    fn check_apart(&self) -> Result<(), ConfigError> {
        let sni = self.sni.map(|sni| ("SNI_LISTEN", sni));
        let all = [Some(("PROXY_LISTEN", self.proxy)), Some(("ADMIN_LISTEN", self.admin)), sni];
        let all: Vec<_> = all.into_iter().flatten().collect();
        for (index, (name, address)) in all.iter().enumerate() {
            let clash = all[..index].iter().find(|(_, other)| are_one(*address, *other));
            if let Some((other_name, other)) = clash {
                let problem =
                    format!("{address} is taken by {other_name} ({other}), expected another port");
                return Err(ConfigError::new(name, problem));
            }
        }
        Ok(())
    }
}

/// Whether the system lets only one of two sockets listen; port 0 is whichever
/// is free.
fn are_one(one: SocketAddr, other: SocketAddr) -> bool {
    let (ip, other_ip) = (one.ip().to_canonical(), other.ip().to_canonical());
    one.port() == other.port()
        && one.port() != 0
        && (ip == other_ip || covers(ip, other_ip) || covers(other_ip, ip))
}

/// Whether `ip` stands for all addresses of the machine, `other` among them;
/// `::` stands for those of IPv4, too.
fn covers(ip: IpAddr, other: IpAddr) -> bool {
    ip.is_unspecified() && (ip.is_ipv6() || other.is_ipv4())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(proxy: &str, admin: &str, sni: &str) -> Result<Listen, ConfigError> {
        let variables = [("PROXY_LISTEN", proxy), ("ADMIN_LISTEN", admin), ("SNI_LISTEN", sni)];
        Listen::from_env(&Env::from_pairs(variables), 1)
    }

    fn check_clash(proxy: &str, admin: &str, sni: &str, names: [&str; 2]) {
        let error = read(proxy, admin, sni).unwrap_err().to_string();
        assert!(names.iter().all(|name| error.contains(name)), "{error}");
    }

    #[test]
    fn two_addresses_that_are_one_are_an_error_that_names_both() {
        check_clash("127.0.0.1:1", "127.0.0.1:1", "", ["ADMIN_LISTEN", "PROXY_LISTEN"]);
        check_clash("0.0.0.0:1", "127.0.0.1:1", "", ["ADMIN_LISTEN", "PROXY_LISTEN"]);
        check_clash("127.0.0.1:1", "[::]:1", "", ["ADMIN_LISTEN", "PROXY_LISTEN"]);
        check_clash("[::1]:1", "[::1]:2", "[::]:1", ["SNI_LISTEN", "PROXY_LISTEN"]);
        check_clash("127.0.0.1:1", "127.0.0.1:2", "0.0.0.0:2", ["SNI_LISTEN", "ADMIN_LISTEN"]);
    }

    #[test]
    fn addresses_that_differ_go_together() {
        read("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3").unwrap();
        read("127.0.0.1:1", "127.0.0.2:1", "[::1]:1").unwrap();
        read("0.0.0.0:1", "[::1]:1", "").unwrap();
        read("127.0.0.1:0", "127.0.0.1:0", "0.0.0.0:0").unwrap();
    }
}
