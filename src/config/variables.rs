//! The registry of variables.

/// One variable that the sidecar reads.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    /// Its name in the environment.
    pub name: &'static str,
    /// Its value where none is given; empty: none.
    pub default: &'static str,
    /// What it does, with its unit.
    pub meaning: &'static str,
}

const fn var(name: &'static str, default: &'static str, meaning: &'static str) -> Variable {
    Variable { name, default, meaning }
}

/// Every variable, in the order of the documentation.
pub const VARIABLES: &[Variable] = &[
    var("PROXY_LISTEN", "127.0.0.1:8080", "address of the proxy and the gateway, ip:port"),
    var("ADMIN_LISTEN", "127.0.0.1:9090", "address of the admin port, ip:port"),
    var(
        "SNI_LISTEN",
        "",
        "address where TLS comes straight in and the SNI decides, for clients behind an alias, ip:port",
    ),
    var("WORKERS", "", "worker threads; default: the cores granted, at most 4"),
    var(
        "API_ORIGINS",
        "https://web-agr.chitai-gorod.ru/web/api,https://web-gate.chitai-gorod.ru/api",
        "the shop's API: https origins, each with the path prefix of the gateway",
    ),
    var("SHOP_URL", "https://www.chitai-gorod.ru/", "the page that sets the token's cookie"),
    var("TOKEN_COOKIE", "access-token,bearer_token", "names of the token's cookie, best first"),
    var(
        "VERIFY_URL",
        "https://web-agr.chitai-gorod.ru/web/api/v2/search/product?customerCityId=39&products[page]=1&products[per-page]=1&phrase=python",
        "a request that answers 200 with a good token and 401 with a bad one; at an API host",
    ),
    var(
        "AUTHORIZATION",
        "always",
        "always: each API request gets the token; present: only those that bring one, if only in a cookie",
    ),
    var(
        "PERSONAL_TOKENS",
        "keep",
        "keep: a client's own live personal token is left alone; replace: it is not",
    ),
    var(
        "TOKEN_SOURCES",
        "flaresolverr,direct",
        "where tokens come from, in order; without FLARESOLVERR_URL direct alone",
    ),
    var("FLARESOLVERR_URL", "", "FlareSolverr, such as http://flaresolverr:8191/v1"),
    var("SOURCE_PATIENCE", "8s", "wait for a source before the next one is started beside it"),
    var(
        "REDIS_URL",
        "",
        "redis://host:6379/0, rediss://…, unix:///path or redis+sentinel://host:26379,host:26379/service/0; without it no Redis is used",
    ),
    var("REDIS_PASSWORD", "", "Redis's password, any characters"),
    var(
        "REDIS_PASSWORD_FILE",
        "",
        "file that holds Redis's password, read for each connection; REDIS_PASSWORD or one in REDIS_URL goes before it",
    ),
    var(
        "REDIS_SENTINEL_PASSWORD",
        "",
        "password of the Sentinels themselves, where they have one, any characters",
    ),
    var("REDIS_KEY", "chitai_gorod_token", "Redis key of the bare token"),
    var("REDIS_COOKIES_KEY", "chitai_gorod_cookies", "Redis key of the cookies, a JSON object"),
    var("REDIS_TLS_CA", "", "PEM file: the CA of a rediss:// server"),
    var("REDIS_TLS_CERT", "", "PEM file: client certificate for rediss://"),
    var("REDIS_TLS_KEY", "", "PEM file: key of the client certificate"),
    var("TOKEN_TTL", "24h", "longest life of the Redis keys"),
    var(
        "ENV_FILE",
        ".env",
        "settings are read from it, and the token's line is kept up to date in it",
    ),
    var(
        "CHITAI_GOROD_BEARER_TOKEN",
        "",
        "a token to start with, where Redis and ENV_FILE have none",
    ),
    var("REFRESH_EVERY", "3h", "longest time between two refreshes"),
    var("HOLD_TIMEOUT", "60s", "longest time that a request is held during a refresh"),
    var("RETRY_STATUS", "503", "status of a request whose hold ran out: 503 or 429"),
    var("SOLVE_TIMEOUT", "45s", "FlareSolverr's own limit for one page (maxTimeout)"),
    var("MAX_CONNECTIONS", "20000", "open client connections"),
    var("MAX_CLIENT_CONNECTIONS", "10000", "open connections of one client address"),
    var("MAX_HELD", "10000", "requests held at once"),
    var("REPLAY_BODY_LIMIT", "8MiB", "largest request body that can be replayed"),
    var("REPLAY_MEMORY", "64MiB", "bytes kept for replay by all requests together"),
    var("UPSTREAM_CONNECTIONS", "256", "open connections per origin"),
    var("CA_DIR", "certs", "folder of ca.pem and ca.key, the sidecar's alone"),
    var("TRUST_DIR", "", "folder of ca.pem and ca-bundle.pem, for parsers; default: CA_DIR"),
    var("EXTRA_CA_FILE", "", "PEM file: roots that ca-bundle.pem gets as well"),
    var("CONNECT_TIMEOUT", "10s", "longest time until a connection to an upstream stands"),
    var(
        "UPSTREAM_TIMEOUT",
        "60s",
        "longest silence: before and amid an answer, amid a request's body, in wait for a connection",
    ),
    var("UPSTREAM_CA_FILE", "", "PEM file: roots that upstreams may have besides the public ones"),
    var("CONNECT_TO", "", "host:port=addr:port,… : dial there instead"),
    var(
        "UPSTREAM_DNS",
        "",
        "resolvers ip[:port],… that are asked instead of the system, needed behind an alias that leads here",
    ),
    var(
        "UPSTREAM_PROXY",
        "",
        "http://[user:pass@]host:port, percent-encoded: the proxy that leads to all but loopback and CONNECT_TO",
    ),
    var(
        "ALLOW_HOSTS",
        "",
        "destinations allowed although not public: names, *.suffix, CIDRs, each with :port if wanted",
    ),
    var("CLIENT_NETWORKS", "private", "networks that clients may come from: CIDRs, or private"),
    var("PROXY_AUTH", "", "user:password that clients must present"),
    var(
        "ADMIN_TOKEN",
        "",
        "bearer token for every POST on the admin port; without one, POSTs only from loopback",
    ),
    var(
        "ADVERTISE_URL",
        "",
        "the proxy as parsers reach it, http://host:port, for `env`; default: PROXY_LISTEN",
    ),
    var(
        "ADVERTISE_TRUST_DIR",
        "",
        "TRUST_DIR as parsers see it, an absolute path, for `env`; default: TRUST_DIR",
    ),
    var("DRAIN_TIMEOUT", "30s", "longest time that running answers get after SIGTERM"),
    var("RUST_LOG", "info", "log filter"),
    var("LOG_FORMAT", "text", "text or json"),
];
