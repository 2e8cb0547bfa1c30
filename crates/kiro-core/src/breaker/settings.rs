//! What did the mesh file declare about an edge's breaker?

use std::time::Duration;

/// The shortest and the longest time that a breaker may stay open.
pub const OPEN_MIN: Duration = Duration::from_millis(100);
/// See [`OPEN_MIN`]: a callee that came back is found within ten minutes.
pub const OPEN_MAX: Duration = Duration::from_mins(10);

/// As many trials at a time, or in a row, as may be asked for.
pub const TRIALS_MAX: u32 = 100;

/// When a breaker opens and closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerSettings {
    /// The share of failures that opens it, in hundredths.
    pub failures_percent: u32,
    /// Fewer requests than this in the window say nothing.
    pub requests_min: u32,
    /// How long it stays open the first time.
    pub open_base: Duration,
    /// What this doubles up to.
    pub open_max: Duration,
    /// How many trials may be on their way at a time.
    pub trials: u32,
    /// How many of them must succeed in a row.
    pub successes: u32,
}

impl Default for BreakerSettings {
    /// Half of at least 20 requests: Hystrix's (`errorThresholdPercentage`, `requestVolumeThreshold`), also its 5 s
    /// (`sleepWindowInMilliseconds`). They double up to a minute, Linkerd's longest back-off (`failureAccrual`). Three trials: one
    /// alone may be lucky.
    fn default() -> Self {
        Self {
            failures_percent: 50,
            requests_min: 20,
            open_base: Duration::from_secs(5),
            open_max: Duration::from_mins(1),
            trials: 3,
            successes: 3,
        }
    }
}

/// Why settings make no breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BreakerSettingsError {
    /// No share, or more than all.
    #[error("a breaker at {0} % of failures: write 1 to 100 %")]
    FailuresPercent(u32),
    /// Not a single request.
    #[error("a breaker over at least 0 requests: write 1 or more")]
    RequestsMin,
    /// A time too short or too long, or two in the wrong order.
    #[error(
        "open for {base:?} up to {max:?}: write times from {OPEN_MIN:?} to {OPEN_MAX:?}, the shorter one first"
    )]
    Open {
        /// The first time.
        base: Duration,
        /// The longest.
        max: Duration,
    },
    /// None, or too many.
    #[error("{trials} trials at a time, {successes} successes: write 1 to {TRIALS_MAX} for each")]
    Trials {
        /// At a time.
        trials: u32,
        /// In a row.
        successes: u32,
    },
}

impl BreakerSettings {
    /// Whether these settings make a breaker.
    ///
    /// # Errors
    /// When one of them makes no sense.
    pub fn check(&self) -> Result<(), BreakerSettingsError> {
        let Self { failures_percent, requests_min, open_base: base, open_max: max, trials, successes } =
            *self;
        if !(1..=100).contains(&failures_percent) {
            return Err(BreakerSettingsError::FailuresPercent(failures_percent));
        }
        if requests_min == 0 {
            return Err(BreakerSettingsError::RequestsMin);
        }
        if base < OPEN_MIN || base > max || max > OPEN_MAX {
            return Err(BreakerSettingsError::Open { base, max });
        }
        let counts = 1..=TRIALS_MAX;
        if !counts.contains(&trials) || !counts.contains(&successes) {
            return Err(BreakerSettingsError::Trials { trials, successes });
        }
        Ok(())
    }
}
