//! Who are we, and is what we were given fit to prove it?
//!
//! An [`Identity`] is loaded whole and checked before anything listens: what a peer would refuse later is refused now, with the
//! file's name and how to mend it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiro_core::identity::{Role, SpiffeId};
use rustls::InconsistentKeys;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor, UnixTime};
use zeroize::Zeroizing;

use crate::config::provider;
use crate::error::HandshakeErrorKind as Kind;
use crate::facts::LeafFacts;
use crate::files::{self, Place, Secrecy};
use crate::verify::{Expected, Leg, Rules, Side, judge};

/// Why an identity can't be used. Every text names the file and how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file is not there, or not for us.
    #[error("{}: can't be read ({cause}): {fix}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        cause: String,
        /// What to do.
        fix: String,
    },
    /// A file is far larger than it can honestly be.
    #[error("{}: has over {bytes_max} bytes: mount the directory that `make certs` wrote", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The bound.
        bytes_max: u64,
    },
    /// A key is open to others.
    #[error("{}: its mode {mode:04o} opens this secret to {who}: run `chmod {chmod} {}`", path.display(), path.display())]
    KeyMode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// Who has access.
        who: &'static str,
        /// What the mode should be.
        chmod: &'static str,
    },
    /// A file does not hold what it should.
    #[error("{}: {cause}: {fix}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What was found.
        cause: String,
        /// What to do.
        fix: String,
    },
    /// The leaf is one that peers would refuse.
    #[error("{}: {cause}: {fix}", path.display())]
    Leaf {
        /// The file.
        path: PathBuf,
        /// What a peer would say.
        kind: Kind,
        /// What was found.
        cause: String,
        /// What to do.
        fix: String,
    },
}

impl IdentityError {
    pub(crate) fn unreadable(path: &Path, error: &io::Error) -> Self {
        let fix = if error.kind() == io::ErrorKind::PermissionDenied {
            let uid = rustix::process::geteuid().as_raw();
            format!(
                "it must be readable by user {uid}, who runs this: run `make certs` as the user who runs the mesh"
            )
        } else {
            "run `make certs`, and mount the service's own directory of certs/ here".to_owned()
        };
        Self::Unreadable { path: path.to_owned(), cause: error.to_string(), fix }
    }

    pub(crate) fn content(path: PathBuf, cause: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::Content { path, cause: cause.into(), fix: fix.into() }
    }
}

/// The three files of a role, as PEM.
#[derive(Clone)]
pub struct Material {
    /// `ca.pem`: the CA's certificate, or several while it is being replaced.
    pub ca_pem: Vec<u8>,
    /// `leaf.pem`: the leaf, then what leads up to the CA.
    pub leaf_pem: Vec<u8>,
    /// `leaf.key`: the leaf's private key.
    pub key_pem: Zeroizing<Vec<u8>>,
}

impl Material {
    pub(crate) fn read(place: &Place, secrecy: Secrecy) -> Result<Self, IdentityError> {
        Ok(Self {
            ca_pem: files::read(&place.path(files::CA), Secrecy::Public)?.to_vec(),
            leaf_pem: files::read(&place.path(files::LEAF), Secrecy::Public)?.to_vec(),
            key_pem: files::read(&place.path(files::KEY), secrecy)?,
        })
    }
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Material(redacted)")
    }
}

/// One role's identity: leaf, key and the CA that peers are measured by. Immutable; a renewal makes another one.
pub struct Identity {
    spiffe: SpiffeId,
    facts: LeafFacts,
    authorities: Vec<LeafFacts>,
    roots: Arc<[TrustAnchor<'static>]>,
    certificate: Arc<SingleCertAndKey>,
    generation: u64,
}

impl Identity {
    /// Loads the identity that must be in a directory: `ca.pem`, `leaf.pem`, `leaf.key`.
    ///
    /// # Errors
    /// Names the file, what is wrong with it, and how to mend it.
    pub fn load(directory: &Path, expected: &SpiffeId) -> Result<Self, IdentityError> {
        let place = Place::directory(directory);
        let secrecy = match expected.role {
            Role::Sidecar => Secrecy::Sidecar,
            Role::App => Secrecy::App,
        };
        let material = Material::read(&place, secrecy)?;
        Self::build(&material, expected, 1, &place)
    }

    /// As [`Identity::load`], from memory.
    ///
    /// # Errors
    /// Names the file that it would have been, what is wrong with it, and how to mend it.
    pub fn from_material(material: &Material, expected: &SpiffeId) -> Result<Self, IdentityError> {
        Self::build(material, expected, 1, &Place::memory())
    }

    pub(crate) fn build(
        material: &Material,
        expected: &SpiffeId,
        generation: u64,
        place: &Place,
    ) -> Result<Self, IdentityError> {
        let (roots, authorities) = authorities(&material.ca_pem, &place.path(files::CA))?;
        let key_pair = KeyPair {
            chain_pem: &material.leaf_pem,
            chain_path: place.path(files::LEAF),
            key_pem: &material.key_pem,
            key_path: place.path(files::KEY),
        };
        let certified = key_pair.load()?;
        let facts = check_leaf(&certified.cert, &roots, expected, &place.path(files::LEAF))?;
        Ok(Self {
            spiffe: expected.clone(),
            facts,
            authorities,
            roots,
            certificate: Arc::new(SingleCertAndKey::from(certified)),
            generation,
        })
    }

    /// Whom it proves.
    #[must_use]
    pub fn spiffe(&self) -> &SpiffeId {
        &self.spiffe
    }

