//! Who finds whom, and who may talk to whom.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{containers, items, named, object, objects, pairs, parser_pod, pod, text, workloads};

/// The labels of a workload's pods.
fn labels(workload: &Value) -> &Value {
    &workload["spec"]["template"]["metadata"]["labels"]
}

fn parser_labels() -> Value {
    labels(&object("Deployment", "parser")).clone()
}

/// Whether every pair of `wanted` is among `labels`.
fn has_all(labels: &Value, wanted: &Value) -> bool {
    let (labels, wanted) = (pairs(labels), pairs(wanted));
    wanted.iter().all(|(name, value)| labels.get(name) == Some(value))
}

/// The names of the workloads whose pods have these labels.
fn workloads_with(wanted: &Value) -> Vec<String> {
    let found = workloads().into_iter().filter(|workload| has_all(labels(workload), wanted));
    found.map(|workload| named(&workload).to_owned()).collect()
}

/// The port of a workload's pods that has this name.
fn container_port(workload: &Value, name: &str) -> Option<u64> {
    let mut ports = containers(pod(workload)).flat_map(|container| items(&container["ports"]));
    let port = ports.find(|port| port["name"] == name)?;
    port["containerPort"].as_u64()
}

#[test]
fn workloads_select_their_own_pods_alone() {
    for workload in workloads() {
        let selector = &workload["spec"]["selector"];
        assert_eq!(selector.as_object().unwrap().len(), 1, "labels alone");
        assert_eq!(workloads_with(&selector["matchLabels"]), [named(&workload)]);
    }
}

#[test]
fn services_lead_to_the_port_of_the_workload_of_their_name() {
    for service in objects("Service") {
        let name = named(&service);
        assert_eq!(workloads_with(&service["spec"]["selector"]), [name]);
        let all = workloads();
        let workload = all.iter().find(|workload| named(workload) == name).unwrap();
        for port in items(&service["spec"]["ports"]) {
            let target = container_port(workload, text(&port["targetPort"]));
            assert_eq!(target, port["port"].as_u64(), "{name}");
        }
        assert!(service["spec"]["type"].is_null(), "{name}: nothing is published");
    }
    let redis = object("StatefulSet", "redis");
    object("Service", text(&redis["spec"]["serviceName"]));
}

#[test]
fn probes_by_port_name_a_port_of_their_container() {
    let mut count = 0;
    for workload in workloads() {
        for container in containers(pod(&workload)) {
            for (name, probe) in container.as_object().unwrap() {
                if name.ends_with("Probe") && probe["exec"].is_null() {
                    let kinds = ["httpGet", "tcpSocket"].map(|kind| &probe[kind]["port"]);
                    let port = kinds.into_iter().find(|port| !port.is_null()).unwrap();
                    assert!(container_port(&workload, text(port)).is_some(), "{probe}");
                    count += 1;
                }
            }
        }
    }
    assert_eq!(count, 3);
}

#[test]
fn nothing_of_the_parsers_pod_is_probed_or_reached_by_a_port() {
    for container in containers(&parser_pod()) {
        assert!(container["ports"].is_null());
        let kubelet = container.to_string();
        assert!(!kubelet.contains("httpGet") && !kubelet.contains("tcpSocket"), "{kubelet}");
    }
}

// Policies.

/// Somebody at the other end of a connection.
#[derive(Clone, Debug)]
enum Peer {
    /// A pod of the namespace with these labels.
    Pod(Value),
    /// An address that is no pod's.
    Address(IpAddr),
}

fn address(text: &str) -> Peer {
    Peer::Address(text.parse().unwrap())
}

/// Whether `policies`, all of which select the pod in question, allow it.
fn allowed(policies: &[Value], direction: &str, peer: &Peer, workload: &Value, port: u64) -> bool {
    let (kind, side) = match direction {
        "ingress" => ("Ingress", "from"),
        _ => ("Egress", "to"),
    };
    let of_kind = |policy: &&Value| items(&policy["spec"]["policyTypes"]).any(|of| of == kind);
    let mut rules = policies.iter().filter(of_kind).flat_map(|of| items(&of["spec"][direction]));
    rules.any(|rule| {
        let peers = &rule[side];
        let ports = &rule["ports"];
        (peers.is_null() || items(peers).any(|rule| peer_matches(rule, peer)))
            && (ports.is_null() || items(ports).any(|rule| port_matches(rule, workload, port)))
    })
}

fn peer_matches(rule: &Value, peer: &Peer) -> bool {
    match peer {
        Peer::Address(address) => block_holds(&rule["ipBlock"], *address),
        Peer::Pod(labels) if rule["namespaceSelector"].is_null() => {
            !rule["podSelector"].is_null() && has_all(labels, &rule["podSelector"]["matchLabels"])
        }
        Peer::Pod(_) => {
            assert_eq!(rule, &json!({"namespaceSelector": {}}), "all pods");
            true
        }
    }
}

