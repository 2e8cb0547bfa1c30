//! How are programs run that may hang, so that none outlives its time or this run?

use std::io::Read;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kiro_bench::stop;

/// How often a running program is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// How much of what a program says is kept: more than any log that is read here.
const OUTPUT_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// How much of a failed program's words is shown.
const LAST_WORDS_BYTES: usize = 2_000;

/// Whether a wish to stop ends the wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heed {
    /// It does: the program is killed.
    Stop,
    /// It does not: what this program does is the end, or mends something.
    Nothing,
}

/// What a program said.
#[derive(Debug)]
pub(crate) struct Said {
    /// On stdout.
    pub(crate) out: String,
    /// On stderr.
    pub(crate) err: String,
}

/// Runs a program to its end. It has a process group of its own: a terminal's Ctrl-C reaches this program alone, which then mends
/// and ends everything in order. A program that fails or takes too long is an error with its last words.
pub(crate) fn run(command: &mut Command, within: Duration, heed: Heed) -> anyhow::Result<Said> {
    let name = describe(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start `{name}`: is it installed?"))?;
    let out = child.stdout.take().map(reader);
    let err = child.stderr.take().map(reader);
    let end = Instant::now() + within;
    let status = loop {
        if let Some(status) = child.try_wait().with_context(|| format!("cannot wait for `{name}`"))? {
            break Ok(status);
        }
        let stopped = heed == Heed::Stop && stop::asked();
        if stopped || Instant::now() >= end {
            // It may have ended in this moment, which is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
            break Err(if stopped { "was interrupted".to_owned() } else { format!("took over {within:?}") });
        }
        thread::sleep(LOOK);
    };
    let text = |reader: Option<thread::JoinHandle<String>>| {
        reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
    };
    match status {
        Ok(status) if status.success() => Ok(Said { out: text(out), err: text(err) }),
        Ok(status) => bail!("`{name}` failed ({status}): {}", tail(&text(err))),
        // What it started may hold its pipes: nobody waits for those.
        Err(why) => bail!("`{name}` {why}"),
    }
}

fn reader(from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What could be read counts.
        let _ = from.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn describe(command: &Command) -> String {
    let arguments = command.get_args().map(|argument| argument.to_string_lossy());
    std::iter::once(command.get_program().to_string_lossy()).chain(arguments).collect::<Vec<_>>().join(" ")
}

fn tail(text: &str) -> &str {
    let from = text.len().saturating_sub(LAST_WORDS_BYTES);
    let from = (from..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    text.get(from..).unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, within: Duration) -> anyhow::Result<Said> {
        run(Command::new("sh").args(["-c", script]), within, Heed::Nothing)
    }

    #[test]
    fn words_and_failures() {
        let said = shell("echo good; echo well >&2", Duration::from_secs(20)).unwrap();
        assert_eq!((said.out.as_str(), said.err.as_str()), ("good\n", "well\n"));
        let failed = shell("echo no such luck >&2; exit 3", Duration::from_secs(20)).unwrap_err().to_string();
        assert!(failed.contains("no such luck") && failed.contains('3'), "{failed}");
    }

    #[test]
    fn what_does_not_end_is_ended() {
        let begin = Instant::now();
        let late = shell("sleep 60", Duration::from_millis(50)).unwrap_err().to_string();
        assert!(late.contains("took over"), "{late}");
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn last_words_end_where_letters_do() {
        let long = "ä".repeat(LAST_WORDS_BYTES);
        assert!(tail(&long).len() <= LAST_WORDS_BYTES);
        assert_eq!(tail(" short \n"), "short");
    }
}
