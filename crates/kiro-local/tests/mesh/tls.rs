//! Who may speak at all: certificates that prove nothing, at each end of each connection, and what both sides say of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiro_core::identity::{SpiffeId, TrustDomain};
use kiro_pki::{Authority, LeafSpec};
use kiro_proxy::{MeshSource, PEER_PORT, Settings, Sidecar};
use kiro_telemetry::log::{Format, LogSink};
use kiro_telemetry::trace::Tracing;
use kiro_tls::{Material, SidecarFiles, SidecarSource};
use rustls::{ClientConfig, HandshakeKind, ServerConfig};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::fake::{Fake, OBEDIENT, OnConnection, Script, place};
use crate::hostile::{
    Body, Draft, HTTP1, Leaf, MESH, NO_ALPN, OLD_TLS, Peer, Speaks, client, handshake, name, other_authority,
    secrets, server, sidecar, spec,
};
use crate::support::{Answer, DESCRIPTORS, Logs, PATIENCE, Spec, World, anywhere, events, eventually};

/// The one line of a handshake that ended badly, by the addresses of its connection.
async fn refusal(events: &Logs, what: &str, fits: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
    let of_it = |line: &serde_json::Value| line["target"] == "kiro::certificate" && fits(line);
    let line = events.wait_for(what, of_it).await;
    assert_eq!(line["verdict"], "refused", "{what}: {line}");
    let all: Vec<_> = events.lines().into_iter().filter(of_it).collect();
    assert_eq!(all.len(), 1, "{what}: one line a handshake: {all:#?}");
    line
}

/// What the line of a refusal has to say.
#[derive(Debug, Clone, Copy)]
struct Says<'a> {
    reason: &'a str,
    expected: &'a str,
    /// Empty where no certificate came.
    presented: &'a str,
    fix: &'a str,
}

#[track_caller]
fn check(what: &str, line: &serde_json::Value, says: Says<'_>) {
    assert_eq!(line["reason"], says.reason, "{what}: {line}");
    assert_eq!(line["expected"], says.expected, "{what}: {line}");
    assert_eq!(line["presented"].as_str().unwrap_or_default(), says.presented, "{what}: {line}");
    assert!(line["fix"].as_str().unwrap().contains(says.fix), "{what}: {line}");
}

fn days(count: i64) -> time::Duration {
    time::Duration::days(count)
}

fn expired(spec: LeafSpec) -> LeafSpec {
    let now = OffsetDateTime::now_utc();
    LeafSpec { not_before: now - days(2), not_after: now - days(1), ..spec }
}

fn early(spec: LeafSpec) -> LeafSpec {
    let now = OffsetDateTime::now_utc();
    LeafSpec { not_before: now + days(1), not_after: now + days(2), ..spec }
}

fn elsewhere(service: &str) -> SpiffeId {
    SpiffeId::sidecar(&TrustDomain::parse("other.mesh").unwrap(), &name(service))
}

/// A caller with any leaf asks for the callee, with a signature that would hold.
async fn call(world: &World, config: ClientConfig) -> (SocketAddr, Option<u16>) {
    let stream = TcpStream::connect(world.addresses("callee").inbound).await.unwrap();
    let local = stream.local_addr().unwrap();
    let Ok(peer) = Peer::on(stream, "callee", &Arc::new(config)).await else { return (local, None) };
    let mut draft = Draft::get("callee");
    draft.sign(&mut peer.signer(&secrets(world, "caller"), "callee"));
    (local, peer.send(draft.request(), Body::None).await.ok().map(|reply| reply.status))
}

