//! Certificates, and a mesh of sidecars that are played by the test.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kiro_demo::{Options, ProxyAddress, Service, StartError, TlsMaterial, TlsSource, serve};
use kiro_telemetry::trace::Tracing;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rcgen::{ExtendedKeyUsagePurpose as Usage, KeyUsagePurpose};
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, HandshakeKind, RootCertStore, ServerConfig, SupportedProtocolVersion};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Far above what any of these tests takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A CA of its own.
pub(crate) struct Pki {
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, "TestCA");
        Self { ca: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    /// A leaf for a DNS name, good for both ends.
    pub(crate) fn leaf(&self, dns: &str) -> TlsMaterial {
        self.leaf_with(dns, |_| {})
    }

    /// The same with something about it changed.
    pub(crate) fn leaf_with(&self, dns: &str, change: impl FnOnce(&mut CertificateParams)) -> TlsMaterial {
        let mut params = CertificateParams::new(vec![dns.to_owned()]).unwrap();
        params.extended_key_usages = vec![Usage::ServerAuth, Usage::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.ca).unwrap();
        TlsMaterial {
            ca_pem: self.ca.pem().into_bytes(),
            leaf_pem: leaf.pem().into_bytes(),
            key_pem: key.serialize_pem().into_bytes(),
        }
    }

    /// The application's leaf of a service.
    pub(crate) fn app(&self, service: Service) -> TlsMaterial {
        self.leaf(service.app_dns_name())
    }
}

fn roots(material: &TlsMaterial) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&material.ca_pem).unwrap()).unwrap();
    Arc::new(roots)
}

fn chain(material: &TlsMaterial) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let leaf = CertificateDer::from_pem_slice(&material.leaf_pem).unwrap();
    (vec![leaf], PrivateKeyDer::from_pem_slice(&material.key_pem).unwrap())
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// What a sidecar would dial its application with. rustls's own defaults otherwise: it would resume a session if it could.
pub(crate) fn client_config(
    ca: &TlsMaterial,
    own: Option<&TlsMaterial>,
    version: &'static SupportedProtocolVersion,
) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots(ca));
    let config = match own {
        Some(own) => {
            let (chain, key) = chain(own);
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    Arc::new(config)
}

/// What a sidecar's port 15001 shows: `own`, to any client of its CA.
fn server_config(own: &TlsMaterial) -> Arc<ServerConfig> {
    let (chain, key) = chain(own);
    let clients = WebPkiClientVerifier::builder_with_provider(roots(own), provider()).build().unwrap();
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)
        .unwrap();
    Arc::new(config)
}

/// Whether a certificate is of this CA and for this DNS name.
fn is_for(ca: &TlsMaterial, leaf: &CertificateDer<'_>, dns: &'static str) -> bool {
    rustls::client::WebPkiServerVerifier::builder_with_provider(roots(ca), provider())
        .build()
        .unwrap()
        .verify_server_cert(leaf, &[], &ServerName::try_from(dns).unwrap(), &[], UnixTime::now())
        .is_ok()
}

/// A request as it came to a sidecar's outbound port.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) caller: Service,
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
}

/// What the played sidecar does with it.
pub(crate) enum Action {
    /// Carry it to the service that it is for.
    Forward,
    /// The same, once the test says so.
    ForwardAfter(Arc<Notify>),
    /// Answer in the service's place; with a code it is the mesh that answers.
    Answer(u16, Option<&'static str>, String),
    /// Never answer.
    Hang,
    /// Close the connection.
    Close,
}

/// Which leaf a sidecar's outbound port shows.
pub(crate) type OutboundLeaf = Box<dyn Fn(&Pki, Service) -> TlsMaterial>;

type Rule = Arc<dyn Fn(&Seen) -> Action + Send + Sync>;

/// How a mesh is to be.
pub(crate) struct Plan {
    pub(crate) mutual: bool,
    pub(crate) call_timeout: Duration,
    pub(crate) tracing: Tracing,
    pub(crate) rule: Rule,
    /// The leaf that a sidecar's outbound port shows, where it is not its own.
    pub(crate) outbound_leaf: Option<OutboundLeaf>,
}

impl Plan {
    /// Everything is carried, over plain connections or over mutual TLS.
    pub(crate) fn new(mutual: bool) -> Self {
        Self {
            mutual,
            call_timeout: PATIENCE,
            tracing: Tracing::off(),
            rule: Arc::new(|_| Action::Forward),
            outbound_leaf: None,
        }
    }

