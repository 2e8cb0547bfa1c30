//! Which of the targets are met? Ratios within one run, since figures of two machines, or of two days, say nothing about each other.

use crate::measure::FEW_SERVICES;
use crate::plan::{GRPC_STREAMS, IDLE_CONNECTIONS, OPEN_LOOP_CONNECTIONS, Pair, Scenario};
use crate::records::{Record, Results};
use crate::report::table::number;
use crate::stats::{Figure, Spread};

/// Everybody else.
pub(crate) const PEERS: [Pair; 4] = [Pair::EnvoyH2, Pair::HaproxyH2, Pair::HaproxyH1, Pair::NginxH1];

/// How a target came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Met {
    /// Better than what was aimed at.
    Aim,
    /// As good as it must be.
    Must,
    /// Not as good as it must be.
    Missed,
    /// One of the two was not measured, or is void.
    Unknown,
}

impl Met {
    /// In a word or two.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Aim => "aim met",
            Self::Must => "must met",
            Self::Missed => "MISSED",
            Self::Unknown => "not measured",
        }
    }
}

/// A line of the table.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    /// What is compared.
    pub(crate) what: String,
    /// Kiro's figure.
    pub(crate) ours: String,
    /// What it is compared with.
    pub(crate) theirs: String,
    /// One through the other.
    pub(crate) ratio: Option<f64>,
    /// What must be.
    pub(crate) must: String,
    /// What is aimed at.
    pub(crate) aim: String,
    /// How it came out.
    pub(crate) met: Met,
}

/// One figure of one work.
#[derive(Debug, Clone, Copy)]
struct Question {
    scenario: Scenario,
    connections: usize,
    figure: Figure,
}

/// A pair's best figure, with the number of workers that gave it.
#[derive(Debug, Clone, Copy)]
struct Answer {
    pair: Pair,
    spread: Spread,
    workers: usize,
}

impl Answer {
    fn text(&self, unit: &str) -> String {
        format!("{} {unit} ({}, {}w)", number(Some(self.spread.median)), self.pair, self.workers)
    }
}

/// All targets of a run.
pub(crate) fn evaluate(results: &Results) -> Vec<Row> {
    let mut rows = Vec::new();
    rows.extend(small(results));
    rows.extend(latency(results));
    rows.extend(bodies(results));
    rows.extend(memory(results));
    rows.extend(growth(results));
    rows
}

fn small(results: &Results) -> Vec<Row> {
    let cpu = |connections| Question { scenario: Scenario::Small, connections, figure: Figure::CpuUs };
    let haproxy = [Pair::HaproxyH2];
    let row = |what: &str, ours, connections, rivals: &[Pair], must, aim| {
        ratio(results, what, ours, cpu(connections), rivals, must, aim)
    };
    vec![
        row("CPU a request, everything on, c=32", Pair::KiroEverything, 32, &haproxy, 1.3, Some(1.0)),
        row("CPU a request, everything on, c=32", Pair::KiroEverything, 32, &[Pair::EnvoyH2], 0.35, None),
        row("CPU a request, bare, c=32", Pair::KiroBare, 32, &haproxy, 1.05, Some(0.85)),
        row("CPU a request, everything on, c=1", Pair::KiroEverything, 1, &haproxy, 1.3, Some(1.0)),
        row("CPU a request, everything on, c=256", Pair::KiroEverything, 256, &haproxy, 1.3, Some(1.0)),
    ]
}

