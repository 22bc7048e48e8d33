//! Leaf certificates: what a parser sees in place of the API's own.
//!
//! # Invariants
//!
//! - A leaf is valid for at most a day and never longer than the CA; its key is its own and stays in memory.
//! - A connection never waits for a new leaf while the present one is valid, except the one that makes it.
//! - Sessions survive the renewal of a leaf, since all leaves share one ticketer, but no ticket outlives the leaf that
//!   the client saw: it would be let in by a certificate that has expired.
//! - Only the hosts that are given at the start have leaves, so no client can make their number grow.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ProducesTickets;
use tokio::sync::Mutex;
use tracing::{debug, error};

use super::authority::Authority;
use super::scope::Host;
use super::{ALPN, TlsError, provider};

/// How long a leaf is valid from the moment it is made. With the backdating it stays below a day.
const LIFETIME: Duration = Duration::from_hours(23);
/// How far its validity reaches into the past, for clients whose clock is behind.
const BACKDATE: Duration = Duration::from_mins(5);

/// The leaves of all API hosts.
pub struct Leaves {
    press: Arc<Press>,
    slots: HashMap<String, Slot>,
}

impl Leaves {
    /// Makes a leaf for each of `hosts`: names in lower case without a trailing dot, or IP literals.
    ///
    /// Blocks for some milliseconds.
    ///
    /// # Errors
    ///
    /// [`TlsError::NotCovered`] for a host that `authority` may not vouch for, [`TlsError::BadHost`] for none at all.
    pub fn new(authority: Arc<Authority>, hosts: &[String]) -> Result<Self, TlsError> {
        Self::new_at(authority, hosts, SystemTime::now())
    }

    /// The TLS settings for connections to `host`; `None` if it is no API host.
    ///
    /// Waits only for a new leaf: in the one call that makes it, or in all if the present one is not valid.
    pub async fn server_config(&self, host: &str) -> Option<Arc<ServerConfig>> {
        self.server_config_at(host, SystemTime::now()).await
    }

    fn new_at(
        authority: Arc<Authority>,
        hosts: &[String],
        now: SystemTime,
    ) -> Result<Self, TlsError> {
        let press = Arc::new(Press::new(authority)?);
        let slot = |text: &String| {
            let host = Host::parse(text)?;
            press.authority.check_host(&host)?;
            let leaf = ArcSwap::from_pointee(press.make(&host, now)?);
            Ok((text.clone(), Slot { host, leaf, renewal: Mutex::new(()) }))
        };
        let slots = hosts.iter().map(slot).collect::<Result<_, TlsError>>()?;
        Ok(Self { press, slots })
    }

    async fn server_config_at(&self, host: &str, now: SystemTime) -> Option<Arc<ServerConfig>> {
        let slot = self.slots.get(host)?;
        let leaf = slot.leaf.load_full();
        let leaf = if leaf.is_due(now) { self.renew(slot, leaf, now).await } else { leaf };
        Some(Arc::clone(&leaf.config))
    }

    /// A newer leaf than `present`, or `present` while another call is making one.
    async fn renew(&self, slot: &Slot, present: Arc<Leaf>, now: SystemTime) -> Arc<Leaf> {
        let _turn = if present.is_valid(now) {
            let Ok(turn) = slot.renewal.try_lock() else {
                return present;
            };
            turn
        } else {
            slot.renewal.lock().await
        };
        let present = slot.leaf.load_full();
        if !present.is_due(now) {
            return present; // the call before us has done it
        }
        let press = Arc::clone(&self.press);
        let host = slot.host.clone();
        match tokio::task::spawn_blocking(move || press.make(&host, now)).await {
            Ok(Ok(leaf)) => slot.publish(leaf),
            Ok(Err(error)) => {
                error!(host = %slot.host, %error, "leaf certificate not renewed");
                present
            }
            Err(error) => {
                error!(host = %slot.host, %error, "making a leaf certificate was cut short");
                present
            }
        }
    }
}

/// The leaf of one host.
struct Slot {
    host: Host,
    leaf: ArcSwap<Leaf>,
    /// Held by the call that makes a new leaf.
    renewal: Mutex<()>,
}

