//! Applications that are checked by their sidecars: who gets no requests, who is none the wiser, and what is told of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::RecvStream;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;

use crate::client::{Client, Refusal, check_refused};
use crate::h2_ends::{Answerer, H2App, answer, fields_of, read_all};
use crate::hostile::{HTTP1, Leaf, server};
use crate::support::{Answer, Spec, World, events, eventually, raw};

const POST: &str = "POST http://callee/a HTTP/1.1\r\nHost: callee\r\nContent-Length: 2\r\n\r\nok";
const GET: &str = "GET http://callee/a HTTP/1.1\r\nHost: callee\r\n\r\n";

/// Often, and with room for a busy machine: three in a row are a second.
const OFTEN: &str = "interval: 300ms";

/// `caller` may call `callee`, which is entered like this.
fn spec(callee: &str) -> Spec {
    let callee = Box::leak(callee.replace("OFTEN", OFTEN).into_boxed_str());
    Spec { services: vec![("caller", "app: { port: {port} }"), ("callee", callee)], ..Spec::pair() }
}

/// An application that is well or not, and counts what it was asked beside its checks.
#[derive(Clone, Default)]
struct App {
    ill: Arc<AtomicBool>,
    seen: Arc<AtomicUsize>,
    checks: Arc<AtomicUsize>,
}

impl App {
    async fn start(world: &mut World, host: u8, service: &'static str) -> Self {
        Self::start_to_end(world, host, service).await.0
    }

    /// The same; the handle ends it, once its connections have ended, of which each carries one request.
    async fn start_to_end(world: &mut World, host: u8, service: &'static str) -> (Self, AbortHandle) {
        let app = Self::default();
        let of_it = app.clone();
        let handle = world
            .app_on(host, service, move |request: Request<Incoming>| {
                let app = of_it.clone();
                async move { app.answer(&request) }
            })
            .await;
        (app, handle)
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from_static(b"the application")));
        response.headers_mut().insert("connection", HeaderValue::from_static("close"));
        if request.uri().path() == "/healthz"
            && request.headers().get("user-agent").is_some_and(|agent| agent == "kiro-health")
        {
            self.checks.fetch_add(1, Ordering::SeqCst);
            assert!(request.headers().get("x-kiro-caller").is_none(), "{request:?}");
            if self.ill.load(Ordering::SeqCst) {
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            }
        } else {
            self.seen.fetch_add(1, Ordering::SeqCst);
        }
        response
    }

    fn falls_ill(&self, ill: bool) {
        self.ill.store(ill, Ordering::SeqCst);
    }

    fn seen(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }
}

async fn document(world: &World, service: &str) -> serde_json::Value {
    let answer = world.admin(service, "/mesh/health").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_str(&answer.body).unwrap()
}

/// Waits until a sidecar says this of its application.
async fn until(world: &World, service: &str, state: &str) {
    eventually(&format!("{service} is {state}"), async || {
        document(world, service).await["app"]["state"] == state
    })
    .await;
}

/// What the sidecar says of one of the services that it calls.
async fn of(world: &World, caller: &str, callee: &str) -> serde_json::Value {
    let document = document(world, caller).await;
    document["services"].as_array().unwrap().iter().find(|service| service["name"] == callee).unwrap().clone()
}

/// The sidecar's own readiness, at both of its ports.
async fn is_ready(world: &World, service: &str) {
    let request = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    for address in [world.addresses(service).admin, world.addresses(service).health] {
        assert_eq!(Answer::parse(&raw(address, request).await).status, 200, "{service}");
    }
}

const TWO: &str = "app: { port: {port} }, health: { http: /healthz, OFTEN }, \
    endpoints: [\"127.0.0.1:{inbound}\", \"127.0.0.2:{inbound}\"]";

