//! The `kiro` command, run as a person and as Docker run it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests, where a panic is a failed test"
)]

mod call;
mod check;
mod guard;
mod pod;
mod probe;
mod sidecar;
mod support;
