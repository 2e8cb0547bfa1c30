//! What do ten thousand client connections cost that each made one request and are kept?

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hdrhistogram::Histogram;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::h1::{Client, get};
use super::{Loaded, Meter, latencies, note};
use crate::stop;

/// Threads that connect: as many requests are under way at a time.
const THREADS: usize = 16;
/// A thread that has met so many errors has seen enough.
const ERRORS_MAX: u64 = 20;
/// Descriptors beside those of the connections.
const MORE_DESCRIPTORS: u64 = 500;
/// How long the proxies have to come to rest before they are looked at.
const REST: Duration = Duration::from_millis(300);

/// Lets this process and its children have as many descriptors as it may; says how many that is.
pub(crate) fn raise_descriptors() -> anyhow::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(1 << 20);
    setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: limit.maximum })
        .context("cannot raise the number of descriptors")?;
    Ok(most)
}

struct Kept {
    clients: Vec<Client>,
    latencies: Histogram<u64>,
    errors: u64,
    first_error: Option<io::Error>,
}

/// Opens them, looks at the proxies, and sees that all are still open.
pub(crate) fn load(
    to: SocketAddr,
    host: &str,
    connections: usize,
    descriptors: u64,
    meter: &mut Meter,
) -> anyhow::Result<Loaded> {
    let needed = connections as u64 + MORE_DESCRIPTORS;
    if descriptors < needed {
        bail!(
            "{connections} connections need {needed} descriptors, and this process may have {descriptors}: raise `ulimit -n`"
        );
    }
    let request = get(host, "/");
    meter.begin();
    let began = Instant::now();
    let kept = std::thread::scope(|scope| -> anyhow::Result<Vec<Kept>> {
        let threads: Vec<_> = (0..THREADS)
            .map(|index| {
                let share = connections / THREADS + usize::from(index < connections % THREADS);
                let request = &request;
                scope.spawn(move || open(to, request, share))
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, anyhow::Result<Kept>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a connecting thread has panicked"))?
        };
        threads.into_iter().map(join).collect()
    })?;
    let seconds = began.elapsed().as_secs_f64();
    meter.end();
    stop::pause(REST)?;
    meter.look();

    let mut together = latencies()?;
    let (mut errors, mut gone, mut first_error) = (0, 0, None);
    for one in &kept {
        together.add(&one.latencies).context("histograms of two kinds")?;
        errors += one.errors;
        gone += one.clients.iter().filter(|client| !client.is_open()).count() as u64;
        first_error = first_error.or(one.first_error.as_ref());
    }
    let void = match first_error {
        Some(error) => {
            Some(format!("{} of {connections} connections were served, then: {error}", together.len()))
        }
        None => (gone > 0).then(|| format!("{gone} of {connections} connections were closed by the proxy")),
    };
    let requests = together.len();
    let loaded =
        Loaded { requests, errors: errors + gone, seconds, completed: requests, void, ..Loaded::default() };
    Ok(loaded.timed(&together))
}

fn open(to: SocketAddr, request: &[u8], share: usize) -> anyhow::Result<Kept> {
    let mut kept =
        Kept { clients: Vec::with_capacity(share), latencies: latencies()?, errors: 0, first_error: None };
    for _ in 0..share {
        if stop::asked() || kept.errors >= ERRORS_MAX {
            break;
        }
        let began = Instant::now();
        let answered = Client::connect(to).and_then(|mut client| match client.call(request)? {
            answer if answer.status == 200 && !answer.closes => Ok(client),
            answer => Err(io::Error::other(format!("status {}, closes: {}", answer.status, answer.closes))),
        });
        match answered {
            Ok(client) => {
                note(&mut kept.latencies, began.elapsed());
                kept.clients.push(client);
            }
            Err(error) => {
                kept.errors += 1;
                kept.first_error.get_or_insert(error);
            }
        }
    }
    Ok(kept)
}
