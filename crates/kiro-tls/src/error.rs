//! Why did a handshake end, and what mends it?
//!
//! The kind is what other code decides by and what callers see as a code. Cause and fix are for people: the log has them, the
//! peer never does (it gets a TLS alert).

use std::fmt;
use std::io;

use rustls::{AlertDescription, CertificateError, InvalidMessage, PeerIncompatible};

use crate::facts::LeafFacts;
use crate::verify::{Leg, Refusal, Side};

/// What went wrong, as one of a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandshakeErrorKind {
    /// The caller showed no certificate.
    NoCertificate,
    /// The certificate does not come from our CA.
    UnknownIssuer,
    /// The certificate's time is over, by our clock.
    Expired,
    /// The certificate's time has not come, by our clock.
    NotYetValid,
    /// The certificate is for somebody else, for another use, or names no one identity.
    WrongIdentity,
    /// The certificate is for another trust domain.
    TrustDomain,
    /// An application's leaf where only a sidecar's may stand.
    AppLeaf,
    /// No TLS version in common.
    Version,
    /// No application protocol in common.
    Alpn,
    /// The peer sent an alert: it refuses us.
    PeerRefused,
    /// The peer closed the connection.
    Closed,
    /// The peer does not speak TLS.
    PlainHttp,
    /// Anything else; the cause says what.
    Other,
}

impl HandshakeErrorKind {
    /// The code of answers, log lines and metrics.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::NoCertificate => "tls_no_certificate",
            Self::UnknownIssuer => "tls_unknown_issuer",
            Self::Expired => "tls_expired",
            Self::NotYetValid => "tls_not_yet_valid",
            Self::WrongIdentity => "tls_wrong_identity",
            Self::TrustDomain => "tls_trust_domain",
            Self::AppLeaf => "tls_app_leaf",
            Self::Version => "tls_version",
            Self::Alpn => "tls_alpn",
            Self::PeerRefused => "tls_peer_refused",
            Self::Closed => "tls_closed",
            Self::PlainHttp => "tls_plain_http",
            Self::Other => "tls_other",
        }
    }

    /// What a verifier answers rustls with, so that the peer gets the alert that RFC 8446 6.2 has for it.
    pub(crate) fn certificate_error(self) -> CertificateError {
        match self {
            Self::UnknownIssuer => CertificateError::UnknownIssuer,
            Self::Expired => CertificateError::Expired,
            Self::NotYetValid => CertificateError::NotValidYet,
            Self::WrongIdentity | Self::TrustDomain | Self::AppLeaf => {
                CertificateError::ApplicationVerificationFailure
            }
            Self::NoCertificate
            | Self::Version
            | Self::Alpn
            | Self::PeerRefused
            | Self::Closed
            | Self::PlainHttp
            | Self::Other => CertificateError::BadEncoding,
        }
    }
}

/// Why a handshake ended. Its text is for our own log, never for the peer.
pub struct HandshakeError(Box<Inner>);

struct Inner {
    kind: HandshakeErrorKind,
    cause: String,
    fix: String,
    presented: Option<LeafFacts>,
}

impl HandshakeError {
    pub(crate) fn new(refusal: Refusal, presented: Option<LeafFacts>) -> Self {
        let Refusal { kind, cause, fix } = refusal;
        Self(Box::new(Inner { kind, cause, fix, presented }))
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> HandshakeErrorKind {
        self.0.kind
    }

    /// The kind's code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.0.kind.code()
    }

    /// What was found.
    #[must_use]
    pub fn cause(&self) -> &str {
        &self.0.cause
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> &str {
        &self.0.fix
    }

    /// The certificate that the peer presented, where it came so far.
    #[must_use]
    pub fn presented(&self) -> Option<&LeafFacts> {
        self.0.presented.as_ref()
    }
}

impl fmt::Display for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.cause, self.0.fix)
    }
}

impl fmt::Debug for HandshakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandshakeError")
            .field("kind", &self.0.kind)
            .field("cause", &self.0.cause)
            .field("fix", &self.0.fix)
            .field("presented", &self.0.presented)
            .finish()
    }
}

