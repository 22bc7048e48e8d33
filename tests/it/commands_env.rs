//! `env`: its output taken literally by `sh`, compose and Kubernetes, and its self-test in earnest.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use saphyr::{LoadableYamlNode as _, Yaml};
use url::Url;

use crate::support::client::{API, GATE};
use crate::support::sidecar::{output, stderr, stdout};
use crate::support::solver::Mode;
use crate::support::{Stage, World};

/// A folder and credentials that no quoting may spoil.
const ODD_FOLDER: &str = "/tr ust/it's \"so\" $HOME ${PATH} `id` \\n #1: {x}";
const ODD_USER: &str = "us'er $1";
const ODD_PASSWORD: &str = "p@ss:w/o?r#d% \"$(id)\\' {ü}";

/// The variables that a parser gets, each set to what it is to be.
const NAMES: [&str; 10] = [
    "http_proxy",
    "https_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "no_proxy",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
];

async fn odd_stage() -> Stage {
    let mut stage = Stage::new().await;
    stage.set("PROXY_LISTEN", "0.0.0.0:18080");
    stage.set("ADVERTISE_URL", "http://token-sidecar:8080");
    stage.set("ADVERTISE_TRUST_DIR", ODD_FOLDER);
    stage.set("PROXY_AUTH", format!("{ODD_USER}:{ODD_PASSWORD}"));
    stage
}

/// What `env` prints.
async fn printed(stage: &Stage, arguments: &[&str]) -> String {
    let output = stage.run(&[&["env"], arguments].concat()).await;
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output)
}

/// Runs `script` in `sh` with nothing but the path in its environment.
async fn sh(script: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("sh");
    command.args(["-euc", script, "sh"]).args(arguments);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    command.stdin(Stdio::null());
    output(command).await
}

/// The self-test that `env` prints at its end.
fn self_test(printed: &str) -> &str {
    let line = printed.lines().last().and_then(|line| line.strip_prefix("# "));
    line.filter(|line| line.starts_with("python3 ")).expect("the self-test")
}

/// The odd values arrived as they are.
fn check_odd(variables: &BTreeMap<String, String>) {
    for name in NAMES {
        assert!(variables.contains_key(name), "{name} is missing: {variables:?}");
    }
    for name in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"] {
        let url = Url::parse(&variables[name]).unwrap();
        assert_eq!((url.host_str(), url.port()), (Some("token-sidecar"), Some(8080)));
        let decoded = |text| percent_encoding::percent_decode_str(text).decode_utf8().unwrap();
        assert_eq!(decoded(url.username()), ODD_USER);
        assert_eq!(decoded(url.password().unwrap()), ODD_PASSWORD);
    }
    for name in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
        assert_eq!(variables[name], format!("{ODD_FOLDER}/ca-bundle.pem"));
    }
    assert_eq!(variables["NODE_EXTRA_CA_CERTS"], format!("{ODD_FOLDER}/ca.pem"));
}

/// The offers that stand in comments, taken up: each line without its mark and nothing else done.
fn taken_up(printed: &str) -> String {
    let line = |line: &str| match line.strip_prefix("  # ") {
        Some(offer) => format!("  {offer}\n"),
        None if line.starts_with("# export ") => format!("{}\n", &line[2..]),
        None => format!("{line}\n"),
    };
    printed.lines().map(line).collect()
}

/// The offers arrived as they are, beside the rest.
fn check_offers(variables: &BTreeMap<String, String>) {
    check_odd(variables);
    assert_eq!(variables["CHITAI_GOROD_API_URL"], "http://token-sidecar:8080/web/api/v2");
    assert_eq!(variables["PHP_INI_SCAN_DIR"], format!(":{ODD_FOLDER}/php.d"));
    let options = &variables["JAVA_TOOL_OPTIONS"];
    let store = format!("-Djavax.net.ssl.trustStore={ODD_FOLDER}/trust.jks ");
    let proxy = "-Dhttps.proxyHost=token-sidecar -Dhttps.proxyPort=8080 ";
    assert!(options.contains(proxy) && options.contains(&store), "{options}");
}

