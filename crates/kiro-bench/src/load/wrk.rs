//! Closed-loop HTTP/1.1 load: each connection sends its next request when the answer to the last one is there. By wrk, with one thread.

use std::fs;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use serde::Deserialize;

use super::{Length, Loaded, Meter};
use crate::child::{Child, Output};
use crate::plan::Scenario;
use crate::stop;
use crate::tools::Tools;

/// How long before its end a run is looked at: its connections are still at work.
const LOOK_BEFORE_END: Duration = Duration::from_millis(150);
/// How much longer than asked wrk may take.
const LATE: Duration = Duration::from_secs(20);

/// What one run found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct Summary {
    /// Answers.
    pub(crate) requests: u64,
    /// From the first connect to the end.
    pub(crate) duration_us: u64,
    connect: u64,
    read: u64,
    write: u64,
    status: u64,
    timeout: u64,
    /// Half of the answers came within.
    pub(crate) p50_us: u64,
    /// 99 of a hundred.
    pub(crate) p99_us: u64,
    /// 999 of a thousand.
    pub(crate) p999_us: u64,
}

impl Summary {
    /// Everything that went wrong.
    pub(crate) fn errors(&self) -> u64 {
        self.connect + self.read + self.write + self.status + self.timeout
    }
}

/// wrk's own report has no 99.9 %, so a script prints what we want.
const MARK: &str = "kiro-bench ";
const DONE: &str = r#"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('kiro-bench {"requests":%.0f,"duration_us":%.0f,"connect":%.0f,"read":%.0f,"write":%.0f,"status":%.0f,"timeout":%.0f,"p50_us":%.0f,"p99_us":%.0f,"p999_us":%.0f}\n',
    summary.requests, summary.duration, e.connect, e.read, e.write, e.status, e.timeout,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
"#;

/// One kind of request.
#[derive(Debug, Clone)]
pub(crate) struct Work {
    wrk: PathBuf,
    script: PathBuf,
    path: &'static str,
    dir: PathBuf,
}

impl Work {
    /// The requests of a scenario.
    pub(crate) fn of(scenario: Scenario, tools: &Tools, dir: &Path) -> anyhow::Result<Self> {
        let (path, body_bytes) = match scenario {
            Scenario::Post1k => ("/post", 1 << 10),
            Scenario::Up1m => ("/post", 1 << 20),
            Scenario::Get16k => ("/16k", 0),
            Scenario::Down1m => ("/1m", 0),
            Scenario::Small
            | Scenario::GrpcUnary
            | Scenario::TcpStream
            | Scenario::Handshake
            | Scenario::HandshakePq
            | Scenario::Idle
            | Scenario::OpenLoop
            | Scenario::Growth
            | Scenario::Start => ("/", 0),
        };
        let script = dir.join(format!("wrk-{body_bytes}.lua"));
        let method = if body_bytes > 0 {
            format!("wrk.method = \"POST\"\nwrk.body = string.rep(\"x\", {body_bytes})\n")
        } else {
            String::new()
        };
        fs::write(&script, method + DONE).with_context(|| format!("cannot write {}", script.display()))?;
        Ok(Self { wrk: tools.wrk.clone(), script, path, dir: dir.to_owned() })
    }

    /// Warms up, then counts.
    pub(crate) fn load(
        &self,
        to: SocketAddr,
        host: &str,
        connections: usize,
        length: Length,
        meter: &mut Meter,
    ) -> anyhow::Result<Loaded> {
        let warm = self.run(to, host, connections, length.warm_up, &mut || {})?;
        meter.begin();
        let counted = self.run(to, host, connections, length.measured, &mut || meter.look())?;
        meter.end();
        let milliseconds = |us: u64| (counted.requests > 0).then_some(us as f64 / 1e3);
        Ok(Loaded {
            requests: counted.requests,
            errors: warm.errors() + counted.errors(),
            seconds: counted.duration_us as f64 / 1e6,
            p50_ms: milliseconds(counted.p50_us),
            p99_ms: milliseconds(counted.p99_us),
            p999_ms: milliseconds(counted.p999_us),
            completed: warm.requests + counted.requests,
            cut_off_max: 2 * connections as u64,
            ..Loaded::default()
        })
    }

    /// Runs it; `look` is called shortly before the end.
    fn run(
        &self,
        to: SocketAddr,
        host: &str,
        connections: usize,
        length: Duration,
        look: &mut dyn FnMut(),
    ) -> anyhow::Result<Summary> {
        // Whole seconds are all that wrk takes.
        let seconds = length.as_secs().max(1);
        let mut command = Command::new(&self.wrk);
        command
            .args(["-t1", &format!("-c{connections}"), &format!("-d{seconds}s"), "--latency", "-s"])
            .arg(&self.script)
            .args(["-H", &format!("Host: {host}"), &format!("http://{to}{}", self.path)]);
        let mut child = Child::start("wrk", &mut command, Output::Pipe, &self.dir)?;
        let mut output = child.stdout().context("wrk has no output")?;
        stop::pause(Duration::from_secs(seconds).saturating_sub(LOOK_BEFORE_END))?;
        look();
        // It says a page at most, which a pipe holds.
        child.finish(LATE)?;
        let mut text = String::new();
        output.read_to_string(&mut text).context("cannot read wrk's output")?;
        parse(&text)
    }
}

/// Finds the script's line.
fn parse(text: &str) -> anyhow::Result<Summary> {
    let line = text.lines().find_map(|line| line.strip_prefix(MARK));
    let line = line.with_context(|| format!("wrk printed no summary:\n{}", text.trim()))?;
    serde_json::from_str(line).with_context(|| format!("wrk's summary is not what its script writes: {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scripts_line_among_wrks_own() {
        let text = "Running 1s test @ http://127.0.0.1:1/\n  1 threads and 32 connections\n\
            kiro-bench {\"requests\":1000,\"duration_us\":1000200,\"connect\":1,\"read\":2,\"write\":3,\"status\":4,\
            \"timeout\":5,\"p50_us\":300,\"p99_us\":900,\"p999_us\":1500}\n";
        let summary = parse(text).unwrap();
        assert_eq!((summary.requests, summary.errors(), summary.p999_us), (1000, 15, 1500));
    }

    #[test]
    fn another_output_is_an_error_that_shows_it() {
        let error = parse("unable to connect to 127.0.0.1:1 Connection refused").unwrap_err().to_string();
        assert!(error.contains("Connection refused"), "{error}");
        assert!(parse("kiro-bench {\"requests\":-1}").is_err());
    }
}
