//! A mesh to test: services with sidecars, applications to put behind them, and what was logged.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kiro_core::identity::ServiceName;
use kiro_local::{LocalMesh, MeshOptions};
use kiro_proxy::{Addresses, Listen, LocalHost, MeshSource, Sidecar};
use kiro_telemetry::log::{EventLayer, Format, LogSink};
use kiro_telemetry::trace::Tracing;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinHandle};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;

/// How long a test waits for something that has to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Descriptors of a sidecar: many meshes, and their clients and applications, share the process's.
pub(crate) const DESCRIPTORS: u64 = 4096;

/// A mesh file, but for the ports.
pub(crate) struct Spec {
    /// Lines at the top: `mode: audit`, `signatures: off`.
    pub(crate) top: &'static str,
    /// Each service's name, and its entry. The application's port is filled in for `{port}`, free ones for `{ingress}` and
    /// `{ingress_tls}`; `endpoints` is added, but for an entry that has one, and for one with `{dns}`, whose place is asked of DNS.
    pub(crate) services: Vec<(&'static str, &'static str)>,
    /// The lines below `allow:`.
    pub(crate) allow: &'static str,
}

impl Spec {
    /// `caller` may do anything to `callee`, plain applications.
    pub(crate) fn pair() -> Self {
        Self {
            top: "",
            services: vec![("caller", "app: { port: {port} }"), ("callee", "app: { port: {port} }")],
            allow: "  - { from: caller, to: callee }",
        }
    }
}

/// The ports of one service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) app: u16,
    pub(crate) inbound: u16,
    pub(crate) ingress: u16,
    pub(crate) ingress_tls: u16,
}

/// A running mesh.
pub(crate) struct World {
    pub(crate) mesh: LocalMesh,
    pub(crate) ports: BTreeMap<&'static str, Ports>,
    pub(crate) logs: Logs,
    spec: Spec,
    directory: TempDir,
    apps: Vec<JoinHandle<()>>,
    /// Sidecars beside the first one of their service, by name and host.
    pub(crate) replicas: BTreeMap<(&'static str, u8), Sidecar>,
}

/// Ports that were free a moment ago. None is given twice in this process, since tests run in parallel and some ports of a mesh
/// are to stay closed. They lie above a pod's own, and below those that the system gives to outgoing connections, one of which
/// could otherwise take a port before its listener does. Each process begins elsewhere.
fn free_ports<const N: usize>() -> [u16; N] {
    const FIRST: u32 = 16_000;
    const COUNT: u32 = 16_000;
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let begin = std::process::id().wrapping_mul(997);
    std::array::from_fn(|_| {
        loop {
            let place = begin.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % COUNT;
            let port = u16::try_from(FIRST + place).unwrap();
            if StdListener::bind(at(port)).is_ok() {
                return port;
            }
        }
    })
}

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn at(port: u16) -> SocketAddr {
    SocketAddr::new(LOOPBACK, port)
}

/// A port of another address of loopback.
pub(crate) fn on(host: u8, port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, host], port))
}

impl World {
    /// Starts a sidecar for each service.
    pub(crate) async fn start(spec: Spec) -> Self {
        Self::start_with(spec, Tracing::off()).await
    }

    /// The same, with traces.
    pub(crate) async fn start_with(spec: Spec, tracing: Tracing) -> Self {
        Self::start_as(spec, tracing, 1, LocalHost::with_free_ports()).await
    }

    /// The same, with so many descriptors for each sidecar.
    pub(crate) async fn start_small(spec: Spec, descriptors: u64) -> Self {
        Self::start_within(spec, Tracing::off(), 1, LocalHost::with_free_ports(), descriptors).await
    }

    /// The same, with so many workers each, and tcp services where `local` says.
    pub(crate) async fn start_as(spec: Spec, tracing: Tracing, workers: usize, local: LocalHost) -> Self {
        Self::start_within(spec, tracing, workers, local, DESCRIPTORS).await
    }

