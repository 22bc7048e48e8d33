//! Which client is led and made to trust by what: the README's table of clients.

use std::process::Command;

use super::Way;
use crate::support::World;

/// A row of the table.
pub(super) struct Client {
    pub(super) name: &'static str,
    /// Where its tests are, and how their names begin.
    tests: &'static str,
    ways: &'static [Way],
    /// The variables by which it finds the proxy.
    proxy: &'static [&'static str],
    proxy_note: &'static str,
    /// The variable by which it trusts the CA.
    trust: &'static [&'static str],
    trust_note: &'static str,
}

/// What most clients have in common.
const PLAIN: Client = Client {
    name: "",
    tests: "",
    ways: &[Way::Proxy, Way::Gateway, Way::Alias],
    proxy: &["HTTPS_PROXY"],
    proxy_note: "",
    trust: &["SSL_CERT_FILE"],
    trust_note: "",
};

pub(super) const REQUESTS: Client = Client {
    name: "Python requests",
    tests: "python::requests_",
    trust: &["REQUESTS_CA_BUNDLE"],
    ..PLAIN
};
pub(super) const URLLIB: Client =
    Client { name: "Python urllib", tests: "python::urllib_", ..PLAIN };
pub(super) const HTTPX: Client = Client { name: "Python httpx", tests: "python::httpx_", ..PLAIN };
pub(super) const AIOHTTP: Client = Client {
    name: "Python aiohttp",
    tests: "python::aiohttp_",
    proxy_note: ", only with `trust_env=True`; else the gateway or an alias",
    ..PLAIN
};
pub(super) const SCRAPY: Client = Client {
    name: "scrapy",
    tests: "python::scrapy_",
    trust: &[],
    trust_note: "does not verify",
    ..PLAIN
};
pub(super) const CURL_CFFI: Client = Client {
    name: "curl_cffi",
    tests: "python::curl_cffi_",
    proxy: &["https_proxy", "http_proxy"],
    proxy_note: " (lower case)",
    trust: &["CURL_CA_BUNDLE"],
    ..PLAIN
};
pub(super) const CURL: Client = Client {
    name: "curl",
    tests: "curl::curl_",
    proxy: &["https_proxy", "http_proxy"],
    proxy_note: " (lower case)",
    trust: &["CURL_CA_BUNDLE"],
    ..PLAIN
};
pub(super) const PHP_CURL: Client = Client {
    name: "PHP curl",
    tests: "php::php_curl_",
    proxy: &["https_proxy", "http_proxy"],
    proxy_note: " (lower case)",
    trust: &["PHP_INI_SCAN_DIR"],
    trust_note: ": a folder with an ini file that sets `curl.cainfo`; no other variable",
    ..PLAIN
};
pub(super) const NODE_FETCH: Client = Client {
    name: "Node fetch",
    tests: "node::fetch_",
    ways: &[Way::Gateway, Way::Alias],
    proxy: &[],
    proxy_note: "ignores proxies: the gateway or an alias",
    trust: &["NODE_EXTRA_CA_CERTS"],
    ..PLAIN
};
pub(super) const NODE_HTTPS: Client = Client {
    name: "Node https, axios",
    tests: "node::https_",
    trust: &["NODE_EXTRA_CA_CERTS"],
    ..PLAIN
};
/// Nothing but a proxy makes it special: where it knows of none it is [`NODE_HTTPS`].
pub(super) const NODE_AXIOS_OLD: Client = Client {
    name: "Node axios up to 1.7",
    tests: "node::axios_up_to_1_7_",
    ways: &[Way::Proxy],
    trust: &[],
    trust_note: "not needed",
    ..PLAIN
};
pub(super) const GO: Client = Client {
    name: "Go net/http",
    tests: "go::net_http_",
    proxy_note: ", never for localhost",
    ..PLAIN
};
pub(super) const JAVA: Client = Client {
    name: "Java HttpClient",
    tests: "java::http_client_",
    proxy: &["JAVA_TOOL_OPTIONS"],
    proxy_note: ": `-Dhttps.proxyHost=… -Dhttps.proxyPort=…`",
    trust: &["JAVA_TOOL_OPTIONS"],
    trust_note: ": `-Djavax.net.ssl.trustStore=… -Djavax.net.ssl.trustStorePassword=…`",
    ..PLAIN
};

