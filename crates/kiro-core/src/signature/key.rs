//! Which key signs, and what is it made from?
//!
//! An edge has one secret; each connection makes its own key of it with what only its two ends know (the TLS exporter, RFC
//! 8446 7.5). A signature is therefore worth nothing on another connection, and a leaked leaf can't sign.

use std::fmt;

use hkdf::Hkdf;
use hmac::{Hmac, KeyInit};
use sha2::Sha256;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::identity::{NameError, ServiceName};

/// HMAC-SHA256.
pub(super) type Mac = Hmac<Sha256>;

/// The label under which TLS exports the connection's part of the key.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-kiro-signature";

/// What the derived key is for, so that no other use of the edge's secret can give the same key.
const KEY_INFO: &[u8] = b"kiro signature v1 ";

/// The secret of an edge: what the two sidecars share beside their certificates.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct EdgeSecret([u8; 32]);

impl EdgeSecret {
    /// Takes over a secret's bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for EdgeSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EdgeSecret(redacted)")
    }
}

/// Names an edge and the epoch of its secret: `dashboard>profile#1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId {
    /// Who calls.
    pub source: ServiceName,
    /// Who is called.
    pub target: ServiceName,
    /// Counts the edge's secrets.
    pub epoch: u32,
}

/// Why a text is no [`KeyId`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyIdError {
    /// The form is another one.
    #[error("a keyid is written source>target#epoch")]
    Form,
    /// One of the two is no service's name.
    #[error("a keyid names two services: {0}")]
    Name(#[from] NameError),
    /// The epoch is no number as we write it.
    #[error("a keyid's epoch is a decimal number below 2^32 without leading zeros")]
    Epoch,
}

impl KeyId {
    /// Reads what `Display` writes, and nothing else.
    ///
    /// # Errors
    /// Says which part is wrong.
    pub fn parse(text: &str) -> Result<Self, KeyIdError> {
        let (source, rest) = text.split_once('>').ok_or(KeyIdError::Form)?;
        let (target, epoch) = rest.split_once('#').ok_or(KeyIdError::Form)?;
        let canonical =
            epoch == "0" || (!epoch.starts_with('0') && epoch.bytes().all(|byte| byte.is_ascii_digit()));
        let epoch = epoch.parse().ok().filter(|_| canonical).ok_or(KeyIdError::Epoch)?;
        Ok(Self { source: ServiceName::parse(source)?, target: ServiceName::parse(target)?, epoch })
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}>{}#{}", self.source, self.target, self.epoch)
    }
}

/// The key of one edge on one connection. It is kept as HMAC's keyed state, so that a request clones it instead of keying anew.
#[derive(Clone)]
pub struct ConnectionKey(Mac);

impl ConnectionKey {
    /// Binds an edge's secret to the connection whose exporter is given.
    #[must_use]
    pub fn derive(secret: &EdgeSecret, exporter: &[u8; 32], keyid: &KeyId) -> Self {
        let mut key = [0; 32];
        let hkdf = Hkdf::<Sha256>::new(Some(exporter), &secret.0);
        #[expect(clippy::expect_used, reason = "HKDF refuses only outputs over 255 hashes; this is one")]
        hkdf.expand_multi_info(&[KEY_INFO, keyid.to_string().as_bytes()], &mut key)
            .expect("one hash of output");
        let this = Self::from_mac_key(&key);
        key.zeroize();
        this
    }

    /// The key itself, without an edge and a connection.
    pub(super) fn from_mac_key(key: &[u8]) -> Self {
        #[expect(clippy::expect_used, reason = "HMAC takes keys of every length; the error is of the trait")]
        Self(Mac::new_from_slice(key).expect("any length"))
    }

    /// A MAC that has been given the key and nothing else.
    pub(super) fn mac(&self) -> Mac {
        self.0.clone()
    }
}

impl fmt::Debug for ConnectionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ConnectionKey(redacted)")
    }
}
