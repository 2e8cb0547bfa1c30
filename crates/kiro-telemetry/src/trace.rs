//! How does one request become one trace over all its hops? Each hop continues the context that came with the request,
//! passes its own on, and hands its finished span to a queue in front of an OTLP exporter.
//!
//! Spans are put together here and given to the SDK's exporter in batches. The SDK's own tracer would cost a
//! context, a sampler call with attributes and a lock a span, for nothing that Kiro uses; `batch` says what its processor would.

mod batch;
mod context;
mod export;
mod propagation;
mod sampler;
pub mod semantic;
mod settings;

use std::borrow::Cow;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, Key};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::{EnvResourceDetector, TelemetryResourceDetector};
use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};

pub use context::TraceContext;
pub use opentelemetry::KeyValue;
pub use opentelemetry::trace::{SpanKind, Status};
pub use opentelemetry_sdk::error::OTelSdkResult;
pub use opentelemetry_sdk::trace::{SpanData, SpanExporter};
pub use propagation::{Remote, TRACESTATE_BYTES_MAX, extract, inject, inject_with_state};
pub use sampler::Sampler;

use batch::{Batcher, Batching};
use export::{Counts, Watched};
use settings::Settings;

/// How long a flush may take.
const FLUSH: Duration = Duration::from_secs(5);

/// Who the spans are from: the resource attributes `service.name`, `service.instance.id` and `service.version`.
#[derive(Debug, Clone, Copy)]
pub struct ServiceInfo<'a> {
    /// The service's name.
    pub name: &'a str,
    /// What tells this process from other replicas.
    pub instance_id: &'a str,
    /// The program's version.
    pub version: &'a str,
}

/// Why tracing could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TracingError {
    /// A variable holds what we do not understand.
    #[error("{variable}={value:?} cannot be used; allowed: {allowed}")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What may stand there.
        allowed: &'static str,
    },
    /// The exporter refused its configuration.
    #[error("the OTLP exporter to {endpoint} could not be set up: {cause}")]
    Exporter {
        /// The collector's URL.
        endpoint: String,
        /// What the library says.
        cause: String,
    },
    /// A thread did not start.
    #[error("the thread of the OTLP exporter could not be started: {0}")]
    Thread(#[from] io::Error),
}

/// A finished span.
#[derive(Debug, Clone)]
pub struct Span<'a> {
    /// Its place in the trace.
    pub context: &'a TraceContext,
    /// Server, client, …
    pub kind: SpanKind,
    /// A name out of a small set; never holds a raw path.
    pub name: Cow<'static, str>,
    /// When it began.
    pub start: SystemTime,
    /// When it ended.
    pub end: SystemTime,
    /// What it says; names in [`semantic`].
    pub attributes: Vec<KeyValue>,
    /// Whether it failed.
    pub status: Status,
}

/// What became of the spans so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpanCounts {
    /// Taken into the queue.
    pub recorded: u64,
    /// Taken by the collector.
    pub exported: u64,
    /// Lost because the collector could not be reached or refused them.
    pub failed: u64,
    /// Lost because the queue was full, or after shutdown.
    pub dropped: u64,
}

/// Makes contexts and takes finished spans. Clones share everything.
#[derive(Debug, Clone, Default)]
pub struct Tracing {
    /// `None`: off.
    pipeline: Option<Arc<Pipeline>>,
}

#[derive(Debug)]
struct Pipeline {
    sampler: Sampler,
    batcher: Batcher,
    scope: InstrumentationScope,
    counts: Arc<Counts>,
    /// Spans that may wait, the batch on its way included.
    queued_spans_max: usize,
    closed: AtomicBool,
}

impl Tracing {
    /// Follows the `OTEL_*` variables. Off unless an OTLP endpoint is set (or `OTEL_TRACES_EXPORTER=otlp`); a variable that
    /// is not understood is an error, because a trace that silently goes nowhere is found out too late.
    ///
    /// The exporter's connection lives on a thread of its own: it needs a runtime as long as there are spans, and the last ones come
    /// when the workers' runtimes have ended.
    pub fn from_env(service_name: &str, instance_id: &str, version: &str) -> Result<Self, TracingError> {
        let info = ServiceInfo { name: service_name, instance_id, version };
        Self::from_variables(&info, &|name| {
            std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
        })
    }

