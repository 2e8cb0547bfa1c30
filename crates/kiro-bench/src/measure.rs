//! How is one pair measured at one work? Freshly started, warmed up, counted, and ended.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use crate::app::App;
use crate::collector::Collector;
use crate::identity::{CALLEE, Identities, Issuer};
use crate::load::handshake::Relay;
use crate::load::hello::{X25519, X25519_MLKEM768};
use crate::load::wrk::Work;
use crate::load::{Length, Loaded, Meter, grpc, handshake, idle, open_loop, tcp};
use crate::pairs::kiro::{self, MeshFile};
use crate::pairs::{Group, Order, Running};
use crate::plan::{Mode, Pair, Scenario};
use crate::stats::Measured;
use crate::tools::Tools;
use crate::{ports, stop};

/// Services of the small mesh file.
pub(crate) const FEW_SERVICES: usize = 3;

/// One thing that is measured, as often as there are rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cell {
    /// The work.
    pub(crate) scenario: Scenario,
    /// Whose proxies.
    pub(crate) pair: Pair,
    /// Threads or processes of each.
    pub(crate) workers: usize,
    /// How much is under way at a time.
    pub(crate) connections: usize,
    /// Whether Kiro gets the large mesh file.
    pub(crate) large: bool,
}

/// What all measurements share.
#[derive(Debug)]
pub(crate) struct Bench {
    tools: Tools,
    dir: PathBuf,
    kiro_proxy: PathBuf,
    few: Identities,
    many: Identities,
    collector: Collector,
    app: App,
    grpc_app: SocketAddr,
    tcp_app: SocketAddr,
    descriptors: u64,
    length: Length,
    /// Requests a second of the open loop, once it is known.
    pub(crate) rate: Option<f64>,
}

impl Bench {
    /// Makes identities and starts the applications.
    pub(crate) fn start(
        tools: Tools,
        dir: &Path,
        kiro_proxy: PathBuf,
        length: Length,
    ) -> anyhow::Result<Self> {
        let dir = dir.join("run");
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        // Programs are told of files in it, and not all of them start where this one did.
        let dir = dir.canonicalize().with_context(|| format!("cannot find {}", dir.display()))?;
        let issuer = Issuer::new()?;
        let services = kiro::services();
        let few = services.get(..FEW_SERVICES).context("fewer services than the small mesh file has")?;
        Ok(Self {
            few: issuer.write(&dir.join("identities-few"), few)?,
            many: issuer.write(&dir.join("identities-many"), &services)?,
            collector: Collector::start()?,
            app: App::start(&tools, &dir)?,
            grpc_app: grpc::start_app()?,
            tcp_app: tcp::start_app()?,
            descriptors: idle::raise_descriptors()?,
            rate: None,
            tools,
            dir,
            kiro_proxy,
            length,
        })
    }

    /// Why this pair can't be measured at this work, if it can't.
    pub(crate) fn left_out(&self, scenario: Scenario, pair: Pair) -> Option<String> {
        if let Some(reason) = scenario.left_out(pair) {
            return Some(reason.to_owned());
        }
        if !self.tools.has(pair) {
            return Some("its program is missing".to_owned());
        }
        match scenario.mode() {
            Mode::Tcp if pair == Pair::NginxH1 && self.tools.nginx_stream.is_none() => {
                Some("nginx has no stream module here (package libnginx-mod-stream)".to_owned())
            }
            mode if pair.is_kiro() => kiro::cannot(mode),
            Mode::Http | Mode::Grpc | Mode::Tcp => None,
        }
    }

    /// Measures once. What goes wrong makes it void, so that one bad round does not end a run; only an interruption is an error.
    pub(crate) fn measure(&mut self, cell: Cell) -> anyhow::Result<Measured> {
        stop::check()?;
        self.app.alive()?;
        let outcome = if cell.scenario == Scenario::Start { self.time_start(cell) } else { self.load(cell) };
        match outcome {
            Ok(measured) => Ok(measured),
            Err(error) => {
                stop::check()?;
                Ok(Measured { void: Some(format!("{error:#}")), ..Measured::default() })
            }
        }
    }

