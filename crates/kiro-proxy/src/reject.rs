//! Why was a request refused, and what does its caller learn of it?
//!
//! [`Reject`] is the data path's only error: a closed enum whose `status`, `code` and `origin` are total functions. The code is
//! the value of the response's `x-kiro-reject`, the log's field and the metric's label. A caller sees the code alone; the cause
//! ([`Refused::cause`]) goes to the log.

use std::borrow::Cow;
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use kiro_core::fields;
use kiro_core::policy::Denial;
use kiro_core::signature::SignError;

/// Whose fault a refusal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The request itself can't be served.
    Client,
    /// The sidecar can't serve it at the moment.
    Proxy,
    /// What stands behind the sidecar failed.
    Upstream,
}

/// Every reason for which a sidecar answers in place of the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reject {
    /// The authority is not the name of a service.
    AuthorityInvalid,
    /// HTTP/1.1 without Host.
    HostMissing,
    /// Several Host fields.
    HostDuplicate,
    /// The path holds a dot segment, NUL, a bad escape or bytes outside ASCII.
    PathInvalid,
    /// The message could not be read as HTTP.
    MessageInvalid,
    /// A header field can't be carried.
    HeaderInvalid,
    /// The header block is over its limit.
    HeadersTooLarge,
    /// The head, or the body, did not come in time.
    RequestTimeout,
    /// An upgrade other than `websocket`.
    UpgradeUnsupported,
    /// HTTP for a service that is declared `protocol: tcp`.
    ServiceIsTcp,
    /// TLS inside a CONNECT tunnel to an HTTP service.
    TlsInTunnel,
    /// The application uses our signature's label.
    SignatureLabelTaken,
    /// The request was meant for another service.
    Misdirected,
    /// No service of that name in the mesh file.
    ServiceUnknown,
    /// A host outside the mesh.
    HostExternal,
    /// The policy says no.
    Denied(Denial),
    /// The signature does not hold; the code says why.
    Signature(&'static str),
    /// No secret for this edge.
    EdgeSecretMissing,
    /// Too many requests wait for this peer, or all connections to the application are in use.
    QueueFull,
    /// The name did not resolve.
    NameUnresolved,
    /// Nobody accepts connections at the peer's address.
    UpstreamConnect,
    /// The TLS handshake with the peer failed; the code says why.
    UpstreamTls(&'static str),
    /// The peer ended the stream or the connection without an answer.
    UpstreamReset,
    /// The peer did not answer in time.
    UpstreamTimeout,
    /// The application does not accept connections.
    AppConnect,
    /// The TLS handshake with the application failed.
    AppTls(&'static str),
    /// The application closed the connection, or spoke something else than HTTP.
    AppReset,
    /// The application did not answer in time.
    AppTimeout,
    /// The application answered a WebSocket handshake as if it were any request.
    AppNoUpgrade,
    /// The application is not fit for traffic at the moment.
    AppUnready,
    /// Whoever asked had given up before the request came.
    DeadlineOver,
    /// The service has failed too often to be asked at the moment.
    BreakerOpen,
    /// The caller has had its share of requests.
    RateLimited,
    /// The application has as many requests under way as it may, and too many wait.
    Overloaded,
    /// The mesh file asks for it to go wrong, with this status.
    FaultInjected(StatusCode),
}

impl Reject {
    /// The status of the answer.
    #[must_use]
    pub fn status(self) -> StatusCode {
        match self {
            Reject::AuthorityInvalid
            | Reject::HostMissing
            | Reject::HostDuplicate
            | Reject::PathInvalid
            | Reject::MessageInvalid
            | Reject::HeaderInvalid
            | Reject::UpgradeUnsupported
            | Reject::ServiceIsTcp
            | Reject::TlsInTunnel
            | Reject::SignatureLabelTaken => StatusCode::BAD_REQUEST,
            Reject::HeadersTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Reject::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
            Reject::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            Reject::ServiceUnknown => StatusCode::NOT_FOUND,
            Reject::HostExternal | Reject::Denied(_) => StatusCode::FORBIDDEN,
            Reject::Signature(_) => StatusCode::UNAUTHORIZED,
            Reject::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Reject::EdgeSecretMissing
            | Reject::QueueFull
            | Reject::NameUnresolved
            | Reject::AppUnready
            | Reject::BreakerOpen
            | Reject::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
            Reject::UpstreamConnect
            | Reject::UpstreamTls(_)
            | Reject::UpstreamReset
            | Reject::AppConnect
            | Reject::AppTls(_)
            | Reject::AppReset
            | Reject::AppNoUpgrade => StatusCode::BAD_GATEWAY,
            Reject::UpstreamTimeout | Reject::AppTimeout | Reject::DeadlineOver => {
                StatusCode::GATEWAY_TIMEOUT
            }
            Reject::FaultInjected(status) => status,
        }
    }

    /// The name of the reason.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Reject::AuthorityInvalid => "authority_invalid",
            Reject::HostMissing => "host_missing",
            Reject::HostDuplicate => "host_duplicate",
            Reject::PathInvalid => "path_invalid",
            Reject::MessageInvalid => "message_invalid",
            Reject::HeaderInvalid => "header_invalid",
            Reject::HeadersTooLarge => "headers_too_large",
            Reject::RequestTimeout => "request_timeout",
            Reject::UpgradeUnsupported => "upgrade_unsupported",
            Reject::ServiceIsTcp => "service_is_tcp",
            Reject::TlsInTunnel => "tls_in_tunnel",
            Reject::SignatureLabelTaken => "signature_label_taken",
            Reject::Misdirected => "misdirected",
            Reject::ServiceUnknown => "service_unknown",
            Reject::HostExternal => "host_external",
            Reject::Denied(denial) => denial.code(),
            Reject::Signature(code) | Reject::UpstreamTls(code) | Reject::AppTls(code) => code,
            Reject::EdgeSecretMissing => "edge_secret_missing",
            Reject::QueueFull => "queue_full",
            Reject::NameUnresolved => "name_unresolved",
            Reject::UpstreamConnect => "upstream_connect",
            Reject::UpstreamReset => "upstream_reset",
            Reject::UpstreamTimeout => "upstream_timeout",
            Reject::AppConnect => "app_connect",
            Reject::AppReset => "app_reset",
            Reject::AppTimeout => "app_timeout",
            Reject::AppNoUpgrade => "app_no_upgrade",
            Reject::AppUnready => "app_unready",
            Reject::DeadlineOver => "deadline_over",
            Reject::BreakerOpen => "breaker_open",
            Reject::RateLimited => "rate_limited",
            Reject::Overloaded => "overloaded",
            Reject::FaultInjected(_) => "fault_injected",
        }
    }

    /// Whose fault it is.
    #[must_use]
    pub fn origin(self) -> Origin {
        match self {
            Reject::EdgeSecretMissing
            | Reject::QueueFull
            | Reject::BreakerOpen
            | Reject::Overloaded
            | Reject::FaultInjected(_) => Origin::Proxy,
            Reject::NameUnresolved
            | Reject::UpstreamConnect
            | Reject::UpstreamTls(_)
            | Reject::UpstreamReset
            | Reject::UpstreamTimeout
            | Reject::AppConnect
            | Reject::AppTls(_)
            | Reject::AppReset
            | Reject::AppTimeout
            | Reject::AppNoUpgrade
            | Reject::AppUnready => Origin::Upstream,
            Reject::AuthorityInvalid
            | Reject::HostMissing
            | Reject::HostDuplicate
            | Reject::PathInvalid
            | Reject::MessageInvalid
            | Reject::HeaderInvalid
            | Reject::HeadersTooLarge
            | Reject::RequestTimeout
            | Reject::UpgradeUnsupported
            | Reject::ServiceIsTcp
            | Reject::TlsInTunnel
            | Reject::SignatureLabelTaken
            | Reject::Misdirected
            | Reject::ServiceUnknown
            | Reject::HostExternal
            | Reject::Denied(_)
            | Reject::Signature(_)
            | Reject::DeadlineOver
            | Reject::RateLimited => Origin::Client,
        }
    }
}

