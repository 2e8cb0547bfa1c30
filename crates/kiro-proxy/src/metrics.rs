//! What is counted, and where?
//!
//! The counts of an edge are made when the mesh file names its services, never by what a client sends, so that label sets can't
//! grow from outside. Each worker counts on lines of its own (a [`Shard`]); what happens once a connection, or less often, is
//! counted in one place. [`catalogue`] has the names, [`collect`] writes the text.

mod calls;
mod catalogue;
mod collect;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use kiro_core::quota::LineQuota;
use kiro_telemetry::log::LogSink;
use kiro_telemetry::metrics::{Counter, Gauge, Histogram, render};
use kiro_telemetry::trace::Tracing;
use prometheus_client::registry::Registry;

use crate::abuse::Reason;
use crate::admission::{Admission, Limit, Listener, Seat};
use crate::exchange::Direction;
use crate::health::AppHealth;
use crate::limits;
use crate::lock::lock;
use crate::reject::CODES;

/// Upper bounds of the duration buckets: from what a request on one machine takes to the default timeout.
const DURATION_BOUNDS_US: &[u64] = &[
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000, 15_000_000,
];

const METHODS: [&str; 4] = ["read", "write", "connect", "other"];
const STATUSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "gone"];

/// The name, in metrics, of what is no service of the mesh file. No service can have it.
pub(crate) const UNKNOWN: &str = "-";

/// How a TLS handshake can end.
const HANDSHAKE_OUTCOMES: &[&str] = &[
    "ok",
    "tls_no_certificate",
    "tls_unknown_issuer",
    "tls_expired",
    "tls_not_yet_valid",
    "tls_wrong_identity",
    "tls_trust_domain",
    "tls_app_leaf",
    "tls_version",
    "tls_alpn",
    "tls_peer_refused",
    "tls_closed",
    "tls_plain_http",
    "tls_timeout",
    "tls_too_many",
    "tls_other",
];

/// Which connection of the sidecar a handshake is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leg {
    /// The application's to port 15001.
    Outbound,
    /// Another sidecar's to port 15006.
    Inbound,
    /// An outside client's to the ingress.
    Ingress,
    /// This sidecar's to another one.
    Peer,
    /// This sidecar's to the application.
    App,
}

impl Leg {
    /// All of them, in the order of their discriminants.
    const ALL: [Leg; 5] = [Leg::Outbound, Leg::Inbound, Leg::Ingress, Leg::Peer, Leg::App];

    fn as_str(self) -> &'static str {
        match self {
            Leg::Outbound => "outbound",
            Leg::Inbound => "inbound",
            Leg::Ingress => "ingress",
            Leg::Peer => "peer",
            Leg::App => "app",
        }
    }
}

impl From<Direction> for Leg {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Outbound => Leg::Outbound,
            Direction::Inbound => Leg::Inbound,
            Direction::Ingress => Leg::Ingress,
        }
    }
}

/// The counts of one edge as this sidecar sees it.
#[derive(Debug)]
pub(crate) struct EdgeMetrics {
    workers: usize,
    /// Made when the edge is first used: a mesh has many more edges that a sidecar might see than it ever does.
    shards: OnceLock<Box<[Shard]>>,
    /// By the place of the code in [`CODES`]; most edges never have any.
    rejects: OnceLock<Box<[Counter]>>,
}

/// What one worker counts of an edge, on cache lines that no other worker writes.
#[derive(Debug)]
#[repr(align(128))]
struct Shard {
    requests: [[Counter; STATUSES.len()]; METHODS.len()],
    duration: Histogram,
    bytes_in: Counter,
    bytes_out: Counter,
}

impl Shard {
    fn new() -> Self {
        Self {
            requests: Default::default(),
            duration: Histogram::new(DURATION_BOUNDS_US),
            bytes_in: Counter::default(),
            bytes_out: Counter::default(),
        }
    }

    fn request(&self, method: &str, status: u16) {
        let row = self.requests.get(method_class(method));
        if let Some(counter) = row.and_then(|row| row.get(status_class(status))) {
            counter.inc();
        }
    }
}

impl EdgeMetrics {
    fn new(workers: usize) -> Self {
        Self { workers: workers.max(1), shards: OnceLock::new(), rejects: OnceLock::new() }
    }