#[tokio::test]
async fn an_unready_application_gets_no_requests_and_callers_are_none_the_wiser() {
    let mut world = World::start(spec(TWO)).await;
    world.replica("callee", 2).await;
    let (first, second) =
        (App::start(&mut world, 1, "callee").await, App::start(&mut world, 2, "callee").await);
    until(&world, "callee", "ready").await;
    let mut client = Client::app_of(&world, "caller").await;
    first.falls_ill(true);
    eventually("the first one is unready", async || {
        // Whatever happens meanwhile, each request is served.
        assert_eq!(client.exchange(POST).await.verdict(), (200, None));
        document(&world, "callee").await["app"]["state"] == "unready"
    })
    .await;
    let (before, other) = (first.seen(), second.seen());
    let mut asked = 0;
    eventually("it is left out", async || {
        assert_eq!(client.exchange(POST).await.verdict(), (200, None));
        asked += 1;
        let view = of(&world, "caller", "callee").await;
        view["replicas"][0]["state"] == "ejected" && view["replicas"][1]["state"] == "up"
    })
    .await;
    let refused = world.rejects("callee", "app_unready").await;
    assert!(refused >= 5, "{refused}: a failure as any other");
    for _ in 0..60 {
        assert_eq!(client.exchange(POST).await.verdict(), (200, None));
    }
    let trials = world.rejects("callee", "app_unready").await - refused;
    assert!(trials < 10, "{trials} of 60 were tried there");
    assert_eq!((first.seen(), second.seen()), (before, other + asked + 60), "none has seen one twice");
    let view = of(&world, "caller", "callee").await;
    assert!(view["requests"]["2xx"].as_u64().is_some_and(|count| count >= 60), "{view:#}");
    is_ready(&world, "callee").await;
    first.falls_ill(false);
    eventually("the first one is asked again", async || {
        assert_eq!(client.exchange(POST).await.status, 200);
        first.seen() > before
    })
    .await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn where_all_are_unready_callers_learn_it_at_once_and_it_is_no_fault_of_theirs() {
    let events = events();
    let front = "app: { port: {port} }, health: { http: /healthz, OFTEN }";
    let callee = "app: { port: {port} }, health: { http: /healthz, OFTEN }, ingress: { port: {ingress} }";
    let mut spec = spec(callee);
    spec.services[0].1 = Box::leak(front.replace("OFTEN", OFTEN).into_boxed_str());
    spec.allow = "  - { from: caller, to: callee }\n  - { from: ingress, to: callee }";
    let mut world = World::start(spec).await;
    let (front, app) = (App::start(&mut world, 1, "caller").await, App::start(&mut world, 1, "callee").await);
    until(&world, "caller", "ready").await;
    until(&world, "callee", "ready").await;
    app.falls_ill(true);
    until(&world, "callee", "unready").await;
    let began = Instant::now();
    let refusal = Refusal { status: 503, code: "app_unready", cause: "the peer's sidecar said so" };
    let line = check_refused(&world, "caller", POST, refusal).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(line["attempts"], 1, "one that said no is not asked again: {line}");
    let answer = Client::app_of(&world, "caller").await.exchange(GET).await;
    assert_eq!(answer.header("retry-after"), Some("1"));
    let mut outside = Client::open(world.addresses("callee").ingress.unwrap()).await;
    let answer = outside.exchange("GET /a HTTP/1.1\r\nHost: callee\r\n\r\n").await;
    assert_eq!((answer.verdict(), answer.header("retry-after")), ((503, Some("app_unready")), Some("1")));
    assert_eq!(app.seen(), 0);
    // A caller's application is well, whatever becomes of those that it calls.
    let checks = front.checks.load(Ordering::SeqCst);
    eventually("it is checked some more", async || front.checks.load(Ordering::SeqCst) > checks + 3).await;
    assert_eq!(document(&world, "caller").await["app"]["state"], "ready");
    is_ready(&world, "callee").await;
    let seen = &document(&world, "callee").await["app"];
    assert_eq!((&seen["check"], &seen["last_failure"]), (&"http /healthz".into(), &"status 503".into()));
    assert_eq!(world.metric("callee", "kiro_app_health{state=\"unready\"}").await, 1);
    assert_eq!(world.metric("callee", "kiro_app_health_changes_total{state=\"unready\"}").await, 1);
    app.falls_ill(false);
    until(&world, "callee", "ready").await;
    assert_eq!(outside.exchange("GET /a HTTP/1.1\r\nHost: callee\r\n\r\n").await.verdict(), (200, None));
    eventually("callers are served again", async || {
        Client::app_of(&world, "caller").await.exchange(GET).await.status == 200
    })
    .await;
    let reason = "3 checks in a row failed, the last one: status 503";
    let told = |line: &serde_json::Value| line["target"] == "kiro::health" && line["reason"] == reason;
    let line = events.wait_for("of the change", told).await;
    assert_eq!(
        (&line["from"], &line["to"], &line["level"]),
        (&"ready".into(), &"unready".into(), &"WARN".into())
    );
    assert!(world.stop().await);
}

#[tokio::test]
async fn who_does_not_listen_is_unready_with_the_first_request_that_finds_it_so() {
    // No check would say so for a long time.
    let health = "health: { http: /healthz, interval: 60s, unhealthy: 100 }";
    let mut world = World::start(spec(&format!("app: {{ port: {{port}} }}, {health}"))).await;
    assert_eq!(document(&world, "callee").await["app"]["state"], "unknown");
    let mut client = Client::app_of(&world, "caller").await;
    let answer = client.exchange(POST).await;
    // The attempt that found it so, and the next one, which is told.
    assert_eq!((answer.verdict(), answer.header("retry-after")), ((503, Some("app_unready")), Some("60")));
    let seen = &document(&world, "callee").await["app"];
    assert_eq!(
        (&seen["state"], &seen["last_failure"]),
        (&"unready".into(), &"no connection: connection refused".into())
    );
    is_ready(&world, "callee").await;
    // It is asked again soon, since somebody waits for it.
    let (app, ends) = App::start_to_end(&mut world, 1, "callee").await;
    until(&world, "callee", "ready").await;
    assert!(app.checks.load(Ordering::SeqCst) >= 2);
    let mut client = Client::app_of(&world, "caller").await;
    assert_eq!(client.exchange(POST).await.status, 200);
    // Now that it is ready, the next check would be a minute away.
    ends.abort();
    eventually("it is found gone", async || client.exchange(POST).await.status != 200).await;
    assert_eq!(document(&world, "callee").await["app"]["state"], "unready");
    App::start(&mut world, 1, "callee").await;
    until(&world, "callee", "ready").await;
    assert_eq!(client.exchange(POST).await.status, 200);
    assert!(world.stop().await);
}

#[tokio::test]
async fn who_accepts_and_does_not_answer_is_unready() {
    let world = World::start(spec("app: { port: {port} }, health: { http: /healthz, OFTEN }")).await;
    let _silent = world.listen("callee").await;
    until(&world, "callee", "unready").await;
    assert_eq!(document(&world, "callee").await["app"]["last_failure"], "no answer in time: 300 ms");
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_with_long_intervals_keeps_nobody_from_another_replica() {
    // Longer than a request has time: whoever waited for it would have none left.
    let entry = TWO.replace("OFTEN", "interval: 60s, timeout: 1s, unhealthy: 100");
    let mut world = World::start(spec(&entry)).await;
    world.replica("callee", 2).await;
    let second = App::start(&mut world, 2, "callee").await;
    // The first one has no application, which the first request that comes there finds.
    let mut client = Client::app_of(&world, "caller").await;
    eventually("the first one is unready and has said so", async || {
        assert_eq!(client.exchange(POST).await.verdict(), (200, None));
        world.rejects("callee", "app_unready").await > 0
    })
    .await;
    assert!(second.seen() > 0);
    assert!(world.stop().await);
}

#[tokio::test]
async fn nothing_declared_means_no_checks_and_nobody_is_turned_away() {
    let mut world = World::start(spec("app: { port: {port} }")).await;
    let mut client = Client::app_of(&world, "caller").await;
    for _ in 0..3 {
        assert_eq!(client.exchange(GET).await.verdict(), (502, Some("app_connect")));
    }
    let seen = document(&world, "callee").await;
    assert_eq!(
        seen["app"],
        serde_json::json!({ "check": null, "state": "unknown", "since": null, "last_failure": null })
    );
    assert_eq!(of(&world, "callee", "caller").await, serde_json::json!({ "name": "caller", "unused": true }));
    let app = App::start(&mut world, 1, "callee").await;
    eventually("it is served", async || client.exchange(GET).await.status == 200).await;
    assert_eq!(app.checks.load(Ordering::SeqCst), 0);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_mesh_file_without_the_section_lets_requests_through_again() {
    let mut world = World::start(spec("app: { port: {port} }, health: { http: /healthz, OFTEN }")).await;
    let app = App::start(&mut world, 1, "callee").await;
    until(&world, "callee", "ready").await;
    app.falls_ill(true);
    until(&world, "callee", "unready").await;
    assert_eq!(world.get("caller", "http://callee/a").await.verdict(), (503, Some("app_unready")));
    let text = std::fs::read_to_string(world.mesh_file()).unwrap();
    world.rewrite(&text.replace(&format!(", health: {{ http: /healthz, {OFTEN} }}"), ""));
    until(&world, "callee", "unknown").await;
    eventually("it is served", async || world.get("caller", "http://callee/a").await.status == 200).await;
    assert!(world.stop().await);
}

/// What `grpc.health.v1.Health/Check` is to say, as the second byte of its message.
async fn health_service(request: Request<RecvStream>, mut respond: Answerer, status: u8) {
    let (head, mut recv) = request.into_parts();
    if head.uri.path() != "/grpc.health.v1.Health/Check" {
        answer(&mut respond, 200, &[("content-type", "application/grpc"), ("grpc-status", "12")], true);
        return;
    }
    let (body, _) = read_all(&mut recv).await.unwrap();
    if body[..] != *b"\0\0\0\0\x08\x0a\x06shop.A" {
        answer(&mut respond, 200, &[("content-type", "application/grpc"), ("grpc-status", "5")], true);
        return;
    }
    let mut send = answer(&mut respond, 200, &[("content-type", "application/grpc")], false);
    send.send_data(Bytes::from(vec![0, 0, 0, 0, 2, 8, status]), false).unwrap();
    send.send_trailers(fields_of(&[("grpc-status", "0")])).unwrap();
}

#[tokio::test]
async fn a_grpc_application_is_asked_by_its_own_protocol() {
    let entry = "app: { port: {port}, protocol: grpc }, health: { grpc: shop.A, OFTEN }";
    let world = World::start(spec(entry)).await;
    let status = Arc::new(AtomicUsize::new(1));
    let of_it = Arc::clone(&status);
    let _app = H2App::start(&world, "callee", move |request, respond| {
        let status = u8::try_from(of_it.load(Ordering::SeqCst)).unwrap();
        health_service(request, respond, status)
    })
    .await;
    until(&world, "callee", "ready").await;
    status.store(2, Ordering::SeqCst);
    until(&world, "callee", "unready").await;
    assert_eq!(document(&world, "callee").await["app"]["last_failure"], "NOT_SERVING");
    status.store(1, Ordering::SeqCst);
    until(&world, "callee", "ready").await;
    let text = std::fs::read_to_string(world.mesh_file()).unwrap();
    world.rewrite(&text.replace("grpc: shop.A", "grpc: shop.B"));
    until(&world, "callee", "unready").await;
    assert_eq!(document(&world, "callee").await["app"]["last_failure"], "gRPC status 5");
    assert!(world.stop().await);
}

#[tokio::test]
async fn http_is_asked_over_http2_where_the_application_speaks_it() {
    let world =
        World::start(spec("app: { port: {port}, protocol: h2 }, health: { http: \"/healthz?deep\", OFTEN }"))
            .await;
    let ill = Arc::new(AtomicBool::new(false));
    let of_it = Arc::clone(&ill);
    let _app = H2App::start(&world, "callee", move |request, mut respond: Answerer| {
        let ill = of_it.load(Ordering::SeqCst);
        async move {
            assert_eq!(request.uri().path_and_query().unwrap(), "/healthz?deep");
            answer(&mut respond, if ill { 500 } else { 204 }, &[], true);
        }
    })
    .await;
    until(&world, "callee", "ready").await;
    ill.store(true, Ordering::SeqCst);
    until(&world, "callee", "unready").await;
    assert_eq!(document(&world, "callee").await["app"]["last_failure"], "status 500");
    assert!(world.stop().await);
}

#[tokio::test]
async fn bytes_are_well_where_somebody_listens() {
    let world =
        World::start(spec("app: { port: {port}, protocol: tcp }, health: { tcp: true, OFTEN }")).await;
    let listener = world.listen("callee").await;
    until(&world, "callee", "ready").await;
    drop(listener);
    until(&world, "callee", "unready").await;
    let seen = document(&world, "callee").await["app"]["last_failure"].as_str().unwrap().to_owned();
    assert!(seen.starts_with("no connection: "), "{seen}");
    let tunnel = world.raw_outbound("caller", b"CONNECT callee:1 HTTP/1.1\r\nHost: callee:1\r\n\r\n").await;
    assert_eq!(Answer::parse(&tunnel).verdict(), (503, Some("app_unready")));
    assert!(world.stop().await);
}

/// Serves HTTP/1 over TLS with a leaf.
fn encrypted(world: &World, leaf: &Leaf, listener: TcpListener) -> tokio::task::JoinHandle<()> {
    let acceptor = TlsAcceptor::from(Arc::new(server(world, leaf, HTTP1)));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let well = hyper::service::service_fn(async |_| {
                    Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::new())))
                });
                let io = hyper_util::rt::TokioIo::new(stream);
                let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, well).await;
            });
        }
    })
}

