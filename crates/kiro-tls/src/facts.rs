//! What does a certificate say of itself?
//!
//! The facts of a leaf that was presented, trusted or not, as log lines and people need them. Whatever stands in a certificate
//! comes from the network, so texts are bounded and hold no control characters.

use std::fmt::Write;

use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

/// No honest leaf has nearly as many names; the log line stays readable when a dishonest one does.
const NAMES_MAX: usize = 32;

/// RFC 1035 names have 253 bytes, SPIFFE IDs at most 2048, ours far less.
const NAME_CHARS_MAX: usize = 320;

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafFacts {
    /// Serial number, in hex.
    pub serial: String,
    /// The start of its time.
    pub not_before: OffsetDateTime,
    /// The end of its time.
    pub not_after: OffsetDateTime,
    /// Its subject alternative names, each with its kind: `DNS:profile`, `URI:spiffe://kiro.mesh/profile`.
    pub sans: Vec<String>,
    /// Who says that it issued it.
    pub issuer: String,
    /// SHA-256 over the whole certificate, in hex.
    pub fingerprint: String,
    /// URI names alone, as they stand: the verifier compares them.
    pub(crate) uris: Vec<String>,
    /// DNS names alone, as they stand.
    pub(crate) dns: Vec<String>,
}

impl LeafFacts {
    /// Reads a certificate. A name that can't be read, or more names than a leaf can honestly have, is an error: the verifier
    /// must see every name that there is.
    pub(crate) fn from_der(der: &[u8]) -> Result<Self, String> {
        let (rest, certificate) = X509Certificate::from_der(der)
            .map_err(|error| format!("it is no X.509 certificate ({error})"))?;
        if !rest.is_empty() {
            return Err("bytes follow the certificate".to_owned());
        }
        let mut facts = Self {
            serial: serial(certificate.raw_serial()),
            not_before: certificate.validity().not_before.to_datetime(),
            not_after: certificate.validity().not_after.to_datetime(),
            sans: Vec::new(),
            issuer: clean(&certificate.issuer().to_string()),
            fingerprint: hex(&Sha256::digest(der)),
            uris: Vec::new(),
            dns: Vec::new(),
        };
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| format!("its names can't be read ({error})"))?
            .map(|extension| extension.value.general_names.as_slice())
            .unwrap_or_default();
        if names.len() > NAMES_MAX {
            return Err(format!("it has {} names, over {NAMES_MAX}", names.len()));
        }
        for name in names {
            facts.take(name)?;
        }
        Ok(facts)
    }

    fn take(&mut self, name: &GeneralName<'_>) -> Result<(), String> {
        match name {
            GeneralName::DNSName(dns) => {
                self.dns.push((*dns).to_owned());
                self.sans.push(clean(&format!("DNS:{dns}")));
            }
            GeneralName::URI(uri) => {
                self.uris.push((*uri).to_owned());
                self.sans.push(clean(&format!("URI:{uri}")));
            }
            GeneralName::Invalid(tag, _) => return Err(format!("one of its names can't be read ({tag})")),
            GeneralName::OtherName(..)
            | GeneralName::RFC822Name(_)
            | GeneralName::X400Address(_)
            | GeneralName::DirectoryName(_)
            | GeneralName::EDIPartyName(_)
            | GeneralName::IPAddress(_)
            | GeneralName::RegisteredID(_) => self.sans.push(clean(&name.to_string())),
        }
        Ok(())
    }

    /// The identity that the certificate claims, for people: its URI names.
    pub(crate) fn presented(&self) -> String {
        if self.uris.is_empty() {
            return format!("no URI name ({})", self.sans.join(" "));
        }
        clean(&self.uris.join(" "))
    }
}

/// A text from a certificate, fit for a log line.
pub(crate) fn clean(text: &str) -> String {
    text.chars().take(NAME_CHARS_MAX).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// A time as logs have it.
pub(crate) fn instant(time: OffsetDateTime) -> String {
    // RFC 3339 has no year over 9999, X.509 does not either, but a peer's encoder might.
    time.format(&Rfc3339).unwrap_or_else(|_| time.unix_timestamp().to_string())
}

/// As `openssl x509 -serial` has it, without DER's sign byte.
fn serial(raw: &[u8]) -> String {
    match raw {
        [0, rest @ ..] if !rest.is_empty() => hex(rest),
        whole => hex(whole),
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String can't fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, CustomExtension, DnType, KeyPair, SanType, SerialNumber};

    use super::*;

    fn facts(change: impl FnOnce(&mut CertificateParams)) -> Result<LeafFacts, String> {
        let mut params = CertificateParams::default();
        change(&mut params);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        LeafFacts::from_der(certificate.der())
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    #[test]
    fn a_name_that_can_not_be_read_is_an_error() {
        // SEQUENCE { [6] "a:b", [6] ff }: the second is no text.
        let names = vec![0x30, 8, 0x86, 3, b'a', b':', b'b', 0x86, 1, 0xff];
        let extension = CustomExtension::from_oid_content(&[2, 5, 29, 17], names);
        let error = facts(|params| params.custom_extensions.push(extension)).unwrap_err();
        assert!(error.contains("one of its names can't be read"), "{error}");
    }

    #[test]
    fn there_are_only_so_many_names() {
        let names = |count: usize| {
            facts(|params| params.subject_alt_names = (0..count).map(|n| uri(&format!("a:{n}"))).collect())
        };
        assert_eq!(names(NAMES_MAX).unwrap().uris.len(), NAMES_MAX);
        assert!(names(NAMES_MAX + 1).unwrap_err().contains("33 names"));
    }

    #[test]
    fn what_is_shown_is_bounded_and_has_no_control_characters() {
        let long = format!("a:{}", "x".repeat(5000));
        let facts = facts(|params| {
            params.subject_alt_names = vec![uri("a:\n\u{1b}[31m"), uri(&long)];
            params.distinguished_name.push(DnType::CommonName, "Kiro\r\nCA");
        })
        .unwrap();
        assert_eq!(facts.uris.first().unwrap(), "a:\n\u{1b}[31m", "compared as it stands");
        for text in facts.sans.iter().chain([&facts.issuer, &facts.presented()]) {
            assert!(text.len() <= 4 * NAME_CHARS_MAX && !text.chars().any(char::is_control), "{text:?}");
        }
    }

    #[test]
    fn a_serial_is_written_as_openssl_does() {
        for (serial, shown) in [(vec![0x80, 1], "8001"), (vec![0x7f, 2], "7f02"), (vec![5], "05")] {
            let facts = facts(|params| params.serial_number = Some(SerialNumber::from(serial))).unwrap();
            assert_eq!(facts.serial, shown);
        }
    }

    #[test]
    fn bytes_after_the_certificate_are_an_error() {
        let certificate = CertificateParams::default().self_signed(&KeyPair::generate().unwrap()).unwrap();
        let mut der = certificate.der().to_vec();
        assert!(LeafFacts::from_der(&der).is_ok());
        der.push(0);
        assert!(LeafFacts::from_der(&der).is_err());
        assert!(LeafFacts::from_der(b"hello").is_err());
    }
}
