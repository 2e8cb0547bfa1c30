//! What floods a connection that a sidecar has opened costs whoever answers on it the connection, and nobody else anything.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::client::Client;
use crate::fake;
use crate::h2_ends::{self, Answerer};
use crate::h2_frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, PRIORITY, PUSH_PROMISE, RST_STREAM,
    SETTINGS, WINDOW_UPDATE, field, frame, read_frame, string,
};
use crate::hostile::{self, Leaf, MESH};
use crate::support::{PATIENCE, Spec, World, events, eventually};

const PREFACE_BYTES: usize = 24;

/// `:status`, as a field that goes into no table.
fn status(code: &str) -> Vec<u8> {
    [&[8][..], &string(code.as_bytes())].concat()
}

type Flood = fn() -> Box<dyn Iterator<Item = Vec<u8>> + Send>;

fn repeated(frame: Vec<u8>) -> Box<dyn Iterator<Item = Vec<u8>> + Send> {
    // Several in one write, and no more than any bound can be meant to take.
    Box::new(std::iter::repeat_n(frame.repeat(50), 2000))
}

fn after(first: Vec<u8>, more: Vec<u8>) -> Box<dyn Iterator<Item = Vec<u8>> + Send> {
    Box::new(std::iter::once(first).chain(repeated(more)))
}

/// Each kind of flood in the place of an answer to stream 1, and the reason that it is to be cut with.
const FLOODS: &[(&str, &str, Flood)] = &[
    ("PING", "control_flood", || repeated(frame(PING, 0, 0, &[0; 8]))),
    ("PING's answer", "control_flood", || repeated(frame(PING, 1, 0, &[0; 8]))),
    ("SETTINGS", "control_flood", || repeated(frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0xff, 0xff]))),
    ("WINDOW_UPDATE", "control_flood", || repeated(frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes()))),
    ("PRIORITY", "control_flood", || repeated(frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1]))),
    ("unknown frames", "control_flood", || repeated(frame(0xfa, 0, 0, &[]))),
    ("GOAWAY", "control_flood", || repeated(frame(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0]))),
    ("interim answers", "control_flood", || repeated(frame(HEADERS, END_HEADERS, 1, &status("103")))),
    ("resets", "rapid_reset", || repeated(frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes()))),
    ("empty DATA", "tiny_data", || {
        after(frame(HEADERS, END_HEADERS, 1, &status("200")), frame(DATA, 0, 1, &[]))
    }),
    ("CONTINUATION", "continuation_flood", || {
        after(
            frame(HEADERS, END_STREAM, 1, &status("200")),
            frame(CONTINUATION, 0, 1, &field("x", &[b'a'; 100])),
        )
    }),
    ("empty CONTINUATION", "continuation_flood", || {
        after(frame(HEADERS, END_STREAM, 1, &status("200")), frame(CONTINUATION, 0, 1, &[]))
    }),
    ("HPACK bomb", "header_bomb", || {
        let entry = [&[0x40][..], &string(b"x"), &string(&[b'a'; 3900])].concat();
        let block = [status("200"), entry, vec![0xbe; 12_000]].concat();
        Box::new(std::iter::once(frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)))
    }),
    ("push", "protocol", || repeated(frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2, 0x82]))),
    ("window overflow", "protocol", || repeated(frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffff_u32.to_be_bytes()))),
    ("DATA of no stream", "protocol", || repeated(frame(DATA, 0, 0, b"DATA"))),
];

/// Who answers.
#[derive(Debug, Clone, Copy)]
enum Door {
    /// Another sidecar.
    Peer,
    /// An application that speaks HTTP/2.
    App,
}

impl Door {
    /// Whose sidecar is flooded, and the leg.
    fn whose(self) -> (&'static str, &'static str) {
        match self {
            Door::Peer => ("caller", "peer"),
            Door::App => ("flooder", "app"),
        }
    }
}

/// What floods with the kind that stands here, or answers 200 where none does.
struct Flooder {
    address: SocketAddr,
    kind: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Flooder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

const NONE: usize = usize::MAX;

impl Flooder {
    fn start(listener: TcpListener, tls: Option<TlsAcceptor>) -> Self {
        let address = listener.local_addr().unwrap();
        let kind = Arc::new(AtomicUsize::new(NONE));
        let now = Arc::clone(&kind);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let (tls, now) = (tls.clone(), Arc::clone(&now));
                tokio::spawn(async move {
                    match tls {
                        None => answer(stream, &now).await,
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => answer(stream, &now).await,
                            Err(_) => Ok(()),
                        },
                    }
                });
            }
        });
        Self { address, kind, task }
    }
}

/// HTTP/2 by hand: answers questions, and each request as it is told to.
async fn answer<S>(stream: S, kind: &AtomicUsize) -> std::io::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut read, mut write) = tokio::io::split(stream);
    read.read_exact(&mut [0; PREFACE_BYTES]).await?;
    write.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
    write.flush().await?;
    let flood = loop {
        let came = read_frame(&mut read).await?;
        match came.kind {
            PING if came.flags == 0 => write.write_all(&frame(PING, 1, 0, &came.payload)).await?,
            HEADERS => match FLOODS.get(kind.load(Ordering::SeqCst)) {
                Some((_, _, flood)) => break flood,
                None => {
                    write
                        .write_all(&frame(HEADERS, END_HEADERS | END_STREAM, came.stream, &status("200")))
                        .await?;
                }
            },
            _ => {}
        }
        write.flush().await?;
    };
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_536];
        while read.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    });
    // Whoever has been cut off can't write any more.
    for piece in flood() {
        write.write_all(&piece).await?;
        write.flush().await?;
    }
    std::future::pending().await
}