#[tokio::test]
async fn the_inbound_port_takes_sidecars_of_the_mesh_alone() {
    let events = events();
    let mut world = World::start(Spec::pair()).await;
    let recorder = world.recorder("callee").await;
    let authority = &world.mesh.pki.authority;
    let mint = |spec: LeafSpec| Some(Leaf::minted(authority, &spec));
    let caller = || spec(&sidecar("caller"));
    let ingress = LeafSpec::ingress(&name("caller"), &[], OffsetDateTime::now_utc());
    let own = || Some(Leaf::of(&world, "caller"));
    let (us, sidecars, clocks) = ("spiffe://test.mesh/caller", "only sidecars call", "clocks");

    let cases: Vec<(Option<Leaf>, Speaks, &str, &str, &str)> = vec![
        (None, MESH, "tls_no_certificate", "", sidecars),
        (
            Some(Leaf::minted(&other_authority(), &caller())),
            MESH,
            "tls_unknown_issuer",
            us,
            "compare ca.pem at both ends",
        ),
        (
            mint(spec(&elsewhere("caller"))),
            MESH,
            "tls_trust_domain",
            "spiffe://other.mesh/caller",
            "two meshes never trust each other",
        ),
        (mint(expired(caller())), MESH, "tls_expired", us, "renew it with `make certs`"),
        (mint(early(caller())), MESH, "tls_not_yet_valid", us, clocks),
        (
            Some(Leaf::of_app(&world, "caller")),
            MESH,
            "tls_app_leaf",
            "spiffe://test.mesh/caller/app",
            "an application speaks to its own sidecar alone",
        ),
        (
            mint(ingress),
            MESH,
            "tls_wrong_identity",
            "no URI name (DNS:localhost DNS:caller)",
            "an ingress certificate proves nothing",
        ),
        (
            mint(LeafSpec { dns: vec!["callee".into()], ..caller() }),
            MESH,
            "tls_wrong_identity",
            us,
            "renew it",
        ),
        (own(), OLD_TLS, "tls_version", "", "let the peer speak TLS 1.3"),
        (own(), HTTP1, "tls_alpn", "", "HTTP/2 alone"),
        (own(), NO_ALPN, "tls_alpn", us, "HTTP/2 alone"),
    ];
    let inbound = world.addresses("callee").inbound.to_string();
    for (leaf, speaks, reason, presented, fix) in cases {
        let what = format!("{reason}, {presented}");
        let (local, status) = call(&world, client(&world, leaf.as_ref(), speaks)).await;
        assert_eq!(status, None, "{what}: nothing is answered");
        let line =
            refusal(&events, &what, |line| line["local"] == *inbound && line["remote"] == *local.to_string())
                .await;
        let expected = "spiffe://test.mesh/<service>";
        check(&what, &line, Says { reason, expected, presented, fix });
    }
    assert_eq!(recorder.seen().len(), 0);

    let (_, status) = call(&world, client(&world, own().as_ref(), MESH)).await;
    assert_eq!(status, Some(200), "with the right leaf the same call arrives");
    assert_eq!(recorder.only().head.headers["x-kiro-caller"], "caller");
    assert!(world.stop().await);
}

#[tokio::test]
async fn the_inbound_port_does_not_speak_plain_http() {
    let events = events();
    let mut world = World::start(Spec::pair()).await;
    let recorder = world.recorder("callee").await;
    let inbound = world.addresses("callee").inbound;
    let mut stream = TcpStream::connect(inbound).await.unwrap();
    let (local, inbound) = (stream.local_addr().unwrap().to_string(), inbound.to_string());
    stream.write_all(b"GET /a HTTP/1.1\r\nHost: callee\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP/"), "{answer:?}");
    let line = refusal(&events, "plain", |line| line["local"] == *inbound && line["remote"] == *local).await;
    let says = Says {
        reason: "tls_plain_http",
        expected: "spiffe://test.mesh/<service>",
        presented: "",
        fix: "let the application call through its own sidecar",
    };
    check("plain", &line, says);
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

fn with_mutual_caller() -> Spec {
    let services =
        vec![("caller", "app: { port: {port}, tls: mutual }"), ("callee", "app: { port: {port} }")];
    Spec { services, ..Spec::pair() }
}

/// What an application sends to its proxy.
const GET: &[u8] = b"GET http://callee/a HTTP/1.1\r\nHost: callee\r\nConnection: close\r\n\r\n";

