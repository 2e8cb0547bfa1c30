//! Kiro with everything on, and Kiro bare.
//!
//! Everything: signatures required, a policy of twenty lines with paths, the JSON log into a pipe that is read, 1 % of traces to a
//! collector, metrics scraped each second. Bare: mutual TLS and identity, a policy of one line, no traces; the access log has no
//! switch, so it goes to `/dev/null`.

mod audit;
mod events;
mod mesh;
mod watch;

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

pub(crate) use self::audit::{sum_of, verdict};
pub(crate) use self::events::Events;
pub(crate) use self::mesh::{MeshFile, services};
pub(crate) use self::watch::Watch;
use super::{Order, Running, START};
use crate::child::{Child, Output};
use crate::identity::{CALLEE, CALLER};
use crate::load::h1;
use crate::plan::{Mode, Pair};
use crate::{ports, stop};

/// How often a starting sidecar is asked whether it is ready: its answer is what is timed.
const ASK_EVERY: Duration = Duration::from_micros(500);

/// One sidecar's addresses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses {
    /// For its application.
    pub(crate) outbound: SocketAddr,
    /// For other sidecars.
    pub(crate) inbound: SocketAddr,
    admin: SocketAddr,
    /// Whether it is ready.
    pub(crate) health: SocketAddr,
}

impl Addresses {
    /// That nobody has.
    pub(crate) fn free() -> anyhow::Result<Self> {
        Ok(Self {
            outbound: ports::free()?,
            inbound: ports::free()?,
            admin: ports::free()?,
            health: ports::free()?,
        })
    }
}

/// Why this build of Kiro can't do it, if it can't.
pub(crate) fn cannot(mode: Mode) -> Option<String> {
    // Three that differ, as a pod's ports must.
    let [app, dial, entry] = [20_000, 20_001, 20_002].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let text = MeshFile::OneLine.text(mode, app, dial, entry);
    let problems = kiro_core::mesh::parse(&text).err()?;
    let what = match mode {
        Mode::Http => "HTTP",
        Mode::Grpc => "gRPC",
        Mode::Tcp => "TCP",
    };
    Some(format!("this build of Kiro takes no mesh file for {what}: {problems}"))
}

/// Starts the pair.
pub(super) fn start(order: &Order<'_>, entry: SocketAddr) -> anyhow::Result<Running> {
    let everything = order.pair == Pair::KiroEverything;
    let mut caller = Addresses::free()?;
    let callee = Addresses { inbound: order.inbound, ..Addresses::free()? };
    if order.mode != Mode::Tcp {
        caller.outbound = entry;
    }
    let mesh = order.dir.join("mesh");
    std::fs::create_dir_all(&mesh).with_context(|| format!("cannot create {}", mesh.display()))?;
    let text = order.mesh.text(order.mode, order.app, order.dial, entry);
    std::fs::write(mesh.join("mesh.yaml"), text).context("cannot write the mesh file")?;

    let output = if everything { Output::Pipe } else { Output::Null };
    let one = |name: &str, addresses: Addresses, identity: &Path| {
        let mut command = sidecar(order.kiro_proxy, name, addresses, identity, &mesh, order.workers);
        if everything {
            command
                .env("KIRO_INGRESS_HOST", "127.0.0.1")
                .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", order.collector.address))
                .env("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
                .env("OTEL_TRACES_SAMPLER_ARG", "0.01");
        }
        Child::start(&format!("kiro-{name}"), &mut command, output, order.dir)
    };
    let mut children =
        vec![one(CALLER, caller, &order.identities.caller)?, one(CALLEE, callee, &order.identities.callee)?];
    let watch = if everything {
        let admin = [caller.admin, callee.admin];
        Some(Watch::start(&mut children, admin, order.collector, order.events.as_ref())?)
    } else {
        None
    };
    for health in [caller.health, callee.health] {
        let mut alive = || children.iter_mut().try_for_each(Child::alive);
        h1::wait_for_answer(health, "localhost", "/ready", START, &mut alive)?;
    }
    Ok(Running { children, entry, watch, probes: 0 })
}

/// One sidecar as a command, with its log as it comes and no traces.
pub(crate) fn sidecar(
    program: &Path,
    service: &str,
    addresses: Addresses,
    identity: &Path,
    mesh: &Path,
    workers: usize,
) -> Command {
    let mut command = Command::new(program);
    // Nothing of this process's environment decides what is measured.
    command
        .env_clear()
        .env("KIRO_SERVICE", service)
        .env("KIRO_IDENTITY_DIR", identity)
        .env("KIRO_MESH_DIR", mesh)
        .env("KIRO_OUTBOUND_ADDR", addresses.outbound.to_string())
        .env("KIRO_INBOUND_ADDR", addresses.inbound.to_string())
        .env("KIRO_ADMIN_ADDR", addresses.admin.to_string())
        .env("KIRO_HEALTH_ADDR", addresses.health.to_string())
        .env("KIRO_WORKERS", workers.to_string())
        .env("KIRO_LOG_FORMAT", "json");
    command
}

/// Starts the caller's sidecar alone and times it until it says that it is ready.
pub(crate) fn time_start(
    program: &Path,
    identity: &Path,
    text: &str,
    workers: usize,
    dir: &Path,
) -> anyhow::Result<Duration> {
    let mesh = dir.join("mesh");
    std::fs::create_dir_all(&mesh).with_context(|| format!("cannot create {}", mesh.display()))?;
    std::fs::write(mesh.join("mesh.yaml"), text).context("cannot write the mesh file")?;
    let addresses = Addresses::free()?;
    let mut command = sidecar(program, CALLER, addresses, identity, &mesh, workers);
    let began = Instant::now();
    let mut child = Child::start("kiro-start", &mut command, Output::Null, dir)?;
    loop {
        stop::check()?;
        if h1::ask(addresses.health, "localhost", "/ready").is_ok_and(|answer| answer.status == 200) {
            return Ok(began.elapsed());
        }
        child.alive()?;
        if began.elapsed() > START {
            bail!("the sidecar is not ready after {} s{}", START.as_secs(), child.last_words());
        }
        std::thread::sleep(ASK_EVERY);
    }
}
