//! Which containers are broken? A mesh of this program's own: project name, ports, certificates and mesh file.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use kiro_bench::{say, stop};
use rustix::process::{Pid, Signal, kill_process};

use crate::command::{Heed, Said, run};
use crate::ledger::Outcome;
use crate::load::burst;

/// The Compose project.
const PROJECT: &str = "kiro-chaos";
/// Ports on loopback that nothing else of ours has: the tests in containers use 18080, a person's mesh 8080.
const HTTP_PORT: u16 = 28_080;
const HTTPS_PORT: u16 = 28_443;
const JAEGER_PORT: u16 = 28_686;

/// How long Docker may take for what it does at once.
const SHORT: Duration = Duration::from_secs(20);
/// How long containers may take to come up, with the images there.
const UP: Duration = Duration::from_secs(120);
/// How long the images may take, on a slow machine with nothing cached.
const BUILD: Duration = Duration::from_secs(3_600);
/// How long the mesh may take to be well again between two experiments: what was broken is back by then, or its promise was broken.
const WELL: Duration = Duration::from_secs(15);
/// So many requests at once that are all answered well, by all replicas, and the mesh is well.
const WELL_ANSWERS: usize = 32;
const BETWEEN_BURSTS: Duration = Duration::from_millis(200);
/// How often a mesh that is not well is made anew before an experiment has to do with what there is.
const ANEW_MAX: u32 = 2;

/// The replicas of Profile, as their answers name them.
const REPLICAS: [&str; 2] = ["profile-1", "profile-2"];

/// The mesh. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Mesh {
    /// Where its certificates and its mesh file are; Compose takes relative paths from here.
    dir: PathBuf,
    /// docker-compose.yml.
    compose_file: PathBuf,
}

impl Mesh {
    /// Makes its files below `dir`, builds what is to be built, and brings it up.
    pub(crate) fn up(dir: &Path, kiro: &Path, build: bool) -> anyhow::Result<Self> {
        let compose_file = Path::new("docker-compose.yml").canonicalize();
        let compose_file = compose_file.context("no docker-compose.yml: run this where it lies")?;
        make_files(dir, kiro)?;
        let mesh = Self { dir: dir.canonicalize().context("where are the files?")?, compose_file };
        // What an earlier run left that was killed.
        mesh.compose(&["down", "--remove-orphans", "--timeout", "2"], UP, Heed::Stop)?;
        if build {
            say("building the images");
            run(Command::new("docker").args(["compose", "build", "--quiet"]), BUILD, Heed::Stop)?;
        }
        say("bringing the mesh up");
        if let Err(error) = mesh.start_all() {
            stop::check()?;
            ensure!(mesh.answers(), "the mesh does not come up: {error:#}");
        }
        Ok(mesh)
    }

    fn start_all(&self) -> anyhow::Result<()> {
        self.compose(&["up", "--detach", "--no-build", "--wait", "--wait-timeout", "100"], UP, Heed::Stop)?;
        self.wait_until_well()
    }

    /// Runs `docker compose …` on it.
    pub(crate) fn compose(&self, arguments: &[&str], within: Duration, heed: Heed) -> anyhow::Result<Said> {
        let mut command = Command::new("docker");
        command.args(["compose", "--project-name", PROJECT, "--project-directory"]);
        command.arg(&self.dir).arg("--file").arg(&self.compose_file).args(arguments);
        for (name, port) in [
            ("KIRO_HTTP_PORT", HTTP_PORT),
            ("KIRO_HTTPS_PORT", HTTPS_PORT),
            ("KIRO_JAEGER_PORT", JAEGER_PORT),
        ] {
            command.env(name, port.to_string());
        }
        command.env("KIRO_LOG_FORMAT", "json");
        run(&mut command, within, heed)
    }

