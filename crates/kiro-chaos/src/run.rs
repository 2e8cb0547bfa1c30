//! In which order is everything done? One mesh, one experiment after the other, and between two of them the mesh is made well.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kiro_bench::{procfs, say, stop};
use rustix::process::{Signal, test_kill_process};
use time::OffsetDateTime;

use crate::Options;
use crate::experiments::{ALL, Experiment, Kind};
use crate::figures::{Figures, Times};
use crate::judge::Beside;
use crate::load::{self, Load};
use crate::mesh::{self, Mesh};
use crate::report::{self, Result as Outcome, Results, Verdict};

/// Where everything goes.
const DIR: &str = "target/chaos";
/// What is measured before anything is broken.
const BEFORE: Duration = Duration::from_secs(3);
/// How long is looked on after something was mended: what was ejected comes back with the next probe.
const AFTER: Duration = Duration::from_secs(12);
/// No load lasts longer, whatever Docker takes.
const LOAD_MAX: Duration = Duration::from_secs(180);
/// How long an overload lasts.
const OVERLOAD: Duration = Duration::from_secs(6);
/// Senders that find out what the mesh can do, and for how long.
const CAPACITY_SENDERS: usize = 32;
const CAPACITY: Duration = Duration::from_secs(4);
/// How long a container may take to end before that is a hang: above all graces.
const END_MAX: Duration = Duration::from_secs(20);
/// With more to do than this, a machine has no processor to spare for what is measured.
const LOAD_BEFORE_MAX: f64 = 1.0;
/// A mesh that is slower than this before anything is broken shares its machine with something that leaves it no time: what it then does
/// under a fault says nothing.
const P99_BEFORE_MAX_MS: f64 = 250.0;
/// How long containers are left in peace before one is told to end.
const IDLE: Duration = Duration::from_secs(2);

/// Runs, lists, or only reports; true where every promise was kept.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let dir = Path::new(DIR);
    if options.list {
        ALL.iter().for_each(|experiment| say(&format!("{:<20} {}", experiment.name, experiment.promise)));
        return Ok(true);
    }
    if options.report {
        return report::write(&Results::read(dir)?, dir, true);
    }
    let chosen = chosen(&options.only)?;
    mesh::check_rights()?;
    std::fs::create_dir_all(dir)
        .with_context(|| format!("cannot create {DIR}: run this where Cargo.toml lies"))?;
    let began = OffsetDateTime::now_utc();
    let load_before = load_average();
    if load_before > LOAD_BEFORE_MAX {
        say(&format!("the machine is busy (load average {load_before:.1}): what is found will say little"));
    }
    let mesh = Mesh::up(&dir.join("mesh"), &kiro(options)?, !options.no_build)?;
    let mut outcomes = Vec::new();
    let made = chosen.iter().try_for_each(|experiment| -> anyhow::Result<()> {
        if !outcomes.is_empty() {
            mend(&mesh)?;
        }
        let outcome = one(experiment, &mesh, options, dir)?;
        say(&report::line(&outcome));
        outcomes.push(outcome);
        Ok(())
    });
    drop(mesh);
    let results = Results {
        machine: procfs::machine(),
        date: began.date().to_string(),
        minutes: (OffsetDateTime::now_utc() - began).whole_minutes(),
        load_before,
        experiments: outcomes,
    };
    results.write(dir)?;
    // What was found before an end that nobody planned is kept, and is no whole run.
    let kept = report::write(&results, dir, options.only.is_empty() && made.is_ok())?;
    made.map(|()| kept)
}

/// Makes the mesh well. Where it can't be, but answers, the next experiment says what it misses.
fn mend(mesh: &Mesh) -> anyhow::Result<()> {
    let Err(error) = mesh.mend() else { return Ok(()) };
    stop::check()?;
    ensure!(mesh.answers(), "the mesh does not answer any more: {error:#}");
    say(&format!("the mesh can't be made well: {error:#}"));
    Ok(())
}

/// Over the last minute; nothing where the system does not say.
fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or_default()
}

fn chosen(only: &[String]) -> anyhow::Result<Vec<Experiment>> {
    for name in only {
        ensure!(
            ALL.iter().any(|experiment| experiment.name == name),
            "--only {name}: there is no such experiment; --list says which there are"
        );
    }
    let asked = |experiment: &&Experiment| only.is_empty() || only.iter().any(|name| name == experiment.name);
    Ok(ALL.iter().filter(asked).copied().collect())
}

/// Makes one. An error is one that ends the run; what goes wrong with this experiment alone is its outcome.
fn one(experiment: &Experiment, mesh: &Mesh, options: &Options, dir: &Path) -> anyhow::Result<Outcome> {
    let made = match experiment.kind {
        Kind::Fault { fault, .. } => match fault.impossible(mesh) {
            Some(why) => Ok(Outcome::without(experiment, Verdict::Skipped, why)),
            None => under_load(experiment, mesh, options, dir),
        },
        Kind::Overload => overload(experiment, mesh, dir),
        Kind::IdleStop { within_ms } => idle_stop(experiment, mesh, within_ms),
    };
    stop::check()?;
    Ok(made.unwrap_or_else(|error| Outcome::without(experiment, Verdict::Void, format!("{error:#}"))))
}

