//! Is this application fit for traffic, and what changed its state?
//!
//! Thresholds on consecutive results of active checks, so that one lost answer does not take a replica out and one lucky answer does
//! not put it back: Kubernetes' `failureThreshold` and `successThreshold`. What checks (HTTP, gRPC, TCP) and when to tell whom is the
//! caller's.

use std::fmt;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// How an application is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthSettings {
    interval: Duration,
    interval_not_ready: Duration,
    timeout: Duration,
    successes_at_start: NonZeroU32,
    successes: NonZeroU32,
    failures: NonZeroU32,
}

/// What is wrong with the settings of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HealthError {
    /// It would check without a pause.
    #[error("interval {0:?} is below {INTERVAL_MIN:?}; write {INTERVAL_MIN:?} or more")]
    IntervalTooShort(Duration),
    /// Changes would be noticed only after an hour.
    #[error("interval {0:?} is over {INTERVAL_MAX:?}; write {INTERVAL_MAX:?} or less")]
    IntervalTooLong(Duration),
    /// Every check would fail, or checks would overlap.
    #[error(
        "timeout {timeout:?} does not fit between 1ms and the interval {interval:?}; write one that does"
    )]
    Timeout {
        /// As given.
        timeout: Duration,
        /// As given.
        interval: Duration,
    },
    /// A threshold that is reached before any result.
    #[error("{0} is 0; write at least 1")]
    NoThreshold(&'static str),
}

/// A check costs the application a request; ten a second is plenty.
pub const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Rarer checks say nothing.
pub const INTERVAL_MAX: Duration = Duration::from_secs(3600);

/// While an application is not ready somebody waits for it, so it is asked more often than when it is.
const INTERVAL_NOT_READY: Duration = Duration::from_secs(1);

impl Default for HealthSettings {
    /// Every 5 s with 1 s to answer; ready after the first success at the start (nobody gains from a slower one), after 2 in a row
    /// when it had been unready; unready after 3 failures in a row (Kubernetes').
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(5),
            interval_not_ready: INTERVAL_NOT_READY,
            timeout: Duration::from_secs(1),
            successes_at_start: NonZeroU32::MIN,
            successes: NonZeroU32::MIN.saturating_add(1),
            failures: NonZeroU32::MIN.saturating_add(2),
        }
    }
}

impl HealthSettings {
    /// With other times.
    pub fn with_times(self, interval: Duration, timeout: Duration) -> Result<Self, HealthError> {
        if interval < INTERVAL_MIN {
            return Err(HealthError::IntervalTooShort(interval));
        }
        if interval > INTERVAL_MAX {
            return Err(HealthError::IntervalTooLong(interval));
        }
        if timeout < Duration::from_millis(1) || timeout > interval {
            return Err(HealthError::Timeout { timeout, interval });
        }
        Ok(Self { interval, interval_not_ready: interval.min(INTERVAL_NOT_READY), timeout, ..self })
    }

    /// With other thresholds: successes in a row to be ready again after a failure, failures in a row to be unready.
    pub fn with_thresholds(self, successes: u32, failures: u32) -> Result<Self, HealthError> {
        let successes = NonZeroU32::new(successes).ok_or(HealthError::NoThreshold("successes"))?;
        let failures = NonZeroU32::new(failures).ok_or(HealthError::NoThreshold("failures"))?;
        Ok(Self { successes, failures, ..self })
    }

    /// How long an answer may take.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// So many successes in a row make it ready again.
    #[must_use]
    pub fn successes(&self) -> u32 {
        self.successes.get()
    }

    /// So many failures in a row make it unready.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures.get()
    }

    /// How often a ready application is asked.
    #[must_use]
    pub fn interval(&self) -> Duration {
        self.interval
    }
}

/// Whether an application is fit for traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Nothing is known yet.
    Unknown,
    /// It is.
    Ready,
    /// It is not.
    Unready,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Unknown, Self::Ready, Self::Unready];

    /// Its name in log, metric and health document.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            State::Unknown => "unknown",
            State::Ready => "ready",
            State::Unready => "unready",
        }
    }
}

