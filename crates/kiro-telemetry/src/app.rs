//! How does an application take part in a trace? With a SERVER span for each request it gets, and a CLIENT span for each
//! it makes.
//!
//! Two functions and two guards, without a framework: a middleware calls [`server_span`] before the handler and
//! [`ServerSpan::finish`] after it; whoever sends a request calls [`client_span`] before and [`ClientSpan::finish`] or
//! [`ClientSpan::fail`] after. A guard that is dropped unfinished records that the request was cancelled.

use std::borrow::Cow;
use std::time::SystemTime;

use http::header::HeaderValue;
use http::request::Parts;
use http::uri::{Scheme, Uri};
use http::{HeaderMap, Method, StatusCode, header};

use crate::trace::semantic::{self, known_method, protocol_version};
use crate::trace::{KeyValue, Span, SpanKind, Status, TraceContext, Tracing, extract, inject_with_state};

/// `error.type` of a span whose request ended before its answer.
pub const CANCELLED: &str = "cancelled";

/// The span of a request that is being served.
#[derive(Debug)]
pub struct ServerSpan {
    open: OpenSpan,
    state: Option<HeaderValue>,
}

/// The span of a request that was sent.
#[derive(Debug)]
pub struct ClientSpan {
    open: OpenSpan,
}

/// Begins the span of a request that came in, under the context that came with it. `route` is the pattern that matched
/// (`/profiles/{user}`); the span is named after it, never after the path, which could be anything. `scheme` is that of
/// the listener, since an HTTP/1 request does not tell.
pub fn server_span(
    tracing: &Tracing,
    request: &Parts,
    scheme: &'static str,
    route: Option<&str>,
) -> ServerSpan {
    let remote = extract(&request.headers);
    let context = match &remote {
        Some(remote) => tracing.continue_from(remote, true),
        None => tracing.root(),
    };
    let attributes = if tracing.is_enabled() && context.sampled {
        server_attributes(request, scheme, route)
    } else {
        Vec::new()
    };
    let name = span_name(&request.method, route);
    ServerSpan {
        open: OpenSpan::new(tracing, context, SpanKind::Server, name, attributes),
        state: remote.and_then(|remote| remote.state),
    }
}

/// Begins the span of a request that is about to be sent, and writes its context into `headers`. `uri` is absolute;
/// `resends` is how often this request was sent before (each attempt is a span).
pub fn client_span(
    parent: &ServerSpan,
    method: &Method,
    uri: &Uri,
    headers: &mut HeaderMap,
    resends: u32,
) -> ClientSpan {
    let tracing = &parent.open.tracing;
    let context = tracing.child(parent.context());
    inject_with_state(&context, parent.state.as_ref(), headers);
    begin_client_span(tracing, context, method, uri, resends)
}

/// The same for a request that nobody asked for: its trace begins here.
pub fn root_client_span(
    tracing: &Tracing,
    method: &Method,
    uri: &Uri,
    headers: &mut HeaderMap,
) -> ClientSpan {
    let context = tracing.root();
    inject_with_state(&context, None, headers);
    begin_client_span(tracing, context, method, uri, 0)
}

fn begin_client_span(
    tracing: &Tracing,
    context: TraceContext,
    method: &Method,
    uri: &Uri,
    resends: u32,
) -> ClientSpan {
    let attributes = if tracing.is_enabled() && context.sampled {
        client_attributes(method, uri, resends)
    } else {
        Vec::new()
    };
    ClientSpan {
        open: OpenSpan::new(tracing, context, SpanKind::Client, span_name(method, None), attributes),
    }
}

impl ServerSpan {
    /// Its place in the trace.
    pub fn context(&self) -> &TraceContext {
        &self.open.context
    }

    /// Adds what the conventions know nothing of.
    pub fn add(&mut self, attribute: KeyValue) {
        self.open.attributes.push(attribute);
    }

    /// Ends with the answer's status. Only what is the server's fault (5xx) is an error.
    pub fn finish(mut self, status: StatusCode) {
        self.open.finish(status, status.is_server_error());
    }
}

impl ClientSpan {
    /// Its place in the trace.
    pub fn context(&self) -> &TraceContext {
        &self.open.context
    }