fn latency(results: &Results) -> Vec<Row> {
    let p50 = Question { scenario: Scenario::Small, connections: 1, figure: Figure::P50Ms };
    let mut first =
        ratio(results, "p50, everything on, c=1", Pair::KiroEverything, p50, &[Pair::HaproxyH2], 1.0, None);
    if first.met == Met::Must
        && let (Some(ours), Some(best)) =
            (answer(results, Pair::KiroEverything, p50), best_of(results, &PEERS, p50))
        && ours.spread.median <= best.spread.median
    {
        first.met = Met::Aim;
    }
    first.aim = "≤ the best peer's".to_owned();
    let at_256 = Question { scenario: Scenario::Small, connections: 256, figure: Figure::P99Ms };
    let open =
        Question { scenario: Scenario::OpenLoop, connections: OPEN_LOOP_CONNECTIONS, figure: Figure::P99Ms };
    vec![
        first,
        within_spread(results, "p99, everything on, c=256", at_256),
        within_spread(results, "p99, everything on, open loop", open),
    ]
}

fn bodies(results: &Results) -> Vec<Row> {
    let cpu = |scenario: Scenario, connections| Question { scenario, connections, figure: Figure::CpuUs };
    let down = cpu(Scenario::Down1m, 8);
    let up = cpu(Scenario::Up1m, 8);
    let grpc = cpu(Scenario::GrpcUnary, GRPC_STREAMS);
    let ours = Pair::KiroEverything;
    let mut rows = vec![
        ratio(results, "CPU, 1 MiB down, everything on", ours, down, &PEERS, 0.95, Some(0.8)),
        ratio(results, "CPU, 1 MiB up, bare", Pair::KiroBare, up, &PEERS, 0.95, Some(0.8)),
    ];
    if let (Some(everything), Some(bare)) = (answer(results, ours, up), answer(results, Pair::KiroBare, up)) {
        let share = (everything.spread.median - bare.spread.median) / everything.spread.median;
        rows.push(Row {
            what: format!("CPU, 1 MiB up: {:.0} % of it is digest, signature, log and policy", share * 100.0),
            ours: everything.text("µs"),
            theirs: bare.text("µs"),
            ratio: Some(everything.spread.median / bare.spread.median),
            must: "to be said".to_owned(),
            aim: String::new(),
            met: Met::Must,
        });
    }
    rows.push(ratio(results, "CPU, gRPC unary, everything on", ours, grpc, &[Pair::EnvoyH2], 0.6, Some(0.4)));
    rows
}

fn memory(results: &Results) -> Vec<Row> {
    let rss = |scenario, connections| Question { scenario, connections, figure: Figure::RssMb };
    let ours = Pair::KiroEverything;
    let small = rss(Scenario::Small, 32);
    let idle = rss(Scenario::Idle, IDLE_CONNECTIONS);
    let haproxy = [Pair::HaproxyH2, Pair::HaproxyH1];
    vec![
        ratio(
            results,
            "memory of the pair, everything on, c=32",
            ours,
            small,
            &[Pair::HaproxyH2],
            1.2,
            Some(1.0),
        ),
        ratio(
            results,
            "memory at 10,000 idle connections, everything on",
            ours,
            idle,
            &haproxy,
            2.0,
            Some(1.2),
        ),
    ]
}

