//! What a sidecar says of itself, to whom.

use crate::support::{Answer, Spec, World, raw};

async fn ask(address: std::net::SocketAddr, request: &str) -> Answer {
    Answer::parse(&raw(address, request.as_bytes()).await)
}

#[tokio::test]
async fn admin_answers_to_its_own_names_and_changes_nothing() {
    let world = World::start(Spec::pair()).await;
    let admin = world.addresses("caller").admin;
    for (host, status) in [
        ("Host: 127.0.0.1", 200),
        ("Host: localhost:15000", 200),
        ("Host: LOCALHOST", 200),
        ("Host: evil.example", 403),
        ("Host: localhost.evil.example", 403),
        ("Host: 127.0.0.1.evil.example:15000", 403),
        ("Host: caller", 403),
        ("Host: localhost\r\nHost: evil.example", 403),
        ("Accept: */*", 403),
    ] {
        for path in ["/live", "/ready", "/metrics", "/config", "/mesh/health"] {
            let request = format!("GET {path} HTTP/1.1\r\n{host}\r\nConnection: close\r\n\r\n");
            let answer = ask(admin, &request).await;
            assert_eq!(answer.status, status, "{request}");
            assert!(status == 200 || !answer.body.contains("caller"), "{answer:?}");
        }
    }
    for method in ["POST", "PUT", "DELETE", "PATCH"] {
        let request = format!(
            "{method} /config HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        assert_eq!(ask(admin, &request).await.status, 405, "{method}");
    }
    assert_eq!(world.admin("caller", "/quit").await.status, 404);
    assert!(world.stop().await);
}

/// Lines of a key, and the edge secrets, as they stand in their files.
fn secrets(key_pem: &[u8], edges_json: &[u8]) -> Vec<String> {
    let pem = std::str::from_utf8(key_pem).unwrap();
    let mut secrets: Vec<String> =
        pem.lines().filter(|line| !line.starts_with("-----")).map(str::to_owned).collect();
    let edges: serde_json::Value = serde_json::from_slice(edges_json).unwrap();
    let edges = edges["edges"].as_array().unwrap();
    secrets.extend(edges.iter().map(|edge| edge["secret"].as_str().unwrap().to_owned()));
    assert!(secrets.len() > 3 && secrets.iter().all(|secret| secret.len() > 20), "{} secrets", secrets.len());
    secrets
}

#[tokio::test]
async fn config_shows_no_secret() {
    let world = World::start(Spec::pair()).await;
    let config = world.admin("caller", "/config").await.body;
    assert!(config.contains("spiffe://test.mesh/caller"), "{config}");
    assert!(config.contains("caller -> callee: any method, any path"), "{config}");
    let files = &world.mesh.pki.sidecars["caller"];
    for secret in secrets(&files.key_pem, &files.edges_json) {
        assert!(!config.contains(&secret), "a secret is in {config}");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn others_see_health_and_metrics_only_where_they_are_opened() {
    let mut spec = Spec::pair();
    spec.services[1].1 = "app: { port: {port} }, metrics: open";
    let world = World::start(spec).await;
    for (service, path, status) in [
        ("caller", "/live", 200),
        ("caller", "/ready", 200),
        ("caller", "/metrics", 404),
        ("caller", "/config", 404),
        ("callee", "/metrics", 200),
        ("callee", "/config", 404),
    ] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: any\r\nConnection: close\r\n\r\n");
        assert_eq!(ask(world.addresses(service).health, &request).await.status, status, "{service} {path}");
    }
    assert!(world.stop().await);
}
