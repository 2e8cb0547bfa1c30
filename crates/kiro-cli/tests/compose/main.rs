//! The mesh in real containers, looked at from outside. `docker/test` brings it up and runs these, one after the other.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "tests: a panic is a failed one, and what they measure is for a person to see"
)]

mod containers;
mod healing;
mod requests;
mod support;
mod traces;
