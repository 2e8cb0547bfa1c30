//! How many requests an edge may carry, how many an application has under way, and what becomes of the others.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use kiro_proxy::LocalHost;
use kiro_telemetry::trace::Tracing;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::client::{Client, Refusal, check_refused};
use crate::h2_ends::{H2App, H2Client, answer, request};
use crate::hostile::{Body, Draft};
use crate::signatures::{caller, edit, three};
use crate::support::{PATIENCE, Spec, World, eventually};

const GET: &str = "GET http://callee/a HTTP/1.1\r\nHost: callee\r\n\r\n";

/// `caller` and `other` may call `callee`, with these `limits`.
fn limited(limits: &str) -> Spec {
    let spec = three();
    Spec { allow: Box::leak(format!("{}\nlimits:\n{limits}", spec.allow).into_boxed_str()), ..spec }
}

/// `caller` may call `callee`, which has this `traffic`.
fn busy(traffic: &str) -> Spec {
    let entry = format!("app: {{ port: {{port}} }}, traffic: {{ {traffic} }}");
    Spec {
        services: vec![("caller", "app: { port: {port} }"), ("callee", Box::leak(entry.into_boxed_str()))],
        ..Spec::pair()
    }
}

/// How many of each verdict a client got.
async fn ask(client: &mut Client, request: &str, count: usize) -> BTreeMap<(u16, Option<String>), usize> {
    let mut verdicts = BTreeMap::new();
    for _ in 0..count {
        let answer = client.exchange(request).await;
        let (status, code) = answer.verdict();
        *verdicts.entry((status, code.map(str::to_owned))).or_default() += 1;
    }
    verdicts
}

fn verdicts<const N: usize>(
    expected: [(u16, Option<&str>, usize); N],
) -> BTreeMap<(u16, Option<String>), usize> {
    expected.into_iter().map(|(status, code, count)| ((status, code.map(str::to_owned)), count)).collect()
}

