//! How is TLS set up on each of a pod's ports?
//!
//! One type for each kind of handshake, so that one can't be used in place of another. What they share is in [`ServerCore`] and
//! [`ClientCore`]: a rustls configuration is made for each handshake, since its verifier keeps what it saw (see
//! [`crate::verify`]); keys and roots are parsed once, when the identity is loaded.

use std::fmt;
use std::sync::{Arc, LazyLock};

use kiro_core::identity::{Role, SpiffeId};
use kiro_core::quota::LineQuota;
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::server::{NoClientAuth, NoServerSessionStorage};
use rustls::sign::SingleCertAndKey;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};
use rustls_pki_types::{InvalidDnsNameError, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{client, server};

use crate::error::HandshakeError;
use crate::handshake::{self, Established, HandshakeContext};
use crate::identity::Identity;
use crate::sidecar::IngressMaterial;
use crate::verify::{Expected, Leg, PeerVerifier, Rules, Side};

/// Inside a pod and between sidecars both ends are our own or the application's choice: there is nothing old to serve.
static MESH_VERSIONS: [&SupportedProtocolVersion; 1] = [&TLS13];
/// Outside clients may be older.
static INGRESS_VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

const H2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";
/// What clients offer that speak 1.0 and nothing else, like `curl --http1.0`.
const HTTP1_0: &[u8] = b"http/1.0";

/// In our order: the hybrid with a post-quantum half first, so that what is recorded today stays closed later; then what peers
/// without it speak. Sidecars always agree on the first.
const GROUPS: [&dyn SupportedKxGroup; 4] =
    [kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1];

/// AES-128-GCM first: ten rounds a block instead of fourteen, and as hard to break as the P-256 keys that vouch for the
/// connection (128 bits, NIST SP 800-57). A server takes the client's first, so it is what sidecars agree on.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = aws_lc_rs::default_provider();
    // A stable sort: the others keep the library's order.
    provider.cipher_suites.sort_by_key(|suite| *suite != TLS13_AES_128_GCM_SHA256);
    provider.kx_groups = GROUPS.to_vec();
    Arc::new(provider)
});

/// The cryptography that all of Kiro's TLS uses.
pub(crate) fn provider() -> &'static Arc<CryptoProvider> {
    &PROVIDER
}

/// Why TLS can't be set up with what was loaded.
#[derive(Debug, thiserror::Error)]
pub enum TlsConfigError {
    /// rustls does not take the parts.
    #[error("TLS can't be set up: {0}")]
    Rustls(#[from] rustls::Error),
    /// The name to dial is no DNS name.
    #[error("`{name}` is no DNS name that TLS could ask for: {cause}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        cause: InvalidDnsNameError,
    },
}

/// What the server's end of each kind of handshake is made of.
#[derive(Clone)]
pub(crate) struct ServerCore {
    certificate: Arc<SingleCertAndKey>,
    /// Absent at the ingress, which asks its callers for no certificate.
    rules: Option<Arc<Rules>>,
    versions: &'static [&'static SupportedProtocolVersion],
    alpn: &'static [&'static [u8]],
    pub(crate) leg: Leg,
    /// Bounds the lines of handshakes that fail, which anybody can cause.
    pub(crate) failures: Option<Arc<LineQuota>>,
}

impl ServerCore {
    fn mutual(identity: &Identity, expected: Expected, leg: Leg, alpn: &'static [&'static [u8]]) -> Self {
        let rules = Rules { roots: identity.roots(), expected, side: Side::Server, leg };
        Self {
            certificate: identity.certificate(),
            rules: Some(Arc::new(rules)),
            versions: &MESH_VERSIONS,
            alpn,
            leg,
            failures: None,
        }
    }

    /// Makes a configuration, so that what is wrong is found before the first connection.
    fn tried(self) -> Result<Self, TlsConfigError> {
        self.config()?;
        Ok(self)
    }

    pub(crate) fn config(&self) -> Result<(ServerConfig, Option<Arc<PeerVerifier>>), rustls::Error> {
        let builder = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
            .with_protocol_versions(self.versions)?;
        let verifier = self.rules.as_ref().map(|rules| Arc::new(PeerVerifier::new(rules, &PROVIDER)));
        let builder = match &verifier {
            Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier) as Arc<_>),
            None => builder.with_client_cert_verifier(Arc::new(NoClientAuth)),
        };
        let mut config = builder.with_cert_resolver(Arc::clone(&self.certificate) as Arc<_>);
        config.alpn_protocols = self.alpn.iter().map(|protocol| protocol.to_vec()).collect();
        // A resumed session asks no verifier: none is kept, and no ticket is sent.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok((config, verifier))
    }

    pub(crate) fn expected(&self) -> Option<String> {
        self.rules.as_ref().map(|rules| rules.expected.to_string())
    }

    /// Whether HTTP/2 must have been agreed on; elsewhere a peer without ALPN speaks HTTP/1.1.
    pub(crate) fn requires_h2(&self) -> bool {
        self.leg == Leg::Mesh
    }
}

