//! What goes wrong behind a sidecar, and whether caller and log learn which it was.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::io::AsyncReadExt;

use crate::client::{Client, Refusal, check_line, check_refused};
use crate::support::{Spec, World, eventually};

/// `callee` and `hermit`, whose place only DNS could tell, and does not.
fn spec() -> Spec {
    let mut spec = Spec::pair();
    spec.services[1].1 = "app: { port: {port} }, traffic: { timeout: 300ms }";
    spec.services.push(("kiro-test-hermit-invalid", "app: { port: {port} }{dns}"));
    spec.allow = "  - { from: caller, to: callee }\n  - { from: caller, to: kiro-test-hermit-invalid }";
    spec
}

const GET: &str = "GET http://callee/a HTTP/1.1\r\nHost: callee\r\n\r\n";

#[tokio::test]
async fn each_failure_has_a_code_of_its_own() {
    let mut world = World::start(spec()).await;
    let mut codes = BTreeSet::new();

    let get = "GET http://nobody/ HTTP/1.1\r\nHost: x\r\n\r\n";
    let unknown = Refusal { status: 404, code: "service_unknown", cause: "no such service" };
    check_refused(&world, "caller", get, unknown).await;
    codes.insert(unknown.code);

    let get = "GET http://kiro-test-hermit-invalid/ HTTP/1.1\r\nHost: x\r\n\r\n";
    let unresolved = Refusal { status: 503, code: "name_unresolved", cause: "kiro-test-hermit-invalid" };
    check_refused(&world, "caller", get, unresolved).await;
    codes.insert(unresolved.code);

    // The callee's sidecar knows best, and the caller's says whose word it was.
    let before = world.logs.lines().len();
    let down = Refusal { status: 502, code: "app_connect", cause: "the peer's sidecar said so" };
    check_refused(&world, "caller", GET, down).await;
    let line = world.logs.wait_for_after(before, "inbound", |line| line["direction"] == "inbound").await;
    assert_eq!((&line["status"], &line["reject"]), (&502.into(), &"app_connect".into()), "{line}");
    assert!(
        line["reject_cause"].as_str().unwrap().contains(&world.ports["callee"].app.to_string()),
        "{line}"
    );
    codes.insert(down.code);

    world.app("callee", |_| std::future::pending()).await;
    let before = world.logs.lines().len();
    let slow = Refusal { status: 504, code: "app_timeout", cause: "the peer's sidecar said so" };
    check_refused(&world, "caller", GET, slow).await;
    // Lines of the attempts before may still come.
    let inbound =
        |line: &serde_json::Value| line["direction"] == "inbound" && line["reject"] == "app_timeout";
    let line = world.logs.wait_for_after(before, "inbound", inbound).await;
    assert_eq!(line["status"], 504, "{line}");
    assert!(line["duration_us"].as_u64().unwrap() >= 300_000, "{line}");
    codes.insert(slow.code);

    assert!(world.mesh.sidecars.remove("callee").unwrap().stop().await);
    let nobody = Refusal { status: 502, code: "upstream_connect", cause: "refused" };
    check_refused(&world, "caller", GET, nobody).await;
    codes.insert(nobody.code);

    assert_eq!(codes.len(), 5);
    for code in codes {
        let counted = world.rejects("caller", code).await;
        assert_eq!(counted, 1, "{code}");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_failure_is_over_when_its_reason_is() {
    let mut world = World::start(spec()).await;
    let mut client = Client::app_of(&world, "caller").await;
    assert_eq!(client.exchange(GET).await.verdict(), (502, Some("app_connect")));
    let recorder = world.recorder("callee").await;
    assert_eq!(client.exchange(GET).await.status, 200, "on the same connection");
    recorder.only();
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_that_does_not_speak_http_is_a_bad_gateway() {
    let world = World::start(spec()).await;
    for (says, cause) in [("", "closed"), ("SSH-2.0-OpenSSH_9.9\r\n\r\n", "invalid HTTP")] {
        let listener = world.listen("callee").await;
        let app = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, says.as_bytes()).await.unwrap();
        });
        let before = world.logs.lines().len();
        let expected = Refusal { status: 502, code: "app_reset", cause: "the peer's sidecar said so" };
        check_refused(&world, "caller", GET, expected).await;
        let line = world.logs.wait_for_after(before, "inbound", |line| line["direction"] == "inbound").await;
        assert!(line["reject_cause"].as_str().unwrap().contains(cause), "{line}");
        app.await.unwrap();
    }
    assert!(world.stop().await);
}

/// Counts the requests that an application works on, and its handler's ends.
#[derive(Clone, Default)]
struct Working(Arc<AtomicUsize>);

struct Guard(Working);

impl Working {
    fn begin(&self) -> Guard {
        self.0.fetch_add(1, Ordering::SeqCst);
        Guard(self.clone())
    }

    fn now(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An application that never answers, and what it works on.
async fn silent(world: &mut World) -> Working {
    let working = Working::default();
    let begun = working.clone();
    world
        .app("callee", move |request: Request<Incoming>| {
            let guard = begun.begin();
            async move {
                let _guard = guard;
                match request.into_body().collect().await {
                    Ok(body) => assert!(body.to_bytes().is_empty(), "an end that never came"),
                    Err(_) => return Response::new(Full::default()),
                }
                std::future::pending().await
            }
        })
        .await;
    working
}

/// Sends a request, or a part of one, and goes away once the application works on it; the application must learn of that.
async fn leave(request: impl AsRef<[u8]>) -> World {
    let mut spec = Spec::pair();
    spec.services[1].1 = "app: { port: {port} }, traffic: { timeout: off }";
    let mut world = World::start(spec).await;
    let working = silent(&mut world).await;
    let mut client = Client::app_of(&world, "caller").await;
    client.send(request).await;
    eventually("the application works on it", || async { working.now() == 1 }).await;
    drop(client);
    eventually("the application's connection is closed", || async { working.now() == 0 }).await;
    world
}

async fn check_gone(world: &World, service: &str, direction: &str, class: &str) {
    let line = world.logs.wait_for(direction, |line| line["direction"] == direction).await;
    assert_eq!((&line["service"], &line["status"]), (&service.into(), &499.into()), "{line}");
    assert!(line["reject_cause"].as_str().unwrap().contains("went away"), "{line}");
    let series =
        format!("kiro_requests_total{{from=\"caller\",to=\"callee\",method=\"{class}\",status=\"gone\"}}");
    assert_eq!(world.metric(service, &series).await, 1, "{service}");
}

#[tokio::test]
async fn a_client_that_goes_away_is_recorded_and_frees_the_application() {
    let world = leave(GET).await;
    check_gone(&world, "caller", "outbound", "read").await;
    check_gone(&world, "callee", "inbound", "read").await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_client_that_goes_away_in_a_body_frees_the_application() {
    let head = "POST http://callee/a HTTP/1.1\r\nHost: callee\r\nContent-Length: 1000000\r\n\r\n";
    let world = leave([head.as_bytes(), &[b'a'; 0x10000]].concat()).await;
    // The client may only have ended its half, so there is somebody to tell what was wrong.
    let expected =
        Refusal { status: 400, code: "message_invalid", cause: "end of file before message length" };
    check_line(&world, "caller", 0, "a body that broke off", expected).await;
    check_gone(&world, "callee", "inbound", "write").await;
    assert!(world.stop().await);
}