fn under_load(
    experiment: &Experiment,
    mesh: &Mesh,
    options: &Options,
    dir: &Path,
) -> anyhow::Result<Outcome> {
    let Kind::Fault { fault, seconds, rate, replica } = experiment.kind else {
        anyhow::bail!("{} has no fault", experiment.name)
    };
    let lasts = Duration::from_secs(options.seconds.unwrap_or(seconds));
    let load = Load { to: mesh.ingress(), rate: options.rate.unwrap_or(rate), lasts_max: LOAD_MAX };
    let begin = Instant::now();
    let (ledger, times) = load::run(&load, |clock| {
        clock.wait_until(BEFORE)?;
        let broken_at = clock.now();
        let broken = fault.make(mesh)?;
        clock.wait_until(clock.now() + lasts)?;
        broken.mend()?;
        let mended = clock.now();
        if fault.lasts() {
            clock.wait_until(mended + after(replica))?;
        }
        Ok(Times { broken: broken_at, mended, by_hand: fault.lasts() })
    })?;
    ledger.write(&dir.join(format!("{}.ledger.jsonl", experiment.name)))?;
    let figures = Figures::of(&ledger, times, replica);
    ensure!(figures.errors_before == 0, "{} errors before anything was broken", figures.errors_before);
    let before = figures.p99_before_ms.unwrap_or_default();
    ensure!(
        before <= P99_BEFORE_MAX_MS,
        "the machine is too busy: p99 was {before:.0} ms before anything was broken, over {P99_BEFORE_MAX_MS}"
    );
    ensure!(
        figures.share_before_percent.is_none_or(|share| share > 0.0),
        "the replica gave no answer before it was broken, so that nobody would miss it"
    );
    let logs = logs(experiment, mesh, begin.elapsed())?;
    Ok(Outcome::of(experiment, load.rate, figures, Beside { capacity: None, logs: &logs }))
}

/// How long is looked on after mending: where a replica is to come back, until it must have.
fn after(replica: Option<&str>) -> Duration {
    if replica.is_some() { AFTER } else { Duration::from_secs(2) }
}

/// What those containers have logged whose log is part of the promise.
fn logs(
    experiment: &Experiment,
    mesh: &Mesh,
    since: Duration,
) -> anyhow::Result<Vec<(&'static str, String)>> {
    let containers = experiment.expects.iter().filter_map(|expect| expect.log());
    containers.map(|container| Ok((container, mesh.log(container, since)?))).collect()
}

fn overload(experiment: &Experiment, mesh: &Mesh, dir: &Path) -> anyhow::Result<Outcome> {
    let capacity = load::capacity(mesh.ingress(), CAPACITY_SENDERS, CAPACITY)?;
    ensure!(capacity > 0, "the mesh can do nothing");
    let load = Load { to: mesh.ingress(), rate: capacity.saturating_mul(3), lasts_max: LOAD_MAX };
    let (ledger, times) = load::run(&load, |clock| {
        clock.wait_until(OVERLOAD)?;
        Ok(Times { broken: Duration::ZERO, mended: clock.now(), by_hand: false })
    })?;
    ledger.write(&dir.join(format!("{}.ledger.jsonl", experiment.name)))?;
    let figures = Figures::of(&ledger, times, None);
    Ok(Outcome::of(experiment, load.rate, figures, Beside { capacity: Some(capacity), logs: &[] }))
}

/// Tells an application, a sidecar and a pod to end, each of which has connections open and nothing to do.
fn idle_stop(experiment: &Experiment, mesh: &Mesh, within_ms: f64) -> anyhow::Result<Outcome> {
    let mut took = Vec::new();
    for container in ["profile-1", "profile-1-proxy", "profile-1-pod"] {
        mesh.mend()?;
        stop::pause(IDLE)?;
        let process = mesh.process(container)?;
        let begin = Instant::now();
        mesh::signal(process, Signal::TERM)?;
        while test_kill_process(process).is_ok() {
            ensure!(begin.elapsed() < END_MAX, "{container} did not end within {} s", END_MAX.as_secs());
            std::thread::sleep(Duration::from_millis(1));
        }
        took.push((container, begin.elapsed().as_secs_f64() * 1e3));
    }
    Ok(Outcome::stops(experiment, &took, within_ms))
}

fn kiro(options: &Options) -> anyhow::Result<PathBuf> {
    let file = match &options.kiro {
        Some(file) => file.clone(),
        None => std::env::current_exe().context("where is this program?")?.with_file_name("kiro"),
    };
    file.canonicalize().with_context(|| {
        format!("no kiro command at {}: `cargo build --package kiro-cli` makes it", file.display())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_asked_for() {
        assert_eq!(chosen(&[]).unwrap().len(), ALL.len());
        let one = chosen(&["kill-proxy".to_owned()]).unwrap();
        assert_eq!(one.iter().map(|experiment| experiment.name).collect::<Vec<_>>(), ["kill-proxy"]);
        assert!(chosen(&["kill-everything".to_owned()]).unwrap_err().to_string().contains("--list"));
    }

    #[test]
    fn a_load_outlasts_what_is_looked_for() {
        for experiment in ALL {
            let Kind::Fault { seconds, .. } = experiment.kind else { continue };
            let lasts = BEFORE + Duration::from_secs(seconds) + AFTER;
            assert!(lasts < LOAD_MAX, "{}", experiment.name);
        }
    }
}