#[tokio::test]
async fn an_encrypted_application_is_asked_through_its_tls() {
    let entry = "app: { port: {port}, tls: mutual }, health: { http: /healthz, OFTEN }";
    let world = World::start(spec(entry)).await;
    let app = encrypted(&world, &Leaf::of_app(&world, "callee"), world.listen("callee").await);
    until(&world, "callee", "ready").await;
    app.abort();
    let _ = app.await;
    until(&world, "callee", "unready").await;
    // Somebody else's leaf is no application of ours.
    let app = encrypted(&world, &Leaf::of_app(&world, "caller"), world.listen("callee").await);
    eventually("it is told", async || {
        let seen = &document(&world, "callee").await["app"];
        seen["state"] == "unready"
            && seen["last_failure"].as_str().is_some_and(|said| said.starts_with("tls_wrong_identity: "))
    })
    .await;
    app.abort();
    assert!(world.stop().await);
}

async fn at_ingress(world: &World, method: &str) -> Answer {
    let request = format!("{method} /healthz HTTP/1.1\r\nHost: front\r\nConnection: close\r\n\r\n");
    Answer::parse(&raw(world.addresses("front").ingress.unwrap(), request.as_bytes()).await)
}

fn front(entry: &str) -> Spec {
    let entry = Box::leak(entry.replace("OFTEN", OFTEN).into_boxed_str());
    let allow = "  - { from: ingress, to: front, paths: [/healthz, /a] }";
    Spec { top: "", services: vec![("front", entry)], allow }
}

