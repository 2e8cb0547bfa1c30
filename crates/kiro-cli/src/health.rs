//! How is the mesh, as this pod's sidecar sees it?
//!
//! `kiro health` asks the sidecar's admin port and shows a table: the pod's own application, and each service with its replicas. What
//! is not well stands below it in words, and makes the exit code 1.

use std::net::SocketAddr;

use serde_json::Value;

use crate::output::{note, say};
use crate::probe;

/// Show how the mesh is, as this pod's sidecar sees it.
///
/// Run it in a sidecar's container (`docker compose exec profile-1-proxy kiro health`). A sidecar knows of a service what its calls
/// have shown: one that it has not called is `unused`. Exit codes: 0 where all is well, 1 where something is not.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The sidecar's document as it is, instead of a table.
    #[arg(long)]
    json: bool,
    /// The sidecar's admin port.
    #[arg(
        long,
        env = "KIRO_ADMIN_ADDR",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:15000",
        hide_env_values = true
    )]
    admin: SocketAddr,
}

/// Asks, shows, and gives the exit code.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let document = match probe::mesh_health(arguments.admin) {
        Ok(document) => document,
        Err(what) => {
            note(&format!("kiro health: {what}"));
            return 1;
        }
    };
    let problems = problems(&document);
    if arguments.json {
        say(&format!("{document:#}"));
    } else {
        for line in table(&document) {
            say(&line);
        }
        say("");
        for problem in &problems {
            say(&format!("NOT WELL  {problem}"));
        }
        if problems.is_empty() {
            say("all is well");
        }
    }
    u8::from(!problems.is_empty())
}

fn word<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn number(value: &Value, key: &str) -> Option<f64> {
    value.get(key).and_then(Value::as_f64)
}

fn is_true(value: &Value, key: &str) -> bool {
    value.get(key).and_then(Value::as_bool).unwrap_or_default()
}

/// States of a replica that is there for requests; one that is warming gets fewer of them.
const WELL: [&str; 2] = ["up", "warming"];

/// What is not well, one sentence each.
fn problems(document: &Value) -> Vec<String> {
    let mut problems = Vec::new();
    let (me, app) = (word(document, "service"), document.get("app").unwrap_or(&Value::Null));
    if is_true(document, "draining") {
        problems.push(format!("{me}: the sidecar drains, and takes no new connections"));
    }
    // One failed check is no state yet, and who declares none has no state to speak of.
    if word(app, "state") == "unready" {
        let (check, why) = (word(app, "check"), word(app, "last_failure"));
        let why = if why.is_empty() { "not yet passed often enough" } else { why };
        problems.push(format!("{me}: the application is unready ({check}: {why}): it gets no requests"));
    }
    for service in list(document, "services").iter().filter(|service| !is_true(service, "unused")) {
        of_service(service, &mut problems);
    }
    problems
}

fn of_service(service: &Value, problems: &mut Vec<String>) {
    let name = word(service, "name");
    let replicas = list(service, "replicas");
    match (replicas.is_empty(), word(service, "name_error")) {
        (true, "") => problems.push(format!("{name}: nobody is there")),
        (true, error) => problems.push(format!("{name}: nobody is there: {error}")),
        (false, "") => {}
        (false, error) => problems.push(format!("{name}: what is known of it is old: {error}")),
    }
    for replica in replicas.iter().filter(|replica| !WELL.contains(&word(replica, "state"))) {
        problems.push(format!("{name}: {} is {}", word(replica, "address"), word(replica, "state")));
    }
    let breaker = word(service, "breaker");
    if !matches!(breaker, "" | "closed") {
        problems.push(format!("{name}: its breaker is {breaker}: it failed too often"));
    }
}

const HEADINGS: [&str; 7] = ["SERVICE", "REPLICA", "STATE", "LATENCY", "IN FLIGHT", "FAILURES", "OUT FOR"];

fn table(document: &Value) -> Vec<String> {
    let app = document.get("app").unwrap_or(&Value::Null);
    let mut rows = vec![
        HEADINGS.map(str::to_owned).to_vec(),
        vec![word(document, "service").to_owned(), "this pod".to_owned(), own_state(document, app)],
    ];
    for service in list(document, "services") {
        let (name, replicas) = (word(service, "name"), list(service, "replicas"));
        if replicas.is_empty() {
            let state = if is_true(service, "unused") { "unused" } else { "nobody" };
            rows.push(vec![name.to_owned(), "-".to_owned(), state.to_owned()]);
        }
        rows.extend(replicas.iter().map(|replica| row(name, replica)));
    }
    aligned(&rows)
}

fn own_state(document: &Value, app: &Value) -> String {
    let state = if word(app, "check").is_empty() { "not checked" } else { word(app, "state") };
    if is_true(document, "draining") { format!("{state}, draining") } else { state.to_owned() }
}

fn row(service: &str, replica: &Value) -> Vec<String> {
    let shown = |key, show: fn(f64) -> String| number(replica, key).map_or_else(|| "-".to_owned(), show);
    vec![
        service.to_owned(),
        word(replica, "address").to_owned(),
        word(replica, "state").to_owned(),
        shown("latency_ms", |time| format!("{time:.1} ms")),
        shown("in_flight", |count| count.to_string()),
        shown("failures", |count| count.to_string()),
        shown("out_for_ms", |time| format!("{:.1} s", time / 1000.0)),
    ]
}

/// Rows of columns as lines, each column as wide as its widest cell.
fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..HEADINGS.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}
