//! How do people see a run? A line for each experiment, `target/chaos/results.json`, and `docs/resilience.md`.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use kiro_bench::say;
use serde::{Deserialize, Serialize};

use crate::experiments::Experiment;
use crate::figures::Figures;
use crate::judge::{Beside, Expect};

const FILE: &str = "results.json";
/// What stays the same from run to run.
const BEFORE: &str = include_str!("before.md");

/// What became of a promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// It was kept.
    Kept,
    /// It was broken.
    Broken,
    /// It can't be tried on this machine.
    Skipped,
    /// The experiment went wrong and says nothing.
    Void,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Broken => "BROKEN",
            Self::Skipped => "SKIPPED",
            Self::Void => "VOID",
        }
    }
}

/// What an experiment gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Result {
    /// Its name.
    pub(crate) name: String,
    /// What was promised.
    pub(crate) promise: String,
    /// What became of it.
    pub(crate) verdict: Verdict,
    /// Requests a second.
    pub(crate) rate: Option<u32>,
    /// What the mesh could do, where that was measured.
    pub(crate) capacity: Option<u32>,
    /// What was found.
    pub(crate) figures: Option<Figures>,
    /// The figures that people want to see, in words.
    pub(crate) said: String,
    /// Those parts of the promise that were broken.
    pub(crate) broken: Vec<String>,
}

impl Result {
    /// Of a ledger's figures.
    pub(crate) fn of(experiment: &Experiment, rate: u32, figures: Figures, beside: Beside<'_>) -> Self {
        let is_broken = |expect: &&Expect| !expect.is_kept(&figures, beside);
        let broken: Vec<String> =
            experiment.expects.iter().filter(is_broken).map(Expect::to_string).collect();
        Self {
            verdict: if broken.is_empty() { Verdict::Kept } else { Verdict::Broken },
            rate: Some(rate),
            capacity: beside.capacity,
            said: in_words(&figures, rate, beside.capacity),
            figures: Some(figures),
            broken,
            ..Self::without(experiment, Verdict::Kept, String::new())
        }
    }

    /// Of an experiment that gave no figures.
    pub(crate) fn without(experiment: &Experiment, verdict: Verdict, said: String) -> Self {
        Self {
            name: experiment.name.to_owned(),
            promise: experiment.promise.to_owned(),
            verdict,
            rate: None,
            capacity: None,
            figures: None,
            said,
            broken: Vec::new(),
        }
    }

    /// Of containers that were told to end.
    pub(crate) fn stops(experiment: &Experiment, took: &[(&str, f64)], within_ms: f64) -> Self {
        let said: Vec<_> = took.iter().map(|(container, ms)| format!("{container} {ms:.0} ms")).collect();
        let late = took.iter().filter(|(_, ms)| *ms > within_ms);
        let broken: Vec<_> =
            late.map(|(container, _)| format!("{container} within {within_ms} ms")).collect();
        let verdict = if broken.is_empty() { Verdict::Kept } else { Verdict::Broken };
        Self { broken, ..Self::without(experiment, verdict, said.join(", ")) }
    }
}

/// All of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Results {
    /// Where.
    pub(crate) machine: String,
    /// When.
    pub(crate) date: String,
    /// How long it took.
    pub(crate) minutes: i64,
    /// What else the machine had to do: its load average before the mesh was brought up.
    pub(crate) load_before: f64,
    /// In the order of the run.
    pub(crate) experiments: Vec<Result>,
}

impl Results {
    /// Those of the last run.
    pub(crate) fn read(dir: &Path) -> anyhow::Result<Self> {
        let file = dir.join(FILE);
        let bytes = std::fs::read(&file)
            .with_context(|| format!("no results in {}: run without --report", file.display()))?;
        serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not of this version: run it again", file.display()))
    }

    /// Keeps them.
    pub(crate) fn write(&self, dir: &Path) -> anyhow::Result<()> {
        let file = dir.join(FILE);
        let text = serde_json::to_string_pretty(self).context("figures that are no numbers")?;
        std::fs::write(&file, text + "\n").with_context(|| format!("cannot write {}", file.display()))
    }
}

/// Writes the page, the project's own after a whole run, else a copy; true where every promise was kept.
pub(crate) fn write(results: &Results, dir: &Path, whole: bool) -> anyhow::Result<bool> {
    let page = if whole { Path::new("docs/resilience.md").to_owned() } else { dir.join("resilience.md") };
    std::fs::write(&page, document(results)).with_context(|| format!("cannot write {}", page.display()))?;
    let count = |verdict| results.experiments.iter().filter(|one| one.verdict == verdict).count();
    say(&format!(
        "\n{} kept, {} broken, {} skipped, {} void; written: {} and {}",
        count(Verdict::Kept),
        count(Verdict::Broken),
        count(Verdict::Skipped),
        count(Verdict::Void),
        dir.join(FILE).display(),
        page.display()
    ));
    Ok(count(Verdict::Broken) + count(Verdict::Void) == 0)
}

