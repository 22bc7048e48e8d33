//! The variables that parsers need, and why.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::self_test;
use crate::config::{Config, RedisSettings, normalize_host};

/// What the user part of a URL may hold as it is (RFC 3986 §2.3).
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Names that lead to services beside a parser, never through the proxy.
const NEIGHBOURS: [&str; 5] = ["localhost", "127.0.0.1", "::1", "redis", "flaresolverr"];

const PROXY: [&str; 3] = [
    "Where the proxy is. curl and PHP's curl read http_proxy in lower case only, aiohttp reads",
    "these only with trust_env=True, undici only with an agent, Go never for localhost.",
    "Node's own fetch, got and Java read none of them: see below.",
];
const PROXY_PASSWORD: [&str; 2] = [
    "PROXY_AUTH is set: the URL carries user:password, percent-encoded.",
    "Treat these lines as a secret.",
];
const NO_PROXY: [&str; 2] = [
    "What does not go through the proxy. Add your own services (databases, queues), but never",
    "an API host: its requests would lack the token.",
];
const BUNDLE: [&str; 4] = [
    "Whom to trust. The file replaces a client's own roots: it holds the public ones and the",
    "sidecar's CA. SSL_CERT_FILE: urllib, httpx, aiohttp, Go, curl, curl_cffi.",
    "REQUESTS_CA_BUNDLE: requests, curl_cffi. CURL_CA_BUNDLE: curl, curl_cffi, requests without",
    "the former. PHP's curl and Java obey none of them: see below. scrapy does not verify.",
];
const NODE: [&str; 1] =
    ["Node (axios, undici): a file with the sidecar's CA alone, which is added."];

const GATEWAY: [&str; 2] = [
    "For a client that ignores proxy variables but takes its base URL from one: the gateway, without",
    "proxy and certificate. All other such clients: TOKEN_UPDATE_GUIDE.md.",
];
const GATEWAY_PASSWORD: [&str; 2] = [
    "PROXY_AUTH is set: the gateway asks for `Authorization: Basic`, so a client that sets",
    "Authorization itself cannot use it.",
];
const PHP: [&str; 2] = [
    "PHP's curl: a folder with an ini file that says curl.cainfo=<path of ca-bundle.pem>, here in the",
    "trust files' folder, or in /tmp where that is read-only; make it first. The colon keeps PHP's own.",
];
const JAVA: [&str; 3] = [
    "Java's HttpClient: proxy and trust store by one variable. Make the store first, here beside the",
    "trust files, or in /tmp where they are read-only: a copy of $JAVA_HOME/lib/security/cacerts into",
    "which keytool -importcert has put ca.pem; the README has the commands.",
];

