//! How are programs run so that nothing outlives this one, and an early death is told with what the dead said?

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::stop;

/// How long a program may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(12);
/// How much of a dead program's last words is shown.
const LAST_WORDS_BYTES: usize = 2_000;

/// A program that ends, with all that it started, when this is dropped.
#[derive(Debug)]
pub(crate) struct Child {
    name: String,
    inner: std::process::Child,
    stderr: PathBuf,
    /// It has ended and been waited for: its number may be somebody else's by now.
    done: bool,
}

/// Where a program's output goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// Nowhere.
    Null,
    /// To whoever takes [`Child::stdout`].
    Pipe,
}

impl Child {
    /// Starts a program in a process group of its own: a terminal's Ctrl-C reaches this program alone, which then ends the others in order.
    pub(crate) fn start(
        name: &str,
        command: &mut Command,
        output: Output,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let stderr = dir.join(format!("{name}.err"));
        let file = File::create(&stderr).with_context(|| format!("cannot write {}", stderr.display()))?;
        let stdout = match output {
            Output::Null => Stdio::null(),
            Output::Pipe => Stdio::piped(),
        };
        let inner = command
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        Ok(Self { name: name.to_owned(), inner, stderr, done: false })
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.inner.id()
    }

    /// Its output, once.
    pub(crate) fn stdout(&mut self) -> Option<ChildStdout> {
        self.inner.stdout.take()
    }

    /// An error with its last words if it has ended.
    pub(crate) fn alive(&mut self) -> anyhow::Result<()> {
        match self.inner.try_wait().with_context(|| format!("cannot ask for {}", self.name))? {
            None => Ok(()),
            Some(status) => bail!("{} has ended by itself ({status}){}", self.name, self.last_words()),
        }
    }

    /// Waits for its own end; it is an error if that is not a success.
    pub(crate) fn finish(mut self, within: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + within;
        loop {
            stop::check()?;
            match self.inner.try_wait().with_context(|| format!("cannot ask for {}", self.name))? {
                Some(status) if status.success() => {
                    self.done = true;
                    return Ok(());
                }
                Some(status) => bail!("{} failed ({status}){}", self.name, self.last_words()),
                None if Instant::now() >= end => {
                    bail!("{} did not end within {} s{}", self.name, within.as_secs(), self.last_words())
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Asks it to end and waits; what does not end in time is killed.
    pub(crate) fn stop(&mut self) -> Option<ExitStatus> {
        if self.done {
            return None;
        }
        self.done = true;
        if let Ok(Some(status)) = self.inner.try_wait() {
            // Its workers may have survived it.
            self.signal(Signal::KILL);
            return Some(status);
        }
        self.terminate();
        let end = Instant::now() + GRACE;
        while Instant::now() < end {
            match self.inner.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Err(_) => break,
            }
        }
        self.signal(Signal::KILL);
        self.inner.wait().ok()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.inner.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // It may be gone already, which is what is wanted.
            let _ = kill_process_group(pid, signal);
        }
    }

    /// The end of what it wrote to stderr, on lines of its own.
    pub(crate) fn last_words(&self) -> String {
        let text = fs::read(&self.stderr).unwrap_or_default();
        let tail = text.get(text.len().saturating_sub(LAST_WORDS_BYTES)..).unwrap_or_default();
        let tail = String::from_utf8_lossy(tail);
        if tail.trim().is_empty() { String::new() } else { format!("; it said:\n{}", tail.trim_end()) }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_early_death_is_told_with_its_last_words() {
        let dir = std::env::temp_dir().join(format!("kiro-bench-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let start = |script: &str| {
            Child::start("shell", Command::new("sh").args(["-c", script]), Output::Null, &dir).unwrap()
        };
        let error = start("echo no such luck >&2; exit 3").finish(Duration::from_secs(20)).unwrap_err();
        assert!(error.to_string().contains("no such luck") && error.to_string().contains('3'), "{error}");
        start("exit 0").finish(Duration::from_secs(20)).unwrap();
        let mut sleeper = start("sleep 60");
        sleeper.alive().unwrap();
        assert!(sleeper.stop().is_some());
        assert!(sleeper.alive().is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
