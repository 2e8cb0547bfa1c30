//! Services that speak no HTTP, found on the caller's own loopback: what a database's client does, and what it must not see of us.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::time::{Duration, Instant};

use kiro_core::identity::ServiceName;
use kiro_proxy::{LocalHost, MeshSource, PEER_PORT, Settings, Sidecar};
use kiro_telemetry::log::{Format, LogSink};
use kiro_telemetry::trace::Tracing;
use kiro_tls::{Material, SidecarFiles, SidecarSource};
use sha2::{Digest, Sha256};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::client::Client;
use crate::support::{DESCRIPTORS, PATIENCE, Spec, World, anywhere, events, eventually};

const ALLOW: &str =
    "  - { from: caller, to: db }\n  - { from: other, to: db }\n  - { from: caller, to: web }";

/// `caller` and `other` may use `db`, which speaks no HTTP; nobody may use `cache`, which does not either.
fn spec() -> Spec {
    Spec {
        top: "",
        services: vec![
            ("caller", "app: { port: {port} }"),
            ("other", "app: { port: {port} }"),
            ("db", "app: { port: {port}, protocol: tcp }"),
            ("cache", "app: { port: {port}, protocol: tcp }"),
            ("web", "app: { port: {port} }"),
        ],
        allow: ALLOW,
    }
}

/// A client's connection to `db`, and the application's end of it, after a first byte that way.
async fn connect(world: &World, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let mut client = TcpStream::connect(world.local("caller", "db")).await.unwrap();
    let (mut app, _) = timeout(PATIENCE, listener.accept()).await.expect("nobody connects").unwrap();
    app.write_all(b"!").await.unwrap();
    timeout(PATIENCE, client.read_exact(&mut [0])).await.expect("not joined").unwrap();
    (client, app)
}