const CLIENTS: [Client; 13] = [
    REQUESTS,
    URLLIB,
    HTTPX,
    AIOHTTP,
    SCRAPY,
    CURL_CFFI,
    CURL,
    PHP_CURL,
    NODE_FETCH,
    NODE_HTTPS,
    NODE_AXIOS_OLD,
    GO,
    JAVA,
];

/// The file that a test makes of the CA for Java, in the folder of its world, and its password.
pub(super) const TRUST_STORE: (&str, &str) = ("trust.p12", "changeit");
/// The folder in which a test makes an ini file for PHP.
pub(super) const INI_FOLDER: &str = "php.d";

impl Client {
    /// The variables of its row that it needs on this way, and no others.
    pub(super) fn environment(&self, way: Way, world: &World) -> Vec<(&'static str, String)> {
        let names = match way {
            Way::Proxy => [self.proxy, self.trust].concat(),
            Way::Gateway => Vec::new(),
            Way::Alias => self.trust.to_vec(),
        };
        names.into_iter().map(|name| (name, value(name, way, world))).collect()
    }

    /// Its line in the README.
    fn row(&self) -> String {
        let cell = |variables: &[&str], note: &str| {
            let variables: Vec<String> = variables.iter().map(|name| format!("`{name}`")).collect();
            variables.join(", ") + note
        };
        let proxy = cell(self.proxy, self.proxy_note);
        let trust = cell(self.trust, self.trust_note);
        format!("| {} | {proxy} | {trust} |", self.name)
    }
}

/// What a parser's container has in a variable.
fn value(name: &str, way: Way, world: &World) -> String {
    let proxy = world.sidecar.proxy();
    let certs = world.path("certs");
    match name {
        "HTTPS_PROXY" | "https_proxy" | "http_proxy" => format!("http://{proxy}"),
        "NODE_EXTRA_CA_CERTS" => certs.join("ca.pem").display().to_string(),
        // Before the colon: the folders that it has anyway.
        "PHP_INI_SCAN_DIR" => format!(":{}", world.path(INI_FOLDER).display()),
        "JAVA_TOOL_OPTIONS" => java_options(way, world),
        _ => certs.join("ca-bundle.pem").display().to_string(),
    }
}

fn java_options(way: Way, world: &World) -> String {
    let (proxy, (store, password)) = (world.sidecar.proxy(), TRUST_STORE);
    let mut options = vec![
        format!("-Djavax.net.ssl.trustStore={}", world.path(store).display()),
        format!("-Djavax.net.ssl.trustStorePassword={password}"),
    ];
    if way == Way::Proxy {
        options.push(format!("-Dhttps.proxyHost={}", proxy.ip()));
        options.push(format!("-Dhttps.proxyPort={}", proxy.port()));
    }
    options.join(" ")
}

#[test]
fn readme_has_the_table_of_clients() {
    let readme = format!("{}/README.md", env!("CARGO_MANIFEST_DIR"));
    let readme = std::fs::read_to_string(readme).unwrap();
    let mut rows = readme.lines().skip_while(|line| !line.starts_with("| client | "));
    let rows: Vec<&str> = rows.by_ref().skip(2).take_while(|line| line.starts_with('|')).collect();
    let (any, rows) = rows.split_last().expect("a table of clients");
    assert!(any.starts_with("| anything with a base URL | the gateway: "), "{any}");
    assert_eq!(rows, CLIENTS.each_ref().map(Client::row));
}

#[test]
fn every_client_of_the_table_has_a_test_of_each_way() {
    let this = std::env::current_exe().unwrap();
    let list = Command::new(this).args(["--list", "--format", "terse"]).output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    for client in &CLIENTS {
        for way in client.ways {
            let found = list.lines().filter_map(|line| line.strip_suffix(": test")).any(|test| {
                let test = test.strip_prefix("clients::").unwrap_or_default();
                test.starts_with(client.tests) && test.ends_with(way.suffix())
            });
            assert!(found, "no test {}…{}", client.tests, way.suffix());
        }
    }
}
