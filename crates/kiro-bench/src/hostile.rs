//! `make bench-hostile`: what does an abuser cost others, and in memory?
//!
//! A pair as `kiro-everything` has it, with one worker each, so that abuser and others share a thread. An ordinary client asks at a
//! moderate fixed rate; its p99 is taken with nobody else there, while the attacker attacks something that only reads (the control:
//! what attacker and kernel take by themselves), and under attack. Each attack has its own freshly started pair in each round, so that
//! no memory is left over from another. See [`attacks`] for what is done at which door and how hard, [`records`] for what must hold.

mod attacker;
mod attacks;
mod document;
mod keys;
mod patience;
mod records;
mod script;
mod sink;
mod verdict;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use time::OffsetDateTime;

use self::attacker::{Attacker, Target, Toll};
pub(crate) use self::attacks::{Attack, Door};
use self::keys::Keys;
use self::patience::Patience;
use self::records::{Record, Results, Round};
use self::sink::Sink;
use self::verdict::{Said, complaint, said};
use crate::app::App;
use crate::collector::Collector;
use crate::identity::{CALLEE, Identities, Issuer};
use crate::load::{Length, Loaded, Meter, h1, open_loop};
use crate::measure::FEW_SERVICES;
use crate::pairs::kiro::{Events, MeshFile, services, sum_of};
use crate::pairs::{Group, Order, Running};
use crate::plan::{Mode, Pair};
use crate::tools::Tools;
use crate::{Options, ports, procfs, say, stop};

/// The ordinary client's connections.
const CONNECTIONS: usize = 16;
/// Its requests a second: a tenth of what the pair can do on two cores.
const RATE: f64 = 1000.0;
const ROUNDS: u32 = 3;
/// With nobody else there, and in the control.
const WITHOUT: Length = Length { warm_up: Duration::from_millis(100), measured: Duration::from_millis(500) };
/// Under attack, once it is under way.
const WITH: Length = Length { warm_up: Duration::from_millis(200), measured: Duration::from_millis(1000) };
/// How long a line may take to come through the log's pipe.
const LINE: Duration = Duration::from_millis(500);
/// How long a door may take to open.
const START: Duration = Duration::from_secs(10);
/// Where the last whole run is shown.
const DOCUMENT: &str = "docs/hostile-peers.md";

/// What all measurements share.
struct Field {
    tools: Tools,
    dir: PathBuf,
    kiro_proxy: PathBuf,
    identities: Identities,
    keys: Keys,
    collector: Collector,
    app: App,
    plain: Sink,
    tls: Sink,
}

/// A pair that is about to be attacked.
struct Attacked {
    running: Running,
    inbound: SocketAddr,
    ingress: SocketAddr,
    events: Arc<Events>,
}

/// p99s of the controls of a round, and the attacker's share of a core: who sends the same to the same sink need not do so twice.
type Controls = BTreeMap<(Attack, bool), (f64, f64)>;

/// Runs, or only shows the last run again.
pub(crate) fn run(options: &Options, kiro_proxy: &Path, dir: &Path) -> anyhow::Result<()> {
    let file = dir.join("hostile.json");
    let whole = options.attacks.is_empty() && options.doors.is_empty() && !options.quick;
    let results = if options.report {
        Results::read(&file)?
    } else {
        let results = measure(options, kiro_proxy, dir)?;
        results.write(&file)?;
        results
    };
    say(&document::table(&results));
    say(&format!("written: {}", file.display()));
    if whole && !results.quick {
        document::write(&results, Path::new(DOCUMENT))?;
        say(&format!("written: {DOCUMENT}"));
    }
    Ok(())
}