    async fn start_within(
        spec: Spec,
        tracing: Tracing,
        workers: usize,
        local: LocalHost,
        descriptors: u64,
    ) -> Self {
        // Before anything is written: what is met earlier may stay unheard for good (tokio-rs/tracing's callsites are cached).
        events();
        let ports: BTreeMap<&'static str, Ports> = spec
            .services
            .iter()
            .map(|(name, _)| {
                let [app, inbound, ingress, ingress_tls] = free_ports();
                (*name, Ports { app, inbound, ingress, ingress_tls })
            })
            .collect();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("mesh.yaml"), mesh_text(&spec, spec.allow, &ports)).unwrap();
        let logs = Logs::default();
        let places = ports
            .iter()
            .map(|(name, ports)| {
                let listen = Listen {
                    outbound: at(0),
                    inbound: at(ports.inbound),
                    ingress: LOOPBACK,
                    local,
                    admin: at(0),
                    health: at(0),
                };
                (ServiceName::parse(name).unwrap(), listen)
            })
            .collect();
        let same = |_: &ServiceName| tracing.clone();
        let options = options(&directory, &logs, places, &same, workers, descriptors);
        let mesh = LocalMesh::start(options).await.unwrap();
        Self { mesh, ports, logs, spec, directory, apps: Vec::new(), replicas: BTreeMap::new() }
    }

    /// Starts another sidecar of a service, on another address of loopback: 127.0.0.`host`, with the ports of the first one. Its
    /// application is [`World::app_on`] that host.
    pub(crate) async fn replica(&mut self, service: &'static str, host: u8) {
        let listen = Listen {
            outbound: on(host, 0),
            inbound: on(host, self.ports[service].inbound),
            ingress: on(host, 0).ip(),
            local: LocalHost::with_free_ports(),
            admin: on(host, 0),
            health: on(host, 0),
        };
        let off = |_: &ServiceName| Tracing::off();
        let options = options(&self.directory, &self.logs, BTreeMap::new(), &off, 1, DESCRIPTORS);
        let name = ServiceName::parse(service).unwrap();
        let sidecar = self.mesh.replica(&name, listen, on(host, 0).ip(), &options).await.unwrap();
        self.replicas.insert((service, host), sidecar);
    }

    /// Renews a sidecar's leaf, as `kiro certs` does.
    pub(crate) fn renew(&self, service: &str) {
        let authority = &self.mesh.pki.authority;
        let issued =
            authority.issue_sidecar(&ServiceName::parse(service).unwrap(), SystemTime::now().into()).unwrap();
        let directory = self.directory.path().join("certs").join(service);
        std::fs::write(directory.join("leaf.key"), issued.key_pem).unwrap();
        std::fs::write(directory.join("leaf.pem"), issued.leaf_pem).unwrap();
    }

    /// Replaces the allow lines; they hold within a second.
    pub(crate) fn allow(&self, lines: &str) {
        self.rewrite(&mesh_text(&self.spec, lines, &self.ports));
    }

    /// Replaces the mesh file, as an editor does.
    pub(crate) fn rewrite(&self, text: &str) {
        let new = self.directory.path().join(".new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.mesh_file()).unwrap();
    }

    /// Where the mesh file is.
    pub(crate) fn mesh_file(&self) -> PathBuf {
        self.directory.path().join("mesh.yaml")
    }

    /// Where a sidecar listens.
    pub(crate) fn addresses(&self, service: &str) -> &Addresses {
        self.mesh.sidecars.get(service).unwrap().addresses()
    }

    /// Where a service's application finds a tcp service.
    pub(crate) fn local(&self, caller: &str, callee: &str) -> SocketAddr {
        self.mesh.local_address(caller, callee).unwrap_or_else(|| panic!("{caller} has no port for {callee}"))
    }

    /// Takes an application's port, for one that does not speak HTTP.
    pub(crate) async fn listen(&self, service: &str) -> TcpListener {
        TcpListener::bind(at(self.ports[service].app)).await.unwrap()
    }

    /// Puts an application behind a sidecar.
    pub(crate) async fn app<F, R>(&mut self, service: &str, handler: F)
    where
        F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
        R: Future<Output = Response<Full<Bytes>>> + Send + 'static,
    {
        let _ = self.app_on(1, service, handler).await;
    }

    /// The same, behind the sidecar at 127.0.0.`host`; the handle ends it.
    pub(crate) async fn app_on<F, R>(&mut self, host: u8, service: &str, handler: F) -> AbortHandle
    where
        F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
        R: Future<Output = Response<Full<Bytes>>> + Send + 'static,
    {
        let listener = TcpListener::bind(on(host, self.ports[service].app)).await.unwrap();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let handler = handler.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let answered = handler(request);
                        async move { Ok::<_, std::convert::Infallible>(answered.await) }
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .max_headers(512)
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades()
                        .await;
                });
            }
        });
        let handle = task.abort_handle();
        self.apps.push(task);
        handle
    }

    /// Puts an application behind a sidecar that records each request's bytes and answers 200.
    pub(crate) async fn recorder(&mut self, service: &str) -> Recorder {
        let recorder = Recorder::default();
        let seen = recorder.clone();
        self.app(service, move |request: Request<Incoming>| {
            let seen = seen.clone();
            async move {
                let (head, body) = request.into_parts();
                let collected = body.collect().await;
                let whole = collected.is_ok();
                let body = collected.map(|collected| collected.to_bytes()).unwrap_or_default();
                seen.0.lock().unwrap().push(Recorded { head, body, whole });
                Response::new(Full::new(Bytes::from_static(b"recorded")))
            }
        })
        .await;
        recorder
    }

    /// Sends bytes to a caller's outbound port and reads until the connection ends or nothing comes for a while.
    pub(crate) async fn raw_outbound(&self, service: &str, bytes: &[u8]) -> String {
        raw(self.addresses(service).outbound, bytes).await
    }

    /// A GET by absolute form from a service's application.
    pub(crate) async fn get(&self, service: &str, url: &str) -> Answer {
        let request = format!("GET {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        Answer::parse(&self.raw_outbound(service, request.as_bytes()).await)
    }

    /// What a sidecar's admin port answers.
    pub(crate) async fn admin(&self, service: &str, path: &str) -> Answer {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        Answer::parse(&raw(self.addresses(service).admin, request.as_bytes()).await)
    }

    /// A number from a sidecar's metrics: `series` is all of a line that stands before it.
    pub(crate) async fn metric(&self, service: &str, series: &str) -> u64 {
        let metrics = self.admin(service, "/metrics").await.body;
        let value = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().unwrap())
    }

    /// How many requests a sidecar refused with a code, on all of its edges.
    pub(crate) async fn rejects(&self, service: &str, code: &str) -> u64 {
        let metrics = self.admin(service, "/metrics").await.body;
        let wanted = format!("code=\"{code}\"}} ");
        let counts = metrics.lines().filter(|line| line.starts_with("kiro_rejects_total{"));
        counts.filter_map(|line| Some(line.split_once(&wanted)?.1.parse::<u64>().unwrap())).sum()
    }

    /// Ends the mesh.
    pub(crate) async fn stop(self) -> bool {
        let mut clean = self.mesh.stop().await;
        for replica in self.replicas.into_values() {
            clean &= replica.stop().await;
        }
        for app in self.apps {
            app.abort();
        }
        clean
    }
}

