//! What does a run leave for people and programs? `target/bench/results.json`.

use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::measure::Cell;
use crate::plan::{Pair, Scenario};
use crate::stats::{Figure, Measured, Spread, over_rounds};

/// A whole run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Results {
    /// What it ran on.
    pub(crate) machine: String,
    /// When it began, in UTC.
    pub(crate) date: String,
    /// Programs and their versions.
    pub(crate) versions: Vec<(String, String)>,
    /// Whether rounds were too short to be honest.
    pub(crate) quick: bool,
    /// Seconds that count of a round.
    pub(crate) seconds: u64,
    /// Requests a second of the open loop.
    pub(crate) open_loop_rate: Option<f64>,
    /// For each pair at each work the better number of workers.
    pub(crate) records: Vec<Record>,
    /// The others.
    pub(crate) other_records: Vec<Record>,
    /// What was not measured, and why.
    pub(crate) left_out: Vec<LeftOut>,
    /// What else there is to know.
    pub(crate) notes: Vec<String>,
}

/// One pair at one work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Whose proxies.
    pub(crate) pair: Pair,
    /// The work.
    pub(crate) scenario: Scenario,
    /// How much was under way at a time.
    pub(crate) connections: usize,
    /// Threads or processes of each proxy; 0 where there is none.
    pub(crate) workers: usize,
    /// Services in Kiro's mesh file, where that is the question.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) services: Option<usize>,
    /// How often it was measured.
    pub(crate) rounds: usize,
    /// Answers, of all rounds together; MiB in `tcp-stream`.
    pub(crate) requests: u64,
    /// Failures, of all rounds together.
    pub(crate) errors: u64,
    /// The median of requests a second.
    pub(crate) rps: Option<f64>,
    /// The median of the rounds' medians.
    pub(crate) p50_ms: Option<f64>,
    /// The median of what 99 % came within.
    pub(crate) p99_ms: Option<f64>,
    /// The median of what 99.9 % came within.
    pub(crate) p999_ms: Option<f64>,
    /// The median of the CPU time of both proxies for a request.
    pub(crate) cpu_us_per_request: Option<f64>,
    /// The median of the memory of both proxies under load.
    pub(crate) rss_mb: Option<f64>,
    /// How far the rounds lie apart.
    pub(crate) spread: Spreads,
    /// What the proxies agreed on, where that could be seen.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) tls: Option<String>,
    /// Which rule was broken; then the figures are worth nothing.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) void: Option<String>,
}

/// Smallest and largest of the rounds, for each figure.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Spreads {
    pub(crate) rps: Option<Spread>,
    pub(crate) p50_ms: Option<Spread>,
    pub(crate) p99_ms: Option<Spread>,
    pub(crate) p999_ms: Option<Spread>,
    pub(crate) cpu_us_per_request: Option<Spread>,
    pub(crate) rss_mb: Option<Spread>,
}

/// What was not measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct LeftOut {
    /// Whose proxies.
    pub(crate) pair: Pair,
    /// At which work.
    pub(crate) scenario: Scenario,
    /// Why not.
    pub(crate) reason: String,
}

impl Record {
    /// From the rounds of a cell.
    pub(crate) fn of(cell: Cell, services: Option<usize>, rounds: &[Measured]) -> Self {
        let over = |figure| over_rounds(rounds, figure);
        let spread = Spreads {
            rps: over(Figure::Rps),
            p50_ms: over(Figure::P50Ms),
            p99_ms: over(Figure::P99Ms),
            p999_ms: over(Figure::P999Ms),
            cpu_us_per_request: over(Figure::CpuUs),
            rss_mb: over(Figure::RssMb),
        };
        let median = |spread: Option<Spread>| spread.map(|spread| spread.median);
        Self {
            pair: cell.pair,
            scenario: cell.scenario,
            connections: cell.connections,
            workers: cell.workers,
            services,
            rounds: rounds.len(),
            requests: rounds.iter().map(|round| round.requests).sum(),
            errors: rounds.iter().map(|round| round.errors).sum(),
            rps: median(spread.rps),
            p50_ms: median(spread.p50_ms),
            p99_ms: median(spread.p99_ms),
            p999_ms: median(spread.p999_ms),
            cpu_us_per_request: median(spread.cpu_us_per_request),
            rss_mb: median(spread.rss_mb),
            spread,
            tls: rounds.iter().find_map(|round| round.tls.clone()),
            void: rounds.iter().find_map(|round| round.void.clone()),
        }
    }

    /// One of its figures with its spread; none of a void record.
    pub(crate) fn figure(&self, figure: Figure) -> Option<Spread> {
        let spread = match figure {
            Figure::Rps => self.spread.rps,
            Figure::P50Ms => self.spread.p50_ms,
            Figure::P99Ms => self.spread.p99_ms,
            Figure::P999Ms => self.spread.p999_ms,
            Figure::CpuUs => self.spread.cpu_us_per_request,
            Figure::RssMb => self.spread.rss_mb,
        };
        spread.filter(|_| self.void.is_none())
    }

