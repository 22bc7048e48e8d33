//! The `ConfigMap` and the Secret, as the program takes them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;
use token_sidecar::config::{Config, Env, VARIABLES};

use super::{
    SECRET, containers, documents, from_secret, is_sidecar, items, literals, object, pairs, parsed,
    parser, parser_pod, pod, sidecar, text, workloads,
};
use crate::support::sidecar::{Variables, run, stderr, stdout};

/// What the `ConfigMap` says.
pub(super) fn config_map() -> Variables {
    let map = object("ConfigMap", "token-sidecar");
    pairs(&map["data"])
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// The settings as the program reads them.
pub(super) fn config(variables: &Variables) -> Config {
    Config::from_env(&Env::from_pairs(variables.iter().cloned())).unwrap()
}

/// Runs a command with exactly these variables, in an empty folder.
pub(super) async fn answer(arguments: &[&str], variables: &Variables) -> String {
    let dir = TempDir::new().unwrap();
    let output = run(arguments, variables, dir.path()).await;
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    stdout(&output)
}

/// What `env --format k8s` says of a container.
pub(super) async fn advice(variables: &Variables) -> Value {
    parsed(&answer(&["env", "--format", "k8s"], variables).await).remove(0)
}

/// The names that the registry has.
fn known() -> BTreeSet<&'static str> {
    VARIABLES.iter().map(|variable| variable.name).collect()
}

#[test]
fn config_map_sets_variables_of_the_sidecar_alone() {
    let map = config_map();
    assert!(map.len() > 5, "{map:?}");
    for (name, _) in map {
        assert!(known().contains(name.as_str()), "{name} is no variable of the sidecar");
    }
}

#[tokio::test]
async fn program_takes_the_settings() {
    let mut variables = config_map();
    variables.push(("REDIS_PASSWORD".to_owned(), "s3cret".to_owned()));
    variables.push(("ADMIN_TOKEN".to_owned(), "s3cret".to_owned()));
    assert!(!answer(&["env"], &variables).await.contains("s3cret"));
}

#[test]
fn pod_takes_its_settings_from_the_config_map_and_the_secret() {
    let pod = parser_pod();
    let sidecar = sidecar(&pod);
    let sources: Vec<&Value> = items(&sidecar["envFrom"]).collect();
    assert_eq!(sources.len(), 1);
    assert_eq!(sources[0]["configMapRef"]["name"], "token-sidecar");
    assert!(literals(sidecar).is_empty(), "settings stand in the ConfigMap");
    for (name, _) in from_secret(sidecar) {
        assert!(known().contains(name), "{name} is no variable of the sidecar");
        assert!(config_map().iter().all(|(set, _)| set != name), "{name} is in the ConfigMap, too");
    }
}

#[test]
fn ports_are_on_loopback() {
    let listen = config(&config_map()).listen;
    assert!(listen.proxy.ip().is_loopback() && listen.admin.ip().is_loopback());
    assert_ne!(listen.proxy.port(), listen.admin.port());
}

#[test]
fn folders_of_the_sidecar_are_volumes_of_its_own() {
    let pod = parser_pod();
    let config = config(&config_map());
    let mounts = mounts(sidecar(&pod));
    let state = config.stores.env_file.parent().unwrap().to_owned();
    let folders: BTreeSet<PathBuf> = [config.ca.dir, config.ca.trust_dir, state].into();
    assert_eq!(folders.len(), 3, "each is a volume of its own");
    assert_eq!(mounts.keys().cloned().collect::<BTreeSet<_>>(), folders);
    for (folder, mount) in mounts {
        assert!(mount["readOnly"] != true, "{} must be writable", folder.display());
    }
}

/// The mounts of a container by their paths.
pub(super) fn mounts(container: &Value) -> BTreeMap<PathBuf, Value> {
    let mounts = items(&container["volumeMounts"]);
    mounts.map(|mount| (PathBuf::from(text(&mount["mountPath"])), mount.clone())).collect()
}

