//! What do unit tests serve connections with, where time has to be theirs?
//!
//! A worker of a sidecar that no listener and no thread belongs to: on the test's own runtime, whose clock may stand still.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kiro_core::identity::{ServiceName, SpiffeId};
use kiro_telemetry::log::{Format, LogSink};
use kiro_telemetry::trace::Tracing;
use kiro_tls::{Material, SidecarFiles, SidecarIdentity, SidecarSource};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::watch;

use crate::admission::{Admission, Listener};
use crate::discover::Resolver;
use crate::drain::{Phase, PhaseWatch};
use crate::exchange::{Direction, Via};
use crate::metrics::Metrics;
use crate::settings::{Listen, MeshSource, PEER_PORT, Settings};
use crate::state::{OwnMesh, State};
use crate::worker::{Parts, Worker};

const MESH: &str = "\
trust_domain: test.mesh
services:
  caller: { app: { port: 1 } }
  callee: { app: { port: 2 } }
allow:
  - { from: caller, to: callee }
";

/// A worker of `caller`'s sidecar, and what it hears of.
pub(crate) struct Trial {
    pub(crate) worker: Rc<Worker>,
    _states: watch::Sender<Arc<State>>,
    _phase: watch::Sender<Phase>,
}

impl Trial {
    /// Makes one.
    pub(crate) fn new() -> Self {
        let mesh = kiro_core::mesh::parse(MESH).unwrap();
        let service = ServiceName::parse("caller").unwrap();
        let pki = kiro_pki::in_memory(&mesh, SystemTime::now().into()).unwrap();
        let files = &pki.sidecars[&service];
        let files = SidecarFiles {
            material: Material {
                ca_pem: files.ca_pem.clone(),
                leaf_pem: files.leaf_pem.clone(),
                key_pem: files.key_pem.clone(),
            },
            edges_json: files.edges_json.clone(),
            ingress: None,
        };
        let expected = SpiffeId::sidecar(&mesh.trust_domain, &service);
        let identity = Arc::new(SidecarIdentity::from_files(&files, &expected).unwrap());
        let log = LogSink::new(std::io::sink(), Format::Json, None).unwrap();
        let metrics = Metrics::of_a_test(1, Admission::shared(1 << 20, 1));
        let edges = Arc::default();
        let own = Arc::new(OwnMesh::of(&mesh, &service, &metrics, &edges).unwrap());
        let state = State::build(1, own, identity, &metrics).unwrap();
        let (states, states_seen) = watch::channel(Arc::new(state));
        let (phase, phase_seen) = watch::channel(Phase::Serving);
        let settings = Settings {
            service,
            identity: SidecarSource::Memory(files),
            mesh: MeshSource::Text(MESH.to_owned()),
            listen: Listen::default(),
            peer_port: PEER_PORT,
            app_host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            workers: 1,
            descriptors: None,
            pod: None,
            drain_timeout: Duration::ZERO,
            log_format: Format::Json,
        };
        let parts = Parts {
            settings: Arc::new(settings),
            states: states_seen,
            log,
            tracing: Tracing::off(),
            metrics,
            resolver: Resolver::start(PEER_PORT),
            phase: PhaseWatch(phase_seen),
        };
        Self { worker: Worker::new(&parts, 0), _states: states, _phase: phase }
    }

    /// A connection that came by one of its listeners.
    pub(crate) async fn via(&self, direction: Direction) -> Rc<Via> {
        let listener = match direction {
            Direction::Outbound => Listener::Outbound,
            Direction::Inbound => Listener::Inbound,
            Direction::Ingress => Listener::Ingress,
        };
        let remote = SocketAddr::from(([127, 0, 0, 1], 1));
        let place = self.worker.places.take(listener, remote).await.unwrap();
        Rc::new(Via { direction, caller: None, caller_proof: "none", place, tunnelled: false })
    }

    /// How many connections were cut for a reason.
    pub(crate) fn abused(&self, listener: &str, reason: &str) -> u64 {
        let series = format!("kiro_abuse_total{{listener=\"{listener}\",reason=\"{reason}\"}} ");
        let text = self.worker.metrics.render();
        text.lines().find_map(|line| line.strip_prefix(&*series)).map_or(0, |count| count.parse().unwrap())
    }
}

/// What a client of HTTP/2 begins with: the preface, and its SETTINGS.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Writes these bytes, and then reads what comes until the other end closes.
pub(crate) async fn say(mut stream: DuplexStream, bytes: &[u8]) -> Vec<u8> {
    stream.write_all(bytes).await.unwrap();
    let mut read = Vec::new();
    let _ = stream.read_to_end(&mut read).await;
    read
}

/// Whether frames that were read have one of a kind.
pub(crate) fn has_frame(mut bytes: &[u8], wanted: u8) -> bool {
    while let Some((head, rest)) = bytes.split_first_chunk::<9>() {
        let [a, b, c, kind, ..] = *head;
        if kind == wanted {
            return true;
        }
        bytes = rest.get(u32::from_be_bytes([0, a, b, c]) as usize..).unwrap_or_default();
    }
    false
}