fn growth(results: &Results) -> Vec<Row> {
    let sized = |scenario, few: bool| {
        let of_size = move |record: &&Record| {
            record.scenario == scenario
                && record.services.is_some_and(|services| (services == FEW_SERVICES) == few)
        };
        results.records.iter().find(of_size)
    };
    let figure = |scenario, few, figure| {
        sized(scenario, few).and_then(|record: &Record| record.figure(figure)).map(|spread| spread.median)
    };
    let (few, many) = (true, false);
    let cpu = (figure(Scenario::Growth, many, Figure::CpuUs), figure(Scenario::Growth, few, Figure::CpuUs));
    let rss = (figure(Scenario::Growth, many, Figure::RssMb), figure(Scenario::Growth, few, Figure::RssMb));
    let start = |few| figure(Scenario::Start, few, Figure::P50Ms);
    let ratio = cpu.0.zip(cpu.1).map(|(many, few)| many / few);
    let more = rss.0.zip(rss.1).map(|(many, few)| many - few);
    let text = |value: Option<f64>, unit: &str| format!("{} {unit}", number(value));
    let plain =
        |what: &str, ours, theirs, ratio, value: Option<f64>, must: (f64, &str), aim: Option<f64>| Row {
            what: what.to_owned(),
            ours,
            theirs,
            ratio,
            must: format!("≤ {} {}", must.0, must.1).trim_end().to_owned(),
            aim: aim.map_or(String::new(), |aim| format!("≤ {aim} {}", must.1)),
            met: judge(value, must.0, aim),
        };
    let size = "1,000 services, 10,000 lines";
    vec![
        plain(
            &format!("CPU a request with {size}, against 3 and 3"),
            text(cpu.0, "µs"),
            text(cpu.1, "µs"),
            ratio,
            ratio,
            (1.05, ""),
            None,
        ),
        plain(
            &format!("start with {size}"),
            text(start(many), "ms"),
            String::new(),
            None,
            start(many),
            (100.0, "ms"),
            None,
        ),
        plain(
            &format!("memory of the pair with {size}, against 3 and 3"),
            text(rss.0, "MB"),
            text(rss.1, "MB"),
            None,
            more,
            (8.0, "MB more"),
            None,
        ),
        plain(
            "sidecar start to ready",
            text(start(few), "ms"),
            String::new(),
            None,
            start(few),
            (50.0, "ms"),
            Some(20.0),
        ),
    ]
}

fn answer(results: &Results, pair: Pair, asked: Question) -> Option<Answer> {
    let (spread, workers) = results.best(pair, asked.scenario, asked.connections, asked.figure)?;
    Some(Answer { pair, spread, workers })
}

fn best_of(results: &Results, pairs: &[Pair], asked: Question) -> Option<Answer> {
    let answers = pairs.iter().filter_map(|pair| answer(results, *pair, asked));
    answers.min_by(|one, other| one.spread.median.total_cmp(&other.spread.median))
}

fn judge(value: Option<f64>, must: f64, aim: Option<f64>) -> Met {
    match (value, aim) {
        (None, _) => Met::Unknown,
        (Some(value), _) if value > must => Met::Missed,
        (Some(value), Some(aim)) if value <= aim => Met::Aim,
        (Some(_), None) => Met::Aim,
        (Some(_), Some(_)) => Met::Must,
    }
}

fn unit(figure: Figure) -> &'static str {
    match figure {
        Figure::Rps => "/s",
        Figure::P50Ms | Figure::P99Ms | Figure::P999Ms => "ms",
        Figure::CpuUs => "µs",
        Figure::RssMb => "MB",
    }
}

/// Ours through the best of the rivals'.
fn ratio(
    results: &Results,
    what: &str,
    pair: Pair,
    asked: Question,
    rivals: &[Pair],
    must: f64,
    aim: Option<f64>,
) -> Row {
    let (ours, best) = (answer(results, pair, asked), best_of(results, rivals, asked));
    let ratio = ours.zip(best).map(|(ours, best)| ours.spread.median / best.spread.median);
    let against = match rivals {
        [one] => one.name(),
        [Pair::HaproxyH2, Pair::HaproxyH1] => "HAProxy",
        _ => "the best peer",
    };
    let text =
        |answer: Option<Answer>| answer.map_or("–".to_owned(), |answer| answer.text(unit(asked.figure)));
    Row {
        what: what.to_owned(),
        ours: text(ours),
        theirs: text(best),
        ratio,
        must: format!("≤ {must} × {against}"),
        aim: aim.map_or(String::new(), |aim| format!("≤ {aim} ×")),
        met: judge(ratio, must, aim),
    }
}