    /// Adds what the conventions know nothing of.
    pub fn add(&mut self, attribute: KeyValue) {
        self.open.attributes.push(attribute);
    }

    /// Ends with the answer's status. To a client 4xx is an error too.
    pub fn finish(mut self, status: StatusCode) {
        self.open.finish(status, status.is_client_error() || status.is_server_error());
    }

    /// Ends without an answer. `error_type` is a word out of a small set (`connect`, `timeout`).
    pub fn fail(mut self, error_type: &'static str) {
        self.open.fail(error_type);
    }
}

#[derive(Debug)]
struct OpenSpan {
    tracing: Tracing,
    context: TraceContext,
    kind: SpanKind,
    name: Cow<'static, str>,
    start: SystemTime,
    attributes: Vec<KeyValue>,
    finished: bool,
}

impl OpenSpan {
    fn new(
        tracing: &Tracing,
        context: TraceContext,
        kind: SpanKind,
        name: Cow<'static, str>,
        attributes: Vec<KeyValue>,
    ) -> Self {
        let start = SystemTime::now();
        Self { tracing: tracing.clone(), context, kind, name, start, attributes, finished: false }
    }

    fn finish(&mut self, status: StatusCode, is_error: bool) {
        self.attributes.push(status_attribute(status));
        if is_error {
            self.attributes.push(KeyValue::new(semantic::ERROR_TYPE, status.as_str().to_owned()));
        }
        // The conventions want no description where the status says it all.
        self.record(if is_error { Status::error("") } else { Status::Unset });
    }

    fn fail(&mut self, error_type: &'static str) {
        self.attributes.push(KeyValue::new(semantic::ERROR_TYPE, error_type));
        self.record(Status::error(error_type));
    }

    fn record(&mut self, status: Status) {
        self.finished = true;
        self.tracing.record(Span {
            context: &self.context,
            kind: self.kind.clone(),
            name: std::mem::take(&mut self.name),
            start: self.start,
            end: SystemTime::now(),
            attributes: std::mem::take(&mut self.attributes),
            status,
        });
    }
}

impl Drop for OpenSpan {
    fn drop(&mut self) {
        if !self.finished {
            self.fail(CANCELLED);
        }
    }
}

/// `GET /profiles/{user}`, or `GET` where there is no route.
fn span_name(method: &Method, route: Option<&str>) -> Cow<'static, str> {
    // The conventions' word for a method that is not known, whose name could be anything.
    let method = known_method(method.as_str()).unwrap_or("HTTP");
    match route {
        Some(route) => Cow::Owned(format!("{method} {route}")),
        None => Cow::Borrowed(method),
    }
}

fn server_attributes(request: &Parts, scheme: &'static str, route: Option<&str>) -> Vec<KeyValue> {
    let mut attributes = Vec::with_capacity(10);
    push_method(&mut attributes, &request.method);
    attributes.push(KeyValue::new(semantic::URL_PATH, request.uri.path().to_owned()));
    attributes.push(KeyValue::new(semantic::URL_SCHEME, scheme));
    attributes.push(KeyValue::new(semantic::NETWORK_PROTOCOL_VERSION, protocol_version(request.version)));
    if let Some(route) = route {
        attributes.push(KeyValue::new(semantic::HTTP_ROUTE, route.to_owned()));
    }
    let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let authority = request.uri.authority().cloned().or_else(|| host.and_then(|host| host.parse().ok()));
    if let Some(authority) = authority {
        attributes.push(KeyValue::new(semantic::SERVER_ADDRESS, authority.host().to_owned()));
        if let Some(port) = authority.port_u16() {
            attributes.push(KeyValue::new(semantic::SERVER_PORT, i64::from(port)));
        }
    }
    attributes
}

fn client_attributes(method: &Method, uri: &Uri, resends: u32) -> Vec<KeyValue> {
    let mut attributes = Vec::with_capacity(10);
    push_method(&mut attributes, method);
    let scheme = uri.scheme().unwrap_or(&Scheme::HTTP);
    let host = uri.host().unwrap_or_default();
    let port = uri.port_u16().unwrap_or(if scheme == &Scheme::HTTPS { 443 } else { 80 });
    attributes.push(KeyValue::new(semantic::SERVER_ADDRESS, host.to_owned()));
    attributes.push(KeyValue::new(semantic::SERVER_PORT, i64::from(port)));
    // Without the query and without user and password: people put secrets there.
    let shown_port = uri.port_u16().map(|port| format!(":{port}")).unwrap_or_default();
    let url = format!("{scheme}://{host}{shown_port}{path}", path = uri.path());
    attributes.push(KeyValue::new(semantic::URL_FULL, url));
    if resends > 0 {
        attributes.push(KeyValue::new(semantic::HTTP_REQUEST_RESEND_COUNT, i64::from(resends)));
    }
    attributes
}