/// Sends [`GET`] to the outbound port and reads to the end.
async fn through_outbound(world: &World, config: ClientConfig) -> (SocketAddr, Option<Answer>) {
    let stream = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
    let local = stream.local_addr().unwrap();
    let Ok(mut stream) = handshake(stream, "caller", &Arc::new(config)).await else { return (local, None) };
    let mut answer = Vec::new();
    let _ = stream.write_all(GET).await;
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
    let text = String::from_utf8(answer).unwrap();
    (local, (!text.is_empty()).then(|| Answer::parse(&text)))
}

#[tokio::test]
async fn the_outbound_port_takes_its_own_application_alone_where_tls_is_mutual() {
    let events = events();
    let mut world = World::start(with_mutual_caller()).await;
    let recorder = world.recorder("callee").await;
    let authority = &world.mesh.pki.authority;
    let app = |service: &str| {
        let id = SpiffeId::app(&TrustDomain::parse("test.mesh").unwrap(), &name(service));
        spec(&id)
    };
    let us = "spiffe://test.mesh/caller/app";
    let outbound = world.addresses("caller").outbound.to_string();
    let cases: Vec<(Option<Leaf>, Speaks, &str, &str, &str)> = vec![
        (None, HTTP1, "tls_no_certificate", "", "certs/<service>-app"),
        (
            Some(Leaf::minted(&other_authority(), &app("caller"))),
            HTTP1,
            "tls_unknown_issuer",
            us,
            "compare ca.pem",
        ),
        (
            Some(Leaf::minted(authority, &expired(app("caller")))),
            HTTP1,
            "tls_expired",
            us,
            "renew it with `make certs`",
        ),
        (
            Some(Leaf::of_app(&world, "callee")),
            HTTP1,
            "tls_wrong_identity",
            "spiffe://test.mesh/callee/app",
            "directories of one service",
        ),
        (
            Some(Leaf::of(&world, "callee")),
            HTTP1,
            "tls_wrong_identity",
            "spiffe://test.mesh/callee",
            "directories of one service",
        ),
        (Some(Leaf::of_app(&world, "caller")), OLD_TLS, "tls_version", "", "TLS 1.3"),
    ];
    let expected = "spiffe://test.mesh/caller/app or spiffe://test.mesh/caller";
    for (leaf, speaks, reason, presented, fix) in cases {
        let what = format!("{reason}, {presented}");
        let (local, answer) = through_outbound(&world, client(&world, leaf.as_ref(), speaks)).await;
        assert!(answer.is_none(), "{what}: {answer:?}");
        let fits =
            |line: &serde_json::Value| line["local"] == *outbound && line["remote"] == *local.to_string();
        let line = refusal(&events, &what, fits).await;
        check(&what, &line, Says { reason, expected, presented, fix });
    }

    let mut plain = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
    let local = plain.local_addr().unwrap().to_string();
    plain.write_all(GET).await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP/"), "{answer:?}");
    let line = refusal(&events, "plain", |line| line["local"] == *outbound && line["remote"] == *local).await;
    let says = Says { reason: "tls_plain_http", expected, presented: "", fix: "https://" };
    check("plain", &line, says);
    assert!(recorder.seen().is_empty());

    for (leaf, proof) in
        [(Leaf::of_app(&world, "caller"), "mtls"), (Leaf::of(&world, "caller"), "mtls-sidecar")]
    {
        let (_, answer) = through_outbound(&world, client(&world, Some(&leaf), HTTP1)).await;
        assert_eq!(answer.unwrap().status, 200);
        let fits =
            |line: &serde_json::Value| line["direction"] == "outbound" && line["caller_proof"] == proof;
        world.logs.wait_for(proof, fits).await;
    }
    assert!(world.stop().await);
}

/// A mesh whose callee is at a place where something else stands.
async fn with_fake(entry: &'static str) -> World {
    World::start(Spec {
        services: vec![("caller", "app: { port: {port} }"), ("callee", entry)],
        ..Spec::pair()
    })
    .await
}

