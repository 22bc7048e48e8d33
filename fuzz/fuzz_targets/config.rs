//! Any text as variables and as an env file: read without a panic; an error
//! names a variable, and shows nothing of a secret; what is read keeps what
//! the settings promise.
//!
//! Input: lines `NAME=value` of the environment, then `--` alone on a line,
//! then the env file. A name that is none of ours is taken for one of them.
#![no_main]

use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use token_sidecar::config::{Config, ConfigError, VARIABLES};
use token_sidecar::fuzzing::env_of;

/// What secrets are made of here.
const WORD: &str = "hunter2";

/// Variables whose text no error and no Debug form shows.
const SECRET: [&str; 6] = [
    "ADMIN_TOKEN",
    "CHITAI_GOROD_BEARER_TOKEN",
    "PROXY_AUTH",
    "REDIS_PASSWORD",
    "REDIS_URL",
    "UPSTREAM_PROXY",
];

/// Variables whose text no error shows: somebody may put credentials in.
const PERHAPS_SECRET: [&str; 5] =
    ["ADVERTISE_URL", "API_ORIGINS", "FLARESOLVERR_URL", "SHOP_URL", "VERIFY_URL"];

fn assignment(line: &str) -> Option<(String, String)> {
    let (name, value) = line.split_once('=')?;
    let known = VARIABLES.iter().find(|variable| variable.name == name);
    let index = name.bytes().map(usize::from).sum::<usize>() % VARIABLES.len();
    Some((known.unwrap_or(&VARIABLES[index]).name.to_owned(), value.to_owned()))
}

fn check_error(error: &ConfigError, may_show: bool) {
    assert!(VARIABLES.iter().any(|variable| variable.name == error.variable));
    let shown = error.to_string();
    assert!(shown.starts_with(&format!("{}: ", error.variable)), "{shown}");
    assert!(error.problem.len() > 10, "{shown}");
    assert!(may_show || !shown.contains(WORD), "{shown}");
}

fn check_config(config: &Config) {
    let listen = &config.listen;
    assert!(listen.workers.get() <= config.upstream.connections.max(1));
    assert!((1..=64).contains(&listen.workers.get()));
    let sni = listen.sni;
    for (one, other) in [
        (Some(listen.proxy), Some(listen.admin)),
        (sni, Some(listen.proxy)),
        (sni, Some(listen.admin)),
    ] {
        assert!(one.is_none() || one != other || one.is_some_and(|one| one.port() == 0));
    }
    assert!(sni.is_none() || config.access.proxy_auth.is_none());
    assert!(!config.api.origins.is_empty() && !config.api.token_cookies.is_empty());
    let verify = config.api.verify_url.host().expect("a host").to_ascii_lowercase();
    let verify = verify.trim_matches(['[', ']']);
    let verify = verify.strip_suffix('.').unwrap_or(verify);
    assert!(config.api.hosts().iter().any(|host| host == verify));
    for origin in &config.api.origins {
        assert!(!origin.host.is_empty() && !origin.host.contains(['@', '/', '[']));
        assert_eq!(origin.host, origin.host.to_ascii_lowercase());
        assert!(origin.prefix.is_empty() || origin.prefix.starts_with('/'));
        let url: http::Uri = origin.base_url().parse().expect("a URL");
        let host = url.host().expect("a host").trim_matches(['[', ']']);
        assert_eq!((host, url.port_u16().unwrap_or(443)), (&*origin.host, origin.port));
        assert_ne!(origin.port, 0);
    }
    for url in [Some(&config.api.shop_url), config.refresh.flaresolverr_url.as_ref()] {
        assert!(url.is_none_or(|url| url.authority().is_some_and(|it| !it.as_str().contains('@'))));
    }
    let refresh = &config.refresh;
    assert!(!refresh.sources.is_empty());
    let is_once = |source| refresh.sources.iter().filter(|other| *other == source).count() == 1;
    assert!(refresh.sources.iter().all(is_once));
    for duration in [
        listen.drain_timeout,
        refresh.patience,
        refresh.solve_timeout,
        refresh.every,
        refresh.hold_timeout,
        config.upstream.connect_timeout,
        config.upstream.timeout,
    ] {
        assert!(!duration.is_zero());
        assert!(Instant::now().checked_add(duration).is_some(), "beyond the end of time");
    }
    if let Some(parent) = &config.upstream.proxy {
        assert!(parent.port != 0 && !parent.host.is_empty());
        assert!(parent.url().parse::<http::Uri>().is_ok(), "{}", parent.url());
    }
    assert!(config.upstream.dns.iter().all(|server| server.port() != 0));
    assert!(
        config.advertise.url.port_u16().is_some_and(|port| port != 0 || listen.proxy.port() == 0)
    );
    assert!(config.access.proxy_auth.as_ref().is_none_or(|pair| pair.expose().contains(':')));
}

fuzz_target!(|text: &str| {
    let (variables, file) = text.split_once("\n--\n").unwrap_or((text, ""));
    let variables: Vec<_> = variables.lines().filter_map(assignment).collect();
    let env = match env_of(&variables, file) {
        Ok(env) => env,
        // Such an error never shows the line.
        Err(error) => return check_error(&error, false),
    };
    for (name, near) in env.near_misses() {
        assert!(name != near);
    }
    // Where the word stands in another variable, it is no secret.
    let is_given = |except: &[&str]| {
        let mut others = VARIABLES.iter().filter(|variable| !except.contains(&variable.name));
        others.any(|variable| {
            env.given(variable.name).is_some_and(|text| text.to_ascii_lowercase().contains(WORD))
        })
    };
    match Config::from_env(&env) {
        Ok(config) => {
            check_config(&config);
            let shown = format!("{config:?}");
            assert!(is_given(&SECRET) || !shown.contains(WORD), "{shown}");
            let again = Config::from_env(&env).expect("the same settings");
            assert_eq!(format!("{again:?}"), shown);
        }
        Err(error) => check_error(&error, is_given(&[&SECRET[..], &PERHAPS_SECRET[..]].concat())),
    }
});
