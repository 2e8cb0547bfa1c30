//! What do all workers know of one address?

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::latency::{Latency, PeakEwma};
use super::outlier::{Began, Census, Counting, Outlier, Standing};
use super::settings::Settings;
use super::state::{Change, Event, State};

/// While a replica warms up, slow answers are forgotten so many times faster: caches fill and connections are made, and with the
/// usual decay one first answer of 100 ms would keep a newcomer idle for longer than its warm-up lasts.
const WARMING_DECAY: u32 = 4;

/// One address of a service, as all workers know it. It is on cache lines of its own: what one replica's requests write does not
/// slow down another's.
#[derive(Debug)]
#[repr(align(64))]
pub struct Replica {
    latency: PeakEwma,
    in_flight: AtomicU32,
    outlier: Outlier,
    address: SocketAddr,
    /// When the set began: times are counted from there.
    base: Instant,
    settings: Settings,
}

/// What became of a request at a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It was answered, and well.
    Success,
    /// The application answered that it won't (4xx). It is alive, so a trial has gone well; but a fast no says nothing about its
    /// speed, and neither makes nor breaks a row of failures.
    Rejected,
    /// It speaks against the replica: a reset, a time-out, 502, 503 or 504 by its sidecar for its application, 5xx of the
    /// application itself.
    Failure,
    /// No connection came about: refused, unreachable, or no answer in time. Not for faults on this side, such as too many open
    /// files.
    ConnectFailure,
    /// It says nothing: the client went away, or something failed on this side. Only that it has taken so long already is known.
    Abandoned,
}

/// What a person sees of a replica.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct View {
    /// Which one.
    pub address: SocketAddr,
    /// Whether it is in.
    pub state: State,
    /// The peak-EWMA of its latency, where there was an answer.
    pub latency: Option<Duration>,
    /// Requests in flight from this sidecar.
    pub in_flight: u32,
    /// Failures since the last success.
    pub failures: u32,
    /// How often it went out while it was known.
    pub ejections: u32,
    /// How long it is out for yet, if it is; zero while a trial is due or under way.
    pub out_for: Option<Duration>,
    /// How much of its share it gets: 0 while it is out, 0.1 to 1 while it warms up.
    pub share: f64,
}

impl Replica {
    pub(super) fn new(address: SocketAddr, base: Instant, settings: Settings, census: Arc<Census>) -> Self {
        Self {
            latency: PeakEwma::unknown(),
            in_flight: AtomicU32::new(0),
            outlier: Outlier::new(census),
            address,
            base,
            settings,
        }
    }

    /// Which one it is.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Requests in flight, of all workers.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// All that is known, as of `now`.
    #[must_use]
    pub fn view(&self, now: Instant) -> View {
        let nanos = self.nanos(now);
        View {
            address: self.address,
            state: self.outlier.state(nanos),
            latency: self.latency(now).known(),
            in_flight: self.in_flight(),
            failures: self.outlier.failures(),
            ejections: self.outlier.ejections(),
            out_for: self.outlier.out_for(nanos),
            share: match self.standing(now) {
                Standing::In { weight } => weight,
                Standing::Out => 0.0,
            },
        }
    }

    fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.base).as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn standing(&self, now: Instant) -> Standing {
        self.outlier.standing(self.nanos(now), &self.settings)
    }

    /// It has failed so often in a row that it is only in since others are out.
    pub(super) fn is_failing(&self) -> bool {
        self.outlier.failures() >= self.settings.failures()
    }

    fn decay(&self, nanos: u64) -> Duration {
        let decay = self.settings.decay();
        match self.outlier.standing(nanos, &self.settings) {
            Standing::In { weight } if weight < 1.0 => decay / WARMING_DECAY,
            Standing::In { .. } | Standing::Out => decay,
        }
    }

    pub(super) fn latency(&self, now: Instant) -> Latency {
        let nanos = self.nanos(now);
        self.latency.read(nanos, self.decay(nanos))
    }

    /// Whether nobody is on his way there, and what is known of it is old.
    pub(super) fn is_unheard_of(&self, now: Instant) -> bool {
        self.in_flight() == 0 && self.latency.is_old(self.nanos(now))
    }

    pub(super) fn join(&self, census: &mut Counting<'_>, now: Instant, warm: bool) {
        // Whoever answers at this address now may be another container.
        self.latency.reset(self.nanos(now), None);
        self.outlier.join(census, self.nanos(now), warm, &self.settings);
    }

    pub(super) fn leave(&self, census: &mut Counting<'_>) {
        self.outlier.leave(census);
    }

    pub(super) fn readmit(&self, census: &mut Counting<'_>, now: Instant) -> Option<Event> {
        let change = self.outlier.readmit(census, self.nanos(now), &self.settings)?;
        self.latency.reset(self.nanos(now), None);
        Some(Event { address: self.address, change })
    }

    pub(super) fn out_for(&self, now: Instant) -> Option<Duration> {
        self.outlier.out_for(self.nanos(now))
    }
}