impl Slot {
    fn publish(&self, leaf: Leaf) -> Arc<Leaf> {
        let leaf = Arc::new(leaf);
        self.leaf.store(Arc::clone(&leaf));
        debug!(host = %self.host, "leaf certificate renewed");
        leaf
    }
}

/// A leaf in the settings that serve it.
struct Leaf {
    config: Arc<ServerConfig>,
    not_before: SystemTime,
    /// From when on it should be replaced.
    renew_from: SystemTime,
    not_after: SystemTime,
}

impl Leaf {
    fn is_valid(&self, now: SystemTime) -> bool {
        (self.not_before..=self.not_after).contains(&now)
    }

    /// Before its time counts too: then the clock was set back, and clients may refuse it.
    fn is_due(&self, now: SystemTime) -> bool {
        now < self.not_before || now >= self.renew_from
    }
}

/// Makes leaves, all of one kind.
struct Press {
    authority: Arc<Authority>,
    provider: Arc<CryptoProvider>,
    ticketer: Arc<dyn ProducesTickets>,
}

impl Press {
    fn new(authority: Arc<Authority>) -> Result<Self, TlsError> {
        let ticketer = aws_lc_rs::Ticketer::new()?;
        Ok(Self { authority, provider: provider(), ticketer })
    }

    fn make(&self, host: &Host, now: SystemTime) -> Result<Leaf, TlsError> {
        self.authority.check_time(now)?;
        let not_before = now - BACKDATE;
        let not_after = (now + LIFETIME).min(self.authority.not_after());
        // A leaf that ends with the CA cannot be bettered, so it is used to its end.
        let spare = match not_after {
            end if end == self.authority.not_after() => Duration::ZERO,
            _ => (LIFETIME + BACKDATE) / 4,
        };
        let (certificate, key) = self.sign(host, not_before, not_after)?;
        let config = Arc::new(self.server_config(certificate, key, not_after)?);
        Ok(Leaf { config, not_before, renew_from: not_after - spare, not_after })
    }

    fn sign(
        &self,
        host: &Host,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), TlsError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        params.distinguished_name = subject();
        params.subject_alt_names = vec![match host {
            Host::Dns(name) => SanType::DnsName(name.as_str().try_into()?),
            Host::Ip(address) => SanType::IpAddress(*address),
        }];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = self.authority.sign(&params, &key)?;
        Ok((certificate.into(), key.into()))
    }

    fn server_config(
        &self,
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
        not_after: SystemTime,
    ) -> Result<ServerConfig, TlsError> {
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // OpenSSL would have AES-256 of TLS 1.3 at any price.
        config.ignore_client_order = true;
        // Clients of TLS 1.2 that take no tickets are remembered, the last 256 of each leaf in some hundred bytes each.
        config.ticketer = Arc::new(LeafTickets { ticketer: Arc::clone(&self.ticketer), not_after });
        // The next connection takes one; more would only be more bytes for clients that never come again.
        config.send_tls13_tickets = 1;
        Ok(config)
    }
}

/// The tickets of one leaf. Each holds the leaf's end, so that whichever leaf is served then can tell.
#[derive(Debug)]
struct LeafTickets {
    ticketer: Arc<dyn ProducesTickets>,
    not_after: SystemTime,
}

impl ProducesTickets for LeafTickets {
    fn enabled(&self) -> bool {
        self.ticketer.enabled()
    }

    fn lifetime(&self) -> u32 {
        let left = seconds(self.not_after).saturating_sub(seconds(SystemTime::now()));
        self.ticketer.lifetime().min(left.try_into().unwrap_or(u32::MAX))
    }

    fn encrypt(&self, session: &[u8]) -> Option<Vec<u8>> {
        self.ticketer.encrypt(&[&seconds(self.not_after).to_be_bytes(), session].concat())
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let plain = self.ticketer.decrypt(ticket)?;
        let (not_after, session) = plain.split_first_chunk()?;
        let is_valid = u64::from_be_bytes(*not_after) > seconds(SystemTime::now());
        is_valid.then(|| session.to_vec())
    }
}

