//! `deploy/k8s`: what stands in the manifests fits together, and is what the program takes.
//!
//! There is no cluster here. What can be known without one is checked: the schemas of Kubernetes,
//! the names by which the parts find each other, the settings and commands by the real binary, and
//! Redis's start by a real `redis-server`.

mod guide;
mod network;
mod pods;
mod redis;
mod schema;
mod settings;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use saphyr::{LoadableYamlNode as _, Scalar, Yaml};
use serde_json::Value;

/// Manifests that are not applied with the rest; the guide says what they are for.
const APART: [&str; 2] = ["namespace.yaml", "secret.example.yaml"];

/// The Secret that people make.
const SECRET: &str = "token-sidecar";

/// A file of `deploy/k8s`.
fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/k8s").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap()
}

/// The YAML files of `deploy/k8s`.
fn yaml_files() -> BTreeSet<String> {
    let entries = fs::read_dir(path("")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains(".y")).collect()
}

/// The files that `kubectl apply -k` applies.
fn applied_files() -> BTreeSet<String> {
    let kustomization = documents("kustomization.yaml").remove(0);
    strings(&kustomization["resources"]).map(str::to_owned).collect()
}

/// All that is applied.
fn applied() -> Vec<Value> {
    applied_files().iter().flat_map(|file| documents(file)).collect()
}

/// The object of this kind and name among what is applied.
fn object(kind: &str, name: &str) -> Value {
    let found =
        applied().into_iter().find(|object| object["kind"] == kind && named(object) == name);
    found.unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

/// The objects of this kind among what is applied; there is at least one.
fn objects(kind: &str) -> Vec<Value> {
    let found: Vec<Value> = applied().into_iter().filter(|object| object["kind"] == kind).collect();
    assert!(!found.is_empty(), "there is no {kind}");
    found
}

/// The objects that make pods.
fn workloads() -> Vec<Value> {
    let mut workloads = objects("Deployment");
    workloads.extend(objects("StatefulSet"));
    workloads
}

fn named(object: &Value) -> &str {
    text(&object["metadata"]["name"])
}

/// The documents of a file of `deploy/k8s`.
fn documents(name: &str) -> Vec<Value> {
    parsed(&read(name))
}

/// The documents of a YAML text.
fn parsed(text: &str) -> Vec<Value> {
    let documents = Yaml::load_from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert!(!documents.is_empty(), "{text}");
    documents.iter().map(json).collect()
}

/// The same as JSON, which has the types that the API server sees.
fn json(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::Value(Scalar::Null) => Value::Null,
        Yaml::Value(Scalar::Boolean(flag)) => (*flag).into(),
        Yaml::Value(Scalar::Integer(number)) => (*number).into(),
        Yaml::Value(Scalar::FloatingPoint(number)) => number.into_inner().into(),
        Yaml::Value(Scalar::String(text)) => text.as_ref().into(),
        Yaml::Sequence(items) => items.iter().map(json).collect(),
        Yaml::Mapping(pairs) => pairs
            .iter()
            .map(|(name, value)| (name.as_str().unwrap().to_owned(), json(value)))
            .collect(),
        other => panic!("not plain YAML: {other:?}"),
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("expected a text: {value}"))
}

/// The items of a list; none where there is no list.
fn items(value: &Value) -> impl Iterator<Item = &Value> {
    assert!(value.is_array() || value.is_null(), "expected a list: {value}");
    value.as_array().into_iter().flatten()
}

/// The texts of a list.
fn strings(value: &Value) -> impl Iterator<Item = &str> {
    items(value).map(text)
}

/// The pairs of an object whose values are all texts.
fn pairs(value: &Value) -> BTreeMap<&str, &str> {
    let pairs = value.as_object().unwrap_or_else(|| panic!("expected an object: {value}"));
    pairs.iter().map(|(name, value)| (name.as_str(), text(value))).collect()
}

/// The spec of a workload's pods.
fn pod(workload: &Value) -> &Value {
    &workload["spec"]["template"]["spec"]
}

/// All containers of a pod.
fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    items(&pod["initContainers"]).chain(items(&pod["containers"]))
}

/// The parser's pod.
fn parser_pod() -> Value {
    pod(&object("Deployment", "parser")).clone()
}

fn is_sidecar(container: &Value) -> bool {
    container["name"] == "token-sidecar"
}

/// The sidecar of a pod.
fn sidecar(pod: &Value) -> &Value {
    containers(pod).find(|container| is_sidecar(container)).expect("a sidecar")
}

/// The parser of a pod.
fn parser(pod: &Value) -> &Value {
    containers(pod).find(|container| container["name"] == "parser").expect("a parser")
}

/// The variables that stand in the container itself, with their values.
fn literals(container: &Value) -> BTreeMap<&str, &str> {
    let plain = items(&container["env"]).filter(|variable| variable.get("value").is_some());
    plain.map(|variable| (text(&variable["name"]), text(&variable["value"]))).collect()
}

/// The variables that come from a Secret: name, and the reference.
fn from_secret(container: &Value) -> Vec<(&str, &Value)> {
    let references = items(&container["env"])
        .map(|variable| (text(&variable["name"]), &variable["valueFrom"]["secretKeyRef"]));
    references.filter(|(_, reference)| !reference.is_null()).collect()
}

#[test]
fn kustomization_names_every_manifest_but_those_that_stand_apart() {
    let mut expected = yaml_files();
    for name in APART.into_iter().chain(["kustomization.yaml"]) {
        assert!(expected.remove(name), "{name}");
    }
    assert!(expected.len() > 3, "{expected:?}");
    assert_eq!(applied_files(), expected);
}

#[test]
fn no_manifest_that_is_applied_is_a_secret_or_names_a_namespace_of_its_own() {
    for object in applied() {
        assert!(object["kind"] != "Secret" && object["kind"] != "Namespace", "{}", named(&object));
        assert!(object["metadata"]["namespace"].is_null(), "{}", named(&object));
    }
}

#[test]
fn what_stands_apart_is_for_the_namespace_of_the_kustomization() {
    let kustomization = documents("kustomization.yaml").remove(0);
    let namespace = documents("namespace.yaml").remove(0);
    assert_eq!(named(&namespace), text(&kustomization["namespace"]));
    let secret = documents("secret.example.yaml").remove(0);
    assert_eq!(secret["metadata"]["namespace"], kustomization["namespace"]);
}

#[test]
fn no_kind_has_two_objects_of_one_name() {
    let all = applied();
    let names: BTreeSet<_> = all.iter().map(|o| (text(&o["kind"]), named(o))).collect();
    assert_eq!(names.len(), all.len());
}
