//! Kiro's sidecar: what stands beside a service and carries all of its traffic.
//!
//! Read `inbound` and `outbound` first: each is a request's way from top to bottom. `sidecar` starts and stops the whole, `worker`
//! is one thread of it.
//!
//! This crate can't see `kiro-pki`, but for its unit tests: a sidecar can't mint an identity.

mod abuse;
mod admin;
mod admission;
mod answer;
mod app;
mod attempt;
mod body;
mod client;
mod counts;
mod discover;
mod drain;
mod early;
mod edge;
mod exchange;
mod faults;
mod flow;
mod frames;
mod h2_io;
mod header_size;
mod headers;
mod health;
mod inbound;
mod ingress;
mod interim;
mod limits;
mod listen;
mod local;
mod lock;
mod metrics;
mod mirror;
mod outbound;
mod overload;
mod park;
mod payload;
mod pod;
mod proof;
mod rates;
mod reject;
mod route;
mod send;
mod serve;
mod settings;
mod sidecar;
mod spans;
mod state;
mod trailers;
#[cfg(test)]
mod trial;
mod tunnel;
mod upstream;
mod versions;
mod websocket;
mod worker;

pub mod framing;
pub mod memory;
pub mod process;

pub use admission::process_descriptors;
pub use listen::BindError;
pub use reject::{CODES, Origin, Reject, by_code};
pub use settings::{Listen, LocalHost, MeshSource, PEER_PORT, Settings, default_workers};
pub use sidecar::{Addresses, MESH_FILE, Sidecar, StartError, read_mesh};
