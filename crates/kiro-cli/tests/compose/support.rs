//! Docker, Compose and curl, as a person would use them.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Every pod by its application's container: Profile has two.
pub(crate) const PODS: [&str; 4] = ["dashboard", "profile-1", "profile-2", "auth"];

/// The service that a pod is a replica of: its identity and its name in the mesh.
pub(crate) fn service(pod: &str) -> &str {
    pod.trim_end_matches(|end: char| end == '-' || end.is_ascii_digit())
}

/// The containers of a pod, the owner of its namespace first.
pub(crate) fn containers(pod: &str) -> [String; 3] {
    [format!("{pod}-pod"), format!("{pod}-proxy"), pod.to_owned()]
}

pub(crate) fn every_container() -> Vec<String> {
    PODS.iter().flat_map(|pod| containers(pod)).collect()
}

/// What a command made of it.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) said: String,
}

#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&str]) -> Ran {
    let mut command = Command::new(program);
    // Where docker-compose.yml is.
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let output = command.args(arguments).stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ran { code: output.status.code(), out: text(&output.stdout), said: text(&output.stderr) }
}

#[track_caller]
pub(crate) fn must(program: &str, arguments: &[&str]) -> String {
    let Ran { code, out, said } = run(program, arguments);
    assert_eq!(code, Some(0), "{program} {arguments:?}\n{out}{said}");
    out
}

/// `kiro …` in a container.
#[track_caller]
pub(crate) fn kiro(container: &str, arguments: &[&str]) -> Ran {
    run("docker", &[&["compose", "exec", "-T", container, "kiro"], arguments].concat())
}

/// A container's id, which stays through its restarts.
#[track_caller]
pub(crate) fn id(container: &str) -> String {
    must("docker", &["compose", "ps", "--all", "--quiet", container]).trim().to_owned()
}

#[track_caller]
pub(crate) fn inspect(container: &str) -> Value {
    let all: Value = serde_json::from_str(&must("docker", &["inspect", &id(container)])).unwrap();
    all[0].clone()
}

/// What a container has written to stdout; not by Compose, which puts escapes for a terminal between the lines.
#[track_caller]
pub(crate) fn logs(container: &str) -> String {
    must("docker", &["logs", &id(container)])
}

/// A port of this run, by its variable.
pub(crate) fn port(variable: &str, default: u16) -> u16 {
    std::env::var(variable).map_or(default, |port| port.parse().unwrap())
}

/// A path at the ingress.
pub(crate) fn ingress(path: &str) -> String {
    format!("http://127.0.0.1:{}{path}", port("KIRO_HTTP_PORT", 8080))
}

/// Status and body of a URL; 0 where nobody answers.
#[track_caller]
pub(crate) fn curl(arguments: &[&str]) -> (u16, String) {
    let always = ["--silent", "--show-error", "--max-time", "10", "--write-out", "\n%{http_code}"];
    let ran = run("curl", &[&always, arguments].concat());
    let (body, status) = ran.out.rsplit_once('\n').unwrap_or_else(|| panic!("curl: {}", ran.said));
    (status.parse().unwrap(), body.to_owned())
}

/// Looks again until there is something, and fails by name if there never is.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < patience, "never seen: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
