//! How often has each of a few things happened?

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts by a few words.
#[derive(Debug)]
pub(crate) struct Counts<const N: usize> {
    words: &'static [&'static str; N],
    counts: [AtomicU64; N],
}

impl<const N: usize> Counts<N> {
    /// None yet.
    pub(crate) fn of(words: &'static [&'static str; N]) -> Self {
        Self { words, counts: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    /// Counts one.
    pub(crate) fn count(&self, word: &str) {
        let place = self.words.iter().position(|known| *known == word);
        if let Some(count) = place.and_then(|place| self.counts.get(place)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// All counts, with their words.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.words.iter().copied().zip(self.counts.iter().map(|count| count.load(Ordering::Relaxed)))
    }
}
