//! A change of the mesh file, good or bad, while the sidecars run.

use crate::support::{Spec, World, events, eventually};

/// The names are this file's own, so that events of other tests are not mistaken for this one's.
fn spec(caller: &'static str, callee: &'static str, allow: &'static str) -> Spec {
    Spec {
        top: "",
        services: vec![(caller, "app: { port: {port} }"), (callee, "app: { port: {port} }")],
        allow,
    }
}

#[tokio::test]
async fn a_bad_file_keeps_the_running_one() {
    let events = events();
    let allow = "  - { from: reload-caller, to: reload-callee }";
    let mut world = World::start(spec("reload-caller", "reload-callee", allow)).await;
    let recorder = world.recorder("reload-callee").await;
    let good = std::fs::read_to_string(world.mesh_file()).unwrap();

    for (bad, problem) in [
        (good.replace("from: reload-caller", "from: reload-nobody"), "reload-nobody"),
        (good.replace("signatures: required", "").replace("allow:", "alow:"), "alow"),
        (good.replace("app: {", "app: { colour: red,"), "colour"),
        (good.replace("services:", "services: ["), "mesh.yaml"),
        (good.replace("trust_domain: test.mesh", "trust_domain: other.mesh"), "other.mesh"),
        (
            good.replace("reload-callee", "reload-renamed").replace("reload-caller", "reload-moved"),
            "no service",
        ),
        (String::new(), "mesh.yaml"),
    ] {
        assert_ne!(bad, good, "{problem}");
        let before = events.lines().len();
        world.rewrite(&bad);
        for service in ["reload-caller", "reload-callee"] {
            let event = events
                .wait_for_after(before, problem, |event| {
                    event["service"] == service && event["target"] == "kiro::reload"
                })
                .await;
            assert_eq!(event["level"], "ERROR", "{event}");
            assert!(event["message"].as_str().unwrap().contains("stays"), "{event}");
            assert!(event["error"].as_str().unwrap().contains(problem), "{problem}: {event}");
        }
        assert_eq!(world.get("reload-caller", "http://reload-callee/a").await.status, 200, "{problem}");
        assert!(
            world.admin("reload-caller", "/config").await.body.contains("\"generation\": 1"),
            "{problem}"
        );
    }

    // The next good one is taken as if nothing had been.
    world.allow("  - { from: reload-callee, to: reload-caller }");
    eventually("the new lines hold", || async {
        world.get("reload-caller", "http://reload-callee/a").await.verdict() == (403, Some("policy_no_edge"))
    })
    .await;
    assert!(recorder.seen().len() >= 7);
    assert!(world.stop().await);
}

/// Waits until a service runs with the state of this number.
async fn generation(world: &World, service: &str, number: u32) {
    eventually("the new state", || async {
        world.admin(service, "/config").await.body.contains(&format!("\"generation\": {number}"))
    })
    .await;
}

#[tokio::test]
async fn a_file_that_is_gone_keeps_the_running_state() {
    let events = events();
    let allow = "  - { from: gone-caller, to: gone-callee }";
    let mut world = World::start(spec("gone-caller", "gone-callee", allow)).await;
    let _recorder = world.recorder("gone-callee").await;
    let audit =
        std::fs::read_to_string(world.mesh_file()).unwrap().replace("services:", "mode: audit\nservices:");
    world.rewrite(&audit);
    for service in ["gone-caller", "gone-callee"] {
        generation(&world, service, 2).await;
    }
    let before = events.lines().len();
    std::fs::remove_file(world.mesh_file()).unwrap();
    for service in ["gone-caller", "gone-callee"] {
        let reloads =
            |event: &serde_json::Value| event["service"] == service && event["target"] == "kiro::reload";
        let event = events.wait_for_after(before, service, reloads).await;
        assert_eq!(event["level"], "ERROR", "{event}");
        assert!(event["error"].as_str().unwrap().contains("KIRO_MESH_DIR"), "how to mend it: {event}");
    }
    assert_eq!(world.get("gone-caller", "http://gone-callee/a").await.status, 200);
    world.rewrite(&audit.replace("mode: audit", "mode: enforce"));
    generation(&world, "gone-caller", 3).await;
    assert_eq!(
        world.get("gone-callee", "http://gone-caller/a").await.verdict(),
        (403, Some("policy_no_edge"))
    );
    assert!(world.stop().await);
}

#[tokio::test]
async fn signatures_are_turned_off_and_on_while_it_runs() {
    let allow = "  - { from: signing-caller, to: signing-callee }";
    let mut world = World::start(spec("signing-caller", "signing-callee", allow)).await;
    let _recorder = world.recorder("signing-callee").await;
    let text = std::fs::read_to_string(world.mesh_file()).unwrap();
    let verdict = async |world: &World| {
        let before = world.logs.lines().len();
        let answer = world.get("signing-caller", "http://signing-callee/a").await;
        let inbound = |line: &serde_json::Value| line["direction"] == "inbound";
        let line = world.logs.wait_for_after(before, "inbound", inbound).await;
        (answer.status, line["signature"].as_str().unwrap().to_owned())
    };
    assert_eq!(verdict(&world).await, (200, "verified".to_owned()));
    world.rewrite(&text.replace("services:", "signatures: off\nservices:"));
    for service in ["signing-caller", "signing-callee"] {
        generation(&world, service, 2).await;
    }
    eventually("unsigned", || async { verdict(&world).await == (200, "off".to_owned()) }).await;
    world.rewrite(&text);
    for service in ["signing-caller", "signing-callee"] {
        generation(&world, service, 3).await;
    }
    eventually("signed", || async { verdict(&world).await == (200, "verified".to_owned()) }).await;
    assert!(world.stop().await);
}
