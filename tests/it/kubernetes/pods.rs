//! The pods: what runs before what, who mounts what, by which rights, and how it ends.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};

use super::settings::{config, config_map, mounts};
use super::{
    containers, is_sidecar, items, named, object, parser, parser_pod, pod, sidecar, strings, text,
    workloads,
};
use crate::support::Stage;

/// The user of the sidecar's image.
const SIDECAR_USER: u64 = 65532;

/// How long `healthcheck` itself waits for an answer.
const HEALTH_LIMIT: u64 = 5;

/// Each container of each pod.
fn each_container(mut check: impl FnMut(&Value, &Value)) {
    let mut count = 0;
    for workload in workloads() {
        let pod = pod(&workload);
        for container in containers(pod) {
            check(pod, container);
            count += 1;
        }
    }
    assert_eq!(count, 4, "sidecar, parser, FlareSolverr, Redis");
}

// The order.

#[test]
fn sidecar_is_started_before_the_parser_and_stays() {
    let pod = parser_pod();
    let first = items(&pod["initContainers"]).next().expect("an init container");
    assert!(is_sidecar(first));
    assert_eq!(first["restartPolicy"], "Always", "else the parser would wait for its end");
    assert!(items(&pod["containers"]).all(|container| !is_sidecar(container)));
    assert!(items(&pod["containers"]).any(|container| container["name"] == "parser"));
    assert!(!first["startupProbe"].is_null(), "the parser waits for it");
}

#[test]
fn pod_has_time_for_a_held_request_of_the_parser_and_the_drain_of_the_sidecar() {
    let config = config(&config_map());
    let grace = parser_pod()["terminationGracePeriodSeconds"].as_u64().unwrap();
    let needed = config.listen.drain_timeout + config.refresh.hold_timeout;
    assert!(Duration::from_secs(grace) > needed, "{grace} s, {needed:?}");
}

// Probes.

const PROBES: [&str; 3] = ["startupProbe", "livenessProbe", "readinessProbe"];

/// What a probe runs, without the program's name.
fn probe_arguments(container: &Value, probe: &str) -> Vec<String> {
    let command: Vec<&str> = strings(&container[probe]["exec"]["command"]).collect();
    assert_eq!(command[0], "token-sidecar", "{probe}");
    command[1..].iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn sidecar_without_a_token_starts_and_lives_but_is_not_ready() {
    let mut stage = Stage::new().await;
    stage.without_token();
    stage.solver.pause();
    stage.set("TOKEN_SOURCES", "flaresolverr");
    let mut world = stage.launch().await;
    let admin = world.sidecar.admin();
    world.set("ADMIN_LISTEN", admin);
    let pod = parser_pod();
    let [start, live, ready] = PROBES.map(|probe| probe_arguments(sidecar(&pod), probe));
    let probe = async |arguments: &[String]| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        world.run(&arguments).await.status.code()
    };
    assert_eq!(probe(&start).await, Some(0));
    assert_eq!(probe(&live).await, Some(0));
    assert_eq!(probe(&ready).await, Some(1));
    world.solver.resume();
    world.sidecar.ready().await;
    assert_eq!(probe(&ready).await, Some(0));
}

#[test]
fn probes_of_the_sidecar_outlast_the_command_that_they_run() {
    let pod = parser_pod();
    for probe in PROBES {
        let seconds = sidecar(&pod)[probe]["timeoutSeconds"].as_u64().unwrap();
        assert!(seconds > HEALTH_LIMIT, "{probe}");
    }
}

#[test]
fn readiness_outlasts_a_solve() {
    let pod = parser_pod();
    let probe = &sidecar(&pod)["readinessProbe"];
    let of = |name: &str| probe[name].as_u64().unwrap();
    assert!(of("periodSeconds") * of("failureThreshold") >= 30);
}

#[test]
fn flaresolverr_is_given_its_time_and_its_memory() {
    let workload = object("Deployment", "flaresolverr");
    let pod = pod(&workload);
    let container = containers(pod).next().unwrap();
    for probe in ["startupProbe", "livenessProbe"] {
        let probe = &container[probe];
        assert_eq!(probe["httpGet"]["path"], "/health");
        assert!(probe["timeoutSeconds"].as_u64().unwrap() >= 50, "{probe}");
    }
    assert!(container["readinessProbe"].is_null());
    assert_eq!(container["resources"]["limits"]["memory"], "2Gi");
    let shm = &mounts(container)[std::path::Path::new("/dev/shm")];
    let volume = items(&pod["volumes"]).find(|volume| volume["name"] == shm["name"]).unwrap();
    assert_eq!(volume["emptyDir"], json!({"medium": "Memory", "sizeLimit": "512Mi"}));
    assert_eq!(workload["spec"]["replicas"], 1, "sessions live in one process");
}

// Volumes.

