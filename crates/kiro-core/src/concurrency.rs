//! May this request start now, must it wait for another to end, or is it better refused at once?
//!
//! A limit of requests in flight with a short queue. While there is room, a request costs two atomic operations. At the limit, it
//! waits: first in, first out while the queue is young. When the queue has not been empty for an interval (100 ms), it stands for
//! load that does not go away, and order and patience change, as in Facebook's adaptive LIFO with controlled delay ("Fail at Scale",
//! ACM Queue 13(8), 2015; CoDel is RFC 8289): the newest goes first, since its caller surely still waits, and who has waited longer
//! than a target (10 ms) is refused. So what is served is served soon, and what is not is told soon, where a plain queue would
//! answer everybody late. The newest of the queue is never refused for its age, as CoDel never drops the last packet: else a slow
//! application with few slots would stand idle until the next request came.
//!
//! **Shared, not divided.** Connections fall on workers unevenly (few sidecars, each with one connection), so that a worker's part of a
//! limit would be too small where the load is and idle elsewhere, and a limit of 1 can't be divided at all. The count of what is in
//! flight is one atomic for all workers. The queue is one for all too, behind a mutex: it is locked only while the limit is reached,
//! for the time of a push or a pop, by requests that have to wait anyway and by those whose end lets one of them go on. A queue a
//! worker would be without the lock, but a slot that one worker frees would have to find a waiter of another all the same, and a
//! worker with all the slots and a queue that is never empty would starve the others.
//!
//! Nothing waits in here. A waiter is whatever the caller wakes it by (`W`); it has a timer of its own.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

mod adaptive;
mod queue;
#[cfg(test)]
mod tests;

pub use adaptive::{Adaptive, AdaptiveError};
pub use queue::{QueueSettings, Ticket};

use adaptive::Controller;
use queue::{Push, Queue, Still};

/// What a limit is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConcurrencySettings {
    /// How many requests are in flight at most.
    pub limit: Limit,
    /// How the others wait.
    pub queue: QueueSettings,
    /// What a refused caller is told to wait. Seconds are the unit of `Retry-After`, so less than one is not to be said.
    pub retry_after: Duration,
}

/// How many requests are in flight at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// So many.
    Fixed(NonZeroU32),
    /// As many as the application answers without making each other slower.
    Adaptive(Adaptive),
}

impl Default for ConcurrencySettings {
    /// 1,024 requests, as Envoy's and so Istio's circuit breaker has it: a bound on memory, not a guess of what the application can
    /// do.
    fn default() -> Self {
        Self {
            limit: Limit::Fixed(NonZeroU32::new(1024).unwrap_or(NonZeroU32::MIN)),
            queue: QueueSettings::default(),
            retry_after: Duration::from_secs(1),
        }
    }
}

/// What becomes of a request that arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It goes on, and tells its end by [`leave`](ConcurrencyLimit::leave).
    Admitted,
    /// It waits until its waiter is woken. At `check_at` it asks by [`expired`](ConcurrencyLimit::expired).
    Queued {
        /// Its place.
        ticket: Ticket,
        /// When to ask whether to wait on.
        check_at: Instant,
    },
    /// It is refused: 503.
    Shed(Shed),
}

/// What a waiter is woken with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on, and tell the end by [`leave`](ConcurrencyLimit::leave).
    Admitted,
    /// Refused: 503.
    Shed(Shed),
}

/// What [`expired`](ConcurrencyLimit::expired) says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Wait on, and ask again then.
    Until(Instant),
    /// Refused: 503. The place is gone.
    Shed(Shed),
    /// The place is gone already: the verdict is on its way to the waiter.
    Told,
}

/// A request is refused for load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shed {
    /// Why.
    pub reason: ShedReason,
    /// For `Retry-After`.
    pub retry_after: Duration,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ShedReason {
    /// As many wait as may.
    QueueFull,
    /// It has waited longer than the target while the load does not go away, or as long as anybody may.
    WaitedTooLong,
}

