//! How do the counts become the text of `/metrics`?

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kiro_telemetry::log::LogSink;
use kiro_telemetry::metrics::{Histogram, Metric};
use kiro_telemetry::trace::Tracing;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::calls;
use super::catalogue::{self as names, Entry};
use super::{Counts, EdgeMetrics, HANDSHAKE_OUTCOMES, Leg, METHODS, STATUSES, Shard};
use crate::abuse::Reason;
use crate::admission::{Limit, Listener};
use crate::exchange::Direction;
use crate::lock::lock;
use crate::reject::CODES;

/// Registers all that is counted.
pub(super) fn register(registry: &mut Registry, counts: Arc<Counts>, log: LogSink, tracing: Tracing) {
    registry.register_collector(Box::new(Everything { counts, log, tracing }));
}

struct Everything {
    counts: Arc<Counts>,
    log: LogSink,
    tracing: Tracing,
}

impl fmt::Debug for Everything {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Everything").finish_non_exhaustive()
    }
}

pub(super) type Labels<'a, const N: usize> = [(&'static str, &'a str); N];

/// One metric, as it is written.
pub(super) struct Family<'a>(MetricEncoder<'a>);

impl<'a> Family<'a> {
    pub(super) fn begin<'e: 'a>(
        encoder: &'a mut DescriptorEncoder<'e>,
        entry: &Entry,
    ) -> Result<Self, fmt::Error> {
        encoder.encode_descriptor(entry.name, entry.help, None, entry.kind).map(Self)
    }

    pub(super) fn counter<const N: usize>(&mut self, labels: &Labels<'_, N>, value: u64) -> fmt::Result {
        ConstCounter::new(value).encode(self.0.encode_family(labels)?)
    }

    pub(super) fn gauge<const N: usize>(&mut self, labels: &Labels<'_, N>, value: i64) -> fmt::Result {
        ConstGauge::new(value).encode(self.0.encode_family(labels)?)
    }
}

fn one_counter(encoder: &mut DescriptorEncoder<'_>, entry: &Entry, value: u64) -> fmt::Result {
    ConstCounter::new(value).encode(encoder.encode_descriptor(entry.name, entry.help, None, entry.kind)?)
}

fn one_gauge(encoder: &mut DescriptorEncoder<'_>, entry: &Entry, value: u64) -> fmt::Result {
    let value = i64::try_from(value).unwrap_or(i64::MAX);
    ConstGauge::new(value).encode(encoder.encode_descriptor(entry.name, entry.help, None, entry.kind)?)
}

impl Collector for Everything {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut encoder;
        edges(&self.counts, encoder)?;
        in_flight(&self.counts, encoder)?;
        one_counter(encoder, &names::LIBRARY_ANSWERS, self.counts.library_answers.get())?;
        one_counter(encoder, &names::TRAILERS_DROPPED, self.counts.trailers_dropped.get())?;
        listeners(&self.counts, encoder)?;
        dialled(&self.counts, encoder)?;
        calls::encode(&self.counts.calls, &self.counts.app_health, encoder)?;
        handshakes(&self.counts, encoder)?;
        abuse(&self.counts, encoder)?;
        abuse_by_callee(&self.counts, encoder)?;
        bounds(&self.counts, encoder)?;
        let expiry = self.counts.certificate_expiry_unix_s.load(Ordering::Relaxed);
        one_gauge(encoder, &names::CERTIFICATE_EXPIRY, expiry)?;
        let local_ports = self.counts.local_ports_failed.load(Ordering::Relaxed);
        one_gauge(encoder, &names::LOCAL_PORTS_FAILED, local_ports)?;
        one_gauge(encoder, &names::OPEN_FDS, open_descriptors())?;
        one_counter(encoder, &names::LOG_LINES_LOST, self.log.lost())?;
        let strangers = self.counts.listeners.iter().map(|listener| listener.lines.suppressed());
        let callees = [&self.counts.upstream, &self.counts.app].map(|dialled| dialled.lines.suppressed());
        one_counter(encoder, &names::LOG_LINES_SUPPRESSED, strangers.chain(callees).sum())?;
        let spans = self.tracing.counts();
        one_counter(encoder, &names::SPANS_RECORDED, spans.recorded)?;
        one_counter(encoder, &names::SPANS_EXPORTED, spans.exported)?;
        one_counter(encoder, &names::SPANS_LOST, spans.failed + spans.dropped)
    }
}

