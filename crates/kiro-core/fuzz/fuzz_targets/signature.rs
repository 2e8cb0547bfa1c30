//! Whatever fields a message carries, the signature code neither panics, nor believes what was not signed, nor signs what its
//! own verifier refuses, nor changes what belongs to the application.
//!
//! Input: a field a line; the first byte chooses the name, the rest is the value.

#![no_main]

use http::{HeaderMap, HeaderName, HeaderValue};
use kiro_core::signature::{
    BodyProof, ConnectionKey, EdgeSecret, Head, KeyId, SignatureError, Signer, Verifier, strip,
    strip_trailers,
};
use libfuzzer_sys::fuzz_target;

const NOW: u64 = 1_800_000_000;
const HEAD: Head<'_> = Head { method: "POST", authority: "profile", path: "/a", query: Some("b=1") };
const NAMES: [&str; 8] = [
    "signature-input",
    "signature",
    "content-digest",
    "x-kiro-host",
    "x-kiro-body",
    "x-kiro-upgrade",
    "x-kiro-caller",
    "accept",
];

fuzz_target!(|data: &[u8]| {
    let fields = fields(data);
    head(&fields);
    trailers(&fields);
});

fn fields(data: &[u8]) -> HeaderMap {
    let mut fields = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n').take(64) {
        let Some((choice, value)) = line.split_first() else { continue };
        let name = HeaderName::from_static(NAMES[usize::from(*choice) % NAMES.len()]);
        if let Ok(value) = HeaderValue::from_bytes(value) {
            fields.append(name, value);
        }
    }
    fields
}

fn pair() -> (Signer, Verifier) {
    let keyid = KeyId::parse("dashboard>profile#1").expect("a keyid");
    let key = ConnectionKey::derive(&EdgeSecret::from_bytes([1; 32]), &[2; 32], &keyid);
    (Signer::new(key.clone(), keyid.clone()), Verifier::new(vec![(keyid, key)]))
}

fn head(fields: &HeaderMap) {
    let (mut signer, mut verifier) = pair();
    let refused = verifier.verify(&HEAD, fields, NOW).expect_err("nobody signed this");
    assert!(refused.code().starts_with("signature_"));

    let mut bare = fields.clone();
    strip(&mut bare);
    let mut signed = fields.clone();
    if signer.sign(&HEAD, &mut signed, NOW).is_err() {
        return;
    }
    verifier.verify(&HEAD, &signed, NOW).expect("what we sign we believe");
    assert_eq!(verifier.verify(&HEAD, &signed, NOW), Err(SignatureError::Replayed));
    strip(&mut signed);
    assert_eq!(signed, bare);
}

fn trailers(fields: &HeaderMap) {
    let (mut signer, mut verifier) = pair();
    let mut head = HeaderMap::new();
    head.insert("x-kiro-body", HeaderValue::from_static("stream"));
    signer.sign(&HEAD, &mut head, NOW).expect("a plain head");
    let verified = verifier.verify(&HEAD, &head, NOW).expect("what we sign we believe");
    assert_eq!(verified.body, BodyProof::Trailers);
    let digest = [3; 32];
    verifier.verify_trailers(&verified, &digest, fields).expect_err("nobody signed this");

    let mut bare = fields.clone();
    strip(&mut bare);
    let mut signed = fields.clone();
    if signer.sign_trailers(verified.nonce, &digest, &mut signed).is_err() {
        return;
    }
    verifier.verify_trailers(&verified, &digest, &signed).expect("what we sign we believe");
    assert_eq!(verifier.verify_trailers(&verified, &[4; 32], &signed), Err(SignatureError::DigestMismatch));
    strip_trailers(&mut signed);
    assert_eq!(signed, bare);
}
