//! Heads and bodies that two readers on the way could read in two ways, that are too large, or that never end.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::client::{Client, Refusal, check_line};
use crate::support::{PATIENCE, Recorder, Spec, World};

/// A second request behind the first one's bytes, which must never be taken for one.
const SMUGGLED: &str = "GET http://callee/smuggled HTTP/1.1\r\nHost: callee\r\n\r\n";

async fn world() -> (World, Recorder) {
    let mut world = World::start(Spec::pair()).await;
    let recorder = world.recorder("callee").await;
    (world, recorder)
}

/// A message that is refused: 400, the connection closed, nothing forwarded, one line, one count. `code` is for the log; the
/// client learns it where the sidecar, and not its HTTP library, has answered.
async fn check_refused(request: &[u8], code: &str) {
    let (world, recorder) = world().await;
    let what = String::from_utf8_lossy(request).into_owned();
    let mut client = Client::app_of(&world, "caller").await;
    client.send(request).await;
    client.send(SMUGGLED).await;
    let answer = client.head().await;
    assert_eq!(answer.status, 400, "{what}: {answer:?}");
    let rest = client.rest().await;
    assert!(!rest.contains("HTTP/1.1"), "{what}: closed after the refusal, not {rest:?}");

    let by_library = code == "message_invalid";
    assert_eq!(answer.header("x-kiro-reject"), (!by_library).then_some(code), "{what}");
    let line = world.logs.wait_for(&what, |line| line["service"] == "caller").await;
    assert_eq!((&line["status"], &line["reject"]), (&400.into(), &code.into()), "{what}: {line}");
    assert_eq!(world.rejects("caller", code).await, 1, "{what}");
    assert_eq!(world.metric("caller", "kiro_library_answers_total").await, u64::from(by_library), "{what}");
    if by_library {
        assert!(!line["reject_cause"].as_str().unwrap().is_empty(), "{what}: {line}");
    }
    assert!(world.stop().await);
    assert!(recorder.seen().is_empty(), "{what}");
}

fn post(fields: &str) -> Vec<u8> {
    format!("POST http://callee/a HTTP/1.1\r\nHost: callee\r\n{fields}\r\n\r\nhello").into_bytes()
}

#[tokio::test]
async fn lengths_that_differ_are_refused() {
    check_refused(&post("Content-Length: 5\r\nContent-Length: 6"), "message_invalid").await;
    check_refused(&post("Content-Length: 5, 6"), "message_invalid").await;
}

#[tokio::test]
async fn lengths_that_are_no_numbers_are_refused() {
    check_refused(&post("Content-Length: +5"), "message_invalid").await;
    check_refused(&post("Content-Length: 0x5"), "message_invalid").await;
    check_refused(&post("Content-Length: -5"), "message_invalid").await;
}

#[tokio::test]
async fn codings_that_nobody_can_end_are_refused() {
    check_refused(&post("Transfer-Encoding: gzip"), "message_invalid").await;
    check_refused(&post("Transfer-Encoding: chunked, gzip"), "message_invalid").await;
}

#[tokio::test]
async fn two_hosts_are_refused() {
    check_refused(b"GET /a HTTP/1.1\r\nHost: callee\r\nHost: callee\r\n\r\n", "host_duplicate").await;
    check_refused(b"GET http://callee/a HTTP/1.1\r\nHost: callee\r\nHost: x\r\n\r\n", "host_duplicate").await;
}

#[tokio::test]
async fn no_host_is_refused() {
    check_refused(b"GET /a HTTP/1.1\r\nAccept: a\r\n\r\n", "host_missing").await;
    check_refused(b"GET http://callee/a HTTP/1.1\r\nAccept: a\r\n\r\n", "host_missing").await;
}

#[tokio::test]
async fn a_bare_carriage_return_is_refused() {
    check_refused(b"GET http://callee/a HTTP/1.1\r\nHost: callee\r\nx: a\rb\r\n\r\n", "message_invalid")
        .await;
    check_refused(b"GET http://callee/a HTTP/1.1\rHost: callee\r\n\r\n", "message_invalid").await;
}

#[tokio::test]
async fn a_folded_line_is_refused() {
    check_refused(b"GET http://callee/a HTTP/1.1\r\nHost: callee\r\nx: a\r\n b\r\n\r\n", "message_invalid")
        .await;
    check_refused(b"GET http://callee/a HTTP/1.1\r\n Host: callee\r\nHost: x\r\n\r\n", "message_invalid")
        .await;
}

#[tokio::test]
async fn a_field_name_with_a_blank_is_refused() {
    check_refused(&post("Content-Length : 5"), "message_invalid").await;
}

#[tokio::test]
async fn nul_is_refused() {
    check_refused(b"GET http://callee/a\0b HTTP/1.1\r\nHost: callee\r\n\r\n", "message_invalid").await;
    check_refused(b"GET http://callee/a HTTP/1.1\r\nHost: callee\r\nx: a\0b\r\n\r\n", "message_invalid")
        .await;
}

