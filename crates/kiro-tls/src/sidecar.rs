//! What does a sidecar's directory hold, and where else may it come from?

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiro_core::identity::SpiffeId;
use rustls::sign::SingleCertAndKey;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::edges::{self, EdgeSecrets};
use crate::facts::LeafFacts;
use crate::files::{self, Place, Secrecy, Stamp};
use crate::identity::{Identity, IdentityError, KeyPair, Material};

/// Where a sidecar's files are.
#[derive(Clone, Debug)]
pub enum SidecarSource {
    /// In a directory, which is polled for renewed ones.
    Directory(PathBuf),
    /// In memory, for a mesh in one process.
    Memory(SidecarFiles),
}

/// A sidecar's files, by content.
#[derive(Clone, Debug)]
pub struct SidecarFiles {
    /// `ca.pem`, `leaf.pem`, `leaf.key`.
    pub material: Material,
    /// `edges.json`.
    pub edges_json: Zeroizing<Vec<u8>>,
    /// `ingress.pem` and `ingress.key`, where there is a TLS ingress.
    pub ingress: Option<IngressFiles>,
}

impl SidecarFiles {
    pub(crate) fn read(directory: &Path) -> Result<Self, IdentityError> {
        let place = Place::directory(directory);
        Ok(Self {
            material: Material::read(&place, Secrecy::Sidecar)?,
            edges_json: files::read(&place.path(files::EDGES), Secrecy::Sidecar)?,
            ingress: IngressFiles::read(&place)?,
        })
    }

    /// Tells one content from another without keeping keys for it.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let ingress = self.ingress.as_ref();
        let parts = [
            Some(self.material.ca_pem.as_slice()),
            Some(self.material.leaf_pem.as_slice()),
            Some(self.material.key_pem.as_slice()),
            Some(self.edges_json.as_slice()),
            ingress.map(|ingress| ingress.chain_pem.as_slice()),
            ingress.map(|ingress| ingress.key_pem.as_slice()),
        ];
        let mut hash = Sha256::new();
        for part in parts {
            // Its length first, so that no byte can wander from one file to the next; an absent file is no empty one.
            hash.update(part.map_or(u64::MAX, |part| part.len() as u64).to_be_bytes());
            hash.update(part.unwrap_or_default());
        }
        hash.finalize().into()
    }
}

/// The stamps of a directory's files, in a fixed order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamps([Option<Stamp>; 6]);

impl Stamps {
    pub(crate) fn of(directory: &Path) -> Self {
        let names = [files::CA, files::LEAF, files::KEY, files::EDGES, files::INGRESS, files::INGRESS_KEY];
        Self(names.map(|name| files::stamp(&directory.join(name))))
    }

    /// Whether one of the files could change without its stamp telling.
    pub(crate) fn any_fresh(&self, now_unix: i64) -> bool {
        self.0.iter().flatten().any(|stamp| stamp.is_fresh(now_unix))
    }
}

/// The ingress's two files, by content.
#[derive(Clone)]
pub struct IngressFiles {
    /// `ingress.pem`: the certificate, then what leads up to its CA.
    pub chain_pem: Vec<u8>,
    /// `ingress.key`.
    pub key_pem: Zeroizing<Vec<u8>>,
}

impl IngressFiles {
    fn read(place: &Place) -> Result<Option<Self>, IdentityError> {
        let chain = files::read_optional(&place.path(files::INGRESS), Secrecy::Public)?;
        let key = files::read_optional(&place.path(files::INGRESS_KEY), Secrecy::Sidecar)?;
        const FIX: &str = "put both there, or neither";
        match (chain, key) {
            (Some(chain), Some(key_pem)) => Ok(Some(Self { chain_pem: chain.to_vec(), key_pem })),
            (None, None) => Ok(None),
            (Some(_), None) => Err(IdentityError::content(
                place.path(files::INGRESS_KEY),
                "is not there, and ingress.pem is",
                FIX,
            )),
            (None, Some(_)) => Err(IdentityError::content(
                place.path(files::INGRESS),
                "is not there, and ingress.key is",
                FIX,
            )),
        }
    }
}

impl fmt::Debug for IngressFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IngressFiles(redacted)")
    }
}

/// What the ingress shows to outside clients: a leaf of ours or a certificate of the user's. Whether clients will trust it is
/// theirs to say, so neither its chain nor its validity is judged here.
#[derive(Clone)]
pub struct IngressMaterial {
    certificate: Arc<SingleCertAndKey>,
    facts: LeafFacts,
}

impl IngressMaterial {
    /// Takes a chain and its key, as PEM.
    ///
    /// # Errors
    /// Where they can't be read, or do not fit each other.
    pub fn from_files(files: &IngressFiles) -> Result<Self, IdentityError> {
        Self::build(files, &Place::memory())
    }

    fn build(files: &IngressFiles, place: &Place) -> Result<Self, IdentityError> {
        let pair = KeyPair {
            chain_pem: &files.chain_pem,
            chain_path: place.path(files::INGRESS),
            key_pem: &files.key_pem,
            key_path: place.path(files::INGRESS_KEY),
        };
        let certified = pair.load()?;
        let leaf = certified.cert.first().map(AsRef::as_ref).unwrap_or_default();
        let facts = LeafFacts::from_der(leaf).map_err(|cause| {
            IdentityError::content(
                place.path(files::INGRESS),
                format!("holds a bad certificate ({cause})"),
                "renew it with `make certs`, or with whoever issued it",
            )
        })?;
        Ok(Self { certificate: Arc::new(SingleCertAndKey::from(certified)), facts })
    }

    /// What the certificate says.
    #[must_use]
    pub fn facts(&self) -> &LeafFacts {
        &self.facts
    }

    pub(crate) fn certificate(&self) -> Arc<SingleCertAndKey> {
        Arc::clone(&self.certificate)
    }
}

impl fmt::Debug for IngressMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IngressMaterial").field("facts", &self.facts).finish_non_exhaustive()
    }
}

/// All that a sidecar holds in secret, of one moment.
#[derive(Clone, Debug)]
pub struct SidecarIdentity {
    /// Who it is.
    pub identity: Arc<Identity>,
    /// What it signs and verifies with.
    pub edges: Arc<EdgeSecrets>,
    /// What its ingress shows.
    pub ingress: Option<IngressMaterial>,
    /// Grows with each renewal.
    pub generation: u64,
}

impl SidecarIdentity {
    /// Loads a sidecar's directory.
    ///
    /// # Errors
    /// Names the file, what is wrong with it, and how to mend it.
    pub fn load(directory: &Path, expected: &SpiffeId) -> Result<Self, IdentityError> {
        Self::build(&SidecarFiles::read(directory)?, expected, 1, &Place::directory(directory))
    }

    /// As [`SidecarIdentity::load`], from memory.
    ///
    /// # Errors
    /// Names the file that it would have been, what is wrong with it, and how to mend it.
    pub fn from_files(files: &SidecarFiles, expected: &SpiffeId) -> Result<Self, IdentityError> {
        Self::build(files, expected, 1, &Place::memory())
    }

    pub(crate) fn build(
        files: &SidecarFiles,
        expected: &SpiffeId,
        generation: u64,
        place: &Place,
    ) -> Result<Self, IdentityError> {
        let identity = Identity::build(&files.material, expected, generation, place)?;
        let edges = edges::in_place(&files.edges_json, &expected.service, place)?;
        let ingress = files.ingress.as_ref().map(|files| IngressMaterial::build(files, place)).transpose()?;
        Ok(Self { identity: Arc::new(identity), edges: Arc::new(edges), ingress, generation })
    }
}
