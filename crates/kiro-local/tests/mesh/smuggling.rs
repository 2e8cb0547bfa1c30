//! No bytes of one request become another: what the application reads is framed by the body that really comes.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{Answer, Spec, World, raw};

/// An application that keeps every byte and answers each head with 200, whatever length it names: as lenient as they come.
async fn lenient(world: &World, service: &str) -> Arc<Mutex<String>> {
    let seen = Arc::new(Mutex::new(String::new()));
    let listener = TcpListener::bind(("127.0.0.1", world.ports[service].app)).await.unwrap();
    let kept = Arc::clone(&seen);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(answer_heads(stream, Arc::clone(&kept)));
        }
    });
    seen
}

async fn answer_heads(mut stream: TcpStream, seen: Arc<Mutex<String>>) {
    let mut buffer = [0; 4096];
    let mut unanswered = String::new();
    loop {
        let Ok(count) = stream.read(&mut buffer).await else { return };
        if count == 0 {
            return;
        }
        let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
        seen.lock().unwrap().push_str(&text);
        unanswered.push_str(&text);
        while let Some(end) = unanswered.find("\r\n\r\n") {
            unanswered.drain(..end + 4);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        }
    }
}

const WEBSOCKET: &str =
    "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

#[tokio::test]
async fn a_handshake_with_a_length_does_not_reach_the_application() {
    let world = World::start(Spec::pair()).await;
    let seen = lenient(&world, "callee").await;
    for framing in ["Content-Length: 156", "Transfer-Encoding: chunked"] {
        let request = format!("GET /a HTTP/1.1\r\nHost: callee\r\n{WEBSOCKET}{framing}\r\n\r\n");
        let answer = Answer::parse(&world.raw_outbound("caller", request.as_bytes()).await);
        assert_eq!(answer.verdict(), (400, Some("header_invalid")), "{framing}");
    }
    assert_eq!(*seen.lock().unwrap(), "");
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_connection_that_was_asked_to_switch_carries_nothing_else() {
    let world = World::start(Spec::pair()).await;
    let seen = lenient(&world, "callee").await;
    let handshake = format!("GET /switch HTTP/1.1\r\nHost: callee\r\n{WEBSOCKET}\r\n");
    let answer = Answer::parse(&world.raw_outbound("caller", handshake.as_bytes()).await);
    assert_eq!(answer.verdict(), (502, Some("app_no_upgrade")), "a 200 opens no stream");
    assert_eq!(world.get("caller", "http://callee/next").await.status, 200);
    assert_eq!(seen.lock().unwrap().matches("HTTP/1.1\r\n").count(), 2);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_body_of_a_get_arrives_framed() {
    let mut world = World::start(Spec::pair()).await;
    let recorder = world.recorder("callee").await;
    let request = "GET /a HTTP/1.1\r\nHost: callee\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let answer = Answer::parse(&world.raw_outbound("caller", request.as_bytes()).await);
    assert_eq!(answer.status, 200);
    let seen = recorder.only();
    assert_eq!((seen.body.as_ref(), seen.whole), (&b"hello"[..], true));
    assert!(world.stop().await);
}

#[tokio::test]
async fn trailers_can_not_speak_for_sidecars() {
    let spec = Spec {
        top: "",
        services: vec![("front", "app: { port: {port} }, ingress: { port: {ingress} }")],
        allow: "  - { from: ingress, to: front }",
    };
    let mut world = World::start(spec).await;
    let seen: Arc<Mutex<Vec<HeaderMap>>> = Arc::default();
    let kept = Arc::clone(&seen);
    world
        .app("front", move |request: Request<Incoming>| {
            let kept = Arc::clone(&kept);
            async move {
                let (head, body) = request.into_parts();
                let trailers = body.collect().await.unwrap().trailers().cloned().unwrap_or_default();
                *kept.lock().unwrap() = vec![head.headers, trailers];
                Response::new(Full::new(Bytes::new()))
            }
        })
        .await;
    let ingress = world.addresses("front").ingress.unwrap();
    let request = "POST /a HTTP/1.1\r\nHost: front\r\nTransfer-Encoding: chunked\r\nTrailer: x-kiro-caller, x-other\r\nX_Kiro_Caller: head\r\nConnection: close\r\n\r\n2\r\nhi\r\n0\r\nx-kiro-caller: profile\r\nx-other: 1\r\n\r\n";
    assert_eq!(Answer::parse(&raw(ingress, request.as_bytes()).await).status, 200);
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    let [head, trailers] = &seen[..] else { panic!("{seen:?}") };
    assert_eq!(head["x-kiro-caller"], "ingress");
    assert!(!head.contains_key("x_kiro_caller"), "{head:?}");
    assert_eq!(trailers["x-other"], "1");
    assert!(!trailers.contains_key("x-kiro-caller"), "{trailers:?}");
    assert!(world.stop().await);
}