/// What a mesh is started with, but for where its sidecars listen.
fn options<'a>(
    directory: &TempDir,
    logs: &Logs,
    places: BTreeMap<ServiceName, Listen>,
    tracing: &'a dyn Fn(&ServiceName) -> Tracing,
    workers: usize,
    descriptors: u64,
) -> MeshOptions<'a> {
    MeshOptions {
        mesh: MeshSource::Directory(directory.path().to_owned()),
        identities: Some(directory.path().join("certs")),
        places,
        log: LogSink::new(logs.clone(), Format::Json, None).unwrap(),
        log_format: Format::Json,
        tracing,
        workers,
        descriptors: Some(descriptors),
        drain_timeout: Duration::from_secs(2),
    }
}

fn mesh_text(spec: &Spec, allow: &str, ports: &BTreeMap<&'static str, Ports>) -> String {
    let services: String = spec
        .services
        .iter()
        .map(|(name, entry)| {
            let ports = &ports[name];
            let endpoints = format!(", endpoints: [\"127.0.0.1:{}\"]", ports.inbound);
            let placed = entry.contains("{dns}") || entry.contains("endpoints:");
            let endpoints = if placed { "" } else { &endpoints };
            let entry = entry
                .replace("{dns}", "")
                .replace("{port}", &ports.app.to_string())
                .replace("{inbound}", &ports.inbound.to_string())
                .replace("{ingress}", &ports.ingress.to_string())
                .replace("{ingress_tls}", &ports.ingress_tls.to_string());
            format!("  {name}: {{ {entry}{endpoints} }}\n")
        })
        .collect();
    format!("trust_domain: test.mesh\n{}\nservices:\n{services}allow:\n{allow}\n", spec.top)
}