fn block_holds(block: &Value, address: IpAddr) -> bool {
    let holds = |text: &Value| {
        let network: IpNet = self::text(text).parse().unwrap();
        network.contains(&address)
    };
    !block.is_null() && holds(&block["cidr"]) && !items(&block["except"]).any(holds)
}

/// By number, or by the name that it has in the pod behind it.
fn port_matches(rule: &Value, workload: &Value, port: u64) -> bool {
    let number = match &rule["port"] {
        Value::String(name) => container_port(workload, name),
        number => number.as_u64(),
    };
    rule["protocol"] == "TCP" && number == Some(port)
}

/// The policies for the pods of a workload; there is at least one.
fn policies_of(workload: &Value) -> Vec<Value> {
    let selects =
        |policy: &Value| has_all(labels(workload), &policy["spec"]["podSelector"]["matchLabels"]);
    let policies: Vec<Value> = objects("NetworkPolicy").into_iter().filter(selects).collect();
    assert!(!policies.is_empty(), "{}", named(workload));
    policies
}

/// Who may connect to this workload at `port`.
fn admits(workload: &Value, peer: &Peer, port: u64) -> bool {
    allowed(&policies_of(workload), "ingress", peer, workload, port)
}

/// Where pods of this workload may connect to.
fn leads(workload: &Value, peer: &Peer, port: u64) -> bool {
    allowed(&policies_of(workload), "egress", peer, &Value::Null, port)
}

#[test]
fn each_policy_is_for_the_pods_of_one_workload_in_both_directions() {
    let mut selected: Vec<String> = Vec::new();
    for policy in objects("NetworkPolicy") {
        assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
        selected.extend(workloads_with(&policy["spec"]["podSelector"]["matchLabels"]));
    }
    selected.sort();
    let mut all: Vec<String> = workloads().iter().map(|of| named(of).to_owned()).collect();
    all.sort();
    assert_eq!(selected, all);
}

#[test]
fn redis_and_flaresolverr_admit_pods_with_a_sidecar_alone() {
    let parser = Peer::Pod(parser_labels());
    let others = [
        Peer::Pod(json!({"app.kubernetes.io/name": "shop"})),
        Peer::Pod(json!({"app.kubernetes.io/name": "parser"})),
        Peer::Pod(json!({"token-sidecar": "false"})),
        address("10.0.0.7"),
        address("93.184.215.14"),
    ];
    for (kind, name) in [("StatefulSet", "redis"), ("Deployment", "flaresolverr")] {
        let workload = object(kind, name);
        let service = object("Service", name);
        let port = service["spec"]["ports"][0]["port"].as_u64().unwrap();
        assert!(admits(&workload, &parser, port), "{name}");
        assert!(!admits(&workload, &parser, port + 1), "{name}");
        for other in &others {
            assert!(!admits(&workload, other, port), "{name}: {other:?}");
        }
    }
}

#[test]
fn parsers_admit_nobody() {
    let parser = object("Deployment", "parser");
    for port in [80, 8080, 9090] {
        for peer in [Peer::Pod(parser_labels()), address("10.0.0.7"), address("93.184.215.14")] {
            assert!(!admits(&parser, &peer, port), "{peer:?}");
        }
    }
}

#[test]
fn parsers_go_out_everywhere_but_to_what_hands_out_the_nodes_credentials() {
    let parser = object("Deployment", "parser");
    for (peer, port) in [
        (Peer::Pod(json!({"app.kubernetes.io/name": "redis"})), 6379),
        (address("93.184.215.14"), 443),
        (address("10.1.2.3"), 5432),
        (address("2606:2800:21f:cb07::1"), 443),
        (address("169.254.20.10"), 53),
    ] {
        assert!(leads(&parser, &peer, port), "{peer:?}");
    }
    for peer in ["169.254.169.254", "fe80::a9fe:a9fe", "fd00:ec2::254"] {
        assert!(!leads(&parser, &address(peer), 80), "{peer}");
    }
}

#[test]
fn browser_goes_out_to_public_addresses_alone() {
    let solver = object("Deployment", "flaresolverr");
    for (peer, port) in [
        ("93.184.215.14", 443),
        ("93.184.215.14", 80),
        ("2606:2800:21f:cb07::1", 443),
        ("10.96.0.10", 53),
        ("169.254.20.10", 53),
    ] {
        assert!(leads(&solver, &address(peer), port), "{peer}");
    }
    for peer in [
        "10.96.0.1",
        "172.17.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "fd00:ec2::254",
        "fe80::1",
        "::1",
    ] {
        assert!(!leads(&solver, &address(peer), 443), "{peer}");
    }
    assert!(!leads(&solver, &Peer::Pod(parser_labels()), 443));
}

#[test]
fn redis_goes_out_nowhere() {
    let redis = object("StatefulSet", "redis");
    for peer in [Peer::Pod(parser_labels()), address("93.184.215.14"), address("10.96.0.10")] {
        assert!(!leads(&redis, &peer, 53) && !leads(&redis, &peer, 443), "{peer:?}");
    }
}
