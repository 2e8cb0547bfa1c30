//! The `kiro` command, run as a person and as Docker run it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests, where a panic is a failed test"
)]

#[cfg(feature = "sidecar")]
mod call;
#[cfg(feature = "sidecar")]
mod check;
#[cfg(feature = "sidecar")]
mod drain;
mod guard;
#[cfg(feature = "sidecar")]
mod health;
mod pod;
mod probe;
#[cfg(feature = "sidecar")]
mod sidecar;
mod support;
