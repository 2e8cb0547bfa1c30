//! Who signs identities, and what stands in a leaf?

use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use kiro_core::identity::{ServiceName, SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, SanType, SerialNumber,
};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::edges::EdgeMaster;
use crate::error::PkiError;
use crate::facts::{Facts, San};
use crate::files::Folder;
use crate::{AUTHORITY_LIFETIME, AUTHORITY_NAME, BACKDATED, LEAF_LIFETIME, layout, pem};

const SERIAL_BYTES: usize = 16;

/// The mesh's certificate authority with its key, and the master of the edge secrets.
pub struct Authority {
    trust_domain: TrustDomain,
    certificate_pem: Vec<u8>,
    facts: Facts,
    key: Zeroizing<KeyPair>,
    master: EdgeMaster,
}

/// A leaf and its key, as they stand in files.
pub struct Issued {
    /// The certificate.
    pub leaf_pem: Vec<u8>,
    /// The private key, PKCS #8.
    pub key_pem: Zeroizing<Vec<u8>>,
}

/// What a leaf shall say. Any value can be issued, since tests need leaves that nobody should accept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafSpec {
    /// The subject's common name: for people only, nothing checks it.
    pub common_name: String,
    /// The subject's organisational unit, for people too: `sidecar`, `app` or `ingress`.
    pub unit: String,
    /// DNS SANs; a name that is an IP address becomes an IP SAN.
    pub dns: Vec<String>,
    /// URI SANs: exactly one in a good identity.
    pub uri: Vec<String>,
    /// From when it is valid.
    pub not_before: OffsetDateTime,
    /// Until when.
    pub not_after: OffsetDateTime,
    /// Extended key usage `serverAuth`.
    pub server: bool,
    /// Extended key usage `clientAuth`.
    pub client: bool,
}

impl LeafSpec {
    /// The leaf of one role of a service: both uses, since each role serves and calls.
    pub fn identity(id: &SpiffeId, now: OffsetDateTime) -> Self {
        let unit = match id.role {
            kiro_core::identity::Role::Sidecar => "sidecar",
            kiro_core::identity::Role::App => "app",
        };
        Self {
            uri: vec![id.to_string()],
            client: true,
            ..Self::server(id.service.as_str(), unit, vec![id.dns_name()], now)
        }
    }

    /// The leaf that a service's ingress shows to outside clients. It has no URI SAN and no client use, so it is worth nothing
    /// inside the mesh.
    pub fn ingress(service: &ServiceName, names: &[String], now: OffsetDateTime) -> Self {
        let mut dns = vec!["localhost".to_owned(), service.as_str().to_owned()];
        for name in names {
            if !dns.contains(name) {
                dns.push(name.clone());
            }
        }
        Self::server(service.as_str(), "ingress", dns, now)
    }

    fn server(service: &str, unit: &str, dns: Vec<String>, now: OffsetDateTime) -> Self {
        Self {
            common_name: service.to_owned(),
            unit: unit.to_owned(),
            dns,
            uri: Vec::new(),
            not_before: now - BACKDATED,
            not_after: now + LEAF_LIFETIME,
            server: true,
            client: false,
        }
    }

    /// The names, as a certificate's facts spell them.
    pub(crate) fn sans(&self) -> Vec<San> {
        let dns = self.dns.iter().map(|name| match name.parse::<IpAddr>() {
            Ok(address) => San::Ip(address.to_string()),
            Err(_) => San::Dns(name.clone()),
        });
        dns.chain(self.uri.iter().cloned().map(San::Uri)).collect()
    }

    fn params(&self) -> Result<CertificateParams, PkiError> {
        let wrong = |name: &str, error| PkiError::issue(format!("a leaf with the name `{name}`"), error);
        let mut params = bare_params(self.not_before, self.not_after)?;
        for name in &self.dns {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into().map_err(|error| wrong(name, error))?),
            });
        }
        for uri in &self.uri {
            let uri = SanType::URI(uri.as_str().try_into().map_err(|error| wrong(uri, error))?);
            params.subject_alt_names.push(uri);
        }
        params.distinguished_name.push(DnType::OrganizationalUnitName, self.unit.as_str());
        params.distinguished_name.push(DnType::CommonName, self.common_name.as_str());
        // "Explicit" also writes the subject key identifier.
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if self.server {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if self.client {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }
}