    fn load(&self, cell: Cell) -> anyhow::Result<Measured> {
        let inbound = ports::free()?;
        let new_connections = matches!(cell.scenario, Scenario::Handshake | Scenario::HandshakePq);
        let relay = if new_connections { Some(Relay::start(inbound)?) } else { None };
        let order = Order {
            pair: cell.pair,
            workers: cell.workers,
            mode: cell.scenario.mode(),
            large_bodies: matches!(cell.scenario, Scenario::Down1m | Scenario::Up1m | Scenario::TcpStream),
            group: if cell.scenario == Scenario::HandshakePq { Group::X25519MlKem768 } else { Group::X25519 },
            app: match cell.scenario.mode() {
                Mode::Http => self.app.address,
                Mode::Grpc => self.grpc_app,
                Mode::Tcp => self.tcp_app,
            },
            inbound,
            dial: relay.as_ref().map_or(inbound, |relay| relay.address),
            mesh: mesh_file(cell),
            identities: if cell.large { &self.many } else { &self.few },
            tools: &self.tools,
            kiro_proxy: &self.kiro_proxy,
            collector: &self.collector,
            events: None,
            dir: &self.dir,
        };
        let mut running = Running::start(&order)?;
        let mut meter = Meter::new(running.roots());
        let loaded = self.apply(cell, &mut running, relay.as_ref(), &mut meter).map_err(|error| {
            // A dead proxy is why its load failed.
            running.alive().err().unwrap_or(error)
        })?;
        running.alive()?;
        self.finish(running, loaded, &meter)
    }

    fn apply(
        &self,
        cell: Cell,
        running: &mut Running,
        relay: Option<&Relay>,
        meter: &mut Meter,
    ) -> anyhow::Result<Loaded> {
        let (to, connections, length) = (running.entry, cell.connections, self.length);
        match cell.scenario {
            Scenario::Small
            | Scenario::Post1k
            | Scenario::Get16k
            | Scenario::Down1m
            | Scenario::Up1m
            | Scenario::Growth => {
                Work::of(cell.scenario, &self.tools, &self.dir)?.load(to, CALLEE, connections, length, meter)
            }
            Scenario::GrpcUnary => {
                grpc::load(to, CALLEE, connections, length, meter, &mut || running.alive())
            }
            Scenario::TcpStream => tcp::load(to, connections, length, meter, &mut || running.alive()),
            Scenario::Handshake | Scenario::HandshakePq => {
                let relay = relay.context("no relay for new connections")?;
                let group = if cell.scenario == Scenario::Handshake { X25519 } else { X25519_MLKEM768 };
                handshake::load(to, CALLEE, relay, group, length, meter)
            }
            Scenario::Idle => idle::load(to, CALLEE, connections, self.descriptors, meter),
            Scenario::OpenLoop => {
                let rate = self.rate.context("the rate of the open loop is not known")?;
                open_loop::load(to, CALLEE, connections, rate, length, meter)
            }
            Scenario::Start => anyhow::bail!("a start has no load"),
        }
    }

    fn finish(&self, mut running: Running, loaded: Loaded, meter: &Meter) -> anyhow::Result<Measured> {
        let mut void = loaded.void;
        if void.is_none() && loaded.errors > 0 {
            void = Some(format!("{} errors", loaded.errors));
        }
        if let Some(watch) = running.watch.take() {
            let completed = loaded.completed + running.probes;
            let audit =
                watch.finish(&mut running.children, &self.collector, completed, loaded.cut_off_max)?;
            void = void.or_else(|| kiro::verdict(&audit));
        }
        Ok(Measured {
            requests: loaded.requests,
            errors: loaded.errors,
            seconds: loaded.seconds,
            p50_ms: loaded.p50_ms,
            p99_ms: loaded.p99_ms,
            p999_ms: loaded.p999_ms,
            cpu_us: (!meter.is_empty()).then_some(meter.cpu.as_secs_f64() * 1e6),
            rss_mb: meter.rss_mb,
            tls: loaded.tls,
            void,
        })
    }

    fn time_start(&self, cell: Cell) -> anyhow::Result<Measured> {
        let address = SocketAddr::from(([127, 0, 0, 1], 9));
        let text = mesh_file(cell).text(Mode::Http, address, address, address);
        let identities = if cell.large { &self.many } else { &self.few };
        let took = kiro::time_start(&self.kiro_proxy, &identities.caller, &text, cell.workers, &self.dir)?;
        let milliseconds = Some(took.as_secs_f64() * 1e3);
        Ok(Measured {
            requests: 1,
            seconds: took.max(Duration::from_micros(1)).as_secs_f64(),
            p50_ms: milliseconds,
            ..Measured::default()
        })
    }
}

fn mesh_file(cell: Cell) -> MeshFile {
    match (cell.scenario, cell.large, cell.pair) {
        (_, true, _) => MeshFile::Large,
        (Scenario::Growth | Scenario::Start, false, _) => MeshFile::Small,
        (_, false, Pair::KiroBare) => MeshFile::OneLine,
        (_, false, _) => MeshFile::Everything,
    }
}
