//! `kiro guard`: codes and signals pass through, and an application whose network has gone ends.

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::{Running, kiro, outcome, there, wait_for};

const HEADINGS: &str = "Inter-|   Receive  |  Transmit\n face |bytes    packets|bytes    packets\n";

fn list(file: &Path, names: &[&str]) {
    let lines: String = names.iter().map(|name| format!("{name:>6}: 1 2 3 4\n")).collect();
    // In one step, so that the guard never reads half a listing.
    let half = file.with_extension("half");
    std::fs::write(&half, format!("{HEADINGS}{lines}")).unwrap();
    std::fs::rename(half, file).unwrap();
}

fn shell(script: &str) -> Command {
    let mut command = kiro();
    command.args(["guard", "--", "/bin/sh", "-c", script]);
    command
}

#[test]
fn the_exit_code_is_the_commands() {
    for code in [0, 3, 255] {
        assert_eq!(outcome(&mut shell(&format!("exit {code}"))).0, Some(code));
    }
    let (killed, _, _) = outcome(&mut shell("kill -KILL $$"));
    assert_eq!(killed, Some(128 + 9));
}

#[test]
fn arguments_and_streams_are_the_commands() {
    let (code, out, _) = outcome(kiro().args(["guard", "--", "echo", "--grace-ms", "-n", "x y"]));
    assert_eq!((code, out.as_str()), (Some(0), "--grace-ms -n x y\n"));
}

#[test]
fn a_command_that_cannot_start_says_why() {
    let (code, _, said) = outcome(kiro().args(["guard", "--", "/no/such/command"]));
    assert_eq!(code, Some(127));
    assert!(said.contains("/no/such/command can't be started"), "{said}");
    let (code, _, _) = outcome(kiro().args(["guard", "--", "/dev/null"]));
    assert_eq!(code, Some(126));
}

#[test]
fn signals_reach_the_command_alone() {
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    for (signal, code) in [(Signal::TERM, 41), (Signal::INT, 42), (Signal::HUP, 43), (Signal::USR1, 44)] {
        let script = format!(
            "trap 'exit 41' TERM; trap 'exit 42' INT; trap 'exit 43' HUP; trap 'exit 44' USR1; \
             touch {}; while :; do sleep 0.05; done",
            ready.display()
        );
        let mut running = Running::start(&mut shell(&script));
        wait_for("the script has its traps", || there(&ready));
        running.send(signal);
        assert_eq!(running.end().0.code(), Some(code), "{signal:?}");
        std::fs::remove_file(&ready).unwrap();
    }
}

#[test]
fn a_command_whose_network_is_gone_is_ended_not_at_once_but_surely() {
    let dir = tempfile::tempdir().unwrap();
    let (listing, ready) = (dir.path().join("dev"), dir.path().join("ready"));
    list(&listing, &["lo", "eth0"]);
    // Deaf to SIGTERM: it has to be killed.
    let script = format!(
        "trap 'touch {}.told' TERM; touch {}; while :; do sleep 0.05; done",
        ready.display(),
        ready.display()
    );
    let mut command = kiro();
    command.args(["guard", "--interfaces"]).arg(&listing).args(["--", "/bin/sh", "-c", &script]);
    let mut running = Running::start(&mut command);
    wait_for("the script runs", || there(&ready));

    list(&listing, &["lo"]);
    let (status, took) = running.end();
    assert_eq!(status.code(), Some(75));
    assert!(there(&ready.with_extension("told")).is_some(), "it was asked first");
    // Two seconds for Docker to have the owner back, and the grace.
    assert!(took >= Duration::from_millis(2400), "{took:?}");
    assert!(took < Duration::from_secs(6), "{took:?}");
    let said = running.line();
    assert!(said.contains("network namespace is gone"), "{said}");
}

#[test]
fn a_command_that_ends_by_itself_after_its_network_has_gone_asks_to_be_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let (listing, ready) = (dir.path().join("dev"), dir.path().join("ready"));
    list(&listing, &["lo", "eth0"]);
    let script = format!("trap 'exit 0' TERM; touch {}; while :; do sleep 0.05; done", ready.display());
    let mut command = kiro();
    command
        .args(["guard", "--grace-ms", "60000", "--interfaces"])
        .arg(&listing)
        .args(["--", "/bin/sh", "-c", &script]);
    let mut running = Running::start(&mut command);
    wait_for("the script runs", || there(&ready));
    list(&listing, &["lo"]);
    assert_eq!(running.end().0.code(), Some(75), "code 0 would be a wanted end to `restart: on-failure`");
}

#[test]
fn without_a_listing_there_is_nothing_to_watch() {
    let mut command = kiro();
    command.args(["guard", "--interfaces", "/no/such/listing", "--", "sleep", "0.5"]);
    let (status, _) = Running::start(&mut command).end();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
}