    /// Where the ingress is.
    pub(crate) fn ingress(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, HTTP_PORT).into()
    }

    /// Where Profile's identity lies.
    pub(crate) fn certificates(&self) -> PathBuf {
        self.dir.join("certs")
    }

    /// A container's full name.
    pub(crate) fn container(service: &str) -> String {
        format!("{PROJECT}-{service}-1")
    }

    /// One thing that Docker knows of a container.
    pub(crate) fn inspect(&self, service: &str, what: &str) -> anyhow::Result<String> {
        let mut command = Command::new("docker");
        command.args(["inspect", "--format", what, &Self::container(service)]);
        Ok(run(&mut command, SHORT, Heed::Nothing)?.out.trim().to_owned())
    }

    /// A container's first process, as the host numbers it.
    pub(crate) fn process(&self, service: &str) -> anyhow::Result<Pid> {
        let text = self.inspect(service, "{{.State.Pid}}")?;
        // 0 is a container that does not run.
        let pid = text.parse().ok().filter(|pid: &i32| *pid > 0).and_then(Pid::from_raw);
        pid.with_context(|| format!("{service} does not run"))
    }

    /// All processes of a container: a launcher, and what it has launched.
    pub(crate) fn processes(&self, service: &str) -> anyhow::Result<Vec<Pid>> {
        let mut command = Command::new("docker");
        command.args(["top", &Self::container(service), "-o", "pid"]);
        let said = run(&mut command, SHORT, Heed::Nothing)?;
        Ok(said.out.lines().filter_map(|line| line.trim().parse().ok()).filter_map(Pid::from_raw).collect())
    }

    /// What a container has logged since it was last started, or since `since`.
    pub(crate) fn log(&self, service: &str, since: Duration) -> anyhow::Result<String> {
        let mut command = Command::new("docker");
        let since = format!("{}s", since.as_secs() + 1);
        command.args(["logs", "--since", &since, &Self::container(service)]);
        let said = run(&mut command, SHORT, Heed::Nothing)?;
        Ok(said.out + &said.err)
    }

    /// Makes it well for the next experiment; what can't be mended in place is made anew.
    pub(crate) fn mend(&self) -> anyhow::Result<()> {
        let mut started = self.start_all();
        for _ in 0..ANEW_MAX {
            let Err(error) = &started else { break };
            stop::check()?;
            say(&format!("the mesh is made anew: {error:#}"));
            self.compose(&["down", "--remove-orphans", "--timeout", "2"], UP, Heed::Stop)?;
            started = self.start_all();
        }
        started
    }

    /// Whether anything answers: a mesh that can't be made well is no reason to give up what was found.
    pub(crate) fn answers(&self) -> bool {
        burst(self.ingress(), 1)
            .is_ok_and(|outcomes| outcomes.iter().all(|outcome| matches!(outcome, Outcome::Answered { .. })))
    }

    /// Waits until all answers are good and both replicas give some.
    fn wait_until_well(&self) -> anyhow::Result<()> {
        let end = Instant::now() + WELL;
        loop {
            let outcomes = burst(self.ingress(), WELL_ANSWERS)?;
            let is_by = |outcome: &Outcome, name: &str| matches!(outcome, Outcome::Answered { replica: Some(replica) } if replica == name);
            let good = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Answered { .. })).count();
            let seen =
                REPLICAS.into_iter().filter(|name| outcomes.iter().any(|outcome| is_by(outcome, name)));
            let seen: Vec<_> = seen.collect();
            if good == outcomes.len() && seen == REPLICAS {
                return Ok(());
            }
            if Instant::now() >= end {
                let (all, seconds, seen) = (outcomes.len(), WELL.as_secs(), seen.join(", "));
                bail!(
                    "not well after {seconds} s: of the last {all} requests {good} were answered, by [{seen}]"
                );
            }
            stop::pause(BETWEEN_BURSTS)?;
        }
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        say("taking the mesh down");
        if let Err(error) = self.compose(&["down", "--remove-orphans", "--timeout", "2"], UP, Heed::Nothing) {
            say(&format!(
                "it could not be taken down; `docker compose --project-name {PROJECT} down` does it: {error:#}"
            ));
        }
    }
}

/// A mesh file and certificates: those of a person who runs the demonstration are left alone.
fn make_files(dir: &Path, kiro: &Path) -> anyhow::Result<()> {
    let mesh_dir = dir.join("docker/mesh");
    std::fs::create_dir_all(&mesh_dir).with_context(|| format!("cannot create {}", mesh_dir.display()))?;
    let file = mesh_dir.join("mesh.yaml");
    std::fs::copy("docker/mesh/mesh.yaml", &file)
        .with_context(|| format!("cannot copy docker/mesh/mesh.yaml to {}", file.display()))?;
    let mut command = Command::new(kiro);
    command.arg("certs").arg("--mesh").arg(&file);
    command.arg("--out").arg(dir.join("certs")).arg("--env-file").arg(dir.join(".env"));
    run(&mut command, SHORT, Heed::Stop)?;
    Ok(())
}

/// Sends a signal to a process of a container.
pub(crate) fn signal(pid: Pid, signal: Signal) -> anyhow::Result<()> {
    kill_process(pid, signal).with_context(|| {
        format!(
            "process {} takes no signal: only root can crash a container's process from the host",
            pid.as_raw_nonzero()
        )
    })
}

/// Whether this process may do what the experiments do.
pub(crate) fn check_rights() -> anyhow::Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "containers' processes and namespaces are broken from the host, which only root can: run it with sudo"
    );
    Ok(())
}