impl Reject {
    /// Whether a sidecar says by it that its application has surely not seen the request.
    pub(crate) fn is_before_the_application(self) -> bool {
        matches!(self, Reject::AppConnect | Reject::AppUnready) || self.is_overload()
    }

    /// Whether a sidecar says by it that it has too much to do.
    pub(crate) fn is_overload(self) -> bool {
        matches!(self, Reject::QueueFull | Reject::Overloaded)
    }
}

/// The reason for which the peer's sidecar refused a request, if it did.
pub(crate) fn of_peer(headers: &HeaderMap) -> Option<Reject> {
    by_code(known_code(headers.get(&fields::REJECT)?.as_bytes())?)
}

/// Every code there is: the values of `x-kiro-reject`, of the log's `reject` and of the metric's label.
pub const CODES: &[&str] = &[
    "authority_invalid",
    "host_missing",
    "host_duplicate",
    "path_invalid",
    "message_invalid",
    "header_invalid",
    "headers_too_large",
    "request_timeout",
    "upgrade_unsupported",
    "service_is_tcp",
    "tls_in_tunnel",
    "signature_label_taken",
    "misdirected",
    "service_unknown",
    "host_external",
    "policy_no_edge",
    "policy_method",
    "policy_path",
    "policy_ambiguous_path",
    "policy_tunnel",
    "signature_missing",
    "signature_malformed",
    "signature_duplicate",
    "signature_unknown_key",
    "signature_algorithm",
    "signature_component",
    "signature_mismatch",
    "signature_expired",
    "signature_not_yet_valid",
    "signature_replayed",
    "signature_digest",
    "signature_trailers",
    "edge_secret_missing",
    "queue_full",
    "name_unresolved",
    "upstream_connect",
    "upstream_reset",
    "upstream_timeout",
    "app_connect",
    "app_reset",
    "app_timeout",
    "app_no_upgrade",
    "app_unready",
    "deadline_over",
    "breaker_open",
    "rate_limited",
    "overloaded",
    "fault_injected",
    "tls_no_certificate",
    "tls_unknown_issuer",
    "tls_expired",
    "tls_not_yet_valid",
    "tls_wrong_identity",
    "tls_trust_domain",
    "tls_app_leaf",
    "tls_version",
    "tls_alpn",
    "tls_peer_refused",
    "tls_closed",
    "tls_plain_http",
    "tls_timeout",
    "tls_other",
];

