//! Calls of gRPC, frame by frame: nothing is held back, ends and reasons are the application's, refusals are statuses of gRPC.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream};
use http::{Method, Request};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

use crate::client::Client;
use crate::h2_ends::{
    Answerer, Call, H2App, H2Client, answer, fields_of, read_all, read_exact, request, send_all, serve, soon,
};
use crate::hostile::{Body, Draft, HTTP1, Leaf, MESH, Peer, Speaks, secrets, server};
use crate::support::{Spec, World};

const GRPC: (&str, &str) = ("content-type", "application/grpc");

/// `caller` may call `callee`, which is entered like this.
fn spec(callee: &'static str) -> Spec {
    Spec { services: vec![("caller", "app: { port: {port} }"), ("callee", callee)], ..Spec::pair() }
}

const SPEAKS_GRPC: &str = "app: { port: {port}, protocol: grpc }, traffic: { timeout: 200ms }";

/// The head of a call.
fn call(method: &str) -> Request<()> {
    request(Method::POST, &format!("http://callee/shop.Orders/{method}"), &[GRPC, ("te", "trailers")])
}

/// A message as gRPC frames it.
fn message(body: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(body.len() + 5);
    framed.extend_from_slice(&[0]);
    framed.extend_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(body);
    framed.freeze()
}

fn ok_trailers() -> http::HeaderMap {
    fields_of(&[("grpc-status", "0"), ("x-sum", "7"), ("x-kiro-caller", "nobody")])
}

/// An application with one method for each kind of call.
async fn orders(request: Request<RecvStream>, mut respond: Answerer) {
    let (head, mut recv) = request.into_parts();
    assert_eq!(head.headers["te"], "trailers");
    match head.uri.path() {
        "/shop.Orders/Unary" | "/shop.Orders/Collect" => {
            let (body, _) = read_all(&mut recv).await.unwrap();
            let mut send = answer(&mut respond, 200, &[GRPC], false);
            send_all(&mut send, body, false).await.unwrap();
            send.send_trailers(ok_trailers()).unwrap();
        }
        "/shop.Orders/List" => {
            read_all(&mut recv).await.unwrap();
            let mut send = answer(&mut respond, 200, &[GRPC], false);
            for number in 0..5 {
                send_all(&mut send, message(&[number]), false).await.unwrap();
            }
            send.send_trailers(ok_trailers()).unwrap();
        }
        "/shop.Orders/Chat" => {
            let mut send = answer(&mut respond, 200, &[GRPC], false);
            while let Some(Ok(piece)) = recv.data().await {
                recv.flow_control().release_capacity(piece.len()).unwrap();
                send_all(&mut send, piece, false).await.unwrap();
            }
            send.send_trailers(ok_trailers()).unwrap();
        }
        _ => drop(answer(
            &mut respond,
            200,
            &[GRPC, ("grpc-status", "5"), ("grpc-message", "no such order")],
            true,
        )),
    }
}

