//! How many of the last requests failed?
//!
//! A ring of seconds, each one word: which second it counts, its requests and its failures. A word of an earlier round of the ring is
//! replaced by whoever comes first in its new second, with the same compare-and-swap that counts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What the window covers: the second that runs and the nine before it.
pub const WINDOW: Duration = Duration::from_secs(SECONDS);

const SECONDS: u64 = 10;

const COUNT_BITS: u32 = 18;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;
/// 28 bits: a word's second is the same one again after 8.5 years.
const SECOND_MASK: u64 = (1 << (u64::BITS - 2 * COUNT_BITS)) - 1;

/// What happened within the window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowCounts {
    /// Requests that ended.
    pub requests: u64,
    /// Those of them that failed.
    pub failures: u64,
}

/// Requests and failures of the last seconds.
#[derive(Debug, Default)]
pub(super) struct Window {
    seconds: [AtomicU64; SECONDS as usize],
}

impl Window {
    pub(super) fn add(&self, second: u64, failed: bool) {
        let Some(word) = self.seconds.get((second % SECONDS) as usize) else { return };
        let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
            // Nothing of a second that has passed out of the window is added to one that is newer.
            let counts = match age(word, second) {
                0 => unpack(word),
                age if age < SECOND_MASK / 2 || word == 0 => WindowCounts::default(),
                _ => return None,
            };
            Some(pack(second, counted(counts, failed)))
        });
    }

    pub(super) fn counts(&self, second: u64) -> WindowCounts {
        self.seconds
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            .filter(|word| age(*word, second) < SECONDS)
            .map(unpack)
            .fold(WindowCounts::default(), |sum, counts| WindowCounts {
                requests: sum.requests.saturating_add(counts.requests),
                failures: sum.failures.saturating_add(counts.failures),
            })
    }

    pub(super) fn clear(&self) {
        for word in &self.seconds {
            word.store(0, Ordering::Relaxed);
        }
    }
}

/// A quarter of a million requests a second fill a word: from there on all of its counts are halved, and their share stays.
fn counted(counts: WindowCounts, failed: bool) -> WindowCounts {
    let counts = if counts.requests >= COUNT_MASK {
        WindowCounts { requests: counts.requests / 2, failures: counts.failures / 2 }
    } else {
        counts
    };
    WindowCounts {
        requests: counts.requests.saturating_add(1),
        failures: counts.failures.saturating_add(u64::from(failed)),
    }
}

fn pack(second: u64, counts: WindowCounts) -> u64 {
    (second & SECOND_MASK) << (2 * COUNT_BITS)
        | (counts.requests & COUNT_MASK) << COUNT_BITS
        | (counts.failures & COUNT_MASK)
}

fn unpack(word: u64) -> WindowCounts {
    WindowCounts { requests: word >> COUNT_BITS & COUNT_MASK, failures: word & COUNT_MASK }
}

/// How many seconds ago a word's second was.
fn age(word: u64, second: u64) -> u64 {
    second.wrapping_sub(word >> (2 * COUNT_BITS)) & SECOND_MASK
}
