//! What a service gets copies of, and what the originals notice of it: nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use kiro_telemetry::trace::Sampler;
use serde_json::Value;
use tokio::sync::Semaphore;

use crate::client::Client;
use crate::support::{Answer, Spec, World, eventually};
use crate::traces::{attribute, traced};

const ENTRY: &str = "app: { port: {port} }";

/// `callee-v2` gets copies of what `caller` and `narrow` ask of `callee`; `narrow` may do less with it.
fn spec() -> Spec {
    Spec {
        top: "mirrors: [{ to: callee, copy_to: callee-v2, percent: 100 }]",
        services: vec![("caller", ENTRY), ("narrow", ENTRY), ("callee", ENTRY), ("callee-v2", ENTRY)],
        allow: "  - { from: caller, to: callee }\n  - { from: caller, to: callee-v2 }\n  \
                - { from: narrow, to: callee }\n  - { from: narrow, to: callee-v2, methods: [PUT] }",
    }
}

async fn post(world: &World, service: &str, body: &str) -> Answer {
    let length = body.len();
    let request = format!(
        "POST http://callee/a?b=c HTTP/1.1\r\nHost: callee:80\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    Answer::parse(&world.raw_outbound(service, request.as_bytes()).await)
}

fn is_copy(line: &Value) -> bool {
    line["direction"] == "outbound" && line["copy_of"] == "callee"
}

async fn copies(world: &World, word: &str) -> u64 {
    world.metric("caller", &format!("kiro_copies_total{{to=\"callee-v2\",copy=\"{word}\"}}")).await
}

#[tokio::test]
async fn a_copy_arrives_signed_and_marked() {
    let (mut world, kept) = traced(spec(), Sampler::PARENT_BASED_ALWAYS_ON).await;
    let original = world.recorder("callee").await;
    let copy = world.recorder("callee-v2").await;
    let answer = post(&world, "caller", "the body").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "recorded"));
    eventually("the copy", || async { copy.seen().len() == 1 }).await;
    let (original, copy) = (original.only(), copy.only());
    assert_eq!((&copy.head.method, &copy.head.uri), (&original.head.method, &original.head.uri));
    assert_eq!((&copy.body, copy.whole), (&original.body, true));
    assert_eq!(original.body, "the body");
    assert_eq!(copy.head.headers["host"], "callee-v2");
    let line = world.logs.wait_for("of the copy", is_copy).await;
    let said = ["callee", "signature", "policy"].map(|field| line[field].as_str().unwrap());
    assert_eq!((said, line["status"].as_u64()), (["callee-v2", "signed", "allowed"], Some(200)), "{line}");
    let of_copy = |line: &Value| line["direction"] == "inbound" && line["callee"] == "callee-v2";
    let inbound = world.logs.wait_for("at the copy's service", of_copy).await;
    assert_eq!(inbound["signature"], "verified", "{inbound}");
    let plain = |line: &Value| line["direction"] == "outbound" && line["callee"] == "callee";
    let first = world.logs.wait_for("of the original", plain).await;
    assert_eq!(first.get("copy_of"), None, "{first}");
    // One trace: the copy's span is below the original's.
    let spans = kept.trace(first["trace_id"].as_str().unwrap(), 4).await;
    let marked: Vec<_> = spans.iter().filter(|span| attribute(span, "kiro.copy_of").is_some()).collect();
    let [marked] = marked.as_slice() else { panic!("{spans:#?}") };
    assert_eq!(attribute(marked, "kiro.copy_of").as_deref(), Some("callee"));
    assert_eq!(marked.parent_span_id.to_string(), first["span_id"].as_str().unwrap());
    assert_eq!(copies(&world, "answered").await, 1);
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_original_does_not_notice_that_nobody_takes_its_copy() {
    let mut world = World::start(spec()).await;
    let original = world.recorder("callee").await;
    // The copy's application is not there, and later its sidecar is not either.
    assert_eq!(post(&world, "caller", "first").await.status, 200);
    let line = world.logs.wait_for("of the copy", is_copy).await;
    assert_eq!(line["reject"], "app_connect", "{line}");
    let sidecar = world.mesh.sidecars.remove("callee-v2").unwrap();
    sidecar.stop().await;
    let before = Instant::now();
    assert_eq!(post(&world, "caller", "second").await.status, 200);
    assert!(before.elapsed() < Duration::from_secs(2), "{:?}", before.elapsed());
    eventually("both failed", || async { copies(&world, "failed").await == 2 }).await;
    assert_eq!(original.seen().len(), 2);
    assert!(world.stop().await);
}

