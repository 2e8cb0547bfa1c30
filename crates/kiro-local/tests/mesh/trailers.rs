//! Trailers that are too large end the one stream that they are of, with a word in the log, and not the connection that others share.

use std::sync::Arc;

use bytes::Bytes;
use h2::RecvStream;
use http::{HeaderMap, HeaderValue, Method, Request};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::client::Client;
use crate::fake;
use crate::h2_ends::{self, Answerer, Call, H2App, H2Client, answer, read_all, request, soon};
use crate::hostile::{self, Leaf, MESH};
use crate::support::{Spec, World, eventually};

/// What an HTTP/1 library takes, and HPACK makes 130 KiB of: more CONTINUATION frames than its receiver bears.
static RARE: [u8; 40_000] = [0xff; 40_000];

fn trailers(value: &[u8]) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", HeaderValue::from_bytes(value).unwrap());
    trailers
}

/// Checks that one sidecar alone has logged and counted the one answer or request, and that no connection was opened in the place of
/// one that ended.
async fn check_seen(world: &World, service: &str, status: u16) {
    let code = "headers_too_large";
    let refused = |line: &serde_json::Value| line["service"] == service && line["reject"] == code;
    let line = world.logs.wait_for("of the trailers", refused).await;
    assert_eq!(line["status"], status, "{line}");
    assert!(line["reject_cause"].as_str().unwrap().contains("trailers that are too large"), "{line}");
    assert_eq!(world.rejects(service, code).await, 1);
    assert_eq!(world.metric(service, "kiro_limit_hits_total{limit=\"header_bytes\"}").await, 1);
    assert_eq!(world.metric("caller", "kiro_upstream_connections_opened_total").await, 1);
}

/// Begins a call whose answer goes on until it is let go.
async fn begin(client: &H2Client) -> RecvStream {
    let call = client.call(request(Method::GET, "http://callee/wait", &[]), true).await;
    let (head, recv, _) = call.head().await;
    assert_eq!(head.status, 200);
    recv
}

/// Ends it whole.
async fn end(mut recv: RecvStream, let_go: &Semaphore) {
    let_go.add_permits(1);
    let (body, _) = read_all(&mut recv).await.unwrap();
    assert_eq!(body, "begun and ended", "the other stream of the connection is whole");
}

#[tokio::test]
async fn an_application_s_end_its_answer_alone() {
    let world = World::start(Spec::pair()).await;
    let app = world.listen("callee").await;
    let let_go = Arc::new(Semaphore::new(0));
    let gate = Arc::clone(&let_go);
    let serving = tokio::spawn(async move {
        loop {
            let (stream, _) = app.accept().await.unwrap();
            let gate = Arc::clone(&gate);
            tokio::spawn(http1_app(stream, gate));
        }
    });
    let client = H2Client::app_of(&world, "caller").await;
    let other = begin(&client).await;
    let (head, mut recv, _) =
        client.call(request(Method::GET, "http://callee/large", &[]), true).await.head().await;
    assert_eq!(head.status, 200, "its head is well");
    assert!(read_all(&mut recv).await.is_err(), "it is no whole answer");
    check_seen(&world, "callee", 200).await;
    end(other, &let_go).await;
    serving.abort();
    drop(client);
    assert!(world.stop().await);
}

/// An application without HTTP/2, whose trailers are large but for `/wait`.
async fn http1_app(stream: TcpStream, gate: Arc<Semaphore>) {
    let mut stream = Client::on(stream);
    let head = stream.request_head().await;
    stream
        .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n6\r\nbegun \r\n")
        .await;
    if head.starts_with("GET /wait") {
        gate.acquire().await.unwrap().forget();
        stream.send("9\r\nand ended\r\n0\r\n\r\n").await;
    } else {
        stream.send([b"0\r\nx-sum: ", &RARE[..], b"\r\n\r\n"].concat()).await;
    }
    let mut stream = stream.into_stream();
    let _ = stream.flush().await;
    std::future::pending::<()>().await;
}

/// Answers by HTTP/2 as above, with trailers that are larger than any may be.
async fn h2_app(request: Request<RecvStream>, mut respond: Answerer, gate: Arc<Semaphore>) {
    let mut stream = answer(&mut respond, 200, &[], false);
    stream.send_data(Bytes::from_static(b"begun "), false).unwrap();
    if request.uri().path() == "/wait" {
        gate.acquire().await.unwrap().forget();
        stream.send_data(Bytes::from_static(b"and ended"), true).unwrap();
    } else {
        stream.send_trailers(trailers(&[b'a'; 70_000])).unwrap();
    }
}

