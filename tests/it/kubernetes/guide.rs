//! `deploy/k8s/README.md`: its commands name what is there, and its alias works with these manifests.

use std::collections::BTreeSet;

use serde_json::Value;

use super::settings::{answer, config, config_map};
use super::{
    SECRET, containers, items, named, object, pairs, parsed, path, pod, read, sidecar, strings,
    text, yaml_files,
};
use crate::support::sidecar::{BINARY, Variables};

/// The code blocks of a language.
fn blocks(language: &str) -> Vec<String> {
    let guide = read("README.md");
    let mark = format!("```{language}\n");
    let blocks: Vec<String> = guide
        .split(&mark)
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap().to_owned())
        .collect();
    assert!(!blocks.is_empty(), "{language}");
    blocks
}

/// Every `kubectl …` of the guide, in blocks and in the text.
fn commands() -> Vec<String> {
    let guide = read("README.md");
    let pieces = guide.split("kubectl ").skip(1);
    let command = |piece: &str| {
        let end = piece.find(['`', '\n', '#']).unwrap_or(piece.len());
        piece[..end].trim().to_owned()
    };
    let commands: Vec<String> = pieces.map(command).filter(|command| command.len() > 9).collect();
    assert!(commands.len() > 10, "{commands:?}");
    commands
}

#[test]
fn guide_lists_every_file() {
    let guide = read("README.md");
    let listed: BTreeSet<String> = guide
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next().map(str::to_owned))
        .collect();
    assert_eq!(listed, yaml_files());
}

#[test]
fn commands_are_for_the_namespace_and_for_what_is_in_it() {
    let namespace = named(&super::documents("namespace.yaml")[0]).to_owned();
    let prefix = format!("-n {namespace} ");
    let mut count = 0;
    for command in commands().iter().filter_map(|command| command.strip_prefix(&prefix)) {
        for word in command.split(' ').filter(|word| is_target(word)) {
            let (kind, name) = word.split_once('/').unwrap();
            let kind = if kind == "deployment" { "Deployment" } else { "StatefulSet" };
            let workload = object(kind, name);
            if let Some((_, container)) = command.split_once(" -c ") {
                let container = container.split(' ').next().unwrap();
                assert!(containers(pod(&workload)).any(|of| of["name"] == container), "{command}");
            }
            count += 1;
        }
    }
    assert!(count >= 8, "{count}");
}

fn is_target(word: &str) -> bool {
    word.starts_with("deployment/") || word.starts_with("statefulset/")
}

#[test]
fn commands_by_files_name_files() {
    let mut count = 0;
    for command in commands() {
        for option in [" -f ", " -k "] {
            if let Some((_, file)) = command.split_once(option) {
                let file = file.strip_prefix("deploy/k8s").expect("a path from the top");
                assert!(path(file.trim_start_matches('/')).exists(), "{command}");
                count += 1;
            }
        }
    }
    assert!(count >= 2, "{count}");
}

#[test]
fn secret_of_the_guide_is_the_one_that_pods_ask_for() {
    let guide = read("README.md");
    let made = format!("create secret generic {SECRET} --from-literal=REDIS_PASSWORD=");
    assert!(guide.contains(&made) && read("secret.example.yaml").contains(&made));
}

#[test]
fn commands_in_the_sidecar_are_those_of_the_program() {
    let mut count = 0;
    for command in commands() {
        let Some((_, inside)) = command.split_once(" -- token-sidecar ") else { continue };
        let mut program = std::process::Command::new(BINARY);
        let output = program.args(inside.split(' ')).arg("--help").output().unwrap();
        assert!(output.status.success(), "{inside}");
        count += 1;
    }
    assert!(count >= 4, "{count}");
}

#[test]
fn port_that_is_forwarded_is_the_admin_port() {
    let port = config(&config_map()).listen.admin.port();
    let forwards = commands().into_iter().filter(|command| command.contains("port-forward"));
    let ports: Vec<String> =
        forwards.map(|command| command.rsplit(' ').next().unwrap().to_owned()).collect();
    assert_eq!(ports, [port.to_string()]);
}

#[test]
fn label_of_the_guide_is_that_of_the_policies() {
    let labels = &object("Deployment", "parser")["spec"]["template"]["metadata"]["labels"];
    let value = pairs(labels)["token-sidecar"].to_owned();
    assert!(read("README.md").contains(&format!("`token-sidecar: \"{value}\"`")));
}

// The alias.

/// What the guide adds to the `ConfigMap`, and to the pod.
fn alias() -> (Value, Value) {
    let mut blocks = blocks("yaml").into_iter().map(|block| parsed(&block).remove(0));
    (blocks.next().unwrap(), blocks.next().unwrap())
}

/// The parser's Deployment with the alias.
pub(super) fn with_alias() -> Value {
    let mut deployment = object("Deployment", "parser");
    let pod = &mut deployment["spec"]["template"]["spec"];
    let (_, addition) = alias();
    pod["hostAliases"] = addition["hostAliases"].clone();
    pod["securityContext"]["sysctls"] = addition["securityContext"]["sysctls"].clone();
    deployment
}

fn settings_with_alias() -> Variables {
    let mut variables = config_map();
    for (name, value) in pairs(&alias().0) {
        assert!(variables.iter().all(|(set, _)| set != name), "{name} is set already");
        variables.push((name.to_owned(), value.to_owned()));
    }
    variables
}

#[tokio::test]
async fn settings_of_the_alias_are_taken_by_the_program() {
    let variables = settings_with_alias();
    let config = config(&variables);
    assert!(config.listen.sni.is_some() && !config.upstream.dns.is_empty());
    answer(&["env"], &variables).await;
}

#[test]
fn alias_leads_every_api_host_to_where_the_sidecar_takes_tls() {
    let config = config(&settings_with_alias());
    let sni = config.listen.sni.unwrap();
    let aliases = alias().1["hostAliases"].take();
    let aliases: Vec<&Value> = items(&aliases).collect();
    assert_eq!(aliases.len(), 1);
    assert_eq!((text(&aliases[0]["ip"]), 443), (&*sni.ip().to_string(), sni.port()));
    let names: Vec<&str> = strings(&aliases[0]["hostnames"]).collect();
    assert_eq!(names, config.api.hosts());
}

#[test]
fn alias_lets_the_sidecar_listen_on_its_port_without_root() {
    let deployment = with_alias();
    let pod = pod(&deployment);
    let sysctls: Vec<&Value> = items(&pod["securityContext"]["sysctls"]).collect();
    assert_eq!(sysctls.len(), 1);
    assert_eq!(sysctls[0]["name"], "net.ipv4.ip_unprivileged_port_start");
    let first: u16 = text(&sysctls[0]["value"]).parse().unwrap();
    assert!(first <= config(&settings_with_alias()).listen.sni.unwrap().port());
    assert!(!sidecar(pod)["securityContext"]["runAsUser"].is_null());
}

#[test]
fn gateway_of_the_guide_is_that_of_the_settings() {
    let listen = config(&config_map()).listen.proxy;
    assert!(read("README.md").contains(&format!("`http://{listen}/web/api/v2`")));
}
