//! What does a sidecar admit at a time, who holds how much of it, and what happens at the bound?
//!
//! Each connection that a listener accepts holds a [`Place`] until the last of what was made of it is gone, upgraded streams and
//! tunnels included. The bounds themselves stand in [`crate::limits`]; [`Limit`] names those that somebody can run into, so that
//! `/metrics` shows each with how often that happened.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::limits;
use crate::metrics::{Metrics, UnderWay};

/// A port of the sidecar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Listener {
    /// The application's proxy.
    Outbound,
    /// Mutual TLS from other sidecars.
    Inbound,
    /// The ingress without TLS.
    Ingress,
    /// The ingress with TLS.
    IngressTls,
    /// Ports of the pod's loopback that lead to tcp services.
    Local,
    /// Admin, on the pod's loopback.
    Admin,
    /// Health for others.
    Health,
}

impl Listener {
    /// All of them, in the order of their discriminants.
    pub(crate) const ALL: [Listener; 7] = [
        Listener::Outbound,
        Listener::Inbound,
        Listener::Ingress,
        Listener::IngressTls,
        Listener::Local,
        Listener::Admin,
        Listener::Health,
    ];

    /// The word that log and metrics use.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Listener::Outbound => "outbound",
            Listener::Inbound => "inbound",
            Listener::Ingress => "ingress",
            Listener::IngressTls => "ingress_tls",
            Listener::Local => "local",
            Listener::Admin => "admin",
            Listener::Health => "health",
        }
    }
}

/// A bound that somebody can run into, and of which there is something to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// [`Admission::connections`].
    Connections,
    /// [`limits::ADMIN_CONNECTIONS`].
    AdminConnections,
    /// What the system gives this process (`ulimit -n`).
    Descriptors,
    /// [`limits::HANDSHAKES_PER_LISTENER`].
    Handshakes,
    /// [`limits::CLIENT_STREAMS`].
    ClientStreams,
    /// [`limits::STREAMS_PER_CONNECTION`].
    PeerStreams,
    /// [`limits::STREAM_WAITERS`].
    StreamWaiters,
    /// [`limits::HEADER_BYTES`].
    HeaderBytes,
}

impl Limit {
    /// All of them, in the order of their discriminants.
    pub(crate) const ALL: [Limit; 8] = [
        Limit::Connections,
        Limit::AdminConnections,
        Limit::Descriptors,
        Limit::Handshakes,
        Limit::ClientStreams,
        Limit::PeerStreams,
        Limit::StreamWaiters,
        Limit::HeaderBytes,
    ];

    /// The metric's label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Limit::Connections => "connections",
            Limit::AdminConnections => "admin_connections",
            Limit::Descriptors => "descriptors",
            Limit::Handshakes => "handshakes",
            Limit::ClientStreams => "client_streams",
            Limit::PeerStreams => "peer_streams",
            Limit::StreamWaiters => "stream_waiters",
            Limit::HeaderBytes => "header_bytes",
        }
    }

    /// What is bounded, what happens at the bound, and where its use is seen: for the documentation.
    #[cfg(test)]
    pub(crate) fn meaning(self) -> &'static str {
        match self {
            Limit::Connections => {
                "connections that one worker serves at one listener, upgraded ones and tunnels included; the next one makes one that carries no request end, and is closed where there is none. In use: `kiro_connections_open`"
            }
            Limit::AdminConnections => {
                "connections at each of the ports 15000 and 15020; the next one ends the oldest. In use: `kiro_connections_open`"
            }
            Limit::Descriptors => {
                "what the system gives this process (`ulimit -n`), raised to its hard limit at start; past it a connection waits in the kernel. In use: `process_open_fds`"
            }
            Limit::Handshakes => {
                "TLS handshakes that one worker runs at one listener; the next one waits for its turn, which the oldest has to give up after a second. In use: `kiro_tls_handshakes_in_progress`"
            }
            Limit::ClientStreams => {
                "streams that a client has open on one HTTP/2 connection; the next one is reset with REFUSED_STREAM. In use: `kiro_requests_in_flight`"
            }
            Limit::PeerStreams => {
                "streams that another sidecar has open on one connection; the next one is reset with REFUSED_STREAM. In use: `kiro_requests_in_flight`"
            }
            Limit::StreamWaiters => {
                "requests that wait for a free stream to one peer at one worker; the next one is refused with `queue_full`. In use: `kiro_requests_in_flight`"
            }
            Limit::HeaderBytes => {
                "bytes of a request's head or trailers; a larger head is refused with `headers_too_large`"
            }
        }
    }
}

/// What this process admits, worked out at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Admission {
    /// Connections that one worker serves at a time at one listener.
    pub(crate) connections: usize,
    /// Descriptors that this process may have.
    pub(crate) descriptors: u64,
}

