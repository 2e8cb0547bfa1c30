//! How is each thing broken, and how is it mended?

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use kiro_bench::say;
use kiro_core::identity::{ServiceName, SpiffeId};
use kiro_pki::{Authority, LeafSpec};
use rustix::process::{Pid, Signal};
use time::OffsetDateTime;

use crate::command::Heed;
use crate::mesh::{Mesh, signal};
use crate::netns::Rule;

/// How long Compose may take to stop, start or recreate a pod.
const COMPOSE: Duration = Duration::from_secs(90);
/// A slow application: it stands still for the longer, and works for the shorter of these, again and again.
const STILL: Duration = Duration::from_millis(100);
const WORKS: Duration = Duration::from_millis(20);

/// What is done to the mesh.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// A container's first process is killed. Docker starts it again.
    Kill(&'static str),
    /// A container's processes stand still, their connections open.
    Pause(&'static str),
    /// A container's processes stand still most of the time.
    Slow(&'static str),
    /// Something becomes of the packets of these pods.
    Net(Rule, &'static [&'static str]),
    /// Profile's identity is replaced by one that is not good at this time.
    Leaf(Skew),
    /// A container is stopped.
    Stop(&'static str),
    /// Whoever reads a container's stdout stands still.
    LogStalled(&'static str),
    /// A container gets a tenth of a processor.
    Starved(&'static str),
    /// A pod's containers are stopped as `docker compose stop` does it, and started again.
    ComposeStop(&'static [&'static str]),
    /// Containers are made anew.
    Recreate(&'static [&'static str]),
}

/// How a leaf's time is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Skew {
    /// It begins tomorrow.
    NotYet,
    /// It ended yesterday.
    Expired,
}

type Mending<'a> = Box<dyn FnOnce() -> anyhow::Result<()> + 'a>;

/// What is broken at this moment. It is mended when this is dropped, if not before.
pub(crate) struct Broken<'a>(Vec<Mending<'a>>);

impl<'a> Broken<'a> {
    fn nothing() -> Self {
        Self(Vec::new())
    }

    fn by(mending: impl FnOnce() -> anyhow::Result<()> + 'a) -> Self {
        Self(vec![Box::new(mending)])
    }

    /// Mends it.
    pub(crate) fn mend(mut self) -> anyhow::Result<()> {
        self.0.drain(..).try_for_each(|mending| mending())
    }
}

impl Drop for Broken<'_> {
    fn drop(&mut self) {
        for mending in self.0.drain(..) {
            if let Err(error) = mending() {
                say(&format!("could not be mended: {error:#}"));
            }
        }
    }
}

impl Fault {
    /// Whether it is over only when it is mended; else it is over by itself, or by Docker.
    pub(crate) fn lasts(self) -> bool {
        !matches!(self, Self::Kill(_) | Self::Recreate(_))
    }

    /// Why it can't be made on this machine, if it can't.
    pub(crate) fn impossible(self, mesh: &Mesh) -> Option<String> {
        let Self::Net(rule, pods) = self else { return None };
        let pod = mesh.process(&format!("{}-pod", pods.first()?));
        pod.map_or_else(|error| Some(format!("{error:#}")), |pod| rule.impossible(pod))
    }

    /// Makes it.
    pub(crate) fn make<'a>(self, mesh: &'a Mesh) -> anyhow::Result<Broken<'a>> {
        match self {
            Self::Kill(container) => {
                // As a crash: `docker kill` would count as an operator's wish and switch the restart off.
                signal(mesh.process(container)?, Signal::KILL)?;
                Ok(Broken::nothing())
            }
            Self::Pause(container) => pause(mesh.processes(container)?),
            Self::Slow(container) => Ok(slow(mesh.processes(container)?)),
            Self::Net(rule, pods) => net(mesh, rule, pods),
            Self::Leaf(skew) => leaf(mesh, skew),
            Self::Stop(container) => {
                mesh.compose(&["kill", container], COMPOSE, Heed::Stop)?;
                Ok(Broken::by(move || up(mesh, &["--no-recreate"], &[container])))
            }
            Self::LogStalled(container) => pause(vec![parent(mesh.process(container)?)?]),
            Self::Starved(container) => starve(mesh, container),
            Self::ComposeStop(containers) => {
                mesh.compose(&[&["stop"], containers].concat(), COMPOSE, Heed::Stop)?;
                Ok(Broken::by(move || up(mesh, &["--no-recreate"], containers)))
            }
            Self::Recreate(containers) => {
                up(mesh, &["--force-recreate"], containers)?;
                Ok(Broken::nothing())
            }
        }
    }
}

fn up(mesh: &Mesh, how: &[&str], containers: &[&str]) -> anyhow::Result<()> {
    let always = ["up", "--detach", "--no-build", "--no-deps", "--wait"];
    mesh.compose(&[&always, how, containers].concat(), COMPOSE, Heed::Nothing).map(|_| ())
}

