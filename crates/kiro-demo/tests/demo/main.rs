//! Do the three services answer as they should, each behind a sidecar that is played by a test?

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod certificates;
mod lifetime;
mod loopback;
mod refusals;
mod services;
mod support;
