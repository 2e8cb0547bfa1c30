//! Who has to leave hears of it: where a listener is full, and where a sidecar ends.

use std::net::SocketAddr;
use std::sync::Arc;

use http::Method;
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::client::Client;
use crate::h2_ends::{H2Client, bytes_of, request, soon};
use crate::h2_frames::{
    END_HEADERS, END_STREAM, GOAWAY, HEADERS, frame, preface, read_frame, request as head_of,
};
use crate::hostile::{self, Leaf, MESH};
use crate::support::{Spec, World, eventually};

/// `caller` may use `chat`, whose WebSockets send back what they get.
async fn world() -> World {
    World::start(Spec {
        top: "signatures: off",
        services: vec![
            ("caller", "app: { port: {port} }"),
            ("chat", "app: { port: {port} }, ingress: { port: {ingress} }"),
        ],
        allow: "  - { from: caller, to: chat }\n  - { from: ingress, to: chat }",
    })
    .await
}

/// An application that answers requests, and opens whatever asks for a WebSocket. At `/wait` it does not answer, and says so.
async fn chat(world: &World) -> mpsc::UnboundedReceiver<()> {
    let app = world.listen("chat").await;
    let (tell, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let mut client = Client::on(app.accept().await.unwrap().0);
            let tell = tell.clone();
            tokio::spawn(async move {
                let head = client.request_head().await.to_ascii_lowercase();
                if head.starts_with("get /wait") {
                    tell.send(()).unwrap();
                    return std::future::pending().await;
                }
                if !head.contains("upgrade: websocket") {
                    return client
                        .send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
                        .await;
                }
                client
                    .send(
                        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
                         Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
                    )
                    .await;
                let (mut read, mut write) = client.into_stream().into_split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    told
}

async fn websocket(address: SocketAddr) -> Client {
    let mut client = Client::open(address).await;
    client
        .send(
            "GET /chat HTTP/1.1\r\nHost: chat\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        )
        .await;
    assert_eq!(client.head().await.status, 101);
    echo(&mut client).await;
    client
}

async fn echo(socket: &mut Client) {
    socket.send("hello").await;
    assert_eq!(socket.bytes(5).await, b"hello");
}

/// A tunnel to `chat`, which speaks HTTP, after a request inside.
async fn tunnel(world: &World) -> Client {
    let mut client = Client::app_of(world, "caller").await;
    client.send("CONNECT chat:80 HTTP/1.1\r\nHost: chat:80\r\n\r\n").await;
    assert_eq!(client.head().await.status, 200);
    assert_eq!(client.exchange("GET /a HTTP/1.1\r\nHost: chat\r\n\r\n").await.body, "ok");
    client
}

#[tokio::test]
async fn a_tunnel_of_http_without_a_request_makes_room_and_a_websocket_does_not() {
    let world = world().await;
    let _told = chat(&world).await;
    let outbound = world.addresses("caller").outbound;
    let mut socket = websocket(outbound).await;
    let mut by_http1 = tunnel(&world).await;
    let outer = H2Client::app_of(&world, "caller").await;
    let (head, recv, send) = outer.call(request(Method::CONNECT, "chat:80", &[]), false).await.head().await;
    assert_eq!(head.status, 200);
    let mut by_h2 = Client::on(bytes_of(recv, send));
    assert_eq!(by_h2.exchange("GET /a HTTP/1.1\r\nHost: chat\r\n\r\n").await.body, "ok");
    let cap = world.metric("caller", "kiro_limit{limit=\"connections\"}").await as usize;
    let evicted = "kiro_connections_evicted_total{listener=\"outbound\"}";
    let mut crowd = Vec::with_capacity(cap);
    while world.metric("caller", evicted).await < 2 {
        assert!(crowd.len() < 3 * cap, "the bound is never run into");
        for _ in 0..(cap / 8).max(1) {
            crowd.push(TcpStream::connect(outbound).await.unwrap());
        }
    }
    // They were idle for longest.
    assert_eq!(by_http1.rest().await, "");
    assert_eq!(by_h2.rest().await, "");
    echo(&mut socket).await;
    drop((crowd, socket, outer));
    assert!(world.stop().await);
}

/// Waits for the goodbye of an HTTP/2 connection.
async fn goodbye<S: AsyncRead + Unpin>(mut stream: S) {
    while soon("a frame", read_frame(&mut stream)).await.expect("a GOAWAY comes before the end").kind
        != GOAWAY
    {}
}

#[tokio::test]
async fn a_sidecar_that_drains_says_goodbye_while_a_request_is_under_way() {
    let world = world().await;
    let mut waits = chat(&world).await;
    let ask = [preface(), frame(HEADERS, END_HEADERS | END_STREAM, 1, &head_of("GET", "chat"))].concat();
    let config = Arc::new(hostile::client(&world, Some(&Leaf::of(&world, "caller")), MESH));
    let peer = TcpStream::connect(world.addresses("chat").inbound).await.unwrap();
    let mut peer = hostile::handshake(peer, "chat", &config).await.unwrap();
    let mut client = TcpStream::connect(world.addresses("chat").ingress.unwrap()).await.unwrap();
    peer.write_all(&ask).await.unwrap();
    peer.flush().await.unwrap();
    client.write_all(&ask).await.unwrap();
    let answered = "kiro_app_connections_opened_total";
    eventually("both are served", || async { world.metric("chat", answered).await == 2 }).await;
    // What keeps the sidecar from ending at once.
    let mut waiting = Client::open(world.addresses("chat").ingress.unwrap()).await;
    waiting.send("GET /wait HTTP/1.1\r\nHost: chat\r\n\r\n").await;
    soon("the request at the application", waits.recv()).await.unwrap();
    let (clean, (), ()) = tokio::join!(world.stop(), goodbye(peer), goodbye(client));
    assert!(!clean, "the request never ended");
}

#[tokio::test]
async fn a_tunnel_of_http_without_a_request_does_not_keep_a_sidecar() {
    let world = world().await;
    let _told = chat(&world).await;
    let mut tunnel = tunnel(&world).await;
    assert!(world.stop().await);
    assert_eq!(tunnel.rest().await, "");
}

#[tokio::test]
async fn a_websocket_ends_with_its_sidecar_and_the_log_says_so() {
    let world = world().await;
    let _told = chat(&world).await;
    // One sidecar alone is on its way, so that it is this one's end that it sees.
    let mut socket = websocket(world.addresses("chat").ingress.unwrap()).await;
    let logs = world.logs.clone();
    assert!(!world.stop().await, "it was open to the last");
    assert_eq!(socket.rest().await, "");
    let line = logs.wait_for("of the socket", |line| line["direction"] == "ingress").await;
    assert_eq!(line["ended"], "stopped", "{line}");
}