impl std::error::Error for HandshakeError {}

/// What an error of an established stream says about the handshake. In TLS 1.3 a caller's handshake is over before the other
/// end has seen the caller's certificate, so a refusal of it arrives as the first thing that is read. `None` for errors that
/// are no verdict on us.
#[must_use]
pub fn classify_io(error: &io::Error) -> Option<HandshakeErrorKind> {
    let rustls::Error::AlertReceived(alert) = tls_error(error)? else { return None };
    let kind = alert_kind(*alert);
    (kind != HandshakeErrorKind::PeerRefused || judges_certificate(*alert)).then_some(kind)
}

/// The alerts that answer a certificate, or the proof that its key is held.
fn judges_certificate(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::NoCertificate
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError
            | AlertDescription::CertificateRequired
    )
}

fn alert_kind(alert: AlertDescription) -> HandshakeErrorKind {
    if alert == AlertDescription::ProtocolVersion {
        HandshakeErrorKind::Version
    } else if alert == AlertDescription::NoApplicationProtocol {
        HandshakeErrorKind::Alpn
    } else {
        HandshakeErrorKind::PeerRefused
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Where a handshake stood when it failed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Nothing that is TLS had come from the peer.
    First,
    /// The peer had spoken TLS.
    Later,
}

/// Reads a failure that no verifier has explained.
pub(crate) fn explain(error: &io::Error, stage: Stage, side: Side, leg: Leg) -> Refusal {
    let (kind, cause) = match tls_error(error) {
        Some(error) => explain_tls(error, stage),
        None => explain_socket(error),
    };
    Refusal { kind, cause, fix: fix(kind, side, leg).to_owned() }
}

fn explain_socket(error: &io::Error) -> (HandshakeErrorKind, String) {
    let closed = matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected
    );
    if closed {
        return (
            HandshakeErrorKind::Closed,
            "the peer closed the connection within the handshake".to_owned(),
        );
    }
    (HandshakeErrorKind::Other, error.to_string())
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "rustls's enum is open, and what is left speaks for itself"
)]
fn explain_tls(error: &rustls::Error, stage: Stage) -> (HandshakeErrorKind, String) {
    match error {
        rustls::Error::NoCertificatesPresented => {
            (HandshakeErrorKind::NoCertificate, "the peer showed no certificate".to_owned())
        }
        rustls::Error::NoApplicationProtocol => {
            (HandshakeErrorKind::Alpn, "the peer speaks none of our application protocols".to_owned())
        }
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) if stage == Stage::First => (
            HandshakeErrorKind::PlainHttp,
            "the peer does not speak TLS, its first bytes are plain".to_owned(),
        ),
        rustls::Error::PeerIncompatible(
            PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
            | PeerIncompatible::SupportedVersionsExtensionRequired,
        ) => (HandshakeErrorKind::Version, "the peer speaks no TLS version that we do".to_owned()),
        rustls::Error::AlertReceived(alert) => {
            (alert_kind(*alert), format!("the peer ended the handshake with the alert {alert:?}"))
        }
        other => (HandshakeErrorKind::Other, other.to_string()),
    }
}

