//! Peers that are none of ours: any leaf at either end of a connection, any signature on a request.

use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, Method, Request, Uri};
use kiro_core::identity::{ServiceName, SpiffeId, TrustDomain};
use kiro_core::signature::{ConnectionKey, Head, Nonce, Signer};
use kiro_pki::{Authority, LeafSpec};
use kiro_tls::EdgeSecrets;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, HandshakeKind, RootCertStore, ServerConfig, SupportedProtocolVersion};
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::support::{PATIENCE, World};

/// The trust domain of every [`World`].
const DOMAIN: &str = "test.mesh";

/// A name of a service.
pub(crate) fn name(service: &str) -> ServiceName {
    ServiceName::parse(service).unwrap()
}

/// A sidecar's identity in the world's trust domain.
pub(crate) fn sidecar(service: &str) -> SpiffeId {
    SpiffeId::sidecar(&TrustDomain::parse(DOMAIN).unwrap(), &name(service))
}

/// What a good leaf of an identity says.
pub(crate) fn spec(id: &SpiffeId) -> LeafSpec {
    LeafSpec::identity(id, OffsetDateTime::now_utc())
}

/// Another authority for the same trust domain.
pub(crate) fn other_authority() -> Authority {
    Authority::generate(&TrustDomain::parse(DOMAIN).unwrap(), OffsetDateTime::now_utc()).unwrap()
}

/// A certificate and its key.
pub(crate) struct Leaf {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Leaf {
    fn parse(leaf_pem: &[u8], key_pem: &[u8]) -> Self {
        let chain = CertificateDer::pem_slice_iter(leaf_pem).map(Result::unwrap).collect();
        Self { chain, key: PrivateKeyDer::from_pem_slice(key_pem).unwrap() }
    }

    /// A sidecar's own.
    pub(crate) fn of(world: &World, service: &str) -> Self {
        let files = &world.mesh.pki.sidecars[&name(service)];
        Self::parse(&files.leaf_pem, &files.key_pem)
    }

    /// An application's own.
    pub(crate) fn of_app(world: &World, service: &str) -> Self {
        let files = &world.mesh.pki.apps[&name(service)];
        Self::parse(&files.leaf_pem, &files.key_pem)
    }

    /// Any leaf of any authority.
    pub(crate) fn minted(authority: &Authority, spec: &LeafSpec) -> Self {
        let issued = authority.issue(spec).unwrap();
        Self::parse(&issued.leaf_pem, &issued.key_pem)
    }
}

fn roots(world: &World) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(world.mesh.pki.authority.ca_pem()).unwrap()).unwrap();
    roots
}

/// One version of TLS, and what is to be spoken in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Speaks {
    versions: &'static [&'static SupportedProtocolVersion],
    alpn: &'static [&'static str],
}

/// What sidecars speak.
pub(crate) const MESH: Speaks = Speaks { versions: &[&TLS13], alpn: &["h2"] };
/// What was spoken before.
pub(crate) const OLD_TLS: Speaks = Speaks { versions: &[&TLS12], alpn: &["h2"] };
/// The other HTTP.
pub(crate) const HTTP1: Speaks = Speaks { versions: &[&TLS13], alpn: &["http/1.1"] };
/// TLS without a word on what is inside.
pub(crate) const NO_ALPN: Speaks = Speaks { versions: &[&TLS13], alpn: &[] };

fn wire(alpn: &[&str]) -> Vec<Vec<u8>> {
    alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect()
}

/// A client of rustls's defaults, which would resume a session.
pub(crate) fn client(world: &World, shows: Option<&Leaf>, speaks: Speaks) -> ClientConfig {
    let builder =
        ClientConfig::builder_with_protocol_versions(speaks.versions).with_root_certificates(roots(world));
    let mut config = match shows {
        None => builder.with_no_client_auth(),
        Some(leaf) => builder.with_client_auth_cert(leaf.chain.clone(), leaf.key.clone_key()).unwrap(),
    };
    config.alpn_protocols = wire(speaks.alpn);
    config
}

/// A server of rustls's defaults, which would send tickets. It takes any caller with a leaf of the world's authority.
pub(crate) fn server(world: &World, shows: &Leaf, speaks: Speaks) -> ServerConfig {
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots(world))).build().unwrap();
    let mut config = ServerConfig::builder_with_protocol_versions(speaks.versions)
        .with_client_cert_verifier(verifier)
        .with_single_cert(shows.chain.clone(), shows.key.clone_key())
        .unwrap();
    config.alpn_protocols = wire(speaks.alpn);
    config
}

