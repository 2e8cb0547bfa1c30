//! What came of a run, over its rounds?

use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::attacks::{Attack, Door, SLACK_MIB};
use super::patience::Given;

/// Others are to be served within so many times what is normal.
pub(crate) const RATIO_MAX: f64 = 2.0;
/// MB (10^6 bytes) of a MiB.
pub(crate) const MB_PER_MIB: f64 = 1.048_576;

/// One measurement of one attack.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Round {
    /// The ordinary client's p99 with nobody else there.
    pub(crate) p99_without_ms: f64,
    /// The same while the attacker attacks something that only reads.
    pub(crate) p99_control_ms: f64,
    /// The same under attack.
    pub(crate) p99_with_ms: f64,
    /// The attacked sidecar's peak memory without.
    pub(crate) peak_without_mb: f64,
    /// And with.
    pub(crate) peak_with_mb: f64,
    /// The other sidecar's peak under attack.
    pub(crate) peak_other_mb: f64,
    /// The ordinary client's failures, of all that it asked.
    pub(crate) errors: u64,
    /// The attacker's connections.
    pub(crate) connections: u64,
    /// Those that were ended.
    pub(crate) cut: u64,
    /// Frames, chunks or lines a second.
    pub(crate) frames_per_second: f64,
    /// `kiro_abuse_total`: how much it grew.
    pub(crate) counted: u64,
    /// Lines that name the attacker.
    pub(crate) lines: u64,
    /// Lines that were counted instead.
    pub(crate) suppressed: u64,
    /// Whom they name.
    pub(crate) named: Option<String>,
    /// What is wrong with how the attacker was dealt with.
    pub(crate) complaint: Option<String>,
    /// Of a core, what the attacker took for itself under attack.
    pub(crate) attacker_cpu: f64,
    /// And in the control.
    pub(crate) control_cpu: f64,
}

/// An attack at a door, over all rounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What.
    pub(crate) attack: Attack,
    /// Where.
    pub(crate) door: Door,
    /// The door's p99 with nobody else there: the median of all of its rounds, whatever the attack.
    pub(crate) normal_ms: f64,
    /// What a sidecar may hold of it, in MB.
    pub(crate) bound_mb: f64,
    /// Each round.
    pub(crate) rounds: Vec<Round>,
}

/// A run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Results {
    /// Where.
    pub(crate) machine: String,
    /// When.
    pub(crate) date: String,
    /// Of which Kiro.
    pub(crate) version: String,
    /// One short round, to see that everything works.
    pub(crate) quick: bool,
    /// How long it took.
    pub(crate) seconds: u64,
    /// The ordinary client's requests a second.
    pub(crate) rate: f64,
    /// Each attack.
    pub(crate) records: Vec<Record>,
    /// Slow clients, which are given time.
    pub(crate) slow: Vec<Given>,
}

impl Results {
    /// Reads what was written.
    pub(crate) fn read(file: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(file)
            .with_context(|| format!("no run at {}: `make bench-hostile` makes one", file.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is none of ours", file.display()))
    }

    /// Writes all of it.
    pub(crate) fn write(&self, file: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self).context("no text")? + "\n";
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
    }

    /// What is not as it must be, one a line.
    pub(crate) fn missed(&self) -> Vec<String> {
        let attacks = self.records.iter().flat_map(|record| {
            let (attack, door) = (record.attack, record.door);
            record.missed().into_iter().map(move |what| format!("{attack} at {door}: {what}"))
        });
        let slow = self.slow.iter().filter(|given| !given.is_well()).map(|given| {
            let (reason, stated) = given.what.stated(given.door);
            let after = given.after_s.map_or("not at all".to_owned(), |after| format!("after {after:.0} s"));
            let named = given.named.as_deref().unwrap_or("nobody");
            let why = given.reason.as_deref().unwrap_or("no reason");
            format!(
                "a slow {} at {}: given up {after}, for {why}, with {named} named; stated is {reason} after {stated} s",
                given.what, given.door
            )
        });
        attacks.chain(slow).collect()
    }
}

impl Record {
    /// Over the rounds; `normals` are the p99s of its door with nobody else there.
    pub(crate) fn of(attack: Attack, door: Door, normals: &[f64], rounds: Vec<Round>) -> Self {
        let bound_mb = (attack.bound_mib(door) + SLACK_MIB) * MB_PER_MIB;
        Self { attack, door, normal_ms: median(normals.iter().copied()), bound_mb, rounds }
    }

