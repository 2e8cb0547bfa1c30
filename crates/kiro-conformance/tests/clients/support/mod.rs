//! What the tests are made of: sidecars, applications, clients.

pub(crate) mod app;
pub(crate) mod process;
pub(crate) mod tools;
pub(crate) mod world;
