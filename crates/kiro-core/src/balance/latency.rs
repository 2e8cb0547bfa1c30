//! How long does a replica take to answer at the moment?
//!
//! The peak-EWMA of Finagle and Linkerd: an answer slower than the estimate is the new estimate at once, a faster one pulls it
//! down gradually, by how much time has passed, and without answers it decays, so that a replica once slow is tried again.
//!
//! One word holds the estimate and its time, so that several threads change both at once by compare-and-swap.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What an unmeasured replica is taken to need where the other is unmeasured too: Linkerd's default. It only matters beside a
/// replica of which nothing but "longer than so and so" is known.
const GUESS_NANOS: f32 = 30e6;

/// No estimate falls below a microsecond: what is less is decay, not speed, and products with it would no longer count requests in
/// flight.
const LEAST_NANOS: f32 = 1e3;

/// An estimate's time is counted in 2^20 ns, about a millisecond: 32 bits of them go round in 52 days.
const TICK_BITS: u32 = 20;

/// Workers read the clock at slightly different times, so an estimate can be from a moment ahead. Up to so many ticks (over an
/// hour) are read like that; more is a count that has gone round, and has long decayed.
const AHEAD_TICKS: u32 = 1 << 22;

/// What is known of a latency, decayed to the moment of the question.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Latency {
    nanos: f32,
    /// Whether an answer was measured: else `nanos` is only what it takes at least.
    measured: bool,
}

impl Latency {
    /// How this one compares with another's: two figures of the same measure. One that was never measured counts like the other,
    /// so that requests in flight alone decide: with zero a newcomer would draw all requests, with a high guess it would get none.
    pub(super) fn against(self, other: Self) -> (f64, f64) {
        let least = if self.measured || other.measured { LEAST_NANOS } else { GUESS_NANOS };
        let (mut own, mut others) = (self.nanos.max(least), other.nanos.max(least));
        if !self.measured {
            own = own.max(others);
        } else if !other.measured {
            others = others.max(own);
        }
        (f64::from(own), f64::from(others))
    }

    /// The estimate, where an answer was measured.
    pub(super) fn known(self) -> Option<Duration> {
        self.measured.then(|| Duration::from_nanos(self.nanos as u64))
    }
}

/// The estimate's word: 32 bits of `f32`, whose sign says that nothing was measured, and 32 of ticks.
#[derive(Debug, Clone, Copy)]
struct Word {
    latency: Latency,
    tick: u32,
}

impl Word {
    fn unpack(word: u64) -> Self {
        let value = f32::from_bits((word >> 32) as u32);
        let latency = Latency { nanos: value.abs(), measured: value.is_sign_positive() };
        Self { latency, tick: word as u32 }
    }

    fn pack(self) -> u64 {
        let value = self.latency.nanos.abs();
        let value = if self.latency.measured { value } else { -value };
        u64::from(value.to_bits()) << 32 | u64::from(self.tick)
    }

    /// What is left of the estimate's weight, and the tick to write with a new one.
    fn weight(self, now: u64, decay: Duration) -> (f32, u32) {
        let tick = tick(now);
        if self.tick.wrapping_sub(tick) <= AHEAD_TICKS {
            return (1.0, self.tick);
        }
        let passed = f64::from(tick.wrapping_sub(self.tick)) * f64::from(1_u32 << TICK_BITS);
        ((-passed / decay.as_nanos() as f64).exp() as f32, tick)
    }
}

/// Cut off on purpose: the count goes round.
fn tick(nanos: u64) -> u32 {
    (nanos >> TICK_BITS) as u32
}

/// The latency of a replica, shared by all workers. Times are nanoseconds since the set of replicas began.
#[derive(Debug)]
pub(super) struct PeakEwma(AtomicU64);

impl PeakEwma {
    /// One of which nothing is known.
    pub(super) fn unknown() -> Self {
        Self(AtomicU64::new(Self::nothing(0)))
    }

    fn nothing(now: u64) -> u64 {
        Word { latency: Latency { nanos: 0.0, measured: false }, tick: tick(now) }.pack()
    }

    /// The estimate as of `now`.
    pub(super) fn read(&self, now: u64, decay: Duration) -> Latency {
        let word = Word::unpack(self.0.load(Ordering::Relaxed));
        let (weight, _) = word.weight(now, decay);
        Latency { nanos: word.latency.nanos * weight, ..word.latency }
    }

    /// An answer came after `sample`.
    pub(super) fn observe(&self, now: u64, sample: Duration, decay: Duration) {
        let nanos = sample.as_nanos() as f32;
        self.change(|word| {
            let (weight, tick) = word.weight(now, decay);
            let old = word.latency;
            let nanos = if old.measured && nanos < old.nanos {
                old.nanos * weight + nanos * (1.0 - weight)
            } else {
                nanos
            };
            Some(Word { latency: Latency { nanos, measured: true }, tick })
        });
    }

    /// Something ended after `sample` that was no answer, or none that took its time: it can show a replica to be slow, never to be
    /// fast.
    pub(super) fn at_least(&self, now: u64, sample: Duration, decay: Duration) {
        let nanos = sample.as_nanos() as f32;
        self.change(|word| {
            let (weight, tick) = word.weight(now, decay);
            let old = word.latency;
            (nanos > old.nanos * weight).then_some(Word { latency: Latency { nanos, ..old }, tick })
        });
    }

    /// Begins anew with one answer, or with nothing.
    pub(super) fn reset(&self, now: u64, sample: Option<Duration>) {
        let word = sample.map_or(Self::nothing(now), |sample| {
            Word { latency: Latency { nanos: sample.as_nanos() as f32, measured: true }, tick: tick(now) }
                .pack()
        });
        self.0.store(word, Ordering::Relaxed);
    }

    fn change(&self, mut change: impl FnMut(Word) -> Option<Word>) {
        // `Err` is a change that had nothing to do.
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            change(Word::unpack(word)).map(Word::pack)
        });
    }
}
