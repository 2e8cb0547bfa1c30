//! Was it kept?

use std::fmt;

use crate::figures::Figures;

/// A part of a promise that a figure can keep or break.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Expect {
    /// So many requests at most get no good answer.
    ErrorsMax(u64),
    /// So many of a hundred at most.
    ErrorsPercentMax(f64),
    /// None that is due later than this after the fault does.
    QuietAfterMs(f64),
    /// Whoever gets no good answer knows it within this time.
    ToldWithinMs(f64),
    /// Whoever gets no good answer gets another one: no connection breaks, nobody waits in vain.
    NoneLost,
    /// 99 of a hundred answers during the fault come within this many times what they took before it, or within the milliseconds,
    /// whichever is more: on a shared machine a few milliseconds mean nothing.
    P99 {
        /// Times what it was before.
        times: f64,
        /// But not less than this.
        floor_ms: f64,
    },
    /// Half of them do within so many milliseconds.
    P50MaxMs(f64),
    /// The replica answers again within this time after it could.
    BackWithinMs(f64),
    /// The replica gives at most so many of a hundred answers while it is broken.
    ShareMaxPercent(f64),
    /// Good answers a second, in percent of what the mesh can do.
    GoodputMinPercent(f64),
    /// The container says this in its log.
    Says(&'static str, &'static str),
}

/// What an experiment has beside its figures.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Beside<'a> {
    /// What the mesh can do, in requests a second.
    pub(crate) capacity: Option<u32>,
    /// Logs of containers since the experiment's begin.
    pub(crate) logs: &'a [(&'static str, String)],
}

impl Expect {
    /// The container whose log it is about.
    pub(crate) fn log(&self) -> Option<&'static str> {
        if let Self::Says(container, _) = self { Some(container) } else { None }
    }

    /// Whether it was kept. What was not measured was not kept.
    pub(crate) fn is_kept(self, figures: &Figures, beside: Beside<'_>) -> bool {
        let at_most = |found: Option<f64>, limit: f64| found.is_none_or(|found| found <= limit);
        match self {
            Self::ErrorsMax(limit) => figures.errors() <= limit,
            Self::ErrorsPercentMax(limit) => {
                figures.errors() as f64 * 100.0 <= limit * figures.requests as f64
            }
            Self::QuietAfterMs(limit) => at_most(figures.last_error_ms, limit),
            Self::ToldWithinMs(limit) => at_most(figures.worst_error_ms, limit),
            Self::NoneLost => figures.lost == 0 && figures.late == 0,
            Self::P99 { times, floor_ms } => {
                let before = figures.p99_before_ms.unwrap_or(0.0);
                figures.p99_during_ms.is_some_and(|during| during <= (times * before).max(floor_ms))
            }
            Self::P50MaxMs(limit) => figures.p50_during_ms.is_some_and(|during| during <= limit),
            Self::BackWithinMs(limit) => figures.back_ms.is_some_and(|back| back <= limit),
            Self::ShareMaxPercent(limit) => figures.share_percent.is_some_and(|share| share <= limit),
            Self::GoodputMinPercent(limit) => {
                beside.capacity.is_some_and(|capacity| figures.goodput * 100.0 >= limit * f64::from(capacity))
            }
            Self::Says(container, words) => {
                beside.logs.iter().any(|(name, log)| *name == container && log.contains(words))
            }
        }
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ErrorsMax(0) => f.write_str("no error"),
            Self::ErrorsMax(limit) => write!(f, "at most {limit} errors"),
            Self::ErrorsPercentMax(limit) => write!(f, "at most {limit} % errors"),
            Self::QuietAfterMs(limit) => write!(f, "none due later than {limit} ms after it"),
            Self::ToldWithinMs(limit) => write!(f, "each told within {limit} ms"),
            Self::NoneLost => f.write_str("none without an answer"),
            Self::P99 { times, floor_ms } => write!(f, "p99 within {times} × what it was, or {floor_ms} ms"),
            Self::P50MaxMs(limit) => write!(f, "p50 within {limit} ms"),
            Self::BackWithinMs(limit) => write!(f, "the replica is back within {limit} ms"),
            Self::ShareMaxPercent(limit) => write!(f, "the replica gives at most {limit} % of the answers"),
            Self::GoodputMinPercent(limit) => write!(f, "goodput at least {limit} % of what the mesh can do"),
            Self::Says(container, words) => write!(f, "{container} logs “{words}”"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_is_kept_up_to_itself_and_broken_above() {
        let figures = Figures {
            requests: 200,
            refused: 2,
            p99_before_ms: Some(10.0),
            p50_during_ms: Some(5.0),
            p99_during_ms: Some(30.0),
            last_error_ms: Some(100.0),
            worst_error_ms: Some(50.0),
            back_ms: Some(1_000.0),
            share_percent: Some(20.0),
            goodput: 90.0,
            ..Figures::default()
        };
        let logs = [("profile-1-proxy", "a bad one".to_owned())];
        let beside = Beside { capacity: Some(100), logs: &logs };
        for (kept, broken) in [
            (Expect::ErrorsMax(2), Expect::ErrorsMax(1)),
            (Expect::ErrorsPercentMax(1.0), Expect::ErrorsPercentMax(0.9)),
            (Expect::QuietAfterMs(100.0), Expect::QuietAfterMs(99.0)),
            (Expect::ToldWithinMs(50.0), Expect::ToldWithinMs(49.0)),
            (Expect::P99 { times: 3.0, floor_ms: 1.0 }, Expect::P99 { times: 2.9, floor_ms: 29.0 }),
            (Expect::P50MaxMs(5.0), Expect::P50MaxMs(4.0)),
            (Expect::BackWithinMs(1_000.0), Expect::BackWithinMs(999.0)),
            (Expect::ShareMaxPercent(20.0), Expect::ShareMaxPercent(19.0)),
            (Expect::GoodputMinPercent(90.0), Expect::GoodputMinPercent(91.0)),
            (Expect::Says("profile-1-proxy", "bad"), Expect::Says("profile-2-proxy", "bad")),
        ] {
            assert!(kept.is_kept(&figures, beside), "{kept}");
            assert!(!broken.is_kept(&figures, beside), "{broken}");
        }
        assert!(Expect::NoneLost.is_kept(&figures, beside));
        assert!(!Expect::NoneLost.is_kept(&Figures { late: 1, ..figures }, beside));
    }

    #[test]
    fn what_was_not_measured_was_not_kept() {
        let nothing = Figures::default();
        for expect in [
            Expect::BackWithinMs(1.0),
            Expect::P50MaxMs(1.0),
            Expect::P99 { times: 1.0, floor_ms: 1.0 },
            Expect::ShareMaxPercent(1.0),
            Expect::GoodputMinPercent(1.0),
        ] {
            assert!(!expect.is_kept(&nothing, Beside::default()), "{expect}");
        }
    }
}
