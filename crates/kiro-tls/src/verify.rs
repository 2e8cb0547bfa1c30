//! Is this certificate the one that must stand here?
//!
//! One function, [`judge`], for both ends: chain, validity and use first, so that nothing is believed of a certificate that our
//! CA has not signed; then its one SPIFFE ID, trust domain, role and service, and the DNS name that goes with it.
//!
//! rustls calls a verifier without saying for which connection. Each handshake therefore has a [`PeerVerifier`] of its own,
//! which keeps what it saw and decided: the refusal's log line needs the facts, and a handshake that never asked its verifier
//! must not pass.

use std::fmt;
use std::sync::{Arc, OnceLock};

use kiro_core::identity::{Role, SpiffeId};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use time::OffsetDateTime;
use webpki::{EndEntityCert, KeyUsage};

use crate::error::{self, HandshakeErrorKind as Kind};
use crate::facts::{LeafFacts, clean, instant};

/// RFC 5280 4.2.1.12, `id-kp-serverAuth` (1.3.6.1.5.5.7.3.1), as DER has it.
const SERVER_USE: &[u8] = &[43, 6, 1, 5, 5, 7, 3, 1];
/// `id-kp-clientAuth` (1.3.6.1.5.5.7.3.2).
const CLIENT_USE: &[u8] = &[43, 6, 1, 5, 5, 7, 3, 2];

/// Which end of a connection we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

impl Side {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }

    /// The use that the peer's certificate must be for. webpki's own `client_auth` would take a leaf without any use.
    fn peer_use(self) -> KeyUsage {
        match self {
            Self::Client => KeyUsage::required(SERVER_USE),
            Self::Server => KeyUsage::required(CLIENT_USE),
        }
    }
}

/// Which of a pod's connections this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leg {
    /// Between sidecars.
    Mesh,
    /// From the application to its sidecar.
    Outbound,
    /// From the sidecar to its application.
    App,
    /// From outside.
    Ingress,
}

/// Who may be at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Any sidecar of our trust domain; which one may do what is the policy's business.
    AnySidecar(SpiffeId),
    /// This one.
    Exactly(SpiffeId),
    /// The application or the sidecar of our own pod.
    OwnPod(SpiffeId),
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AnySidecar(me) => write!(f, "spiffe://{}/<service>", me.trust_domain),
            Self::Exactly(id) => write!(f, "{id}"),
            Self::OwnPod(me) => write!(
                f,
                "{} or {}",
                SpiffeId::app(&me.trust_domain, &me.service),
                SpiffeId::sidecar(&me.trust_domain, &me.service)
            ),
        }
    }
}

/// A refusal before it is an error: kind, what was found, what to do.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub(crate) kind: Kind,
    pub(crate) cause: String,
    pub(crate) fix: String,
}

/// What a peer's certificate is measured by.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) roots: Arc<[TrustAnchor<'static>]>,
    pub(crate) expected: Expected,
    pub(crate) side: Side,
    pub(crate) leg: Leg,
}

/// What the verifier saw and how it decided.
#[derive(Debug)]
pub(crate) struct Seen {
    /// Absent where the certificate could not be read.
    pub(crate) facts: Option<LeafFacts>,
    pub(crate) verdict: Result<SpiffeId, Refusal>,
}

