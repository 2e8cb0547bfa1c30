//! What floods a connection costs whoever sends it the connection, and nobody else anything.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::hostile::{self, HTTP1, Leaf, MESH, Speaks};
use crate::support::{PATIENCE, Spec, World, events, eventually};

/// HTTP/2 by hand.
pub(crate) mod h2_frames {
    use tokio::io::{AsyncRead, AsyncReadExt};

    pub(crate) const DATA: u8 = 0;
    pub(crate) const HEADERS: u8 = 1;
    pub(crate) const PRIORITY: u8 = 2;
    pub(crate) const RST_STREAM: u8 = 3;
    pub(crate) const SETTINGS: u8 = 4;
    pub(crate) const PUSH_PROMISE: u8 = 5;
    pub(crate) const PING: u8 = 6;
    pub(crate) const GOAWAY: u8 = 7;
    pub(crate) const WINDOW_UPDATE: u8 = 8;
    pub(crate) const CONTINUATION: u8 = 9;
    pub(crate) const END_STREAM: u8 = 1;
    pub(crate) const END_HEADERS: u8 = 4;

    /// A frame.
    pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    /// A frame that was read.
    #[derive(Debug)]
    pub(crate) struct Frame {
        pub(crate) kind: u8,
        pub(crate) flags: u8,
        pub(crate) stream: u32,
        pub(crate) payload: Vec<u8>,
    }

    impl Frame {
        /// The code of a RST_STREAM.
        pub(crate) fn code(&self) -> u32 {
            u32::from_be_bytes(self.payload[..4].try_into().unwrap())
        }
    }

    /// The next frame, where one comes.
    pub(crate) async fn read_frame<S: AsyncRead + Unpin>(stream: &mut S) -> std::io::Result<Frame> {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let [a, b, c, kind, flags, place @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        stream.read_exact(&mut payload).await?;
        Ok(Frame { kind, flags, stream: u32::from_be_bytes(place), payload })
    }

    /// What a client begins with.
    pub(crate) fn preface() -> Vec<u8> {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(SETTINGS, 0, 0, &[]));
        bytes
    }

    /// A string as HPACK has it, without Huffman.
    pub(crate) fn string(text: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        if text.len() < 127 {
            bytes.push(text.len() as u8);
        } else {
            bytes.push(127);
            let mut rest = text.len() - 127;
            while rest >= 128 {
                bytes.push((rest % 128) as u8 | 128);
                rest /= 128;
            }
            bytes.push(rest as u8);
        }
        bytes.extend(text);
        bytes
    }

    /// A field that goes into no table.
    pub(crate) fn field(name: &str, value: &[u8]) -> Vec<u8> {
        [&[0x10][..], &string(name.as_bytes()), &string(value)].concat()
    }

    /// `:method`, `:scheme`, `:path` and `:authority` of a request for `/`.
    pub(crate) fn request(method: &str, authority: &str) -> Vec<u8> {
        let method = if method == "GET" { 0x82 } else { 0x83 };
        [&[method, 0x86, 0x84, 0x01][..], &string(authority.as_bytes())].concat()
    }
}

use h2_frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, PRIORITY, RST_STREAM, SETTINGS,
    WINDOW_UPDATE, field, frame, preface, request,
};

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

/// A flood, as pieces that are sent one after the other; `authority` is the service that is spoken to.
type Flood = fn(authority: &str) -> Box<dyn Iterator<Item = Vec<u8>> + Send>;

fn streams() -> impl Iterator<Item = u32> {
    (1..1_000_000).step_by(2)
}

fn repeated(frame: Vec<u8>) -> Box<dyn Iterator<Item = Vec<u8>> + Send> {
    // Several in one write, and no more than any bound can be meant to take.
    Box::new(std::iter::repeat_n(frame.repeat(50), 2000))
}

