//! Runs one of the three demonstration services.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use kiro_demo::{JaegerUi, Options, ProxyAddress, Service, TlsSource};
use kiro_telemetry::log::{Format, init_logging};
use kiro_telemetry::trace::Tracing;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// How long log lines and spans may take to leave at the end.
const FLUSH: Duration = Duration::from_secs(2);

/// One of Kiro's demonstration services.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Which service to be.
    service: Name,

    /// Where to listen [default: 127.0.0.1 and port 8001, 8002 or 8003].
    #[arg(long, env = "KIRO_APP_ADDR")]
    addr: Option<SocketAddr>,

    /// Directory with ca.pem, leaf.pem and leaf.key. Without it: plain HTTP.
    #[arg(long, env = "KIRO_APP_CERTS")]
    certs: Option<PathBuf>,

    /// The sidecar's outbound proxy [default: https://127.0.0.1:15001 with certificates, http://127.0.0.1:15001 without].
    #[arg(long, env = "KIRO_PROXY")]
    proxy: Option<ProxyAddress>,

    /// Where Jaeger's pages are, for the links on Dashboard's page.
    #[arg(long, env = "KIRO_JAEGER_UI", default_value = "http://localhost:16686")]
    jaeger_ui: JaegerUi,

    /// Its name among several of the same service; Profile's answers then say it.
    #[arg(long, env = "KIRO_REPLICA")]
    replica: Option<String>,

    /// Which log lines to write.
    #[arg(long, env = "KIRO_LOG", default_value = "info")]
    log: String,

    /// How they look: json or pretty.
    #[arg(long, env = "KIRO_LOG_FORMAT", default_value = "json")]
    log_format: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    Dashboard,
    Profile,
    Auth,
}

impl From<Name> for Service {
    fn from(name: Name) -> Self {
        match name {
            Name::Dashboard => Self::Dashboard,
            Name::Profile => Self::Profile,
            Name::Auth => Self::Auth,
        }
    }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let service = Service::from(arguments.service);
    let sink = init_logging(arguments.log_format, &arguments.log, Some(service.name()))?;
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "localhost".to_owned());
    let instance = format!("{host}-{}", std::process::id());
    let tracing = Tracing::from_env(service.name(), &instance, env!("CARGO_PKG_VERSION"))?;

    // One thread: a demonstration is not where a machine's cores should go.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(run(service, arguments, tracing.clone()));

    tracing.shutdown(FLUSH);
    sink.flush(FLUSH);
    result
}

async fn run(service: Service, arguments: Arguments, tracing: Tracing) -> anyhow::Result<()> {
    let Arguments { addr, certs, proxy, jaeger_ui, replica, .. } = arguments;
    // Before anything is served: a signal in between would end the process at once.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };

    let addr = addr.unwrap_or_else(|| (Ipv4Addr::LOCALHOST, service.default_port()).into());
    let listener = TcpListener::bind(addr).await.with_context(|| format!("cannot listen on {addr}"))?;
    let proxy = proxy.unwrap_or_else(|| ProxyAddress {
        tls: certs.is_some(),
        host: Ipv4Addr::LOCALHOST.to_string(),
        port: 15001,
    });
    let certificates =
        certs.as_ref().map_or_else(|| "none".to_owned(), |directory| directory.display().to_string());
    let options = Options {
        listener,
        tls: certs.map(TlsSource::Directory),
        proxy,
        jaeger_ui,
        tracing,
        call_timeout: service.call_timeout(),
        replica,
    };
    kiro_demo::serve(service, options, shutdown)
        .await
        .with_context(|| format!("cannot start {service} (certificates: {certificates})"))
}
