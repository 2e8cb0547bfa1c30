//! How are certificates and keys read from a directory, and who else could read them?

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::identity::IdentityError;

/// The CA's certificate, or several while it is being replaced.
pub(crate) const CA: &str = "ca.pem";
/// The leaf, and after it what leads up to the CA.
pub(crate) const LEAF: &str = "leaf.pem";
/// The leaf's key.
pub(crate) const KEY: &str = "leaf.key";
/// The secrets of the sidecar's edges.
pub(crate) const EDGES: &str = "edges.json";
/// What the ingress shows to outside clients.
pub(crate) const INGRESS: &str = "ingress.pem";
/// The ingress certificate's key.
pub(crate) const INGRESS_KEY: &str = "ingress.key";

/// A directory's files together stay far below this: a chain has a few KiB, an edge's secret 150 bytes.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

const OTHERS: u32 = 0o007;
const GROUP: u32 = 0o070;
const GROUP_BEYOND_READ: u32 = 0o030;

/// Who may read a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Secrecy {
    /// Anybody.
    Public,
    /// Its owner; a group only where it is the process's own.
    Sidecar,
    /// Its owner, and a group that reads: the application's key is shared by a group that its image does not know.
    App,
}

/// Where files come from, for messages that name them.
#[derive(Clone, Debug)]
pub(crate) struct Place(Option<PathBuf>);

impl Place {
    pub(crate) fn directory(path: &Path) -> Self {
        Self(Some(path.to_owned()))
    }

    pub(crate) fn memory() -> Self {
        Self(None)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.as_ref().map_or_else(|| PathBuf::from(name), |directory| directory.join(name))
    }
}

/// Reads a file whole. Mode and content are of one open file, so nobody can exchange it in between.
pub(crate) fn read(path: &Path, secrecy: Secrecy) -> Result<Zeroizing<Vec<u8>>, IdentityError> {
    let unreadable = |error: io::Error| IdentityError::unreadable(path, &error);
    let mut file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    check_mode(path, &metadata, secrecy)?;
    let length = metadata.len().min(FILE_BYTES_MAX);
    // Room for all of it at once: a vector that grows leaves copies of a key behind.
    let mut content = Zeroizing::new(Vec::with_capacity(usize::try_from(length).unwrap_or(0) + 1));
    file.by_ref().take(FILE_BYTES_MAX + 1).read_to_end(&mut content).map_err(unreadable)?;
    if content.len() as u64 > FILE_BYTES_MAX {
        return Err(IdentityError::TooLarge { path: path.to_owned(), bytes_max: FILE_BYTES_MAX });
    }
    Ok(content)
}

/// As [`read`], for a file that may be absent.
pub(crate) fn read_optional(
    path: &Path,
    secrecy: Secrecy,
) -> Result<Option<Zeroizing<Vec<u8>>>, IdentityError> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Ok(_) | Err(_) => read(path, secrecy).map(Some),
    }
}

fn check_mode(path: &Path, metadata: &Metadata, secrecy: Secrecy) -> Result<(), IdentityError> {
    let mode = metadata.mode() & 0o777;
    let own_group = metadata.gid() == rustix::process::getegid().as_raw();
    match too_open(mode, own_group, secrecy) {
        None => Ok(()),
        Some(who) => Err(IdentityError::KeyMode {
            path: path.to_owned(),
            mode,
            who,
            chmod: if secrecy == Secrecy::App { "640" } else { "600" },
        }),
    }
}

/// Who has access to a key and should not.
fn too_open(mode: u32, own_group: bool, secrecy: Secrecy) -> Option<&'static str> {
    match secrecy {
        Secrecy::Public => None,
        Secrecy::Sidecar | Secrecy::App if mode & OTHERS != 0 => Some("everybody"),
        Secrecy::Sidecar if mode & GROUP != 0 && !own_group => Some("a group that is not this process's own"),
        Secrecy::App if mode & GROUP_BEYOND_READ != 0 => Some("its group, to write or run,"),
        Secrecy::Sidecar | Secrecy::App => None,
    }
}

/// What tells one version of a file from another without reading it. The time of the inode's change is in it, since a mended
/// mode changes nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    modified: (i64, i64),
    changed: (i64, i64),
    bytes: u64,
    inode: u64,
}

/// A file system keeps times by its kernel's tick: what is written twice within one has the same stamp both times.
const TICK_SECONDS_MAX: i64 = 1;

impl Stamp {
    /// Whether the file could still change without its stamp telling. True too where its clock is ahead of ours.
    pub(crate) fn is_fresh(&self, now_unix: i64) -> bool {
        self.modified.0.max(self.changed.0) + TICK_SECONDS_MAX >= now_unix
    }
}

/// `None` where the file is not there.
pub(crate) fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = path.metadata().ok()?;
    Some(Stamp {
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
        bytes: metadata.len(),
        inode: metadata.ino(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_trusted_once_its_tick_is_over() {
        let stamp = Stamp { modified: (100, 7), changed: (105, 0), bytes: 1, inode: 1 };
        for (now, fresh) in [(0, true), (105, true), (106, true), (107, false), (1000, false)] {
            assert_eq!(stamp.is_fresh(now), fresh, "{now}");
        }
    }

    #[test]
    fn a_mended_mode_changes_the_stamp() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        let before = stamp(file.path()).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        // Until the file system's clock has ticked.
        while stamp(file.path()).unwrap() == before {
            assert!(std::time::Instant::now() < deadline, "the stamp never changes");
            std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o600)).unwrap();
        }
    }

    #[test]
    fn keys_that_others_can_reach_are_refused() {
        let cases = [
            (0o600, false, Secrecy::Sidecar, true),
            (0o400, false, Secrecy::Sidecar, true),
            (0o640, true, Secrecy::Sidecar, true),
            (0o640, false, Secrecy::Sidecar, false),
            (0o620, false, Secrecy::Sidecar, false),
            (0o604, true, Secrecy::Sidecar, false),
            (0o602, true, Secrecy::Sidecar, false),
            (0o644, true, Secrecy::Sidecar, false),
            (0o640, false, Secrecy::App, true),
            (0o600, false, Secrecy::App, true),
            (0o660, true, Secrecy::App, false),
            (0o644, false, Secrecy::App, false),
            (0o601, false, Secrecy::App, false),
            (0o644, false, Secrecy::Public, true),
        ];
        for (mode, own_group, secrecy, fine) in cases {
            assert_eq!(too_open(mode, own_group, secrecy).is_none(), fine, "{mode:o} own group {own_group}");
        }
    }
}
