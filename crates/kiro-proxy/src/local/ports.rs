//! Which ports of this pod's loopback lead to tcp services, and does anybody listen there?
//!
//! The mesh file says which are wanted. They are bound on the control thread, which sees to it that a port that can't be had is told,
//! shown and tried again; workers take their sockets from a table that is published whole whenever something of it changes.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use kiro_core::identity::ServiceName;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, spawn_local};

use crate::admission::Listener;
use crate::drain::Phase;
use crate::limits;
use crate::listen::{self, Bound};
use crate::lock::lock;
use crate::metrics::Metrics;
use crate::settings::Settings;
use crate::state::State;
use crate::worker::Worker;

/// The local port of each tcp service that this pod may reach.
pub(crate) type Table = Arc<BTreeMap<ServiceName, Port>>;

/// One local port.
#[derive(Debug, Clone)]
pub(crate) struct Port {
    /// What the mesh file says.
    pub(crate) declared: u16,
    /// Its sockets, or why there are none.
    pub(crate) state: Result<Arc<Listening>, Arc<str>>,
}

/// A port that is bound.
#[derive(Debug)]
pub(crate) struct Listening {
    id: u64,
    /// Where.
    pub(crate) address: SocketAddr,
    /// One for each worker, taken once.
    sockets: Mutex<Vec<Option<Socket>>>,
}

/// A worker's socket. Whoever has bound it learns that all of a port's are closed when the last `_open` is gone.
#[derive(Debug)]
struct Socket {
    socket: std::net::TcpListener,
    open: mpsc::Sender<Infallible>,
}

impl Listening {
    fn take(&self, worker: usize) -> Option<Socket> {
        lock(&self.sockets).get_mut(worker)?.take()
    }
}

/// Binds what the present state wants and follows the later ones. Must be called within a tokio runtime.
pub(crate) fn start(
    settings: Arc<Settings>,
    metrics: Arc<Metrics>,
    states: watch::Receiver<Arc<State>>,
) -> watch::Receiver<Table> {
    let (tables, seen) = watch::channel(Table::default());
    let mut keeper = Keeper { settings, metrics, states, tables, ports: BTreeMap::new(), next: 0 };
    keeper.open_missing();
    tokio::spawn(keeper.follow());
    seen
}

struct Keeper {
    settings: Arc<Settings>,
    metrics: Arc<Metrics>,
    states: watch::Receiver<Arc<State>>,
    tables: watch::Sender<Table>,
    ports: BTreeMap<ServiceName, Kept>,
    next: u64,
}

struct Kept {
    port: Port,
    /// Ends when all of its sockets are closed.
    closed: Option<mpsc::Receiver<Infallible>>,
}

impl Keeper {
    async fn follow(mut self) {
        loop {
            let failing = self.ports.values().any(|kept| kept.port.state.is_err());
            tokio::select! {
                changed = self.states.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(limits::BIND_AGAIN), if failing => {}
                () = self.tables.closed() => return,
            }
            self.close_unwanted().await;
            self.open_missing();
        }
    }

    fn wanted(&mut self) -> BTreeMap<ServiceName, u16> {
        let state = self.states.borrow_and_update();
        state.peers.iter().filter_map(|peer| Some((peer.name.clone(), peer.local_port?))).collect()
    }

    /// Lets go of what is no longer wanted, and waits until it is gone: another service may have its port now.
    async fn close_unwanted(&mut self) {
        let wanted = self.wanted();
        let unwanted = |name: &ServiceName, kept: &mut Kept| wanted.get(name) != Some(&kept.port.declared);
        let gone: Vec<(ServiceName, Kept)> = self.ports.extract_if(.., unwanted).collect();
        if gone.is_empty() {
            return;
        }
        self.publish();
        for (service, Kept { port, closed }) in gone {
            let (Ok(listening), Some(mut closed)) = (port.state, closed) else { continue };
            let address = listening.address;
            // The sockets that no worker has taken are in here.
            drop(listening);
            let _ = tokio::time::timeout(limits::UNBIND, closed.recv()).await;
            tracing::info!(target: "kiro::local", service = %self.settings.service, callee = %service, %address, "local port is closed");
        }
    }

