//! PHP's binding of libcurl.

use std::process::Command;

use super::matrix::{INI_FOLDER, PHP_CURL};
use super::{Way, check_at, dying_site};
use crate::support::World;
use crate::support::parser::{is_installed, program};

/// libcurl reads no variable for its roots, only the tool does; PHP has a setting for them.
fn write_ini_file(world: &World) {
    let folder = world.path(INI_FOLDER);
    std::fs::create_dir(&folder).unwrap();
    let bundle = world.path("certs").join("ca-bundle.pem");
    let setting = format!("curl.cainfo = \"{}\"\n", bundle.display());
    std::fs::write(folder.join("sidecar.ini"), setting).unwrap();
}

async fn check_php(way: Way) {
    if !is_installed(PHP_CURL.name, "php", &["-r", "exit(function_exists('curl_init') ? 0 : 1);"]) {
        return;
    }
    let Some(site) = dying_site(way).await else {
        return;
    };
    write_ini_file(&site);
    let mut command = Command::new("php");
    command.arg(program("curl_client.php"));
    check_at(&site, &PHP_CURL, way, command).await;
}

#[tokio::test]
async fn php_curl_sees_no_401_through_the_proxy() {
    check_php(Way::Proxy).await;
}

#[tokio::test]
async fn php_curl_sees_no_401_at_the_gateway() {
    check_php(Way::Gateway).await;
}

#[tokio::test]
async fn php_curl_sees_no_401_behind_the_alias() {
    check_php(Way::Alias).await;
}