    /// What two records must share to be two ways of running the same.
    fn key(&self) -> (Pair, Scenario, usize, Option<usize>) {
        (self.pair, self.scenario, self.connections, self.services)
    }

    /// Lower is better: by the scenario's figure, a void one last.
    fn rank(&self) -> f64 {
        self.figure(self.scenario.decides())
            .or_else(|| self.figure(Figure::P50Ms))
            .map_or(f64::INFINITY, |spread| spread.median)
    }
}

/// Parts the records into the better number of workers of each, and the rest.
pub(crate) fn part(records: Vec<Record>) -> (Vec<Record>, Vec<Record>) {
    let (mut better, mut others): (Vec<Record>, Vec<Record>) = Default::default();
    for record in records {
        match better.iter_mut().find(|known| known.key() == record.key()) {
            None => better.push(record),
            Some(known) if record.rank() < known.rank() => others.push(std::mem::replace(known, record)),
            Some(_) => others.push(record),
        }
    }
    (better, others)
}

impl Results {
    /// The best median of a figure over a pair's numbers of workers, and which number that was.
    pub(crate) fn best(
        &self,
        pair: Pair,
        scenario: Scenario,
        connections: usize,
        figure: Figure,
    ) -> Option<(Spread, usize)> {
        self.records
            .iter()
            .chain(&self.other_records)
            .filter(|record| {
                (record.pair, record.scenario, record.connections) == (pair, scenario, connections)
            })
            .filter_map(|record| Some((record.figure(figure)?, record.workers)))
            .min_by(|(one, _), (other, _)| one.median.total_cmp(&other.median))
    }

    /// Reads a run's results.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}: `make bench` writes it", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is of another version", path.display()))
    }

    /// Writes them.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self).context("results that can't be written")?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A record of one round.
    pub(crate) fn record(pair: Pair, scenario: Scenario, workers: usize, cpu_us: f64) -> Record {
        let connections = if scenario == Scenario::Small { 32 } else { scenario.connections()[0] };
        let cell = Cell { scenario, pair, workers, connections, large: false };
        let round = Measured {
            requests: 1_000,
            seconds: 2.0,
            p50_ms: Some(1.0),
            p99_ms: Some(2.0),
            p999_ms: Some(3.0),
            cpu_us: Some(cpu_us * 1_000.0),
            rss_mb: Some(20.0),
            ..Measured::default()
        };
        Record::of(cell, None, &[round])
    }

    /// A run with these records.
    pub(crate) fn results(records: Vec<Record>) -> Results {
        let (records, other_records) = part(records);
        Results {
            machine: "a machine".to_owned(),
            date: "2026-01-01".to_owned(),
            versions: vec![("nginx".to_owned(), "1".to_owned())],
            quick: false,
            seconds: 2,
            open_loop_rate: Some(5_000.0),
            records,
            other_records,
            left_out: vec![LeftOut {
                pair: Pair::NginxH1,
                scenario: Scenario::GrpcUnary,
                reason: "no HTTP/2".to_owned(),
            }],
            notes: Vec::new(),
        }
    }

    #[test]
    fn the_better_number_of_workers_counts_and_void_ones_never_do() {
        let mut void = record(Pair::KiroBare, Scenario::Small, 1, 1.0);
        void.void = Some("errors".to_owned());
        let run = results(vec![
            record(Pair::HaproxyH2, Scenario::Small, 1, 30.0),
            record(Pair::HaproxyH2, Scenario::Small, 2, 40.0),
            void,
            record(Pair::KiroBare, Scenario::Small, 2, 50.0),
        ]);
        let kept: Vec<_> = run.records.iter().map(|record| (record.pair, record.workers)).collect();
        assert_eq!(kept, [(Pair::HaproxyH2, 1), (Pair::KiroBare, 2)]);
        assert_eq!(run.other_records.len(), 2);
        let best = |pair| run.best(pair, Scenario::Small, 32, Figure::CpuUs).map(|(cpu, _)| cpu.median);
        assert_eq!((best(Pair::HaproxyH2), best(Pair::KiroBare)), (Some(30.0), Some(50.0)));
        assert_eq!(best(Pair::EnvoyH2), None);
    }

    #[test]
    fn the_file_has_the_agreed_shape() {
        let run = results(vec![record(Pair::KiroEverything, Scenario::Down1m, 1, 30.0)]);
        let json = serde_json::to_value(&run).unwrap();
        assert!(json["machine"].is_string());
        let first = json["records"][0].as_object().unwrap();
        let fields = [
            "pair",
            "scenario",
            "connections",
            "rounds",
            "requests",
            "errors",
            "rps",
            "p50_ms",
            "p99_ms",
            "p999_ms",
            "cpu_us_per_request",
            "rss_mb",
        ];
        for field in fields {
            assert!(first.contains_key(field), "{field}");
        }
        assert_eq!((&first["pair"], &first["scenario"]), (&"kiro-everything".into(), &"1m-down".into()));
        let again: Results = serde_json::from_value(json).unwrap();
        assert_eq!(again.records, run.records);
    }
}
