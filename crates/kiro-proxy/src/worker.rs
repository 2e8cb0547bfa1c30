//! What does one thread of the data path own?
//!
//! A worker has its own runtime, listeners, pools and log buffer. What it shares with others is read-only or a counter:
//! nothing on a request's way waits for another thread.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiro_telemetry::access::AccessRecord;
use kiro_telemetry::log::{Format, LineBuffer, LogSink};
use kiro_telemetry::trace::Tracing;
use kiro_tls::HandshakeError;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::task::spawn_local;

use crate::admission::{Gate, HalfHeads, HandshakeTurn, Limit, Peers, Places};
use crate::app::App;
use crate::discover::{Names, Resolver};
use crate::drain::{Phase, PhaseWatch};
use crate::exchange::{Direction, Via};
use crate::health::AppHealth;
use crate::limits;
use crate::metrics::{Leg, Metrics};
use crate::reject::Reject;
use crate::settings::Settings;
use crate::state::{Snapshot, State};
use crate::tunnel::Tunnels;
use crate::upstream::Upstreams;

/// What a worker is made of; everything in it stays on its thread.
pub(crate) struct Worker {
    snapshot: RefCell<Snapshot>,
    log: RefCell<LineBuffer>,
    log_pending: Notify,
    log_format: Format,
    /// Spans go here.
    pub(crate) tracing: Tracing,
    /// Counts go here.
    pub(crate) metrics: Arc<Metrics>,
    /// Who was accepted.
    pub(crate) places: Rc<Places>,
    /// What clients have sent of heads that have not ended.
    pub(crate) half_heads: Arc<HalfHeads>,
    /// The connections of other sidecars, by identity.
    pub(crate) peers: Peers,
    /// Connections to peers.
    pub(crate) upstreams: Upstreams,
    /// Connections to the application.
    pub(crate) app: App,
    /// Whether the application is fit for traffic.
    pub(crate) health: Arc<AppHealth>,
    /// Addresses of peers.
    pub(crate) names: Names,
    /// Open tunnels and upgraded streams.
    pub(crate) tunnels: Tunnels,
    /// Copies of requests that are under way.
    pub(crate) copies: Cell<usize>,
    /// Exchanges that are under way, by direction.
    active: [Cell<u64>; 3],
    /// Connections that end in order: see [`Worker::in_order`].
    ending: Cell<[u64; 2]>,
    /// Its place among the workers.
    pub(crate) number: usize,
    /// Whose turn it is for a handshake, one gate for each [`Direction`]: a crowd at one of them is no concern of the others, and none of
    /// the sidecar's own calls.
    handshakes: [Gate; 3],
    /// Told to all who hold a connection on which somebody has proven himself to the identity that was.
    pub(crate) renewed: Notify,
    /// Serving, draining, or done.
    pub(crate) phase: PhaseWatch,
    /// What was configured at start.
    pub(crate) settings: Arc<Settings>,
}

/// What a worker is started with.
pub(crate) struct Parts {
    pub(crate) settings: Arc<Settings>,
    pub(crate) states: watch::Receiver<Arc<State>>,
    pub(crate) log: LogSink,
    pub(crate) tracing: Tracing,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) resolver: Resolver,
    pub(crate) phase: PhaseWatch,
}

impl Worker {
    /// Makes a worker on its own thread.
    pub(crate) fn new(parts: &Parts, number: usize) -> Rc<Self> {
        let state: Arc<State> = Arc::clone(&parts.states.borrow());
        let admission = parts.metrics.admission();
        Rc::new(Self {
            snapshot: RefCell::new(Rc::new(state)),
            log: RefCell::new(LineBuffer::new(parts.log.clone())),
            log_pending: Notify::new(),
            log_format: parts.settings.log_format,
            tracing: parts.tracing.clone(),
            metrics: Arc::clone(&parts.metrics),
            places: Places::new(&parts.metrics),
            half_heads: Arc::default(),
            peers: Peers::default(),
            upstreams: Upstreams::new(admission.upstreams),
            app: App::new(admission.app_connections),
            health: Arc::clone(parts.metrics.app_health()),
            names: Names::new(parts.resolver.clone()),
            tunnels: Tunnels::new(),
            copies: Cell::new(0),
            active: Default::default(),
            ending: Cell::default(),
            number,
            handshakes: std::array::from_fn(|_| Gate::new(&parts.metrics)),
            renewed: Notify::new(),
            phase: parts.phase.clone(),
            settings: Arc::clone(&parts.settings),
        })
    }

