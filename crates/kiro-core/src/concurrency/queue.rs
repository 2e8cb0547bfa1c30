//! Who of those that wait goes next, and who waits in vain?

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How requests wait. Every value is a sensible one: no place at all makes a limit that refuses at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueSettings {
    /// How many may wait.
    pub max_waiting: u32,
    /// How long one waits while the queue does not become empty. 10 ms: CoDel and Facebook have 5, folly's servers up to 20; a timer
    /// of a loaded worker is late by a few.
    pub target: Duration,
    /// How long a queue that is never empty still is a burst. 100 ms is CoDel's and Facebook's: a round trip and a little, so that
    /// a burst has time to pass.
    pub interval: Duration,
    /// How long the newest waits, whatever happens, when nothing ends.
    pub max_wait: Duration,
}

impl Default for QueueSettings {
    /// A hundred places (as Netflix's limiters have), 10 ms in 100 ms, a second at most.
    fn default() -> Self {
        Self {
            max_waiting: 100,
            target: Duration::from_millis(10),
            interval: Duration::from_millis(100),
            max_wait: Duration::from_secs(1),
        }
    }
}

/// A place in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

#[derive(Debug)]
struct Waiter<W> {
    ticket: Ticket,
    since: Instant,
    wakes: W,
}

/// Those who wait, the oldest at the front: by ticket as well as by time.
#[derive(Debug)]
pub(super) struct Queue<W> {
    settings: QueueSettings,
    waiters: VecDeque<Waiter<W>>,
    next: u64,
    /// Since when somebody has always been waiting.
    busy_since: Option<Instant>,
}

pub(super) enum Push {
    Queued { ticket: Ticket, check_at: Instant },
    Full,
}

pub(super) enum Still {
    Waits(Instant),
    Expired,
    Unknown,
}

impl<W> Queue<W> {
    pub(super) fn new(settings: QueueSettings) -> Self {
        Self { settings, waiters: VecDeque::new(), next: 0, busy_since: None }
    }

    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.waiters.len()).unwrap_or(u32::MAX)
    }

    /// Whether this is load that does not go away, and no burst.
    fn overloaded(&self, now: Instant) -> bool {
        self.busy_since.is_some_and(|since| now.saturating_duration_since(since) >= self.settings.interval)
    }

    /// One more at the end. In a full queue the oldest makes room under load, since it would be the last to be served; before that,
    /// the newcomer would.
    pub(super) fn push(&mut self, now: Instant, waiter: impl FnOnce() -> W, shed: &mut Vec<W>) -> Push {
        if self.len() >= self.settings.max_waiting {
            if !self.overloaded(now) {
                return Push::Full;
            }
            let Some(oldest) = self.waiters.pop_front() else { return Push::Full };
            shed.push(oldest.wakes);
        }
        let ticket = Ticket(self.next);
        self.next = self.next.wrapping_add(1);
        self.busy_since.get_or_insert(now);
        self.waiters.push_back(Waiter { ticket, since: now, wakes: waiter() });
        Push::Queued { ticket, check_at: self.check_at(now, now, true) }
    }

    /// Who goes next: the oldest, under load the newest.
    pub(super) fn pop(&mut self, now: Instant) -> Option<W> {
        let waiter = if self.overloaded(now) { self.waiters.pop_back() } else { self.waiters.pop_front() };
        self.note_empty();
        Some(waiter?.wakes)
    }

    /// Takes out those who wait in vain: under load, all that are older than the target but the newest.
    pub(super) fn shed_old(&mut self, now: Instant, shed: &mut Vec<W>) {
        if !self.overloaded(now) {
            return;
        }
        while self.waiters.len() > 1 {
            let old = |waiter: &Waiter<W>| now.saturating_duration_since(waiter.since) > self.settings.target;
            if !self.waiters.front().is_some_and(old) {
                return;
            }
            shed.extend(self.waiters.pop_front().map(|waiter| waiter.wakes));
        }
    }

    pub(super) fn expired(&mut self, ticket: Ticket, now: Instant) -> Still {
        let Some(index) = self.index(ticket) else { return Still::Unknown };
        let Some(since) = self.waiters.get(index).map(|waiter| waiter.since) else { return Still::Unknown };
        let check_at = self.check_at(since, now, index + 1 == self.waiters.len());
        if check_at > now {
            return Still::Waits(check_at);
        }
        self.waiters.remove(index);
        self.note_empty();
        Still::Expired
    }

    pub(super) fn remove(&mut self, ticket: Ticket) -> bool {
        let removed = self.index(ticket).and_then(|index| self.waiters.remove(index)).is_some();
        self.note_empty();
        removed
    }

    /// When somebody who came at `since` waits in vain, as it looks now.
    fn check_at(&self, since: Instant, now: Instant, newest: bool) -> Instant {
        let at_most = after(since, self.settings.max_wait);
        if newest && self.overloaded(now) {
            return at_most;
        }
        let burst_over = after(self.busy_since.unwrap_or(now), self.settings.interval);
        burst_over.max(after(since, self.settings.target)).min(at_most)
    }

    fn index(&self, ticket: Ticket) -> Option<usize> {
        self.waiters.binary_search_by_key(&ticket, |waiter| waiter.ticket).ok()
    }

    fn note_empty(&mut self) {
        if self.waiters.is_empty() {
            self.busy_since = None;
        }
    }
}

/// A time that is too long to be added is one that nobody lives to see the end of.
fn after(at: Instant, time: Duration) -> Instant {
    at + time.min(Duration::from_secs(366 * 24 * 3600))
}
