//! How does the demonstration run in one process: `make demo`?

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use kiro_core::identity::ServiceName;
use kiro_demo::{JaegerUi, ProxyAddress, Service, TlsMaterial, TlsSource};
use kiro_proxy::{Listen, LocalHost, MeshSource};
use kiro_telemetry::log::{Format, LogSink};
use kiro_telemetry::trace::{Sampler, ServiceInfo, Tracing};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::mesh::{LocalError, LocalMesh, MeshOptions};
use crate::tree::{Traces, draw};

/// The first of the ports that the demonstration uses, where none is given: none of them is one of the containers'.
pub const PORT_BASE: u16 = 21_000;

/// What the demonstration is started with.
#[derive(Debug)]
pub struct DemoOptions {
    /// The ingress is here, the rest in the two hundred ports above.
    pub port_base: u16,
    /// Where lines go.
    pub log: LogSink,
    /// How they are written.
    pub log_format: Format,
    /// Where finished traces are drawn, unless an OTLP endpoint is configured.
    pub draw: Option<fn(&str)>,
}

/// Why it does not start.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A sidecar does not start, or a port is taken.
    #[error(transparent)]
    Mesh(#[from] LocalError),
    /// An application's port is taken.
    #[error(
        "the {service} application can't listen on {address}: {error}; another process has the port: stop it, or choose another --port-base"
    )]
    Port {
        /// Whose.
        service: Service,
        /// Where.
        address: SocketAddr,
        /// The system's word.
        error: std::io::Error,
    },
    /// The base leaves no room.
    #[error("--port-base {0} leaves no room for the ports above it: choose one from 1024 to 65000")]
    PortBase(u16),
    /// The trace exporter can't be made.
    #[error(transparent)]
    Tracing(#[from] kiro_telemetry::trace::TracingError),
    /// Something of the demonstration's own does not hold.
    #[error("{0}")]
    Application(String),
}

/// The demonstration, running.
#[derive(Debug)]
pub struct Demo {
    mesh: LocalMesh,
    applications: Vec<JoinHandle<Result<(), kiro_demo::StartError>>>,
    shutdown: watch::Sender<bool>,
    drawing: Option<JoinHandle<()>>,
    tracings: Vec<Tracing>,
    /// The ingress.
    pub url: String,
    /// The ingress with TLS.
    pub tls_url: String,
}

/// The ports of one service, above its base.
#[derive(Debug, Clone, Copy)]
struct Ports {
    base: u16,
}

impl Ports {
    fn of(demo_base: u16, service: Service) -> Self {
        let place = match service {
            Service::Dashboard => 1,
            Service::Profile => 2,
            Service::Auth => 3,
        };
        Self { base: demo_base + 10 + place * 10 }
    }

    fn listen(self) -> Listen {
        let at = |offset| SocketAddr::new(LOOPBACK, self.base + offset);
        let local = LocalHost::with_free_ports();
        Listen { admin: at(0), outbound: at(1), inbound: at(6), health: at(7), ingress: LOOPBACK, local }
    }

