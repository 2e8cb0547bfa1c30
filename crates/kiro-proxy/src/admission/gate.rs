//! How many TLS handshakes run at a time, and whose turn is it?

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Limit;
use crate::limits;
use crate::metrics::{Metrics, UnderWay};

/// Lets so many handshakes with clients run at a time, at one listener of a worker. Where all turns are taken, whoever has had his for
/// longest makes room, once he has had time enough for an honest one: a crowd that stands still in its handshakes keeps nobody out.
#[derive(Debug)]
pub(crate) struct Gate {
    /// The oldest first.
    under_way: RefCell<VecDeque<Rc<Handshake>>>,
    /// Whoever waits stands in line, and the first alone looks for a turn: a crowd that woke for each would cost more than handshakes do.
    line: tokio::sync::Mutex<()>,
    /// When somebody had to make room last.
    room_made: Cell<Option<Instant>>,
    freed: Notify,
    metrics: Arc<Metrics>,
}

/// A handshake that is under way.
#[derive(Debug)]
pub(crate) struct Handshake {
    since: Instant,
    /// Told to make room.
    pub(crate) leave: Notify,
}

/// The right to run a handshake with a client.
pub(crate) struct HandshakeTurn<'a> {
    pub(crate) gate: &'a Gate,
    pub(crate) under_way: Rc<Handshake>,
    pub(crate) _counted: UnderWay,
}

impl Gate {
    /// An empty one.
    pub(crate) fn new(metrics: &Arc<Metrics>) -> Self {
        Self {
            under_way: RefCell::default(),
            line: tokio::sync::Mutex::new(()),
            room_made: Cell::new(None),
            freed: Notify::new(),
            metrics: Arc::clone(metrics),
        }
    }

    /// Waits for a turn; the caller limits the wait.
    pub(crate) async fn turn(&self) -> (&Self, Rc<Handshake>) {
        if self.is_full() {
            self.metrics.limit_hit(Limit::Handshakes);
        }
        let _first = self.line.lock().await;
        loop {
            let freed = self.freed.notified();
            let Some(room) = self.room_at() else { return (self, self.begin()) };
            if room <= Instant::now() {
                self.make_room();
                return (self, self.begin());
            }
            tokio::select! {
                () = freed => {}
                () = tokio::time::sleep_until(room) => {}
            }
        }
    }

    fn is_full(&self) -> bool {
        self.under_way.borrow().len() >= limits::HANDSHAKES_PER_LISTENER
    }

    /// When the oldest has to make room; absent where there is room.
    fn room_at(&self) -> Option<Instant> {
        let oldest = self.under_way.borrow().front().filter(|_| self.is_full())?.since;
        let at = oldest + limits::ROOM_MADE_AFTER;
        Some(self.room_made.get().map_or(at, |last| at.max(last + limits::TURNS_APART)))
    }

    fn make_room(&self) {
        self.room_made.set(Some(Instant::now()));
        if let Some(oldest) = self.under_way.borrow_mut().pop_front() {
            oldest.leave.notify_one();
        }
    }

    fn begin(&self) -> Rc<Handshake> {
        let handshake = Rc::new(Handshake { since: Instant::now(), leave: Notify::new() });
        self.under_way.borrow_mut().push_back(Rc::clone(&handshake));
        handshake
    }
}

impl Drop for HandshakeTurn<'_> {
    fn drop(&mut self) {
        self.gate.under_way.borrow_mut().retain(|other| !Rc::ptr_eq(other, &self.under_way));
        self.gate.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;
    use std::time::Duration;

    use super::*;
    use crate::admission::Admission;

    #[tokio::test(start_paused = true)]
    async fn a_crowd_of_slow_handshakes_is_not_replaced_all_at_once() {
        let gate = Gate::new(&Metrics::of_a_test(1, Admission::shared(1024, 1)));
        for _ in 0..limits::HANDSHAKES_PER_LISTENER {
            gate.turn().await;
        }
        let begin = Instant::now();
        let crowd = (0..200).map(|_| async {
            gate.turn().await;
            begin.elapsed()
        });
        let mut had = all_of(crowd).await;
        had.sort_unstable();
        assert!(had[0] >= limits::ROOM_MADE_AFTER, "{:?}", had[0]);
        // Each begins with work that the others on the thread wait for.
        let apart = had.windows(2).map(|two| two[1] - two[0]);
        assert!(apart.into_iter().all(|apart| apart >= limits::TURNS_APART), "{had:?}");
        // And nobody waits for long: as quickly as turns grow old.
        assert!(had[199] < 2 * limits::ROOM_MADE_AFTER, "{:?}", had[199]);
    }

    /// Runs all of them at the same time.
    async fn all_of<F: Future<Output = Duration>>(futures: impl Iterator<Item = F>) -> Vec<Duration> {
        let mut waiting: Vec<_> = futures.map(Box::pin).collect();
        let mut ready = Vec::new();
        std::future::poll_fn(|cx| {
            waiting.retain_mut(|future| match future.as_mut().poll(cx) {
                Poll::Ready(output) => {
                    ready.push(output);
                    false
                }
                Poll::Pending => true,
            });
            if waiting.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        ready
    }
}
