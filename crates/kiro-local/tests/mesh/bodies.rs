//! Does a body arrive as it was sent, whatever its size and framing, and is nothing sent twice that may have been processed?

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::client::Client;
use crate::fake::{Arrived, Fake, OBEDIENT, OnConnection, OnRequest, Script, place};
use crate::hostile::{Leaf, MESH, server};
use crate::support::{Answer, PATIENCE, Spec, World, eventually};

const KIB: usize = 1024;

/// What is held and signed with the head, and what is not; and one that is larger than every window and buffer on its way.
const SIZES: [usize; 5] = [0, 1, 64 * KIB, 64 * KIB + 1, 10 * KIB * KIB];

/// Bytes of which no two neighbouring blocks are alike.
fn pattern(size: usize) -> Bytes {
    (0..size).map(|place| (place ^ (place >> 8) ^ (place >> 16)) as u8).collect()
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An application that says what it got, and gives patterns.
async fn mirror(request: Request<Incoming>) -> Response<Full<Bytes>> {
    if let Some(size) = request.uri().path().strip_prefix("/down/") {
        return Response::new(Full::new(pattern(size.parse().unwrap())));
    }
    let framing = ["content-length", "transfer-encoding"]
        .map(|name| request.headers().get(name).map_or("-", |value| value.to_str().unwrap()).to_owned());
    let signed = request.headers().keys().any(|name| name.as_str().starts_with("signature"));
    let collected = request.into_body().collect().await.unwrap();
    let trailer = collected.trailers().map_or_else(|| "-".to_owned(), own_trailers);
    let body = collected.to_bytes();
    let text = format!("{} {} {} {trailer} {signed}", body.len(), digest(&body), framing.join(" "));
    Response::new(Full::new(text.into()))
}

fn own_trailers(trailers: &HeaderMap) -> String {
    trailers.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect()
}

/// A body as HTTP/1 frames it without a length.
fn chunked(body: &[u8], trailers: &str) -> Vec<u8> {
    let mut framed = Vec::new();
    for chunk in body.chunks(50_000) {
        framed.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        framed.extend_from_slice(chunk);
        framed.extend_from_slice(b"\r\n");
    }
    framed.extend_from_slice(format!("0\r\n{trailers}\r\n").as_bytes());
    framed
}

fn head(method: &str, path: &str, fields: &str) -> Vec<u8> {
    format!("{method} http://callee{path} HTTP/1.1\r\nHost: callee\r\n{fields}\r\n").into_bytes()
}

async fn post(world: &World, path: &str, fields: &str, body: &[u8]) -> Answer {
    let mut client = Client::app_of(world, "caller").await;
    client.send(head("POST", path, fields)).await;
    client.exchange(body).await
}

async fn download(world: &World, size: usize) -> Bytes {
    let stream = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
    let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = Request::get(format!("http://callee/down/{size}")).header("host", "callee");
    let response = send.send_request(request.body(Full::<Bytes>::default()).unwrap()).await.unwrap();
    assert_eq!(response.headers()["content-length"], size.to_string());
    let body = response.into_body().collect().await.unwrap().to_bytes();
    driver.abort();
    body
}

async fn check_sizes(spec: Spec, signatures: [&str; 2]) {
    let mut world = World::start(spec).await;
    world.app("callee", mirror).await;
    for size in SIZES {
        let body = pattern(size);
        let sum = digest(&body);
        let path = format!("/up/{size}");
        let answer = post(&world, &path, &format!("Content-Length: {size}\r\n"), &body).await;
        assert_eq!(answer.body, format!("{size} {sum} {size} - - false"), "{size} with its length");
        for (direction, signature) in ["outbound", "inbound"].into_iter().zip(signatures) {
            let of_it = |line: &serde_json::Value| line["direction"] == direction && line["path"] == path;
            let line = world.logs.wait_for(direction, of_it).await;
            assert_eq!(line["signature"], signature, "{line}");
            assert_eq!(line["bytes_in"], size, "{line}");
            assert_eq!(line["bytes_out"], answer.body.len(), "{line}");
        }
        let answer = post(&world, "/up", "Transfer-Encoding: chunked\r\n", &chunked(&body, "")).await;
        assert_eq!(answer.body, format!("{size} {sum} - chunked - false"), "{size} in chunks");
        assert_eq!(digest(&download(&world, size).await), sum, "{size} down");
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn bodies_of_every_size_arrive_signed() {
    check_sizes(Spec::pair(), ["signed", "verified"]).await;
}

#[tokio::test]
async fn bodies_of_every_size_arrive_unsigned() {
    check_sizes(Spec { top: "signatures: off", ..Spec::pair() }, ["off", "off"]).await;
}

#[tokio::test]
async fn trailers_of_a_request_arrive() {
    for top in ["", "signatures: off"] {
        let mut world = World::start(Spec { top, ..Spec::pair() }).await;
        world.app("callee", mirror).await;
        let framed = chunked(b"hello", "x-sum: 7\r\n");
        let answer = post(&world, "/up", "Transfer-Encoding: chunked\r\nTrailer: x-sum\r\n", &framed).await;
        let sum = digest(b"hello");
        assert_eq!(answer.body, format!("5 {sum} - chunked x-sum=7 false"), "{top}");
        assert_eq!(world.metric("callee", DROPPED).await, 0);

        // Which ones come has to be said in the head.
        let framed = chunked(b"hello", "x-sum: 7\r\nx-other: 8\r\nx-third: 9\r\n");
        let answer = post(&world, "/up", "Transfer-Encoding: chunked\r\nTrailer: x-sum\r\n", &framed).await;
        assert_eq!(answer.body, format!("5 {sum} - chunked x-sum=7 false"), "{top}");
        assert_eq!(world.metric("callee", DROPPED).await, 2);
        assert!(world.stop().await);
    }
}

const DROPPED: &str = "kiro_trailers_dropped_total";

/// An application that reads one request's head and answers with these bytes. It gives its connection, and how many bytes of the
/// body it had read.
async fn answers_once(listener: &TcpListener, answer: &[u8]) -> (TcpStream, usize) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut read = Vec::new();
    let end = loop {
        assert!(stream.read_buf(&mut read).await.unwrap() > 0);
        if let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
    };
    stream.write_all(answer).await.unwrap();
    (stream, read.len() - end)
}

#[tokio::test]
async fn an_answer_without_a_length_arrives_with_its_trailers() {
    let world = World::start(Spec::pair()).await;
    let listener = world.listen("callee").await;
    let text =
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum, x-kiro-caller\r\nConnection: close\r\n\r\n\
        5\r\nhello\r\n7\r\n, world\r\n0\r\nx-sum: 7\r\nx-kiro-caller: nobody\r\n\r\n";
    let mut client = Client::app_of(&world, "caller").await;
    let call = async {
        client.send(head("GET", "/a", "TE: trailers\r\nConnection: te, close\r\n")).await;
        client.rest().await
    };
    let (whole, _) = tokio::join!(call, answers_once(&listener, text));
    let answer = Answer::parse(&whole);
    assert_eq!(answer.status, 200);
    let joined: String =
        answer.body.split("\r\n").skip(1).step_by(2).take_while(|chunk| !chunk.contains(": ")).collect();
    assert_eq!(joined, "hello, world", "{whole}");
    assert!(answer.body.ends_with("0\r\nx-sum: 7\r\n\r\n"), "{whole}");
    assert_eq!(world.metric("caller", DROPPED).await, 0);

    // A client has to ask for them.
    let mut client = Client::app_of(&world, "caller").await;
    let call = async {
        client.send(head("GET", "/a", "Connection: close\r\n")).await;
        client.rest().await
    };
    let (whole, _) = tokio::join!(call, answers_once(&listener, text));
    assert!(whole.ends_with("0\r\n\r\n"), "{whole}");
    assert_eq!(world.metric("caller", DROPPED).await, 1);
    assert!(world.stop().await);
}

#[tokio::test]
async fn expect_100_continue_is_answered_before_the_body_is_sent() {
    let mut world = World::start(Spec::pair()).await;
    world.app("callee", mirror).await;
    let mut client = Client::app_of(&world, "caller").await;
    for size in [5, 100_000] {
        let body = pattern(size);
        let fields = format!("Content-Length: {size}\r\nExpect: 100-continue\r\n");
        client.send(head("POST", "/up", &fields)).await;
        assert_eq!(client.head().await.status, 100);
        let answer = client.exchange(&body).await;
        let sum = digest(&body);
        assert_eq!((answer.status, answer.body), (200, format!("{size} {sum} {size} - - false")));
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn who_expects_100_continue_and_is_refused_sends_no_body() {
    let world = World::start(Spec::pair()).await;
    let listener = world.listen("callee").await;
    let refusal = b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let mut client = Client::app_of(&world, "caller").await;
    let call = async {
        client.send(head("POST", "/up", "Content-Length: 5\r\nExpect: 100-continue\r\n")).await;
        client.head().await
    };
    let (answer, (_app, body)) = tokio::join!(call, answers_once(&listener, refusal));
    assert_eq!((answer.status, body), (417, 0));
    // The client's connection ends, as the body may come all the same; a client that is not told sends its next request there.
    assert_eq!(answer.header("connection"), Some("close"), "{answer:?}");
    assert_eq!(client.rest().await, "");
    assert!(world.stop().await);
}

const TOO_LARGE: &[u8] =
    b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nless";

#[tokio::test]
async fn an_answer_before_the_body_has_ended_arrives() {
    let world = World::start(Spec::pair()).await;
    let listener = world.listen("callee").await;
    let size = 10 * KIB * KIB;
    // A client that waits in the middle of its body and one that goes on sending; an application that stays and one that goes.
    for (sends, goes) in [(100 * KIB, false), (100 * KIB, true), (size, false), (size, true)] {
        let stream = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
        let (mut read, mut write) = stream.into_split();
        let writer = tokio::spawn(async move {
            let body = pattern(sends);
            let _ = write.write_all(&head("POST", "/up", &format!("Content-Length: {size}\r\n"))).await;
            let _ = write.write_all(&body).await;
            write
        });
        let call = async {
            let mut text = Vec::new();
            while !text.ends_with(b"less") {
                let reading = tokio::time::timeout(PATIENCE, read.read_buf(&mut text));
                let count = reading.await.expect("an answer");
                assert!(count.is_ok_and(|count| count > 0), "{sends} {goes}: {text:?}");
            }
            Answer::parse(&String::from_utf8(text).unwrap())
        };
        let app = async {
            let (stream, _) = answers_once(&listener, TOO_LARGE).await;
            (!goes).then_some(stream)
        };
        let (answer, _) = tokio::join!(call, app);
        assert_eq!((answer.verdict(), answer.body.as_str()), ((413, None), "less"), "{sends} {goes}");
        writer.abort();
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_never_takes_half_a_body_for_a_whole_one() {
    for top in ["", "signatures: off"] {
        let mut world = World::start(Spec { top, ..Spec::pair() }).await;
        let [begun, broken, whole]: [Arc<AtomicUsize>; 3] = Default::default();
        let counts = [&begun, &broken, &whole].map(Arc::clone);
        world
            .app("callee", move |request| {
                let [begun, broken, whole] = counts.clone();
                async move {
                    begun.fetch_add(1, Ordering::SeqCst);
                    let collected = request.into_body().collect().await;
                    let count = if collected.is_ok() { whole } else { broken };
                    count.fetch_add(1, Ordering::SeqCst);
                    Response::default()
                }
            })
            .await;
        let reached = async |count: &AtomicUsize, wanted: usize| {
            eventually("counted", || async { count.load(Ordering::SeqCst) == wanted }).await;
        };
        let framings = [
            ("streamed", "Content-Length: 200000\r\n", pattern(100_000).to_vec()),
            ("in chunks", "Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n".to_vec()),
            ("in a chunk", "Transfer-Encoding: chunked\r\n", b"5\r\nhel".to_vec()),
        ];
        for (place, (what, fields, half)) in framings.into_iter().enumerate() {
            let mut client = Client::app_of(&world, "caller").await;
            client.send(head("POST", &format!("/{place}"), fields)).await;
            client.send(half).await;
            reached(&begun, place + 1).await;
            drop(client);
            reached(&broken, place + 1).await;
            for direction in ["outbound", "inbound"] {
                let of_it = |line: &serde_json::Value| {
                    line["direction"] == direction && line["path"] == format!("/{place}")
                };
                let line = world.logs.wait_for(what, of_it).await;
                assert!(line["status"].as_u64().unwrap() >= 400, "{what}: {line}");
            }
        }

        // A body that would be held does not leave before it is whole.
        let mut client = Client::app_of(&world, "caller").await;
        client.send(head("POST", "/held", "Content-Length: 1000\r\n")).await;
        client.send("half").await;
        drop(client);
        let line = world.logs.wait_for("held", |line| line["path"] == "/held").await;
        assert_eq!((&line["direction"], &line["attempts"]), (&"outbound".into(), &0.into()), "{line}");

        assert_eq!(world.get("caller", "http://callee/a").await.status, 200, "the next one is served");
        let counts = [&begun, &broken, &whole].map(|count| count.load(Ordering::SeqCst));
        assert_eq!(counts, [4, 3, 1]);
        assert!(world.stop().await);
    }
}

#[tokio::test]
async fn half_an_answer_is_not_passed_off_as_a_whole_one() {
    let world = World::start(Spec::pair()).await;
    let listener = world.listen("callee").await;
    let halves: [&[u8]; 2] = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ];
    for half in halves {
        let mut client = Client::app_of(&world, "caller").await;
        let call = async {
            client.send(head("GET", "/a", "")).await;
            client.head().await
        };
        let (answer, (app, _)) = tokio::join!(call, answers_once(&listener, half));
        assert_eq!(answer.status, 200);
        drop(app);
        let body = client.rest().await;
        let whole = match answer.header("content-length") {
            Some(length) => body.len() >= length.parse().unwrap(),
            None => body.ends_with("0\r\n\r\n"),
        };
        assert!(body.contains("half") && !whole, "{body:?}");
    }
    assert!(world.stop().await);
}

/// A mesh with a callee that does as it likes.
async fn with_fake(script: Script) -> (World, Fake) {
    let (listener, _, entry) = place();
    let services = vec![("caller", "app: { port: {port} }"), ("callee", entry)];
    let world = World::start(Spec { services, ..Spec::pair() }).await;
    let config = server(&world, &Leaf::of(&world, "callee"), MESH);
    (world, Fake::start(listener, Some(config), script))
}

#[tokio::test]
async fn a_body_is_signed_with_its_head_where_that_is_possible_and_at_its_end_otherwise() {
    #[derive(Debug, PartialEq)]
    enum Signed {
        No,
        WithHead,
        AtEnd,
    }
    fn signed(arrived: &Arrived) -> Signed {
        let head = &arrived.head.headers;
        assert!(head["signature-input"].to_str().unwrap().contains("caller>callee#1"));
        let input = head["signature-input"].to_str().unwrap();
        let covers = |name: &str| input.contains(&format!("\"{name}\""));
        match (head.get("x-kiro-body"), &arrived.trailers) {
            (Some(stream), Some(trailers)) => {
                assert!(stream == "stream" && covers("x-kiro-body"));
                assert!(trailers.contains_key("signature") && trailers.contains_key("content-digest"));
                Signed::AtEnd
            }
            (None, None) if head.contains_key("content-digest") => {
                assert!(covers("content-digest"));
                Signed::WithHead
            }
            (None, None) => Signed::No,
            other => panic!("half of it: {other:?}"),
        }
    }
    let (world, fake) = with_fake(OBEDIENT).await;
    let length = |size: usize| format!("Content-Length: {size}\r\n");
    let chunks = || "Transfer-Encoding: chunked\r\n".to_owned();
    let own = format!("Content-Digest: sha-256=:{}=:\r\n", "A".repeat(43));
    let cases = [
        ("nothing", length(0), pattern(0).to_vec(), Signed::No),
        ("one byte", length(1), pattern(1).to_vec(), Signed::WithHead),
        ("64 KiB", length(64 * KIB), pattern(64 * KIB).to_vec(), Signed::WithHead),
        ("64 KiB + 1", length(64 * KIB + 1), pattern(64 * KIB + 1).to_vec(), Signed::AtEnd),
        ("in chunks", chunks(), chunked(b"hello", ""), Signed::AtEnd),
        ("the application's digest", length(5) + &own, b"hello".to_vec(), Signed::AtEnd),
    ];
    for (what, fields, body, expected) in cases {
        assert_eq!(post(&world, "/up", &fields, &body).await.status, 200, "{what}");
        let arrived = fake.take();
        assert_eq!(arrived.len(), 1, "{what}");
        assert_eq!(signed(&arrived[0]), expected, "{what}");
        if fields.contains("Content-Digest") {
            assert_eq!(arrived[0].head.headers["content-digest"], own.trim()["Content-Digest: ".len()..]);
        }
    }
    assert_eq!(fake.connections(), 1);
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_a_peer_has_not_processed_is_sent_again_on_another_stream_or_connection() {
    let refused =
        Script { request: |place| if place == 0 { OnRequest::Refuse } else { OnRequest::Serve }, ..OBEDIENT };
    let gone = Script {
        connection: |place| if place == 0 { OnConnection::GoAway { last: 0 } } else { OnConnection::Serve },
        ..OBEDIENT
    };
    for (what, script, connections) in [("refused", refused, 1), ("gone", gone, 2)] {
        for (method, body) in [("GET", &b""[..]), ("POST", b"held whole")] {
            let (world, fake) = with_fake(script).await;
            let mut client = Client::app_of(&world, "caller").await;
            client.send(head(method, "/a", &format!("Content-Length: {}\r\n", body.len()))).await;
            let answer = client.exchange(body).await;
            assert_eq!((answer.status, answer.header("x-fake")), (200, Some("yes")), "{what} {method}");
            assert_eq!((fake.heads(), fake.connections()), (2, connections), "{what} {method}");
            let served = fake.take();
            assert_eq!(served.len(), 1, "{what} {method}");
            assert_eq!(served[0].body, body);
            let line = world.logs.wait_for(what, |line| line["direction"] == "outbound").await;
            assert_eq!(line["attempts"], 2, "{line}");
            assert!(world.stop().await);
        }
    }
}

#[tokio::test]
async fn a_peer_that_died_without_a_word_costs_no_request() {
    let silent = Script {
        connection: |place| if place == 0 { OnConnection::FallSilent } else { OnConnection::Serve },
        ..OBEDIENT
    };
    let (world, fake) = with_fake(silent).await;
    assert_eq!(world.get("caller", "http://callee/a").await.status, 200);
    // It is time itself that has to pass: after a second of silence a peer is asked whether it is still there.
    tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
    let request =
        "POST http://callee/b HTTP/1.1\r\nHost: callee\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi";
    let answer = crate::support::Answer::parse(&world.raw_outbound("caller", request.as_bytes()).await);
    assert_eq!(answer.status, 200, "whatever its method: {answer:?}");
    assert_eq!((fake.heads(), fake.connections()), (2, 2));
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_may_have_been_processed_is_not_sent_again() {
    // The peer says that it has processed the stream, and goes without an answer.
    let gone = Script { connection: |_| OnConnection::GoAway { last: 1 }, ..OBEDIENT };
    let (world, fake) = with_fake(gone).await;
    let answer = world.get("caller", "http://callee/a").await;
    assert_eq!(answer.verdict(), (502, Some("upstream_reset")));
    assert_eq!((fake.heads(), fake.connections()), (1, 1));
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_body_that_has_begun_to_stream_is_not_sent_again() {
    let refuse = Script { request: |_| OnRequest::Refuse, ..OBEDIENT };
    let gone = Script { connection: |_| OnConnection::GoAway { last: 0 }, ..OBEDIENT };
    for (what, script) in [("refused", refuse), ("gone", gone)] {
        let (world, fake) = with_fake(script).await;
        let answer = post(&world, "/up", "Transfer-Encoding: chunked\r\n", &chunked(b"hello", "")).await;
        assert_eq!(answer.verdict(), (502, Some("upstream_reset")), "{what}");
        assert_eq!(fake.heads(), 1, "{what}");
        assert!(world.stop().await);
    }
}

#[tokio::test]
async fn a_peer_that_always_refuses_is_given_up() {
    let (world, fake) = with_fake(Script { request: |_| OnRequest::Refuse, ..OBEDIENT }).await;
    let answer = world.get("caller", "http://callee/a").await;
    assert_eq!(answer.verdict(), (502, Some("upstream_reset")));
    assert_eq!(fake.heads(), 3);
    assert!(world.stop().await);
}