impl ShedReason {
    /// The reason's name for log and metric.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            ShedReason::QueueFull => "queue_full",
            ShedReason::WaitedTooLong => "waited_too_long",
        }
    }
}

/// How a request ended, as far as it says something of the application's load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered: its latency counts.
    Answered,
    /// Timed out, or refused by the application for load (503, 429): an adaptive limit shrinks.
    Overloaded,
    /// Says nothing: the caller went away, no connection, an upgrade, a quick error.
    Ignored,
}

/// A limit of requests in flight, shared by all workers. `W` is what wakes a waiter, such as the sender of a oneshot channel.
#[derive(Debug)]
pub struct ConcurrencyLimit<W> {
    settings: ConcurrencySettings,
    in_flight: AtomicU32,
    limit: AtomicU32,
    /// As many as the queue holds, written under its lock, so that a request that ends need not look into it.
    waiting: AtomicU32,
    /// Whether somebody found no room since the adaptive limit last looked.
    bound: AtomicBool,
    queue: Mutex<Queue<W>>,
    controller: Option<Controller>,
}

impl<W> ConcurrencyLimit<W> {
    /// Nothing in flight. `now` is the moment that time is counted from.
    #[must_use]
    pub fn new(settings: ConcurrencySettings, now: Instant) -> Self {
        let (limit, controller) = match settings.limit {
            Limit::Fixed(limit) => (limit.get(), None),
            Limit::Adaptive(adaptive) => (adaptive.initial(), Some(Controller::new(adaptive, now))),
        };
        Self {
            settings,
            in_flight: AtomicU32::new(0),
            limit: AtomicU32::new(limit),
            waiting: AtomicU32::new(0),
            bound: AtomicBool::new(false),
            queue: Mutex::new(Queue::new(settings.queue)),
            controller,
        }
    }

    /// A request arrives. `waiter` is called only if it must wait, with the lock of the queue held, so let it do little. `wake` is
    /// called for others, whose wait ends by this; see [`leave`](Self::leave).
    pub fn arrive(
        &self,
        now: Instant,
        waiter: impl FnOnce() -> W,
        mut wake: impl FnMut(W, Verdict) -> bool,
    ) -> Arrival {
        if self.waiting.load(Ordering::SeqCst) == 0 && self.acquire() {
            return Arrival::Admitted;
        }
        self.bound.store(true, Ordering::Relaxed);
        let mut told = Told::default();
        let arrival = {
            let mut queue = self.lock();
            // First announced, then tried once more: who leaves either sees this waiter or has left a free slot before.
            self.waiting.store(queue.len().saturating_add(1), Ordering::SeqCst);
            let arrival = match self.acquire_for_new(&queue) {
                true => Arrival::Admitted,
                false => match queue.push(now, waiter, &mut told.shed) {
                    Push::Queued { ticket, check_at } => Arrival::Queued { ticket, check_at },
                    Push::Full => Arrival::Shed(self.shed(ShedReason::QueueFull)),
                },
            };
            self.trim(&mut queue, now, &mut told);
            arrival
        };
        self.tell(now, told, &mut wake);
        arrival
    }

    /// A request has ended, `latency` after it was admitted (its time in the queue not counted). Each waiter whose wait ends by this
    /// is handed to `wake`, which says whether somebody was still there: if not, the slot goes to the next.
    ///
    /// A waiter that goes away while its verdict is on the way has to see to it: [`cancel`](Self::cancel).
    pub fn leave(
        &self,
        now: Instant,
        outcome: Outcome,
        latency: Duration,
        mut wake: impl FnMut(W, Verdict) -> bool,
    ) {
        let changed = self.learn(now, outcome, latency);
        self.release();
        if self.waiting.load(Ordering::SeqCst) > 0 || changed {
            self.hand_on(now, &mut wake);
        }
    }

