//! How often may a log line be written that strangers can cause?

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// A few lines at once, then so many a second. What is not written is counted, and the next line says how much that was.
#[derive(Debug)]
pub struct LineQuota {
    at_once: u32,
    per_second: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Lines that may be written, and the second up to which they have grown; absent before the first line.
    left: Option<(u32, Instant)>,
    since_the_last: u64,
    ever: u64,
}

impl LineQuota {
    /// A full one.
    #[must_use]
    pub fn new(at_once: u32, per_second: u32) -> Self {
        Self { at_once, per_second, state: Mutex::default() }
    }

    /// Whether a line may be written now; if so, how many were not since the last one.
    pub fn take(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut left, mut since) = state.left.unwrap_or((self.at_once, now));
        let passed = now.saturating_duration_since(since).as_secs();
        if passed > 0 {
            let grown = u32::try_from(passed).unwrap_or(u32::MAX).saturating_mul(self.per_second);
            left = left.saturating_add(grown).min(self.at_once);
            since = now;
        }
        let may = left.checked_sub(1);
        state.left = Some((may.unwrap_or(0), since));
        if may.is_some() {
            return Some(std::mem::take(&mut state.since_the_last));
        }
        state.since_the_last += 1;
        state.ever += 1;
        None
    }

    /// How many lines were ever not written.
    #[must_use]
    pub fn suppressed(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).ever
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn lines_are_bounded_by_rate_and_say_how_many_were_left_out() {
        let (quota, begin) = (LineQuota::new(20, 5), Instant::now());
        let after = |seconds| begin + Duration::from_secs(seconds);
        for _ in 0..20 {
            assert_eq!(quota.take(begin), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(quota.take(begin + Duration::from_millis(999)), None);
        }
        assert_eq!(quota.take(after(1)), Some(1000));
        for _ in 1..5 {
            assert_eq!(quota.take(after(1)), Some(0));
        }
        assert_eq!(quota.take(after(1)), None);
        // However long nothing happens, no more than the first few come at once.
        for _ in 0..20 {
            assert!(quota.take(after(1_000_000)).is_some());
        }
        assert_eq!(quota.take(after(1_000_000)), None);
        // A clock that went back is not a reason to write more.
        assert_eq!(quota.take(begin), None);
        assert_eq!(quota.suppressed(), 1003);
    }
}