/// Some variables with what people should know of them.
pub(super) struct Group {
    /// Lines for people.
    pub(super) comment: Vec<&'static str>,
    /// Names and values.
    pub(super) variables: Vec<(&'static str, String)>,
}

/// All that a parser needs. Values may hold the proxy's password.
pub(super) struct Needs {
    /// The variables.
    pub(super) groups: Vec<Group>,
    /// Variables for some clients only, which are offered in comments.
    pub(super) offers: Vec<Group>,
    /// The folder of the trust files as a parser sees it.
    pub(super) trust_dir: String,
    /// The same folder as the sidecar sees it.
    pub(super) own_trust_dir: String,
    /// A command that tells whether it all works.
    pub(super) self_test: String,
}

impl Needs {
    /// What parsers of the sidecar that `config` describes need.
    pub(super) fn of(config: &Config) -> Self {
        let proxy = proxy_url(config);
        let file = |name| config.advertise.trust_dir.join(name).display().to_string();
        let own = &config.ca.trust_dir;
        let own = std::path::absolute(own).unwrap_or_else(|_| own.clone());
        Self {
            groups: vec![
                proxy_group(config, &proxy),
                group(&NO_PROXY, &["no_proxy", "NO_PROXY"], &unproxied(config).join(",")),
                group(
                    &BUNDLE,
                    &["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"],
                    &file("ca-bundle.pem"),
                ),
                group(&NODE, &["NODE_EXTRA_CA_CERTS"], &file("ca.pem")),
            ],
            offers: vec![
                group(&PHP, &["PHP_INI_SCAN_DIR"], &format!(":{}", file("php.d"))),
                group(&JAVA, &["JAVA_TOOL_OPTIONS"], &java_options(config, &file("trust.jks"))),
                gateway_group(config),
            ],
            trust_dir: config.advertise.trust_dir.display().to_string(),
            own_trust_dir: own.display().to_string(),
            self_test: self_test::command(&config.api.verify_url),
        }
    }
}

fn group(comment: &[&'static str], names: &[&'static str], value: &str) -> Group {
    let variables = names.iter().map(|name| (*name, value.to_owned())).collect();
    Group { comment: comment.to_vec(), variables }
}

fn proxy_group(config: &Config, proxy: &str) -> Group {
    let names = ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"];
    let mut group = group(&PROXY, &names, proxy);
    if config.access.proxy_auth.is_some() {
        group.comment.extend(PROXY_PASSWORD);
    }
    group
}

/// Without credentials: they would go into the `Authorization` that the client
/// sets itself.
fn gateway_group(config: &Config) -> Group {
    let prefix = config.api.origins.first().map_or("", |origin| &origin.prefix);
    let url = format!("http://{}{prefix}/v2", proxy_authority(config));
    let mut group = group(&GATEWAY, &["CHITAI_GOROD_API_URL"], &url);
    if config.access.proxy_auth.is_some() {
        group.comment.extend(GATEWAY_PASSWORD);
    }
    group
}

/// Java's proxy and trust store. A store that is a copy of Java's own has the
/// password of that one.
fn java_options(config: &Config, store: &str) -> String {
    let url = &config.advertise.url;
    let host = url.host().map(normalize_host).unwrap_or_default();
    let port = url.port_u16().unwrap_or(80);
    format!(
        "-Dhttps.proxyHost={host} -Dhttps.proxyPort={port} -Djavax.net.ssl.trustStore={store} \
         -Djavax.net.ssl.trustStorePassword=changeit"
    )
}

fn proxy_authority(config: &Config) -> &str {
    config.advertise.url.authority().map_or("", |authority| authority.as_str())
}

/// The proxy's URL without a final slash, with the credentials it asks for.
fn proxy_url(config: &Config) -> String {
    let authority = proxy_authority(config);
    let pair = config.access.proxy_auth.as_ref().and_then(|pair| pair.expose().split_once(':'));
    let encoded = |text| utf8_percent_encode(text, ENCODED);
    match pair {
        None => format!("http://{authority}"),
        Some((user, password)) => {
            format!("http://{}:{}@{authority}", encoded(user), encoded(password))
        }
    }
}

/// Hosts that are not to be reached through the proxy, each once; never an API
/// host.
fn unproxied(config: &Config) -> Vec<String> {
    let listeners = [config.listen.proxy, config.listen.admin].map(|address| address.ip());
    let listeners = listeners.iter().filter(|ip| !ip.is_unspecified()).map(ToString::to_string);
    let solver = config.refresh.flaresolverr_url.as_ref().and_then(|url| url.host());
    let redis = config.stores.redis.as_ref();
    let redis = redis.map(RedisSettings::hosts).unwrap_or_default();
    let named = [config.advertise.url.host(), solver].into_iter().flatten();
    let named = named.chain(redis.iter().map(String::as_str));
    let all = NEIGHBOURS.map(str::to_owned).into_iter().chain(named.map(normalize_host));
    let api = config.api.hosts();
    let mut hosts = Vec::new();
    for host in all.chain(listeners) {
        if !host.is_empty() && !api.contains(&host) && !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    hosts
}
