//! What does a sidecar know of its mesh at one moment?
//!
//! A [`State`] is built whole from the mesh file and the identity, on the control thread, whenever one of the two changes, and
//! is swapped whole on each worker. A request runs from its head to its end under the state that it began with; tunnels are
//! judged again (see [`crate::tunnel`]).
//!
//! **Invariant.** What a sidecar knows of the mesh file is here once, as requests want it: the file's own form is gone when a state has
//! been built, and a state with another identity shares what the last one took of it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use http::HeaderValue;
use http::uri::Authority;
use kiro_core::identity::{ServiceName, SpiffeId, TrustDomain};
use kiro_core::mesh::{AppTls, FaultLine, Mesh, Protocol, Service, Signatures, Traffic};
use kiro_core::policy::Policy;
use kiro_core::shaping::Mirror;
use kiro_tls::{IngressServer, LoopbackClient, LoopbackServer, MeshServer, SidecarIdentity};

use crate::admission::Listener;
use crate::edge::{Calls, Edges};
use crate::exchange::{Direction, Via};
use crate::metrics::{EdgeMetrics, Metrics, UNKNOWN};
use crate::overload::AppLimit;
use crate::rates::Rate;
use crate::versions::Versions;

/// What workers hold: one reference count of their own, so that a request touches no other thread's cache line.
pub(crate) type Snapshot = Rc<Arc<State>>;

/// A service that this sidecar's application may name.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Its name, which is the DNS name that is dialled and the authority between sidecars.
    pub(crate) name: ServiceName,
    /// The identity that its sidecar must prove.
    pub(crate) id: SpiffeId,
    /// The name as authority, ready to be cloned into a request.
    pub(crate) authority: Authority,
    /// Addresses from the mesh file, where DNS can't serve.
    pub(crate) endpoints: Arc<[SocketAddr]>,
    /// What its application speaks.
    pub(crate) protocol: Protocol,
    /// The port of our loopback that leads there, where it is a tcp service that a line of the policy lets us reach.
    pub(crate) local_port: Option<u16>,
    /// How calls to it are made.
    pub(crate) traffic: Traffic,
    /// What goes wrong with calls to it on purpose.
    pub(crate) faults: Option<Box<[FaultLine]>>,
    /// The versions behind its name.
    pub(crate) versions: Option<Box<Versions>>,
    /// Who gets copies of calls to it, as a place among the peers.
    pub(crate) mirror: Option<Mirror<usize>>,
    /// Counts of the edge to it.
    pub(crate) metrics: Arc<EdgeMetrics>,
    /// What all workers share about the calls to it; made with the first one, since most of a large mesh is never called.
    calls: OnceLock<Calls>,
    edges: Arc<Edges>,
    /// The number of the mesh file.
    file: u64,
    /// Counts of the edge from it.
    incoming: Arc<EdgeMetrics>,
}

impl Peer {
    /// What all workers share about the calls to it.
    pub(crate) fn calls(&self) -> &Calls {
        let make = || {
            let (breaker, now) = (self.traffic.breaker, Instant::now());
            self.edges.calls(&self.name, self.file, &self.endpoints, breaker, now)
        };
        self.calls.get_or_init(make)
    }
}

/// What a sidecar takes of the mesh file.
#[derive(Debug)]
pub(crate) struct OwnMesh {
    /// This sidecar's service.
    pub(crate) me: ServiceName,
    /// The service's name as a field value.
    pub(crate) me_value: HeaderValue,
    /// This sidecar's entry in the mesh file.
    pub(crate) service: Service,
    /// Whether requests are signed.
    pub(crate) signatures: Signatures,
    /// The edges that start or end here.
    pub(crate) policy: Policy,
    /// All other services, in the order of their names.
    pub(crate) peers: Vec<Peer>,
    /// What the mesh's CA must vouch for.
    pub(crate) trust_domain: TrustDomain,
    /// How many requests may come.
    pub(crate) rates: Box<[Rate]>,
    /// How many the application may have under way.
    pub(crate) concurrency: Option<Arc<AppLimit>>,
    index: HashMap<ServiceName, usize>,
    ingress: Arc<EdgeMetrics>,
    unknown_caller: Arc<EdgeMetrics>,
    unknown_callee: Arc<EdgeMetrics>,
}

