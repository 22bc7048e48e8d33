//! The CA: its key and certificate in `CA_DIR`, and what they sign.
//!
//! # Invariants
//!
//! - `ca.key` gets its name before `ca.pem` does, and the certificate is always made from the key on disk. So a
//!   process that stops between the two leaves a folder that the next one completes.
//! - Neither file is ever replaced except by [`Authority::renew`], which removes the certificate first.
//! - The lock only saves work; who makes the CA is decided by the link that gives the file its name.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use tracing::{debug, info, warn};
use x509_parser::certificate::X509Certificate;
use x509_parser::error::X509Error;
use x509_parser::time::ASN1Time;

use super::scope::{Host, Scope, constraints};
use super::{TlsError, files, provider};

/// How long a new CA is valid.
const LIFETIME: Duration = Duration::from_hours(43800);
/// How far a new CA's validity reaches into the past, for clients whose clock is behind.
const BACKDATE: Duration = Duration::from_hours(1);
/// How long before its end a CA draws a warning.
const WARN_BEFORE: Duration = Duration::from_hours(720);

/// The CA certificate with its key.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    facts: Facts,
    paths: Paths,
}

/// What there is to say about a CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The subject's distinguished name.
    pub subject: String,
    /// SHA-256 of the certificate, in the form that `openssl x509 -fingerprint -sha256` prints.
    pub fingerprint: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// The hosts that the name constraint permits; empty for a foreign CA that has none.
    pub hosts: Vec<String>,
}

impl Authority {
    /// Loads the CA from the folder `dir`, or makes one for `hosts` there.
    ///
    /// Blocks: it reads and writes files and waits for other processes that do the same. A folder that cannot be
    /// written is fine if it holds a CA.
    ///
    /// # Errors
    ///
    /// [`TlsError`] if there is no usable CA that covers all `hosts`, and none can be made.
    pub fn open(dir: &Path, hosts: &[String]) -> Result<Self, TlsError> {
        let hosts = Host::parse_all(hosts)?;
        let authority = if let Ok(Some(authority)) = Self::load(dir) {
            authority
        } else {
            // Something is missing, or a renewal was met halfway: both are settled under the lock.
            files::create_dir(dir)?;
            let _lock = lock(dir);
            Self::complete(dir, &hosts)?
        };
        authority.check(&hosts, SystemTime::now())?;
        Ok(authority)
    }

    /// Makes a new CA with a new key for `hosts`, and keeps the old files as `ca.pem.old` and `ca.key.old`.
    ///
    /// Blocks like [`open`](Self::open). Parsers have to get the new certificate, running sidecars a restart.
    ///
    /// # Errors
    ///
    /// [`TlsError`] for a host that is none, and for a folder that cannot be written.
    pub fn renew(dir: &Path, hosts: &[String]) -> Result<Self, TlsError> {
        let hosts = Host::parse_all(hosts)?;
        let paths = Paths::new(dir);
        files::create_dir(dir)?;
        let _lock = lock(dir);
        keep_old(&paths.key, 0o600)?;
        keep_old(&paths.certificate, 0o644)?;
        // In this order a stop at any point leaves a key without a certificate, which `open` completes.
        files::remove(&paths.certificate)?;
        files::replace(&paths.key, new_key()?.as_bytes(), 0o600)?;
        Self::complete(dir, &hosts)
    }

    /// Loads the CA from the folder `dir` as it is, valid or not; `None` if there is no certificate. Never writes.
    ///
    /// # Errors
    ///
    /// [`TlsError`] if a file cannot be read, does not parse, or the two do not belong together.
    pub fn load(dir: &Path) -> Result<Option<Self>, TlsError> {
        let paths = Paths::new(dir);
        // The certificate first: where one is seen, its key was there before.
        let Some(pem) = files::read(&paths.certificate)? else {
            return Ok(None);
        };
        let Some(key) = paths.read_key()? else {
            return Err(TlsError::KeyMissing { key: paths.key });
        };
        Self::assemble(paths, &pem, key).map(Some)
    }