    /// The state that a request begins under.
    pub(crate) fn snapshot(&self) -> Snapshot {
        Rc::clone(&self.snapshot.borrow())
    }

    /// Writes a request's line into the worker's buffer; a timer of the worker hands the buffer on.
    pub(crate) fn access_line(&self, record: &AccessRecord<'_>) {
        let mut log = self.log.borrow_mut();
        let was_empty = log.is_empty();
        log.write(|out| record.write(self.log_format, out));
        if was_empty && !log.is_empty() {
            self.log_pending.notify_one();
        }
    }

    /// Writes the line of a request that the HTTP library answered by itself, since its head could not be read.
    pub(crate) fn library_answer(&self, via: &Via, reject: Reject, cause: &str) {
        self.library_answers(via, reject, cause, 1);
    }

    /// The same for several of a kind, which came at once and share a line.
    pub(crate) fn library_answers(&self, via: &Via, reject: Reject, cause: &str, count: u64) {
        let state = self.snapshot();
        for _ in 0..count {
            self.metrics.library_answered();
            state.incoming(via).unread(self.number, reject.status().as_u16(), reject.code());
        }
        if reject == Reject::HeadersTooLarge {
            self.metrics.limit_hits(Limit::HeaderBytes, count);
        }
        self.access_line(&AccessRecord {
            time: SystemTime::now(),
            service: state.me.as_str(),
            direction: via.direction.as_str(),
            caller: via.caller(),
            caller_proof: via.caller_proof,
            remote: via.stranger(),
            callee: "",
            callee_proof: "none",
            method: "",
            path: "",
            protocol: "",
            status: reject.status().as_u16(),
            reject: Some(reject.code()),
            reject_cause: Some(cause),
            signature: "none",
            policy: "none",
            policy_denial: None,
            bytes_in: 0,
            bytes_out: 0,
            ended: None,
            duration: Duration::ZERO,
            upstream: None,
            attempts: 0,
            gave_up: None,
            fault: None,
            split: None,
            copy_of: None,
            trace_id: 0,
            span_id: 0,
            sampled: false,
        });
    }

