//! Bytes both ways: CONNECT, WebSockets, and what is not carried.

use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

use crate::client::{Client, Refusal, check_line, check_refused};
use crate::support::{Spec, World, eventually};

/// `caller` may use `store`, which speaks no HTTP, and `chat`, which does and has an ingress.
fn spec() -> Spec {
    Spec {
        top: "",
        services: vec![
            ("caller", "app: { port: {port} }"),
            ("store", "app: { port: {port}, protocol: tcp }"),
            ("chat", "app: { port: {port} }, ingress: { port: {ingress} }"),
        ],
        allow: "  - { from: caller, to: store }\n  - { from: caller, to: chat }\n  - { from: ingress, to: chat }",
    }
}

/// Opens a tunnel to `store`; both ends of it.
async fn tunnel(world: &World, listener: &TcpListener, authority: &str) -> (Client, Client) {
    let mut client = Client::app_of(world, "caller").await;
    client.send(format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n")).await;
    let (stream, _) = listener.accept().await.unwrap();
    let answer = client.head().await;
    assert_eq!(answer.verdict(), (200, None), "{answer:?}");
    assert_eq!(answer.header("content-length").or(answer.header("transfer-encoding")), None, "{answer:?}");
    (client, Client::on(stream))
}

#[tokio::test]
async fn bytes_flow_both_ways_and_each_half_ends_by_itself() {
    let world = World::start(spec()).await;
    let listener = world.listen("store").await;
    // Whatever port is asked for, it ends at the declared one.
    for authority in ["store:5432", "store:1", "STORE.:80"] {
        let before = world.logs.lines().len();
        let (mut client, mut app) = tunnel(&world, &listener, authority).await;
        client.send("\x16\0ping\n").await;
        client.end().await;
        assert_eq!(app.rest().await, "\x16\0ping\n");
        // The client's half has ended; the other one goes on.
        app.send("pong").await;
        assert_eq!(client.bytes(4).await, b"pong");
        app.send("and on").await;
        drop(app);
        assert_eq!(client.rest().await, "and on");
        for direction in ["outbound", "inbound"] {
            let line =
                world.logs.wait_for_after(before, authority, |line| line["direction"] == direction).await;
            assert_eq!((&line["method"], &line["callee"]), (&"CONNECT".into(), &"store".into()), "{line}");
            assert_eq!((&line["status"], &line["policy"]), (&200.into(), &"allowed".into()), "{line}");
            assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&7.into(), &10.into()), "{line}");
        }
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn the_server_may_speak_first() {
    let world = World::start(spec()).await;
    let listener = world.listen("store").await;
    let (mut client, mut app) = tunnel(&world, &listener, "store:25").await;
    app.send("220 store ready\r\n").await;
    assert_eq!(client.bytes(17).await, b"220 store ready\r\n");
    client.send("EHLO caller\r\n").await;
    assert_eq!(app.bytes(13).await, b"EHLO caller\r\n");
    // The server's half may end first as well.
    app.end().await;
    client.send("QUIT\r\n").await;
    client.end().await;
    assert_eq!(app.rest().await, "QUIT\r\n");
    assert_eq!(client.rest().await, "");
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_comes_right_behind_connect_is_not_lost() {
    let world = World::start(spec()).await;
    let listener = world.listen("store").await;
    let mut client = Client::app_of(&world, "caller").await;
    client.send("CONNECT store:1 HTTP/1.1\r\nHost: store:1\r\n\r\nhasty").await;
    let mut app = Client::on(listener.accept().await.unwrap().0);
    assert_eq!(app.bytes(5).await, b"hasty");
    assert_eq!(client.head().await.status, 200);
    drop((client, app));
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_tunnel_to_nobody_is_refused() {
    let world = World::start(spec()).await;
    let expected = Refusal { status: 502, code: "app_connect", cause: "the peer's sidecar said so" };
    check_refused(&world, "caller", "CONNECT store:1 HTTP/1.1\r\nHost: store:1\r\n\r\n", expected).await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_service_without_http_gets_none() {
    let world = World::start(spec()).await;
    let listener = world.listen("store").await;
    let expected = Refusal { status: 400, code: "service_is_tcp", cause: "" };
    check_refused(&world, "caller", "GET http://store/ HTTP/1.1\r\nHost: store\r\n\r\n", expected).await;
    let websocket = "GET / HTTP/1.1\r\nHost: store\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    check_refused(&world, "caller", websocket, expected).await;
    let accepted = tokio::time::timeout(std::time::Duration::ZERO, listener.accept()).await;
    assert!(accepted.is_err(), "the application was connected to");
    assert!(world.stop().await);
}

#[tokio::test]
async fn connect_to_a_service_with_http_carries_requests() {
    let mut world = World::start(spec()).await;
    let recorder = world.recorder("chat").await;
    let mut client = Client::app_of(&world, "caller").await;
    client.send("CONNECT chat:443 HTTP/1.1\r\nHost: chat:443\r\n\r\n").await;
    assert_eq!(client.head().await.status, 200);
    for path in ["/a", "/b"] {
        let answer =
            client.exchange(format!("GET {path} HTTP/1.1\r\nHost: chat\r\nx-kiro-caller: x\r\n\r\n")).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, "recorded"), "{answer:?}");
        let line =
            world.logs.wait_for(path, |line| line["direction"] == "outbound" && line["path"] == path).await;
        assert_eq!((&line["method"], &line["signature"]), (&"GET".into(), &"signed".into()), "{line}");
    }
    let seen: Vec<_> = recorder.seen().iter().map(|seen| seen.head.uri.to_string()).collect();
    assert_eq!(seen, ["/a", "/b"]);
    assert_eq!(recorder.seen()[0].head.headers["x-kiro-caller"], "caller");
    assert!(world.logs.lines().iter().all(|line| line["direction"] == "outbound" || line["method"] == "GET"));
    drop(client);
    assert!(world.stop().await);
}

#[tokio::test]
async fn tls_inside_connect_is_refused_by_name() {
    let mut world = World::start(spec()).await;
    let recorder = world.recorder("chat").await;
    let mut client = Client::app_of(&world, "caller").await;
    client.send("CONNECT chat:443 HTTP/1.1\r\nHost: chat:443\r\n\r\n").await;
    assert_eq!(client.head().await.status, 200);
    let before = world.logs.lines().len();
    client.send([22, 3, 1, 0, 5, 1, 0, 0, 1, 3]).await;
    // A fatal alert, access_denied: what a TLS client can read.
    assert_eq!(client.bytes(7).await, [21, 3, 3, 0, 2, 2, 49]);
    assert_eq!(client.rest().await, "");
    let expected = Refusal { status: 400, code: "tls_in_tunnel", cause: "call http://<service>" };
    check_line(&world, "caller", before, "TLS in a tunnel", expected).await;
    assert_eq!(world.rejects("caller", "tls_in_tunnel").await, 1);
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

/// An application that takes WebSocket handshakes at `/chat` and sends back what it gets; elsewhere it says 403.
async fn chat(world: &mut World) {
    world
        .app("chat", |mut request: Request<Incoming>| async move {
            let refused = |text: &'static str| {
                let mut response = Response::new(Full::from(text));
                *response.status_mut() = StatusCode::FORBIDDEN;
                response
            };
            let asks =
                |name: &str, value: &str| request.headers().get(name).is_some_and(|found| found == value);
            if request.method() != "GET" || !asks("upgrade", "websocket") || !asks("connection", "upgrade") {
                return refused("not a handshake");
            }
            if request.uri() != "/chat?room=1" || !asks("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==") {
                return refused("not here");
            }
            let caller = request.headers()["x-kiro-caller"].clone();
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let (mut read, mut write) = tokio::io::split(TokioIo::new(upgrade.await.unwrap()));
                write.write_all(b"hello").await.unwrap();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
            Response::builder()
                .status(101)
                .header("connection", "upgrade")
                .header("upgrade", "websocket")
                .header("sec-websocket-accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
                .header("seen-caller", caller)
                .body(Full::default())
                .unwrap()
        })
        .await;
}

const HANDSHAKE: &str = "GET /chat?room=1 HTTP/1.1\r\nHost: chat\r\nConnection: keep-alive, Upgrade\r\n\
    Upgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

async fn shake_hands(client: &mut Client, caller: &str) {
    client.send(HANDSHAKE).await;
    let answer = client.head().await;
    assert_eq!(answer.status, 101, "{answer:?}");
    assert_eq!(answer.header("upgrade"), Some("websocket"));
    assert_eq!(answer.header("connection"), Some("upgrade"));
    assert_eq!(answer.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    assert_eq!(answer.header("seen-caller"), Some(caller));
    assert_eq!(client.bytes(5).await, b"hello");
    client.send(b"\x81\x85\x01\x02\x03\x04frame").await;
    assert_eq!(client.bytes(11).await, b"\x81\x85\x01\x02\x03\x04frame");
}

async fn check_handshake_line(world: &World, direction: &str) {
    let line = world.logs.wait_for(direction, |line| line["direction"] == direction).await;
    assert_eq!((&line["method"], &line["path"]), (&"GET".into(), &"/chat".into()), "{line}");
    assert_eq!(line["policy"], "allowed", "{line}");
    assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&11.into(), &16.into()), "{line}");
}

#[tokio::test]
async fn a_websocket_passes_both_sidecars() {
    let mut world = World::start(spec()).await;
    chat(&mut world).await;
    let mut client = Client::app_of(&world, "caller").await;
    shake_hands(&mut client, "caller").await;
    client.end().await;
    assert_eq!(client.rest().await, "");
    for direction in ["outbound", "inbound"] {
        check_handshake_line(&world, direction).await;
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_websocket_passes_the_ingress() {
    let mut world = World::start(spec()).await;
    chat(&mut world).await;
    let mut client = Client::open(world.addresses("chat").ingress.unwrap()).await;
    shake_hands(&mut client, "ingress").await;
    client.end().await;
    assert_eq!(client.rest().await, "");
    check_handshake_line(&world, "ingress").await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_handshake_that_the_application_refuses_is_an_answer() {
    let mut world = World::start(spec()).await;
    chat(&mut world).await;
    let elsewhere = HANDSHAKE.replace("/chat", "/elsewhere");
    let addresses = [world.addresses("caller").outbound, world.addresses("chat").ingress.unwrap()];
    for (address, caller) in addresses.into_iter().zip(["caller", "ingress"]) {
        let mut client = Client::open(address).await;
        for _ in 0..2 {
            let answer = client.exchange(&elsewhere).await;
            assert_eq!((answer.verdict(), answer.body.as_str()), ((403, None), "not here"), "{answer:?}");
        }
        shake_hands(&mut client, caller).await;
        client.end().await;
        assert_eq!(client.rest().await, "");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn other_upgrades_are_refused() {
    let mut world = World::start(spec()).await;
    let recorder = world.recorder("chat").await;
    let expected =
        Refusal { status: 400, code: "upgrade_unsupported", cause: "the one upgrade that is carried" };
    for fields in [
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
        "Connection: upgrade\r\nUpgrade: h2c, websocket",
        "Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c",
        "Connection: upgrade\r\nUpgrade: TLS/1.2",
        "Connection: upgrade\r\nUpgrade: connect-udp",
        "Upgrade: websocket",
    ] {
        let request = format!("GET /chat HTTP/1.1\r\nHost: chat\r\n{fields}\r\n\r\n");
        check_refused(&world, "caller", &request, expected).await;
        let mut client = Client::open(world.addresses("chat").ingress.unwrap()).await;
        let answer = client.exchange(&request).await;
        assert_eq!(answer.verdict(), (400, Some("upgrade_unsupported")), "{request}");
    }
    let old = "GET http://chat/chat HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    check_refused(&world, "caller", old, expected).await;
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_can_not_switch_protocols_unasked() {
    let mut world = World::start(spec()).await;
    world
        .app("chat", |_| async {
            let builder =
                Response::builder().status(101).header("connection", "upgrade").header("upgrade", "h2c");
            builder.body(Full::default()).unwrap()
        })
        .await;
    let expected = Refusal { status: 502, code: "app_reset", cause: "the peer's sidecar said so" };
    check_refused(&world, "caller", "GET http://chat/ HTTP/1.1\r\nHost: chat\r\n\r\n", expected).await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn open_streams_are_cut_when_their_line_goes() {
    let mut world = World::start(spec()).await;
    chat(&mut world).await;
    let listener = world.listen("store").await;
    let (mut cut, mut app) = tunnel(&world, &listener, "store:1").await;
    cut.send("ping").await;
    assert_eq!(app.bytes(4).await, b"ping");
    let mut websocket = Client::app_of(&world, "caller").await;
    shake_hands(&mut websocket, "caller").await;
    let mut outside = Client::open(world.addresses("chat").ingress.unwrap()).await;
    shake_hands(&mut outside, "ingress").await;

    // A line that stays, or becomes another that still allows it, cuts nothing.
    world.allow(
        "  - { from: caller, to: store }\n  - { from: ingress, to: chat }\n  - { from: caller, to: chat, paths: [/chat] }\n  - { from: store, to: chat }",
    );
    eventually("all three have the new lines", || async {
        let mut all = true;
        for service in ["caller", "store", "chat"] {
            all &= world.admin(service, "/config").await.body.contains("\"generation\": 2");
        }
        all
    })
    .await;
    websocket.send("still").await;
    assert_eq!(websocket.bytes(5).await, b"still");

    world.allow("  - { from: ingress, to: chat, paths: [/elsewhere] }");
    assert_eq!(cut.rest().await, "");
    assert_eq!(websocket.rest().await, "");
    assert_eq!(outside.rest().await, "");
    assert_eq!(app.rest().await, "");
    let said = |direction, method| {
        let logs = world.logs.clone();
        async move {
            let fits = |line: &serde_json::Value| line["direction"] == direction && line["method"] == method;
            logs.wait_for("a cut stream", fits).await
        }
    };
    // Both sidecars judge for themselves; whichever is first ends it for the other one.
    for method in ["CONNECT", "GET"] {
        let lines = [said("outbound", method).await, said("inbound", method).await];
        assert!(lines.iter().any(|line| line["policy"] == "cut"), "{lines:?}");
    }
    let line = said("ingress", "GET").await;
    assert_eq!(line["policy"], "cut", "{line}");
    assert!(line["reject_cause"].as_str().unwrap().contains("no longer allows it"), "{line}");
    assert!(world.stop().await);
}
