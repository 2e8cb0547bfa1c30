//! The document for people: `docs/performance.md`.

use std::fmt::Write as _;

use crate::plan::{Pair, Scenario};
use crate::records::{Record, Results};
use crate::report::plots::Plot;
use crate::report::table::{number, pair};
use crate::report::targets::{Met, PEERS, Row, evaluate};
use crate::stats::{Figure, Spread};

/// What stays the same from run to run.
const BEFORE: &str = include_str!("before.md");
const AFTER: &str = include_str!("after.md");

/// The whole document.
pub(crate) fn document(results: &Results, plots: &[Plot]) -> String {
    let mut text = String::from(BEFORE);
    text.push_str(&about(results));
    text.push_str(&targets(&evaluate(results)));
    text.push_str(&losses(results));
    text.push_str("\n## Plots\n\n");
    for plot in plots {
        // Writing to a String does not fail.
        let _ = writeln!(text, "![{}](performance/{}.svg)\n", plot.title, plot.name);
    }
    text.push_str(&figures(results));
    text.push_str(&left_out(results));
    text.push_str(AFTER);
    text
}

fn about(results: &Results) -> String {
    let versions: Vec<String> =
        results.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let rounds = results.records.iter().map(|record| record.rounds).min().unwrap_or_default();
    let warning = if results.quick {
        "\n**This was a quick run, to see that everything works: its figures are worth little.**\n"
    } else {
        ""
    };
    let rate = results
        .open_loop_rate
        .map_or(String::new(), |rate| format!(" The open loop's rate was {rate:.0} requests a second."));
    let notes: String = results.notes.iter().map(|note| format!(" {note}.")).collect();
    let notes = notes.replacen(" the run", " The run", 1);
    format!(
        "\n## The last run\n{warning}\n{date}, on {machine}. {versions}. At least {rounds} rounds of {seconds} s \
         each.{rate}{notes}\n",
        date = results.date,
        machine = results.machine,
        versions = versions.join(", "),
        seconds = results.seconds,
    )
}

fn targets(rows: &[Row]) -> String {
    let mut text = String::from(
        "\n## Targets\n\nRatios within this run. Of each pair the better number of workers counts, and is named \
         (`1w`, `2w`).\n\n| what | Kiro | compared with | ratio | must | aim | |\n|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let met = if row.met == Met::Missed { "**missed**" } else { row.met.word() };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {met} |",
            row.what,
            row.ours,
            row.theirs,
            row.ratio.map_or(String::new(), |ratio| format!("{ratio:.3}")),
            row.must,
            row.aim,
        );
    }
    text
}

/// Every figure in which a peer is better than Kiro with everything on.
fn losses(results: &Results) -> String {
    const FIGURES: [(Figure, &str, &str); 5] = [
        (Figure::CpuUs, "CPU a request", "µs"),
        (Figure::Rps, "requests a second", "/s"),
        (Figure::P50Ms, "p50", "ms"),
        (Figure::P99Ms, "p99", "ms"),
        (Figure::RssMb, "memory", "MB"),
    ];
    let mut lines = Vec::new();
    for scenario in Scenario::ALL {
        for connections in scenario.connections() {
            for (figure, name, unit) in FIGURES {
                let ask = |pair| {
                    results.best(pair, *scenario, *connections, figure).map(|(spread, _)| spread.median)
                };
                let Some(ours) = ask(Pair::KiroEverything) else { continue };
                let peers = PEERS.iter().filter_map(|peer| Some((*peer, ask(*peer)?)));
                let more_is_better = figure == Figure::Rps;
                let best = if more_is_better {
                    peers.max_by(|one, other| one.1.total_cmp(&other.1))
                } else {
                    peers.min_by(|one, other| one.1.total_cmp(&other.1))
                };
                let Some((peer, theirs)) = best else { continue };
                let loses = if more_is_better { ours < theirs } else { ours > theirs };
                if loses {
                    lines.push(format!(
                        "| {scenario}, c={connections} | {name} | {} {unit} | {} {unit} ({peer}) | {:.2} |\n",
                        number(Some(ours)),
                        number(Some(theirs)),
                        ours / theirs,
                    ));
                }
            }
        }
    }
    let void = void(results);
    if lines.is_empty() {
        return format!("\n## Where Kiro loses\n\nIn no figure that was measured in this run.\n{void}");
    }
    format!(
        "\n## Where Kiro loses\n\nEvery figure in which a peer, which neither signs nor asks a policy nor writes a log \
         nor counts, is better than Kiro with everything on.\n\n| work | figure | Kiro | the best peer | ratio \
         |\n|---|---|---|---|---|\n{}{void}",
        lines.concat()
    )
}

