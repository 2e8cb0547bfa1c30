//! May this request pass now, or has its caller had its share?
//!
//! A rate limit by the generic cell rate algorithm (GCRA; ITU-T I.371, Annex A): a bucket of `burst` requests that fills
//! continuously, at one request each emission interval. The whole of it is one number, the theoretical arrival time (TAT): when the
//! bucket will be full again. So it fits an atomic, and workers that share it by compare-and-swap are exact together: of any number
//! that ask at one moment, as many pass as there is room for.
//!
//! [`RateLimit`] is one bucket; [`Keyed`] is one for each caller, path or header value, in bounded memory; [`PolicyName`] writes
//! what an answer says of either.
//!
//! **Invariant**: in no stretch of time `t` do more pass than `burst + t × requests / per`. A caller that keeps to `requests` in
//! every stretch of `per` is never refused where `burst` is `requests`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

mod fields;
mod keyed;
#[cfg(test)]
mod tests;

pub use fields::{PolicyName, PolicyNameError};
pub use keyed::{Keyed, KeyedSettings, MAX_KEYS_DEFAULT};

/// The most that a limit can allow: a thousand times what one sidecar carries, and an emission interval of a thousand nanoseconds,
/// so that a nanosecond's rounding stays below a thousandth of it.
pub const REQUESTS_PER_SECOND_MAX: u64 = 1_000_000;

/// The longest time that an empty bucket may take to fill. Nobody waits longer for a limit, and the arithmetic below is far from
/// its ends with it.
pub const FILL_TIME_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// How many requests may pass, checked: values that no bucket can keep do not get in here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateSettings {
    requests: u32,
    per: Duration,
    burst: u32,
}

/// What is wrong with a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RateError {
    /// No request at all would pass.
    #[error("requests is 0, which lets nothing pass; write at least 1, or leave the allow line out")]
    NoRequests,
    /// A rate over no time is none.
    #[error("per is 0; write a time such as 1s")]
    NoTime,
    /// The bucket would hold nothing.
    #[error("burst is 0, which lets nothing pass; write at least 1, or leave it out for as many as requests")]
    NoBurst,
    /// Faster than anything that it could limit.
    #[error(
        "{requests} requests in {per:?} are more than {REQUESTS_PER_SECOND_MAX} a second; \
         write fewer, or leave the limit out"
    )]
    TooFast {
        /// As given.
        requests: u32,
        /// As given.
        per: Duration,
    },
    /// Slower than anybody waits.
    #[error(
        "a burst of {burst} at {requests} in {per:?} takes more than a year to fill; write a smaller burst or a shorter time"
    )]
    TooSlow {
        /// As given.
        requests: u32,
        /// As given.
        per: Duration,
        /// As given.
        burst: u32,
    },
}

impl RateSettings {
    /// So many requests in so much time. At once, `burst`; without it, as many as `requests`: then nobody is refused who keeps to
    /// what the limit says, however unevenly.
    pub fn new(requests: u32, per: Duration, burst: Option<u32>) -> Result<Self, RateError> {
        let burst = burst.unwrap_or(requests);
        if requests == 0 {
            return Err(RateError::NoRequests);
        }
        if per.is_zero() {
            return Err(RateError::NoTime);
        }
        if burst == 0 {
            return Err(RateError::NoBurst);
        }
        if u128::from(requests) * NANOS_PER_SECOND > u128::from(REQUESTS_PER_SECOND_MAX) * per.as_nanos() {
            return Err(RateError::TooFast { requests, per });
        }
        // A Duration has 94 bits of nanoseconds, too many to be multiplied by a burst of 32; anything near that is too slow anyway.
        let fill = per.as_nanos().checked_mul(u128::from(burst)).map(|all| all / u128::from(requests));
        if per > FILL_TIME_MAX || fill.is_none_or(|fill| fill > FILL_TIME_MAX.as_nanos()) {
            return Err(RateError::TooSlow { requests, per, burst });
        }
        Ok(Self { requests, per, burst })
    }

    /// How many requests in [`per`](Self::per).
    #[must_use]
    pub fn requests(&self) -> u32 {
        self.requests
    }

    /// The time that [`requests`](Self::requests) are counted over.
    #[must_use]
    pub fn per(&self) -> Duration {
        self.per
    }

    /// How many may pass at once, after a rest.
    #[must_use]
    pub fn burst(&self) -> u32 {
        self.burst
    }
}

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// A request passes; this is what the bucket holds after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// How many more would pass at this moment.
    pub remaining: u32,
    /// The effective window: a caller that sends no more than `remaining` within it, evenly, keeps to the limit's rate for good. At
    /// least the time until there is room for one more than `remaining`.
    pub reset: Duration,
}

/// A request does not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limited {
    /// After this time there is room for one, if nobody else takes it. Never zero.
    pub retry_after: Duration,
}

