//! Is it worth asking this service at all?
//!
//! A circuit breaker for an edge (one caller's sidecar to one callee), shared by all workers. **Closed**, it counts; where too
//! large a share of the requests in a sliding window fails, it opens. **Open**, it refuses at once, which costs the caller nothing
//! and lets the callee recover. After a while it is **half-open**: a few trial requests at a time, of which all must succeed to
//! close it; one failure opens it again, for twice as long.
//!
//! A request is admitted once, however many attempts follow, and its outcome is what its caller was told: one replica that is gone
//! is the balancer's business, and must not cut off those that are left. Failures are what says that the service can't (no
//! connection, a reset, a timeout, 5xx), not what it says about the request (4xx).
//!
//! A request costs a load when it is admitted and one compare-and-swap when it ends. Only transitions lock.
//!
//! **Invariant**: a trial has its place back however it ends, also when its caller goes away or never says how it ended.

mod settings;
mod window;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use settings::{BreakerSettings, BreakerSettingsError, OPEN_MAX, OPEN_MIN, TRIALS_MAX};
pub use window::{WINDOW, WindowCounts};

use window::Window;

/// How long a round of trials may take. One that hangs has no outcome; after this time, new ones are tried in its stead.
pub const ROUND_MAX: Duration = Duration::from_secs(30);

/// What a caller is told while all places for trials are taken: ask again in a second.
const RETRY_AFTER_TRIALS: Duration = Duration::from_secs(1);

/// What a breaker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BreakerState {
    /// It lets all pass.
    Closed,
    /// It refuses.
    Open,
    /// It lets trials pass.
    HalfOpen,
}

impl BreakerState {
    /// The word for log, metric and `/config`.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

impl fmt::Display for BreakerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A change of state: an event for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// What it was.
    pub from: BreakerState,
    /// What it is.
    pub to: BreakerState,
    /// Requests and failures in the window: why it opened.
    pub window: WindowCounts,
    /// How long it stays open, if it is now.
    pub open_for: Option<Duration>,
}

/// How an admitted request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The service answered.
    Success,
    /// The service could not.
    Failure,
    /// The caller went away before either was known.
    Abandoned,
}

/// Whether a request may go on. What lets it pass goes back to [`Breaker::record`].
#[derive(Debug)]
#[must_use = "an admitted request's outcome is recorded"]
pub enum Admission {
    /// Yes.
    Closed(Permit),
    /// Yes, and much depends on it.
    Trial(Trial),
    /// No.
    Refused {
        /// When another one may be tried.
        retry_after: Duration,
    },
}

/// Lets a request pass a closed breaker.
#[derive(Debug)]
pub struct Permit {
    period: u64,
}

/// Lets a request pass a half-open breaker. Dropped without a record, it frees its place.
#[derive(Debug)]
pub struct Trial {
    breaker: Arc<Breaker>,
    period: u64,
    transition: Option<Transition>,
}

impl Trial {
    /// The event, if this trial is the one that began the round.
    #[must_use]
    pub fn transition(&self) -> Option<Transition> {
        self.transition
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.breaker.leave(self.period);
    }
}

/// What a breaker shows of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerSnapshot {
    /// Its state.
    pub state: BreakerState,
    /// Since when.
    pub since: Instant,
    /// When the next trial may pass, if it is open.
    pub next_trial: Option<Instant>,
    /// What it has counted while closed.
    pub window: WindowCounts,
    /// How often it ever opened.
    pub opened_count: u64,
    /// Trials on their way.
    pub trials_in_flight: u32,
    /// How many succeeded in this round.
    pub trials_succeeded: u32,
}

/// An edge's breaker.
#[derive(Debug)]
pub struct Breaker {
    settings: BreakerSettings,
    /// Time is counted from here.
    base: Instant,
    /// What decides, in one word ([`Phase`]), so that a trial is admitted or not by one compare-and-swap.
    phase: AtomicU64,
    /// Until when it is open, in nanoseconds from `base`. Written before the phase says open.
    open_until: AtomicU64,
    window: Window,
    history: Mutex<History>,
}

