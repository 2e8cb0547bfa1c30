//! Renewed certificates are taken up without a restart, and without a request that fails for it; who was verified before is not believed
//! for ever.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::h2_ends::soon;
use crate::h2_frames::{
    END_HEADERS, END_STREAM, GOAWAY, HEADERS, RST_STREAM, frame, preface, read_frame, request,
};
use crate::hostile::{self, Leaf, MESH};
use crate::support::{PATIENCE, Spec, World, eventually};

/// The serial of the certificate that a sidecar runs with, by its own word.
async fn serial(world: &World, service: &str) -> String {
    let text = crate::support::raw(
        world.addresses(service).admin,
        b"GET /config HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )
    .await;
    let line = text.lines().find(|line| line.contains("\"serial\"")).unwrap();
    line.trim().to_owned()
}

#[tokio::test]
async fn a_renewed_callee_is_called_anew_while_an_old_answer_still_flows() {
    let mut world = World::start(Spec::pair()).await;
    world
        .app("callee", |request: Request<Incoming>| async move {
            let size = if request.uri().path() == "/long" { 8_000_000 } else { 2 };
            Response::new(Full::new(Bytes::from(vec![b'a'; size])))
        })
        .await;
    // Its answer has begun and is not read: the stream stays open over the renewal.
    let mut long = TcpStream::connect(world.addresses("caller").outbound).await.unwrap();
    long.write_all(b"GET http://callee/long HTTP/1.1\r\nHost: callee\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    long.readable().await.unwrap();
    let before = serial(&world, "callee").await;
    world.renew("callee");
    eventually("the new certificate is in use", || async { serial(&world, "callee").await != before }).await;
    for _ in 0..20 {
        let answer =
            tokio::time::timeout(PATIENCE, world.get("caller", "http://callee/short")).await.unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    let mut whole = Vec::new();
    tokio::time::timeout(PATIENCE, long.read_to_end(&mut whole)).await.unwrap().unwrap();
    assert!(whole.len() > 8_000_000, "the old answer ends as it began: {}", whole.len());
    let all_good = || async {
        let lines = world.logs.lines();
        lines.iter().filter(|line| line["direction"] == "outbound" && line["status"] == 200).count() == 21
    };
    eventually("each call is logged as one that went well", all_good).await;
    assert!(world.stop().await);
}

/// Renews a sidecar and waits until it runs with the new leaf.
async fn renewed(world: &World, service: &str) {
    let before = serial(world, service).await;
    world.renew(service);
    eventually("the new certificate is in use", || async { serial(world, service).await != before }).await;
}

/// Makes of a connection to a callee's sidecar one of the caller's, over which HTTP/2 has begun.
async fn begin(world: &World, stream: TcpStream) -> tokio_rustls::client::TlsStream<TcpStream> {
    let config = Arc::new(hostile::client(world, Some(&Leaf::of(world, "caller")), MESH));
    let mut stream = hostile::handshake(stream, "callee", &config).await.unwrap();
    stream.write_all(&preface()).await.unwrap();
    stream.flush().await.unwrap();
    stream
}

/// The next frame of this kind.
async fn next(stream: &mut tokio_rustls::client::TlsStream<TcpStream>, kinds: &[u8]) -> (u8, Option<u32>) {
    loop {
        let came = soon("a frame", read_frame(stream)).await.unwrap();
        if kinds.contains(&came.kind) {
            return (came.kind, (came.kind == RST_STREAM).then(|| came.code()));
        }
    }
}

#[tokio::test]
async fn a_peer_that_does_not_hear_of_the_end_is_refused_soon_after() {
    const REFUSED_STREAM: u32 = 7;
    let world = World::start(Spec::pair()).await;
    let mut peer = begin(&world, TcpStream::connect(world.addresses("callee").inbound).await.unwrap()).await;
    renewed(&world, "callee").await;
    next(&mut peer, &[GOAWAY]).await;
    let told = Instant::now();
    // It never answers the PING behind the GOAWAY, so the library goes on to take its streams.
    let mut answered = 0;
    for stream in (1..).step_by(2) {
        let head = frame(HEADERS, END_HEADERS | END_STREAM, stream, &request("GET", "callee"));
        peer.write_all(&head).await.unwrap();
        peer.flush().await.unwrap();
        // Without a signature, a head is an answer of 401, which is what the sidecar says to who is believed.
        match next(&mut peer, &[HEADERS, RST_STREAM]).await {
            (HEADERS, _) => answered += 1,
            (_, code) => {
                assert_eq!(code, Some(REFUSED_STREAM));
                break;
            }
        }
        assert!(told.elapsed() < PATIENCE, "believed for ever: {answered} answers");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(answered > 0, "what was on its way when it was told is served");
    let after = told.elapsed().as_millis();
    assert!((4_000..7_000).contains(&after), "after {after} ms");
    drop(peer);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_handshake_that_a_renewal_falls_into_is_told_as_well() {
    let world = World::start(Spec::pair()).await;
    let stream = TcpStream::connect(world.addresses("callee").inbound).await.unwrap();
    let open = "kiro_connections_open{listener=\"inbound\"}";
    eventually("it is accepted", || async { world.metric("callee", open).await == 1 }).await;
    renewed(&world, "callee").await;
    // Its handshake is one with the identity that was.
    let mut peer = begin(&world, stream).await;
    next(&mut peer, &[GOAWAY]).await;
    drop(peer);
    assert!(world.stop().await);
}
