//! What do several rounds say together?

use serde::{Deserialize, Serialize};

/// One of the figures that rounds give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Figure {
    /// Requests a second; MiB a second in `tcp-stream`.
    Rps,
    /// Half of the answers came within.
    P50Ms,
    /// 99 of a hundred.
    P99Ms,
    /// 999 of a thousand.
    P999Ms,
    /// User and system time of both proxies for one request.
    CpuUs,
    /// Proportional set size of both proxies under load.
    RssMb,
}

/// The middle of the rounds and how far they lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    /// The middle one.
    pub(crate) median: f64,
    /// The smallest.
    pub(crate) min: f64,
    /// The largest.
    pub(crate) max: f64,
}

impl Spread {
    /// Of these values; `None` where there are none, or one is no number.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        if sorted.iter().any(|value| !value.is_finite()) {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        let median = if sorted.len() % 2 == 1 { upper } else { (upper + *sorted.get(middle - 1)?) / 2.0 };
        Some(Self { median, min, max })
    }
}

/// What one round of one pair at one work gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Measured {
    /// Requests that were answered.
    pub(crate) requests: u64,
    /// Requests that failed, and answers that were errors.
    pub(crate) errors: u64,
    /// How long it took, in seconds.
    pub(crate) seconds: f64,
    /// See [`Figure::P50Ms`].
    pub(crate) p50_ms: Option<f64>,
    /// See [`Figure::P99Ms`].
    pub(crate) p99_ms: Option<f64>,
    /// See [`Figure::P999Ms`].
    pub(crate) p999_ms: Option<f64>,
    /// User and system time of both proxies meanwhile, in microseconds.
    pub(crate) cpu_us: Option<f64>,
    /// See [`Figure::RssMb`].
    pub(crate) rss_mb: Option<f64>,
    /// What the proxies agreed on, where that could be seen.
    pub(crate) tls: Option<String>,
    /// Which rule was broken, if one was.
    pub(crate) void: Option<String>,
}

impl Measured {
    /// One of its figures.
    pub(crate) fn figure(&self, figure: Figure) -> Option<f64> {
        let requests = self.requests as f64;
        match figure {
            Figure::Rps => (self.seconds > 0.0).then(|| requests / self.seconds),
            Figure::P50Ms => self.p50_ms,
            Figure::P99Ms => self.p99_ms,
            Figure::P999Ms => self.p999_ms,
            Figure::CpuUs => self.cpu_us.filter(|_| self.requests > 0).map(|cpu| cpu / requests),
            Figure::RssMb => self.rss_mb,
        }
    }
}

/// A figure over the rounds.
pub(crate) fn over_rounds(rounds: &[Measured], figure: Figure) -> Option<Spread> {
    let values: Vec<f64> = rounds.iter().filter_map(|round| round.figure(figure)).collect();
    Spread::of(&values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_ends() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[f64::NAN, 1.0]), None);
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
    }

    #[test]
    fn a_round_without_requests_has_no_cost_a_request() {
        let none = Measured { cpu_us: Some(5.0), seconds: 1.0, ..Measured::default() };
        assert_eq!(none.figure(Figure::CpuUs), None);
        let some = Measured { requests: 10, ..none };
        assert_eq!(some.figure(Figure::CpuUs), Some(0.5));
        assert_eq!(some.figure(Figure::Rps), Some(10.0));
        assert_eq!(over_rounds(&[some], Figure::P99Ms), None);
    }
}
