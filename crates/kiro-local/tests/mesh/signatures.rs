//! Is a request the one that was signed? A peer with the right leaf and an HTTP/2 of its own asks a real inbound.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use kiro_core::signature::{LIFETIME_SECONDS, SKEW_SECONDS_MAX, Signer, content_digest_value, strip};
use sha2::{Digest, Sha256};

use crate::hostile::{Body, Draft, Peer, now, secrets};
use crate::support::{Spec, World};

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// `caller` and `other` may do anything to `callee`.
pub(crate) fn three() -> Spec {
    Spec {
        services: vec![
            ("caller", "app: { port: {port} }"),
            ("other", "app: { port: {port} }"),
            ("callee", "app: { port: {port} }"),
        ],
        allow: "  - { from: caller, to: callee }\n  - { from: other, to: callee }\n  - { from: caller, to: other }",
        ..Spec::pair()
    }
}

/// A peer and what signs for it.
pub(crate) async fn caller(world: &World) -> (Peer, Signer) {
    let peer = Peer::of(world, "caller", "callee").await;
    let signer = peer.signer(&secrets(world, "caller"), "callee");
    (peer, signer)
}

pub(crate) const TEXT: &[u8] = b"what was signed";

/// A request with a body of its head's digest and a field of ours.
pub(crate) fn post() -> Draft {
    let mut draft = Draft::new(Method::POST, "callee", "/a?q=1");
    draft.set("x-kiro-host", "callee:8080");
    draft.headers.insert("content-digest", content_digest_value(&sha256(TEXT)));
    draft
}

pub(crate) fn text() -> Body {
    Body::Data(vec![Bytes::from_static(TEXT)])
}

/// Changes our member of `signature-input`.
fn edit_input(draft: &mut Draft, from: &str, to: &str) {
    edit(&mut draft.headers, "signature-input", from, to);
}

pub(crate) fn edit(headers: &mut HeaderMap, name: &'static str, from: &str, to: &str) {
    let before = headers[name].to_str().unwrap();
    let after = before.replacen(from, to, 1);
    assert_ne!(before, after, "nothing to change");
    headers.insert(name, after.parse().unwrap());
}

