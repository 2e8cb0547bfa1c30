//! Who sends the requests, so that none waits for another?
//!
//! One schedule for all, and many senders: whoever is free takes the next request of the plan, waits until it is due, and sends it on a
//! connection that is idle, or on a new one. A request that hangs holds its sender and its connection and nothing else.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kiro_bench::h1::{Answer, Client, get};
use kiro_bench::schedule::{Length, Schedule};
use kiro_bench::stop;

use crate::ledger::{Ledger, Outcome, Record};

/// How long a request may take; then its user has gone.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// The most that may be under way. At the highest rate all of them could hang for over half a second before the plan falls behind; what
/// then is not sent in time is late, like what is not answered in time.
const SENDERS_MAX: usize = 1_200;
/// What a sender's own variables need.
const STACK_BYTES: usize = 128 * 1024;
/// How often a sender that waits looks whether it is over: seldom, there are many of them.
const LOOK: Duration = Duration::from_millis(500);
/// Between a sender's look at the end and a change of it.
const MARGIN: Duration = Duration::from_millis(20);
/// How long the senders have to be there.
const LEAD: Duration = Duration::from_millis(150);

/// What is sent.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    /// Where to.
    pub(crate) to: SocketAddr,
    /// Requests a second.
    pub(crate) rate: u32,
    /// For so long at most.
    pub(crate) lasts_max: Duration,
}

/// The load's clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    /// How long the load has been on; nothing before its start.
    pub(crate) fn now(self) -> Duration {
        self.0.elapsed()
    }

    /// Waits for a time of it; an error if somebody wants to stop.
    pub(crate) fn wait_until(self, at: Duration) -> anyhow::Result<()> {
        stop::pause((self.0 + at).saturating_duration_since(Instant::now()))
    }
}

/// What the senders share.
struct Shared<'a> {
    load: &'a Load,
    request: Vec<u8>,
    schedule: Schedule,
    start: Instant,
    next: AtomicU32,
    /// In microseconds: what is due at or after it is not sent.
    end: AtomicU64,
    idle: Mutex<Vec<Client>>,
}

impl Shared<'_> {
    /// Ends the load at this moment, or a little later: what a sender may just be about to send still belongs to it.
    fn end_now(&self) {
        self.end_at(self.start.elapsed() + MARGIN);
    }

    fn end_at(&self, end: Duration) {
        self.end.store(u64::try_from(end.as_micros()).unwrap_or(u64::MAX), Ordering::SeqCst);
    }

    fn end(&self) -> Duration {
        Duration::from_micros(self.end.load(Ordering::SeqCst))
    }

    /// Waits until a request is due; false if the load has ended by then.
    fn wait(&self, due: Duration) -> bool {
        loop {
            let left = (self.start + due).saturating_duration_since(Instant::now());
            if due >= self.end() || stop::asked() {
                return false;
            }
            if left.is_zero() {
                return true;
            }
            thread::sleep(left.min(LOOK));
        }
    }
}

/// Sends for as long as `meanwhile` breaks and mends things; then gives what became of each request.
pub(crate) fn run<T>(
    load: &Load,
    meanwhile: impl FnOnce(Clock) -> anyhow::Result<T>,
) -> anyhow::Result<(Ledger, T)> {
    let length = Length { warm_up: Duration::ZERO, measured: load.lasts_max };
    let schedule = Schedule::of(f64::from(load.rate), 1, 0, length);
    let shared = Shared {
        load,
        request: get("localhost", "/dashboard/alice"),
        schedule,
        start: Instant::now() + LEAD,
        next: AtomicU32::new(0),
        end: AtomicU64::new(u64::MAX),
        idle: Mutex::new(Vec::new()),
    };
    let per_patience = load.rate as usize * PATIENCE.as_secs() as usize;
    let (records, outcome) = thread::scope(|scope| -> anyhow::Result<_> {
        let mut senders = Vec::new();
        for _ in 0..per_patience.min(SENDERS_MAX) {
            let builder = thread::Builder::new().stack_size(STACK_BYTES);
            senders.push(builder.spawn_scoped(scope, || sender(&shared)).context("no thread to send with")?);
        }
        let outcome = meanwhile(Clock(shared.start));
        match &outcome {
            Ok(_) => shared.end_now(),
            Err(_) => shared.end_at(Duration::ZERO),
        }
        let mut records = Vec::new();
        for sender in senders {
            records.extend(sender.join().map_err(|_| anyhow::anyhow!("a sender has panicked"))?);
        }
        Ok((records, outcome))
    })?;
    let outcome = outcome?;
    stop::check()?;
    let is_planned = |number: &u32| schedule.intended(*number).is_some_and(|due| due < shared.end());
    let planned = (0..).take_while(is_planned).count();
    let planned = u32::try_from(planned).context("more requests than can be counted")?;
    Ok((Ledger::of(records, planned)?, outcome))
}

fn sender(shared: &Shared<'_>) -> Vec<Record> {
    let mut records = Vec::new();
    loop {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        let Some(due) = shared.schedule.intended(number) else { return records };
        if !shared.wait(due) {
            return records;
        }
        let sent = shared.start.elapsed();
        // Nobody was free for it until its user had gone.
        let outcome = if sent > due + PATIENCE { Outcome::Late } else { one(shared) };
        records.push(Record { number, due, sent, ended: shared.start.elapsed(), outcome });
    }
}

