//! How does a file get its content, owner and mode, so that no reader ever sees half of it and no secret is ever too open?
//!
//! Everything goes through an open directory and never follows a link in it: a run as root must not be led elsewhere by whoever
//! can write there.

use std::fs::{File, Metadata, Permissions, TryLockError};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use zeroize::Zeroizing;

use crate::error::PkiError;

/// No certificate, key or list of secrets comes near this; what does is not ours, and is not read into memory.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// New content waits under this name's beginning until it is whole. What is left of a run that was cut off is found by it.
const UNFINISHED: &str = ".kiro-new-";

/// Who may do what with a file or directory. `None` leaves an owner as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) mode: u32,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

/// A file that was there.
pub(crate) struct Found {
    pub(crate) bytes: Zeroizing<Vec<u8>>,
    pub(crate) mode: u32,
    file: File,
    metadata: Metadata,
}

/// An open directory.
pub(crate) struct Folder {
    file: File,
    path: PathBuf,
}

/// What became of a mode or owner.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Settled {
    pub(crate) mode_before: u32,
    pub(crate) mode: u32,
    /// Owner or group were set.
    pub(crate) owner_changed: bool,
    /// Bits that the readers need and that are not there. They are told, not given: a mode is never weakened.
    pub(crate) missing: u32,
}