    /// The certificate in PEM form.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// What there is to say about this CA.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            subject: self.facts.subject.clone(),
            fingerprint: fingerprint(&self.certificate),
            not_before: self.facts.not_before,
            not_after: self.facts.not_after,
            hosts: self.facts.scope.hosts(),
        }
    }

    /// Whether it may vouch for all `hosts` at `now`. Reads and writes nothing.
    ///
    /// # Errors
    ///
    /// [`TlsError::Expired`], [`TlsError::NotCovered`] or [`TlsError::BadHost`].
    pub fn vouches_for(&self, hosts: &[String], now: SystemTime) -> Result<(), TlsError> {
        self.check_scope(&Host::parse_all(hosts)?, now)
    }

    /// The certificate in DER form.
    pub(super) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The last moment at which this CA is valid.
    pub(super) fn not_after(&self) -> SystemTime {
        self.facts.not_after
    }

    /// Signs a certificate for `key` as `params` describe it.
    pub(super) fn sign(
        &self,
        params: &CertificateParams,
        key: &KeyPair,
    ) -> Result<Certificate, TlsError> {
        Ok(params.signed_by(key, &self.issuer)?)
    }

    /// Whether the name constraints allow `host`.
    pub(super) fn check_host(&self, host: &Host) -> Result<(), TlsError> {
        if self.facts.scope.allows(host) {
            return Ok(());
        }
        let certificate = self.paths.certificate.clone();
        Err(TlsError::NotCovered { host: host.to_string(), certificate })
    }

    /// Whether there is time left at `now`.
    pub(super) fn check_time(&self, now: SystemTime) -> Result<(), TlsError> {
        let not_after = self.facts.not_after;
        if now <= not_after {
            return Ok(());
        }
        Err(TlsError::Expired { certificate: self.paths.certificate.clone(), not_after })
    }

    fn check(&self, hosts: &[Host], now: SystemTime) -> Result<(), TlsError> {
        self.check_scope(hosts, now)?;
        self.paths.warn_of_open_key();
        let path = self.paths.certificate.display();
        let not_after = self.facts.not_after;
        if now + WARN_BEFORE > not_after {
            let expires = humantime::format_rfc3339_seconds(not_after);
            warn!(%path, %expires, "CA expires soon, renew it with `token-sidecar ca --renew`");
        }
        if now < self.facts.not_before {
            warn!(%path, "CA is not valid yet, check the clock");
        }
        Ok(())
    }

    fn check_scope(&self, hosts: &[Host], now: SystemTime) -> Result<(), TlsError> {
        self.check_time(now)?;
        hosts.iter().try_for_each(|host| self.check_host(host))
    }

    /// Makes what is missing: a key, and a certificate from the key that is on disk then.
    fn complete(dir: &Path, hosts: &[Host]) -> Result<Self, TlsError> {
        if let Some(authority) = Self::load(dir)? {
            return Ok(authority);
        }
        let paths = Paths::new(dir);
        if paths.read_key()?.is_none() {
            files::create(&paths.key, new_key()?.as_bytes(), 0o600)?;
        }
        let missing = || TlsError::KeyMissing { key: paths.key.clone() };
        let key = paths.read_key()?.ok_or_else(missing)?;
        files::create(&paths.certificate, new_certificate(&key, hosts)?.as_bytes(), 0o644)?;
        let authority = Self::load(dir)?.ok_or_else(missing)?;
        let summary = authority.summary();
        let path = paths.certificate.display();
        info!(%path, fingerprint = %summary.fingerprint, hosts = ?summary.hosts, "CA made");
        Ok(authority)
    }

    fn assemble(paths: Paths, pem: &str, key: KeyPair) -> Result<Self, TlsError> {
        let unusable =
            |reason: String| TlsError::Unusable { path: paths.certificate.clone(), reason };
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| unusable(format!("no PEM certificate ({error})")))?;
        let facts = Facts::read(&certificate).map_err(unusable)?;
        if facts.public_key != key.der_bytes() {
            return Err(TlsError::Mismatch { certificate: paths.certificate, key: paths.key });
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| unusable(error.to_string()))?;
        let certificate_pem = super::trust::to_pem([&certificate]);
        Ok(Self { issuer, certificate, certificate_pem, facts, paths })
    }
}

/// Where the two files of a CA are.
#[derive(Debug)]
struct Paths {
    certificate: PathBuf,
    key: PathBuf,
}

impl Paths {
    fn new(dir: &Path) -> Self {
        Self { certificate: dir.join("ca.pem"), key: dir.join("ca.key") }
    }

