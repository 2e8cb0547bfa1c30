//! The figures of a run as a table of text.

use std::fmt::Write as _;

use crate::records::{Record, Results};
use crate::report::targets::Row;

/// A number with as many digits as a reader can use.
pub(crate) fn number(value: Option<f64>) -> String {
    match value {
        None => "–".to_owned(),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

/// What a record's pair is called in a table.
pub(crate) fn pair(record: &Record) -> String {
    let size = record.services.map_or(String::new(), |services| format!(", {services} services"));
    match record.workers {
        0 => format!("{}{size}", record.pair),
        workers => format!("{} ({workers}w{size})", record.pair),
    }
}

/// The whole run.
pub(crate) fn text(results: &Results) -> String {
    let mut text = String::new();
    let mut last = None;
    for record in &results.records {
        let work = (record.scenario, record.connections);
        if last.replace(work) != Some(work) {
            // Writing to a String does not fail.
            let _ = writeln!(
                text,
                "\n{:<34} {:>9} {:>9} {:>9} {:>9} {:>12} {:>8}",
                format!("{}, c={}", record.scenario, record.connections),
                "req/s",
                "p50 ms",
                "p99 ms",
                "p99.9 ms",
                "CPU us/req",
                "MB"
            );
        }
        let void = record.void.as_ref().map_or(String::new(), |void| format!("  VOID: {void}"));
        let _ = writeln!(
            text,
            "  {:<32} {:>9} {:>9} {:>9} {:>9} {:>12} {:>8}{void}",
            pair(record),
            number(record.rps),
            number(record.p50_ms),
            number(record.p99_ms),
            number(record.p999_ms),
            number(record.cpu_us_per_request),
            number(record.rss_mb),
        );
    }
    text
}

/// The targets.
pub(crate) fn targets(rows: &[Row]) -> String {
    let mut text = String::from("\ntargets, as ratios within this run\n");
    for row in rows {
        let ratio = row.ratio.map_or(String::new(), |ratio| format!("{ratio:.3}"));
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "  {:<12} {:<66} {ratio:>5}  {} : {}  (must {}{})",
            row.met.word(),
            row.what,
            row.ours,
            row.theirs,
            row.must,
            if row.aim.is_empty() { String::new() } else { format!(", aim {}", row.aim) },
        );
    }
    text
}
