//! What does the mesh file say?
//!
//! [`parse`] reads the file into types that can't hold nonsense, or gives all of its problems at once, each with line, path,
//! value and fix. A [`Mesh`] that exists is consistent: every name in `allow` is a service of it, no two ports of a pod collide.

mod faults;
mod health;
mod limit;
mod mirrors;
mod problem;
mod read;
mod schema;
mod splits;
#[cfg(test)]
mod tests;
mod traffic;
mod tree;

use std::collections::BTreeMap;
use std::net::SocketAddr;

pub use self::faults::FaultLine;
pub use self::health::{HealthCheck, Question};
pub use self::limit::{LimitedSource, Per, RateLine};
pub use self::mirrors::MirrorLine;
use self::problem::Found;
pub use self::problem::{Problem, Problems};
pub use self::splits::SplitLine;
pub use self::traffic::{Route, Terms, Timeout, Traffic};
use crate::identity::{ServiceName, TrustDomain};
use crate::path::PathPattern;

/// The whole mesh, as its file declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// What the mesh's CA vouches for.
    pub trust_domain: TrustDomain,
    /// Whether requests between sidecars are signed.
    pub signatures: Signatures,
    /// Whether the policy refuses or only watches.
    pub mode: Mode,
    /// The services.
    pub services: BTreeMap<ServiceName, Service>,
    /// The allowed edges, in the file's order.
    pub allow: Vec<Allow>,
    /// How many requests the edges may carry, in the file's order.
    pub limits: Vec<RateLine>,
    /// What is to go wrong on purpose, in the file's order; the first line that fits a request counts.
    pub faults: Vec<FaultLine>,
    /// Names behind which there are versions, each once.
    pub splits: Vec<SplitLine>,
    /// Services of whose calls another one gets copies, each once.
    pub mirrors: Vec<MirrorLine>,
}

/// `signatures:`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Signatures {
    /// Unsigned requests are refused. The default: what is off should be written down.
    #[default]
    Required,
    /// Nothing is signed, mutual TLS alone protects.
    Off,
}

/// `mode:`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mode {
    /// What is not allowed is refused. The default: a mesh that only watches should say so.
    #[default]
    Enforce,
    /// What is not allowed is logged and let through.
    Audit,
}

/// One entry of `services:`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// How the sidecar reaches its application.
    pub app: App,
    /// What the pod opens to outside the mesh; nothing by default.
    pub ingress: Option<Ingress>,
    /// How calls to this service are made.
    pub traffic: Traffic,
    /// How its sidecar checks its application; none: it does not.
    pub health: Option<HealthCheck>,
    /// Addresses of the service's sidecars where DNS can't serve; empty: the name is resolved.
    pub endpoints: Vec<SocketAddr>,
    /// Who may read the sidecar's metrics.
    pub metrics: Metrics,
    /// Where callers find a `protocol: tcp` service on their own loopback, if that is not `app.port`; see [`Service::found_at`].
    pub local_port: Option<u16>,
}

impl Service {
    /// The port of their own loopback at which callers find this service; none where it speaks HTTP, and is called by name.
    #[must_use]
    pub fn found_at(&self) -> Option<u16> {
        (self.app.protocol == Protocol::Tcp).then(|| self.local_port.unwrap_or(self.app.port))
    }
}

impl Mesh {
    /// The tcp services that a line of `allow` lets `caller` reach, each once, with the port of its loopback where it finds them. No
    /// two have the same port.
    #[must_use]
    pub fn local_ports(&self, caller: &ServiceName) -> BTreeMap<&ServiceName, u16> {
        let reached = self.allow.iter().filter(
            |line| matches!(&line.from, Source::Service(from) if from == caller && line.to != *caller),
        );
        reached.filter_map(|line| Some((&line.to, self.services.get(&line.to)?.found_at()?))).collect()
    }
}

/// `app:`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct App {
    /// The application's port on its pod's loopback.
    pub port: u16,
    /// How the two speak on loopback.
    pub tls: AppTls,
    /// What the application speaks.
    pub protocol: Protocol,
    /// How field names are spelled towards it.
    pub header_case: HeaderCase,
}

/// `app.tls:`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AppTls {
    /// Plain, on loopback alone. The default: most applications speak no TLS, and nothing leaves the pod.
    #[default]
    None,
    /// Mutual TLS both ways, with the application's own leaf.
    Mutual,
}

/// `app.protocol:`. Declared, never guessed: guessing stalls protocols in which the server speaks first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Protocol {
    /// HTTP/1.1. The default: method and path are seen by policy and log.
    #[default]
    Http1,
    /// HTTP/2 with prior knowledge, or by ALPN where the application speaks TLS.
    H2,
    /// gRPC, which is HTTP/2 whose calls last as long as their callers allow.
    Grpc,
    /// Bytes, which travel as CONNECT.
    Tcp,
}

impl Protocol {
    /// Whether the application speaks HTTP, of whichever version.
    #[must_use]
    pub fn is_http(self) -> bool {
        match self {
            Protocol::Http1 | Protocol::H2 | Protocol::Grpc => true,
            Protocol::Tcp => false,
        }
    }
}

/// `app.header_case:`. How field names are spelled towards an application that speaks HTTP/1.1, where case means nothing
/// (RFC 9110 5.1) but to old applications.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum HeaderCase {
    /// `content-type`, as HTTP/2 has them.
    #[default]
    Lower,
    /// `Content-Type`.
    Title,
}

/// `ingress:`. At least one of the ports is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ingress {
    /// The plain HTTP port.
    pub port: Option<u16>,
    /// The TLS port.
    pub tls_port: Option<u16>,
    /// More DNS names for the ingress leaf, beside `localhost` and the service's own.
    pub names: Vec<String>,
    /// Whether `forwarded` and `x-forwarded-*` from outside are believed. Not by default: anybody can write them.
    pub trust_forwarded: bool,
    /// Whether the sidecar itself answers `/healthz` there. Not by default: an application may have one of its own.
    pub healthz: bool,
}

/// `metrics:`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Metrics {
    /// Only from inside the pod. The default: they name every peer.
    #[default]
    Closed,
    /// From the pod's network too, on 15020.
    Open,
}

/// One line of `allow:`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allow {
    /// Who may call.
    pub from: Source,
    /// Whom.
    pub to: ServiceName,
    /// With these methods; none: with every one.
    pub methods: Option<Vec<String>>,
    /// On these paths; none: on every one.
    pub paths: Option<Vec<PathPattern>>,
}

/// The caller in an allow line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Outside the mesh, by the destination's own ingress.
    Ingress,
    /// A service of the mesh.
    Service(ServiceName),
}

/// The ports in a pod that are the sidecar's own, with what listens there.
pub const SIDECAR_PORTS: &[(u16, &str)] = &[
    (15000, "the sidecar's admin listener"),
    (15001, "the sidecar's outbound listener"),
    (15006, "the sidecar's inbound listener"),
    (15020, "the sidecar's health listener"),
    (15021, "the pod process"),
];

/// Reads the mesh file's text.
///
/// # Errors
/// All problems that could be found, in the file's order.
pub fn parse(text: &str) -> Result<Mesh, Problems> {
    let mut found = Found::default();
    let mesh = tree::read(text, &mut found).and_then(|root| schema::mesh(&root, &mut found));
    match mesh {
        Ok(mesh) if found.is_empty() => Ok(mesh),
        Ok(_) | Err(_) => Err(found.into_problems()),
    }
}
