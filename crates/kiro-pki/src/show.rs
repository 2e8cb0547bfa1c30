//! Which certificates are there, whose are they, until when, and is any key too open?

use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::AUTHORITY_NAME;
use crate::error::PkiError;
use crate::facts::{Facts, San};
use crate::files::Folder;
use crate::layout::{self, HolderRole, INGRESS, Kind, LEAF};

/// One certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Where it lies.
    pub path: PathBuf,
    /// What it is for, by its place.
    #[serde(rename = "use")]
    pub usage: Use,
    /// Whom it names.
    pub subject: String,
    /// Subject alternative names, as `DNS:…`, `URI:…`, `IP:…`.
    pub sans: Vec<String>,
    /// Extended key usage: `server`, `client`.
    pub key_usage: Vec<&'static str>,
    /// Who issued it.
    pub issuer: String,
    /// Whether the authority in this directory signed it.
    pub issued_here: bool,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// From when it is valid.
    #[serde(serialize_with = "rfc3339")]
    pub not_before: OffsetDateTime,
    /// Until when.
    #[serde(serialize_with = "rfc3339")]
    pub not_after: OffsetDateTime,
    /// Whole days until then; negative when it has passed.
    pub days_left: i64,
    /// SHA-256 of the certificate, hexadecimal.
    pub fingerprint: String,
    /// Its private key's file.
    pub key: KeyEntry,
}

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Use {
    /// Signs the others.
    Authority,
    /// A sidecar's identity.
    Sidecar,
    /// An application's identity, for the way to its own sidecar.
    App,
    /// What outside clients see.
    Ingress,
}

/// A private key's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeyEntry {
    /// Where it lies.
    pub path: PathBuf,
    /// Its mode in octal, or `None` when it is missing.
    pub mode: Option<String>,
    /// Whether the key is there and nobody but its readers can read it.
    pub ok: bool,
}

/// What lies in a directory that [`crate::provision`] wrote, the authority first. A file that can't be read as a certificate is an
/// error that names it.
pub fn show(dir: &Path, now: OffsetDateTime) -> Result<Vec<Entry>, PkiError> {
    let nothing = || {
        PkiError::file(dir, "there are no certificates here", "run `kiro certs` (`make certs`) to make them")
    };
    let root = Folder::open(dir)?.ok_or_else(nothing)?;
    let mut names = root.names()?;
    names.sort_by_key(|name| name != layout::AUTHORITY_DIR);
    let mut entries = Vec::new();
    let mut authority = None;
    for name in names {
        let Some(folder) = root.open_child_if_directory(&name)? else { continue };
        if name == layout::AUTHORITY_DIR {
            let access = layout::authority_access(Kind::Secret);
            let files = (layout::CA_CERTIFICATE, layout::CA_KEY);
            if let Some((entry, facts)) = entry(&folder, files, Some(Use::Authority), access.mode, None, now)?
            {
                entries.push(entry);
                authority = Some(facts);
            }
            continue;
        }
        let role = role_of(&folder)?;
        let access = layout::access(role, Kind::Secret, None);
        for (pair, usage) in [(LEAF, None), (INGRESS, Some(Use::Ingress))] {
            let files = (pair.certificate, pair.key);
            entries.extend(
                entry(&folder, files, usage, access.mode, authority.as_ref(), now)?.map(|(entry, _)| entry),
            );
        }
    }
    if entries.is_empty() { Err(nothing()) } else { Ok(entries) }
}

/// A sidecar's directory is the one with edge secrets: the name does not tell, since a service may be called `x-app`.
fn role_of(folder: &Folder) -> Result<HolderRole, PkiError> {
    let is_sidecar = folder.names()?.iter().any(|name| name == layout::EDGES);
    Ok(if is_sidecar { HolderRole::Sidecar } else { HolderRole::App })
}

fn entry(
    folder: &Folder,
    (certificate, key): (&str, &str),
    usage: Option<Use>,
    key_mode_max: u32,
    authority: Option<&Facts>,
    now: OffsetDateTime,
) -> Result<Option<(Entry, Facts)>, PkiError> {
    let path = folder.path().join(certificate);
    let Some(found) = folder.read(certificate)? else { return Ok(None) };
    let facts = Facts::from_pem(&found.bytes)
        .map_err(|what| PkiError::file(&path, what, "move it away and run `kiro certs` to have a new one"))?;
    let mode = folder.mode(key)?;
    let uses = [(facts.server, "server"), (facts.client, "client")];
    let is_app = facts.sans.iter().any(|san| matches!(san, San::Dns(name) if name.starts_with("app.")));
    let entry = Entry {
        usage: usage.unwrap_or(if is_app { Use::App } else { Use::Sidecar }),
        subject: facts.subject.clone(),
        sans: facts.sans.iter().map(ToString::to_string).collect(),
        key_usage: uses.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect(),
        issuer: facts.issuer.clone(),
        issued_here: match authority {
            Some(authority) => facts.is_signed_by(authority),
            None => {
                facts.authority
                    && facts.issuer_name.as_deref() == Some(AUTHORITY_NAME)
                    && facts.is_signed_by(&facts)
            }
        },
        serial: facts.serial.clone(),
        not_before: facts.not_before,
        not_after: facts.not_after,
        days_left: (facts.not_after - now).whole_days() - i64::from(facts.not_after < now),
        fingerprint: facts.fingerprint.clone(),
        key: KeyEntry {
            path: folder.path().join(key),
            mode: mode.map(|mode| format!("{mode:04o}")),
            ok: mode.is_some_and(|mode| mode & !key_mode_max == 0),
        },
        path,
    };
    Ok(Some((entry, facts)))
}

fn rfc3339<S: Serializer>(time: &OffsetDateTime, serializer: S) -> Result<S::Ok, S::Error> {
    let text = time.format(&Rfc3339).map_err(serde::ser::Error::custom)?;
    serializer.serialize_str(&text)
}
