//! Clients and servers that people use, through real sidecars: each test is one promise that Kiro makes to them.
//!
//! What needs nothing but curl runs with all other tests. The rest is ignored there, and run by `make conformance`, which prepares
//! Python and Go clients beside the tests; a test whose tool is missing says SKIPPED, or fails under `KIRO_CONFORMANCE=all`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod browser;
mod curl;
mod curl_bodies;
mod grpc;
mod nginx;
mod streams;
mod support;
mod tcp;
mod websocket;