#[tokio::test]
async fn a_target_outside_ascii_is_refused() {
    check_refused(b"GET http://callee/caf\xc3\xa9 HTTP/1.1\r\nHost: callee\r\n\r\n", "path_invalid").await;
    check_refused(b"GET http://callee/a?caf\xc3\xa9 HTTP/1.1\r\nHost: callee\r\n\r\n", "path_invalid").await;
    check_refused(b"GET /a\xff HTTP/1.1\r\nHost: callee\r\n\r\n", "message_invalid").await;
}

/// A message that RFC 9112 lets a proxy read: exactly one request is forwarded, framed anew, and the connection ends.
async fn check_framed_anew(request: &[u8], body: &str) {
    let (world, recorder) = world().await;
    let what = String::from_utf8_lossy(request).into_owned();
    let mut client = Client::app_of(&world, "caller").await;
    client.send([request, SMUGGLED.as_bytes()].concat()).await;
    let answer = client.answer().await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "recorded"), "{what}: {answer:?}");
    assert_eq!(answer.header("connection"), Some("close"), "{what}");
    assert_eq!(client.rest().await, "", "{what}");
    assert!(world.stop().await);

    let seen = recorder.only();
    assert_eq!((seen.head.uri.path(), &seen.body[..]), ("/a", body.as_bytes()), "{what}");
    let lengths = seen.head.headers.get_all("content-length").iter().count();
    let codings = seen.head.headers.get_all("transfer-encoding").iter().count();
    assert!(lengths + codings <= 1, "{what}: {:?}", seen.head.headers);
}

#[tokio::test]
async fn a_length_beside_chunks_is_framed_anew() {
    let request = b"POST http://callee/a HTTP/1.1\r\nHost: callee\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n\
        5\r\nhello\r\n0\r\n\r\n";
    check_framed_anew(request, "hello").await;
    let request = b"POST http://callee/a HTTP/1.1\r\nHost: callee\r\nTransfer-Encoding: chunked\r\nContent-Length: 300\r\n\r\n\
        5\r\nhello\r\n0\r\n\r\n";
    check_framed_anew(request, "hello").await;
}

#[tokio::test]
async fn the_same_length_twice_is_framed_anew() {
    check_framed_anew(&post("Content-Length: 5\r\nContent-Length: 5"), "hello").await;
}

#[tokio::test]
async fn bare_line_feeds_are_framed_anew() {
    check_framed_anew(b"GET http://callee/a HTTP/1.1\nHost: callee\n\n", "").await;
    check_framed_anew(
        b"POST http://callee/a HTTP/1.1\r\nHost: callee\r\nContent-Length: 5\n\r\nhello",
        "hello",
    )
    .await;
}