/// What only transitions change.
#[derive(Debug)]
struct History {
    since: Instant,
    opened_count: u64,
    /// How often it opened again without having been closed for long.
    reopened: u32,
}

/// The word that decides. The period counts changes of state: an outcome belongs to the period in which its request was admitted,
/// and says nothing about another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Phase {
    state: BreakerState,
    in_flight: u32,
    succeeded: u32,
    period: u64,
}

impl Phase {
    const COUNT_BITS: u32 = 8;
    const COUNT_MASK: u64 = (1 << Self::COUNT_BITS) - 1;
    const STATE_BITS: u32 = 2;
    const PERIOD_SHIFT: u32 = 2 * Self::COUNT_BITS + Self::STATE_BITS;

    const fn new(state: BreakerState, period: u64) -> Self {
        Self { state, in_flight: 0, succeeded: 0, period }
    }

    fn pack(self) -> u64 {
        let state = match self.state {
            BreakerState::Closed => 0,
            BreakerState::Open => 1,
            BreakerState::HalfOpen => 2,
        };
        let counts = (u64::from(self.in_flight) & Self::COUNT_MASK) << Self::COUNT_BITS
            | (u64::from(self.succeeded) & Self::COUNT_MASK);
        self.period << Self::PERIOD_SHIFT | state << (2 * Self::COUNT_BITS) | counts
    }

    fn unpack(word: u64) -> Self {
        let count = |shift: u32| u32::try_from(word >> shift & Self::COUNT_MASK).unwrap_or(0);
        let state = match word >> (2 * Self::COUNT_BITS) & ((1 << Self::STATE_BITS) - 1) {
            0 => BreakerState::Closed,
            1 => BreakerState::Open,
            _ => BreakerState::HalfOpen,
        };
        Self {
            state,
            in_flight: count(Self::COUNT_BITS),
            succeeded: count(0),
            period: word >> Self::PERIOD_SHIFT,
        }
    }
}

impl Breaker {
    /// A closed one. It is shared, since a trial holds on to it.
    ///
    /// # Errors
    /// When a setting makes no sense.
    pub fn new(settings: BreakerSettings, now: Instant) -> Result<Arc<Self>, BreakerSettingsError> {
        settings.check()?;
        Ok(Arc::new(Self {
            settings,
            base: now,
            phase: AtomicU64::new(Phase::new(BreakerState::Closed, 0).pack()),
            open_until: AtomicU64::new(0),
            window: Window::default(),
            history: Mutex::new(History { since: now, opened_count: 0, reopened: 0 }),
        }))
    }

    /// Whether a request may go on.
    pub fn admit(self: &Arc<Self>, now: Instant) -> Admission {
        let phase = self.phase();
        match phase.state {
            BreakerState::Closed => Admission::Closed(Permit { period: phase.period }),
            BreakerState::HalfOpen => self.admit_trial(now),
            BreakerState::Open => match self.left_open(now) {
                Some(retry_after) => Admission::Refused { retry_after },
                None => self.begin_round(now),
            },
        }
    }

    /// How an admitted request ended; the event, if that changed the state. `random` gives 64 random bits where they are needed:
    /// breakers that opened together should not try together.
    pub fn record(
        &self,
        now: Instant,
        admission: Admission,
        outcome: Outcome,
        random: impl FnOnce() -> u64,
    ) -> Option<Transition> {
        match (admission, outcome) {
            (Admission::Refused { .. }, _)
            | (Admission::Closed(_) | Admission::Trial(_), Outcome::Abandoned) => None,
            (Admission::Closed(permit), outcome) => self.count(now, permit, outcome, random),
            (Admission::Trial(trial), Outcome::Success) => self.trial_succeeded(now, trial),
            (Admission::Trial(trial), Outcome::Failure) => self.trial_failed(now, &trial, random),
        }
    }