/// Waits for the end of a connection; true where it was a reset.
async fn is_reset(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    match timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("no end") {
        Ok(_) => false,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

/// Connects and says something; true where that ends in a reset, which may come before the connect is over.
async fn meets_reset(address: SocketAddr) -> bool {
    match TcpStream::connect(address).await {
        Ok(mut client) => {
            let _ = client.write_all(b"early").await;
            is_reset(&mut client).await
        }
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

/// The line of the connection that ended after the first `before` lines.
async fn line_of(world: &World, before: usize, service: &str, direction: &str) -> serde_json::Value {
    let fits = |line: &serde_json::Value| {
        line["service"] == service && line["direction"] == direction && line["method"] == "CONNECT"
    };
    world.logs.wait_for_after(before, direction, fits).await
}

/// Waits until all sidecars have the mesh file's `generation`.
async fn have_generation(world: &World, generation: u64) {
    let wanted = format!("\"generation\": {generation}");
    eventually("all have the new lines", || async {
        let mut all = true;
        for service in ["caller", "other", "db"] {
            all &= world.admin(service, "/config").await.body.contains(&wanted);
        }
        all
    })
    .await;
}

#[tokio::test]
async fn the_server_speaks_first_to_a_client_that_has_said_nothing() {
    let world = World::start(spec()).await;
    let listener = world.listen("db").await;
    let mut client = Client::open(world.local("caller", "db")).await;
    let mut app = Client::on(timeout(PATIENCE, listener.accept()).await.expect("nobody connects").unwrap().0);
    app.send("+banner\r\n").await;
    assert_eq!(client.bytes(9).await, b"+banner\r\n");
    client.send("hello").await;
    assert_eq!(app.bytes(5).await, b"hello");
    drop(client);
    assert_eq!(app.rest().await, "");
    drop(app);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_connection_leaves_one_line_at_each_end_and_is_counted() {
    let world = World::start(spec()).await;
    let listener = world.listen("db").await;
    let address = world.local("caller", "db");
    assert!(address.ip().is_loopback(), "{address}");
    let mut client = Client::open(address).await;
    // Before anybody has connected to the application.
    client.send("early").await;
    let mut app = Client::on(listener.accept().await.unwrap().0);
    assert_eq!(app.bytes(5).await, b"early");
    app.send("answer").await;
    assert_eq!(client.bytes(6).await, b"answer");
    client.end().await;
    assert_eq!(app.rest().await, "");
    drop(app);
    assert_eq!(client.rest().await, "");
    let out = line_of(&world, 0, "caller", "outbound").await;
    let inside = line_of(&world, 0, "db", "inbound").await;
    for line in [&out, &inside] {
        assert_eq!((&line["caller"], &line["callee"]), (&"caller".into(), &"db".into()), "{line}");
        assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&5.into(), &6.into()), "{line}");
        assert_eq!((&line["policy"], &line["ended"]), (&"allowed".into(), &"finished".into()), "{line}");
        assert!(line["duration_us"].as_u64().unwrap() > 0, "{line}");
    }
    assert_eq!((&out["protocol"], &out["caller_proof"]), (&"TCP".into(), &"loopback".into()), "{out}");
    assert_eq!((&out["signature"], &out["callee_proof"]), (&"signed".into(), &"mtls".into()), "{out}");
    assert_eq!((&inside["signature"], &inside["caller_proof"]), (&"verified".into(), &"mtls".into()));
    let requests = "kiro_requests_total{from=\"caller\",to=\"db\",method=\"connect\",status=\"2xx\"}";
    let received = "kiro_body_bytes_total{from=\"caller\",to=\"db\",body=\"response\"}";
    assert_eq!((world.metric("caller", requests).await, world.metric("caller", received).await), (1, 6));
    assert!(world.stop().await);
}

#[tokio::test]
async fn each_half_ends_by_itself() {
    let world = World::start(spec()).await;
    let listener = world.listen("db").await;
    // The client's first.
    let (client, app) = connect(&world, &listener).await;
    let (mut client, mut app) = (Client::on(client), Client::on(app));
    client.send("query").await;
    client.end().await;
    assert_eq!(app.rest().await, "query");
    app.send("row").await;
    assert_eq!(client.bytes(3).await, b"row");
    app.send("last").await;
    app.end().await;
    assert_eq!(client.rest().await, "last");
    // The application's first.
    let (client, app) = connect(&world, &listener).await;
    let (mut client, mut app) = (Client::on(client), Client::on(app));
    app.send("bye").await;
    app.end().await;
    assert_eq!(client.rest().await, "bye");
    client.send("still here").await;
    assert_eq!(app.bytes(10).await, b"still here");
    client.end().await;
    assert_eq!(app.rest().await, "");
    drop((client, app));
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_reset_stays_a_reset() {
    let world = World::start(spec()).await;
    let listener = world.listen("db").await;
    let reset = |stream: TcpStream| SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    let before = world.logs.lines().len();
    let (client, mut app) = connect(&world, &listener).await;
    reset(client);
    assert!(is_reset(&mut app).await, "the application took it for an end");
    assert_eq!(line_of(&world, before, "caller", "outbound").await["ended"], "client_reset");
    assert_eq!(line_of(&world, before, "db", "inbound").await["ended"], "peer_reset");

    let before = world.logs.lines().len();
    let (mut client, app) = connect(&world, &listener).await;
    reset(app);
    assert!(is_reset(&mut client).await, "the client took it for an end");
    assert_eq!(line_of(&world, before, "caller", "outbound").await["ended"], "peer_reset");
    assert_eq!(line_of(&world, before, "db", "inbound").await["ended"], "app_reset");
    assert!(world.stop().await);
}

/// Sends so many bytes that nobody could guess and ends its half; their digest, and that of what came the other way.
async fn exchange(stream: TcpStream, length: usize, seed: u64) -> ([u8; 32], [u8; 32], usize) {
    let (mut read, mut write) = stream.into_split();
    let sending = tokio::spawn(async move {
        let (mut sent, mut left, mut state) = (Sha256::new(), length, seed);
        while left > 0 {
            // Pieces of all sizes, from one byte to several of the buffers on the way.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let size = (1 + (state >> 33) as usize % 200_000).min(left);
            let piece: Vec<u8> =
                (0..size).map(|at| (state.wrapping_mul(at as u64 + 1) >> 40) as u8).collect();
            sent.update(&piece);
            write.write_all(&piece).await.unwrap();
            left -= size;
        }
        write.shutdown().await.unwrap();
        sent.finalize().into()
    });
    let (mut received, mut count, mut buffer) = (Sha256::new(), 0, vec![0; 100_000]);
    loop {
        let size = timeout(PATIENCE, read.read(&mut buffer)).await.expect("stands still").unwrap();
        if size == 0 {
            break;
        }
        received.update(&buffer[..size]);
        count += size;
    }
    (sending.await.unwrap(), received.finalize().into(), count)
}

#[tokio::test]
async fn much_goes_both_ways_at_once_and_arrives_as_it_was() {
    let world = World::start(spec()).await;
    let listener = world.listen("db").await;
    const LENGTH: usize = 24 * 1024 * 1024;
    let (client, app) = connect(&world, &listener).await;
    let (client, app) =
        tokio::join!(tokio::spawn(exchange(client, LENGTH, 1)), tokio::spawn(exchange(app, LENGTH - 77, 2)));
    let ((up, down, got_down), (app_down, app_up, got_up)) = (client.unwrap(), app.unwrap());
    assert_eq!((got_up, got_down), (LENGTH, LENGTH - 77));
    assert!(up == app_up && down == app_down, "bytes have changed on their way");
    let line = line_of(&world, 0, "caller", "outbound").await;
    assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&LENGTH.into(), &(LENGTH - 76).into()), "{line}");
    assert!(world.stop().await);
}

#[tokio::test]
async fn one_connection_that_is_not_read_holds_up_no_other() {
    let world = World::start(spec()).await;
    let listener = world.listen("db").await;
    let (mut stuck, stuck_app) = connect(&world, &listener).await;
    // All that fits between the two, until nothing is taken any more.
    let piece = vec![7; 64 * 1024];
    let mut sent = 0;
    while let Ok(Ok(count)) = timeout(Duration::from_millis(500), stuck.write(&piece)).await {
        sent += count;
        assert!(sent < 256 * 1024 * 1024, "what is not read has to stop its sender");
    }
    let (client, app) = connect(&world, &listener).await;
    let (client, app) =
        tokio::join!(tokio::spawn(exchange(client, 4_000_000, 3)), tokio::spawn(exchange(app, 4_000_000, 4)));
    assert!(client.unwrap().1 == app.unwrap().0);
    // And it goes on once it is read.
    drop(stuck);
    let mut rest = stuck_app;
    let mut count = 0;
    let mut buffer = vec![0; 100_000];
    while let Ok(Ok(size @ 1..)) = timeout(PATIENCE, rest.read(&mut buffer)).await {
        count += size;
    }
    assert_eq!(count, sent);
    drop(rest);
    assert!(world.stop().await);
}

/// An application that says each connection's first byte back and closes.
fn echo(listener: TcpListener) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut byte = [0; 1];
                if stream.read_exact(&mut byte).await.is_ok() {
                    let _ = stream.write_all(&byte).await;
                }
            });
        }
    })
}