    fn shard(&self, worker: usize) -> Option<&Shard> {
        let shards = self.shards.get_or_init(|| (0..self.workers).map(|_| Shard::new()).collect());
        shards.get(worker).or_else(|| shards.first())
    }

    fn shards(&self) -> &[Shard] {
        self.shards.get().map_or(&[], |shards| shards)
    }

    /// Counts a finished request.
    pub(crate) fn request(&self, worker: usize, finished: &Finished<'_>) {
        if let Some(shard) = self.shard(worker) {
            shard.request(finished.method, finished.status);
            shard.duration.observe(finished.duration);
            shard.bytes_in.add(finished.bytes_in);
            shard.bytes_out.add(finished.bytes_out);
        }
        if let Some(code) = finished.reject {
            self.reject(code);
        }
    }

    /// Counts a request that was answered before it could be read: nobody knows its method or how long it took.
    pub(crate) fn unread(&self, worker: usize, status: u16, code: &'static str) {
        if let Some(shard) = self.shard(worker) {
            shard.request("", status);
        }
        self.reject(code);
    }

    /// How many requests ended with each class of status, of those that some did.
    pub(crate) fn statuses(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let of = |column: usize| {
            let counts = self.shards().iter().flat_map(|shard| &shard.requests);
            counts.filter_map(|row| row.get(column)).map(Counter::get).fold(0, u64::wrapping_add)
        };
        STATUSES
            .into_iter()
            .enumerate()
            .map(move |(column, status)| (status, of(column)))
            .filter(|(_, count)| *count > 0)
    }

    fn reject(&self, code: &'static str) {
        let rejects = self.rejects.get_or_init(|| CODES.iter().map(|_| Counter::default()).collect());
        if let Some(position) = CODES.iter().position(|known| *known == code)
            && let Some(count) = rejects.get(position)
        {
            count.inc();
        }
    }
}

/// A request that has ended, as far as it is counted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Finished<'a> {
    pub(crate) method: &'a str,
    pub(crate) status: u16,
    pub(crate) reject: Option<&'static str>,
    pub(crate) duration: Duration,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
}

/// The connections of one listener.
#[derive(Debug)]
pub(crate) struct Connections {
    /// Open now.
    pub(crate) open: Gauge,
    /// Accepted so far.
    pub(crate) accepted: Counter,
    /// Turned away.
    pub(crate) refused: Counter,
    /// Closed to make room.
    pub(crate) evicted: Counter,
    /// Cut off, by [`Reason`].
    abuse: [Counter; Reason::ALL.len()],
    /// Bounds the log lines that strangers can cause there.
    pub(crate) lines: Arc<LineQuota>,
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            open: Gauge::default(),
            accepted: Counter::default(),
            refused: Counter::default(),
            evicted: Counter::default(),
            abuse: Default::default(),
            lines: Arc::new(LineQuota::new(limits::STRANGER_LINES, limits::STRANGER_LINES_PER_SECOND)),
        }
    }
}

/// Connections that this sidecar opens.
#[derive(Debug)]
pub(crate) struct Dialled {
    /// Opened so far.
    pub(crate) opened: Counter,
    /// Ended so far.
    pub(crate) closed: Counter,
    /// Could not be opened.
    pub(crate) failed: Counter,
    /// Cut off, by [`Reason`].
    abuse: [Counter; Reason::ALL.len()],
    /// Bounds the log lines that those who answer can cause.
    lines: LineQuota,
}

impl Default for Dialled {
    fn default() -> Self {
        Self {
            opened: Counter::default(),
            closed: Counter::default(),
            failed: Counter::default(),
            abuse: Default::default(),
            lines: LineQuota::new(limits::STRANGER_LINES, limits::STRANGER_LINES_PER_SECOND),
        }
    }
}

/// A dialled connection, which counts as open until this is dropped.
#[derive(Debug)]
pub(crate) struct OpenConnection {
    metrics: Arc<Metrics>,
    of: fn(&Metrics) -> &Dialled,
    _seat: Seat,
}

impl OpenConnection {
    /// One to another sidecar.
    pub(crate) fn to_peer(metrics: &Arc<Metrics>, seat: Seat) -> Self {
        Self::new(metrics, Metrics::upstream, seat)
    }

