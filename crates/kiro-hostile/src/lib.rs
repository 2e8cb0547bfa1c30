//! What does a hostile client send? HTTP/2 written by hand ([`frames`]), and the floods that are made of it ([`floods`]).
//!
//! The tests of a mesh see that each flood is cut off, and `make bench-hostile` measures what it costs others: both send the same bytes.
//!
//! **Invariant.** Nothing here knows a socket, a clock, or any other crate of Kiro; and nothing that ships is built from it.

pub mod floods;
pub mod frames;

pub use floods::{FLOODS, Flood, Pieces};