#[tokio::test]
async fn thousands_of_short_connections_each_leave_a_line_and_nothing_else() {
    const CONNECTIONS: usize = 3000;
    let world = World::start_as(spec(), Tracing::off(), 2, LocalHost::with_free_ports()).await;
    let app = echo(world.listen("db").await);
    let address = world.local("caller", "db");
    let clients: Vec<_> = (0..20_u8)
        .map(|client| {
            tokio::spawn(async move {
                for number in 0..CONNECTIONS / 20 {
                    let byte = client.wrapping_add(number as u8);
                    let mut stream = TcpStream::connect(address).await.unwrap();
                    stream.write_all(&[byte]).await.unwrap();
                    let mut answer = Vec::new();
                    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("no answer").unwrap();
                    assert_eq!(answer, [byte]);
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    let requests = "kiro_requests_total{from=\"caller\",to=\"db\",method=\"connect\",status=\"2xx\"}";
    for service in ["caller", "db"] {
        eventually("each connection is counted", || async {
            world.metric(service, requests).await == CONNECTIONS as u64
        })
        .await;
    }
    let logs = world.logs.clone();
    assert!(world.stop().await, "something is still under way");
    app.abort();
    let lines = logs.lines();
    let finished = lines.iter().filter(|line| line["ended"] == "finished").count();
    assert_eq!((lines.len(), finished), (2 * CONNECTIONS, 2 * CONNECTIONS));
}

#[tokio::test]
async fn who_may_not_reach_a_service_has_no_port_for_it() {
    let world = World::start(spec()).await;
    for (caller, callee) in [
        // No line.
        ("caller", "cache"),
        ("db", "cache"),
        ("web", "db"),
        // HTTP, which is called by its name.
        ("caller", "web"),
        // Oneself.
        ("db", "db"),
    ] {
        assert_eq!(world.mesh.local_address(caller, callee), None, "{caller} > {callee}");
    }
    let config: serde_json::Value =
        serde_json::from_str(&world.admin("caller", "/config").await.body).unwrap();
    let address = world.local("caller", "db").to_string();
    let expected = serde_json::json!({ "db": { "port": world.ports["db"].app, "address": address } });
    assert_eq!(config["local_ports"], expected);
    assert!(world.stop().await);
}

#[tokio::test]
async fn each_caller_is_known_by_its_own_port() {
    let world = World::start(spec()).await;
    let listener = world.listen("db").await;
    for caller in ["caller", "other"] {
        let before = world.logs.lines().len();
        let mut client = Client::open(world.local(caller, "db")).await;
        let mut app = Client::on(listener.accept().await.unwrap().0);
        app.send("hello").await;
        assert_eq!(client.bytes(5).await, b"hello");
        drop((client, app));
        let line = line_of(&world, before, "db", "inbound").await;
        assert_eq!((&line["caller"], &line["caller_proof"]), (&caller.into(), &"mtls".into()), "{line}");
    }
    assert!(world.stop().await);
}

/// Another sidecar of `caller`, whose mesh file is the one that the world had at its start.
async fn stubborn_caller(world: &World, text: String) -> Sidecar {
    let name = ServiceName::parse("caller").unwrap();
    let files = &world.mesh.pki.sidecars[&name];
    let material = Material {
        ca_pem: files.ca_pem.clone(),
        leaf_pem: files.leaf_pem.clone(),
        key_pem: files.key_pem.clone(),
    };
    let files = SidecarFiles { material, edges_json: files.edges_json.clone(), ingress: None };
    let settings = Settings {
        identity: SidecarSource::Memory(files),
        service: name,
        mesh: MeshSource::Text(text),
        listen: anywhere(),
        peer_port: PEER_PORT,
        app_host: [127, 0, 0, 1].into(),
        workers: 1,
        descriptors: Some(DESCRIPTORS),
        pod: None,
        drain_timeout: Duration::from_secs(2),
        log_format: Format::Json,
    };
    let log = LogSink::new(world.logs.clone(), Format::Json, None).unwrap();
    Sidecar::start(settings, Tracing::off(), log).await.unwrap()
}

#[tokio::test]
async fn the_callees_own_policy_counts() {
    let world = World::start(spec()).await;
    let listener = world.listen("db").await;
    let stubborn = stubborn_caller(&world, std::fs::read_to_string(world.mesh_file()).unwrap()).await;
    world.allow("  - { from: other, to: db }");
    have_generation(&world, 2).await;
    let before = world.logs.lines().len();
    let address = stubborn.local_address("db").unwrap();
    assert!(meets_reset(address).await, "a refusal has to look like one");
    let line = line_of(&world, before, "db", "inbound").await;
    assert_eq!((&line["status"], &line["reject"]), (&403.into(), &"policy_no_edge".into()), "{line}");
    let line = line_of(&world, before, "caller", "outbound").await;
    assert_eq!((&line["status"], &line["reject"]), (&403.into(), &"policy_no_edge".into()), "{line}");
    assert_eq!((&line["policy"], &line["protocol"]), (&"allowed".into(), &"TCP".into()), "{line}");
    assert_eq!(line["reject_cause"], "the peer's sidecar said so", "{line}");
    let accepted = timeout(Duration::ZERO, listener.accept()).await;
    assert!(accepted.is_err(), "the application was connected to");
    assert!(stubborn.stop().await);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_line_that_goes_closes_the_port_and_cuts_what_is_open() {
    let world = World::start_as(spec(), Tracing::off(), 2, LocalHost::with_free_ports()).await;
    let listener = world.listen("db").await;
    let address = world.local("caller", "db");
    let mut open = Vec::new();
    // Enough for both workers to have some.
    for _ in 0..8 {
        open.push(connect(&world, &listener).await);
    }
    let mut stays = Client::open(world.local("other", "db")).await;
    let mut stays_app = Client::on(listener.accept().await.unwrap().0);

    let changed = Instant::now();
    world.allow("  - { from: other, to: db }");
    for (client, app) in &mut open {
        assert!(is_reset(client).await && is_reset(app).await, "a cut has to look like one");
    }
    eventually("the port is closed", || async { TcpStream::connect(address).await.is_err() }).await;
    // The time is the mesh file's promise; what a loaded machine adds to it is not looked at closely.
    assert!(changed.elapsed() < Duration::from_secs(3), "{:?}", changed.elapsed());
    assert_eq!(world.mesh.local_address("caller", "db"), None);
    // Connections that came to the port before it was closed were refused, and have no end of this kind.
    let ended =
        || world.logs.lines().into_iter().filter(|line| line.get("ended").is_some()).collect::<Vec<_>>();
    eventually("each has its lines", || async { ended().len() == 2 * open.len() }).await;
    let lines = ended();
    assert!(lines.iter().all(|line| line["ended"] == "cut" || line["ended"] == "peer_reset"), "{lines:#?}");
    assert!(lines.iter().any(|line| line["ended"] == "cut" && line["policy"] == "cut"), "{lines:#?}");
    // Who is still allowed has noticed nothing.
    stays.send("still").await;
    assert_eq!(stays_app.bytes(5).await, b"still");

    // And a line that comes opens the port.
    world.allow(ALLOW);
    eventually("the port is open", || async { world.mesh.local_address("caller", "db").is_some() }).await;
    have_generation(&world, 3).await;
    drop((connect(&world, &listener).await, stays, stays_app));
    assert!(world.stop().await);
}

#[tokio::test]
async fn an_application_that_is_down_is_a_reset_and_a_line() {
    let world = World::start(spec()).await;
    assert!(meets_reset(world.local("caller", "db")).await, "a client has to see a failure");
    let inside = line_of(&world, 0, "db", "inbound").await;
    assert_eq!((&inside["status"], &inside["reject"]), (&502.into(), &"app_connect".into()), "{inside}");
    let out = line_of(&world, 0, "caller", "outbound").await;
    assert_eq!((&out["status"], &out["reject"]), (&502.into(), &"app_connect".into()), "{out}");
    assert_eq!(world.rejects("caller", "app_connect").await, 1);
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_sidecar_that_is_down_is_a_reset_and_a_line_and_another_one_is_tried() {
    let mut spec = spec();
    // Nobody is at the first two addresses.
    let [gone, gone_too] = [(); 2].map(|()| StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let entry = format!("app: {{ port: {{port}}, protocol: tcp }}, endpoints: [\"{gone}\", \"{gone_too}\"]");
    spec.services[2].1 = Box::leak(entry.into_boxed_str());
    let world = World::start(spec).await;
    assert!(meets_reset(world.local("caller", "db")).await);
    let line = line_of(&world, 0, "caller", "outbound").await;
    assert_eq!((&line["reject"], &line["attempts"]), (&"upstream_connect".into(), &3.into()), "{line}");

    let text = std::fs::read_to_string(world.mesh_file()).unwrap();
    let inbound = world.addresses("db").inbound.to_string();
    world.rewrite(&text.replace(&gone_too.to_string(), &inbound));
    have_generation(&world, 2).await;
    let listener = world.listen("db").await;
    for _ in 0..4 {
        drop(connect(&world, &listener).await);
    }
    assert!(world.stop().await);
}

#[tokio::test]
async fn a_port_that_is_taken_is_told_and_tried_again() {
    let events = events();
    let mut spec = Spec::pair();
    spec.services = vec![
        ("taken-caller", "app: { port: {port} }"),
        ("taken-db", "app: { port: {port}, protocol: tcp }, local_port: {ingress}"),
    ];
    spec.allow = "  - { from: taken-caller, to: taken-db }";
    // The world's ports are free; this one is taken as soon as it is known, by closing and opening the line.
    let world = World::start_as(spec, Tracing::off(), 1, LocalHost::default()).await;
    let address = SocketAddr::from(([127, 0, 0, 1], world.ports["taken-db"].ingress));
    assert_eq!(world.local("taken-caller", "taken-db"), address);
    world.allow("  []");
    eventually("the port is closed", || async {
        world.mesh.local_address("taken-caller", "taken-db").is_none()
    })
    .await;
    let taken = eventually_bound(address).await;
    world.allow("  - { from: taken-caller, to: taken-db }");
    let fits = |line: &serde_json::Value| line["level"] == "ERROR" && line["callee"] == "taken-db";
    let line = events.wait_for("port taken", fits).await;
    assert!(line["error"].as_str().unwrap().contains(&address.to_string()), "{line}");
    assert!(line["fix"].as_str().unwrap().contains("local_port"), "{line}");
    let config: serde_json::Value =
        serde_json::from_str(&world.admin("taken-caller", "/config").await.body).unwrap();
    let shown = &config["local_ports"]["taken-db"];
    assert_eq!(shown["port"], address.port());
    assert!(shown["error"].as_str().unwrap().contains("in use"), "{shown}");
    assert_eq!(world.metric("taken-caller", "kiro_local_ports_failed").await, 1);
    assert_eq!(world.admin("taken-caller", "/ready").await.status, 200, "the sidecar goes on");

    drop(taken);
    eventually("the port is bound", || async {
        world.mesh.local_address("taken-caller", "taken-db") == Some(address)
    })
    .await;
    assert_eq!(world.metric("taken-caller", "kiro_local_ports_failed").await, 0);
    assert_eq!(events.lines().iter().filter(|line| fits(line)).count(), 1, "told once");
    let listener = world.listen("taken-db").await;
    let client = TcpStream::connect(address).await.unwrap();
    let app = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    drop((client, app));
    assert!(world.stop().await);
}

async fn eventually_bound(address: SocketAddr) -> StdListener {
    let begin = Instant::now();
    loop {
        match StdListener::bind(address) {
            Ok(listener) => return listener,
            Err(error) => assert!(begin.elapsed() < PATIENCE, "{address}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_port_goes_from_one_service_to_another() {
    let mut spec = spec();
    spec.services[2].1 = "app: { port: {port}, protocol: tcp }, local_port: {ingress}";
    spec.allow = "  - { from: caller, to: db }";
    let world = World::start_as(spec, Tracing::off(), 2, LocalHost::default()).await;
    let address = world.local("caller", "db");
    let text = std::fs::read_to_string(world.mesh_file()).unwrap();
    // `cache` is found where `db` was, and `db` nowhere.
    let local_port = format!(", local_port: {}", address.port());
    let cache = format!("port: {}, protocol: tcp }}", world.ports["cache"].app);
    let text = text
        .replace(&local_port, "")
        .replace(&cache, &format!("{cache}{local_port}"))
        .replace("from: caller, to: db", "from: caller, to: cache");
    world.rewrite(&text);
    eventually("the port is the cache's", || async {
        world.mesh.local_address("caller", "cache") == Some(address)
    })
    .await;
    assert_eq!(world.mesh.local_address("caller", "db"), None);
    let listener = world.listen("cache").await;
    let mut client = Client::open(address).await;
    let mut app = Client::on(timeout(PATIENCE, listener.accept()).await.unwrap().unwrap().0);
    app.send("cache").await;
    assert_eq!(client.bytes(5).await, b"cache");
    drop((client, app));
    assert!(world.stop().await);
}

#[tokio::test]
async fn what_drains_still_reaches_its_database() {
    let mut world = World::start(spec()).await;
    let listener = world.listen("db").await;
    let (client, app) = connect(&world, &listener).await;
    let (mut client, mut app) = (Client::on(client), Client::on(app));
    app.send("hello").await;
    assert_eq!(client.bytes(5).await, b"hello");
    let address = world.local("caller", "db");
    let admin = world.addresses("caller").admin;
    let name = ServiceName::parse("caller").unwrap();
    let stopping = tokio::spawn(world.mesh.sidecars.remove(&name).unwrap().stop());
    eventually("it drains", || async {
        let asked = crate::support::raw(
            admin,
            b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        );
        asked.await.contains("draining")
    })
    .await;
    // What is open goes on, and what comes is carried.
    client.send("commit").await;
    assert_eq!(app.bytes(6).await, b"commit");
    let mut late = Client::open(address).await;
    let mut late_app = Client::on(timeout(PATIENCE, listener.accept()).await.unwrap().unwrap().0);
    late.send("late").await;
    assert_eq!(late_app.bytes(4).await, b"late");
    assert!(!stopping.is_finished(), "it waits for what is under way");
    for (mut client, mut app) in [(client, app), (late, late_app)] {
        client.end().await;
        assert_eq!(app.rest().await, "");
        drop(app);
        assert_eq!(client.rest().await, "");
    }
    assert!(stopping.await.unwrap(), "nothing was cut");
    assert!(TcpStream::connect(address).await.is_err(), "the port is closed");
    assert!(world.stop().await);
}
