//! How many TLS handshakes run at a time, and whose turn is it?

use std::cell::RefCell;
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
        Self { under_way: RefCell::default(), freed: Notify::new(), metrics: Arc::clone(metrics) }
    }

    /// Waits for a turn; the caller limits the wait.
    pub(crate) async fn turn(&self) -> (&Self, Rc<Handshake>) {
        let mut counted = false;
        loop {
            let freed = self.freed.notified();
            let oldest = {
                let mut under_way = self.under_way.borrow_mut();
                let oldest = under_way.front().filter(|_| under_way.len() >= limits::HANDSHAKES_PER_LISTENER);
                let oldest = oldest.map(|oldest| oldest.since);
                if oldest.is_some() && !counted {
                    counted = true;
                    self.metrics.limit_hit(Limit::Handshakes);
                }
                let old = oldest.filter(|since| since.elapsed() >= limits::ROOM_MADE_AFTER);
                if old.is_some()
                    && let Some(oldest) = under_way.pop_front()
                {
                    oldest.leave.notify_one();
                }
                match oldest {
                    Some(since) if old.is_none() => since,
                    _ => {
                        let handshake = Rc::new(Handshake { since: Instant::now(), leave: Notify::new() });
                        under_way.push_back(Rc::clone(&handshake));
                        return (self, handshake);
                    }
                }
            };
            tokio::select! {
                () = freed => {}
                () = tokio::time::sleep_until(oldest + limits::ROOM_MADE_AFTER) => {}
            }
        }
    }
}

impl Drop for HandshakeTurn<'_> {
    fn drop(&mut self) {
        self.gate.under_way.borrow_mut().retain(|other| !Rc::ptr_eq(other, &self.under_way));
        self.gate.freed.notify_one();
    }
}
