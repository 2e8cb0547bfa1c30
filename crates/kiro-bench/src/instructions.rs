//! How many instructions does a request cost at each of the two sidecars? A figure that repeats where time does not, so that a change
//! that adds three in a hundred shows in review.
//!
//! Of a pair with everything on, one sidecar at a time runs under callgrind and serves requests one after the other: some to fill
//! pools and caches, then those that count. Twice, since a figure that does not repeat decides nothing. Traces are drawn by lot with a
//! chance of nothing: each request pays for the draw and for the headers, and no request for a span.
//!
//! The one thread that serves is counted. What reads files, writes the log and looks names up has threads of its own, whose work goes
//! with the time that passes, and valgrind makes that fifty times longer.

mod app;
mod callgrind;
mod cases;
mod kept;

use std::path::Path;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use self::callgrind::Callgrind;
pub(crate) use self::cases::Case;
use self::cases::Side;
use self::kept::Kept;
use crate::identity::{Identities, Issuer};
use crate::load::grpc;
use crate::pairs::kiro;
use crate::say;

/// How far two counts of the same may lie apart.
const SPREAD_MAX: f64 = 0.01;
/// How often everything is counted.
const ROUNDS: usize = 2;

/// What all counts share.
struct Setting<'a> {
    valgrind: Callgrind,
    kiro_proxy: &'a Path,
    identities: Identities,
    app: std::net::SocketAddr,
    grpc_app: std::net::SocketAddr,
    dir: std::path::PathBuf,
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    case: Case,
    side: Side,
    /// Instructions for one request: the mean of the rounds.
    instructions: u64,
    /// How far the rounds lie apart, in hundredths of the mean.
    spread_percent: f64,
    /// What was kept, and by how much in a hundred this is more.
    kept: Option<u64>,
    change_percent: Option<f64>,
}

/// Counts, writes `target/bench/instructions.json`, and compares with what was kept, or keeps it if asked to.
pub(crate) fn run(kiro_proxy: &Path, dir: &Path, only: &[Case], accept: bool) -> anyhow::Result<()> {
    let home = dir.join("instructions");
    std::fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    let home = home.canonicalize().with_context(|| format!("cannot find {}", home.display()))?;
    let services = kiro::services();
    let few =
        services.get(..crate::measure::FEW_SERVICES).context("fewer services than the mesh file has")?;
    let setting = Setting {
        valgrind: Callgrind::find()?,
        kiro_proxy,
        identities: Issuer::new()?.write(&home.join("identities"), few)?,
        app: app::start()?,
        grpc_app: grpc::start_app()?,
        dir: home,
    };
    let mut kept = Kept::read()?;
    let mut records = Vec::new();
    for (case, side) in cases::all().filter(|(case, _)| only.is_empty() || only.contains(case)) {
        let record = record(case, side, &rounds(&setting, case, side)?, kept.figure(case, side));
        say(&line(&record, &kept));
        records.push(record);
    }
    let text = serde_json::to_string_pretty(&records).context("no text")? + "\n";
    let file = dir.join("instructions.json");
    std::fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    if let Some(reason) = unsteady(&records) {
        bail!("{reason}");
    }
    if accept {
        return kept.write(&records, setting.valgrind.version());
    }
    match too_much(&records, &kept) {
        Some(reason) => bail!("{reason}"),
        None => Ok(()),
    }
}

fn rounds(setting: &Setting<'_>, case: Case, side: Side) -> anyhow::Result<Vec<u64>> {
    (0..ROUNDS).map(|_| cases::count(setting, case, side)).collect()
}

fn record(case: Case, side: Side, rounds: &[u64], kept: Option<u64>) -> Record {
    let instructions = rounds.iter().sum::<u64>() / (rounds.len().max(1) as u64);
    let (most, least) = (rounds.iter().max().copied(), rounds.iter().min().copied());
    let apart = most.unwrap_or_default() - least.unwrap_or_default();
    let percent = |part: f64, whole: u64| (part / (whole.max(1) as f64) * 10_000.0).round() / 100.0;
    Record {
        case,
        side,
        instructions,
        spread_percent: percent(apart as f64, instructions),
        kept,
        change_percent: kept.map(|kept| percent(instructions as f64 - kept as f64, kept)),
    }
}

fn line(record: &Record, kept: &Kept) -> String {
    let change = match (record.kept, record.change_percent) {
        (Some(figure), Some(change)) => format!("{change:+6.1} % since {} ({figure})", kept.since()),
        _ => "nothing kept".to_owned(),
    };
    format!(
        "{:<10} {:<8} {:>9} instructions a request, ±{:.2} %  {change}",
        record.case.name(),
        record.side.name(),
        record.instructions,
        record.spread_percent / 2.0
    )
}

/// Which figure does not repeat, if one does not.
fn unsteady(records: &[Record]) -> Option<String> {
    let bad = records.iter().find(|record| record.spread_percent > SPREAD_MAX * 100.0)?;
    Some(format!(
        "{} {}: two counts lie {} % apart, which decides nothing: is something else at the sidecars' ports?",
        bad.case.name(),
        bad.side.name(),
        bad.spread_percent
    ))
}

/// Which figures have grown too much, if any have.
fn too_much(records: &[Record], kept: &Kept) -> Option<String> {
    let grown: Vec<String> = records
        .iter()
        .filter(|record| record.change_percent.is_some_and(|change| change > kept::TOLERANCE_PERCENT))
        .map(|record| {
            let change = record.change_percent.unwrap_or_default();
            format!("{} {} {change:+.1} %", record.case.name(), record.side.name())
        })
        .collect();
    (!grown.is_empty()).then(|| {
        format!(
            "more than {} % since {}: {}. Make it lighter, or keep it with `make bench-instructions ARGS=--accept` and say in \
             the commit what it buys",
            kept::TOLERANCE_PERCENT,
            kept.since(),
            grown.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(now: [u64; 2], kept: u64) -> Vec<Record> {
        vec![record(Case::Get, Side::Outbound, &now, Some(kept))]
    }

    #[test]
    fn three_in_a_hundred_more_is_too_much() {
        let kept = Kept::default();
        assert_eq!(too_much(&records([103_000, 103_000], 100_000), &kept), None);
        let reason = too_much(&records([104_100, 104_300], 100_000), &kept).unwrap();
        assert!(reason.contains("get outbound +4.2 %"), "{reason}");
        assert_eq!(too_much(&records([90_000, 90_000], 100_000), &kept), None);
        assert_eq!(too_much(&[record(Case::Get, Side::Outbound, &[5], None)], &kept), None);
    }

    #[test]
    fn what_does_not_repeat_decides_nothing() {
        assert_eq!(unsteady(&records([100_000, 100_900], 100_000)), None);
        assert!(unsteady(&records([100_000, 101_200], 100_000)).unwrap().contains("get outbound"));
    }
}