    /// What the leaf says.
    #[must_use]
    pub fn facts(&self) -> &LeafFacts {
        &self.facts
    }

    /// What the CA's certificates say: TLS trusts their keys whatever their time, people should renew them in time.
    #[must_use]
    pub fn authorities(&self) -> &[LeafFacts] {
        &self.authorities
    }

    /// Grows with each renewal; what was opened under an older one can be told by it.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn roots(&self) -> Arc<[TrustAnchor<'static>]> {
        Arc::clone(&self.roots)
    }

    pub(crate) fn certificate(&self) -> Arc<SingleCertAndKey> {
        Arc::clone(&self.certificate)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("spiffe", &self.spiffe)
            .field("facts", &self.facts)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// A chain and its key, with the files' names for messages.
pub(crate) struct KeyPair<'a> {
    pub(crate) chain_pem: &'a [u8],
    pub(crate) chain_path: PathBuf,
    pub(crate) key_pem: &'a [u8],
    pub(crate) key_path: PathBuf,
}

impl KeyPair<'_> {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "rustls's enum is open, and what is left is of the key"
    )]
    pub(crate) fn load(self) -> Result<CertifiedKey, IdentityError> {
        const FIX: &str = "renew both with `make certs`";
        let chain = certificates(self.chain_pem, &self.chain_path)?;
        // Neither the key nor what the parser found of it goes into a message.
        let key = PrivateKeyDer::from_pem_slice(self.key_pem)
            .map_err(|_| IdentityError::content(self.key_path.clone(), "holds no private key in PEM", FIX))?;
        CertifiedKey::from_der(chain, key, provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => IdentityError::content(
                self.key_path,
                format!("is not the key of {}", self.chain_path.display()),
                FIX,
            ),
            rustls::Error::InvalidCertificate(error) => {
                IdentityError::content(self.chain_path, format!("holds a bad certificate ({error})"), FIX)
            }
            error => IdentityError::content(
                self.key_path,
                format!("holds a key that TLS can't use ({error})"),
                FIX,
            ),
        })
    }
}

/// A PEM file's certificates, at least one.
fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    const FIX: &str = "renew it with `make certs`";
    let chain = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| IdentityError::content(path.to_owned(), format!("is not PEM ({error})"), FIX))?;
    if chain.is_empty() {
        return Err(IdentityError::content(path.to_owned(), "holds no certificate in PEM", FIX));
    }
    Ok(chain)
}

type Authorities = (Arc<[TrustAnchor<'static>]>, Vec<LeafFacts>);

fn authorities(pem: &[u8], path: &Path) -> Result<Authorities, IdentityError> {
    const FIX: &str = "mount the ca.pem that `make certs` wrote";
    let bad = |cause: String| {
        IdentityError::content(path.to_owned(), format!("holds a bad certificate ({cause})"), FIX)
    };
    let mut roots = Vec::new();
    let mut facts = Vec::new();
    for certificate in certificates(pem, path)? {
        let anchor =
            webpki::anchor_from_trusted_cert(&certificate).map_err(|error| bad(error.to_string()))?;
        roots.push(anchor.to_owned());
        facts.push(LeafFacts::from_der(&certificate).map_err(bad)?);
    }
    Ok((roots.into(), facts))
}

/// Looks at our own leaf as the peers of each side will.
fn check_leaf(
    chain: &[CertificateDer<'static>],
    roots: &Arc<[TrustAnchor<'static>]>,
    expected: &SpiffeId,
    path: &Path,
) -> Result<LeafFacts, IdentityError> {
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err(IdentityError::content(
            path.to_owned(),
            "holds no certificate",
            own_fix(Kind::Other, expected),
        ));
    };
    let mut facts = None;
    for side in [Side::Client, Side::Server] {
        let rules = Rules {
            roots: Arc::clone(roots),
            expected: Expected::Exactly(expected.clone()),
            side,
            leg: Leg::Mesh,
        };
        let seen = judge(&rules, provider(), leaf, intermediates, UnixTime::now());
        if let Err(refusal) = seen.verdict {
            return Err(IdentityError::Leaf {
                path: path.to_owned(),
                kind: refusal.kind,
                cause: refusal.cause,
                fix: own_fix(refusal.kind, expected),
            });
        }
        facts = seen.facts;
    }
    facts.ok_or_else(|| {
        IdentityError::content(path.to_owned(), "holds no certificate", own_fix(Kind::Other, expected))
    })
}

/// What to do about one's own leaf.
fn own_fix(kind: Kind, expected: &SpiffeId) -> String {
    let directory = match expected.role {
        Role::Sidecar => format!("certs/{}", expected.service),
        Role::App => format!("certs/{}-app", expected.service),
    };
    match kind {
        Kind::UnknownIssuer => {
            format!("leaf.pem and ca.pem are of different CAs: run `make certs` and mount {directory} whole")
        }
        Kind::Expired => "renew it with `make certs`, and look at this host's clock".to_owned(),
        Kind::NotYetValid => "set this host's clock (NTP)".to_owned(),
        Kind::WrongIdentity | Kind::TrustDomain | Kind::AppLeaf => {
            format!("mount {directory}, and run `make certs` if the mesh file has changed")
        }
        Kind::NoCertificate
        | Kind::Version
        | Kind::Alpn
        | Kind::PeerRefused
        | Kind::Closed
        | Kind::PlainHttp
        | Kind::Other => "renew it with `make certs`".to_owned(),
    }
}