/// What the shards of an edge come to.
fn sum(edge: &EdgeMetrics, count: impl Fn(&Shard) -> u64) -> u64 {
    edge.shards().iter().map(count).fold(0, u64::wrapping_add)
}

fn edges(counts: &Counts, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let requests = |shard: &Shard| shard.requests.iter().flatten().map(|counter| counter.get()).sum();
    // Of the thousands that a mesh may have, few are in use.
    let edges: BTreeMap<_, _> = {
        let all = lock(&counts.edges);
        let used = all.iter().filter(|(_, edge)| sum(edge, requests) > 0);
        used.map(|(names, edge)| (names.clone(), Arc::clone(edge))).collect()
    };
    let mut family = Family::begin(encoder, &names::REQUESTS)?;
    for ((from, to), edge) in &edges {
        for (row, method) in METHODS.into_iter().enumerate() {
            for (column, status) in STATUSES.into_iter().enumerate() {
                let cell = |shard: &Shard| {
                    shard.requests.get(row).and_then(|row| row.get(column)).map_or(0, |counter| counter.get())
                };
                let count = sum(edge, cell);
                if count > 0 {
                    let labels =
                        [("from", from.as_str()), ("to", to), ("method", method), ("status", status)];
                    family.counter(&labels, count)?;
                }
            }
        }
    }
    let mut family = Family::begin(encoder, &names::REJECTS)?;
    for ((from, to), edge) in &edges {
        let Some(rejects) = edge.rejects.get() else { continue };
        for (code, count) in CODES.iter().zip(rejects).filter(|(_, count)| count.get() > 0) {
            family.counter(&[("from", from.as_str()), ("to", to), ("code", *code)], count.get())?;
        }
    }
    let mut family = Family::begin(encoder, &names::DURATION)?;
    for ((from, to), edge) in &edges {
        let shards: Vec<&Histogram> = edge.shards().iter().map(|shard| &shard.duration).collect();
        Histogram::encode_sum(&shards, family.0.encode_family(&[("from", from.as_str()), ("to", to)])?)?;
    }
    let mut family = Family::begin(encoder, &names::BODY_BYTES)?;
    for ((from, to), edge) in &edges {
        let labels = |body| [("from", from.as_str()), ("to", to.as_str()), ("body", body)];
        family.counter(&labels("request"), sum(edge, |shard| shard.bytes_in.get()))?;
        family.counter(&labels("response"), sum(edge, |shard| shard.bytes_out.get()))?;
    }
    Ok(())
}

fn in_flight(counts: &Counts, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let mut family = Family::begin(encoder, &names::IN_FLIGHT)?;
    for direction in [Direction::Outbound, Direction::Inbound, Direction::Ingress] {
        let of = |load: &super::Load| load.in_flight.get(direction as usize).map_or(0, |gauge| gauge.get());
        family.gauge(&[("direction", direction.as_str())], counts.loads.iter().map(of).sum())?;
    }
    Ok(())
}

fn listeners(counts: &Counts, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let listeners = || Listener::ALL.into_iter().zip(&counts.listeners);
    let mut family = Family::begin(encoder, &names::CONNECTIONS_OPEN)?;
    for (listener, connections) in listeners() {
        family.gauge(&[("listener", listener.as_str())], connections.open.get())?;
    }
    let mut family = Family::begin(encoder, &names::CONNECTIONS_ACCEPTED)?;
    for (listener, connections) in listeners() {
        family.counter(&[("listener", listener.as_str())], connections.accepted.get())?;
    }
    let mut family = Family::begin(encoder, &names::CONNECTIONS_REFUSED)?;
    for (listener, connections) in listeners() {
        family.counter(&[("listener", listener.as_str())], connections.refused.get())?;
    }
    let mut family = Family::begin(encoder, &names::CONNECTIONS_EVICTED)?;
    for (listener, connections) in listeners() {
        family.counter(&[("listener", listener.as_str())], connections.evicted.get())?;
    }
    Ok(())
}

fn dialled(counts: &Counts, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let open = |dialled: &super::Dialled| dialled.opened.get().saturating_sub(dialled.closed.get());
    one_gauge(encoder, &names::UPSTREAM_OPEN, open(&counts.upstream))?;
    one_counter(encoder, &names::UPSTREAM_OPENED, counts.upstream.opened.get())?;
    one_counter(encoder, &names::UPSTREAM_CLOSED, counts.upstream.closed.get())?;
    one_counter(encoder, &names::UPSTREAM_FAILED, counts.upstream.failed.get())?;
    one_gauge(encoder, &names::APP_OPEN, open(&counts.app))?;
    one_counter(encoder, &names::APP_OPENED, counts.app.opened.get())
}

