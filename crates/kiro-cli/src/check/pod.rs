//! Can this sidecar do its work, now?

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use kiro_core::identity::{ServiceName, SpiffeId};
use kiro_core::mesh::{Service, Source};
use kiro_tls::{HandshakeContext, Identity, SidecarIdentity, expiry_warning};
use time::OffsetDateTime;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::report::Report;
use super::{host, local};
use crate::place::{Own, Place};
use crate::probe;

/// Where a sidecar's own ports are, in its variables.
#[derive(Debug, clap::Args)]
pub(super) struct Ports {
    /// The sidecar's admin port.
    #[arg(
        long,
        env = "KIRO_ADMIN_ADDR",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:15000",
        hide_env_values = true
    )]
    admin: SocketAddr,
    /// The sidecar's outbound port.
    #[arg(
        long,
        env = "KIRO_OUTBOUND_ADDR",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:15001",
        hide_env_values = true
    )]
    outbound: SocketAddr,
    /// Where the application listens; its port is in the mesh file.
    #[arg(
        long,
        env = "KIRO_APP_HOST",
        value_name = "HOST",
        default_value = "127.0.0.1",
        hide_env_values = true
    )]
    app_host: IpAddr,
    /// The mesh port of other sidecars, where the mesh file names no endpoints.
    #[arg(
        long,
        env = "KIRO_PEER_PORT",
        value_name = "PORT",
        default_value_t = 15006,
        hide_env_values = true
    )]
    peer_port: u16,
}

/// How long DNS, a connect and a handshake may take, each.
const STEP: Duration = Duration::from_secs(3);

/// Looks at a running pod from within.
pub(super) async fn check(place: &Place, ports: &Ports, report: &mut Report) {
    let own = match place.own() {
        Ok(own) => own,
        Err(failure) => return report.bad(failure.what, failure.fix),
    };
    report.good(format!("mesh file: {} is one of {} services", own.name, own.mesh.services.len()));
    let identity = identity(&own, &place.identity, report);
    match probe::ask(ports.admin, "/ready") {
        Ok(word) => report.good(format!("admin {}: {word}", ports.admin)),
        Err(what) => report.bad(what, format!("read its log: `docker compose logs {}-proxy`", own.name)),
    }
    match probe::reach(ports.outbound) {
        Ok(line) => report.good(format!("outbound: {line}")),
        Err(what) => report.bad(
            format!("outbound: {what}"),
            "the sidecar is not up, or listens elsewhere (KIRO_OUTBOUND_ADDR)",
        ),
    }
    local::bound(&own, ports.admin, report);
    let app = SocketAddr::new(ports.app_host, own.service.app.port);
    match probe::reach(app) {
        Ok(line) => report.good(format!("application: {line}")),
        Err(what) => report.bad(
            format!("application: {what}"),
            format!("start it, and let it listen there: the mesh file says `app.port: {}`", app.port()),
        ),
    }
    if let Some(identity) = identity {
        for (name, service) in callees(&own) {
            callee(&own, &identity, name, service, ports.peer_port, report).await;
        }
    }
}

fn identity(own: &Own, directory: &Path, report: &mut Report) -> Option<Arc<Identity>> {
    let loaded = match SidecarIdentity::load(directory, &own.id) {
        Ok(loaded) => loaded,
        Err(error) => {
            report.bad_as_said(error);
            return None;
        }
    };
    let end = loaded.identity.facts().not_after;
    let what = format!("identity: {}, until {}", own.id, end.date());
    match expiry_warning(end, OffsetDateTime::now_utc()) {
        Some(warning) => {
            report.warn(
                format!("{what}: {} days left", warning.left.whole_days()),
                "run `make certs` on the host",
            );
        }
        None => report.good(what),
    }
    host::edges(&own.mesh, &own.name, &loaded.edges, directory, report);
    Some(loaded.identity)
}

