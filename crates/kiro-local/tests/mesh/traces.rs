//! Is a call one trace, from hop to hop?

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::HeaderMap;
use kiro_telemetry::trace::{
    KeyValue, OTelSdkResult, Sampler, ServiceInfo, SpanData, SpanExporter, SpanKind, Status, Tracing,
};

use crate::client::Client;
use crate::fake::{Fake, OBEDIENT, OnRequest, Script, place};
use crate::hostile::{Leaf, MESH, server};
use crate::support::{Spec, World, eventually};

/// Where the sidecars' spans go.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kept(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Kept {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

fn tracing(kept: &Kept, sampler: Sampler) -> Tracing {
    let info = ServiceInfo { name: "mesh", instance_id: "1", version: "1" };
    Tracing::with_exporter(kept.clone(), &info, sampler, Duration::from_millis(5)).unwrap()
}

/// A mesh whose spans are kept.
pub(crate) async fn traced(spec: Spec, sampler: Sampler) -> (World, Kept) {
    let kept = Kept::default();
    let world = World::start_with(spec, tracing(&kept, sampler)).await;
    (world, kept)
}

impl Kept {
    /// Waits for this many spans of a trace and takes them, callers first.
    pub(crate) async fn trace(&self, id: &str, count: usize) -> Vec<SpanData> {
        let of_it = |span: &SpanData| span.span_context.trace_id().to_string() == id;
        eventually("spans", || async {
            self.0.lock().unwrap().iter().filter(|span| of_it(span)).count() >= count
        })
        .await;
        let mut spans: Vec<_> = self.0.lock().unwrap().iter().filter(|span| of_it(span)).cloned().collect();
        spans.sort_by_key(|span| span.start_time);
        assert_eq!(spans.len(), count, "{spans:#?}");
        spans
    }
}

fn span_id(span: &SpanData) -> String {
    span.span_context.span_id().to_string()
}

fn parent(span: &SpanData) -> String {
    span.parent_span_id.to_string()
}

/// An attribute as text.
pub(crate) fn attribute(span: &SpanData, name: &str) -> Option<String> {
    span.attributes.iter().find(|KeyValue { key, .. }| key.as_str() == name).map(|kv| kv.value.to_string())
}

#[track_caller]
fn check_attributes(span: &SpanData, expected: &[(&str, Option<&str>)]) {
    for (name, value) in expected {
        assert_eq!(attribute(span, name).as_deref(), *value, "{name} of {span:#?}");
    }
}

/// The parts of a traceparent: trace, span, flags.
fn traceparent(headers: &HeaderMap) -> (String, String, String) {
    let text = headers["traceparent"].to_str().unwrap();
    let parts: Vec<&str> = text.split('-').collect();
    assert_eq!((parts.len(), parts[0]), (4, "00"), "{text}");
    (parts[1].to_owned(), parts[2].to_owned(), parts[3].to_owned())
}

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

fn get(path: &str, fields: &str) -> String {
    format!("GET http://callee{path} HTTP/1.1\r\nHost: callee\r\n{fields}\r\n")
}

async fn call(world: &World, request: impl AsRef<[u8]>) -> (u16, Option<String>) {
    let answer = Client::app_of(world, "caller").await.exchange(request).await;
    (answer.status, answer.header("x-kiro-reject").map(str::to_owned))
}

