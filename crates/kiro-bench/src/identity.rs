//! Who do the proxies say they are? One authority and two leaves, made by the crate that makes Kiro's, serve all pairs.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use kiro_core::identity::{ServiceName, TrustDomain};
use kiro_pki::Authority;
use time::OffsetDateTime;

/// What the authority vouches for.
pub(crate) const TRUST_DOMAIN: &str = "bench.mesh";
/// The service beside which the client is.
pub(crate) const CALLER: &str = "caller";
/// The service that is called.
pub(crate) const CALLEE: &str = "callee";

/// Issues identities for meshes of any size.
pub(crate) struct Issuer(Authority);

/// The directories of caller and callee; each has `ca.pem`, `leaf.pem`, `leaf.key`, `both.pem` and `edges.json`.
#[derive(Debug, Clone)]
pub(crate) struct Identities {
    /// The caller's.
    pub(crate) caller: PathBuf,
    /// The callee's.
    pub(crate) callee: PathBuf,
}

impl Issuer {
    /// A new authority.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let domain = TrustDomain::parse(TRUST_DOMAIN)?;
        Ok(Self(Authority::generate(&domain, OffsetDateTime::now_utc())?))
    }

    /// Writes what caller and callee hold in a mesh of these services: a leaf each, and a secret for each of their edges. The other
    /// services run nowhere, so they need no files.
    pub(crate) fn write(&self, dir: &Path, services: &[String]) -> anyhow::Result<Identities> {
        let names = services.iter().map(|name| ServiceName::parse(name)).collect::<Result<Vec<_>, _>>()?;
        let one = |name: &str| -> anyhow::Result<PathBuf> {
            let service = ServiceName::parse(name)?;
            let issued = self.0.issue_sidecar(&service, OffsetDateTime::now_utc())?;
            let home = dir.join(name);
            fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
            secret(&home.join("ca.pem"), self.0.ca_pem())?;
            secret(&home.join("leaf.pem"), &issued.leaf_pem)?;
            secret(&home.join("leaf.key"), &issued.key_pem)?;
            // HAProxy wants both in one file.
            secret(&home.join("both.pem"), &[issued.leaf_pem.as_slice(), &issued.key_pem].concat())?;
            secret(&home.join("edges.json"), &self.0.edges_json(names.iter(), &service)?)?;
            Ok(home)
        };
        Ok(Identities { caller: one(CALLER)?, callee: one(CALLEE)? })
    }
}

/// Writes a file that its owner alone can read: Kiro takes no other key.
fn secret(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    // Opening an old file would keep its mode.
    let _ = fs::remove_file(path);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    file.write_all(bytes).with_context(|| format!("cannot write {}", path.display()))
}
