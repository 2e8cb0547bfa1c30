//! Which secret signs the requests of an edge, and who gets it?
//!
//! Each ordered pair of services has a secret of its own, derived from a master that never leaves the authority's directory: a new
//! service adds pairs and changes none. A sidecar is given the pairs that start or end at itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hkdf::Hkdf;
use kiro_core::identity::ServiceName;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::{Zeroize as _, Zeroizing};

use crate::error::PkiError;

/// The epoch of the secrets that are given out. A later one stands beside it while secrets are being replaced.
pub const EDGE_EPOCH: u32 = 1;

const SECRET_BYTES: usize = 32;
const FORMAT_VERSION: u32 = 1;
/// More than an entry takes with the longest names, so that the buffer never grows and leaves no copy behind.
const ENTRY_BYTES_MAX: usize = 384;

/// What all edge secrets derive from.
pub struct EdgeMaster(Zeroizing<[u8; SECRET_BYTES]>);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EdgesFile {
    version: u32,
    edges: Vec<EdgeEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EdgeEntry {
    source: String,
    target: String,
    epoch: u32,
    secret: SecretText,
}

#[derive(Serialize, Deserialize, PartialEq, Eq)]
#[serde(transparent)]
struct SecretText(String);

impl Drop for SecretText {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl EdgeMaster {
    pub(crate) fn generate() -> Result<Self, PkiError> {
        let mut bytes = Zeroizing::new([0_u8; SECRET_BYTES]);
        aws_lc_rs::rand::fill(&mut *bytes)
            .map_err(|_| PkiError::issue("the edge secrets' master", "no randomness from the system"))?;
        Ok(Self(bytes))
    }

    /// The secret of one edge and epoch.
    pub fn secret(
        &self,
        source: &ServiceName,
        target: &ServiceName,
        epoch: u32,
    ) -> Result<Zeroizing<[u8; 32]>, PkiError> {
        let mut secret = Zeroizing::new([0_u8; SECRET_BYTES]);
        // A service's name holds no `>` and no `#`, so no two edges share this text.
        let info = format!("kiro edge v1 {source}>{target}#{epoch}");
        Hkdf::<Sha256>::new(None, &*self.0)
            .expand(info.as_bytes(), &mut *secret)
            .map_err(|error| PkiError::issue(format!("the secret of edge {source}>{target}"), error))?;
        Ok(secret)
    }

    /// `edges.json` of one sidecar. A service's edge to itself is among them: its replicas call each other by its name.
    pub(crate) fn edges_json<'a>(
        &self,
        services: impl IntoIterator<Item = &'a ServiceName>,
        me: &ServiceName,
    ) -> Result<Zeroizing<Vec<u8>>, PkiError> {
        let mut pairs = BTreeSet::from([(me, me)]);
        for other in services {
            pairs.insert((me, other));
            pairs.insert((other, me));
        }
        let mut edges = Vec::with_capacity(pairs.len());
        for (source, target) in pairs {
            let secret = self.secret(source, target, EDGE_EPOCH)?;
            edges.push(EdgeEntry {
                source: source.to_string(),
                target: target.to_string(),
                epoch: EDGE_EPOCH,
                secret: SecretText(STANDARD.encode(secret.as_slice())),
            });
        }
        let mut json = Zeroizing::new(Vec::with_capacity(ENTRY_BYTES_MAX * (edges.len() + 1)));
        serde_json::to_writer_pretty(&mut *json, &EdgesFile { version: FORMAT_VERSION, edges })
            .map_err(|error| PkiError::issue(format!("the edge secrets of `{me}`"), error))?;
        json.push(b'\n');
        Ok(json)
    }

    /// The master as `edge-master.key` holds it.
    pub(crate) fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut text = STANDARD.encode(self.0.as_slice());
        text.push('\n');
        let bytes = Zeroizing::new(text.as_bytes().to_vec());
        text.zeroize();
        bytes
    }

    pub(crate) fn decode(text: &[u8]) -> Result<Self, String> {
        let decoded = Zeroizing::new(STANDARD.decode(text.trim_ascii()).unwrap_or_default());
        let bytes =
            decoded.as_slice().try_into().map_err(|_| "does not hold 32 bytes in base64".to_owned())?;
        Ok(Self(Zeroizing::new(bytes)))
    }
}

impl fmt::Debug for EdgeMaster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EdgeMaster([redacted])")
    }
}

/// How the edges of a file differ from the ones that take its place, in words for the report.
/// The error completes the sentence "this file …".
pub(crate) fn difference(old: &[u8], new: &[u8]) -> Result<String, String> {
    let (old, new) = (parse(old)?, parse(new)?);
    let names = |edges: Vec<&Key>| {
        edges.iter().map(|(s, t, e)| format!("{s}>{t}#{e}")).collect::<Vec<_>>().join(", ")
    };
    let added = names(new.keys().filter(|key| !old.contains_key(*key)).collect());
    let removed = names(old.keys().filter(|key| !new.contains_key(*key)).collect());
    let changed =
        names(new.iter().filter(|(k, v)| old.get(*k).is_some_and(|old| old != *v)).map(|(k, _)| k).collect());
    let parts = [("new edges", added), ("edges that are no more", removed), ("other secrets for", changed)];
    let text = parts
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(what, names)| format!("{what}: {names}"));
    let text = text.collect::<Vec<_>>().join("; ");
    Ok(if text.is_empty() { "the same edges, written otherwise".to_owned() } else { text })
}

