//! Who has a place at a worker's listeners, and who makes room for whom?
//!
//! All listeners of a worker share its places, so that one may have what the others do not use. What each is sure of is kept for
//! it: a crowd at one listener never takes the last place at another.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::{Admission, Limit, Listener, SHARING};
use crate::limits;
use crate::metrics::Metrics;

/// The places of one worker.
///
/// **Invariant.** What the listeners have, or are sure of where that is more, is never more than the worker's places: a
/// connection that is to make room keeps its own until it has gone.
#[derive(Debug)]
pub(crate) struct Places {
    admission: Admission,
    taken: [RefCell<HashMap<u64, Weak<Place>>>; SHARING.len()],
    next: Cell<u64>,
    metrics: Arc<Metrics>,
}

impl Places {
    /// None is taken yet.
    pub(crate) fn new(metrics: &Arc<Metrics>) -> Rc<Self> {
        Self::of(metrics.admission(), metrics)
    }

    fn of(admission: Admission, metrics: &Arc<Metrics>) -> Rc<Self> {
        Rc::new(Self {
            admission,
            taken: Default::default(),
            next: Cell::new(0),
            metrics: Arc::clone(metrics),
        })
    }

    /// A place for a connection. Where there is none, those that have carried no request for longest make room: silent ones, ones that
    /// are still at their handshake or in their first head, and kept ones.
    pub(crate) async fn take(self: &Rc<Self>, listener: Listener, remote: SocketAddr) -> Option<Rc<Place>> {
        let connections = self.metrics.connections(listener);
        if let Some(limit) = self.full(listener) {
            self.metrics.limit_hit(limit);
            if self.make_room(listener, limit) {
                // Their tasks were woken, and run before this one does again.
                tokio::task::yield_now().await;
            }
            if self.full(listener).is_some() {
                connections.refused.inc();
                return None;
            }
        }
        connections.accepted.inc();
        connections.open.inc();
        let key = self.next.get();
        self.next.set(key.wrapping_add(1));
        let place = Rc::new(Place {
            remote,
            listener,
            key,
            busy: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            owed: Cell::new(0),
            takes: Cell::new(0),
            told_to_leave: Cell::new(false),
            leave: Notify::new(),
            places: Rc::clone(self),
        });
        self.taken.get(listener as usize)?.borrow_mut().insert(key, Rc::downgrade(&place));
        Some(place)
    }

    fn count(&self, listener: Listener) -> usize {
        self.taken.get(listener as usize).map_or(0, |taken| taken.borrow().len())
    }

    /// The bound that keeps a listener from another connection, if one does.
    fn full(&self, listener: Listener) -> Option<Limit> {
        let Admission { connections, worker_connections, sure_connections, .. } = self.admission;
        let own = self.count(listener);
        if own >= connections {
            return Some(Limit::Connections);
        }
        let others = SHARING.into_iter().filter(|other| *other != listener);
        let spoken_for: usize = others.map(|other| self.count(other).max(sure_connections)).sum();
        (own >= sure_connections && own + spoken_for >= worker_connections)
            .then_some(Limit::WorkerConnections)
    }

    /// Tells connections to make room, and whether there were any that could be told. Where the places of all are taken, the listener
    /// that has most of them gives some up first, so that a crowd pays for itself; then the one that wants another.
    fn make_room(&self, listener: Listener, limit: Limit) -> bool {
        let own = self.count(listener);
        let shared = limit == Limit::WorkerConnections;
        let mut larger: Vec<_> = SHARING
            .into_iter()
            .map(|other| (self.count(other), other))
            .filter(|(count, _)| shared && *count > own && *count > self.admission.sure_connections)
            .collect();
        larger.sort_unstable_by_key(|(count, _)| Reverse(*count));
        larger.into_iter().map(|(_, other)| other).chain([listener]).any(|from| self.make_room_at(from))
    }

    fn make_room_at(&self, listener: Listener) -> bool {
        let Some(taken) = self.taken.get(listener as usize) else { return false };
        let taken = taken.borrow();
        let mut idle: Vec<_> = taken
            .values()
            .filter_map(Weak::upgrade)
            .filter_map(|place| Some((place.idle_for()?, place)))
            .filter(|(idle, place)| *idle >= limits::ROOM_MADE_AFTER && !place.told_to_leave.get())
            .collect();
        idle.sort_unstable_by_key(|(idle, place)| (Reverse(*idle), place.key));
        let count = limits::ROOM_MADE_AT_A_TIME.min(taken.len().div_ceil(4));
        let any = !idle.is_empty();
        for (_, place) in idle.into_iter().take(count) {
            place.told_to_leave.set(true);
            self.metrics.connections(listener).evicted.inc();
            place.leave.notify_one();
        }
        any
    }
}

/// An accepted connection's place; whoever keeps the connection, or what was made of it, keeps this.
#[derive(Debug)]
pub(crate) struct Place {
    /// The address at the other end.
    pub(crate) remote: SocketAddr,
    /// Where it came in.
    pub(crate) listener: Listener,
    key: u64,
    /// Exchanges that are under way on it.
    busy: Cell<u32>,
    idle_since: Cell<Instant>,
    /// Answers on it with something that the client has not taken.
    owed: Cell<u32>,
    /// Grows with whatever the client takes.
    takes: Cell<u64>,
    told_to_leave: Cell<bool>,
    leave: Notify,
    places: Rc<Places>,
}

impl Place {
    /// An exchange has begun on the connection.
    pub(crate) fn begun(&self) {
        self.busy.set(self.busy.get() + 1);
    }

    /// One has ended.
    pub(crate) fn ended(&self) {
        self.busy.set(self.busy.get().saturating_sub(1));
        self.idle_since.set(Instant::now());
    }

