//! What a sidecar counts, and that nobody outside can make it count under names of his own.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;

use crate::client::Client;
use crate::support::{Spec, World, eventually};

/// A caller whose callee answers with the status that the path asks for.
async fn world_of_any_status() -> World {
    let mut world = World::start(Spec::pair()).await;
    world
        .app("callee", |request: Request<Incoming>| async move {
            let status = request.uri().path().trim_start_matches("/status/").parse().unwrap_or(200);
            let mut response = Response::new(Full::new(Bytes::from_static(b"x")));
            *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
            response
        })
        .await;
    world
}

async fn series(world: &World, service: &str) -> usize {
    let text = world.admin(service, "/metrics").await.body;
    text.lines().filter(|line| !line.starts_with('#')).count()
}

/// Requests of the numbers in a range, each odd in every way that a client has.
async fn odd_requests(client: &mut Client, numbers: std::ops::Range<u16>) {
    for number in numbers {
        let status = 200 + number % 800;
        let known = format!("M{number} http://callee/status/{status} HTTP/1.1\r\nHost: x\r\n\r\n");
        let unknown = format!("M{number} http://host{number}/path{number} HTTP/1.1\r\nHost: x\r\n\r\n");
        for request in [known, unknown] {
            let answer = client.exchange(request).await;
            assert!(answer.status >= 200, "{answer:?}");
        }
    }
}

#[tokio::test]
async fn a_client_can_not_make_series() {
    let world = world_of_any_status().await;
    let mut client = Client::app_of(&world, "caller").await;
    // One of each class of status, of each known reject.
    odd_requests(&mut client, 0..800).await;
    let before = (series(&world, "caller").await, series(&world, "callee").await);
    odd_requests(&mut client, 800..2400).await;
    assert_eq!((series(&world, "caller").await, series(&world, "callee").await), before);
    let text = world.admin("caller", "/metrics").await.body;
    for odd in ["M1", "host1", "path1", "\"799\""] {
        assert!(!text.contains(odd), "{odd} in {text}");
    }
    let unknown = "kiro_rejects_total{from=\"caller\",to=\"-\",code=\"service_unknown\"}";
    assert_eq!(world.metric("caller", unknown).await, 2400);
    drop(client);
    assert!(world.stop().await);
}

#[tokio::test]
async fn connections_and_handshakes_are_counted_at_both_ends() {
    let mut world = World::start(Spec::pair()).await;
    world.recorder("callee").await;
    assert_eq!(world.get("caller", "http://callee/a").await.status, 200);
    for (service, series, count) in [
        ("caller", "kiro_connections_accepted_total{listener=\"outbound\"}", 1),
        ("caller", "kiro_upstream_connections_opened_total", 1),
        ("caller", "kiro_upstream_connections_open", 1),
        ("caller", "kiro_tls_handshakes_total{direction=\"peer\",outcome=\"ok\"}", 1),
        ("callee", "kiro_connections_accepted_total{listener=\"inbound\"}", 1),
        ("callee", "kiro_connections_open{listener=\"inbound\"}", 1),
        ("callee", "kiro_tls_handshakes_total{direction=\"inbound\",outcome=\"ok\"}", 1),
        ("callee", "kiro_app_connections_opened_total", 1),
    ] {
        assert_eq!(world.metric(service, series).await, count, "{service} {series}");
    }
    eventually("the client's connection is gone", || async {
        world.metric("caller", "kiro_connections_open{listener=\"outbound\"}").await == 0
    })
    .await;
    assert_eq!(world.metric("caller", "kiro_requests_in_flight{direction=\"outbound\"}").await, 0);
    assert!(world.stop().await);
}
