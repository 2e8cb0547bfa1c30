//! What did a run do, and what should a person look at?

use std::fmt;
use std::path::PathBuf;

/// What one run of [`crate::provision`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What was written, tightened or removed, in order.
    pub changes: Vec<Change>,
    /// How many files were good as they were.
    pub kept: usize,
    /// What was left alone although somebody should know of it.
    pub notes: Vec<String>,
}

/// One change on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What was done.
    pub action: Action,
    /// To what.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

/// What was done to a file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It was not there.
    Created,
    /// It was near its end; names, issuer and use are the same, the key is new.
    Renewed,
    /// It no longer fitted: names, issuer, use or key.
    Reissued,
    /// Other content: a copy of the authority's certificate, or a list of edge secrets.
    Rewritten,
    /// Its mode was too open.
    Tightened,
    /// Its owner or group was set.
    Given,
    /// Half-written, left by a run that was cut off.
    Removed,
}

impl Report {
    /// Whether the run left everything as it was.
    pub fn is_unchanged(&self) -> bool {
        self.changes.is_empty()
    }

    pub(crate) fn change(&mut self, action: Action, path: impl Into<PathBuf>, reason: impl Into<String>) {
        self.changes.push(Change { action, path: path.into(), reason: reason.into() });
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Created => "created",
            Self::Renewed => "renewed",
            Self::Reissued => "reissued",
            Self::Rewritten => "rewritten",
            Self::Tightened => "tightened",
            Self::Given => "given",
            Self::Removed => "removed",
        })
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<9}  {}", self.action, self.path.display())?;
        if !self.reason.is_empty() {
            write!(f, "  ({})", self.reason)?;
        }
        Ok(())
    }
}