/// How a check failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// Nobody listens, or the connection broke.
    Connection,
    /// No answer in time.
    Timeout,
    /// An answer with a status that is not a success.
    Status(u16),
    /// gRPC's health service says something else than SERVING, by its number.
    NotServing(i32),
    /// A call of gRPC's health service that ended with this status, which is an error.
    Grpc(u16),
    /// The TLS handshake failed, for this reason.
    Tls(&'static str),
    /// An answer that can't be read.
    Protocol,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Connection => f.write_str("no connection"),
            Failure::Timeout => f.write_str("no answer in time"),
            Failure::Status(status) => write!(f, "status {status}"),
            Failure::NotServing(2) => f.write_str("NOT_SERVING"),
            Failure::NotServing(3) => f.write_str("SERVICE_UNKNOWN"),
            Failure::NotServing(number) => write!(f, "not SERVING but {number}"),
            Failure::Grpc(status) => write!(f, "gRPC status {status}"),
            Failure::Tls(code) => f.write_str(code),
            Failure::Protocol => f.write_str("an answer that can't be read"),
        }
    }
}

/// Why a state changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// So many checks in a row succeeded.
    Succeeded(u32),
    /// So many checks in a row failed, the last of them in this way.
    Failed(u32, Failure),
    /// A request, not a check, could not reach the application: it has ended or is being replaced, and there is nothing to wait for.
    Unreachable,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Succeeded(1) => f.write_str("a check succeeded"),
            Reason::Succeeded(count) => write!(f, "{count} checks in a row succeeded"),
            Reason::Failed(1, failure) => write!(f, "a check failed: {failure}"),
            Reason::Failed(count, failure) => {
                write!(f, "{count} checks in a row failed, the last one: {failure}")
            }
            Reason::Unreachable => f.write_str("a request found nobody who accepts connections"),
        }
    }
}

/// A change of state, for the log and for the peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// What it was.
    pub from: State,
    /// What it is.
    pub to: State,
    /// Why.
    pub reason: Reason,
    /// When.
    pub at: Instant,
}

/// The state of one application.
#[derive(Clone, Debug)]
pub struct Health {
    settings: HealthSettings,
    state: State,
    since: Instant,
    /// Results in a row of the kind that the last one was.
    successes: u32,
    failures: u32,
    failed_ever: bool,
    last_failure: Option<Failure>,
}

impl Health {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(settings: HealthSettings, now: Instant) -> Self {
        Self {
            settings,
            state: State::Unknown,
            since: now,
            successes: 0,
            failures: 0,
            failed_ever: false,
            last_failure: None,
        }
    }

    /// What it is made of.
    #[must_use]
    pub fn settings(&self) -> &HealthSettings {
        &self.settings
    }

    /// Whether it is fit for traffic.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Since when it is in this state.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

    /// How the last check failed, if the last one did.
    #[must_use]
    pub fn last_failure(&self) -> Option<Failure> {
        self.last_failure
    }

    /// A check has a result.
    pub fn record(&mut self, result: Result<(), Failure>, now: Instant) -> Option<Transition> {
        match result {
            Ok(()) => self.succeeded(now),
            Err(failure) => self.failed(failure, now),
        }
    }

    /// A request could not reach the application. Unready at once: a port where nobody listens is no matter of thresholds.
    pub fn unreachable(&mut self, now: Instant) -> Option<Transition> {
        self.successes = 0;
        self.failed_ever = true;
        self.last_failure = Some(Failure::Connection);
        self.change(State::Unready, Reason::Unreachable, now)
    }

