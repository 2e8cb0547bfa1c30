//! Requests from outside the mesh: what is believed of them, and what they may do.

use std::sync::Arc;

use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::client::{Client, Refusal, check_line};
use crate::support::{Recorder, Spec, World, eventually};

const BOTH_PORTS: &str =
    "app: { port: {port} }, ingress: { port: {ingress}, tls_port: {ingress_tls}, names: [shop.example.com] }";

async fn world(front: &'static str, allow: &'static str) -> (World, Recorder) {
    let mut world = World::start(Spec { top: "", services: vec![("front", front)], allow }).await;
    let recorder = world.recorder("front").await;
    (world, recorder)
}

async fn open() -> (World, Recorder) {
    world(BOTH_PORTS, "  - { from: ingress, to: front }").await
}

async fn outside(world: &World) -> Client {
    Client::open(world.addresses("front").ingress.unwrap()).await
}

/// The fields whose names begin like this, as the application saw them.
fn fields(recorder: &Recorder, start: &str) -> Vec<(String, String)> {
    let seen = recorder.seen();
    let headers = &seen.last().unwrap().head.headers;
    let mut fields: Vec<_> = headers
        .iter()
        .filter(|(name, _)| name.as_str().starts_with(start))
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
        .collect();
    fields.sort_unstable();
    fields
}

fn owned<const N: usize>(fields: [(&str, &str); N]) -> Vec<(String, String)> {
    fields.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
}

const CLAIMS: &str = "GET /a?b HTTP/1.1\r\nHost: shop.example.com\r\nForwarded: for=10.9.9.9\r\n\
    X-Forwarded-For: 10.9.9.9\r\nX-Forwarded-Proto: gopher\r\nX-Forwarded-Host: bank.example\r\nX-Forwarded-Port: 1\r\n\
    X-Kiro-Caller: front\r\nx-kiro-host: front\r\nx-kiro-reject: no\r\nConnection: x-kiro-caller, x-hop\r\nx-hop: 1\r\n\r\n";

