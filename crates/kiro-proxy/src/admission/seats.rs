//! How many connections does a worker open itself, and how many may one peer open to it?

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiro_core::identity::ServiceName;
use tokio::sync::Notify;

use crate::limits;

/// Connections of one kind that a worker may have open. All of them are on its thread; the counts are atomic because hyper's
/// upgrades ask for a stream that could move to another.
#[derive(Debug)]
pub(crate) struct Seats {
    /// How many.
    pub(crate) bound: usize,
    taken: AtomicUsize,
    waiting: AtomicUsize,
    freed: Notify,
}

/// The right to have one of them open, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Seat(Arc<Seats>);

impl Seats {
    /// So many.
    pub(crate) fn new(bound: usize) -> Arc<Self> {
        Arc::new(Self {
            bound,
            taken: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            freed: Notify::new(),
        })
    }

    /// One, where there is one at once.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Seat> {
        if self.taken.load(Ordering::Relaxed) >= self.bound {
            return None;
        }
        self.taken.fetch_add(1, Ordering::Relaxed);
        Some(Seat(Arc::clone(self)))
    }

    /// How many wait for one.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Tells one of those who wait that he may find something: a seat, or a connection that its last user has left.
    pub(crate) fn tell(&self) {
        if self.waiting() > 0 {
            self.freed.notify_one();
        }
    }

    /// Waits until `find` has something, which it is asked for again with each change; the caller limits the wait.
    pub(crate) async fn wait_for<T>(&self, mut find: impl FnMut() -> Option<T>) -> T {
        let _waiting = Waits::begin(&self.waiting);
        loop {
            let freed = self.freed.notified();
            if let Some(found) = find() {
                return found;
            }
            freed.await;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
        self.0.tell();
    }
}

struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The connections of other sidecars to one worker, by the identity that TLS has proven: nobody can make an entry who has none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Peers(Rc<RefCell<HashMap<ServiceName, usize>>>);

/// One of a peer's connections.
#[derive(Debug)]
pub(crate) struct PeerSeat {
    peer: ServiceName,
    peers: Peers,
}

impl Peers {
    /// Another connection of a peer; none where it has as many as it may.
    pub(crate) fn take(&self, peer: &ServiceName) -> Option<PeerSeat> {
        let mut open = self.0.borrow_mut();
        let count = open.entry(peer.clone()).or_default();
        if *count >= limits::CONNECTIONS_PER_PEER {
            return None;
        }
        *count += 1;
        Some(PeerSeat { peer: peer.clone(), peers: self.clone() })
    }
}

impl Drop for PeerSeat {
    fn drop(&mut self) {
        let mut open = self.peers.0.borrow_mut();
        if let Some(count) = open.get_mut(&self.peer) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                open.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_gets_the_seat_that_is_given_back() {
        let seats = Seats::new(2);
        let (first, second) = (seats.take().unwrap(), seats.take().unwrap());
        assert!(seats.take().is_none());
        let waiting = seats.wait_for(|| seats.take());
        let giving = async {
            tokio::task::yield_now().await;
            assert_eq!(seats.waiting(), 1);
            drop(first);
        };
        let (third, ()) = tokio::join!(waiting, giving);
        assert_eq!(seats.waiting(), 0);
        assert!(seats.take().is_none());
        drop((second, third));
        assert_eq!(seats.taken.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_peer_has_its_own_bound_and_leaves_nothing_behind() {
        let peers = Peers::default();
        let [one, other] = ["one", "other"].map(|name| ServiceName::parse(name).unwrap());
        let seats: Vec<_> = (0..limits::CONNECTIONS_PER_PEER).map(|_| peers.take(&one).unwrap()).collect();
        assert!(peers.take(&one).is_none());
        drop(peers.take(&other).unwrap());
        drop(seats);
        assert!(peers.0.borrow().is_empty());
    }
}