    pub(crate) fn rule(mut self, rule: impl Fn(&Seen) -> Action + Send + Sync + 'static) -> Self {
        self.rule = Arc::new(rule);
        self
    }
}

/// Three services with their played sidecars.
pub(crate) struct Mesh {
    shared: Arc<Shared>,
    /// Per service: whether it is to end.
    shutdown: watch::Sender<[bool; 3]>,
    pub(crate) running: Vec<JoinHandle<Result<(), StartError>>>,
}

struct Shared {
    apps: [SocketAddr; 3],
    /// The sidecars' leaves, where the loopback legs are mutual TLS.
    sidecars: Option<[TlsMaterial; 3]>,
    rule: Rule,
    seen: Mutex<Vec<Seen>>,
    connections: AtomicUsize,
    resumed: AtomicUsize,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    /// Status and `said_by`.
    pub(crate) fn word(&self) -> (u16, String) {
        (self.status, self.json()["said_by"].as_str().unwrap_or_default().to_owned())
    }
}

pub(crate) fn index(service: Service) -> usize {
    Service::ALL.iter().position(|other| *other == service).unwrap()
}

pub(crate) async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

pub(crate) fn options(listener: TcpListener, tls: Option<TlsSource>, proxy: SocketAddr) -> Options {
    let proxy = ProxyAddress { tls: tls.is_some(), host: proxy.ip().to_string(), port: proxy.port() };
    Options {
        listener,
        tls,
        proxy,
        jaeger_ui: "http://localhost:16686".parse().unwrap(),
        tracing: Tracing::off(),
        call_timeout: PATIENCE,
        replica: None,
    }
}

impl Mesh {
    pub(crate) async fn start(plan: Plan) -> Self {
        let pki = Pki::new();
        let listeners = [listener().await, listener().await, listener().await];
        let shared = Arc::new(Shared {
            apps: listeners.each_ref().map(|(_, address)| *address),
            sidecars: plan.mutual.then(|| Service::ALL.map(|service| pki.leaf(service.name()))),
            rule: plan.rule,
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
            resumed: AtomicUsize::new(0),
        });
        let (shutdown, closing) = watch::channel([false; 3]);
        let mut running = Vec::new();
        for (service, (app, _)) in Service::ALL.into_iter().zip(listeners) {
            let (outbound, proxy) = listener().await;
            let shown = match &plan.outbound_leaf {
                Some(other) => Some(other(&pki, service)),
                None => shared.sidecars.as_ref().map(|leaves| leaves[index(service)].clone()),
            };
            tokio::spawn(Arc::clone(&shared).outbound(service, outbound, shown.filter(|_| plan.mutual)));
            let tls = plan.mutual.then(|| TlsSource::Memory(pki.app(service)));
            let mut options = options(app, tls, proxy);
            options.tracing = plan.tracing.clone();
            options.call_timeout = plan.call_timeout;
            let mut closing = closing.clone();
            running.push(tokio::spawn(serve(service, options, async move {
                let _ = closing.wait_for(|closing| closing[index(service)]).await;
            })));
        }
        Self { shared, shutdown, running }
    }

    pub(crate) async fn get(&self, service: Service, path: &str) -> Answer {
        let request = Request::get(path).body(Full::default()).unwrap();
        self.ask(service, request).await
    }

    /// Asks a service as its sidecar would.
    pub(crate) async fn ask(&self, service: Service, request: Request<Full<Bytes>>) -> Answer {
        let response =
            tokio::time::timeout(PATIENCE, self.shared.inbound(service, request)).await.unwrap().unwrap();
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answer { status: head.status.as_u16(), headers: head.headers, body }
    }

