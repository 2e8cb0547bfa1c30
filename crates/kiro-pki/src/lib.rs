//! Who is who in the mesh, and what proves it?
//!
//! A certificate authority for one trust domain, a leaf for each sidecar, application and ingress, and a secret for each edge:
//! [`provision`] keeps them in a directory, [`in_memory`] makes the same files for a mesh in one process, [`show`] tells what a
//! directory holds.
//!
//! **Invariant.** Nothing that runs beside a workload depends on this crate: what can't see the authority can't mint an identity.
//!
//! **Invariant.** Key material appears in no `Debug`, no error and no report, and is overwritten when dropped where the libraries
//! let us (a parsed key inside aws-lc clears itself; rcgen's copy and all of our buffers are cleared here).

mod authority;
mod edges;
mod error;
mod facts;
mod files;
mod layout;
mod memory;
mod pem;
mod provision;
mod report;
mod show;
mod standing;

pub use authority::{Authority, Issued, LeafSpec};
pub use edges::{EDGE_EPOCH, EdgeMaster};
pub use error::PkiError;
pub use files::write_if_changed;
pub use memory::{AppFiles, IngressFiles, MemoryPki, SidecarFiles, in_memory};
pub use provision::{Options, Owners, provision};
pub use report::{Action, Change, Report};
pub use show::{Entry, KeyEntry, Use, show};

use time::Duration;

/// The common name of every authority that this crate makes; a leaf with another issuer is somebody else's.
pub const AUTHORITY_NAME: &str = "KiroCA";

/// How long an authority lives: longer than a Compose project, since replacing it means new leaves for everybody.
pub const AUTHORITY_LIFETIME: Duration = Duration::days(3652);

/// How long a leaf lives until renewal is automatic: a person has to run `make certs` once in this time.
pub const LEAF_LIFETIME: Duration = Duration::days(90);

/// How far not-before lies in the past: hosts' clocks differ, and a leaf must be good at once on a host whose clock is slow.
pub const BACKDATED: Duration = Duration::minutes(2);

/// When a leaf is due for renewal by default: at a third of its life, which leaves a month of runs to try again.
pub const RENEW_WITHIN: std::time::Duration = std::time::Duration::from_secs(30 * 24 * 60 * 60);