    fn read_key(&self) -> Result<Option<KeyPair>, TlsError> {
        let Some(pem) = files::read(&self.key)? else {
            return Ok(None);
        };
        // The parser's own words are left out: they could quote the file.
        let key = KeyPair::from_pem(&pem).map_err(|_| TlsError::Unusable {
            path: self.key.clone(),
            reason: "no unencrypted private key in PEM form".to_owned(),
        })?;
        Ok(Some(key))
    }

    fn warn_of_open_key(&self) {
        let mode = fs::metadata(&self.key).map(|metadata| metadata.permissions().mode());
        if mode.is_ok_and(|mode| mode & 0o077 != 0) {
            warn!(path = %self.key.display(), "CA key is open to other users, run chmod 600 on it");
        }
    }
}

/// What matters of a CA certificate.
#[derive(Debug)]
struct Facts {
    subject: String,
    public_key: Vec<u8>,
    not_before: SystemTime,
    not_after: SystemTime,
    scope: Scope,
}

impl Facts {
    /// Reads a certificate, or says why it is none of a CA.
    fn read(der: &[u8]) -> Result<Self, String> {
        let (_, parsed) =
            x509_parser::parse_x509_certificate(der).map_err(|error| error.to_string())?;
        if !may_sign(&parsed).map_err(|error| error.to_string())? {
            return Err("it is not the certificate of a CA".to_owned());
        }
        let constraints = parsed.name_constraints().map_err(|error| error.to_string())?;
        Ok(Self {
            subject: parsed.subject().to_string(),
            public_key: parsed.public_key().subject_public_key.data.to_vec(),
            not_before: system_time(parsed.validity().not_before),
            not_after: system_time(parsed.validity().not_after),
            scope: constraints.map(|found| Scope::from_extension(found.value)).unwrap_or_default(),
        })
    }
}

fn may_sign(certificate: &X509Certificate<'_>) -> Result<bool, X509Error> {
    let is_ca = certificate.basic_constraints()?.is_some_and(|found| found.value.ca);
    let usage = certificate.key_usage()?;
    Ok(is_ca && usage.is_none_or(|found| found.value.key_cert_sign()))
}

fn system_time(time: ASN1Time) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}

fn new_key() -> Result<String, TlsError> {
    Ok(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.serialize_pem())
}

fn new_certificate(key: &KeyPair, hosts: &[Host]) -> Result<String, TlsError> {
    let now = SystemTime::now();
    certificate_for(key, hosts, now - BACKDATE, now + LIFETIME)
}

fn certificate_for(
    key: &KeyPair,
    hosts: &[Host],
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<String, TlsError> {
    let mut params = CertificateParams::default();
    params.not_before = not_before.into();
    params.not_after = not_after.into();
    params.serial_number = Some(random_serial()?);
    params.distinguished_name = subject(key);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.name_constraints = Some(constraints(hosts));
    Ok(params.self_signed(key)?.pem())
}

/// A name that tells one CA from another: two of the same name and different keys confuse some clients.
fn subject(key: &KeyPair) -> DistinguishedName {
    let digest = Sha256::digest(key.der_bytes());
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, format!("token-sidecar CA {}", hex(&digest[..4], "")));
    name
}

/// rcgen would make the serial number from the key, so a certificate re-issued for a key would repeat it.
fn random_serial() -> Result<SerialNumber, TlsError> {
    let mut bytes = [0; 16];
    provider().secure_random.fill(&mut bytes).map_err(|_| rustls::Error::FailedToGetRandomBytes)?;
    bytes[0] = bytes[0] & 0x3f | 0x40; // positive, and always 16 bytes long
    Ok(SerialNumber::from_slice(&bytes))
}

/// Holds off other processes that make or renew the CA in `dir`, until dropped. The folder itself carries the lock:
/// that needs no further file, and works where nothing can be written.
fn lock(dir: &Path) -> Option<File> {
    let locked = File::open(dir).and_then(|folder| folder.lock().map(|()| folder));
    // Not every file system has locks; the links decide then as they do anyway.
    locked.inspect_err(|error| debug!(%error, "CA folder cannot be locked")).ok()
}

/// Copies the file at `path`, if there is one, to the same name with `.old` behind it.
fn keep_old(path: &Path, mode: u32) -> Result<(), TlsError> {
    match fs::read(path) {
        Ok(contents) => {
            let mut old = path.as_os_str().to_owned();
            old.push(".old");
            files::replace(Path::new(&old), &contents, mode)
        }
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(cause) => Err(TlsError::Read { path: path.to_owned(), cause }),
    }
}