impl Admission {
    /// Shares the descriptors out: half of what is left beside [`limits::DESCRIPTOR_RESERVE`] are for connections to peers and to the
    /// application, the others belong to the listeners, to each as many as to any other, so that a crowd at one of them leaves
    /// the others their share.
    pub(crate) fn shared(descriptors: u64, workers: usize, listeners: usize) -> Self {
        let reserve = limits::DESCRIPTOR_RESERVE.min(descriptors / 2);
        let sharers = (workers.max(1) * listeners.max(1)) as u64;
        let share = (descriptors - reserve) / 2 / sharers;
        let share = usize::try_from(share).unwrap_or(usize::MAX);
        Self { connections: share.clamp(1, limits::CONNECTIONS_PER_LISTENER), descriptors }
    }

    /// Raises the process's soft limit of descriptors to its hard one, as Go's runtime does, and shares them out.
    pub(crate) fn of_this_process(workers: usize, listeners: usize) -> Self {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let now = getrlimit(Resource::Nofile);
        let raised = Rlimit { current: now.maximum, maximum: now.maximum };
        // A system that does not let it happen leaves the limit as it was.
        let _ = setrlimit(Resource::Nofile, raised);
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let admission = Self::shared(descriptors, workers, listeners);
        if admission.connections < limits::CONNECTIONS_PER_LISTENER {
            tracing::warn!(
                target: "kiro::start", descriptors, workers, listeners, connections = admission.connections,
                wanted = limits::CONNECTIONS_PER_LISTENER,
                "few file descriptors: each worker serves fewer connections at a listener; raise the hard limit of `ulimit -n` (Compose: `ulimits: nofile`)"
            );
        }
        admission
    }

    /// The bound of a limit.
    pub(crate) fn bound(&self, limit: Limit) -> u64 {
        match limit {
            Limit::Connections => self.connections as u64,
            Limit::AdminConnections => limits::ADMIN_CONNECTIONS as u64,
            Limit::Descriptors => self.descriptors,
            Limit::Handshakes => limits::HANDSHAKES_PER_LISTENER as u64,
            Limit::ClientStreams => limits::CLIENT_STREAMS.into(),
            Limit::PeerStreams => limits::STREAMS_PER_CONNECTION.into(),
            Limit::StreamWaiters => limits::STREAM_WAITERS as u64,
            Limit::HeaderBytes => limits::HEADER_BYTES as u64,
        }
    }
}

/// The places that one worker has at one listener.
#[derive(Debug)]
pub(crate) struct Places {
    listener: Listener,
    bound: usize,
    taken: RefCell<HashMap<u64, Weak<Place>>>,
    /// Those that were told to make room and have not left yet.
    leaving: Cell<usize>,
    next: Cell<u64>,
    metrics: Arc<Metrics>,
}

impl Places {
    /// Places at a listener of a worker.
    pub(crate) fn new(listener: Listener, bound: usize, metrics: &Arc<Metrics>) -> Rc<Self> {
        Rc::new(Self {
            listener,
            bound,
            taken: RefCell::default(),
            leaving: Cell::new(0),
            next: Cell::new(0),
            metrics: Arc::clone(metrics),
        })
    }

    /// A place for a connection. Where all are taken, those that have carried no request for longest make room: silent ones, ones that
    /// are still at their handshake or in their first head, and kept ones.
    pub(crate) fn take(self: &Rc<Self>, remote: SocketAddr) -> Option<Rc<Place>> {
        let connections = self.metrics.connections(self.listener);
        if self.is_full() {
            self.metrics.limit_hit(Limit::Connections);
            self.make_room();
            if self.is_full() {
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
            listener: self.listener,
            key,
            busy: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            owed: Cell::new(0),
            takes: Cell::new(0),
            told_to_leave: Cell::new(false),
            leave: Notify::new(),
            places: Rc::clone(self),
        });
        self.taken.borrow_mut().insert(key, Rc::downgrade(&place));
        Some(place)
    }

    fn is_full(&self) -> bool {
        self.taken.borrow().len().saturating_sub(self.leaving.get()) >= self.bound
    }

    fn make_room(&self) {
        let taken = self.taken.borrow();
        let mut idle: Vec<_> = taken
            .values()
            .filter_map(Weak::upgrade)
            .filter_map(|place| Some((place.idle_for()?, place)))
            .filter(|(idle, place)| *idle >= limits::ROOM_MADE_AFTER && !place.told_to_leave.get())
            .collect();
        idle.sort_unstable_by_key(|(idle, place)| (Reverse(*idle), place.key));
        let count = limits::ROOM_MADE_AT_A_TIME.min(self.bound.div_ceil(4));
        for (_, place) in idle.into_iter().take(count) {
            place.told_to_leave.set(true);
            self.leaving.set(self.leaving.get() + 1);
            self.metrics.connections(self.listener).evicted.inc();
            place.leave.notify_one();
        }
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
        if self.told_to_leave.get() {
            self.places.leaving.set(self.places.leaving.get().saturating_sub(1));
        }
        self.places.taken.borrow_mut().remove(&self.key);
        self.places.metrics.connections(self.listener).open.dec();
    }
}

/// Lets so many handshakes with clients run at a time, at one listener of a worker. Where all turns are taken, whoever has had his for
/// longest makes room, once he has had time enough for an honest one: a crowd that stands still in its handshakes keeps nobody out.
#[derive(Debug)]
pub(crate) struct Gate {
    /// The oldest first.
    under_way: RefCell<VecDeque<Rc<Handshake>>>,
    freed: Notify,
    metrics: Arc<Metrics>,
}

