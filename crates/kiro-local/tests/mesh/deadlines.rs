//! How much time a request has, and who learns of it.

use std::time::{Duration, Instant};

use http::Method;

use crate::client::{Client, Refusal, check_refused};
use crate::h2_ends::{H2App, H2Client, request};
use crate::support::{Spec, World};

/// `caller` may call `callee`, which is entered like this.
fn spec(callee: &'static str) -> Spec {
    Spec { services: vec![("caller", "app: { port: {port} }"), ("callee", callee)], ..Spec::pair() }
}

/// A request with less time than the mesh file gives it.
fn hurried(fields: &str) -> String {
    format!("GET http://callee/a HTTP/1.1\r\nHost: callee\r\n{fields}\r\n")
}

#[tokio::test]
async fn an_application_may_wish_for_less_time() {
    let mut world = World::start(spec("app: { port: {port} }")).await;
    world.app("callee", |_| std::future::pending()).await;
    let before = Instant::now();
    // The callee's sidecar was told, and is the one that gives up.
    let slow = Refusal { status: 504, code: "app_timeout", cause: "the peer's sidecar said so" };
    check_refused(&world, "caller", &hurried("x-kiro-deadline: 200\r\n"), slow).await;
    assert!((200..3000).contains(&before.elapsed().as_millis()), "{:?}", before.elapsed());
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_is_left_is_told_to_the_next_application_and_nothing_where_nobody_asked() {
    let mut world = World::start(spec("app: { port: {port} }")).await;
    let recorder = world.recorder("callee").await;
    let mut client = Client::app_of(&world, "caller").await;
    assert_eq!(client.exchange(hurried("x-kiro-deadline: 5000\r\n")).await.status, 200);
    assert_eq!(client.exchange(hurried("")).await.status, 200);
    let told: Vec<Option<u64>> = recorder
        .seen()
        .iter()
        .map(|request| {
            request.head.headers.get("x-kiro-deadline").map(|left| left.to_str().unwrap().parse().unwrap())
        })
        .collect();
    assert!(matches!(told[..], [Some(1000..=5000), None]), "{told:?}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn nobody_may_wish_for_more_time() {
    let mut world = World::start(spec("app: { port: {port} }, traffic: { timeout: 200ms }")).await;
    world.app("callee", |_| std::future::pending()).await;
    let before = Instant::now();
    let slow = Refusal { status: 504, code: "app_timeout", cause: "the peer's sidecar said so" };
    check_refused(&world, "caller", &hurried("x-kiro-deadline: 3600000\r\n"), slow).await;
    assert!(before.elapsed() < Duration::from_secs(3), "{:?}", before.elapsed());
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_has_no_time_left_is_not_begun() {
    let mut world = World::start(spec("app: { port: {port} }")).await;
    let recorder = world.recorder("callee").await;
    let over = Refusal { status: 504, code: "deadline_over", cause: "no time was left" };
    check_refused(&world, "caller", &hurried("x-kiro-deadline: 0\r\n"), over).await;
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_wish_that_is_no_time_is_refused() {
    let mut world = World::start(spec("app: { port: {port} }")).await;
    let recorder = world.recorder("callee").await;
    for wish in ["-1", "1s", "", "0200", "3600001", "99999999999999999999"] {
        let wrong = Refusal { status: 400, code: "header_invalid", cause: "x-kiro-deadline" };
        check_refused(&world, "caller", &hurried(&format!("x-kiro-deadline: {wish}\r\n")), wrong).await;
    }
    let twice = Refusal { status: 400, code: "header_invalid", cause: "twice" };
    let fields = "x-kiro-deadline: 100\r\nx-kiro-deadline: 100\r\n";
    check_refused(&world, "caller", &hurried(fields), twice).await;
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_route_has_a_time_of_its_own() {
    const CALLEE: &str = "app: { port: {port} }, traffic: { timeout: 60s, routes: \
        [{ methods: [GET], paths: [\"/quick/*\"], timeout: 200ms }] }";
    let mut world = World::start(spec(CALLEE)).await;
    world.app("callee", |_| std::future::pending()).await;
    let slow = Refusal { status: 504, code: "app_timeout", cause: "the peer's sidecar said so" };
    check_refused(&world, "caller", "GET http://callee/quick/a HTTP/1.1\r\nHost: callee\r\n\r\n", slow).await;
    for request in [
        "POST http://callee/quick/a HTTP/1.1\r\nHost: callee\r\nContent-Length: 0\r\n\r\n",
        "GET http://callee/slow HTTP/1.1\r\nHost: callee\r\n\r\n",
    ] {
        let mut client = Client::app_of(&world, "caller").await;
        client.send(request).await;
        assert!(client.is_silent().await, "{request}");
    }
    world.stop().await;
}

#[tokio::test]
async fn what_comes_from_outside_says_nothing_about_time() {
    let mut world = World::start(Spec {
        services: vec![("front", "app: { port: {port} }, ingress: { port: {ingress} }")],
        allow: "  - { from: ingress, to: front }",
        top: "",
    })
    .await;
    let recorder = world.recorder("front").await;
    let mut client = Client::open(world.addresses("front").ingress.unwrap()).await;
    let get = "GET /a HTTP/1.1\r\nHost: front\r\nx-kiro-deadline: 0\r\n\r\n";
    assert_eq!(client.exchange(get).await.status, 200);
    assert!(!recorder.only().head.headers.contains_key("x-kiro-deadline"));
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_call_of_grpc_ends_with_the_time_that_its_caller_gave_it() {
    let world = World::start(spec("app: { port: {port}, protocol: grpc }")).await;
    let _app = H2App::start(&world, "callee", |_, respond| async move {
        std::future::pending::<()>().await;
        drop(respond);
    })
    .await;
    let client = H2Client::app_of(&world, "caller").await;
    let fields = [("content-type", "application/grpc"), ("te", "trailers"), ("grpc-timeout", "200m")];
    let call = request(Method::POST, "http://callee/shop.Orders/Late", &fields);
    let answer = client.exchange(call, b"\0\0\0\0\0").await;
    // DEADLINE_EXCEEDED.
    assert_eq!((answer.head.status.as_u16(), answer.field("grpc-status")), (200, Some("4")));
    assert!(world.stop().await);
}
