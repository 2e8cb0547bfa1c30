//! Whole meshes in one process: real sockets, TLS, signatures and policy. One story a file.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests say what they expect"
)]

mod client;
mod hostile;
mod support;

mod bodies;
mod failures;
mod framing;
mod happy;
mod policy;
mod requests;
mod signatures;
mod tls;
mod traces;
mod tunnels;
