//! The manifests against the schemas of Kubernetes, which `kubernetes-validate` brings along.

use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use super::guide::with_alias;
use super::{APART, applied_files, documents, path};
use crate::support::parser::python;
use crate::support::sidecar::{output, stderr, stdout};

/// The oldest that the guide promises, and the newest of which the package knows.
const VERSIONS: [&str; 2] = ["1.29", "1.37"];

/// Runs the validator on files, strictly; tells whether it succeeded, and what it said.
async fn validated(mut command: Command, files: &[impl AsRef<std::ffi::OsStr>]) -> (bool, String) {
    command.args(["-m", "kubernetes_validate", "--strict"]);
    command.args(VERSIONS.iter().flat_map(|version| ["-k", version])).args(files);
    let output = output(command).await;
    (output.status.success(), stdout(&output) + &stderr(&output))
}

fn validator() -> Option<Command> {
    python("schemas of Kubernetes", "kubernetes_validate")
}

/// A Deployment in a file of its own.
fn file_of(object: &Value, dir: &TempDir) -> std::path::PathBuf {
    let file = dir.path().join("object.yaml");
    std::fs::write(&file, object.to_string()).unwrap();
    file
}

#[tokio::test]
async fn manifests_are_valid_for_kubernetes() {
    let Some(command) = validator() else { return };
    let files: Vec<String> = applied_files().into_iter().chain(APART.map(str::to_owned)).collect();
    let count: usize = files.iter().map(|file| documents(file).len()).sum();
    let paths: Vec<_> = files.iter().map(|file| path(file)).collect();
    let (success, said) = validated(command, &paths).await;
    assert!(success, "{said}");
    // What it has no schema for it passes over with a warning.
    let passed = said.lines().filter(|line| line.starts_with("INFO ") && line.contains(" passed "));
    assert_eq!(passed.count(), count * VERSIONS.len(), "{said}");
    assert_eq!(said.lines().count(), count * VERSIONS.len(), "{said}");
}

#[tokio::test]
async fn pod_with_the_alias_of_the_guide_is_valid_for_kubernetes() {
    let Some(command) = validator() else { return };
    let dir = TempDir::new().unwrap();
    let (success, said) = validated(command, &[file_of(&with_alias(), &dir)]).await;
    assert!(success && said.matches(" passed ").count() == VERSIONS.len(), "{said}");
}

#[tokio::test]
async fn slip_of_the_pen_is_seen_by_the_validator() {
    let Some(command) = validator() else { return };
    let dir = TempDir::new().unwrap();
    let mut parser = super::object("Deployment", "parser");
    let sidecar = &mut parser["spec"]["template"]["spec"]["initContainers"][0];
    sidecar["restartPolcy"] = sidecar["restartPolicy"].take();
    sidecar.as_object_mut().unwrap().remove("restartPolicy");
    let (success, said) = validated(command, &[file_of(&parser, &dir)]).await;
    assert!(!success && said.contains("restartPolcy"), "{said}");
}
