//! What the tests share: a CA that issues leaves good and bad, ends of connections that are not ours, and the log's lines.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Once};

use kiro_core::identity::{ServiceName, SpiffeId, TrustDomain};
use kiro_tls::{HandshakeContext, Identity, Material};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
};
use time::{Duration, OffsetDateTime};
use tracing::field::{Field, Visit};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

pub const DOMAIN: &str = "kiro.mesh";

pub fn name(service: &str) -> ServiceName {
    ServiceName::parse(service).unwrap()
}

pub fn sidecar(service: &str) -> SpiffeId {
    SpiffeId::sidecar(&TrustDomain::parse(DOMAIN).unwrap(), &name(service))
}

pub fn app(service: &str) -> SpiffeId {
    SpiffeId::app(&TrustDomain::parse(DOMAIN).unwrap(), &name(service))
}

/// A leaf to be issued.
#[derive(Clone)]
pub struct Leaf {
    pub dns: Vec<String>,
    pub uri: Vec<String>,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
    pub uses: Vec<ExtendedKeyUsagePurpose>,
}

impl Leaf {
    pub fn of(id: &SpiffeId) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            dns: vec![id.dns_name()],
            uri: vec![id.to_string()],
            not_before: now - Duration::minutes(2),
            not_after: now + Duration::days(90),
            uses: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        }
    }

    pub fn dns(mut self, dns: &[&str]) -> Self {
        self.dns = dns.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    pub fn uri(mut self, uri: &[&str]) -> Self {
        self.uri = uri.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    pub fn from(mut self, not_before: OffsetDateTime) -> Self {
        self.not_before = not_before;
        self
    }

    pub fn until(mut self, not_after: OffsetDateTime) -> Self {
        self.not_after = not_after;
        self
    }

    pub fn uses(mut self, uses: &[ExtendedKeyUsagePurpose]) -> Self {
        self.uses = uses.to_vec();
        self
    }
}

pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

impl Ca {
    /// All CAs of the tests have the same name: it is the key that counts.
    pub fn new() -> Self {
        Self::until(OffsetDateTime::now_utc() + Duration::days(3650))
    }

    pub fn until(not_after: OffsetDateTime) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "KiroCA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = OffsetDateTime::now_utc() - Duration::days(1);
        params.not_after = not_after;
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    pub fn issue(&self, leaf: &Leaf) -> Material {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "leaf");
        for dns in &leaf.dns {
            params.subject_alt_names.push(SanType::DnsName(dns.as_str().try_into().unwrap()));
        }
        for uri in &leaf.uri {
            params.subject_alt_names.push(SanType::URI(uri.as_str().try_into().unwrap()));
        }
        params.not_before = leaf.not_before;
        params.not_after = leaf.not_after;
        params.extended_key_usages = leaf.uses.clone();
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        Material {
            ca_pem: self.pem.clone().into_bytes(),
            leaf_pem: leaf.pem().into_bytes(),
            key_pem: key.serialize_pem().into_bytes().into(),
        }
    }

    pub fn identity(&self, id: &SpiffeId) -> Arc<Identity> {
        Arc::new(Identity::from_material(&self.issue(&Leaf::of(id)), id).unwrap())
    }
}

pub fn chain(material: &Material) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let chain = CertificateDer::pem_slice_iter(&material.leaf_pem).map(Result::unwrap).collect();
    (chain, PrivateKeyDer::from_pem_slice(&material.key_pem).unwrap())
}

/// A certificate that is shown by somebody who holds another key.
pub fn without_its_key(material: &Material) -> Arc<SingleCertAndKey> {
    let key = PrivateKeyDer::Pkcs8(KeyPair::generate().unwrap().serialize_der().into());
    let key = aws_lc_rs::sign::any_supported_type(&key).unwrap();
    Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain(material).0, key)))
}

/// An end that is not ours, and takes whatever is shown to it.
#[derive(Debug)]
pub struct TakesAll(Arc<CryptoProvider>);

impl TakesAll {
    fn new() -> Arc<Self> {
        Arc::new(Self(Arc::new(aws_lc_rs::default_provider())))
    }
}

impl ServerCertVerifier for TakesAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for TakesAll {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

type Versions<'a> = &'a [&'static SupportedProtocolVersion];

pub const TLS13: Versions<'static> = &[&rustls::version::TLS13];
pub const TLS12: Versions<'static> = &[&rustls::version::TLS12];

/// A client that is not ours, with rustls's defaults: it would resume.
pub fn foreign_client(shows: Option<&Material>, versions: Versions<'_>, alpn: &[&str]) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(TakesAll::new());
    let mut config = match shows {
        None => builder.with_no_client_auth(),
        Some(material) => {
            let (chain, key) = chain(material);
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    config
}

/// A server that is not ours, with rustls's defaults: it would send tickets.
pub fn foreign_server(shows: &Material, versions: Versions<'_>, alpn: &[&str]) -> ServerConfig {
    let (chain, key) = chain(shows);
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_client_cert_verifier(TakesAll::new())
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    config
}

pub fn context(service: &str, direction: &'static str) -> HandshakeContext {
    subscribe();
    HandshakeContext {
        service: name(service),
        local: None,
        remote: Some(([127, 0, 0, 1], 40000).into()),
        direction,
    }
}

/// An event's fields as text, with `level`, `target` and `message`.
pub type Line = BTreeMap<&'static str, String>;

thread_local! {
    /// What was logged on this thread since its [`Log`] was started. One subscriber for the process, which tells threads
    /// apart: tracing remembers which events nobody wants, and tests that come and go with their own subscribers race for that.
    static LINES: RefCell<Option<Vec<Line>>> = const { RefCell::new(None) };
}

static SUBSCRIBER: Once = Once::new();

fn subscribe() {
    SUBSCRIBER.call_once(|| {
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Collect)).unwrap();
    });
}

/// The log of the thread that made it, until it is dropped.
pub struct Log(());

impl Log {
    pub fn start() -> Self {
        subscribe();
        LINES.set(Some(Vec::new()));
        Self(())
    }

    /// The lines of one target so far, each given once.
    pub fn take(&self, target: &str) -> Vec<Line> {
        let lines = LINES.take().expect("the log was started on this thread");
        let (taken, left) = lines.into_iter().partition(|line| line["target"] == target);
        LINES.set(Some(left));
        taken
    }

    pub fn certificates(&self) -> Vec<Line> {
        self.take("kiro::certificate")
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        LINES.set(None);
    }
}

struct Collect;

impl<S: tracing::Subscriber> Layer<S> for Collect {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        if !metadata.target().starts_with("kiro") {
            return;
        }
        let mut fields = Fields(Line::new());
        fields.0.insert("level", metadata.level().to_string());
        fields.0.insert("target", metadata.target().to_owned());
        event.record(&mut fields);
        LINES.with_borrow_mut(|lines| lines.iter_mut().for_each(|lines| lines.push(fields.0.clone())));
    }
}

struct Fields(Line);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}
