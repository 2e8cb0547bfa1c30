//! Streams that become bytes, in both versions of HTTP and between them: WebSocket, CONNECT, and HTTP inside of CONNECT.

use std::net::SocketAddr;

use http::{Method, Request};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::client::{Client, Refusal, check_line};
use crate::h2_ends::{Answerer, H2App, H2Client, answer, bytes_of, connect, request, soon};
use crate::support::{Spec, World};

const OPEN: &str = "  - { from: caller, to: store }\n  - { from: caller, to: chat, methods: [GET], paths: [/chat] }\n  - { from: ingress, to: chat, methods: [GET], paths: [/chat] }";

/// `caller` may use `store`, which speaks no HTTP, and `chat`, which is entered like this.
async fn world(chat: &'static str) -> World {
    let services = vec![
        ("caller", "app: { port: {port} }"),
        ("store", "app: { port: {port}, protocol: tcp }"),
        ("chat", chat),
    ];
    World::start(Spec { top: "", services, allow: OPEN }).await
}

const HTTP1: &str = "app: { port: {port} }, ingress: { port: {ingress} }";
const H2: &str = "app: { port: {port}, protocol: h2 }, ingress: { port: {ingress} }";

/// Where a client may come in, and how its application then sees it.
fn doors(world: &World) -> [(SocketAddr, &'static str); 2] {
    [(world.addresses("caller").outbound, "caller"), (world.addresses("chat").ingress.unwrap(), "ingress")]
}

/// An application's end of an open stream: takes (`u`) or gives (`d`) as many bytes as nine digits say, and ends when its client has.
async fn converse(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut command = [0; 10];
    while stream.read_exact(&mut command).await.is_ok() {
        let count: usize = std::str::from_utf8(&command[1..]).unwrap().parse().unwrap();
        if command[0] == b'u' {
            let mut taken = vec![0; count];
            stream.read_exact(&mut taken).await.unwrap();
            assert!(taken == pattern(count));
            stream.write_all(b"taken").await.unwrap();
        } else {
            stream.write_all(&pattern(count)).await.unwrap();
        }
    }
    let _ = stream.write_all(b"bye").await;
    let _ = stream.shutdown().await;
}

fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|place| (place ^ (place >> 8) ^ (place >> 16)) as u8).collect()
}

const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// An application that speaks HTTP/1.1.
fn http1_chat(listener: TcpListener) -> JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            let mut app = Client::on(listener.accept().await.unwrap().0);
            tokio::spawn(async move {
                let head = app.request_head().await.to_ascii_lowercase();
                let field = |name: &str| {
                    head.lines()
                        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                        .unwrap_or_default()
                };
                assert!(head.starts_with("get /chat?room=1 http/1.1\r\n"), "{head}");
                assert_eq!((field("connection"), field("upgrade")), ("upgrade", "websocket"), "{head}");
                assert_eq!(
                    (field("sec-websocket-version"), field("sec-websocket-key").len()),
                    ("13", 24),
                    "{head}"
                );
                assert_eq!((field("content-length"), field("transfer-encoding")), ("", ""), "{head}");
                let caller = field("x-kiro-caller");
                app.send(format!(
                    "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
                     Sec-WebSocket-Accept: {ACCEPT}\r\nSec-WebSocket-Protocol: chat\r\nseen-caller: {caller}\r\n\r\n"
                ))
                .await;
                converse(app.into_stream()).await;
            });
        }
    })
}

/// An application that speaks HTTP/2.
async fn h2_chat(request: Request<h2::RecvStream>, mut respond: Answerer) {
    let (head, recv) = request.into_parts();
    assert_eq!(head.method, Method::CONNECT);
    assert_eq!(head.extensions.get::<h2::ext::Protocol>().unwrap().as_str(), "websocket");
    assert_eq!((head.uri.path(), head.uri.query()), ("/chat", Some("room=1")));
    assert_eq!((head.headers.get("sec-websocket-key"), head.headers.get("upgrade")), (None, None));
    assert_eq!(head.headers["sec-websocket-version"], "13");
    let caller = head.headers["x-kiro-caller"].to_str().unwrap().to_owned();
    let send =
        answer(&mut respond, 200, &[("sec-websocket-protocol", "chat"), ("seen-caller", &caller)], false);
    converse(bytes_of(recv, send)).await;
}

