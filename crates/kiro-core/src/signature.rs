//! Is this request the one that the calling sidecar sent, on this very connection, now and only once?
//!
//! A strict subset of RFC 9421 (HTTP Message Signatures) with HMAC-SHA256. Both ends are our own, so there is one way to write
//! a signature and the verifier takes no other: the components are exactly those that [`Signer::sign`] would cover given the
//! fields that are there, the parameters are exactly `created`, `expires`, `nonce`, `keyid`, `alg` and `tag`, in that order.
//! What is left to decide on is little, and it is all decided before the MAC is believed.
//!
//! ```text
//! signature-input: kiro=("@method" "@authority" "@path" "@query" "content-digest");created=1618884473;expires=1618884503;nonce="7";keyid="dashboard>profile#1";alg="hmac-sha256";tag="kiro"
//! signature: kiro=:pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=:
//! ```
//!
//! **Invariant**: the label `kiro` and the tags `kiro` and `kiro-trailers` are ours. Signatures of applications under other
//! labels are stepped over, never judged, and pass untouched. The code that steps over them is our own (`scan`, `dictionary`)
//! and not the `sfv` crate: the signature base needs our member's bytes as they came, a walk needs no allocation, and a field
//! line that is no dictionary at all (the older `Signature: keyId=…` scheme) has to pass as well.

mod base;
mod covered;
mod dictionary;
mod digest;
mod error;
mod key;
mod member;
mod scan;
mod sign;
#[cfg(test)]
mod tests;
mod verify;

use std::fmt;

use http::{HeaderMap, HeaderName};

pub use self::digest::content_digest_value;
pub use self::error::{SignError, SignatureError};
pub use self::key::{ConnectionKey, EXPORTER_LABEL, EdgeSecret, KeyId, KeyIdError};
pub use self::sign::Signer;
pub use self::verify::{Verified, Verifier};

/// How long a signature holds. A request is signed when its stream is free and verified before anything waits, so all that
/// passes in between is the network; half a minute is many retransmissions.
pub const LIFETIME_SECONDS: u64 = 30;

/// How far two hosts' clocks may be apart, in either direction. It is what certificates are backdated by, so clocks that get
/// through the handshake get through here. Replays are refused without a clock; this bounds what else it could be off by.
pub const SKEW_SECONDS_MAX: u64 = 120;

/// Our label in the dictionaries `signature-input` and `signature`.
const LABEL: &str = "kiro";
/// The label with what follows it.
const LABEL_PREFIX: &[u8] = b"kiro=";
const ALGORITHM: &str = "hmac-sha256";

static SIGNATURE_INPUT: HeaderName = HeaderName::from_static("signature-input");
static SIGNATURE: HeaderName = HeaderName::from_static("signature");
static CONTENT_DIGEST: HeaderName = HeaderName::from_static("content-digest");

/// What a signature is over: a head, or the trailers of a streamed body. Each has a tag of its own, so that one can never be
/// shown in place of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Head,
    Trailers,
}

impl Form {
    fn tag(self) -> &'static str {
        match self {
            Self::Head => "kiro",
            Self::Trailers => "kiro-trailers",
        }
    }

    /// What follows a component's quoted name.
    fn suffix(self) -> &'static str {
        match self {
            Self::Head => "",
            Self::Trailers => ";tr",
        }
    }
}

/// A request's head as the wire between sidecars has it.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// `:method`.
    pub method: &'a str,
    /// `:authority`: the service's bare name.
    pub authority: &'a str,
    /// `:path` up to its query, not decoded; `/` for CONNECT.
    pub path: &'a str,
    /// The query without its `?`. RFC 9421 does not tell an absent query from an empty one.
    pub query: Option<&'a str>,
}

/// A request's place in its connection's counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nonce(u64);

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a verified head says about the body that follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyProof {
    /// There is none.
    Empty,
    /// Its SHA-256.
    Digest([u8; 32]),
    /// It ends with a trailer signature.
    Trailers,
}

/// Takes our signature out of a head; other labels stay as they are.
pub fn strip(headers: &mut HeaderMap) {
    dictionary::remove_ours(headers, &SIGNATURE_INPUT);
    dictionary::remove_ours(headers, &SIGNATURE);
}

/// Takes our signature out of trailers, and the digest that came with it; an application's own stay as they are.
pub fn strip_trailers(trailers: &mut HeaderMap) {
    let signed = dictionary::remove_ours(trailers, &SIGNATURE_INPUT);
    dictionary::remove_ours(trailers, &SIGNATURE);
    if signed {
        digest::remove_last(trailers);
    }
}
