//! A sidecar whose pod ends: what it has to say is said before the pod, and with it the network, is gone.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::sidecar::{Made, With};
use crate::support::{PATIENCE, kiro};

fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// A collector that takes what it gets and never answers: it keeps all bytes.
fn collector() -> (String, Arc<Mutex<Vec<u8>>>) {
    let (listener, address) = listener();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let all = Arc::clone(&seen);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, all) = (stream.unwrap(), Arc::clone(&all));
            std::thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut bytes) {
                    all.lock().unwrap().extend_from_slice(&bytes[..count]);
                }
            });
        }
    });
    (address, seen)
}

#[test]
fn spans_and_lines_are_out_before_the_pod_may_go() {
    let made = Made::new(&With { tls: "none", ..With::default() });
    let (pod, pod_address) = listener();
    let (collector_address, exported) = collector();
    let mut command = kiro();
    command.arg("proxy").stdout(Stdio::piped()).stderr(Stdio::inherit());
    command.env("KIRO_SERVICE", "auth").env("KIRO_WORKERS", "1").env("KIRO_POD_ADDR", pod_address);
    command.env("KIRO_IDENTITY_DIR", made.path("certs/auth")).env("KIRO_MESH_DIR", made.path("docker/mesh"));
    for address in ["KIRO_OUTBOUND_ADDR", "KIRO_INBOUND_ADDR", "KIRO_ADMIN_ADDR", "KIRO_HEALTH_ADDR"] {
        command.env(address, "127.0.0.1:0");
    }
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{collector_address}"));
    // So that nothing is exported but at the end.
    command.env("OTEL_BSP_SCHEDULE_DELAY", "600000");
    let mut sidecar = command.spawn().unwrap();
    let mut lines = BufReader::new(sidecar.stdout.take().unwrap()).lines().map(|line| {
        let line = line.unwrap();
        serde_json::from_str::<Value>(&line).unwrap_or_else(|_| panic!("{line}"))
    });
    let ready = lines.find(|line| line["message"] == "sidecar is ready").unwrap();
    let (mut word, _) = pod.accept().unwrap();
    word.set_read_timeout(Some(PATIENCE)).unwrap();

    let mut request = TcpStream::connect(ready["outbound"].as_str().unwrap()).unwrap();
    request.write_all(b"GET http://nobody/ HTTP/1.1\r\nHost: nobody\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    request.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");

    word.write_all(b"drain\n").unwrap();
    assert_eq!(word.read(&mut [0; 1]).unwrap(), 0, "the sidecar lets its pod go");
    let exported = exported.lock().unwrap().clone();
    let text = String::from_utf8_lossy(&exported);
    assert!(text.contains("auth-proxy"), "{} bytes of spans before the pod was let go", exported.len());
    assert_eq!(sidecar.wait().unwrap().code(), Some(0));
    let rest: Vec<Value> = lines.collect();
    for expected in ["service_unknown", "sidecar has stopped"] {
        assert!(rest.iter().any(|line| line.to_string().contains(expected)), "{expected}: {rest:?}");
    }
}