    /// One to the application.
    pub(crate) fn to_app(metrics: &Arc<Metrics>, seat: Seat) -> Self {
        Self::new(metrics, Metrics::app, seat)
    }

    /// Where it is counted.
    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Counts that it was cut. Where there is to be a line of it, how many were not written before.
    pub(crate) fn abused(&self, reason: Reason) -> Option<u64> {
        let dialled = (self.of)(&self.metrics);
        if let Some(count) = dialled.abuse.get(reason as usize) {
            count.inc();
        }
        dialled.lines.take(Instant::now())
    }

    fn new(metrics: &Arc<Metrics>, of: fn(&Metrics) -> &Dialled, seat: Seat) -> Self {
        of(metrics).opened.inc();
        Self { metrics: Arc::clone(metrics), of, _seat: seat }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        (self.of)(&self.metrics).closed.inc();
    }
}

/// What one worker shows of itself; only it writes here.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Load {
    /// Requests under way, by [`Direction`].
    pub(crate) in_flight: [Gauge; 3],
}

type Edges = Mutex<HashMap<(String, String), Arc<EdgeMetrics>>>;

/// All counts of a sidecar.
#[derive(Debug)]
pub(crate) struct Metrics {
    counts: Arc<Counts>,
    registry: Mutex<Registry>,
}

/// What is counted, apart from what writes it down.
#[derive(Debug)]
struct Counts {
    admission: Admission,
    calls: Arc<crate::edge::Edges>,
    app_health: Arc<AppHealth>,
    edges: Edges,
    loads: Box<[Load]>,
    listeners: [Connections; Listener::ALL.len()],
    upstream: Dialled,
    app: Dialled,
    /// By [`Leg`], and by the place in [`HANDSHAKE_OUTCOMES`].
    handshakes: [Box<[Counter]>; Leg::ALL.len()],
    handshakes_in_progress: [Gauge; Leg::ALL.len()],
    limit_hits: [Counter; Limit::ALL.len()],
    library_answers: Counter,
    trailers_dropped: Counter,
    certificate_expiry_unix_s: AtomicU64,
    local_ports_failed: AtomicU64,
}

impl Metrics {
    /// Counts that all stand at nothing, for a number of workers.
    pub(crate) fn new(
        log: LogSink,
        tracing: Tracing,
        workers: usize,
        admission: Admission,
        calls: Arc<crate::edge::Edges>,
    ) -> Arc<Self> {
        let counts = Arc::new(Counts {
            admission,
            calls,
            app_health: Arc::default(),
            edges: Edges::default(),
            loads: (0..workers.max(1)).map(|_| Load::default()).collect(),
            listeners: Default::default(),
            upstream: Dialled::default(),
            app: Dialled::default(),
            handshakes: std::array::from_fn(|_| {
                HANDSHAKE_OUTCOMES.iter().map(|_| Counter::default()).collect()
            }),
            handshakes_in_progress: Default::default(),
            limit_hits: Default::default(),
            library_answers: Counter::default(),
            trailers_dropped: Counter::default(),
            certificate_expiry_unix_s: AtomicU64::new(0),
            local_ports_failed: AtomicU64::new(0),
        });
        let mut registry = Registry::default();
        collect::register(&mut registry, Arc::clone(&counts), log, tracing);
        Arc::new(Self { counts, registry: Mutex::new(registry) })
    }

    /// Counts that nobody reads but a test.
    #[cfg(test)]
    pub(crate) fn of_a_test(workers: usize, admission: Admission) -> Arc<Self> {
        let log = LogSink::new(std::io::sink(), kiro_telemetry::log::Format::Json, None).unwrap();
        Self::new(log, Tracing::off(), workers, admission, Arc::default())
    }

    /// The counts of an edge, made on first use; called when a mesh file is read, never for a request.
    pub(crate) fn edge(&self, from: &str, to: &str) -> Arc<EdgeMetrics> {
        let mut edges = lock(&self.counts.edges);
        let edge = edges
            .entry((from.to_owned(), to.to_owned()))
            .or_insert_with(|| Arc::new(EdgeMetrics::new(self.counts.loads.len())));
        Arc::clone(edge)
    }

    /// What is known of the application.
    pub(crate) fn app_health(&self) -> &Arc<AppHealth> {
        &self.counts.app_health
    }

