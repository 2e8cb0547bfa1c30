//! Renewed certificates are taken up without a restart, and without a request that fails for it.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

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
