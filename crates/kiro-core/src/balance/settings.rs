//! How quickly is a replica believed, and how long is it left out?

use std::num::NonZeroU32;
use std::time::Duration;

/// What a set of replicas goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    decay: Duration,
    warm_up: Duration,
    failures: NonZeroU32,
    first_ejection: Duration,
    longest_ejection: Duration,
}

/// Settings that make no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// A latency that is forgotten at once, or hardly ever.
    #[error("decay is {0:?}; 1s to 10m is possible, 10s is usual")]
    Decay(Duration),
    /// A warm-up that hardly ends.
    #[error("warm-up is {0:?}; at most 10m is possible, 10s is usual")]
    WarmUp(Duration),
    /// Ejections that are no time at all, or hardly end.
    #[error(
        "ejections are {first:?} to {longest:?}; 100ms to 1h is possible, the longer one last, 1s to 60s is usual"
    )]
    Ejection {
        /// How long the first one would be.
        first: Duration,
        /// How long one could become.
        longest: Duration,
    },
}

impl Settings {
    /// - `decay`: after this time a slow answer weighs 37 % (1/e) of what it did at first.
    /// - `warm_up`: the time in which a newcomer's share grows from a tenth to all of it; zero for none.
    /// - `failures`: so many in a row eject a replica,
    /// - for `first_ejection`, which doubles up to `longest_ejection` when it soon fails again.
    pub fn new(
        decay: Duration,
        warm_up: Duration,
        failures: NonZeroU32,
        first_ejection: Duration,
        longest_ejection: Duration,
    ) -> Result<Self, SettingsError> {
        if !(Duration::from_secs(1)..=Duration::from_secs(600)).contains(&decay) {
            return Err(SettingsError::Decay(decay));
        }
        if warm_up > Duration::from_secs(600) {
            return Err(SettingsError::WarmUp(warm_up));
        }
        if first_ejection < Duration::from_millis(100)
            || longest_ejection < first_ejection
            || longest_ejection > Duration::from_secs(3600)
        {
            return Err(SettingsError::Ejection { first: first_ejection, longest: longest_ejection });
        }
        Ok(Self { decay, warm_up, failures, first_ejection, longest_ejection })
    }

    pub(super) fn decay(&self) -> Duration {
        self.decay
    }

    pub(super) fn warm_up(&self) -> Duration {
        self.warm_up
    }

    pub(super) fn failures(&self) -> u32 {
        self.failures.get()
    }

    /// How long the ejection is that follows `before` others.
    pub(super) fn ejection(&self, before: u32) -> Duration {
        let factor = 1_u32.checked_shl(before).unwrap_or(u32::MAX);
        self.first_ejection.saturating_mul(factor).min(self.longest_ejection)
    }

    /// A replica that has been up for so long begins anew with the first ejection.
    pub(super) fn forgiven_after(&self) -> Duration {
        self.longest_ejection
    }
}

impl Default for Settings {
    /// Linkerd's decay (10 s) and its ejections (1 s doubling to 60 s); Envoy's and Istio's five failures in a row, where Linkerd
    /// waits for seven; Envoy's slow start begins with a tenth of the share too, and 10 s are several times what a server needs to
    /// fill its caches and pools.
    fn default() -> Self {
        Self {
            decay: Duration::from_secs(10),
            warm_up: Duration::from_secs(10),
            failures: NonZeroU32::MIN.saturating_add(4),
            first_ejection: Duration::from_secs(1),
            longest_ejection: Duration::from_secs(60),
        }
    }
}
