//! What must a sidecar be told before it starts?
//!
//! Two directories, its service's name and the addresses that it binds; all else is in the mesh file, which may change while
//! the sidecar runs.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use kiro_core::identity::ServiceName;
use kiro_telemetry::log::Format;
use kiro_tls::SidecarSource;

/// Everything a sidecar is configured with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The service that this sidecar stands beside.
    pub service: ServiceName,
    /// Where its certificates and edge secrets are.
    pub identity: SidecarSource,
    /// Where the mesh file is.
    pub mesh: MeshSource,
    /// What it binds.
    pub listen: Listen,
    /// The port that other sidecars' inbound listeners have, where the mesh file names no `endpoints`.
    pub peer_port: u16,
    /// Where the application listens; the port is in the mesh file.
    pub app_host: IpAddr,
    /// Threads that serve requests.
    pub workers: usize,
    /// File descriptors that are this sidecar's share, where it has the process not for itself.
    pub descriptors: Option<u64>,
    /// The pod process that says when to drain, where there is one.
    pub pod: Option<SocketAddr>,
    /// How long a drain may take.
    pub drain_timeout: Duration,
    /// How the access log is written.
    pub log_format: Format,
}

/// The mesh file's place.
#[derive(Debug, Clone)]
pub enum MeshSource {
    /// A directory with `mesh.yaml`: a directory, since an editor's rename breaks the mount of a file.
    Directory(PathBuf),
    /// The file's text, for a mesh in one process.
    Text(String),
}

/// The addresses that a sidecar binds.
#[derive(Debug, Clone)]
pub struct Listen {
    /// The application's proxy.
    pub outbound: SocketAddr,
    /// Mutual TLS from other sidecars.
    pub inbound: SocketAddr,
    /// The host of the ingress; its ports are in the mesh file.
    pub ingress: IpAddr,
    /// Where the application finds the tcp services that it may reach; their ports are in the mesh file.
    pub local: LocalHost,
    /// Admin, read only.
    pub admin: SocketAddr,
    /// `/live` and `/ready` for others.
    pub health: SocketAddr,
}

impl Default for Listen {
    fn default() -> Self {
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Self {
            outbound: SocketAddr::new(loopback, 15001),
            inbound: SocketAddr::new(any, 15006),
            ingress: any,
            local: LocalHost::default(),
            admin: SocketAddr::new(loopback, 15000),
            health: SocketAddr::new(any, 15020),
        }
    }
}

/// Where the application finds tcp services. Always loopback: whoever connects there passes for the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalHost {
    address: IpAddr,
    free_ports: bool,
}

impl LocalHost {
    /// The mesh file's ports at a loopback address; none where it is another one.
    #[must_use]
    pub fn new(address: IpAddr) -> Option<Self> {
        address.is_loopback().then_some(Self { address, free_ports: false })
    }

    /// Any free ports of 127.0.0.1 in the place of the mesh file's, for meshes whose pods share one network namespace;
    /// [`crate::Sidecar::local_address`] tells them.
    #[must_use]
    pub fn with_free_ports() -> Self {
        Self { free_ports: true, ..Self::default() }
    }

    /// What to bind for a port of the mesh file.
    pub(crate) fn at(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address, if self.free_ports { 0 } else { port })
    }
}

impl Default for LocalHost {
    fn default() -> Self {
        Self { address: IpAddr::V4(Ipv4Addr::LOCALHOST), free_ports: false }
    }
}

/// The port of inbound listeners.
pub const PEER_PORT: u16 = 15006;

/// The default of `workers`: two threads carry tens of thousands of requests a second, and a host runs many sidecars.
#[must_use]
pub fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().min(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_ports_are_on_loopback_alone() {
        for (address, taken) in [
            ("127.0.0.1", true),
            ("127.1.2.3", true),
            ("::1", true),
            ("0.0.0.0", false),
            ("::", false),
            ("10.0.0.7", false),
            ("::ffff:127.0.0.1", false),
        ] {
            assert_eq!(LocalHost::new(address.parse().unwrap()).is_some(), taken, "{address}");
        }
        assert_eq!(LocalHost::default().at(5432).to_string(), "127.0.0.1:5432");
        assert_eq!(LocalHost::with_free_ports().at(5432).to_string(), "127.0.0.1:0");
    }
}
