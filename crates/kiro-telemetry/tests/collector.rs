//! Spans on their way to a real OTLP collector over gRPC, one that is down, and one that never answers.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests may panic as the tests themselves may"
)]

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use kiro_telemetry::log::{EventLayer, LogSink};
use kiro_telemetry::trace::{KeyValue, SpanCounts, SpanKind, Status, semantic};
use kiro_telemetry::{Format, ServiceInfo, Span, TraceContext, Tracing};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span as ProtoSpan;
use tokio::net::TcpSocket;
use tokio::sync::oneshot;
use tonic::transport::server::{Server, TcpIncoming};
use tonic::{Request, Response, Status as RpcStatus};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;

const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Default)]
struct Received(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Received {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, RpcStatus> {
        self.0.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Received {
    fn spans(&self) -> Vec<ProtoSpan> {
        let requests = self.0.lock().unwrap();
        let resources = requests.iter().flat_map(|request| &request.resource_spans);
        resources.flat_map(|resource| &resource.scope_spans).flat_map(|scope| scope.spans.clone()).collect()
    }

    fn resource(&self) -> HashMap<String, String> {
        let requests = self.0.lock().unwrap();
        let resource = requests[0].resource_spans[0].resource.clone().unwrap();
        resource
            .attributes
            .into_iter()
            .map(|entry| (entry.key, text(entry.value.and_then(|v| v.value))))
            .collect()
    }
}

fn text(value: Option<Value>) -> String {
    match value {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

/// A collector in a thread of its own, with a runtime of its own.
struct Collector {
    received: Received,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    fn start() -> Self {
        Self::start_on(reserved())
    }

    fn start_on(socket: TcpSocket) -> Self {
        let received = Received::default();
        let address = socket.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let service = TraceServiceServer::new(received.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let incoming = TcpIncoming::from(socket.listen(64).unwrap());
                let serving = Server::builder().add_service(service).serve_with_incoming(incoming);
                tokio::select! { result = serving => result.unwrap(), _ = stopped => {} }
            });
        });
        Self { received, address, stop: Some(stop), thread: Some(thread) }
    }
}

/// A port that is ours; nobody listens on it yet, so connections are refused.
fn reserved() -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    socket
}

impl Drop for Collector {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

fn tracing_to(address: SocketAddr, more: &[(&str, &str)]) -> Tracing {
    let endpoint = format!("http://{address}");
    let info = ServiceInfo { name: "profile", instance_id: "profile-1", version: "1.2.3" };
    Tracing::from_variables(&info, &|name| match name {
        "OTEL_EXPORTER_OTLP_ENDPOINT" => Some(endpoint.clone()),
        name => more.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()),
    })
    .unwrap()
}

fn span(context: &TraceContext, kind: SpanKind) -> Span<'_> {
    let end = SystemTime::now();
    Span {
        context,
        kind,
        name: "GET /profiles/{user}".into(),
        start: end - Duration::from_millis(5),
        end,
        attributes: vec![
            KeyValue::new(semantic::HTTP_REQUEST_METHOD, "GET"),
            KeyValue::new(semantic::HTTP_RESPONSE_STATUS_CODE, 502),
        ],
        status: Status::error("upstream_connect"),
    }
}

#[test]
fn spans_arrive_and_shutdown_flushes() {
    let collector = Collector::start();
    let tracing = tracing_to(collector.address, &[]);
    let root = tracing.root();
    let child = tracing.child(&root);
    tracing.record(span(&root, SpanKind::Server));
    tracing.record(span(&child, SpanKind::Client));
    // Long before the five seconds that a batch would wait.
    let start = Instant::now();
    assert!(tracing.shutdown(PATIENCE));
    assert!(start.elapsed() < Duration::from_secs(4));

    let spans = collector.received.spans();
    assert_eq!(spans.len(), 2);
    for (span, context) in spans.iter().zip([root, child]) {
        assert_eq!(span.trace_id, root.trace_id.to_be_bytes());
        assert_eq!(span.span_id, context.span_id.to_be_bytes());
        assert_eq!(span.name, "GET /profiles/{user}");
        assert_eq!(span.end_time_unix_nano - span.start_time_unix_nano, 5_000_000);
        assert_eq!(span.status.as_ref().unwrap().message, "upstream_connect");
        let attributes: Vec<(String, String)> = span
            .attributes
            .iter()
            .map(|entry| (entry.key.clone(), text(entry.value.clone().and_then(|value| value.value))))
            .collect();
        let expected = [("http.request.method", "GET"), ("http.response.status_code", "502")];
        assert_eq!(attributes, expected.map(|(key, value)| (key.to_owned(), value.to_owned())));
    }
    assert_eq!(spans[0].parent_span_id, b"");
    assert_eq!(spans[1].parent_span_id, root.span_id.to_be_bytes());
    // SERVER and CLIENT on the wire.
    assert_eq!((spans[0].kind, spans[1].kind), (2, 3));
    let resource = collector.received.resource();
    assert_eq!(resource["service.name"], "profile");
    assert_eq!(resource["service.instance.id"], "profile-1");
    assert_eq!(resource["service.version"], "1.2.3");
    assert_eq!(tracing.counts(), SpanCounts { recorded: 2, exported: 2, ..SpanCounts::default() });

    // After the end, spans are dropped and counted; a second shutdown is harmless.
    tracing.record(span(&child, SpanKind::Client));
    assert_eq!(tracing.counts().dropped, 1);
    assert!(tracing.shutdown(PATIENCE));
    assert_eq!(collector.received.spans().len(), 2);
}

