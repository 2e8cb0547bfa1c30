//! How does the sidecar live as a process: settings from flags and environment, signals, and an orderly end?

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use kiro_core::identity::ServiceName;
use kiro_telemetry::log::{Format, LogSink, init_logging};
use kiro_telemetry::trace::Tracing;
use kiro_tls::SidecarSource;
use tokio::signal::unix::{SignalKind, signal};

use crate::memory;
use crate::pod::{PodEvent, watch_pod};
use crate::settings::{Listen, LocalHost, MeshSource, PEER_PORT, Settings, default_workers};
use crate::sidecar::{FLUSH, Sidecar};

/// Kiro's sidecar: mutual TLS, signatures, policy and traces for one service.
#[derive(Debug, Args)]
pub struct Arguments {
    /// The service that this sidecar stands beside, as the mesh file names it.
    #[arg(long, env = "KIRO_SERVICE", value_parser = service)]
    service: ServiceName,
    /// The directory with the sidecar's certificate, key and edge secrets.
    #[arg(long, env = "KIRO_IDENTITY_DIR", default_value = "/etc/kiro/identity")]
    identity_dir: PathBuf,
    /// The directory with mesh.yaml.
    #[arg(long, env = "KIRO_MESH_DIR", default_value = "/etc/kiro/mesh")]
    mesh_dir: PathBuf,
    /// Where the application's proxy listens.
    #[arg(long, env = "KIRO_OUTBOUND_ADDR", default_value_t = Listen::default().outbound)]
    outbound_addr: SocketAddr,
    /// Where other sidecars are served.
    #[arg(long, env = "KIRO_INBOUND_ADDR", default_value_t = Listen::default().inbound)]
    inbound_addr: SocketAddr,
    /// The address of the ingress; its ports are in the mesh file.
    #[arg(long, env = "KIRO_INGRESS_HOST", default_value_t = Listen::default().ingress)]
    ingress_host: IpAddr,
    /// Where the application finds tcp services, a loopback address; their ports are in the mesh file.
    #[arg(long, env = "KIRO_LOCAL_HOST", default_value = "127.0.0.1", value_parser = local_host)]
    local_host: LocalHost,
    /// Where admin listens.
    #[arg(long, env = "KIRO_ADMIN_ADDR", default_value_t = Listen::default().admin)]
    admin_addr: SocketAddr,
    /// Where health listens for others.
    #[arg(long, env = "KIRO_HEALTH_ADDR", default_value_t = Listen::default().health)]
    health_addr: SocketAddr,
    /// Where the application listens; its port is in the mesh file.
    #[arg(long, env = "KIRO_APP_HOST", default_value = "127.0.0.1")]
    app_host: IpAddr,
    /// The port of other sidecars, where the mesh file names no endpoints.
    #[arg(long, env = "KIRO_PEER_PORT", default_value_t = PEER_PORT)]
    peer_port: u16,
    /// The pod process, where the sidecar lives in its network namespace.
    #[arg(long, env = "KIRO_POD_ADDR")]
    pod_addr: Option<SocketAddr>,
    /// Threads that serve requests.
    #[arg(long, env = "KIRO_WORKERS", default_value_t = default_workers(), value_parser = workers)]
    workers: usize,
    /// How long a drain may take, in seconds.
    #[arg(long, env = "KIRO_DRAIN_TIMEOUT", default_value_t = 10, value_name = "SECONDS")]
    drain_timeout: u64,
    /// What is logged beside the access log: a tracing filter.
    #[arg(long, env = "KIRO_LOG", default_value = "info")]
    log: String,
    /// `json` or `pretty`.
    #[arg(long, env = "KIRO_LOG_FORMAT", default_value = "json")]
    log_format: Format,
}

fn service(text: &str) -> Result<ServiceName, String> {
    ServiceName::parse(text).map_err(|error| error.to_string())
}

fn local_host(text: &str) -> Result<LocalHost, String> {
    let address = text.parse().map_err(|error: std::net::AddrParseError| error.to_string())?;
    LocalHost::new(address).ok_or_else(|| {
        "not a loopback address: whoever connects there passes for the application; write 127.0.0.1"
            .to_owned()
    })
}

fn workers(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=64) => Ok(count),
        _ => Err("1 to 64 threads".to_owned()),
    }
}

/// Runs a sidecar until it is told to end.
#[must_use]
pub fn run(arguments: Arguments) -> ExitCode {
    memory::small_pages();
    let log = match init_logging(arguments.log_format, &arguments.log, Some(arguments.service.as_str())) {
        Ok(log) => log,
        Err(error) => {
            #[allow(clippy::print_stderr, reason = "there is no log to write this to")]
            {
                eprintln!("kiro-proxy: {error}");
            }
            return ExitCode::FAILURE;
        }
    };
    let outcome = until_told(arguments, log.clone());
    if let Err(error) = &outcome {
        tracing::error!(target: "kiro::start", "{error:#}");
    }
    log.flush(FLUSH);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn until_told(arguments: Arguments, log: LogSink) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the system gives no runtime")?;
    runtime.block_on(live(arguments, log))
}

async fn live(arguments: Arguments, log: LogSink) -> anyhow::Result<()> {
    // Before the start, so that a signal that comes during it is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM can't be handled")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT can't be handled")?;
    // Sidecar and application are told apart in a trace, as they are in `docker compose ps`.
    let name = format!("{}-proxy", arguments.service);
    let instance = format!("{name}-{:08x}", fastrand::u32(..));
    let tracing = Tracing::from_env(&name, &instance, env!("CARGO_PKG_VERSION"))?;
    tokio::spawn(memory::give_back());
    let pod = arguments.pod_addr;
    let sidecar = Sidecar::start(settings(arguments), tracing.clone(), log.clone()).await?;
    let pod_event = async {
        match pod {
            Some(pod) => watch_pod(pod).await,
            None => std::future::pending().await,
        }
    };
    let pod_waits = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        event = pod_event => match event {
            PodEvent::Drain(stream) => Some(stream),
            PodEvent::NamespaceGone => {
                anyhow::bail!("the pod's network namespace is gone: exiting, so that the container is started in the new one");
            }
        },
    };
    sidecar.stop().await;
    // Both at once: each may take its whole time.
    let spans = tokio::task::spawn_blocking(move || tracing.shutdown(FLUSH));
    let lines = tokio::task::spawn_blocking(move || log.flush(FLUSH));
    spans.await.context("the trace exporter did not stop")?;
    lines.await.context("the log did not stop")?;
    // Not sooner: the pod goes now, and with it the network that spans leave by; Docker then kills whoever is left.
    drop(pod_waits);
    Ok(())
}

fn settings(arguments: Arguments) -> Settings {
    Settings {
        service: arguments.service,
        identity: SidecarSource::Directory(arguments.identity_dir),
        mesh: MeshSource::Directory(arguments.mesh_dir),
        listen: Listen {
            outbound: arguments.outbound_addr,
            inbound: arguments.inbound_addr,
            ingress: arguments.ingress_host,
            local: arguments.local_host,
            admin: arguments.admin_addr,
            health: arguments.health_addr,
        },
        peer_port: arguments.peer_port,
        app_host: arguments.app_host,
        workers: arguments.workers,
        descriptors: None,
        pod: arguments.pod_addr,
        drain_timeout: Duration::from_secs(arguments.drain_timeout),
        log_format: arguments.log_format,
    }
}
