//! Who reads the log, scrapes the metrics and takes the spans while Kiro runs with everything on?

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::ChildStdout;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::audit::{Audit, sum_of};
use super::events::Events;
use crate::child::Child;
use crate::collector::Collector;
use crate::load::h1;
use crate::stop;

/// How often Prometheus would at its busiest.
const SCRAPE_EVERY: Duration = Duration::from_secs(1);
/// How long counts may take to stand still once the client has ended.
const SETTLE: Duration = Duration::from_secs(5);
/// Two looks at the counts this far apart that are alike mean that they stand still.
const SETTLED: Duration = Duration::from_millis(30);
/// What an access line has near its start.
const ACCESS: &[u8] = br#""target":"kiro::access""#;
/// The pipe's own size: a reader as quick as Docker's.
const READ_BYTES: usize = 64 * 1024;

/// Log readers and a scraper at work.
#[derive(Debug)]
pub(crate) struct Watch {
    readers: [JoinHandle<u64>; 2],
    scraper: JoinHandle<Scrapes>,
    /// The scraper ends when this is dropped.
    stop: mpsc::Sender<()>,
    admin: [SocketAddr; 2],
    spans_before: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Scrapes {
    done: u64,
    failed: u64,
    seconds: u64,
}

/// What two sidecars have counted.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
struct Counts {
    requests: [u64; 2],
    lines_lost: u64,
    spans_recorded: u64,
    spans_lost: u64,
}

impl Watch {
    /// Takes the sidecars' output and begins.
    pub(crate) fn start(
        children: &mut [Child],
        admin: [SocketAddr; 2],
        collector: &Collector,
        events: Option<&Arc<Events>>,
    ) -> anyhow::Result<Self> {
        let [caller, callee] = children else { bail!("a pair is two sidecars") };
        let reader = |child: &mut Child| -> anyhow::Result<JoinHandle<u64>> {
            let output = child.stdout().context("the sidecar's log is no pipe")?;
            let events = events.cloned();
            std::thread::Builder::new()
                .name("log".to_owned())
                .spawn(move || count_access_lines(output, events.as_deref()))
                .context("no thread for a log")
        };
        let readers = [reader(caller)?, reader(callee)?];
        let (stop, stopped) = mpsc::channel();
        let scraper = std::thread::Builder::new()
            .name("scraper".to_owned())
            .spawn(move || scrape(admin, &stopped))
            .context("no thread for the scraper")?;
        Ok(Self { readers, scraper, stop, admin, spans_before: collector.received() })
    }

    /// What both count now, as Prometheus reads it: the caller's and the callee's.
    pub(crate) fn metrics(&self) -> anyhow::Result<[String; 2]> {
        let [caller, callee] = self.admin;
        Ok([metrics(caller)?, metrics(callee)?])
    }

    /// Ends the sidecars and says what came of it.
    pub(crate) fn finish(
        self,
        children: &mut [Child],
        collector: &Collector,
        completed: u64,
        cut_off_max: u64,
    ) -> anyhow::Result<Audit> {
        drop(self.stop);
        let scrapes = joined(self.scraper, "scraper")?;
        let counts = settled(self.admin)?;
        children.iter().for_each(Child::terminate);
        for child in children {
            child.stop();
        }
        let [caller, callee] = self.readers;
        Ok(Audit {
            completed,
            cut_off_max,
            lines: [joined(caller, "log reader")?, joined(callee, "log reader")?],
            counted: counts.requests,
            lines_lost: counts.lines_lost,
            spans_recorded: counts.spans_recorded,
            spans_lost: counts.spans_lost,
            spans_received: collector.received() - self.spans_before,
            scrapes: scrapes.done,
            scrapes_failed: scrapes.failed,
            seconds: scrapes.seconds,
        })
    }
}

fn joined<T>(thread: JoinHandle<T>, what: &str) -> anyhow::Result<T> {
    thread.join().map_err(|_| anyhow::anyhow!("the {what} has panicked"))
}

fn count_access_lines(output: ChildStdout, events: Option<&Events>) -> u64 {
    let mut reader = BufReader::with_capacity(READ_BYTES, output);
    let (mut line, mut count) = (Vec::new(), 0);
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return count,
            Ok(_) => {
                let access = is_access_line(&line);
                count += u64::from(access);
                if let Some(events) = events {
                    events.note(&line, access);
                }
            }
        }
    }
}

/// A whole line of the access log. The mark stands behind the time and the level, and no client can write there.
fn is_access_line(line: &[u8]) -> bool {
    let start = line.get(..line.len().min(120)).unwrap_or_default();
    line.ends_with(b"\n") && start.windows(ACCESS.len()).any(|window| window == ACCESS)
}

fn scrape(admin: [SocketAddr; 2], stopped: &mpsc::Receiver<()>) -> Scrapes {
    let began = Instant::now();
    let mut scrapes = Scrapes::default();
    loop {
        let next = SCRAPE_EVERY * u32::try_from(scrapes.seconds + 1).unwrap_or(u32::MAX);
        match stopped.recv_timeout((began + next).saturating_duration_since(Instant::now())) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return scrapes,
        }
        scrapes.seconds += 1;
        for address in admin {
            match h1::ask(address, "localhost", "/metrics") {
                Ok(answer) if answer.status == 200 => scrapes.done += 1,
                Ok(_) | Err(_) => scrapes.failed += 1,
            }
        }
    }
}

fn metrics(admin: SocketAddr) -> anyhow::Result<String> {
    let answer = h1::ask(admin, "localhost", "/metrics")?;
    Ok(String::from_utf8_lossy(&answer.body).into_owned())
}

fn counts(admin: [SocketAddr; 2]) -> anyhow::Result<Counts> {
    let [caller, callee] = admin;
    let (caller, callee) = (metrics(caller)?, metrics(callee)?);
    let both = |name| sum_of(&caller, name) + sum_of(&callee, name);
    let requests = "kiro_requests_total";
    Ok(Counts {
        requests: [sum_of(&caller, requests), sum_of(&callee, requests)],
        lines_lost: both("kiro_log_lines_lost_total"),
        spans_recorded: both("kiro_spans_recorded_total"),
        spans_lost: both("kiro_spans_lost_total"),
    })
}

/// Requests that the client gave up are recorded when the sidecar sees that it has gone.
fn settled(admin: [SocketAddr; 2]) -> anyhow::Result<Counts> {
    let end = Instant::now() + SETTLE;
    let mut last = counts(admin)?;
    loop {
        stop::pause(SETTLED)?;
        let now = counts(admin)?;
        if now == last || Instant::now() >= end {
            return Ok(now);
        }
        last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_access_lines_count() {
        let access =
            br#"{"time":"2026-01-01T00:00:00.000000Z","level":"INFO","target":"kiro::access","service":"a"}"#;
        assert!(!is_access_line(access), "cut off");
        assert!(is_access_line(&[access.as_slice(), b"\n"].concat()));
        assert!(!is_access_line(b"{\"time\":\"x\",\"level\":\"INFO\",\"target\":\"kiro::tls\"}\n"));
        assert!(!is_access_line(b"\n"));
    }
}