fn measure(options: &Options, kiro_proxy: &Path, dir: &Path) -> anyhow::Result<Results> {
    let (began, date) = (Instant::now(), OffsetDateTime::now_utc());
    let field = Field::start(kiro_proxy, dir)?;
    let slow_pair = field.start_pair("slow")?;
    let patience = Patience::start(|door| field.target(&slow_pair, door), Arc::clone(&slow_pair.events))?;
    let asked = |one: &(Attack, Door)| {
        (options.attacks.is_empty() || options.attacks.contains(&one.0))
            && (options.doors.is_empty() || options.doors.contains(&one.1))
    };
    let cells: Vec<_> = attacks::cells().into_iter().filter(asked).collect();
    let mut rounds: Vec<Vec<Round>> = vec![Vec::new(); cells.len()];
    let count = options.rounds.unwrap_or(if options.quick { 1 } else { ROUNDS });
    for number in 1..=count {
        let mut controls = Controls::new();
        for ((attack, door), rounds) in cells.iter().zip(&mut rounds) {
            let round =
                field.round(*attack, *door, &mut controls).with_context(|| format!("{attack} at {door}"))?;
            say(&progress(*attack, *door, number, count, &round));
            rounds.push(round);
        }
    }
    let slow = patience.end()?;
    let records = cells.iter().zip(&rounds).map(|((attack, door), own)| {
        let same_door =
            cells.iter().zip(&rounds).filter(|((_, other), _)| normal_of(*other) == normal_of(*door));
        let normals: Vec<f64> =
            same_door.flat_map(|(_, rounds)| rounds).map(|round| round.p99_without_ms).collect();
        Record::of(*attack, *door, &normals, own.clone())
    });
    Ok(Results {
        machine: procfs::machine(),
        date: date.date().to_string(),
        version: crate::run::kiro_version(),
        quick: options.quick,
        rate: RATE,
        records: records.collect(),
        slow,
        seconds: began.elapsed().as_secs(),
    })
}

/// The ordinary client comes by one of two ways, whichever door is attacked.
const fn normal_of(door: Door) -> bool {
    matches!(door, Door::Ingress)
}

fn progress(attack: Attack, door: Door, number: u32, count: u32, round: &Round) -> String {
    format!(
        "{attack:<20} {door:<9} {number}/{count}  p99 {:.2} ms, control {:.2}, under attack {:.2}  {:.1} MB, then {:.1}  cut {}/{}  {}",
        round.p99_without_ms,
        round.p99_control_ms,
        round.p99_with_ms,
        round.peak_without_mb,
        round.peak_with_mb,
        round.cut,
        round.connections,
        round.complaint.as_deref().or(round.named.as_deref()).unwrap_or("-"),
    )
}

impl Field {
    fn start(kiro_proxy: &Path, dir: &Path) -> anyhow::Result<Self> {
        let dir = dir.join("hostile");
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let dir = dir.canonicalize().with_context(|| format!("cannot find {}", dir.display()))?;
        let tools = Tools::find(&dir, false)?;
        let services = services();
        let few = services.get(..FEW_SERVICES).context("fewer services than the mesh file has")?;
        let identities = Issuer::new()?.write(&dir.join("identities"), few)?;
        let keys = Keys::read(&identities)?;
        Ok(Self {
            kiro_proxy: kiro_proxy.to_owned(),
            identities,
            collector: Collector::start()?,
            app: App::start(&tools, &dir)?,
            plain: Sink::start(None)?,
            tls: Sink::start(Some(Arc::clone(&keys.server)))?,
            tools,
            dir,
            keys,
        })
    }

    /// A pair as `kiro-everything`, whose callee has an ingress, and whose log is kept.
    fn start_pair(&self, name: &str) -> anyhow::Result<Attacked> {
        let (inbound, ingress) = (ports::free()?, ports::free()?);
        let events = Arc::new(Events::default());
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let running = Running::start(&Order {
            pair: Pair::KiroEverything,
            workers: 1,
            mode: Mode::Http,
            large_bodies: false,
            group: Group::X25519MlKem768,
            app: self.app.address,
            inbound,
            dial: inbound,
            mesh: MeshFile::Doors(ingress.port()),
            identities: &self.identities,
            tools: &self.tools,
            kiro_proxy: &self.kiro_proxy,
            collector: &self.collector,
            events: Some(Arc::clone(&events)),
            dir: &dir,
        })?;
        let mut attacked = Attacked { running, inbound, ingress, events };
        h1::wait_for_answer(ingress, CALLEE, "/", START, &mut || attacked.running.alive())?;
        Ok(attacked)
    }

    fn target(&self, pair: &Attacked, door: Door) -> Target {
        let address = match door {
            Door::Outbound => pair.running.entry,
            Door::Ingress => pair.ingress,
            Door::Inbound | Door::Handshake => pair.inbound,
        };
        Target { door, address, sink: false, keys: self.keys.clone() }
    }

