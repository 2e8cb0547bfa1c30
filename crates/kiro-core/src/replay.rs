//! Has this nonce been used before on this connection?
//!
//! Nonces are a counter, and requests arrive nearly in the order in which they were signed. So a bitmap that slides along
//! behind the highest nonce answers exactly, in constant memory and without a clock (the window of RFC 6479).

const WORD_BITS: u64 = u64::BITS as u64;

/// How far behind the highest nonce a request may arrive. Nonces are given out as streams open, so what can be late is what
/// was open at the same time: four times the thousand streams that a sidecar allows a connection.
pub const WINDOW_NONCES: u64 = 4096;

/// One word more than the window: entering a new word clears all of it, and without the spare that would forget nonces still
/// inside the window.
const WORDS: u64 = WINDOW_NONCES / WORD_BITS + 1;

/// The nonces seen on one connection.
#[derive(Clone, Debug)]
pub struct ReplayWindow {
    highest: Option<u64>,
    seen: [u64; WORDS as usize],
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self::new()
    }
}

impl ReplayWindow {
    /// A window that has seen nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { highest: None, seen: [0; WORDS as usize] }
    }

    /// Takes a nonce: true once for each, false when it was seen before or is too old to tell. Give it verified nonces only: a
    /// forged one far ahead would make all that follow too old.
    #[must_use]
    pub fn accept(&mut self, nonce: u64) -> bool {
        match self.highest {
            Some(highest) if nonce <= highest => {
                if highest - nonce >= WINDOW_NONCES {
                    return false;
                }
            }
            Some(_) | None => self.advance(nonce),
        }
        let bit = 1 << (nonce % WORD_BITS);
        let Some(word) = self.seen.get_mut(slot(nonce / WORD_BITS)) else { return false };
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    /// Moves the window's upper end to `nonce` and clears the words that it enters.
    fn advance(&mut self, nonce: u64) {
        let entered = nonce / WORD_BITS;
        let left = self.highest.map_or(0, |highest| highest / WORD_BITS);
        for step in 1..=(entered - left).min(WORDS) {
            if let Some(word) = self.seen.get_mut(slot(left + step)) {
                *word = 0;
            }
        }
        self.highest = Some(nonce);
    }
}

/// Where the words lie in the ring.
fn slot(word: u64) -> usize {
    (word % WORDS) as usize
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::random::Random;

    /// The rule, spelled out with memory that grows.
    #[derive(Default)]
    struct Model {
        highest: Option<u64>,
        seen: HashSet<u64>,
    }

    impl Model {
        fn accept(&mut self, nonce: u64) -> bool {
            if self
                .highest
                .is_some_and(|highest| u128::from(nonce) + u128::from(WINDOW_NONCES) <= u128::from(highest))
            {
                return false;
            }
            self.highest = self.highest.max(Some(nonce));
            self.seen.insert(nonce)
        }
    }

    /// What comes next, seen from the highest nonce so far: mostly in order, with repeats, late ones, ones at the window's very
    /// edge, and jumps of every size.
    fn next_nonce(random: &mut Random, highest: u64) -> u64 {
        match random.below(100) {
            0..50 => highest.saturating_add(1),
            50..65 => highest.saturating_sub(random.below(8)),
            65..75 => highest.saturating_sub(random.below(WINDOW_NONCES + 200)),
            75..85 => highest.saturating_sub(WINDOW_NONCES - 2 + random.below(4)),
            85..94 => highest.saturating_add(random.below(200)),
            94..97 => highest.saturating_add(WORD_BITS * (WORDS - 2 + random.below(4)) + random.below(3)),
            97..99 => highest.saturating_add(random.below(3 * WINDOW_NONCES)),
            _ => highest.saturating_add(random.below(1 << 40)),
        }
    }

    #[test]
    fn agrees_with_a_set_that_never_forgets() {
        for seed in 0..400 {
            let mut random = Random(seed);
            let (mut window, mut model) = (ReplayWindow::new(), Model::default());
            let start = if seed % 2 == 0 { 0 } else { random.next() >> (seed % 64) };
            let mut nonce = start;
            for step in 0..4_000 {
                let expected = model.accept(nonce);
                assert_eq!(window.accept(nonce), expected, "seed {seed}, step {step}, nonce {nonce}");
                nonce = next_nonce(&mut random, model.highest.unwrap_or(start));
            }
        }
    }

    #[test]
    fn takes_each_nonce_of_a_shuffled_stream_once() {
        let mut window = ReplayWindow::new();
        let mut random = Random(7);
        let mut nonces: Vec<u64> = (0..100_000).collect();
        for block in nonces.chunks_mut(WINDOW_NONCES as usize / 2) {
            for index in (1..block.len()).rev() {
                block.swap(index, random.below(index as u64 + 1) as usize);
            }
        }
        assert!(nonces.iter().all(|nonce| window.accept(*nonce)));
        assert!(!nonces.iter().any(|nonce| window.accept(*nonce)));
    }

    #[test]
    fn the_windows_edge_is_exact() {
        let mut window = ReplayWindow::new();
        assert!(window.accept(WINDOW_NONCES));
        assert!(!window.accept(0));
        assert!(window.accept(1));
        assert!(!window.accept(1));
    }

    #[test]
    fn the_highest_of_all_nonces_is_like_any_other() {
        let mut window = ReplayWindow::new();
        assert!(window.accept(0));
        assert!(window.accept(u64::MAX));
        assert!(!window.accept(u64::MAX));
        assert!(window.accept(u64::MAX - WINDOW_NONCES + 1));
        assert!(!window.accept(u64::MAX - WINDOW_NONCES));
        assert!(!window.accept(0));
    }
}
