//! One client that misbehaves is no other client's concern.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::{PATIENCE, Spec, World};

#[tokio::test]
async fn silent_connections_keep_nobody_out() {
    let mut world = World::start(Spec::pair()).await;
    world.recorder("callee").await;
    let inbound = world.addresses("callee").inbound;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(inbound).await.unwrap());
    }
    let answer = tokio::time::timeout(PATIENCE, world.get("caller", "http://callee/a")).await.unwrap();
    assert_eq!(answer.status, 200, "the first call of this edge, which needs a handshake");
    drop(silent);
    assert!(world.stop().await);
}

#[tokio::test]
async fn empty_frames_of_a_client_do_not_add_up_on_the_edge() {
    let mut world = World::start(Spec::pair()).await;
    world.recorder("callee").await;
    let stream = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    // A body that ends with an empty frame, as many libraries write it. A hundred of them would end a connection.
    for number in 0..150 {
        let request = Request::post("http://callee/a").body(()).unwrap();
        let (answer, mut body) = send.clone().ready().await.unwrap().send_request(request, false).unwrap();
        body.send_data(Bytes::from_static(b"hello"), false).unwrap();
        tokio::task::yield_now().await;
        body.send_data(Bytes::new(), true).unwrap();
        let answer = tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap();
        assert_eq!(answer.status(), 200, "request {number}");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn slow_readers_do_not_stop_an_edge() {
    let mut world = World::start(Spec::pair()).await;
    world
        .app("callee", |request: Request<Incoming>| async move {
            let size = if request.uri().path() == "/big" { 5_000_000 } else { 10 };
            Response::new(Full::new(Bytes::from(vec![b'a'; size])))
        })
        .await;
    let outbound = world.addresses("caller").outbound;
    let mut readers = Vec::new();
    for _ in 0..8 {
        let mut reader = TcpStream::connect(outbound).await.unwrap();
        reader.write_all(b"GET http://callee/big HTTP/1.1\r\nHost: callee\r\n\r\n").await.unwrap();
        readers.push(reader);
    }
    for reader in &readers {
        // Its answer has begun, and nobody reads it.
        tokio::time::timeout(PATIENCE, reader.readable()).await.unwrap().unwrap();
    }
    let answer = tokio::time::timeout(PATIENCE, world.get("caller", "http://callee/small")).await.unwrap();
    assert_eq!((answer.status, answer.body.len()), (200, 10));
    drop(readers);
    world.stop().await;
}