#[tokio::test]
async fn the_four_kinds_of_calls_pass() {
    let world = World::start(spec(SPEAKS_GRPC)).await;
    let _app = H2App::start(&world, "callee", orders).await;
    let client = H2Client::app_of(&world, "caller").await;

    let unary = client.exchange(call("Unary"), b"\0\0\0\0\x01a").await;
    assert_eq!((unary.verdict(), &unary.body[..]), ((200, None), &b"\0\0\0\0\x01a"[..]));
    assert_eq!((unary.trailer("grpc-status"), unary.trailer("x-sum")), (Some("0"), Some("7")));
    assert_eq!(unary.trailer("x-kiro-caller"), None, "our own fields are nobody's to send");

    let mut collect = client.call(call("Collect"), false).await;
    for number in 0..4 {
        send_all(&mut collect.send, message(&[number; 3]), number == 3).await.unwrap();
    }
    let collected = collect.whole().await;
    let all: Vec<u8> = (0..4).flat_map(|number| message(&[number; 3])).collect();
    assert_eq!((&collected.body[..], collected.trailer("grpc-status")), (&all[..], Some("0")));

    let list = client.exchange(call("List"), b"\0\0\0\0\0").await;
    let all: Vec<u8> = (0..5).flat_map(|number| message(&[number])).collect();
    assert_eq!((&list.body[..], list.trailer("grpc-status")), (&all[..], Some("0")));

    // Each message is there before the next one is sent.
    let mut chat = client.call(call("Chat"), false).await;
    send_all(&mut chat.send, message(b"0"), false).await.unwrap();
    let (_, mut recv, mut send) = chat.head().await;
    assert_eq!(read_exact(&mut recv, 6).await, message(b"0"));
    for number in 1..20_u8 {
        send_all(&mut send, message(&[number]), false).await.unwrap();
        assert_eq!(read_exact(&mut recv, 6).await, message(&[number]));
    }
    send.send_data(Bytes::new(), true).unwrap();
    let (rest, trailers) = read_all(&mut recv).await.unwrap();
    assert_eq!((rest.len(), &trailers.unwrap()["grpc-status"]), (0, &"0".parse().unwrap()));

    let missing = client.exchange(call("Missing"), b"\0\0\0\0\0").await;
    assert_eq!((missing.verdict(), missing.field("grpc-status")), ((200, None), Some("5")));
    assert_eq!(missing.field("grpc-message"), Some("no such order"));
    for direction in ["outbound", "inbound"] {
        let line = world.logs.wait_for(direction, |line| {
            line["direction"] == direction && line["path"] == "/shop.Orders/Chat"
        });
        let line = line.await;
        assert_eq!((&line["status"], &line["bytes_in"]), (&200.into(), &120.into()), "{line}");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_large_message_passes_both_ways_within_the_windows() {
    const SIZE: usize = 8 * 1024 * 1024;
    let world = World::start(spec(SPEAKS_GRPC)).await;
    let _app = H2App::start(&world, "callee", orders).await;
    let client = H2Client::app_of(&world, "caller").await;
    let body: Vec<u8> = (0..SIZE).map(|place| (place ^ (place >> 8) ^ (place >> 16)) as u8).collect();
    let sent = message(&body);
    let Call { answer, mut send } = client.call(call("Chat"), false).await;
    let upload = send_all(&mut send, sent.clone(), true);
    let download = async {
        let (_, mut recv) = soon("a head", answer).await.unwrap().into_parts();
        read_all(&mut recv).await.unwrap()
    };
    let (uploaded, (came, trailers)) = tokio::join!(upload, download);
    uploaded.unwrap();
    assert!(came == sent, "{} of {} bytes", came.len(), sent.len());
    assert_eq!(trailers.unwrap()["grpc-status"], "0");
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_call_may_take_its_time_and_other_requests_may_not() {
    // Longer than `traffic.timeout`, and than what its caller adds to it.
    const LATE: std::time::Duration = std::time::Duration::from_millis(900);
    let world = World::start(spec(SPEAKS_GRPC)).await;
    let _app = H2App::start(&world, "callee", |_, mut respond| async move {
        tokio::time::sleep(LATE).await;
        let mut send = answer(&mut respond, 200, &[GRPC], false);
        let _ = send.send_trailers(ok_trailers());
    })
    .await;
    let client = H2Client::app_of(&world, "caller").await;
    let plain = request(Method::GET, "http://callee/page", &[]);
    let (late, plain) =
        tokio::join!(client.exchange(call("Late"), b"\0\0\0\0\0"), client.exchange(plain, b""));
    assert_eq!((late.verdict(), late.trailer("grpc-status")), ((200, None), Some("0")));
    assert_eq!(plain.verdict(), (504, Some("app_timeout")));
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_a_client_says_of_itself_lifts_no_limit() {
    const H2: &str = "app: { port: {port}, protocol: h2 }, traffic: { timeout: 200ms }";
    let world = World::start(spec(H2)).await;
    let _app =
        H2App::start(&world, "callee", |request: Request<RecvStream>, mut respond: Answerer| async move {
            if request.uri().path().ends_with("Late") {
                return std::future::pending().await;
            }
            answer(&mut respond, 200, &[GRPC], false).send_trailers(ok_trailers()).unwrap();
        })
        .await;
    let client = H2Client::app_of(&world, "caller").await;
    let begin = std::time::Instant::now();
    assert_eq!(client.exchange(call("Soon"), b"\0\0\0\0\0").await.trailer("grpc-status"), Some("0"));
    let late = client.exchange(call("Late"), b"\0\0\0\0\0").await;
    // It is told in its own words all the same.
    assert_eq!((late.field("grpc-status"), late.field("grpc-message")), (Some("4"), Some("app_timeout")));
    assert!(begin.elapsed() < crate::support::PATIENCE);
    assert!(world.stop().await);
}

/// An application that tells what happens to its streams, and never answers the one at `/silent`.
async fn watching(world: &World) -> (H2App, mpsc::UnboundedReceiver<String>) {
    let (tell, told) = mpsc::unbounded_channel();
    let app = H2App::start(world, "callee", move |request, mut respond| {
        let tell = tell.clone();
        async move {
            let (head, mut recv) = request.into_parts();
            let path = head.uri.path().to_owned();
            tell.send(format!("{path} began")).unwrap();
            let mut send = None;
            if !path.ends_with("Silent") {
                send = Some(answer(&mut respond, 200, &[GRPC], false));
            }
            let ended = loop {
                match recv.data().await {
                    Some(Ok(piece)) if piece.is_empty() => {}
                    Some(Ok(piece)) => {
                        recv.flow_control().release_capacity(piece.len()).unwrap();
                        tell.send(format!("{path} {}", String::from_utf8_lossy(&piece[5..]))).unwrap();
                    }
                    Some(Err(error)) => break format!("{path} reset {:?}", error.reason().unwrap()),
                    None => break format!("{path} ended"),
                }
            };
            tell.send(ended).unwrap();
            drop(send);
        }
    })
    .await;
    (app, told)
}

async fn next(told: &mut mpsc::UnboundedReceiver<String>) -> String {
    soon("word of the application", told.recv()).await.unwrap()
}

#[tokio::test]
async fn the_application_sees_at_once_that_its_caller_cancels() {
    let world = World::start(spec(SPEAKS_GRPC)).await;
    let (_app, mut told) = watching(&world).await;
    let client = H2Client::app_of(&world, "caller").await;
    // Before the answer's head, and after it.
    for (method, answered) in [("Silent", false), ("Chat", true)] {
        let mut chat = client.call(call(method), false).await;
        send_all(&mut chat.send, message(b"hello"), false).await.unwrap();
        assert_eq!(next(&mut told).await, format!("/shop.Orders/{method} began"));
        assert_eq!(next(&mut told).await, format!("/shop.Orders/{method} hello"));
        if answered {
            let (_, _recv, mut send) = chat.head().await;
            send.send_reset(Reason::CANCEL);
        } else {
            chat.send.send_reset(Reason::CANCEL);
        }
        assert_eq!(next(&mut told).await, format!("/shop.Orders/{method} reset CANCEL"));
    }
    // A client that is gone altogether.
    let mut chat = client.call(call("Chat"), false).await;
    send_all(&mut chat.send, message(b"hello"), false).await.unwrap();
    assert_eq!(next(&mut told).await, "/shop.Orders/Chat began");
    assert_eq!(next(&mut told).await, "/shop.Orders/Chat hello");
    drop((chat, client));
    assert_eq!(next(&mut told).await, "/shop.Orders/Chat reset CANCEL");
    assert!(world.stop().await, "nothing is left behind");
}

#[tokio::test]
async fn the_caller_sees_why_the_application_gave_up() {
    let world = World::start(spec(SPEAKS_GRPC)).await;
    let _app = H2App::start(&world, "callee", |request, mut respond| async move {
        let reason =
            if request.uri().path().ends_with("Calm") { Reason::ENHANCE_YOUR_CALM } else { Reason::CANCEL };
        if request.uri().path().starts_with("/early") {
            respond.send_reset(reason);
        } else {
            let mut send = answer(&mut respond, 200, &[GRPC], false);
            send_all(&mut send, message(b"first"), false).await.unwrap();
            // The head is on its way before the reset is.
            let _ = request.into_body().data().await;
            send.send_reset(reason);
        }
    })
    .await;
    let client = H2Client::app_of(&world, "caller").await;
    for (method, reason) in [("Calm", Reason::ENHANCE_YOUR_CALM), ("Cancel", Reason::CANCEL)] {
        let (_, mut recv, mut send) = client.call(call(method), false).await.head().await;
        assert_eq!(read_exact(&mut recv, 10).await, message(b"first"));
        send_all(&mut send, message(b"go"), false).await.unwrap();
        let error = soon("an end", recv.data()).await.unwrap().unwrap_err();
        assert_eq!((error.is_remote(), error.reason()), (true, Some(reason)), "{method}");
    }
    let early = request(Method::POST, "http://callee/early", &[GRPC]);
    let early = client.exchange(early, b"").await;
    assert_eq!((early.verdict(), early.field("grpc-status")), ((200, Some("app_reset")), Some("14")));
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_refusal_is_a_status_of_grpc_to_grpc_alone() {
    let services = vec![
        ("caller", SPEAKS_GRPC),
        ("callee", SPEAKS_GRPC),
        ("other", SPEAKS_GRPC),
        ("front", "app: { port: {port}, protocol: grpc }, ingress: { port: {ingress} }"),
    ];
    let world = World::start(Spec {
        services,
        allow: "  - { from: caller, to: callee, paths: [/shop.Orders/*] }\n  - { from: ingress, to: front, methods: [GET] }",
        ..Spec::pair()
    })
    .await;
    let client = H2Client::app_of(&world, "caller").await;
    let front = H2Client::open(world.addresses("front").ingress.unwrap()).await;
    let cases = [
        (&client, "http://other/a.B/C", "7", "policy_no_edge", 403),
        (&client, "http://callee/a.B/C", "7", "policy_path", 403),
        (&client, "http://nobody/a.B/C", "12", "service_unknown", 404),
        (&client, "http://callee/shop.Orders/Get", "14", "app_connect", 502),
        (&front, "http://front/a.B/C", "7", "policy_method", 403),
    ];
    for (client, uri, status, code, true_status) in cases {
        let before = world.logs.lines().len();
        let fields = [("content-type", "application/grpc+proto"), ("te", "trailers")];
        let refused = client.exchange(request(Method::POST, uri, &fields), b"\0\0\0\0\0").await;
        assert_eq!(refused.verdict(), (200, Some(code)), "{uri}");
        assert_eq!(refused.field("grpc-status"), Some(status), "{uri}");
        assert_eq!(refused.field("grpc-message"), Some(code), "{uri}");
        assert_eq!(refused.field("content-type"), Some("application/grpc"), "{uri}");
        assert_eq!((refused.body.len(), refused.trailers), (0, None), "{uri}");
        let line = world.logs.wait_for_after(before, uri, |line| line["direction"] != "inbound").await;
        assert_eq!((&line["status"], &line["reject"]), (&true_status.into(), &code.into()), "{line}");
    }
    let line = world.logs.wait_for("the callee's", |line| line["direction"] == "inbound").await;
    assert_eq!((&line["status"], &line["reject"]), (&502.into(), &"app_connect".into()), "{line}");

    // Who does not speak gRPC would take its 200 for a success.
    let web = [("content-type", "application/grpc-web+proto")];
    let refused = client.exchange(request(Method::POST, "http://other/a.B/C", &web), b"").await;
    assert_eq!(refused.verdict(), (403, Some("policy_no_edge")));
    for path in ["shop.Orders/Get", "a.B/C"] {
        let before = world.logs.lines().len();
        let head = format!(
            "POST http://callee/{path} HTTP/1.1\r\nHost: callee\r\ncontent-type: application/grpc\r\nContent-Length: 0\r\n\r\n"
        );
        let refused = Client::app_of(&world, "caller").await.exchange(head).await;
        let (status, code) = if path == "a.B/C" { (403, "policy_path") } else { (502, "app_connect") };
        assert_eq!(refused.verdict(), (status, Some(code)), "{refused:?}");
        assert_eq!(refused.header("content-type"), Some("application/json"), "{refused:?}");
        let fits =
            |line: &serde_json::Value| line["direction"] == "outbound" && line["protocol"] == "HTTP/1.1";
        let line = world.logs.wait_for_after(before, path, fits).await;
        assert_eq!((&line["status"], &line["reject"]), (&status.into(), &code.into()), "{line}");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_call_with_a_bad_signature_is_unauthenticated() {
    let world = World::start(spec(SPEAKS_GRPC)).await;
    let app = H2App::start(&world, "callee", orders).await;
    let peer = Peer::of(&world, "caller", "callee").await;
    let mut signer = peer.signer(&secrets(&world, "caller"), "callee");
    let mut draft = Draft::new(Method::POST, "callee", "/shop.Orders/Unary");
    draft.set("content-type", "application/grpc");
    draft.sign(&mut signer);
    draft.target = "/shop.Orders/Delete".to_owned();
    let reply = peer.send(draft.request(), Body::None).await.unwrap();
    assert_eq!(reply.verdict(), (200, Some("signature_mismatch")));
    assert_eq!((reply.headers["grpc-status"].as_bytes(), reply.body.len()), (&b"16"[..], 0));
    let line = world.logs.wait_for("a bad signature", |line| line["direction"] == "inbound").await;
    assert_eq!((&line["status"], &line["signature"]), (&401.into(), &"refused".into()), "{line}");
    assert_eq!(app.connections(), 0);
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_never_sees_the_end_of_a_streamed_body_that_was_changed() {
    let world = World::start(spec(SPEAKS_GRPC)).await;
    let (_app, mut told) = watching(&world).await;
    let peer = Peer::of(&world, "caller", "callee").await;
    let mut signer = peer.signer(&secrets(&world, "caller"), "callee");
    let frames = || vec![message(b"first"), message(b"last")];
    let signed: Vec<u8> = frames().concat();
    let changed = [&signed[..signed.len() - 1], b"!"].concat();
    for (method, whole) in [("Silent", false), ("Chat", false), ("Chat", true)] {
        for length in [false, true] {
            let mut draft = Draft::new(Method::POST, "callee", &format!("/shop.Orders/{method}"));
            draft.set("content-type", "application/grpc");
            draft.set("x-kiro-body", "stream");
            if length {
                draft.set("content-length", &signed.len().to_string());
            }
            let nonce = draft.sign(&mut signer);
            let mut trailers = http::HeaderMap::new();
            let hashed = if whole { &signed } else { &changed };
            signer.sign_trailers(nonce, &crate::signatures::sha256(hashed), &mut trailers).unwrap();
            let reply = peer.send(draft.request(), Body::Trailed(frames(), trailers)).await;
            let path = format!("/shop.Orders/{method}");
            assert_eq!(next(&mut told).await, format!("{path} began"));
            let mut seen = Vec::new();
            let end = loop {
                let word = next(&mut told).await.split_off(path.len() + 1);
                if word == "ended" || word.starts_with("reset") {
                    break word;
                }
                seen.push(word);
            };
            if whole {
                assert_eq!((seen, end), (vec!["first".to_owned(), "last".to_owned()], "ended".to_owned()));
                continue;
            }
            assert_eq!(end, "reset CANCEL");
            // Who could count bytes does not get the last of them before they are known to be good.
            assert!(!length || !seen.contains(&"last".to_owned()), "{seen:?}");
            if method == "Silent" {
                let reply = reply.unwrap();
                assert_eq!(reply.verdict(), (200, Some("signature_digest")));
                assert_eq!(reply.headers["grpc-status"], "16");
            }
        }
    }
    assert!(world.stop().await);
}

/// What an application does with its streams, by how many have come before.
type Script = fn(usize) -> Act;

enum Act {
    Serve,
    /// Says that it has not looked at the stream.
    Refuse,
    /// Gives it up after its head.
    Reset(Reason),
    /// Takes no new streams, and answers this one.
    GoAway,
}

/// An application that follows a script, and how many heads it has seen.
async fn scripted(world: &World, script: Script) -> (tokio::task::JoinHandle<()>, Arc<AtomicUsize>) {
    let listener = world.listen("callee").await;
    let heads = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&heads);
    let task = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let act = script(seen.fetch_add(1, Ordering::SeqCst));
                    match act {
                        Act::Refuse => respond.send_reset(Reason::REFUSED_STREAM),
                        Act::Reset(reason) => respond.send_reset(reason),
                        Act::GoAway => {
                            connection.graceful_shutdown();
                            tokio::spawn(orders(request, respond));
                        }
                        Act::Serve => drop(tokio::spawn(orders(request, respond))),
                    }
                }
            });
        }
    });
    (task, heads)
}

#[tokio::test]
async fn what_an_application_surely_did_not_look_at_it_gets_once_more() {
    let cases: [(Script, Option<&str>, usize); 5] = [
        (|place| if place == 0 { Act::Refuse } else { Act::Serve }, Some("0"), 2),
        (|_| Act::Refuse, None, 2),
        (|_| Act::Reset(Reason::CANCEL), None, 1),
        (|_| Act::Reset(Reason::INTERNAL_ERROR), None, 1),
        (|_| Act::Reset(Reason::NO_ERROR), None, 1),
    ];
    for (number, (script, status, expected)) in cases.into_iter().enumerate() {
        let world = World::start(spec(SPEAKS_GRPC)).await;
        let (app, heads) = scripted(&world, script).await;
        let client = H2Client::app_of(&world, "caller").await;
        let done = client.exchange(call("Unary"), b"\0\0\0\0\x01a").await;
        assert_eq!(done.trailer("grpc-status"), status, "{number}");
        if status.is_none() {
            assert_eq!(done.field("x-kiro-reject"), Some("app_reset"), "{number}");
        }
        assert_eq!(heads.load(Ordering::SeqCst), expected, "{number}");
        // A body that has begun to flow is gone, whatever the application says.
        let mut chat = client.call(call("Chat"), false).await;
        send_all(&mut chat.send, message(b"hello"), false).await.unwrap();
        if expected != 2 || status.is_none() {
            let refused = chat.whole().await;
            assert_eq!(refused.field("grpc-status"), Some("14"), "{number}");
            assert_eq!(heads.load(Ordering::SeqCst), expected + 1, "{number}");
        } else {
            drop(chat);
        }
        app.abort();
        assert!(world.stop().await);
    }
}

#[tokio::test]
async fn an_application_that_takes_no_more_streams_is_called_on_another_connection() {
    let world = World::start(spec(SPEAKS_GRPC)).await;
    // It goes away with each call, as a server does that bounds a connection's age.
    let (app, heads) = scripted(&world, |_| Act::GoAway).await;
    let client = H2Client::app_of(&world, "caller").await;
    for number in 1..=10 {
        let done = client.exchange(call("Unary"), b"\0\0\0\0\x01a").await;
        assert_eq!(done.trailer("grpc-status"), Some("0"), "{number}: {done:?}");
        // One that streams has nothing to repeat, and nothing of it has been sent.
        let mut chat = client.call(call("Chat"), false).await;
        send_all(&mut chat.send, message(b"hello"), true).await.unwrap();
        let done = chat.whole().await;
        assert_eq!(done.trailer("grpc-status"), Some("0"), "{number}: {done:?}");
        assert_eq!(heads.load(Ordering::SeqCst), 2 * number);
    }
    app.abort();
    assert!(world.stop().await);
}

#[tokio::test]
async fn streams_beyond_what_the_application_takes_wait_and_are_not_lost() {
    const CALLS: usize = 60;
    let world = World::start(spec(SPEAKS_GRPC)).await;
    let mut builder = h2::server::Builder::new();
    builder.max_concurrent_streams(2);
    let (active, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counted, peak) = (Arc::clone(&active), Arc::clone(&most));
    let app = H2App::with(world.listen("callee").await, builder, move |request, respond| {
        let (active, peak) = (Arc::clone(&counted), Arc::clone(&peak));
        async move {
            peak.fetch_max(active.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            orders(request, respond).await;
            active.fetch_sub(1, Ordering::SeqCst);
        }
    });
    let client = H2Client::app_of(&world, "caller").await;
    let mut calls = Vec::new();
    for _ in 0..CALLS {
        let mut unary = client.call(call("Unary"), false).await;
        send_all(&mut unary.send, message(b"a"), true).await.unwrap();
        calls.push(unary);
    }
    for unary in calls {
        let done = unary.whole().await;
        assert_eq!(done.trailer("grpc-status"), Some("0"), "{done:?}");
    }
    assert!(most.load(Ordering::SeqCst) <= 2 * app.connections());
    assert!(world.stop().await);
}

/// Serves TLS connections of an application, which agrees on this by ALPN.
async fn encrypted(world: &World, speaks: Speaks) -> tokio::task::JoinHandle<()> {
    let listener = world.listen("callee").await;
    let acceptor = TlsAcceptor::from(Arc::new(server(world, &Leaf::of_app(world, "callee"), speaks)));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                serve(stream, h2::server::Builder::new(), orders).await;
            });
        }
    })
}

#[tokio::test]
async fn an_application_may_speak_it_over_mutual_tls_and_must_agree_on_it() {
    for (speaks, status, code) in [(MESH, "0", None), (HTTP1, "14", Some("tls_alpn"))] {
        let world = World::start(spec("app: { port: {port}, protocol: grpc, tls: mutual }")).await;
        let app = encrypted(&world, speaks).await;
        let client = H2Client::app_of(&world, "caller").await;
        let done = client.exchange(call("Unary"), b"\0\0\0\0\x01a").await;
        let told = done.trailer("grpc-status").or(done.field("grpc-status"));
        assert_eq!((told, done.field("x-kiro-reject")), (Some(status), code), "{done:?}");
        app.abort();
        assert!(world.stop().await);
    }
}
