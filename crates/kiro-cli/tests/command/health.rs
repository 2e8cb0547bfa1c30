//! `kiro health`: a table, what is not well in words, and the exit code.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};

use crate::support::{kiro, outcome};

/// A sidecar's admin port that answers one caller with this document.
fn admin(document: &str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{document}", document.len());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut asked = [0; 1024];
        let length = stream.read(&mut asked).unwrap();
        // Whoever asks for something else gets no answer.
        if asked[..length].starts_with(b"GET /mesh/health HTTP/1.1\r\nHost: localhost\r\n") {
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    address
}

const WELL: &str = r#"{
    "service": "dashboard", "draining": false,
    "app": { "check": "http /healthz", "state": "ready", "since": "2026-03-02T08:14:09Z", "last_failure": "status 500" },
    "services": [
        { "name": "auth", "unused": true },
        { "name": "profile", "unused": false, "breaker": "closed", "retry_budget": 100, "name_error": null, "replicas": [
            { "address": "10.0.0.3:15006", "state": "up", "latency_ms": 1.24, "in_flight": 3, "failures": 0, "out_for_ms": null },
            { "address": "10.0.0.12:15006", "state": "warming", "latency_ms": null, "in_flight": 0, "failures": 1, "out_for_ms": null }
        ] }
    ]
}"#;

#[track_caller]
fn check(document: &str, code: i32, lines: &str) {
    let (found, out, err) = outcome(kiro().args(["health", "--admin", &admin(document).to_string()]));
    assert_eq!((found, err.as_str()), (Some(code), ""), "{out}");
    assert_eq!(out.trim_end(), lines.trim(), "\n{out}");
}

#[test]
fn a_mesh_that_is_well() {
    check(
        WELL,
        0,
        "
SERVICE    REPLICA          STATE    LATENCY  IN FLIGHT  FAILURES  OUT FOR
dashboard  this pod         ready
auth       -                unused
profile    10.0.0.3:15006   up       1.2 ms   3          0         -
profile    10.0.0.12:15006  warming  -        0          1         -

all is well",
    );
}

#[test]
fn what_is_not_well_is_named() {
    let document = WELL
        .replace(r#""draining": false"#, r#""draining": true"#)
        .replace(r#""state": "ready""#, r#""state": "unready""#)
        .replace(r#""warming""#, r#""ejected""#)
        .replace(r#""failures": 1, "out_for_ms": null"#, r#""failures": 1, "out_for_ms": 1900"#)
        .replace(r#""closed""#, r#""open""#)
        .replace(
            r#"{ "name": "auth", "unused": true }"#,
            r#"{ "name": "auth", "unused": false, "replicas": [], "name_error": "NXDOMAIN" }"#,
        );
    check(
        &document,
        1,
        "
SERVICE    REPLICA          STATE              LATENCY  IN FLIGHT  FAILURES  OUT FOR
dashboard  this pod         unready, draining
auth       -                nobody
profile    10.0.0.3:15006   up                 1.2 ms   3          0         -
profile    10.0.0.12:15006  ejected            -        0          1         1.9 s

NOT WELL  dashboard: the sidecar drains, and takes no new connections
NOT WELL  dashboard: the application is unready (http /healthz: status 500): it gets no requests
NOT WELL  auth: nobody is there: NXDOMAIN
NOT WELL  profile: 10.0.0.12:15006 is ejected
NOT WELL  profile: its breaker is open: it failed too often",
    );
}

#[test]
fn one_thing_that_is_not_well_makes_the_code() {
    for (from, to, code) in [
        ("", "", 0),
        (r#""draining": false"#, r#""draining": true"#, 1),
        (r#""state": "ready""#, r#""state": "unready""#, 1),
        (r#""state": "ready""#, r#""state": "unknown""#, 0),
        (r#""up""#, r#""ejected""#, 1),
        (r#""up""#, r#""unreachable""#, 1),
        (r#""up""#, r#""probing""#, 1),
        (r#""closed""#, r#""half_open""#, 1),
        (r#""closed""#, "null", 0),
        (r#""name_error": null"#, r#""name_error": "SERVFAIL""#, 1),
        (r#""unused": true"#, r#""unused": false, "replicas": []"#, 1),
    ] {
        let document = if from.is_empty() { WELL.to_owned() } else { WELL.replace(from, to) };
        let at = admin(&document).to_string();
        let (found, out, _) = outcome(kiro().args(["health", "--json"]).env("KIRO_ADMIN_ADDR", at));
        assert_eq!(found, Some(code), "{from} as {to}");
        let read = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(read(&out), read(&document));
    }
}

#[test]
fn nobody_there_is_said() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (code, out, err) = outcome(kiro().args(["health", "--admin", &free]));
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(err.starts_with(&format!("kiro health: no sidecar answers at {free}: ")), "{err}");
}