/// One consistent view of the mesh.
#[derive(Debug)]
pub(crate) struct State {
    /// Grows with each state that is published.
    pub(crate) generation: u64,
    /// What the mesh file says.
    mesh: Arc<OwnMesh>,
    /// This sidecar's identity.
    pub(crate) id: SpiffeId,
    /// Certificates and edge secrets.
    pub(crate) identity: Arc<SidecarIdentity>,
    /// TLS of the inbound listener.
    pub(crate) mesh_server: MeshServer,
    /// TLS of the outbound listener, where the application speaks it.
    pub(crate) loopback_server: Option<LoopbackServer>,
    /// TLS of the ingress, where it is open.
    pub(crate) ingress_server: Option<IngressServer>,
    /// TLS towards the application, where it speaks it.
    pub(crate) app_client: Option<LoopbackClient>,
}

impl Deref for State {
    type Target = OwnMesh;

    fn deref(&self) -> &OwnMesh {
        &self.mesh
    }
}

/// Why a mesh file that is good in itself can't serve this sidecar.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// The mesh file lacks this service.
    #[error(
        "the mesh file has no service `{0}`: add it under `services:`, or set KIRO_SERVICE to one that is there"
    )]
    NoService(ServiceName),
    /// The certificates are for another trust domain.
    #[error(
        "the mesh file says `trust_domain: {wanted}`, the certificates are for `{found}`: run `make certs` after moving the old certs/ away"
    )]
    TrustDomain {
        /// The mesh file's.
        wanted: String,
        /// The certificates'.
        found: String,
    },
    /// The ingress is to speak TLS and has no certificate.
    #[error(
        "services.{0}.ingress.tls_port is set, and there is no ingress.pem beside the sidecar's certificate: run `make certs`"
    )]
    NoIngressCertificate(ServiceName),
    /// A certificate can't be used.
    #[error("{0}")]
    Tls(String),
}

impl State {
    /// Builds the state of one service; see [`OwnMesh::of`].
    pub(crate) fn build(
        generation: u64,
        mesh: Arc<OwnMesh>,
        identity: Arc<SidecarIdentity>,
        metrics: &Metrics,
    ) -> Result<Self, StateError> {
        let id = identity.identity.spiffe().clone();
        if id.trust_domain != mesh.trust_domain {
            return Err(StateError::TrustDomain {
                wanted: mesh.trust_domain.to_string(),
                found: id.trust_domain.to_string(),
            });
        }
        let tls = |error: &dyn std::fmt::Display| StateError::Tls(error.to_string());
        let lines = |listener| &metrics.connections(listener).lines;
        let ingress_server = match (&mesh.service.ingress, &identity.ingress) {
            (Some(ingress), Some(material)) if ingress.tls_port.is_some() => {
                let server = kiro_tls::ingress_server(material).map_err(|error| tls(&error))?;
                Some(server.with_failures_bounded(lines(Listener::IngressTls)))
            }
            (Some(ingress), None) if ingress.tls_port.is_some() => {
                return Err(StateError::NoIngressCertificate(mesh.me.clone()));
            }
            _ => None,
        };
        let app = &mesh.service.app;
        let mutual = app.tls == AppTls::Mutual;
        Ok(Self {
            generation,
            mesh_server: kiro_tls::mesh_server(&identity.identity)
                .map_err(|error| tls(&error))?
                .with_failures_bounded(lines(Listener::Inbound)),
            loopback_server: mutual
                .then(|| kiro_tls::loopback_server(&identity.identity))
                .transpose()
                .map_err(|error| tls(&error))?
                .map(|server| server.with_failures_bounded(lines(Listener::Outbound))),
            app_client: mutual
                .then(|| match app.protocol {
                    Protocol::H2 | Protocol::Grpc => kiro_tls::loopback_client_h2(&identity.identity),
                    Protocol::Http1 | Protocol::Tcp => kiro_tls::loopback_client(&identity.identity),
                })
                .transpose()
                .map_err(|error| tls(&error))?,
            ingress_server,
            id,
            identity,
            mesh,
        })
    }

    /// Lets go of what was kept for what the mesh file says no more; for a state that is taken, since one that is refused changes nothing.
    pub(crate) fn take_over(&self, edges: &Edges) {
        edges.keep(|name| *name == self.me || self.index.contains_key(name));
        edges.rates.keep(&self.rates);
        edges.app.keep(self.concurrency.as_ref());
    }

    /// What it took of the mesh file, for a state with another identity.
    pub(crate) fn mesh(&self) -> Arc<OwnMesh> {
        Arc::clone(&self.mesh)
    }
}