/// A client's handshake with whoever is at the other end, who must prove to be `server`. In TLS 1.3 it may succeed although
/// the server is about to refuse.
pub(crate) async fn handshake(
    stream: TcpStream,
    server: &str,
    config: &Arc<ClientConfig>,
) -> io::Result<TlsStream<TcpStream>> {
    let server = ServerName::try_from(server.to_owned()).unwrap();
    TlsConnector::from(Arc::clone(config)).connect(server, stream).await
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// The edge secrets that a sidecar of the world holds.
pub(crate) fn secrets(world: &World, service: &str) -> EdgeSecrets {
    let files = &world.mesh.pki.sidecars[&name(service)];
    kiro_tls::edges::parse(&files.edges_json, &name(service)).unwrap()
}

/// A connection to a sidecar's inbound port.
pub(crate) struct Peer {
    send: h2::client::SendRequest<Bytes>,
    /// Binds signatures to this connection.
    pub(crate) exporter: [u8; 32],
    /// Whether the handshake was a full one.
    pub(crate) handshake: Option<HandshakeKind>,
    driver: JoinHandle<()>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Peer {
    /// Connects with the leaf of a sidecar of the world.
    pub(crate) async fn of(world: &World, service: &str, callee: &str) -> Self {
        let config = Arc::new(client(world, Some(&Leaf::of(world, service)), MESH));
        Self::with(world, callee, &config).await.unwrap()
    }

    /// Connects with any configuration.
    pub(crate) async fn with(world: &World, callee: &str, config: &Arc<ClientConfig>) -> io::Result<Self> {
        Self::on(TcpStream::connect(world.addresses(callee).inbound).await?, callee, config).await
    }

    /// Makes a TCP connection one to a sidecar.
    pub(crate) async fn on(stream: TcpStream, callee: &str, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let stream = handshake(stream, callee, config).await?;
        let exporter = kiro_tls::exporter(stream.get_ref().1).unwrap();
        let kind = stream.get_ref().1.handshake_kind();
        let (send, connection) = h2::client::handshake(stream).await.map_err(io::Error::other)?;
        let driver = tokio::spawn(async move {
            // Requests learn of the end from their streams.
            let _ = connection.await;
        });
        Ok(Self { send, exporter, handshake: kind, driver })
    }

    /// What signs on this connection, with the secret of the edge from `secrets`' owner to a callee.
    pub(crate) fn signer(&self, secrets: &EdgeSecrets, callee: &str) -> Signer {
        let (keyid, secret) = secrets.signing(callee).unwrap();
        Signer::new(ConnectionKey::derive(secret, &self.exporter, keyid), keyid.clone())
    }

    /// Sends a request and waits for its answer's end.
    pub(crate) async fn send(&self, request: Request<()>, body: Body) -> Result<Reply, h2::Error> {
        tokio::time::timeout(PATIENCE, self.exchange(request, body)).await.expect("an answer in time")
    }

    async fn exchange(&self, request: Request<()>, body: Body) -> Result<Reply, h2::Error> {
        let mut send = self.send.clone().ready().await?;
        let (answer, mut stream) = send.send_request(request, matches!(body, Body::None))?;
        // A callee that answers early may refuse the rest.
        let sent = match body {
            Body::None => Ok(()),
            Body::Data(pieces) => send_pieces(&mut stream, pieces, true).await,
            Body::Trailed(pieces, trailers) => match send_pieces(&mut stream, pieces, false).await {
                Ok(()) => stream.send_trailers(trailers),
                Err(error) => Err(error),
            },
        };
        drop(sent);
        let (head, mut recv) = answer.await?.into_parts();
        let mut body = BytesMut::new();
        while let Some(piece) = recv.data().await {
            body.extend_from_slice(&piece?);
        }
        let reject = head.headers.get("x-kiro-reject").map(|code| code.to_str().unwrap().to_owned());
        Ok(Reply { status: head.status.as_u16(), reject, headers: head.headers, body: body.freeze() })
    }
}

/// Sends each piece as a frame of its own.
async fn send_pieces(
    stream: &mut h2::SendStream<Bytes>,
    pieces: Vec<Bytes>,
    ends: bool,
) -> Result<(), h2::Error> {
    let count = pieces.len();
    for (place, piece) in pieces.into_iter().enumerate() {
        stream.reserve_capacity(piece.len());
        while stream.capacity() < piece.len() {
            match std::future::poll_fn(|cx| stream.poll_capacity(cx)).await {
                Some(granted) => drop(granted?),
                None => return Ok(()),
            }
        }
        stream.send_data(piece, ends && place + 1 == count)?;
    }
    Ok(())
}

/// A body that a test sends.
pub(crate) enum Body {
    /// None: the head ends the stream.
    None,
    /// Frames; the last ends the stream.
    Data(Vec<Bytes>),
    /// Frames, then trailers.
    Trailed(Vec<Bytes>, HeaderMap),
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) reject: Option<String>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Reply {
    /// Status and reject code.
    pub(crate) fn verdict(&self) -> (u16, Option<&str>) {
        (self.status, self.reject.as_deref())
    }
}

/// A request between sidecars that a test may change before and after it is signed.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    pub(crate) method: Method,
    pub(crate) authority: String,
    /// With its query.
    pub(crate) target: String,
    pub(crate) headers: HeaderMap,
}

impl Draft {
    /// A request to a service.
    pub(crate) fn new(method: Method, authority: &str, target: &str) -> Self {
        Self { method, authority: authority.to_owned(), target: target.to_owned(), headers: HeaderMap::new() }
    }

    /// A GET of a service.
    pub(crate) fn get(authority: &str) -> Self {
        Self::new(Method::GET, authority, "/a?q=1")
    }

    /// Adds a field, or replaces it.
    pub(crate) fn set(&mut self, name: &'static str, value: &str) {
        self.headers.insert(HeaderName::from_static(name), value.parse().unwrap());
    }

    /// Takes a field out.
    pub(crate) fn unset(&mut self, name: &str) {
        self.headers.remove(name).unwrap();
    }

    /// Signs what is there now.
    pub(crate) fn sign(&mut self, signer: &mut Signer) -> Nonce {
        self.sign_at(signer, now())
    }

    /// Signs by another clock.
    pub(crate) fn sign_at(&mut self, signer: &mut Signer, now: u64) -> Nonce {
        let (path, query) = match self.target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (self.target.as_str(), None),
        };
        let head = Head { method: self.method.as_str(), authority: &self.authority, path, query };
        signer.sign(&head, &mut self.headers, now).unwrap()
    }

    /// The request.
    pub(crate) fn request(&self) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = format!("https://{}{}", self.authority, self.target).parse::<Uri>().unwrap();
        *request.version_mut() = http::Version::HTTP_2;
        *request.headers_mut() = self.headers.clone();
        request
    }
}
