//! The mesh in real containers, looked at from outside. `docker/test` brings it up and runs these, one after the other.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod containers;
mod healing;
mod requests;
mod support;
mod traces;
