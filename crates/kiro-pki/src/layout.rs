//! Which file lies where, and for whom?
//!
//! ```text
//! certs/ca/           ca.pem, ca.key, edge-master.key                  never mounted anywhere
//! certs/<svc>/        ca.pem, leaf.pem, leaf.key, edges.json           the sidecar
//!                     ingress.pem, ingress.key                         … with an ingress
//! certs/<svc>-app/    ca.pem, leaf.pem, leaf.key                       the application
//! ```

use std::collections::BTreeMap;

use kiro_core::identity::{ServiceName, SpiffeId};
use kiro_core::mesh::Mesh;
use time::OffsetDateTime;

use crate::authority::{Authority, LeafSpec};
use crate::error::PkiError;
use crate::files::Access;
use crate::provision::Owners;

pub(crate) const AUTHORITY_DIR: &str = "ca";
pub(crate) const CA_CERTIFICATE: &str = "ca.pem";
pub(crate) const CA_KEY: &str = "ca.key";
pub(crate) const EDGE_MASTER: &str = "edge-master.key";
pub(crate) const EDGES: &str = "edges.json";

/// A directory that goes into one container, and what belongs in it.
pub(crate) struct Holder {
    pub(crate) directory: String,
    pub(crate) service: ServiceName,
    pub(crate) role: HolderRole,
    pub(crate) pairs: Vec<Pair>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HolderRole {
    Sidecar,
    App,
}

/// A certificate and its key.
pub(crate) struct Pair {
    pub(crate) names: PairNames,
    pub(crate) spec: LeafSpec,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PairNames {
    pub(crate) certificate: &'static str,
    pub(crate) key: &'static str,
    /// A person may put certificates of their own in this place; they are kept.
    pub(crate) may_be_theirs: bool,
}

pub(crate) const LEAF: PairNames =
    PairNames { certificate: "leaf.pem", key: "leaf.key", may_be_theirs: false };
pub(crate) const INGRESS: PairNames =
    PairNames { certificate: "ingress.pem", key: "ingress.key", may_be_theirs: true };

/// What a file's content is, as far as its mode goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    Public,
    Secret,
}

impl Holder {
    /// Whether an ingress pair belongs here.
    pub(crate) fn has_ingress(&self) -> bool {
        self.pairs.iter().any(|pair| pair.names == INGRESS)
    }

    pub(crate) fn access(&self, kind: Kind, owners: Option<Owners>) -> Access {
        access(self.role, kind, owners)
    }
}

/// Everything that the mesh file calls for.
pub(crate) fn holders(
    mesh: &Mesh,
    authority: &Authority,
    now: OffsetDateTime,
) -> Result<Vec<Holder>, PkiError> {
    let mut holders = Vec::with_capacity(mesh.services.len() * 2);
    for (name, service) in &mesh.services {
        let identity =
            |id: SpiffeId| Pair { names: LEAF, spec: authority.within(LeafSpec::identity(&id, now)) };
        let mut pairs = vec![identity(SpiffeId::sidecar(authority.trust_domain(), name))];
        if let Some(ingress) = &service.ingress {
            let spec = authority.within(LeafSpec::ingress(name, &ingress.names, now));
            pairs.push(Pair { names: INGRESS, spec });
        }
        let sidecar =
            Holder { directory: name.to_string(), service: name.clone(), role: HolderRole::Sidecar, pairs };
        let app = Holder {
            directory: format!("{name}-app"),
            service: name.clone(),
            role: HolderRole::App,
            pairs: vec![identity(SpiffeId::app(authority.trust_domain(), name))],
        };
        holders.extend([sidecar, app]);
    }
    refuse_clashes(&holders)?;
    Ok(holders)
}

fn refuse_clashes(holders: &[Holder]) -> Result<(), PkiError> {
    let mut taken = BTreeMap::from([(AUTHORITY_DIR, "the authority".to_owned())]);
    for holder in holders {
        let whose = match holder.role {
            HolderRole::Sidecar => format!("the sidecar of `{}`", holder.service),
            HolderRole::App => format!("the application of `{}`", holder.service),
        };
        if let Some(other) = taken.insert(&holder.directory, whose) {
            let (service, directory) = (holder.service.to_string(), holder.directory.clone());
            return Err(PkiError::Clash { service, directory, other });
        }
    }
    Ok(())
}

/// Who may do what. As root a directory belongs to root and its files to their reader: a reader that was taken over can then put
/// nothing in its own directory that the next run as root would fall for. An ordinary user can give nothing away, so the
/// application's key is readable for the group that both share.
pub(crate) fn access(role: HolderRole, kind: Kind, owners: Option<Owners>) -> Access {
    let mode = match (kind, role) {
        (Kind::Directory, _) => 0o750,
        (Kind::Public, _) => 0o644,
        (Kind::Secret, HolderRole::Sidecar) => 0o600,
        (Kind::Secret, HolderRole::App) => 0o640,
    };
    let reader = owners.filter(|_| rustix::process::geteuid().is_root() && kind != Kind::Directory);
    let uid = reader.map(|owners| match role {
        HolderRole::Sidecar => owners.sidecar_uid,
        HolderRole::App => owners.app_uid,
    });
    Access { mode, uid, gid: owners.map(|owners| owners.gid) }
}

/// The authority's files are for the person who runs `kiro certs`, and nobody else.
pub(crate) fn authority_access(kind: Kind) -> Access {
    let mode = match kind {
        Kind::Directory => 0o700,
        Kind::Public => 0o644,
        Kind::Secret => 0o600,
    };
    Access { mode, uid: None, gid: None }
}