/// Judges a certificate. Pure: `now` comes from rustls's clock.
pub(crate) fn judge(
    rules: &Rules,
    provider: &CryptoProvider,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> Seen {
    let facts = match LeafFacts::from_der(leaf) {
        Ok(facts) => facts,
        Err(cause) => return Seen { facts: None, verdict: Err(rules.refuse(Kind::Other, cause)) },
    };
    let verdict =
        rules.chain(provider, leaf, intermediates, now, &facts).and_then(|()| rules.identity(&facts));
    Seen { facts: Some(facts), verdict }
}

impl Rules {
    fn refuse(&self, kind: Kind, cause: String) -> Refusal {
        refusal(kind, cause, error::fix(kind, self.side, self.leg))
    }

    /// Signatures up to our CA, validity, use.
    fn chain(
        &self,
        provider: &CryptoProvider,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        facts: &LeafFacts,
    ) -> Result<(), Refusal> {
        let algorithms = provider.signature_verification_algorithms.all;
        EndEntityCert::try_from(leaf)
            .and_then(|leaf| {
                leaf.verify_for_usage(
                    algorithms,
                    &self.roots,
                    intermediates,
                    now,
                    self.side.peer_use(),
                    None,
                    None,
                )
                .map(|_path| ())
            })
            .map_err(|error| self.explain(&error, now, facts))
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "webpki's enum is open, and what is left speaks for itself"
    )]
    fn explain(&self, error: &webpki::Error, now: UnixTime, facts: &LeafFacts) -> Refusal {
        match error {
            webpki::Error::CertExpired { not_after, .. } => self.refuse(
                Kind::Expired,
                format!("the certificate expired at {}, our clock says {}", clock(*not_after), clock(now)),
            ),
            webpki::Error::CertNotValidYet { not_before, .. } => self.refuse(
                Kind::NotYetValid,
                format!(
                    "the certificate is valid from {}, our clock says {}",
                    clock(*not_before),
                    clock(now)
                ),
            ),
            webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => self.refuse(
                Kind::UnknownIssuer,
                format!(
                    "the certificate's issuer ({}) is not our CA, or another one of the same name",
                    facts.issuer
                ),
            ),
            webpki::Error::RequiredEkuNotFoundContext(_) => refusal(
                Kind::WrongIdentity,
                format!("the certificate is not for use as a TLS {}", self.peer_word()),
                "an ingress certificate proves nothing inside the mesh: let the peer show its leaf.pem",
            ),
            other => self.refuse(Kind::Other, format!("the certificate is refused: {other}")),
        }
    }

    fn peer_word(&self) -> &'static str {
        match self.side {
            Side::Client => "server",
            Side::Server => "client",
        }
    }

    /// Whom the certificate is for.
    fn identity(&self, facts: &LeafFacts) -> Result<SpiffeId, Refusal> {
        let [uri] = facts.uris.as_slice() else {
            return Err(self.refuse(
                Kind::WrongIdentity,
                format!(
                    "the certificate has {} URI names, a leaf of the mesh has exactly one",
                    facts.uris.len()
                ),
            ));
        };
        let id = SpiffeId::parse(uri).map_err(|error| {
            self.refuse(
                Kind::WrongIdentity,
                format!("the certificate's URI name is `{}`: {error}", clean(uri)),
            )
        })?;
        self.may_stand_here(&id)?;
        let name = id.dns_name();
        // Compared whole: a wildcard names no one service.
        if !facts.dns.contains(&name) {
            return Err(self.refuse(
                Kind::WrongIdentity,
                format!("the certificate is for {id} and lacks the DNS name `{name}` that goes with it"),
            ));
        }
        Ok(id)
    }

    fn may_stand_here(&self, id: &SpiffeId) -> Result<(), Refusal> {
        let (Expected::AnySidecar(reference) | Expected::Exactly(reference) | Expected::OwnPod(reference)) =
            &self.expected;
        if id.trust_domain != reference.trust_domain {
            return Err(refusal(
                Kind::TrustDomain,
                format!(
                    "the certificate is for trust domain {}, expected {}",
                    id.trust_domain, reference.trust_domain
                ),
                "two meshes never trust each other: let both mesh files say the same trust_domain and run `make certs`, or don't let them meet",
            ));
        }
        let sidecar_wanted = match &self.expected {
            Expected::AnySidecar(_) => true,
            Expected::Exactly(wanted) => wanted.role == Role::Sidecar,
            Expected::OwnPod(_) => false,
        };
        if sidecar_wanted && id.role == Role::App {
            return Err(refusal(
                Kind::AppLeaf,
                format!("the certificate is the application's ({id}), expected a sidecar's"),
                "an application speaks to its own sidecar alone: let it call http://<service>/ through the sidecar's outbound port",
            ));
        }
        let fits = match &self.expected {
            Expected::AnySidecar(_) => true,
            Expected::Exactly(wanted) => id == wanted,
            Expected::OwnPod(me) => id.service == me.service,
        };
        if fits {
            return Ok(());
        }
        let fix = match self.leg {
            Leg::Mesh => {
                "the address belongs to another pod: look at the service's DNS alias, at `endpoints:` in the mesh file, and at which directory that sidecar has mounted"
            }
            Leg::Outbound | Leg::App | Leg::Ingress => {
                "application and sidecar of a pod have directories of one service (certs/<service>-app, certs/<service>): look at what is mounted"
            }
        };
        Err(refusal(
            Kind::WrongIdentity,
            format!("the certificate is for {id}, expected {}", self.expected),
            fix,
        ))
    }
}

fn refusal(kind: Kind, cause: String, fix: &str) -> Refusal {
    Refusal { kind, cause, fix: fix.to_owned() }
}

fn clock(time: UnixTime) -> String {
    i64::try_from(time.as_secs())
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .map_or_else(|| time.as_secs().to_string(), instant)
}

/// The verifier of one handshake.
pub(crate) struct PeerVerifier {
    rules: Arc<Rules>,
    provider: Arc<CryptoProvider>,
    seen: OnceLock<Seen>,
}

impl PeerVerifier {
    pub(crate) fn new(rules: &Arc<Rules>, provider: &Arc<CryptoProvider>) -> Self {
        Self { rules: Arc::clone(rules), provider: Arc::clone(provider), seen: OnceLock::new() }
    }

    /// What has been seen; `None` while no certificate has come.
    pub(crate) fn seen(&self) -> Option<&Seen> {
        self.seen.get()
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let seen = self.seen.get_or_init(|| judge(&self.rules, &self.provider, leaf, intermediates, now));
        match &seen.verdict {
            Ok(_) => Ok(()),
            Err(refusal) => Err(refusal.kind.certificate_error().into()),
        }
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for PeerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerVerifier").field("expected", &self.rules.expected).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        // What the leaf must be for stands in the rules: more than a name.
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
    // No hints: a caller of ours has one certificate and shows it.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}