    /// For how long it has carried no request; absent while it carries one.
    pub(crate) fn idle_for(&self) -> Option<Duration> {
        (self.busy.get() == 0).then(|| self.idle_since.get().elapsed())
    }

    /// An answer has, or no longer has, something that the client has not taken.
    pub(crate) fn owes(&self, owed: bool) {
        let now = self.owed.get();
        self.owed.set(if owed { now + 1 } else { now.saturating_sub(1) });
    }

    /// The client takes, or is ready to take, a piece of an answer.
    pub(crate) fn taken(&self) {
        self.takes.set(self.takes.get().wrapping_add(1));
    }

    /// Returns when there were answers for [`limits::BODY_IDLE`] of which the client took nothing.
    pub(crate) async fn not_read(&self) {
        const LOOKS: u32 = 4;
        let (mut seen, mut quiet) = (self.takes.get(), 0);
        while quiet < LOOKS {
            tokio::time::sleep(limits::BODY_IDLE / LOOKS).await;
            let took = self.takes.get() != seen;
            seen = self.takes.get();
            quiet = if took || self.owed.get() == 0 { 0 } else { quiet + 1 };
        }
    }

    /// Returns when the connection is to make room.
    pub(crate) async fn told_to_leave(&self) {
        self.leave.notified().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(taken) = self.places.taken.get(self.listener as usize) {
            taken.borrow_mut().remove(&self.key);
        }
        self.places.metrics.connections(self.listener).open.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Five places for each of the listeners, of which it is sure of two, and at most twelve at one.
    const ADMISSION: Admission = Admission {
        connections: 12,
        worker_connections: 25,
        sure_connections: 2,
        app_connections: 1,
        upstreams: 1,
        descriptors: 1024,
    };

    fn places() -> (Rc<Places>, Arc<Metrics>) {
        let metrics = Metrics::of_a_test(1, ADMISSION);
        (Places::of(ADMISSION, &metrics), metrics)
    }

    /// As many connections at a listener as it admits, up to `most`.
    async fn crowd(places: &Rc<Places>, listener: Listener, most: usize) -> Vec<Rc<Place>> {
        let mut crowd = Vec::new();
        while crowd.len() < most
            && let Some(place) = places.take(listener, SocketAddr::from(([127, 0, 0, 1], 1))).await
        {
            crowd.push(place);
        }
        crowd
    }

    /// Serves nothing on a connection until it is to make room.
    fn stand_still(place: Rc<Place>) {
        tokio::task::spawn_local(async move { place.told_to_leave().await });
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_leaves_each_listener_what_it_is_sure_of() {
        let (places, metrics) = places();
        let outbound = crowd(&places, Listener::Outbound, 100).await;
        let ingress = crowd(&places, Listener::Ingress, 100).await;
        // The cap of one listener; then all but what the three others are sure of.
        assert_eq!((outbound.len(), ingress.len()), (12, 7));
        for listener in [Listener::Inbound, Listener::IngressTls, Listener::Local] {
            assert_eq!(crowd(&places, listener, 100).await.len(), 2, "{listener:?}");
        }
        let inbound = crowd(&places, Listener::Inbound, 100).await;
        let local = crowd(&places, Listener::Local, 100).await;
        assert_eq!((inbound.len(), local.len()), (2, 2));
        // What is given up is for whoever comes first.
        drop(outbound);
        assert_eq!(crowd(&places, Listener::Local, 100).await.len(), 10);
        assert!(metrics.connections(Listener::Ingress).refused.get() > 0);
    }

    #[tokio::test(start_paused = true)]
    async fn connections_without_a_request_make_room_and_others_do_not() {
        let local = tokio::task::LocalSet::new();
        local.run_until(check_room()).await;
    }

    async fn check_room() {
        let (places, metrics) = places();
        let mut crowd_at_outbound = crowd(&places, Listener::Outbound, 12).await;
        assert!(crowd(&places, Listener::Outbound, 1).await.is_empty(), "all have just come");
        tokio::time::advance(limits::ROOM_MADE_AFTER).await;
        let busy = crowd_at_outbound.split_off(9);
        for place in &busy {
            place.begun();
        }
        crowd_at_outbound.into_iter().for_each(stand_still);
        tokio::task::yield_now().await;
        // A quarter of the places at a time: those that were idle for longest.
        let new = crowd(&places, Listener::Outbound, 3).await;
        assert_eq!(new.len(), 3);
        assert_eq!(metrics.connections(Listener::Outbound).evicted.get(), 3);
        let more = crowd(&places, Listener::Outbound, 100).await;
        assert_eq!(more.len(), 6, "and no one who is busy, or has just come");
        drop((busy, new, more));
        assert_eq!(metrics.connections(Listener::Outbound).open.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_largest_crowd_makes_room_for_another_listener() {
        tokio::task::LocalSet::new().run_until(check_largest()).await;
    }

    async fn check_largest() {
        let (places, metrics) = places();
        crowd(&places, Listener::Ingress, 12).await.into_iter().for_each(stand_still);
        crowd(&places, Listener::IngressTls, 7).await.into_iter().for_each(stand_still);
        let outbound = crowd(&places, Listener::Outbound, 2).await;
        tokio::task::yield_now().await;
        tokio::time::advance(limits::ROOM_MADE_AFTER).await;
        assert_eq!(crowd(&places, Listener::Outbound, 1).await.len(), 1, "beyond what it is sure of");
        assert_eq!(metrics.connections(Listener::Ingress).evicted.get(), 3);
        assert_eq!(metrics.connections(Listener::IngressTls).evicted.get(), 0);
        assert_eq!(places.count(Listener::Outbound), outbound.len());
    }
}