impl OwnMesh {
    /// Takes what concerns one service.
    pub(crate) fn of(
        mesh: &Mesh,
        me: &ServiceName,
        metrics: &Metrics,
        edges: &Arc<Edges>,
    ) -> Result<Self, StateError> {
        let service = mesh.services.get(me).cloned().ok_or_else(|| StateError::NoService(me.clone()))?;
        let mut peers = peers(me, mesh, metrics, edges);
        let now = Instant::now();
        let index: HashMap<ServiceName, usize> =
            peers.iter().enumerate().map(|(index, peer)| (peer.name.clone(), index)).collect();
        for line in &mesh.splits {
            let versions = Versions::of(line, &index).map(Box::new);
            if let Some(peer) = index.get(&line.to).and_then(|to| peers.get_mut(*to)) {
                peer.versions = versions;
            }
        }
        for line in &mesh.mirrors {
            // Nothing where this sidecar would send copies to itself.
            let to = index.get(&line.mirror.to).copied();
            if let Some(peer) = index.get(&line.to).and_then(|to| peers.get_mut(*to)) {
                peer.mirror = to.map(|to| Mirror { to, share: line.mirror.share });
            }
        }
        Ok(Self {
            me: me.clone(),
            me_value: HeaderValue::from_str(me.as_str())
                .map_err(|error| StateError::Tls(error.to_string()))?,
            rates: edges.rates.of(mesh.limits.iter(), me, now),
            concurrency: edges.app.of(service.traffic.concurrency, now),
            service,
            signatures: mesh.signatures,
            policy: Policy::for_service(mesh, me),
            index,
            peers,
            trust_domain: mesh.trust_domain.clone(),
            ingress: metrics.edge("ingress", me.as_str()),
            unknown_caller: metrics.edge(UNKNOWN, me.as_str()),
            unknown_callee: metrics.edge(me.as_str(), UNKNOWN),
        })
    }

    /// The place of a service among the peers.
    pub(crate) fn find(&self, name: &str) -> Option<(usize, &Peer)> {
        let index = *self.index.get(name)?;
        self.peers.get(index).map(|peer| (index, peer))
    }

    /// The peer at a place that [`State::find`] gave.
    pub(crate) fn peer(&self, index: usize) -> Option<&Peer> {
        self.peers.get(index)
    }

    /// The counts of the edge by which a request has come that goes no further than to this sidecar or its application.
    pub(crate) fn incoming(&self, via: &Via) -> &Arc<EdgeMetrics> {
        match (via.direction, &via.caller) {
            (Direction::Outbound, _) => &self.unknown_callee,
            (_, None) => &self.ingress,
            (_, Some(caller)) => match self.find(caller.as_str()) {
                Some((_, peer)) => &peer.incoming,
                None => &self.unknown_caller,
            },
        }
    }

    /// The counts of requests to what is no service of the mesh.
    pub(crate) fn unknown_callee(&self) -> &Arc<EdgeMetrics> {
        &self.unknown_callee
    }

    /// How the application beside this sidecar is known.
    pub(crate) fn app_proof(&self) -> &'static str {
        match self.service.app.tls {
            AppTls::Mutual => "mtls",
            AppTls::None => "loopback",
        }
    }
}

/// The lines about the calls of one service to another; nothing where there is none, which is nearly everywhere.
fn faults(me: &ServiceName, to: &ServiceName, mesh: &Mesh) -> Option<Box<[FaultLine]>> {
    let lines = mesh.faults.iter().filter(|line| line.to == *to && line.is_about(me)).cloned();
    let lines: Box<[FaultLine]> = lines.collect();
    (!lines.is_empty()).then_some(lines)
}

fn peers(me: &ServiceName, mesh: &Mesh, metrics: &Metrics, edges: &Arc<Edges>) -> Vec<Peer> {
    let local_ports = mesh.local_ports(me);
    let file = edges.next_file();
    mesh.services
        .iter()
        .filter(|(name, _)| *name != me)
        .filter_map(|(name, service)| {
            Some(Peer {
                id: SpiffeId::sidecar(&mesh.trust_domain, name),
                // A service's name is a DNS label, which is an authority.
                authority: Authority::try_from(name.as_str()).ok()?,
                name: name.clone(),
                endpoints: service.endpoints.clone().into(),
                protocol: service.app.protocol,
                local_port: local_ports.get(name).copied(),
                traffic: service.traffic.clone(),
                faults: faults(me, name, mesh),
                versions: None,
                mirror: None,
                metrics: metrics.edge(me.as_str(), name.as_str()),
                calls: OnceLock::new(),
                edges: Arc::clone(edges),
                file,
                incoming: metrics.edge(name.as_str(), me.as_str()),
            })
        })
        .collect()
}
