//! What floods a connection costs whoever sends it the connection, and nobody else anything.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kiro_hostile::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, field, frame, preface, request,
};
use kiro_hostile::{FLOODS, Flood, Pieces};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::hostile::{self, HTTP1, Leaf, MESH, Speaks};
use crate::support::{PATIENCE, Spec, World, events, eventually};

/// A mesh with every kind of listener: `first` has an ingress and calls `second`. Tests tell theirs by address.
async fn world() -> World {
    let mut world = World::start(Spec {
        top: "",
        services: vec![
            (
                "first",
                "app: { port: {port} }, ingress: { port: {ingress}, tls_port: {ingress_tls} }, metrics: open",
            ),
            ("second", "app: { port: {port} }"),
        ],
        allow: "  - { from: first, to: second }\n  - { from: ingress, to: first }",
    })
    .await;
    world.recorder("first").await;
    world.recorder("second").await;
    world
}

/// A listener, and how one gets to it.
#[derive(Debug, Clone, Copy)]
enum Door {
    Outbound,
    Inbound,
    Ingress,
    IngressTls,
}

const DOORS: [Door; 4] = [Door::Outbound, Door::Inbound, Door::Ingress, Door::IngressTls];

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Door {
    /// Whose it is, and its name there.
    fn whose(self) -> (&'static str, &'static str) {
        match self {
            Door::Outbound => ("first", "outbound"),
            Door::Inbound => ("second", "inbound"),
            Door::Ingress => ("first", "ingress"),
            Door::IngressTls => ("first", "ingress_tls"),
        }
    }

    fn address(self, world: &World) -> SocketAddr {
        match self {
            Door::Outbound => world.addresses("first").outbound,
            Door::Inbound => world.addresses("second").inbound,
            Door::Ingress => world.addresses("first").ingress.unwrap(),
            Door::IngressTls => world.addresses("first").ingress_tls.unwrap(),
        }
    }

    /// What is asked for through it.
    fn authority(self) -> &'static str {
        match self {
            Door::Outbound | Door::Inbound => "second",
            Door::Ingress | Door::IngressTls => "localhost",
        }
    }

    /// A connection through which HTTP/2 can be spoken, and its address.
    async fn open(self, world: &World) -> (Box<dyn Stream>, String) {
        let stream = TcpStream::connect(self.address(world)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let local = stream.local_addr().unwrap().to_string();
        let stream: Box<dyn Stream> = match self {
            Door::Outbound | Door::Ingress => Box::new(stream),
            Door::Inbound => {
                let config = Arc::new(hostile::client(world, Some(&Leaf::of(world, "first")), MESH));
                Box::new(hostile::handshake(stream, "second", &config).await.unwrap())
            }
            Door::IngressTls => {
                let config = Arc::new(hostile::client(world, None, MESH));
                Box::new(hostile::handshake(stream, "localhost", &config).await.unwrap())
            }
        };
        (stream, local)
    }
}