    /// What to show of it.
    #[must_use]
    pub fn snapshot(&self, now: Instant) -> BreakerSnapshot {
        let history = self.history();
        let phase = self.phase();
        let open_until = Duration::from_nanos(self.open_until.load(Ordering::Relaxed));
        BreakerSnapshot {
            state: phase.state,
            since: history.since,
            next_trial: (phase.state == BreakerState::Open)
                .then(|| self.base.checked_add(open_until))
                .flatten(),
            window: self.window.counts(self.second(now)),
            opened_count: history.opened_count,
            trials_in_flight: phase.in_flight,
            trials_succeeded: phase.succeeded,
        }
    }

    /// What it was made from.
    #[must_use]
    pub fn settings(&self) -> BreakerSettings {
        self.settings
    }

    fn count(
        &self,
        now: Instant,
        permit: Permit,
        outcome: Outcome,
        random: impl FnOnce() -> u64,
    ) -> Option<Transition> {
        if self.phase().period != permit.period {
            return None;
        }
        let failed = outcome == Outcome::Failure;
        let second = self.second(now);
        self.window.add(second, failed);
        // A success never opens it, and so needs no look at the window.
        if !failed || !self.fails_too_often(self.window.counts(second)) {
            return None;
        }
        let mut history = self.history();
        let phase = self.phase();
        if phase.period != permit.period {
            return None;
        }
        let window = self.window.counts(second);
        // Closed for as long as it is ever open: then what follows is another trouble, and not the same one.
        let closed_for = now.saturating_duration_since(history.since);
        history.reopened = if history.opened_count == 0 || closed_for >= self.settings.open_max {
            0
        } else {
            history.reopened.saturating_add(1)
        };
        Some(self.open(now, &mut history, phase, window, random()))
    }

    fn fails_too_often(&self, counts: WindowCounts) -> bool {
        counts.requests >= u64::from(self.settings.requests_min)
            && u128::from(counts.failures) * 100
                >= u128::from(counts.requests) * u128::from(self.settings.failures_percent)
    }

    /// A place for a trial in a round that has begun.
    fn admit_trial(self: &Arc<Self>, now: Instant) -> Admission {
        let mut word = self.phase.load(Ordering::Acquire);
        loop {
            let phase = Phase::unpack(word);
            if phase.state != BreakerState::HalfOpen {
                // The round has just ended, one way or the other.
                return match phase.state {
                    BreakerState::Closed => Admission::Closed(Permit { period: phase.period }),
                    BreakerState::Open | BreakerState::HalfOpen => {
                        Admission::Refused { retry_after: self.left_open(now).unwrap_or(RETRY_AFTER_TRIALS) }
                    }
                };
            }
            if phase.in_flight >= self.settings.trials {
                return self.renew_round(now);
            }
            let taken = Phase { in_flight: phase.in_flight.saturating_add(1), ..phase }.pack();
            match self.phase.compare_exchange_weak(word, taken, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Admission::Trial(self.trial(phase.period, None)),
                Err(newer) => word = newer,
            }
        }
    }

    /// From open to half-open, by whoever asks first once the time is over.
    fn begin_round(self: &Arc<Self>, now: Instant) -> Admission {
        let mut history = self.history();
        let phase = self.phase();
        if phase.state != BreakerState::Open || self.left_open(now).is_some() {
            drop(history);
            return self.admit_trial(now);
        }
        history.since = now;
        let begun = self.enter(phase, BreakerState::HalfOpen, 1);
        let transition = Transition {
            from: BreakerState::Open,
            to: BreakerState::HalfOpen,
            window: self.window.counts(self.second(now)),
            open_for: None,
        };
        Admission::Trial(self.trial(begun.period, Some(transition)))
    }

    /// All places are taken: no, unless the round has taken so long that those who have them are given up.
    fn renew_round(self: &Arc<Self>, now: Instant) -> Admission {
        // Nobody waits for the lock: who holds it decides.
        let Ok(mut history) = self.history.try_lock() else {
            return Admission::Refused { retry_after: RETRY_AFTER_TRIALS };
        };
        let phase = self.phase();
        if phase.state != BreakerState::HalfOpen || now.saturating_duration_since(history.since) < ROUND_MAX {
            return Admission::Refused { retry_after: RETRY_AFTER_TRIALS };
        }
        history.since = now;
        let begun = self.enter(phase, BreakerState::HalfOpen, 1);
        Admission::Trial(self.trial(begun.period, None))
    }