    /// The same with variables from elsewhere. Three are still read from the environment, by the SDK:
    /// `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_EXPORTER_OTLP_HEADERS` and `OTEL_EXPORTER_OTLP_TRACES_HEADERS`.
    pub fn from_variables(
        info: &ServiceInfo<'_>,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, TracingError> {
        let Some(settings) = Settings::read(variable)? else { return Ok(Self::off()) };
        let (endpoint, timeout) = (settings.endpoint.clone(), settings.timeout);
        let exporter = move || {
            let builder = opentelemetry_otlp::SpanExporter::builder().with_tonic();
            let built = builder.with_endpoint(endpoint.as_str()).with_timeout(timeout).build();
            built.map_err(|error| TracingError::Exporter { endpoint, cause: error.to_string() })
        };
        Self::start(exporter, resource(info, settings.service_name.as_deref()), &settings)
    }

    /// Spans go to any exporter, `delay` after they were recorded at the latest.
    pub fn with_exporter(
        exporter: impl SpanExporter + 'static,
        info: &ServiceInfo<'_>,
        sampler: Sampler,
        delay: Duration,
    ) -> Result<Self, TracingError> {
        let settings = Settings { sampler, delay, ..Settings::default() };
        Self::start(|| Ok(exporter), resource(info, None), &settings)
    }

    /// Contexts are made, none is sampled, and no span is kept.
    pub fn off() -> Self {
        Self { pipeline: None }
    }

    fn start<E: SpanExporter + 'static>(
        exporter: impl FnOnce() -> Result<E, TracingError> + Send + 'static,
        resource: Resource,
        settings: &Settings,
    ) -> Result<Self, TracingError> {
        let counts = Arc::new(Counts::default());
        let make = {
            let (endpoint, counts) = (settings.endpoint.clone(), Arc::clone(&counts));
            move || {
                let mut exporter = exporter()?;
                exporter.set_resource(&resource);
                Ok::<_, TracingError>(Watched::new(exporter, endpoint, counts))
            }
        };
        let batching = Batching { spans_max: settings.batch_spans_max, delay: settings.delay };
        let batcher = Batcher::start(make, batching)??;
        let scope =
            InstrumentationScope::builder("kiro-telemetry").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Self {
            pipeline: Some(Arc::new(Pipeline {
                sampler: settings.sampler,
                batcher,
                scope,
                counts,
                queued_spans_max: settings.queued_spans_max,
                closed: AtomicBool::new(false),
            })),
        })
    }

    /// Whether spans go anywhere. Where they do not, a proxy leaves trace fields as they came: a context that nobody
    /// decided on would tell the next hop not to sample.
    pub fn is_enabled(&self) -> bool {
        self.pipeline.is_some()
    }

    /// The context of a trace that begins here.
    pub fn root(&self) -> TraceContext {
        let trace_id = context::random_trace_id();
        TraceContext {
            trace_id,
            span_id: context::random_span_id(),
            parent_span_id: None,
            sampled: self.sampler().root(trace_id),
        }
    }

    /// The context of a span under one of this process.
    pub fn child(&self, parent: &TraceContext) -> TraceContext {
        TraceContext {
            trace_id: parent.trace_id,
            span_id: context::random_span_id(),
            parent_span_id: Some(parent.span_id),
            sampled: self.sampler().child(parent.trace_id, parent.sampled),
        }
    }

    /// The context of a span under one of another process. Without `obey_sampled` the trace id is kept and the decision is
    /// ours: at the ingress, where anybody could switch the tracing of everything on, or off.
    pub fn continue_from(&self, remote: &Remote, obey_sampled: bool) -> TraceContext {
        let sampler = self.sampler();
        TraceContext {
            trace_id: remote.trace_id,
            span_id: context::random_span_id(),
            parent_span_id: Some(remote.span_id),
            sampled: match remote.sampled {
                Some(sampled) if obey_sampled => sampler.child(remote.trace_id, sampled),
                Some(_) | None => sampler.root(remote.trace_id),
            },
        }
    }

    fn sampler(&self) -> Sampler {
        self.pipeline.as_ref().map_or(Sampler::PARENT_BASED_ALWAYS_OFF, |pipeline| pipeline.sampler)
    }

    /// Takes a finished span, if it is sampled. Never waits: what does not fit into the queue is dropped and counted.
    pub fn record(&self, span: Span<'_>) {
        if let Some(pipeline) = self.pipeline.as_ref().filter(|_| span.context.sampled) {
            pipeline.record(span);
        }
    }

    /// What became of the spans so far.
    pub fn counts(&self) -> SpanCounts {
        self.pipeline.as_ref().map_or_else(SpanCounts::default, |pipeline| pipeline.counts.read())
    }

    /// Exports what was recorded before, and waits for it, at most five seconds. Says whether all of it arrived.
    pub fn flush(&self) -> bool {
        let Some(pipeline) = self.pipeline.as_ref() else { return true };
        let failed_before = pipeline.counts.read().failed;
        pipeline.batcher.flush(FLUSH) && pipeline.counts.read().failed == failed_before
    }

    /// Exports what was recorded before, at most for `timeout`, and ends; later spans are dropped. Says whether nothing was
    /// left. Blocks its thread: in async code, call it where no request is served any more.
    pub fn shutdown(&self, timeout: Duration) -> bool {
        let Some(pipeline) = self.pipeline.as_ref() else { return true };
        if pipeline.closed.swap(true, Ordering::AcqRel) {
            return pipeline.counts.queued() == 0;
        }
        let failed_before = pipeline.counts.read().failed;
        let in_time = pipeline.batcher.shutdown(timeout);
        in_time && pipeline.counts.queued() == 0 && pipeline.counts.read().failed == failed_before
    }
}

