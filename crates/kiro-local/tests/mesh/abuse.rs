//! One client that misbehaves is no other client's concern.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::client::Client;
use crate::support::{PATIENCE, Spec, World, eventually};

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

/// A mesh whose callee has large answers, of which one piece of memory is enough.
async fn world_with_large_answers() -> World {
    let mut world = World::start(Spec::pair()).await;
    let large = Bytes::from(vec![b'a'; 5_000_000]);
    world
        .app("callee", move |request: Request<Incoming>| {
            let large = large.clone();
            async move {
                let body =
                    if request.uri().path() == "/big" { large } else { Bytes::from_static(b"0123456789") };
                Response::new(Full::new(body))
            }
        })
        .await;
    world
}

/// Others go on being served, large answers included, while so many answers are left unread that they would fill the edge.
async fn check_edge_goes_on(world: &World) {
    let mut client = Client::app_of(world, "caller").await;
    for (path, length) in [("small", 10), ("small", 10), ("big", 5_000_000), ("small", 10)] {
        let answer = client.exchange(format!("GET http://callee/{path} HTTP/1.1\r\nHost: x\r\n\r\n")).await;
        assert_eq!((answer.status, answer.body.len()), (200, length));
    }
}

#[tokio::test]
async fn a_crowd_of_slow_readers_does_not_stop_an_edge() {
    let world = world_with_large_answers().await;
    let outbound = world.addresses("caller").outbound;
    let in_flight = "kiro_requests_in_flight{direction=\"outbound\"}";
    let mut readers = Vec::new();
    while readers.len() < 700 {
        // No more at a time than the application accepts.
        for _ in 0..50 {
            // The less the system takes in the reader's place, the less has to be sent.
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_recv_buffer_size(4096).unwrap();
            let mut reader = socket.connect(outbound).await.unwrap();
            reader.write_all(b"GET http://callee/big HTTP/1.1\r\nHost: callee\r\n\r\n").await.unwrap();
            readers.push(reader);
        }
        eventually("they are under way", || async {
            world.metric("callee", "kiro_app_connections_opened_total").await as usize >= readers.len()
        })
        .await;
    }
    assert!(world.metric("caller", in_flight).await > 600);
    check_edge_goes_on(&world).await;
    drop(readers);
    world.stop().await;
}

#[tokio::test]
async fn windows_of_zero_do_not_stop_an_edge() {
    let world = world_with_large_answers().await;
    let mut open = Vec::new();
    for _ in 0..4 {
        let stream = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
        let mut builder = h2::client::Builder::new();
        let (send, connection) = builder.initial_window_size(0).handshake::<_, Bytes>(stream).await.unwrap();
        tokio::spawn(connection);
        for _ in 0..4 {
            let mut answers = Vec::new();
            for _ in 0..50 {
                let request = Request::get("http://callee/big").body(()).unwrap();
                let (answer, _) = send.clone().ready().await.unwrap().send_request(request, true).unwrap();
                answers.push(answer);
            }
            for answer in answers {
                // Its head has come, and its body may not.
                open.push(tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap());
            }
        }
    }
    assert!(open.iter().all(|answer| answer.status() == 200), "{} answers", open.len());
    check_edge_goes_on(&world).await;
    drop(open);
    world.stop().await;
}

/// A callee whose application says something without end, and a caller who asks it once; whether others are served meanwhile.
async fn check_endless(begin: &'static [u8], again: &'static [u8], status: Option<u16>) {
    let mut spec = Spec::pair();
    spec.services[1].1 = "app: { port: {port} }, traffic: { timeout: 1s }";
    let world = World::start(spec).await;
    let app = world.listen("callee").await;
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = app.accept().await.unwrap();
            tokio::spawn(async move {
                let mut head = [0; 4096];
                let count = stream.read(&mut head).await.unwrap_or(0);
                if !head[..count].starts_with(b"GET /endless") {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
                    return;
                }
                let _ = stream.write_all(begin).await;
                while stream.write_all(again).await.is_ok() {}
            });
        }
    });
    let mut endless = Client::app_of(&world, "caller").await;
    endless.send("GET http://callee/endless HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let other = tokio::time::timeout(PATIENCE, world.get("caller", "http://callee/other")).await.unwrap();
    assert_eq!((other.status, other.body.as_str()), (200, "ok"));
    match status {
        Some(status) => assert_eq!(endless.head().await.status, status),
        // An answer that has begun can only be broken off.
        None => assert!(!endless.rest().await.ends_with("0\r\n\r\n")),
    }
    // However it ends, it ends, and is no longer under way.
    let in_flight = "kiro_requests_in_flight{direction=\"inbound\"}";
    eventually("it has ended", || async { world.metric("callee", in_flight).await == 0 }).await;
    drop(endless);
    serving.abort();
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_that_only_ever_says_1xx_is_too_late() {
    check_endless(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", Some(504)).await;
}

#[tokio::test]
async fn trailers_without_end_break_an_answer_off() {
    check_endless(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n5\r\nhello\r\n0\r\n",
        b"x: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n",
        None,
    )
    .await;
}

#[tokio::test]
async fn a_head_without_end_is_refused() {
    check_endless(
        b"HTTP/1.1 200 OK\r\n",
        b"x: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n",
        Some(502),
    )
    .await;
}