/// Calls for longer than it takes to see whether each request asks for a handshake; all must be refused alike.
async fn check_back_off(world: &World, what: &str, code: &str, connections: impl Fn() -> usize) {
    let begin = Instant::now();
    for _ in 0..8 {
        let answer = world.get("caller", "http://callee/a").await;
        assert_eq!(answer.verdict(), (502, Some(code)), "{what}: {answer:?}");
        assert!(!answer.body.contains("spiffe"), "{what}: causes go to the log alone: {answer:?}");
    }
    // One a second, in case the machine is slow.
    let allowed = 1 + begin.elapsed().as_secs() as usize;
    assert!(connections() <= allowed, "{what}: {} connections", connections());
}

#[tokio::test]
async fn a_callee_must_prove_to_be_the_one_that_was_dialled() {
    type Make = fn(&World) -> Option<ServerConfig>;
    fn with(world: &World, spec: &LeafSpec) -> Option<ServerConfig> {
        Some(server(world, &Leaf::minted(&world.mesh.pki.authority, spec), MESH))
    }
    let callee = "spiffe://test.mesh/callee";
    let cases: [(Make, &str, &str, &str); 11] = [
        (
            |world| Some(server(world, &Leaf::of(world, "caller"), MESH)),
            "tls_wrong_identity",
            "spiffe://test.mesh/caller",
            "the address belongs to another pod",
        ),
        (
            // The name is right, and the identity another's: the name alone is not enough.
            |world| with(world, &LeafSpec { dns: vec!["callee".into()], ..spec(&sidecar("caller")) }),
            "tls_wrong_identity",
            "spiffe://test.mesh/caller",
            "the address belongs to another pod",
        ),
        (
            |world| with(world, &LeafSpec { dns: vec!["caller".into()], ..spec(&sidecar("callee")) }),
            "tls_wrong_identity",
            callee,
            "renew it",
        ),
        (
            |world| Some(server(world, &Leaf::of_app(world, "callee"), MESH)),
            "tls_app_leaf",
            "spiffe://test.mesh/callee/app",
            "an application speaks to its own sidecar alone",
        ),
        (
            |world| Some(server(world, &Leaf::minted(&other_authority(), &spec(&sidecar("callee"))), MESH)),
            "tls_unknown_issuer",
            callee,
            "compare ca.pem",
        ),
        (
            |world| with(world, &spec(&elsewhere("callee"))),
            "tls_trust_domain",
            "spiffe://other.mesh/callee",
            "two meshes",
        ),
        (|world| with(world, &expired(spec(&sidecar("callee")))), "tls_expired", callee, "renew it"),
        (|world| with(world, &early(spec(&sidecar("callee")))), "tls_not_yet_valid", callee, "clocks"),
        (|world| Some(server(world, &Leaf::of(world, "callee"), OLD_TLS)), "tls_version", "", "TLS 1.3"),
        (
            |world| Some(server(world, &Leaf::of(world, "callee"), NO_ALPN)),
            "tls_alpn",
            callee,
            "HTTP/2 alone",
        ),
        (|_| None, "tls_plain_http", "", "no sidecar answers there"),
    ];
    let events = events();
    let one = |(make, reason, presented, fix): (Make, &'static str, &'static str, &'static str)| {
        let events = events.clone();
        async move {
            let what = format!("{reason}, {presented}");
            let (listener, address, entry) = place();
            // Another test may have had this place before.
            let before = events.lines().len();
            let world = with_fake(entry).await;
            let fake = Fake::start(listener, make(&world), OBEDIENT);
            check_back_off(&world, &what, reason, || fake.connections()).await;
            assert_eq!(fake.heads(), 0, "{what}: no request leaves");

            let of_it =
                |line: &serde_json::Value| line["side"] == "client" && line["remote"] == *address.to_string();
            let line = events.wait_for_after(before, &what, of_it).await;
            let expected = "spiffe://test.mesh/callee";
            check(&what, &line, Says { reason, expected, presented, fix });
            let lines = events.lines().into_iter().skip(before).filter(of_it).count();
            assert_eq!(lines, fake.connections(), "{what}: one line a handshake");
            assert!(world.stop().await);
        }
    };
    for case in cases {
        one(case).await;
    }
}

