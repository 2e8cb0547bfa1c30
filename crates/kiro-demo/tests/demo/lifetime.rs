//! Does a request that is under way survive the end of its service, and is it seen in one trace?

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiro_demo::Service;
use kiro_telemetry::trace::{
    OTelSdkResult, Sampler, ServiceInfo, SpanData, SpanExporter, SpanKind, Status, Tracing,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::support::{Action, Mesh, PATIENCE, Plan};

#[tokio::test]
async fn shutdown_lets_requests_finish_and_closes_the_rest() {
    for mutual in [false, true] {
        let permit = Arc::new(Notify::new());
        let held = Arc::clone(&permit);
        let mut mesh = Mesh::start(Plan::new(mutual).rule(move |seen| {
            if seen.caller == Service::Dashboard && seen.uri.host() == Some("profile") {
                Action::ForwardAfter(Arc::clone(&held))
            } else {
                Action::Forward
            }
        }))
        .await;
        // A connection on which nothing was asked must not hold the end up. (Over TLS it is still in its handshake.)
        let mut silent = TcpStream::connect(mesh.app(Service::Auth)).await.unwrap();

        let answer = mesh.get(Service::Dashboard, "/dashboard/alice");
        let end = async {
            let asked = async {
                while !mesh.seen().iter().any(|seen| seen.uri.host() == Some("profile")) {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(PATIENCE, asked).await.expect("Profile is not asked");
            // Dashboard alone: the others are needed for what is under way.
            mesh.shut_down_one(Service::Dashboard);
            let refused = async {
                while TcpStream::connect(mesh.app(Service::Dashboard)).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(PATIENCE, refused).await.expect("still listening");
            permit.notify_one();
        };
        let (answer, ()) = tokio::join!(answer, end);
        assert_eq!(answer.status, 200, "cut off at shutdown");

        mesh.shut_down();
        for running in &mut mesh.running {
            // Less than a handshake may take, and than connections are given before they are cut off.
            tokio::time::timeout(Duration::from_secs(4), running)
                .await
                .expect("does not end")
                .unwrap()
                .unwrap();
        }
        assert_eq!(silent.read(&mut [0]).await.unwrap_or(0), 0);
    }
}

#[tokio::test]
async fn a_malformed_head_is_answered_and_the_connection_closed() {
    let mesh = Mesh::start(Plan::new(false)).await;
    let long = format!("GET / HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "a".repeat(70 * 1024));
    let many = format!("GET / HTTP/1.1\r\nhost: x\r\n{}\r\n", "x: y\r\n".repeat(300));
    for (head, status) in [("GET\0 / HTTP/1.1\r\n\r\n", 400), (long.as_str(), 431), (many.as_str(), 431)] {
        let mut tcp = TcpStream::connect(mesh.app(Service::Auth)).await.unwrap();
        // It may be answered and closed before all of it was sent.
        let _ = tcp.write_all(head.as_bytes()).await;
        let mut answer = vec![0; 12];
        tokio::time::timeout(PATIENCE, tcp.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), format!("HTTP/1.1 {status}"), "{head:.30}");
    }
}

#[derive(Clone, Debug, Default)]
struct Kept(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Kept {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

#[tokio::test]
async fn a_request_is_one_trace_over_all_services() {
    let kept = Kept::default();
    let info = ServiceInfo { name: "demo", instance_id: "1", version: "0" };
    let mut plan = Plan::new(true);
    let delay = Duration::from_millis(10);
    plan.tracing =
        Tracing::with_exporter(kept.clone(), &info, Sampler::PARENT_BASED_ALWAYS_ON, delay).unwrap();
    let tracing = plan.tracing.clone();
    let mesh = Mesh::start(plan).await;
    let answer = mesh.get(Service::Dashboard, "/dashboard/mallory").await;
    assert_eq!(answer.status, 403);
    // The last span is recorded before the answer leaves, and exported here.
    tokio::task::spawn_blocking(move || tracing.flush()).await.unwrap();

    let spans = kept.0.lock().unwrap();
    let traces = answer.headers["traceresponse"].to_str().unwrap();
    let parts: Vec<_> = traces.split('-').collect();
    let root = spans.iter().find(|span| span.span_context.span_id().to_string() == parts[2]).unwrap();
    assert_eq!((parts[0], parts[3]), ("00", "01"));
    assert_eq!(root.name, "GET /dashboard/{user}");

    let mut tree: Vec<_> = spans
        .iter()
        .map(|span| {
            assert_eq!(span.span_context.trace_id().to_string(), parts[1]);
            let parent = spans.iter().find(|other| other.span_context.span_id() == span.parent_span_id);
            let failed = matches!(span.status, Status::Error { .. });
            (parent.map_or("-", |span| &span.name), span.name.as_ref(), span.span_kind.clone(), failed)
        })
        .collect();
    tree.sort_by_key(|(parent, name, ..)| (parent.to_string(), name.to_string()));
    let (server, client) = (SpanKind::Server, SpanKind::Client);
    assert_eq!(
        tree,
        [
            ("-", "GET /dashboard/{user}", server.clone(), false),
            ("GET", "GET /profiles/{user}", server.clone(), false),
            ("GET", "GET /sessions/{user}", server.clone(), false),
            ("GET /dashboard/{user}", "GET", client.clone(), false),
            ("GET /dashboard/{user}", "GET", client.clone(), true),
            ("GET /profiles/{user}", "POST", client, true),
            ("POST", "POST /verify", server, false),
        ]
    );
}