#[test]
fn batches_go_by_themselves_whatever_runtime_made_them() {
    let collector = Collector::start();
    let variables = [("OTEL_BSP_SCHEDULE_DELAY", "20"), ("OTEL_SERVICE_NAME", "renamed")];
    // The runtime that was there at the beginning is gone when the spans come.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let tracing = runtime.block_on(async { tracing_to(collector.address, &variables) });
    drop(runtime);
    let workers: Vec<_> = (0..4)
        .map(|_| {
            let tracing = tracing.clone();
            std::thread::spawn(move || {
                for _ in 0..100 {
                    tracing.record(span(&tracing.root(), SpanKind::Server));
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    let start = Instant::now();
    while collector.received.spans().len() < 400 {
        assert!(start.elapsed() < PATIENCE, "{:?}", tracing.counts());
        std::thread::yield_now();
    }
    assert_eq!(collector.received.resource()["service.name"], "renamed");
}

#[test]
fn what_is_not_sampled_is_not_sent() {
    let collector = Collector::start();
    let tracing = tracing_to(collector.address, &[("OTEL_TRACES_SAMPLER", "parentbased_always_off")]);
    let unsampled = tracing.root();
    assert!(!unsampled.sampled);
    tracing.record(span(&unsampled, SpanKind::Server));
    let sampled = TraceContext { sampled: true, ..unsampled };
    tracing.record(span(&sampled, SpanKind::Server));
    assert!(tracing.flush());
    assert_eq!(collector.received.spans().len(), 1);
    assert_eq!(tracing.counts(), SpanCounts { recorded: 1, exported: 1, ..SpanCounts::default() });
}

#[test]
fn a_collector_that_is_down_costs_no_request_and_one_line() {
    let (reader, writer) = std::io::pipe().unwrap();
    let sink = LogSink::new(writer, Format::Json, None).unwrap();
    let events = EventLayer::new(sink.clone(), Format::Json, None);
    // The exporter's thread logs by the global subscriber; no other test of this program looks at the log.
    let own = Targets::new().with_target("kiro", tracing::Level::INFO);
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(own).with(events)).unwrap();

    let socket = reserved();
    let address = socket.local_addr().unwrap();
    let variables = [
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "300"),
    ];
    let tracing = tracing_to(address, &variables);
    let start = Instant::now();
    while tracing.counts().failed < 200 {
        tracing.record(span(&tracing.root(), SpanKind::Server));
        assert!(start.elapsed() < PATIENCE, "{:?}", tracing.counts());
    }
    let counts = tracing.counts();
    assert!(counts.dropped > 0, "the queue is not bounded: {counts:?}");
    assert_eq!(counts.exported, 0);

    // The collector comes up where it was expected, and spans arrive.
    let collector = Collector::start_on(socket);
    let start = Instant::now();
    while tracing.counts().exported == 0 {
        tracing.record(span(&tracing.root(), SpanKind::Server));
        assert!(start.elapsed() < PATIENCE, "{:?}", tracing.counts());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!collector.received.spans().is_empty());
    assert!(tracing.shutdown(PATIENCE));

    assert!(sink.flush(PATIENCE));
    let lines = read_available(reader, sink);
    let of_traces: Vec<&serde_json::Value> =
        lines.iter().filter(|line| line["target"] == "kiro::traces" && endpoint_is(line, address)).collect();
    let messages: Vec<&str> = of_traces.iter().map(|line| line["message"].as_str().unwrap()).collect();
    assert_eq!(messages, ["spans could not be exported", "spans are exported again"]);
    assert!(of_traces[0]["error"].as_str().unwrap().contains("refused"), "{}", of_traces[0]);
}

fn endpoint_is(line: &serde_json::Value, address: SocketAddr) -> bool {
    line["endpoint"] == format!("http://{address}")
}

/// What is in the pipe. The global subscriber keeps the other end open for ever, so a last line is sent to stop at.
fn read_available(reader: std::io::PipeReader, sink: LogSink) -> Vec<serde_json::Value> {
    use std::io::{BufRead, BufReader};
    sink.push(b"{\"last\":true}\n".to_vec());
    BufReader::new(reader)
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap())
        .take_while(|line| line["last"] != true)
        .collect()
}

#[test]
fn a_collector_that_never_answers_holds_up_neither_a_request_nor_the_end() {
    // Accepts by its backlog, and says nothing; an export waits ten seconds for it.
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let variables = [("OTEL_BSP_MAX_QUEUE_SIZE", "100"), ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")];
    let tracing = tracing_to(listener.local_addr().unwrap(), &variables);
    let start = Instant::now();
    for _ in 0..2_000 {
        tracing.record(span(&tracing.root(), SpanKind::Server));
    }
    assert!(!tracing.shutdown(Duration::from_millis(300)));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(tracing.counts(), SpanCounts { recorded: 100, dropped: 1_900, ..SpanCounts::default() });
}