/// What Kiro did not do by the rules: a loss too.
fn void(results: &Results) -> String {
    let void = results.records.iter().filter(|record| record.pair.is_kiro()).filter_map(|record| {
        let reason = record.void.as_ref()?.lines().next().unwrap_or_default();
        let (scenario, connections) = (record.scenario, record.connections);
        Some(format!("- {scenario}, c={connections}: {} is void: {reason}\n", pair(record)))
    });
    let lines: String = void.collect();
    if lines.is_empty() {
        lines
    } else {
        format!("\nAnd what is void of Kiro's own, which counts as lost:\n\n{lines}")
    }
}

fn figures(results: &Results) -> String {
    let mut text = String::from(
        "## All figures\n\nMedians of the rounds, with the smallest and the largest in brackets. The number of workers of \
         each proxy stands behind the pair's name; the row that counts comes first, the other one is in `target/bench/results.json`.\n",
    );
    let mut last = None;
    for record in &results.records {
        let work = (record.scenario, record.connections);
        if last.replace(work) != Some(work) {
            let (scenario, connections) = work;
            let _ = write!(
                text,
                "\n### {scenario}, c={connections}\n\n| pair | {} | p50 ms | p99 ms | p99.9 ms | CPU µs/{} | MB |\n|---|---|---|---|---|---|---|\n",
                if scenario == Scenario::TcpStream { "MiB/s" } else { "req/s" },
                if scenario == Scenario::TcpStream { "MiB" } else { "req" },
            );
        }
        let _ = writeln!(text, "{}", figure_row(record));
    }
    text
}

fn figure_row(record: &Record) -> String {
    if let Some(void) = &record.void {
        let void: String = void.lines().next().unwrap_or_default().replace('|', "\\|");
        return format!("| {} | void: {void} | | | | | |", pair(record));
    }
    let cell = |spread: Option<Spread>| match spread {
        None => "–".to_owned(),
        Some(spread) => format!(
            "{} ({}…{})",
            number(Some(spread.median)),
            number(Some(spread.min)),
            number(Some(spread.max))
        ),
    };
    let spread = &record.spread;
    let cells =
        [spread.rps, spread.p50_ms, spread.p99_ms, spread.p999_ms, spread.cpu_us_per_request, spread.rss_mb];
    let tls = record.tls.as_ref().map_or(String::new(), |tls| format!(", {tls}"));
    format!("| {}{tls} | {} |", pair(record), cells.map(cell).join(" | "))
}

fn left_out(results: &Results) -> String {
    if results.left_out.is_empty() {
        return String::new();
    }
    let mut text = String::from("\n## Left out\n\n| work | pair | why |\n|---|---|---|\n");
    for left in &results.left_out {
        let reason = left.reason.lines().next().unwrap_or_default().replace('|', "\\|");
        let _ = writeln!(text, "| {} | {} | {reason} |", left.scenario, left.pair);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::tests::{record, results};
    use crate::report::plots;

    #[test]
    fn the_document_says_where_kiro_loses_and_what_was_left_out() {
        let mut void = record(Pair::HaproxyH1, Scenario::Small, 1, 1.0);
        void.void = Some("2 errors | more\nand more".to_owned());
        let mut lost = record(Pair::KiroEverything, Scenario::Idle, 1, 1.0);
        lost.void = Some("4096 of 10000".to_owned());
        let run = results(vec![
            record(Pair::KiroEverything, Scenario::Small, 1, 30.0),
            record(Pair::HaproxyH2, Scenario::Small, 1, 20.0),
            record(Pair::EnvoyH2, Scenario::Small, 1, 90.0),
            void,
            lost,
        ]);
        let text = document(&run, &plots::all(&run));
        for expected in [
            "| CPU a request, everything on, c=32 | 30.0 µs (kiro-everything, 1w) | 20.0 µs (haproxy-h2, 1w) | 1.500 |",
            "**missed**",
            "| small, c=32 | CPU a request | 30.0 µs | 20.0 µs (haproxy-h2) | 1.50 |",
            "| haproxy-h1 (1w) | void: 2 errors \\| more |",
            "| grpc-unary | nginx-h1 | no HTTP/2 |",
            "- idle, c=10000: kiro-everything (1w) is void: 4096 of 10000",
            "(performance/cpu-small.svg)",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
        assert!(!text.contains("small, c=32 | memory"), "equal is no loss\n{text}");
    }
}
