//! What do all workers of a sidecar share about the calls to one service?
//!
//! Its replicas and how they do, what retries it may cost, and whether its breaker is open. An [`Edge`] is made with the first
//! call, and outlives changes of the mesh file: what was learnt of a service is not forgotten because another line has changed.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiro_core::balance::{self, Change, Replicas};
use kiro_core::breaker::{Breaker, BreakerSettings, BreakerState, Transition};
use kiro_core::identity::ServiceName;
use kiro_core::retry::{GiveUp, RetryBudget};
use tokio::sync::{Notify, watch};

use crate::counts::Counts;
use crate::faults::WORDS as FAULTS;
use crate::lock::lock;
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
    declared: Mutex<Declared>,
    followed: AtomicBool,
    used: AtomicBool,
}

/// What the newest mesh file that was asked about says of a service.
#[derive(Debug)]
struct Declared {
    /// Which mesh file. A request that began under an older one does not take this back.
    number: u64,
    /// Where the service is; empty where DNS says it.
    endpoints: Arc<[SocketAddr]>,
    breaker: Option<Arc<Breaker>>,
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
            declared: Mutex::new(Declared { number: 0, endpoints: Arc::from([]), breaker: None }),
            followed: AtomicBool::new(false),
            used: AtomicBool::new(true),
        }
    }

    /// Takes over what the mesh file of that number says, unless a newer one has spoken. Gives the breaker with these settings: the one
    /// that is there, if it has them.
    fn declare(
        &self,
        number: u64,
        endpoints: &Arc<[SocketAddr]>,
        breaker: Option<BreakerSettings>,
        now: Instant,
    ) -> Option<Arc<Breaker>> {
        let mut declared = lock(&self.declared);
        if number < declared.number {
            return declared.breaker.clone().filter(|_| breaker.is_some());
        }
        declared.number = number;
        if declared.endpoints != *endpoints {
            declared.endpoints.clone_from(endpoints);
            // Where DNS is asked from now on, its answer replaces what the file said.
            self.learn(endpoints, now);
            self.known.send_replace(Known::default());
        }
        if declared.breaker.as_ref().map(|breaker| breaker.settings()) != breaker {
            declared.breaker = breaker.and_then(|settings| Breaker::new(settings, now).ok());
        }
        declared.breaker.clone()
    }

    /// The breaker as it is, for people to look at.
    pub(crate) fn current_breaker(&self) -> Option<Arc<Breaker>> {
        lock(&self.declared).breaker.clone()
    }

    /// Whether the mesh file says where the service is, so that DNS is not asked.
    pub(crate) fn is_placed(&self) -> bool {
        !lock(&self.declared).endpoints.is_empty()
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

/// A time as log and documents have it.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
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

/// The edges of one sidecar.
#[derive(Debug, Default)]
pub(crate) struct Edges {
    calls: Mutex<HashMap<ServiceName, Arc<Edge>>>,
    /// How many mesh files have been read.
    files: AtomicU64,
    /// What has passed of the requests that may come.
    pub(crate) rates: Rates,
    /// How many requests the application has under way.
    pub(crate) app: AppLimits,
}

impl Edges {
    /// The number of a mesh file that has just been read.
    pub(crate) fn next_file(&self) -> u64 {
        self.files.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The edge to a service, as the mesh file of that number declares it.
    pub(crate) fn calls(
        &self,
        name: &ServiceName,
        number: u64,
        endpoints: &Arc<[SocketAddr]>,
        breaker: Option<BreakerSettings>,
        now: Instant,
    ) -> Calls {
        let edge = {
            let mut edges = lock(&self.calls);
            let new = || Arc::new(Edge::new(name.clone(), now));
            Arc::clone(edges.entry(name.clone()).or_insert_with(new))
        };
        let breaker = edge.declare(number, endpoints, breaker, now);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(edge: &Edge) -> Vec<SocketAddr> {
        edge.replicas.snapshot().iter().map(|replica| replica.address()).collect()
    }

    #[test]
    fn a_request_of_an_older_mesh_file_takes_nothing_back() {
        let (edges, now) = (Edges::default(), Instant::now());
        let name = ServiceName::parse("profile").unwrap();
        let place =
            |port: u16| -> Arc<[SocketAddr]> { Arc::from([SocketAddr::from(([127, 0, 0, 1], port))]) };
        let (old, new) = (edges.next_file(), edges.next_file());
        let settings = BreakerSettings { requests_min: 7, ..BreakerSettings::default() };
        let first = edges.calls(&name, new, &place(2), Some(settings), now);
        // Its state is older, and it is the first of its state to call.
        let late = edges.calls(&name, old, &place(1), Some(BreakerSettings::default()), now);
        assert_eq!(addresses(&late.edge), [place(2)[0]]);
        assert!(Arc::ptr_eq(&late.breaker.unwrap(), first.breaker.as_ref().unwrap()));
        assert_eq!(first.edge.current_breaker().unwrap().settings(), settings);
        assert!(edges.calls(&name, old, &place(1), None, now).breaker.is_none());
        let newest = edges.calls(&name, edges.next_file(), &place(3), None, now);
        assert_eq!(addresses(&newest.edge), [place(3)[0]]);
    }
}
