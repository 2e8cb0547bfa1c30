//! What does the mesh decide, given what it sees?
//!
//! Kiro's rules, and nothing else: who is who ([`identity`]), which service an authority means ([`authority`]), which paths can
//! be read in two ways ([`path`]), what the mesh file says ([`mesh`]), what it allows ([`policy`]), and whether a request is the
//! one that its sender signed ([`signature`]).
//!
//! **Invariant**: no I/O, no clock, no randomness, no runtime. Time is a parameter. Every function is total: whatever comes from
//! the network or a file gives an answer or an error, in bounded memory, and never a panic.

pub mod authority;
pub mod balance;
pub mod breaker;
pub mod concurrency;
pub mod deadline;
pub mod fields;
pub mod health;
pub mod identity;
pub mod interfaces;
pub mod mesh;
pub mod path;
pub mod policy;
pub mod quota;
#[cfg(test)]
mod random;
pub mod rate;
pub mod replay;
pub mod retry;
pub mod shaping;
pub mod signature;