/// Opens a WebSocket in HTTP/1.1.
async fn http1_socket(door: SocketAddr, caller: &str) -> Client {
    let mut client = Client::open(door).await;
    client
        .send(format!(
            "GET /chat?room=1 HTTP/1.1\r\nHost: chat\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Protocol: chat\r\n\r\n"
        ))
        .await;
    let answer = client.head().await;
    assert_eq!(answer.status, 101, "{answer:?}");
    assert_eq!(answer.header("sec-websocket-accept"), Some(ACCEPT), "{answer:?}");
    assert_eq!((answer.header("upgrade"), answer.header("connection")), (Some("websocket"), Some("upgrade")));
    assert_eq!(answer.header("sec-websocket-protocol"), Some("chat"), "{answer:?}");
    assert_eq!(answer.header("seen-caller"), Some(caller), "{answer:?}");
    client
}

fn handshake(path: &str) -> Request<()> {
    let fields = [("sec-websocket-version", "13"), ("sec-websocket-protocol", "chat")];
    connect("websocket", &format!("http://chat{path}"), &fields)
}

/// Opens a WebSocket in HTTP/2.
async fn h2_socket(client: &H2Client, caller: &str) -> Client<DuplexStream> {
    let (head, recv, send) = client.call(handshake("/chat?room=1"), false).await.head().await;
    assert_eq!(head.status, 200, "{head:?}");
    assert_eq!(head.headers["sec-websocket-protocol"], "chat");
    assert_eq!(head.headers["seen-caller"], caller);
    for name in ["sec-websocket-accept", "upgrade", "connection", "content-length"] {
        assert!(!head.headers.contains_key(name), "{head:?}");
    }
    Client::on(bytes_of(recv, send))
}

/// Messages of every size both ways, then one half's end and the other's.
async fn talk<S: AsyncRead + AsyncWrite + Unpin>(mut socket: Client<S>) {
    // More than all windows and buffers on the way together.
    for count in [1, 1024 * 1024] {
        socket.send(format!("u{count:09}")).await;
        socket.send(pattern(count)).await;
        assert_eq!(socket.bytes(5).await, b"taken");
        socket.send(format!("d{count:09}")).await;
        assert!(socket.bytes(count).await == pattern(count));
    }
    socket.end().await;
    assert_eq!(socket.rest().await, "bye");
}

#[tokio::test]
async fn a_websocket_passes_in_each_version_to_each_version() {
    for (chat, speaks_h2) in [(HTTP1, false), (H2, true)] {
        let world = world(chat).await;
        let listener = world.listen("chat").await;
        let mut builder = h2::server::Builder::new();
        builder.enable_connect_protocol();
        let (h2_app, http1_app) = if speaks_h2 {
            (Some(H2App::with(listener, builder, h2_chat)), None)
        } else {
            (None, Some(http1_chat(listener)))
        };
        for (door, caller) in doors(&world) {
            talk(http1_socket(door, caller).await).await;
            let client = H2Client::open(door).await;
            talk(h2_socket(&client, caller).await).await;
            // It is a stream of many: the connection goes on.
            talk(h2_socket(&client, caller).await).await;
        }
        for direction in ["outbound", "inbound", "ingress"] {
            let fits =
                |line: &serde_json::Value| line["direction"] == direction && line["protocol"] == "HTTP/2";
            let line = world.logs.wait_for(direction, fits).await;
            assert_eq!((&line["method"], &line["path"]), (&"GET".into(), &"/chat".into()), "{line}");
            assert_eq!(line["policy"], "allowed", "{line}");
        }
        if let Some(app) = http1_app {
            app.abort();
        }
        drop(h2_app);
        assert!(world.stop().await);
    }
}