/// Each kind of flood, and the reason that it is to be cut with.
const FLOODS: &[(&str, &str, Flood)] = &[
    ("rapid reset", "rapid_reset", |authority| {
        let head = request("GET", authority);
        Box::new(streams().take(100_000).map(move |stream| {
            let mut both = frame(HEADERS, END_HEADERS | END_STREAM, stream, &head);
            both.extend(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
            both
        }))
    }),
    ("made to reset", "stream_errors", |authority| {
        let head = request("POST", authority);
        Box::new(streams().take(100_000).map(move |stream| {
            let mut both = frame(HEADERS, END_HEADERS, stream, &head);
            both.extend(frame(WINDOW_UPDATE, 0, stream, &0x7fff_ffff_u32.to_be_bytes()));
            both
        }))
    }),
    ("CONTINUATION", "continuation_flood", |authority| {
        let first = frame(HEADERS, END_STREAM, 1, &request("GET", authority));
        let more = frame(CONTINUATION, 0, 1, &field("x", &[b'a'; 100]));
        Box::new(std::iter::once(first).chain(std::iter::repeat_n(more, 10_000)))
    }),
    ("empty CONTINUATION", "continuation_flood", |authority| {
        let first = frame(HEADERS, END_STREAM, 1, &request("GET", authority));
        let more = frame(CONTINUATION, 0, 1, &[]);
        Box::new(std::iter::once(first).chain(std::iter::repeat_n(more, 10_000)))
    }),
    ("HPACK bomb", "header_bomb", |authority| {
        let mut block = request("GET", authority);
        // One entry of the table, named thousands of times.
        block.extend([&[0x40][..], &h2_frames::string(b"x"), &h2_frames::string(&[b'a'; 3900])].concat());
        block.extend(std::iter::repeat_n(0xbe, 12_000));
        Box::new(std::iter::once(frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)))
    }),
    ("PING", "control_flood", |_| repeated(frame(PING, 0, 0, &[0; 8]))),
    ("SETTINGS", "control_flood", |_| repeated(frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0xff, 0xff]))),
    ("WINDOW_UPDATE", "control_flood", |_| repeated(frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes()))),
    ("PRIORITY", "control_flood", |_| repeated(frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1]))),
    ("unknown frames", "control_flood", |_| repeated(frame(0xfa, 0, 0, &[]))),
    ("empty DATA", "tiny_data", |authority| {
        let first = frame(HEADERS, END_HEADERS, 1, &request("POST", authority));
        let more = frame(DATA, 0, 1, &[]);
        Box::new(std::iter::once(first).chain(std::iter::repeat_n(more, 10_000)))
    }),
    ("window overflow", "protocol", |_| repeated(frame(WINDOW_UPDATE, 0, 0, &0x7fff_ffff_u32.to_be_bytes()))),
    ("no HTTP/2", "protocol", |_| repeated(frame(DATA, 0, 0, b"DATA of no stream"))),
];

/// Sends a flood until the other end has had enough of it.
async fn send(stream: Box<dyn Stream>, pieces: Box<dyn Iterator<Item = Vec<u8>> + Send>) {
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

async fn check_flood(world: &World, door: Door, (name, reason, flood): (&str, &str, Flood)) {
    let events = events();
    let (service, listener) = door.whose();
    let series = format!("kiro_abuse_total{{listener=\"{listener}\",reason=\"{reason}\"}}");
    let before = world.metric(service, &series).await;
    let (stream, local) = door.open(world).await;
    send(stream, flood(door.authority())).await;
    let what = format!("{name} through {door:?}");
    // Another test's client may have had this one's port.
    let is_its = |line: &serde_json::Value| {
        line["target"] == "kiro::abuse" && line["remote"] == *local && line["listener"] == listener
    };
    let line = events.wait_for(&what, is_its).await;
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
        check_flood(&world, door, *flood).await;
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
        let flood: (&str, &str, Flood) = ("DATA of one byte", "tiny_data", |authority| {
            let first = frame(HEADERS, END_HEADERS, 1, &request("POST", authority));
            // As much as the window of the stream lets through, in one piece.
            Box::new([first, frame(DATA, 0, 1, b"x").repeat(60_000)].into_iter())
        });
        check_flood(&world, door, flood).await;
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

/// How long requests of one client take until the time is over: the median, and the 99th of a hundred.
async fn latencies(address: SocketAddr, until: Instant) -> (Duration, Duration) {
    let mut client = Client::open(address).await;
    let mut taken = Vec::new();
    while Instant::now() < until {
        let begin = Instant::now();
        let answer = client.exchange("GET /honest HTTP/1.1\r\nHost: second\r\n\r\n").await;
        assert_eq!(answer.status, 200);
        taken.push(begin.elapsed());
    }
    taken.sort_unstable();
    (taken[taken.len() / 2], taken[taken.len() * 99 / 100])
}

/// Memory of this process in MiB, where the system shows it.
fn memory_mib() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096 / (1 << 20)
}

/// What floods cost others, and in memory. Times are the machine's, so this measures only where it is asked to:
/// `KIRO_MEASURE=1 cargo test -p kiro-local --test mesh measured -- --nocapture`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_floods_cost_others_is_measured() {
    if std::env::var_os("KIRO_MEASURE").is_none() {
        return;
    }
    const EACH: Duration = Duration::from_secs(3);
    let world = Arc::new(world().await);
    let address = world.addresses("first").outbound;
    let (p50, normal) = latencies(address, Instant::now() + EACH).await;
    let report = |what: &str, p50: Duration, p99: Duration| {
        let ratio = p99.as_secs_f64() / normal.as_secs_f64();
        let (p50, p99) = (p50.as_micros(), p99.as_micros());
        let line =
            format!("{what:<32} p50 {p50:>6} us  p99 {p99:>7} us  x {ratio:.2}  {} MiB\n", memory_mib());
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).unwrap();
    };
    report("nothing", p50, normal);
    for (name, _, flood) in FLOODS {
        for door in [Door::Outbound, Door::Inbound] {
            let until = Instant::now() + EACH;
            let abused = Arc::clone(&world);
            let abuser = tokio::spawn(async move {
                while Instant::now() < until {
                    let (stream, _) = door.open(&abused).await;
                    send(stream, flood(door.authority())).await;
                }
            });
            let (p50, p99) = latencies(address, until).await;
            abuser.await.unwrap();
            report(&format!("{name}, {door:?}"), p50, p99);
        }
    }
}
