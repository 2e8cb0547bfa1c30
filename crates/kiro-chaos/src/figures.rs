//! What does a ledger say, beside the times at which something was broken and mended?

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ledger::{Ledger, Outcome, Record};

/// When what was done, by the load's clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// The hand was at it.
    pub(crate) broken: Duration,
    /// It was mended, or its time was over.
    pub(crate) mended: Duration,
    /// Whether somebody mended it: its replica comes back from then on, else from when it was broken.
    pub(crate) by_hand: bool,
}

/// What an experiment found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// Requests, all accounted for: the sum of the next four.
    pub(crate) requests: u64,
    /// Got what they asked for.
    pub(crate) answered: u64,
    /// Got another answer.
    pub(crate) refused: u64,
    /// Got none.
    pub(crate) lost: u64,
    /// Had waited for [`crate::load::PATIENCE`].
    pub(crate) late: u64,
    /// Statuses and codes of those that were refused, words of the system of those that were lost.
    pub(crate) words: BTreeMap<String, u64>,
    /// Of a hundred answers before anything was broken, 99 came within.
    pub(crate) p99_before_ms: Option<f64>,
    /// Half of those while it was broken.
    pub(crate) p50_during_ms: Option<f64>,
    /// 99 of a hundred.
    pub(crate) p99_during_ms: Option<f64>,
    /// From the fault to the last request that came due and got no good answer.
    pub(crate) last_error_ms: Option<f64>,
    /// The longest that somebody waited for a bad answer, or for none.
    pub(crate) worst_error_ms: Option<f64>,
    /// From the end of the fault to the first good answer by the replica in question.
    pub(crate) back_ms: Option<f64>,
    /// The share of the good answers, before anything was broken, that this replica gave, in percent.
    pub(crate) share_before_percent: Option<f64>,
    /// The share of the good answers, while it was broken, that this replica gave, in percent.
    pub(crate) share_percent: Option<f64>,
    /// Good answers a second while it was broken.
    pub(crate) goodput: f64,
    /// Errors before anything was broken: the mesh was not well, and the experiment is worth nothing.
    pub(crate) errors_before: u64,
    /// The most that a request was sent late, which is this program's fault.
    pub(crate) behind_ms: f64,
}

impl Figures {
    /// Of a ledger.
    pub(crate) fn of(ledger: &Ledger, times: Times, replica: Option<&str>) -> Self {
        let records = ledger.records();
        let count = |is: fn(&Record) -> bool| records.iter().filter(|record| is(record)).count() as u64;
        let is_during = |record: &&Record| record.due >= times.broken && record.due < times.mended;
        let during: Vec<&Record> = records.iter().filter(is_during).collect();
        let before: Vec<&Record> = records.iter().filter(|record| record.ended < times.broken).collect();
        let bad = || records.iter().filter(|record| !record.is_good() && record.ended >= times.broken);
        let seconds = times.mended.saturating_sub(times.broken).as_secs_f64();
        let good_during = during.iter().filter(|record| record.is_good()).count();
        Self {
            requests: records.len() as u64,
            answered: count(Record::is_good),
            refused: count(|record| matches!(record.outcome, Outcome::Refused { .. })),
            lost: count(|record| matches!(record.outcome, Outcome::Lost { .. })),
            late: count(|record| matches!(record.outcome, Outcome::Late)),
            words: words(records),
            p99_before_ms: quantile(&before, 0.99),
            p50_during_ms: quantile(&during, 0.5),
            p99_during_ms: quantile(&during, 0.99),
            last_error_ms: bad().map(|record| ms(record.due.saturating_sub(times.broken))).reduce(f64::max),
            worst_error_ms: bad().map(|record| ms(record.waited())).reduce(f64::max),
            back_ms: replica.and_then(|replica| back(records, times, replica)),
            share_before_percent: replica.and_then(|replica| share(&before, replica)),
            share_percent: replica.and_then(|replica| share(&during, replica)),
            goodput: if seconds > 0.0 { good_during as f64 / seconds } else { 0.0 },
            errors_before: before.iter().filter(|record| !record.is_good()).count() as u64,
            behind_ms: records
                .iter()
                .map(|record| ms(record.sent.saturating_sub(record.due)))
                .fold(0.0, f64::max),
        }
    }

    /// Requests that did not get what they asked for.
    pub(crate) fn errors(&self) -> u64 {
        self.refused + self.lost + self.late
    }
}

fn ms(length: Duration) -> f64 {
    length.as_secs_f64() * 1e3
}

fn is_by(record: &Record, name: &str) -> bool {
    matches!(&record.outcome, Outcome::Answered { replica: Some(replica) } if replica == name)
}