    /// A waiter's time has come: it has waited until `check_at`.
    pub fn expired(&self, ticket: Ticket, now: Instant) -> Patience {
        let mut queue = self.lock();
        let patience = match queue.expired(ticket, now) {
            Still::Waits(until) => Patience::Until(until),
            Still::Expired => Patience::Shed(self.shed(ShedReason::WaitedTooLong)),
            Still::Unknown => Patience::Told,
        };
        self.waiting.store(queue.len(), Ordering::SeqCst);
        patience
    }

    /// A waiter goes away: its caller has, or its deadline is over. False: its verdict is on the way, and if that is
    /// [`Verdict::Admitted`] it holds a slot and must [`leave`](Self::leave).
    #[must_use]
    pub fn cancel(&self, ticket: Ticket) -> bool {
        let mut queue = self.lock();
        let removed = queue.remove(ticket);
        self.waiting.store(queue.len(), Ordering::SeqCst);
        removed
    }

    /// What it was made of.
    #[must_use]
    pub fn settings(&self) -> &ConcurrencySettings {
        &self.settings
    }

    /// How many are in flight.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// How many may be in flight now.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// How many wait.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Queue<W>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shed(&self, reason: ShedReason) -> Shed {
        Shed { reason, retry_after: self.settings.retry_after }
    }

    fn acquire(&self) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        let one_more = |in_flight: u32| (in_flight < limit).then_some(in_flight.saturating_add(1));
        self.in_flight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).is_ok()
    }

    /// A newcomer passes nobody who waits.
    fn acquire_for_new(&self, queue: &Queue<W>) -> bool {
        queue.len() == 0 && self.acquire()
    }

    fn release(&self) {
        let one_less = |in_flight: u32| in_flight.checked_sub(1);
        // Err: somebody left who had not been admitted; there is nothing to take away.
        let _ = self.in_flight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less);
    }

    /// What ends by itself: slots that are free while somebody waits, and waits that are too long.
    fn trim(&self, queue: &mut Queue<W>, now: Instant, told: &mut Told<W>) {
        while queue.len() > 0 && self.acquire() {
            let Some(waiter) = queue.pop(now) else {
                self.release();
                break;
            };
            told.admitted.push(waiter);
        }
        queue.shed_old(now, &mut told.shed);
        self.waiting.store(queue.len(), Ordering::SeqCst);
    }

    fn hand_on(&self, now: Instant, wake: &mut impl FnMut(W, Verdict) -> bool) {
        let mut told = Told::default();
        self.trim(&mut self.lock(), now, &mut told);
        self.tell(now, told, wake);
    }

    /// Wakes without the lock, so that whatever a waker does can't hold others up.
    fn tell(&self, now: Instant, told: Told<W>, wake: &mut impl FnMut(W, Verdict) -> bool) {
        let mut told = told;
        loop {
            let mut nobody_there = false;
            for waiter in told.admitted {
                if !wake(waiter, Verdict::Admitted) {
                    self.release();
                    nobody_there = true;
                }
            }
            let shed = Verdict::Shed(self.shed(ShedReason::WaitedTooLong));
            for waiter in told.shed {
                wake(waiter, shed);
            }
            if !nobody_there {
                return;
            }
            told = Told::default();
            self.trim(&mut self.lock(), now, &mut told);
        }
    }

    /// Gives an adaptive limit what this request says. True: the limit has changed.
    fn learn(&self, now: Instant, outcome: Outcome, latency: Duration) -> bool {
        let Some(controller) = &self.controller else { return false };
        let Some(limit) = controller.sample(now, outcome, latency, &self.bound) else { return false };
        self.limit.store(limit, Ordering::Relaxed);
        true
    }
}

/// Whose wait has ended.
#[derive(Debug)]
struct Told<W> {
    admitted: Vec<W>,
    shed: Vec<W>,
}

impl<W> Default for Told<W> {
    fn default() -> Self {
        Self { admitted: Vec::new(), shed: Vec::new() }
    }
}