/// Sends bytes and reads what comes back until the other end closes, or nothing has come for half a second after something has.
pub(crate) async fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The other end may refuse, and close, before all is written.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let wait = if answer.is_empty() { PATIENCE } else { Duration::from_millis(500) };
        match tokio::time::timeout(wait, stream.read(&mut buffer)).await {
            Ok(Ok(count)) if count > 0 => answer.extend_from_slice(&buffer[..count]),
            _ => break,
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

/// An answer, as far as tests look at it.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    /// Reads the first answer in a text.
    #[track_caller]
    pub(crate) fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        Self { status, headers, body: body.to_owned() }
    }

    /// A header's value.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Status and reject code.
    pub(crate) fn verdict(&self) -> (u16, Option<&str>) {
        (self.status, self.header("x-kiro-reject"))
    }
}

/// Ports that nobody has to know beforehand.
pub(crate) fn anywhere() -> Listen {
    let (outbound, inbound, admin, health) = (at(0), at(0), at(0), at(0));
    Listen { outbound, inbound, ingress: LOOPBACK, local: LocalHost::with_free_ports(), admin, health }
}

/// What a [`World::recorder`] application has seen.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recorder(Arc<Mutex<Vec<Recorded>>>);

/// One request as the application saw it.
#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    pub(crate) head: http::request::Parts,
    pub(crate) body: Bytes,
    /// Whether the body's end was seen.
    pub(crate) whole: bool,
}

impl Recorder {
    /// All that was seen so far.
    pub(crate) fn seen(&self) -> Vec<Recorded> {
        self.0.lock().unwrap().clone()
    }

    /// The one request that was seen.
    #[track_caller]
    pub(crate) fn only(&self) -> Recorded {
        let seen = self.seen();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen[0].clone()
    }
}

/// The access lines of a mesh.
#[derive(Clone, Default)]
pub(crate) struct Logs(Arc<Mutex<Vec<u8>>>);

impl Write for Logs {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Logs {
    /// All lines so far.
    pub(crate) fn lines(&self) -> Vec<serde_json::Value> {
        let bytes = self.0.lock().unwrap().clone();
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(parsed).collect()
    }

    /// Waits for a line that fits.
    pub(crate) async fn wait_for(
        &self,
        what: &str,
        fits: impl Fn(&serde_json::Value) -> bool,
    ) -> serde_json::Value {
        self.wait_for_after(0, what, fits).await
    }

    /// The same, after the first `before` lines.
    pub(crate) async fn wait_for_after(
        &self,
        before: usize,
        what: &str,
        fits: impl Fn(&serde_json::Value) -> bool,
    ) -> serde_json::Value {
        let begin = Instant::now();
        // What was looked at is not looked at again: the log of all meshes of the process is long.
        let mut seen = self.end_of(before);
        loop {
            let new = self.after(seen);
            seen += new.len();
            if let Some(line) = new.lines().map(parsed).find(|line| fits(line)) {
                return line;
            }
            assert!(begin.elapsed() < PATIENCE, "no line {what} among {}", self.after(self.end_of(before)));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Where so many lines end.
    fn end_of(&self, lines: usize) -> usize {
        let bytes = self.0.lock().unwrap();
        let ends = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(place, _)| place + 1);
        if lines == 0 { 0 } else { ends.take(lines).last().unwrap_or(0) }
    }

    /// The whole lines from a place on.
    fn after(&self, place: usize) -> String {
        let bytes = self.0.lock().unwrap();
        let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |place| place + 1);
        String::from_utf8(bytes[place.min(end)..end].to_vec()).unwrap()
    }
}

fn parsed(line: &str) -> serde_json::Value {
    serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))
}

/// The events of all meshes of this process, beside their access lines. Tests run in parallel: services with names of their own
/// tell one mesh from another. Call it before the mesh starts.
pub(crate) fn events() -> Logs {
    static EVENTS: OnceLock<Logs> = OnceLock::new();
    let install = || {
        let logs = Logs::default();
        let sink = LogSink::new(logs.clone(), Format::Json, None).unwrap();
        // As a sidecar has it by default.
        let filter = Targets::new().with_default(LevelFilter::INFO).with_target("h2", LevelFilter::ERROR);
        let subscriber =
            tracing_subscriber::registry().with(filter).with(EventLayer::new(sink, Format::Json, None));
        tracing::subscriber::set_global_default(subscriber).unwrap();
        logs
    };
    EVENTS.get_or_init(install).clone()
}

/// Waits until a condition holds.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begin = Instant::now();
    while !holds().await {
        assert!(begin.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