/// Since 1970.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The same for all leaves: the host stands in the alternative name, and a common name that looks like a host would be
/// held against the CA's constraints by some clients, or be too long.
fn subject() -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, "token-sidecar leaf");
    name
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::fs;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::path::Path;
    use std::process::Command;
    use std::thread;

    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::{ServerName, UnixTime};
    use rustls::{
        ClientConfig, ClientConnection, HandshakeKind, RootCertStore, ServerConnection,
        SupportedProtocolVersion,
    };
    use tempfile::TempDir;

    use super::super::trust::{TrustBundle, to_pem};
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    fn authority(hosts: &[&str]) -> (TempDir, Arc<Authority>) {
        let dir = tempfile::tempdir().unwrap();
        let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
        let authority = Authority::open(dir.path(), &hosts).unwrap();
        (dir, Arc::new(authority))
    }

    fn roots(authority: &Authority) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate().clone()).unwrap();
        Arc::new(roots)
    }

    fn openssl_accepts(dir: &Path, host: &Host, leaf: &CertificateDer<'static>) -> bool {
        fs::write(dir.join("leaf.pem"), to_pem([leaf])).unwrap();
        let named = if matches!(host, Host::Ip(_)) { "-verify_ip" } else { "-verify_hostname" };
        let output = Command::new("openssl")
            .args(["verify", "-x509_strict", "-purpose", "sslserver", named, &host.to_string()])
            .args(["-CAfile", "ca.pem", "leaf.pem"])
            .current_dir(dir)
            .output()
            .unwrap();
        output.status.success()
    }

    fn rustls_accepts(authority: &Authority, host: &Host, leaf: &CertificateDer<'static>) -> bool {
        let verifier = WebPkiServerVerifier::builder_with_provider(roots(authority), provider())
            .build()
            .unwrap();
        let name = ServerName::try_from(host.to_string()).unwrap();
        verifier.verify_server_cert(leaf, &[], &name, &[], UnixTime::now()).is_ok()
    }

    /// Checks who accepts a leaf for `host`, signed by the CA for `covered` against its own rules if need be.
    fn check_leaf(covered: &[&str], host: &str, accepted: bool) {
        let (dir, authority) = authority(covered);
        let press = Press::new(Arc::clone(&authority)).unwrap();
        let host = Host::parse(host).unwrap();
        let now = SystemTime::now();
        let (leaf, _) = press.sign(&host, now - BACKDATE, now + LIFETIME).unwrap();
        assert_eq!(authority.check_host(&host).is_ok(), accepted, "ours: {covered:?} {host}");
        assert_eq!(
            rustls_accepts(&authority, &host, &leaf),
            accepted,
            "rustls: {covered:?} {host}"
        );
        assert_eq!(
            openssl_accepts(dir.path(), &host, &leaf),
            accepted,
            "openssl: {covered:?} {host}"
        );
    }

    #[test]
    fn leaves_are_good_for_covered_hosts_and_for_no_others() {
        let long = format!("{}.test", "a".repeat(63));
        check_leaf(&["api.test", "127.0.0.1", "::1"], "api.test", true);
        check_leaf(&["api.test", "127.0.0.1", "::1"], "127.0.0.1", true);
        check_leaf(&["api.test", "127.0.0.1", "::1"], "::1", true);
        check_leaf(&[&long], &long, true);
        check_leaf(&["localhost"], "localhost", true);
        check_leaf(&["127.0.0.1"], "127.0.0.1", true);
        check_leaf(&["api.test"], "evil.test", false);
        check_leaf(&["api.test"], "evilapi.test", false);
        check_leaf(&["api.test"], "127.0.0.1", false);
        check_leaf(&["api.test"], "::1", false);
        check_leaf(&["127.0.0.1"], "127.0.0.2", false);
        check_leaf(&["127.0.0.1"], "::1", false);
        check_leaf(&["127.0.0.1"], "api.test", false);
    }

    fn client(
        authority: &Authority,
        version: &'static SupportedProtocolVersion,
    ) -> Arc<ClientConfig> {
        // It would rather have AES-256.
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots(authority))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Arc::new(config)
    }

    /// A whole handshake in memory; returns the client's end.
    fn connect(
        client: &Arc<ClientConfig>,
        server: Arc<ServerConfig>,
        host: &str,
    ) -> ClientConnection {
        let name = ServerName::try_from(host.to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::clone(client), name).unwrap();
        let mut server = ServerConnection::new(server).unwrap();
        while client.wants_write() || server.wants_write() {
            let mut wire = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut wire).unwrap();
            }
            receive(&wire, |from| server.read_tls(from));
            server.process_new_packets().unwrap();
            let mut wire = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut wire).unwrap();
            }
            receive(&wire, |from| client.read_tls(from));
            client.process_new_packets().unwrap();
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        client
    }

    fn receive(mut wire: &[u8], mut read: impl FnMut(&mut dyn Read) -> std::io::Result<usize>) {
        while !wire.is_empty() {
            read(&mut wire).unwrap();
        }
    }

    #[tokio::test]
    async fn both_versions_shake_hands_and_resume_across_a_renewal() {
        let (_dir, authority) = authority(&["api.test", "127.0.0.1"]);
        let hosts = ["api.test".to_owned(), "127.0.0.1".to_owned()];
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let leaves = Leaves::new(Arc::clone(&authority), &hosts).unwrap();
            let client = client(&authority, version);
            for host in &hosts {
                let server = leaves.server_config(host).await.unwrap();
                let first = connect(&client, Arc::clone(&server), host);
                assert_eq!(first.protocol_version(), Some(version.version));
                assert_eq!(first.alpn_protocol(), Some(ALPN));
                let suite = first.negotiated_cipher_suite().unwrap().suite();
                assert!(suite.as_str().unwrap().contains("AES_128_GCM_SHA256"), "{suite:?}");
                assert_eq!(first.handshake_kind(), Some(HandshakeKind::Full));
                let second = connect(&client, Arc::clone(&server), host);
                assert_eq!(second.handshake_kind(), Some(HandshakeKind::Resumed));
                let later = SystemTime::now() + 20 * HOUR;
                let renewed = leaves.server_config_at(host, later).await.unwrap();
                assert!(!Arc::ptr_eq(&server, &renewed));
                let third = connect(&client, renewed, host);
                assert_eq!(third.handshake_kind(), Some(HandshakeKind::Resumed));
            }
        }
    }

    #[test]
    fn tickets_end_with_the_leaf() {
        let ticketer = aws_lc_rs::Ticketer::new().unwrap();
        let now = SystemTime::now();
        let of_leaf = |not_after| LeafTickets { ticketer: Arc::clone(&ticketer), not_after };
        let [present, renewed, expired] = [now + HOUR, now + 23 * HOUR, now - HOUR].map(of_leaf);
        let ticket = present.encrypt(b"session").unwrap();
        assert_eq!(present.decrypt(&ticket).unwrap(), b"session");
        assert_eq!(renewed.decrypt(&ticket).unwrap(), b"session", "the leaf was only renewed");
        assert_eq!(renewed.decrypt(&expired.encrypt(b"session").unwrap()), None);
        assert_eq!(present.decrypt(b"no ticket"), None);
        assert!((3590..=3600).contains(&present.lifetime()), "{}", present.lifetime());
        assert_eq!(renewed.lifetime(), ticketer.lifetime());
        assert_eq!(expired.lifetime(), 0);
    }

    #[tokio::test]
    async fn only_api_hosts_have_leaves() {
        let (_dir, authority) = authority(&["api.test"]);
        let leaves = Leaves::new(Arc::clone(&authority), &["api.test".to_owned()]).unwrap();
        for other in ["www.api.test", "API.test", "api.test.", "", "127.0.0.1"] {
            assert!(leaves.server_config(other).await.is_none(), "{other}");
        }
        assert_eq!(leaves.slots.len(), 1, "asking makes none");
        let uncovered = Leaves::new(authority, &["other.test".to_owned()]).err();
        assert!(
            matches!(uncovered, Some(TlsError::NotCovered { host, .. }) if host == "other.test")
        );
    }

    #[tokio::test]
    async fn a_leaf_is_renewed_once_in_its_last_quarter() {
        let (_dir, authority) = authority(&["api.test"]);
        let start = SystemTime::now();
        let leaves = Leaves::new_at(authority, &["api.test".to_owned()], start).unwrap();
        let leaves = &leaves;
        let at = |now| async move { leaves.server_config_at("api.test", now).await.unwrap() };
        let first = at(start).await;
        assert!(Arc::ptr_eq(&first, &at(start + 17 * HOUR).await));
        // One of two calls makes the new leaf, the other has the old one, which is still valid.
        let late = start + 18 * HOUR;
        let (makes, passes) = tokio::join!(at(late), at(late));
        assert!(!Arc::ptr_eq(&first, &makes) && Arc::ptr_eq(&first, &passes));
        assert!(Arc::ptr_eq(&makes, &at(late).await));
        // Nobody gets an expired leaf: here both wait for the same new one.
        let after = late + 24 * HOUR;
        let (one, other) = tokio::join!(at(after), at(after));
        assert!(Arc::ptr_eq(&one, &other) && !Arc::ptr_eq(&makes, &one));
        // The clock was set back.
        assert!(!Arc::ptr_eq(&one, &at(start).await));
    }

    #[tokio::test]
    async fn no_leaf_outlives_the_ca() {
        let (_dir, authority) = authority(&["api.test"]);
        let end = authority.not_after();
        let leaves = Leaves::new_at(authority, &["api.test".to_owned()], end - HOUR).unwrap();
        let first = leaves.server_config_at("api.test", end - HOUR).await.unwrap();
        assert_eq!(leaves.slots["api.test"].leaf.load().not_after, end);
        let last = leaves.server_config_at("api.test", end - HOUR / 60).await.unwrap();
        assert!(Arc::ptr_eq(&first, &last), "a new leaf could not last longer");
        let expired = leaves.server_config_at("api.test", end + HOUR).await.unwrap();
        assert!(Arc::ptr_eq(&first, &expired));
    }

    const PYTHON_CLIENT: &str = "