impl Folder {
    /// The directory, or `None` when there is nothing at this path. This one may be a link: a person named it.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>, PkiError> {
        match rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { file: File::from(fd), path: path.to_owned() })),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::NOTDIR) => Err(not_a_directory(path)),
            Err(error) => Err(PkiError::io(path, "open", error)),
        }
    }

    /// A directory in this one, or `None` when there is nothing of this name.
    pub(crate) fn open_child(&self, name: &str) -> Result<Option<Self>, PkiError> {
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.file, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { file: File::from(fd), path })),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::NOTDIR | Errno::LOOP) => Err(not_a_directory(&path)),
            Err(error) => Err(PkiError::io(path, "open", error)),
        }
    }

    /// A new directory in this one. It starts out closed to all others; `settle` opens it as far as it should be.
    pub(crate) fn create_child(&self, name: &str) -> Result<Self, PkiError> {
        let path = self.path.join(name);
        rustix::fs::mkdirat(&self.file, name, Mode::RWXU)
            .map_err(|error| PkiError::io(&path, "create", error))?;
        self.open_child(name)?.ok_or_else(|| PkiError::io(path, "open", Errno::NOENT))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps every other run out until this value is dropped. The lock is on the directory itself, so nothing is left lying about.
    pub(crate) fn lock(&self) -> Result<(), PkiError> {
        match self.file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => Err(PkiError::Busy { path: self.path.clone() }),
            Err(TryLockError::Error(error)) => Err(PkiError::io(&self.path, "lock", error)),
        }
    }

    /// A whole file, or `None` when there is nothing of this name.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Found>, PkiError> {
        let path = self.path.join(name);
        // Without NONBLOCK the opening of a pipe would wait for its writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let mut file = match rustix::fs::openat(&self.file, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => {
                return Err(PkiError::file(
                    path,
                    "is a link",
                    "put the file itself here, or remove the link and run `kiro certs`",
                ));
            }
            Err(error) => return Err(PkiError::io(path, "read", error)),
        };
        let failed = |error| PkiError::io(&path, "read", error);
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(PkiError::file(path, "is not a file", "move it away and run `kiro certs` again"));
        }
        let size = metadata.len();
        if size > FILE_BYTES_MAX {
            let what =
                format!("has {size} bytes, where {FILE_BYTES_MAX} are more than any certificate needs");
            return Err(PkiError::file(path, what, "move it away and run `kiro certs` again"));
        }
        // Room for all of it at once: a buffer that grows leaves copies of a key behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1));
        (&mut file).take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
        Ok(Some(Found { bytes, mode: mode_bits(&metadata), file, metadata }))
    }

    /// Puts a whole file in place at once, with its final owner and mode, and returns when it is on the disk.
    pub(crate) fn write(&self, name: &str, bytes: &[u8], access: Access) -> Result<(), PkiError> {
        let path = self.path.join(name);
        let failed = |error: std::io::Error| PkiError::io(&path, "write", error);
        let unfinished = format!("{UNFINISHED}{name}");
        let mut file = self.create(&unfinished).map_err(failed)?;
        let written = file
            .write_all(bytes)
            .and_then(|()| give(&file, access))
            .and_then(|()| file.sync_all())
            .and_then(|()| Ok(rustix::fs::renameat(&self.file, &unfinished, &self.file, name)?));
        if let Err(error) = written {
            // The first error is the one to tell; what stays behind is swept by the next run.
            let _ = rustix::fs::unlinkat(&self.file, &unfinished, AtFlags::empty());
            return Err(failed(error));
        }
        self.sync()
    }

    fn create(&self, name: &str) -> std::io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || rustix::fs::openat(&self.file, name, flags, Mode::RUSR | Mode::WUSR);
        let fd = match open() {
            // Left by a run that was cut off: its owner and content are anybody's guess.
            Err(Errno::EXIST) => {
                rustix::fs::unlinkat(&self.file, name, AtFlags::empty())?;
                open()?
            }
            opened => opened?,
        };
        Ok(File::from(fd))
    }

    /// Renames an entry; the target must be absent or an empty directory.
    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), PkiError> {
        rustix::fs::renameat(&self.file, from, &self.file, to)
            .map_err(|error| PkiError::io(self.path.join(to), "create", error))?;
        self.sync()
    }

    fn sync(&self) -> Result<(), PkiError> {
        match rustix::fs::fsync(&self.file) {
            // Some file systems (shares from another host) know no fsync of a directory.
            Ok(()) | Err(Errno::INVAL | Errno::NOTSUP) => Ok(()),
            Err(error) => Err(PkiError::io(&self.path, "write", error)),
        }
    }

    /// The names in this directory, in order.
    pub(crate) fn names(&self) -> Result<Vec<String>, PkiError> {
        let failed = |error| PkiError::io(&self.path, "list", error);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.file).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Removes what a run that was cut off left, and returns the names. Only for the one who holds the lock.
    pub(crate) fn sweep(&self) -> Result<Vec<String>, PkiError> {
        let unfinished: Vec<_> =
            self.names()?.into_iter().filter(|name| name.starts_with(UNFINISHED)).collect();
        for name in &unfinished {
            if let Some(folder) = self.open_child_if_directory(name)? {
                for inner in folder.names()? {
                    folder.remove(&inner, AtFlags::empty())?;
                }
                self.remove(name, AtFlags::REMOVEDIR)?;
            } else {
                self.remove(name, AtFlags::empty())?;
            }
        }
        Ok(unfinished)
    }

    /// The entry as a directory, or `None` for anything else.
    pub(crate) fn open_child_if_directory(&self, name: &str) -> Result<Option<Self>, PkiError> {
        let stat = rustix::fs::statat(&self.file, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| PkiError::io(self.path.join(name), "look at", error))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            self.open_child(name)
        } else {
            Ok(None)
        }
    }

    fn remove(&self, name: &str, flags: AtFlags) -> Result<(), PkiError> {
        rustix::fs::unlinkat(&self.file, name, flags)
            .map_err(|error| PkiError::io(self.path.join(name), "remove", error))
    }

    /// The mode of an entry, or `None` when there is nothing of this name. It need not be readable.
    pub(crate) fn mode(&self, name: &str) -> Result<Option<u32>, PkiError> {
        let path = self.path.join(name);
        match std::fs::symlink_metadata(&path) {
            Ok(metadata) => Ok(Some(mode_bits(&metadata))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(PkiError::io(path, "look at", error)),
        }
    }

    /// Sets the directory's own owner and mode, never more open than it was. `fresh`: it was made by this run.
    pub(crate) fn settle(&self, access: Access, fresh: bool) -> Result<Settled, PkiError> {
        let failed = |error| PkiError::io(&self.path, "set owner and mode of", error);
        let metadata = self.file.metadata().map_err(failed)?;
        settle(&self.file, &metadata, access, fresh).map_err(failed)
    }
}

