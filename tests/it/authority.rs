//! The sidecar's own certificate authority and the files that parsers trust.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use futures_util::future::join_all;
use x509_parser::prelude::{FromDer as _, GeneralName, ParsedExtension, X509Certificate};

use crate::support::client::{API, GATE, Request, Way};
use crate::support::sidecar::{Sidecar, stderr};
use crate::support::{Stage, World, skip};

/// Reads the first certificate of a PEM file.
fn certificate(path: &Path) -> Vec<u8> {
    pem::parse(std::fs::read(path).unwrap()).unwrap().into_contents()
}

#[tokio::test]
async fn files_are_made_on_the_first_start_with_the_key_for_the_owner_alone() {
    let world = World::start().await;
    let certs = world.path("certs");
    let mode =
        |name: &str| std::fs::metadata(certs.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("ca.key"), 0o600);
    assert_eq!(mode("ca.pem"), 0o644);
    assert_eq!(mode("ca-bundle.pem"), 0o644);
}

#[tokio::test]
async fn authority_is_constrained_to_the_api_hosts() {
    let world = World::start().await;
    let der = certificate(&world.ca_file());
    let (_, ca) = X509Certificate::from_der(&der).unwrap();
    assert!(ca.is_ca());
    let constraints = ca
        .extensions()
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::NameConstraints(constraints) => {
                Some((extension.critical, constraints))
            }
            _ => None,
        })
        .expect("name constraints");
    assert!(constraints.0, "critical");
    let permitted: Vec<&str> = constraints
        .1
        .permitted_subtrees
        .iter()
        .flatten()
        .filter_map(|subtree| match subtree.base {
            GeneralName::DNSName(name) => Some(name),
            _ => None,
        })
        .collect();
    assert!(permitted.contains(&API) && permitted.contains(&GATE), "{permitted:?}");
}

#[tokio::test]
async fn leaf_lives_a_day_at_most_and_names_its_host() {
    use tokio_rustls::rustls::pki_types::ServerName;
    let world = World::start().await;
    let tunnel = world.tunnel(&format!("{API}:443")).await;
    let connector = crate::support::certificates::connector(&world.ca_file(), &[]);
    let stream =
        connector.connect(ServerName::try_from(API).unwrap(), tunnel.into_inner()).await.unwrap();
    let chain = stream.get_ref().1.peer_certificates().unwrap();
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    let validity = leaf.validity();
    let life = validity.not_after.timestamp() - validity.not_before.timestamp();
    assert!(life <= 24 * 3600, "{life} s");
    let backdated =
        i64::try_from(crate::support::token::now()).unwrap() - validity.not_before.timestamp();
    assert!((290..400).contains(&backdated), "{backdated} s");
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(
        matches!(names.value.general_names.as_slice(), [GeneralName::DNSName(name)] if *name == API)
    );
    assert!(!leaf.is_ca());
}

#[tokio::test]
async fn authority_is_kept_over_restarts() {
    let stage = World::start().await.stop();
    let before = std::fs::read(stage.ca_file()).unwrap();
    let world = stage.start().await;
    assert_eq!(std::fs::read(world.ca_file()).unwrap(), before);
    assert_eq!(world.call(Way::Intercept, &Request::get("/web/api/v2/x")).await.status, 200);
}

#[tokio::test]
async fn several_sidecars_that_start_on_one_volume_share_one_authority() {
    let mut stage = Stage::new().await;
    stage.set("ENV_FILE", "/dev/null");
    stage.set("CHITAI_GOROD_BEARER_TOKEN", stage.token.clone());
    let starts = (0..6).map(|_| Sidecar::start(stage.variables(), stage.dir()));
    let sidecars = join_all(starts).await;
    let on_disk = std::fs::read_to_string(stage.ca_file()).unwrap();
    for sidecar in &sidecars {
        let mut wire = crate::support::http::Wire::connect(sidecar.proxy()).await;
        wire.send("GET /.well-known/token-sidecar/ca.pem HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert_eq!(wire.response("GET").await.text(), on_disk);
    }
}

#[tokio::test]
async fn authority_that_does_not_cover_the_origins_ends_the_start_with_a_hint() {
    let mut stage = World::start().await.stop();
    stage.set("API_ORIGINS", "https://other.test/web/api");
    stage.set("VERIFY_URL", "https://other.test/web/api/v2/search/product?phrase=python");
    let output = stage.run(&["run"]).await;
    assert!(!output.status.success());
    assert!(stderr(&output).contains("ca --renew"), "{}", stderr(&output));
}

#[tokio::test]
async fn trust_folder_may_lie_apart_and_never_holds_the_key() {
    let mut stage = Stage::new().await;
    let trust = stage.path("trust");
    stage.set("TRUST_DIR", trust.display());
    let world = stage.start().await;
    let mut names: Vec<String> = std::fs::read_dir(&trust)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert_eq!(names, ["ca-bundle.pem", "ca.pem"]);
    assert_eq!(
        std::fs::read(trust.join("ca.pem")).unwrap(),
        std::fs::read(world.ca_file()).unwrap()
    );
}

#[tokio::test]
async fn extra_authority_is_in_the_bundle() {
    let mut stage = Stage::new().await;
    let extra = stage.path("shop-ca.pem");
    stage.set("EXTRA_CA_FILE", extra.display());
    let world = stage.start().await;
    let bundle = std::fs::read_to_string(world.path("certs").join("ca-bundle.pem")).unwrap();
    let lines = |text: &str| text.lines().collect::<String>();
    assert!(lines(&bundle).contains(&lines(&std::fs::read_to_string(extra).unwrap())));
}

#[tokio::test]
async fn openssl_in_strict_mode_accepts_the_leaf() {
    let world = World::start().await;
    let bundle = world.path("certs").join("ca-bundle.pem");
    let proxy = world.sidecar.proxy().to_string();
    let mut command = std::process::Command::new("openssl");
    command.args([
        "s_client",
        "-proxy",
        &proxy,
        "-connect",
        &format!("{API}:443"),
        "-servername",
        API,
    ]);
    command
        .args(["-verify_hostname", API, "-x509_strict", "-verify_return_error", "-CAfile"])
        .arg(bundle);
    command.stdin(std::process::Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap();
    let Ok(output) = output else {
        return skip::not_installed("`openssl` does not run");
    };
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains("Verify return code: 0 (ok)"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