/// The variables of a shell that has evaluated `printed`.
async fn shell_variables(printed: &str) -> BTreeMap<String, String> {
    let output = sh("eval \"$1\"; exec env -0", &[printed]).await;
    assert!(output.status.success(), "{}", stderr(&output));
    let pairs = stdout(&output);
    let pairs = pairs.split('\0').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

#[tokio::test]
async fn shell_output_is_evaluated_to_the_very_values() {
    let stage = odd_stage().await;
    for arguments in [&[][..], &["--format", "shell"]] {
        let printed = printed(&stage, arguments).await;
        let variables = shell_variables(&printed).await;
        check_odd(&variables);
        assert!(!variables.contains_key("CHITAI_GOROD_API_URL"));
        check_offers(&shell_variables(&taken_up(&printed)).await);
    }
}

/// The first document of `text`.
fn yaml(text: &str) -> Yaml<'_> {
    let mut documents = Yaml::load_from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(documents.len(), 1);
    documents.remove(0)
}

/// A text as compose and Kubernetes read it: `$$` is a dollar, and a single one would begin an expansion.
fn expanded(value: &Yaml) -> String {
    let text = value.as_str().expect("a string");
    let parts: Vec<&str> = text.split("$$").collect();
    assert!(!parts.iter().any(|part| part.contains('$')), "{text}");
    parts.join("$")
}

fn compose_variables(service: &Yaml) -> BTreeMap<String, String> {
    let variables = service["environment"].as_mapping().unwrap().iter();
    variables.map(|(name, value)| (name.as_str().unwrap().to_owned(), expanded(value))).collect()
}

#[tokio::test]
async fn compose_output_is_a_fragment_with_the_very_values() {
    let stage = odd_stage().await;
    let printed = printed(&stage, &["--format", "compose"]).await;
    let service = yaml(&printed);
    check_odd(&compose_variables(&service));
    check_offers(&compose_variables(&yaml(&taken_up(&printed))));
    let volume = &service["volumes"].as_vec().unwrap()[0];
    assert_eq!(expanded(&volume["target"]), ODD_FOLDER);
    assert_eq!(volume["read_only"].as_bool(), Some(true));
}

fn container_variables(container: &Yaml) -> BTreeMap<String, String> {
    let variables = container["env"].as_vec().unwrap().iter();
    let pair =
        |entry: &Yaml| (entry["name"].as_str().unwrap().to_owned(), expanded(&entry["value"]));
    variables.map(pair).collect()
}

#[tokio::test]
async fn kubernetes_output_is_a_fragment_with_the_very_values() {
    let stage = odd_stage().await;
    let printed = printed(&stage, &["--format", "k8s"]).await;
    let container = yaml(&printed);
    check_odd(&container_variables(&container));
    check_offers(&container_variables(&yaml(&taken_up(&printed))));
    let mount = &container["volumeMounts"].as_vec().unwrap()[0];
    assert_eq!(mount["mountPath"].as_str(), Some(ODD_FOLDER));
    assert_eq!(mount["readOnly"].as_bool(), Some(true));
}