#[tokio::test]
async fn healthz_at_the_ingress_is_the_applications_unless_the_mesh_file_gives_it_to_the_sidecar() {
    let entry = "app: { port: {port} }, health: { http: /healthz, OFTEN }, ingress: { port: {ingress} }";
    let mut world = World::start(front(entry)).await;
    let app = App::start(&mut world, 1, "front").await;
    assert_eq!(at_ingress(&world, "GET").await.body, "the application");
    assert_eq!(app.seen(), 1);
    assert!(world.stop().await);

    let entry = "app: { port: {port} }, health: { http: /healthz, OFTEN }, ingress: { port: {ingress}, healthz: true }";
    // What policy allows has no say.
    let allow = "  - { from: ingress, to: front, paths: [/a] }";
    let mut world = World::start(Spec { allow, ..front(entry) }).await;
    let answer = at_ingress(&world, "GET").await;
    assert_eq!((answer.status, answer.header("cache-control")), (503, Some("no-store")), "{answer:?}");
    let app = App::start(&mut world, 1, "front").await;
    until(&world, "front", "ready").await;
    let answer = at_ingress(&world, "GET").await;
    assert_eq!((answer.verdict(), &*answer.body), ((200, None), "ready\n"));
    let answer = at_ingress(&world, "HEAD").await;
    assert_eq!((answer.status, &*answer.body), (200, ""));
    assert_eq!(at_ingress(&world, "POST").await.verdict(), (403, Some("policy_path")));
    app.falls_ill(true);
    until(&world, "front", "unready").await;
    let answer = at_ingress(&world, "GET").await;
    assert_eq!((answer.verdict(), &*answer.body), ((503, None), "unready\n"));
    assert_eq!(app.seen(), 0);
    assert!(world.stop().await);
}

#[tokio::test]
async fn without_a_check_the_sidecars_own_healthz_speaks_for_the_sidecar_alone() {
    let world =
        World::start(front("app: { port: {port} }, ingress: { port: {ingress}, healthz: true }")).await;
    let answer = at_ingress(&world, "GET").await;
    assert_eq!((answer.status, &*answer.body), (200, "ready\n"));
    assert!(world.stop().await);
}

#[tokio::test]
async fn the_meshs_health_is_for_the_pod_alone() {
    let mut spec = Spec::pair();
    spec.services[1].1 = "app: { port: {port} }, metrics: open";
    let world = World::start(spec).await;
    let request = b"GET /mesh/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    assert_eq!(Answer::parse(&raw(world.addresses("callee").health, request).await).status, 404);
    assert!(world.stop().await);
}
