//! How does a sidecar start, follow its files, and end?

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kiro_core::identity::{ServiceName, SpiffeId};
use kiro_core::mesh::{self, Mesh};
use kiro_telemetry::log::LogSink;
use kiro_telemetry::trace::Tracing;
use kiro_tls::SidecarIdentity;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::LocalSet;

use crate::admin::{self, Audience, View};
use crate::admission::{Admission, Listener, process_descriptors};
use crate::discover::Resolver;
use crate::drain::{Phase, PhaseWatch};
use crate::edge::Edges;
use crate::faults;
use crate::listen::{self, BindError, Bound};
use crate::local::ports;
use crate::metrics::Metrics;
use crate::settings::{MeshSource, Settings};
use crate::state::{OwnMesh, State, StateError};
use crate::worker::{Parts, Worker};
use crate::{health, inbound, ingress, limits, outbound};

/// Why a sidecar does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The mesh file can't be read.
    #[error("{path}: {error}: mount the directory that holds mesh.yaml, or set KIRO_MESH_DIR")]
    MeshUnreadable {
        /// The file.
        path: PathBuf,
        /// The system's word.
        error: std::io::Error,
    },
    /// The mesh file has problems.
    #[error("{path}: the mesh file has problems\n{problems}")]
    MeshProblems {
        /// The file.
        path: PathBuf,
        /// All of them.
        problems: mesh::Problems,
    },
    /// Certificates or edge secrets can't be used.
    #[error(transparent)]
    Identity(#[from] kiro_tls::IdentityError),
    /// Mesh file and certificates do not fit each other or this service.
    #[error("{0}")]
    State(String),
    /// A port can't be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A thread or runtime can't be made.
    #[error("the system gives no thread or runtime: {0}")]
    System(#[from] std::io::Error),
}

impl From<StateError> for StartError {
    fn from(error: StateError) -> Self {
        StartError::State(error.to_string())
    }
}

/// The file in a mesh directory.
pub const MESH_FILE: &str = "mesh.yaml";

/// Reads and checks a mesh file.
pub fn read_mesh(source: &MeshSource) -> Result<Mesh, StartError> {
    let (path, text) = mesh_text(source)?;
    mesh::parse(&text).map_err(|problems| StartError::MeshProblems { path, problems })
}

fn mesh_text(source: &MeshSource) -> Result<(PathBuf, String), StartError> {
    match source {
        MeshSource::Text(text) => Ok((PathBuf::from("(in memory)"), text.clone())),
        MeshSource::Directory(directory) => {
            let path = directory.join(MESH_FILE);
            match std::fs::read_to_string(&path) {
                Ok(text) => Ok((path, text)),
                Err(error) => Err(StartError::MeshUnreadable { path, error }),
            }
        }
    }
}

/// What a mesh file was like, to tell whether it is another one now.
type Print = [u8; 32];

fn print(text: &str) -> Print {
    Sha256::digest(text).into()
}

/// Reads a mesh file for one service. What it takes to read thousands of lines is given back: a thread of its own does it, so that all
/// that the allocator holds for it is free when it has ended and what is to be kept has been taken.
fn read_own(
    (path, text): (PathBuf, String),
    service: &ServiceName,
    metrics: &Metrics,
    edges: &Arc<Edges>,
) -> Result<Arc<OwnMesh>, StartError> {
    let mesh = match thread::scope(|scope| scope.spawn(|| mesh::parse(&text)).join()) {
        Ok(Ok(mesh)) => mesh,
        Ok(Err(problems)) => return Err(StartError::MeshProblems { path, problems }),
        Err(_) => return Err(std::io::Error::other("the reader of the mesh file panicked").into()),
    };
    Ok(Arc::new(OwnMesh::of(&mesh, service, metrics, edges)?))
}

/// A sidecar that runs.
#[derive(Debug)]
pub struct Sidecar {
    phase: watch::Sender<Phase>,
    threads: Vec<thread::JoinHandle<()>>,
    addresses: Addresses,
    settings: Arc<Settings>,
    quiet: mpsc::Receiver<bool>,
    local_ports: watch::Receiver<ports::Table>,
}

/// Where a sidecar listens.
#[derive(Debug, Clone)]
pub struct Addresses {
    /// The application's proxy.
    pub outbound: SocketAddr,
    /// Mutual TLS from other sidecars.
    pub inbound: SocketAddr,
    /// The ingress without TLS.
    pub ingress: Option<SocketAddr>,
    /// The ingress with TLS.
    pub ingress_tls: Option<SocketAddr>,
    /// Admin.
    pub admin: SocketAddr,
    /// Health for others.
    pub health: SocketAddr,
}

impl Sidecar {
    /// Starts a sidecar. All that can be wrong with files and ports is found before this returns; when it does, the sidecar is
    /// ready. Must be called within a tokio runtime, which runs the control tasks: file polling and DNS.
    pub async fn start(settings: Settings, tracing: Tracing, log: LogSink) -> Result<Self, StartError> {
        let settings = Arc::new(settings);
        let admission =
            Admission::of(settings.descriptors.unwrap_or_else(process_descriptors), settings.workers);
        let edges: Arc<Edges> = Arc::default();
        let metrics =
            Metrics::new(log.clone(), tracing.clone(), settings.workers, admission, Arc::clone(&edges));
        let text = mesh_text(&settings.mesh)?;
        let print = print(&text.1);
        let mesh = read_own(text, &settings.service, &metrics, &edges)?;
        let expected = SpiffeId::sidecar(&mesh.trust_domain, &settings.service);
        let identity = kiro_tls::watch_sidecar(settings.identity.clone(), expected)?;
        let first = Arc::clone(&identity.borrow());
        note_expiry(&metrics, &first);
        let state = State::build(1, mesh, first, &metrics)?;
        state.take_over(&edges);
        faults::tell(&state);
        let listeners = Listeners::bind(&settings, &state)?;
        let addresses = listeners.addresses.clone();
        let (states, states_seen) = watch::channel(Arc::new(state));
        let (phase, phase_seen) = watch::channel(Phase::Serving);
        let phase_seen = PhaseWatch(phase_seen);
        let local_ports = ports::start(Arc::clone(&settings), Arc::clone(&metrics), states_seen.clone());
        let follower = Follower {
            settings: Arc::clone(&settings),
            identity,
            metrics: Arc::clone(&metrics),
            edges: Arc::clone(&edges),
            states,
            print,
            generation: 1,
        };
        tokio::spawn(follower.follow());
        let health = Arc::clone(metrics.app_health());
        tokio::spawn(health::follow(health, Arc::clone(&settings), states_seen.clone(), phase_seen.clone()));
        let parts = Parts {
            settings: Arc::clone(&settings),
            states: states_seen.clone(),
            log,
            tracing,
            metrics: Arc::clone(&metrics),
            resolver: Resolver::start(settings.peer_port),
            phase: phase_seen.clone(),
        };
        let view = View {
            states: states_seen,
            metrics,
            edges,
            phase: phase_seen,
            listeners: Arc::new(addresses.named()),
            local_ports: local_ports.clone(),
        };
        let (threads, quiet) = listeners.spawn(parts, view)?;
        tracing::info!(
            target: "kiro::start", service = %settings.service, outbound = %addresses.outbound, inbound = %addresses.inbound,
            admin = %addresses.admin, workers = settings.workers, "sidecar is ready"
        );
        Ok(Self { phase, threads, addresses, settings, quiet, local_ports })
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Where the application finds a tcp service at this moment; none where it may not reach it, or its port can't be bound.
    #[must_use]
    pub fn local_address(&self, service: &str) -> Option<SocketAddr> {
        let table = self.local_ports.borrow();
        table.get(service)?.state.as_ref().ok().map(|listening| listening.address)
    }

    /// Drains and ends it: no new inbound connections, what is under way ends, the application's calls go out until nothing is
    /// under way or the drain time is over. True where nothing was cut.
    pub async fn stop(mut self) -> bool {
        let _ = self.phase.send(Phase::Draining);
        let mut clean = true;
        for _ in 0..self.settings.workers.max(1) {
            clean &= self.quiet.recv().await.unwrap_or(false);
        }
        let _ = self.phase.send(Phase::Stopped);
        for thread in self.threads {
            clean &= tokio::task::spawn_blocking(move || thread.join().is_ok()).await.unwrap_or(false);
        }
        tracing::info!(target: "kiro::stop", service = %self.settings.service, clean, "sidecar has stopped");
        clean
    }
}

impl Addresses {
    fn named(&self) -> Vec<(&'static str, SocketAddr)> {
        let mut named = vec![
            ("outbound", self.outbound),
            ("inbound", self.inbound),
            ("admin", self.admin),
            ("health", self.health),
        ];
        named.extend(self.ingress.map(|address| ("ingress", address)));
        named.extend(self.ingress_tls.map(|address| ("ingress_tls", address)));
        named
    }
}

fn note_expiry(metrics: &Metrics, identity: &SidecarIdentity) {
    let ends = identity.identity.facts().not_after.unix_timestamp();
    metrics.certificate_ends(u64::try_from(ends).unwrap_or(0));
}

struct Listeners {
    outbound: Bound,
    inbound: Bound,
    ingress: Option<Bound>,
    ingress_tls: Option<Bound>,
    admin: Bound,
    health: Bound,
    addresses: Addresses,
}

impl Listeners {
    fn bind(settings: &Settings, state: &State) -> Result<Self, BindError> {
        let workers = settings.workers;
        let outbound = Bound::new("outbound", settings.listen.outbound, workers)?;
        let inbound = Bound::new("inbound", settings.listen.inbound, workers)?;
        let ingress_at = |port: Option<u16>, what| {
            port.map(|port| Bound::new(what, SocketAddr::new(settings.listen.ingress, port), workers))
                .transpose()
        };
        let ingress = ingress_at(state.service.ingress.as_ref().and_then(|ingress| ingress.port), "ingress")?;
        let ingress_tls =
            ingress_at(state.service.ingress.as_ref().and_then(|ingress| ingress.tls_port), "ingress TLS")?;
        let admin = Bound::new("admin", settings.listen.admin, 1)?;
        let health = Bound::new("health", settings.listen.health, 1)?;
        let addresses = Addresses {
            outbound: outbound.address,
            inbound: inbound.address,
            ingress: ingress.as_ref().map(|bound| bound.address),
            ingress_tls: ingress_tls.as_ref().map(|bound| bound.address),
            admin: admin.address,
            health: health.address,
        };
        Ok(Self { outbound, inbound, ingress, ingress_tls, admin, health, addresses })
    }

    fn spawn(
        self,
        parts: Parts,
        view: View,
    ) -> Result<(Vec<thread::JoinHandle<()>>, mpsc::Receiver<bool>), StartError> {
        let workers = parts.settings.workers.max(1);
        let (quiet, quiet_seen) = mpsc::channel(workers);
        let parts = Arc::new(parts);
        let mut outbound = self.outbound.into_sockets().into_iter();
        let mut inbound = self.inbound.into_sockets().into_iter();
        let mut ingress = self.ingress.map(Bound::into_sockets).unwrap_or_default().into_iter();
        let mut ingress_tls = self.ingress_tls.map(Bound::into_sockets).unwrap_or_default().into_iter();
        let mut threads = Vec::with_capacity(workers + 1);
        for number in 0..workers {
            let sockets = Sockets {
                outbound: outbound.next(),
                inbound: inbound.next(),
                ingress: ingress.next(),
                ingress_tls: ingress_tls.next(),
                local_ports: view.local_ports.clone(),
                number,
            };
            let (parts, quiet) = (Arc::clone(&parts), quiet.clone());
            let builder = thread::Builder::new().name(format!("kiro-worker-{number}"));
            let runtime = runtime()?;
            threads.push(
                builder.spawn(move || {
                    LocalSet::new().block_on(&runtime, work(&parts, number, sockets, quiet))
                })?,
            );
        }
        let (admin, health) = (self.admin.into_sockets(), self.health.into_sockets());
        let runtime = runtime()?;
        let builder = thread::Builder::new().name("kiro-admin".to_owned());
        threads.push(builder.spawn(move || runtime.block_on(look(admin, health, view)))?);
        Ok((threads, quiet_seen))
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

struct Sockets {
    outbound: Option<std::net::TcpListener>,
    inbound: Option<std::net::TcpListener>,
    ingress: Option<std::net::TcpListener>,
    ingress_tls: Option<std::net::TcpListener>,
    local_ports: watch::Receiver<ports::Table>,
    /// The worker's own number.
    number: usize,
}

/// One worker's life.
async fn work(parts: &Parts, number: usize, sockets: Sockets, quiet: mpsc::Sender<bool>) {
    let worker = Worker::new(parts, number);
    worker.spawn_chores(parts.states.clone());
    let listen =
        |socket: Option<std::net::TcpListener>| socket.and_then(|socket| TcpListener::from_std(socket).ok());
    if let Some(listener) = listen(sockets.inbound) {
        let listener = (Listener::Inbound, listener);
        tokio::task::spawn_local(listen::accept(worker.clone(), listener, Phase::Draining, inbound::serve));
    }
    if let Some(listener) = listen(sockets.outbound) {
        let listener = (Listener::Outbound, listener);
        tokio::task::spawn_local(listen::accept(worker.clone(), listener, Phase::Stopped, outbound::serve));
    }
    tokio::task::spawn_local(ports::follow(worker.clone(), sockets.local_ports, sockets.number));
    if let Some(listener) = listen(sockets.ingress) {
        tokio::task::spawn_local(listen::accept(
            worker.clone(),
            (Listener::Ingress, listener),
            Phase::Draining,
            ingress::serve_plain,
        ));
    }
    if let Some(listener) = listen(sockets.ingress_tls) {
        tokio::task::spawn_local(listen::accept(
            worker.clone(),
            (Listener::IngressTls, listener),
            Phase::Draining,
            ingress::serve_tls,
        ));
    }
    worker.phase.reached(Phase::Draining).await;
    let clean = worker.quiesce(parts.settings.drain_timeout).await;
    let _ = quiet.send(clean).await;
    worker.phase.reached(Phase::Stopped).await;
    worker.farewell().await;
    // Exchanges that are cut record themselves when their tasks end, with the runtime; the flush below takes what is there.
    tokio::task::yield_now().await;
    worker.flush_log();
}

async fn look(admin: Vec<std::net::TcpListener>, health: Vec<std::net::TcpListener>, view: View) {
    let listen = |sockets: Vec<std::net::TcpListener>| {
        sockets.into_iter().next().and_then(|socket| TcpListener::from_std(socket).ok())
    };
    let (Some(admin), Some(health)) = (listen(admin), listen(health)) else { return };
    tokio::join!(
        admin::serve(admin, Audience::Admin, view.clone()),
        admin::serve(health, Audience::Others, view.clone()),
    );
}

/// Follows the mesh file and the identity, and publishes a new state when one of them changes.
struct Follower {
    settings: Arc<Settings>,
    identity: watch::Receiver<Arc<SidecarIdentity>>,
    metrics: Arc<Metrics>,
    edges: Arc<Edges>,
    states: watch::Sender<Arc<State>>,
    print: Print,
    generation: u64,
}

impl Follower {
    async fn follow(mut self) {
        let mut seen = None;
        // An identity from memory never changes, and nobody is left to change it.
        let mut renewable = true;
        loop {
            tokio::select! {
                () = tokio::time::sleep(limits::FILES_EVERY) => {
                    if let MeshSource::Directory(directory) = &self.settings.mesh {
                        let now = stamp(&directory.join(MESH_FILE));
                        if now != seen {
                            seen = now;
                            self.mesh_changed();
                        }
                    }
                }
                changed = self.identity.changed(), if renewable => {
                    renewable = changed.is_ok();
                    if !renewable {
                        continue;
                    }
                    let identity = Arc::clone(&self.identity.borrow_and_update());
                    note_expiry(&self.metrics, &identity);
                    let mesh = self.states.borrow().mesh();
                    self.publish(mesh, "certificates");
                }
                () = self.states.closed() => return,
            }
        }
    }

    fn mesh_changed(&mut self) {
        let read = mesh_text(&self.settings.mesh).and_then(|text| {
            let print = print(&text.1);
            if print == self.print {
                return Ok(None);
            }
            Ok(Some((print, read_own(text, &self.settings.service, &self.metrics, &self.edges)?)))
        });
        match read {
            Ok(None) => {}
            Ok(Some((print, mesh))) => {
                self.print = print;
                self.publish(mesh, "mesh file");
            }
            Err(error) => {
                tracing::error!(target: "kiro::reload", service = %self.settings.service, %error, "mesh file is bad: the running one stays");
            }
        }
    }

    fn publish(&mut self, mesh: Arc<OwnMesh>, what: &'static str) {
        let identity = Arc::clone(&self.identity.borrow());
        let built = State::build(self.generation + 1, mesh, identity, &self.metrics);
        let state = match built {
            Ok(state) => state,
            Err(error) => {
                tracing::error!(target: "kiro::reload", service = %self.settings.service, %error, what, "change can't be taken: the running state stays");
                return;
            }
        };
        let before = Arc::clone(&self.states.borrow());
        if before.service.ingress.as_ref().map(|ingress| (ingress.port, ingress.tls_port))
            != state.service.ingress.as_ref().map(|ingress| (ingress.port, ingress.tls_port))
        {
            tracing::warn!(target: "kiro::reload", service = %self.settings.service, "ingress ports have changed: they are bound at the next start");
        }
        self.generation += 1;
        state.take_over(&self.edges);
        let changed = !Arc::ptr_eq(&before.mesh(), &state.mesh());
        let state = Arc::new(state);
        self.states.send_replace(Arc::clone(&state));
        tracing::info!(target: "kiro::reload", service = %self.settings.service, what, generation = self.generation, "state has changed");
        if changed {
            faults::tell(&state);
        }
    }
}

/// What tells one version of a file from another without reading it.
fn stamp(path: &Path) -> Option<(Option<std::time::SystemTime>, u64, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    #[cfg(unix)]
    let inode = std::os::unix::fs::MetadataExt::ino(&metadata);
    #[cfg(not(unix))]
    let inode = 0;
    Some((metadata.modified().ok(), metadata.len(), inode))
}

/// How long a stop may take beyond the drain: flushing logs and spans.
pub(crate) const FLUSH: Duration = Duration::from_secs(3);