/// Ours must lie within what the best peer's rounds reach.
fn within_spread(results: &Results, what: &str, asked: Question) -> Row {
    let (ours, best) = (answer(results, Pair::KiroEverything, asked), best_of(results, &PEERS, asked));
    let ratio = ours.zip(best).map(|(ours, best)| ours.spread.median / best.spread.median);
    let met = match ours.zip(best) {
        None => Met::Unknown,
        Some((ours, best)) if ours.spread.median <= 0.8 * best.spread.median => Met::Aim,
        Some((ours, best)) if ours.spread.median <= best.spread.max => Met::Must,
        Some(_) => Met::Missed,
    };
    let text = |answer: Option<Answer>| answer.map_or("–".to_owned(), |answer| answer.text("ms"));
    let reach = best.map_or(String::new(), |best| format!(" (≤ {} ms)", number(Some(best.spread.max))));
    Row {
        what: what.to_owned(),
        ours: text(ours),
        theirs: text(best),
        ratio,
        must: format!("within the best peer's spread{reach}"),
        aim: "≤ 0.8 ×".to_owned(),
        met,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::tests::{record, results};

    fn row(ours: f64, theirs: f64) -> Row {
        let run = results(vec![
            record(Pair::KiroEverything, Scenario::Small, 1, ours),
            record(Pair::HaproxyH2, Scenario::Small, 1, theirs + 5.0),
            record(Pair::HaproxyH2, Scenario::Small, 2, theirs),
        ]);
        evaluate(&run).into_iter().next().unwrap()
    }

    #[test]
    fn a_ratio_is_judged_against_the_better_number_of_workers() {
        let table = [(20.0, 20.0, Met::Aim), (26.0, 20.0, Met::Must), (26.1, 20.0, Met::Missed)];
        for (ours, theirs, met) in table {
            let row = row(ours, theirs);
            assert_eq!((row.met, row.ratio), (met, Some(ours / theirs)), "{row:?}");
            assert!(row.theirs.contains("haproxy-h2, 2w"), "{row:?}");
        }
    }

    #[test]
    fn what_is_missing_or_void_is_not_judged() {
        let mut void = record(Pair::KiroEverything, Scenario::Small, 1, 1.0);
        void.void = Some("3 log lines lost".to_owned());
        let run = results(vec![void, record(Pair::HaproxyH2, Scenario::Small, 1, 20.0)]);
        assert!(evaluate(&run).iter().all(|row| row.met == Met::Unknown), "{:?}", evaluate(&run));
    }

    #[test]
    fn within_the_best_peers_spread() {
        let p99 = |pair, from: f64, to: f64| {
            let mut record = record(pair, Scenario::OpenLoop, 1, 1.0);
            record.spread.p99_ms = Spread::of(&[from, to]);
            record
        };
        let met = |ours: f64| {
            let run = results(vec![p99(Pair::KiroEverything, ours, ours), p99(Pair::NginxH1, 1.0, 3.0)]);
            evaluate(&run).into_iter().find(|row| row.what.contains("open loop")).unwrap().met
        };
        assert_eq!((met(1.6), met(2.9), met(3.1)), (Met::Aim, Met::Must, Met::Missed));
    }

    #[test]
    fn growth_compares_the_two_sizes() {
        let sized = |scenario, services, cpu: f64, rss: f64| {
            let mut record = record(Pair::KiroEverything, scenario, 1, cpu);
            record.services = Some(services);
            record.spread.rss_mb = Spread::of(&[rss]);
            record
        };
        let run = results(vec![
            sized(Scenario::Growth, 3, 20.0, 40.0),
            sized(Scenario::Growth, 1_000, 20.5, 50.0),
            sized(Scenario::Start, 3, 1.0, 0.0),
        ]);
        let rows = evaluate(&run);
        let met = |word: &str| rows.iter().find(|row| row.what.starts_with(word)).unwrap().met;
        assert_eq!(met("CPU a request with 1,000"), Met::Aim);
        assert_eq!(met("memory of the pair with"), Met::Missed);
        assert_eq!(met("start with"), Met::Unknown);
        assert_eq!(met("sidecar start"), Met::Aim);
    }
}