fn push_method(attributes: &mut Vec<KeyValue>, method: &Method) {
    match known_method(method.as_str()) {
        Some(known) => attributes.push(KeyValue::new(semantic::HTTP_REQUEST_METHOD, known)),
        None => {
            attributes.push(KeyValue::new(semantic::HTTP_REQUEST_METHOD, "_OTHER"));
            attributes
                .push(KeyValue::new(semantic::HTTP_REQUEST_METHOD_ORIGINAL, method.as_str().to_owned()));
        }
    }
}

fn status_attribute(status: StatusCode) -> KeyValue {
    KeyValue::new(semantic::HTTP_RESPONSE_STATUS_CODE, i64::from(status.as_u16()))
}

#[cfg(test)]
mod tests {
    use http::{Request, Version};
    use opentelemetry::Value;

    use super::*;
    use crate::trace::tests::keeping;
    use crate::trace::{Sampler, SpanData};

    const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn request(method: &str, uri: &str, fields: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn attribute<'a>(span: &'a SpanData, name: &str) -> Option<&'a Value> {
        let mut found = span.attributes.iter().filter(|attribute| attribute.key.as_str() == name);
        let value = found.next().map(|attribute| &attribute.value);
        assert!(found.next().is_none(), "{name} stands twice");
        value
    }

    fn check(span: &SpanData, expected: &[(&str, Option<Value>)]) {
        for (name, value) in expected {
            assert_eq!(attribute(span, name), value.as_ref(), "{name}");
        }
    }

    #[test]
    fn a_served_request() {
        let (tracing, spans) = keeping(Sampler::PARENT_BASED_ALWAYS_ON);
        let parts = request(
            "GET",
            "/profiles/alice?token=secret",
            &[("host", "profile:8002"), ("traceparent", TRACEPARENT)],
        );
        server_span(&tracing, &parts, "https", Some("/profiles/{user}")).finish(StatusCode::NOT_FOUND);
        let spans = spans();
        let span = &spans[0];
        assert_eq!(span.name, "GET /profiles/{user}");
        assert_eq!(span.span_kind, SpanKind::Server);
        assert_eq!(span.status, Status::Unset, "4xx is not the server's error");
        assert_eq!(span.span_context.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(span.parent_span_id.to_string(), "b7ad6b7169203331");
        check(
            span,
            &[
                (semantic::HTTP_REQUEST_METHOD, Some("GET".into())),
                (semantic::URL_PATH, Some("/profiles/alice".into())),
                (semantic::URL_SCHEME, Some("https".into())),
                (semantic::HTTP_ROUTE, Some("/profiles/{user}".into())),
                (semantic::HTTP_RESPONSE_STATUS_CODE, Some(404.into())),
                (semantic::NETWORK_PROTOCOL_VERSION, Some("1.1".into())),
                (semantic::SERVER_ADDRESS, Some("profile".into())),
                (semantic::SERVER_PORT, Some(8002.into())),
                (semantic::ERROR_TYPE, None),
            ],
        );
        assert!(!format!("{span:?}").contains("secret"));
    }

    #[test]
    fn a_server_that_fails() {
        let (tracing, spans) = keeping(Sampler::PARENT_BASED_ALWAYS_ON);
        let mut parts = request("BREW", "/pot", &[]);
        parts.version = Version::HTTP_2;
        server_span(&tracing, &parts, "http", None).finish(StatusCode::BAD_GATEWAY);
        drop(server_span(&tracing, &parts, "http", None));
        let spans = spans();
        assert_eq!(spans[0].name, "HTTP");
        assert_eq!(spans[0].status, Status::error(""));
        check(
            &spans[0],
            &[
                (semantic::HTTP_REQUEST_METHOD, Some("_OTHER".into())),
                (semantic::HTTP_REQUEST_METHOD_ORIGINAL, Some("BREW".into())),
                (semantic::NETWORK_PROTOCOL_VERSION, Some("2".into())),
                (semantic::ERROR_TYPE, Some("502".into())),
                (semantic::SERVER_ADDRESS, None),
            ],
        );
        assert_eq!(spans[1].status, Status::error(CANCELLED));
        check(
            &spans[1],
            &[(semantic::ERROR_TYPE, Some(CANCELLED.into())), (semantic::HTTP_RESPONSE_STATUS_CODE, None)],
        );
    }

    #[test]
    fn a_sent_request() {
        let (tracing, spans) = keeping(Sampler::PARENT_BASED_ALWAYS_ON);
        let parts = request("GET", "/", &[("traceparent", TRACEPARENT), ("tracestate", "a=1")]);
        let server = server_span(&tracing, &parts, "https", Some("/"));
        let uri: Uri = "https://me:hunter2@auth/verify?token=secret".parse().unwrap();
        let mut headers = HeaderMap::new();
        let client = client_span(&server, &Method::POST, &uri, &mut headers, 2);
        let (client_context, server_context) = (*client.context(), *server.context());
        client.finish(StatusCode::FORBIDDEN);
        server.finish(StatusCode::OK);

        let sent = extract(&headers).unwrap();
        assert_eq!((sent.trace_id, sent.span_id), (server_context.trace_id, client_context.span_id));
        assert_eq!(sent.state.unwrap(), "a=1");
        let spans = spans();
        let span = &spans[0];
        assert_eq!(span.name, "POST");
        assert_eq!(span.span_kind, SpanKind::Client);
        assert_eq!(span.status, Status::error(""), "4xx is an error to a client");
        assert_eq!(span.parent_span_id.to_bytes(), server_context.span_id.to_be_bytes());
        check(
            span,
            &[
                (semantic::HTTP_REQUEST_METHOD, Some("POST".into())),
                (semantic::SERVER_ADDRESS, Some("auth".into())),
                (semantic::SERVER_PORT, Some(443.into())),
                (semantic::URL_FULL, Some("https://auth/verify".into())),
                (semantic::HTTP_REQUEST_RESEND_COUNT, Some(2.into())),
                (semantic::HTTP_RESPONSE_STATUS_CODE, Some(403.into())),
                (semantic::ERROR_TYPE, Some("403".into())),
            ],
        );
        assert!(!format!("{span:?}").contains("hunter2") && !format!("{span:?}").contains("secret"));
    }

    #[test]
    fn a_request_that_fails_before_its_answer() {
        let (tracing, spans) = keeping(Sampler::PARENT_BASED_ALWAYS_ON);
        let uri: Uri = "http://auth:8003/verify".parse().unwrap();
        let mut headers = HeaderMap::new();
        headers.insert("tracestate", HeaderValue::from_static("somebody=else"));
        root_client_span(&tracing, &Method::GET, &uri, &mut headers).fail("connect");
        assert!(!headers.contains_key("tracestate"));
        let spans = spans();
        assert_eq!(spans[0].status, Status::error("connect"));
        check(
            &spans[0],
            &[
                (semantic::ERROR_TYPE, Some("connect".into())),
                (semantic::SERVER_PORT, Some(8003.into())),
                (semantic::URL_FULL, Some("http://auth:8003/verify".into())),
                (semantic::HTTP_REQUEST_RESEND_COUNT, None),
            ],
        );
    }

    #[test]
    fn unsampled_requests_pass_their_context_on_and_gather_nothing() {
        let (tracing, spans) = keeping(Sampler::PARENT_BASED_ALWAYS_ON);
        let unsampled = TRACEPARENT.replace("-01", "-00");
        let parts = request("GET", "/", &[("traceparent", &unsampled)]);
        let server = server_span(&tracing, &parts, "http", None);
        assert!(server.open.attributes.is_empty());
        let mut headers = HeaderMap::new();
        client_span(&server, &Method::GET, &"http://auth/".parse().unwrap(), &mut headers, 0)
            .finish(StatusCode::OK);
        assert_eq!(extract(&headers).unwrap().sampled, Some(false));
        server.finish(StatusCode::OK);
        assert!(spans().is_empty());
    }
}
