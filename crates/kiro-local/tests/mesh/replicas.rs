//! Several replicas of one service: who gets a request, who is left out, and what a caller is spared.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::task::JoinSet;

use crate::client::{Client, Refusal, check_refused};
use crate::support::{Spec, World, events, eventually, on};

const GET: &str = "GET http://callee/a HTTP/1.1\r\nHost: callee\r\n\r\n";
const POST: &str = "POST http://callee/a HTTP/1.1\r\nHost: callee\r\nContent-Length: 2\r\n\r\nok";

/// Where the replicas of `callee` are.
const TWO: &str = "endpoints: [\"127.0.0.1:{inbound}\", \"127.0.0.2:{inbound}\"]";

/// `caller` may call `callee`, which has two replicas and is called like this.
fn spec(traffic: &str) -> Spec {
    let entry = format!("app: {{ port: {{port}} }}, traffic: {{ {traffic} }}, {TWO}");
    Spec {
        services: vec![("caller", "app: { port: {port} }"), ("callee", Box::leak(entry.into_boxed_str()))],
        ..Spec::pair()
    }
}

/// How an application answers, and how often it was asked.
#[derive(Clone, Default)]
struct Behaviour {
    seen: Arc<AtomicUsize>,
    fails: Arc<AtomicBool>,
}

impl Behaviour {
    fn seen(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }

    fn fail(&self, fails: bool) {
        self.fails.store(fails, Ordering::SeqCst);
    }
}

async fn app(world: &mut World, host: u8) -> Behaviour {
    let behaviour = Behaviour::default();
    let of_app = behaviour.clone();
    world
        .app_on(host, "callee", move |_: Request<Incoming>| {
            let behaviour = of_app.clone();
            async move {
                behaviour.seen.fetch_add(1, Ordering::SeqCst);
                let mut response = Response::new(Full::new(Bytes::from(host.to_string())));
                if behaviour.fails.load(Ordering::SeqCst) {
                    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                }
                response
            }
        })
        .await;
    behaviour
}

/// Both replicas with their applications.
async fn pair(traffic: &str) -> (World, Behaviour, Behaviour) {
    let mut world = World::start(spec(traffic)).await;
    world.replica("callee", 2).await;
    let (first, second) = (app(&mut world, 1).await, app(&mut world, 2).await);
    (world, first, second)
}

/// How often each answer came.
async fn ask(client: &mut Client, request: &str, count: usize) -> BTreeMap<(u16, String), usize> {
    let mut answers = BTreeMap::new();
    for _ in 0..count {
        let answer = client.exchange(request).await;
        *answers.entry((answer.status, answer.body)).or_default() += 1;
    }
    answers
}

/// The same from sixteen clients at a time, so that one replica alone can't be the better one for all.
async fn ask_at_once(world: &World, request: &'static str) -> BTreeMap<(u16, String), usize> {
    let mut clients = JoinSet::new();
    for _ in 0..16 {
        let mut client = Client::app_of(world, "caller").await;
        clients.spawn(async move { ask(&mut client, request, 20).await });
    }
    let mut all = BTreeMap::new();
    for (answer, count) in clients.join_all().await.into_iter().flatten() {
        *all.entry(answer).or_default() += count;
    }
    all
}