#[test]
fn mounts_are_of_volumes_that_are_there_and_each_volume_is_mounted() {
    for workload in workloads() {
        let pod = pod(&workload);
        let claims = items(&workload["spec"]["volumeClaimTemplates"]).map(named);
        let volumes = items(&pod["volumes"]).map(|volume| text(&volume["name"]));
        let volumes: BTreeSet<&str> = volumes.chain(claims).collect();
        let mounts = containers(pod).flat_map(|container| items(&container["volumeMounts"]));
        let mounted: BTreeSet<&str> = mounts.map(|mount| text(&mount["name"])).collect();
        assert_eq!(mounted, volumes, "{}", named(&workload));
    }
}

/// The names of the containers that mount the volume at the sidecar's `folder`.
fn who_mounts(pod: &Value, folder: &std::path::Path) -> Vec<String> {
    let volume = &mounts(sidecar(pod))[folder]["name"];
    let has = |container: &&Value| mounts(container).values().any(|mount| mount["name"] == *volume);
    let names = containers(pod).filter(has).map(|container| text(&container["name"]).to_owned());
    names.collect()
}

#[test]
fn key_of_the_ca_and_the_tokens_file_are_in_volumes_of_the_sidecar_alone() {
    let pod = parser_pod();
    let config = config(&config_map());
    assert_eq!(who_mounts(&pod, &config.ca.dir), ["token-sidecar"]);
    let state = config.stores.env_file.parent().unwrap();
    assert_eq!(who_mounts(&pod, state), ["token-sidecar"]);
    assert_eq!(who_mounts(&pod, &config.ca.trust_dir), ["token-sidecar", "parser"]);
}

#[test]
fn volumes_of_the_parsers_pod_end_with_it() {
    for volume in items(&parser_pod()["volumes"]) {
        assert!(volume["emptyDir"]["sizeLimit"].is_string(), "{volume}");
    }
}

// Rights.

/// A setting of a container, or of its pod where the container has none.
fn right<'a>(pod: &'a Value, container: &'a Value, name: &str) -> &'a Value {
    let own = &container["securityContext"][name];
    if own.is_null() { &pod["securityContext"][name] } else { own }
}

#[test]
fn every_container_meets_the_restricted_standard_that_the_namespace_enforces() {
    let namespace = super::documents("namespace.yaml").remove(0);
    let labels = &namespace["metadata"]["labels"];
    assert_eq!(labels["pod-security.kubernetes.io/enforce"], "restricted");
    each_container(|pod, container| {
        let name = text(&container["name"]);
        assert_eq!(right(pod, container, "runAsNonRoot"), true, "{name}");
        assert!(right(pod, container, "runAsUser").as_u64().unwrap() > 0, "{name}");
        assert_eq!(right(pod, container, "seccompProfile")["type"], "RuntimeDefault", "{name}");
        assert_eq!(right(pod, container, "allowPrivilegeEscalation"), false, "{name}");
        assert_eq!(right(pod, container, "capabilities"), &json!({"drop": ["ALL"]}), "{name}");
        for host in ["hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"] {
            assert!(pod[host].is_null(), "{name}: {host}");
        }
    });
}

#[test]
fn root_is_read_only_where_the_program_allows_it() {
    each_container(|pod, container| {
        let name = text(&container["name"]);
        let read_only = right(pod, container, "readOnlyRootFilesystem") == true;
        assert_eq!(read_only, matches!(name, "token-sidecar" | "redis"), "{name}");
    });
}

#[test]
fn sidecar_is_the_user_of_its_image_and_the_parser_is_another() {
    let pod = parser_pod();
    let user = |container| right(&pod, container, "runAsUser").as_u64().unwrap();
    assert_eq!(user(sidecar(&pod)), SIDECAR_USER);
    assert_ne!(user(parser(&pod)), SIDECAR_USER);
    assert_eq!(pod["securityContext"]["fsGroup"], SIDECAR_USER, "it writes the volumes");
    assert_eq!(right(&pod, sidecar(&pod), "runAsGroup"), SIDECAR_USER);
}

#[test]
fn no_pod_gets_a_token_of_the_cluster_or_variables_of_its_services() {
    for workload in workloads() {
        assert_eq!(pod(&workload)["automountServiceAccountToken"], false, "{}", named(&workload));
        assert_eq!(pod(&workload)["enableServiceLinks"], false, "{}", named(&workload));
    }
}

#[test]
fn images_are_pinned_and_memory_is_limited() {
    each_container(|_, container| {
        let image = text(&container["image"]);
        let (_, tag) = image.rsplit_once(':').expect("a tag");
        assert!(!tag.contains('/') && tag != "latest", "{image}");
        for bound in ["requests", "limits"] {
            assert!(container["resources"][bound]["memory"].is_string(), "{image}: {bound}");
        }
    });
    let solver = object("Deployment", "flaresolverr");
    let image = &containers(pod(&solver)).next().unwrap()["image"];
    assert_eq!(image, "ghcr.io/flaresolverr/flaresolverr:v3.5.2");
}

#[test]
fn variables_of_a_container_have_different_names() {
    each_container(|_, container| {
        let names: Vec<&str> = items(&container["env"]).map(|v| text(&v["name"])).collect();
        let different: BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(different.len(), names.len(), "{names:?}");
    });
}