/// A request that is in flight at a replica. [`end`](Self::end) says what became of it; dropped without, it is no longer counted,
/// and nothing is learnt.
#[derive(Debug)]
#[must_use = "a request is in flight only as long as this lives"]
pub struct InFlight {
    replica: Arc<Replica>,
    since: Instant,
    began: Began,
    explores: bool,
}

impl InFlight {
    fn new(replica: &Arc<Replica>, now: Instant, began: Began) -> Self {
        replica.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { replica: Arc::clone(replica), since: now, began, explores: false }
    }

    pub(super) fn begin(replica: &Arc<Replica>, now: Instant) -> Self {
        Self::new(replica, now, replica.outlier.begin())
    }

    /// One that asks whether what is known of the replica still holds.
    pub(super) fn exploring(replica: &Arc<Replica>, now: Instant) -> Self {
        let mut flight = Self::begin(replica, now);
        flight.explores = true;
        flight
    }

    /// A trial, if the replica is out and due for one.
    pub(super) fn trial(replica: &Arc<Replica>, now: Instant) -> Option<Self> {
        let began = replica.outlier.claim(replica.nanos(now))?;
        Some(Self::new(replica, now, began))
    }

    /// Where it is.
    #[must_use]
    pub fn replica(&self) -> &Arc<Replica> {
        &self.replica
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.replica.address
    }

    /// Whether it tries a replica that is out.
    #[must_use]
    pub fn is_trial(&self) -> bool {
        self.began.claim.is_some()
    }

    /// The request leaves on a connection that stands: its latency counts from here. What it waited for before is the price of a
    /// new connection, which each worker pays once, and not how fast the replica is.
    pub fn sent(&mut self, now: Instant) {
        self.since = now;
    }

    /// The response's head is here, or there will be none. What is returned is worth a line in the log.
    #[must_use = "an event is worth a line in the log"]
    pub fn end(mut self, now: Instant, outcome: Outcome) -> Option<Event> {
        let Self { replica, since, began, explores } = &mut self;
        let (nanos, settings) = (replica.nanos(now), &replica.settings);
        let (took, decay) = (now.saturating_duration_since(*since), replica.decay(nanos));
        let change = match outcome {
            Outcome::Success => {
                if *explores {
                    // It was asked since what was known of it is old.
                    replica.latency.reset(nanos, Some(took));
                } else {
                    replica.latency.observe(nanos, took, decay);
                }
                replica.outlier.answered(*began, true, nanos, settings)
            }
            Outcome::Rejected => {
                replica.latency.at_least(nanos, took, decay);
                replica.outlier.answered(*began, false, nanos, settings)
            }
            Outcome::Failure => {
                replica.latency.at_least(nanos, took, decay);
                replica.outlier.failed(*began, false, nanos, settings)
            }
            Outcome::ConnectFailure => replica.outlier.failed(*began, true, nanos, settings),
            Outcome::Abandoned => {
                replica.latency.at_least(nanos, took, decay);
                // Not at once: where a replica hangs, one client after the other would wait at it and go away.
                if let Some(claim) = began.claim.take() {
                    replica.outlier.release(claim, nanos, settings.ejection(0));
                }
                None
            }
        }?;
        began.claim = None;
        if matches!(change, Change::Returned { .. }) {
            // What it took to answer before it failed, or while it did, is no measure of it now.
            replica.latency.reset(nanos, (outcome == Outcome::Success).then_some(took));
        }
        Some(Event { address: replica.address, change })
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.replica.in_flight.fetch_sub(1, Ordering::Relaxed);
        if let Some(claim) = self.began.claim {
            self.replica.outlier.release(claim, 0, Duration::ZERO);
        }
    }
}
