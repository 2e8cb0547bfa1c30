//! What does telemetry cost a request? `cargo bench -p kiro-telemetry` prints nanoseconds.
#![allow(clippy::print_stdout, reason = "printing is what a benchmark is for")]

use std::hint::black_box;
use std::time::{Duration, Instant, SystemTime};

use http::HeaderMap;
use kiro_telemetry::log::{LineBuffer, LogSink};
use kiro_telemetry::metrics::{Family, Histogram, Label};
use kiro_telemetry::trace::{KeyValue, Span, SpanData, SpanExporter, SpanKind, Status};
use kiro_telemetry::trace::{OTelSdkResult, Sampler, semantic};
use kiro_telemetry::{AccessRecord, Format, ServiceInfo, Tracing, extract, inject};

const ROUNDS: u32 = 1_000_000;

fn main() {
    let record = record();
    let mut line = Vec::new();
    measure("access line, JSON", || {
        line.clear();
        record.write(Format::Json, &mut line);
        black_box(&line);
    });
    println!("    of {} bytes", line.len());
    measure("access line, JSON, with its own time", || {
        line.clear();
        AccessRecord { time: SystemTime::now(), ..record.clone() }.write(Format::Json, &mut line);
        black_box(&line);
    });
    measure("access line, pretty", || {
        line.clear();
        record.write(Format::Pretty, &mut line);
        black_box(&line);
    });
    let sink = LogSink::new(std::io::sink(), Format::Json, None);
    let mut buffer = LineBuffer::new(sink.unwrap_or_else(|error| unreachable!("no thread: {error}")));
    measure("access line through buffer and sink", || {
        buffer.write(|out| record.write(Format::Json, out));
    });

    let info = ServiceInfo { name: "profile", instance_id: "1", version: "1" };
    let sampler = Sampler::PARENT_BASED_ALWAYS_ON;
    let tracing = Tracing::with_exporter(Nowhere, &info, sampler, Duration::from_millis(100))
        .unwrap_or_else(|error| unreachable!("no thread: {error}"));
    let mut headers = HeaderMap::new();
    inject(&tracing.root(), &mut headers);
    measure("context: extract, continue, child, inject", || {
        let context =
            extract(&headers).map_or_else(|| tracing.root(), |remote| tracing.continue_from(&remote, true));
        inject(&tracing.child(&context), &mut headers);
    });
    let context = tracing.root();
    measure("span with eight attributes", || {
        tracing.record(span(&context));
    });
    println!("    {:?}", tracing.counts());

    let family = Family::new(
        [Label::new("direction", ["inbound", "outbound"]), Label::new("class", ["2xx", "4xx", "5xx"])],
        || Histogram::new(&[100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000]),
    );
    measure("histogram in a family", || {
        if let Some(histogram) = family.at(black_box([1, 0])) {
            histogram.observe(black_box(Duration::from_micros(700)));
        }
    });
}

fn measure(what: &str, mut work: impl FnMut()) {
    for _ in 0..ROUNDS / 10 {
        work();
    }
    let start = Instant::now();
    for _ in 0..ROUNDS {
        work();
    }
    println!("{what}: {:.0} ns", start.elapsed().as_nanos() as f64 / f64::from(ROUNDS));
}

fn record() -> AccessRecord<'static> {
    AccessRecord {
        time: SystemTime::now(),
        service: "profile",
        direction: "inbound",
        caller: "dashboard",
        caller_proof: "mtls",
        remote: None,
        callee: "profile",
        callee_proof: "loopback-mtls",
        method: "GET",
        path: "/profiles/alice",
        protocol: "HTTP/2",
        status: 200,
        reject: None,
        reject_cause: None,
        signature: "verified",
        policy: "allowed",
        policy_denial: None,
        bytes_in: 0,
        bytes_out: 1234,
        ended: None,
        duration: Duration::from_micros(1234),
        upstream: Some(([127, 0, 0, 1], 8002).into()),
        attempts: 1,
        gave_up: None,
        fault: None,
        split: None,
        copy_of: None,
        trace_id: 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef,
        span_id: 0x0123_4567_89ab_cdef,
        sampled: true,
    }
}

fn span(context: &kiro_telemetry::TraceContext) -> Span<'_> {
    let start = SystemTime::now();
    Span {
        context,
        kind: SpanKind::Server,
        name: "GET".into(),
        start,
        end: start,
        attributes: vec![
            KeyValue::new(semantic::HTTP_REQUEST_METHOD, "GET"),
            KeyValue::new(semantic::URL_PATH, "/profiles/alice".to_owned()),
            KeyValue::new(semantic::URL_SCHEME, "https"),
            KeyValue::new(semantic::HTTP_RESPONSE_STATUS_CODE, 200),
            KeyValue::new(semantic::NETWORK_PROTOCOL_VERSION, "2"),
            KeyValue::new(semantic::SERVER_ADDRESS, "profile".to_owned()),
            KeyValue::new(semantic::NETWORK_PEER_ADDRESS, "172.20.0.3".to_owned()),
            KeyValue::new(semantic::NETWORK_PEER_PORT, 40000),
        ],
        status: Status::Unset,
    }
}

#[derive(Debug)]
struct Nowhere;

impl SpanExporter for Nowhere {
    async fn export(&self, _batch: Vec<SpanData>) -> OTelSdkResult {
        Ok(())
    }
}