#[tokio::test]
async fn what_the_way_was_is_the_ingress_s_word() {
    let (world, recorder) = open().await;
    let answer = outside(&world).await.exchange(CLAIMS).await;
    assert_eq!((answer.verdict(), answer.body.as_str()), ((200, None), "recorded"));
    let expected = [
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-host", "shop.example.com"),
        ("x-forwarded-proto", "http"),
        ("x-kiro-caller", "ingress"),
    ];
    assert_eq!(fields(&recorder, "x-"), owned(expected));
    assert_eq!(fields(&recorder, "forwarded"), []);
    assert_eq!(recorder.only().head.headers["host"], "shop.example.com");
    let line = world.logs.wait_for("ingress", |line| line["direction"] == "ingress").await;
    assert_eq!((&line["caller"], &line["caller_proof"]), (&"ingress".into(), &"none".into()), "{line}");
    // Nothing else says who a stranger is.
    assert!(line["remote"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
    assert_eq!((&line["callee"], &line["path"]), (&"front".into(), &"/a".into()), "{line}");
    assert_eq!((&line["policy"], &line["signature"]), (&"allowed".into(), &"none".into()), "{line}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_proxy_that_is_trusted_is_believed_but_for_our_own_fields() {
    let front = "app: { port: {port} }, ingress: { port: {ingress}, trust_forwarded: true }";
    let (world, recorder) = world(front, "  - { from: ingress, to: front }").await;
    assert_eq!(outside(&world).await.exchange(CLAIMS).await.status, 200);
    let expected = [
        ("x-forwarded-for", "10.9.9.9"),
        ("x-forwarded-host", "bank.example"),
        ("x-forwarded-port", "1"),
        ("x-forwarded-proto", "gopher"),
        ("x-kiro-caller", "ingress"),
    ];
    assert_eq!(fields(&recorder, "x-"), owned(expected));
    assert_eq!(fields(&recorder, "forwarded"), owned([("forwarded", "for=10.9.9.9")]));
    assert!(world.stop().await);
}

async fn check_refused(world: &World, request: &str, expected: Refusal<'_>) {
    let before = world.logs.lines().len();
    let answer = outside(world).await.exchange(request).await;
    assert_eq!(answer.verdict(), (expected.status, Some(expected.code)), "{request}");
    check_line(world, "front", before, request, expected).await;
}

#[tokio::test]
async fn the_policy_s_lines_for_the_ingress_are_all_that_is_allowed() {
    let (world, recorder) =
        world(BOTH_PORTS, "  - { from: ingress, to: front, methods: [GET], paths: [/open/**] }").await;
    for (request, code) in [
        ("POST /open/a HTTP/1.1\r\nHost: front\r\nContent-Length: 0\r\n\r\n", "policy_method"),
        ("GET /shut HTTP/1.1\r\nHost: front\r\n\r\n", "policy_path"),
        ("GET http://front/shut HTTP/1.1\r\nHost: front\r\n\r\n", "policy_path"),
        ("GET /open//shut HTTP/1.1\r\nHost: front\r\n\r\n", "policy_ambiguous_path"),
    ] {
        check_refused(&world, request, Refusal { status: 403, code, cause: "" }).await;
    }
    assert!(recorder.seen().is_empty());
    assert_eq!(outside(&world).await.exchange("GET /open/a/b HTTP/1.1\r\nHost: x\r\n\r\n").await.status, 200);
    recorder.only();
    let denied = "kiro_requests_total{from=\"ingress\",to=\"front\",method=\"read\",status=\"4xx\"}";
    assert_eq!(world.metric("front", denied).await, 3);
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_ingress_carries_no_tunnels_and_no_nonsense() {
    let (world, recorder) = open().await;
    for (request, status, code, cause) in [
        ("CONNECT front:80 HTTP/1.1\r\nHost: front:80\r\n\r\n", 403, "policy_tunnel", "carries no tunnels"),
        (
            "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n",
            403,
            "policy_tunnel",
            "no tunnels",
        ),
        ("GET /a/../b HTTP/1.1\r\nHost: front\r\n\r\n", 400, "path_invalid", "dot segment"),
        ("OPTIONS * HTTP/1.1\r\nHost: front\r\n\r\n", 400, "path_invalid", "/"),
        ("GET /a HTTP/1.1\r\nHost: front\r\nHost: front\r\n\r\n", 400, "host_duplicate", ""),
        ("GET /a HTTP/1.1\r\n\r\n", 400, "host_missing", ""),
        (
            "GET /a HTTP/1.1\r\nHost: front\r\nConnection: host\r\n\r\n",
            400,
            "header_invalid",
            "Connection names",
        ),
    ] {
        check_refused(&world, request, Refusal { status, code, cause }).await;
    }
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_the_library_refuses_is_logged_here_too() {
    let (world, recorder) = open().await;
    let large = format!("GET /a HTTP/1.1\r\nHost: front\r\nx: {}\r\n\r\n", "a".repeat(64 * 1024));
    let twice =
        "POST /a HTTP/1.1\r\nHost: front\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello".to_owned();
    for (request, status, code, cause) in
        [(large, 431, "headers_too_large", "too large"), (twice, 400, "message_invalid", "content-length")]
    {
        let before = world.logs.lines().len();
        let mut client = outside(&world).await;
        client.send(request).await;
        assert_eq!(client.head().await.status, status);
        assert_eq!(client.rest().await, "");
        check_line(&world, "front", before, code, Refusal { status, code, cause }).await;
    }
    assert_eq!(world.metric("front", "kiro_library_answers_total").await, 2);
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_slow_or_absent_application_is_told_apart() {
    let front = "app: { port: {port} }, ingress: { port: {ingress} }, traffic: { timeout: 300ms }";
    let mut world = World::start(Spec {
        top: "",
        services: vec![("front", front)],
        allow: "  - { from: ingress, to: front }",
    })
    .await;
    let get = "GET /a HTTP/1.1\r\nHost: front\r\n\r\n";
    check_refused(&world, get, Refusal { status: 502, code: "app_connect", cause: "refused" }).await;
    world.app("front", |_| std::future::pending()).await;
    check_refused(&world, get, Refusal { status: 504, code: "app_timeout", cause: "in time" }).await;
    assert!(world.stop().await);
}

async fn tls(world: &World, name: &'static str, alpn: &[&[u8]]) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(world.mesh.pki.authority.ca_pem()).unwrap()).unwrap();
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let stream = TcpStream::connect(world.addresses("front").ingress_tls.unwrap()).await.unwrap();
    let name = ServerName::try_from(name).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
}

#[tokio::test]
async fn the_tls_port_speaks_both_versions() {
    let (world, recorder) = open().await;
    let stream = tls(&world, "localhost", &[b"http/1.1"]).await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let mut client = Client::on(stream);
    assert_eq!(client.exchange(CLAIMS).await.body, "recorded");
    assert_eq!(fields(&recorder, "x-forwarded-proto"), owned([("x-forwarded-proto", "https")]));
    let refused = client.exchange("CONNECT front:80 HTTP/1.1\r\nHost: front:80\r\n\r\n").await;
    assert_eq!(refused.verdict(), (403, Some("policy_tunnel")));

    let stream = tls(&world, "shop.example.com", &[b"h2", b"http/1.1"]).await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = http::Request::get("https://shop.example.com/two?b")
        .header("x-forwarded-for", "10.9.9.9")
        .header("x-kiro-caller", "front")
        .body(Empty::<bytes::Bytes>::new())
        .unwrap();
    let answer = sender.send_request(request).await.unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "recorded");
    let expected = [
        ("x-forwarded-for", "127.0.0.1"),
        ("x-forwarded-host", "shop.example.com"),
        ("x-forwarded-proto", "https"),
        ("x-kiro-caller", "ingress"),
    ];
    assert_eq!(fields(&recorder, "x-"), owned(expected));
    assert_eq!(recorder.seen()[1].head.uri, "/two?b");
    assert_eq!(recorder.seen()[1].head.headers["host"], "shop.example.com");
    for protocol in ["HTTP/1.1", "HTTP/2"] {
        world.logs.wait_for(protocol, |line| line["protocol"] == protocol && line["status"] == 200).await;
    }
    drop((client, sender));
    driver.await.unwrap().unwrap();
    assert!(world.stop().await);
}

#[tokio::test]
async fn each_port_says_what_it_does_not_speak() {
    let (world, recorder) = open().await;
    let before = world.logs.lines().len();
    let mut client = outside(&world).await;
    client.send([22, 3, 1, 0, 5, 1, 0, 0, 1, 3]).await;
    assert_eq!(client.rest().await, "");
    let expected =
        Refusal { status: 400, code: "message_invalid", cause: "TLS on a port that speaks plain HTTP" };
    check_line(&world, "front", before, "TLS to the plain port", expected).await;

    let mut client = Client::open(world.addresses("front").ingress_tls.unwrap()).await;
    client.send("GET / HTTP/1.1\r\nHost: front\r\n\r\n").await;
    client.rest().await;
    drop(client);
    eventually("the failure is counted", || async {
        world
            .metric("front", "kiro_tls_handshakes_total{direction=\"ingress\",outcome=\"tls_plain_http\"}")
            .await
            == 1
    })
    .await;
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}
