//! What became of each request?
//!
//! A line for each that was planned: when it was due, when it was sent, when it was over, and how it ended. Nothing is left out, so that
//! "no errors" can't mean "nobody counted".

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::Serialize;

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub(crate) enum Outcome {
    /// With what was asked for.
    Answered {
        /// Which replica of Profile had a part in it.
        #[serde(skip_serializing_if = "Option::is_none")]
        replica: Option<String>,
    },
    /// With another answer.
    Refused {
        /// Its status.
        status: u16,
        /// The mesh's code, where the mesh said so.
        #[serde(skip_serializing_if = "Option::is_none")]
        code: Option<String>,
    },
    /// Without an answer: nobody took the connection, or it broke.
    Lost {
        /// The system's word.
        why: String,
    },
    /// There was none when the caller's patience ended.
    Late,
}

/// One request. Times count from the load's start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    /// Its place in the plan.
    pub(crate) number: u32,
    /// When it was to be sent.
    pub(crate) due: Duration,
    /// When it was sent.
    pub(crate) sent: Duration,
    /// When it was over.
    pub(crate) ended: Duration,
    /// How.
    pub(crate) outcome: Outcome,
}

impl Record {
    /// How long its user waited, from when it was due.
    pub(crate) fn waited(&self) -> Duration {
        self.ended.saturating_sub(self.due)
    }

    /// Whether it got what was asked for.
    pub(crate) fn is_good(&self) -> bool {
        matches!(self.outcome, Outcome::Answered { .. })
    }
}

/// All requests of one load, in the order of the plan.
#[derive(Debug)]
pub(crate) struct Ledger(Vec<Record>);

impl Ledger {
    /// Of these records, if each of the plan is there once.
    pub(crate) fn of(mut records: Vec<Record>, planned: u32) -> anyhow::Result<Self> {
        records.sort_by_key(|record| record.number);
        let complete = records.iter().map(|record| record.number).eq(0..planned);
        ensure!(complete, "{} of {planned} requests are accounted for", records.len());
        Ok(Self(records))
    }

    /// Its lines.
    pub(crate) fn records(&self) -> &[Record] {
        &self.0
    }

    /// Writes it, a line of JSON for each request.
    pub(crate) fn write(&self, file: &Path) -> anyhow::Result<()> {
        #[derive(Serialize)]
        struct Line<'a> {
            number: u32,
            due_us: u128,
            sent_us: u128,
            ended_us: u128,
            #[serde(flatten)]
            outcome: &'a Outcome,
        }
        let failed = || format!("cannot write {}", file.display());
        let mut out = std::io::BufWriter::new(std::fs::File::create(file).with_context(failed)?);
        for Record { number, due, sent, ended, outcome } in &self.0 {
            let (due_us, sent_us, ended_us) = (due.as_micros(), sent.as_micros(), ended.as_micros());
            let line = Line { number: *number, due_us, sent_us, ended_us, outcome };
            serde_json::to_writer(&mut out, &line).with_context(failed)?;
            out.write_all(b"\n").with_context(failed)?;
        }
        out.flush().with_context(failed)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record(number: u32, due_ms: u64, took_ms: u64, outcome: Outcome) -> Record {
        let due = Duration::from_millis(due_ms);
        Record { number, due, sent: due, ended: due + Duration::from_millis(took_ms), outcome }
    }

    pub(crate) fn good(replica: &str) -> Outcome {
        Outcome::Answered { replica: Some(replica.to_owned()) }
    }

    #[test]
    fn a_request_that_is_missing_or_there_twice_voids_it() {
        let line = |number| record(number, 0, 1, Outcome::Late);
        assert!(Ledger::of(vec![line(1), line(0)], 2).is_ok());
        for records in [vec![line(0)], vec![line(0), line(0)], vec![line(0), line(1), line(2)]] {
            assert!(Ledger::of(records, 2).is_err());
        }
    }

    #[test]
    fn a_line_says_what_became_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ledger");
        let refused = Outcome::Refused { status: 502, code: Some("app_unreachable".to_owned()) };
        let records = vec![record(0, 5, 2, good("profile-1")), record(1, 10, 1, refused)];
        Ledger::of(records, 2).unwrap().write(&file).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(
            text,
            "{\"number\":0,\"due_us\":5000,\"sent_us\":5000,\"ended_us\":7000,\"outcome\":\"answered\",\"replica\":\"profile-1\"}\n\
             {\"number\":1,\"due_us\":10000,\"sent_us\":10000,\"ended_us\":11000,\"outcome\":\"refused\",\"status\":502,\"code\":\"app_unreachable\"}\n"
        );
    }
}
