//! Crowds take what nobody else needs: each listener keeps its own places, and the application is not drowned.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::hostile::{self, Body, Draft, Leaf, MESH, Peer, secrets};
use crate::support::{PATIENCE, Spec, World, events, eventually, raw};

/// Opens connections that say nothing, and waits until the sidecar has seen each of them.
async fn silent(
    world: &World,
    service: &str,
    listener: &str,
    address: SocketAddr,
    count: usize,
) -> Vec<TcpStream> {
    let (accepted, refused) = (
        format!("kiro_connections_accepted_total{{listener=\"{listener}\"}}"),
        format!("kiro_connections_refused_total{{listener=\"{listener}\"}}"),
    );
    let seen = || async { world.metric(service, &accepted).await + world.metric(service, &refused).await };
    let before = seen().await;
    let mut crowd = Vec::with_capacity(count);
    for _ in 0..count {
        crowd.push(TcpStream::connect(address).await.unwrap());
    }
    eventually("all are seen", || async { seen().await >= before + count as u64 }).await;
    crowd
}

async fn limit(world: &World, service: &str, name: &str) -> usize {
    usize::try_from(world.metric(service, &format!("kiro_limit{{limit=\"{name}\"}}")).await).unwrap()
}

async fn open(world: &World, service: &str, listener: &str) -> usize {
    let series = format!("kiro_connections_open{{listener=\"{listener}\"}}");
    usize::try_from(world.metric(service, &series).await).unwrap()
}

/// A service with all listeners there are, a callee, and two that speak no HTTP.
fn all_listeners() -> Spec {
    Spec {
        top: "",
        services: vec![
            ("busy", "app: { port: {port} }, ingress: { port: {ingress}, tls_port: {ingress_tls} }"),
            ("callee", "app: { port: {port} }"),
            ("db", "app: { port: {port}, protocol: tcp }"),
            ("cache", "app: { port: {port}, protocol: tcp }"),
        ],
        allow: "  - { from: busy, to: callee }\n  - { from: callee, to: busy }\n  - { from: ingress, to: busy, paths: [/**] }\n  - { from: busy, to: db }\n  - { from: busy, to: cache }",
    }
}

