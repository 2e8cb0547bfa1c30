//! Which replica of a service takes this request, and which is left out for a while?
//!
//! All workers of a sidecar share what is known of a replica: requests in flight, a peak-EWMA of its latency, and whether it has
//! been failing. [`choose`] draws two replicas at random and takes the one whose latency times requests in flight is lower, which
//! comes close to the best choice of all without looking at all (Mitzenmacher, "The power of two choices in randomized load
//! balancing", 2001). [`InFlight::end`] says what became of the request.
//!
//! A replica that fails several times in a row is ejected for a second, then two, up to a minute; after that one request at a time
//! tries it before it is back. Never more than half of the replicas are ejected at once: when most of them fail, the fault is
//! elsewhere, and fewer replicas would only add overload to it. One that can't be connected to is unreachable: nobody is served by
//! asking it, so it gets nothing while others are there, however many of them there are, until a trial has reached it.
//!
//! **Invariant**: a choice and the end of a request that went well read and write atomics alone. A lock is taken where a replica
//! leaves or comes back, and where the set of addresses changes.
//!
//! ```
//! # use std::time::{Duration, Instant};
//! # use kiro_core::balance::{Outcome, Replicas, Settings, choose};
//! let now = Instant::now();
//! let replicas = Replicas::new(Settings::default(), now);
//! replicas.update(&["10.0.0.1:15006".parse().unwrap(), "10.0.0.2:15006".parse().unwrap()], now);
//! let snapshot = replicas.snapshot();
//! let mut request = choose(&snapshot, now, 4, &[]).unwrap();
//! request.sent(now + Duration::from_millis(1));
//! let event = request.end(now + Duration::from_millis(3), Outcome::Success);
//! assert!(event.is_none());
//! ```

mod choice;
mod latency;
mod outlier;
mod replica;
mod replicas;
mod settings;
mod state;
#[cfg(test)]
mod tests;

pub use choice::choose;
pub use replica::{InFlight, Outcome, Replica, View};
pub use replicas::{REPLICAS_MAX, Replicas, Snapshot};
pub use settings::{Settings, SettingsError};
pub use state::{Cause, Change, Event, State};
