//! What if clients do not read the answers that came on one connection?
//!
//! All answers of a peer share the window of one connection, and what a client leaves unread stays counted against it: enough slow
//! readers would stop the edge for everybody. Up to half of the window may be held so, for as long as a body may stand still. Beyond
//! that, the answers that have not been read for longest are given up, which opens the window again.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::rc::{Rc, Weak};

use tokio::task::spawn_local;

use crate::limits;

/// An answer that can be given up.
pub(crate) trait Answer {
    /// Lets go of its stream.
    fn give_up(&self);
}

/// How far a client has read an answer.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    /// Whether something is there that the client has not taken.
    owed: Cell<bool>,
    takes: Cell<u32>,
    seen: Cell<u32>,
    /// Looks in a row at which nothing had been taken.
    quiet: Cell<u32>,
}

impl Reading {
    /// Something may be there, and nobody has asked for it.
    pub(crate) fn unread() -> Self {
        Self { owed: Cell::new(true), ..Self::default() }
    }

    /// The client has asked for more; `found` says whether it got something.
    pub(crate) fn asked(&self, found: bool) {
        self.owed.set(found);
        self.takes.set(self.takes.get().wrapping_add(1));
    }

    fn look(&self) -> u32 {
        let quiet = self.owed.get() && self.takes.get() == self.seen.replace(self.takes.get());
        self.quiet.set(if quiet { self.quiet.get().saturating_add(1) } else { 0 });
        self.quiet.get()
    }
}

type Open = HashMap<u64, (Rc<Reading>, Weak<dyn Answer>)>;

/// The larger answers of one connection.
#[derive(Default)]
pub(crate) struct Readers {
    open: RefCell<Open>,
    next: Cell<u64>,
    looking: Cell<bool>,
}

/// An answer's place among them, left when it is dropped.
pub(crate) struct Registered {
    key: u64,
    readers: Rc<Readers>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.readers.open.borrow_mut().remove(&self.key);
    }
}

impl Readers {
    /// Registers an answer.
    pub(crate) fn register(self: &Rc<Self>, reading: &Rc<Reading>, answer: Weak<dyn Answer>) -> Registered {
        let key = self.next.get();
        self.next.set(key.wrapping_add(1));
        self.open.borrow_mut().insert(key, (Rc::clone(reading), answer));
        if self.open.borrow().len() > limits::SLOW_READERS && !self.looking.replace(true) {
            spawn_local(Rc::clone(self).watch());
        }
        Registered { key, readers: Rc::clone(self) }
    }

    /// Looks after them until they are few again.
    async fn watch(self: Rc<Self>) {
        while self.open.borrow().len() > limits::SLOW_READERS {
            tokio::time::sleep(limits::SLOW_READERS_EVERY).await;
            self.look();
        }
        self.looking.set(false);
    }

    fn look(&self) {
        let mut slow: Vec<_> = {
            let open = self.open.borrow();
            let quiet =
                |(reading, answer): &(Rc<Reading>, Weak<dyn Answer>)| (reading.look(), answer.clone());
            open.values().map(quiet).filter(|(quiet, _)| *quiet >= 2).collect()
        };
        let too_many = slow.len().saturating_sub(limits::SLOW_READERS);
        slow.sort_unstable_by_key(|(quiet, _)| Reverse(*quiet));
        for (_, answer) in slow.into_iter().take(too_many) {
            if let Some(answer) = answer.upgrade() {
                answer.give_up();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::LocalSet;

    use super::*;

    #[derive(Default)]
    struct Kept(Cell<bool>);

    impl Answer for Kept {
        fn give_up(&self) {
            self.0.set(true);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_slowest_readers_beyond_half_of_the_window_are_given_up() {
        let readers = Rc::new(Readers::default());
        let begin = async {
            let mut open = Vec::new();
            for number in 0..limits::SLOW_READERS + 100 {
                let (reading, answer) = (Rc::new(Reading::unread()), Rc::new(Kept::default()));
                let weak: Weak<dyn Answer> = Rc::downgrade(&answer) as Weak<dyn Answer>;
                let registered = readers.register(&reading, weak);
                // Ten wait for their peer, as server-sent events do.
                if number < 10 {
                    reading.asked(false);
                }
                open.push((reading, answer, registered));
            }
            for _ in 0..10 {
                tokio::time::sleep(limits::SLOW_READERS_EVERY).await;
                // Ten more read now and then.
                for (reading, _, _) in open.iter().skip(10).take(10) {
                    reading.asked(true);
                }
            }
            open
        };
        let open = LocalSet::new().run_until(begin).await;
        let given_up = |(_, answer, _): &(Rc<Reading>, Rc<Kept>, Registered)| answer.0.get();
        assert!(!open.iter().take(20).any(given_up), "who waits or reads keeps his answer");
        // 80 too many; who is given up here does not leave the register, so it may be the same ones again.
        assert_eq!(open.iter().filter(|one| given_up(one)).count(), 80);
    }
}