    fn trial(self: &Arc<Self>, period: u64, transition: Option<Transition>) -> Trial {
        Trial { breaker: Arc::clone(self), period, transition }
    }

    /// Counts a success of the trial's own round, and frees its place when the trial is dropped.
    fn trial_succeeded(&self, now: Instant, trial: Trial) -> Option<Transition> {
        let counted = self.phase.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            let phase = Phase::unpack(word);
            (phase.period == trial.period).then(|| {
                Phase { succeeded: phase.succeeded.saturating_add(1).min(TRIALS_MAX), ..phase }.pack()
            })
        });
        let succeeded = Phase::unpack(counted.ok()?).succeeded.saturating_add(1);
        if succeeded < self.settings.successes {
            return None;
        }
        let mut history = self.history();
        let phase = self.phase();
        if phase.period != trial.period {
            return None;
        }
        let window = self.window.counts(self.second(now));
        history.since = now;
        self.window.clear();
        self.enter(phase, BreakerState::Closed, 0);
        Some(Transition { from: phase.state, to: BreakerState::Closed, window, open_for: None })
    }

    fn trial_failed(&self, now: Instant, trial: &Trial, random: impl FnOnce() -> u64) -> Option<Transition> {
        let mut history = self.history();
        let phase = self.phase();
        if phase.period != trial.period {
            return None;
        }
        history.reopened = history.reopened.saturating_add(1);
        let window = self.window.counts(self.second(now));
        Some(self.open(now, &mut history, phase, window, random()))
    }

    /// Opens it. The lock is held.
    fn open(
        &self,
        now: Instant,
        history: &mut History,
        phase: Phase,
        window: WindowCounts,
        random: u64,
    ) -> Transition {
        let factor = 1_u32.checked_shl(history.reopened.min(31)).unwrap_or(u32::MAX);
        let whole = self.settings.open_base.saturating_mul(factor).min(self.settings.open_max);
        let open_for = jittered(whole, random);
        history.since = now;
        history.opened_count = history.opened_count.saturating_add(1);
        self.open_until.store(self.nanos(now).saturating_add(nanos(open_for)), Ordering::Relaxed);
        self.enter(phase, BreakerState::Open, 0);
        Transition { from: phase.state, to: BreakerState::Open, window, open_for: Some(open_for) }
    }

    /// Enters the next period. The lock is held, so that nobody else does; counts of the period that ends are lost with it.
    fn enter(&self, phase: Phase, state: BreakerState, in_flight: u32) -> Phase {
        let next = Phase { in_flight, ..Phase::new(state, phase.period.wrapping_add(1)) };
        self.phase.store(next.pack(), Ordering::Release);
        Phase::unpack(next.pack())
    }

    /// Frees a trial's place, if its round is still the one that runs.
    fn leave(&self, period: u64) {
        let _ = self.phase.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            let phase = Phase::unpack(word);
            (phase.period == period && phase.state == BreakerState::HalfOpen)
                .then(|| Phase { in_flight: phase.in_flight.saturating_sub(1), ..phase }.pack())
        });
    }

    /// How long it stays open, if it does.
    fn left_open(&self, now: Instant) -> Option<Duration> {
        let left = self.open_until.load(Ordering::Relaxed).saturating_sub(self.nanos(now));
        (left > 0).then(|| Duration::from_nanos(left))
    }

    fn phase(&self) -> Phase {
        Phase::unpack(self.phase.load(Ordering::Acquire))
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.base).as_secs()
    }

    fn nanos(&self, now: Instant) -> u64 {
        nanos(now.saturating_duration_since(self.base))
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Three quarters to all of a time: spread out, and never longer than the settings say.
fn jittered(whole: Duration, random: u64) -> Duration {
    let quarter = nanos(whole) / 4;
    let less = u64::try_from((u128::from(quarter) * u128::from(random)) >> 64).unwrap_or(0);
    whole.saturating_sub(Duration::from_nanos(less))
}

#[cfg(test)]
mod tests;
