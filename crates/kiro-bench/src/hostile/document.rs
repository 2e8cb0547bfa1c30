//! How do people see a run? As a table in the terminal, and as a part of `docs/hostile-peers.md`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Context as _;

use super::attacks::{Expected, SLACK_MIB};
use super::records::{RATIO_MAX, Record, Results};

/// Between these two lines the document is this command's.
const BEGIN: &str = "<!-- `make bench-hostile` writes from here -->\n";
const END: &str = "<!-- to here -->\n";

/// The table for the terminal.
pub(crate) fn table(results: &Results) -> String {
    let mut text = format!(
        "{:<20} {:<9} {:>8} {:>8} {:>8} {:>6} {:>6} {:>7} {:>7} {:>7} {:>9} {:>5}  {}\n",
        "attack",
        "door",
        "p99 ms",
        "control",
        "under",
        "x",
        "x ctl",
        "MB",
        "more",
        "stated",
        "cut/conn",
        "err",
        "named"
    );
    for record in &results.records {
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "{:<20} {:<9} {:>8.2} {:>8.2} {:>8.2} {:>6.2} {:>6.2} {:>7.1} {:>7.1} {:>7.0} {:>9} {:>5}  {}",
            record.attack,
            record.door,
            record.normal_ms,
            record.median(|round| round.p99_control_ms),
            record.median(|round| round.p99_with_ms),
            record.ratio(),
            record.ratio_to_control(),
            record.median(|round| round.peak_without_mb),
            record.growth_mb(),
            record.bound_mb,
            format!("{}/{}", record.sum(|round| round.cut), record.sum(|round| round.connections)),
            record.sum(|round| round.errors),
            named(record),
        );
    }
    for given in &results.slow {
        let after = given.after_s.map_or("not at all".to_owned(), |after| format!("after {after:.1} s"));
        let named = given.named.as_deref().unwrap_or("nobody");
        let (reason, stated) = given.what.stated(given.door);
        let _ = writeln!(
            text,
            "slow {:<15} {:<9} given up {after}, stated {stated} s, {reason}: {named} for {}",
            given.what,
            given.door,
            given.reason.as_deref().unwrap_or("nothing")
        );
    }
    let missed = results.missed();
    let _ = writeln!(text, "\n{} musts missed", missed.len());
    for line in missed {
        let _ = writeln!(text, "MISSED  {line}");
    }
    text
}

fn named(record: &Record) -> String {
    match (record.named(), record.attack.expected()) {
        (Some(named), _) => {
            let (lines, more) = (record.sum(|round| round.lines), record.sum(|round| round.suppressed));
            format!("{named}, {lines} lines, {more} more counted")
        }
        (None, Expected::Served) => "served".to_owned(),
        (None, Expected::Later) => "later, see below".to_owned(),
        (None, Expected::Cut(_) | Expected::Rejected(_) | Expected::Refused(_)) => "NOBODY".to_owned(),
    }
}

/// Writes the run into the document.
pub(crate) fn write(results: &Results, document: &Path) -> anyhow::Result<()> {
    let text = fs::read_to_string(document)
        .with_context(|| format!("cannot read {}: run this where Cargo.toml lies", document.display()))?;
    let new = replaced(&text, &section(results))
        .with_context(|| format!("{} lacks the line {BEGIN:?} or {END:?} after it", document.display()))?;
    fs::write(document, new).with_context(|| format!("cannot write {}", document.display()))
}

fn replaced(text: &str, section: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some([before, BEGIN, section, END, after].concat())
}

fn section(results: &Results) -> String {
    let rounds = results.records.iter().map(|record| record.rounds.len()).min().unwrap_or_default();
    let mut text = format!(
        "\n{date}, on {machine}. Kiro {version}. {rounds} rounds, {rate:.0} requests a second of the ordinary client, {seconds} s in \
         all.\n",
        date = results.date,
        machine = results.machine,
        version = results.version,
        rate = results.rate,
        seconds = results.seconds,
    );
    if results.quick {
        text.push_str(
            "\n**This was a quick run, to see that everything works: its figures are worth little.**\n",
        );
    }
    text.push_str(
        "\n| attack | door | p99 normal | control | under attack | x normal | x control | memory | more | stated | cut off | named |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for record in &results.records {
        text.push_str(&row(record));
    }
    text.push_str(
        "\nSlow clients, one of each:\n\n| what stands still | door | given up after | stated | reason | named |\n|---|---|---|---|---|---|\n",
    );
    for given in &results.slow {
        let (reason, stated) = given.what.stated(given.door);
        let after = given.after_s.map_or("not within 90 s".to_owned(), |after| format!("{after:.1} s"));
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "| {} | {} | {after} | {stated} s | `{reason}` | {} |",
            given.what,
            given.door,
            given.named.as_deref().unwrap_or("**nobody**")
        );
    }
    let missed = results.missed();
    if missed.is_empty() {
        let _ = writeln!(
            text,
            "\nNo must is missed: others within {RATIO_MAX:.0} x their normal p99 and without a failure, memory within what is stated \
             (each figure has {SLACK_MIB:.0} MiB of allocator's slack in it), abusers cut off and named.\n"
        );
    } else {
        text.push_str("\nMissed:\n\n");
        for line in missed {
            let _ = writeln!(text, "- {line}");
        }
        text.push('\n');
    }
    text
}

fn row(record: &Record) -> String {
    let ratio = record.ratio();
    let ratio = if ratio > RATIO_MAX { format!("**{ratio:.2}**") } else { format!("{ratio:.2}") };
    format!(
        "| {} | {} | {:.2} ms | {:.2} ms | {:.2} ms | {ratio} | {:.2} | {:.1} MB | {:.1} MB | {:.0} MB | {} of {} | {} |\n",
        record.attack,
        record.door,
        record.normal_ms,
        record.median(|round| round.p99_control_ms),
        record.median(|round| round.p99_with_ms),
        record.ratio_to_control(),
        record.median(|round| round.peak_without_mb),
        record.growth_mb(),
        record.bound_mb,
        record.sum(|round| round.cut),
        record.sum(|round| round.connections),
        named(record),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_lines_is_replaced() {
        let text = format!("before\n{BEGIN}old\n{END}after\n");
        assert_eq!(replaced(&text, "new\n").unwrap(), format!("before\n{BEGIN}new\n{END}after\n"));
        assert_eq!(replaced("before\n", "new\n"), None);
        assert_eq!(replaced(&format!("{END}{BEGIN}"), "new\n"), None);
    }

    #[test]
    fn the_document_has_the_lines() {
        let text = include_str!("../../../../docs/hostile-peers.md");
        assert!(replaced(text, "").is_some(), "docs/hostile-peers.md has no place for a run");
    }
}