#[tokio::test]
async fn a_call_is_one_trace_through_both_sidecars_to_the_application() {
    let (mut world, kept) = traced(Spec::pair(), Sampler::PARENT_BASED_ALWAYS_ON).await;
    let recorder = world.recorder("callee").await;
    let fields = format!("traceparent: 00-{TRACE}-{SPAN}-01\r\ntracestate: vendor=1\r\n");
    assert_eq!(call(&world, get("/a/b?token=hidden", &fields)).await, (200, None));

    let spans = kept.trace(TRACE, 2).await;
    let [out, inn] = spans.as_slice() else { panic!("{spans:#?}") };
    assert_eq!((&out.span_kind, &inn.span_kind), (&SpanKind::Client, &SpanKind::Server));
    assert_eq!(parent(out), SPAN, "the application's span");
    assert_eq!(parent(inn), span_id(out));
    let seen = recorder.only().head.headers;
    assert_eq!(traceparent(&seen), (TRACE.to_owned(), span_id(inn), "01".to_owned()));
    assert_eq!(seen["tracestate"], "vendor=1");

    assert_eq!((out.name.as_ref(), inn.name.as_ref()), ("GET callee", "GET callee"));
    assert_eq!((&out.status, &inn.status), (&Status::Unset, &Status::Unset));
    let port = world.ports["callee"].inbound.to_string();
    check_attributes(
        out,
        &[
            ("http.request.method", Some("GET")),
            ("http.response.status_code", Some("200")),
            ("url.full", Some("http://callee/a/b")),
            ("server.address", Some("callee")),
            ("server.port", Some(&port)),
            ("network.peer.address", Some("127.0.0.1")),
            ("network.protocol.version", Some("1.1")),
            ("kiro.peer.identity", Some("spiffe://test.mesh/callee")),
            ("kiro.reject", None),
            ("error.type", None),
        ],
    );
    check_attributes(
        inn,
        &[
            ("http.request.method", Some("GET")),
            ("http.response.status_code", Some("200")),
            ("url.path", Some("/a/b")),
            ("url.scheme", Some("https")),
            ("network.protocol.version", Some("2")),
            ("kiro.peer.identity", Some("spiffe://test.mesh/caller")),
            ("kiro.reject", None),
        ],
    );
    assert!(!format!("{spans:?}").contains("hidden"), "a query may hold secrets");

    for (direction, span) in [("outbound", out), ("inbound", inn)] {
        let of_it = |line: &serde_json::Value| line["direction"] == direction;
        let line = world.logs.wait_for(direction, of_it).await;
        assert_eq!((&line["trace_id"], &line["span_id"]), (&TRACE.into(), &span_id(span).into()), "{line}");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_call_without_a_trace_begins_one() {
    let (mut world, kept) = traced(Spec::pair(), Sampler::PARENT_BASED_ALWAYS_ON).await;
    let recorder = world.recorder("callee").await;
    for fields in ["", "traceparent: 00-00000000000000000000000000000000-0000000000000000-01\r\n"] {
        assert_eq!(call(&world, get("/a", fields)).await, (200, None));
        let (trace, span, flags) = traceparent(&recorder.seen().last().unwrap().head.headers);
        let spans = kept.trace(&trace, 2).await;
        assert_eq!(parent(&spans[0]), "0000000000000000");
        assert_eq!(parent(&spans[1]), span_id(&spans[0]));
        assert_eq!((span_id(&spans[1]), flags.as_str()), (span, "01"));
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn b3_is_continued_as_w3c() {
    let (mut world, kept) = traced(Spec::pair(), Sampler::PARENT_BASED_ALWAYS_ON).await;
    let recorder = world.recorder("callee").await;
    let forms = [
        ("80f198ee56343ba864fe8b2a57d3eff7", "b3: {trace}-e457b5a2e4d86bd1-1\r\n"),
        (
            "80f198ee56343ba864fe8b2a57d3eff8",
            "X-B3-TraceId: {trace}\r\nX-B3-SpanId: e457b5a2e4d86bd1\r\nX-B3-Sampled: 1\r\n",
        ),
    ];
    for (trace, fields) in forms {
        assert_eq!(call(&world, get("/a", &fields.replace("{trace}", trace))).await, (200, None));
        let spans = kept.trace(trace, 2).await;
        assert_eq!(parent(&spans[0]), "e457b5a2e4d86bd1");
        assert_eq!(parent(&spans[1]), span_id(&spans[0]));
        let seen = recorder.seen().pop().unwrap().head.headers;
        assert_eq!(traceparent(&seen), (trace.to_owned(), span_id(&spans[1]), "01".to_owned()));
        let b3 = |name: &&str| name.contains("b3");
        assert_eq!(seen.keys().map(http::HeaderName::as_str).find(b3), None, "one context, not two");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_an_application_does_not_want_traced_is_not() {
    let (mut world, kept) = traced(Spec::pair(), Sampler::PARENT_BASED_ALWAYS_ON).await;
    let recorder = world.recorder("callee").await;
    let unsampled = format!("traceparent: 00-{TRACE}-{SPAN}-00\r\n");
    assert_eq!(call(&world, get("/a", &unsampled)).await, (200, None));
    let (trace, _, flags) = traceparent(&recorder.only().head.headers);
    assert_eq!((trace.as_str(), flags.as_str()), (TRACE, "00"), "the decision goes on");
    // A later call's spans have come, so the earlier's would have.
    let other = TRACE.replace('4', "5");
    let sampled = format!("traceparent: 00-{other}-{SPAN}-01\r\n");
    assert_eq!(call(&world, get("/a", &sampled)).await, (200, None));
    kept.trace(&other, 2).await;
    kept.trace(TRACE, 0).await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn where_nothing_is_exported_an_application_s_context_passes_as_it_came() {
    let mut world = World::start(Spec::pair()).await;
    let recorder = world.recorder("callee").await;
    let fields = format!("traceparent: 00-{TRACE}-{SPAN}-01\r\nb3: 0\r\n");
    assert_eq!(call(&world, get("/a", &fields)).await, (200, None));
    let seen = recorder.only().head.headers;
    assert_eq!(traceparent(&seen), (TRACE.to_owned(), SPAN.to_owned(), "01".to_owned()));
    assert_eq!(seen["b3"], "0");
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_ingress_continues_a_trace_and_decides_by_itself_whether_it_is_kept() {
    let spec = || Spec {
        services: vec![("callee", "app: { port: {port} }, ingress: { port: {ingress} }")],
        allow: "  - { from: ingress, to: callee }",
        ..Spec::pair()
    };
    // What the client says, against what the sampler says for a trace that begins here.
    for (theirs, sampler, ours) in
        [("00", Sampler::PARENT_BASED_ALWAYS_ON, "01"), ("01", Sampler::PARENT_BASED_ALWAYS_OFF, "00")]
    {
        let (mut world, kept) = traced(spec(), sampler).await;
        let recorder = world.recorder("callee").await;
        let mut client = Client::open(world.addresses("callee").ingress.unwrap()).await;
        let request =
            format!("GET /a HTTP/1.1\r\nHost: shop\r\ntraceparent: 00-{TRACE}-{SPAN}-{theirs}\r\n\r\n");
        assert_eq!(client.exchange(request).await.status, 200);
        let (trace, span, flags) = traceparent(&recorder.only().head.headers);
        assert_eq!((trace.as_str(), flags.as_str()), (TRACE, ours), "they said {theirs}");
        if ours == "01" {
            let spans = kept.trace(TRACE, 1).await;
            assert_eq!((parent(&spans[0]).as_str(), span_id(&spans[0])), (SPAN, span));
            assert_eq!(spans[0].span_kind, SpanKind::Server);
            check_attributes(
                &spans[0],
                &[
                    ("url.scheme", Some("http")),
                    ("kiro.peer.identity", None),
                    ("kiro.direction", Some("ingress")),
                ],
            );
        }
        assert!(world.stop().await);
        kept.trace(TRACE, usize::from(ours == "01")).await;
    }
}

#[tokio::test]
async fn a_refusal_stands_on_its_span() {
    let allow = "  - { from: caller, to: callee, paths: [/open] }";
    let (mut world, kept) = traced(Spec { allow, ..Spec::pair() }, Sampler::PARENT_BASED_ALWAYS_ON).await;
    world
        .app("callee", |_| async { http::Response::builder().status(404).body(Default::default()).unwrap() })
        .await;
    let fields = |trace: &str| format!("traceparent: 00-{trace}-{SPAN}-01\r\n");

    let denied = (403, Some("policy_path".to_owned()));
    assert_eq!(call(&world, get("/closed", &fields(TRACE))).await, denied);
    let spans = kept.trace(TRACE, 1).await;
    assert!(matches!(spans[0].status, Status::Error { .. }), "{spans:#?}");
    check_attributes(
        &spans[0],
        &[
            ("kiro.reject", Some("policy_path")),
            ("error.type", Some("policy_path")),
            ("http.response.status_code", Some("403")),
            ("kiro.peer.identity", None),
        ],
    );

    // An application's own answer is no refusal; 404 is an error of the caller's alone.
    let other = TRACE.replace('4', "5");
    assert_eq!(call(&world, get("/open", &fields(&other))).await, (404, None));
    let spans = kept.trace(&other, 2).await;
    assert!(matches!(spans[0].status, Status::Error { .. }));
    assert_eq!(spans[1].status, Status::Unset);
    check_attributes(&spans[0], &[("kiro.reject", None), ("error.type", Some("404"))]);
    check_attributes(&spans[1], &[("kiro.reject", None), ("error.type", None)]);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_peer_s_refusal_stands_on_the_spans_of_both_ends() {
    let (world, kept) = traced(Spec::pair(), Sampler::PARENT_BASED_ALWAYS_ON).await;
    let fields = format!("traceparent: 00-{TRACE}-{SPAN}-01\r\n");
    // Nobody has put an application there.
    assert_eq!(call(&world, get("/a", &fields)).await, (502, Some("app_connect".to_owned())));
    // Three attempts, of which the caller's first two say that there was another.
    let spans = kept.trace(TRACE, 6).await;
    assert!(spans.iter().all(|span| matches!(span.status, Status::Error { .. })), "{spans:#?}");
    let is_retried = |span: &&SpanData| attribute(span, "error.type").as_deref() == Some("retried");
    assert_eq!(spans.iter().filter(is_retried).count(), 2, "{spans:#?}");
    for span in spans.iter().filter(|span| !is_retried(span)) {
        check_attributes(span, &[("kiro.reject", Some("app_connect")), ("error.type", Some("app_connect"))]);
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn each_attempt_is_a_span() {
    let script =
        Script { request: |place| if place == 0 { OnRequest::Refuse } else { OnRequest::Serve }, ..OBEDIENT };
    let (listener, _, entry) = place();
    let services = vec![("caller", "app: { port: {port} }"), ("callee", entry)];
    let (world, kept) = traced(Spec { services, ..Spec::pair() }, Sampler::PARENT_BASED_ALWAYS_ON).await;
    let config = server(&world, &Leaf::of(&world, "callee"), MESH);
    let fake = Fake::start(listener, Some(config), script);
    let fields = format!("traceparent: 00-{TRACE}-{SPAN}-01\r\n");
    assert_eq!(call(&world, get("/a", &fields)).await, (200, None));

    let spans = kept.trace(TRACE, 2).await;
    assert_eq!([parent(&spans[0]), parent(&spans[1])], [SPAN, SPAN], "siblings");
    assert_ne!(span_id(&spans[0]), span_id(&spans[1]));
    check_attributes(
        &spans[0],
        &[
            ("http.request.resend_count", None),
            ("http.response.status_code", None),
            ("error.type", Some("retried")),
        ],
    );
    check_attributes(&spans[1], &[("http.request.resend_count", Some("1")), ("kiro.reject", None)]);
    let arrived = fake.take();
    let (_, span, _) = traceparent(&arrived[0].head.headers);
    assert_eq!(span, span_id(&spans[1]), "the peer's parent is the attempt that reached it");
    assert!(world.stop().await);
}
