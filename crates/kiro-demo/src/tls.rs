//! How does a service prove itself to its own sidecar, and to whom else does it speak? To nobody.
//!
//! Sidecar and application share a loopback interface, and so does whatever else runs in the pod. Both ends therefore show
//! a leaf of the mesh's CA: the sidecar's is for the DNS name `<service>`, the application's for `app.<service>`. Only
//! rustls is needed for that.
//!
//! **Invariant.** No session is resumed and no ticket issued, at either end: a resumed session asks no verifier.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};

use crate::Service;

/// File names in a certificate directory.
pub(crate) const FILES: [&str; 3] = ["ca.pem", "leaf.pem", "leaf.key"];

/// Longest certificate or key file: far above any chain, so that a wrong mount is not read whole.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// The one protocol on the loopback legs.
const ALPN: &[u8] = b"http/1.1";

/// CA, leaf (with its chain) and key of one application, as PEM.
#[derive(Clone)]
pub struct TlsMaterial {
    /// The CA that signs every leaf of the mesh.
    pub ca_pem: Vec<u8>,
    /// The application's leaf, for `app.<service>`.
    pub leaf_pem: Vec<u8>,
    /// The leaf's private key.
    pub key_pem: Vec<u8>,
}

impl fmt::Debug for TlsMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsMaterial").finish_non_exhaustive()
    }
}

/// Where certificate and key come from.
#[derive(Clone, Debug)]
pub enum TlsSource {
    /// A directory with `ca.pem`, `leaf.pem` and `leaf.key`. It is polled: renewed files are taken up while running.
    Directory(PathBuf),
    /// Fixed material.
    Memory(TlsMaterial),
}

/// Why a service can't use its certificates.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing, unreadable or too large.
    #[error("{}: {cause}; the directory must hold ca.pem, leaf.pem and leaf.key, readable by this user", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: String,
    },
    /// The private key may be read by everybody.
    #[error("{}: everybody may read this private key (mode {mode:04o}); take it away with: chmod o-rwx {}", path.display(), path.display())]
    KeyMode {
        /// The key file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A file does not hold what its name says.
    #[error("{file}: {cause}")]
    Content {
        /// `ca.pem`, `leaf.pem` or `leaf.key`.
        file: &'static str,
        /// What is wrong with it.
        cause: String,
    },
    /// The leaf is not valid for this service now.
    #[error(
        "leaf.pem: not usable as the leaf of {expected}: {cause}; make new certificates with `make certs`"
    )]
    Leaf {
        /// The DNS name that the leaf must carry.
        expected: String,
        /// What is wrong with it.
        cause: String,
    },
}

impl TlsMaterial {
    /// Reads the three files of `directory`. A key that everybody may read is refused.
    pub fn read(directory: &Path) -> Result<Self, TlsError> {
        let [ca, leaf, key] = FILES.map(|name| directory.join(name));
        refuse_open_key(&key)?;
        Ok(Self { ca_pem: read(&ca)?, leaf_pem: read(&leaf)?, key_pem: read(&key)? })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let file_error = |cause: String| TlsError::File { path: path.to_owned(), cause };
    let size = std::fs::metadata(path).map_err(|error| file_error(error.to_string()))?.len();
    if size > FILE_BYTES_MAX {
        return Err(file_error(format!("{size} bytes are more than a certificate file has")));
    }
    std::fs::read(path).map_err(|error| file_error(error.to_string()))
}

fn refuse_open_key(path: &Path) -> Result<(), TlsError> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = std::fs::metadata(path)
        .map_err(|error| TlsError::File { path: path.to_owned(), cause: error.to_string() })?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o007 != 0 { Err(TlsError::KeyMode { path: path.to_owned(), mode }) } else { Ok(()) }
}

/// One generation of a service's certificates, ready for both of its legs.
pub(crate) struct Tls {
    /// For the listener: takes the service's own sidecar alone.
    pub(crate) server: Arc<ServerConfig>,
    /// For calls to the outbound proxy.
    pub(crate) client: Arc<ClientConfig>,
    /// The name that the sidecar's leaf must carry.
    pub(crate) sidecar: ServerName<'static>,
}

impl Tls {
    /// Checks the material and makes both configurations: key fits leaf, and the leaf is valid now, signed by the CA and
    /// for `app.<service>`. What a peer would refuse is said here first.
    pub(crate) fn new(service: Service, material: &TlsMaterial) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let roots = Arc::new(roots(&material.ca_pem)?);
        let chain = certificates("leaf.pem", &material.leaf_pem)?;
        let key = PrivateKeyDer::from_pem_slice(&material.key_pem)
            .map_err(|error| content("leaf.key", &error.to_string()))?;
        let sidecar = dns_name(service.name());

        let servers = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| content("ca.pem", &error.to_string()))?;
        refuse_unfit_leaf(service, &chain, servers.as_ref())?;
        let clients = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| content("ca.pem", &error.to_string()))?;
        let clients = Arc::new(OwnSidecar { chain: clients, name: sidecar.clone() });

        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| content("leaf.key", &error.to_string()))?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(|error| content("leaf.key", &error.to_string()))?;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.alpn_protocols = vec![ALPN.to_vec()];

        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| content("leaf.key", &error.to_string()))?
            .with_webpki_verifier(servers)
            .with_client_auth_cert(chain, key)
            .map_err(|error| content("leaf.key", &error.to_string()))?;
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![ALPN.to_vec()];

        Ok(Self { server: Arc::new(server), client: Arc::new(client), sidecar })
    }
}

fn content(file: &'static str, cause: &str) -> TlsError {
    TlsError::Content { file, cause: cause.to_owned() }
}

fn certificates(file: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let chain = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| content(file, &error.to_string()))?;
    if chain.is_empty() { Err(content(file, "holds no certificate")) } else { Ok(chain) }
}

fn roots(pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("ca.pem", pem)? {
        roots.add(certificate).map_err(|error| content("ca.pem", &error.to_string()))?;
    }
    Ok(roots)
}

/// Asks of our own leaf what a client of ours would ask.
fn refuse_unfit_leaf(
    service: Service,
    chain: &[CertificateDer<'static>],
    verifier: &WebPkiServerVerifier,
) -> Result<(), TlsError> {
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(content("leaf.pem", "holds no certificate"));
    };
    let expected = service.app_dns_name();
    verifier
        .verify_server_cert(leaf, intermediates, &dns_name(expected), &[], UnixTime::now())
        .map(|_| ())
        .map_err(|error| TlsError::Leaf { expected: expected.to_owned(), cause: error.to_string() })
}

/// The names of [`Service`] are all DNS names; `the_services_names_are_dns_names` holds them to it.
fn dns_name(name: &'static str) -> ServerName<'static> {
    #[expect(clippy::expect_used, reason = "closed set of names, each covered by a test")]
    ServerName::try_from(name).expect("a service's name is a DNS name")
}

/// Takes a client whose leaf chains to the CA *and* is for the DNS name of the service's own sidecar. The chain alone
/// would let in every service of the mesh.
#[derive(Debug)]
struct OwnSidecar {
    chain: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl ClientCertVerifier for OwnSidecar {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, &self.name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_services_names_are_dns_names() {
        for service in Service::ALL {
            assert_eq!(dns_name(service.name()).to_str(), service.name());
            assert_eq!(dns_name(service.app_dns_name()).to_str(), format!("app.{}", service.name()));
        }
    }
}