impl Found {
    /// Sets owner and mode, never more open than they were.
    pub(crate) fn settle(&self, path: &Path, access: Access) -> Result<Settled, PkiError> {
        settle(&self.file, &self.metadata, access, false)
            .map_err(|error| PkiError::io(path, "set owner and mode of", error))
    }
}

fn not_a_directory(path: &Path) -> PkiError {
    PkiError::file(path, "is not a directory", "move it away and run `kiro certs` again")
}

fn mode_bits(metadata: &Metadata) -> u32 {
    metadata.mode() & 0o7777
}

fn settle(file: &File, metadata: &Metadata, access: Access, fresh: bool) -> std::io::Result<Settled> {
    let before = mode_bits(metadata);
    let mode = if fresh { access.mode } else { before & access.mode };
    let uid = access.uid.filter(|uid| *uid != metadata.uid());
    let gid = access.gid.filter(|gid| *gid != metadata.gid());
    let owner_changed = uid.is_some() || gid.is_some();
    if mode & before != before {
        // Shut first: a new group must not find the old mode, not for a moment.
        file.set_permissions(Permissions::from_mode(mode & before))?;
    }
    if owner_changed || mode != mode & before {
        give(file, Access { mode, uid, gid })?;
    }
    Ok(Settled { mode_before: before, mode, owner_changed, missing: access.mode & !mode })
}

/// Owner first, since a change of owner may clear bits of the mode.
fn give(file: &File, access: Access) -> std::io::Result<()> {
    if access.uid.is_some() || access.gid.is_some() {
        fchown(file, access.uid, access.gid)?;
    }
    file.set_permissions(Permissions::from_mode(access.mode))
}