/// Sends one request. A connection that has ended while it was idle is not used: a client would see that too.
fn one(shared: &Shared<'_>) -> Outcome {
    let idle = || loop {
        let kept = shared.idle.lock().ok()?.pop()?;
        if kept.is_open() {
            return Some(kept);
        }
    };
    let client = match idle() {
        Some(client) => Ok(client),
        None => Client::connect_within(shared.load.to, PATIENCE),
    };
    let called = client.and_then(|mut client| client.call(&shared.request).map(|answer| (client, answer)));
    match called {
        Ok((client, answer)) => {
            if !answer.closes
                && let Ok(mut idle) = shared.idle.lock()
            {
                idle.push(client);
            }
            judge(&answer)
        }
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
        {
            Outcome::Late
        }
        Err(error) => Outcome::Lost { why: error.kind().to_string() },
    }
}

fn judge(answer: &Answer) -> Outcome {
    let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let word = |value: Option<&serde_json::Value>| value.and_then(|value| value.as_str()).map(str::to_owned);
    if answer.status == 200 {
        return Outcome::Answered { replica: word(body.pointer("/profile/replica")) };
    }
    // Dashboard hands the mesh's word on in its answer; the mesh itself says it in a field.
    let code = answer.field("x-kiro-reject").map(str::to_owned).or_else(|| word(body.get("reject")));
    Outcome::Refused { status: answer.status, code }
}

/// So many requests at once, each on a connection of its own.
pub(crate) fn burst(to: SocketAddr, count: usize) -> anyhow::Result<Vec<Outcome>> {
    let request = get("localhost", "/dashboard/alice");
    let one = || {
        let called = Client::connect_within(to, PATIENCE).and_then(|mut client| client.call(&request));
        called.map_or_else(|error| Outcome::Lost { why: error.kind().to_string() }, |answer| judge(&answer))
    };
    thread::scope(|scope| {
        let senders: Vec<_> = (0..count).map(|_| scope.spawn(one)).collect();
        let join = |sender: thread::ScopedJoinHandle<'_, Outcome>| {
            sender.join().map_err(|_| anyhow::anyhow!("a sender has panicked"))
        };
        senders.into_iter().map(join).collect()
    })
}

/// How many requests a second the mesh can do: each of a few senders sends its next one when the last one is answered.
pub(crate) fn capacity(to: SocketAddr, senders: usize, lasts: Duration) -> anyhow::Result<u32> {
    let begin = Instant::now();
    let count = |()| -> u32 {
        let Ok(mut client) = Client::connect_within(to, PATIENCE) else { return 0 };
        let request = get("localhost", "/dashboard/alice");
        let mut answered = 0;
        while begin.elapsed() < lasts && !stop::asked() {
            match client.call(&request) {
                Ok(Answer { status: 200, closes: false, .. }) => answered += 1,
                Ok(_) | Err(_) => break,
            }
        }
        answered
    };
    let answered: u32 = thread::scope(|scope| {
        let senders: Vec<_> = (0..senders).map(|_| scope.spawn(move || count(()))).collect();
        senders.into_iter().map(|sender| sender.join().unwrap_or(0)).sum()
    });
    stop::check()?;
    Ok((f64::from(answered) / begin.elapsed().as_secs_f64()) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    /// Answers every connection's requests with one head and body.
    fn server(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    let mut bytes = [0; 1024];
                    while matches!(stream.read(&mut bytes), Ok(1..)) {
                        if answer.is_empty() || stream.write_all(answer.as_bytes()).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    fn outcomes(answer: &'static str) -> Vec<Outcome> {
        let load = Load { to: server(answer), rate: 100, lasts_max: Duration::from_secs(60) };
        let (ledger, ()) = run(&load, |clock| clock.wait_until(Duration::from_millis(200))).unwrap();
        assert!((20..40).contains(&ledger.records().len()), "{}", ledger.records().len());
        ledger.records().iter().map(|record| record.outcome.clone()).collect()
    }

    #[test]
    fn every_request_is_accounted_for() {
        let good = "HTTP/1.1 200 OK\r\ncontent-length: 35\r\n\r\n{\"profile\":{\"replica\":\"profile-2\"}}";
        let answered = Outcome::Answered { replica: Some("profile-2".to_owned()) };
        assert!(outcomes(good).iter().all(|outcome| *outcome == answered));
        let no = "HTTP/1.1 503 No\r\nx-kiro-reject: overloaded\r\ncontent-length: 0\r\n\r\n";
        let refused = Outcome::Refused { status: 503, code: Some("overloaded".to_owned()) };
        assert!(outcomes(no).iter().all(|outcome| *outcome == refused));
        assert!(outcomes("").iter().all(|outcome| matches!(outcome, Outcome::Lost { .. })));
    }

    #[test]
    fn an_error_meanwhile_ends_the_load() {
        let load = Load { to: server(""), rate: 10, lasts_max: Duration::from_secs(600) };
        let begin = Instant::now();
        assert!(run(&load, |_| -> anyhow::Result<()> { anyhow::bail!("no") }).is_err());
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
}