impl fmt::Debug for ServerCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCore")
            .field("leg", &self.leg)
            .field("expected", &self.expected())
            .finish_non_exhaustive()
    }
}

/// What the client's end of each kind of handshake is made of.
#[derive(Clone)]
pub(crate) struct ClientCore {
    certificate: Arc<SingleCertAndKey>,
    rules: Arc<Rules>,
    server_name: ServerName<'static>,
    alpn: &'static [&'static [u8]],
    /// Its handshakes leave no line in the log.
    pub(crate) silent: bool,
}

impl ClientCore {
    fn new(
        identity: &Identity,
        dialled: &SpiffeId,
        leg: Leg,
        alpn: &'static [&'static [u8]],
    ) -> Result<Self, TlsConfigError> {
        let name = dialled.dns_name();
        let server_name =
            ServerName::try_from(name.clone()).map_err(|cause| TlsConfigError::Name { name, cause })?;
        let expected = Expected::Exactly(dialled.clone());
        let rules = Rules { roots: identity.roots(), expected, side: Side::Client, leg };
        Ok(Self {
            certificate: identity.certificate(),
            rules: Arc::new(rules),
            server_name,
            alpn,
            silent: false,
        })
    }

    pub(crate) fn config(&self) -> Result<(ClientConfig, Arc<PeerVerifier>), rustls::Error> {
        let verifier = Arc::new(PeerVerifier::new(&self.rules, &PROVIDER));
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
            .with_protocol_versions(&MESH_VERSIONS)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<_>)
            .with_client_cert_resolver(Arc::clone(&self.certificate) as Arc<_>);
        config.alpn_protocols = self.alpn.iter().map(|protocol| protocol.to_vec()).collect();
        // A resumed session asks no verifier.
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        Ok((config, verifier))
    }

    pub(crate) fn expected(&self) -> String {
        self.rules.expected.to_string()
    }

    pub(crate) fn leg(&self) -> Leg {
        self.rules.leg
    }

    pub(crate) fn server_name(&self) -> ServerName<'static> {
        self.server_name.clone()
    }

    pub(crate) fn requires_h2(&self) -> bool {
        self.alpn == [H2]
    }
}

impl fmt::Debug for ClientCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCore")
            .field("leg", &self.rules.leg)
            .field("expected", &self.expected())
            .finish_non_exhaustive()
    }
}

/// The inbound port: TLS 1.3, HTTP/2 alone, any sidecar of the trust domain.
#[derive(Clone, Debug)]
pub struct MeshServer(ServerCore);

/// Sets up the inbound port (15006).
///
/// # Errors
/// Where rustls does not take the identity.
pub fn mesh_server(identity: &Arc<Identity>) -> Result<MeshServer, TlsConfigError> {
    let expected = Expected::AnySidecar(identity.spiffe().clone());
    Ok(MeshServer(ServerCore::mutual(identity, expected, Leg::Mesh, &[H2]).tried()?))
}

/// The outbound port, for the application: TLS 1.3, the application of our own pod or the sidecar itself.
#[derive(Clone, Debug)]
pub struct LoopbackServer(ServerCore);

/// Sets up the outbound port (15001).
///
/// # Errors
/// Where rustls does not take the identity.
pub fn loopback_server(identity: &Arc<Identity>) -> Result<LoopbackServer, TlsConfigError> {
    let expected = Expected::OwnPod(identity.spiffe().clone());
    Ok(LoopbackServer(ServerCore::mutual(identity, expected, Leg::Outbound, &[H2, HTTP1, HTTP1_0]).tried()?))
}