/// A second sidecar of the world's caller, with files of the test's making.
async fn another_caller(world: &World, issuer: &Authority, spec: &LeafSpec) -> Sidecar {
    let issued = issuer.issue(spec).unwrap();
    // It trusts the world's authority, and proves itself by the issuer's.
    let ca_pem = [issuer.ca_pem(), world.mesh.pki.authority.ca_pem()].concat();
    let edges_json = world.mesh.pki.sidecars[&name("caller")].edges_json.clone();
    let material = Material { ca_pem, leaf_pem: issued.leaf_pem, key_pem: issued.key_pem };
    let files = SidecarFiles { material, edges_json, ingress: None };
    let at = SocketAddr::from(([127, 0, 0, 1], 0));
    let settings = Settings {
        service: name("caller"),
        identity: SidecarSource::Memory(files),
        mesh: MeshSource::Directory(world.mesh_file().parent().unwrap().to_owned()),
        listen: anywhere(),
        peer_port: PEER_PORT,
        app_host: at.ip(),
        workers: 1,
        descriptors: Some(DESCRIPTORS),
        pod: None,
        drain_timeout: Duration::from_secs(2),
        log_format: Format::Json,
    };
    let log = LogSink::new(Logs::default(), Format::Json, None).unwrap();
    Sidecar::start(settings, Tracing::off(), log).await.unwrap()
}

/// In TLS 1.3 a refusal of the caller's certificate comes after the caller's handshake is over.
async fn check_refused_caller(world: &World, rogue: &Sidecar, says: Says<'_>) {
    let events = events();
    let outbound = rogue.addresses().outbound;
    let begin = Instant::now();
    for _ in 0..8 {
        let answer = Answer::parse(&crate::support::raw(outbound, GET).await);
        assert_eq!(answer.verdict(), (502, Some("tls_peer_refused")), "{answer:?}");
    }
    let allowed = 1 + begin.elapsed().as_secs() as usize;

    let inbound = world.addresses("callee").inbound.to_string();
    let of_it = |line: &serde_json::Value| line["local"] == *inbound && line["verdict"] == "refused";
    let line = events.wait_for(says.reason, of_it).await;
    check(says.reason, &line, says);
    assert_eq!(line["side"], "server");
    let lines = events.lines().into_iter().filter(of_it).count();
    assert!(lines <= allowed, "{lines} handshakes");
}

#[tokio::test]
async fn a_caller_whose_certificate_is_refused_learns_it_and_backs_off() {
    let _ = events();
    let mut world = World::start(Spec::pair()).await;
    let recorder = world.recorder("callee").await;
    let issuer = other_authority();
    let rogue = another_caller(&world, &issuer, &spec(&sidecar("caller"))).await;
    let says = Says {
        reason: "tls_unknown_issuer",
        expected: "spiffe://test.mesh/<service>",
        presented: "spiffe://test.mesh/caller",
        fix: "compare ca.pem at both ends",
    };
    check_refused_caller(&world, &rogue, says).await;
    assert!(recorder.seen().is_empty());
    assert!(rogue.stop().await && world.stop().await);
}