impl Authority {
    /// A new authority for a trust domain, with a new master for edge secrets.
    pub fn generate(trust_domain: &TrustDomain, now: OffsetDateTime) -> Result<Self, PkiError> {
        let failed = |error| PkiError::issue("the authority's certificate", error);
        let key = Zeroizing::new(KeyPair::generate().map_err(failed)?);
        let mut params = bare_params(now - BACKDATED, now + AUTHORITY_LIFETIME)?;
        params.distinguished_name.push(DnType::CommonName, AUTHORITY_NAME);
        // SPIFFE: a signing certificate carries its trust domain as an ID without a path. It is also how we know, years later,
        // what this authority is for.
        let id = format!("spiffe://{}", trust_domain.as_str());
        params.subject_alt_names = vec![SanType::URI(id.try_into().map_err(failed)?)];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.use_authority_key_identifier_extension = true;
        let certificate_pem = params.self_signed(&*key).map_err(failed)?.pem().into_bytes();
        let facts = Facts::from_pem(&certificate_pem)
            .map_err(|what| PkiError::issue("the authority's certificate", what))?;
        Ok(Self {
            trust_domain: trust_domain.clone(),
            certificate_pem,
            facts,
            key,
            master: EdgeMaster::generate()?,
        })
    }

    /// The authority in a directory that [`crate::provision`] wrote.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let absent = || {
            PkiError::file(
                dir.join(layout::AUTHORITY_DIR),
                "there is no authority here",
                "run `kiro certs` (`make certs`) to make one",
            )
        };
        let root = Folder::open(dir)?.ok_or_else(absent)?;
        Self::read(&root)?.ok_or_else(absent)
    }

    /// `None` when there is no authority at all; half of one is an error, since making the other half up would change who is
    /// trusted, or every edge's secret, behind a person's back.
    pub(crate) fn read(root: &Folder) -> Result<Option<Self>, PkiError> {
        let Some(folder) = root.open_child(layout::AUTHORITY_DIR)? else { return Ok(None) };
        let certificate = folder.read(layout::CA_CERTIFICATE)?;
        let key = folder.read(layout::CA_KEY)?;
        let master = folder.read(layout::EDGE_MASTER)?;
        if certificate.is_none() && key.is_none() && master.is_none() {
            return Ok(None);
        }
        let fix = || {
            format!(
                "restore it from a copy, or move {} away and run `kiro certs` again: it then makes a new authority and issues \
                 every leaf and edge secret anew",
                folder.path().display()
            )
        };
        let broken = |name: &str, what: String| PkiError::file(folder.path().join(name), what, fix());
        let present = |found: Option<crate::files::Found>, name: &str| {
            found.ok_or_else(|| {
                broken(name, "is missing, while the rest of the authority is there".to_owned())
            })
        };
        let certificate = present(certificate, layout::CA_CERTIFICATE)?;
        let key_file = present(key, layout::CA_KEY)?;
        let master = present(master, layout::EDGE_MASTER)?;

        let facts =
            Facts::from_pem(&certificate.bytes).map_err(|what| broken(layout::CA_CERTIFICATE, what))?;
        if !facts.authority
            || !facts.is_signed_by(&facts)
            || facts.issuer_name.as_deref() != Some(AUTHORITY_NAME)
        {
            let what =
                format!("is not an authority that `kiro certs` made (its subject is `{}`)", facts.subject);
            return Err(broken(layout::CA_CERTIFICATE, what));
        }
        let trust_domain = trust_domain_of(&facts).ok_or_else(|| {
            broken(
                layout::CA_CERTIFICATE,
                "names no trust domain (a URI SAN `spiffe://…` without a path)".to_owned(),
            )
        })?;
        let key = pem::parse_key(&key_file.bytes).map_err(|what| broken(layout::CA_KEY, what))?;
        if key.subject_public_key_info() != facts.public_key {
            return Err(broken(layout::CA_KEY, format!("does not fit {}", layout::CA_CERTIFICATE)));
        }
        let master = EdgeMaster::decode(&master.bytes).map_err(|what| broken(layout::EDGE_MASTER, what))?;
        Ok(Some(Self { trust_domain, certificate_pem: certificate.bytes.to_vec(), facts, key, master }))
    }

    /// The trust domain that this authority speaks for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The authority's certificate: `ca.pem` in every directory. Further roots in the file are kept behind it.
    pub fn ca_pem(&self) -> &[u8] {
        &self.certificate_pem
    }

    /// Until when the authority is valid; no leaf outlives it.
    pub fn not_after(&self) -> OffsetDateTime {
        self.facts.not_after
    }

    /// The master of the edge secrets.
    pub fn edge_master(&self) -> &EdgeMaster {
        &self.master
    }

    /// `edges.json` of one sidecar: the secrets of every edge that starts or ends at `me`.
    pub fn edges_json<'a>(
        &self,
        services: impl IntoIterator<Item = &'a ServiceName>,
        me: &ServiceName,
    ) -> Result<Zeroizing<Vec<u8>>, PkiError> {
        self.master.edges_json(services, me)
    }

    /// A sidecar's leaf: DNS `<svc>`, URI `spiffe://<trust domain>/<svc>`.
    pub fn issue_sidecar(&self, service: &ServiceName, now: OffsetDateTime) -> Result<Issued, PkiError> {
        self.issue(&self.within(LeafSpec::identity(&SpiffeId::sidecar(&self.trust_domain, service), now)))
    }

    /// An application's leaf: DNS `app.<svc>`, URI `spiffe://<trust domain>/<svc>/app`.
    pub fn issue_app(&self, service: &ServiceName, now: OffsetDateTime) -> Result<Issued, PkiError> {
        self.issue(&self.within(LeafSpec::identity(&SpiffeId::app(&self.trust_domain, service), now)))
    }

    /// An ingress's leaf: server use, `localhost`, `<svc>` and the given names.
    pub fn issue_ingress(
        &self,
        service: &ServiceName,
        names: &[String],
        now: OffsetDateTime,
    ) -> Result<Issued, PkiError> {
        self.issue(&self.within(LeafSpec::ingress(service, names, now)))
    }

    /// Signs exactly what is asked, good or bad.
    pub fn issue(&self, spec: &LeafSpec) -> Result<Issued, PkiError> {
        let failed =
            |error| PkiError::issue(format!("a leaf for {} `{}`", spec.unit, spec.common_name), error);
        let key = Zeroizing::new(KeyPair::generate().map_err(failed)?);
        let issuer = Issuer::from_ca_cert_der(self.facts.der(), &*self.key).map_err(failed)?;
        let leaf = spec.params()?.signed_by(&*key, &issuer).map_err(failed)?;
        Ok(Issued { leaf_pem: leaf.pem().into_bytes(), key_pem: pem::encode_key(&key) })
    }

    /// The leaf, ending with the authority at the latest: a chain is worth nothing past its root.
    pub(crate) fn within(&self, spec: LeafSpec) -> LeafSpec {
        LeafSpec { not_after: spec.not_after.min(self.facts.not_after), ..spec }
    }

    pub(crate) fn facts(&self) -> &Facts {
        &self.facts
    }

    pub(crate) fn key_pem(&self) -> Zeroizing<Vec<u8>> {
        pem::encode_key(&self.key)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("trust_domain", &self.trust_domain.as_str())
            .field("fingerprint", &self.facts.fingerprint)
            .field("not_after", &self.facts.not_after)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued")
            .field("leaf_pem", &String::from_utf8_lossy(&self.leaf_pem))
            .finish_non_exhaustive()
    }
}

fn trust_domain_of(facts: &Facts) -> Option<TrustDomain> {
    facts.sans.iter().find_map(|san| match san {
        San::Uri(uri) => TrustDomain::parse(uri.strip_prefix("spiffe://")?).ok(),
        San::Dns(_) | San::Ip(_) | San::Other(_) => None,
    })
}

/// Parameters with nothing in them but validity and a serial number: rcgen's defaults hold names and dates of its own.
fn bare_params(not_before: OffsetDateTime, not_after: OffsetDateTime) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = not_before;
    params.not_after = not_after;
    params.serial_number = Some(random_serial()?);
    Ok(params)
}

/// 126 random bits: positive as RFC 5280 wants it, and always sixteen bytes long.
fn random_serial() -> Result<SerialNumber, PkiError> {
    let mut serial = [0_u8; SERIAL_BYTES];
    aws_lc_rs::rand::fill(&mut serial)
        .map_err(|_| PkiError::issue("a serial number", "no randomness from the system"))?;
    if let Some(first) = serial.first_mut() {
        *first = (*first & 0x3f) | 0x40;
    }
    Ok(SerialNumber::from_slice(&serial))
}