    /// Waits until a client has begun to speak and it is its turn for a handshake on its listener. Only who has begun counts: silent
    /// connections keep nobody out.
    pub(crate) async fn turn(&self, direction: Direction, stream: &TcpStream) -> Option<HandshakeTurn<'_>> {
        // Not `readable()`, which may be true of a connection that has nothing to read.
        let begun = tokio::time::timeout(limits::FIRST_BYTE, stream.peek(&mut [0])).await.ok()?.ok()?;
        if begun == 0 {
            return None;
        }
        let gate = self.handshakes.get(direction as usize)?;
        let turn = tokio::time::timeout(limits::HANDSHAKE, gate.turn()).await;
        let Ok((gate, under_way)) = turn else {
            self.metrics.handshake_ended(direction.into(), "tls_too_many");
            return None;
        };
        Some(HandshakeTurn { gate, under_way, _counted: self.metrics.handshake_begins(direction.into()) })
    }

    /// Runs a TLS handshake with a client.
    pub(crate) async fn accept<S>(
        &self,
        direction: Direction,
        turn: HandshakeTurn<'_>,
        handshake: impl Future<Output = Result<S, HandshakeError>>,
    ) -> Option<S> {
        tokio::select! {
            outcome = self.handshake(direction.into(), handshake) => outcome?.ok(),
            () = turn.under_way.leave.notified() => {
                self.metrics.handshake_ended(direction.into(), "tls_too_many");
                None
            }
        }
    }

    /// Runs a TLS handshake within its time, and counts how it ended; the caller boxes it, since its state is large and soon gone.
    pub(crate) async fn handshake<S>(
        &self,
        leg: Leg,
        handshake: impl Future<Output = Result<S, HandshakeError>>,
    ) -> Option<Result<S, HandshakeError>> {
        let outcome = tokio::time::timeout(limits::HANDSHAKE, handshake).await.ok();
        let word = match &outcome {
            Some(Ok(_)) => "ok",
            Some(Err(error)) => error.code(),
            None => "tls_timeout",
        };
        self.metrics.handshake_ended(leg, word);
        outcome
    }

    /// Notes that an exchange is under way.
    pub(crate) fn begun(&self, direction: Direction) {
        self.count_active(direction, |count| count + 1);
    }

    /// Notes that one has ended.
    pub(crate) fn ended(&self, direction: Direction) {
        self.count_active(direction, |count| count.saturating_sub(1));
    }

    fn count_active(&self, direction: Direction, change: impl FnOnce(u64) -> u64) {
        if let Some(active) = self.active.get(direction as usize) {
            active.set(change(active.get()));
            self.metrics.in_flight(self.number, direction, active.get());
        }
    }

    /// Runs what a worker does beside serving; the tasks end with the runtime.
    pub(crate) fn spawn_chores(self: &Rc<Self>, states: watch::Receiver<Arc<State>>) {
        let flusher = Rc::clone(self);
        spawn_local(async move {
            loop {
                flusher.log_pending.notified().await;
                tokio::time::sleep(limits::LOG_FLUSH).await;
                flusher.flush_log();
            }
        });
        let follower = Rc::clone(self);
        spawn_local(async move { follower.follow(states).await });
    }

    /// Hands the buffered lines to the writer.
    pub(crate) fn flush_log(&self) {
        self.log.borrow_mut().flush();
    }

    async fn follow(&self, mut states: watch::Receiver<Arc<State>>) {
        while states.changed().await.is_ok() {
            let state: Arc<State> = Arc::clone(&states.borrow_and_update());
            let before = self.snapshot();
            let renewed =
                !Arc::ptr_eq(&state.identity, &before.identity) || state.signatures != before.signatures;
            self.snapshot.replace(Rc::new(state));
            if renewed {
                // Requests under way keep the connection that they are on; new ones prove the new identity.
                self.upstreams.forget_all();
                self.app.forget_all();
                self.renewed.notify_waiters();
            }
            let state = self.snapshot();
            self.names.keep(|name| state.find(name.as_str()).is_some());
            self.tunnels.judge_again(&state);
        }
    }

    /// Notes a connection that ends in order once the phase is `told_at`, for as long as the guard lives: it says to its other end that it
    /// takes no more, takes what has been sent meanwhile, and writes what is left. To exit before would lose an answer's last bytes, or
    /// leave a caller in doubt whether its request was processed.
    pub(crate) fn in_order(self: &Rc<Self>, told_at: Phase) -> InOrder {
        let place = usize::from(told_at == Phase::Stopped);
        self.count_ending(place, |count| count + 1);
        InOrder { worker: Rc::clone(self), place }
    }

    fn count_ending(&self, place: usize, change: impl FnOnce(u64) -> u64) {
        let mut ending = self.ending.get();
        if let Some(count) = ending.get_mut(place) {
            *count = change(*count);
        }
        self.ending.set(ending);
    }

    /// Waits until nothing is under way, or the time is over; true where nothing was left. Then those connections get a moment whose
    /// other ends have been told that the sidecar drains.
    pub(crate) async fn quiesce(&self, limit: Duration) -> bool {
        let end = tokio::time::Instant::now() + limit;
        let clean = until(end, || self.active.iter().all(|active| active.get() == 0)).await;
        if clean {
            // An exchange has ended when its answer was handed over; written it is when its connection has ended.
            let end = end.min(tokio::time::Instant::now() + limits::FAREWELL);
            until(end, || matches!(self.ending.get(), [0, _])).await;
        }
        clean
    }

    /// Gives what is left, the application's own connections and open streams, a moment to end, each with its line.
    pub(crate) async fn farewell(&self) {
        let over = || self.ending.get() == [0, 0] && self.tunnels.is_empty();
        until(tokio::time::Instant::now() + limits::FAREWELL, over).await;
    }
}

/// A connection that ends in order.
pub(crate) struct InOrder {
    worker: Rc<Worker>,
    place: usize,
}

impl Drop for InOrder {
    fn drop(&mut self) {
        self.worker.count_ending(self.place, |count| count.saturating_sub(1));
    }
}

/// Waits for a condition; false if it does not come true in time.
async fn until(end: tokio::time::Instant, is_so: impl Fn() -> bool) -> bool {
    while !is_so() {
        if tokio::time::Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    true
}

/// Seconds since 1970, as signatures have them.
pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