#[tokio::test]
async fn crowds_at_all_listeners_leave_each_its_own_and_never_use_up_the_descriptors() {
    let mut world = World::start_small(all_listeners(), 512).await;
    world.recorder("callee").await;
    world.recorder("busy").await;
    let db = world.listen("db").await;
    let all = limit(&world, "busy", "worker_connections").await;
    let cap = limit(&world, "busy", "connections").await;
    let addresses = world.addresses("busy").clone();
    // Half of all would have been a listener's share where each has a fixed one.
    assert!(cap > all / 2, "{cap} of {all}");
    let outbound = silent(&world, "busy", "outbound", addresses.outbound, cap + 20).await;
    assert_eq!(open(&world, "busy", "outbound").await, cap);
    let sure = (all - cap) / 4;
    let mut crowds = vec![outbound];
    // The second crowd could have all that the first one has left, and the others are to have theirs.
    for (listener, address, count) in [
        ("ingress", addresses.ingress.unwrap(), 4 * sure),
        ("ingress_tls", addresses.ingress_tls.unwrap(), sure),
        ("inbound", addresses.inbound, sure),
        ("local", world.local("busy", "db"), sure),
    ] {
        crowds.push(silent(&world, "busy", listener, address, count).await);
        assert!(open(&world, "busy", listener).await >= sure, "{listener}");
    }
    let mut sum = 0;
    for listener in ["outbound", "ingress", "ingress_tls", "inbound", "local"] {
        sum += open(&world, "busy", listener).await;
    }
    assert!(sum <= all, "{sum} of {all}");
    // After a moment the largest crowd makes room for whoever comes, at any listener, and the way on is free.
    eventually("the ingress serves", || async {
        raw(addresses.ingress.unwrap(), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .await
            .starts_with("HTTP/1.1 200")
    })
    .await;
    eventually("the application's calls go out", || async {
        raw(addresses.outbound, b"GET / HTTP/1.1\r\nHost: callee\r\n\r\n").await.starts_with("HTTP/1.1 200")
    })
    .await;
    assert_eq!(world.get("callee", "http://busy/").await.status, 200, "another sidecar is served");
    assert_eq!(world.metric("busy", "kiro_limit_hits_total{limit=\"descriptors\"}").await, 0);
    drop((crowds, db));
    world.stop().await;
}

#[tokio::test]
async fn the_local_ports_share_what_one_listener_may_have() {
    let world = World::start_small(all_listeners(), 512).await;
    let cap = limit(&world, "busy", "connections").await;
    let (db, cache) = (world.listen("db").await, world.listen("cache").await);
    let mut crowds = Vec::new();
    for service in ["db", "cache"] {
        crowds.push(silent(&world, "busy", "local", world.local("busy", service), cap * 3 / 4).await);
    }
    assert!(open(&world, "busy", "local").await <= cap);
    assert!(world.metric("busy", "kiro_connections_refused_total{listener=\"local\"}").await > 0);
    drop((crowds, db, cache));
    world.stop().await;
}

/// A callee whose application answers when it is let, `places` connections to it, and a client of the caller with many streams.
async fn held(descriptors: u64) -> (World, watch::Sender<bool>, h2::client::SendRequest<Bytes>) {
    let mut world = World::start_small(Spec::pair(), descriptors).await;
    let (let_go, may_go) = watch::channel(false);
    world
        .app("callee", move |_: Request<Incoming>| {
            let mut may_go = may_go.clone();
            async move {
                let _ = may_go.wait_for(|may| *may).await;
                Response::new(Full::new(Bytes::from_static(b"at last")))
            }
        })
        .await;
    let stream = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    (world, let_go, send)
}

type Answers = JoinSet<(u16, Option<String>)>;

async fn ask(send: &h2::client::SendRequest<Bytes>, answers: &mut Answers) {
    let request = Request::get("http://callee/a").body(()).unwrap();
    let (answer, _) = send.clone().ready().await.unwrap().send_request(request, true).unwrap();
    answers.spawn(async move {
        let answer = tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap();
        let reject = answer.headers().get("x-kiro-reject").map(|code| code.to_str().unwrap().to_owned());
        (answer.status().as_u16(), reject)
    });
}

#[tokio::test]
async fn connections_to_an_application_are_bounded_and_who_waits_too_long_is_refused() {
    let (world, let_go, send) = held(128).await;
    let places = limit(&world, "callee", "app_connections").await;
    let mut answers = Answers::new();
    for _ in 0..places {
        ask(&send, &mut answers).await;
    }
    let open = "kiro_app_connections_open";
    eventually("all are in use", || async { world.metric("callee", open).await as usize == places }).await;
    for _ in 0..3 {
        ask(&send, &mut answers).await;
    }
    for _ in 0..3 {
        let refused = answers.join_next().await.unwrap().unwrap();
        assert_eq!(refused, (503, Some("queue_full".to_owned())));
    }
    assert_eq!(world.metric("callee", open).await as usize, places, "and no connection more");
    assert_eq!(world.metric("callee", "kiro_limit_hits_total{limit=\"app_connections\"}").await, 3);
    // Whoever waits goes on a connection that another request has left.
    for _ in 0..3 {
        ask(&send, &mut answers).await;
    }
    eventually("they wait", || async {
        world.metric("callee", "kiro_limit_hits_total{limit=\"app_connections\"}").await == 6
    })
    .await;
    let_go.send_replace(true);
    while let Some(answer) = answers.join_next().await {
        assert_eq!(answer.unwrap(), (200, None));
    }
    assert_eq!(world.metric("callee", "kiro_app_connections_opened_total").await as usize, places);
    assert!(world.stop().await);
}

#[tokio::test]
async fn tunnels_to_an_application_have_the_same_bound() {
    let mut spec = Spec::pair();
    spec.services[1].1 = "app: { port: {port}, protocol: tcp }";
    let world = World::start_small(spec, 128).await;
    let places = limit(&world, "callee", "app_connections").await;
    let app = world.listen("callee").await;
    let mut tunnels = Vec::new();
    for _ in 0..places {
        let client = TcpStream::connect(world.local("caller", "callee")).await.unwrap();
        let (app, _) = tokio::time::timeout(PATIENCE, app.accept()).await.unwrap().unwrap();
        tunnels.push((client, app));
    }
    let mut another = TcpStream::connect(world.local("caller", "callee")).await.unwrap();
    let end = tokio::time::timeout(PATIENCE, another.read(&mut [0])).await.unwrap();
    assert!(end.is_err(), "a reset");
    let is_its = |line: &serde_json::Value| line["service"] == "callee" && line["reject"] == "queue_full";
    world.logs.wait_for("of the callee's refusal", is_its).await;
    // The place of one that has ended is free again.
    drop(tunnels.pop());
    let again = TcpStream::connect(world.local("caller", "callee")).await.unwrap();
    tokio::time::timeout(PATIENCE, app.accept()).await.unwrap().unwrap();
    drop((again, tunnels));
    world.stop().await;
}

/// An application that takes connections and ends each when it is told to; how many there were.
fn dead_end(listener: TcpListener) -> (Arc<AtomicUsize>, watch::Sender<bool>) {
    let count = Arc::new(AtomicUsize::new(0));
    let (end, may_end) = watch::channel(false);
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            let mut may_end = may_end.clone();
            tokio::spawn(async move {
                let _ = may_end.wait_for(|may| *may).await;
                drop(stream);
            });
        }
    });
    (count, end)
}

