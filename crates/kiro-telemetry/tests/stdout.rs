//! What a program that calls `init_logging` really writes to its stdout.

use std::process::{Command, Stdio};
use std::time::Duration;

use kiro_telemetry::{Format, LogError, init_logging};
use serde_json::Value;

#[test]
#[ignore = "the program that the test below runs: a process can set up logging only once"]
fn program() {
    let sink = init_logging(Format::Json, "info,quiet=warn", Some("auth")).unwrap();
    assert!(matches!(init_logging(Format::Json, "", None), Err(LogError::AlreadySet)));
    tracing::info!(target: "loud", answer = 42, "heard");
    tracing::debug!(target: "loud", "below the level");
    tracing::info!(target: "quiet", "filtered");
    tracing::warn!(target: "quiet", "heard too");
    assert!(sink.flush(Duration::from_secs(5)));
}

#[test]
fn events_that_pass_the_filter_come_out_as_json_lines() {
    let program = std::env::current_exe().unwrap();
    let output = Command::new(program)
        .args(["--exact", "program", "--ignored", "--nocapture"])
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    // The test harness of the program has its own lines.
    let lines: Vec<Value> =
        text.lines().filter_map(|line| serde_json::from_str(&line[line.find('{')?..]).ok()).collect();
    let messages: Vec<&str> = lines.iter().map(|line| line["message"].as_str().unwrap()).collect();
    assert_eq!(messages, ["heard", "heard too"], "{text}");
    assert_eq!((&lines[0]["answer"], &lines[0]["service"]), (&Value::from(42), &Value::from("auth")));
}
