//! What do the services say, and to whom do they speak, when nothing is in their way?

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use kiro_demo::Service;
use serde_json::{Value, json};

use crate::support::{Mesh, Plan};

/// Both kinds of loopback legs give the same answers.
async fn each_mesh(check: impl AsyncFn(&Mesh)) {
    for mutual in [false, true] {
        let mesh = Mesh::start(Plan::new(mutual)).await;
        check(&mesh).await;
    }
}

#[tokio::test]
async fn users_who_are_fine_get_their_dashboard() {
    each_mesh(async |mesh| {
        let alice = mesh.get(Service::Dashboard, "/dashboard/alice").await;
        assert_eq!(alice.status, 200);
        assert_eq!(
            alice.json(),
            json!({
                "user": "alice",
                "profile": { "user": "alice", "name": "Alice Liddell", "team": "Cartography" },
                "sessions": { "user": "alice", "sessions": 2, "last_login": "2026-03-02T08:14:09Z" },
            })
        );
        let bob = mesh.get(Service::Dashboard, "/dashboard/bob").await;
        assert_eq!((bob.status, &bob.json()["profile"]["name"]), (200, &json!("Bob Cratchit")));
    })
    .await;
}

#[tokio::test]
async fn auth_has_the_word_on_other_users() {
    each_mesh(async |mesh| {
        let mallory = mesh.get(Service::Dashboard, "/dashboard/mallory").await;
        assert_eq!(mallory.status, 403);
        assert_eq!(
            mallory.json(),
            json!({ "error": "user is disabled", "said_by": "auth", "status": 403, "user": "mallory" })
        );
        let nobody = mesh.get(Service::Dashboard, "/dashboard/nobody").await;
        assert_eq!(nobody.status, 404);
        assert_eq!(
            nobody.json(),
            json!({ "error": "no such user", "said_by": "auth", "status": 404, "user": "nobody" })
        );
    })
    .await;
}

#[tokio::test]
async fn nobody_is_asked_about_a_malformed_name() {
    let mesh = Mesh::start(Plan::new(false)).await;
    let long = "a".repeat(33);
    for name in ["Alice", "al%20ice", "..%2fauth", "%ff", "a%00", "-a", &long] {
        for (service, path) in [
            (Service::Dashboard, format!("/dashboard/{name}")),
            (Service::Profile, format!("/profiles/{name}")),
            (Service::Auth, format!("/sessions/{name}")),
        ] {
            let answer = mesh.get(service, &path).await;
            assert_eq!(answer.word(), (400, service.name().to_owned()), "{path}");
            assert!(answer.json()["error"].as_str().unwrap().contains("a user name is"), "{path}");
        }
    }
    assert!(mesh.seen().is_empty());
}

#[tokio::test]
async fn calls_go_to_the_proxy_in_absolute_form_under_the_callees_name() {
    let mesh = Mesh::start(Plan::new(false)).await;
    mesh.get(Service::Dashboard, "/dashboard/alice").await;
    let mut calls: Vec<_> = mesh
        .seen()
        .iter()
        .map(|seen| {
            assert!(seen.headers.contains_key("traceparent"));
            let host = seen.headers["host"].to_str().unwrap();
            (seen.caller.name(), format!("{} {} host={host}", seen.method, seen.uri))
        })
        .collect();
    calls.sort();
    assert_eq!(
        calls,
        [
            ("dashboard", "GET http://auth/sessions/alice host=auth".to_owned()),
            ("dashboard", "GET http://profile/profiles/alice host=profile".to_owned()),
            ("profile", "POST http://auth/verify host=auth".to_owned()),
        ]
    );
}

#[tokio::test]
async fn connections_to_the_proxy_are_used_again() {
    let mesh = Mesh::start(Plan::new(true)).await;
    for _ in 0..10 {
        assert_eq!(mesh.get(Service::Dashboard, "/dashboard/alice").await.status, 200);
    }
    assert_eq!(mesh.seen().len(), 30);
    // Dashboard to Profile, Dashboard to Auth, Profile to Auth.
    assert_eq!(mesh.connections(), 3);
}

#[tokio::test]
async fn every_service_is_healthy_and_knows_its_paths_and_methods() {
    each_mesh(async |mesh| {
        for service in Service::ALL {
            let health = mesh.get(service, "/healthz").await;
            assert_eq!(
                (health.status, health.json()),
                (200, json!({ "status": "ok", "service": service.name() }))
            );
            assert_eq!(mesh.get(service, "/nothing").await.word(), (404, service.name().to_owned()));
            let post = Request::post("/healthz").body(Full::default()).unwrap();
            assert_eq!(mesh.ask(service, post).await.word(), (405, service.name().to_owned()));
        }
    })
    .await;
}

async fn verify(mesh: &Mesh, kind: &str, body: impl Into<Bytes>) -> (u16, Value) {
    let request = Request::post("/verify").header("content-type", kind).body(Full::new(body.into())).unwrap();
    let answer = mesh.ask(Service::Auth, request).await;
    (answer.status, answer.json())
}

#[tokio::test]
async fn verify_takes_a_small_json_object_with_a_user() {
    let mesh = Mesh::start(Plan::new(false)).await;
    let json = "application/json";
    assert_eq!(
        verify(&mesh, json, r#"{"user":"bob"}"#).await,
        (200, json!({ "user": "bob", "verified": true }))
    );
    let large = format!(r#"{{"user":"{}"}}"#, "a".repeat(5000));
    for (kind, body, status) in [
        (json, "", 400),
        (json, "{", 400),
        (json, "[]", 400),
        (json, r#"{"user":7}"#, 400),
        (json, r#"{"user":"../x"}"#, 400),
        (json, r#"{"user":"bob","admin":true}"#, 400),
        ("text/plain", r#"{"user":"bob"}"#, 415),
        (json, large.as_str(), 413),
        (json, r#"{"user":"mallory"}"#, 403),
        (json, r#"{"user":"nobody"}"#, 404),
    ] {
        let (got, answer) = verify(&mesh, kind, body.to_owned()).await;
        assert_eq!((got, &answer["said_by"]), (status, &json!("auth")), "{body:.40}: {answer}");
    }
}

#[tokio::test]
async fn the_page_is_one_document_under_its_own_policy() {
    let mesh = Mesh::start(Plan::new(false)).await;
    let page = mesh.get(Service::Dashboard, "/").await;
    assert_eq!(page.status, 200);
    assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'; style-src 'sha256-"), "{policy}");
    assert!(!policy.contains("unsafe"), "{policy}");
    let html = String::from_utf8(page.body.to_vec()).unwrap();
    for path in ["/dashboard/alice", "/dashboard/mallory", "/dashboard/nobody", "/try/denied"] {
        assert!(html.contains(path), "{path}");
    }
}
