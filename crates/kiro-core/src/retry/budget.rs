//! How many retries may an edge afford?
//!
//! Two rules, each one atomic word that all workers share:
//!
//! - The **budget**, a token bucket: each request deposits a share of a retry, and a floor comes with time, so that an edge with
//!   little traffic can retry at all. Whatever fails, in whatever order, and on however many threads,
//!   `retries ≤ ratio × requests + floor × time + burst`, for the edge's whole life and for each part of it.
//! - The **throttle**, after gRPC's A6 (<https://github.com/grpc/proposal/blob/master/A6-client-retries.md>): while most
//!   attempts fail, another one would fail as well, and only adds to the load. A budget alone doesn't see that: ten
//!   thousand callers with a request a second each would triple the load within their floors, for as long as it is too much.
//!   A6 counts; here a failure that comes alone weighs more, so that a quiet caller learns as fast as a busy one: after
//!   [`THROTTLE_FAILURES`] failures, or two seconds of nothing else.
//!
//! Finagle and Linkerd save what was deposited in the last ten seconds. Here the bucket holds a fixed burst instead: what a busy
//! edge could save up in ten seconds is twice its load of a second, spent at once when the callee can bear it least. It also
//! makes the usual case cheap: where the bucket is full and nothing fails, nobody writes, and no cache line travels.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
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

/// How many failures close the throttle when nothing succeeds: the default burst, so that a blip of a busy edge stays within it.
pub const THROTTLE_FAILURES: u32 = 100;

/// What a failure takes and a success gives back, for each of the failure's weight: two failures for three successes are the
/// border. One replica of two that fails costs a third of all attempts while the other one mends its failures, and is no reason
/// to stop that.
const THROTTLE_FAILURE: u64 = 3;
const THROTTLE_SUCCESS: u64 = 2;

/// All tokens. As in A6, retries need more than half of them; the other half is how much must be forgotten before they are worth
/// it again.
const THROTTLE_MAX: u64 = 2 * THROTTLE_FAILURE * THROTTLE_FAILURES as u64;

/// A failure weighs one for each such time since the one before, and at least one: in two seconds, [`THROTTLE_FAILURES`].
const THROTTLE_UNIT_MILLIS: u64 = 20;

/// What a failure weighs at most: half of what closes the throttle. The quietest caller has seen enough after one request that
/// failed with all of its retries, and the next one.
const THROTTLE_WEIGHT_MAX: u64 = THROTTLE_FAILURES as u64 / 2;

/// The throttle's word: its tokens, what a success gives back, and the time of the last failure in units from the base. A success
/// weighs as much as the heaviest of the last failures, so that a share of the attempts decides on a busy edge, and a retry that
/// mends a failure counts for as much as that did on a quiet one.
#[derive(Clone, Copy)]
struct Throttle {
    tokens: u64,
    worth: u64,
    failed_at: u64,
}

impl Throttle {
    const BITS: u32 = 10;
    const MASK: u64 = (1 << Self::BITS) - 1;
    const FULL: Self = Self { tokens: THROTTLE_MAX, worth: 1, failed_at: 0 };

    const fn pack(self) -> u64 {
        self.failed_at << (2 * Self::BITS)
            | (self.worth & Self::MASK) << Self::BITS
            | (self.tokens & Self::MASK)
    }

    const fn unpack(word: u64) -> Self {
        Self {
            tokens: word & Self::MASK,
            worth: word >> Self::BITS & Self::MASK,
            failed_at: word >> (2 * Self::BITS),
        }
    }

    fn after_failure(self, at: u64) -> Self {
        let weight = at.saturating_sub(self.failed_at).clamp(1, THROTTLE_WEIGHT_MAX);
        Self {
            tokens: self.tokens.saturating_sub(weight.saturating_mul(THROTTLE_FAILURE)),
            // Retries follow at once and weigh little. What they mend is the failure before them.
            worth: weight.max(self.worth.saturating_sub(1)),
            failed_at: at.max(self.failed_at),
        }
    }

    fn after_success(self) -> Self {
        Self {
            tokens: self.tokens.saturating_add(self.worth.saturating_mul(THROTTLE_SUCCESS)).min(THROTTLE_MAX),
            ..self
        }
    }

    /// Whether what may have been processed is worth another attempt: three of five attempts succeed, or did until lately.
    fn is_open(self) -> bool {
        self.tokens > THROTTLE_MAX / 2
    }
}

/// What a failed attempt leaves to hope for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hope {
    /// Most attempts succeed.
    pub(super) repeat: bool,
    /// Some do: a token was left, so that each success makes one reroute worth it at least.
    pub(super) reroute: bool,
}

/// Times from a base are cut off here, so that no sum with one overflows.
const CENTURY: Duration = Duration::from_hours(24 * 365 * 100);

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
    throttle: AtomicU64,
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
            throttle: AtomicU64::new(Throttle::FULL.pack()),
        }
    }

    /// A request begins: call it once for each, before its first attempt.
    pub fn deposit(&self, now: Instant) {
        let full = self.since_base(now) - self.burst_nanos;
        let _ = self.empty_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |empty_at| {
            // What is over the burst is cut off where it is looked at.
            (empty_at > full).then_some(empty_at - self.deposit_nanos)
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
        let _ = self.throttle.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            let after = Throttle::unpack(word).after_success().pack();
            (after != word).then_some(after)
        });
    }

    /// An attempt failed ([`super::decide`] calls it).
    pub(super) fn failed(&self, now: Instant) -> Hope {
        let millis = now.saturating_duration_since(self.base).min(CENTURY).as_millis();
        let at = u64::try_from(millis).unwrap_or(0) / THROTTLE_UNIT_MILLIS;
        let failed = |word| Throttle::unpack(word).after_failure(at);
        let before = self
            .throttle
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| Some(failed(word).pack()))
            .unwrap_or_else(|word| word);
        Hope { repeat: failed(before).is_open(), reroute: Throttle::unpack(before).tokens > 0 }
    }

    /// Whole retries that could be withdrawn now, for the metric.
    #[must_use]
    pub fn left(&self, now: Instant) -> u32 {
        let saved = self.since_base(now).saturating_sub(self.empty_at.load(Ordering::Relaxed));
        let retries = saved.clamp(0, self.burst_nanos).checked_div(self.retry_nanos).unwrap_or(0);
        u32::try_from(retries).unwrap_or(0)
    }

    /// Whether so much failed that what may have been processed is not retried for now, for the metric.
    #[must_use]
    pub fn is_throttled(&self) -> bool {
        !Throttle::unpack(self.throttle.load(Ordering::Relaxed)).is_open()
    }

    /// What it was made from.
    #[must_use]
    pub fn settings(&self) -> BudgetSettings {
        self.settings
    }

    /// At most a hundred years, so that no sum with it overflows.
    fn since_base(&self, now: Instant) -> i64 {
        let since = now.saturating_duration_since(self.base).min(CENTURY);
        i64::try_from(since.as_nanos()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
