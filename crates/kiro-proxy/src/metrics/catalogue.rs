//! Which metrics are there, and what does each of them say?
//!
//! What is registered takes its name, its type and its help from here, and `docs/metrics.md` is written from here.

use prometheus_client::metrics::MetricType;

/// What there is to know of one metric.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// Without the suffix that its type adds.
    pub(super) name: &'static str,
    pub(super) kind: MetricType,
    /// The names of its labels.
    #[cfg_attr(not(test), allow(dead_code, reason = "for the documentation, which a test writes"))]
    pub(super) labels: &'static [&'static str],
    /// One sentence, without a full stop.
    pub(super) help: &'static str,
}

macro_rules! catalogue {
    ($($constant:ident = $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(pub(super) const $constant: Entry = Entry {
            name: $name, kind: MetricType::$kind, labels: &[$($label),*], help: $help,
        };)*
        /// All of them, in the order of the text.
        #[cfg(test)]
        pub(super) const ALL: &[Entry] = &[$($constant),*];
    };
}

catalogue! {
    REQUESTS = Counter "kiro_requests" ["from", "to", "method", "status"]
        "Requests by edge, class of method and class of status";
    REJECTS = Counter "kiro_rejects" ["from", "to", "code"]
        "Requests that a sidecar answered in the application's place, by edge and reject code";
    DURATION = Histogram "kiro_request_duration_seconds" ["from", "to"]
        "From a request's head to its answer's end";
    BODY_BYTES = Counter "kiro_body_bytes" ["from", "to", "body"]
        "Bytes of bodies, of tunnels too";
    IN_FLIGHT = Gauge "kiro_requests_in_flight" ["direction"]
        "Requests, tunnels and upgraded streams that are under way";
    LIBRARY_ANSWERS = Counter "kiro_library_answers" []
        "Requests that were answered before they could be read whole: malformed or too large heads";
    TRAILERS_DROPPED = Counter "kiro_trailers_dropped" []
        "Trailers that could not be carried on and were dropped";
    CONNECTIONS_OPEN = Gauge "kiro_connections_open" ["listener"]
        "Accepted connections that are open, upgraded ones and tunnels included";
    CONNECTIONS_ACCEPTED = Counter "kiro_connections_accepted" ["listener"]
        "Connections accepted";
    CONNECTIONS_REFUSED = Counter "kiro_connections_refused" ["listener"]
        "Connections turned away because a listener had all that it may have";
    CONNECTIONS_EVICTED = Counter "kiro_connections_evicted" ["listener"]
        "Connections without a request that were closed to make room, because a listener had all that it may have";
    UPSTREAM_OPEN = Gauge "kiro_upstream_connections_open" []
        "Connections to other sidecars that are open";
    UPSTREAM_OPENED = Counter "kiro_upstream_connections_opened" []
        "Connections to other sidecars that were opened";
    UPSTREAM_CLOSED = Counter "kiro_upstream_connections_closed" []
        "Connections to other sidecars that have ended";
    UPSTREAM_FAILED = Counter "kiro_upstream_connections_failed" []
        "Connections to other sidecars that could not be opened";
    APP_OPEN = Gauge "kiro_app_connections_open" []
        "Connections to the application that are open, idle ones, upgraded ones and tunnels included";
    APP_OPENED = Counter "kiro_app_connections_opened" []
        "Connections to the application that were opened";
    REPLICAS = Gauge "kiro_replicas" ["to", "state"]
        "Replicas of the services that were called, by how they do";
    EJECTIONS = Counter "kiro_replica_ejections" ["to"]
        "How often a replica that is there now was left out, for failures or since it could not be reached";
    RETRIES = Counter "kiro_retries" ["to", "outcome"]
        "Attempts that failed, by whether they were made again, or why not";
    FAULTS = Counter "kiro_faults" ["to", "fault"]
        "Requests with which something went wrong because the mesh file's `faults` ask for it";
    COPIES = Counter "kiro_copies" ["to", "copy"]
        "Copies of requests that the mesh file's `mirrors` ask for, by what became of them";
    RETRY_BUDGET = Gauge "kiro_retry_budget" ["to"]
        "Retries that a service may cost at the moment";
    BREAKER = Gauge "kiro_breaker" ["to", "state"]
        "1 for the state that a service's breaker is in; only where one is declared";
    BREAKER_OPENED = Counter "kiro_breaker_opened" ["to"]
        "How often a service's breaker opened";
    NAME_AGE = Gauge "kiro_name_age_seconds" ["to"]
        "How long ago DNS confirmed where a service is; it grows while DNS gives no answer";
    APP_HEALTH = Gauge "kiro_app_health" ["state"]
        "1 for the state of the application by its checks; `unknown` where none are declared";
    APP_HEALTH_CHANGES = Counter "kiro_app_health_changes" ["state"]
        "How often the application came into a state";
    RATE_LIMITED = Counter "kiro_rate_limited" ["line"]
        "Requests that a line of `limits` refused";
    RATE_KEYS = Gauge "kiro_rate_limit_keys" ["line"]
        "Callers, paths or header values that a line of `limits` with `per` knows";
    RATE_KEYS_OVERFLOWED = Counter "kiro_rate_limit_keys_overflowed" ["line"]
        "Requests that had to share one bucket, because a line of `limits` knew too many callers, paths or header values";
    CONCURRENCY_LIMIT = Gauge "kiro_concurrency_limit" []
        "Requests that the application may have under way at the moment; only where `traffic.concurrency` is declared";
    CONCURRENCY_IN_FLIGHT = Gauge "kiro_concurrency_in_flight" []
        "Requests that it has under way, as far as they count for that";
    CONCURRENCY_WAITING = Gauge "kiro_concurrency_waiting" []
        "Requests that wait for their place there";
    OVERLOADED = Counter "kiro_overloaded" ["cause"]
        "Requests that were refused because the application had enough to do";
    HANDSHAKES = Counter "kiro_tls_handshakes" ["direction", "outcome"]
        "TLS handshakes that ended, by leg and outcome";
    HANDSHAKES_IN_PROGRESS = Gauge "kiro_tls_handshakes_in_progress" ["direction"]
        "TLS handshakes with clients that are under way";
    ABUSE = Counter "kiro_abuse" ["listener", "reason"]
        "Connections cut because their client abused them";
    ABUSE_BY_CALLEE = Counter "kiro_abuse_by_callee" ["direction", "reason"]
        "Connections of this sidecar's own cut because the other sidecar, or the application, abused them";
    LIMIT = Gauge "kiro_limit" ["limit"]
        "Bounds that somebody can run into";
    LIMIT_HITS = Counter "kiro_limit_hits" ["limit"]
        "How often a bound was run into";
    CERTIFICATE_EXPIRY = Gauge "kiro_certificate_expiry_timestamp_seconds" []
        "When the sidecar's certificate ends, in seconds since 1970";
    LOCAL_PORTS_FAILED = Gauge "kiro_local_ports_failed" []
        "Ports of the pod's loopback that lead to tcp services and can't be bound";
    OPEN_FDS = Gauge "process_open_fds" []
        "File descriptors that this process has open";
    LOG_LINES_LOST = Counter "kiro_log_lines_lost" []
        "Log lines lost to a full buffer";
    LOG_LINES_SUPPRESSED = Counter "kiro_log_lines_suppressed" []
        "Log lines that were not written because strangers caused too many of them";
    SPANS_RECORDED = Counter "kiro_spans_recorded" []
        "Spans handed to the exporter";
    SPANS_EXPORTED = Counter "kiro_spans_exported" []
        "Spans that the collector took";
    SPANS_LOST = Counter "kiro_spans_lost" []
        "Spans lost: the collector did not take them, or the queue was full";
}

#[cfg(test)]
mod tests {
    use crate::abuse::Reason;
    use crate::admission::{Admission, Limit, Listener};
    use crate::edge::RETRY_OUTCOMES;
    use crate::overload::SHED_REASONS;

    use super::super::calls::BREAKER_STATES;
    use super::super::{HANDSHAKE_OUTCOMES, Leg, METHODS, STATUSES};
    use super::*;

    fn full_name(entry: &Entry) -> String {
        let suffix = if matches!(entry.kind, MetricType::Counter) { "_total" } else { "" };
        format!("{}{suffix}", entry.name)
    }

    fn values(label: &str) -> String {
        let list =
            |words: &[&str]| words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ");
        match label {
            "from" | "to" => {
                "a service of the mesh file, `ingress` for outside clients, `-` for what is no service of it"
                    .to_owned()
            }
            "method" => format!(
                "{}: GET, HEAD and OPTIONS; POST, PUT, PATCH and DELETE; CONNECT; all others",
                list(&METHODS)
            ),
            "status" => format!("{}; `gone` where the client left before an answer", list(&STATUSES)),
            "code" => "a [reject code](reject-codes.md)".to_owned(),
            "body" => list(&["request", "response"]),
            "direction" => format!(
                "{}: whose connection or request it is; the last two are this sidecar's own connections",
                list(&Leg::ALL.map(Leg::as_str))
            ),
            "listener" => list(&Listener::ALL.map(Listener::as_str)),
            "outcome" => format!(
                "of a handshake: {}; of an attempt that failed: {}",
                list(HANDSHAKE_OUTCOMES),
                list(&RETRY_OUTCOMES)
            ),
            "state" => format!(
                "of a replica: {}; of a breaker: {}; of the application: {}",
                list(&kiro_core::balance::State::ALL.map(kiro_core::balance::State::as_str)),
                list(&BREAKER_STATES.map(kiro_core::breaker::BreakerState::word)),
                list(&kiro_core::health::State::ALL.map(kiro_core::health::State::name))
            ),
            "line" => "the name of a line of `limits` in the mesh file".to_owned(),
            "cause" => format!(
                "{}: as many waited as may, it waited for too long, its own time was over while it waited",
                list(&SHED_REASONS)
            ),
            "reason" => "see below".to_owned(),
            "fault" => list(&crate::faults::WORDS),
            "copy" => format!(
                "{}: the third where as many as there may be were under way, the last where the body is not held",
                list(&crate::mirror::WORDS)
            ),
            "limit" => "see below".to_owned(),
            other => panic!("label {other} is not documented"),
        }
    }

    fn document() -> String {
        let mut text = DOCUMENT.to_owned();
        for entry in ALL {
            let labels = entry.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(" ");
            let kind = entry.kind.as_str();
            text.push_str(&format!("| `{}` | {kind} | {labels} | {} |\n", full_name(entry), entry.help));
        }
        text.push_str("\n## Labels\n\nNo label takes a value from what a client sends.\n\n| label | values |\n|---|---|\n");
        let mut labels: Vec<_> = ALL.iter().flat_map(|entry| entry.labels).collect();
        let mut seen = Vec::new();
        labels.retain(|label| {
            !seen.contains(label) && {
                seen.push(label);
                true
            }
        });
        for label in labels {
            text.push_str(&format!("| `{label}` | {} |\n", values(label)));
        }
        text.push_str("\n## Limits\n\n`kiro_limit` shows each bound, `kiro_limit_hits_total` how often it was run into.\n\n| limit | default | what it bounds |\n|---|---|---|\n");
        let admission = Admission::shared(u64::MAX, 1);
        for limit in Limit::ALL {
            let bound = if limit == Limit::Descriptors {
                "the system's".to_owned()
            } else {
                admission.bound(limit).to_string()
            };
            text.push_str(&format!("| `{}` | {bound} | {} |\n", limit.as_str(), limit.meaning()));
        }
        text.push_str("\n## Abuse\n\nA client that does one of these is cut off; `kiro_abuse_total` counts it, and one line of the log names it. So is a sidecar that answers, or an application that speaks HTTP/2, which `kiro_abuse_by_callee_total` counts.\n\n| reason | what the client did |\n|---|---|\n");
        for reason in Reason::ALL {
            text.push_str(&format!("| `{}` | {} |\n", reason.as_str(), reason.meaning()));
        }
        text
    }

    /// `UPDATE_DOCS=1 cargo test -p kiro-proxy documentation` writes it.
    #[test]
    fn the_documentation_lists_the_metrics() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/metrics.md");
        let text = document();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == text,
            "docs/metrics.md has drifted: UPDATE_DOCS=1 cargo test -p kiro-proxy documentation"
        );
    }

    const DOCUMENT: &str = "\
# Metrics

`/metrics` on port 15000 (loopback), and on 15020 where the mesh file says `metrics: open`, in the OpenMetrics text that Prometheus reads.
Each sidecar counts what passes it, so a request between two services is counted at both ends, under the same edge. Counts are of the whole
sidecar, all workers together; a series appears with its first count.

| metric | type | labels | what it says |
|---|---|---|---|
";
}
