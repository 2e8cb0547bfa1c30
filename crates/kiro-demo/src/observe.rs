//! What is seen of a request? One SERVER span, one log line, and a `traceresponse` field for the caller, always together.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderName, HeaderValue, Method, StatusCode};
use kiro_telemetry::app::{ServerSpan, server_span};
use kiro_telemetry::trace::{TraceContext, Tracing};
use tracing::info;

use crate::Service;

/// W3C's field for the trace that a response belongs to. The page links to it.
const TRACE_RESPONSE: HeaderName = HeaderName::from_static("traceresponse");

/// The span of the request that a handler serves; the calls it makes stand under it.
#[derive(Clone)]
pub(crate) struct Trace(Arc<ServerSpan>);

impl Trace {
    pub(crate) fn span(&self) -> &ServerSpan {
        &self.0
    }
}

/// What all requests of a service have in common.
#[derive(Clone)]
pub(crate) struct Observer {
    pub(crate) service: Service,
    pub(crate) tracing: Tracing,
    /// `https` or `http`, as the listener has it.
    pub(crate) scheme: &'static str,
}

/// The outermost layer of a router.
pub(crate) async fn observe(State(observer): State<Observer>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let route = parts.extensions.get::<MatchedPath>().cloned();
    let route = route.as_ref().map(MatchedPath::as_str);
    let span = Arc::new(server_span(&observer.tracing, &parts, observer.scheme, route));
    let context = *span.context();
    let line = Line {
        service: observer.service,
        method: parts.method.clone(),
        path: parts.uri.path().to_owned(),
        context,
        begin: Instant::now(),
        status: None,
    };

    let mut request = Request::from_parts(parts, body);
    request.extensions_mut().insert(Trace(Arc::clone(&span)));
    let mut response = next.run(request).await;

    response.headers_mut().insert(TRACE_RESPONSE, trace_response(&context));
    line.finish(response.status());
    // The handler and its request are gone, and with them every other holder of the span.
    if let Some(span) = Arc::into_inner(span) {
        span.finish(response.status());
    }
    response
}

fn trace_response(context: &TraceContext) -> HeaderValue {
    let TraceContext { trace_id, span_id, sampled, .. } = context;
    let text = format!("00-{trace_id:032x}-{span_id:016x}-{:02x}", u8::from(*sampled));
    #[expect(clippy::expect_used, reason = "hexadecimal digits and dashes")]
    HeaderValue::try_from(text).expect("ASCII")
}

/// The one line a request, written on drop: a caller that went away leaves a line too.
struct Line {
    service: Service,
    method: Method,
    path: String,
    context: TraceContext,
    begin: Instant,
    /// None until it is answered.
    status: Option<StatusCode>,
}

impl Line {
    fn finish(mut self, status: StatusCode) {
        self.status = Some(status);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        info!(
            target: "kiro::request",
            service = self.service.name(),
            method = %self.method,
            path = self.path,
            status = self.status.map(|status| status.as_u16()),
            cancelled = self.status.is_none(),
            duration_us = u64::try_from(self.begin.elapsed().as_micros()).unwrap_or(u64::MAX),
            trace_id = %format_args!("{:032x}", self.context.trace_id),
            span_id = %format_args!("{:016x}", self.context.span_id),
            "request"
        );
    }
}
