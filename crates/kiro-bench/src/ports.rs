//! Which ports are free?

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Mutex;

use anyhow::bail;

/// Below the range from which the kernel takes the ports of outgoing connections: one of ten thousand of those could otherwise take a
/// chosen port before its server does.
const RANGE: std::ops::Range<u16> = 16_000..32_000;
const TRIES: usize = 1_000;

static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// An address of the loopback whose port nobody has, and that is given once in this process's life.
pub(crate) fn free() -> anyhow::Result<SocketAddr> {
    let mut given = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if given.len() > RANGE.len() / 2 {
        given.clear();
    }
    for _ in 0..TRIES {
        let port = fastrand::u16(RANGE);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if !given.contains(&port) && TcpListener::bind(address).is_ok() {
            given.insert(port);
            return Ok(address);
        }
    }
    bail!("no port from {} to {} is free on 127.0.0.1", RANGE.start, RANGE.end)
}
