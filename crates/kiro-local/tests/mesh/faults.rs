//! What goes wrong because the mesh file asks for it, and who can see that.

use std::time::{Duration, Instant};

use kiro_telemetry::trace::Sampler;
use serde_json::Value;

use crate::support::{Answer, Spec, World, events, eventually};
use crate::traces::{attribute, traced};

/// Two callers with different rights, and these lines of `faults`.
fn spec(faults: &'static str) -> Spec {
    let entry = "app: { port: {port} }";
    Spec {
        top: faults,
        services: vec![("caller", entry), ("other", entry), ("callee", entry)],
        allow: "  - { from: caller, to: callee, methods: [GET, POST] }\n  - { from: other, to: callee }",
    }
}

const ALL_ABORTED: &str = "faults: [{ from: caller, to: callee, methods: [GET], paths: [\"/a/*\"], abort: 418, abort_percent: 100 }]";

async fn get(world: &World, service: &str, path: &str) -> Answer {
    world.get(service, &format!("http://callee{path}")).await
}

fn outbound(line: &Value) -> bool {
    line["direction"] == "outbound"
}

#[tokio::test]
async fn an_abort_is_answered_marked_and_goes_no_further() {
    let (mut world, kept) = traced(spec(ALL_ABORTED), Sampler::PARENT_BASED_ALWAYS_ON).await;
    let recorder = world.recorder("callee").await;
    let answer = get(&world, "caller", "/a/b").await;
    assert_eq!(answer.verdict(), (418, Some("fault_injected")));
    let line = world.logs.wait_for("outbound", outbound).await;
    let said = ["fault", "reject", "callee", "policy"].map(|field| line[field].as_str().unwrap());
    assert_eq!(said, ["abort", "fault_injected", "callee", "allowed"], "{line}");
    assert_eq!((&line["status"], &line["attempts"]), (&Value::from(418), &Value::from(0)));
    let spans = kept.trace(line["trace_id"].as_str().unwrap(), 1).await;
    assert_eq!(attribute(&spans[0], "kiro.fault").as_deref(), Some("abort"));
    assert!(recorder.seen().is_empty());
    assert_eq!(world.metric("caller", "kiro_faults_total{to=\"callee\",fault=\"abort\"}").await, 1);
    // Nothing else is touched: another path, another method, another caller.
    assert_eq!(get(&world, "caller", "/b").await.status, 200);
    let post = "POST http://callee/a/b HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    assert_eq!(Answer::parse(&world.raw_outbound("caller", post.as_bytes()).await).status, 200);
    assert_eq!(get(&world, "other", "/a/b").await.status, 200);
    let unmarked = |line: &Value| outbound(line) && line.get("fault").is_none();
    world.logs.wait_for("of another request", unmarked).await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn the_policy_speaks_first() {
    let faults = "faults: [{ from: \"*\", to: callee, abort: 503, abort_percent: 100 }]";
    let world = World::start(spec(faults)).await;
    let put = "PUT http://callee/a HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let answer = Answer::parse(&world.raw_outbound("caller", put.as_bytes()).await);
    assert_eq!(answer.verdict(), (403, Some("policy_method")));
    for service in ["caller", "other"] {
        assert_eq!(get(&world, service, "/").await.verdict(), (503, Some("fault_injected")));
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_delay_comes_before_the_request_goes_on() {
    let faults = "faults: [{ from: caller, to: callee, delay: 300ms, delay_percent: 100 }]";
    let mut world = World::start(spec(faults)).await;
    let recorder = world.recorder("callee").await;
    let begin = Instant::now();
    assert_eq!(get(&world, "caller", "/a").await.status, 200);
    assert!(begin.elapsed() >= Duration::from_millis(300), "{:?}", begin.elapsed());
    assert_eq!(recorder.seen().len(), 1);
    let line = world.logs.wait_for("outbound", outbound).await;
    assert_eq!((line["fault"].as_str(), line.get("reject")), (Some("delay"), None), "{line}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_delay_ends_with_the_requests_time() {
    let faults = "faults: [{ from: caller, to: callee, delay: 60s, delay_percent: 100 }]";
    let mut world = World::start(spec(faults)).await;
    let recorder = world.recorder("callee").await;
    let begin = Instant::now();
    let hurried =
        "GET http://callee/a HTTP/1.1\r\nHost: x\r\nx-kiro-deadline: 200\r\nConnection: close\r\n\r\n";
    let answer = Answer::parse(&world.raw_outbound("caller", hurried.as_bytes()).await);
    assert_eq!(answer.verdict(), (504, Some("upstream_timeout")));
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    let line = world.logs.wait_for("outbound", outbound).await;
    assert_eq!(line["fault"], "delay", "{line}");
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_part_of_the_requests_is_a_part_of_them() {
    let faults = "faults: [{ from: caller, to: callee, abort: 503, abort_percent: 30 }]";
    let mut world = World::start(spec(faults)).await;
    let _recorder = world.recorder("callee").await;
    let mut client = crate::client::Client::app_of(&world, "caller").await;
    let mut aborted = 0;
    for _ in 0..500 {
        let answer = client.exchange("GET http://callee/a HTTP/1.1\r\nHost: callee\r\n\r\n").await;
        aborted += u32::from(answer.status == 503);
    }
    // 150 are expected, and 10.2 is the standard deviation: more than six of them off is once in a thousand million runs.
    assert!((85..=215).contains(&aborted), "{aborted}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn faults_come_and_go_with_the_file_and_are_told() {
    let events = events();
    let entry = "app: { port: {port} }";
    let mut world = World::start(Spec {
        top: "faults: [{ from: \"*\", to: faulty-callee, delay: 1ms, delay_percent: 0.5, abort: 503, abort_percent: 100 }]",
        services: vec![("faulty-caller", entry), ("faulty-callee", entry)],
        allow: "  - { from: faulty-caller, to: faulty-callee }",
    })
    .await;
    let _recorder = world.recorder("faulty-callee").await;
    let told = |event: &Value| event["target"] == "kiro::faults" && event["service"] == "faulty-caller";
    let event = events.wait_for("at the start", told).await;
    assert_eq!(
        (event["level"].as_str(), event["to"].as_str()),
        (Some("WARN"), Some("faulty-callee")),
        "{event}"
    );
    assert_eq!((event["abort"].as_u64(), event["delay_percent"].as_f64()), (Some(503), Some(0.5)), "{event}");
    let url = "http://faulty-callee/a";
    assert_eq!(world.get("faulty-caller", url).await.verdict(), (503, Some("fault_injected")));
    let with = std::fs::read_to_string(world.mesh_file()).unwrap();
    let without: String =
        with.lines().filter(|line| !line.starts_with("faults:")).map(|line| format!("{line}\n")).collect();
    world.rewrite(&without);
    eventually("no faults", || async { world.get("faulty-caller", url).await.status == 200 }).await;
    let before = events.lines().len();
    world.rewrite(&with);
    eventually("faults", || async { world.get("faulty-caller", url).await.status == 503 }).await;
    events.wait_for_after(before, "at the change", told).await;
    // Whoever does not call has none to tell of.
    let of_callee = |event: &Value| event["target"] == "kiro::faults" && event["service"] == "faulty-callee";
    assert!(!events.lines().iter().any(of_callee));
    assert!(world.stop().await);
}