#[tokio::test]
async fn no_proxy_names_the_neighbours_and_no_api_host() {
    let mut stage = Stage::new().await;
    stage.set("PROXY_LISTEN", "127.0.0.7:18080");
    stage.set("ADVERTISE_URL", format!("http://{API}:8080"));
    stage.set("REDIS_URL", "redis://:secret@cache.test:6379/0");
    stage.set("FLARESOLVERR_URL", "http://Solver.test:8191/v1");
    let printed = printed(&stage, &[]).await;
    let line = printed.lines().find_map(|line| line.strip_prefix("export no_proxy=")).unwrap();
    let names: Vec<&str> = line.trim_matches('\'').split(',').collect();
    for name in [
        "localhost",
        "127.0.0.1",
        "::1",
        "redis",
        "flaresolverr",
        "127.0.0.7",
        "cache.test",
        "solver.test",
    ] {
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    assert!(!names.contains(&API) && !names.contains(&GATE), "{names:?}");
    assert!(!printed.contains("secret"));
}

#[tokio::test]
async fn every_format_warns_of_the_password_and_has_the_self_test_in_comments() {
    let stage = odd_stage().await;
    for format in ["shell", "compose", "k8s"] {
        let printed = printed(&stage, &["--format", format]).await;
        let comments: Vec<&str> = printed.lines().filter(|line| line.starts_with('#')).collect();
        let comments = comments.join("\n");
        assert!(comments.contains("the URL carries user:password"), "{format}");
        assert!(comments.contains("the gateway asks for `Authorization: Basic`"), "{format}");
        assert!(self_test(&printed).contains(API), "{format}");
    }
}

/// The line that `env` says on stderr; it stands at the top of the output, too.
async fn doubt(stage: &Stage, format: &str) -> Option<String> {
    let output = stage.run(&["env", "--format", format]).await;
    assert!(output.status.success());
    let said = stderr(&output);
    assert!(said.lines().count() <= 1, "{said}");
    let doubt = said.strip_prefix("token-sidecar: ")?.trim_end().to_owned();
    let top = format!("# NOTE: {doubt}\n");
    assert!(stdout(&output).starts_with(&top), "{}", stdout(&output));
    Some(doubt)
}

#[tokio::test]
async fn loopback_address_for_a_container_is_doubted() {
    let mut stage = Stage::new().await;
    for format in ["compose", "k8s"] {
        let doubt = doubt(&stage, format).await.expect("a doubt");
        assert!(
            doubt.contains("ADVERTISE_URL") && doubt.contains("ADVERTISE_TRUST_DIR"),
            "{doubt}"
        );
    }
    stage.set("ADVERTISE_TRUST_DIR", "/certs");
    stage.set("ADVERTISE_URL", "http://localhost:8080");
    let said = doubt(&stage, "compose").await.expect("a doubt");
    assert!(said.contains("ADVERTISE_URL") && !said.contains("ADVERTISE_TRUST_DIR"), "{said}");
    stage.set("ADVERTISE_URL", "http://token-sidecar:8080");
    for format in ["compose", "k8s"] {
        assert_eq!(doubt(&stage, format).await, None);
    }
}

#[tokio::test]
async fn trust_files_that_are_not_there_are_doubted_in_a_shell() {
    let stage = Stage::new().await;
    let said = doubt(&stage, "shell").await.expect("a doubt");
    assert!(said.contains("token-sidecar run"), "{said}");
    let world = stage.start().await;
    assert_eq!(doubt(&world, "shell").await, None, "the sidecar has made them");
}

#[tokio::test]
async fn unknown_format_is_a_usage_error() {
    let stage = Stage::new().await;
    assert_eq!(stage.run(&["env", "--format", "xml"]).await.status.code(), Some(2));
}

#[tokio::test]
async fn env_makes_and_asks_nothing() {
    let stage = Stage::new().await;
    let listing = || {
        let entries = std::fs::read_dir(stage.dir()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = listing();
    printed(&stage, &[]).await;
    assert_eq!(listing(), before);
    assert_eq!(stage.origin.connections(), 0);
}

#[tokio::test]
async fn guide_has_the_self_test_that_env_prints() {
    let stage = Stage::new().await;
    let printed = printed(&stage, &[]).await;
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("TOKEN_UPDATE_GUIDE.md");
    let guide = std::fs::read_to_string(guide).unwrap();
    assert!(guide.lines().any(|line| line == self_test(&printed)), "{}", self_test(&printed));
}

// The self-test, in a shell that has evaluated the output.

/// The output of `env` for a parser of this running sidecar.
async fn beside(world: &mut World) -> String {
    let proxy = world.sidecar.proxy();
    world.set("PROXY_LISTEN", proxy);
    printed(world, &[]).await
}

/// Runs the self-test after `change`, and checks its exit code and how its only line begins.
async fn check_self_test(printed: &str, change: &str, expected: &str) {
    let script = format!("eval \"$1\"; {change}\neval \"$2\"");
    let output = sh(&script, &[printed, self_test(printed)]).await;
    let said = stdout(&output) + &stderr(&output);
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(said.starts_with(expected), "{said}");
    assert_eq!(output.status.success(), expected.starts_with("OK"), "{said}");
}

#[tokio::test]
async fn self_test_is_content_with_a_working_sidecar() {
    let mut world = World::start().await;
    let printed = beside(&mut world).await;
    check_self_test(&printed, "", "OK: proxy, certificate and token work: HTTP 200").await;
}

#[tokio::test]
async fn self_test_is_content_with_odd_credentials_and_present_alone() {
    let pair = format!("{ODD_USER}:{ODD_PASSWORD}");
    let mut world = World::with(&[("PROXY_AUTH", &pair), ("AUTHORIZATION", "present")]).await;
    let printed = beside(&mut world).await;
    check_self_test(&printed, "", "OK: ").await;
    let wrong = "https_proxy=http://someone:else@${https_proxy##*@}";
    check_self_test(&printed, wrong, "FAILED: the proxy refuses: ").await;
}

#[tokio::test]
async fn self_test_tells_a_certificate_that_is_not_trusted() {
    let mut world = World::start().await;
    let printed = beside(&mut world).await;
    check_self_test(&printed, "unset SSL_CERT_FILE", "FAILED: certificate not trusted: ").await;
    let missing = "FAILED: certificate not trusted: SSL_CERT_FILE=/nowhere.pem, no file there";
    check_self_test(&printed, "SSL_CERT_FILE=/nowhere.pem", missing).await;
}

#[tokio::test]
async fn self_test_tells_variables_that_are_missing() {
    let mut world = World::start().await;
    let printed = beside(&mut world).await;
    let unset = "unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY";
    check_self_test(&printed, unset, "FAILED: proxy variables missing: ").await;
    let bypass = format!("no_proxy={API}");
    check_self_test(&printed, &bypass, "FAILED: no_proxy names ").await;
}

#[tokio::test]
async fn self_test_tells_a_proxy_that_is_not_reachable() {
    let mut world = World::start().await;
    world.set("PROXY_AUTH", "user:hunter2");
    let printed = beside(&mut world).await;
    let address = world.sidecar.proxy();
    world.sidecar.kill();
    let expected = format!("FAILED: proxy not reachable: {address}: ");
    check_self_test(&printed, "", &expected).await;
}

#[tokio::test]
async fn self_test_tells_that_there_is_no_token() {
    let stage = Stage::new().await;
    stage.without_token();
    stage.origin.close_doors();
    stage.solver.set(Mode::Error);
    let mut world = stage.launch().await;
    let printed = beside(&mut world).await;
    let script = "eval \"$1\"; eval \"$2\"";
    let output = sh(script, &[&printed, self_test(&printed)]).await;
    let said = stderr(&output);
    assert!(said.starts_with("FAILED: no token, or no room: HTTP 503 "), "{said}");
    assert!(said.contains("token_unavailable"), "{said}");
    assert_eq!(output.status.code(), Some(1));
}

#[tokio::test]
async fn self_test_tells_a_token_that_is_refused_and_not_renewed() {
    let mut world = World::start().await;
    let printed = beside(&mut world).await;
    world.origin.close_doors();
    world.solver.set(Mode::Error);
    world.kill_token();
    check_self_test(&printed, "", "FAILED: token refused: HTTP 401 token-sidecar").await;
}