    /// The median of a figure.
    pub(crate) fn median(&self, figure: impl Fn(&Round) -> f64) -> f64 {
        median(self.rounds.iter().map(figure))
    }

    /// The sum of a count.
    pub(crate) fn sum(&self, count: impl Fn(&Round) -> u64) -> u64 {
        self.rounds.iter().map(count).sum()
    }

    /// p99 under attack, in p99s with nobody else there.
    pub(crate) fn ratio(&self) -> f64 {
        self.median(|round| round.p99_with_ms) / self.normal_ms.max(f64::MIN_POSITIVE)
    }

    /// The same in p99s of the control.
    pub(crate) fn ratio_to_control(&self) -> f64 {
        let control = self.median(|round| round.p99_control_ms);
        self.median(|round| round.p99_with_ms) / control.max(f64::MIN_POSITIVE)
    }

    /// How much more the attacked sidecar held than without: the most of all rounds, since a bound is one.
    pub(crate) fn growth_mb(&self) -> f64 {
        self.rounds.iter().map(|round| round.peak_with_mb - round.peak_without_mb).fold(0.0, f64::max)
    }

    /// Whom the log names.
    pub(crate) fn named(&self) -> Option<&str> {
        self.rounds.iter().find_map(|round| round.named.as_deref())
    }

    /// What is not as it must be.
    pub(crate) fn missed(&self) -> Vec<String> {
        let mut missed = Vec::new();
        let ratio = self.ratio();
        if ratio > RATIO_MAX {
            missed.push(format!("others' p99 is {ratio:.2} x the normal one"));
        }
        let (growth, bound) = (self.growth_mb(), self.bound_mb);
        if growth > bound {
            missed.push(format!("{growth:.0} MB more, and {bound:.0} are stated"));
        }
        let errors = self.sum(|round| round.errors);
        if errors > 0 {
            missed.push(format!("{errors} requests of others failed"));
        }
        missed.extend(self.rounds.iter().find_map(|round| round.complaint.clone()));
        missed
    }
}

/// The middle one.
fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => figures.get(middle).copied().unwrap_or(f64::NAN),
        _ => figures.get(middle - 1..=middle).map_or(f64::NAN, |two| two.iter().sum::<f64>() / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round() -> Round {
        Round {
            p99_without_ms: 1.0,
            p99_control_ms: 1.2,
            p99_with_ms: 1.5,
            peak_without_mb: 20.0,
            peak_with_mb: 24.0,
            ..Round::default()
        }
    }

    fn record(rounds: Vec<Round>) -> Record {
        Record::of(Attack::Ping, Door::Outbound, &[0.9, 1.0, 1.1], rounds)
    }

    #[test]
    fn what_is_well_misses_nothing() {
        let record = record(vec![round(), round()]);
        assert_eq!(record.missed(), Vec::<String>::new());
        assert!((record.ratio() - 1.5).abs() < 1e-9 && (record.ratio_to_control() - 1.25).abs() < 1e-9);
    }

    #[test]
    fn each_must_is_seen_when_it_is_missed() {
        let worse = [
            (Round { p99_with_ms: 2.1, ..round() }, "others' p99"),
            (Round { peak_with_mb: 20.0 + 9.0 * MB_PER_MIB, ..round() }, "MB more"),
            (Round { errors: 1, ..round() }, "failed"),
            (Round { complaint: Some("no line".to_owned()), ..round() }, "no line"),
        ];
        for (round, word) in worse {
            let missed = record(vec![round]).missed();
            assert!(missed.len() == 1 && missed[0].contains(word), "{missed:?} lacks {word:?}");
        }
    }

    #[test]
    fn medians_of_odd_and_even() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        assert!(median(std::iter::empty()).is_nan());
    }
}