    fn open_missing(&mut self) {
        let mut changed = false;
        for (service, port) in self.wanted() {
            let before = self.ports.get(&service).map(|kept| &kept.port.state);
            if matches!(before, Some(Ok(_))) {
                continue;
            }
            let told = before.and_then(|state| state.as_ref().err()).cloned();
            let kept = self.open(&service, port, told.as_deref());
            changed |= kept.port.state.is_ok() || kept.port.state.as_ref().err() != told.as_ref();
            self.ports.insert(service, kept);
        }
        if changed {
            self.publish();
        }
    }

    /// Binds a port; a failure that was `told` is not told again.
    fn open(&mut self, service: &ServiceName, declared: u16, told: Option<&str>) -> Kept {
        let me = &self.settings.service;
        let bound = Bound::new("local port", self.settings.listen.local.at(declared), self.settings.workers);
        match bound {
            Ok(bound) => {
                let address = bound.address;
                self.next += 1;
                let (open, closed) = mpsc::channel(1);
                let sockets = bound.into_sockets().into_iter();
                let sockets = sockets.map(|socket| Some(Socket { socket, open: open.clone() })).collect();
                let listening = Listening { id: self.next, address, sockets: Mutex::new(sockets) };
                tracing::info!(target: "kiro::local", service = %me, callee = %service, %address, "local port is open");
                Kept { port: Port { declared, state: Ok(Arc::new(listening)) }, closed: Some(closed) }
            }
            Err(error) => {
                let error = error.to_string();
                if told != Some(error.as_str()) {
                    let fix = format!(
                        "free the port in the pod of {me}, or give services.{service} another local_port in the mesh file; it is tried again until then"
                    );
                    tracing::error!(target: "kiro::local", service = %me, callee = %service, %error, fix, "the application can't reach a tcp service");
                }
                Kept { port: Port { declared, state: Err(error.into()) }, closed: None }
            }
        }
    }

    fn publish(&self) {
        let table: BTreeMap<_, _> =
            self.ports.iter().map(|(service, kept)| (service.clone(), kept.port.clone())).collect();
        self.metrics.local_ports_failed(table.values().filter(|port| port.state.is_err()).count());
        self.tables.send_replace(Arc::new(table));
    }
}

/// Accepts on the ports of the table, as worker `number`, for as long as they stand there. Connections outlive their listener:
/// whether they may go on is the policy's to say.
pub(crate) async fn follow(worker: Rc<Worker>, mut tables: watch::Receiver<Table>, number: usize) {
    let mut accepting: HashMap<u64, AbortHandle> = HashMap::new();
    loop {
        let table = Arc::clone(&tables.borrow_and_update());
        let listening =
            || table.iter().filter_map(|(service, port)| Some((service, port.state.as_ref().ok()?)));
        accepting.retain(|id, task| {
            let stays = listening().any(|(_, listening)| listening.id == *id);
            if !stays {
                task.abort();
            }
            stays
        });
        for (service, listening) in listening() {
            if let Some(socket) = listening.take(number) {
                let task = spawn_local(accept(Rc::clone(&worker), socket, Rc::new(service.clone())));
                accepting.insert(listening.id, task.abort_handle());
            }
        }
        drop(table);
        if tables.changed().await.is_err() {
            return;
        }
    }
}

async fn accept(worker: Rc<Worker>, Socket { socket, open }: Socket, service: Rc<ServiceName>) {
    match TcpListener::from_std(socket) {
        Ok(listener) => {
            // Like the application's proxy, these work until the sidecar's end: what drains may still need its database.
            let serve = |worker, stream, place| super::serve(worker, stream, place, Rc::clone(&service));
            listen::accept(worker, (Listener::Local, listener), Phase::Stopped, serve).await;
        }
        Err(error) => {
            tracing::error!(target: "kiro::local", callee = %service, %error, "the runtime does not take a local port's socket");
        }
    }
    // Only after the socket.
    drop(open);
}
