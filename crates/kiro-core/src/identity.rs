//! Who is who: which names may a service have, and how is a service's or an application's identity written?
//!
//! A name is checked once, where it comes in; what holds a [`ServiceName`] or a [`SpiffeId`] need not look again.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use crate::authority;

/// Names that mean something else where a service's name may stand: the source of allow lines for what comes from outside,
/// and the name that every resolver answers with loopback.
pub const RESERVED_NAMES: &[&str] = &["ingress", "localhost"];

/// RFC 1035, 2.3.4: a label is at most 63 bytes.
const LABEL_BYTES_MAX: usize = 63;

/// The SPIFFE ID specification, 2.1: a trust domain is at most 255 bytes.
const TRUST_DOMAIN_BYTES_MAX: usize = 255;

const SPIFFE_SCHEME: &str = "spiffe://";

/// The last segment of an application's SPIFFE ID, and the first label of its DNS name.
const APP: &str = "app";

/// The name of a service: one DNS label, so that the same word is its DNS name, its SAN, its authority and its SPIFFE path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName(Arc<str>);

/// Why a text is not a service's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing at all.
    #[error("the name is empty: write one of the letters a to z, digits and hyphens")]
    Empty,
    /// Over a DNS label's 63 bytes.
    #[error("the name has {length} bytes: a DNS label has at most {LABEL_BYTES_MAX}, shorten it")]
    TooLong {
        /// How long it is, in bytes.
        length: usize,
    },
    /// A character that no host name has.
    #[error("the name has {character:?}: write it with the letters a to z, digits and hyphens alone")]
    Character {
        /// The first one of them.
        character: char,
    },
    /// A hyphen where RFC 1123 has none.
    #[error("the name starts or ends with a hyphen: let it start and end with a letter or a digit")]
    Hyphen,
    /// The name means something else already.
    #[error("the name `{0}` is reserved: choose another one")]
    Reserved(&'static str),
    /// A resolver would read the name as an IPv4 address.
    #[error("the name is a number, which resolvers read as an IPv4 address: add a letter to it")]
    Number,
}

impl ServiceName {
    /// Reads a name; it is taken as it is, never mended.
    ///
    /// # Errors
    /// Says what is wrong with it and what to write.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if let Some(character) = text.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
            return Err(NameError::Character { character });
        }
        if text.len() > LABEL_BYTES_MAX {
            return Err(NameError::TooLong { length: text.len() });
        }
        if text.starts_with('-') || text.ends_with('-') {
            return Err(NameError::Hyphen);
        }
        if let Some(reserved) = RESERVED_NAMES.iter().find(|reserved| **reserved == text) {
            return Err(NameError::Reserved(reserved));
        }
        // Without this a service could have a name that `authority::service_of` refuses, and nobody could call it.
        if authority::is_number(text) {
            return Err(NameError::Number);
        }
        Ok(Self(text.into()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl Borrow<str> for ServiceName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// What one CA vouches for: two meshes with different trust domains never trust each other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

/// Why a text is not a trust domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrustDomainError {
    /// Nothing at all.
    #[error("the trust domain is empty: write one like `kiro.mesh`")]
    Empty,
    /// Over SPIFFE's 255 bytes.
    #[error(
        "the trust domain has {length} bytes: SPIFFE allows at most {TRUST_DOMAIN_BYTES_MAX}, shorten it"
    )]
    TooLong {
        /// How long it is, in bytes.
        length: usize,
    },
    /// A character that SPIFFE does not allow.
    #[error("the trust domain has {character:?}: write it with a to z, digits, `.`, `-` and `_` alone")]
    Character {
        /// The first one of them.
        character: char,
    },
}

impl TrustDomain {
    /// Reads a trust domain by the SPIFFE ID specification, 2.1.
    ///
    /// # Errors
    /// Says what is wrong with it and what to write.
    pub fn parse(text: &str) -> Result<Self, TrustDomainError> {
        if text.is_empty() {
            return Err(TrustDomainError::Empty);
        }
        if let Some(character) = text.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_'))
        {
            return Err(TrustDomainError::Character { character });
        }
        if text.len() > TRUST_DOMAIN_BYTES_MAX {
            return Err(TrustDomainError::TooLong { length: text.len() });
        }
        Ok(Self(text.into()))
    }