#[tokio::test]
async fn a_head_that_is_not_the_one_that_was_signed_is_refused() {
    type Change = fn(&mut Draft);
    let cases: &[(&str, Change, &str)] = &[
        ("no signature", |draft| strip(&mut draft.headers), "signature_missing"),
        ("no signature-input", |draft| draft.unset("signature-input"), "signature_missing"),
        ("no mac", |draft| draft.unset("signature"), "signature_missing"),
        ("method", |draft| draft.method = Method::PUT, "signature_mismatch"),
        ("path", |draft| draft.target = "/b?q=1".into(), "signature_mismatch"),
        ("query", |draft| draft.target = "/a?q=2".into(), "signature_mismatch"),
        ("no query", |draft| draft.target = "/a".into(), "signature_mismatch"),
        ("own field changed", |draft| draft.set("x-kiro-host", "callee:9090"), "signature_mismatch"),
        ("own field gone", |draft| draft.unset("x-kiro-host"), "signature_component"),
        ("own field added", |draft| draft.set("x-kiro-body", "stream"), "signature_component"),
        (
            "own field twice",
            |draft| {
                draft.headers.append("x-kiro-host", HeaderValue::from_static("callee:8080"));
            },
            "signature_component",
        ),
        (
            "another digest",
            |draft| {
                drop(draft.headers.insert("content-digest", content_digest_value(&sha256(b"another"))));
            },
            "signature_mismatch",
        ),
        ("no digest", |draft| draft.unset("content-digest"), "signature_component"),
        (
            "two of ours",
            |draft| {
                for name in ["signature-input", "signature"] {
                    let value = draft.headers[name].clone();
                    draft.headers.append(name, value);
                }
            },
            "signature_duplicate",
        ),
        (
            "two of ours in one line",
            |draft| {
                for name in ["signature-input", "signature"] {
                    let value = draft.headers[name].to_str().unwrap();
                    let twice = format!("{value}, {value}");
                    draft.headers.insert(name, twice.parse().unwrap());
                }
            },
            "signature_duplicate",
        ),
        (
            "our tag under another label",
            |draft| {
                for name in ["signature-input", "signature"] {
                    let other = draft.headers[name].to_str().unwrap().replacen("kiro=", "app=", 1);
                    draft.headers.append(name, other.parse().unwrap());
                }
            },
            "signature_duplicate",
        ),
        (
            "an unknown component",
            |draft| edit_input(draft, "\"@query\"", "\"@query\" \"@scheme\""),
            "signature_component",
        ),
        (
            "a component twice",
            |draft| edit_input(draft, "\"@query\"", "\"@query\" \"@query\""),
            "signature_component",
        ),
        ("a component less", |draft| edit_input(draft, " \"@query\"", ""), "signature_component"),
        (
            "another order",
            |draft| edit_input(draft, "\"@path\" \"@query\"", "\"@query\" \"@path\""),
            "signature_component",
        ),
        ("another time", |draft| edit_input(draft, "created=1", "created=2"), "signature_mismatch"),
        ("another nonce", |draft| edit_input(draft, "nonce=\"", "nonce=\"9"), "signature_mismatch"),
        ("another algorithm", |draft| edit_input(draft, "hmac-sha256", "hmac-sha512"), "signature_algorithm"),
        ("another epoch", |draft| edit_input(draft, "#1", "#2"), "signature_unknown_key"),
        ("another edge's name", |draft| edit_input(draft, "caller>", "other>"), "signature_unknown_key"),
        (
            "another mac",
            |draft| {
                let zeros = format!("kiro=:{}=:", "A".repeat(43));
                draft.headers.insert("signature", zeros.parse().unwrap());
            },
            "signature_mismatch",
        ),
    ];
    let mut world = World::start(three()).await;
    let recorder = world.recorder("callee").await;
    let (peer, mut signer) = caller(&world).await;
    for (what, change, code) in cases {
        let mut draft = post();
        draft.sign(&mut signer);
        change(&mut draft);
        let reply = peer.send(draft.request(), text()).await.unwrap();
        assert_eq!(reply.verdict(), (401, Some(*code)), "{what}");
        assert!(!String::from_utf8_lossy(&reply.body).contains(' '), "{what}: the code alone: {reply:?}");
    }
    assert_eq!(recorder.seen().len(), 0);

    let mut draft = post();
    draft.sign(&mut signer);
    assert_eq!(peer.send(draft.request(), text()).await.unwrap().verdict(), (200, None), "unchanged");
    let seen = recorder.only();
    assert_eq!(seen.body, TEXT);
    assert_eq!(seen.head.headers["host"], "callee:8080");

    for (_, _, code) in cases {
        let fits = |line: &serde_json::Value| line["reject"] == *code && line["signature"] == "refused";
        let line = world.logs.wait_for(code, fits).await;
        assert_eq!((&line["caller"], &line["policy"]), (&"caller".into(), &"allowed".into()), "{line}");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_signature_holds_for_its_edge_its_connection_its_time_and_once() {
    let mut world = World::start(three()).await;
    let recorder = world.recorder("callee").await;
    let (peer, mut signer) = caller(&world).await;
    let send = async |what: &str, draft: &Draft, code: &str| {
        let reply = peer.send(draft.request(), Body::None).await.unwrap();
        assert_eq!(reply.verdict(), (401, Some(code)), "{what}");
    };

    // The secrets of others, on this very connection.
    let mut draft = Draft::get("callee");
    draft.sign(&mut peer.signer(&secrets(&world, "other"), "callee"));
    send("another caller's edge", &draft, "signature_unknown_key").await;

    let mut draft = Draft::get("callee");
    draft.sign(&mut peer.signer(&secrets(&world, "caller"), "other"));
    send("an edge to another callee", &draft, "signature_unknown_key").await;
    edit_input(&mut draft, ">other", ">callee");
    send("another edge's secret under the right name", &draft, "signature_mismatch").await;

    // A signature that was captured on another connection of the same two ends.
    let (second, mut second_signer) = caller(&world).await;
    let mut captured = Draft::get("callee");
    captured.sign(&mut second_signer);
    send("another connection's", &captured, "signature_mismatch").await;
    let reply = second.send(captured.request(), Body::None).await.unwrap();
    assert_eq!(reply.status, 200, "on its own it holds");

    // Once.
    let mut draft = Draft::get("callee");
    draft.sign(&mut signer);
    let first = peer.send(draft.request(), Body::None).await.unwrap();
    assert_eq!(first.status, 200);
    send("replayed", &draft, "signature_replayed").await;
    send("replayed again", &draft, "signature_replayed").await;

    let off_by = LIFETIME_SECONDS + SKEW_SECONDS_MAX;
    for (what, clock, code) in [
        ("expired", now() - off_by - 5, "signature_expired"),
        ("from the future", now() + SKEW_SECONDS_MAX + 5, "signature_not_yet_valid"),
    ] {
        let mut draft = Draft::get("callee");
        draft.sign_at(&mut signer, clock);
        send(what, &draft, code).await;
        let line = world.logs.wait_for(what, |line| line["reject"] == code).await;
        let cause = line["reject_cause"].as_str().unwrap();
        assert!(cause.contains(&clock.to_string()), "{what}: it says the caller's clock: {cause}");
        let ours = &now().to_string()[..8];
        assert!(cause.contains(ours), "{what}: and its own: {cause}");
    }
    for clock in [now() - off_by + 20, now() + SKEW_SECONDS_MAX - 20] {
        let mut draft = Draft::get("callee");
        draft.sign_at(&mut signer, clock);
        let reply = peer.send(draft.request(), Body::None).await.unwrap();
        assert_eq!(reply.status, 200, "within what clocks may be apart");
    }
    assert_eq!(recorder.seen().len(), 4);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_websocket_can_not_be_made_of_what_was_signed_as_something_else() {
    let mut world = World::start(three()).await;
    let recorder = world.recorder("callee").await;
    let (peer, mut signer) = caller(&world).await;
    let handshake = |draft: &Draft| {
        let mut request = draft.request();
        request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
        request
    };
    let mut draft = Draft::new(Method::CONNECT, "callee", "/chat");
    draft.sign(&mut signer);
    let reply = peer.send(handshake(&draft), Body::None).await.unwrap();
    assert_eq!(reply.verdict(), (400, Some("header_invalid")), "the field of ours is missing");
    draft.set("x-kiro-upgrade", "websocket");
    let reply = peer.send(handshake(&draft), Body::None).await.unwrap();
    assert_eq!(reply.verdict(), (401, Some("signature_component")), "the field of ours is not signed");

    let mut draft = Draft::new(Method::CONNECT, "callee", "/chat");
    draft.set("x-kiro-upgrade", "websocket");
    draft.sign(&mut signer);
    let mut plain = draft.clone();
    plain.method = Method::GET;
    let reply = peer.send(plain.request(), Body::None).await.unwrap();
    assert_eq!(reply.verdict(), (400, Some("header_invalid")), "signed as a handshake, sent as a request");
    assert_eq!(recorder.seen().len(), 0);
    let reply = peer.send(handshake(&draft), Body::None).await.unwrap();
    assert_eq!(
        reply.verdict(),
        (502, Some("app_no_upgrade")),
        "as it was signed; the recorder knows no WebSocket"
    );
    assert_eq!(recorder.only().head.headers["upgrade"], "websocket");
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_callee_judges_by_itself() {
    let allow =
        "  - { from: caller, to: callee, methods: [GET], paths: [/open/*] }\n  - { from: other, to: caller }";
    let mut world = World::start(Spec { allow, ..three() }).await;
    let recorder = world.recorder("callee").await;
    let (peer, mut signer) = caller(&world).await;
    let cases = [
        (Method::GET, "/closed", 403, "policy_path"),
        (Method::GET, "/open/a/b", 403, "policy_path"),
        (Method::POST, "/open/a", 403, "policy_method"),
        (Method::GET, "/open//a", 403, "policy_ambiguous_path"),
        (Method::GET, "/open/a%2fb", 403, "policy_ambiguous_path"),
        (Method::GET, "/open/../closed", 400, "path_invalid"),
        (Method::CONNECT, "/", 403, "policy_tunnel"),
    ];
    for (method, target, status, code) in cases {
        let mut draft = Draft::new(method.clone(), "callee", target);
        draft.sign(&mut signer);
        let mut request = draft.request();
        if method == Method::CONNECT {
            *request.uri_mut() = "callee".parse().unwrap();
        }
        let reply = peer.send(request, Body::None).await.unwrap();
        assert_eq!(reply.verdict(), (status, Some(code)), "{method} {target}");
        assert!(!String::from_utf8_lossy(&reply.body).contains("/open"), "what is allowed is not told");
    }
    // A caller without any edge, with a leaf and a signature that hold.
    let other = Peer::of(&world, "other", "callee").await;
    let mut draft = Draft::new(Method::GET, "callee", "/open/a");
    draft.set("x-kiro-caller", "caller");
    let mut unspoofed = draft.clone();
    unspoofed.unset("x-kiro-caller");
    unspoofed.sign(&mut other.signer(&secrets(&world, "other"), "callee"));
    for (name, value) in &unspoofed.headers {
        draft.headers.insert(name, value.clone());
    }
    let reply = other.send(draft.request(), Body::None).await.unwrap();
    assert_eq!(reply.verdict(), (403, Some("policy_no_edge")));
    let fits = |line: &serde_json::Value| line["reject"] == "policy_no_edge";
    let line = world.logs.wait_for("the denied caller", fits).await;
    assert_eq!((&line["caller"], &line["policy"]), (&"other".into(), &"denied".into()));
    assert_eq!(recorder.seen().len(), 0);

    let mut draft = Draft::new(Method::GET, "callee", "/open/a");
    draft.sign(&mut signer);
    assert_eq!(peer.send(draft.request(), Body::None).await.unwrap().status, 200);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_callee_answers_for_its_own_name_alone() {
    let mut world = World::start(three()).await;
    let recorder = world.recorder("callee").await;
    let (peer, mut signer) = caller(&world).await;
    // Signed for the name that is asked for, and for the callee's, which is the one that the callee signs by.
    for authority in ["other", "callee.other", "callee:443", "CALLEE", "127.0.0.1"] {
        let mut draft = Draft::get("callee");
        draft.sign(&mut signer);
        draft.authority = authority.to_owned();
        let reply = peer.send(draft.request(), Body::None).await.unwrap();
        assert_eq!(reply.verdict(), (421, Some("misdirected")), "{authority}");
    }
    let mut draft = Draft::get("callee");
    draft.set("x-kiro-host", "other:8080");
    draft.sign(&mut signer);
    let reply = peer.send(draft.request(), Body::None).await.unwrap();
    assert_eq!(reply.verdict(), (421, Some("misdirected")), "the Host is another service's");

    let mut draft = Draft::get("other");
    draft.sign(&mut signer);
    draft.authority = "callee".to_owned();
    let reply = peer.send(draft.request(), Body::None).await.unwrap();
    assert_eq!(reply.verdict(), (401, Some("signature_mismatch")), "signed for another authority");
    assert_eq!(recorder.seen().len(), 0);
    assert!(world.stop().await);
}

#[tokio::test]
async fn nobody_calls_with_another_s_identity() {
    let mut world = World::start(three()).await;
    let recorder = world.recorder("callee").await;
    let other = Peer::of(&world, "other", "callee").await;

    // The secret of another caller's edge is worth nothing with a leaf of one's own.
    let mut draft = Draft::get("callee");
    draft.sign(&mut other.signer(&secrets(&world, "caller"), "callee"));
    let reply = other.send(draft.request(), Body::None).await.unwrap();
    assert_eq!(reply.verdict(), (401, Some("signature_unknown_key")));
    assert_eq!(recorder.seen().len(), 0);

    // What it says of itself is not believed.
    let mut draft = Draft::get("callee");
    draft.sign(&mut other.signer(&secrets(&world, "other"), "callee"));
    for name in ["x-kiro-caller", "x-kiro-reject", "x-kiro-anything"] {
        draft.set(name, "caller");
    }
    assert_eq!(other.send(draft.request(), Body::None).await.unwrap().status, 200);
    let seen = recorder.only();
    let ours: Vec<(&str, &[u8])> = seen
        .head
        .headers
        .iter()
        .filter(|(name, _)| name.as_str().starts_with("x-kiro-"))
        .map(|(name, value)| (name.as_str(), value.as_bytes()))
        .collect();
    assert_eq!(ours, [("x-kiro-caller", &b"other"[..])]);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_leaf_alone_is_not_enough_and_is_where_signatures_are_off() {
    let mut world = World::start(Spec { top: "signatures: off", ..three() }).await;
    let recorder = world.recorder("callee").await;
    let (peer, mut signer) = caller(&world).await;
    assert_eq!(peer.send(Draft::get("callee").request(), Body::None).await.unwrap().status, 200);
    let mut draft = post();
    draft.sign(&mut signer);
    assert_eq!(peer.send(draft.request(), text()).await.unwrap().status, 200, "one that signs all the same");
    let seen = recorder.seen();
    assert!(seen.iter().all(|seen| !seen.head.headers.contains_key("signature")));
    let line = world.logs.wait_for("inbound", |line| line["direction"] == "inbound").await;
    assert_eq!(line["signature"], "off");
    assert!(world.stop().await);
}
