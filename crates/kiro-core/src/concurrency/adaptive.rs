//! How many requests can an application have in flight before they make each other slower?
//!
//! Found by gradient, as Netflix's concurrency-limits (`Gradient2Limit`) and Envoy's adaptive concurrency do: the latency of a
//! window is compared with a baseline, what it is without queueing. Where it is higher than a tolerance allows, the limit shrinks
//! by as much; else it grows by its square root, which is the queue that it allows itself.
//!
//! The baseline is measured, as in Envoy and in BBR, not averaged over the long run: under lasting overload an average drifts up and
//! takes the limit with it. So every ten seconds, and as soon as the limit has been halved, it is halved once more for as long as it
//! takes to see the latency of fewer requests: a few hundredths of the goodput, for a limit that can't run away.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Outcome;

/// A window is no shorter, and no shorter than [`SAMPLES_MIN`] requests.
const WINDOW: Duration = Duration::from_millis(100);
/// Envoy asks for as many: with them the mean of latencies that vary as much as they are long is known to a seventh.
const SAMPLES_MIN: u64 = 50;
/// Where there are fewer requests than that in a second, so many have to do.
const SLOW_WINDOW: Duration = Duration::from_secs(1);
const SLOW_SAMPLES_MIN: u64 = 10;
/// Latency may be higher than its baseline by this factor without being called queueing: 1.5 is Netflix's.
const TOLERANCE: f64 = 1.5;
/// No window shrinks a limit by more, so that one that was slow by chance does not close the door (Netflix).
const GRADIENT_MIN: f64 = 0.5;
/// What a window with refusals or time-outs leaves of a limit (Netflix's AIMD limit).
const BACK_OFF: f64 = 0.9;
/// How much of a lower latency the baseline takes over at once.
const BASELINE_GAIN: f64 = 0.1;
/// As BBR's window of its minimum.
const PROBE_EVERY: Duration = Duration::from_secs(10);
/// The first windows may have been queueing already.
const FIRST_PROBE_AFTER: Duration = Duration::from_secs(1);
/// A probe takes some latencies' time; where those are long, it is rarer, so that it costs no more.
const PROBE_EVERY_LATENCIES: f64 = 50.0;
/// A slower request counts as one of sixteen seconds: a window's sum then fits beside its count.
const LATENCY_MICROS_MAX: u64 = 1 << 24;
const COUNT_SHIFT: u32 = 44;

/// The bounds that an adaptive limit stays in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adaptive {
    min: u32,
    initial: u32,
    max: u32,
}

/// Bounds between which there is nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdaptiveError {
    /// No request at all could pass.
    #[error("min is 0, which lets nothing pass; write at least 1")]
    NoRequests,
    /// The wrong way round.
    #[error("min {min} is more than max {max}; write a min of {max} at most")]
    Crossed {
        /// As given.
        min: u32,
        /// As given.
        max: u32,
    },
}

impl Adaptive {
    /// Never fewer than `min` in flight, never more than `max`.
    pub fn new(min: u32, max: u32) -> Result<Self, AdaptiveError> {
        if min == 0 {
            return Err(AdaptiveError::NoRequests);
        }
        if min > max {
            return Err(AdaptiveError::Crossed { min, max });
        }
        Ok(Self { min, initial: INITIAL.clamp(min, max), max })
    }

    /// Never fewer in flight.
    #[must_use]
    pub fn min(&self) -> u32 {
        self.min
    }

    /// What it begins with: 20, as Netflix's, or the bound that is next to it.
    #[must_use]
    pub fn initial(&self) -> u32 {
        self.initial
    }

    /// Never more in flight.
    #[must_use]
    pub fn max(&self) -> u32 {
        self.max
    }
}

const INITIAL: u32 = 20;

impl Default for Adaptive {
    /// From 4, below which a square root is no room to grow, to 1,000, which is Envoy's maximum.
    fn default() -> Self {
        Self { min: 4, initial: INITIAL, max: 1000 }
    }
}

/// What workers write into, and who draws conclusions from it once a window.
#[derive(Debug)]
pub(super) struct Controller {
    origin: Instant,
    /// How many latencies there were since the window began, above their sum in microseconds: one addition for both.
    samples: AtomicU64,
    overloaded: AtomicBool,
    /// When the window may end, in nanoseconds since the origin.
    due: AtomicU64,
    gradient: Mutex<Gradient>,
}

impl Controller {
    pub(super) fn new(settings: Adaptive, now: Instant) -> Self {
        Self {
            origin: now,
            samples: AtomicU64::new(0),
            overloaded: AtomicBool::new(false),
            due: AtomicU64::new(nanos(WINDOW)),
            gradient: Mutex::new(Gradient::new(settings, now)),
        }
    }

