//! Certificates on both sides: our own CA with its leaves for parsers, and trust in upstreams.
//!
//! # Invariants
//!
//! - The CA can vouch for the API hosts and for nothing else: its certificate says so, critically.
//! - All processes that share a CA folder use the same CA, whichever of them made it.
//! - The CA key never leaves its folder, and no one but its owner can read what this module writes there.
//! - Upstream certificates are always verified.

mod authority;
mod files;
mod leaf;
mod scope;
mod trust;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use rustix::process::geteuid;
use rustls::SupportedCipherSuite;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use thiserror::Error;

pub use authority::{Authority, Summary};
pub use leaf::Leaves;
pub use trust::{TrustBundle, client_config};

/// The only application protocol spoken here, on either side.
const ALPN: &[u8] = b"http/1.1";

/// Why certificates could not be made, loaded or trusted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file is there but cannot be read.
    #[error(
        "cannot read {}: {cause}; check the owner and mode of it and of its folder, for user {}",
        path.display(), geteuid().as_raw()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A file or folder cannot be written.
    #[error("cannot write {}: {cause}; make its folder writable for the user that runs token-sidecar", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// `ca.pem` or `ca.key` does not hold what it should.
    #[error("{} is not usable: {reason}; restore it, or make a new CA with `token-sidecar ca --renew`", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// `ca.pem` is there without its key.
    #[error("{} is missing beside its certificate; restore it, or make a new CA with `token-sidecar ca --renew`", key.display())]
    KeyMissing {
        /// Where the key should be.
        key: PathBuf,
    },
    /// The certificate is of another key.
    #[error(
        "{} and {} do not belong together; restore the pair, or make a new CA with `token-sidecar ca --renew`",
        certificate.display(), key.display()
    )]
    Mismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// The CA's name constraints leave out an API host.
    #[error(
        "the CA in {} does not cover the API host `{host}`; make one that does with `token-sidecar ca --renew`",
        certificate.display()
    )]
    NotCovered {
        /// The host that is left out.
        host: String,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// The CA's time has run out.
    #[error(
        "the CA in {} expired on {}; make a new one with `token-sidecar ca --renew`",
        certificate.display(), humantime::format_rfc3339_seconds(*not_after)
    )]
    Expired {
        /// The certificate's file.
        certificate: PathBuf,
        /// The last moment of its validity.
        not_after: SystemTime,
    },
    /// An API host that is neither a DNS name nor an IP address.
    #[error("`{host}` is neither a DNS name nor an IP address; check the hosts in API_ORIGINS")]
    BadHost {
        /// The text that was given.
        host: String,
    },
    /// A file of additional roots holds no certificate, or one that cannot be used.
    #[error("{} holds no usable CA certificate: {reason}; it must hold certificates in PEM form", path.display())]
    BadRoots {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate or key could not be made.
    #[error("cannot make a certificate: {0}")]
    Issue(rcgen::Error),
    /// The TLS library refused its settings.
    #[error("cannot set up TLS: {0}")]
    Setup(rustls::Error),
}

impl From<rcgen::Error> for TlsError {
    fn from(cause: rcgen::Error) -> Self {
        Self::Issue(cause)
    }
}

impl From<rustls::Error> for TlsError {
    fn from(cause: rustls::Error) -> Self {
        Self::Setup(cause)
    }
}

/// The cryptography that all TLS here uses; no process-wide default is relied on.
///
/// AES-128-GCM goes first, as it does with browsers: as far as anybody knows it is no easier to break than AES-256-GCM, and
/// it and its SHA-256 cost less, a fifth of a handshake.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(key_length);
    Arc::new(provider)
}

fn key_length(suite: &SupportedCipherSuite) -> usize {
    match suite {
        SupportedCipherSuite::Tls12(suite) => suite.aead_alg.key_block_shape().enc_key_len,
        SupportedCipherSuite::Tls13(suite) => suite.aead_alg.key_len(),
    }
}
