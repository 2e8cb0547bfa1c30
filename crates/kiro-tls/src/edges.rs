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

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
    const TWO: &str = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=";

    fn me() -> ServiceName {
        ServiceName::parse("profile").unwrap()
    }

    fn entry(source: &str, target: &str, epoch: u32, secret: &str) -> String {
        format!(r#"{{"source":"{source}","target":"{target}","epoch":{epoch},"secret":"{secret}"}}"#)
    }

    fn file(entries: &[String]) -> String {
        format!(r#"{{"version":1,"edges":[{}]}}"#, entries.join(","))
    }

    fn refused(text: &str) -> String {
        parse(text.as_bytes(), &me()).expect_err("refused").to_string()
    }

    /// Tells secrets apart, which show nothing of themselves.
    fn same(secret: &EdgeSecret, byte: u8, keyid: &KeyId) -> bool {
        use kiro_core::signature::{ConnectionKey, Head, Signer};
        let sign = |secret: &EdgeSecret| {
            let key = ConnectionKey::derive(secret, &[0; 32], keyid);
            let mut headers = Default::default();
            let head = Head { method: "GET", authority: "auth", path: "/", query: None };
            Signer::new(key, keyid.clone()).sign(&head, &mut headers, 1).unwrap();
            headers
        };
        sign(secret) == sign(&EdgeSecret::from_bytes([byte; 32]))
    }

    #[test]
    fn each_edge_is_found_from_its_other_end() {
        let text = file(&[
            entry("dashboard", "profile", 1, ONE),
            entry("profile", "auth", 1, TWO),
            entry("profile", "profile", 1, ONE),
        ]);
        let secrets = parse(text.as_bytes(), &me()).unwrap();
        let (keyid, secret) = secrets.signing("auth").unwrap();
        assert!(keyid.to_string() == "profile>auth#1" && same(secret, 2, keyid));
        assert!(secrets.signing("dashboard").is_none(), "that edge ends here");
        let verifying: Vec<_> = secrets.verifying("dashboard").collect();
        assert!(verifying.len() == 1 && same(verifying[0].1, 1, verifying[0].0));
        assert_eq!(secrets.verifying("auth").count(), 0, "that edge starts here");
        assert!(secrets.signing("profile").is_some() && secrets.verifying("profile").count() == 1);
    }

    #[test]
    fn the_epoch_that_is_listed_first_signs_and_all_verify() {
        let both = |source, target| [entry(source, target, 2, TWO), entry(source, target, 1, ONE)];
        let text = file(&[both("profile", "auth"), both("auth", "profile")].concat());
        let secrets = parse(text.as_bytes(), &me()).unwrap();
        let (keyid, secret) = secrets.signing("auth").unwrap();
        assert!(keyid.epoch == 2 && same(secret, 2, keyid));
        let epochs: Vec<_> = secrets.verifying("auth").map(|(keyid, _)| keyid.epoch).collect();
        assert_eq!(epochs, [2, 1]);
    }

    #[test]
    fn what_can_not_be_used_is_refused_and_not_shown() {
        let good = entry("profile", "auth", 1, ONE);
        let cases = [
            ("nonsense".to_owned(), "not the JSON that is expected, at line 1"),
            (r#"{"version":2,"edges":[]}"#.to_owned(), "version is 2"),
            (r#"{"version":1}"#.to_owned(), "not the JSON"),
            (r#"{"version":1,"edges":[],"more":1}"#.to_owned(), "not the JSON"),
            (file(&[good.clone(), good.clone()]), "entry 2 (profile>auth#1) stands twice"),
            (
                file(&[good.clone(), entry("dashboard", "auth", 1, ONE)]),
                "entry 2 (dashboard>auth#1) is of an edge",
            ),
            (file(&[entry("Profile", "auth", 1, ONE)]), "bad source"),
            (file(&[entry("profile", "ingress", 1, ONE)]), "bad target"),
            (file(&[entry("profile", "auth", 1, "")]), "no secret of 32 bytes"),
            (file(&[entry("profile", "auth", 1, &ONE[4..])]), "no secret of 32 bytes"),
            (
                file(&[entry("profile", "auth", 1, &format!("{}AQ==", &ONE[..44].replace('=', "A")))]),
                "no secret of 32 bytes",
            ),
            (file(&[entry("profile", "auth", 1, &ONE.repeat(3))]), "no secret of 32 bytes"),
            (file(&[entry("profile", "auth", 1, &ONE.replace('A', "!"))]), "no secret of 32 bytes"),
            (file(&[good.replace(r#""epoch":1"#, r#""epoch":-1"#)]), "not the JSON"),
            (file(&[good.replace(r#""epoch":1"#, r#""epoch":1,"more":1"#)]), "not the JSON"),
        ];
        for (text, says) in cases {
            let error = refused(&text);
            assert!(error.contains(says), "{text}\n{error}");
            assert!(!error.contains("AQEB"), "{error}");
        }
    }

    #[test]
    fn debug_shows_edges_and_no_secrets() {
        let text = file(&[entry("profile", "auth", 1, ONE)]);
        let shown = format!("{:?}", parse(text.as_bytes(), &me()).unwrap());
        assert!(
            shown.contains("profile>auth#1") && !shown.contains("AQEB") && !shown.contains("1, 1"),
            "{shown}"
        );
    }
}
