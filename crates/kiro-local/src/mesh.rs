//! How are the sidecars of any mesh file started in one process?

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kiro_core::identity::ServiceName;
use kiro_core::mesh::Mesh;
use kiro_pki::{MemoryPki, PkiError};
use kiro_proxy::{Listen, MeshSource, PEER_PORT, Settings, Sidecar, StartError, read_mesh};
use kiro_telemetry::log::{Format, LogSink};
use kiro_telemetry::trace::Tracing;
use kiro_tls::{IngressFiles, Material, SidecarFiles, SidecarSource};

/// Why a mesh does not start.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// A sidecar does not start.
    #[error("{service}: {error}")]
    Sidecar {
        /// Whose.
        service: ServiceName,
        /// Why.
        error: StartError,
    },
    /// The mesh file can't be used.
    #[error(transparent)]
    Mesh(#[from] StartError),
    /// Certificates can't be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// An identity can't be written.
    #[error("{}: {error}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// The system's word.
        error: std::io::Error,
    },
    /// The mesh file has a service for which no place was given.
    #[error("no addresses were given for `{0}`")]
    NoPlace(ServiceName),
}

/// What a mesh is started with.
pub struct MeshOptions<'a> {
    /// The mesh file. Each service's `endpoints` must be the inbound address of its place.
    pub mesh: MeshSource,
    /// Where the sidecars' identities are written, a directory each, to be renewed there; without it they stay in memory.
    pub identities: Option<PathBuf>,
    /// What each sidecar binds.
    pub places: BTreeMap<ServiceName, Listen>,
    /// Where lines go.
    pub log: LogSink,
    /// How they are written.
    pub log_format: Format,
    /// Where each sidecar's spans go.
    pub tracing: &'a dyn Fn(&ServiceName) -> Tracing,
    /// Threads of each sidecar.
    pub workers: usize,
    /// File descriptors that each sidecar may have; without it they share half of the process's, the others are for applications.
    pub descriptors: Option<u64>,
    /// How long a stop may take.
    pub drain_timeout: Duration,
}

/// Sidecars that run, and the authority that made their identities.
#[derive(Debug)]
pub struct LocalMesh {
    /// The mesh file as it was at start.
    pub mesh: Mesh,
    /// Every identity of the mesh; tests have its authority mint more.
    pub pki: MemoryPki,
    /// The sidecars.
    pub sidecars: BTreeMap<ServiceName, Sidecar>,
}

impl LocalMesh {
    /// Starts a sidecar for each service of the mesh file. They are ready when this returns.
    pub async fn start(options: MeshOptions<'_>) -> Result<Self, LocalError> {
        let mesh = read_mesh(&options.mesh)?;
        let pki = kiro_pki::in_memory(&mesh, SystemTime::now().into())?;
        let descriptors = options.descriptors.unwrap_or_else(|| share(pki.sidecars.len()));
        let mut sidecars = BTreeMap::new();
        for (service, files) in &pki.sidecars {
            let listen = options.places.get(service).ok_or_else(|| LocalError::NoPlace(service.clone()))?;
            let sidecar = start(service, files, listen.clone(), APP_HOST, descriptors, &options).await?;
            sidecars.insert(service.clone(), sidecar);
        }
        Ok(Self { mesh, pki, sidecars })
    }

    /// Starts another sidecar of a service, with the same identity: a replica. Its application listens at `app_host`, on the port that the
    /// mesh file says.
    pub async fn replica(
        &self,
        service: &ServiceName,
        listen: Listen,
        app_host: IpAddr,
        options: &MeshOptions<'_>,
    ) -> Result<Sidecar, LocalError> {
        let files = self.pki.sidecars.get(service).ok_or_else(|| LocalError::NoPlace(service.clone()))?;
        let descriptors = options.descriptors.unwrap_or_else(|| share(self.sidecars.len() + 1));
        start(service, files, listen, app_host, descriptors, options).await
    }

    /// Where a service's application finds a tcp service at this moment; none where it may not reach it, or its port can't be bound.
    #[must_use]
    pub fn local_address(&self, caller: &str, callee: &str) -> Option<SocketAddr> {
        self.sidecars.get(caller)?.local_address(callee)
    }

    /// Drains all sidecars at once; true where nothing was cut.
    pub async fn stop(self) -> bool {
        let stops: Vec<_> = self.sidecars.into_values().map(|sidecar| tokio::spawn(sidecar.stop())).collect();
        let mut clean = true;
        for stop in stops {
            clean &= stop.await.unwrap_or(false);
        }
        clean
    }
}

/// Where applications listen.
const APP_HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A sidecar's share of half of the process's descriptors.
fn share(sidecars: usize) -> u64 {
    kiro_proxy::process_descriptors() / 2 / sidecars.max(1) as u64
}

async fn start(
    service: &ServiceName,
    files: &kiro_pki::SidecarFiles,
    listen: Listen,
    app_host: IpAddr,
    descriptors: u64,
    options: &MeshOptions<'_>,
) -> Result<Sidecar, LocalError> {
    let settings = Settings {
        service: service.clone(),
        identity: match &options.identities {
            None => SidecarSource::Memory(sidecar_files(files)),
            Some(directory) => {
                let directory = directory.join(service.as_str());
                write_identity(&directory, files)?;
                SidecarSource::Directory(directory)
            }
        },
        mesh: options.mesh.clone(),
        listen,
        peer_port: PEER_PORT,
        app_host,
        workers: options.workers,
        descriptors: Some(descriptors),
        pod: None,
        drain_timeout: options.drain_timeout,
        log_format: options.log_format,
    };
    let started = Sidecar::start(settings, (options.tracing)(service), options.log.clone()).await;
    started.map_err(|error| LocalError::Sidecar { service: service.clone(), error })
}

/// Writes a sidecar's files, keys for their owner alone.
pub fn write_identity(directory: &Path, files: &kiro_pki::SidecarFiles) -> Result<(), LocalError> {
    let write = |name: &str, bytes: &[u8]| {
        let path = directory.join(name);
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let written = options.open(&path).and_then(|mut file| file.write_all(bytes));
        written.map_err(|error| LocalError::Write { path, error })
    };
    std::fs::create_dir_all(directory)
        .map_err(|error| LocalError::Write { path: directory.to_owned(), error })?;
    write("ca.pem", &files.ca_pem)?;
    write("leaf.key", &files.key_pem)?;
    write("leaf.pem", &files.leaf_pem)?;
    write("edges.json", &files.edges_json)?;
    if let Some(ingress) = &files.ingress {
        write("ingress.key", &ingress.key_pem)?;
        write("ingress.pem", &ingress.chain_pem)?;
    }
    Ok(())
}

/// A sidecar's files, as the sidecar takes them from memory.
#[must_use]
pub fn sidecar_files(files: &kiro_pki::SidecarFiles) -> SidecarFiles {
    SidecarFiles {
        material: Material {
            ca_pem: files.ca_pem.clone(),
            leaf_pem: files.leaf_pem.clone(),
            key_pem: files.key_pem.clone(),
        },
        edges_json: files.edges_json.clone(),
        ingress: files.ingress.as_ref().map(|ingress| IngressFiles {
            chain_pem: ingress.chain_pem.clone(),
            key_pem: ingress.key_pem.clone(),
        }),
    }
}