    /// When to check next, after a check at `now`: the interval, a tenth more or less by `random`, so that the checks of many
    /// sidecars do not meet.
    #[must_use]
    pub fn next_check(&self, now: Instant, random: u64) -> Instant {
        let interval = match self.state {
            State::Ready => self.settings.interval,
            State::Unknown | State::Unready => self.settings.interval_not_ready,
        };
        let nanos = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX);
        let fifth = u128::from(nanos / 5);
        let jitter = u64::try_from((fifth * u128::from(random)) >> 64).unwrap_or(0);
        now + Duration::from_nanos((nanos - nanos / 10).saturating_add(jitter))
    }

    fn succeeded(&mut self, now: Instant) -> Option<Transition> {
        self.failures = 0;
        self.last_failure = None;
        self.successes = self.successes.saturating_add(1);
        let needed =
            if self.failed_ever { self.settings.successes } else { self.settings.successes_at_start };
        if self.successes < needed.get() {
            return None;
        }
        self.change(State::Ready, Reason::Succeeded(self.successes), now)
    }

    fn failed(&mut self, failure: Failure, now: Instant) -> Option<Transition> {
        self.successes = 0;
        self.last_failure = Some(failure);
        self.failures = self.failures.saturating_add(1);
        if self.failures < self.settings.failures.get() {
            return None;
        }
        self.failed_ever = true;
        self.change(State::Unready, Reason::Failed(self.failures, failure), now)
    }

    fn change(&mut self, to: State, reason: Reason, now: Instant) -> Option<Transition> {
        let from = std::mem::replace(&mut self.state, to);
        if from == to {
            return None;
        }
        self.since = now;
        Some(Transition { from, to, reason, at: now })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Results as letters (`.` a success, `x` a failure, `!` unreachable), and the state after each: `?`, `+`, `-`.
    fn check(settings: HealthSettings, results: &str, states: &str) {
        let start = Instant::now();
        let mut health = Health::new(settings, start);
        let mut seen = String::new();
        for (second, result) in results.chars().enumerate() {
            let (now, before) = (start + Duration::from_secs(second as u64), health.state());
            let change = match result {
                '.' => health.record(Ok(()), now),
                'x' => health.record(Err(Failure::Timeout), now),
                _ => health.unreachable(now),
            };
            match change {
                Some(change) => {
                    assert_ne!(change.from, change.to);
                    assert_eq!((change.from, change.to, change.at), (before, health.state(), health.since()));
                }
                None => assert_eq!(before, health.state()),
            }
            seen.push(match health.state() {
                State::Unknown => '?',
                State::Ready => '+',
                State::Unready => '-',
            });
        }
        assert_eq!(seen, states, "{results}");
    }

    #[test]
    fn thresholds_are_of_results_in_a_row() {
        let check = |results, states| check(HealthSettings::default(), results, states);
        check(".", "+");
        check("xx.", "??+");
        check("xxx.", "??--");
        check("xxx..", "??--+");
        check(".xx.xx.xx.xxx", "++++++++++++-");
        check(".xxx.x..", "+++----+");
        check(".!.", "+--");
        check(".!..", "+--+");
        check("!..", "--+");
        check(".!x..xx", "+---+++");
        check(".!!!..", "+----+");
    }

    #[test]
    fn thresholds_and_times_can_be_set() {
        let with = |successes, failures| HealthSettings::default().with_thresholds(successes, failures);
        check(with(1, 1).unwrap(), ".x.x.", "+-+-+");
        check(with(4, 2).unwrap(), "xx.......", "?----++++");
        assert_eq!(with(0, 1), Err(HealthError::NoThreshold("successes")));
        assert_eq!(with(1, 0), Err(HealthError::NoThreshold("failures")));
        let times = |interval, timeout| {
            let ms = Duration::from_millis;
            HealthSettings::default().with_times(ms(interval), ms(timeout)).map_err(|error| error.to_string())
        };
        assert!(times(100, 100).is_ok());
        for (interval, timeout) in [(99, 1), (3_600_001, 1), (1_000, 0), (1_000, 1_001)] {
            assert!(times(interval, timeout).unwrap_err().contains("; write "));
        }
    }

    #[test]
    fn a_transition_says_why() {
        let now = Instant::now();
        let mut health = Health::new(HealthSettings::default(), now);
        let reason = |change: Option<Transition>| change.map(|change| change.reason);
        assert_eq!(reason(health.record(Ok(()), now)), Some(Reason::Succeeded(1)));
        assert_eq!(health.record(Err(Failure::Timeout), now), None);
        assert_eq!(health.record(Err(Failure::Timeout), now), None);
        let last = Failure::Status(500);
        assert_eq!(reason(health.record(Err(last), now)), Some(Reason::Failed(3, last)));
        assert_eq!(health.last_failure(), Some(last));
        assert_eq!(health.record(Ok(()), now), None);
        assert_eq!(reason(health.record(Ok(()), now)), Some(Reason::Succeeded(2)));
        assert_eq!(reason(health.unreachable(now)), Some(Reason::Unreachable));
        assert_eq!(health.last_failure(), Some(Failure::Connection));
    }

    #[test]
    fn checks_are_spread_and_more_frequent_while_somebody_waits() {
        let now = Instant::now();
        let mut health = Health::new(HealthSettings::default(), now);
        let next = |health: &Health, random| (health.next_check(now, random) - now).as_millis();
        assert_eq!([0, u64::MAX / 2, u64::MAX].map(|random| next(&health, random)), [900, 999, 1_099]);
        health.record(Ok(()), now);
        assert_eq!([0, u64::MAX / 2, u64::MAX].map(|random| next(&health, random)), [4_500, 4_999, 5_499]);
        health.unreachable(now);
        assert_eq!(next(&health, 0), 900);
    }
}