/// Puts `bytes` at `path` unless they are there already, whole or not at all; returns whether it wrote. An existing file keeps its
/// owner and mode, a new one gets `mode_if_new`; a link is followed, so that it stays one.
pub fn write_if_changed(path: &Path, bytes: &[u8], mode_if_new: u32) -> Result<bool, PkiError> {
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let (Some(parent), Some(name)) = (target.parent(), target.file_name().and_then(|name| name.to_str()))
    else {
        return Err(PkiError::file(path, "is no name for a file", "name a file"));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let folder = Folder::open(parent)?.ok_or_else(|| PkiError::io(parent, "open", Errno::NOENT))?;
    let access = match folder.read(name)? {
        Some(found) if *found.bytes == bytes => return Ok(false),
        Some(found) => {
            Access { mode: found.mode, uid: Some(found.metadata.uid()), gid: Some(found.metadata.gid()) }
        }
        None => Access { mode: mode_if_new, uid: None, gid: None },
    };
    folder.write(name, bytes, access)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const SECRET: Access = Access { mode: 0o600, uid: None, gid: None };

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap().unwrap();
        (dir, folder)
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_file_is_replaced_whole_with_its_mode_and_nothing_is_left_beside_it() {
        let (dir, folder) = folder();
        folder.write("key", b"one", SECRET).unwrap();
        let first = std::fs::metadata(dir.path().join("key")).unwrap().ino();
        folder.write("key", b"two", SECRET).unwrap();
        assert_eq!(*folder.read("key").unwrap().unwrap().bytes, b"two");
        assert_ne!(
            std::fs::metadata(dir.path().join("key")).unwrap().ino(),
            first,
            "renamed into place, not written over"
        );
        assert_eq!(mode(&dir.path().join("key")), 0o600);
        assert_eq!(folder.names().unwrap(), ["key"]);
    }

    #[test]
    fn a_mode_is_tightened_and_never_weakened() {
        for (before, expected, missing) in [
            (0o644, 0o600, 0),
            (0o600, 0o600, 0),
            (0o400, 0o400, 0o200),
            (0o660, 0o600, 0),
            (0o4777, 0o600, 0),
        ] {
            let (dir, folder) = folder();
            let path = dir.path().join("key");
            std::fs::write(&path, "x").unwrap();
            chmod(&path, before);
            let settled = folder.read("key").unwrap().unwrap().settle(&path, SECRET).unwrap();
            assert_eq!((mode(&path), settled.missing), (expected, missing), "from {before:o}");
        }
    }

    #[test]
    fn links_pipes_directories_and_giants_are_refused_by_name() {
        let (dir, folder) = folder();
        symlink("/etc/passwd", dir.path().join("link")).unwrap();
        symlink("/etc", dir.path().join("way")).unwrap();
        std::fs::create_dir(dir.path().join("inner")).unwrap();
        rustix::fs::mknodat(&folder.file, "pipe", FileType::Fifo, Mode::RWXU, 0).unwrap();
        File::create(dir.path().join("giant")).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
        for (name, what) in
            [("link", "is a link"), ("inner", "is not a file"), ("pipe", "is not a file"), ("giant", "bytes")]
        {
            let error = folder.read(name).err().unwrap().to_string();
            assert!(error.contains(what) && error.contains(name), "{error}");
        }
        let error = folder.open_child("way").err().unwrap().to_string();
        assert!(error.contains("not a directory") && error.contains("way"), "{error}");
    }

    #[test]
    fn writing_over_a_link_replaces_the_link_and_not_what_it_points_to() {
        let (dir, folder) = folder();
        std::fs::write(dir.path().join("victim"), "precious").unwrap();
        symlink("victim", dir.path().join("key")).unwrap();
        folder.write("key", b"new", SECRET).unwrap();
        assert_eq!(std::fs::read(dir.path().join("victim")).unwrap(), b"precious");
        assert_eq!(*folder.read("key").unwrap().unwrap().bytes, b"new");
    }

    #[test]
    fn a_second_run_is_kept_out_while_the_first_is_at_work() {
        let (dir, first) = folder();
        let second = Folder::open(dir.path()).unwrap().unwrap();
        first.lock().unwrap();
        assert!(matches!(second.lock(), Err(PkiError::Busy { .. })));
        drop(first);
        second.lock().unwrap();
    }

    #[test]
    fn leftovers_of_a_cut_off_run_are_swept_and_nothing_else() {
        let (dir, folder) = folder();
        std::fs::write(dir.path().join(".kiro-new-leaf.key"), "half").unwrap();
        std::fs::create_dir(dir.path().join(".kiro-new-ca")).unwrap();
        std::fs::write(dir.path().join(".kiro-new-ca/ca.key"), "half").unwrap();
        std::fs::write(dir.path().join("leaf.key"), "whole").unwrap();
        assert_eq!(folder.sweep().unwrap(), [".kiro-new-ca", ".kiro-new-leaf.key"]);
        assert_eq!(folder.names().unwrap(), ["leaf.key"]);
        assert!(folder.sweep().unwrap().is_empty());
    }

    #[test]
    fn an_unwritable_directory_is_told_with_the_way_out() {
        let missing = Path::new("/nonexistent-kiro/certs/file");
        let error = write_if_changed(missing, b"x", 0o644).unwrap_err().to_string();
        assert!(error.contains("/nonexistent-kiro/certs") && error.contains("check the path"), "{error}");
    }

    #[test]
    fn a_persons_file_keeps_its_mode_and_its_link() {
        let (dir, _) = folder();
        let (real, link) = (dir.path().join("real.env"), dir.path().join(".env"));
        std::fs::write(&real, "A=1\n").unwrap();
        chmod(&real, 0o640);
        symlink(&real, &link).unwrap();
        assert!(write_if_changed(&link, b"A=2\n", 0o644).unwrap());
        assert!(!write_if_changed(&link, b"A=2\n", 0o644).unwrap());
        assert_eq!((std::fs::read(&real).unwrap().as_slice(), mode(&real)), (b"A=2\n".as_slice(), 0o640));
        assert!(link.is_symlink());
        let new = dir.path().join("new");
        assert!(write_if_changed(&new, b"x", 0o644).unwrap());
        assert_eq!(mode(&new), 0o644);
    }
}
