//! `kiro probe`: exit code and one line.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};

use crate::support::{kiro, outcome};

/// Gives each caller one answer, and what it was asked.
fn admin(answer: &'static str) -> (SocketAddr, std::thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let asked = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut asked = [0; 1024];
        let length = stream.read(&mut asked).unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
        String::from_utf8_lossy(&asked[..length]).into_owned()
    });
    (address, asked)
}

#[track_caller]
fn check(what: &str, answer: &'static str, code: i32, line: &str) {
    let (address, asked) = admin(answer);
    let (found, out, _) = outcome(kiro().args(["probe", what, "--addr", &address.to_string()]));
    assert_eq!((found, out.as_str()), (Some(code), line.replace("ADDRESS", &address.to_string()).as_str()));
    let asked = asked.join().unwrap();
    assert!(asked.starts_with(&format!("GET /{what} HTTP/1.1\r\nHost: localhost\r\n")), "{asked}");
}

#[test]
fn the_code_follows_the_sidecars_answer() {
    check("ready", "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nready\n", 0, "ready\n");
    check("live", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nlive\n", 0, "live\n");
    check(
        "ready",
        "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 9\r\n\r\ndraining\n",
        1,
        "/ready answers 503: draining\n",
    );
    check("ready", "", 1, "ADDRESS does not speak HTTP: is that the sidecar's admin port?\n");
}

#[test]
fn nobody_there_is_said() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (code, out, _) = outcome(kiro().args(["probe", "ready", "--addr", &free]));
    assert_eq!(code, Some(1));
    assert!(out.starts_with(&format!("no sidecar answers at {free}: ")) && out.lines().count() == 1, "{out}");
    let (code, out, _) = outcome(kiro().args(["probe", "tcp", &free]));
    assert_eq!(code, Some(1));
    assert!(out.starts_with(&format!("nobody answers at {free}: ")), "{out}");
}

#[test]
fn an_application_is_asked_whether_it_listens() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (code, out, _) = outcome(kiro().args(["probe", "tcp", &address]));
    assert_eq!((code, out), (Some(0), format!("{address} accepts connections\n")));
}
