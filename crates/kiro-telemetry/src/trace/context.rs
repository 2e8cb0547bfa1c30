//! Which span is this, and in which trace?

use std::cell::RefCell;
use std::hash::{BuildHasher, RandomState};

/// A span's place in its trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace; never 0.
    pub trace_id: u128,
    /// The span; never 0.
    pub span_id: u64,
    /// The span above it.
    pub parent_span_id: Option<u64>,
    /// Whether the trace is kept.
    pub sampled: bool,
}

thread_local! {
    // Seeded from the keys of the standard library's hash maps, which come from the operating system: fastrand's own
    // seed is made of the clock and the thread's number, and those are alike in containers that start together.
    static RNG: RefCell<fastrand::Rng> = RefCell::new(fastrand::Rng::with_seed(RandomState::new().hash_one(())));
}

pub(super) fn random_trace_id() -> u128 {
    RNG.with_borrow_mut(|rng| rng.u128(1..))
}

pub(super) fn random_span_id() -> u64 {
    RNG.with_borrow_mut(|rng| rng.u64(1..))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn threads_that_start_together_make_different_ids() {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                std::thread::spawn(|| {
                    (0..1000).map(|_| (random_trace_id(), random_span_id())).collect::<Vec<_>>()
                })
            })
            .collect();
        let ids: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        let traces: HashSet<u128> = ids.iter().map(|(trace, _)| *trace).collect();
        let spans: HashSet<u64> = ids.iter().map(|(_, span)| *span).collect();
        assert_eq!((traces.len(), spans.len()), (8_000, 8_000));
        assert!(!traces.contains(&0) && !spans.contains(&0));
    }
}
