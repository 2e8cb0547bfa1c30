//! What is a person told of a replica that fails?

use std::net::SocketAddr;
use std::time::Duration;

/// What a person sees of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// In, with all of its share.
    Up,
    /// In, with a share that grows: it is new, or has just come back.
    Warming,
    /// Out, since it failed several times in a row.
    Ejected,
    /// Out, since it could not be connected to.
    Unreachable,
    /// Out, and one request is trying it.
    Probing,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Up, Self::Warming, Self::Ejected, Self::Unreachable, Self::Probing];

    /// The name in metrics, logs and `/config`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Warming => "warming",
            Self::Ejected => "ejected",
            Self::Unreachable => "unreachable",
            Self::Probing => "probing",
        }
    }
}

/// A replica went out or came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Which one.
    pub address: SocketAddr,
    /// What became of it.
    pub change: Change,
}

/// What became of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It is out, or stays so.
    Ejected {
        /// Why.
        cause: Cause,
        /// When it will be tried.
        lasts: Duration,
    },
    /// It is in again: a request reached it and went well.
    Returned {
        /// How long it was out.
        after: Duration,
    },
    /// It is in again though no request has gone well: more than half of the replicas would be ejected. Others have left the set
    /// for good, or others are ejected and this one was unreachable and answers now, if only with failures.
    Readmitted {
        /// How long it was out.
        after: Duration,
    },
}

/// Why a replica is out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// Several failures in a row.
    Failures,
    /// A connect that failed.
    Unreachable,
    /// The trial after an ejection failed.
    Trial,
}

impl Cause {
    /// The name in logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Failures => "consecutive failures",
            Self::Unreachable => "unreachable",
            Self::Trial => "trial failed",
        }
    }
}