    fn round(&self, attack: Attack, door: Door, controls: &mut Controls) -> anyhow::Result<Round> {
        let mut pair = self.start_pair("pair")?;
        let [victim, other] = pair.pids(door)?;
        let client = if normal_of(door) { pair.ingress } else { pair.running.entry };
        // What starting took is nobody's memory any more, and the first requests have opened connections.
        ordinary(client, Length { warm_up: Duration::ZERO, measured: WITHOUT.warm_up })?;
        reset(victim)?;
        let without = ordinary(client, WITHOUT)?;
        let peak_without_mb = peak(victim)?;
        let (p99_control_ms, control_cpu) = self.control(attack, door, client, controls)?;

        let (seen, counted) = (pair.events.count(), pair.counted(door)?);
        reset(victim)?;
        reset(other)?;
        let attacking = Instant::now();
        let attacker = Attacker::start(attack, self.target(&pair, door))?;
        let under = ordinary(client, WITH);
        let (peak_with_mb, peak_other_mb) = (peak(victim)?, peak(other)?);
        let toll = attacker.end()?;
        let attacked_s = attacking.elapsed().as_secs_f64();
        let under = under.map_err(|error| pair.running.alive().err().unwrap_or(error))?;
        pair.running.alive()?;
        let said = pair.said(attack, door, &toll, seen)?;
        let counted = pair.counted(door)?.saturating_sub(counted);
        Ok(Round {
            p99_without_ms: p99(&without)?,
            p99_control_ms,
            p99_with_ms: p99(&under)?,
            peak_without_mb,
            peak_with_mb,
            peak_other_mb,
            errors: without.errors + under.errors,
            connections: toll.connections,
            cut: toll.cut,
            frames_per_second: toll.frames as f64 / attacked_s,
            counted,
            lines: said.lines,
            suppressed: said.suppressed,
            complaint: complaint(attack.expected(), toll.cut, counted, &said),
            named: said.named,
            attacker_cpu: toll.cpu.as_secs_f64() / attacked_s,
            control_cpu,
        })
    }

    /// The ordinary client's p99 while the attacker attacks a sink, and the share of a core that the attacker takes.
    fn control(
        &self,
        attack: Attack,
        door: Door,
        client: SocketAddr,
        controls: &mut Controls,
    ) -> anyhow::Result<(f64, f64)> {
        let tls = door == Door::Inbound || attack == Attack::NoLeaf;
        if let Some(known) = controls.get(&(attack, tls)) {
            return Ok(*known);
        }
        let sink = if tls { &self.tls } else { &self.plain };
        let target = Target { door, address: sink.address, sink: true, keys: self.keys.clone() };
        let began = Instant::now();
        let attacker = Attacker::start(attack, target)?;
        let loaded = ordinary(client, WITHOUT);
        let toll = attacker.end()?;
        let cpu = toll.cpu.as_secs_f64() / began.elapsed().as_secs_f64();
        let control = (p99(&loaded?)?, cpu);
        controls.insert((attack, tls), control);
        Ok(control)
    }
}

impl Attacked {
    /// The attacked sidecar's process, and the other one's.
    fn pids(&self, door: Door) -> anyhow::Result<[u32; 2]> {
        let [caller, callee] = <[u32; 2]>::try_from(self.running.roots())
            .map_err(|pids| anyhow::anyhow!("a pair of {} sidecars", pids.len()))?;
        Ok(if door == Door::Outbound { [caller, callee] } else { [callee, caller] })
    }

    /// Connections that the attacked sidecar says it has cut.
    fn counted(&self, door: Door) -> anyhow::Result<u64> {
        let watch = self.running.watch.as_ref().context("a pair without a watch")?;
        let [caller, callee] = watch.metrics()?;
        Ok(sum_of(if door == Door::Outbound { &caller } else { &callee }, "kiro_abuse_total"))
    }

    /// What the log says of it; it may be on its way.
    fn said(&self, attack: Attack, door: Door, toll: &Toll, seen: usize) -> anyhow::Result<Said> {
        let until = Instant::now() + LINE;
        loop {
            let found = said(&self.events.since(seen), attack.expected(), door, &toll.locals);
            if found.lines > 0 || Instant::now() > until {
                return Ok(found);
            }
            stop::pause(Duration::from_millis(10))?;
        }
    }
}

/// The ordinary client at work.
fn ordinary(to: SocketAddr, length: Length) -> anyhow::Result<Loaded> {
    open_loop::load(to, CALLEE, CONNECTIONS, RATE, length, &mut Meter::new(Vec::new()))
}

fn p99(loaded: &Loaded) -> anyhow::Result<f64> {
    loaded.p99_ms.context("the ordinary client got no answer at all")
}

fn reset(pid: u32) -> anyhow::Result<()> {
    procfs::reset_peak(pid).with_context(|| format!("the kernel does not reset the peak of process {pid}"))
}

fn peak(pid: u32) -> anyhow::Result<f64> {
    procfs::peak_mb(pid).with_context(|| format!("process {pid} has no peak"))
}
