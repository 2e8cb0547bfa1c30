//! Which connection carries the next request to a peer, and when is there room on it?
//!
//! One HTTP/2 connection an address and identity. Whoever needs one that is being opened waits for it; the opening is a task of
//! its own, so that a caller who goes away takes nobody else's connection with him.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Ping, PingPong};
use kiro_core::identity::ServiceName;
use kiro_core::signature::Signer;
use tokio::sync::{Notify, oneshot};
use tokio::task::spawn_local;

use crate::admission::{Limit, Seat, Seats};
use crate::limits;
use crate::metrics::Metrics;
use crate::reject::{Refused, Reject};
use crate::state::Snapshot;
use crate::upstream::connect::{self, Refusal};
use crate::upstream::readers::Readers;
use crate::worker::Worker;

/// A live connection to a peer.
pub(crate) struct Upstream {
    /// Where it leads.
    pub(crate) address: SocketAddr,
    pub(super) send: SendRequest<Bytes>,
    pub(super) signer: Option<RefCell<Signer>>,
    pub(super) in_flight: Cell<usize>,
    pub(super) waiting: Cell<usize>,
    pub(super) freed: Rc<Notify>,
    pub(super) closed: Cell<bool>,
    /// When the peer was last heard of.
    pub(super) heard: Cell<Instant>,
    /// Lent to whoever asks the peer whether it is still there.
    pub(super) ping: RefCell<Option<PingPong>>,
    pub(super) asked: Notify,
    pub(super) refusal: Refusal,
    pub(super) metrics: Arc<Metrics>,
    pub(super) readers: Rc<Readers>,
    /// Tells whoever drives the connection when this is dropped.
    pub(super) _held: oneshot::Sender<()>,
}

/// The right to open one stream. h2 queues without bound past the peer's limit, so whoever sends holds one of these.
pub(crate) struct Slot {
    upstream: Rc<Upstream>,
}

impl Slot {
    /// The connection that it is a place on.
    pub(crate) fn upstream(&self) -> &Rc<Upstream> {
        &self.upstream
    }

    /// Who reads the larger answers of the connection.
    pub(crate) fn readers(&self) -> &Rc<Readers> {
        &self.upstream.readers
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.upstream.in_flight.set(self.upstream.in_flight.get().saturating_sub(1));
        self.upstream.freed.notify_one();
    }
}

impl Upstream {
    /// Waits until the peer takes another stream.
    pub(crate) async fn slot(self: &Rc<Self>) -> Result<Slot, Refused> {
        if !self.has_room() {
            if self.waiting.get() >= limits::STREAM_WAITERS {
                self.metrics.limit_hit(Limit::StreamWaiters);
                return Err(Refused::new(
                    Reject::QueueFull,
                    format!("{} wait for {}", self.waiting.get(), self.address),
                ));
            }
            let _waiting = Waiting::new(&self.waiting);
            while !self.has_room() {
                let freed = self.freed.notified();
                if self.closed.get() {
                    let closed = h2::Error::from(h2::Reason::NO_ERROR);
                    return Err(connect::lost(&closed, self.refusal()));
                }
                freed.await;
            }
        }
        Ok(self.take())
    }

    /// A place for another stream, where there is one at once.
    pub(crate) fn slot_now(self: &Rc<Self>) -> Option<Slot> {
        self.has_room().then(|| self.take())
    }

    fn take(self: &Rc<Self>) -> Slot {
        self.in_flight.set(self.in_flight.get() + 1);
        Slot { upstream: Rc::clone(self) }
    }

    fn has_room(&self) -> bool {
        !self.closed.get() && self.in_flight.get() < self.send.current_max_send_streams()
    }

    /// The handle to open a stream with; each request has its own, since h2 lets a handle wait for its last stream.
    pub(crate) fn sender(&self) -> SendRequest<Bytes> {
        self.send.clone()
    }

    /// What signs requests on this connection; absent where signatures are off.
    pub(crate) fn signer(&self) -> Option<&RefCell<Signer>> {
        self.signer.as_ref()
    }

