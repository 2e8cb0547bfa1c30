//! How much does a TCP service's stream cost? The application speaks first and never stops, as a database that sends a large result.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::{Length, Loaded, Meter};
use crate::{ports, stop};

const BLOCK_BYTES: usize = 64 * 1024;
const MIB: f64 = 1_048_576.0;
/// How long a pair may take until the first byte comes through.
const FIRST_BYTE: Duration = Duration::from_secs(20);
/// How long a client waits for bytes before it looks whether it is over.
const TURN: Duration = Duration::from_millis(100);
/// How long before the end the memory is read.
const LOOK_BEFORE_END: Duration = Duration::from_millis(150);

/// Starts the application: it lives as long as this process, and serves only who connects.
pub(crate) fn start_app() -> anyhow::Result<SocketAddr> {
    let address = ports::free()?;
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    std::thread::Builder::new()
        .name("tcp-app".to_owned())
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away ends its thread; without a thread it is closed, which the client sees.
                let _ = std::thread::Builder::new().spawn(move || pour(stream));
            }
        })
        .context("no thread for the TCP application")?;
    Ok(address)
}

fn pour(mut stream: TcpStream) {
    let block = vec![b'x'; BLOCK_BYTES];
    while stream.write_all(&block).is_ok() {}
}

/// Reads from several connections. A request is a MiB here.
pub(crate) fn load(
    to: SocketAddr,
    connections: usize,
    length: Length,
    meter: &mut Meter,
    alive: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Loaded> {
    let (first, tries) = first_connection(to, alive)?;
    let mut streams = vec![first];
    for _ in 1..connections {
        streams.push(connect(to).with_context(|| format!("cannot connect to {to}"))?);
    }
    let (bytes, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let (bytes, over) = (&bytes, &over);
    let (read, seconds, ended) = std::thread::scope(|scope| -> anyhow::Result<_> {
        let threads: Vec<_> =
            streams.into_iter().map(|stream| scope.spawn(move || drain(stream, bytes, over))).collect();
        let mut count = || -> anyhow::Result<_> {
            stop::pause(length.warm_up)?;
            meter.begin();
            let (before, began) = (bytes.load(Ordering::Relaxed), Instant::now());
            stop::pause(length.measured.saturating_sub(LOOK_BEFORE_END))?;
            meter.look();
            stop::pause(LOOK_BEFORE_END)?;
            meter.end();
            Ok((bytes.load(Ordering::Relaxed) - before, began.elapsed().as_secs_f64()))
        };
        let counted = count();
        over.store(true, Ordering::Relaxed);
        let mut ended = 0;
        for thread in threads {
            ended += thread.join().map_err(|_| anyhow::anyhow!("a reading thread has panicked"))?;
        }
        let (read, seconds) = counted?;
        Ok((read, seconds, ended))
    })?;
    Ok(Loaded {
        requests: (read as f64 / MIB) as u64,
        errors: ended,
        seconds,
        completed: connections as u64,
        cut_off_max: tries,
        void: (ended > 0).then(|| format!("{ended} of {connections} connections ended early")),
        ..Loaded::default()
    })
}

fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(TURN))?;
    Ok(stream)
}

/// The first connection through which a byte comes, and how many came to nothing before.
fn first_connection(
    to: SocketAddr,
    alive: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<(TcpStream, u64)> {
    let end = Instant::now() + FIRST_BYTE;
    let mut tries = 0;
    while Instant::now() < end {
        stop::check()?;
        alive()?;
        if let Ok(mut stream) = connect(to) {
            let until = Instant::now() + Duration::from_secs(1);
            while Instant::now() < until {
                match stream.read(&mut [0]) {
                    Ok(1..) => return Ok((stream, tries)),
                    Ok(0) => break,
                    Err(error) if is_a_turn(&error) => {}
                    Err(_) => break,
                }
            }
            tries += 1;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    bail!("no byte came through {to} within {} s", FIRST_BYTE.as_secs())
}

fn is_a_turn(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

/// Reads until it is over; gives one if the stream ended before.
fn drain(mut stream: TcpStream, bytes: &AtomicU64, over: &AtomicBool) -> u64 {
    let mut block = vec![0; BLOCK_BYTES];
    while !over.load(Ordering::Relaxed) {
        match stream.read(&mut block) {
            Ok(0) => return 1,
            Ok(count) => {
                bytes.fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(error) if is_a_turn(&error) => {}
            Err(_) => return 1,
        }
    }
    0
}
