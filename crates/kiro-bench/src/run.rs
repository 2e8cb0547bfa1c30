//! In which order is everything measured? Scenario by scenario, and within one in rounds that alternate over the pairs, so that a
//! machine that slows down slows all of them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use time::OffsetDateTime;

use crate::load::Length;
use crate::measure::{Bench, Cell, FEW_SERVICES};
use crate::pairs::kiro;
use crate::plan::{Pair, Scenario};
use crate::records::{LeftOut, Record, Results, part};
use crate::stats::{Figure, Measured, over_rounds};
use crate::tools::Tools;
use crate::{Options, hostile, instructions, procfs, report, say};

/// Where everything goes.
const DIR: &str = "target/bench";
const ROUNDS: u32 = 3;
const SECONDS: u64 = 2;
const WARM_UP: Duration = Duration::from_secs(1);
/// Starts of a sidecar: each takes so little that there can be more of them.
const STARTS: usize = 11;

/// Runs, or only reports.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let dir = Path::new(DIR);
    let file = dir.join("results.json");
    if options.hostile {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot create {DIR}: run this where Cargo.toml lies"))?;
        return hostile::run(options, &kiro_proxy(options)?, dir);
    }
    if options.report {
        return report::write(&Results::read(&file)?, dir, true);
    }
    std::fs::create_dir_all(dir)
        .with_context(|| format!("cannot create {DIR}: run this where Cargo.toml lies"))?;
    if options.instructions {
        return instructions::run(&kiro_proxy(options)?, dir, &options.cases, options.accept);
    }
    let results = measure(options, dir)?;
    results.write(&file)?;
    let whole = options.pairs.is_empty() && options.scenarios.is_empty() && !options.quick;
    report::write(&results, dir, whole)
}

fn measure(options: &Options, dir: &Path) -> anyhow::Result<Results> {
    let kiro_proxy = kiro_proxy(options)?;
    let tools = Tools::find(dir, !options.no_install)?;
    tools.missing.iter().for_each(|line| say(line));
    let versions = tools.versions.clone();
    let seconds = options.seconds.unwrap_or(if options.quick { 1 } else { SECONDS });
    let length = Length { warm_up: WARM_UP, measured: Duration::from_secs(seconds) };
    let began = OffsetDateTime::now_utc();
    let mut bench = Bench::start(tools, dir, kiro_proxy, length)?;
    let pairs = chosen(Pair::ALL, &options.pairs);
    let mut left_out = Vec::new();
    let mut records = Vec::new();
    for scenario in chosen(Scenario::ALL, &options.scenarios) {
        let mut taking_part = Vec::new();
        for pair in &pairs {
            match bench.left_out(scenario, *pair) {
                None => taking_part.push(*pair),
                Some(reason) => left_out.push(LeftOut { pair: *pair, scenario, reason }),
            }
        }
        if scenario == Scenario::OpenLoop && !taking_part.is_empty() {
            bench.rate = Some(open_loop_rate(&mut bench, &records, &taking_part)?);
        }
        for connections in scenario.connections() {
            let cells = cells(scenario, &taking_part, *connections);
            records.extend(rounds(&mut bench, options, &cells)?);
        }
    }
    let (records, other_records) = part(records);
    let mut known = vec![("kiro".to_owned(), kiro_version())];
    known.extend(versions.into_iter().map(|(name, version)| (name.to_owned(), version)));
    Ok(Results {
        machine: procfs::machine(),
        date: began.date().to_string(),
        versions: known,
        quick: options.quick,
        seconds,
        open_loop_rate: bench.rate,
        records,
        other_records,
        left_out,
        notes: vec![format!("the run took {} minutes", (OffsetDateTime::now_utc() - began).whole_minutes())],
    })
}

/// All, or those that were asked for.
fn chosen<T: Copy + PartialEq>(all: &[T], asked: &[T]) -> Vec<T> {
    all.iter().copied().filter(|one| asked.is_empty() || asked.contains(one)).collect()
}

/// What is measured of a scenario at one concurrency, in the order of a round.
fn cells(scenario: Scenario, pairs: &[Pair], connections: usize) -> Vec<Cell> {
    let sizes: &[bool] =
        if matches!(scenario, Scenario::Growth | Scenario::Start) { &[false, true] } else { &[false] };
    let mut cells = Vec::new();
    for pair in pairs {
        // One thread shows growth and start best; a second one would only add to the time.
        let workers = if sizes.len() > 1 { &[1] } else { pair.workers() };
        for workers in workers {
            for large in sizes {
                cells.push(Cell { scenario, pair: *pair, workers: *workers, connections, large: *large });
            }
        }
    }
    cells
}