    /// The trust domain.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Which of a pod's two processes an identity is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// The sidecar, which speaks for the service to other sidecars.
    Sidecar,
    /// The application, whose identity is worth something on its pod's loopback alone.
    App,
}

/// The identity in a leaf's URI SAN: `spiffe://<trust domain>/<service>`, for an application with `/app` after it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    /// What the CA vouches for.
    pub trust_domain: TrustDomain,
    /// The service.
    pub service: ServiceName,
    /// Its sidecar or its application.
    pub role: Role,
}

/// Why a text is not the SPIFFE ID of one of our leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// Another scheme, or none.
    #[error("the identity does not start with `{SPIFFE_SCHEME}`")]
    Scheme,
    /// The part before the first slash.
    #[error("in the identity's first part: {0}")]
    TrustDomain(#[from] TrustDomainError),
    /// The path's first segment.
    #[error("in the identity's second part: {0}")]
    Service(#[from] NameError),
    /// Something else than `/<service>` or `/<service>/app`.
    #[error("the identity's path is not `/<service>` or `/<service>/{APP}`")]
    Path,
}

impl SpiffeId {
    /// The identity of a service's sidecar.
    #[must_use]
    pub fn sidecar(trust_domain: &TrustDomain, service: &ServiceName) -> Self {
        Self { trust_domain: trust_domain.clone(), service: service.clone(), role: Role::Sidecar }
    }

    /// The identity of a service's application.
    #[must_use]
    pub fn app(trust_domain: &TrustDomain, service: &ServiceName) -> Self {
        Self { trust_domain: trust_domain.clone(), service: service.clone(), role: Role::App }
    }

    /// Reads what `Display` writes, and nothing else: an identity is compared, so it has one spelling.
    ///
    /// # Errors
    /// Says which part is wrong.
    pub fn parse(text: &str) -> Result<Self, SpiffeIdError> {
        let rest = text.strip_prefix(SPIFFE_SCHEME).ok_or(SpiffeIdError::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').ok_or(SpiffeIdError::Path)?;
        let (service, role) = match path.split_once('/') {
            None => (path, Role::Sidecar),
            Some((service, APP)) => (service, Role::App),
            Some(_) => return Err(SpiffeIdError::Path),
        };
        Ok(Self {
            trust_domain: TrustDomain::parse(trust_domain)?,
            service: ServiceName::parse(service)?,
            role,
        })
    }

    /// The DNS name beside this identity in its leaf: `<service>`, for an application `app.<service>`.
    #[must_use]
    pub fn dns_name(&self) -> String {
        match self.role {
            Role::Sidecar => self.service.as_str().to_owned(),
            Role::App => format!("{APP}.{}", self.service),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SPIFFE_SCHEME}{}/{}", self.trust_domain, self.service)?;
        match self.role {
            Role::Sidecar => Ok(()),
            Role::App => write!(f, "/{APP}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_dns_labels_are_taken_as_they_are() {
        let longest = "a".repeat(63);
        for name in
            ["a", "7a", "profile", "profile-1", "a--b", "xn--bcher-kva", "app", "1e3", "0xyz", &longest]
        {
            let parsed = ServiceName::parse(name).unwrap();
            assert_eq!(parsed.as_str(), name);
            assert_eq!(parsed.to_string(), name);
        }
    }

    #[test]
    fn other_names_are_refused_with_the_reason() {
        let long = "a".repeat(64);
        let cases = [
            ("", NameError::Empty),
            (long.as_str(), NameError::TooLong { length: 64 }),
            ("Profile", NameError::Character { character: 'P' }),
            ("pro_file", NameError::Character { character: '_' }),
            ("pro.file", NameError::Character { character: '.' }),
            ("profil\u{e9}", NameError::Character { character: '\u{e9}' }),
            ("profile\0", NameError::Character { character: '\0' }),
            ("profile\n", NameError::Character { character: '\n' }),
            ("-profile", NameError::Hyphen),
            ("profile-", NameError::Hyphen),
            ("-", NameError::Hyphen),
            ("ingress", NameError::Reserved("ingress")),
            ("localhost", NameError::Reserved("localhost")),
            ("2130706433", NameError::Number),
            ("0x7f", NameError::Number),
            ("0x", NameError::Number),
            ("0", NameError::Number),
        ];
        for (name, error) in cases {
            assert_eq!(ServiceName::parse(name), Err(error), "{name}");
        }
    }

    #[test]
    fn an_error_never_prints_a_control_character() {
        let error = ServiceName::parse("a\u{1b}[31m").unwrap_err().to_string();
        assert!(!error.chars().any(char::is_control), "{error:?}");
    }

    #[test]
    fn a_name_finds_its_entry_by_str() {
        let map = std::collections::HashMap::from([(ServiceName::parse("auth").unwrap(), 1)]);
        assert_eq!(map.get("auth"), Some(&1));
        assert_eq!(map.get("aut"), None);
    }

    #[test]
    fn trust_domains_follow_spiffe() {
        let longest = "d".repeat(255);
        for name in ["kiro.mesh", "a_b-c.1", &longest] {
            assert_eq!(TrustDomain::parse(name).unwrap().as_str(), name);
        }
        let long = "d".repeat(256);
        let cases = [
            ("", TrustDomainError::Empty),
            (long.as_str(), TrustDomainError::TooLong { length: 256 }),
            ("Kiro.mesh", TrustDomainError::Character { character: 'K' }),
            ("kiro/mesh", TrustDomainError::Character { character: '/' }),
            ("kiro:8080", TrustDomainError::Character { character: ':' }),
            ("a@b", TrustDomainError::Character { character: '@' }),
        ];
        for (name, error) in cases {
            assert_eq!(TrustDomain::parse(name), Err(error), "{name}");
        }
    }

    #[test]
    fn identities_are_read_as_they_are_written() {
        let domain = TrustDomain::parse("kiro.mesh").unwrap();
        for service in ["profile", "app"] {
            let service = ServiceName::parse(service).unwrap();
            for id in [SpiffeId::sidecar(&domain, &service), SpiffeId::app(&domain, &service)] {
                assert_eq!(SpiffeId::parse(&id.to_string()), Ok(id));
            }
        }
        let profile = ServiceName::parse("profile").unwrap();
        let sidecar = SpiffeId::sidecar(&domain, &profile);
        let app = SpiffeId::app(&domain, &profile);
        assert_eq!(
            (sidecar.to_string().as_str(), sidecar.dns_name().as_str()),
            ("spiffe://kiro.mesh/profile", "profile")
        );
        assert_eq!(
            (app.to_string().as_str(), app.dns_name().as_str()),
            ("spiffe://kiro.mesh/profile/app", "app.profile")
        );
    }

    #[test]
    fn other_identities_are_refused() {
        let cases = [
            ("", SpiffeIdError::Scheme),
            ("SPIFFE://kiro.mesh/profile", SpiffeIdError::Scheme),
            ("https://kiro.mesh/profile", SpiffeIdError::Scheme),
            ("spiffe://kiro.mesh", SpiffeIdError::Path),
            ("spiffe://kiro.mesh/", SpiffeIdError::Service(NameError::Empty)),
            ("spiffe:///profile", SpiffeIdError::TrustDomain(TrustDomainError::Empty)),
            ("spiffe://kiro.mesh/profile/", SpiffeIdError::Path),
            ("spiffe://kiro.mesh/profile/App", SpiffeIdError::Path),
            ("spiffe://kiro.mesh/profile/app/", SpiffeIdError::Path),
            ("spiffe://kiro.mesh/profile/app/x", SpiffeIdError::Path),
            ("spiffe://kiro.mesh//app", SpiffeIdError::Service(NameError::Empty)),
            ("spiffe://kiro.mesh/ingress", SpiffeIdError::Service(NameError::Reserved("ingress"))),
            ("spiffe://kiro.mesh/profile?x", SpiffeIdError::Service(NameError::Character { character: '?' })),
            ("spiffe://kiro.mesh/%70rofile", SpiffeIdError::Service(NameError::Character { character: '%' })),
            (
                "spiffe://user@kiro.mesh/profile",
                SpiffeIdError::TrustDomain(TrustDomainError::Character { character: '@' }),
            ),
        ];
        for (text, error) in cases {
            assert_eq!(SpiffeId::parse(text), Err(error), "{text}");
        }
    }
}
