//! Where does a request go next, and when is it given up?
//!
//! Only what the peer surely did not process is sent again: a connect that failed goes to another address, a stream that was
//! refused, or never reached the peer, goes on another connection. What a body allows is the caller's to say: one that has begun
//! to stream is gone.

use std::net::SocketAddr;
use std::rc::Rc;

use crate::limits;
use crate::reject::{Refused, Reject};

/// How far a failed attempt came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reached {
    /// No connection: nothing was sent.
    Nobody,
    /// A connection, and the peer surely did not process the request.
    NotProcessed,
    /// The peer may have processed it.
    MaybeProcessed,
}

/// An attempt that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What the caller would learn.
    pub(crate) refused: Refused,
    /// How far it came.
    pub(crate) reached: Reached,
}

impl Failure {
    /// A failure before anything was sent.
    pub(crate) fn nobody(refused: Refused) -> Self {
        Self { refused, reached: Reached::Nobody }
    }
}

/// The attempts of one request.
#[derive(Debug)]
pub(crate) struct Attempts {
    addresses: Rc<[SocketAddr]>,
    turn: usize,
    made: u32,
    unreachable: usize,
}

impl Attempts {
    /// Begins at `turn` among the addresses.
    pub(crate) fn new(addresses: Rc<[SocketAddr]>, turn: usize) -> Self {
        Self { addresses, turn, made: 0, unreachable: 0 }
    }

    /// The address of the next attempt.
    pub(crate) fn next(&mut self) -> Result<SocketAddr, Refused> {
        let place = (self.turn + self.made as usize).checked_rem(self.addresses.len()).unwrap_or(0);
        let address = self.addresses.get(place).ok_or(Reject::NameUnresolved)?;
        self.made += 1;
        Ok(*address)
    }

    /// Takes a failure in: `Ok` where another attempt is due.
    pub(crate) fn settle(&mut self, failure: Failure, whole: bool) -> Result<(), Refused> {
        let again = match failure.reached {
            Reached::Nobody => {
                self.unreachable += 1;
                whole && self.unreachable < self.addresses.len()
            }
            Reached::NotProcessed => whole,
            Reached::MaybeProcessed => false,
        };
        if again && self.made < limits::ATTEMPTS { Ok(()) } else { Err(failure.refused) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(count: u16) -> Rc<[SocketAddr]> {
        (1..=count).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect()
    }

    fn failure(reached: Reached) -> Failure {
        Failure { refused: Reject::UpstreamConnect.into(), reached }
    }

    #[test]
    fn each_address_is_tried_once_when_nobody_listens() {
        let mut attempts = Attempts::new(addresses(2), 1);
        assert_eq!(attempts.next().unwrap().port(), 2);
        attempts.settle(failure(Reached::Nobody), true).unwrap();
        assert_eq!(attempts.next().unwrap().port(), 1);
        attempts.settle(failure(Reached::Nobody), true).unwrap_err();
    }

    #[test]
    fn what_may_have_been_processed_is_not_sent_again() {
        let mut attempts = Attempts::new(addresses(3), 0);
        attempts.next().unwrap();
        attempts.settle(failure(Reached::MaybeProcessed), true).unwrap_err();
    }

    #[test]
    fn a_body_that_has_gone_is_not_sent_again() {
        let mut attempts = Attempts::new(addresses(3), 0);
        attempts.next().unwrap();
        attempts.settle(failure(Reached::NotProcessed), false).unwrap_err();
    }

    #[test]
    fn attempts_end() {
        let mut attempts = Attempts::new(addresses(1), 0);
        for _ in 1..limits::ATTEMPTS {
            attempts.next().unwrap();
            attempts.settle(failure(Reached::NotProcessed), true).unwrap();
        }
        attempts.next().unwrap();
        attempts.settle(failure(Reached::NotProcessed), true).unwrap_err();
    }

    #[test]
    fn no_address_is_an_error() {
        let mut attempts = Attempts::new(addresses(0), 0);
        assert_eq!(attempts.next().unwrap_err().reject, Reject::NameUnresolved);
    }
}