/// An experiment in a line.
pub(crate) fn line(result: &Result) -> String {
    let broken =
        if result.broken.is_empty() { String::new() } else { format!(": {}", result.broken.join("; ")) };
    format!("{:<20} {} | {} | {}{broken}", result.name, result.promise, result.said, result.verdict.word())
}

fn in_words(figures: &Figures, rate: u32, capacity: Option<u32>) -> String {
    let mut text = format!("{} requests at {rate}/s", figures.requests);
    if let Some(capacity) = capacity {
        let _ = write!(text, ", the mesh can do {capacity}/s and did {:.0}/s", figures.goodput);
    }
    let _ = match figures.errors() {
        0 => write!(text, ", no error"),
        errors => {
            let Figures { refused, lost, late, .. } = figures;
            let words: Vec<_> =
                figures.words.iter().map(|(word, count)| format!("{word} ×{count}")).collect();
            write!(
                text,
                ", {errors} errors ({refused} refused, {lost} lost, {late} late: {})",
                words.join(", ")
            )
        }
    };
    let mut figure = |name: &str, value: Option<f64>, unit: &str| {
        if let Some(value) = value {
            let _ = write!(text, ", {name} {value:.0} {unit}");
        }
    };
    figure("the last one due after", figures.last_error_ms, "ms");
    figure("told within", figures.worst_error_ms, "ms");
    figure("p99 before", figures.p99_before_ms, "ms");
    figure("p50 during", figures.p50_during_ms, "ms");
    figure("p99 during", figures.p99_during_ms, "ms");
    figure("replica's share", figures.share_percent, "%");
    figure("replica back after", figures.back_ms, "ms");
    figure("load late by", Some(figures.behind_ms).filter(|behind| *behind > 100.0), "ms");
    text
}

fn document(results: &Results) -> String {
    let mut text = String::from(BEFORE);
    let Results { machine, date, minutes, load_before, experiments } = results;
    // Writing to a String does not fail.
    let _ = write!(
        text,
        "\n## The last run\n\n{date}, on {machine}, which made the load as well; {minutes} minutes. Its load average \
         was {load_before:.1} before the mesh was brought up.\n\n\
         | experiment | promise | figures | |\n|---|---|---|---|\n"
    );
    for result in experiments {
        let said = result.said.lines().next().unwrap_or_default().replace('|', "\\|");
        let broken =
            if result.broken.is_empty() { String::new() } else { format!(": {}", result.broken.join("; ")) };
        let word = result.verdict.word();
        let word = if result.verdict == Verdict::Kept { word.to_owned() } else { format!("**{word}**") };
        let _ = writeln!(text, "| {} | {} | {said} | {word}{broken} |", result.name, result.promise);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiments::ALL;

    fn results() -> Results {
        let by_name = |name: &str| ALL.iter().find(|experiment| experiment.name == name).unwrap();
        let figures = Figures {
            requests: 100,
            answered: 96,
            refused: 4,
            words: [("502 app_unreachable".to_owned(), 4)].into(),
            last_error_ms: Some(40.0),
            worst_error_ms: Some(3.0),
            back_ms: Some(900.0),
            ..Figures::default()
        };
        Results {
            machine: "a machine".to_owned(),
            date: "2026-01-01".to_owned(),
            minutes: 9,
            load_before: 0.5,
            experiments: vec![
                Result::of(by_name("kill-app"), 200, figures, Beside::default()),
                Result::without(by_name("delay-packets"), Verdict::Skipped, "no | netem\nat all".to_owned()),
                Result::stops(by_name("stop-idle"), &[("profile-1", 7.0)], 100.0),
            ],
        }
    }

    #[test]
    fn a_line_has_name_promise_figures_and_verdict() {
        let line = line(&results().experiments[0]);
        for part in
            ["kill-app ", "kill -9 of a replica's", "502 app_unreachable ×4", "| BROKEN: at most 3 errors"]
        {
            assert!(line.contains(part), "{part}\n{line}");
        }
    }

    #[test]
    fn the_page_has_a_row_for_each() {
        let page = document(&results());
        for part in
            ["**BROKEN**: at most 3 errors |", "| no \\| netem | **SKIPPED** |", "| profile-1 7 ms | kept |"]
        {
            assert!(page.contains(part), "{part}\n{page}");
        }
    }

    #[test]
    fn what_was_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        results().write(dir.path()).unwrap();
        assert_eq!(Results::read(dir.path()).unwrap(), results());
    }
}
