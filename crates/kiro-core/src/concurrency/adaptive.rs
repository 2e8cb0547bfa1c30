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
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

use super::Outcome;

/// A window is no shorter, nor shorter than a latency (what a changed limit does is not to be seen sooner), nor than
/// [`SAMPLES_MIN`] requests.
const WINDOW: Duration = Duration::from_millis(100);
/// Envoy asks for as many: with them the mean of latencies that vary as much as they are long is known to a seventh.
const SAMPLES_MIN: u64 = 50;
/// A baseline is worth twice as many: for ten seconds each window is compared with it.
const BASELINE_SAMPLES_MIN: u64 = 100;
/// Where there are fewer requests than that in a second, so many have to do.
const SLOW_WINDOW: Duration = Duration::from_secs(1);
const SLOW_SAMPLES_MIN: u64 = 10;
/// Latency may be higher than its baseline by this factor without being called queueing. Envoy has 1.25 (its `buffer`), Netflix 1.5.
/// With less, a baseline that was low by chance costs goodput; with more, a limit of far more than twice what is right finds at its
/// half a baseline by which it is fine, the more so the fewer slots an application has.
const TOLERANCE: f64 = 1.35;
/// No window aims at less of a limit, so that one that was slow by chance does not close the door (Netflix). Half of the way there
/// is gone in one step: chance goes both ways, and what is lost by shrinking too fast is goodput, by growing only latency.
const GRADIENT_MIN: f64 = 0.5;
/// What a window with refusals or time-outs leaves of a limit (Netflix's AIMD limit).
const BACK_OFF: f64 = 0.9;
/// As BBR's window of its minimum; where latencies are long, after so many of them, since a probe takes two or three.
const PROBE_EVERY: (Duration, f64) = (Duration::from_secs(10), 20.0);
/// The first windows may have been queueing already, and so may a probe that found less than the one before.
const PROBE_AGAIN: (Duration, f64) = (Duration::from_secs(1), 5.0);
/// A baseline that a probe found lower than this part of the one before was measured in a queue: the next may be too.
const STILL_FALLING: f64 = 0.9;
/// One that is higher by less than this factor may be so by chance, and then both are worth something.
const SAME: f64 = 1.4;
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
    /// Requests that were admitted before this do not count, in nanoseconds since the origin: while a baseline is measured, those
    /// from before its probe would say what many requests at the same time do.
    admitted_from: AtomicU64,
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
            admitted_from: AtomicU64::new(0),
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
        let now_nanos = nanos(now.saturating_duration_since(self.origin));
        match outcome {
            Outcome::Answered => {
                if now_nanos.saturating_sub(nanos(latency)) >= self.admitted_from.load(Ordering::Relaxed) {
                    let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
                    let sample = (1 << COUNT_SHIFT) | micros.min(LATENCY_MICROS_MAX);
                    self.samples.fetch_add(sample, Ordering::Relaxed);
                }
            }
            Outcome::Overloaded => self.overloaded.store(true, Ordering::Relaxed),
            Outcome::Ignored => return None,
        }
        if now_nanos < self.due.load(Ordering::Relaxed) {
            return None;
        }
        // Rare, and another worker that is at it does it.
        let mut gradient = match self.gradient.try_lock() {
            Ok(gradient) => gradient,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        self.close_window(&mut gradient, now, now_nanos, bound)
    }

    fn close_window(
        &self,
        gradient: &mut Gradient,
        now: Instant,
        now_nanos: u64,
        bound: &AtomicBool,
    ) -> Option<u32> {
        let open = now.saturating_duration_since(gradient.opened);
        let count = self.samples.load(Ordering::Relaxed) >> COUNT_SHIFT;
        let enough = count >= gradient.samples() || (open >= SLOW_WINDOW && count >= SLOW_SAMPLES_MIN);
        if open < gradient.window() || !(enough || self.overloaded.load(Ordering::Relaxed)) {
            return None;
        }
        let samples = self.samples.swap(0, Ordering::Relaxed);
        let (count, sum) = (samples >> COUNT_SHIFT, samples & ((1 << COUNT_SHIFT) - 1));
        let window = Window {
            mean_micros: (enough && count > 0).then(|| sum as f64 / count as f64),
            overloaded: self.overloaded.swap(false, Ordering::Relaxed),
            bound: bound.swap(false, Ordering::Relaxed),
        };
        let limit = gradient.close(now, &window);
        match gradient.phase {
            Phase::Drain => self.admitted_from.store(now_nanos, Ordering::Relaxed),
            Phase::Measure => {}
            Phase::Steady => self.admitted_from.store(0, Ordering::Relaxed),
        }
        self.due.store(now_nanos.saturating_add(nanos(gradient.window())), Ordering::Relaxed);
        Some(limit)
    }
}

/// From a mean in microseconds.
fn latency(micros: f64) -> Duration {
    Duration::from_micros(micros as u64)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What was seen in a stretch of time.
#[derive(Clone, Copy, Debug)]
struct Window {
    /// None: too few were answered to say.
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
    /// Half the limit, for a latency: most of what was in flight before ends.
    Drain,
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
    /// Of the last window that the limit followed.
    latency: Duration,
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
            latency: Duration::ZERO,
            next_probe: now + PROBE_AGAIN.0,
            measured_at: limit,
        }
    }

    /// How long a window is at least.
    fn window(&self) -> Duration {
        self.latency.clamp(WINDOW, SLOW_WINDOW)
    }

    /// How many samples a window has.
    fn samples(&self) -> u64 {
        match self.phase {
            Phase::Drain => 0,
            Phase::Steady => SAMPLES_MIN,
            Phase::Measure => BASELINE_SAMPLES_MIN,
        }
    }

    /// A window has ended; the limit for the next.
    fn close(&mut self, now: Instant, window: &Window) -> u32 {
        self.opened = now;
        match (self.phase, window.mean_micros) {
            (Phase::Drain, _) => self.phase = Phase::Measure,
            (Phase::Measure, Some(mean)) => self.measured(now, mean),
            (Phase::Steady, Some(mean)) => self.follow(now, mean, window),
            // The window has ended because the application refuses.
            (Phase::Steady | Phase::Measure, None) => self.back_off(),
        }
        self.in_force()
    }

    fn follow(&mut self, now: Instant, mean: f64, window: &Window) {
        self.latency = latency(mean);
        let baseline = match self.baseline_micros {
            None => mean,
            // What made it slow is over. How fast it is without queueing is still to be seen.
            Some(baseline) if mean < baseline / 2.0 => {
                self.next_probe = now;
                mean
            }
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
        let aim = self.limit * gradient + self.limit.sqrt();
        self.set(if aim < self.limit { f64::midpoint(self.limit, aim) } else { aim });
        if now >= self.next_probe || self.limit < self.measured_at / 2.0 {
            self.phase = Phase::Drain;
        }
    }

    fn measured(&mut self, now: Instant, mean: f64) {
        let before = self.baseline_micros.unwrap_or(mean);
        let falling = mean < before * STILL_FALLING;
        let same = !falling && mean < before * SAME;
        self.baseline_micros = Some(if same { f64::midpoint(mean, before) } else { mean });
        self.measured_at = self.limit;
        self.phase = Phase::Steady;
        let (every, latencies) = if falling { PROBE_AGAIN } else { PROBE_EVERY };
        self.next_probe = now + every.max(latency(mean * latencies));
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
            Phase::Drain | Phase::Measure => (self.limit / 2.0).max(f64::from(self.settings.min)),
        };
        // From 1 to u32::MAX by the settings, so that nothing is cut off but the fraction.
        limit as u32
    }
}
