//! What is counted, and how does `/metrics` show it?
//!
//! The counts of an edge are made when the mesh file names its services, never by what a client sends, so that label sets can't
//! grow from outside. Counting is an atomic addition.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiro_telemetry::log::LogSink;
use kiro_telemetry::metrics::{Counter, Histogram, Metric, NumberKind, register_number, render};
use kiro_telemetry::trace::Tracing;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;

use crate::reject::CODES;

/// Upper bounds of the duration buckets: from what a request on one machine takes to the default timeout.
const DURATION_BOUNDS_US: &[u64] = &[
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    5_000_000, 15_000_000,
];

const METHODS: [&str; 4] = ["read", "write", "connect", "other"];
const STATUSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "gone"];

/// The counts of one edge as this sidecar sees it.
#[derive(Debug)]
pub(crate) struct EdgeMetrics {
    requests: [[Counter; STATUSES.len()]; METHODS.len()],
    duration: Histogram,
    bytes_in: Counter,
    bytes_out: Counter,
}

impl EdgeMetrics {
    fn new() -> Self {
        Self {
            requests: Default::default(),
            duration: Histogram::new(DURATION_BOUNDS_US),
            bytes_in: Counter::default(),
            bytes_out: Counter::default(),
        }
    }
}

type Edges = Arc<Mutex<HashMap<(String, String), Arc<EdgeMetrics>>>>;

/// All counts of a sidecar.
#[derive(Debug)]
pub(crate) struct Metrics {
    edges: Edges,
    rejects: Arc<Vec<AtomicU64>>,
    handshake_failures: Arc<Mutex<HashMap<&'static str, u64>>>,
    registry: Mutex<Registry>,
    /// Answers that the HTTP library gave by itself.
    pub(crate) library_answers: Arc<Counter>,
    /// Connections turned away because a listener was full.
    pub(crate) connections_refused: Arc<Counter>,
    certificate_expiry_unix_s: Arc<AtomicU64>,
    local_ports_failed: Arc<AtomicU64>,
}

impl Metrics {
    /// Counts that all stand at nothing.
    pub(crate) fn new(log: LogSink, tracing: Tracing) -> Arc<Self> {
        let metrics = Arc::new(Self {
            edges: Edges::default(),
            rejects: Arc::new(CODES.iter().map(|_| AtomicU64::new(0)).collect()),
            handshake_failures: Arc::default(),
            registry: Mutex::new(Registry::default()),
            library_answers: Arc::default(),
            connections_refused: Arc::default(),
            certificate_expiry_unix_s: Arc::default(),
            local_ports_failed: Arc::default(),
        });
        let mut registry = metrics.registry.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register_collector(Box::new(EdgeCollector {
            edges: Arc::clone(&metrics.edges),
            rejects: Arc::clone(&metrics.rejects),
            handshake_failures: Arc::clone(&metrics.handshake_failures),
        }));
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let (library, refused) =
            (Arc::clone(&metrics.library_answers), Arc::clone(&metrics.connections_refused));
        let expiry = Arc::clone(&metrics.certificate_expiry_unix_s);
        let local_ports_failed = Arc::clone(&metrics.local_ports_failed);
        let mut register = |kind, name, help, read: Box<dyn Fn() -> u64 + Send + Sync>| {
            register_number(&mut registry, kind, name, help, move || number(read()));
        };
        register(
            NumberKind::Counter,
            "kiro_library_answers",
            "Requests that were answered before they could be read whole: malformed or too large heads",
            Box::new(move || library.get()),
        );
        register(
            NumberKind::Counter,
            "kiro_connections_refused",
            "Connections turned away because a listener had all that it may have",
            Box::new(move || refused.get()),
        );
        register(
            NumberKind::Gauge,
            "kiro_certificate_expiry_timestamp_seconds",
            "When the sidecar's certificate ends, in seconds since 1970",
            Box::new(move || expiry.load(Ordering::Relaxed)),
        );
        register(
            NumberKind::Gauge,
            "kiro_local_ports_failed",
            "Ports of the pod's loopback that lead to tcp services and can't be bound",
            Box::new(move || local_ports_failed.load(Ordering::Relaxed)),
        );
        register(
            NumberKind::Counter,
            "kiro_log_lines_lost",
            "Log lines lost to a full buffer",
            Box::new(move || log.lost()),
        );
        let (recorded, exported, failed) = (tracing.clone(), tracing.clone(), tracing);
        register(
            NumberKind::Counter,
            "kiro_spans_recorded",
            "Spans handed to the exporter",
            Box::new(move || recorded.counts().recorded),
        );
        register(
            NumberKind::Counter,
            "kiro_spans_exported",
            "Spans that the collector took",
            Box::new(move || exported.counts().exported),
        );
        register(
            NumberKind::Counter,
            "kiro_spans_lost",
            "Spans lost: the collector did not take them, or the queue was full",
            Box::new(move || failed.counts().failed + failed.counts().dropped),
        );
        drop(registry);
        metrics
    }