#[tokio::test]
async fn what_is_no_websocket_of_the_policy_s_is_refused() {
    let world = world(H2).await;
    let app = H2App::start(&world, "chat", h2_chat).await;
    let with = |name: &'static str, value: &str| {
        let mut request = handshake("/chat?room=1");
        request.headers_mut().insert(name, value.parse().unwrap());
        request
    };
    for ((door, caller), service) in doors(&world).into_iter().zip(["caller", "chat"]) {
        let client = H2Client::open(door).await;
        let cases = [
            (connect("connect-udp", "http://chat/chat", &[]), 400, "upgrade_unsupported", "`websocket`"),
            (connect("WebSocket", "http://chat/chat", &[]), 400, "upgrade_unsupported", "`websocket`"),
            (with("content-length", "0"), 400, "header_invalid", "content-length"),
            (with("content-length", "5"), 400, "header_invalid", "content-length"),
            (handshake("/elsewhere"), 403, "policy_path", ""),
            (handshake("/chat/../x"), 400, "path_invalid", "dot segment"),
        ];
        for (request, status, code, cause) in cases {
            let before = world.logs.lines().len();
            let what = format!("{request:?}");
            let refused = client.call(request, false).await.whole().await;
            assert_eq!(refused.verdict(), (status, Some(code)), "{what}");
            check_line(&world, service, before, &what, Refusal { status, code, cause }).await;
        }
        // The connection is none the worse.
        talk(h2_socket(&client, caller).await).await;
    }
    assert_eq!(app.connections(), 1);
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_that_refuses_or_knows_no_websocket_says_so() {
    let refusing = world(H2).await;
    let _app = H2App::start(&refusing, "chat", |_, mut respond| async move {
        let mut send = answer(&mut respond, 404, &[("x-own", "yes")], false);
        send.send_data("not here".into(), true).unwrap();
    })
    .await;
    for (door, _) in doors(&refusing) {
        let client = H2Client::open(door).await;
        let refused = client.call(handshake("/chat"), false).await.whole().await;
        assert_eq!((refused.verdict(), refused.field("x-own")), ((404, None), Some("yes")));
        assert_eq!(refused.body, "not here");
        let head = "GET /chat HTTP/1.1\r\nHost: chat\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
        let mut client = Client::open(door).await;
        client.send(head).await;
        let refused = client.head().await;
        assert_eq!((refused.verdict(), refused.header("x-own")), ((404, None), Some("yes")));
    }
    assert!(refusing.stop().await);

    let ignorant = world(H2).await;
    let plain = h2::server::Builder::new();
    let _app = H2App::with(ignorant.listen("chat").await, plain, |request, _| async move {
        panic!("an extended CONNECT came: {request:?}");
    });
    for (door, _) in doors(&ignorant) {
        let client = H2Client::open(door).await;
        let refused = client.call(handshake("/chat"), false).await.whole().await;
        assert_eq!(refused.verdict(), (502, Some("app_no_upgrade")));
    }
    assert!(ignorant.stop().await);
}

#[tokio::test]
async fn open_sockets_are_cut_when_their_line_goes() {
    for chat in [HTTP1, H2] {
        let world = world(chat).await;
        let listener = world.listen("chat").await;
        let mut builder = h2::server::Builder::new();
        builder.enable_connect_protocol();
        let (mut http1_app, mut h2_app) = (None, None);
        if chat == H2 {
            h2_app = Some(H2App::with(listener, builder, h2_chat));
        } else {
            http1_app = Some(http1_chat(listener));
        }
        let mut clients = Vec::new();
        let mut sockets = Vec::new();
        for (door, caller) in doors(&world) {
            let client = H2Client::open(door).await;
            let mut socket = h2_socket(&client, caller).await;
            socket.send("d000000003").await;
            assert_eq!(socket.bytes(3).await, pattern(3));
            sockets.push(socket);
            clients.push(client);
        }
        world.allow(
            "  - { from: caller, to: store }\n  - { from: ingress, to: chat, paths: [/elsewhere] }\n  - { from: caller, to: chat, paths: [/elsewhere] }",
        );
        for mut socket in sockets {
            assert_eq!(socket.rest().await, "");
        }
        let line = world.logs.wait_for("a cut stream", |line| line["direction"] == "ingress").await;
        assert_eq!((&line["policy"], &line["method"]), (&"cut".into(), &"GET".into()), "{line}");
        // The connections stay, and are judged by the new lines.
        for client in &clients {
            let refused = client.call(handshake("/chat"), false).await.whole().await;
            assert_eq!(refused.verdict(), (403, Some("policy_path")));
        }
        if let Some(app) = http1_app.take() {
            app.abort();
        }
        drop(h2_app.take());
        assert!(world.stop().await);
    }
}

fn tunnel_to(authority: &str) -> Request<()> {
    request(Method::CONNECT, authority, &[])
}

#[tokio::test]
async fn connect_by_http_2_reaches_a_service_without_http() {
    let world = world(HTTP1).await;
    let listener = world.listen("store").await;
    let client = H2Client::app_of(&world, "caller").await;
    for _ in 0..2 {
        let call = client.call(tunnel_to("store:5432"), false).await;
        let (stream, _) = soon("a connection", listener.accept()).await.unwrap();
        let app = tokio::spawn(converse(stream));
        let (head, recv, send) = call.head().await;
        assert_eq!((head.status.as_u16(), head.headers.get("content-length")), (200, None));
        talk(Client::on(bytes_of(recv, send))).await;
        app.await.unwrap();
    }
    let line = world.logs.wait_for("a tunnel", |line| line["direction"] == "outbound").await;
    assert_eq!((&line["method"], &line["callee"]), (&"CONNECT".into(), &"store".into()), "{line}");
    assert_eq!((&line["status"], &line["protocol"]), (&200.into(), &"HTTP/2".into()), "{line}");

    // A client that resets ends the application's connection, and the other way round.
    let call = client.call(tunnel_to("store:5432"), false).await;
    let mut app = Client::on(soon("a connection", listener.accept()).await.unwrap().0);
    let (_, _recv, mut send) = call.head().await;
    send.send_reset(h2::Reason::CANCEL);
    assert_eq!(app.rest().await, "");
    // Nobody there, nobody known, and a length where there is no body.
    drop(listener);
    let with_length = request(Method::CONNECT, "store:1", &[("content-length", "0")]);
    for (request, status, code) in [
        (tunnel_to("store:1"), 502, "app_connect"),
        (tunnel_to("nobody:1"), 404, "service_unknown"),
        (with_length, 400, "header_invalid"),
    ] {
        let refused = client.call(request, false).await.whole().await;
        assert_eq!(refused.verdict(), (status, Some(code)));
    }
    let client = H2Client::open(world.addresses("chat").ingress.unwrap()).await;
    let refused = client.call(tunnel_to("store:1"), false).await.whole().await;
    assert_eq!(refused.verdict(), (403, Some("policy_tunnel")));
    assert!(world.stop().await);
}

