//! A mesh of three services in a temporary directory, and sidecars that are played by a test.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use kiro_core::identity::{ServiceName, SpiffeId};
use kiro_core::mesh::Mesh;
use kiro_pki::{Options, Owners, provision};
use kiro_tls::{HandshakeContext, Identity};
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;

/// What is in capitals is for [`With`] to say.
const MESH: &str = "\
trust_domain: kiro.mesh
services:
  dashboard:
    app: { port: APP, tls: TLS }
    ingress: { tls_port: 8443 }
  profile:
    app: { port: 8002 }
    endpoints: [CALLEE]
  auth:
    app: { port: 8003 }
allow:
  - { from: ingress, to: dashboard }
  - { from: dashboard, to: profile, methods: [GET], paths: [\"/profiles/*\"] }
";

pub(crate) struct Made {
    pub(crate) dir: TempDir,
    pub(crate) mesh: Mesh,
}

/// What differs between tests.
pub(crate) struct With {
    pub(crate) tls: &'static str,
    pub(crate) app: u16,
    pub(crate) callee: SocketAddr,
    pub(crate) now: OffsetDateTime,
}

impl Default for With {
    fn default() -> Self {
        Self {
            tls: "mutual",
            app: 8001,
            callee: ([127, 0, 0, 1], 15006).into(),
            now: OffsetDateTime::now_utc(),
        }
    }
}

impl Made {
    pub(crate) fn new(with: &With) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text = MESH
            .replace("APP", &with.app.to_string())
            .replace("TLS", with.tls)
            .replace("CALLEE", &format!("\"{}\"", with.callee));
        let mesh = kiro_core::mesh::parse(&text).unwrap_or_else(|problems| panic!("{problems}"));
        std::fs::create_dir_all(dir.path().join("docker/mesh")).unwrap();
        std::fs::write(dir.path().join("docker/mesh/mesh.yaml"), text).unwrap();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let owners = Some(Owners { sidecar_uid: uid, app_uid: uid, gid });
        let options = Options { owners, ..Options::at(with.now) };
        provision(&mesh, &dir.path().join("certs"), &options).unwrap();
        let env = format!("KIRO_SIDECAR_UID={uid}\nKIRO_APP_UID={uid}\nKIRO_GID={gid}\n");
        std::fs::write(dir.path().join(".env"), env).unwrap();
        Self { dir, mesh }
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// A played sidecar's address is known only when it listens, and it needs its identity for that.
    pub(crate) fn callee_moves_to(&self, callee: SocketAddr) {
        let file = self.path("docker/mesh/mesh.yaml");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace(&With::default().callee.to_string(), &callee.to_string()))
            .unwrap();
    }

    pub(crate) fn identity(&self, service: &str) -> Arc<Identity> {
        let id = SpiffeId::sidecar(&self.mesh.trust_domain, &ServiceName::parse(service).unwrap());
        Arc::new(Identity::load(&self.path("certs").join(service), &id).unwrap())
    }
}

/// What a played sidecar does with its connections.
pub(crate) enum Plays {
    /// Reads a request without TLS and answers.
    Plain(&'static str),
    /// The same over the loopback leg's mutual TLS.
    Outbound(Arc<Identity>, &'static str),
    /// Mutual TLS between sidecars, and a first frame of HTTP/2.
    Inbound(Arc<Identity>),
    /// Never answers.
    Silent,
}

/// A sidecar, and what it was asked: the request's text, after the caller's identity where there is one.
pub(crate) fn play(plays: Plays) -> (SocketAddr, Receiver<String>) {
    let (asked, seen) = channel();
    let (bound, address) = channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            bound.send(listener.local_addr().unwrap()).unwrap();
            let mut kept = Vec::new();
            loop {
                let (tcp, remote) = listener.accept().await.unwrap();
                let context = HandshakeContext {
                    service: ServiceName::parse("played").unwrap(),
                    local: None,
                    remote: Some(remote),
                    direction: "inbound",
                };
                match &plays {
                    Plays::Plain(text) => drop(asked.send(answer(tcp, text).await)),
                    Plays::Outbound(identity, text) => {
                        let server = kiro_tls::loopback_server(identity).unwrap();
                        let Ok(established) = server.accept(tcp, &context).await else { continue };
                        let caller = established.peer.unwrap();
                        drop(asked.send(format!("{caller} {}", answer(established.stream, text).await)));
                    }
                    Plays::Inbound(identity) => {
                        let server = kiro_tls::mesh_server(identity).unwrap();
                        let Ok(mut established) = server.accept(tcp, &context).await else { continue };
                        drop(asked.send(established.peer.unwrap().to_string()));
                        // An empty SETTINGS frame.
                        let _ = established.stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await;
                        let _ = established.stream.flush().await;
                        kept.push(established.stream);
                    }
                    Plays::Silent => std::future::pending().await,
                }
            }
        });
    });
    (address.recv().unwrap(), seen)
}

async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, text: &str) -> String {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !whole(&request) {
        match stream.read(&mut buffer).await {
            Ok(count @ 1..) => request.extend_from_slice(&buffer[..count]),
            _ => break,
        }
    }
    let _ = stream.write_all(text.as_bytes()).await;
    let _ = stream.shutdown().await;
    String::from_utf8(request).unwrap()
}

/// Whether a request has its head and as much body as it says.
fn whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length =
        head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
    body.len() >= length.unwrap_or(0)
}
