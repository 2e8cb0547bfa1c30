//! Which figures were accepted last? They are kept in the repository, so that a change of them is seen in review.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::Record;
use super::cases::{Case, Side};
use crate::{procfs, run};

/// Where they are kept.
const FILE: &str = "docs/performance/instructions.json";
/// How much more than kept a figure may be, in a hundred.
pub(super) const TOLERANCE_PERCENT: f64 = 3.0;

/// The figures, and what they were counted with: another processor has other instructions for ciphers, another compiler other code.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Kept {
    commit: String,
    machine: String,
    valgrind: String,
    /// By case and then by side.
    figures: BTreeMap<String, BTreeMap<String, u64>>,
}

impl Kept {
    /// What is kept; nothing is no error.
    pub(super) fn read() -> anyhow::Result<Self> {
        if !Path::new(FILE).exists() {
            return Ok(Self::default());
        }
        let text = std::fs::read_to_string(FILE).with_context(|| format!("cannot read {FILE}"))?;
        serde_json::from_str(&text).with_context(|| format!("{FILE} is of another version: remove it"))
    }

    pub(super) fn figure(&self, case: Case, side: Side) -> Option<u64> {
        self.figures.get(case.name())?.get(side.name()).copied()
    }

    /// The commit that they were counted at.
    pub(super) fn since(&self) -> &str {
        if self.commit.is_empty() { "nothing" } else { &self.commit }
    }

    /// Keeps these in place of their predecessors.
    pub(super) fn write(&mut self, records: &[Record], valgrind: &str) -> anyhow::Result<()> {
        self.commit = run::commit().unwrap_or_else(|| "unknown".to_owned());
        self.machine = procfs::machine();
        self.valgrind = valgrind.to_owned();
        for record in records {
            let sides = self.figures.entry(record.case.name().to_owned()).or_default();
            sides.insert(record.side.name().to_owned(), record.instructions);
        }
        if let Some(dir) = Path::new(FILE).parent() {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let text = serde_json::to_string_pretty(self).context("no text")? + "\n";
        std::fs::write(FILE, text).with_context(|| format!("cannot write {FILE}"))
    }
}