    /// The peer's refusal of our certificate, where that is how the connection ended.
    pub(crate) fn refusal(&self) -> Option<&'static str> {
        self.refusal.get()
    }

    /// The peer has answered.
    pub(crate) fn heard(&self) {
        self.heard.set(Instant::now());
    }

    /// Whether the peer is still there. A pod that died with its network says no goodbye, and the first request on such a connection
    /// would be lost, whatever its method; so after a silence it is asked first, which costs a round trip.
    pub(crate) async fn is_alive(&self) -> bool {
        loop {
            if self.closed.get() {
                return false;
            }
            if self.heard.get().elapsed() < limits::TRUSTED_SILENCE {
                return true;
            }
            let asked = self.asked.notified();
            let ping = self.ping.borrow_mut().take();
            let Some(ping) = ping else {
                asked.await;
                continue;
            };
            let mut lent = Lent { ping: Some(ping), upstream: self };
            if !lent.ask(limits::PONG).await {
                return false;
            }
            self.heard();
        }
    }

    /// Waits until the other side's SETTINGS are known. They are the first that it sends, so they have come when it answers a question.
    pub(crate) async fn is_settled(&self) -> bool {
        let ping = self.ping.borrow_mut().take();
        Lent { ping, upstream: self }.ask(limits::HANDSHAKE).await
    }

    /// Whether the other side takes extended CONNECT (RFC 8441 3).
    pub(crate) fn takes_extended_connect(&self) -> bool {
        self.send.is_extended_connect_protocol_enabled()
    }

    /// Whether it has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.get()
    }
}

/// The right to ask, given back when the answer is there, or when whoever asked has gone.
struct Lent<'a> {
    ping: Option<PingPong>,
    upstream: &'a Upstream,
}

impl Lent<'_> {
    async fn ask(&mut self, limit: Duration) -> bool {
        let Some(ping) = &mut self.ping else { return false };
        // A question that somebody left behind is still on its way; its answer serves as well.
        let _ = ping.send_ping(Ping::opaque());
        let answer = poll_fn(|cx| ping.poll_pong(cx));
        matches!(tokio::time::timeout(limit, answer).await, Ok(Ok(_)))
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        *self.upstream.ping.borrow_mut() = self.ping.take();
        self.upstream.asked.notify_waiters();
    }
}

/// One of those who wait for a stream.
pub(crate) struct Waiting<'a>(&'a Cell<usize>);