/// Asks the flooder, as an application does.
async fn ask(world: &World) -> (u16, Option<String>) {
    let answer = tokio::time::timeout(PATIENCE, world.get("caller", "http://flooder/")).await.unwrap();
    (answer.status, answer.header("x-kiro-reject").map(str::to_owned))
}

async fn check_flood(world: &World, door: Door, flooder: &Flooder, place: usize) {
    let events = events();
    let (name, reason, _) = FLOODS[place];
    let what = format!("{name} by {door:?}");
    let (service, leg) = door.whose();
    let series = format!("kiro_abuse_by_callee_total{{direction=\"{leg}\",reason=\"{reason}\"}}");
    let (before, lines) = (world.metric(service, &series).await, events.lines().len());
    // The connection that stands has answered before, so this is about a new one.
    flooder.kind.store(place, Ordering::SeqCst);
    let mut honest = Client::app_of(world, "caller").await;
    let mut asked = std::pin::pin!(ask(world));
    let (status, reject) = loop {
        let answer = honest.exchange("GET http://honest/ HTTP/1.1\r\nHost: x\r\n\r\n");
        tokio::select! {
            biased;
            asked = &mut asked => break asked,
            answer = answer => assert_eq!(answer.status, 200, "{what}: another service is called all the while"),
        }
    };
    assert!(matches!(status, 200 | 502), "{what}: {status} {reject:?}");
    let is_its = |line: &serde_json::Value| {
        line["target"] == "kiro::abuse"
            && line["service"] == service
            && line["remote"] == *flooder.address.to_string()
    };
    let line = events.wait_for_after(lines, &what, is_its).await;
    assert_eq!(line["reason"], reason, "{what}: {line}");
    let identity = line.get("identity").and_then(serde_json::Value::as_str);
    assert_eq!(
        identity,
        matches!(door, Door::Peer).then_some("spiffe://test.mesh/flooder"),
        "{what}: {line}"
    );
    // What was surely not processed is tried again, and meets the flood once more.
    assert!(world.metric(service, &series).await > before, "{what}");
    // It is called again, by a connection of its own.
    flooder.kind.store(NONE, Ordering::SeqCst);
    eventually("it is called again", || async { ask(world).await.0 == 200 }).await;
}

async fn check_door(door: Door) {
    events();
    let (listener, _, entry) = fake::place();
    let mut world = World::start(Spec {
        top: "",
        services: vec![
            ("caller", "app: { port: {port} }"),
            ("honest", "app: { port: {port} }"),
            match door {
                Door::Peer => ("flooder", entry),
                Door::App => ("flooder", "app: { port: {port}, protocol: h2 }"),
            },
        ],
        allow: "  - { from: caller, to: flooder }\n  - { from: caller, to: honest }",
    })
    .await;
    world.recorder("honest").await;
    let flooder = match door {
        Door::Peer => {
            let config = hostile::server(&world, &Leaf::of(&world, "flooder"), MESH);
            Flooder::start(TcpListener::from_std(listener).unwrap(), Some(Arc::new(config).into()))
        }
        Door::App => Flooder::start(world.listen("flooder").await, None),
    };
    for place in 0..FLOODS.len() {
        check_flood(&world, door, &flooder, place).await;
    }
    if matches!(door, Door::App) {
        let peer = "kiro_upstream_connections_opened_total";
        assert_eq!(
            world.metric("caller", peer).await,
            2,
            "the edge to its sidecar is not the application's to end"
        );
    }
    let in_flight = "kiro_requests_in_flight{direction=\"outbound\"}";
    eventually("no request is left", || async { world.metric("caller", in_flight).await == 0 }).await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn floods_of_a_sidecar_that_answers_are_cut_and_its_identity_is_named() {
    check_door(Door::Peer).await;
}

#[tokio::test]
async fn floods_of_an_application_that_answers_are_cut() {
    check_door(Door::App).await;
}

#[tokio::test]
async fn a_callee_that_opens_no_window_stops_the_one_request() {
    let (listener, _, entry) = fake::place();
    let mut spec = Spec::pair();
    spec.services[1].1 = Box::leak(format!("{entry}, traffic: {{ timeout: 300ms }}").into_boxed_str());
    let world = World::start(spec).await;
    let config = hostile::server(&world, &Leaf::of(&world, "callee"), MESH);
    let (listener, tls) = (TcpListener::from_std(listener).unwrap(), TlsAcceptor::from(Arc::new(config)));
    let serving = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut builder = h2::server::Builder::new();
        builder.initial_window_size(0);
        let handler = |request: http::Request<h2::RecvStream>, mut respond: Answerer| async move {
            if request.method() == "GET" {
                h2_ends::answer(&mut respond, 200, &[], true);
                return;
            }
            // Held, and never read.
            std::future::pending::<()>().await;
            drop(request);
        };
        h2_ends::serve(tls.accept(stream).await.unwrap(), builder, handler).await;
    });
    let mut uploads = Vec::new();
    for _ in 0..20 {
        let mut client = Client::app_of(&world, "caller").await;
        client.send("POST http://callee/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n").await;
        client.send(vec![b'a'; 60_000]).await;
        uploads.push(client);
    }
    for _ in 0..5 {
        assert_eq!(world.get("caller", "http://callee/").await.status, 200);
    }
    for mut upload in uploads {
        assert_eq!(upload.head().await.verdict(), (504, Some("upstream_timeout")));
    }
    assert_eq!(world.metric("caller", "kiro_upstream_connections_opened_total").await, 1);
    serving.abort();
    assert!(world.stop().await);
}
