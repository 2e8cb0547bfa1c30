//! What does a load consist of? The parts of `make bench` that `make chaos` uses as well.
//!
//! [`schedule`] says when requests are to be sent, [`h1`] sends one, [`latency`] counts from the moment at which it was to be sent,
//! [`stop`] ends it all early, [`procfs`] says on what machine it was.

pub mod h1;
pub mod latency;
pub mod procfs;
pub mod schedule;
pub mod stop;

use std::io::Write as _;

/// A line for whoever waits.
pub fn say(line: &str) {
    // A reader that has gone away is no reason to stop measuring.
    let _ = writeln!(std::io::stdout(), "{line}");
}
