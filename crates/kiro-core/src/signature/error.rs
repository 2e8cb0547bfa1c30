//! Why is a request not signed, or its signature not believed?

use super::SKEW_SECONDS_MAX;

/// Why a message can't be signed. Its verifier would refuse it, so it does not leave.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    /// Something that the signature covers is not fit for it.
    #[error("the request can't be signed: {0}")]
    Component(&'static str),
    /// The head's `content-digest` or `x-kiro-body` says nothing that a verifier could hold the body to.
    #[error("the request can't be signed: {0}")]
    Body(&'static str),
    /// The application signs under a label or tag that is the mesh's.
    #[error("the application's own signature uses the label or a tag of the mesh's; give it another")]
    Reserved,
}

/// Why a signature is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// There is none of ours.
    #[error("the request carries no signature of the mesh")]
    Missing,
    /// Something is not written as our signer writes it.
    #[error("the signature is malformed: {0}")]
    Malformed(&'static str),
    /// There are two of ours.
    #[error("the request carries more than one signature of the mesh")]
    Duplicate,
    /// No key of this edge has that name.
    #[error("the signature's keyid names no key of this edge")]
    UnknownKey,
    /// `alg` is another one.
    #[error("the signature's algorithm is not hmac-sha256")]
    WrongAlgorithm,
    /// What it covers is not what it has to cover.
    #[error("the signature does not cover what it must: {0}")]
    Component(&'static str),
    /// The MAC is another one: something was changed, or signed with another key or for another connection.
    #[error(
        "the signature does not fit the message: changed on the way, or signed for another edge or connection"
    )]
    Mismatch,
    /// Too late.
    #[error(
        "the signature expired: the caller's clock said {created} and gave it until {expires}, this one says {now} \
         (seconds since 1970, {SKEW_SECONDS_MAX} s apart are allowed)"
    )]
    Expired {
        /// The caller's clock when it signed.
        created: u64,
        /// Until when it holds, by the caller's clock.
        expires: u64,
        /// The verifier's clock.
        now: u64,
    },
    /// From the future.
    #[error(
        "the signature is from the future: the caller's clock said {created} (until {expires}), this one says {now} \
         (seconds since 1970, {SKEW_SECONDS_MAX} s apart are allowed)"
    )]
    NotYetValid {
        /// The caller's clock when it signed.
        created: u64,
        /// Until when it holds, by the caller's clock.
        expires: u64,
        /// The verifier's clock.
        now: u64,
    },
    /// The nonce was used before on this connection, or is too old to tell.
    #[error("the signature was used before")]
    Replayed,
    /// The body's digest is another one.
    #[error("the body's digest is not the one that was signed")]
    DigestMismatch,
    /// A streamed body ended without a trailer signature.
    #[error("the body ended without the trailer signature that its head promised")]
    TrailersMissing,
    /// The trailer signature belongs to another request of the connection.
    #[error("the trailer signature belongs to another request")]
    TrailersOfAnother,
}

impl SignatureError {
    /// The reason in one word, for `x-kiro-reject`, logs and metrics.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing => "signature_missing",
            Self::Malformed(_) => "signature_malformed",
            Self::Duplicate => "signature_duplicate",
            Self::UnknownKey => "signature_unknown_key",
            Self::WrongAlgorithm => "signature_algorithm",
            Self::Component(_) => "signature_component",
            Self::Mismatch => "signature_mismatch",
            Self::Expired { .. } => "signature_expired",
            Self::NotYetValid { .. } => "signature_not_yet_valid",
            Self::Replayed => "signature_replayed",
            Self::DigestMismatch => "signature_digest",
            Self::TrailersMissing | Self::TrailersOfAnother => "signature_trailers",
        }
    }
}
