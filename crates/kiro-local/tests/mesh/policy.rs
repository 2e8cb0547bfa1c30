//! Whom the policy lets through, and that nothing gets round it.

use std::time::{Duration, Instant};

use crate::client::{Client, Refusal, check_line, check_refused};
use crate::support::{Recorder, Spec, World, eventually};

const RESTRICTED: &str = "  - { from: caller, to: callee, methods: [GET], paths: [\"/open/*\"] }";

fn restricted(top: &'static str) -> Spec {
    let mut spec = Spec::pair();
    spec.top = top;
    spec.allow = RESTRICTED;
    spec.services.push(("other", "app: { port: {port} }"));
    spec.services.push(("store", "app: { port: {port}, protocol: tcp }"));
    spec
}

async fn world(top: &'static str) -> (World, [Recorder; 2]) {
    let mut world = World::start(restricted(top)).await;
    let recorders = [world.recorder("callee").await, world.recorder("other").await];
    (world, recorders)
}

/// A request that the caller's side denies: the code is in the log as what the policy said, and nobody else saw the request.
async fn check_denied(world: &World, request: &str, code: &str) {
    let before = world.logs.lines().len();
    let line = check_refused(world, "caller", request, Refusal { status: 403, code, cause: "" }).await;
    assert_eq!((&line["policy"], &line["policy_denial"]), (&"denied".into(), &code.into()), "{line}");
    assert_eq!((&line["attempts"], &line["signature"]), (&0.into(), &"none".into()), "{line}");
    assert_eq!(world.logs.lines().len(), before + 1, "no sidecar but the caller's was asked");
}

fn request(method: &str, url: &str) -> String {
    format!("{method} {url} HTTP/1.1\r\nHost: x\r\n\r\n")
}

#[tokio::test]
async fn what_no_line_allows_is_denied_at_the_caller() {
    let (world, recorders) = world("").await;
    check_denied(&world, &request("GET", "http://other/open/a"), "policy_no_edge").await;
    for method in ["POST", "DELETE", "OPTIONS", "PUT", "TRACE", "get", "PROPFIND"] {
        check_denied(&world, &request(method, "http://callee/open/a"), "policy_method").await;
    }
    for path in ["/", "/open", "/open/", "/shut", "/open/a/b", "/OPEN/a", "/open/a/"] {
        check_denied(&world, &request("GET", &format!("http://callee{path}")), "policy_path").await;
    }
    for path in ["//open/a", "/open//a", "/open/a%2fb", "/open/a%5cb", "/open/a;b", "/open/a\\b"] {
        check_denied(&world, &request("GET", &format!("http://callee{path}")), "policy_ambiguous_path").await;
    }
    assert!(recorders.iter().all(|recorder| recorder.seen().is_empty()));
    let denied = world.rejects("caller", "policy_method").await;
    assert_eq!(denied, 7);
    assert!(world.stop().await);
}

