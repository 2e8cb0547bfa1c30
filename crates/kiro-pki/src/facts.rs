//! What does a certificate say about itself?

use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::x509::X509Name;

/// One subject alternative name. `Ord` makes comparisons independent of the order in the certificate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum San {
    Dns(String),
    Uri(String),
    Ip(String),
    Other(String),
}

impl std::fmt::Display for San {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dns(name) => write!(f, "DNS:{name}"),
            Self::Uri(uri) => write!(f, "URI:{uri}"),
            Self::Ip(address) => write!(f, "IP:{address}"),
            Self::Other(name) => write!(f, "{name}"),
        }
    }
}

/// A certificate, read. Everything here is public.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) subject: String,
    pub(crate) issuer: String,
    pub(crate) issuer_name: Option<String>,
    pub(crate) serial: String,
    pub(crate) not_before: OffsetDateTime,
    pub(crate) not_after: OffsetDateTime,
    pub(crate) sans: Vec<San>,
    pub(crate) server: bool,
    pub(crate) client: bool,
    pub(crate) authority: bool,
    pub(crate) fingerprint: String,
    pub(crate) public_key: Vec<u8>,
    der: CertificateDer<'static>,
}

impl Facts {
    /// Reads the first certificate of a PEM file; the error completes the sentence "this file …".
    pub(crate) fn from_pem(pem: &[u8]) -> Result<Self, String> {
        let der = crate::pem::first_certificate(pem)?;
        let unreadable = |_| "holds no readable X.509 certificate".to_owned();
        let (_, certificate) = X509Certificate::from_der(&der).map_err(unreadable)?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|_| "has broken subject alternative names".to_owned())?
            .map(|extension| extension.value.general_names.iter().map(san).collect());
        let usage =
            certificate.extended_key_usage().map_err(|_| "has a broken extended key usage".to_owned())?;
        Ok(Self {
            subject: certificate.subject().to_string(),
            issuer: certificate.issuer().to_string(),
            issuer_name: common_name(certificate.issuer()),
            serial: hex(certificate.raw_serial()),
            not_before: certificate.validity().not_before.to_datetime(),
            not_after: certificate.validity().not_after.to_datetime(),
            sans: names.unwrap_or_default(),
            server: usage.as_ref().is_some_and(|usage| usage.value.server_auth),
            client: usage.as_ref().is_some_and(|usage| usage.value.client_auth),
            authority: certificate.is_ca(),
            fingerprint: hex(&Sha256::digest(&der)),
            public_key: certificate.public_key().raw.to_vec(),
            der: der.clone(),
        })
    }

    /// Whether the authority's key signed this certificate, and its name stands as the issuer.
    pub(crate) fn is_signed_by(&self, authority: &Facts) -> bool {
        let (Ok((_, leaf)), Ok((_, issuer))) =
            (X509Certificate::from_der(&self.der), X509Certificate::from_der(&authority.der))
        else {
            return false;
        };
        leaf.issuer().as_raw() == issuer.subject().as_raw()
            && leaf.verify_signature(Some(issuer.public_key())).is_ok()
    }

    pub(crate) fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }
}

fn common_name(name: &X509Name<'_>) -> Option<String> {
    name.iter_common_name().next()?.as_str().ok().map(str::to_owned)
}

fn san(name: &GeneralName<'_>) -> San {
    #[expect(clippy::wildcard_enum_match_arm, reason = "names of other kinds are only ever shown")]
    match name {
        GeneralName::DNSName(name) => San::Dns((*name).to_owned()),
        GeneralName::URI(uri) => San::Uri((*uri).to_owned()),
        GeneralName::IPAddress(octets) => match (<[u8; 4]>::try_from(*octets), <[u8; 16]>::try_from(*octets))
        {
            (Ok(v4), _) => San::Ip(std::net::Ipv4Addr::from(v4).to_string()),
            (_, Ok(v6)) => San::Ip(std::net::Ipv6Addr::from(v6).to_string()),
            _ => San::Other(format!("IP:{}", hex(octets))),
        },
        other => San::Other(other.to_string()),
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
