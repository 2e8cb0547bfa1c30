//! What do clients see that do not wait for each other?
//!
//! Each connection has a schedule of its own, made beforehand, and a latency counts from the moment at which the request was to be
//! sent, whether its connection was free then or not. A closed loop sends nothing while a proxy stalls and so leaves out just those
//! requests that would have waited: coordinated omission (Gil Tene, "How NOT to Measure Latency"; wrk2's README).

use std::net::SocketAddr;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hdrhistogram::Histogram;

use super::h1::{Client, get};
use super::{Length, Loaded, Meter, Schedule, latencies, note};
use crate::stop;

/// How long the threads have to reach their first request.
const LEAD: Duration = Duration::from_millis(100);
/// How long before the end the memory is read.
const LOOK_BEFORE_END: Duration = Duration::from_millis(150);
/// A connection that is so far behind its schedule gives up.
const BEHIND_MAX: Duration = Duration::from_secs(10);

struct Sent {
    latencies: Histogram<u64>,
    completed: u64,
    errors: u64,
}

/// Sends at a rate.
pub(crate) fn load(
    to: SocketAddr,
    host: &str,
    connections: usize,
    rate: f64,
    length: Length,
    meter: &mut Meter,
) -> anyhow::Result<Loaded> {
    let request = get(host, "/");
    let clients = (0..connections)
        .map(|_| Client::connect(to))
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("cannot connect to {to}"))?;
    let all_are_there = Barrier::new(connections + 1);
    let sent = std::thread::scope(|scope| -> anyhow::Result<Vec<Sent>> {
        let threads: Vec<_> = clients
            .into_iter()
            .enumerate()
            .map(|(index, client)| {
                let (request, all_are_there) = (&request, &all_are_there);
                scope.spawn(move || {
                    all_are_there.wait();
                    let start = Instant::now() + LEAD;
                    send(client, to, request, Schedule::of(rate, connections, index, length), start)
                })
            })
            .collect();
        all_are_there.wait();
        stop::pause(LEAD + length.warm_up)?;
        meter.begin();
        stop::pause(length.measured.saturating_sub(LOOK_BEFORE_END))?;
        meter.look();
        stop::pause(LOOK_BEFORE_END)?;
        meter.end();
        let join = |thread: std::thread::ScopedJoinHandle<'_, anyhow::Result<Sent>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a sender has panicked"))?
        };
        threads.into_iter().map(join).collect()
    })?;
    let mut together = latencies()?;
    let (mut completed, mut errors) = (0, 0);
    for one in sent {
        together.add(&one.latencies).context("histograms of two kinds")?;
        completed += one.completed;
        errors += one.errors;
    }
    let loaded = Loaded {
        requests: together.len(),
        errors,
        seconds: length.measured.as_secs_f64(),
        completed,
        ..Loaded::default()
    };
    Ok(loaded.timed(&together))
}

fn send(
    mut client: Client,
    to: SocketAddr,
    request: &[u8],
    schedule: Schedule,
    start: Instant,
) -> anyhow::Result<Sent> {
    let mut sent = Sent { latencies: latencies()?, completed: 0, errors: 0 };
    for number in 0.. {
        let Some(after) = schedule.intended(number) else { break };
        if stop::asked() {
            break;
        }
        let intended = start + after;
        std::thread::sleep(intended.saturating_duration_since(Instant::now()));
        if intended.elapsed() > BEHIND_MAX {
            sent.errors += 1;
            break;
        }
        match client.call(request) {
            Ok(answer) => {
                sent.completed += 1;
                if answer.status != 200 {
                    sent.errors += 1;
                } else if after >= schedule.from {
                    note(&mut sent.latencies, intended.elapsed());
                }
                if answer.closes {
                    client = Client::connect(to).context("cannot connect again")?;
                }
            }
            Err(_) => {
                sent.errors += 1;
                client = Client::connect(to).context("cannot connect again")?;
            }
        }
    }
    Ok(sent)
}
