//! What do all workers of a sidecar share about the calls to one service?
//!
//! Its replicas and how they do, what retries it may cost, and whether its breaker is open. An [`Edge`] is made with the first
//! call, and outlives changes of the mesh file: what was learnt of a service is not forgotten because another line has changed.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiro_core::balance::{self, Change, Replicas};
use kiro_core::breaker::{Breaker, BreakerSettings, BreakerState, Transition};
use kiro_core::identity::ServiceName;
use kiro_core::retry::{GiveUp, RetryBudget};
use tokio::sync::{Notify, watch};

use crate::faults::WORDS as FAULTS;
use crate::mirror::WORDS as COPIES;
use crate::overload::AppLimits;
use crate::rates::Rates;

/// What is known of a service's name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    /// Its addresses.
    pub(crate) addresses: Arc<[IpAddr]>,
    /// Why there is none, or why the addresses are old; absent before the first lookup has ended.
    pub(crate) outcome: Option<Result<(), Arc<str>>>,
    /// When the addresses were last confirmed.
    pub(crate) confirmed: Option<Instant>,
}

/// The calls to one service.
#[derive(Debug)]
pub(crate) struct Edge {
    /// The service.
    pub(crate) name: ServiceName,
    /// Its replicas.
    pub(crate) replicas: Replicas,
    /// What retries it may cost.
    pub(crate) budget: RetryBudget,
    /// What was tried again, and what was not.
    pub(crate) retries: EdgeRetries,
    /// What went wrong on purpose.
    pub(crate) faults: EdgeFaults,
    /// What became of copies for it.
    pub(crate) copies: EdgeCopies,
    /// What discovery has found.
    pub(crate) known: watch::Sender<Known>,
    /// Wakes whoever asks for the name.
    pub(crate) again: Arc<Notify>,
    breaker: Mutex<Option<Arc<Breaker>>>,
    place: Mutex<Arc<[SocketAddr]>>,
    followed: AtomicBool,
    used: AtomicBool,
}

/// One state's view of an edge.
#[derive(Debug)]
pub(crate) struct Calls {
    /// The edge.
    pub(crate) edge: Arc<Edge>,
    /// Its breaker, where one is declared.
    pub(crate) breaker: Option<Arc<Breaker>>,
}

impl Edge {
    fn new(name: ServiceName, now: Instant) -> Self {
        Self {
            name,
            replicas: Replicas::new(balance::Settings::default(), now),
            budget: RetryBudget::usual(now),
            retries: Counts::of(&RETRY_OUTCOMES),
            faults: Counts::of(&FAULTS),
            copies: Counts::of(&COPIES),
            known: watch::Sender::new(Known::default()),
            again: Arc::new(Notify::new()),
            breaker: Mutex::default(),
            place: Mutex::new(Arc::from([])),
            followed: AtomicBool::new(false),
            used: AtomicBool::new(true),
        }
    }

    /// The breaker with these settings: the one that is there, if it has them.
    fn breaker(&self, settings: Option<BreakerSettings>, now: Instant) -> Option<Arc<Breaker>> {
        let mut breaker = lock(&self.breaker);
        if breaker.as_ref().map(|breaker| breaker.settings()) != settings {
            *breaker = settings.and_then(|settings| Breaker::new(settings, now).ok());
        }
        breaker.clone()
    }

    /// The breaker as it is, for people to look at.
    pub(crate) fn current_breaker(&self) -> Option<Arc<Breaker>> {
        lock(&self.breaker).clone()
    }

    /// Takes over where the mesh file says that the service is; nothing where DNS says it.
    fn put(&self, endpoints: &Arc<[SocketAddr]>, now: Instant) {
        let mut place = lock(&self.place);
        if *place == *endpoints {
            return;
        }
        place.clone_from(endpoints);
        // Where DNS is asked from now on, its answer replaces what the file said.
        self.learn(endpoints, now);
        self.known.send_replace(Known::default());
    }

    /// Whether the mesh file says where the service is, so that DNS is not asked.
    pub(crate) fn is_placed(&self) -> bool {
        !lock(&self.place).is_empty()
    }

    /// Takes over the service's addresses.
    pub(crate) fn learn(&self, addresses: &[SocketAddr], now: Instant) {
        for event in self.replicas.update(addresses, now) {
            self.tell(&event);
        }
    }

    /// Writes what has become of a replica.
    pub(crate) fn tell(&self, event: &balance::Event) {
        let (service, replica) = (self.name.as_str(), event.address);
        match event.change {
            Change::Ejected { cause, lasts } => {
                let lasts_ms = milliseconds(lasts);
                tracing::warn!(target: "kiro::balance", service, %replica, cause = cause.as_str(), lasts_ms, "replica left out");
            }
            Change::Returned { after } => {
                let after_ms = milliseconds(after);
                tracing::info!(target: "kiro::balance", service, %replica, after_ms, "replica is back");
            }
            Change::Readmitted { after } => {
                let after_ms = milliseconds(after);
                tracing::info!(
                    target: "kiro::balance", service, %replica, after_ms, "replica is back: too many others are left out"
                );
            }
        }
    }

