//! How a sidecar ends: what it has begun comes to its end, and who comes too late is in no doubt.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use crate::client::Client;
use crate::support::{PATIENCE, Spec, World, eventually};

const GET: &str = "GET http://callee/a HTTP/1.1\r\nHost: callee\r\n\r\n";

/// A client that takes little at a time, so that what it does not read stays with the sidecar.
async fn small_window(address: std::net::SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.set_nonblocking(true).unwrap();
    TcpSocket::from_std_stream(socket.into()).connect(address).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_bytes_of_an_answer_are_written_before_the_end() {
    // Which size leaves bytes with the sidecar when the application has given all of them depends on the system's buffers.
    for megabytes in 1..=6 {
        let body = Bytes::from(vec![b'x'; megabytes << 20]);
        let mut world = World::start(Spec {
            top: "",
            services: vec![("front", "app: { port: {port} }, ingress: { port: {ingress} }")],
            allow: "  - { from: ingress, to: front }",
        })
        .await;
        let answer = body.clone();
        world.app("front", move |_| std::future::ready(Response::new(Full::new(answer.clone())))).await;
        let stream = small_window(world.addresses("front").ingress.unwrap()).await;
        let mut client = Client::on(stream);
        client.send("GET / HTTP/1.1\r\nHost: front\r\n\r\n").await;
        let head = client.head().await;
        assert_eq!(head.status, 200);

        let stopping = tokio::spawn(world.mesh.sidecars.remove("front").unwrap().stop());
        let received = client.bytes(body.len()).await;
        assert!(received == body, "{megabytes} MiB");
        assert!(stopping.await.unwrap());
    }
}

/// What a crowd of callers got, and how much of it the callee had worked on.
#[derive(Default)]
struct Crowd {
    answered: AtomicUsize,
    worked: AtomicUsize,
    over: AtomicBool,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_too_late_was_not_processed() {
    for _ in 0..10 {
        let mut world = World::start(Spec::pair()).await;
        let crowd = Arc::new(Crowd::default());
        let seen = Arc::clone(&crowd);
        world
            .app("callee", move |_| {
                seen.worked.fetch_add(1, Ordering::SeqCst);
                std::future::ready(Response::new(Full::new(Bytes::from_static(b"done"))))
            })
            .await;
        let mut callers = Vec::new();
        for _ in 0..8 {
            let (mut client, crowd) = (Client::app_of(&world, "caller").await, Arc::clone(&crowd));
            callers.push(tokio::spawn(async move {
                while !crowd.over.load(Ordering::SeqCst) {
                    let answer = client.exchange(GET).await;
                    match answer.verdict() {
                        (200, None) => drop(crowd.answered.fetch_add(1, Ordering::SeqCst)),
                        // Nobody there any more, or gone before the handshake was over: never sent.
                        (502, Some("upstream_connect" | "tls_closed")) => return,
                        other => panic!("{other:?} leaves its caller in doubt"),
                    }
                }
            }));
        }
        let busy = || std::future::ready(crowd.answered.load(Ordering::SeqCst) > 200);
        eventually("a crowd at work", busy).await;
        assert!(world.mesh.sidecars.remove("callee").unwrap().stop().await);
        for caller in callers {
            tokio::time::timeout(PATIENCE, caller).await.unwrap().unwrap();
        }
        assert_eq!(crowd.answered.load(Ordering::SeqCst), crowd.worked.load(Ordering::SeqCst));
        assert!(world.stop().await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_sidecar_that_has_nothing_to_do() {
    let mut world = World::start(Spec::pair()).await;
    let _recorder = world.recorder("callee").await;
    let mut client = Client::app_of(&world, "caller").await;
    assert_eq!(client.exchange(GET).await.status, 200);
    // All connections are open: the client's, the one between the sidecars, the one to the application.
    for service in ["callee", "caller"] {
        let begin = Instant::now();
        assert!(world.mesh.sidecars.remove(service).unwrap().stop().await);
        let took = begin.elapsed();
        assert!(took < Duration::from_millis(500), "{service}: {took:?}");
    }
    assert_eq!(client.rest().await, "");
    assert!(world.stop().await);
}
