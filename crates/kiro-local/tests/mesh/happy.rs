//! A permitted call, and what both sidecars say of it.

use crate::support::{Spec, World};

#[tokio::test]
async fn a_permitted_call_arrives_and_is_logged_at_both_ends() {
    let mut world = World::start(Spec::pair()).await;
    let recorder = world.recorder("callee").await;
    let answer = world.get("caller", "http://callee:8080/a/b?q=1").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "recorded"), "{answer:?}");

    let seen = recorder.only();
    assert_eq!(seen.head.uri.path_and_query().unwrap().as_str(), "/a/b?q=1");
    let header = |name: &str| seen.head.headers.get(name).map(|value| value.to_str().unwrap());
    assert_eq!(header("host"), Some("callee:8080"));
    assert_eq!(header("x-kiro-caller"), Some("caller"));
    assert_eq!(header("signature"), None);
    assert_eq!(header("signature-input"), None);

    let out = world.logs.wait_for("outbound", |line| line["direction"] == "outbound").await;
    let inn = world.logs.wait_for("inbound", |line| line["direction"] == "inbound").await;
    for (line, proof, signature) in [(&out, "loopback", "signed"), (&inn, "mtls", "verified")] {
        assert_eq!(line["caller"], "caller");
        assert_eq!(line["callee"], "callee");
        assert_eq!(line["caller_proof"], proof);
        assert_eq!(line["signature"], signature);
        assert_eq!(line["policy"], "allowed");
        assert_eq!(line["path"], "/a/b", "a query may hold secrets");
        assert_eq!(line["status"], 200);
    }
    assert!(world.stop().await);
}