impl<'a> Waiting<'a> {
    /// Counts it in, until it is dropped.
    pub(crate) fn new(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

struct Entry {
    /// Whose identity was, or is to be, proven there.
    peer: ServiceName,
    connection: Connection,
}

enum Connection {
    /// Being opened; the cell gets the outcome.
    Opening(Rc<Opening>),
    /// Open.
    Ready(Rc<Upstream>),
    /// TLS said no, at one end or the other: no use in asking again at once.
    Refused { again: Instant, reject: Reject, cause: Cow<'static, str> },
}

impl Connection {
    fn refused(refused: &Refused) -> Self {
        let again = Instant::now() + limits::REFUSED_BACK_OFF;
        Connection::Refused { again, reject: refused.reject, cause: refused.cause.clone() }
    }
}

struct Opening {
    outcome: RefCell<Option<Result<Rc<Upstream>, Refused>>>,
    done: Notify,
}

/// The connections of one worker. They are all of the identity of this moment: when that changes, the pool is emptied.
pub(crate) struct Upstreams {
    entries: RefCell<HashMap<SocketAddr, Entry>>,
    /// Of all connections, those included that only end what is on them.
    seats: Arc<Seats>,
}

impl Upstreams {
    /// An empty pool that never has more than `bound` connections.
    pub(crate) fn new(bound: usize) -> Self {
        Self { entries: RefCell::default(), seats: Seats::new(bound) }
    }

    /// The right to open another connection. Where there are as many as there may be, the one that nobody uses and that has been silent
    /// for longest makes room.
    async fn seat(&self, metrics: &Metrics) -> Result<Seat, Refused> {
        if let Some(seat) = self.seats.take() {
            return Ok(seat);
        }
        metrics.limit_hit(Limit::Upstreams);
        let unused = self.longest_unused();
        if let Some(unused) = unused {
            self.retire(&unused);
        }
        let seat = tokio::time::timeout(limits::CONNECT, self.seats.wait_for(|| self.seats.take())).await;
        seat.map_err(|_| {
            let cause = format!("all {} connections to other sidecars are in use", self.seats.bound);
            Refused::new(Reject::QueueFull, cause)
        })
    }

    fn longest_unused(&self) -> Option<Rc<Upstream>> {
        let entries = self.entries.borrow();
        let ready = entries.values().filter_map(|entry| match &entry.connection {
            Connection::Ready(upstream) => Some(upstream),
            Connection::Opening(_) | Connection::Refused { .. } => None,
        });
        // Whoever has a stream on it, or is about to, keeps it too.
        let unused = ready.filter(|upstream| Rc::strong_count(upstream) == 1);
        unused.min_by_key(|upstream| upstream.heard.get()).map(Rc::clone)
    }

    /// The connection to a peer's address, opened where there is none.
    pub(crate) async fn connection(
        &self,
        worker: &Rc<Worker>,
        state: &Snapshot,
        peer: usize,
        address: SocketAddr,
    ) -> Result<Rc<Upstream>, Refused> {
        let name = &state.peer(peer).ok_or(Reject::ServiceUnknown)?.name;
        let opening = match self.entries.borrow().get(&address) {
            // Another service may have had this address before.
            Some(entry) if entry.peer != *name => None,
            Some(Entry { connection: Connection::Ready(upstream), .. }) => {
                if !upstream.is_closed() {
                    return Ok(Rc::clone(upstream));
                }
                None
            }
            Some(Entry { connection: Connection::Opening(opening), .. }) => Some(Rc::clone(opening)),
            Some(Entry { connection: Connection::Refused { again, reject, cause }, .. }) => {
                if Instant::now() < *again {
                    return Err(Refused::new(*reject, cause.clone()));
                }
                None
            }
            None => None,
        };
        let opening = opening.unwrap_or_else(|| open(worker, name.clone(), address));
        loop {
            let done = opening.done.notified();
            match &*opening.outcome.borrow() {
                Some(Ok(upstream)) => return Ok(Rc::clone(upstream)),
                Some(Err(refused)) => return Err(Refused::new(refused.reject, refused.cause.clone())),
                None => {}
            }
            done.await;
        }
    }

    /// Lets go of a connection whose peer takes no new requests on it (GOAWAY); those that it has taken end there.
    pub(crate) fn retire(&self, upstream: &Rc<Upstream>) {
        upstream.closed.set(true);
        upstream.freed.notify_waiters();
        self.forget(upstream);
    }

    /// Lets go of a connection that has ended.
    pub(crate) fn forget(&self, ended: &Rc<Upstream>) {
        self.entries.borrow_mut().retain(|_, entry| match &entry.connection {
            Connection::Ready(upstream) => !Rc::ptr_eq(upstream, ended),
            Connection::Opening(_) | Connection::Refused { .. } => true,
        });
    }

    /// Notes that the peer at an address refused our certificate. A refusal that stands is not made to last longer.
    pub(crate) fn refused(&self, peer: &ServiceName, address: SocketAddr, refused: &Refused) {
        let mut entries = self.entries.borrow_mut();
        let standing = entries.get(&address).map(|entry| &entry.connection);
        if !matches!(standing, Some(Connection::Refused { .. } | Connection::Opening(_))) {
            entries.insert(address, Entry { peer: peer.clone(), connection: Connection::refused(refused) });
        }
    }

    /// Lets go of all connections; each ends when its last stream has.
    pub(crate) fn forget_all(&self) {
        self.entries.borrow_mut().clear();
    }

    /// Lets go of a peer's connections to addresses that its name no longer has.
    pub(crate) fn keep(&self, peer: &ServiceName, addresses: &[SocketAddr]) {
        self.entries.borrow_mut().retain(|address, entry| entry.peer != *peer || addresses.contains(address));
    }
}

/// Opens a connection under the state of this moment, which may be newer than its first request's: it is to serve those to come.
fn open(worker: &Rc<Worker>, name: ServiceName, address: SocketAddr) -> Rc<Opening> {
    let opening = Rc::new(Opening { outcome: RefCell::new(None), done: Notify::new() });
    let entry = Entry { peer: name.clone(), connection: Connection::Opening(Rc::clone(&opening)) };
    worker.upstreams.entries.borrow_mut().insert(address, entry);
    let (worker, state, result) = (Rc::clone(worker), worker.snapshot(), Rc::clone(&opening));
    spawn_local(async move {
        let outcome = match state.find(name.as_str()) {
            Some((_, peer)) => match worker.upstreams.seat(&worker.metrics).await {
                Ok(seat) => connect::connect(&worker, &state, peer, address, seat).await,
                Err(refused) => Err(refused),
            },
            None => Err(Reject::ServiceUnknown.into()),
        };
        if outcome.is_err() {
            worker.metrics.upstream().failed.inc();
        }
        settle(&worker.upstreams, address, &result, &outcome);
        *result.outcome.borrow_mut() = Some(outcome);
        result.done.notify_waiters();
    });
    opening
}

/// Keeps an opened connection, unless the pool was emptied meanwhile: then it serves those who wait for it, and nobody else.
fn settle(
    pool: &Upstreams,
    address: SocketAddr,
    opening: &Rc<Opening>,
    outcome: &Result<Rc<Upstream>, Refused>,
) {
    let mut entries = pool.entries.borrow_mut();
    let Some(entry) = entries.get_mut(&address) else { return };
    if !matches!(&entry.connection, Connection::Opening(current) if Rc::ptr_eq(current, opening)) {
        return;
    }
    match outcome {
        Ok(upstream) => entry.connection = Connection::Ready(Rc::clone(upstream)),
        Err(refused) if matches!(refused.reject, Reject::UpstreamTls(_)) => {
            entry.connection = Connection::refused(refused);
        }
        Err(_) => {
            entries.remove(&address);
        }
    }
}