fn handshakes(counts: &Counts, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let mut family = Family::begin(encoder, &names::HANDSHAKES)?;
    for (leg, outcomes) in Leg::ALL.into_iter().zip(&counts.handshakes) {
        for (outcome, count) in HANDSHAKE_OUTCOMES.iter().zip(outcomes).filter(|(_, count)| count.get() > 0) {
            family.counter(&[("direction", leg.as_str()), ("outcome", *outcome)], count.get())?;
        }
    }
    let mut family = Family::begin(encoder, &names::HANDSHAKES_IN_PROGRESS)?;
    // The sidecar's own handshakes are bounded by its connections to peers.
    for (leg, gauge) in Leg::ALL.into_iter().zip(&counts.handshakes_in_progress).take(3) {
        family.gauge(&[("direction", leg.as_str())], gauge.get())?;
    }
    Ok(())
}

fn abuse(counts: &Counts, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let mut family = Family::begin(encoder, &names::ABUSE)?;
    for (listener, connections) in Listener::ALL.into_iter().zip(&counts.listeners) {
        for (reason, count) in
            Reason::ALL.into_iter().zip(&connections.abuse).filter(|(_, count)| count.get() > 0)
        {
            family.counter(&[("listener", listener.as_str()), ("reason", reason.as_str())], count.get())?;
        }
    }
    Ok(())
}

fn abuse_by_callee(counts: &Counts, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let mut family = Family::begin(encoder, &names::ABUSE_BY_CALLEE)?;
    for (leg, dialled) in [(Leg::Peer, &counts.upstream), (Leg::App, &counts.app)] {
        for (reason, count) in
            Reason::ALL.into_iter().zip(&dialled.abuse).filter(|(_, count)| count.get() > 0)
        {
            family.counter(&[("direction", leg.as_str()), ("reason", reason.as_str())], count.get())?;
        }
    }
    Ok(())
}

fn bounds(counts: &Counts, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let mut family = Family::begin(encoder, &names::LIMIT)?;
    for limit in Limit::ALL {
        let bound = i64::try_from(counts.admission.bound(limit)).unwrap_or(i64::MAX);
        family.gauge(&[("limit", limit.as_str())], bound)?;
    }
    let mut family = Family::begin(encoder, &names::LIMIT_HITS)?;
    for (limit, hits) in Limit::ALL.into_iter().zip(&counts.limit_hits) {
        family.counter(&[("limit", limit.as_str())], hits.get())?;
    }
    Ok(())
}

