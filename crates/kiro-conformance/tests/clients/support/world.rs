//! A mesh of real sidecars, a process each, with certificates on disk.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kiro_pki::{Options, provision};
use rustix::process::Signal;
use tempfile::TempDir;
use time::OffsetDateTime;

use super::process::{Server, command, wait_for};

/// A mesh file, but for the ports.
pub(crate) struct Spec {
    /// Each service's name, and its entry. The application's port is filled in for `{port}`, free ones for `{ingress}`,
    /// `{ingress_tls}` and `{local}`; `endpoints` is added.
    pub(crate) services: Vec<(&'static str, &'static str)>,
    /// The lines below `allow:`.
    pub(crate) allow: &'static str,
}

impl Spec {
    /// `caller`, which has no application that listens, may do anything to `app`, and so may the world outside by its ingress.
    pub(crate) fn pair() -> Self {
        Self::pair_with("app: { port: {port} }, ingress: { port: {ingress}, tls_port: {ingress_tls} }")
    }

    /// The same, with an entry for `app`.
    pub(crate) fn pair_with(app: &'static str) -> Self {
        Self {
            services: vec![("caller", "app: { port: {port} }"), ("app", app)],
            allow: "  - { from: caller, to: app }\n  - { from: ingress, to: app }",
        }
    }
}

/// The ports of one service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) app: u16,
    pub(crate) outbound: u16,
    pub(crate) inbound: u16,
    pub(crate) ingress: u16,
    pub(crate) ingress_tls: u16,
    pub(crate) local: u16,
    admin: u16,
    health: u16,
}

/// A running mesh.
pub(crate) struct World {
    // First, so that the sidecars end before their files do.
    sidecars: BTreeMap<&'static str, Server>,
    ports: BTreeMap<&'static str, Ports>,
    directory: TempDir,
}

/// A port of the loopback.
pub(crate) fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Ports that were free a moment ago. None is given twice in this process, since tests run in parallel. They lie above a pod's own,
/// and below those that the system gives to outgoing connections, one of which could otherwise take a port before its listener
/// does. Each process begins elsewhere.
pub(crate) fn free_ports<const N: usize>() -> [u16; N] {
    const FIRST: u32 = 16_000;
    const COUNT: u32 = 16_000;
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let begin = std::process::id().wrapping_mul(997);
    std::array::from_fn(|_| {
        loop {
            let place = begin.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % COUNT;
            let port = u16::try_from(FIRST + place).unwrap();
            if TcpListener::bind(at(port)).is_ok() {
                return port;
            }
        }
    })
}

impl World {
    /// Starts a sidecar for each service, and returns when they are ready.
    #[track_caller]
    pub(crate) fn start(spec: &Spec) -> Self {
        let ports: BTreeMap<&'static str, Ports> = spec
            .services
            .iter()
            .map(|(name, _)| {
                let [app, outbound, inbound, ingress, ingress_tls, local, admin, health] = free_ports();
                (*name, Ports { app, outbound, inbound, ingress, ingress_tls, local, admin, health })
            })
            .collect();
        let directory = tempfile::tempdir().unwrap();
        let text = mesh_text(spec, &ports);
        let mesh = kiro_core::mesh::parse(&text).unwrap_or_else(|problems| panic!("{problems}\n{text}"));
        std::fs::write(directory.path().join("mesh.yaml"), text).unwrap();
        provision(&mesh, &directory.path().join("certs"), &Options::at(OffsetDateTime::now_utc())).unwrap();
        let mut world = Self { sidecars: BTreeMap::new(), ports, directory };
        for (name, _) in &spec.services {
            let sidecar = world.sidecar(name);
            world.sidecars.insert(name, sidecar);
        }
        for (name, sidecar) in &mut world.sidecars {
            let health = world.ports[name].health;
            sidecar.ready(|| is_ready(health).then_some(()));
        }
        world
    }

    fn sidecar(&self, name: &str) -> Server {
        let ports = self.ports(name);
        let mut command = command(env!("CARGO_BIN_EXE_conformance-sidecar"));
        command
            .env("KIRO_SERVICE", name)
            .env("KIRO_IDENTITY_DIR", self.path("certs").join(name))
            .env("KIRO_MESH_DIR", self.directory.path())
            .env("KIRO_OUTBOUND_ADDR", at(ports.outbound).to_string())
            .env("KIRO_INBOUND_ADDR", at(ports.inbound).to_string())
            .env("KIRO_INGRESS_HOST", "127.0.0.1")
            .env("KIRO_ADMIN_ADDR", at(ports.admin).to_string())
            .env("KIRO_HEALTH_ADDR", at(ports.health).to_string());
        // A test that is over waits for nothing.
        Server::start(name, self.directory.path(), &mut command).ending_by(Signal::KILL)
    }

    /// The ports of a service.
    pub(crate) fn ports(&self, name: &str) -> Ports {
        self.ports[name]
    }

    /// The proxy that `caller` uses.
    pub(crate) fn proxy(&self) -> String {
        format!("http://{}", at(self.ports("caller").outbound))
    }

    /// Where an application of `caller` sends requests that are not in a proxy's form.
    pub(crate) fn outbound(&self) -> SocketAddr {
        at(self.ports("caller").outbound)
    }

    /// The ingress of `app`.
    pub(crate) fn ingress(&self) -> SocketAddr {
        at(self.ports("app").ingress)
    }

    /// A file or directory of this mesh; there is room for a test's own.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    /// Waits for a line in a sidecar's access log.
    #[track_caller]
    pub(crate) fn line(
        &self,
        sidecar: &str,
        what: &str,
        is_it: impl Fn(&serde_json::Value) -> bool,
    ) -> serde_json::Value {
        wait_for(&format!("{what}, in the log of {sidecar}"), || {
            let written = self.sidecars[sidecar].written();
            written.lines().filter_map(|line| serde_json::from_str(line).ok()).find(|line| is_it(line))
        })
    }
}

fn mesh_text(spec: &Spec, ports: &BTreeMap<&'static str, Ports>) -> String {
    let mut text = "trust_domain: conformance.kiro\nservices:\n".to_owned();
    for (name, entry) in &spec.services {
        let ports = ports[name];
        let entry = entry
            .replace("{port}", &ports.app.to_string())
            .replace("{ingress}", &ports.ingress.to_string())
            .replace("{ingress_tls}", &ports.ingress_tls.to_string())
            .replace("{local}", &ports.local.to_string());
        text.push_str(&format!("  {name}: {{ {entry}, endpoints: [\"{}\"] }}\n", at(ports.inbound)));
    }
    text.push_str("allow:\n");
    text.push_str(spec.allow);
    text.push('\n');
    text
}

fn is_ready(health: u16) -> bool {
    let mut answer = [0; 12];
    TcpStream::connect(at(health))
        .and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
            stream.read_exact(&mut answer)
        })
        .is_ok_and(|()| answer.ends_with(b" 200"))
}
