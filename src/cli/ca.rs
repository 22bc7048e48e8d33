//! `ca`: the certificate that clients must trust.

use std::process::ExitCode;

use super::fail;
use crate::app::{AppError, write_bundle};
use crate::config::{Config, ConfigError};
use crate::tls::{Authority, TlsError};

/// Shows the CA, after renewing it with `renew`.
pub(super) fn execute(config: &Config, renew: bool) -> Result<ExitCode, AppError> {
    let at_ca = |error: TlsError| ConfigError::new("CA_DIR", error.to_string());
    let dir = &config.ca.dir;
    let authority = if renew {
        let authority = Authority::renew(dir, &config.api.hosts()).map_err(at_ca)?;
        write_bundle(config, &authority)?;
        authority
    } else if let Some(authority) = Authority::load(dir).map_err(at_ca)? {
        authority
    } else {
        let text = format!("no CA in {} yet; the first `run` makes one", dir.display());
        return Ok(fail(&text, 1));
    };
    let summary = authority.summary();
    println!("certificate  {}", dir.join("ca.pem").display());
    println!("subject      {}", summary.subject);
    println!("sha256       {}", summary.fingerprint);
    println!("not_before   {}", humantime::format_rfc3339_seconds(summary.not_before));
    println!("not_after    {}", humantime::format_rfc3339_seconds(summary.not_after));
    println!("only for     {}", summary.hosts.join(", "));
    println!("bundle       {}", config.ca.trust_dir.join("ca-bundle.pem").display());
    if renew {
        println!("Restart the sidecar, and every client that has read the old bundle.");
    }
    Ok(ExitCode::SUCCESS)
}