#[tokio::test]
async fn clean_requests_share_a_connection() {
    let (world, recorder) = world().await;
    let mut client = Client::app_of(&world, "caller").await;
    for path in ["/a", "/b", "/c"] {
        let request =
            format!("POST http://callee{path} HTTP/1.1\r\nHost: callee\r\nContent-Length: 5\r\n\r\nhello");
        let answer = client.exchange(request).await;
        assert_eq!((answer.status, answer.header("connection")), (200, None), "{answer:?}");
    }
    let chunked = "POST http://callee/d HTTP/1.1\r\nHost: callee\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    assert_eq!(client.exchange(chunked).await.header("connection"), None);
    assert_eq!(client.exchange(chunked).await.status, 200);
    assert_eq!(recorder.seen().len(), 5);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_header_block_over_the_limit_is_431_logged_and_counted() {
    let (world, recorder) = world().await;
    let large = format!("x-large: {}\r\n", "a".repeat(64 * 1024));
    let many: String = (0..300).map(|number| format!("x-{number}: 1\r\n")).collect();
    for (count, fields) in [large, many].iter().enumerate() {
        let before = world.logs.lines().len();
        let mut client = Client::app_of(&world, "caller").await;
        client.send(format!("GET http://callee/a HTTP/1.1\r\nHost: callee\r\n{fields}\r\n")).await;
        assert_eq!(client.head().await.status, 431);
        assert_eq!(client.rest().await, "");
        let expected = Refusal { status: 431, code: "headers_too_large", cause: "too large" };
        check_line(&world, "caller", before, "a large head", expected).await;
        let count = count as u64 + 1;
        assert_eq!(world.metric("caller", "kiro_library_answers_total").await, count);
        assert_eq!(world.rejects("caller", "headers_too_large").await, count);
    }
    assert!(recorder.seen().is_empty());
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_head_that_would_end_the_edge_for_everybody_is_refused() {
    let (world, recorder) = world().await;
    // What the HTTP library takes, and HPACK makes 140 KiB of: more CONTINUATION frames than its receiver bears.
    let mut client = Client::app_of(&world, "caller").await;
    let mut head = b"GET http://callee/a HTTP/1.1\r\nHost: callee\r\nCookie: ".to_vec();
    head.extend_from_slice(&[0xff; 40_000]);
    head.extend_from_slice(b"\r\n\r\n");
    client.send(head).await;
    assert_eq!(client.head().await.status, 431);
    assert_eq!(world.rejects("caller", "headers_too_large").await, 1);
    assert!(recorder.seen().is_empty());
    // A peer that would have been the one to end the connection has nothing to complain of.
    assert_eq!(
        world.metric("callee", "kiro_abuse_total{listener=\"inbound\",reason=\"continuation_flood\"}").await,
        0
    );
    let other = "GET http://callee/b HTTP/1.1\r\nHost: callee\r\n\r\n";
    assert_eq!(Client::app_of(&world, "caller").await.exchange(other).await.status, 200);
    assert!(world.stop().await);
}

#[tokio::test]
async fn http_2_has_the_same_limit_and_is_logged_too() {
    let (world, recorder) = world().await;
    let stream = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let request = http::Request::get("http://callee/a").header("x-large", "a".repeat(64 * 1024));
    let answer = sender.send_request(request.body(Empty::<bytes::Bytes>::new()).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 431);
    assert_eq!(answer.headers()["x-kiro-reject"], "headers_too_large");
    let expected = Refusal { status: 431, code: "headers_too_large", cause: "bytes" };
    check_line(&world, "caller", 0, "a large head", expected).await;
    assert_eq!(world.rejects("caller", "headers_too_large").await, 1);
    assert!(recorder.seen().is_empty());
    drop((answer, sender));
    driver.await.unwrap().unwrap();
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_header_block_within_the_limit_passes_both_sidecars() {
    let (world, recorder) = world().await;
    let large = format!("x-large: {}\r\n", "a".repeat(60 * 1024));
    // HTTP/2 counts 32 bytes more for each field.
    let many: String = (0..240).map(|number| format!("x-{number}: {}\r\n", "a".repeat(240))).collect();
    for fields in [large, many] {
        let mut client = Client::app_of(&world, "caller").await;
        let answer =
            client.exchange(format!("GET http://callee/a HTTP/1.1\r\nHost: callee\r\n{fields}\r\n")).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    assert_eq!(recorder.seen().len(), 2);
    assert!(world.stop().await);
}

/// `callee`'s answers may take 300 ms.
fn impatient() -> Spec {
    let mut spec = Spec::pair();
    spec.services[1].1 = "app: { port: {port} }, traffic: { timeout: 300ms }";
    spec
}

#[tokio::test]
async fn a_body_that_stands_still_is_given_up() {
    let mut world = World::start(impatient()).await;
    let recorder = world.recorder("callee").await;
    let mut client = Client::app_of(&world, "caller").await;
    client.send("POST http://callee/a HTTP/1.1\r\nHost: callee\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n").await;
    let answer = client.answer().await;
    assert_eq!(answer.status, 504, "{answer:?}");
    assert_eq!(client.rest().await, "", "the rest of the body can't be told from a request");
    for service in ["caller", "callee"] {
        let line = world.logs.wait_for(service, |line| line["service"] == service).await;
        assert_eq!(line["bytes_in"], 5, "{line}");
    }
    assert!(world.stop().await);
    assert!(recorder.seen().iter().all(|seen| !seen.whole), "an end that never came");
}

#[tokio::test]
async fn a_body_that_nobody_reads_is_not_buffered() {
    let mut world = World::start(impatient()).await;
    let (gone, reads) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&reads);
    world
        .app("callee", move |request| {
            let counted = Arc::clone(&counted);
            async move {
                let mut body = request.into_body();
                let first = body.frame().await.unwrap().unwrap();
                counted.fetch_add(first.into_data().unwrap().len(), Ordering::Relaxed);
                std::future::pending().await
            }
        })
        .await;
    let stream = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let sent = Arc::clone(&gone);
    let sending = tokio::spawn(async move {
        let head = "POST http://callee/a HTTP/1.1\r\nHost: callee\r\nTransfer-Encoding: chunked\r\n\r\n";
        write.write_all(head.as_bytes()).await.unwrap();
        let chunk = [b"10000\r\n".as_slice(), &[b'a'; 0x10000], b"\r\n"].concat();
        while write.write_all(&chunk).await.is_ok() {
            sent.fetch_add(0x10000, Ordering::Relaxed);
        }
    });
    let mut answer = Vec::new();
    // The connection ends without its request having been read to the end, which the kernel may tell by a reset.
    let _ =
        timeout(PATIENCE, read.read_to_end(&mut answer)).await.expect("an answer, and the connection's end");
    sending.await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 504"), "{}", String::from_utf8_lossy(&answer));
    // Sockets' buffers and flow-control windows on the way hold some 9 MB; without windows it is more than 80 MB.
    let sent = gone.load(Ordering::Relaxed);
    assert!(sent < 32 << 20, "{sent} bytes were taken while {} were read", reads.load(Ordering::Relaxed));
    assert!(world.stop().await);
}