/// A client that goes on asking, by the application's way and by the ingress, while others misbehave.
struct Honest {
    answered: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Honest {
    fn start(world: &World) -> Self {
        let (answered, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (outbound, ingress) =
            (world.addresses("first").outbound, world.addresses("first").ingress.unwrap());
        let (count, ended) = (Arc::clone(&answered), Arc::clone(&stop));
        let task = tokio::spawn(async move {
            while !ended.load(Ordering::Relaxed) {
                for (address, host) in [(outbound, "second"), (ingress, "localhost")] {
                    let mut client = Client::open(address).await;
                    for _ in 0..5 {
                        let request = format!("GET /honest HTTP/1.1\r\nHost: {host}\r\n\r\n");
                        let answer = client.exchange(request).await;
                        assert_eq!(answer.status, 200, "{host}: {answer:?}");
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
        Self { answered, stop, task }
    }

    fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// It has been served from `before` on, and without a failure.
    async fn end(self, before: usize) {
        eventually("the other client is served", || async {
            self.answered() > before + 20 || self.task.is_finished()
        })
        .await;
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
    }
}

/// Sends a flood until the other end has had enough of it.
async fn send(stream: Box<dyn Stream>, pieces: Pieces) {
    let (mut read, mut write) = tokio::io::split(stream);
    let reader = tokio::spawn(async move {
        let mut buffer = vec![0; 65_536];
        while read.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    });
    let sent = async {
        write.write_all(&preface()).await?;
        for piece in pieces {
            write.write_all(&piece).await?;
        }
        write.flush().await
    };
    // Whoever has been cut off can't write any more.
    let _ = tokio::time::timeout(PATIENCE, sent).await.expect("neither read nor refused");
    tokio::time::timeout(PATIENCE, reader).await.expect("the connection is cut").unwrap();
}

async fn check_flood(world: &World, door: Door, flood: &Flood) {
    let Flood { name, reason, pieces } = *flood;
    let events = events();
    let (service, listener) = door.whose();
    let series = format!("kiro_abuse_total{{listener=\"{listener}\",reason=\"{reason}\"}}");
    let (before, lines) = (world.metric(service, &series).await, events.lines().len());
    let (stream, local) = door.open(world).await;
    send(stream, pieces(door.authority())).await;
    let what = format!("{name} through {door:?}");
    // Another test's client may have had this one's port.
    let is_its = |line: &serde_json::Value| {
        line["target"] == "kiro::abuse"
            && line["service"] == service
            && line["remote"] == *local
            && line["listener"] == listener
    };
    let line = events.wait_for_after(lines, &what, is_its).await;
    assert_eq!(line["reason"], reason, "{what}: {line}");
    let identity = line.get("identity").and_then(serde_json::Value::as_str);
    let known = matches!(door, Door::Inbound).then_some("spiffe://test.mesh/first");
    assert_eq!(identity, known, "{what}: {line}");
    assert_eq!(world.metric(service, &series).await, before + 1, "{what}");
}

async fn check_door(door: Door) {
    let world = world().await;
    let honest = Honest::start(&world);
    for flood in FLOODS {
        let before = honest.answered();
        check_flood(&world, door, flood).await;
        eventually("the other client is served", || async { honest.answered() > before }).await;
    }
    let before = honest.answered();
    honest.end(before).await;
    let (service, listener) = door.whose();
    let open = format!("kiro_connections_open{{listener=\"{listener}\"}}");
    eventually("no connection is left", || async { world.metric(service, &open).await <= 1 }).await;
    let in_flight = "kiro_requests_in_flight{direction=\"outbound\"}";
    eventually("no request is left", || async { world.metric(service, in_flight).await == 0 }).await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn bodies_in_pieces_of_one_byte_are_cut_where_they_pile_up() {
    let world = world().await;
    let honest = Honest::start(&world);
    for door in [Door::Outbound, Door::Ingress, Door::IngressTls] {
        let before = honest.answered();
        let pieces = |authority: &str| -> Pieces {
            let first = frame(HEADERS, END_HEADERS, 1, &request("POST", authority));
            // As much as the window of the stream lets through, in one piece.
            Box::new([first, frame(DATA, 0, 1, b"x").repeat(60_000)].into_iter())
        };
        check_flood(&world, door, &Flood { name: "DATA of one byte", reason: "tiny_data", pieces }).await;
        eventually("the other client is served", || async { honest.answered() > before }).await;
    }
    // One that comes no faster than it is passed on is a body like any other.
    let mut slow = Client::app_of(&world, "first").await;
    slow.send("POST / HTTP/1.1\r\nHost: second\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    for _ in 0..5_000 {
        slow.send("1\r\nx\r\n").await;
    }
    assert_eq!(slow.exchange("0\r\n\r\n").await.status, 200);
    let before = honest.answered();
    honest.end(before).await;
    assert!(world.stop().await);
}

#[tokio::test]
async fn floods_of_an_application_are_cut() {
    check_door(Door::Outbound).await;
}

#[tokio::test]
async fn floods_of_another_sidecar_are_cut_and_its_identity_is_named() {
    check_door(Door::Inbound).await;
}

#[tokio::test]
async fn floods_from_outside_are_cut() {
    check_door(Door::Ingress).await;
}

#[tokio::test]
async fn floods_inside_tls_are_cut() {
    check_door(Door::IngressTls).await;
}

#[tokio::test]
async fn heads_that_the_library_refuses_are_logged_and_counted() {
    let world = world().await;
    for door in DOORS {
        let before = world.logs.lines().len();
        let (mut stream, _) = door.open(&world).await;
        let mut bytes = preface();
        let mut block = request("GET", door.authority());
        // Beyond what is handed over, and below what ends the connection.
        let fields = if matches!(door, Door::Inbound) { 8 } else { 28 };
        for _ in 0..fields {
            block.extend(field("x", &[b'a'; 10_000]));
        }
        let pieces: Vec<_> = block.chunks(16_384).collect();
        for (place, piece) in pieces.iter().enumerate() {
            let last = if place + 1 == pieces.len() { END_HEADERS } else { 0 };
            let (kind, flags) = if place == 0 { (HEADERS, last | END_STREAM) } else { (CONTINUATION, last) };
            bytes.extend(frame(kind, flags, 1, piece));
        }
        // One that is no request: a field that HTTP/2 does not have.
        let malformed = [request("GET", door.authority()), field("connection", b"close")].concat();
        bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, 3, &malformed));
        stream.write_all(&bytes).await.unwrap();
        stream.flush().await.unwrap();
        let (service, _) = door.whose();
        for (code, status) in [("headers_too_large", 431), ("message_invalid", 400)] {
            let what = format!("{code} through {door:?}");
            let line = world
                .logs
                .wait_for_after(before, &what, |line| line["service"] == service && line["reject"] == code)
                .await;
            assert_eq!(line["status"], status, "{what}: {line}");
        }
        drop(stream);
    }
    assert_eq!(world.rejects("first", "headers_too_large").await, 3);
    assert_eq!(world.rejects("second", "headers_too_large").await, 1);
    assert_eq!(world.metric("first", "kiro_library_answers_total").await, 6);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_crowd_of_idle_connections_makes_room() {
    let world = world().await;
    let cap = world.metric("first", "kiro_limit{limit=\"connections\"}").await as usize;
    for door in [Door::Ingress, Door::Outbound, Door::Inbound] {
        let (service, listener) = door.whose();
        let address = door.address(&world);
        let open = format!("kiro_connections_open{{listener=\"{listener}\"}}");
        let hits = "kiro_limit_hits_total{limit=\"connections\"}";
        let before = world.metric(service, hits).await;
        let mut crowd = Vec::with_capacity(cap);
        // Some have left again where the machine is slow.
        while world.metric(service, hits).await == before {
            assert!(crowd.len() < 3 * cap, "{door:?}: the bound is never run into");
            for number in 0..(cap / 8).max(1) {
                let mut stream = TcpStream::connect(address).await.unwrap();
                // Some say nothing, some stay in their first head.
                if number % 2 == 0 && !matches!(door, Door::Inbound) {
                    stream.write_all(b"GET / HTTP/1.1\r\nHo").await.unwrap();
                }
                crowd.push(stream);
            }
        }
        eventually("a client is served all the same", || async {
            match door {
                Door::Ingress | Door::IngressTls => {
                    let answer =
                        crate::support::raw(address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
                    answer.starts_with("HTTP/1.1 200")
                }
                Door::Outbound => {
                    let answer =
                        crate::support::raw(address, b"GET / HTTP/1.1\r\nHost: second\r\n\r\n").await;
                    answer.starts_with("HTTP/1.1 200")
                }
                Door::Inbound => {
                    let Ok(stream) = TcpStream::connect(address).await else { return false };
                    let config = Arc::new(hostile::client(&world, Some(&Leaf::of(&world, "first")), MESH));
                    hostile::handshake(stream, "second", &config).await.is_ok()
                }
            }
        })
        .await;
        let evicted = format!("kiro_connections_evicted_total{{listener=\"{listener}\"}}");
        assert!(world.metric(service, &evicted).await > 0, "{door:?}");
        drop(crowd);
        eventually("the crowd is gone", || async { world.metric(service, &open).await < 10 }).await;
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn silent_connections_do_not_keep_health_and_admin_from_answering() {
    let world = world().await;
    for address in [world.addresses("first").health, world.addresses("first").admin] {
        let mut silent = Vec::new();
        for _ in 0..200 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let mut client = Client::open(address).await;
        let answer = client.exchange("GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert_eq!(answer.status, 200);
        drop(silent);
    }
    assert!(world.metric("first", "kiro_limit_hits_total{limit=\"admin_connections\"}").await > 0);
    assert!(world.stop().await);
}

#[tokio::test]
async fn failed_handshakes_are_all_counted_and_not_all_written() {
    const COUNT: u64 = 300;
    let events = events();
    let world = world().await;
    let address = world.addresses("second").inbound;
    let mut strangers = Vec::new();
    for _ in 0..COUNT {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: second\r\n\r\n").await.unwrap();
        strangers.push(stream);
    }
    let failed = "kiro_tls_handshakes_total{direction=\"inbound\",outcome=\"tls_plain_http\"}";
    eventually("all have failed", || async { world.metric("second", failed).await == COUNT }).await;
    let suppressed = world.metric("second", "kiro_log_lines_suppressed_total").await;
    let locals: Vec<_> = strangers.iter().map(|stream| stream.local_addr().unwrap().to_string()).collect();
    let written = events
        .lines()
        .iter()
        .filter(|line| {
            line["message"] == "handshake failed" && locals.iter().any(|local| line["remote"] == **local)
        })
        .count() as u64;
    assert_eq!(written + suppressed, COUNT);
    assert!(suppressed > COUNT / 2, "{suppressed} of {COUNT}");
    assert!(written >= 20, "{written} of {COUNT}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn handshakes_that_stand_still_keep_nobody_out() {
    let world = world().await;
    let honest = Honest::start(&world);
    for door in [Door::Inbound, Door::IngressTls] {
        let mut slow = Vec::new();
        // The beginning of a ClientHello; more of them than may be under way.
        for _ in 0..300 {
            let mut stream = TcpStream::connect(door.address(&world)).await.unwrap();
            stream.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
            slow.push(stream);
        }
        let (service, _) = door.whose();
        let leg = if matches!(door, Door::Inbound) { "inbound" } else { "ingress" };
        let under_way = format!("kiro_tls_handshakes_in_progress{{direction=\"{leg}\"}}");
        eventually("they are under way", || async { world.metric(service, &under_way).await == 256 }).await;
        // Whoever comes now is served long before those who stand still are given up.
        let begin = Instant::now();
        let speaks: Speaks = if matches!(door, Door::Inbound) { MESH } else { HTTP1 };
        let config = Arc::new(hostile::client(&world, Some(&Leaf::of(&world, "first")), speaks));
        let server = if matches!(door, Door::Inbound) { "second" } else { "localhost" };
        let stream = TcpStream::connect(door.address(&world)).await.unwrap();
        assert!(hostile::handshake(stream, server, &config).await.is_ok(), "{door:?}");
        assert!(begin.elapsed() < Duration::from_secs(5), "{door:?}: {:?}", begin.elapsed());
        let before = honest.answered();
        eventually("the other client is served", || async { honest.answered() > before + 20 }).await;
        assert!(world.metric(service, "kiro_limit_hits_total{limit=\"handshakes\"}").await > 0);
        drop(slow);
        eventually("they are gone", || async { world.metric(service, &under_way).await == 0 }).await;
    }
    let before = honest.answered();
    honest.end(before).await;
    assert!(world.stop().await);
}