#[tokio::test]
async fn who_waits_for_the_same_connection_shares_its_failure() {
    let mut spec = Spec::pair();
    spec.services[1].1 = "app: { port: {port}, protocol: h2 }";
    let world = World::start(spec).await;
    let (dialled, end) = dead_end(world.listen("callee").await);
    let stream = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut answers = Answers::new();
    for _ in 0..20 {
        ask(&send, &mut answers).await;
    }
    let in_flight = "kiro_requests_in_flight{direction=\"inbound\"}";
    eventually("all wait", || async { world.metric("callee", in_flight).await == 20 }).await;
    end.send_replace(true);
    while let Some(answer) = answers.join_next().await {
        assert_eq!(answer.unwrap(), (502, Some("app_reset".to_owned())));
    }
    assert_eq!(dialled.load(Ordering::Relaxed), 1);
    assert!(world.stop().await);
}

#[tokio::test]
async fn one_peer_can_not_have_all_connections() {
    let spec = Spec {
        top: "",
        services: vec![
            ("greedy", "app: { port: {port} }"),
            ("modest", "app: { port: {port} }"),
            ("wanted", "app: { port: {port} }"),
        ],
        allow: "  - { from: greedy, to: wanted }\n  - { from: modest, to: wanted }",
    };
    let events = events();
    let mut world = World::start(spec).await;
    world.recorder("wanted").await;
    let config = Arc::new(hostile::client(&world, Some(&Leaf::of(&world, "greedy")), MESH));
    let most = limit(&world, "wanted", "peer_connections").await;
    let mut peers = Vec::new();
    for _ in 0..most {
        peers.push(Peer::with(&world, "wanted", &config).await.unwrap());
    }
    let served = |peer: Peer, name: &'static str| {
        let mut signer = peer.signer(&secrets(&world, name), "wanted");
        let mut draft = Draft::get("wanted");
        draft.sign(&mut signer);
        async move {
            let answer = peer.send(draft.request(), Body::None).await;
            (answer.is_ok_and(|reply| reply.status == 200), peer)
        }
    };
    let (ok, last) = served(peers.pop().unwrap(), "greedy").await;
    assert!(ok, "the last one that it may have");
    let one_more = Peer::with(&world, "wanted", &config).await;
    let refused = match one_more {
        Ok(peer) => !served(peer, "greedy").await.0,
        Err(_) => true,
    };
    assert!(refused, "one more");
    let line = events
        .wait_for("refused", |line| line["target"] == "kiro::inbound" && line["peer"] == "greedy")
        .await;
    assert_eq!(line["most"], most, "{line}");
    assert!(world.metric("wanted", "kiro_limit_hits_total{limit=\"peer_connections\"}").await >= 1);
    assert_eq!(world.get("modest", "http://wanted/").await.status, 200, "another peer is served");
    drop(last);
    eventually("its place is free again", || async {
        match Peer::with(&world, "wanted", &config).await {
            Ok(peer) => served(peer, "greedy").await.0,
            Err(_) => false,
        }
    })
    .await;
    drop(peers);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_caller_of_many_services_lets_unused_connections_go() {
    let names = ["one", "two", "three", "four", "five"];
    let mut services = vec![("caller", "app: { port: {port} }")];
    services.extend(names.map(|name| (name, "app: { port: {port} }")));
    let allow = "  - { from: caller, to: one }\n  - { from: caller, to: two }\n  - { from: caller, to: three }\n  - { from: caller, to: four }\n  - { from: caller, to: five }";
    let mut world = World::start_small(Spec { top: "", services, allow }, 128).await;
    for name in names {
        world.recorder(name).await;
    }
    let most = limit(&world, "caller", "upstream_connections").await;
    assert!(most < names.len());
    for _ in 0..3 {
        for name in names {
            let answer = world.get("caller", &format!("http://{name}/")).await;
            assert_eq!(answer.status, 200, "{name}: {answer:?}");
            assert!(world.metric("caller", "kiro_upstream_connections_open").await as usize <= most);
        }
    }
    assert!(world.metric("caller", "kiro_limit_hits_total{limit=\"upstream_connections\"}").await > 0);
    assert!(world.stop().await);
}