fn pause<'a>(processes: Vec<Pid>) -> anyhow::Result<Broken<'a>> {
    let broken = Broken::by({
        let processes = processes.clone();
        move || all(&processes, Signal::CONT)
    });
    // Should one of them refuse, those before go on when this is dropped.
    all(&processes, Signal::STOP)?;
    Ok(broken)
}

fn all(processes: &[Pid], what: Signal) -> anyhow::Result<()> {
    processes.iter().try_for_each(|process| signal(*process, what))
}

fn slow<'a>(processes: Vec<Pid>) -> Broken<'a> {
    let over = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&over);
    let pulse = thread::spawn(move || {
        while !seen.load(Ordering::Relaxed) {
            // A process that has ended is not slow any more.
            if all(&processes, Signal::STOP).is_err() {
                break;
            }
            thread::sleep(STILL);
            let _ = all(&processes, Signal::CONT);
            thread::sleep(WORKS);
        }
        all(&processes, Signal::CONT)
    });
    Broken::by(move || {
        over.store(true, Ordering::Relaxed);
        pulse.join().map_err(|_| anyhow::anyhow!("the pulse has panicked"))?
    })
}

fn net<'a>(mesh: &'a Mesh, rule: Rule, pods: &[&str]) -> anyhow::Result<Broken<'a>> {
    let mut broken = Broken::nothing();
    for pod in pods {
        let pod = mesh.process(&format!("{pod}-pod"))?;
        rule.set(pod)?;
        broken.0.push(Box::new(move || rule.clear(pod)));
    }
    Ok(broken)
}

fn starve<'a>(mesh: &'a Mesh, container: &'static str) -> anyhow::Result<Broken<'a>> {
    let limit = move |quota: &str| {
        let mut command = std::process::Command::new("docker");
        command.args(["update", "--cpu-period", "100000", "--cpu-quota", quota, &Mesh::container(container)]);
        crate::command::run(&mut command, COMPOSE, Heed::Nothing).map(|_| ())
    };
    // The container has to be there.
    mesh.process(container)?;
    limit("10000")?;
    Ok(Broken::by(move || limit("-1")))
}

/// The process that reads what a container writes: its runtime's shim.
fn parent(process: Pid) -> anyhow::Result<Pid> {
    let stat = format!("/proc/{}/stat", process.as_raw_nonzero());
    let text = std::fs::read_to_string(&stat).with_context(|| format!("cannot read {stat}"))?;
    let parent = kiro_bench::procfs::parse_stat(&text).map(|stat| stat.parent);
    let parent = parent.and_then(|parent| i32::try_from(parent).ok()).filter(|parent| *parent > 1);
    let parent = parent.and_then(Pid::from_raw).with_context(|| format!("{stat} names no parent"))?;
    let name = format!("/proc/{}/comm", parent.as_raw_nonzero());
    let name = std::fs::read_to_string(&name).with_context(|| format!("cannot read {name}"))?;
    // To stop anything else would stop somebody who has nothing to do with this.
    anyhow::ensure!(name.starts_with("containerd-shim"), "its parent is {}, no shim", name.trim());
    Ok(parent)
}

/// Puts a leaf of the mesh's own authority in place of Profile's, good in all but its time.
fn leaf<'a>(mesh: &Mesh, skew: Skew) -> anyhow::Result<Broken<'a>> {
    let certificates = mesh.certificates();
    let authority = Authority::load(&certificates)?;
    let service = ServiceName::parse("profile").context("a name")?;
    let now = OffsetDateTime::now_utc();
    let mut spec = LeafSpec::identity(&SpiffeId::sidecar(authority.trust_domain(), &service), now);
    let day = time::Duration::days(1);
    match skew {
        Skew::NotYet => (spec.not_before, spec.not_after) = (now + day, now + 30 * day),
        Skew::Expired => (spec.not_before, spec.not_after) = (now - 2 * day, now - day),
    }
    let issued = authority.issue(&spec)?;
    let folder = certificates.join("profile");
    let files = [
        (folder.join("leaf.key"), issued.key_pem.to_vec()),
        (folder.join("leaf.pem"), issued.leaf_pem.clone()),
    ];
    let mut before = Vec::new();
    for (file, _) in &files {
        before.push((
            file.clone(),
            std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?,
        ));
    }
    let broken = Broken::by(move || put(&before));
    put(&files)?;
    Ok(broken)
}

/// Writes into files that are there, which keeps their owners and modes.
fn put(files: &[(PathBuf, Vec<u8>)]) -> anyhow::Result<()> {
    files.iter().try_for_each(|(file, bytes)| {
        std::fs::write(file, bytes).with_context(|| format!("cannot write {}", file.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn what_is_broken_is_mended_once() {
        let mended = RefCell::new(0);
        let broken = || {
            Broken::by(|| {
                *mended.borrow_mut() += 1;
                Ok(())
            })
        };
        drop(broken());
        broken().mend().unwrap();
        assert_eq!(*mended.borrow(), 2);
    }

    #[test]
    fn only_a_shim_is_a_reader() {
        let own = Pid::from_raw(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(parent(own).is_err());
    }
}