/// The ingress's TLS port: TLS 1.2 or 1.3, no client certificate.
#[derive(Clone, Debug)]
pub struct IngressServer(ServerCore);

/// Sets up the ingress's TLS port.
///
/// # Errors
/// Where rustls does not take the certificate.
pub fn ingress_server(material: &IngressMaterial) -> Result<IngressServer, TlsConfigError> {
    let core = ServerCore {
        certificate: material.certificate(),
        rules: None,
        versions: &INGRESS_VERSIONS,
        alpn: &[H2, HTTP1, HTTP1_0],
        leg: Leg::Ingress,
        failures: None,
    };
    Ok(IngressServer(core.tried()?))
}

/// A call to another sidecar's inbound port.
#[derive(Clone, Debug)]
pub struct MeshClient(ClientCore);

/// Sets up calls to the sidecar that was dialled: its exact SPIFFE ID, and its DNS name.
///
/// # Errors
/// Where the dialled identity has no DNS name.
pub fn mesh_client(identity: &Arc<Identity>, dialled: &SpiffeId) -> Result<MeshClient, TlsConfigError> {
    Ok(MeshClient(ClientCore::new(identity, dialled, Leg::Mesh, &[H2])?))
}

/// A call within the pod, over loopback.
#[derive(Clone, Debug)]
pub struct LoopbackClient(ClientCore);

impl LoopbackClient {
    /// The same, whose handshakes leave no line: of those that only find out whether an application is well there is one every few
    /// seconds, and they would drown those of connections that carry requests. Whoever asks tells what came of it.
    #[must_use]
    pub fn without_lines(mut self) -> Self {
        self.0.silent = true;
        self
    }
}

/// Sets up calls from a sidecar to its application, which speaks HTTP/1.1.
///
/// # Errors
/// Where the application's identity has no DNS name.
pub fn loopback_client(identity: &Arc<Identity>) -> Result<LoopbackClient, TlsConfigError> {
    app_client(identity, &[HTTP1])
}

/// Sets up calls from a sidecar to an application that speaks HTTP/2.
///
/// # Errors
/// Where the application's identity has no DNS name.
pub fn loopback_client_h2(identity: &Arc<Identity>) -> Result<LoopbackClient, TlsConfigError> {
    app_client(identity, &[H2])
}

fn app_client(
    identity: &Arc<Identity>,
    alpn: &'static [&'static [u8]],
) -> Result<LoopbackClient, TlsConfigError> {
    let app = SpiffeId { role: Role::App, ..identity.spiffe().clone() };
    Ok(LoopbackClient(ClientCore::new(identity, &app, Leg::App, alpn)?))
}

/// Sets up calls to the sidecar's own outbound port, with the identity of its application or its own.
///
/// # Errors
/// Where the sidecar's identity has no DNS name.
pub fn outbound_client(identity: &Arc<Identity>) -> Result<LoopbackClient, TlsConfigError> {
    let sidecar = SpiffeId { role: Role::Sidecar, ..identity.spiffe().clone() };
    Ok(LoopbackClient(ClientCore::new(identity, &sidecar, Leg::Outbound, &[HTTP1])?))
}

macro_rules! accepts {
    ($($server:ty),*) => {$(
        impl $server {
            /// Bounds the log lines of handshakes that fail, which anybody can cause.
            #[must_use]
            pub fn with_failures_bounded(mut self, lines: &Arc<LineQuota>) -> Self {
                self.0.failures = Some(Arc::clone(lines));
                self
            }

            /// Runs a caller's handshake. May be dropped at any await; put a time limit round it.
            ///
            /// # Errors
            /// Where the handshake fails; the line in the log is written already.
            pub async fn accept<IO>(
                &self,
                io: IO,
                context: &HandshakeContext,
            ) -> Result<Established<server::TlsStream<IO>>, HandshakeError>
            where
                IO: AsyncRead + AsyncWrite + Unpin,
            {
                handshake::accept(&self.0, io, context).await
            }
        }
    )*};
}