/// Sends more heads that do not end than may be held; the first of them that is cut, and whether the last one still goes on.
async fn check_half_heads(door: &str, begin: Vec<u8>, held: usize) {
    let mut world = World::start(all_listeners()).await;
    world.recorder("busy").await;
    let bound = limit(&world, "busy", "half_heads_bytes").await;
    let address = match door {
        "outbound" => world.addresses("busy").outbound,
        _ => world.addresses("busy").ingress.unwrap(),
    };
    let count = bound / held + 2;
    let mut crowd = Vec::with_capacity(count);
    for _ in 0..count {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&begin).await.unwrap();
        crowd.push(stream);
    }
    let cut = format!("kiro_abuse_total{{listener=\"{door}\",reason=\"half_head\"}}");
    eventually("some are cut", || async { world.metric("busy", &cut).await > 0 }).await;
    eventually("the oldest are, and no more than have to be", || async {
        world.metric("busy", &format!("kiro_connections_open{{listener=\"{door}\"}}")).await as usize
            + world.metric("busy", &cut).await as usize
            == count
            && world.metric("busy", &cut).await <= 3
    })
    .await;
    let mut rest = Vec::new();
    let end = tokio::time::timeout(PATIENCE, crowd[0].read_to_end(&mut rest)).await;
    assert!(end.is_ok(), "the one that began first is cut");
    assert!(world.metric("busy", "kiro_limit_hits_total{limit=\"half_heads_bytes\"}").await > 0);
    // An honest head that is as large has ended before it is the oldest.
    let large = format!("GET / HTTP/1.1\r\nHost: localhost\r\nx: {}\r\n\r\n", "a".repeat(50_000));
    let answer = raw(world.addresses("busy").ingress.unwrap(), large.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    drop(crowd);
    assert!(world.stop().await);
}

#[tokio::test]
async fn heads_that_do_not_end_hold_no_more_than_they_may_together() {
    let begin = format!("GET / HTTP/1.1\r\nHost: localhost\r\nx: {}", "a".repeat(60_000)).into_bytes();
    let held = begin.len();
    check_half_heads("ingress", begin, held).await;
}

#[tokio::test]
async fn header_blocks_that_do_not_end_hold_no_more_than_they_may_together() {
    use crate::h2_frames::{HEADERS, frame, preface};
    let mut begin = preface();
    // GET / of the static table; no END_HEADERS.
    begin.extend(frame(HEADERS, 0, 1, &[0x82, 0x84, 0x86]));
    check_half_heads("outbound", begin, 256 * 1024).await;
}