    /// What this process admits.
    pub(crate) fn admission(&self) -> Admission {
        self.counts.admission
    }

    /// Notes when the certificate ends.
    pub(crate) fn certificate_ends(&self, unix_seconds: u64) {
        self.counts.certificate_expiry_unix_s.store(unix_seconds, Ordering::Relaxed);
    }

    /// Notes how many local ports can't be bound.
    pub(crate) fn local_ports_failed(&self, count: usize) {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.counts.local_ports_failed.store(count, Ordering::Relaxed);
    }

    /// Shows how many requests of one direction are under way at a worker.
    pub(crate) fn in_flight(&self, worker: usize, direction: Direction, count: u64) {
        let load = self.counts.loads.get(worker);
        if let Some(gauge) = load.and_then(|load| load.in_flight.get(direction as usize)) {
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// The connections of a listener.
    pub(crate) fn connections(&self, listener: Listener) -> &Connections {
        let [outbound, inbound, ingress, ingress_tls, local, admin, health] = &self.counts.listeners;
        match listener {
            Listener::Outbound => outbound,
            Listener::Inbound => inbound,
            Listener::Ingress => ingress,
            Listener::IngressTls => ingress_tls,
            Listener::Local => local,
            Listener::Admin => admin,
            Listener::Health => health,
        }
    }

    /// Connections to other sidecars.
    pub(crate) fn upstream(&self) -> &Dialled {
        &self.counts.upstream
    }

    /// Connections to the application.
    pub(crate) fn app(&self) -> &Dialled {
        &self.counts.app
    }

    /// Counts a connection that was cut.
    pub(crate) fn abused(&self, listener: Listener, reason: Reason) {
        if let Some(count) = self.connections(listener).abuse.get(reason as usize) {
            count.inc();
        }
    }

    /// Counts that a bound was run into.
    pub(crate) fn limit_hit(&self, limit: Limit) {
        self.limit_hits(limit, 1);
    }

    /// Counts that a bound was run into several times.
    pub(crate) fn limit_hits(&self, limit: Limit, times: u64) {
        if let Some(count) = self.counts.limit_hits.get(limit as usize) {
            count.add(times);
        }
    }

    /// Counts an answer that the HTTP library gave by itself.
    pub(crate) fn library_answered(&self) {
        self.counts.library_answers.inc();
    }

    /// Counts trailers that could not be carried on.
    pub(crate) fn trailers_dropped(&self) {
        self.counts.trailers_dropped.inc();
    }

    /// Counts a TLS handshake that has ended: `ok`, or the code of its failure.
    pub(crate) fn handshake_ended(&self, leg: Leg, outcome: &'static str) {
        let known = HANDSHAKE_OUTCOMES.iter().position(|known| *known == outcome);
        let position = known.unwrap_or(HANDSHAKE_OUTCOMES.len() - 1);
        let counts = self.counts.handshakes.get(leg as usize);
        if let Some(count) = counts.and_then(|counts| counts.get(position)) {
            count.inc();
        }
    }

    /// A TLS handshake with a client is under way for as long as this is kept.
    pub(crate) fn handshake_begins(self: &Arc<Self>, leg: Leg) -> UnderWay {
        let metrics = Arc::clone(self);
        if let Some(gauge) = metrics.counts.handshakes_in_progress.get(leg as usize) {
            gauge.inc();
        }
        UnderWay { metrics, leg }
    }

    /// The Prometheus text.
    pub(crate) fn render(&self) -> String {
        render(&lock(&self.registry))
    }
}

/// See [`Metrics::handshake_begins`].
#[derive(Debug)]
pub(crate) struct UnderWay {
    metrics: Arc<Metrics>,
    leg: Leg,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if let Some(gauge) = self.metrics.counts.handshakes_in_progress.get(self.leg as usize) {
            gauge.dec();
        }
    }
}

fn method_class(method: &str) -> usize {
    match method {
        "GET" | "HEAD" | "OPTIONS" => 0,
        "POST" | "PUT" | "PATCH" | "DELETE" => 1,
        "CONNECT" => 2,
        _ => 3,
    }
}

fn status_class(status: u16) -> usize {
    match status {
        499 => 5,
        0..200 => 0,
        200..300 => 1,
        300..400 => 2,
        400..500 => 3,
        _ => 4,
    }
}