macro_rules! connects {
    ($($client:ty),*) => {$(
        impl $client {
            /// Runs a handshake. May be dropped at any await; put a time limit round it.
            ///
            /// # Errors
            /// Where the handshake fails; the line in the log is written already.
            pub async fn connect<IO>(
                &self,
                io: IO,
                context: &HandshakeContext,
            ) -> Result<Established<client::TlsStream<IO>>, HandshakeError>
            where
                IO: AsyncRead + AsyncWrite + Unpin,
            {
                handshake::connect(&self.0, io, context).await
            }
        }
    )*};
}

accepts!(MeshServer, LoopbackServer, IngressServer);
connects!(MeshClient, LoopbackClient);

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};
    use rustls::client::ResolvesClientCert;
    use rustls::crypto::aws_lc_rs::sign::any_supported_type;
    use rustls::sign::CertifiedKey;
    use rustls_pki_types::PrivateKeyDer;

    use super::*;

    fn core(leg: Leg) -> ServerCore {
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
        let key = any_supported_type(&PrivateKeyDer::Pkcs8(key.serialize_der().into())).unwrap();
        let certificate = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![leaf.into()], key)));
        ServerCore { certificate, rules: None, versions: &INGRESS_VERSIONS, alpn: &[H2], leg, failures: None }
    }

    /// The handshakes of the tests outside see that nothing is resumed; each of several settings is enough for that alone.
    #[test]
    fn no_setting_leaves_room_for_resumption() {
        let (config, _) = core(Leg::Ingress).config().unwrap();
        assert_eq!((config.send_tls13_tickets, config.max_early_data_size), (0, 0));
        assert!(!config.session_storage.can_cache());
        assert!(!config.ticketer.enabled());
    }

    #[tokio::test]
    async fn a_mesh_handshake_that_asked_no_verifier_is_refused() {
        let core = core(Leg::Mesh);
        let mut roots = rustls::RootCertStore::empty();
        let shown = core.certificate.resolve(&[], &[]).unwrap();
        roots.add(shown.cert.first().unwrap().clone()).unwrap();
        let mut client = ClientConfig::builder_with_provider(Arc::clone(provider()))
            .with_protocol_versions(&MESH_VERSIONS)
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = vec![H2.to_vec()];
        let context = HandshakeContext {
            service: kiro_core::identity::ServiceName::parse("profile").unwrap(),
            local: None,
            remote: None,
            direction: "inbound",
        };
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
        let call =
            async { connector.connect(ServerName::try_from("localhost").unwrap(), theirs).await.map(drop) };
        let (accepted, called) = tokio::join!(handshake::accept(&core, ours, &context), call);
        called.unwrap();
        assert_eq!(accepted.unwrap_err().code(), "tls_no_certificate");
    }

    #[test]
    fn a_client_keeps_no_session() {
        let server = core(Leg::Mesh);
        let td = kiro_core::identity::TrustDomain::parse("kiro.mesh").unwrap();
        let id = SpiffeId::sidecar(&td, &kiro_core::identity::ServiceName::parse("profile").unwrap());
        let rules = Rules {
            roots: Arc::new([]),
            expected: Expected::Exactly(id),
            side: Side::Client,
            leg: Leg::Mesh,
        };
        let server_name = ServerName::try_from("profile").unwrap();
        let client = ClientCore {
            certificate: server.certificate,
            rules: Arc::new(rules),
            server_name,
            alpn: &[H2],
            silent: false,
        };
        let (config, _) = client.config().unwrap();
        // rustls gives no other way to ask.
        let shown = format!("{:?}", config.resumption);
        assert!(shown.contains("NoClientSessionStorage"), "{shown}");
        assert!(!config.enable_early_data);
    }

    #[test]
    fn the_cheaper_cipher_is_preferred_and_none_is_missing() {
        let suites: Vec<_> = provider().cipher_suites.iter().map(|suite| suite.suite()).collect();
        assert_eq!(suites.first(), Some(&rustls::CipherSuite::TLS13_AES_128_GCM_SHA256));
        assert_eq!(suites.len(), aws_lc_rs::default_provider().cipher_suites.len());
    }

    #[test]
    fn the_post_quantum_hybrid_is_preferred() {
        use rustls::NamedGroup;
        let names: Vec<_> = provider().kx_groups.iter().map(|group| group.name()).collect();
        assert_eq!(names.first(), Some(&NamedGroup::X25519MLKEM768));
        assert!(names.contains(&NamedGroup::X25519), "applications without it");
    }
}