/// A tunnel to `chat` by one version or the other, as bytes.
async fn tunnel(world: &World, outer: &H2Client, by_h2: bool) -> DuplexOrTcp {
    if by_h2 {
        let (head, recv, send) = outer.call(tunnel_to("chat:80"), false).await.head().await;
        assert_eq!(head.status, 200);
        return Box::new(bytes_of(recv, send));
    }
    let mut client = Client::app_of(world, "caller").await;
    client.send("CONNECT chat:80 HTTP/1.1\r\nHost: chat:80\r\n\r\n").await;
    assert_eq!(client.head().await.status, 200);
    Box::new(client.into_stream())
}

type DuplexOrTcp = Box<dyn Stream>;

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

#[tokio::test]
async fn both_versions_of_http_pass_inside_of_connect_by_both() {
    let mut world = world(HTTP1).await;
    let recorder = world.recorder("chat").await;
    let outer = H2Client::app_of(&world, "caller").await;
    for by_h2 in [false, true] {
        let mut inside = Client::on(tunnel(&world, &outer, by_h2).await);
        for _ in 0..2 {
            let answer = inside.exchange("GET /chat HTTP/1.1\r\nHost: chat\r\n\r\n").await;
            assert_eq!((answer.verdict(), answer.body.as_str()), ((200, None), "recorded"), "{answer:?}");
            let refused = inside.exchange("GET /other HTTP/1.1\r\nHost: chat\r\n\r\n").await;
            assert_eq!(refused.verdict(), (403, Some("policy_path")), "{refused:?}");
        }
        let again = inside.exchange("CONNECT chat:80 HTTP/1.1\r\nHost: chat:80\r\n\r\n").await;
        assert_eq!(again.verdict(), (400, Some("upgrade_unsupported")), "{again:?}");

        let inside = H2Client::on(tunnel(&world, &outer, by_h2).await).await;
        for _ in 0..2 {
            let answer = inside.exchange(request(Method::GET, "http://chat/chat", &[]), b"").await;
            assert_eq!((answer.verdict(), &answer.body[..]), ((200, None), &b"recorded"[..]));
        }
        let refused = inside.exchange(request(Method::GET, "http://chat/other", &[]), b"").await;
        assert_eq!(refused.verdict(), (403, Some("policy_path")));
        for authority in ["chat:80", "store:1"] {
            let again = inside.call(tunnel_to(authority), false).await.whole().await;
            assert_eq!(again.verdict(), (400, Some("upgrade_unsupported")), "{authority}");
        }
    }
    assert_eq!(recorder.seen().len(), 8);
    assert!(recorder.seen().iter().all(|seen| seen.head.headers["x-kiro-caller"] == "caller"));
    drop(outer);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_tunnel_s_client_that_goes_away_ends_what_is_inside() {
    let mut world = world(HTTP1).await;
    let (arrive, mut arrived) = tokio::sync::mpsc::unbounded_channel();
    world
        .app("chat", move |_| {
            arrive.send(()).unwrap();
            std::future::pending()
        })
        .await;
    let outer = H2Client::app_of(&world, "caller").await;
    let inside = H2Client::on(tunnel(&world, &outer, true).await).await;
    let call = inside.call(request(Method::GET, "http://chat/chat", &[]), true).await;
    soon("the request at the application", arrived.recv()).await.unwrap();
    drop(outer);
    let line =
        world.logs.wait_for("its end", |line| line["direction"] == "outbound" && line["path"] == "/chat");
    let line = line.await;
    assert_eq!(line["reject_cause"], "the client went away before an answer", "{line}");
    drop((call, inside));
    assert!(world.stop().await);
}
