//! How many retries may an edge afford?
//!
//! Two rules, each one atomic word that all workers share:
//!
//! - The **budget**, a token bucket: each request deposits a share of a retry, and a floor comes with time, so that an edge with
//!   little traffic can retry at all. Whatever fails, in whatever order, and on however many threads,
//!   `retries ≤ ratio × requests + floor × time + burst`, for the edge's whole life and for each part of it.
//! - The **throttle** of gRPC's A6 (<https://github.com/grpc/proposal/blob/master/A6-client-retries.md>): while most attempts
//!   fail, another one would fail as well, and only adds to the load. A budget alone doesn't see that: ten thousand callers with
//!   a request a second each would triple the load within their floors.
//!
//! Finagle and Linkerd save what was deposited in the last ten seconds. Here the bucket holds a fixed burst instead: what a busy
//! edge could save up in ten seconds is twice its load of a second, spent at once when the callee can bear it least. It also
//! makes the usual case cheap: where the bucket is full and nothing fails, nobody writes, and no cache line travels.

use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// What an edge may spend on retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetSettings {
    /// What each request deposits, in hundredths of a retry.
    pub ratio_percent: u32,
    /// Retries that come with each second, whatever the traffic.
    pub floor_per_second: u32,
    /// Retries that may be saved up.
    pub burst: u32,
}

impl Default for BudgetSettings {
    /// Linkerd's and Finagle's: 20 % and ten a second, and of these as many as ten seconds (their window) bring.
    fn default() -> Self {
        Self { ratio_percent: 20, floor_per_second: 10, burst: 100 }
    }
}

/// Why these settings make no budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BudgetSettingsError {
    /// More than one retry a request.
    #[error("a retry budget of {0} % would double the load: write 100 % or less")]
    Ratio(u32),
    /// A quiet edge could never retry, or a busy one without end.
    #[error("a floor of {0} retries a second: write 1 to {FLOOR_PER_SECOND_MAX}")]
    Floor(u32),
    /// Nothing could ever be withdrawn, or too much at once.
    #[error("a burst of {0} retries: write 1 to {BURST_MAX}")]
    Burst(u32),
}

/// Floors above this are no floors: an edge with so much traffic lives on its share.
pub const FLOOR_PER_SECOND_MAX: u32 = 1_000;

/// What may be saved up at most: ten seconds of the largest floor.
pub const BURST_MAX: u32 = 10_000;

/// How many failures beyond the successes the throttle takes before it closes, and how many successes beyond the failures open
/// it again. A blip of a busy edge stays within it; a caller with a request a second stops retrying within seconds.
pub const THROTTLE_FAILURES: u32 = 20;

/// gRPC's A6: open while more than half of the tokens are there.
const THROTTLE_TOKENS_MAX: u32 = 2 * THROTTLE_FAILURES;

/// An edge's budget, shared by all workers.
#[derive(Debug)]
pub struct RetryBudget {
    settings: BudgetSettings,
    /// Time is counted from here.
    base: Instant,
    /// The time in which the floor brings one retry. A retry is worth as much: the bucket is kept in nanoseconds.
    retry_nanos: i64,
    deposit_nanos: i64,
    burst_nanos: i64,
    /// When the bucket was, or will be, empty, in nanoseconds from `base`: what it holds is the time since then. One word that
    /// needs no refill, so that a compare-and-swap is the whole transaction.
    empty_at: AtomicI64,
    throttle_tokens: AtomicU32,
}

impl RetryBudget {
    /// A full one.
    ///
    /// # Errors
    /// When a setting makes no sense.
    pub fn new(settings: BudgetSettings, now: Instant) -> Result<Self, BudgetSettingsError> {
        let BudgetSettings { ratio_percent, floor_per_second, burst } = settings;
        if ratio_percent > 100 {
            return Err(BudgetSettingsError::Ratio(ratio_percent));
        }
        if !(1..=FLOOR_PER_SECOND_MAX).contains(&floor_per_second) {
            return Err(BudgetSettingsError::Floor(floor_per_second));
        }
        if !(1..=BURST_MAX).contains(&burst) {
            return Err(BudgetSettingsError::Burst(burst));
        }
        Ok(Self::checked(settings, now))
    }

    /// A full one with the usual settings.
    #[must_use]
    pub fn usual(now: Instant) -> Self {
        Self::checked(BudgetSettings::default(), now)
    }

    fn checked(settings: BudgetSettings, now: Instant) -> Self {
        let BudgetSettings { ratio_percent, floor_per_second, burst } = settings;
        // A retry's worth is rounded up and a deposit down, so that rounding never adds a retry.
        let retry_nanos = i64::from(1_000_000_000_u32.div_ceil(floor_per_second.max(1)));
        let deposit_nanos = retry_nanos * i64::from(ratio_percent) / 100;
        let burst_nanos = retry_nanos * i64::from(burst);
        Self {
            settings,
            base: now,
            retry_nanos,
            deposit_nanos,
            burst_nanos,
            empty_at: AtomicI64::new(-burst_nanos),
            throttle_tokens: AtomicU32::new(THROTTLE_TOKENS_MAX),
        }
    }

    /// A request begins: call it once for each, before its first attempt.
    pub fn deposit(&self, now: Instant) {
        let full = self.since_base(now) - self.burst_nanos;
        let _ = self.empty_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |empty_at| {
            (empty_at > full).then(|| (empty_at - self.deposit_nanos).max(full))
        });
    }

    /// Takes a retry, if there is one.
    #[must_use]
    pub fn withdraw(&self, now: Instant) -> bool {
        let now = self.since_base(now);
        let taken = self.empty_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |empty_at| {
            // What is over the burst is lost first.
            let less = empty_at.max(now - self.burst_nanos) + self.retry_nanos;
            (less <= now).then_some(less)
        });
        taken.is_ok()
    }

    /// An attempt was answered, and not with a failure that is retried. Call it once for each.
    pub fn succeeded(&self) {
        let _ = self.throttle_tokens.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |tokens| {
            (tokens < THROTTLE_TOKENS_MAX).then_some(tokens.saturating_add(1))
        });
    }

    /// An attempt failed ([`super::decide`] calls it): whether enough of them succeed for another one to be worth it.
    pub(super) fn failed(&self) -> bool {
        let before = self
            .throttle_tokens
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |tokens| Some(tokens.saturating_sub(1)));
        before.is_ok_and(|before| before.saturating_sub(1) > THROTTLE_TOKENS_MAX / 2)
    }

    /// Whole retries that could be withdrawn now, for the metric.
    #[must_use]
    pub fn left(&self, now: Instant) -> u32 {
        let saved = self.since_base(now).saturating_sub(self.empty_at.load(Ordering::Relaxed));
        let retries = saved.clamp(0, self.burst_nanos).checked_div(self.retry_nanos).unwrap_or(0);
        u32::try_from(retries).unwrap_or(0)
    }

    /// Whether so many attempts failed that none is retried for now, for the metric.
    #[must_use]
    pub fn is_throttled(&self) -> bool {
        self.throttle_tokens.load(Ordering::Relaxed) <= THROTTLE_TOKENS_MAX / 2
    }

    /// What it was made from.
    #[must_use]
    pub fn settings(&self) -> BudgetSettings {
        self.settings
    }

    /// At most a hundred years, so that no sum with it overflows.
    fn since_base(&self, now: Instant) -> i64 {
        const CENTURY: Duration = Duration::from_hours(24 * 365 * 100);
        let since = now.saturating_duration_since(self.base).min(CENTURY);
        i64::try_from(since.as_nanos()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