/// A handshake that is under way.
#[derive(Debug)]
pub(crate) struct Handshake {
    since: Instant,
    /// Told to make room.
    pub(crate) leave: Notify,
}

/// The right to run a handshake with a client.
pub(crate) struct HandshakeTurn<'a> {
    pub(crate) gate: &'a Gate,
    pub(crate) under_way: Rc<Handshake>,
    pub(crate) _counted: UnderWay,
}

impl Gate {
    /// An empty one.
    pub(crate) fn new(metrics: &Arc<Metrics>) -> Self {
        Self { under_way: RefCell::default(), freed: Notify::new(), metrics: Arc::clone(metrics) }
    }

    /// Waits for a turn; the caller limits the wait.
    pub(crate) async fn turn(&self) -> (&Self, Rc<Handshake>) {
        let mut counted = false;
        loop {
            let freed = self.freed.notified();
            let oldest = {
                let mut under_way = self.under_way.borrow_mut();
                let oldest = under_way.front().filter(|_| under_way.len() >= limits::HANDSHAKES_PER_LISTENER);
                let oldest = oldest.map(|oldest| oldest.since);
                if oldest.is_some() && !counted {
                    counted = true;
                    self.metrics.limit_hit(Limit::Handshakes);
                }
                let old = oldest.filter(|since| since.elapsed() >= limits::ROOM_MADE_AFTER);
                if old.is_some()
                    && let Some(oldest) = under_way.pop_front()
                {
                    oldest.leave.notify_one();
                }
                match oldest {
                    Some(since) if old.is_none() => since,
                    _ => {
                        let handshake = Rc::new(Handshake { since: Instant::now(), leave: Notify::new() });
                        under_way.push_back(Rc::clone(&handshake));
                        return (self, handshake);
                    }
                }
            };
            tokio::select! {
                () = freed => {}
                () = tokio::time::sleep_until(oldest + limits::ROOM_MADE_AFTER) => {}
            }
        }
    }
}

impl Drop for HandshakeTurn<'_> {
    fn drop(&mut self) {
        self.gate.under_way.borrow_mut().retain(|other| !Rc::ptr_eq(other, &self.under_way));
        self.gate.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_and_limits_stand_in_the_order_of_their_labels() {
        for (place, listener) in Listener::ALL.into_iter().enumerate() {
            assert_eq!(listener as usize, place, "{listener:?}");
        }
        for (place, limit) in Limit::ALL.into_iter().enumerate() {
            assert_eq!(limit as usize, place, "{limit:?}");
        }
    }

    #[test]
    fn descriptors_are_shared_out_between_listeners() {
        let connections =
            |descriptors, workers, listeners| Admission::shared(descriptors, workers, listeners).connections;
        assert_eq!(connections(1_048_576, 2, 4), limits::CONNECTIONS_PER_LISTENER);
        assert_eq!(connections(u64::MAX, 64, 4), limits::CONNECTIONS_PER_LISTENER);
        assert_eq!(connections(1024, 2, 4), (1024 - 256) / 2 / 8);
        // However few there are, one connection at a time is served.
        assert_eq!(connections(16, 8, 4), 1);
        assert_eq!(connections(0, 1, 1), 1);
    }

    fn places(bound: usize) -> (Rc<Places>, Arc<Metrics>) {
        let log = kiro_telemetry::log::LogSink::new(std::io::sink(), kiro_telemetry::log::Format::Json, None);
        let tracing = kiro_telemetry::trace::Tracing::off();
        let metrics = Metrics::new(log.unwrap(), tracing, 1, Admission::shared(1024, 1, 1), Arc::default());
        (Places::new(Listener::Ingress, bound, &metrics), metrics)
    }

    #[tokio::test(start_paused = true)]
    async fn connections_without_a_request_make_room_and_others_do_not() {
        let (places, metrics) = places(4);
        let remote = SocketAddr::from(([127, 0, 0, 1], 1));
        let take = || places.take(remote);
        let (busy, first, second, third) =
            (take().unwrap(), take().unwrap(), take().unwrap(), take().unwrap());
        busy.begun();
        assert!(take().is_none(), "all have just come");
        tokio::time::advance(limits::ROOM_MADE_AFTER).await;
        second.ended();
        let fifth = take().unwrap();
        // A quarter of the places at a time: the one that was idle for longest.
        first.told_to_leave().await;
        assert!(take().is_some_and(|_| true), "the third one makes room as well");
        third.told_to_leave().await;
        assert!(take().is_some(), "whoever held that place has left it");
        drop((busy, first, second, third, fifth));
        assert_eq!(metrics.connections(Listener::Ingress).open.get(), 0);
        assert_eq!(metrics.connections(Listener::Ingress).evicted.get(), 2);
        assert_eq!(metrics.connections(Listener::Ingress).refused.get(), 1);
        assert_eq!(places.leaving.get(), 0);
    }
}