    /// The counts of an edge, made on first use; called when a mesh file is read, never for a request.
    pub(crate) fn edge(&self, from: &str, to: &str) -> Arc<EdgeMetrics> {
        let mut edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(
            edges.entry((from.to_owned(), to.to_owned())).or_insert_with(|| Arc::new(EdgeMetrics::new())),
        )
    }

    /// Notes when the certificate ends.
    pub(crate) fn certificate_ends(&self, unix_seconds: u64) {
        self.certificate_expiry_unix_s.store(unix_seconds, Ordering::Relaxed);
    }

    /// Notes how many local ports can't be bound.
    pub(crate) fn local_ports_failed(&self, count: usize) {
        self.local_ports_failed.store(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Counts a finished request.
    #[allow(
        clippy::too_many_arguments,
        reason = "one call a request; a struct would only repeat the access record"
    )]
    pub(crate) fn request(
        &self,
        edge: Option<&Arc<EdgeMetrics>>,
        method: &str,
        status: u16,
        reject: Option<&'static str>,
        duration: Duration,
        bytes_in: u64,
        bytes_out: u64,
    ) {
        if let Some(edge) = edge {
            let row = edge.requests.get(method_class(method));
            if let Some(counter) = row.and_then(|row| row.get(status_class(status))) {
                counter.inc();
            }
            edge.duration.observe(duration);
            edge.bytes_in.add(bytes_in);
            edge.bytes_out.add(bytes_out);
        }
        if let Some(code) = reject
            && let Some(position) = CODES.iter().position(|known| *known == code)
            && let Some(count) = self.rejects.get(position)
        {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a TLS handshake that failed.
    pub(crate) fn handshake_failed(&self, code: &'static str) {
        let mut failures = self.handshake_failures.lock().unwrap_or_else(PoisonError::into_inner);
        *failures.entry(code).or_default() += 1;
    }

    /// The Prometheus text.
    pub(crate) fn render(&self) -> String {
        render(&self.registry.lock().unwrap_or_else(PoisonError::into_inner))
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

#[derive(Debug)]
struct EdgeCollector {
    edges: Edges,
    rejects: Arc<Vec<AtomicU64>>,
    handshake_failures: Arc<Mutex<HashMap<&'static str, u64>>>,
}

impl Collector for EdgeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let edges: std::collections::BTreeMap<_, _> =
            edges.into_iter().filter(|(_, metrics)| metrics.duration.count() > 0).collect();
        let mut requests = encoder.encode_descriptor(
            "kiro_requests",
            "Requests by edge, class of method and class of status (`gone`: the client left before an answer)",
            None,
            MetricType::Counter,
        )?;
        for ((from, to), metrics) in &edges {
            for (method, row) in METHODS.iter().zip(&metrics.requests) {
                for (status, counter) in STATUSES.iter().zip(row).filter(|(_, counter)| counter.get() > 0) {
                    let labels = [
                        ("from", from.as_str()),
                        ("to", to.as_str()),
                        ("method", *method),
                        ("status", *status),
                    ];
                    ConstCounter::new(counter.get()).encode(requests.encode_family(&labels)?)?;
                }
            }
        }
        let mut durations = encoder.encode_descriptor(
            "kiro_request_duration_seconds",
            "From a request's head to its answer's end",
            None,
            MetricType::Histogram,
        )?;
        for ((from, to), metrics) in &edges {
            let labels = [("from", from.as_str()), ("to", to.as_str())];
            Histogram::encode_sum(&[&metrics.duration], durations.encode_family(&labels)?)?;
        }
        let mut bytes =
            encoder.encode_descriptor("kiro_body_bytes", "Bytes of bodies", None, MetricType::Counter)?;
        for ((from, to), metrics) in &edges {
            for (way, counter) in [("request", &metrics.bytes_in), ("response", &metrics.bytes_out)] {
                let labels = [("from", from.as_str()), ("to", to.as_str()), ("body", way)];
                ConstCounter::new(counter.get()).encode(bytes.encode_family(&labels)?)?;
            }
        }
        self.encode_refusals(encoder)
    }
}

impl EdgeCollector {
    fn encode_refusals(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut rejects = encoder.encode_descriptor(
            "kiro_rejects",
            "Refused requests by code",
            None,
            MetricType::Counter,
        )?;
        for (code, count) in CODES.iter().zip(self.rejects.iter()) {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                ConstCounter::new(count).encode(rejects.encode_family(&[("code", *code)])?)?;
            }
        }
        let failures = self.handshake_failures.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let failures: std::collections::BTreeMap<_, _> = failures.into_iter().collect();
        let mut handshakes = encoder.encode_descriptor(
            "kiro_tls_handshakes_failed",
            "TLS handshakes that failed, by reason",
            None,
            MetricType::Counter,
        )?;
        for (code, count) in failures {
            ConstCounter::new(count).encode(handshakes.encode_family(&[("code", code)])?)?;
        }
        Ok(())
    }
}
