//! A shop and a sidecar on loopback. The shop is played in a thread of this
//! process; the sidecar is the real program, a process of its own.

pub(crate) mod client;
mod shop;
pub(crate) mod sidecar;

use std::path::Path;

use tempfile::TempDir;

use self::client::{Client, Way};
use self::shop::Shop;
use self::sidecar::Sidecar;

/// The API's name, as the default settings have it.
const API: &str = "web-agr.chitai-gorod.ru";

/// All names of the shop.
const NAMES: [&str; 3] = [API, "web-gate.chitai-gorod.ru", "www.chitai-gorod.ru"];

/// `{"alg":"HS256"}.{"exp":9999999999,"type":10}.sig`: lives until the year 2286.
const TOKEN: &str = "eyJhbGciOiJIUzI1NiJ9.eyJleHAiOjk5OTk5OTk5OTksInR5cGUiOjEwfQ.c2ln";

/// The shop and what a sidecar needs to find it. Sidecars that are started one
/// after the other have the same CA.
pub(crate) struct World {
    shop: Shop,
    folder: TempDir,
}

impl World {
    /// Plays the shop until the process ends.
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shop = Shop::start();
        std::fs::write(folder.path().join("shop-ca.pem"), shop.ca_pem()).unwrap();
        Self { shop, folder }
    }

    /// A sidecar with the default settings, but for these `variables`, as the
    /// child of `runner`, a command that becomes the program at its end.
    pub(crate) fn sidecar(&self, runner: &[&str], variables: &[(&str, &str)]) -> Sidecar {
        let in_folder = |name: &str| self.folder.path().join(name).display().to_string();
        let at = self.shop.tls_address();
        let redirects = NAMES.map(|name| format!("{name}:443={at}")).join(",");
        let own = [
            ("PROXY_LISTEN", "127.0.0.1:0"),
            ("ADMIN_LISTEN", "127.0.0.1:0"),
            ("LOG_FORMAT", "json"),
            ("CONNECT_TO", &redirects),
            ("UPSTREAM_CA_FILE", &in_folder("shop-ca.pem")),
            ("CA_DIR", &in_folder("certs")),
            ("ENV_FILE", &in_folder("token.env")),
            ("CHITAI_GOROD_BEARER_TOKEN", TOKEN),
        ];
        Sidecar::start(self.folder.path(), runner, own.iter().chain(variables).copied())
    }

    /// A client that goes by `way`, through `sidecar` where the way leads there.
    pub(crate) fn client(&self, way: Way, sidecar: &Sidecar) -> Client {
        match way {
            Way::Plain => Client::new(way, self.shop.plain_address(), self.shop.ca_pem()),
            Way::Tls => Client::new(way, self.shop.tls_address(), self.shop.ca_pem()),
            Way::Absolute | Way::Intercepted => {
                let ca = std::fs::read_to_string(self.ca_file()).unwrap();
                Client::new(way, sidecar.address(), &ca)
            }
        }
    }

    fn ca_file(&self) -> impl AsRef<Path> + use<> {
        self.folder.path().join("certs/ca.pem")
    }
}