type Key = (String, String, u32);

fn parse(json: &[u8]) -> Result<BTreeMap<Key, SecretText>, String> {
    // serde_json's messages quote what they stumble over, which may be a secret: only the place is told.
    let file: EdgesFile = serde_json::from_slice(json).map_err(|error| {
        format!("is not a file of edge secrets (line {}, column {})", error.line(), error.column())
    })?;
    if file.version != FORMAT_VERSION {
        return Err(format!("has version {} where this kiro knows {FORMAT_VERSION}", file.version));
    }
    Ok(file.edges.into_iter().map(|edge| ((edge.source, edge.target, edge.epoch), edge.secret)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ServiceName {
        ServiceName::parse(text).unwrap()
    }

    fn master(byte: u8) -> EdgeMaster {
        EdgeMaster(Zeroizing::new([byte; 32]))
    }

    #[test]
    fn the_derivation_is_fixed_by_a_vector() {
        // openssl kdf -keylen 32 -kdfopt digest:SHA256 -kdfopt hexkey:0707…07 -kdfopt info:'kiro edge v1 dashboard>profile#1' HKDF
        let secret = master(7).secret(&name("dashboard"), &name("profile"), 1).unwrap();
        assert_eq!(STANDARD.encode(secret.as_slice()), VECTOR);
    }

    const VECTOR: &str = "CKEZpPyUY9e0uHqQVvq/eYG0YYv0Og6SBzntkfqwavw=";

    #[test]
    fn every_edge_and_epoch_has_its_own_secret() {
        let names = [name("a"), name("b"), name("c")];
        let mut seen = BTreeSet::new();
        for (source, target, epoch) in
            names.iter().flat_map(|s| names.iter().flat_map(move |t| [1, 2].map(move |e| (s, t, e))))
        {
            assert!(
                seen.insert(*master(1).secret(source, target, epoch).unwrap()),
                "{source}>{target}#{epoch}"
            );
        }
        assert!(seen.insert(*master(2).secret(&names[0], &names[1], 1).unwrap()), "another master");
    }

    #[test]
    fn a_sidecar_gets_only_the_edges_that_start_or_end_at_itself() {
        let services = [name("auth"), name("dashboard"), name("profile")];
        let json = master(3).edges_json(&services, &services[0]).unwrap();
        let edges = parse(&json).unwrap();
        let pairs: Vec<_> = edges.keys().map(|(s, t, _)| format!("{s}>{t}")).collect();
        let expected = ["auth>auth", "auth>dashboard", "auth>profile", "dashboard>auth", "profile>auth"];
        assert_eq!(pairs, expected);
        let expected = master(3).secret(&services[1], &services[0], 1).unwrap();
        assert_eq!(edges[&("dashboard".into(), "auth".into(), 1)].0, STANDARD.encode(expected.as_slice()));
    }

    #[test]
    fn the_buffer_holds_the_longest_names() {
        let services: Vec<_> = (0..40).map(|n| name(&format!("{n:a>63}"))).collect();
        let json = master(3).edges_json(&services, &services[0]).unwrap();
        let entries = services.len() * 2 - 1;
        assert!(json.len() < ENTRY_BYTES_MAX * entries, "{} bytes for {entries} entries", json.len());
    }

    #[test]
    fn the_master_survives_its_file() {
        let text = master(9).encode();
        assert_eq!(*EdgeMaster::decode(&text).unwrap().0, [9; 32]);
        for broken in ["", "AAAA", "not base64!", &STANDARD.encode([1; 31]), &STANDARD.encode([1; 33])] {
            assert!(EdgeMaster::decode(broken.as_bytes()).is_err(), "{broken:?}");
        }
        assert!(!format!("{:?}", master(9)).contains('9'));
    }

    #[test]
    fn a_difference_names_edges_and_no_secret() {
        let two = [name("a"), name("b")];
        let three = [name("a"), name("b"), name("c")];
        let old = master(1).edges_json(&two, &two[0]).unwrap();
        let new = master(1).edges_json(&three, &two[0]).unwrap();
        assert_eq!(difference(&old, &new).unwrap(), "new edges: a>c#1, c>a#1");
        assert_eq!(difference(&new, &old).unwrap(), "edges that are no more: a>c#1, c>a#1");
        let other = master(2).edges_json(&two, &two[0]).unwrap();
        assert_eq!(difference(&old, &other).unwrap(), "other secrets for: a>a#1, a>b#1, b>a#1");
        let error = difference(br#"{"version":1,"edges":["c2VjcmV0"]}"#, &new).unwrap_err();
        assert!(!error.contains("c2VjcmV0"), "{error}");
        assert!(difference(br#"{"version":2,"edges":[]}"#, &new).unwrap_err().contains("version 2"));
    }
}
