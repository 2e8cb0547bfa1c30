//! Which span does a hop leave in the trace?
//!
//! A CLIENT span for each attempt of an outbound request, a SERVER span for an inbound or ingress one, with names and attributes
//! by OpenTelemetry's stable HTTP conventions. Nothing is built for a trace that is not sampled.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use http::uri::PathAndQuery;
use http::{HeaderMap, Version};
use kiro_telemetry::trace::{KeyValue, Span, SpanKind, Status, TraceContext, Tracing, extract, semantic};

use crate::exchange::Direction;

/// One hop of a request, finished.
pub(crate) struct Hop<'a> {
    pub(crate) direction: Direction,
    pub(crate) trace: &'a TraceContext,
    pub(crate) start: SystemTime,
    pub(crate) duration: Duration,
    pub(crate) method: &'a str,
    pub(crate) target: Option<&'a PathAndQuery>,
    pub(crate) version: Version,
    /// Absent where no answer came.
    pub(crate) status: Option<u16>,
    pub(crate) reject: Option<&'static str>,
    pub(crate) caller: &'a str,
    pub(crate) callee: &'a str,
    pub(crate) trust_domain: &'a str,
    pub(crate) upstream: Option<SocketAddr>,
    pub(crate) resend_count: u32,
    /// What went wrong on purpose.
    pub(crate) fault: Option<&'static str>,
    /// The name that was asked for, where a version of it was called.
    pub(crate) split: Option<&'a str>,
    /// Where this is a copy: the service that got the original.
    pub(crate) copy_of: Option<&'a str>,
}

/// The context of a request from the application or from a peer, whose word on sampling counts.
pub(crate) fn inside(tracing: &Tracing, headers: &HeaderMap) -> TraceContext {
    match extract(headers) {
        Some(remote) => tracing.continue_from(&remote, true),
        None => tracing.root(),
    }
}

/// The context of a request from outside: its trace goes on, its word on sampling does not count.
pub(crate) fn outside(tracing: &Tracing, headers: &HeaderMap) -> TraceContext {
    match extract(headers) {
        Some(remote) => tracing.continue_from(&remote, false),
        None => tracing.root(),
    }
}

/// Writes a hop's context into a request that goes on. Where nothing is exported, the application's own context passes as it came:
/// a span that nobody will ever see must not stand between two that somebody does.
pub(crate) fn propagate(tracing: &Tracing, trace: &TraceContext, headers: &mut HeaderMap) {
    if tracing.is_enabled() {
        kiro_telemetry::trace::inject(trace, headers);
    }
}

/// Hands a hop's span over.
pub(crate) fn record(tracing: &Tracing, hop: &Hop<'_>) {
    let method = semantic::known_method(hop.method).unwrap_or("_OTHER");
    let path = hop.target.map_or("/", PathAndQuery::path).to_owned();
    let mut attributes = vec![
        KeyValue::new(semantic::HTTP_REQUEST_METHOD, method),
        KeyValue::new(semantic::NETWORK_PROTOCOL_VERSION, semantic::protocol_version(hop.version)),
        KeyValue::new("kiro.direction", hop.direction.as_str()),
    ];
    if let Some(status) = hop.status {
        attributes.push(KeyValue::new(semantic::HTTP_RESPONSE_STATUS_CODE, i64::from(status)));
    }
    let peer = match hop.direction {
        Direction::Outbound => {
            // The query is left out: it may hold what nobody should read in a trace.
            attributes.push(KeyValue::new(semantic::URL_FULL, format!("http://{}{path}", hop.callee)));
            attributes.push(KeyValue::new(semantic::SERVER_ADDRESS, hop.callee.to_owned()));
            if let Some(upstream) = hop.upstream {
                attributes.push(KeyValue::new(semantic::SERVER_PORT, i64::from(upstream.port())));
                attributes.push(KeyValue::new("network.peer.address", upstream.ip().to_string()));
            }
            if hop.resend_count > 0 {
                attributes
                    .push(KeyValue::new(semantic::HTTP_REQUEST_RESEND_COUNT, i64::from(hop.resend_count)));
            }
            hop.upstream.map(|_| hop.callee)
        }
        Direction::Inbound | Direction::Ingress => {
            attributes.push(KeyValue::new(semantic::URL_PATH, path));
            attributes.push(KeyValue::new(
                semantic::URL_SCHEME,
                if hop.direction == Direction::Inbound { "https" } else { "http" },
            ));
            (hop.direction == Direction::Inbound).then_some(hop.caller)
        }
    };
    if let Some(peer) = peer {
        attributes.push(KeyValue::new("kiro.peer.identity", format!("spiffe://{}/{peer}", hop.trust_domain)));
    }
    if let Some(reject) = hop.reject {
        attributes.push(KeyValue::new("kiro.reject", reject));
    }
    if let Some(fault) = hop.fault {
        attributes.push(KeyValue::new("kiro.fault", fault));
    }
    if let Some(split) = hop.split {
        attributes.push(KeyValue::new("kiro.split", split.to_owned()));
    }
    if let Some(original) = hop.copy_of {
        attributes.push(KeyValue::new("kiro.copy_of", original.to_owned()));
    }
    let kind = if hop.direction == Direction::Outbound { SpanKind::Client } else { SpanKind::Server };
    // 4xx is the client's error alone: unset on a SERVER span, Error on a CLIENT span.
    let failed = hop
        .status
        .is_none_or(|status| status >= 500 || (hop.direction == Direction::Outbound && status >= 400));
    if failed {
        let status = || hop.status.map_or(Cow::Borrowed("_OTHER"), |status| Cow::Owned(status.to_string()));
        let kind = hop.reject.map_or_else(status, Cow::Borrowed);
        attributes.push(KeyValue::new(semantic::ERROR_TYPE, kind));
    }
    tracing.record(Span {
        context: hop.trace,
        kind,
        name: Cow::Owned(format!("{method} {}", hop.callee)),
        start: hop.start,
        end: hop.start + hop.duration,
        attributes,
        status: if failed { Status::error("") } else { Status::Unset },
    });
}
