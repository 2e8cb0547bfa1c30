//! How long does a replica take to answer at the moment?
//!
//! The peak-EWMA of Finagle and Linkerd: an answer slower than the estimate is the new estimate at once, a faster one pulls it
//! down gradually, by how much time has passed, and without answers it decays, so that a replica once slow is tried again.
//!
//! One word holds the estimate and its time, so that several threads change both at once by compare-and-swap.

use std::ops::Range;
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

/// After how long, at the soonest and at the latest, a latency is asked for anew.
const OLD_NANOS: Range<u64> = 1_000_000_000..5_000_000_000;

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
        match (self.measured, other.measured) {
            (true, false) => others = others.max(own),
            (false, true) => own = own.max(others),
            (true, true) | (false, false) => {}
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

    /// Whether it has been known for so long that it should be asked for anew: ten times as long as an answer took, but after a
    /// second at the soonest, so that a slow replica slows down few requests, and after five at the latest.
    pub(super) fn is_old(&self, now: u64) -> bool {
        let word = Word::unpack(self.0.load(Ordering::Relaxed));
        let tick = tick(now);
        if word.tick.wrapping_sub(tick) <= AHEAD_TICKS {
            return false;
        }
        let passed = u64::from(tick.wrapping_sub(word.tick)) << TICK_BITS;
        let ten_times = (word.latency.nanos * 10.0) as u64;
        passed >= ten_times.clamp(OLD_NANOS.start, OLD_NANOS.end)
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

#[cfg(test)]
mod tests {
    use super::*;

    const DECAY: Duration = Duration::from_secs(10);
    const MILLISECOND: u64 = 1_000_000;

    fn milliseconds(latency: Latency) -> f64 {
        f64::from(latency.nanos) / 1e6
    }

    /// The rule in plain floating point, as tower has it: a peak at once, else by the time that has passed.
    #[derive(Default)]
    struct Model {
        estimate: Option<f64>,
        at: u64,
    }

    impl Model {
        fn weight(&self, now: u64) -> f64 {
            (-(now.saturating_sub(self.at) as f64) / DECAY.as_nanos() as f64).exp()
        }

        fn observe(&mut self, now: u64, sample: f64) {
            self.estimate = Some(match self.estimate {
                Some(old) if sample < old => old * self.weight(now) + sample * (1.0 - self.weight(now)),
                Some(_) | None => sample,
            });
            self.at = now;
        }
    }

    fn random(seed: &mut u64) -> u64 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *seed >> 20
    }

    #[test]
    fn agrees_with_the_rule_in_plain_figures() {
        for seed in 0..300 {
            let (ewma, mut model, mut dice) = (PeakEwma::unknown(), Model::default(), seed);
            // Some begin long after their set did, where ticks go round in the middle of the run.
            let mut now = if seed % 3 == 0 { ((1_u64 << 32) << TICK_BITS) - 20_000 * MILLISECOND } else { 0 };
            ewma.reset(now, None);
            for step in 0..200 {
                now += random(&mut dice) % (MILLISECOND << (random(&mut dice) % 12));
                let sample = random(&mut dice) % (MILLISECOND << (random(&mut dice) % 8));
                ewma.observe(now, Duration::from_nanos(sample), DECAY);
                model.observe(now, sample as f64);
                let estimate = f64::from(ewma.read(now, DECAY).nanos);
                let expected = model.estimate.unwrap();
                // A tick is a ten-thousandth of the decay; the errors of a few of them add up.
                assert!((estimate - expected).abs() <= expected * 0.01 + 2.0, "seed {seed} step {step}");
            }
        }
    }

    #[test]
    fn a_peak_counts_at_once_and_is_forgotten_gradually() {
        let ewma = PeakEwma::unknown();
        for now in 0..1000 {
            ewma.observe(now * MILLISECOND, Duration::from_millis(2), DECAY);
        }
        ewma.observe(1000 * MILLISECOND, Duration::from_millis(100), DECAY);
        assert!((milliseconds(ewma.read(1000 * MILLISECOND, DECAY)) - 100.0).abs() < 0.1);
        ewma.observe(1001 * MILLISECOND, Duration::from_millis(2), DECAY);
        assert!(milliseconds(ewma.read(1001 * MILLISECOND, DECAY)) > 99.0);
        for now in 1002..11_000 {
            ewma.observe(now * MILLISECOND, Duration::from_millis(2), DECAY);
        }
        let after_one_decay = milliseconds(ewma.read(11_000 * MILLISECOND, DECAY));
        assert!((after_one_decay - (2.0 + 98.0 / std::f64::consts::E)).abs() < 1.0, "{after_one_decay}");
        // Without answers too, so that it is tried again.
        let later = milliseconds(ewma.read(61_000 * MILLISECOND, DECAY));
        assert!(later < 0.5, "{later}");
    }

    #[test]
    fn an_estimate_is_old_after_ten_times_what_it_says() {
        for (sample, old) in [(2, 1_000), (99, 1_000), (200, 2_000), (499, 4_990), (2_000, 5_000)] {
            let ewma = PeakEwma::unknown();
            ewma.observe(0, Duration::from_millis(sample), DECAY);
            // A tick is about a millisecond.
            assert!(!ewma.is_old((old - 10) * MILLISECOND), "{sample} ms");
            assert!(ewma.is_old((old + 10) * MILLISECOND), "{sample} ms");
        }
        let ewma = PeakEwma::unknown();
        ewma.observe(10 * MILLISECOND, Duration::MAX, DECAY);
        assert!(!ewma.is_old(0) && ewma.is_old(6_000 * MILLISECOND));
    }

    #[test]
    fn who_went_away_makes_nobody_fast() {
        let ewma = PeakEwma::unknown();
        ewma.observe(0, Duration::from_millis(100), DECAY);
        for now in 1..1000 {
            ewma.at_least(now * MILLISECOND, Duration::from_millis(1), DECAY);
        }
        let unmoved = milliseconds(ewma.read(0, DECAY));
        assert!(unmoved > 99.9, "{unmoved}");
        ewma.at_least(1000 * MILLISECOND, Duration::from_millis(500), DECAY);
        assert!(milliseconds(ewma.read(1000 * MILLISECOND, DECAY)) > 499.0);
    }

    #[test]
    fn an_unknown_latency_counts_like_the_other_one() {
        let unknown = PeakEwma::unknown();
        let known = PeakEwma::unknown();
        known.observe(0, Duration::from_millis(7), DECAY);
        let read = |ewma: &PeakEwma| ewma.read(0, DECAY);
        let (own, others) = read(&unknown).against(read(&known));
        assert!(own == others && (own - 7e6).abs() < 10.0);
        let (own, others) = read(&known).against(read(&unknown));
        assert!(own == others && (own - 7e6).abs() < 10.0);
        let (own, others) = read(&unknown).against(read(&unknown));
        assert!(own == others && own > 0.0);
        assert_eq!(read(&unknown).known(), None);

        // What is known of it all the same counts: somebody waited for it in vain.
        unknown.at_least(0, Duration::from_secs(1), DECAY);
        let (own, others) = read(&unknown).against(read(&known));
        assert!(own > 0.9e9 && others < 8e6);
        let (others, own) = read(&PeakEwma::unknown()).against(read(&unknown));
        assert!(own > 0.9e9 && others < 31e6);
        assert_eq!(read(&unknown).known(), None);
    }

    #[test]
    fn clocks_that_differ_and_ticks_that_go_round_do_no_harm() {
        let ewma = PeakEwma::unknown();
        let now = 3_600_000 * MILLISECOND;
        ewma.observe(now, Duration::from_millis(50), DECAY);
        // A worker that is behind neither decays it nor turns its time back.
        assert!(milliseconds(ewma.read(now - 5 * MILLISECOND, DECAY)) > 49.9);
        ewma.observe(now - 5 * MILLISECOND, Duration::from_millis(1), DECAY);
        assert!(milliseconds(ewma.read(now, DECAY)) > 49.9);
        // Idle for weeks.
        for days in [1, 20, 25, 26, 30, 50, 60, 500] {
            let ewma = PeakEwma::unknown();
            ewma.observe(now, Duration::from_secs(60), DECAY);
            let later = now + days * 86_400_000 * MILLISECOND;
            assert!(milliseconds(ewma.read(later, DECAY)) < 1.0, "after {days} days");
        }
        for sample in [Duration::ZERO, Duration::MAX] {
            ewma.observe(u64::MAX, sample, DECAY);
            assert!(ewma.read(u64::MAX, DECAY).against(ewma.read(0, DECAY)).0.is_finite());
        }
    }

    #[test]
    fn no_thread_loses_a_peak() {
        let ewma = PeakEwma::unknown();
        std::thread::scope(|scope| {
            for thread in 1..=4_u64 {
                let ewma = &ewma;
                scope.spawn(move || {
                    for sample in 0..10_000 {
                        ewma.observe(0, Duration::from_nanos(1000 + sample * thread), DECAY);
                    }
                });
            }
        });
        assert_eq!(ewma.read(0, DECAY).known(), Some(Duration::from_nanos(1000 + 9_999 * 4)));
    }
}
