//! What a person sees of the mesh: answers, refusals with their reason, and the log.

use std::time::Duration;

use serde_json::Value;

use crate::support::{PODS, curl, every_container, ingress, inspect, kiro, logs, port, wait_for};

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn a_persons_request_passes_through_all_three_services() {
    let (status, body) = curl(&[&ingress("/dashboard/alice")]);
    assert_eq!(status, 200, "{body}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&answer["user"], &answer["sessions"]["user"]), (&"alice".into(), &"alice".into()), "{body}");
    assert_eq!(curl(&[&ingress("/dashboard/mallory")]).0, 403);
    assert_eq!(curl(&[&ingress("/dashboard/nobody")]).0, 404);
    let (status, page) = curl(&[&ingress("/")]);
    assert!(status == 200 && page.contains("<html"), "{status} {page}");
}

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn the_ingress_speaks_tls_with_a_leaf_of_the_meshs_authority() {
    let url = format!("https://localhost:{}/dashboard/alice", port("KIRO_HTTPS_PORT", 8443));
    assert_eq!(curl(&["--cacert", "certs/ca/ca.pem", &url]).0, 200);
}

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn a_person_calls_from_within_a_pod_and_learns_why_not() {
    let allowed = kiro("profile-1-proxy", &["call", "http://auth/verify", "-d", "{\"user\":\"alice\"}"]);
    assert_eq!(allowed.code, Some(0), "{}{}", allowed.out, allowed.said);
    assert!(
        allowed.out.starts_with("HTTP/1.1 200 OK") && allowed.out.contains("\"verified\":true"),
        "{}",
        allowed.out
    );

    for (container, line, status, code) in [
        ("auth-proxy", &["call", "http://profile/profiles/alice"][..], "403", "policy_no_edge"),
        (
            "dashboard-proxy",
            &["call", "http://profile/profiles/alice", "-X", "DELETE"],
            "403",
            "policy_method",
        ),
        ("dashboard-proxy", &["call", "http://profile/internal/export"], "403", "policy_path"),
        ("dashboard-proxy", &["call", "http://billing/"], "404", "service_unknown"),
        ("dashboard-proxy", &["call", "http://profile/profiles/../x"], "400", "path_invalid"),
    ] {
        let refused = kiro(container, line);
        assert_eq!(refused.code, Some(22), "{line:?}: {}{}", refused.out, refused.said);
        assert!(refused.out.starts_with(&format!("HTTP/1.1 {status} ")), "{line:?}: {}", refused.out);
        assert!(refused.out.contains(&format!("x-kiro-reject: {code}\n  ")), "{line:?}: {}", refused.out);
    }
}

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn every_sidecar_finds_nothing_wrong() {
    for pod in PODS {
        let checked = kiro(&format!("{pod}-proxy"), &["check"]);
        assert_eq!(checked.code, Some(0), "{pod}:\n{}{}", checked.out, checked.said);
    }
    let dashboard = kiro("dashboard-proxy", &["check"]).out;
    assert!(dashboard.contains("mutual TLS with spiffe://kiro.mesh/profile"), "{dashboard}");
}

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn from_another_pod_nothing_but_the_mesh_port_and_health_can_be_reached() {
    let networks = &inspect("auth-pod")["NetworkSettings"]["Networks"];
    let (_, network) = networks.as_object().unwrap().iter().next().unwrap();
    let address = network["IPAddress"].as_str().unwrap();
    for (port, open) in
        [(15006, true), (15020, true), (8003, false), (15000, false), (15001, false), (15021, false)]
    {
        let asked = kiro("profile-1-proxy", &["probe", "tcp", &format!("{address}:{port}")]);
        assert_eq!(asked.code, Some(i32::from(!open)), "{port}: {}", asked.out);
    }
}

#[test]
#[ignore = "needs the containers: docker/test runs it"]
fn each_request_and_each_certificate_is_a_line_of_json_and_no_secret_is() {
    let path = "/dashboard/bob";
    let (status, body) = curl(&[&ingress(path)]);
    assert_eq!(status, 200, "{body}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    let replica = answer["profile"]["replica"].as_str().unwrap();
    let lines = |pod: &str| -> Vec<Value> {
        logs(&format!("{pod}-proxy"))
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{pod}: {line}")))
            .collect()
    };
    let request = wait_for("a line for profile's inbound request", Duration::from_secs(5), || {
        lines(replica)
            .into_iter()
            .find(|line| line["direction"] == "inbound" && line["path"] == "/profiles/bob")
    });
    for (field, value) in
        [("caller", "dashboard"), ("caller_proof", "mtls"), ("signature", "verified"), ("policy", "allowed")]
    {
        assert_eq!(request[field], value, "{request}");
    }
    let verified = lines(replica).into_iter().find(|line| line["message"] == "certificate verified");
    assert!(verified.is_some(), "no line of a verified certificate");

    let all: String = every_container().iter().map(|container| logs(container)).collect();
    let edges =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../certs/profile/edges.json"))
            .unwrap();
    let edges: Value = serde_json::from_str(&edges).unwrap();
    for edge in edges["edges"].as_array().unwrap() {
        assert!(!all.contains(edge["secret"].as_str().unwrap()), "an edge secret is in the log");
    }
    assert!(!all.contains("PRIVATE KEY"));
}