    fn app(self) -> SocketAddr {
        SocketAddr::new(LOOPBACK, self.base + 8)
    }
}

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The demonstration's mesh file: that of the containers, with addresses in place of DNS.
#[must_use]
pub fn mesh_file(port_base: u16) -> String {
    let of = |service| Ports::of(port_base, service);
    let [dashboard, profile, auth] = Service::ALL.map(of);
    let line = |ports: Ports| {
        format!(
            "app: {{ port: {}, tls: mutual }}, endpoints: [\"{}\"]",
            ports.app().port(),
            ports.listen().inbound
        )
    };
    format!(
        "trust_domain: kiro.local
signatures: required
services:
  dashboard: {{ {}, ingress: {{ port: {port_base}, tls_port: {} }} }}
  profile: {{ {} }}
  auth: {{ {} }}
allow:
  - {{ from: ingress, to: dashboard }}
  - {{ from: dashboard, to: profile, methods: [GET], paths: [\"/profiles/*\"] }}
  - {{ from: dashboard, to: auth, methods: [GET], paths: [\"/sessions/*\"] }}
  - {{ from: profile, to: auth, methods: [POST], paths: [/verify] }}
",
        line(dashboard),
        port_base + 1,
        line(profile),
        line(auth),
    )
}

impl Demo {
    /// Starts sidecars and services; all are ready when this returns.
    pub async fn start(options: DemoOptions) -> Result<Self, DemoError> {
        if !(1024..=65_000).contains(&options.port_base) {
            return Err(DemoError::PortBase(options.port_base));
        }
        let traces = Traces::default();
        let spans = Spans::new(options.draw.is_some().then(|| traces.clone()));
        let mut tracings = BTreeMap::new();
        for service in Service::ALL {
            for name in [service.name().to_owned(), format!("{}-proxy", service.name())] {
                tracings.insert(name.clone(), spans.tracing(&name)?);
            }
        }
        let tracing = |name: &str| tracings.get(name).cloned().unwrap_or_else(Tracing::off);
        let places = Service::ALL
            .into_iter()
            .filter_map(|service| {
                let name = ServiceName::parse(service.name()).ok()?;
                Some((name, Ports::of(options.port_base, service).listen()))
            })
            .collect();
        let mesh = LocalMesh::start(MeshOptions {
            mesh: MeshSource::Text(mesh_file(options.port_base)),
            identities: None,
            places,
            log: options.log.clone(),
            log_format: options.log_format,
            tracing: &|service| tracing(&format!("{service}-proxy")),
            workers: 1,
            descriptors: None,
            drain_timeout: Duration::from_secs(5),
        })
        .await?;
        let (shutdown, ended) = watch::channel(false);
        let mut applications = Vec::new();
        for service in Service::ALL {
            let app =
                start_application(service, options.port_base, &mesh, tracing(service.name()), ended.clone());
            applications.push(app.await?);
        }
        let drawing =
            options.draw.filter(|_| spans.drawn()).map(|out| tokio::spawn(draw_traces(traces, out)));
        Ok(Self {
            url: format!("http://localhost:{}", options.port_base),
            tls_url: format!("https://localhost:{}", options.port_base + 1),
            mesh,
            applications,
            shutdown,
            drawing,
            tracings: tracings.into_values().collect(),
        })
    }

    /// The CA of this run, for whoever wants to check the ingress's certificate.
    #[must_use]
    pub fn ca_pem(&self) -> &[u8] {
        self.mesh.pki.authority.ca_pem()
    }

    /// Ends it in order: sidecars drain, services end, spans are flushed. True where nothing was cut.
    pub async fn stop(self) -> bool {
        let mut clean = self.mesh.stop().await;
        let _ = self.shutdown.send(true);
        for application in self.applications {
            clean &= matches!(application.await, Ok(Ok(())));
        }
        let flushed = tokio::task::spawn_blocking(move || {
            // All of them are flushed, whatever became of the others.
            let outcomes: Vec<bool> =
                self.tracings.iter().map(|tracing| tracing.shutdown(Duration::from_secs(2))).collect();
            outcomes.into_iter().all(|flushed| flushed)
        });
        clean &= flushed.await.unwrap_or(false);
        if let Some(drawing) = self.drawing {
            drawing.abort();
        }
        clean
    }
}

async fn start_application(
    service: Service,
    port_base: u16,
    mesh: &LocalMesh,
    tracing: Tracing,
    mut ended: watch::Receiver<bool>,
) -> Result<JoinHandle<Result<(), kiro_demo::StartError>>, DemoError> {
    let ports = Ports::of(port_base, service);
    let address = ports.app();
    let listener =
        TcpListener::bind(address).await.map_err(|error| DemoError::Port { service, address, error })?;
    let files = mesh
        .pki
        .apps
        .get(service.name())
        .ok_or_else(|| DemoError::Application(format!("no certificate for {service}")))?;
    let material = TlsMaterial {
        ca_pem: files.ca_pem.clone(),
        leaf_pem: files.leaf_pem.clone(),
        key_pem: files.key_pem.to_vec(),
    };
    let proxy: ProxyAddress = format!("https://{}", ports.listen().outbound)
        .parse()
        .map_err(|error| DemoError::Application(format!("{error}")))?;
    let jaeger_ui: JaegerUi =
        "http://localhost:16686".parse().map_err(|error| DemoError::Application(format!("{error}")))?;
    let options = kiro_demo::Options {
        listener,
        tls: Some(TlsSource::Memory(material)),
        proxy,
        jaeger_ui,
        tracing,
        call_timeout: service.call_timeout(),
        replica: None,
    };
    let shutdown = async move {
        let _ = ended.wait_for(|ended| *ended).await;
    };
    Ok(tokio::spawn(kiro_demo::serve(service, options, shutdown)))
}

/// Where spans go: to a collector where one is configured, else into the tree.
struct Spans {
    traces: Option<Traces>,
    collector: bool,
}

impl Spans {
    fn new(traces: Option<Traces>) -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let collector = set("OTEL_EXPORTER_OTLP_ENDPOINT") || set("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT");
        Self { traces, collector }
    }

    fn drawn(&self) -> bool {
        !self.collector
    }

    fn tracing(&self, name: &str) -> Result<Tracing, kiro_telemetry::trace::TracingError> {
        let instance = format!("local-{}", std::process::id());
        let info = ServiceInfo { name, instance_id: &instance, version: env!("CARGO_PKG_VERSION") };
        match &self.traces {
            _ if self.collector => Tracing::from_variables(&info, &|variable| {
                // One name for six processes' spans would join what the trace is to tell apart.
                if variable == "OTEL_SERVICE_NAME" { None } else { std::env::var(variable).ok() }
            }),
            Some(traces) => Tracing::with_exporter(
                traces.exporter(name),
                &info,
                Sampler::PARENT_BASED_ALWAYS_ON,
                Duration::from_millis(50),
            ),
            None => Ok(Tracing::off()),
        }
    }
}

async fn draw_traces(traces: Traces, out: fn(&str)) {
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        for trace in traces.finished() {
            out(&draw(&trace));
        }
    }
}