/// The reason that a code stands for; of those that come with a TLS or signature code, the one towards peers.
#[must_use]
pub fn by_code(code: &str) -> Option<Reject> {
    const PLAIN: [Reject; 36] = [
        Reject::AuthorityInvalid,
        Reject::HostMissing,
        Reject::HostDuplicate,
        Reject::PathInvalid,
        Reject::MessageInvalid,
        Reject::HeaderInvalid,
        Reject::HeadersTooLarge,
        Reject::RequestTimeout,
        Reject::UpgradeUnsupported,
        Reject::ServiceIsTcp,
        Reject::TlsInTunnel,
        Reject::SignatureLabelTaken,
        Reject::Misdirected,
        Reject::ServiceUnknown,
        Reject::HostExternal,
        Reject::Denied(Denial::NoEdge),
        Reject::Denied(Denial::Method),
        Reject::Denied(Denial::Path),
        Reject::Denied(Denial::AmbiguousPath),
        Reject::Denied(Denial::TunnelRestricted),
        Reject::EdgeSecretMissing,
        Reject::QueueFull,
        Reject::NameUnresolved,
        Reject::UpstreamConnect,
        Reject::UpstreamReset,
        Reject::UpstreamTimeout,
        Reject::AppConnect,
        Reject::AppReset,
        Reject::AppTimeout,
        Reject::AppNoUpgrade,
        Reject::AppUnready,
        Reject::DeadlineOver,
        Reject::BreakerOpen,
        Reject::RateLimited,
        Reject::Overloaded,
        Reject::FaultInjected(StatusCode::SERVICE_UNAVAILABLE),
    ];
    if let Some(plain) = PLAIN.into_iter().find(|reject| reject.code() == code) {
        return Some(plain);
    }
    let known = known_code(code.as_bytes())?;
    if known.starts_with("signature_") {
        Some(Reject::Signature(known))
    } else {
        Some(Reject::UpstreamTls(known))
    }
}

/// The code that a peer's sidecar sent, if it is one of ours.
pub(crate) fn known_code(value: &[u8]) -> Option<&'static str> {
    CODES.iter().copied().find(|code| code.as_bytes() == value)
}

/// Why an application's request can't be signed.
pub(crate) fn unsignable(error: &SignError) -> Reject {
    match error {
        SignError::Reserved => Reject::SignatureLabelTaken,
        SignError::Component(_) | SignError::Body(_) => Reject::HeaderInvalid,
    }
}

/// A refusal on its way to the answer and the log.
#[derive(Debug)]
pub(crate) struct Refused {
    /// What the caller learns.
    pub(crate) reject: Reject,
    /// What the log learns; empty where the code says it all.
    pub(crate) cause: Cow<'static, str>,
    /// When it is worth asking again, if that is known.
    pub(crate) retry_after: Option<Duration>,
}

impl Refused {
    /// A refusal with a cause for the log.
    pub(crate) fn new(reject: Reject, cause: impl Into<Cow<'static, str>>) -> Self {
        Self { reject, cause: cause.into(), retry_after: None }
    }

    /// The same, where it is known when it is worth asking again.
    pub(crate) fn after(self, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..self }
    }
}

impl From<Reject> for Refused {
    fn from(reject: Reject) -> Self {
        Self { reject, cause: Cow::Borrowed(""), retry_after: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_stands_for_a_reason_of_the_same_code() {
        for code in CODES {
            assert_eq!(by_code(code).unwrap().code(), *code);
        }
        assert_eq!(by_code("no_such_code"), None);
    }

    #[test]
    fn codes_are_told_apart() {
        let distinct: std::collections::BTreeSet<_> = CODES.iter().collect();
        assert_eq!(distinct.len(), CODES.len());
    }

    #[test]
    fn codes_of_other_crates_are_in_the_list() {
        use kiro_core::signature::SignatureError;
        for error in [
            SignatureError::Missing,
            SignatureError::Malformed(""),
            SignatureError::Duplicate,
            SignatureError::UnknownKey,
            SignatureError::WrongAlgorithm,
            SignatureError::Component(""),
            SignatureError::Mismatch,
            SignatureError::Expired { created: 0, expires: 0, now: 0 },
            SignatureError::NotYetValid { created: 0, expires: 0, now: 0 },
            SignatureError::Replayed,
            SignatureError::DigestMismatch,
            SignatureError::TrailersMissing,
            SignatureError::TrailersOfAnother,
        ] {
            assert!(CODES.contains(&error.code()), "{}", error.code());
        }
    }
}
