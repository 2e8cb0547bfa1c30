//! Whole meshes in one process: real sockets, TLS, signatures and policy. One story a file.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests say what they expect"
)]

mod client;
mod fake;
mod faults;
mod h2_ends;
mod h2_frames;
mod hostile;
mod support;

mod abuse;
mod admin;
mod admission;
mod bodies;
mod callee_floods;
mod corpus;
mod deadlines;
mod drain;
mod failures;
mod floods;
mod framing;
mod grpc;
mod happy;
mod health;
mod http2;
mod ingress;
mod interim;
mod leaving;
mod limits;
mod metrics;
mod mirrors;
mod policy;
mod reload;
mod renewal;
mod replicas;
mod requests;
mod signatures;
mod smuggling;
mod splits;
mod streams;
mod tcp;
mod tls;
mod traces;
mod trailers;
mod tunnels;
mod upgrades;
