//! How many instructions does a request cost in each of the two stories? A figure that repeats to a part in a hundred, where time does
//! not: a change that adds three shows in review.
//!
//! Both sidecars run under valgrind with everything on but traces, which are drawn by lot. They serve a few requests and then, started
//! anew, many; the difference is the requests' alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::child::{Child, Output};
use crate::identity::{CALLEE, CALLER};
use crate::load::h1;
use crate::pairs::kiro;
use crate::{ports, say, stop};

/// What was accepted last, in the repository.
const ACCEPTED: &str = "crates/kiro-bench/instructions.json";
/// How much more than accepted a story may take.
const TOLERANCE: f64 = 0.03;
/// Enough to fill pools and caches.
const FEW: u32 = 200;
const MANY: u32 = 1_200;
/// valgrind is some fifty times slower than the machine.
const START: Duration = Duration::from_secs(60);

/// Instructions for one request.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Instructions {
    /// At the caller's sidecar.
    outbound: u64,
    /// At the callee's.
    inbound: u64,
}

/// Counts, compares with what was accepted, and accepts if asked to.
pub(crate) fn run(
    app: std::net::SocketAddr,
    identities: &crate::identity::Identities,
    kiro_proxy: &Path,
    dir: &Path,
    accept: bool,
) -> anyhow::Result<()> {
    let count = |requests| totals(app, identities, kiro_proxy, dir, requests);
    let (few, many) = (count(FEW)?, count(MANY)?);
    let each = |few: u64, many: u64| many.saturating_sub(few) / u64::from(MANY - FEW);
    let [outbound, inbound] = [0, 1].map(|side: usize| {
        each(few.get(side).copied().unwrap_or_default(), many.get(side).copied().unwrap_or_default())
    });
    let now = Instructions { outbound, inbound };
    let accepted = fs::read_to_string(ACCEPTED).ok();
    let accepted = accepted.map(|text| serde_json::from_str::<Instructions>(&text)).transpose();
    let accepted = accepted.with_context(|| format!("{ACCEPTED} is of another version"))?;
    say(&comparison(now, accepted));
    if accept {
        let text = serde_json::to_string_pretty(&now).context("no text")? + "\n";
        return fs::write(ACCEPTED, text).with_context(|| format!("cannot write {ACCEPTED}"));
    }
    match accepted {
        Some(accepted) => judge(now, accepted).map_or(Ok(()), |reason| bail!("{reason}")),
        None => Ok(()),
    }
}

fn comparison(now: Instructions, accepted: Option<Instructions>) -> String {
    let line = |story: &str, now: u64, accepted: Option<u64>| {
        let change = accepted.filter(|accepted| *accepted > 0).map_or(String::new(), |accepted| {
            format!(", {:+.1} % of the accepted {accepted}", (now as f64 / accepted as f64 - 1.0) * 100.0)
        });
        format!("{story}: {now} instructions a request{change}")
    };
    let lines = [
        line("outbound", now.outbound, accepted.map(|accepted| accepted.outbound)),
        line("inbound ", now.inbound, accepted.map(|accepted| accepted.inbound)),
    ];
    lines.join("\n")
}

/// Why this is too much, if it is.
fn judge(now: Instructions, accepted: Instructions) -> Option<String> {
    let stories = [("outbound", now.outbound, accepted.outbound), ("inbound", now.inbound, accepted.inbound)];
    let grown =
        stories.into_iter().find(|(_, now, accepted)| *now as f64 > *accepted as f64 * (1.0 + TOLERANCE));
    grown.map(|(story, now, accepted)| {
        format!(
            "the {story} story takes {now} instructions a request, {accepted} were accepted: make it lighter, or accept it \
             with `make bench-instructions ARGS=--accept` and say in the commit what it buys"
        )
    })
}