fn fingerprint(certificate: &[u8]) -> String {
    hex(&Sha256::digest(certificate), ":").to_uppercase()
}

fn hex(bytes: &[u8], separator: &str) -> String {
    let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    digits.join(separator)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::process::Command;
    use std::sync::Barrier;
    use std::thread;

    use tempfile::TempDir;

    use super::*;

    fn hosts(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    fn folder() -> TempDir {
        tempfile::tempdir().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn entries(dir: &Path) -> Vec<String> {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Lets eight threads run `open` on one new folder at the same moment, and checks that all got the same CA.
    fn check_race(open: fn(&Path) -> Authority) {
        for _ in 0..10 {
            let dir = folder();
            let start = Barrier::new(8);
            let contend = || {
                start.wait();
                open(dir.path()).certificate_pem
            };
            let made = thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(contend)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
            let on_disk = Authority::load(dir.path()).unwrap().unwrap();
            assert!(made.iter().all(|pem| *pem == on_disk.certificate_pem));
            assert_eq!(entries(dir.path()), ["ca.key", "ca.pem"]);
        }
    }

    #[test]
    fn all_who_start_at_once_on_an_empty_folder_get_one_ca() {
        check_race(|dir| Authority::open(dir, &hosts(&["api.test"])).unwrap());
    }

    #[test]
    fn the_links_decide_where_nothing_can_be_locked() {
        check_race(|dir| Authority::complete(dir, &[Host::Dns("api.test".to_owned())]).unwrap());
    }

    #[test]
    fn a_new_ca_is_private_and_says_what_it_is_for() {
        let dir = folder();
        let nested = dir.path().join("a/b");
        let summary = Authority::open(&nested, &hosts(&["api.test", "127.0.0.1", "[::1]"]))
            .unwrap()
            .summary();
        assert_eq!(mode(&nested.join("ca.key")), 0o600);
        assert_eq!(mode(&nested.join("ca.pem")), 0o644);
        assert_eq!(summary.hosts, ["api.test", "127.0.0.1", "::1"]);
        assert!(summary.subject.starts_with("CN=token-sidecar CA "), "{}", summary.subject);
        let left = summary.not_after.duration_since(SystemTime::now()).unwrap();
        assert!(left > Duration::from_hours(43200), "{left:?}");
    }

    #[test]
    fn the_extensions_are_critical_where_they_must_be() {
        let dir = folder();
        Authority::open(dir.path(), &hosts(&["api.test"])).unwrap();
        let print = ["x509", "-in", "ca.pem", "-noout", "-text"];
        let output = Command::new("openssl").args(print).current_dir(dir.path()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for expected in [
            "NIST CURVE: P-256",
            "Basic Constraints: critical CA:TRUE, pathlen:0",
            "Key Usage: critical Certificate Sign, CRL Sign",
            "Name Constraints: critical Permitted: DNS:api.test Excluded: IP:0.0.0.0/0.0.0.0",
            "Subject Key Identifier",
        ] {
            assert!(text.contains(expected), "`{expected}` is not in: {text}");
        }
    }

    #[test]
    fn a_key_without_certificate_gets_one() {
        let dir = folder();
        let api = hosts(&["api.test"]);
        let first = Authority::open(dir.path(), &api).unwrap();
        let key = fs::read(dir.path().join("ca.key")).unwrap();
        fs::remove_file(dir.path().join("ca.pem")).unwrap();
        assert!(Authority::load(dir.path()).unwrap().is_none());
        let second = Authority::open(dir.path(), &api).unwrap();
        assert_eq!(fs::read(dir.path().join("ca.key")).unwrap(), key);
        assert_eq!(second.summary().subject, first.summary().subject);
        let serial = |authority: &Authority| {
            let (_, parsed) = x509_parser::parse_x509_certificate(&authority.certificate).unwrap();
            parsed.raw_serial().to_vec()
        };
        assert_ne!(serial(&first), serial(&second));
    }

    #[test]
    fn a_complete_folder_is_only_read() {
        let dir = folder();
        let api = hosts(&["api.test"]);
        let made = Authority::open(dir.path(), &api).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o555)).unwrap();
        // The mode does not stop root, the time of change tells on it.
        let before = fs::metadata(dir.path()).unwrap().modified().unwrap();
        let opened = Authority::open(dir.path(), &api).unwrap();
        assert_eq!(opened.certificate_pem, made.certificate_pem);
        assert_eq!(fs::metadata(dir.path()).unwrap().modified().unwrap(), before);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn renewal_makes_a_new_pair_and_keeps_the_old_one() {
        let dir = folder();
        let path = |name: &str| dir.path().join(name);
        let old = Authority::open(dir.path(), &hosts(&["old.test"])).unwrap();
        let old_key = fs::read(path("ca.key")).unwrap();
        fs::set_permissions(path("ca.key"), fs::Permissions::from_mode(0o644)).unwrap();
        let new = Authority::renew(dir.path(), &hosts(&["new.test"])).unwrap();
        assert_ne!(new.summary().subject, old.summary().subject);
        assert_eq!(new.summary().hosts, ["new.test"]);
        assert_eq!(fs::read(path("ca.key.old")).unwrap(), old_key);
        assert_eq!(fs::read_to_string(path("ca.pem.old")).unwrap(), old.certificate_pem);
        assert_eq!((mode(&path("ca.key")), mode(&path("ca.key.old"))), (0o600, 0o600));
        Authority::open(dir.path(), &hosts(&["new.test"])).unwrap();
    }

    #[test]
    fn a_renewal_does_not_disturb_those_who_open() {
        let dir = folder();
        let api = hosts(&["api.test"]);
        Authority::open(dir.path(), &api).unwrap();
        thread::scope(|scope| {
            let renewing = scope.spawn(|| {
                for _ in 0..20 {
                    Authority::renew(dir.path(), &api).unwrap();
                }
            });
            while !renewing.is_finished() {
                Authority::open(dir.path(), &api).unwrap();
            }
        });
    }

    #[test]
    fn renewal_mends_an_unusable_folder() {
        let dir = folder();
        fs::write(dir.path().join("ca.pem"), "nonsense").unwrap();
        fs::write(dir.path().join("ca.key"), [0xff, 0xfe]).unwrap();
        let api = hosts(&["api.test"]);
        assert!(Authority::open(dir.path(), &api).is_err());
        Authority::renew(dir.path(), &api).unwrap();
        Authority::open(dir.path(), &api).unwrap();
    }

    /// Makes a CA for `api.test`, spoils its folder, and checks that all of `words` are in the error of opening it.
    fn check_error(spoil: fn(&Path), wanted: &str, words: &[&str]) {
        let dir = folder();
        Authority::open(dir.path(), &hosts(&["api.test"])).unwrap();
        spoil(dir.path());
        let error = Authority::open(dir.path(), &hosts(&[wanted])).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "`{word}` is not in: {error}");
        }
    }

    #[test]
    fn errors_name_the_file_and_the_remedy() {
        let remedy = "token-sidecar ca --renew";
        check_error(|_| (), "other.test", &["ca.pem", "`other.test`", remedy]);
        check_error(|_| (), "api.test.evil", &["`api.test.evil`"]);
        check_error(|_| (), "127.0.0.1", &["`127.0.0.1`"]);
        check_error(|_| (), "two words", &["`two words`", "API_ORIGINS"]);
        check_error(
            |dir| fs::write(dir.join("ca.pem"), "x").unwrap(),
            "api.test",
            &["ca.pem", remedy],
        );
        check_error(
            |dir| fs::write(dir.join("ca.key"), "x").unwrap(),
            "api.test",
            &["ca.key", remedy],
        );
        check_error(
            |dir| fs::remove_file(dir.join("ca.key")).unwrap(),
            "api.test",
            &["ca.key", "missing", remedy],
        );
        let swap = |dir: &Path| fs::write(dir.join("ca.key"), new_key().unwrap()).unwrap();
        check_error(swap, "api.test", &["ca.pem", "ca.key", "belong", remedy]);
        check_error(expire, "api.test", &["ca.pem", "expired on 20", remedy]);
    }

    fn expire(dir: &Path) {
        let key = Paths::new(dir).read_key().unwrap().unwrap();
        let now = SystemTime::now();
        let hour = Duration::from_hours(1);
        let api = [Host::Dns("api.test".to_owned())];
        let certificate = certificate_for(&key, &api, now - 2 * hour, now - hour).unwrap();
        fs::write(dir.join("ca.pem"), certificate).unwrap();
    }
}
