//! How is a sidecar run under callgrind, and what did its serving thread count?

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::load::h1;
use crate::stop;

/// How long a command may take to be heard.
const HEARD: Duration = Duration::from_secs(60);
/// Between two questions that keep the sidecar at work.
const BETWEEN: Duration = Duration::from_millis(20);

/// valgrind, found.
#[derive(Debug)]
pub(super) struct Callgrind {
    version: String,
}

impl Callgrind {
    /// Looks for it; the error says where it is had.
    pub(super) fn find() -> anyhow::Result<Self> {
        let asked = Command::new("valgrind").arg("--version").output();
        let Ok(output) = asked else {
            bail!(
                "no valgrind: `apt-get install valgrind`, `dnf install valgrind` or `apk add valgrind` installs it; macOS has none for \
                 today's processors, so use Linux or a container there"
            );
        };
        Ok(Self { version: String::from_utf8_lossy(&output.stdout).trim().to_owned() })
    }

    pub(super) fn version(&self) -> &str {
        &self.version
    }

    /// The same program with the same environment under callgrind, which leaves a file a thread.
    pub(super) fn command(&self, plain: &Command, counts: &Path) -> anyhow::Result<Command> {
        for old in threads(counts)? {
            // An old one must not be taken for a new one.
            std::fs::remove_file(&old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
        let mut command = Command::new("valgrind");
        command
            .env_clear()
            .args(["--quiet", "--tool=callgrind", "--separate-threads=yes", "--fair-sched=try"])
            .arg(format!("--callgrind-out-file={}", counts.display()))
            .arg(plain.get_program())
            .args(plain.get_args());
        for (name, value) in plain.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        Ok(command)
    }
}

/// A sidecar under callgrind, told when to begin and to end by valgrind's own `vgdb`: without ptrace, which not every container
/// allows, so the sidecar has to be kept at work meanwhile, on another thread than the one that counts.
#[derive(Debug)]
pub(super) struct Counted<'a> {
    pub(super) pid: u32,
    pub(super) health: SocketAddr,
    pub(super) counts: &'a Path,
}

impl Counted<'_> {
    /// From here on everything counts.
    pub(super) fn begin(&self) -> anyhow::Result<()> {
        self.tell("zero")
    }

    /// Instructions since the beginning, of the thread that has the most of them: the one that serves.
    pub(super) fn end(&self) -> anyhow::Result<u64> {
        self.tell("dump")?;
        let mut most = 0;
        for file in threads(self.counts)? {
            let text =
                std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            most = most.max(total(&text).with_context(|| format!("{} has no total", file.display()))?);
        }
        anyhow::ensure!(most > 0, "callgrind left no {}-*", dumped(self.counts));
        Ok(most)
    }

    fn tell(&self, word: &str) -> anyhow::Result<()> {
        let mut vgdb = Command::new("vgdb")
            .args(["--max-invoke-ms=0", "--wait=10"])
            .arg(format!("--pid={}", self.pid))
            .arg(word)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("no vgdb, which comes with valgrind")?;
        let end = Instant::now() + HEARD;
        loop {
            // Valgrind looks for commands between instructions, so there have to be some.
            let _ = h1::ask(self.health, "localhost", "/live");
            match vgdb.try_wait().context("vgdb")? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("vgdb can't tell process {} to {word} ({status})", self.pid),
                None if Instant::now() < end => stop::pause(BETWEEN)?,
                None => {
                    let _ = vgdb.kill();
                    let _ = vgdb.wait();
                    bail!("process {} does not {word} when vgdb says so", self.pid);
                }
            }
        }
    }
}

/// What the names of the files begin with that `dump` writes.
fn dumped(counts: &Path) -> String {
    format!("{}.1", counts.display())
}

/// The files of a count, one for each thread: `<counts>.1-01` and so on, beside which lie those of the sidecar's end.
fn threads(counts: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let (Some(dir), Some(name)) = (counts.parent(), counts.file_name().and_then(|name| name.to_str())) else {
        bail!("{} is no file", counts.display());
    };
    let prefix = format!("{name}.1-");
    let entries = std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let ours = entries.flatten().map(|entry| entry.path()).filter(|path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&prefix))
    });
    Ok(ours.collect())
}

/// The first number of callgrind's `totals:` line: instructions.
fn total(text: &str) -> Option<u64> {
    let line = text.lines().rev().find_map(|line| line.strip_prefix("totals:"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callgrinds_total() {
        assert_eq!(total("events: Ir\nfn=(1) a\n1 2\n\ntotals: 123456\n"), Some(123_456));
        assert_eq!(total("totals: 7 8 9\n"), Some(7));
        assert_eq!(total("events: Ir\n"), None);
    }
}