#[tokio::test]
async fn copies_that_stand_still_are_few_and_hold_nobody_up() {
    let mut world = World::start(spec()).await;
    let original = world.recorder("callee").await;
    let leave = Arc::new(Semaphore::new(0));
    let waiting = Arc::clone(&leave);
    world
        .app("callee-v2", move |_| {
            let waiting = Arc::clone(&waiting);
            async move {
                waiting.acquire().await.unwrap().forget();
                Response::new(Full::new(Bytes::new()))
            }
        })
        .await;
    let mut client = Client::app_of(&world, "caller").await;
    for _ in 0..20 {
        assert_eq!(client.exchange("GET http://callee/a HTTP/1.1\r\nHost: callee\r\n\r\n").await.status, 200);
    }
    // Sixteen are under way at the one worker; of four more there are no copies.
    assert_eq!((original.seen().len(), copies(&world, "too_many").await), (20, 4));
    leave.add_permits(16);
    eventually("answers", || async { copies(&world, "answered").await == 16 }).await;
    // Their places are free again.
    leave.add_permits(1);
    assert_eq!(client.exchange("GET http://callee/a HTTP/1.1\r\nHost: callee\r\n\r\n").await.status, 200);
    eventually("another answer", || async { copies(&world, "answered").await == 17 }).await;
    assert_eq!(copies(&world, "too_many").await, 4);
    assert!(world.stop().await);
}

#[tokio::test]
async fn the_policy_judges_copies() {
    let mut world = World::start(spec()).await;
    let _original = world.recorder("callee").await;
    let copy = world.recorder("callee-v2").await;
    assert_eq!(post(&world, "narrow", "x").await.status, 200);
    let line = world.logs.wait_for("of the copy", is_copy).await;
    assert_eq!(
        (line["policy"].as_str(), line["reject"].as_str()),
        (Some("denied"), Some("policy_method")),
        "{line}"
    );
    // By its own sidecar: nothing was sent that the other one would have refused as well.
    assert_eq!(line["attempts"], 0, "{line}");
    assert!(copy.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_body_that_is_not_held_has_no_copy() {
    let mut world = World::start(spec()).await;
    let original = world.recorder("callee").await;
    let copy = world.recorder("callee-v2").await;
    assert_eq!(post(&world, "caller", &"x".repeat(64 * 1024 + 1)).await.status, 200);
    assert_eq!(copies(&world, "streamed").await, 1);
    assert_eq!((original.only().body.len(), copy.seen().len()), (64 * 1024 + 1, 0));
    assert!(world.stop().await);
}

#[tokio::test]
async fn copies_begin_and_end_with_the_file() {
    let mut world = World::start(spec()).await;
    let _original = world.recorder("callee").await;
    let copy = world.recorder("callee-v2").await;
    let text = std::fs::read_to_string(world.mesh_file()).unwrap();
    world.rewrite(&text.replace("mirrors: [{ to: callee, copy_to: callee-v2, percent: 100 }]", ""));
    eventually("the new state", || async {
        world.admin("caller", "/config").await.body.contains("\"generation\": 2")
    })
    .await;
    assert_eq!(post(&world, "caller", "x").await.status, 200);
    assert!(copy.seen().is_empty());
    world.rewrite(&text);
    eventually("a copy", || async {
        assert_eq!(post(&world, "caller", "x").await.status, 200);
        !copy.seen().is_empty()
    })
    .await;
    assert!(world.stop().await);
}