/// Descriptors that this process has open, where the system shows them; the one that looks is not one of them.
fn open_descriptors() -> u64 {
    let count = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    (count as u64).saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::time::Instant;

    use kiro_core::breaker::BreakerSettings;
    use kiro_core::identity::ServiceName;

    use super::super::{Finished, Metrics, UNKNOWN};
    use super::*;
    use crate::admission::{Admission, Seats};

    fn metrics() -> Arc<Metrics> {
        Metrics::of_a_test(2, Admission::shared(1 << 20, 2))
    }

    #[test]
    fn the_text_has_what_the_catalogue_promises_and_nothing_else() {
        let metrics = metrics();
        let text = metrics.render();
        let described: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# ")).collect();
        let expected: Vec<String> = names::ALL
            .iter()
            .flat_map(|entry| {
                let (name, help) = (entry.name, entry.help);
                [format!("HELP {name} {help}"), format!("TYPE {name} {}", entry.kind.as_str())]
            })
            .chain(["EOF".to_owned()])
            .collect();
        assert_eq!(described, expected);
    }

    #[test]
    fn each_series_has_the_labels_that_the_catalogue_names() {
        let metrics = metrics();
        count_something(&metrics);
        let text = metrics.render();
        for entry in names::ALL {
            let of_it: Vec<_> = text
                .lines()
                .filter(|line| {
                    let rest = line.strip_prefix(entry.name).unwrap_or("#");
                    ["_total", "_count", ""].iter().any(|suffix| {
                        rest.strip_prefix(suffix).is_some_and(|rest| rest.starts_with(['{', ' ']))
                    })
                })
                .collect();
            assert!(!of_it.is_empty(), "{} in {text}", entry.name);
            for line in of_it {
                let labels = line.split_once('{').map_or("", |(_, rest)| rest.split('}').next().unwrap());
                let found: Vec<_> = labels
                    .split(',')
                    .filter_map(|label| label.split_once('=').map(|(name, _)| name))
                    .collect();
                assert_eq!(found, entry.labels, "{line}");
            }
        }
    }

    fn count_something(metrics: &Arc<Metrics>) {
        let finished = Finished {
            method: "GET",
            status: 403,
            reject: Some("policy_no_edge"),
            duration: std::time::Duration::from_millis(3),
            bytes_in: 5,
            bytes_out: 7,
        };
        metrics.edge("a", "b").request(0, &finished);
        metrics.edge("a", "b").request(1, &finished);
        metrics.edge("a", UNKNOWN).unread(1, 431, "headers_too_large");
        metrics.handshake_ended(Leg::Peer, "ok");
        metrics.handshake_ended(Leg::Inbound, "no such code");
        metrics.abused(Listener::Inbound, Reason::RapidReset);
        super::super::OpenConnection::to_app(metrics, Seats::new(1).take().unwrap())
            .abused(Reason::ControlFlood);
        let calls = metrics.counts.calls.calls(
            &ServiceName::parse("b").unwrap(),
            metrics.counts.calls.next_file(),
            &Arc::from([SocketAddr::from(([127, 0, 0, 1], 15006))]),
            Some(BreakerSettings::default()),
            Instant::now(),
        );
        calls.edge.retries.count("retried");
        calls.edge.faults.count("abort");
        calls.edge.copies.count("answered");
        calls.edge.known.send_modify(|known| known.confirmed = Some(Instant::now()));
        let mesh = kiro_core::mesh::parse(
            "trust_domain: d\nservices: { a: { app: { port: 80 }, traffic: { concurrency: 5 } } }\n\
             limits:\n  - { from: \"*\", to: a, rate: 1/s, per: path }\n",
        );
        let (mesh, me, now) = (mesh.unwrap(), ServiceName::parse("a").unwrap(), Instant::now());
        let edges = &metrics.counts.calls;
        edges.rates.keep(&edges.rates.of(mesh.limits.iter(), &me, now));
        edges.app.keep(edges.app.of(mesh.services[&me].traffic.concurrency, now).as_ref());
        metrics.limit_hit(Limit::StreamWaiters);
        metrics.in_flight(0, Direction::Inbound, 2);
        metrics.in_flight(1, Direction::Inbound, 3);
    }

    #[test]
    fn the_text_is_the_sum_of_all_workers() {
        let metrics = metrics();
        count_something(&metrics);
        let text = metrics.render();
        for line in [
            "kiro_requests_total{from=\"a\",to=\"b\",method=\"read\",status=\"4xx\"} 2",
            "kiro_requests_total{from=\"a\",to=\"-\",method=\"other\",status=\"4xx\"} 1",
            "kiro_rejects_total{from=\"a\",to=\"b\",code=\"policy_no_edge\"} 2",
            "kiro_rejects_total{from=\"a\",to=\"-\",code=\"headers_too_large\"} 1",
            "kiro_request_duration_seconds_count{from=\"a\",to=\"b\"} 2",
            "kiro_body_bytes_total{from=\"a\",to=\"b\",body=\"request\"} 10",
            "kiro_requests_in_flight{direction=\"inbound\"} 5",
            "kiro_tls_handshakes_total{direction=\"peer\",outcome=\"ok\"} 1",
            "kiro_tls_handshakes_total{direction=\"inbound\",outcome=\"tls_other\"} 1",
            "kiro_abuse_total{listener=\"inbound\",reason=\"rapid_reset\"} 1",
            "kiro_abuse_by_callee_total{direction=\"app\",reason=\"control_flood\"} 1",
            "kiro_limit{limit=\"stream_waiters\"} 1024",
            "kiro_limit_hits_total{limit=\"stream_waiters\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }

    #[test]
    fn every_tls_code_of_a_reject_is_an_outcome_of_a_handshake() {
        for code in CODES.iter().filter(|code| code.starts_with("tls_") && **code != "tls_in_tunnel") {
            assert!(HANDSHAKE_OUTCOMES.contains(code), "{code}");
        }
        assert_eq!(HANDSHAKE_OUTCOMES.last(), Some(&"tls_other"), "what is not known counts as the last");
        for (place, leg) in Leg::ALL.into_iter().enumerate() {
            assert_eq!(leg as usize, place);
        }
    }
}