import socket, ssl, sys
port, host, roots = int(sys.argv[1]), sys.argv[2], sys.argv[3]
context = ssl.create_default_context(cafile=roots)
context.verify_flags |= ssl.VERIFY_X509_STRICT
with socket.create_connection(('127.0.0.1', port)) as plain:
    with context.wrap_socket(plain, server_hostname=host) as tls:
        tls.sendall(b'ping')
        assert tls.recv(4) == b'pong'
";

    #[tokio::test]
    async fn strict_python_trusts_a_leaf_by_the_bundle() {
        if Command::new("python3").arg("--version").output().is_err() {
            eprintln!("skipped: there is no python3");
            return;
        }
        let (dir, authority) = authority(&["api.test", "127.0.0.1"]);
        TrustBundle::build(&authority, None).unwrap().write(dir.path()).unwrap();
        let hosts = ["api.test".to_owned(), "127.0.0.1".to_owned()];
        let leaves = Leaves::new(authority, &hosts).unwrap();
        for host in &hosts {
            let server = leaves.server_config(host).await.unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port().to_string();
            let python = Command::new("python3")
                .args(["-c", PYTHON_CLIENT, &port, host])
                .arg(dir.path().join("ca-bundle.pem"))
                .spawn()
                .unwrap();
            let serving = thread::spawn(move || answer_ping(&listener, server));
            assert!(python.wait_with_output().unwrap().status.success(), "{host}");
            serving.join().unwrap();
        }
    }

    fn answer_ping(listener: &TcpListener, config: Arc<ServerConfig>) {
        let (socket, _) = listener.accept().unwrap();
        let mut tls = rustls::StreamOwned::new(ServerConnection::new(config).unwrap(), socket);
        let mut ping = [0; 4];
        tls.read_exact(&mut ping).unwrap();
        tls.write_all(b"pong").unwrap();
        tls.flush().unwrap();
    }
}