#[tokio::test]
async fn exactly_the_burst_passes_whichever_worker_is_asked() {
    let spec = Spec {
        services: vec![("front", "app: { port: {port} }, ingress: { port: {ingress} }")],
        allow: "  - { from: ingress, to: front }\nlimits:\n  - { from: ingress, to: front, rate: 1/h, burst: 50 }",
        top: "",
    };
    let mut world = World::start_as(spec, Tracing::off(), 2, LocalHost::with_free_ports()).await;
    let recorder = world.recorder("front").await;
    let mut clients = JoinSet::new();
    for _ in 0..40 {
        let mut client = Client::open(world.addresses("front").ingress.unwrap()).await;
        clients.spawn(async move { ask(&mut client, "GET /a HTTP/1.1\r\nHost: front\r\n\r\n", 5).await });
    }
    let mut all = BTreeMap::new();
    for told in clients.join_all().await {
        for (verdict, count) in told {
            *all.entry(verdict).or_insert(0) += count;
        }
    }
    assert_eq!(all, verdicts([(200, None, 50), (429, Some("rate_limited"), 150)]));
    assert_eq!(recorder.seen().len(), 50);
    assert_eq!(world.metric("front", "kiro_rate_limited_total{line=\"ingress.front\"}").await, 150);
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_edge_has_its_share_and_its_answers_say_what_is_left() {
    let mut world = World::start(limited("  - { from: caller, to: callee, rate: 60/m, burst: 2 }")).await;
    world
        .app("callee", |_: Request<Incoming>| async {
            let mut response = Response::new(Full::new(Bytes::from_static(b"ok")));
            response.headers_mut().insert("ratelimit", HeaderValue::from_static("\"own\";r=1"));
            response
        })
        .await;
    let fields = |answer: &crate::support::Answer| -> Vec<(String, String)> {
        let ours = |(name, _): &&(String, String)| name.starts_with("ratelimit") || name == "retry-after";
        answer.headers.iter().filter(ours).cloned().collect()
    };
    let field = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let policy = field("ratelimit-policy", "\"caller.callee\";q=60;w=60");
    let mut client = Client::app_of(&world, "caller").await;
    let first = client.exchange(GET).await;
    // The application's own stay.
    let mut told = fields(&first);
    told.sort();
    let expected =
        [field("ratelimit", "\"caller.callee\";r=1;t=1"), field("ratelimit", "\"own\";r=1"), policy.clone()];
    assert_eq!((first.status, told), (200, expected.to_vec()));
    assert_eq!(client.exchange(GET).await.status, 200);
    let before = world.logs.lines().len();
    let refused = client.exchange(GET).await;
    assert_eq!(refused.verdict(), (429, Some("rate_limited")));
    let expected = [field("retry-after", "1"), policy, field("ratelimit", "\"caller.callee\";r=0;t=1")];
    let mut told = fields(&refused);
    told.sort();
    let mut expected = expected.to_vec();
    expected.sort();
    assert_eq!(told, expected);
    // The log names the line.
    let inbound = |line: &serde_json::Value| line["direction"] == "inbound" && line["status"] == 429;
    let line = world.logs.wait_for_after(before, "the refusal", inbound).await;
    let cause = line["reject_cause"].as_str().unwrap();
    let place = std::fs::read_to_string(world.mesh_file()).unwrap();
    let place = place.lines().position(|line| line.contains("rate: 60/m")).unwrap() + 1;
    assert_eq!(
        cause,
        format!("`limits`, line {place} of the mesh file (`caller.callee`): more than 60 in 60 s")
    );
    // Another edge is another share.
    let other = Client::app_of(&world, "other").await.exchange(GET).await;
    assert_eq!((other.status, fields(&other).len()), (200, 1));
    // One a second.
    let began = Instant::now();
    while client.exchange(GET).await.status != 200 {
        assert!(began.elapsed() < PATIENCE);
    }
    assert!(began.elapsed() > Duration::from_millis(500), "{:?}", began.elapsed());
    assert!(world.stop().await);
}

#[tokio::test]
async fn whoever_has_had_his_share_is_not_asked_again() {
    // Ten seconds is a `Retry-After` that a retry would wait for.
    let mut spec = limited("  - { from: caller, to: callee, rate: 6/m, burst: 1 }");
    let entry = "app: { port: {port} }, traffic: { retries: { count: 3, statuses: [429, 503] } }";
    spec.services[2] = ("callee", entry);
    let mut world = World::start(spec).await;
    let recorder = world.recorder("callee").await;
    let mut client = Client::app_of(&world, "caller").await;
    assert_eq!(client.exchange(GET).await.status, 200);
    let limited = Refusal { status: 429, code: "rate_limited", cause: "the peer's sidecar said so" };
    let line = check_refused(&world, "caller", GET, limited).await;
    assert_eq!(line["attempts"], 1, "{line}");
    assert_eq!(world.metric("callee", "kiro_rate_limited_total{line=\"caller.callee\"}").await, 1);
    assert_eq!(recorder.seen().len(), 1);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_share_of_each_value_caller_or_path() {
    for (per, requests) in [
        ("header:X-User", [("caller", "/a", "1"), ("caller", "/a", "2"), ("caller", "/a", "")]),
        ("service", [("caller", "/a", "1"), ("other", "/a", "1"), ("other", "/a", "")]),
        ("path", [("caller", "/a", ""), ("caller", "/b", ""), ("other", "/%61", "")]),
    ] {
        let limits = format!("  - {{ from: \"*\", to: callee, rate: 1/h, per: {per}, name: shares }}");
        let mut world = World::start(limited(&limits)).await;
        let _recorder = world.recorder("callee").await;
        let mut passed = 0;
        for _ in 0..2 {
            for (from, path, user) in requests {
                let user = if user.is_empty() { String::new() } else { format!("x-user: {user}\r\n") };
                let request = format!("GET http://callee{path} HTTP/1.1\r\nHost: callee\r\n{user}\r\n");
                let answer = Client::app_of(&world, from).await.exchange(request).await;
                passed += usize::from(answer.status == 200);
                assert!(matches!(answer.status, 200 | 429), "{answer:?}");
            }
        }
        let shares = if per.starts_with("header") { 3 } else { 2 };
        assert_eq!(passed, shares, "{per}");
        let keys = world.metric("callee", "kiro_rate_limit_keys{line=\"shares\"}").await;
        assert_eq!(keys, shares as u64, "{per}");
        assert!(world.stop().await);
    }
}

#[tokio::test]
async fn every_line_that_fits_counts_and_no_spelling_gets_round_it() {
    let limits = "  - { from: caller, to: callee, methods: [POST], rate: 1/h, name: posts }\n  \
                  - { from: \"*\", to: callee, paths: [/search/**], rate: 2/h, name: searches }";
    let mut world = World::start(limited(limits)).await;
    let _recorder = world.recorder("callee").await;
    let mut client = Client::app_of(&world, "caller").await;
    let post = "POST http://callee/search/a HTTP/1.1\r\nHost: callee\r\nContent-Length: 0\r\n\r\n";
    let both = client.exchange(post).await;
    let policies = both.headers.iter().filter(|(name, _)| name == "ratelimit-policy").count();
    assert_eq!((both.status, policies), (200, 2));
    assert_eq!(client.exchange(post).await.status, 429);
    // What the first line refused has used up nothing of the second.
    let search = |path: &str| format!("GET http://callee{path} HTTP/1.1\r\nHost: callee\r\n\r\n");
    assert_eq!(client.exchange(search("/search/b")).await.status, 200);
    for path in ["/search/c", "/%73earch/c", "//search/c", "/search%2Fc", "/x;y/search/c"] {
        assert_eq!(client.exchange(search(path)).await.status, 429, "{path}");
    }
    assert_eq!(client.exchange(search("/a")).await.status, 200);
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_is_not_signed_uses_up_nothing() {
    let mut world = World::start(limited("  - { from: caller, to: callee, rate: 1/h }")).await;
    let recorder = world.recorder("callee").await;
    let (peer, mut signer) = caller(&world).await;
    for _ in 0..3 {
        let mut draft = Draft::get("callee");
        draft.sign(&mut signer);
        edit(&mut draft.headers, "signature", "=:", "=:A");
        let reply = peer.send(draft.request(), Body::None).await.unwrap();
        assert_eq!(reply.status, 401);
    }
    let mut draft = Draft::get("callee");
    draft.sign(&mut signer);
    assert_eq!(peer.send(draft.request(), Body::None).await.unwrap().status, 200);
    let mut draft = Draft::get("callee");
    draft.sign(&mut signer);
    let reply = peer.send(draft.request(), Body::None).await.unwrap();
    assert_eq!(reply.verdict(), (429, Some("rate_limited")));
    assert_eq!(recorder.seen().len(), 1);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_change_that_is_not_about_a_line_leaves_it_what_it_has() {
    let mut world = World::start(limited("  - { from: caller, to: callee, rate: 1/h }")).await;
    let _recorder = world.recorder("callee").await;
    let allow = three().allow;
    let mut generation = 1;
    let mut changed = async |world: &World, limits: &str| {
        generation += 1;
        world.allow(&format!("{allow}\n{limits}"));
        let wanted = format!("\"generation\": {generation}");
        eventually("the new state", || async {
            world.admin("callee", "/config").await.body.contains(&wanted)
        })
        .await;
    };
    let mut client = Client::app_of(&world, "caller").await;
    assert_eq!(client.exchange(GET).await.status, 200);
    assert_eq!(client.exchange(GET).await.status, 429);
    let line = "  - { from: caller, to: callee, rate: 1/h }";
    changed(&world, &format!("limits:\n  - {{ from: other, to: callee, rate: 9/s }}\n{line}")).await;
    assert_eq!(client.exchange(GET).await.status, 429, "the line stands elsewhere, and is the same");
    // The workers take a state over a moment after it is shown.
    changed(&world, "").await;
    eventually("the line is gone", || async { world.get("caller", "http://callee/a").await.status == 200 })
        .await;
    assert_eq!(world.metric("callee", "kiro_rate_limited_total{line=\"caller.callee\"}").await, 0);
    changed(&world, &format!("limits:\n{line}")).await;
    eventually("the line is back, with all that it had", || async {
        let answer = world.get("caller", "http://callee/a").await;
        assert!(answer.status == 200, "{answer:?}");
        answer.header("ratelimit") == Some("\"caller.callee\";r=0;t=3600")
    })
    .await;
    assert_eq!(client.exchange(GET).await.status, 429);
    assert!(world.stop().await);
}

#[tokio::test]
async fn callers_of_grpc_get_statuses_of_grpc() {
    let mut spec = limited("  - { from: caller, to: callee, rate: 1/h, burst: 2, paths: [/shop.Orders/*] }");
    spec.services[2] =
        ("callee", "app: { port: {port}, protocol: grpc }, traffic: { concurrency: { max: 1, queue: 0 } }");
    let world = World::start(spec).await;
    let (begun, mut has_begun) = mpsc::unbounded_channel();
    let _app = H2App::start(&world, "callee", move |_, mut respond| {
        let begun = begun.clone();
        async move {
            begun.send(()).unwrap();
            // The first one goes on for ever, without a head.
            std::future::pending::<()>().await;
            answer(&mut respond, 200, &[], true);
        }
    })
    .await;
    let client = H2Client::app_of(&world, "caller").await;
    let fields = [("content-type", "application/grpc"), ("te", "trailers")];
    let call = || request(Method::POST, "http://callee/shop.Orders/Get", &fields);
    let _first = client.call(call(), true).await;
    has_begun.recv().await.unwrap();
    let overloaded = client.exchange(call(), b"").await;
    assert_eq!(overloaded.field("grpc-status"), Some("14"));
    assert_eq!(overloaded.field("grpc-message"), Some("overloaded"));
    let limited = client.exchange(call(), b"").await;
    assert_eq!(limited.field("grpc-status"), Some("8"));
    assert_eq!(limited.field("grpc-message"), Some("rate_limited"));
    assert_eq!(limited.field("ratelimit"), Some("\"caller.callee\";r=0;t=3600"));
    drop(client);
    world.stop().await;
}

/// An application that tells of each connection's request, and answers as the test says.
async fn by_hand(world: &World, service: &str) -> mpsc::UnboundedReceiver<Client> {
    let listener = world.listen(service).await;
    let (tell, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { return };
            let (mut client, tell) = (Client::on(stream), tell.clone());
            tokio::spawn(async move {
                client.request_head().await;
                let _ = tell.send(client);
            });
        }
    });
    told
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";

/// What an application has under way, and what waits.
async fn load(world: &World) -> (u64, u64) {
    let in_flight = world.metric("callee", "kiro_concurrency_in_flight").await;
    (in_flight, world.metric("callee", "kiro_concurrency_waiting").await)
}

#[tokio::test]
async fn as_many_as_may_are_under_way_one_waits_and_the_rest_is_told_so() {
    let world = World::start(busy("concurrency: { max: 1, queue: 1 }")).await;
    let mut asked = by_hand(&world, "callee").await;
    assert_eq!(world.metric("callee", "kiro_concurrency_limit").await, 1);
    let mut first = Client::app_of(&world, "caller").await;
    first.send(GET).await;
    let mut at_app = asked.recv().await.unwrap();
    let mut second = Client::app_of(&world, "caller").await;
    second.send(GET).await;
    eventually("the second waits", || async { load(&world).await == (1, 1) }).await;
    let third = Client::app_of(&world, "caller").await.exchange(GET).await;
    assert_eq!((third.verdict(), third.header("retry-after")), ((503, Some("overloaded")), Some("1")));
    assert!(asked.try_recv().is_err());
    // It keeps its place until its answer has ended.
    at_app.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\no").await;
    assert_eq!(first.head().await.status, 200);
    assert_eq!(load(&world).await.0, 1);
    at_app.send("k").await;
    let mut at_app = asked.recv().await.unwrap();
    assert_eq!(load(&world).await, (1, 0));
    at_app.send(OK).await;
    assert_eq!(second.answer().await.status, 200);
    eventually("nothing is under way", || async { load(&world).await == (0, 0) }).await;
    assert_eq!(world.metric("callee", "kiro_overloaded_total{cause=\"queue_full\"}").await, 1);
    let inbound = |line: &serde_json::Value| line["direction"] == "inbound" && line["reject"] == "overloaded";
    let line = world.logs.wait_for("the refusal", inbound).await;
    assert!(line["reject_cause"].as_str().unwrap().contains("traffic.concurrency"), "{line}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_wait_is_part_of_the_time_that_a_request_has() {
    let world = World::start(busy("timeout: 200ms, concurrency: { max: 1, queue: 5 }")).await;
    let mut asked = by_hand(&world, "callee").await;
    let mut first = Client::app_of(&world, "caller").await;
    first.send(GET).await;
    let _at_app = asked.recv().await.unwrap();
    // Its time is over before the first one's is: it has less of it.
    let hurried = "GET http://callee/a HTTP/1.1\r\nHost: callee\r\nx-kiro-deadline: 50\r\n\r\n";
    let began = Instant::now();
    let overloaded = Refusal { status: 503, code: "overloaded", cause: "the peer's sidecar said so" };
    check_refused(&world, "caller", hurried, overloaded).await;
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(world.metric("callee", "kiro_overloaded_total{cause=\"deadline\"}").await, 1);
    assert_eq!(first.answer().await.verdict(), (504, Some("app_timeout")));
    eventually("nothing is under way", || async { load(&world).await == (0, 0) }).await;
    world.stop().await;
}

#[tokio::test]
async fn whoever_goes_away_gives_his_place_back() {
    let world = World::start(busy("timeout: off, concurrency: { max: 1, queue: 5 }")).await;
    let mut asked = by_hand(&world, "callee").await;
    let mut first = Client::app_of(&world, "caller").await;
    first.send(GET).await;
    let _at_app = asked.recv().await.unwrap();
    let mut second = Client::app_of(&world, "caller").await;
    second.send(GET).await;
    eventually("the second waits", || async { load(&world).await == (1, 1) }).await;
    drop(second);
    eventually("nobody waits", || async { load(&world).await == (1, 0) }).await;
    drop(first);
    eventually("nothing is under way", || async { load(&world).await == (0, 0) }).await;
    let mut third = Client::app_of(&world, "caller").await;
    third.send(GET).await;
    asked.recv().await.unwrap().send(OK).await;
    assert_eq!(third.answer().await.status, 200);
    world.stop().await;
}

#[tokio::test]
async fn streams_keep_nobody_out() {
    let world = World::start(busy("concurrency: { max: 1, queue: 0 }")).await;
    let mut asked = by_hand(&world, "callee").await;
    let mut events = Client::app_of(&world, "caller").await;
    events.send(GET).await;
    let mut source = asked.recv().await.unwrap();
    let head =
        "HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; x=y\r\nTransfer-Encoding: chunked\r\n\r\n";
    source.send(head).await;
    assert_eq!(events.head().await.status, 200);
    let mut socket = Client::app_of(&world, "caller").await;
    socket
        .send(
            "GET /chat HTTP/1.1\r\nHost: callee\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )
        .await;
    let mut at_app = asked.recv().await.unwrap();
    assert_eq!(load(&world).await.0, 1, "a handshake is a request");
    at_app
        .send(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
        )
        .await;
    assert_eq!(socket.head().await.status, 101);
    assert_eq!(load(&world).await, (0, 0));
    // Any other answer that goes on keeps its place.
    let mut slow = Client::app_of(&world, "caller").await;
    slow.send(GET).await;
    let mut at_app = asked.recv().await.unwrap();
    at_app.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n").await;
    assert_eq!(slow.head().await.status, 200);
    let refused = Client::app_of(&world, "caller").await.exchange(GET).await;
    assert_eq!(refused.verdict(), (503, Some("overloaded")));
    world.stop().await;
}

#[tokio::test]
async fn another_replica_is_asked_soon_and_this_one_stays_in() {
    const TWO: &str = "app: { port: {port} }, traffic: { concurrency: { max: 1, queue: 0 } }, \
        endpoints: [\"127.0.0.1:{inbound}\", \"127.0.0.2:{inbound}\"]";
    let mut spec = three();
    spec.services[2] = ("callee", TWO);
    let mut world = World::start(spec).await;
    world.replica("callee", 2).await;
    let mut asked = by_hand(&world, "callee").await;
    world.app_on(2, "callee", |_| async { Response::new(Full::new(Bytes::from_static(b"2"))) }).await;
    // Until the first replica is full, of which `caller` knows nothing.
    let mut held = Vec::new();
    let _at_app = loop {
        let mut client = Client::app_of(&world, "other").await;
        client.send(GET).await;
        tokio::select! {
            at_app = asked.recv() => { held.push(client); break at_app.unwrap(); }
            answer = client.answer() => assert_eq!(answer.body, "2"),
        }
    };
    let began = Instant::now();
    let post = "POST http://callee/a HTTP/1.1\r\nHost: callee\r\nContent-Length: 2\r\n\r\nok";
    let mut client = Client::app_of(&world, "caller").await;
    for _ in 0..40 {
        let answer = client.exchange(post).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, "2"));
    }
    // `Retry-After` is one second, and about the other one.
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let rerouted = world.metric("caller", "kiro_retries_total{to=\"callee\",outcome=\"retried\"}").await;
    assert!(rerouted > 0);
    assert_eq!(world.metric("callee", "kiro_overloaded_total{cause=\"queue_full\"}").await, rerouted);
    assert_eq!(world.metric("caller", "kiro_replicas{to=\"callee\",state=\"up\"}").await, 2);
    drop(held);
    world.stop().await;
}
