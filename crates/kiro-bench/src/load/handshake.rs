//! What does a new connection between the proxies cost?
//!
//! No two proxies have the same setting for "a new connection a request", and some have none. So a relay stands between the two of
//! every pair and ends the connection after each answer, as a network does; the next request is sent once both have seen the end.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::h1::{Client, get};
use super::hello::{Agreed, agreed};
use super::{Length, Loaded, Meter, latencies, note};
use crate::{ports, stop};

/// How long a proxy may take to see that its connection has ended.
const GRACE: Duration = Duration::from_millis(500);
/// How often the relay looks for a connection or an end.
const LOOK: Duration = Duration::from_micros(100);

#[derive(Debug, Default)]
struct Shared {
    open: Mutex<Vec<Relayed>>,
    accepted: AtomicU64,
    over: AtomicBool,
    /// What the first connection's callee sent first.
    hello: OnceLock<Vec<u8>>,
}

#[derive(Debug)]
struct Relayed {
    ends: [TcpStream; 2],
    copiers: [JoinHandle<()>; 2],
}

/// Passes bytes on until it is told to cut.
#[derive(Debug)]
pub(crate) struct Relay {
    /// Where the caller's proxy finds it.
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// In front of a callee's proxy.
    pub(crate) fn start(to: SocketAddr) -> anyhow::Result<Self> {
        let address = ports::free()?;
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("relay".to_owned())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    if theirs.over.load(Ordering::Relaxed) {
                        return;
                    }
                    // What can't be relayed is closed, and its request fails.
                    let _ = theirs.relay(stream, to);
                }
            })
            .context("no thread for the relay")?;
        Ok(Self { address, shared, thread: Some(thread) })
    }

    /// Connections so far.
    fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// What the two have agreed on.
    fn agreed(&self) -> Option<Agreed> {
        agreed(self.shared.hello.get()?)
    }

    /// Ends all connections and waits until both sides have seen it.
    fn cut(&self) {
        let open: Vec<Relayed> = self.shared.open().drain(..).collect();
        for end in open.iter().flat_map(|relayed| &relayed.ends) {
            // An end that is gone already is what is wanted.
            let _ = end.shutdown(Shutdown::Write);
        }
        for Relayed { ends, copiers } in open {
            let until = Instant::now() + GRACE;
            while copiers.iter().any(|copier| !copier.is_finished()) && Instant::now() < until {
                std::thread::sleep(LOOK);
            }
            for end in &ends {
                let _ = end.shutdown(Shutdown::Both);
            }
            for copier in copiers {
                let _ = copier.join();
            }
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        // Wakes the accepting thread.
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.cut();
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Vec<Relayed>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn relay(self: &Arc<Self>, caller: TcpStream, to: SocketAddr) -> std::io::Result<()> {
        let callee = TcpStream::connect(to)?;
        caller.set_nodelay(true)?;
        callee.set_nodelay(true)?;
        let copiers = [copier(&caller, &callee, None)?, copier(&callee, &caller, Some(Arc::clone(self)))?];
        self.open().push(Relayed { ends: [caller, callee], copiers });
        self.accepted.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Copies one way; what comes first is kept for whoever wants to look at it.
fn copier(from: &TcpStream, to: &TcpStream, keep: Option<Arc<Shared>>) -> std::io::Result<JoinHandle<()>> {
    let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
    std::thread::Builder::new().spawn(move || {
        let mut block = [0; 16 * 1024];
        while let Ok(count @ 1..) = from.read(&mut block) {
            let bytes = block.get(..count).unwrap_or_default();
            if let Some(shared) = &keep {
                shared.hello.get_or_init(|| bytes.to_vec());
            }
            if to.write_all(bytes).is_err() {
                break;
            }
        }
        // The other way may still have something to say.
        let _ = to.shutdown(Shutdown::Write);
    })
}

/// One request after the other, with a key exchange of this group each, over a new connection between the proxies. The client's own connection is kept.
pub(crate) fn load(
    to: SocketAddr,
    host: &str,
    relay: &Relay,
    group: u16,
    length: Length,
    meter: &mut Meter,
) -> anyhow::Result<Loaded> {
    let mut client = Client::connect(to).with_context(|| format!("cannot connect to {to}"))?;
    let request = get(host, "/");
    let mut latencies = latencies()?;
    let (mut completed, mut errors) = (0, 0);
    let mut turn = |latencies: Option<&mut hdrhistogram::Histogram<u64>>| -> anyhow::Result<()> {
        relay.cut();
        let began = Instant::now();
        match client.call(&request) {
            Ok(answer) => {
                completed += 1;
                errors += u64::from(answer.status != 200);
                if let Some(latencies) = latencies.filter(|_| answer.status == 200) {
                    note(latencies, began.elapsed());
                }
                if answer.closes {
                    client = Client::connect(to).context("cannot connect again")?;
                }
            }
            Err(error) => bail!("a request failed: {error}"),
        }
        stop::check()
    };
    let warm = Instant::now();
    while warm.elapsed() < length.warm_up {
        turn(None)?;
    }
    let before = relay.accepted();
    meter.begin();
    let began = Instant::now();
    while began.elapsed() < length.measured {
        turn(Some(&mut latencies))?;
    }
    meter.end();
    meter.look();
    let seconds = began.elapsed().as_secs_f64();
    let (requests, connections) = (latencies.len(), relay.accepted() - before);
    let tls = relay.agreed();
    let void = match tls {
        _ if connections < requests => {
            Some(format!("{connections} connections between the proxies for {requests} requests"))
        }
        Some(tls) if tls.group == group => None,
        Some(tls) => Some(format!("the proxies agreed on {tls}, not on the group of this scenario")),
        None => Some("the handshake is none of TLS 1.3".to_owned()),
    };
    let tls = tls.map(|tls| tls.to_string());
    let loaded = Loaded { requests, errors, seconds, completed, void, tls, ..Loaded::default() };
    Ok(loaded.timed(&latencies))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_is_seen_by_both_sides() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay::start(listener.local_addr().unwrap()).unwrap();
        let mut caller = TcpStream::connect(relay.address).unwrap();
        let (mut callee, _) = listener.accept().unwrap();
        caller.write_all(b"a").unwrap();
        callee.read_exact(&mut [0]).unwrap();
        callee.write_all(b"b").unwrap();
        caller.read_exact(&mut [0]).unwrap();
        let callee = std::thread::spawn(move || callee.read(&mut [0]).unwrap());
        let caller = std::thread::spawn(move || caller.read(&mut [0]).unwrap());
        relay.cut();
        assert_eq!((caller.join().unwrap(), callee.join().unwrap()), (0, 0));
        assert_eq!(relay.accepted(), 1);
    }
}
