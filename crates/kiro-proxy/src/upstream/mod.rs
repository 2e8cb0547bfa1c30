//! How does a worker reach its peers?
//!
//! [`pool`] keeps one HTTP/2 connection for each address and identity, [`connect`] opens it: TCP, mutual TLS with the exact
//! SPIFFE ID of the service that was dialled, HTTP/2 by ALPN.

pub(crate) mod connect;
pub(crate) mod pool;
pub(crate) mod readers;

pub(crate) use pool::{Upstream, Upstreams};
