//! How do people see a run? A table in the terminal, the targets, and `docs/performance.md` with plots.

mod markdown;
mod plots;
mod svg;
mod table;
mod targets;

use std::fs;
use std::path::Path;

use anyhow::Context as _;

use crate::records::Results;
use crate::say;

/// Prints the tables and writes the documents: the project's own after a whole run, else a copy below `dir`.
pub(crate) fn write(results: &Results, dir: &Path, whole: bool) -> anyhow::Result<()> {
    say(&table::text(results));
    say(&table::targets(&targets::evaluate(results)));
    for left in &results.left_out {
        say(&format!(
            "left out: {} {}: {}",
            left.scenario,
            left.pair,
            left.reason.lines().next().unwrap_or_default()
        ));
    }
    let docs = if whole { Path::new("docs").to_owned() } else { dir.join("docs") };
    let pictures = docs.join("performance");
    fs::create_dir_all(&pictures).with_context(|| format!("cannot create {}", pictures.display()))?;
    let plots = plots::all(results);
    for plot in &plots {
        put(&pictures.join(format!("{}.svg", plot.name)), &plot.svg)?;
    }
    let page = docs.join("performance.md");
    put(&page, &markdown::document(results, &plots))?;
    say(&format!("\nwritten: {} and {}", dir.join("results.json").display(), page.display()));
    Ok(())
}

fn put(file: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}
