//! Who is at the other end of this connection, and can we prove who we are?
//!
//! Everything of Kiro that touches TLS: what a sidecar loads ([`Identity`], [`SidecarIdentity`], [`edges`]), how it follows renewed
//! files ([`watch_sidecar`]), and one type for each kind of handshake ([`MeshServer`], [`MeshClient`], [`LoopbackServer`],
//! [`LoopbackClient`], [`IngressServer`]).
//!
//! **Invariants**
//!
//! - A mesh connection is TLS 1.3 with a leaf at both ends, each proven against the CA, its validity, its use, its trust domain
//!   and the one SPIFFE ID that may stand there.
//! - No session is resumed and no ticket is issued, at either end of any listener: a resumed session asks no verifier. A
//!   handshake that ends without the verifier having been asked is refused.
//! - Each handshake that says something about a certificate, and each that fails, makes exactly one log line.
//! - Private keys and edge secrets appear in no `Debug`, no `Display` and no log line.

pub mod edges;

mod config;
mod error;
mod expiry;
mod facts;
mod files;
mod handshake;
mod identity;
mod line;
mod sidecar;
mod verify;
mod watch;

pub use config::{
    IngressServer, LoopbackClient, LoopbackServer, MeshClient, MeshServer, TlsConfigError, ingress_server,
    loopback_client, loopback_client_h2, loopback_server, mesh_client, mesh_server, outbound_client,
};
pub use edges::EdgeSecrets;
pub use error::{HandshakeError, HandshakeErrorKind, classify_io};
pub use expiry::{ExpiryLevel, ExpiryWarning, expiry_warning};
pub use facts::LeafFacts;
pub use handshake::{Established, HandshakeContext, TlsFacts, exporter};
pub use identity::{Identity, IdentityError, Material};
pub use sidecar::{IngressFiles, IngressMaterial, SidecarFiles, SidecarIdentity, SidecarSource};
pub use watch::{POLL_EVERY, watch_sidecar};
