//! When a call does not get through, does the person hear whose word that was?

use std::time::Duration;

use kiro_demo::Service;
use serde_json::json;

use crate::support::{Action, Mesh, OutboundLeaf, Pki, Plan, Seen, index, listener, options, send};

fn is_call(seen: &Seen, caller: Service, callee: &str) -> bool {
    seen.caller == caller && seen.uri.host() == Some(callee)
}

fn reject(status: u16, code: &'static str) -> Action {
    // The mesh's body is for people who use curl; the field is what counts.
    Action::Answer(status, Some(code), "kiro: refused\n".to_owned())
}

#[tokio::test]
async fn what_the_mesh_says_is_told_apart() {
    for mutual in [false, true] {
        for (status, code) in
            [(401, "signature_mismatch"), (403, "policy_path"), (502, "connect_failed"), (503, "no_endpoint")]
        {
            let plan = Plan::new(mutual).rule(move |seen| {
                if is_call(seen, Service::Dashboard, "profile") {
                    reject(status, code)
                } else {
                    Action::Forward
                }
            });
            let answer = Mesh::start(plan).await.get(Service::Dashboard, "/dashboard/alice").await;
            assert_eq!(answer.status, status);
            assert_eq!(
                answer.json(),
                json!({
                    "error": "the mesh did not carry the call from dashboard to profile",
                    "said_by": "mesh",
                    "status": status,
                    "reject": code,
                    "call": "dashboard > profile",
                })
            );
        }
    }
}

#[tokio::test]
async fn a_refusal_deeper_inside_comes_out_unchanged() {
    let plan = Plan::new(true).rule(|seen| {
        if is_call(seen, Service::Profile, "auth") { reject(403, "policy_method") } else { Action::Forward }
    });
    let answer = Mesh::start(plan).await.get(Service::Dashboard, "/dashboard/alice").await;
    assert_eq!(answer.word(), (403, "mesh".to_owned()));
    assert_eq!(answer.json()["call"], "profile > auth");
    assert_eq!(answer.json()["reject"], "policy_method");
}

#[tokio::test]
async fn a_person_can_try_what_the_mesh_denies() {
    let plan = Plan::new(false).rule(|seen| match (seen.method.as_str(), seen.uri.path()) {
        (_, path) if path.starts_with("/internal/") => reject(403, "policy_path"),
        ("DELETE", _) => reject(403, "policy_method"),
        _ => Action::Forward,
    });
    let mesh = Mesh::start(plan).await;
    for (name, status, code) in [
        ("denied", 403, "policy_path"),
        ("method", 403, "policy_method"),
        ("stranger", 404, "unknown_service"),
    ] {
        let answer = mesh.get(Service::Dashboard, &format!("/try/{name}")).await;
        assert_eq!(answer.word(), (status, "mesh".to_owned()), "{name}");
        assert_eq!(answer.json()["reject"], code);
    }
    for name in ["nothing", "%ff"] {
        let answer = mesh.get(Service::Dashboard, &format!("/try/{name}")).await;
        assert_eq!(answer.word(), (404, "dashboard".to_owned()), "{name}");
    }
}

#[tokio::test]
async fn without_a_policy_the_service_itself_has_the_word() {
    let mesh = Mesh::start(Plan::new(false)).await;
    assert_eq!(mesh.get(Service::Dashboard, "/try/denied").await.word(), (404, "profile".to_owned()));
    assert_eq!(mesh.get(Service::Dashboard, "/try/method").await.word(), (405, "profile".to_owned()));
}