/// Instructions of caller and callee from start to end, with this many requests between.
fn totals(
    app: std::net::SocketAddr,
    identities: &crate::identity::Identities,
    kiro_proxy: &Path,
    dir: &Path,
    requests: u32,
) -> anyhow::Result<[u64; 2]> {
    let [caller, callee] = [kiro::Addresses::free()?, kiro::Addresses::free()?];
    let mesh = dir.join("mesh");
    fs::create_dir_all(&mesh).with_context(|| format!("cannot create {}", mesh.display()))?;
    let text = kiro::MeshFile::Everything.text(crate::plan::Mode::Http, app, callee.inbound, ports::free()?);
    fs::write(mesh.join("mesh.yaml"), text).context("cannot write the mesh file")?;
    let one = |name: &str, addresses, identity: &Path| -> anyhow::Result<(Child, PathBuf)> {
        let counts = dir.join(format!("cachegrind-{name}.out"));
        // An old one must not be taken for the new one.
        let _ = fs::remove_file(&counts);
        let plain = kiro::sidecar(kiro_proxy, name, addresses, identity, &mesh, 1);
        let child =
            Child::start(&format!("valgrind-{name}"), &mut counted(&plain, &counts), Output::Null, dir)?;
        Ok((child, counts))
    };
    let mut children = [one(CALLER, caller, &identities.caller)?, one(CALLEE, callee, &identities.callee)?];
    for addresses in [caller, callee] {
        let mut alive = || children.iter_mut().try_for_each(|(child, _)| child.alive());
        h1::wait_for_answer(addresses.health, "localhost", "/ready", START, &mut alive)?;
    }
    let mut client = h1::Client::connect(caller.outbound).context("cannot connect to the sidecar")?;
    let request = h1::get(CALLEE, "/");
    for _ in 0..requests {
        stop::check()?;
        let answer = client.call(&request).context("a request failed")?;
        anyhow::ensure!(answer.status == 200, "status {} instead of 200", answer.status);
    }
    drop(client);
    let mut counted = |index: usize| -> anyhow::Result<u64> {
        let (child, counts) = children.get_mut(index).context("a pair is two sidecars")?;
        child.stop();
        let text = fs::read_to_string(&*counts)
            .with_context(|| format!("valgrind left no {}{}", counts.display(), child.last_words()))?;
        summary(&text).with_context(|| format!("{} has no summary", counts.display()))
    };
    Ok([counted(0)?, counted(1)?])
}

/// The same program under valgrind, with the same environment.
fn counted(plain: &Command, counts: &Path) -> Command {
    let mut command = Command::new("valgrind");
    command
        .env_clear()
        .args(["--quiet", "--tool=cachegrind", "--cache-sim=no", "--fair-sched=no"])
        .arg(format!("--cachegrind-out-file={}", counts.display()))
        .arg(plain.get_program());
    for (name, value) in plain.get_envs() {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

/// The first number of cachegrind's `summary:` line: instructions.
fn summary(text: &str) -> Option<u64> {
    let line = text.lines().rev().find_map(|line| line.strip_prefix("summary:"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_in_a_hundred_more_is_too_much() {
        let accepted = Instructions { outbound: 100_000, inbound: 200_000 };
        assert_eq!(judge(accepted, accepted), None);
        assert_eq!(judge(Instructions { outbound: 103_000, ..accepted }, accepted), None);
        assert!(
            judge(Instructions { outbound: 103_001, ..accepted }, accepted).unwrap().contains("outbound")
        );
        assert!(judge(Instructions { inbound: 210_000, ..accepted }, accepted).unwrap().contains("inbound"));
        assert!(comparison(accepted, Some(accepted)).contains("+0.0 %"));
    }

    #[test]
    fn cachegrinds_summary() {
        assert_eq!(summary("events: Ir\nfn=a\n1 2\nsummary: 123456\n"), Some(123_456));
        assert_eq!(summary("summary: 7 8 9\n"), Some(7));
        assert_eq!(summary("events: Ir\n"), None);
    }
}