    /// Writes what the breaker does now.
    pub(crate) fn tell_breaker(&self, transition: &Transition) {
        let (service, window) = (self.name.as_str(), &transition.window);
        let (from, to) = (transition.from.word(), transition.to.word());
        match transition.to {
            BreakerState::Open => {
                let open_ms = transition.open_for.map_or(0, milliseconds);
                tracing::warn!(
                    target: "kiro::breaker", service, from, to, requests = window.requests, failures = window.failures, open_ms,
                    "breaker opened: too many requests fail"
                );
            }
            BreakerState::HalfOpen | BreakerState::Closed => {
                tracing::info!(target: "kiro::breaker", service, from, to, "breaker changed");
            }
        }
    }

    /// Whether nobody follows the name yet; whoever asks does from now on.
    pub(crate) fn begin_following(&self) -> bool {
        !self.followed.swap(true, Ordering::Relaxed)
    }

    /// Nobody follows the name any more.
    pub(crate) fn end_following(&self) {
        self.followed.store(false, Ordering::Relaxed);
    }

    /// Notes that a call was made.
    pub(crate) fn is_used(&self) {
        // Most of the time it is noted already, and a cache line that is only read is no other worker's concern.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a call was made since this was asked last.
    pub(crate) fn was_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// How long ago the addresses were confirmed; none for those of the mesh file, and before the first answer.
    pub(crate) fn age(&self, now: Instant) -> Option<Duration> {
        let confirmed = self.known.borrow().confirmed?;
        Some(now.saturating_duration_since(confirmed))
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The word for an attempt that failed and was made again.
pub(crate) const RETRIED: &str = "retried";

/// What became of attempts that failed, by the word of the log.
pub(crate) const RETRY_OUTCOMES: [&str; 10] = [
    RETRIED,
    GiveUp::ResponseBegun.word(),
    GiveUp::BodyGone.word(),
    GiveUp::Deadline.word(),
    GiveUp::NotDeclared.word(),
    GiveUp::Status.word(),
    GiveUp::NotIdempotent.word(),
    GiveUp::Attempts.word(),
    GiveUp::Throttled.word(),
    GiveUp::Budget.word(),
];

/// Counts of what became of an edge's attempts that failed.
pub(crate) type EdgeRetries = Counts<{ RETRY_OUTCOMES.len() }>;

/// Counts of what went wrong on purpose with an edge's requests.
pub(crate) type EdgeFaults = Counts<{ FAULTS.len() }>;

/// Counts of what became of the copies of requests that an edge's service got.
pub(crate) type EdgeCopies = Counts<{ COPIES.len() }>;

/// Counts by a few words.
#[derive(Debug)]
pub(crate) struct Counts<const N: usize> {
    words: &'static [&'static str; N],
    counts: [AtomicU64; N],
}

impl<const N: usize> Counts<N> {
    fn of(words: &'static [&'static str; N]) -> Self {
        Self { words, counts: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    /// Counts one.
    pub(crate) fn count(&self, word: &str) {
        let place = self.words.iter().position(|known| *known == word);
        if let Some(count) = place.and_then(|place| self.counts.get(place)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// All counts, with their words.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.words.iter().copied().zip(self.counts.iter().map(|count| count.load(Ordering::Relaxed)))
    }
}

/// The edges of one sidecar.
#[derive(Debug, Default)]
pub(crate) struct Edges {
    calls: Mutex<HashMap<ServiceName, Arc<Edge>>>,
    /// What has passed of the requests that may come.
    pub(crate) rates: Rates,
    /// How many requests the application has under way.
    pub(crate) app: AppLimits,
}

impl Edges {
    /// The edge to a service, as one state of the mesh declares it.
    pub(crate) fn calls(
        &self,
        name: &ServiceName,
        endpoints: &Arc<[SocketAddr]>,
        breaker: Option<BreakerSettings>,
        now: Instant,
    ) -> Calls {
        let edge = {
            let mut edges = lock(&self.calls);
            let new = || Arc::new(Edge::new(name.clone(), now));
            Arc::clone(edges.entry(name.clone()).or_insert_with(new))
        };
        edge.put(endpoints, now);
        let breaker = edge.breaker(breaker, now);
        Calls { edge, breaker }
    }

    /// Forgets the services that are in the mesh file no more.
    pub(crate) fn keep(&self, is_there: impl Fn(&ServiceName) -> bool) {
        lock(&self.calls).retain(|name, _| is_there(name));
    }

    /// All that have been called, in the order of their names.
    pub(crate) fn all(&self) -> Vec<Arc<Edge>> {
        let mut edges: Vec<_> = lock(&self.calls).values().cloned().collect();
        edges.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        edges
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
