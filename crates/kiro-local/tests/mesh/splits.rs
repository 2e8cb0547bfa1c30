//! Which version of a service gets a call, and what each end sees of it.

use kiro_telemetry::trace::Sampler;
use serde_json::Value;

use crate::client::Client;
use crate::support::{Answer, Recorder, Spec, World, eventually};
use crate::traces::{attribute, traced};

const ENTRY: &str = "app: { port: {port} }";

/// `caller` may call both versions of `callee`; `narrow` may do less with the second one.
fn spec(splits: &'static str) -> Spec {
    Spec {
        top: splits,
        services: vec![("caller", ENTRY), ("narrow", ENTRY), ("callee", ENTRY), ("callee-v2", ENTRY)],
        allow: "  - { from: caller, to: callee }\n  - { from: caller, to: callee-v2 }\n  \
                - { from: narrow, to: callee }\n  - { from: narrow, to: callee-v2, methods: [POST] }",
    }
}

async fn recorders(world: &mut World) -> [Recorder; 2] {
    [world.recorder("callee").await, world.recorder("callee-v2").await]
}

fn counts(recorders: &[Recorder; 2]) -> [usize; 2] {
    [recorders[0].seen().len(), recorders[1].seen().len()]
}

async fn get(world: &World, fields: &str) -> Answer {
    let request =
        format!("GET http://callee/a HTTP/1.1\r\nHost: callee\r\n{fields}Connection: close\r\n\r\n");
    Answer::parse(&world.raw_outbound("caller", request.as_bytes()).await)
}

fn outbound(line: &Value) -> bool {
    line["direction"] == "outbound"
}

#[tokio::test]
async fn a_version_gets_all_that_its_weight_says_under_its_own_name() {
    let splits = "splits: [{ to: callee, versions: { callee: 0, callee-v2: 100 } }]";
    let (mut world, kept) = traced(spec(splits), Sampler::PARENT_BASED_ALWAYS_ON).await;
    let recorders = recorders(&mut world).await;
    for _ in 0..20 {
        assert_eq!(get(&world, "").await.status, 200);
    }
    assert_eq!(counts(&recorders), [0, 20]);
    // What was asked for is no name of the version's.
    assert_eq!(recorders[1].seen()[0].head.headers["host"], "callee-v2");
    let line = world.logs.wait_for("outbound", outbound).await;
    let said = ["callee", "split", "signature", "policy"].map(|field| line[field].as_str().unwrap());
    assert_eq!(said, ["callee-v2", "callee", "signed", "allowed"], "{line}");
    let spans = kept.trace(line["trace_id"].as_str().unwrap(), 2).await;
    assert_eq!(attribute(&spans[0], "kiro.split").as_deref(), Some("callee"));
    assert_eq!(attribute(&spans[1], "kiro.split"), None);
    let version = world.logs.wait_for("inbound", |line| line["direction"] == "inbound").await;
    assert_eq!(version["callee"], "callee-v2", "{version}");
    // Who names the version itself has not asked for a split.
    assert_eq!(world.get("caller", "http://callee-v2/own").await.status, 200);
    let own = |line: &Value| outbound(line) && line["path"] == "/own";
    let line = world.logs.wait_for("of the own name", own).await;
    assert_eq!(line.get("split"), None, "{line}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn weights_hold_over_many_requests() {
    let splits = "splits: [{ to: callee, versions: { callee: 70, callee-v2: 30 } }]";
    let mut world = World::start(spec(splits)).await;
    let recorders = recorders(&mut world).await;
    let mut client = Client::app_of(&world, "caller").await;
    for _ in 0..500 {
        assert_eq!(client.exchange("GET http://callee/a HTTP/1.1\r\nHost: callee\r\n\r\n").await.status, 200);
    }
    let [first, second] = counts(&recorders);
    // 150 are expected, and 10.2 is the standard deviation.
    assert!(first + second == 500 && (85..=215).contains(&second), "{first} and {second}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_header_decides_before_the_weights() {
    let splits = "splits: [{ to: callee, versions: { callee: 100, callee-v2: 0 }, headers: \
        [{ name: x-canary, equals: \"yes\", to: callee-v2 }, { name: x-user, prefix: test-, to: callee-v2 }] }]";
    let mut world = World::start(spec(splits)).await;
    let recorders = recorders(&mut world).await;
    for (fields, expected) in [
        ("", [1, 0]),
        ("x-canary: yes\r\n", [1, 1]),
        ("x-canary: no\r\n", [2, 1]),
        ("x-user: test-7\r\n", [2, 2]),
        ("x-user: alice\r\n", [3, 2]),
    ] {
        assert_eq!(get(&world, fields).await.status, 200);
        assert_eq!(counts(&recorders), expected, "{fields}");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_user_stays_with_a_version() {
    let splits = "splits: [{ to: callee, versions: { callee: 50, callee-v2: 50 }, sticky: header:x-user }]";
    let mut world = World::start(spec(splits)).await;
    let recorders = recorders(&mut world).await;
    let mut moved = [0, 0];
    for user in 0..16 {
        let before = counts(&recorders);
        for _ in 0..8 {
            assert_eq!(get(&world, &format!("x-user: {user}\r\n")).await.status, 200);
        }
        let after = counts(&recorders);
        let gained = [after[0] - before[0], after[1] - before[1]];
        assert!(gained == [8, 0] || gained == [0, 8], "{user}: {gained:?}");
        moved[usize::from(gained[1] == 8)] += 1;
    }
    // All sixteen alike is once in 32,768; the hash is fixed, and so is the outcome.
    assert!(moved[0] > 0 && moved[1] > 0, "{moved:?}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn the_policy_judges_the_version_that_was_chosen() {
    let splits = "splits: [{ to: callee, versions: { callee: 0, callee-v2: 100 } }]";
    let mut world = World::start(spec(splits)).await;
    let recorders = recorders(&mut world).await;
    // `narrow` may GET from `callee`, and not from the version.
    let answer = world.get("narrow", "http://callee/a").await;
    assert_eq!(answer.verdict(), (403, Some("policy_method")));
    let line = world.logs.wait_for("outbound", outbound).await;
    assert_eq!(
        (line["callee"].as_str(), line["split"].as_str()),
        (Some("callee-v2"), Some("callee")),
        "{line}"
    );
    assert_eq!(counts(&recorders), [0, 0]);
    let post =
        "POST http://callee/a HTTP/1.1\r\nHost: callee\r\nContent-Length: 2\r\nConnection: close\r\n\r\nab";
    assert_eq!(Answer::parse(&world.raw_outbound("narrow", post.as_bytes()).await).status, 200);
    assert_eq!(recorders[1].only().body, "ab");
    assert!(world.stop().await);
}

#[tokio::test]
async fn weights_change_while_it_runs() {
    let splits = "splits: [{ to: callee, versions: { callee: 100, callee-v2: 0 } }]";
    let mut world = World::start(spec(splits)).await;
    let recorders = recorders(&mut world).await;
    assert_eq!(get(&world, "").await.status, 200);
    assert_eq!(counts(&recorders), [1, 0]);
    let text = std::fs::read_to_string(world.mesh_file()).unwrap();
    world.rewrite(&text.replace("{ callee: 100, callee-v2: 0 }", "{ callee: 0, callee-v2: 100 }"));
    eventually("the other version", || async {
        assert_eq!(get(&world, "").await.status, 200);
        counts(&recorders)[1] > 0
    })
    .await;
    let [first, second] = counts(&recorders);
    assert_eq!(get(&world, "").await.status, 200);
    assert_eq!(counts(&recorders), [first, second + 1]);
    assert!(world.stop().await);
}