#[tokio::test]
async fn a_certificate_that_expires_while_its_sidecar_runs_is_refused() {
    let _ = events();
    let mut world = World::start(Spec::pair()).await;
    let recorder = world.recorder("callee").await;
    let good = spec(&sidecar("caller"));
    let not_after = OffsetDateTime::now_utc() + time::Duration::seconds(2);
    let late = another_caller(&world, &world.mesh.pki.authority, &LeafSpec { not_after, ..good }).await;
    // A certificate's time is counted in whole seconds, the last one included.
    eventually("expired", || async { OffsetDateTime::now_utc() > not_after + time::Duration::seconds(1) })
        .await;
    let says = Says {
        reason: "tls_expired",
        expected: "spiffe://test.mesh/<service>",
        presented: "spiffe://test.mesh/caller",
        fix: "renew it with `make certs`",
    };
    check_refused_caller(&world, &late, says).await;
    assert!(recorder.seen().is_empty());
    assert!(late.stop().await && world.stop().await);
}

#[tokio::test]
async fn no_session_is_resumed_by_a_callee() {
    let mut world = World::start(Spec::pair()).await;
    world.recorder("callee").await;
    // One configuration, whose session store is what would be resumed from.
    let config = Arc::new(client(&world, Some(&Leaf::of(&world, "caller")), MESH));
    for _ in 0..3 {
        let peer = Peer::with(&world, "callee", &config).await.unwrap();
        assert_eq!(peer.handshake, Some(HandshakeKind::Full));
        let mut draft = Draft::get("callee");
        draft.sign(&mut peer.signer(&secrets(&world, "caller"), "callee"));
        // After an answer, tickets would have come.
        assert_eq!(peer.send(draft.request(), Body::None).await.unwrap().status, 200);
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_caller_resumes_no_session_and_keeps_its_connection() {
    let (listener, _, entry) = place();
    let world = with_fake(entry).await;
    let config = server(&world, &Leaf::of(&world, "callee"), MESH);
    let script = Script {
        connection: |place| if place < 2 { OnConnection::ServeOnly(1) } else { OnConnection::Serve },
        ..OBEDIENT
    };
    let fake = Fake::start(listener, Some(config), script);
    for _ in 0..12 {
        assert_eq!(world.get("caller", "http://callee/a").await.status, 200);
    }
    let kinds: BTreeMap<String, usize> = fake.handshakes().iter().fold(BTreeMap::new(), |mut kinds, kind| {
        *kinds.entry(format!("{kind:?}")).or_default() += 1;
        kinds
    });
    assert_eq!(kinds, BTreeMap::from([("Full".to_owned(), 3)]), "two were closed, one carries the rest");
    assert_eq!(fake.heads(), 12);
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_must_prove_to_be_the_one_of_its_pod() {
    let services =
        vec![("caller", "app: { port: {port} }"), ("callee", "app: { port: {port}, tls: mutual }")];
    let world = World::start(Spec { services, ..Spec::pair() }).await;
    let listener = TcpListener::bind(("127.0.0.1", world.ports["callee"].app)).await.unwrap();
    let sidecar_leaf = server(&world, &Leaf::of(&world, "callee"), HTTP1);
    let others = server(&world, &Leaf::of_app(&world, "caller"), HTTP1);
    let own = server(&world, &Leaf::of_app(&world, "callee"), HTTP1);
    let cases = [
        (None, 502, Some("tls_plain_http")),
        (Some(sidecar_leaf), 502, Some("tls_wrong_identity")),
        (Some(others), 502, Some("tls_wrong_identity")),
        (Some(own), 200, None),
    ];
    for (config, status, code) in cases {
        let call = world.get("caller", "http://callee/a");
        let app = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            match config {
                None => {
                    stream.write_all(answer).await.unwrap();
                    let _ = stream.read_to_end(&mut Vec::new()).await;
                }
                Some(config) => {
                    let accepted = TlsAcceptor::from(Arc::new(config)).accept(stream).await;
                    let Ok(mut stream) = accepted else { return };
                    if stream.read(&mut [0; 1024]).await.is_ok_and(|count| count > 0) {
                        stream.write_all(answer).await.unwrap();
                        let _ = stream.shutdown().await;
                    }
                }
            }
        };
        let (answer, ()) = tokio::join!(call, app);
        assert_eq!(answer.verdict(), (status, code), "{answer:?}");
    }
    assert!(world.stop().await);
}