    /// Counts a request. At the end of a window, gives the limit that follows from it.
    pub(super) fn sample(
        &self,
        now: Instant,
        outcome: Outcome,
        latency: Duration,
        bound: &AtomicBool,
    ) -> Option<u32> {
        match outcome {
            Outcome::Answered => {
                let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).min(LATENCY_MICROS_MAX);
                self.samples.fetch_add((1 << COUNT_SHIFT) | micros, Ordering::Relaxed);
            }
            Outcome::Overloaded => self.overloaded.store(true, Ordering::Relaxed),
            Outcome::Ignored => return None,
        }
        let since_origin = now.saturating_duration_since(self.origin);
        if nanos(since_origin) < self.due.load(Ordering::Relaxed) {
            return None;
        }
        // Another worker that is at it already does it.
        let mut gradient = match self.gradient.try_lock() {
            Ok(gradient) => gradient,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
            Err(std::sync::TryLockError::WouldBlock) => return None,
        };
        let open = now.saturating_duration_since(gradient.opened);
        let count = self.samples.load(Ordering::Relaxed) >> COUNT_SHIFT;
        let enough = count >= SAMPLES_MIN || (open >= SLOW_WINDOW && count >= SLOW_SAMPLES_MIN);
        let refused = self.overloaded.load(Ordering::Relaxed) && open >= WINDOW;
        if open < WINDOW || !(enough || refused) {
            return None;
        }
        let samples = self.samples.swap(0, Ordering::Relaxed);
        let sum = samples & ((1 << COUNT_SHIFT) - 1);
        let window = Window {
            mean_micros: if count == 0 { None } else { Some(sum as f64 / (samples >> COUNT_SHIFT) as f64) },
            overloaded: self.overloaded.swap(false, Ordering::Relaxed),
            bound: bound.swap(false, Ordering::Relaxed),
        };
        self.due.store(nanos(since_origin).saturating_add(nanos(WINDOW)), Ordering::Relaxed);
        Some(gradient.close(now, &window))
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What was seen in a stretch of time.
#[derive(Clone, Copy, Debug)]
struct Window {
    /// None: nothing was answered.
    mean_micros: Option<f64>,
    /// Somebody was refused by the application, or timed out.
    overloaded: bool,
    /// Somebody found no room: only then does the limit matter, and the latency say something of it.
    bound: bool,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// The limit follows the gradient.
    Steady,
    /// Half the limit, until what was in flight before has ended.
    Drain { until: Instant },
    /// Half the limit, and the latency of the window is the baseline.
    Measure,
}

#[derive(Debug)]
struct Gradient {
    settings: Adaptive,
    limit: f64,
    baseline_micros: Option<f64>,
    phase: Phase,
    opened: Instant,
    next_probe: Instant,
    /// The limit when the baseline was measured.
    measured_at: f64,
}

impl Gradient {
    fn new(settings: Adaptive, now: Instant) -> Self {
        let limit = f64::from(settings.initial);
        Self {
            settings,
            limit,
            baseline_micros: None,
            phase: Phase::Steady,
            opened: now,
            next_probe: now + FIRST_PROBE_AFTER,
            measured_at: limit,
        }
    }

    /// A window has ended; the limit for the next.
    fn close(&mut self, now: Instant, window: &Window) -> u32 {
        self.opened = now;
        if let Some(mean) = window.mean_micros {
            match self.phase {
                Phase::Steady => self.follow(now, mean, window),
                Phase::Drain { until } => {
                    if now >= until {
                        self.phase = Phase::Measure;
                    }
                }
                Phase::Measure => self.measured(now, mean),
            }
        } else {
            self.back_off();
        }
        self.in_force()
    }

    fn follow(&mut self, now: Instant, mean: f64, window: &Window) {
        let baseline = match self.baseline_micros {
            None => mean,
            // What made it slow is over.
            Some(baseline) if mean < baseline / 2.0 => mean,
            Some(baseline) if mean < baseline => baseline + BASELINE_GAIN * (mean - baseline),
            Some(baseline) => baseline,
        };
        self.baseline_micros = Some(baseline);
        if window.overloaded {
            return self.back_off();
        }
        if !window.bound {
            return;
        }
        let gradient = (TOLERANCE * baseline / mean.max(1.0)).clamp(GRADIENT_MIN, 1.0);
        self.set(self.limit * gradient + self.limit.sqrt());
        if now >= self.next_probe || self.limit < self.measured_at / 2.0 {
            self.phase = Phase::Drain { until: now + Duration::from_secs_f64(mean / 1e6) };
        }
    }

    fn measured(&mut self, now: Instant, mean: f64) {
        self.baseline_micros = Some(mean);
        self.measured_at = self.limit;
        self.phase = Phase::Steady;
        self.next_probe = now + PROBE_EVERY.max(Duration::from_secs_f64(mean / 1e6 * PROBE_EVERY_LATENCIES));
    }

    fn back_off(&mut self) {
        self.set(self.limit * BACK_OFF);
    }

    fn set(&mut self, limit: f64) {
        self.limit = limit.clamp(f64::from(self.settings.min), f64::from(self.settings.max));
    }

    fn in_force(&self) -> u32 {
        let limit = match self.phase {
            Phase::Steady => self.limit,
            Phase::Drain { .. } | Phase::Measure => (self.limit / 2.0).max(f64::from(self.settings.min)),
        };
        // From 1 to u32::MAX by the settings, so that nothing is cut off but the fraction.
        limit as u32
    }
}
