//! What can go wrong, on which file, and what mends it?

use std::io;
use std::path::PathBuf;

/// Why certificates could not be made, kept or shown. Each names the file and the way out; none holds key material.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PkiError {
    /// The operating system refused something.
    #[error("{}: cannot {doing}: {cause}; {fix}", path.display())]
    Io {
        /// What it happened on.
        path: PathBuf,
        /// "read", "write", …
        doing: &'static str,
        /// The operating system's word. It stands in the message, so it is not a source of its own that a chain would repeat.
        cause: io::Error,
        /// What to do.
        fix: String,
    },
    /// A file is broken, somebody else's, or not where it belongs.
    #[error("{}: {what}; {fix}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What to do.
        fix: String,
    },
    /// Another run holds the directory.
    #[error("{}: another `kiro certs` is at work here; wait for it to end and run it again", path.display())]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// The authority there is was made for another trust domain than the mesh file has.
    #[error(
        "{}: this authority is for trust domain `{authority}`, but the mesh file says `{mesh}`; either put `trust_domain: {authority}` \
         back, or move the directory {} away and run `kiro certs` again: it then makes a new authority and issues every leaf anew, \
         and all sidecars have to be restarted together",
        path.display(),
        path.parent().unwrap_or(path).display()
    )]
    TrustDomain {
        /// The authority's certificate.
        path: PathBuf,
        /// The trust domain in it.
        authority: String,
        /// The one that the mesh file names.
        mesh: String,
    },
    /// Two services would share a directory.
    #[error(
        "service `{service}` needs the directory `{directory}`, which is also for {other}; rename the service in the mesh file"
    )]
    Clash {
        /// The service.
        service: String,
        /// The directory's name below the certificates' one.
        directory: String,
        /// Who else has it.
        other: String,
    },
    /// A certificate could not be made.
    #[error("cannot issue {what}: {cause}")]
    Issue {
        /// For what.
        what: String,
        /// The library's word.
        cause: String,
    },
}

impl PkiError {
    pub(crate) fn io(path: impl Into<PathBuf>, doing: &'static str, cause: impl Into<io::Error>) -> Self {
        let cause = cause.into();
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "the operating system knows more kinds than there is advice for"
        )]
        let fix = match cause.kind() {
            io::ErrorKind::PermissionDenied => {
                "run it as the user who made these files (`ls -ln` shows who that is), or with sudo"
                    .to_owned()
            }
            io::ErrorKind::ReadOnlyFilesystem => "mount or remount it writable".to_owned(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "make room on the disk and run it again".to_owned()
            }
            io::ErrorKind::NotFound => "check the path, and that its parent directory exists".to_owned(),
            _ => "mend that and run it again".to_owned(),
        };
        Self::Io { path: path.into(), doing, cause, fix }
    }

    pub(crate) fn file(path: impl Into<PathBuf>, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::File { path: path.into(), what: what.into(), fix: fix.into() }
    }

    pub(crate) fn issue(what: impl Into<String>, cause: impl std::fmt::Display) -> Self {
        Self::Issue { what: what.into(), cause: cause.to_string() }
    }
}