/// The services that this one may call, each once.
fn callees(own: &Own) -> impl Iterator<Item = (&ServiceName, &Service)> {
    own.mesh.services.iter().filter(|(name, _)| {
        own.mesh
            .allow
            .iter()
            .any(|allow| allow.to == **name && allow.from == Source::Service(own.name.clone()))
    })
}

async fn callee(
    own: &Own,
    identity: &Arc<Identity>,
    name: &ServiceName,
    service: &Service,
    port: u16,
    report: &mut Report,
) {
    let addresses = if service.endpoints.is_empty() {
        match resolve(name).await {
            Ok(addresses) => addresses.into_iter().map(|address| SocketAddr::new(address, port)).collect(),
            Err(what) => {
                return report.bad(
                    format!("{name}: {what}"),
                    format!("start its pod (`docker compose up -d {name}`); its pod must have the network alias `{name}`"),
                );
            }
        }
    } else {
        service.endpoints.clone()
    };
    for address in addresses {
        match reach(own, identity, name, address).await {
            Ok(line) => report.good(line),
            Err((what, fix)) => report.bad(what, fix),
        }
    }
}

/// As the sidecar resolves: the system's DNS servers, asked directly.
async fn resolve(name: &ServiceName) -> Result<Vec<IpAddr>, String> {
    let resolver = TokioResolver::builder_tokio()
        .and_then(|builder| builder.build())
        .map_err(|error| format!("the system's DNS configuration can't be used: {error}"))?;
    let found = timeout(STEP, resolver.lookup_ip(name.as_str())).await;
    let addresses: Vec<_> = match found {
        Ok(Ok(found)) => found.iter().collect(),
        Ok(Err(error)) if error.is_no_records_found() => Vec::new(),
        Ok(Err(error)) => return Err(format!("DNS fails: {error}")),
        Err(_) => return Err(format!("DNS gives no answer within {} s", STEP.as_secs())),
    };
    if addresses.is_empty() { Err("DNS does not know the name".to_owned()) } else { Ok(addresses) }
}

async fn reach(
    own: &Own,
    identity: &Arc<Identity>,
    name: &ServiceName,
    address: SocketAddr,
) -> Result<String, (String, String)> {
    let at = format!("{name} at {address}");
    let silent =
        |what: &str| (format!("{at}: {what}"), format!("read its log: `docker compose logs {name}-proxy`"));
    let stream = match timeout(STEP, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(silent(&format!("nobody accepts connections: {error}"))),
        Err(_) => return Err(silent("no answer to a connect")),
    };
    let dialled = SpiffeId::sidecar(&own.mesh.trust_domain, name);
    let client = kiro_tls::mesh_client(identity, &dialled).map_err(|error| silent(&error.to_string()))?;
    let context = HandshakeContext {
        service: own.name.clone(),
        local: stream.local_addr().ok(),
        remote: Some(address),
        direction: "outbound",
    };
    let mut established = match timeout(STEP, client.connect(stream, &context)).await {
        Ok(Ok(established)) => established,
        Ok(Err(error)) => {
            return Err((format!("{at}: {} ({})", error.cause(), error.code()), error.fix().to_owned()));
        }
        Err(_) => return Err(silent("the TLS handshake does not end")),
    };
    // In TLS 1.3 the other side's word on our certificate comes after the handshake: its first HTTP/2 frame, or an alert.
    let mut first = [0; 1];
    match timeout(STEP, established.stream.read(&mut first)).await {
        Ok(Ok(1..)) => Ok(format!("{at}: mutual TLS with {dialled}, {}", established.tls.group)),
        Ok(Ok(0)) => Err(silent("it closes the connection after the handshake")),
        Ok(Err(error)) => {
            let code = kiro_tls::classify_io(&error).map_or("connection broken", |kind| kind.code());
            Err((
                format!("{at}: it refuses our certificate ({code})"),
                format!(
                    "its log says why, in a line `certificate refused`: `docker compose logs {name}-proxy`"
                ),
            ))
        }
        Err(_) => Err(silent("no HTTP/2 after the handshake")),
    }
}