#[tokio::test]
async fn a_broken_answer_is_said_by_who_got_it() {
    let large = format!("\"{}\"", "a".repeat(65 * 1024));
    let wrong_user = r#"{"user":"bob","verified":true}"#;
    let cases: [(Service, &'static str, u16, String, &str); 5] = [
        (Service::Dashboard, "profile", 200, "no JSON".into(), "profile answered 200 in a form"),
        (Service::Dashboard, "auth", 200, r#"{"user":"alice"}"#.into(), "auth answered 200 in a form"),
        (Service::Dashboard, "profile", 500, "<html>".into(), "profile answered 500 in a form"),
        (Service::Dashboard, "profile", 200, large, "longer than 65536 bytes"),
        (Service::Profile, "auth", 200, wrong_user.into(), "auth answered for another user"),
    ];
    for (caller, callee, status, body, error) in cases {
        let plan = Plan::new(false).rule(move |seen| {
            if is_call(seen, caller, callee) {
                Action::Answer(status, None, body.clone())
            } else {
                Action::Forward
            }
        });
        let answer = Mesh::start(plan).await.get(Service::Dashboard, "/dashboard/alice").await;
        assert_eq!(answer.word(), (502, caller.name().to_owned()), "{error}");
        assert!(answer.json()["error"].as_str().unwrap().contains(error), "{}", answer.json());
    }
}

#[tokio::test]
async fn a_call_that_is_not_answered_ends() {
    let mut plan = Plan::new(true).rule(|seen| {
        if is_call(seen, Service::Dashboard, "profile") { Action::Hang } else { Action::Forward }
    });
    plan.call_timeout = Duration::from_millis(200);
    let answer = Mesh::start(plan).await.get(Service::Dashboard, "/dashboard/alice").await;
    assert_eq!(answer.word(), (504, "dashboard".to_owned()));
    assert_eq!(answer.json()["error"], "profile did not answer within 200 ms");

    let plan = Plan::new(true).rule(|seen| {
        if is_call(seen, Service::Dashboard, "profile") { Action::Close } else { Action::Forward }
    });
    let answer = Mesh::start(plan).await.get(Service::Dashboard, "/dashboard/alice").await;
    assert_eq!(answer.word(), (502, "dashboard".to_owned()));
    assert_eq!(answer.json()["error"], "dashboard lost the connection to its outbound proxy");
}

#[tokio::test]
async fn a_proxy_that_is_not_there_is_said_by_the_service() {
    // Bound and dropped: nobody listens there.
    let (_, nowhere) = listener().await;
    let (own, address) = listener().await;
    tokio::spawn(kiro_demo::serve(Service::Dashboard, options(own, None, nowhere), std::future::pending()));
    let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
    let request =
        http::Request::get("/dashboard/alice").header("host", "x").body(Default::default()).unwrap();
    let response = send(tcp, request).await.unwrap();
    assert_eq!(response.status(), 502);
    let body = http_body_util::BodyExt::collect(response.into_body()).await.unwrap().to_bytes();
    let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(body["error"], "dashboard could not reach its outbound proxy");
    assert_eq!(body["said_by"], "dashboard");
}

#[tokio::test]
async fn a_proxy_with_another_identity_gets_no_request() {
    let impostors: [(&str, OutboundLeaf); 4] = [
        (
            "another service's sidecar",
            Box::new(|pki, service| pki.leaf(Service::ALL[(index(service) + 1) % 3].name())),
        ),
        ("the application's own leaf", Box::new(|pki, service| pki.app(service))),
        ("another CA", Box::new(|_, service| Pki::new().leaf(service.name()))),
        (
            "an expired leaf",
            Box::new(|pki, service| {
                pki.leaf_with(service.name(), |params| params.not_after = rcgen::date_time_ymd(2020, 1, 1))
            }),
        ),
    ];
    for (who, leaf) in impostors {
        let mut plan = Plan::new(true);
        plan.outbound_leaf = Some(leaf);
        let mesh = Mesh::start(plan).await;
        let answer = mesh.get(Service::Dashboard, "/dashboard/alice").await;
        assert_eq!(answer.word(), (502, "dashboard".to_owned()), "{who}");
        assert_eq!(answer.json()["error"], "dashboard could not reach its outbound proxy", "{who}");
        assert!(mesh.seen().is_empty(), "{who}");
    }
}
