//! How does a mesh in one process get its identities without a file?

use std::collections::BTreeMap;
use std::fmt;

use kiro_core::identity::ServiceName;
use kiro_core::mesh::Mesh;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::authority::{Authority, Issued};
use crate::error::PkiError;
use crate::layout::{self, Holder, HolderRole, INGRESS};

/// Everything that [`crate::provision`] would have written, in memory.
#[derive(Debug)]
pub struct MemoryPki {
    /// The authority: tests have it mint further leaves.
    pub authority: Authority,
    /// What each sidecar's directory would hold.
    pub sidecars: BTreeMap<ServiceName, SidecarFiles>,
    /// What each application's directory would hold.
    pub apps: BTreeMap<ServiceName, AppFiles>,
}

/// A sidecar's files.
pub struct SidecarFiles {
    /// `ca.pem`
    pub ca_pem: Vec<u8>,
    /// `leaf.pem`
    pub leaf_pem: Vec<u8>,
    /// `leaf.key`
    pub key_pem: Zeroizing<Vec<u8>>,
    /// `edges.json`
    pub edges_json: Zeroizing<Vec<u8>>,
    /// `ingress.pem` and `ingress.key`, where the service has an ingress.
    pub ingress: Option<IngressFiles>,
}

/// An ingress's files.
pub struct IngressFiles {
    /// `ingress.pem`
    pub chain_pem: Vec<u8>,
    /// `ingress.key`
    pub key_pem: Zeroizing<Vec<u8>>,
}

/// An application's files.
pub struct AppFiles {
    /// `ca.pem`
    pub ca_pem: Vec<u8>,
    /// `leaf.pem`
    pub leaf_pem: Vec<u8>,
    /// `leaf.key`
    pub key_pem: Zeroizing<Vec<u8>>,
}

/// A new authority, and all files of all services, written nowhere.
pub fn in_memory(mesh: &Mesh, now: OffsetDateTime) -> Result<MemoryPki, PkiError> {
    let authority = Authority::generate(&mesh.trust_domain, now)?;
    let (mut sidecars, mut apps) = (BTreeMap::new(), BTreeMap::new());
    for holder in layout::holders(mesh, &authority, now)? {
        let (leaf, ingress) = issue_pairs(&holder, &authority)?;
        let ca_pem = authority.ca_pem().to_vec();
        let Issued { leaf_pem, key_pem } = leaf;
        match holder.role {
            HolderRole::Sidecar => {
                let edges_json = authority.edges_json(mesh.services.keys(), &holder.service)?;
                let ingress = ingress
                    .map(|issued| IngressFiles { chain_pem: issued.leaf_pem, key_pem: issued.key_pem });
                sidecars
                    .insert(holder.service, SidecarFiles { ca_pem, leaf_pem, key_pem, edges_json, ingress });
            }
            HolderRole::App => {
                apps.insert(holder.service, AppFiles { ca_pem, leaf_pem, key_pem });
            }
        }
    }
    Ok(MemoryPki { authority, sidecars, apps })
}

fn issue_pairs(holder: &Holder, authority: &Authority) -> Result<(Issued, Option<Issued>), PkiError> {
    let (mut leaf, mut ingress) = (None, None);
    for pair in &holder.pairs {
        let slot = if pair.names == INGRESS { &mut ingress } else { &mut leaf };
        *slot = Some(authority.issue(&pair.spec)?);
    }
    let leaf =
        leaf.ok_or_else(|| PkiError::issue(holder.directory.as_str(), "it has no identity of its own"))?;
    Ok((leaf, ingress))
}

macro_rules! redacted {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    )*};
}
redacted!(SidecarFiles, IngressFiles, AppFiles);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::{Options, provision};

    const MESH: &str = "\
trust_domain: kiro.mesh
services:
  dashboard: { app: { port: 8001 }, ingress: { port: 8080, names: [dashboard.example] } }
  profile: { app: { port: 8002 } }
allow:
  - { from: ingress, to: dashboard }
";

    #[test]
    fn written_out_it_is_what_a_run_on_disk_would_have_left() {
        let mesh = kiro_core::mesh::parse(MESH).unwrap();
        let now = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let pki = in_memory(&mesh, now).unwrap();
        let temp = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: &[u8], mode: u32| {
            let path = temp.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::set_permissions(path.parent().unwrap(), std::fs::Permissions::from_mode(0o750)).unwrap();
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        put("ca/ca.pem", pki.authority.ca_pem(), 0o644);
        put("ca/ca.key", &pki.authority.key_pem(), 0o600);
        put("ca/edge-master.key", &pki.authority.edge_master().encode(), 0o600);
        std::fs::set_permissions(temp.path().join("ca"), std::fs::Permissions::from_mode(0o700)).unwrap();
        for (service, files) in &pki.sidecars {
            put(&format!("{service}/ca.pem"), &files.ca_pem, 0o644);
            put(&format!("{service}/leaf.pem"), &files.leaf_pem, 0o644);
            put(&format!("{service}/leaf.key"), &files.key_pem, 0o600);
            put(&format!("{service}/edges.json"), &files.edges_json, 0o600);
            if let Some(ingress) = &files.ingress {
                put(&format!("{service}/ingress.pem"), &ingress.chain_pem, 0o644);
                put(&format!("{service}/ingress.key"), &ingress.key_pem, 0o600);
            }
        }
        for (service, files) in &pki.apps {
            put(&format!("{service}-app/ca.pem"), &files.ca_pem, 0o644);
            put(&format!("{service}-app/leaf.pem"), &files.leaf_pem, 0o644);
            put(&format!("{service}-app/leaf.key"), &files.key_pem, 0o640);
        }
        let report = provision(&mesh, temp.path(), &Options::at(now)).unwrap();
        assert!(report.is_unchanged() && report.notes.is_empty(), "{report:?}");
        assert_eq!(report.kept, 3 + 2 * 4 + 2 + 2 * 3);
    }
}