#[test]
fn neighbours_are_services_at_ports_that_they_have() {
    let config = config(&config_map());
    let solver = config.refresh.flaresolverr_url.expect("a solver");
    let redis = url::Url::parse(config.stores.redis.expect("a Redis").url.expose()).unwrap();
    for (host, port) in
        [(solver.host().unwrap(), solver.port_u16()), (redis.host_str().unwrap(), redis.port())]
    {
        let service = object("Service", host);
        assert!(
            items(&service["spec"]["ports"]).any(|of| of["port"].as_u64() == port.map(u64::from))
        );
    }
}

#[test]
fn redis_lets_the_keys_of_the_settings_be_used() {
    let redis = config(&config_map()).stores.redis.expect("a Redis");
    let text = super::read("redis.yaml");
    for key in [redis.key.as_str(), redis.cookies_key.as_str()] {
        assert!(key.starts_with("chitai_gorod_"), "{key} is not among Redis's rules");
    }
    assert!(text.contains("~chitai_gorod_* "));
    assert!(text.contains(&format!("~{{{0}}}:* &{{{0}}}:* ", redis.key)));
}

// The parser.

#[tokio::test]
async fn parser_has_the_variables_that_env_prints() {
    let pod = parser_pod();
    let advice = advice(&config_map()).await;
    assert!(literals(&advice).len() >= 10, "{advice}");
    assert_eq!(literals(parser(&pod)), literals(&advice));
}

#[tokio::test]
async fn parser_sees_the_trust_files_where_env_says_and_cannot_write_them() {
    let pod = parser_pod();
    let mounts = mounts(parser(&pod));
    let advice = advice(&config_map()).await;
    let advised: Vec<&Value> = items(&advice["volumeMounts"]).collect();
    assert_eq!(advised.len(), 1);
    let mount = &mounts[&PathBuf::from(text(&advised[0]["mountPath"]))];
    assert_eq!((&mount["readOnly"], &advised[0]["readOnly"]), (&true.into(), &true.into()));
    let trust_dir = config(&config_map()).ca.trust_dir;
    let written = &self::mounts(sidecar(&pod))[&trust_dir];
    assert_eq!(mount["name"], written["name"], "what the sidecar writes");
    for (name, value) in literals(parser(&pod)) {
        let is_file = value.starts_with('/');
        assert!(!is_file || value.starts_with(text(&mount["mountPath"])), "{name}");
    }
}

// Secrets.

/// The keys that the example offers, taken up or not.
fn example_keys() -> BTreeSet<String> {
    let example = super::read("secret.example.yaml").replace("  # ADMIN_TOKEN:", "  ADMIN_TOKEN:");
    let secret = parsed(&example).remove(0);
    assert_eq!((super::named(&secret), text(&secret["kind"])), (SECRET, "Secret"));
    pairs(&secret["stringData"]).into_keys().map(str::to_owned).collect()
}

#[test]
fn pods_ask_for_the_keys_of_the_example_and_wait_for_the_password() {
    let mut asked = BTreeSet::new();
    for workload in workloads() {
        for container in containers(pod(&workload)) {
            for (name, reference) in from_secret(container) {
                let key = text(&reference["key"]);
                assert_eq!(reference["name"], SECRET, "{name}");
                assert_eq!(reference["optional"] == true, key == "ADMIN_TOKEN", "{name}");
                asked.insert(key.to_owned());
            }
        }
    }
    assert_eq!(asked, example_keys());
}

#[test]
fn secrets_reach_no_parser() {
    let pod = parser_pod();
    for container in containers(&pod).filter(|container| !is_sidecar(container)) {
        assert!(from_secret(container).is_empty());
        assert!(!container.to_string().contains(SECRET), "{container}");
    }
    assert!(!pod["volumes"].to_string().contains("secret"));
}

#[test]
fn placeholder_says_what_to_do_and_is_not_in_force() {
    let secret = documents("secret.example.yaml").remove(0);
    let values = pairs(&secret["stringData"]);
    assert_eq!(values.len(), 1);
    assert!(values["REDIS_PASSWORD"].contains("openssl rand -hex 32"));
}
