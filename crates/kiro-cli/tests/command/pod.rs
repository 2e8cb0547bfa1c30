//! `kiro pod`: the word on SIGTERM, and when it leaves.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use rustix::process::Signal;

use crate::support::{PATIENCE, Running, kiro};

fn pod(grace: &str) -> (Running, SocketAddr) {
    let mut running = Running::start(kiro().args(["pod", "--listen", "127.0.0.1:0", "--grace", grace]));
    let line = running.line();
    let address = line.trim_end().rsplit(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("{line}"));
    (running, address)
}

fn sidecar(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[track_caller]
fn hears_drain(stream: &mut TcpStream) {
    let mut word = [0; 6];
    stream.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"drain\n");
}

#[test]
fn it_says_drain_and_stays_until_every_sidecar_has_closed() {
    let (mut pod, address) = pod("60");
    let (mut first, mut second) = (sidecar(address), sidecar(address));
    // Nothing that comes from there is of interest, or ends anything.
    first.write_all(b"what is this?\n").unwrap();
    // A health check that came and went.
    drop(sidecar(address));
    pod.send(Signal::TERM);
    hears_drain(&mut first);
    hears_drain(&mut second);
    drop(first);
    // Somebody who comes late hears it at once.
    hears_drain(&mut sidecar(address));
    assert!(!pod.ended(), "one is still draining");
    drop(second);
    assert_eq!(pod.end().0.code(), Some(0));
    assert!(pod.line().contains("has drained"));
}

#[test]
fn a_sidecar_that_does_not_drain_is_not_waited_for_forever() {
    let (mut pod, address) = pod("1");
    let mut stuck = sidecar(address);
    pod.send(Signal::TERM);
    hears_drain(&mut stuck);
    // A second signal neither hurries nor prolongs it.
    pod.send(Signal::INT);
    let (status, took) = pod.end();
    assert_eq!(status.code(), Some(0));
    assert!(took > Duration::from_millis(800), "{took:?}");
    assert!(pod.line().contains("has not drained in time"));
}

#[test]
fn without_a_sidecar_it_leaves_at_once() {
    let (mut pod, _) = pod("60");
    pod.send(Signal::TERM);
    assert_eq!(pod.end().0.code(), Some(0));
}

#[test]
fn one_connection_too_many_is_closed_and_the_others_stay() {
    let (pod, address) = pod("60");
    let mut kept: Vec<_> = (0..16).map(|_| sidecar(address)).collect();
    let mut one_too_many = sidecar(address);
    assert_eq!(one_too_many.read(&mut [0; 1]).unwrap(), 0);
    pod.send(Signal::TERM);
    for stream in &mut kept {
        hears_drain(stream);
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let (_first, address) = pod("60");
    let mut second = Running::start(kiro().args(["pod", "--listen", &address.to_string()]));
    assert_eq!(second.end().0.code(), Some(1));
    let said = second.line();
    assert!(said.contains(&address.to_string()) && said.contains("second pod process"), "{said}");
}