#[tokio::test]
async fn get_allows_head_and_nothing_else() {
    let (world, [recorder, _]) = world("").await;
    for method in ["GET", "HEAD"] {
        let mut client = Client::app_of(&world, "caller").await;
        client.send(request(method, "http://callee/open/%61?shut")).await;
        assert_eq!(client.head().await.status, 200, "{method}");
    }
    let seen: Vec<_> =
        recorder.seen().iter().map(|seen| format!("{} {}", seen.head.method, seen.head.uri)).collect();
    assert_eq!(seen, ["GET /open/%61?shut", "HEAD /open/%61?shut"], "the raw target travels");
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_websocket_is_judged_by_its_path() {
    let (world, recorders) = world("").await;
    let upgrade = |method: &str, path: &str| {
        format!(
            "{method} {path} HTTP/1.1\r\nHost: callee\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
    };
    check_denied(&world, &upgrade("GET", "/shut"), "policy_path").await;
    check_denied(&world, &upgrade("GET", "http://other/open/a"), "policy_no_edge").await;
    let expected = Refusal { status: 400, code: "upgrade_unsupported", cause: "websocket" };
    check_refused(&world, "caller", upgrade("POST", "/open/a"), expected).await;
    assert!(recorders.iter().all(|recorder| recorder.seen().is_empty()));
    assert!(world.stop().await);
}

#[tokio::test]
async fn connect_does_not_get_round_method_and_path() {
    let (world, [callee, other]) = world("").await;
    check_denied(&world, "CONNECT store:1 HTTP/1.1\r\nHost: store:1\r\n\r\n", "policy_no_edge").await;

    let mut client = Client::app_of(&world, "caller").await;
    client.send("CONNECT callee:80 HTTP/1.1\r\nHost: callee:80\r\n\r\n").await;
    assert_eq!(client.head().await.status, 200);
    // Each request inside is judged by itself, whatever the tunnel was opened for.
    for (inside, code) in [
        ("POST /open/a HTTP/1.1\r\nHost: callee\r\nContent-Length: 0\r\n\r\n", "policy_method"),
        ("GET /shut HTTP/1.1\r\nHost: callee\r\n\r\n", "policy_path"),
        ("GET /open/a HTTP/1.1\r\nHost: other\r\n\r\n", "policy_no_edge"),
    ] {
        let before = world.logs.lines().len();
        assert_eq!(client.exchange(inside).await.verdict(), (403, Some(code)), "{inside}");
        check_line(&world, "caller", before, inside, Refusal { status: 403, code, cause: "" }).await;
    }
    assert!(callee.seen().is_empty());
    assert_eq!(client.exchange("GET /open/a HTTP/1.1\r\nHost: callee\r\n\r\n").await.status, 200);
    assert_eq!(callee.only().head.headers["x-kiro-caller"], "caller");
    let nested = client.exchange("CONNECT store:1 HTTP/1.1\r\nHost: store:1\r\n\r\n").await;
    assert_eq!(nested.verdict(), (400, Some("upgrade_unsupported")));
    assert!(other.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn audit_lets_pass_and_says_what_it_would_not_have() {
    let (world, [callee, other]) = world("mode: audit").await;
    for (method, url, code) in [
        ("POST", "http://callee/open/a", Some("policy_method")),
        ("GET", "http://callee/shut", Some("policy_path")),
        ("GET", "http://other/", Some("policy_no_edge")),
        ("GET", "http://callee/open/a", None),
    ] {
        let before = world.logs.lines().len();
        let mut client = Client::app_of(&world, "caller").await;
        let answer = client.exchange(request(method, url)).await;
        assert_eq!(answer.verdict(), (200, None), "{method} {url}");
        for direction in ["inbound", "outbound"] {
            let line = world.logs.wait_for_after(before, url, |line| line["direction"] == direction).await;
            let policy = if code.is_some() { "audited" } else { "allowed" };
            assert_eq!(line["policy"], policy, "{line}");
            assert_eq!(line.get("policy_denial").and_then(|code| code.as_str()), code, "{line}");
            assert_eq!(line.get("reject"), None, "{line}");
        }
    }
    assert_eq!((callee.seen().len(), other.seen().len()), (3, 1));
    // What is no question of policy is refused in any mode.
    let expected = Refusal { status: 400, code: "path_invalid", cause: "dot segment" };
    check_refused(&world, "caller", request("GET", "http://callee/open/.."), expected).await;
    assert_eq!(callee.seen().len(), 3);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_change_holds_within_a_second_on_an_open_connection() {
    let (world, [recorder, _]) = world("").await;
    let mut client = Client::app_of(&world, "caller").await;
    let mut took = Vec::new();
    // Measured a few times, since a loaded machine can be late once.
    for round in 0..3 {
        for (lines, status) in [("  - { from: caller, to: other }", 403), (RESTRICTED, 200)] {
            world.allow(lines);
            let begin = Instant::now();
            let client = tokio::sync::Mutex::new(&mut client);
            eventually("the new line holds", || async {
                let request = "GET http://callee/open/a HTTP/1.1\r\nHost: callee\r\n\r\n";
                client.lock().await.exchange(request).await.status == status
            })
            .await;
            took.push((round, status, begin.elapsed()));
        }
    }
    for status in [200, 403] {
        let fastest = took.iter().filter(|took| took.1 == status).map(|took| took.2).min().unwrap();
        assert!(fastest < Duration::from_secs(1), "{took:?}");
    }
    let before = recorder.seen().len();
    let expected = Refusal { status: 403, code: "policy_method", cause: "" };
    check_refused(&world, "caller", request("POST", "http://callee/open/a"), expected).await;
    assert_eq!(recorder.seen().len(), before);
    assert!(world.stop().await);
}