#[tokio::test]
async fn replicas_share_the_requests() {
    let (world, first, second) = pair("").await;
    // Many at a time: of two that answer as quickly, the one with fewer requests under way is taken.
    let answers = ask_at_once(&world, GET).await;
    assert!(answers.keys().all(|(status, _)| *status == 200), "{answers:?}");
    assert_eq!(first.seen() + second.seen(), 320);
    assert!(first.seen() > 50 && second.seen() > 50, "{} and {}", first.seen(), second.seen());
    let up = world.metric("caller", "kiro_replicas{to=\"callee\",state=\"up\"}").await;
    assert_eq!(up, 2);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_dead_sidecar_costs_no_request() {
    let events = events();
    let (mut world, first, second) = pair("").await;
    let mut client = Client::app_of(&world, "caller").await;
    ask(&mut client, GET, 20).await;
    world.replicas.remove(&("callee", 2)).unwrap().stop().await;
    let before = (first.seen(), second.seen());
    let answers = ask_at_once(&world, POST).await;
    assert_eq!(answers, BTreeMap::from([((200, "1".to_owned()), 320)]));
    assert_eq!((first.seen(), second.seen()), (before.0 + 320, before.1));
    assert_eq!(world.metric("caller", "kiro_replicas{to=\"callee\",state=\"up\"}").await, 1);
    let gone = on(2, world.ports["callee"].inbound).to_string();
    let line = events
        .wait_for("the replica is left out", |line| {
            line["message"] == "replica left out" && line["replica"] == gone.as_str()
        })
        .await;
    assert_eq!((&line["service"], &line["cause"]), (&"callee".into(), &"unreachable".into()), "{line}");
    // It comes back by itself.
    world.replica("callee", 2).await;
    eventually("the replica takes requests again", || async {
        world.get("caller", "http://callee/").await;
        second.seen() > before.1
    })
    .await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_that_is_gone_costs_no_request_whatever_its_method() {
    let mut world = World::start(spec("")).await;
    world.replica("callee", 2).await;
    let first = app(&mut world, 1).await;
    let mut client = Client::app_of(&world, "caller").await;
    let answers = ask(&mut client, POST, 50).await;
    assert_eq!(answers, BTreeMap::from([((200, "1".to_owned()), 50)]));
    assert_eq!(first.seen(), 50);
    let line = world.logs.wait_for("another attempt", |line| line["attempts"] == 2).await;
    assert_eq!((&line["status"], &line["direction"]), (&200.into(), &"outbound".into()), "{line}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn nobody_left_is_told_as_it_is() {
    let mut world = World::start(spec("")).await;
    world.replica("callee", 2).await;
    let down = Refusal { status: 502, code: "app_connect", cause: "the peer's sidecar said so" };
    check_refused(&world, "caller", GET, down).await;
    let line = world.logs.wait_for("why it ended", |line| line["gave_up"].is_string()).await;
    assert_eq!((&line["gave_up"], &line["attempts"]), (&"attempts".into(), &3.into()), "{line}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_failure_is_tried_again_only_where_that_is_declared() {
    let (world, first, second) = pair("").await;
    first.fail(true);
    second.fail(true);
    let mut client = Client::app_of(&world, "caller").await;
    assert_eq!(client.exchange(GET).await.status, 503);
    assert_eq!(first.seen() + second.seen(), 1);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_failing_application_is_spared_and_so_are_its_callers() {
    let (world, first, second) = pair("retries: 2").await;
    second.fail(true);
    let answers = ask_at_once(&world, GET).await;
    assert_eq!(answers, BTreeMap::from([((200, "1".to_owned()), 320)]));
    // Five failures in a row leave it out; so many more as were on their way by then, and a trial or two.
    assert!((5..=40).contains(&second.seen()), "{}", second.seen());
    assert_eq!(first.seen(), 320);
    assert_eq!(
        world.metric("caller", "kiro_retries_total{to=\"callee\",outcome=\"retried\"}").await,
        second.seen() as u64
    );
    assert_eq!(world.metric("caller", "kiro_replicas{to=\"callee\",state=\"ejected\"}").await, 1);
    second.fail(false);
    eventually("the replica is tried again", || async {
        world.get("caller", "http://callee/").await;
        world.metric("caller", "kiro_replicas{to=\"callee\",state=\"ejected\"}").await == 0
    })
    .await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_may_not_be_repeated_is_not() {
    let (world, first, second) = pair("retries: 2").await;
    first.fail(true);
    second.fail(true);
    let mut client = Client::app_of(&world, "caller").await;
    assert_eq!(client.exchange(POST).await.status, 503);
    assert_eq!(first.seen() + second.seen(), 1);
    let line = world.logs.wait_for("why it ended", |line| line["gave_up"].is_string()).await;
    assert_eq!(line["gave_up"], "not_idempotent", "{line}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn methods_and_statuses_are_those_that_are_declared() {
    let (world, first, second) = pair("retries: { count: 1, methods: [POST], statuses: [503] }").await;
    first.fail(true);
    second.fail(true);
    let mut client = Client::app_of(&world, "caller").await;
    assert_eq!(client.exchange(POST).await.status, 503);
    assert_eq!((first.seen(), second.seen()), (1, 1));
    assert_eq!(client.exchange(GET).await.status, 503);
    assert_eq!(first.seen() + second.seen(), 3);
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_attempt_that_takes_too_long_is_made_elsewhere() {
    let mut world = World::start(spec("timeout: 20s, retries: { count: 1, per_try: 200ms }")).await;
    world.replica("callee", 2).await;
    let first = app(&mut world, 1).await;
    world.app_on(2, "callee", |_| std::future::pending()).await;
    let mut client = Client::app_of(&world, "caller").await;
    let answers = ask(&mut client, GET, 10).await;
    assert_eq!(answers, BTreeMap::from([((200, "1".to_owned()), 10)]));
    assert_eq!(first.seen(), 10);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_breaker_opens_says_when_to_come_back_and_closes() {
    let events = events();
    let (world, first, second) = pair("breaker: { requests: 5, open: 1s }").await;
    first.fail(true);
    second.fail(true);
    let mut client = Client::app_of(&world, "caller").await;
    let mut answer = client.exchange(GET).await;
    for _ in 0..20 {
        answer = client.exchange(GET).await;
    }
    assert_eq!(answer.verdict(), (503, Some("breaker_open")));
    let after: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=2).contains(&after), "{after}");
    let seen = first.seen() + second.seen();
    assert!((5..=8).contains(&seen), "{seen}");
    assert_eq!(world.metric("caller", "kiro_breaker{to=\"callee\",state=\"open\"}").await, 1);
    events.wait_for("an event", |line| line["message"] == "breaker opened: too many requests fail").await;
    first.fail(false);
    second.fail(false);
    eventually("it closes", || async {
        world.get("caller", "http://callee/").await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        world.metric("caller", "kiro_breaker{to=\"callee\",state=\"closed\"}").await == 1
    })
    .await;
    assert_eq!(client.exchange(GET).await.status, 200);
    assert!(world.stop().await);
}

#[tokio::test]
async fn whoever_gives_too_little_time_leaves_no_replica_out() {
    let mut world = World::start(spec("breaker: { requests: 5 }")).await;
    world.replica("callee", 2).await;
    for host in [1, 2] {
        world.app_on(host, "callee", |_| std::future::pending()).await;
    }
    let hurried = "GET http://callee/a HTTP/1.1\r\nHost: callee\r\nx-kiro-deadline: 20\r\n\r\n";
    let mut client = Client::app_of(&world, "caller").await;
    for _ in 0..30 {
        assert_eq!(client.exchange(hurried).await.status, 504);
    }
    let up = ["up", "warming"].map(|state| format!("kiro_replicas{{to=\"callee\",state=\"{state}\"}}"));
    assert_eq!(world.metric("caller", &up[0]).await + world.metric("caller", &up[1]).await, 2);
    assert_eq!(world.metric("caller", "kiro_breaker{to=\"callee\",state=\"closed\"}").await, 1);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_request_that_can_not_be_signed_costs_no_retries() {
    let (world, first, second) = pair("retries: 2, breaker: { requests: 5 }").await;
    // A signature of ours under a label that is not: whoever sends it on would seem to vouch for it.
    let fields = "Signature-Input: other=(\"@method\");tag=\"kiro\"\r\nSignature: other=:YQ==:\r\n";
    let unsignable = format!("GET http://callee/a HTTP/1.1\r\nHost: callee\r\n{fields}\r\n");
    for _ in 0..10 {
        let mut client = Client::app_of(&world, "caller").await;
        assert_eq!(client.exchange(&unsignable).await.verdict(), (400, Some("signature_label_taken")));
    }
    assert_eq!(first.seen() + second.seen(), 0);
    for outcome in ["retried", "attempts", "budget", "throttled"] {
        let series = format!("kiro_retries_total{{to=\"callee\",outcome=\"{outcome}\"}}");
        assert_eq!(world.metric("caller", &series).await, 0, "{outcome}");
    }
    assert!(world.stop().await);
}