/// What to do, where nothing more is known than kind and place.
pub(crate) fn fix(kind: HandshakeErrorKind, side: Side, leg: Leg) -> &'static str {
    match kind {
        HandshakeErrorKind::NoCertificate => match leg {
            Leg::Outbound => {
                "give the application leaf.pem and leaf.key of its own directory (certs/<service>-app) as client certificate"
            }
            Leg::Mesh | Leg::App | Leg::Ingress => {
                "only sidecars call this port: let the application call through its own sidecar"
            }
        },
        HandshakeErrorKind::UnknownIssuer => {
            "compare ca.pem at both ends (`kiro certs show`); after `make certs`, restart what still has files of another CA mounted"
        }
        HandshakeErrorKind::Expired => "renew it with `make certs`, and compare the two hosts' clocks",
        HandshakeErrorKind::NotYetValid => "set the two hosts' clocks (NTP)",
        HandshakeErrorKind::WrongIdentity | HandshakeErrorKind::TrustDomain | HandshakeErrorKind::AppLeaf => {
            "look at what the peer has mounted (`kiro certs show`), and renew it with `make certs`"
        }
        HandshakeErrorKind::Version => match leg {
            Leg::Ingress => "let the client speak TLS 1.2 or 1.3",
            Leg::Mesh | Leg::Outbound | Leg::App => "let the peer speak TLS 1.3",
        },
        HandshakeErrorKind::Alpn => match leg {
            Leg::Mesh => "sidecars speak HTTP/2 alone on this port (ALPN h2): let the peer be a sidecar",
            Leg::App => {
                "let the application agree by ALPN on what `app.protocol` says: http/1.1, or h2 for `h2` and `grpc`"
            }
            Leg::Outbound | Leg::Ingress => "let the client speak HTTP/2 or HTTP/1.1 (ALPN h2, http/1.1)",
        },
        HandshakeErrorKind::PeerRefused => match leg {
            Leg::Ingress => "let the client trust the ingress's issuer (certs/ca/ca.pem)",
            Leg::Mesh => "the peer's own log says why it refused our certificate (`certificate refused`)",
            Leg::Outbound | Leg::App => {
                "let the application trust ca.pem of its directory and expect this sidecar's name; its own log says what it refused"
            }
        },
        HandshakeErrorKind::Closed => "look at the peer's log: it ended the connection without a word",
        HandshakeErrorKind::PlainHttp => match (leg, side) {
            (Leg::Outbound, _) => {
                "let the application's proxy address start with https://, or write `tls: none` under the service's `app:` in the mesh file"
            }
            (Leg::App, _) => {
                "let the application speak TLS, or write `tls: none` under the service's `app:` in the mesh file"
            }
            (Leg::Ingress, _) => "call with https://, or use the ingress's plain port",
            (Leg::Mesh, Side::Server) => {
                "only sidecars call this port: let the application call through its own sidecar"
            }
            (Leg::Mesh, Side::Client) => {
                "no sidecar answers there: look at the service's DNS alias, and at `endpoints:` in the mesh file"
            }
        },
        HandshakeErrorKind::Other => "look at the peer's log for the same moment",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classified(error: rustls::Error) -> Option<HandshakeErrorKind> {
        classify_io(&io::Error::new(io::ErrorKind::InvalidData, error))
    }

    #[test]
    fn only_alerts_that_judge_us_are_refusals() {
        let alert = |alert| classified(rustls::Error::AlertReceived(alert));
        for judging in [
            AlertDescription::BadCertificate,
            AlertDescription::UnsupportedCertificate,
            AlertDescription::CertificateRevoked,
            AlertDescription::CertificateExpired,
            AlertDescription::CertificateUnknown,
            AlertDescription::UnknownCA,
            AlertDescription::AccessDenied,
            AlertDescription::DecryptError,
            AlertDescription::CertificateRequired,
        ] {
            assert_eq!(alert(judging), Some(HandshakeErrorKind::PeerRefused), "{judging:?}");
        }
        assert_eq!(alert(AlertDescription::ProtocolVersion), Some(HandshakeErrorKind::Version));
        assert_eq!(alert(AlertDescription::NoApplicationProtocol), Some(HandshakeErrorKind::Alpn));
        for other in [
            AlertDescription::BadRecordMac,
            AlertDescription::InternalError,
            AlertDescription::RecordOverflow,
            AlertDescription::UserCanceled,
        ] {
            assert_eq!(alert(other), None, "{other:?}");
        }
    }

    #[test]
    fn errors_that_are_no_alert_are_no_refusal() {
        assert_eq!(classified(rustls::Error::DecryptError), None);
        assert_eq!(classify_io(&io::ErrorKind::ConnectionReset.into()), None);
        assert_eq!(classify_io(&io::Error::other("something else")), None);
    }
}
