//! How do keys and certificates become text, and text keys and certificates, without leaving copies of a key behind?

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::KeyPair;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

const LINE_BYTES: usize = 48; // 64 characters of base64, as RFC 7468 asks

/// The key as a PKCS #8 PEM file. rcgen's own encoder goes through buffers that nobody clears.
pub(crate) fn encode_key(key: &KeyPair) -> Zeroizing<Vec<u8>> {
    let der = key.serialized_der();
    // Room for all of it at once: a buffer that grows leaves its former copies in freed memory.
    let mut pem = Zeroizing::new(String::with_capacity(der.len() * 2 + 128));
    pem.push_str("-----BEGIN PRIVATE KEY-----\n");
    for line in der.chunks(LINE_BYTES) {
        STANDARD.encode_string(line, &mut pem);
        pem.push('\n');
    }
    pem.push_str("-----END PRIVATE KEY-----\n");
    Zeroizing::new(std::mem::take(&mut *pem).into_bytes())
}

/// The first certificate of a PEM file; what follows it is its chain, or further roots.
pub(crate) fn first_certificate(pem: &[u8]) -> Result<CertificateDer<'static>, String> {
    CertificateDer::pem_slice_iter(pem)
        .next()
        .ok_or_else(|| "holds no certificate in PEM form".to_owned())?
        .map_err(|error| format!("is not readable as PEM ({error})"))
}

/// The private key of a PEM file, in any of the forms that OpenSSL writes. The error says nothing of the content.
pub(crate) fn parse_key(pem: &[u8]) -> Result<Zeroizing<KeyPair>, String> {
    let der =
        PrivateKeyDer::from_pem_slice(pem).map_err(|_| "holds no private key in PEM form".to_owned())?;
    let der = Zeroizing::new(der);
    let key =
        KeyPair::try_from(&*der).map_err(|_| "is not a private key of a kind that TLS uses".to_owned())?;
    Ok(Zeroizing::new(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_its_text_and_looks_as_other_tools_write_it() {
        let key = KeyPair::generate().unwrap();
        let pem = encode_key(&key);
        assert_eq!(std::str::from_utf8(&pem).unwrap(), key.serialize_pem());
        assert_eq!(parse_key(&pem).unwrap().public_key_raw(), key.public_key_raw());
    }

    #[test]
    fn broken_text_is_an_error_that_repeats_none_of_it() {
        let error =
            parse_key(b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n").unwrap_err();
        assert!(!error.contains("c2VjcmV0"), "{error}");
        assert!(first_certificate(b"nothing").unwrap_err().contains("no certificate"));
        assert!(first_certificate(b"-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n").is_err());
    }
}
