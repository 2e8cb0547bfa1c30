//! What does a reject code mean, and what mends it? One sentence each, for a person who sees the code for the first time.

/// The sentence for a code.
pub(crate) fn of(code: &str) -> &'static str {
    let found = MEANINGS.iter().find(|(known, _)| *known == code);
    found.map_or(
        "a code that this version of the command does not know: see the sidecars' logs",
        |(_, meaning)| meaning,
    )
}

/// Every code of a sidecar.
const MEANINGS: &[(&str, &str)] = &[
    ("authority_invalid", "the host is not the name of a service: no address, no user, no odd characters"),
    ("host_missing", "HTTP/1.1 without a Host field"),
    ("host_duplicate", "several Host fields"),
    (
        "path_invalid",
        "the path holds `.` or `..` segments, NUL, a broken %-escape or bytes outside ASCII; no policy could judge it",
    ),
    ("message_invalid", "the message could not be read as HTTP"),
    ("header_invalid", "a header field can't be carried to the other side"),
    ("headers_too_large", "the header block is over its limit of 64 KiB"),
    ("request_timeout", "head or body did not come in time"),
    ("upgrade_unsupported", "`websocket` is the only upgrade that is carried"),
    ("service_is_tcp", "the service is declared `protocol: tcp`: reach it at its local port, or by CONNECT"),
    ("tls_in_tunnel", "TLS inside a tunnel to an HTTP service: speak plain HTTP in it, the sidecars encrypt"),
    (
        "signature_label_taken",
        "the request has a signature under the label `kiro`, which is the sidecars' own",
    ),
    (
        "misdirected",
        "the request came to the sidecar of another service: is the name right in DNS and in `endpoints`?",
    ),
    ("service_unknown", "the mesh file has no service of this name: see `services`"),
    ("host_external", "the host is outside the mesh, and sidecars are no way out of it"),
    ("policy_no_edge", "no allow line lets this caller call this service: see `allow` in the mesh file"),
    (
        "policy_method",
        "this caller may call this service, but not with this method: see `methods` in the allow line",
    ),
    ("policy_path", "this caller may call this service, but not on this path: see `paths` in the allow line"),
    (
        "policy_ambiguous_path",
        "the path can be read in two ways (//, %2F, %5C, \\ or ;), and the allow line has `paths`",
    ),
    ("policy_tunnel", "a tunnel would get round the methods or paths of the allow line"),
    (
        "signature_missing",
        "the callee's sidecar wants a signature and there was none: is `signatures` the same at both ends?",
    ),
    ("signature_malformed", "the callee's sidecar could not read the signature"),
    ("signature_duplicate", "the request had two signatures of sidecars"),
    (
        "signature_unknown_key",
        "the callee's sidecar does not know the key: run `kiro certs` so that both have the same edge secrets",
    ),
    ("signature_algorithm", "the signature names another algorithm than the mesh's"),
    ("signature_component", "the signature does not cover what it must"),
    (
        "signature_mismatch",
        "something was changed on the way, or the two sidecars have different edge secrets",
    ),
    ("signature_expired", "the signature was too old: compare the clocks of both hosts"),
    ("signature_not_yet_valid", "the signature was from the future: compare the clocks of both hosts"),
    ("signature_replayed", "the same request came twice on one connection"),
    ("signature_digest", "the body is not the one that was signed"),
    ("signature_trailers", "the body did not end with a signature that holds"),
    (
        "edge_secret_missing",
        "this sidecar has no secret for the edge: run `kiro certs` after adding a service",
    ),
    ("queue_full", "too many requests wait for this service, or are under way at its application"),
    ("name_unresolved", "DNS does not know the service: is its pod running? `docker compose ps`"),
    (
        "upstream_connect",
        "nobody accepts connections on the mesh port of the service's pod: is its sidecar running?",
    ),
    ("upstream_reset", "the callee's sidecar broke off without an answer: see its log"),
    ("upstream_timeout", "no answer within the service's `traffic.timeout`"),
    ("app_connect", "the callee's sidecar is there, but its application does not accept connections"),
    ("app_reset", "the callee's application broke off without an answer"),
    ("app_timeout", "the callee's application did not answer in time"),
    ("app_no_upgrade", "the application answered a WebSocket handshake as if it were any request"),
    (
        "app_unready",
        "the application fails its health check (`health` in the mesh file), so its sidecar lets nothing through: see `kiro health` there",
    ),
    (
        "deadline_over",
        "the caller had already given up: `x-kiro-deadline` or `grpc-timeout` said that no time was left",
    ),
    (
        "breaker_open",
        "the service has failed too often: it is left alone until `Retry-After`, then tried again",
    ),
    (
        "rate_limited",
        "the caller has had its share: a line of `limits` in the mesh file says how many, the callee's log which line, and `Retry-After` when to ask again",
    ),
    (
        "overloaded",
        "the callee's application has as many requests under way as its `traffic.concurrency` allows, and too many wait",
    ),
    (
        "fault_injected",
        "nothing is broken: the mesh file's `faults` ask for it, with this status or the one that stands there",
    ),
    ("tls_no_certificate", "a peer showed no certificate"),
    (
        "tls_unknown_issuer",
        "a peer's certificate is from another authority: run `kiro certs` and give both sides the same certs/",
    ),
    ("tls_expired", "a peer's certificate is over: run `kiro certs`"),
    ("tls_not_yet_valid", "a peer's certificate is not valid yet: compare the clocks of both hosts"),
    (
        "tls_wrong_identity",
        "the peer is another service than the one that was called: see the sidecar's log for which",
    ),
    ("tls_trust_domain", "the peer belongs to another mesh: see `trust_domain`"),
    ("tls_app_leaf", "an application's certificate where only a sidecar's may stand"),
    ("tls_version", "the peer speaks no TLS 1.3"),
    ("tls_alpn", "the peer does not speak the mesh's protocol: is it a sidecar?"),
    ("tls_peer_refused", "the peer refused our certificate: its log says why"),
    ("tls_closed", "the peer closed the connection during the handshake"),
    ("tls_plain_http", "the other end does not speak TLS: does `app.tls` fit the application?"),
    ("tls_timeout", "the TLS handshake did not end in time"),
    ("tls_other", "the TLS handshake failed: the sidecar's log says why"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_a_sidecar_has_a_meaning_and_there_is_no_other() {
        let known: Vec<_> = MEANINGS.iter().map(|(code, _)| *code).collect();
        assert_eq!(known, kiro_proxy::CODES);
        assert!(of("no_such_code").contains("does not know"));
    }

    /// What the documentation says of the codes is written from the code: `UPDATE_DOCS=1 cargo test -p kiro-cli meaning` does it.
    #[test]
    fn the_documentation_lists_the_codes() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reject-codes.md");
        let rows: String = MEANINGS
            .iter()
            .filter_map(|(code, meaning)| kiro_proxy::by_code(code).map(|reject| (code, meaning, reject)))
            .map(|(code, meaning, reject)| {
                let origin = format!("{:?}", reject.origin()).to_lowercase();
                let meaning = meaning.replace('|', "\\|");
                format!("| `{code}` | {} | {origin} | {meaning} |\n", reject.status().as_u16())
            })
            .collect();
        let text = format!("{DOCUMENT}{rows}");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == text,
            "docs/reject-codes.md has drifted: UPDATE_DOCS=1 cargo test -p kiro-cli meaning"
        );
    }

    const DOCUMENT: &str = "\
# Reject codes

A request that a sidecar refuses is answered with a status and one of these codes in `x-kiro-reject`, and nothing more. The cause is in the
log of the sidecar that refused: its access line has the same code in `reject` and the cause in `reject_cause`. The origin says whose fault
it is: the request's (`client`), the sidecar's at the moment (`proxy`), or that of what stands behind it (`upstream`).

| code | status | origin | meaning |
|---|---|---|---|
";
}
