//! What do heads hold that have begun and do not end?
//!
//! A head is held until it is whole, and its client decides when that is. Small ones hold no more than what a connection has anyway;
//! of the larger ones each notes here what it holds. Where all of a worker's hold too much, the one that began first is cut: an honest
//! one takes a moment, whatever its size, and is never the oldest of a crowd that stands still.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;

use crate::limits;
use crate::lock::lock;

/// The heads of one worker. All are on its thread; the lock, which nobody waits for, is there because hyper's upgrades ask for a stream
/// that could move to another.
#[derive(Debug)]
pub(crate) struct HalfHeads {
    bound: usize,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    bytes: usize,
    next: u64,
    /// By age.
    open: BTreeMap<u64, Open>,
}

#[derive(Debug)]
struct Open {
    bytes: usize,
    cut: Arc<AtomicBool>,
    reader: Waker,
}

/// One head that has begun; it holds nothing any more when this is dropped.
#[derive(Debug)]
pub(crate) struct HalfHead {
    key: u64,
    cut: Arc<AtomicBool>,
    heads: Arc<HalfHeads>,
}

impl Default for HalfHeads {
    fn default() -> Self {
        Self::new(limits::HALF_HEADS_BYTES)
    }
}

impl HalfHeads {
    fn new(bound: usize) -> Self {
        Self { bound, held: Mutex::default() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        lock(&self.held)
    }

    /// Notes that a head has begun, and its size so far; whoever reads it is woken should it be cut.
    pub(crate) fn begin(self: &Arc<Self>, bytes: usize, reader: &Waker) -> HalfHead {
        let cut = Arc::new(AtomicBool::new(false));
        let mut held = self.held();
        let key = held.next;
        held.next += 1;
        held.open.insert(key, Open { bytes, cut: Arc::clone(&cut), reader: reader.clone() });
        held.bytes += bytes;
        held.cut_above(self.bound);
        HalfHead { key, cut, heads: Arc::clone(self) }
    }
}

impl Held {
    fn remove(&mut self, key: u64) -> Option<Open> {
        let open = self.open.remove(&key)?;
        self.bytes = self.bytes.saturating_sub(open.bytes);
        Some(open)
    }

    fn cut_above(&mut self, bound: usize) {
        while self.bytes > bound
            && let Some(oldest) = self.open.keys().next().copied()
            && let Some(open) = self.remove(oldest)
        {
            open.cut.store(true, Ordering::Relaxed);
            open.reader.wake();
        }
    }
}

impl HalfHead {
    /// Notes the head's size by now.
    pub(crate) fn holds(&self, bytes: usize, reader: &Waker) {
        let mut held = self.heads.held();
        let Some(open) = held.open.get_mut(&self.key) else { return };
        let before = std::mem::replace(&mut open.bytes, bytes);
        open.reader.clone_from(reader);
        held.bytes = held.bytes.saturating_sub(before) + bytes;
        held.cut_above(self.heads.bound);
    }

    /// Whether its connection is to end.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }
}

impl Drop for HalfHead {
    fn drop(&mut self) {
        self.heads.held().remove(self.key);
    }
}

/// What the library holds of a header block that is not whole, be it a head or trailers.
#[derive(Debug)]
pub(crate) struct Block {
    goes_on: bool,
    /// Kept from the block's first frame that is not its last one until it is whole.
    half: Option<HalfHead>,
    heads: Arc<HalfHeads>,
}

impl Block {
    /// None has begun.
    pub(crate) fn new(heads: &Arc<HalfHeads>) -> Self {
        Self { goes_on: false, half: None, heads: Arc::clone(heads) }
    }

    /// A frame of it came; whatever its size, the library may make of a block as much as it lets a list of fields have.
    pub(crate) fn came(&mut self, ends: bool) {
        self.goes_on = !ends;
    }

    /// A frame is whole.
    pub(crate) fn whole(&mut self, reader: &Waker) {
        if !self.goes_on {
            self.half = None;
        } else if self.half.is_none() {
            self.half = Some(self.heads.begin(limits::CLIENT_HEADER_LIST_BYTES as usize, reader));
        }
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.half.as_ref().is_some_and(HalfHead::is_cut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_cut_where_all_hold_too_much() {
        let heads = Arc::new(HalfHeads::new(100));
        let reader = Waker::noop();
        let first = heads.begin(10, reader);
        let second = heads.begin(10, reader);
        let third = heads.begin(60, reader);
        second.holds(30, reader);
        assert!(![&first, &second, &third].iter().any(|head| head.is_cut()));
        third.holds(65, reader);
        assert!(first.is_cut() && !second.is_cut() && !third.is_cut());
        third.holds(101, reader);
        assert!(second.is_cut() && third.is_cut(), "one alone that is too large, too");
        drop((first, second, third));
        assert_eq!(heads.held().bytes, 0);
        assert!(heads.held().open.is_empty());
    }
}
