//! Whom parsers and we ourselves trust: the files for parsers, and the client side of TLS.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use pem::{EncodeConfig, LineEnding, Pem};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use webpki_root_certs::TLS_SERVER_ROOT_CERTS;

use super::authority::Authority;
use super::{ALPN, TlsError, files, provider};

/// The two files that a parser needs to trust our CA.
#[derive(Clone, Debug)]
pub struct TrustBundle {
    /// Our CA alone, for clients that add it to their roots.
    pub ca_pem: Bytes,
    /// The public roots, the operator's and ours, for clients whose roots it replaces.
    pub bundle_pem: Bytes,
}

impl TrustBundle {
    /// Puts together the public roots, those in `extra_ca_file` and the CA of `authority`.
    ///
    /// # Errors
    ///
    /// [`TlsError`] if `extra_ca_file` cannot be read or holds anything but CA certificates.
    pub fn build(authority: &Authority, extra_ca_file: Option<&Path>) -> Result<Self, TlsError> {
        let extra = extra_ca_file.map(read_roots).transpose()?.unwrap_or_default();
        let all = TLS_SERVER_ROOT_CERTS.iter().chain(&extra).chain([authority.certificate()]);
        Ok(Self {
            ca_pem: authority.certificate_pem().to_owned().into(),
            bundle_pem: to_pem(all).into(),
        })
    }

    /// Writes `ca.pem` and `ca-bundle.pem` to the folder `dir`, each in one step, mode 0644, and only if it changes.
    ///
    /// Where `dir` is the CA's own folder, its `ca.pem` is left to the CA. Blocks.
    ///
    /// # Errors
    ///
    /// [`TlsError::Write`] if a file that has to change cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), TlsError> {
        files::create_dir(dir)?;
        // Another process may have renewed the CA since we read it; its certificate must stay with its key.
        if !dir.join("ca.key").exists() {
            write_changed(&dir.join("ca.pem"), &self.ca_pem)?;
        }
        write_changed(&dir.join("ca-bundle.pem"), &self.bundle_pem)
    }
}

/// Settings for TLS to upstreams: the public roots and those in `extra_ca_file`, HTTP/1.1, with resumption.
///
/// The sessions of the last 256 hosts are kept, at most 8 tickets of each: some MB if clients name that many by
/// `https://` in the clear, some KB else.
///
/// # Errors
///
/// [`TlsError`] if `extra_ca_file` cannot be read, holds no certificate, or one that cannot be a root.
pub fn client_config(extra_ca_file: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let extra = extra_ca_file.map(read_roots).transpose()?.unwrap_or_default();
    roots.add_parsable_certificates(extra); // `read_roots` has tried each of them
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config))
}

/// The certificates as PEM text, one after the other.
pub(super) fn to_pem<'a>(
    certificates: impl IntoIterator<Item = &'a CertificateDer<'static>>,
) -> String {
    let blocks: Vec<Pem> =
        certificates.into_iter().map(|der| Pem::new("CERTIFICATE", der.as_ref())).collect();
    pem::encode_many_config(&blocks, EncodeConfig::new().set_line_ending(LineEnding::LF))
}

/// The certificates in the PEM file at `path`: at least one, and all of them fit to be roots.
fn read_roots(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unusable = |reason: String| TlsError::BadRoots { path: path.to_owned(), reason };
    let text =
        std::fs::read(path).map_err(|cause| TlsError::Read { path: path.to_owned(), cause })?;
    let certificates = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unusable(error.to_string()))?;
    if certificates.is_empty() {
        return Err(unusable("there is no certificate in it".to_owned()));
    }
    let mut trial = RootCertStore::empty();
    for certificate in &certificates {
        trial.add(certificate.clone()).map_err(|error| unusable(error.to_string()))?;
    }
    Ok(certificates)
}

fn write_changed(path: &Path, contents: &[u8]) -> Result<(), TlsError> {
    if std::fs::read(path).is_ok_and(|present| present == contents) {
        return Ok(());
    }
    files::replace(path, contents, 0o644)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn authority(dir: &Path) -> Authority {
        Authority::open(dir, &["api.test".to_owned()]).unwrap()
    }

    #[test]
    fn the_bundle_holds_public_roots_the_operators_and_ours() {
        let dir = tempfile::tempdir().unwrap();
        let extra = authority(&dir.path().join("extra"));
        let ours = authority(&dir.path().join("ours"));
        let bundle = TrustBundle::build(&ours, Some(&dir.path().join("extra/ca.pem"))).unwrap();
        let all: Vec<_> =
            CertificateDer::pem_slice_iter(&bundle.bundle_pem).map(Result::unwrap).collect();
        assert!(all.len() > 100, "{}", all.len());
        assert_eq!(all[all.len() - 2..], [extra.certificate().clone(), ours.certificate().clone()]);
        let mut roots = RootCertStore::empty();
        assert_eq!(roots.add_parsable_certificates(all.clone()), (all.len(), 0));
        assert!(!bundle.bundle_pem.contains(&b'\r'));
        assert_eq!(bundle.ca_pem, ours.certificate_pem());
    }

    #[test]
    fn trust_files_are_written_only_when_they_change() {
        let dir = tempfile::tempdir().unwrap();
        let trust = dir.path().join("trust");
        let inode = |name: &str| fs::metadata(trust.join(name)).unwrap().ino();
        let first = TrustBundle::build(&authority(&dir.path().join("a")), None).unwrap();
        first.write(&trust).unwrap();
        let before = (inode("ca.pem"), inode("ca-bundle.pem"));
        let mode = fs::metadata(trust.join("ca-bundle.pem")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o644);
        first.write(&trust).unwrap();
        assert_eq!((inode("ca.pem"), inode("ca-bundle.pem")), before);
        let second = TrustBundle::build(&authority(&dir.path().join("b")), None).unwrap();
        second.write(&trust).unwrap();
        assert_eq!(fs::read(trust.join("ca.pem")).unwrap(), second.ca_pem);
        assert_eq!(fs::read(trust.join("ca-bundle.pem")).unwrap(), second.bundle_pem);
    }

    #[test]
    fn the_cas_own_certificate_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let stale = TrustBundle::build(&authority(dir.path()), None).unwrap();
        let renewed = Authority::renew(dir.path(), &["api.test".to_owned()]).unwrap();
        stale.write(dir.path()).unwrap();
        let present = fs::read_to_string(dir.path().join("ca.pem")).unwrap();
        assert_eq!(present, renewed.certificate_pem());
    }

    #[test]
    fn a_file_of_roots_must_hold_some() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("roots.pem");
        let error = || client_config(Some(&path)).unwrap_err().to_string();
        assert!(error().contains("cannot read") && error().contains("roots.pem"), "{}", error());
        fs::write(&path, "no PEM at all").unwrap();
        assert!(error().contains("roots.pem"), "{}", error());
        fs::write(&path, to_pem([&CertificateDer::from(vec![1, 2, 3])])).unwrap();
        assert!(error().contains("roots.pem"), "{}", error());
        fs::write(&path, authority(&dir.path().join("ca")).certificate_pem()).unwrap();
        assert_eq!(client_config(Some(&path)).unwrap().alpn_protocols, [ALPN]);
        assert!(client_config(None).is_ok());
    }
}