/// One bucket. Workers share it; a check is a load and a compare-and-swap.
#[derive(Debug)]
pub struct RateLimit {
    settings: RateSettings,
    pace: Pace,
    origin: Instant,
    /// In ticks since the origin; never more than [`Pace::capacity`] after now.
    tat: AtomicU64,
}

impl RateLimit {
    /// A full bucket. `origin` is any moment before the first check.
    #[must_use]
    pub fn new(settings: RateSettings, origin: Instant) -> Self {
        Self { settings, pace: Pace::of(&settings), origin, tat: AtomicU64::new(0) }
    }

    /// What it was made of.
    #[must_use]
    pub fn settings(&self) -> &RateSettings {
        &self.settings
    }

    /// Takes a request out of the bucket, if it holds one. A worker's clock that is behind another's only waits a little longer.
    pub fn check(&self, now: Instant) -> Result<Left, Limited> {
        let now = self.pace.ticks(now.saturating_duration_since(self.origin));
        // Nothing else is published by this number, so that relaxed order is enough: a compare-and-swap sees the newest value.
        let mut tat = self.tat.load(Ordering::Relaxed);
        loop {
            let next = self.pace.take(tat, now).ok_or_else(|| self.pace.limited(tat, now))?;
            match self.tat.compare_exchange_weak(tat, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(self.pace.left(next, now)),
                Err(newer) => tat = newer,
            }
        }
    }
}

/// A rate in ticks.
///
/// An emission interval is seldom a whole number of nanoseconds (three a second), and rounding it would let the limit drift. So time
/// is counted in ticks of half a nanosecond to one, of which an interval has a power of two: sums of intervals are exact, a
/// conversion is one multiplication, and how many intervals fit is a shift.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// An emission interval is `1 << shift` ticks.
    shift: u32,
    /// Ticks in a nanosecond, in units of 2^-63: between 2^63 and 2^64. Rounded up, so that the end of an interval, which often is a
    /// whole nanosecond, is not missed by one; wrong by less than a tick in 292 years.
    ticks_per_nano: u64,
    /// The emission interval in nanoseconds, rounded up.
    interval_nanos: u64,
    /// A full bucket in ticks.
    capacity: u64,
}

impl Pace {
    fn of(settings: &RateSettings) -> Self {
        // RateSettings has seen to it that per is below 2^55 nanoseconds, and the interval between 2^9 and 2^55.
        let (per, requests) = (settings.per.as_nanos().max(1), u128::from(settings.requests).max(1));
        let interval = per.div_ceil(requests);
        // The smallest power of two that is no less than per / requests.
        let shift = u128::BITS - (interval - 1).leading_zeros();
        // 2^shift × requests < 2 × (per + requests) < 2^57, so that another 63 bits fit.
        let ticks_per_nano = ((requests << shift) << 63).div_ceil(per);
        Self {
            shift,
            ticks_per_nano: u64::try_from(ticks_per_nano).unwrap_or(u64::MAX),
            interval_nanos: u64::try_from(interval).unwrap_or(u64::MAX),
            capacity: u64::from(settings.burst).saturating_mul(1 << shift.min(63)),
        }
    }

    fn interval(&self) -> u64 {
        1 << self.shift.min(63)
    }

    /// Whole ticks in a time, as far as 146 years.
    fn ticks(&self, time: Duration) -> u64 {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).min(1 << 62);
        u64::try_from((u128::from(nanos) * u128::from(self.ticks_per_nano)) >> 63).unwrap_or(u64::MAX)
    }

    /// A time after which so many ticks have surely passed: a nanosecond more than that at most, since a moment between two ticks
    /// counts as the earlier one.
    fn time(&self, ticks: u64) -> Duration {
        let nanos = (u128::from(ticks) << 63).div_ceil(u128::from(self.ticks_per_nano.max(1)));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// The bucket's next state when one is taken; None when it holds none.
    fn take(&self, tat: u64, now: u64) -> Option<u64> {
        let next = tat.max(now).saturating_add(self.interval());
        (next <= now.saturating_add(self.capacity)).then_some(next)
    }

    fn left(&self, tat: u64, now: u64) -> Left {
        let room = now.saturating_add(self.capacity).saturating_sub(tat);
        let remaining = u32::try_from(room >> self.shift.min(63)).unwrap_or(u32::MAX);
        let for_one_more = self.interval() - (room & (self.interval() - 1));
        let at_the_rate = Duration::from_nanos(self.interval_nanos.saturating_mul(u64::from(remaining)));
        // The division in `time` is paid by the last of a burst alone.
        let reset = if remaining == 0 { self.time(for_one_more) } else { at_the_rate };
        Left { remaining, reset }
    }

    fn limited(&self, tat: u64, now: u64) -> Limited {
        let short =
            tat.max(now).saturating_add(self.interval()).saturating_sub(now.saturating_add(self.capacity));
        Limited { retry_after: self.time(short.max(1)) }
    }
}