/// How much of the good answers a replica gave, in percent.
fn share(records: &[&Record], replica: &str) -> Option<f64> {
    let good = records.iter().filter(|record| record.is_good()).count();
    let its = records.iter().filter(|record| is_by(record, replica)).count();
    (good > 0).then(|| its as f64 * 100.0 / good as f64)
}

/// From when it could be back to its first answer to a request that was due since then.
fn back(records: &[Record], times: Times, replica: &str) -> Option<f64> {
    if times.by_hand {
        let first = records.iter().filter(|record| record.due >= times.mended && is_by(record, replica));
        return first.map(|record| ms(record.ended.saturating_sub(times.mended))).reduce(f64::min);
    }
    // A crash: it still answers for a moment, then it does not, and then it does again, unless its silence lasts to the end.
    let since = records.iter().filter(|record| record.due >= times.broken && is_by(record, replica));
    let mut ends: Vec<f64> = since.map(|record| ms(record.ended.saturating_sub(times.broken))).collect();
    ends.sort_by(f64::total_cmp);
    let mut last = 0.0;
    let mut back = None;
    let mut longest = 0.0;
    for end in ends {
        if end - last > longest {
            longest = end - last;
            back = Some(end);
        }
        last = end;
    }
    let end = records.iter().map(|record| ms(record.due.saturating_sub(times.broken))).fold(0.0, f64::max);
    back.filter(|_| end - last <= longest)
}

/// Of the good answers, what so many came within.
fn quantile(records: &[&Record], quantile: f64) -> Option<f64> {
    let mut waits: Vec<f64> =
        records.iter().filter(|record| record.is_good()).map(|record| ms(record.waited())).collect();
    waits.sort_by(f64::total_cmp);
    let place = (waits.len() as f64 * quantile).ceil() as usize;
    waits.get(place.saturating_sub(1)).copied()
}

fn words(records: &[Record]) -> BTreeMap<String, u64> {
    let mut words = BTreeMap::new();
    for record in records {
        let word = match &record.outcome {
            Outcome::Answered { .. } => continue,
            Outcome::Refused { status, code: Some(code) } => format!("{status} {code}"),
            Outcome::Refused { status, code: None } => status.to_string(),
            Outcome::Lost { why } => why.clone(),
            Outcome::Late => "late".to_owned(),
        };
        *words.entry(word).or_default() += 1;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::tests::{good, record};

    fn refused() -> Outcome {
        Outcome::Refused { status: 502, code: Some("app_unreachable".to_owned()) }
    }

    fn figures(records: Vec<Record>, times: Times) -> Figures {
        let planned = u32::try_from(records.len()).unwrap();
        Figures::of(&Ledger::of(records, planned).unwrap(), times, Some("profile-1"))
    }

    #[test]
    fn every_request_is_in_one_of_four_places() {
        let times =
            Times { broken: Duration::from_millis(100), mended: Duration::from_millis(300), by_hand: true };
        let found = figures(
            vec![
                record(0, 0, 10, good("profile-1")),
                record(1, 90, 20, refused()),
                record(2, 150, 40, good("profile-2")),
                record(3, 200, 30, Outcome::Lost { why: "connection refused".to_owned() }),
                record(4, 250, 5_000, Outcome::Late),
                record(5, 290, 5, good("profile-2")),
                record(6, 310, 7, good("profile-1")),
            ],
            times,
        );
        assert_eq!((found.requests, found.answered, found.refused, found.lost, found.late), (7, 4, 1, 1, 1));
        assert_eq!(found.errors(), 3);
        assert_eq!(found.words.get("502 app_unreachable"), Some(&1));
        assert_eq!((found.last_error_ms, found.worst_error_ms), (Some(150.0), Some(5_000.0)));
        assert_eq!(
            (found.p99_before_ms, found.p50_during_ms, found.p99_during_ms),
            (Some(10.0), Some(5.0), Some(40.0))
        );
        assert_eq!(
            (found.share_before_percent, found.share_percent, found.back_ms),
            (Some(100.0), Some(0.0), Some(17.0))
        );
        assert!((found.goodput - 10.0).abs() < 1e-9);
        assert_eq!(found.errors_before, 0, "under way when it broke");
    }

    #[test]
    fn who_crashed_is_back_after_the_longest_silence() {
        let times =
            Times { broken: Duration::from_millis(100), mended: Duration::from_millis(900), by_hand: false };
        let at = |number, due| record(number, due, 1, good("profile-1"));
        let found = figures(vec![at(0, 50), at(1, 101), at(2, 110), at(3, 700), at(4, 800)], times);
        assert_eq!(found.back_ms, Some(601.0));
        let gone = figures(vec![at(0, 50), at(1, 101), record(2, 900, 1, good("profile-2"))], times);
        assert_eq!(gone.back_ms, None);
    }
}