fn rounds(bench: &mut Bench, options: &Options, cells: &[Cell]) -> anyhow::Result<Vec<Record>> {
    let mut measured: Vec<Vec<Measured>> = vec![Vec::new(); cells.len()];
    let starts = cells.first().is_some_and(|cell| cell.scenario == Scenario::Start);
    let rounds = match options.rounds {
        Some(rounds) => rounds as usize,
        None if starts => STARTS,
        None if options.quick => 1,
        None => ROUNDS as usize,
    };
    for round in 1..=rounds {
        for (cell, measured) in cells.iter().zip(&mut measured) {
            let one = bench.measure(*cell)?;
            say(&progress(*cell, round, rounds, &one));
            measured.push(one);
        }
    }
    let grows = |cell: &Cell| matches!(cell.scenario, Scenario::Growth | Scenario::Start);
    let services =
        |cell: &Cell| grows(cell).then(|| if cell.large { kiro::services().len() } else { FEW_SERVICES });
    Ok(cells.iter().zip(&measured).map(|(cell, rounds)| Record::of(*cell, services(cell), rounds)).collect())
}

fn progress(cell: Cell, round: usize, rounds: usize, measured: &Measured) -> String {
    let show = |figure, digits: usize| {
        measured.figure(figure).map_or("-".to_owned(), |value| format!("{value:.digits$}"))
    };
    let void = measured.void.as_ref().map_or(String::new(), |void| format!("  VOID: {void}"));
    format!(
        "{:<12} c={:<5} {round}/{rounds} {:<15} {}w{} {:>8}/s  p50 {:>7} ms  p99 {:>7} ms  cpu {:>7} us  {:>6} MB{void}",
        cell.scenario,
        cell.connections,
        cell.pair,
        cell.workers,
        if cell.large { " large" } else { "" },
        show(Figure::Rps, 0),
        show(Figure::P50Ms, 2),
        show(Figure::P99Ms, 2),
        show(Figure::CpuUs, 1),
        show(Figure::RssMb, 1),
    )
}

/// Half of what the slowest pair can do at c=32, by what was measured of it or by a look now.
fn open_loop_rate(bench: &mut Bench, records: &[Record], pairs: &[Pair]) -> anyhow::Result<f64> {
    let mut slowest = f64::INFINITY;
    for pair in pairs {
        let known = records
            .iter()
            .filter(|record| {
                (record.pair, record.scenario, record.connections) == (*pair, Scenario::Small, 32)
            })
            .filter_map(|record| record.figure(Figure::Rps).map(|rps| rps.median))
            .max_by(f64::total_cmp);
        let capacity = match known {
            Some(capacity) => Some(capacity),
            None => {
                let workers = pair.workers().first().copied().unwrap_or_default();
                let cell =
                    Cell { scenario: Scenario::Small, pair: *pair, workers, connections: 32, large: false };
                over_rounds(&[bench.measure(cell)?], Figure::Rps).map(|rps| rps.median)
            }
        };
        slowest = slowest.min(capacity.unwrap_or(f64::INFINITY));
    }
    anyhow::ensure!(slowest.is_finite(), "no pair has a capacity to take half of");
    let rate = (slowest / 2.0).round();
    say(&format!("open loop at {rate} requests a second"));
    Ok(rate)
}

/// The crate's version and, where this is a working copy, the commit.
pub(crate) fn kiro_version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    commit().map_or(version.to_owned(), |commit| format!("{version} at {commit}"))
}

/// The commit, where this is a working copy.
pub(crate) fn commit() -> Option<String> {
    let asked = std::process::Command::new("git").args(["rev-parse", "--short", "HEAD"]).output().ok()?;
    asked.status.success().then(|| String::from_utf8_lossy(&asked.stdout).trim().to_owned())
}

fn kiro_proxy(options: &Options) -> anyhow::Result<PathBuf> {
    let file = match &options.kiro_proxy {
        Some(file) => file.clone(),
        None => std::env::current_exe().context("where is this program?")?.with_file_name("kiro-proxy"),
    };
    // Relative to here, and the programs' own directories are others.
    file.canonicalize().with_context(|| {
        format!("no sidecar at {}: `cargo build --release --package kiro-proxy` makes it", file.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_alternates_over_pairs_and_workers() {
        let cells = cells(Scenario::Small, &[Pair::KiroBare, Pair::HaproxyH2, Pair::Direct], 1);
        let order: Vec<_> = cells.iter().map(|cell| (cell.pair, cell.workers)).collect();
        let bare = [(Pair::KiroBare, 1), (Pair::KiroBare, 2)];
        assert_eq!(order[..2], bare);
        assert_eq!(order[2..], [(Pair::HaproxyH2, 1), (Pair::HaproxyH2, 2), (Pair::Direct, 0)]);
    }

    #[test]
    fn only_what_was_asked_for_in_the_order_of_the_plan() {
        assert_eq!(chosen(&[1, 2, 3], &[]), [1, 2, 3]);
        assert_eq!(chosen(&[1, 2, 3], &[3, 1]), [1, 3]);
    }
}