#[tokio::test]
async fn another_sidecar_s_end_its_answer_alone() {
    let (listener, _, entry) = fake::place();
    let mut spec = Spec::pair();
    spec.services[1].1 = entry;
    let world = World::start(spec).await;
    let config = hostile::server(&world, &Leaf::of(&world, "callee"), MESH);
    let (listener, tls) = (TcpListener::from_std(listener).unwrap(), TlsAcceptor::from(Arc::new(config)));
    let let_go = Arc::new(Semaphore::new(0));
    let gate = Arc::clone(&let_go);
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let stream = tls.accept(stream).await.unwrap();
        let handler = move |request: Request<RecvStream>, respond: Answerer| {
            h2_app(request, respond, Arc::clone(&gate))
        };
        h2_ends::serve(stream, h2::server::Builder::new(), handler).await;
    });
    let client = H2Client::app_of(&world, "caller").await;
    let other = begin(&client).await;
    let (_, mut recv, _) =
        client.call(request(Method::GET, "http://callee/large", &[]), true).await.head().await;
    assert!(read_all(&mut recv).await.is_err(), "it is no whole answer");
    check_seen(&world, "caller", 200).await;
    end(other, &let_go).await;
    drop(client);
    serving.abort();
    assert!(world.stop().await);
}

/// Sends a request that ends with trailers. Its answer, where there is one.
async fn upload(client: &H2Client, value: &[u8]) -> Call {
    let mut call = client.call(request(Method::POST, "http://callee/upload", &[]), false).await;
    call.send.send_data(Bytes::from_static(b"hello"), false).unwrap();
    // On its way alone, so that the trailers meet a stream that has begun.
    tokio::task::yield_now().await;
    call.send.send_trailers(trailers(value)).unwrap();
    call
}

#[tokio::test]
async fn a_client_s_end_its_request_alone() {
    let mut world = World::start(Spec::pair()).await;
    let recorder = world.recorder("callee").await;
    let client = H2Client::app_of(&world, "caller").await;
    // Another client's request, which is under way on the edge.
    let other = H2Client::app_of(&world, "caller").await;
    let mut slow = other.call(request(Method::POST, "http://callee/slow", &[]), false).await;
    slow.send.send_data(Bytes::from_static(b"half"), false).unwrap();
    let in_flight = "kiro_requests_in_flight{direction=\"inbound\"}";
    eventually("it is under way", || async { world.metric("callee", in_flight).await == 1 }).await;
    let refused = upload(&client, &RARE).await.whole().await;
    assert_eq!(refused.verdict(), (431, Some("headers_too_large")));
    check_seen(&world, "caller", 431).await;
    slow.send.send_data(Bytes::from_static(b" and whole"), true).unwrap();
    assert_eq!(slow.whole().await.verdict(), (200, None));
    let whole: Vec<_> = recorder.seen().into_iter().filter(|seen| seen.whole).collect();
    assert_eq!(whole.len(), 1, "{whole:?}");
    assert_eq!(whole[0].body, "half and whole");
    drop((client, other));
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_an_application_s_library_could_not_bear_ends_its_request_alone() {
    let mut spec = Spec::pair();
    spec.services[1].1 = "app: { port: {port}, protocol: h2 }";
    let world = World::start(spec).await;
    let let_go = Arc::new(Semaphore::new(0));
    let gate = Arc::clone(&let_go);
    let mut builder = h2::server::Builder::new();
    builder.max_header_list_size(16 * 1024);
    let app = H2App::with(world.listen("callee").await, builder, move |mut request, respond| {
        let gate = Arc::clone(&gate);
        async move {
            // Trailers of a request that is whole would be answered by such, and are not looked at here.
            if read_all(request.body_mut()).await.is_ok() {
                h2_app(request, respond, gate).await;
            }
        }
    });
    let client = H2Client::app_of(&world, "caller").await;
    let other = begin(&client).await;
    // The edge takes it: below 64 KiB. With its name and 32 bytes more it is above four times the library's limit.
    let refused = soon("an answer", upload(&client, &[b'a'; 65_520]).await.whole()).await;
    assert_eq!(refused.verdict(), (431, Some("headers_too_large")));
    let refused = |line: &serde_json::Value| line["service"] == "callee" && line["status"] == 431;
    world.logs.wait_for("of the trailers", refused).await;
    assert_eq!(world.metric("callee", "kiro_limit_hits_total{limit=\"header_bytes\"}").await, 1);
    assert_eq!(app.connections(), 1);
    end(other, &let_go).await;
    drop(client);
    assert!(world.stop().await);
}
