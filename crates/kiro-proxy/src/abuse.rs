//! Which client is cut off for what it does to its connection, or which callee, and who learns of it?
//!
//! A connection that is abused ends, with one line that names who is at its other end and a count by reason. Lines that strangers can cause are
//! bounded by rate ([`kiro_core::quota`]); counts are exact.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::Request;

use kiro_core::identity::{ServiceName, SpiffeId};

use crate::admission::Limit;
use crate::exchange::{Direction, Via};
use crate::frames::{Seen, Unread};
use crate::metrics::OpenConnection;
use crate::reject::Reject;
use crate::worker::Worker;

/// What a client did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Opened streams and reset them before they could be served (CVE-2023-44487).
    RapidReset,
    /// Made this sidecar reset stream after stream (CVE-2025-8671).
    StreamErrors,
    /// A header block in more CONTINUATION frames than its size needs.
    ContinuationFlood,
    /// Header fields far beyond the limit, or an HPACK bomb.
    HeaderBomb,
    /// Frames that carry nothing: PING, SETTINGS, WINDOW_UPDATE, PRIORITY, unknown and empty ones, and interim answers.
    ControlFlood,
    /// DATA in tiny or empty pieces.
    TinyData,
    /// HTTP/2 that breaks its rules.
    Protocol,
    /// No HTTP/2 preface in time.
    PrefaceTimeout,
    /// Answers that the client does not read, on HTTP/2.
    SlowReader,
    /// A head that stood still while those of all clients held too much.
    HalfHead,
}

impl Reason {
    /// All of them, in the order of their discriminants.
    pub(crate) const ALL: [Reason; 10] = [
        Reason::RapidReset,
        Reason::StreamErrors,
        Reason::ContinuationFlood,
        Reason::HeaderBomb,
        Reason::ControlFlood,
        Reason::TinyData,
        Reason::Protocol,
        Reason::PrefaceTimeout,
        Reason::SlowReader,
        Reason::HalfHead,
    ];

    /// The word that log and metrics use.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Reason::RapidReset => "rapid_reset",
            Reason::StreamErrors => "stream_errors",
            Reason::ContinuationFlood => "continuation_flood",
            Reason::HeaderBomb => "header_bomb",
            Reason::ControlFlood => "control_flood",
            Reason::TinyData => "tiny_data",
            Reason::Protocol => "protocol",
            Reason::PrefaceTimeout => "preface_timeout",
            Reason::SlowReader => "slow_reader",
            Reason::HalfHead => "half_head",
        }
    }

    /// For the documentation.
    #[cfg(test)]
    pub(crate) fn meaning(self) -> &'static str {
        match self {
            Reason::RapidReset => "opened streams and reset them at once, again and again (CVE-2023-44487)",
            Reason::StreamErrors => {
                "sent frames that make the sidecar reset stream after stream (CVE-2025-8671)"
            }
            Reason::ContinuationFlood => {
                "sent a header block in more CONTINUATION frames than its size needs"
            }
            Reason::HeaderBomb => "sent header fields far beyond the limit, or an HPACK bomb",
            Reason::ControlFlood => {
                "sent PING, SETTINGS, WINDOW_UPDATE, PRIORITY, unknown or empty frames, or interim answers, far beyond what its requests and answers need"
            }
            Reason::TinyData => "sent bodies in tiny or empty pieces faster than they could be passed on",
            Reason::Protocol => "broke the rules of HTTP/2",
            Reason::PrefaceTimeout => "began HTTP/2 and did not get through its preface in time",
            Reason::SlowReader => "asked over HTTP/2 and read nothing of the answers for a minute",
            Reason::HalfHead => {
                "began a head above 8 KiB and did not end it, longer than all others did, while such heads held too much together"
            }
        }
    }
}

/// Counts a connection that was cut, and names its client in the log.
pub(crate) fn report(worker: &Worker, via: &Via, reason: Reason) {
    let listener = via.place.listener;
    worker.metrics.abused(listener, reason);
    if reason == Reason::HalfHead {
        worker.metrics.limit_hit(Limit::HalfHeads);
    }
    let Some(suppressed) = worker.metrics.connections(listener).lines.take(Instant::now()) else { return };
    let state = worker.snapshot();
    let identity = match (via.direction, &via.caller) {
        (Direction::Inbound, Some(caller)) => {
            Some(SpiffeId::sidecar(&state.id.trust_domain, caller).to_string())
        }
        _ => None,
    };
    tracing::warn!(
        target: "kiro::abuse", service = %state.me, listener = listener.as_str(), caller = via.caller(),
        caller_proof = via.caller_proof, identity, remote = %via.place.remote, reason = reason.as_str(),
        suppressed = (suppressed > 0).then_some(suppressed), "connection cut: its client abuses it"
    );
}

/// Who answers on a connection that this sidecar opened.
#[derive(Debug, Clone)]
pub(crate) struct Callee {
    /// The service that this sidecar is of.
    pub(crate) service: ServiceName,
    /// Who has proven himself there; absent for the application.
    pub(crate) id: Option<SpiffeId>,
    /// Where the connection leads.
    pub(crate) address: SocketAddr,
}

/// Counts a connection of this sidecar's own that was cut, and names who answers on it in the log.
pub(crate) fn report_callee(open: &OpenConnection, callee: &Callee, reason: Reason) {
    let Some(suppressed) = open.abused(reason) else { return };
    let identity = callee.id.as_ref().map(SpiffeId::to_string);
    tracing::warn!(
        target: "kiro::abuse", service = %callee.service, identity, remote = %callee.address,
        reason = reason.as_str(), suppressed = (suppressed > 0).then_some(suppressed),
        "connection cut: who answers on it abuses it"
    );
}

/// Accounts for requests that the HTTP/2 library answered by itself.
pub(crate) fn unread(worker: &Worker, via: &Via, unread: Unread) {
    if unread.refused > 0 {
        let peer = via.direction == Direction::Inbound;
        let limit = if peer { Limit::PeerStreams } else { Limit::ClientStreams };
        worker.metrics.limit_hits(limit, unread.refused);
    }
    let many = [
        (Reject::MessageInvalid, unread.malformed, "a head that is no HTTP/2 request"),
        (Reject::HeadersTooLarge, unread.too_large, "a head far beyond the limit"),
    ];
    for (reject, count, cause) in many.into_iter().filter(|(_, count, _)| *count > 0) {
        worker.library_answers(via, reject, cause, count);
    }
}

/// The next request of a connection; what the library answers by itself meanwhile is accounted for.
pub(crate) async fn next_request<S>(
    worker: &Worker,
    via: &Via,
    h2: &mut h2::server::Connection<S, Bytes>,
    seen: &Seen,
) -> Option<Result<(Request<RecvStream>, SendResponse<Bytes>), h2::Error>>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let accepted = poll_fn(|cx| {
        let polled = h2.poll_accept(cx);
        // It has handed over all that it has read.
        if polled.is_pending()
            && let Some(unread) = seen.unread()
        {
            self::unread(worker, via, unread);
        }
        polled
    })
    .await;
    if matches!(accepted, Some(Ok(_))) {
        seen.serve();
    }
    accepted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_stand_in_the_order_of_their_labels() {
        for (place, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place, "{reason:?}");
        }
    }
}