    pub(crate) fn app(&self, service: Service) -> SocketAddr {
        self.shared.apps[index(service)]
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// Connections that services have made to their sidecars.
    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Those of them that resumed a session of TLS.
    pub(crate) fn resumed(&self) -> usize {
        self.shared.resumed.load(Ordering::Relaxed)
    }

    pub(crate) fn shut_down(&self) {
        self.shutdown.send_replace([true; 3]);
    }

    pub(crate) fn shut_down_one(&self, service: Service) {
        self.shutdown.send_modify(|closing| closing[index(service)] = true);
    }
}

/// An HTTP/1 request over a stream.
pub(crate) async fn send<S>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    sender.send_request(request).await
}

impl Shared {
    /// A sidecar's way to its application.
    async fn inbound(
        &self,
        service: Service,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, hyper::Error> {
        request.headers_mut().insert("host", service.name().parse().unwrap());
        let tcp = TcpStream::connect(self.apps[index(service)]).await.unwrap();
        match &self.sidecars {
            None => send(tcp, request).await,
            Some(leaves) => {
                let leaf = &leaves[index(service)];
                let config = client_config(leaf, Some(leaf), &rustls::version::TLS13);
                let name = ServerName::try_from(service.app_dns_name()).unwrap();
                send(TlsConnector::from(config).connect(name, tcp).await.unwrap(), request).await
            }
        }
    }

    /// A sidecar's port 15001.
    async fn outbound(self: Arc<Self>, caller: Service, listener: TcpListener, leaf: Option<TlsMaterial>) {
        // One for all connections: it would resume sessions.
        let tls = leaf.map(|leaf| (TlsAcceptor::from(server_config(&leaf)), leaf));
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            self.connections.fetch_add(1, Ordering::Relaxed);
            let shared = Arc::clone(&self);
            let tls = tls.clone();
            tokio::spawn(async move {
                let Some((acceptor, leaf)) = tls else { return shared.requests(caller, tcp).await };
                // A test of refusals has the service end this handshake.
                let Ok(stream) = acceptor.accept(tcp).await else { return };
                let connection = stream.get_ref().1;
                let shown = &connection.peer_certificates().unwrap()[0];
                assert!(is_for(&leaf, shown, caller.app_dns_name()), "another leaf than {caller}'s");
                if connection.handshake_kind() != Some(HandshakeKind::Full) {
                    shared.resumed.fetch_add(1, Ordering::Relaxed);
                }
                shared.requests(caller, stream).await;
            });
        }
    }

    async fn requests<S: AsyncRead + AsyncWrite + Unpin>(self: Arc<Self>, caller: Service, stream: S) {
        let handler = service_fn(|request: Request<Incoming>| {
            let shared = Arc::clone(&self);
            async move { shared.carry(caller, request).await }
        });
        let _ =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), handler).await;
    }

    async fn carry(
        &self,
        caller: Service,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, String> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let seen = Seen {
            caller,
            method: parts.method.clone(),
            uri: parts.uri.clone(),
            headers: parts.headers.clone(),
        };
        let action = (self.rule)(&seen);
        self.seen.lock().unwrap().push(seen);
        match action {
            Action::Forward => {}
            Action::ForwardAfter(permit) => permit.notified().await,
            Action::Answer(status, reject, body) => return Ok(answer(status, reject, body)),
            Action::Hang => std::future::pending().await,
            Action::Close => return Err("closed by the test".to_owned()),
        }
        let Some(callee) = Service::ALL.into_iter().find(|callee| parts.uri.host() == Some(callee.name()))
        else {
            return Ok(answer(404, Some("unknown_service"), String::new()));
        };
        let mut request = Request::from_parts(parts, Full::new(body));
        *request.uri_mut() = request.uri().path_and_query().unwrap().as_str().parse().unwrap();
        let response = self.inbound(callee, request).await.map_err(|error| error.to_string())?;
        let (head, body) = response.into_parts();
        Ok(Response::from_parts(head, Full::new(body.collect().await.unwrap().to_bytes())))
    }
}

fn answer(status: u16, reject: Option<&'static str>, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    if let Some(code) = reject {
        response.headers_mut().insert("x-kiro-reject", code.parse().unwrap());
    }
    response
}
