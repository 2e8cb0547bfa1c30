//! Which secrets does this sidecar share with its peers?
//!
//! `edges.json` lists them, one an edge and epoch. Of several epochs of an edge the one listed first signs, and all verify, so
//! that a secret can be replaced while requests are under way.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kiro_core::identity::ServiceName;
use kiro_core::signature::{EdgeSecret, KeyId};
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::files::{self, Place, Secrecy};
use crate::identity::IdentityError;

/// The file format's version.
const VERSION: u32 = 1;

const SECRET_BYTES: usize = 32;

/// Each edge's signing key, with the callers or callees they are shared with.
type ByPeer = BTreeMap<ServiceName, Vec<(KeyId, EdgeSecret)>>;

/// The secrets of the edges that start or end at one sidecar.
pub struct EdgeSecrets {
    me: ServiceName,
    outgoing: ByPeer,
    incoming: ByPeer,
}

/// Why a text is no list of edge secrets. It never holds any of the text, which may be a secret.
#[derive(Debug, thiserror::Error)]
pub enum EdgesError {
    /// No JSON, or not of this form.
    #[error("it is not the JSON that is expected, at line {line}, column {column}")]
    Json {
        /// Where the parser stopped.
        line: usize,
        /// And how far into the line.
        column: usize,
    },
    /// A later format.
    #[error("its version is {0}, this program knows version {VERSION}")]
    Version(u32),
    /// An entry that can't be used.
    #[error("its entry {number} {cause}")]
    Entry {
        /// Counted from 1.
        number: usize,
        /// What is wrong with it.
        cause: String,
    },
}

/// Loads `edges.json` of a sidecar's directory.
///
/// # Errors
/// Names the file, what is wrong with it, and how to mend it.
pub fn load(directory: &Path, me: &ServiceName) -> Result<EdgeSecrets, IdentityError> {
    let place = Place::directory(directory);
    let text = files::read(&place.path(files::EDGES), Secrecy::Sidecar)?;
    in_place(&text, me, &place)
}

pub(crate) fn in_place(text: &[u8], me: &ServiceName, place: &Place) -> Result<EdgeSecrets, IdentityError> {
    parse(text, me).map_err(|error| {
        IdentityError::content(
            place.path(files::EDGES),
            error.to_string(),
            format!("mount certs/{me} as `make certs` wrote it; where nothing is signed, {{\"version\":1,\"edges\":[]}} is enough"),
        )
    })
}

/// Reads what `edges.json` holds.
///
/// # Errors
/// Says what is wrong, and never shows any of the text.
pub fn parse(text: &[u8], me: &ServiceName) -> Result<EdgeSecrets, EdgesError> {
    let file: EdgesFile<'_> = serde_json::from_slice(text)
        .map_err(|error| EdgesError::Json { line: error.line(), column: error.column() })?;
    if file.version != VERSION {
        return Err(EdgesError::Version(file.version));
    }
    let mut secrets = EdgeSecrets { me: me.clone(), outgoing: ByPeer::new(), incoming: ByPeer::new() };
    for (index, entry) in file.edges.iter().enumerate() {
        secrets.take(entry).map_err(|cause| EdgesError::Entry { number: index + 1, cause })?;
    }
    Ok(secrets)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EdgesFile<'a> {
    version: u32,
    #[serde(borrow)]
    edges: Vec<EdgeEntry<'a>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EdgeEntry<'a> {
    #[serde(borrow)]
    source: Cow<'a, str>,
    #[serde(borrow)]
    target: Cow<'a, str>,
    epoch: u32,
    /// Borrowed, so that no copy of it stays behind.
    secret: &'a str,
}

impl EdgeSecrets {
    fn take(&mut self, entry: &EdgeEntry<'_>) -> Result<(), String> {
        let name =
            |text: &str, what| ServiceName::parse(text).map_err(|error| format!("has a bad {what}: {error}"));
        let keyid = KeyId {
            source: name(&entry.source, "source")?,
            target: name(&entry.target, "target")?,
            epoch: entry.epoch,
        };
        let mut bytes = Zeroizing::new([0; SECRET_BYTES]);
        // Decoding wants room for a whole last group.
        let mut room = Zeroizing::new([0; SECRET_BYTES + 3]);
        let decoded = STANDARD.decode_slice(entry.secret, &mut *room).unwrap_or_default();
        match room.get(..decoded) {
            Some(secret) if secret.len() == SECRET_BYTES => bytes.copy_from_slice(secret),
            Some(_) | None => {
                return Err(format!("({keyid}) has no secret of {SECRET_BYTES} bytes in base64"));
            }
        }
        let (starts, ends) = (keyid.source == self.me, keyid.target == self.me);
        if !starts && !ends {
            return Err(format!("({keyid}) is of an edge that neither starts nor ends at {}", self.me));
        }
        if starts {
            add(&mut self.outgoing, keyid.target.clone(), &keyid, &bytes)?;
        }
        if ends {
            add(&mut self.incoming, keyid.source.clone(), &keyid, &bytes)?;
        }
        Ok(())
    }

    /// What signs requests to a service.
    #[must_use]
    pub fn signing(&self, target: &str) -> Option<(&KeyId, &EdgeSecret)> {
        self.outgoing.get(target)?.first().map(|(keyid, secret)| (keyid, secret))
    }

    /// What verifies requests of a service.
    pub fn verifying(&self, source: &str) -> impl Iterator<Item = (&KeyId, &EdgeSecret)> {
        self.incoming.get(source).into_iter().flatten().map(|(keyid, secret)| (keyid, secret))
    }
}

fn add(
    edges: &mut ByPeer,
    peer: ServiceName,
    keyid: &KeyId,
    secret: &[u8; SECRET_BYTES],
) -> Result<(), String> {
    let of_peer = edges.entry(peer).or_default();
    if of_peer.iter().any(|(known, _)| known == keyid) {
        return Err(format!("({keyid}) stands twice"));
    }
    of_peer.push((keyid.clone(), EdgeSecret::from_bytes(*secret)));
    Ok(())
}

impl fmt::Debug for EdgeSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keyids = |edges: &ByPeer| -> Vec<String> {
            edges.values().flatten().map(|(keyid, _)| keyid.to_string()).collect()
        };
        f.debug_struct("EdgeSecrets")
            .field("outgoing", &keyids(&self.outgoing))
            .field("incoming", &keyids(&self.incoming))
            .finish_non_exhaustive()
    }
}