impl Pipeline {
    fn record(&self, span: Span<'_>) {
        if self.closed.load(Ordering::Acquire) || !self.counts.take_in(self.queued_spans_max) {
            self.counts.drop_one();
            return;
        }
        let context = span.context;
        let trace_id = TraceId::from_bytes(context.trace_id.to_be_bytes());
        let span_id = SpanId::from_bytes(context.span_id.to_be_bytes());
        let parent = context.parent_span_id.map(|parent| SpanId::from_bytes(parent.to_be_bytes()));
        let taken = self.batcher.push(SpanData {
            span_context: SpanContext::new(
                trace_id,
                span_id,
                TraceFlags::SAMPLED,
                false,
                TraceState::default(),
            ),
            parent_span_id: parent.unwrap_or(SpanId::INVALID),
            // A server's parent is its client; all other parents of ours are of this process.
            parent_span_is_remote: parent.is_some() && span.kind == SpanKind::Server,
            span_kind: span.kind,
            name: span.name,
            start_time: span.start,
            end_time: span.end,
            attributes: span.attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: span.status,
            instrumentation_scope: self.scope.clone(),
        });
        if !taken {
            self.counts.lose_one();
        }
    }
}

/// What we know, below what `OTEL_RESOURCE_ATTRIBUTES` says, below `OTEL_SERVICE_NAME`.
fn resource(info: &ServiceInfo<'_>, service_name: Option<&str>) -> Resource {
    let own = [
        (semantic::SERVICE_NAME, info.name),
        (semantic::SERVICE_INSTANCE_ID, info.instance_id),
        (semantic::SERVICE_VERSION, info.version),
    ];
    let builder = Resource::builder_empty()
        .with_attributes(own.map(|(key, value)| KeyValue::new(key, value.to_owned())))
        .with_detector(Box::new(TelemetryResourceDetector))
        .with_detector(Box::new(EnvResourceDetector::new()));
    match service_name {
        Some(name) => builder
            .with_attribute(KeyValue::new(Key::from_static_str(semantic::SERVICE_NAME), name.to_owned()))
            .build(),
        None => builder.build(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Keeps what it is given.
    #[derive(Debug, Clone, Default)]
    pub(crate) struct Kept {
        spans: Arc<Mutex<Vec<SpanData>>>,
        resource: Arc<Mutex<Vec<(String, String)>>>,
    }

    impl SpanExporter for Kept {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.spans.lock().unwrap().extend(batch);
            Ok(())
        }

        fn set_resource(&mut self, resource: &Resource) {
            let attributes = resource.iter().map(|(key, value)| (key.to_string(), value.to_string()));
            *self.resource.lock().unwrap() = attributes.collect();
        }
    }

    pub(crate) fn keeping(sampler: Sampler) -> (Tracing, impl Fn() -> Vec<SpanData>) {
        let kept = Kept::default();
        let info = ServiceInfo { name: "auth", instance_id: "a1", version: "9" };
        let tracing = Tracing::with_exporter(kept.clone(), &info, sampler, Duration::from_secs(60)).unwrap();
        let flushing = tracing.clone();
        (tracing, move || {
            assert!(flushing.flush());
            std::mem::take(&mut kept.spans.lock().unwrap())
        })
    }

    fn remote(sampled: Option<bool>) -> Remote {
        Remote { trace_id: 77, span_id: 88, sampled, state: None }
    }

    fn span(context: &TraceContext, kind: SpanKind) -> Span<'_> {
        let now = SystemTime::now();
        Span {
            context,
            kind,
            name: "x".into(),
            start: now,
            end: now,
            attributes: Vec::new(),
            status: Status::Unset,
        }
    }

    #[test]
    fn contexts_continue_and_the_ingress_decides_for_itself() {
        let (on, _) = keeping(Sampler::PARENT_BASED_ALWAYS_ON);
        let (off, _) = keeping(Sampler::PARENT_BASED_ALWAYS_OFF);
        let table = [
            // Their decision, obeyed, by the sampler that keeps, by the one that does not.
            (Some(true), true, true, true),
            (Some(false), true, false, false),
            (None, true, true, false),
            (Some(true), false, true, false),
            (Some(false), false, true, false),
            (None, false, true, false),
        ];
        for (theirs, obey, by_on, by_off) in table {
            let case = format!("{theirs:?}, obey {obey}");
            for (tracing, sampled) in [(&on, by_on), (&off, by_off)] {
                let context = tracing.continue_from(&remote(theirs), obey);
                assert_eq!((context.trace_id, context.parent_span_id), (77, Some(88)), "{case}");
                assert!(context.span_id != 0 && context.span_id != 88);
                assert_eq!(context.sampled, sampled, "{case}");
            }
        }
        let root = on.root();
        let child = on.child(&root);
        assert_eq!(
            (child.trace_id, child.parent_span_id, child.sampled),
            (root.trace_id, Some(root.span_id), true)
        );
        assert_eq!(root.parent_span_id, None);
        assert!(!off.root().sampled);
    }

    #[test]
    fn off_makes_contexts_and_keeps_nothing() {
        let tracing = Tracing::off();
        let root = tracing.root();
        assert!(!tracing.is_enabled() && !root.sampled && root.trace_id != 0);
        // Somebody else's decision is passed on, though nothing is recorded here.
        assert!(tracing.continue_from(&remote(Some(true)), true).sampled);
        tracing.record(span(&TraceContext { sampled: true, ..root }, SpanKind::Server));
        assert_eq!(tracing.counts(), SpanCounts::default());
        assert!(tracing.flush() && tracing.shutdown(Duration::ZERO));
    }

    #[test]
    fn spans_say_whether_their_parent_is_remote() {
        let (tracing, spans) = keeping(Sampler::PARENT_BASED_ALWAYS_ON);
        let served = tracing.continue_from(&remote(Some(true)), true);
        let sent = tracing.child(&served);
        let root = tracing.root();
        for (context, kind) in
            [(&served, SpanKind::Server), (&sent, SpanKind::Client), (&root, SpanKind::Server)]
        {
            tracing.record(span(context, kind));
        }
        let remote: Vec<bool> = spans().iter().map(|span| span.parent_span_is_remote).collect();
        assert_eq!(remote, [true, false, false]);
    }

    #[test]
    fn the_resource_says_who() {
        let kept = Kept::default();
        let info = ServiceInfo { name: "auth", instance_id: "a1", version: "9" };
        let sampler = Sampler::PARENT_BASED_ALWAYS_ON;
        let _tracing = Tracing::with_exporter(kept.clone(), &info, sampler, Duration::from_secs(60)).unwrap();
        let attributes = kept.resource.lock().unwrap();
        for (key, value) in
            [("service.name", "auth"), ("service.instance.id", "a1"), ("service.version", "9")]
        {
            assert!(attributes.contains(&(key.to_owned(), value.to_owned())), "{attributes:?}");
        }
    }

    #[test]
    fn an_unusable_endpoint_is_an_error_and_none_is_off() {
        let info = ServiceInfo { name: "auth", instance_id: "a1", version: "9" };
        let tracing = Tracing::from_variables(&info, &|_| None).unwrap();
        assert!(!tracing.is_enabled());
        let https =
            |name: &str| (name == "OTEL_EXPORTER_OTLP_ENDPOINT").then(|| "https://collector:4317".to_owned());
        let error = Tracing::from_variables(&info, &https).unwrap_err().to_string();
        assert!(error.contains("OTEL_EXPORTER_OTLP_ENDPOINT"), "{error}");
    }
}
