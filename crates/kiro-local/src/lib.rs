//! How does a whole mesh run in one process?
//!
//! The same sidecars as in containers, each with its own listeners on loopback, real TLS, signatures and policy; only the
//! certificates are made in memory and the services' addresses stand in the mesh file, since no DNS knows them. [`mesh`] starts
//! the sidecars for any mesh file; [`demo`] adds the three demonstration services and draws finished traces on the terminal.

pub mod demo;
pub mod mesh;
pub mod tree;

pub use demo::{Demo, DemoError, DemoOptions};
pub use mesh::{LocalError, LocalMesh, MeshOptions};
