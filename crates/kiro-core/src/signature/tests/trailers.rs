//! The trailer signature of a streamed body.

use super::*;

const DIGEST: [u8; 32] = [3; 32];
const NOT_LISTED: SignatureError = SignatureError::Component("a field is there that is not listed");
const NOT_THERE: SignatureError = SignatureError::Component("a field is listed that is not there");

fn trailers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    for (name, value) in fields {
        trailers.append(*name, HeaderValue::from_static(value));
    }
    trailers
}

/// A streamed request whose head is verified, with the signer that has still to sign its trailers.
fn streamed(nonce: u64) -> (Signer, Verifier, Verified) {
    let (mut signer, mut verifier) = (signer(), verifier());
    let mut next = || {
        let mut message = plain_message();
        message.set("x-kiro-body", "stream");
        let head = message.clone();
        signer.sign(&head.head(), &mut message.headers, NOW).unwrap();
        verifier.verify(&head.head(), &message.headers, NOW).unwrap()
    };
    for _ in 0..nonce {
        next();
    }
    let verified = next();
    assert_eq!((verified.nonce, verified.body), (Nonce(nonce), BodyProof::Trailers));
    (signer, verifier, verified)
}

/// What becomes of trailers that are changed after they were signed.
fn changed(change: impl FnOnce(&mut HeaderMap)) -> Result<(), SignatureError> {
    let (signer, verifier, verified) = streamed(0);
    let mut trailers = trailers(&[("grpc-status", "0"), ("x-b", "1"), ("x-b", "2")]);
    signer.sign_trailers(verified.nonce, &DIGEST, &mut trailers).unwrap();
    change(&mut trailers);
    verifier.verify_trailers(&verified, &DIGEST, &trailers)
}

#[test]
fn trailers_are_signed_in_the_one_form() {
    let (signer, verifier, verified) = streamed(5);
    let mut trailers = trailers(&[("x-b", "1 "), ("grpc-status", "0"), ("x-b", "\t2"), ("accept", " ")]);
    signer.sign_trailers(verified.nonce, &DIGEST, &mut trailers).unwrap();
    verifier.verify_trailers(&verified, &DIGEST, &trailers).unwrap();
    let input = format!(
        "(\"content-digest\";tr \"accept\";tr \"grpc-status\";tr \"x-b\";tr)\
         ;nonce=\"5\";keyid=\"{KEYID}\";alg=\"hmac-sha256\";tag=\"kiro-trailers\""
    );
    assert_eq!(lines(&trailers, "signature-input"), [format!("kiro={input}")]);
    let digest = "sha-256=:AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=:";
    assert_eq!(lines(&trailers, "content-digest"), [digest]);
    let mut mac = key().mac();
    mac.update(
        format!(
            "\"content-digest\";tr: {digest}\n\"accept\";tr: \n\"grpc-status\";tr: 0\n\"x-b\";tr: 1, 2\n\"@signature-params\": {input}"
        )
        .as_bytes(),
    );
    assert_eq!(trailers["signature"], labelled(b"kiro=", &mac.finalize().into_bytes().into()));
}

#[test]
fn nothing_in_trailers_can_be_changed() {
    changed(|_| ()).unwrap();
    let insert = |name, value| {
        move |trailers: &mut HeaderMap| {
            drop(trailers.insert(HeaderName::from_static(name), HeaderValue::from_static(value)))
        }
    };
    assert_eq!(changed(insert("grpc-status", "1")), Err(SignatureError::Mismatch));
    assert_eq!(changed(insert("x-b", "1")), Err(SignatureError::Mismatch));
    assert_eq!(changed(insert("x-c", "1")), Err(NOT_LISTED));
    assert_eq!(changed(insert("a", "1")), Err(NOT_LISTED));
    assert_eq!(changed(|trailers| drop(trailers.remove("grpc-status"))), Err(NOT_THERE));
    assert_eq!(changed(|trailers| drop(trailers.remove("x-b"))), Err(NOT_THERE));
    // Two lines joined are the same field value.
    changed(insert("x-b", "1, 2")).unwrap();
}

#[test]
fn a_bodys_end_needs_its_signature() {
    let missing = Err(SignatureError::TrailersMissing);
    assert_eq!(changed(HeaderMap::clear), missing);
    assert_eq!(changed(|trailers| drop(trailers.remove("signature"))), missing);
    assert_eq!(changed(|trailers| drop(trailers.remove("signature-input"))), missing);
    assert_eq!(
        changed(|trailers| drop(trailers.remove("content-digest"))),
        Err(SignatureError::Component("the trailers have no content-digest"))
    );
    assert_eq!(
        changed(|trailers| assert!(trailers.append("signature", HeaderValue::from_static("kiro=::")))),
        Err(SignatureError::Duplicate)
    );
    assert_eq!(
        changed(|trailers| drop(trailers.insert("signature", HeaderValue::from_static("kiro=::")))),
        Err(SignatureError::Malformed("signature"))
    );
}

#[test]
fn another_bodys_digest_is_refused() {
    let (signer, verifier, verified) = streamed(0);
    let mut signed = HeaderMap::new();
    signer.sign_trailers(verified.nonce, &DIGEST, &mut signed).unwrap();
    assert_eq!(verifier.verify_trailers(&verified, &[4; 32], &signed), Err(SignatureError::DigestMismatch));
    verifier.verify_trailers(&verified, &DIGEST, &signed).unwrap();
    // Its digest exchanged for that of the other body.
    signed.insert("content-digest", content_digest_value(&[4; 32]));
    assert_eq!(verifier.verify_trailers(&verified, &[4; 32], &signed), Err(SignatureError::Mismatch));
}

#[test]
fn another_requests_trailers_are_refused() {
    let (signer, verifier, verified) = streamed(1);
    let mut trailers = HeaderMap::new();
    signer.sign_trailers(Nonce(0), &DIGEST, &mut trailers).unwrap();
    let refused = verifier.verify_trailers(&verified, &DIGEST, &trailers);
    assert_eq!(refused, Err(SignatureError::TrailersOfAnother));
    // To call it this one's takes the key.
    let input = lines(&trailers, "signature-input")[0].replace("nonce=\"0\"", "nonce=\"1\"");
    trailers.insert("signature-input", input.parse().unwrap());
    assert_eq!(verifier.verify_trailers(&verified, &DIGEST, &trailers), Err(SignatureError::Mismatch));
}

#[test]
fn trailers_of_another_epoch_or_connection_are_refused() {
    let second = keyid("dashboard>profile#2");
    let second_key = || ConnectionKey::derive(&secret(2), &EXPORTER, &second);
    let (_, _, verified) = streamed(0);
    let mut verifier = Verifier::new(vec![(keyid(KEYID), key()), (second.clone(), second_key())]);
    let mut trailers = HeaderMap::new();
    Signer::new(second_key(), second.clone()).sign_trailers(verified.nonce, &DIGEST, &mut trailers).unwrap();
    assert_eq!(
        verifier.verify_trailers(&verified, &DIGEST, &trailers),
        Err(SignatureError::TrailersOfAnother)
    );

    let elsewhere = ConnectionKey::derive(&secret(1), &[8; 32], &keyid(KEYID));
    trailers.clear();
    Signer::new(elsewhere, keyid(KEYID)).sign_trailers(verified.nonce, &DIGEST, &mut trailers).unwrap();
    assert_eq!(verifier.verify_trailers(&verified, &DIGEST, &trailers), Err(SignatureError::Mismatch));

    // The second epoch's own pass, with its key and not the first one's.
    let mut message = plain_message();
    message.set("x-kiro-body", "stream");
    let mut signer = Signer::new(second_key(), second.clone());
    let nonce = signer.sign(&message.clone().head(), &mut message.headers, NOW).unwrap();
    let verified = verifier.verify(&message.head(), &message.headers, NOW).unwrap();
    trailers.clear();
    signer.sign_trailers(nonce, &DIGEST, &mut trailers).unwrap();
    verifier.verify_trailers(&verified, &DIGEST, &trailers).unwrap();
}

/// Each is signed with the right key.
#[test]
fn the_form_of_trailers_is_exactly_ours() {
    let parameters = format!(";nonce=\"0\";keyid=\"{KEYID}\";alg=\"hmac-sha256\";tag=\"kiro-trailers\"");
    let value = content_digest_value(&DIGEST);
    let digest = ("content-digest", value.to_str().unwrap());
    let (a, b) = (("x-a", "1"), ("x-b", "2"));
    let forged = |form, components: &[(&str, &str)], parameters: &str| {
        let (_, verifier, verified) = streamed(0);
        let mut trailers = trailers(&[("x-b", "2"), ("x-a", "1")]);
        trailers.insert("content-digest", value.clone());
        forge(&mut trailers, form, components, parameters);
        verifier.verify_trailers(&verified, &DIGEST, &trailers)
    };
    forged(Form::Trailers, &[digest, a, b], &parameters).unwrap();
    let component = |what| Err(SignatureError::Component(what));
    for (components, verdict) in [
        (&[digest, b, a][..], component("the components are listed in another order")),
        (&[a, b, digest], component("the components are listed in another order")),
        (&[a, b], component("a field is there that is not listed")),
        (&[digest, a], component("a field is there that is not listed")),
        (&[digest, a, b, b], component("a component is listed twice")),
        (&[digest, a, b, ("x-c", "")], component("a field is listed that is not there")),
    ] {
        assert_eq!(forged(Form::Trailers, components, &parameters), verdict, "{components:?}");
    }
    assert_eq!(
        forged(Form::Head, &[digest, a, b], &parameters),
        component("an unknown component is listed"),
        "fields of the head in place of trailers"
    );
    let malformed = |what| Err(SignatureError::Malformed(what));
    for (from, to, verdict) in [
        ("kiro-trailers", "kiro", malformed("tag")),
        ("sha256", "sha512", Err(SignatureError::WrongAlgorithm)),
        (";nonce", ";created=1800000000;nonce", malformed("nonce")),
        ("\"kiro-trailers\"", "\"kiro-trailers\";a", malformed("more than our parameters")),
        ("dashboard", "auth", Err(SignatureError::TrailersOfAnother)),
    ] {
        assert_eq!(forged(Form::Trailers, &[digest, a, b], &parameters.replace(from, to)), verdict, "{to}");
    }
}

#[test]
fn a_heads_signature_is_none_of_trailers() {
    let (_, verifier, verified) = streamed(0);
    let mut trailers = HeaderMap::new();
    let value = content_digest_value(&DIGEST);
    trailers.insert("content-digest", value.clone());
    let components = [("content-digest", value.to_str().unwrap())];
    forge(&mut trailers, Form::Trailers, &components, &head_parameters());
    assert_eq!(
        verifier.verify_trailers(&verified, &DIGEST, &trailers),
        Err(SignatureError::Malformed("nonce"))
    );
}

#[test]
fn an_applications_own_digest_and_signature_pass() {
    let before = trailers(&[
        ("content-digest", "sha-512=:AAAA:"),
        ("content-digest", "sha-256=:AAAA:"),
        ("signature-input", "sig1=(\"x-a\";tr)"),
        ("signature", "sig1=:AAAA:"),
        ("x-a", "1"),
    ]);
    let (signer, verifier, verified) = streamed(0);
    let mut trailers = before.clone();
    signer.sign_trailers(verified.nonce, &DIGEST, &mut trailers).unwrap();
    assert_eq!(lines(&trailers, "content-digest").len(), 3);
    verifier.verify_trailers(&verified, &DIGEST, &trailers).unwrap();
    strip_trailers(&mut trailers);
    assert_eq!(trailers, before);
    // Nothing of ours, nothing to strip.
    strip_trailers(&mut trailers);
    assert_eq!(trailers, before);
}

/// The line of our digest is the last, whatever a peer with the key puts there.
#[test]
fn the_digest_that_counts_is_ours() {
    let (_, verifier, verified) = streamed(0);
    let parameters = format!(";nonce=\"0\";keyid=\"{KEYID}\";alg=\"hmac-sha256\";tag=\"kiro-trailers\"");
    for (second, verdict) in [
        (content_digest_value(&[4; 32]), Err(SignatureError::DigestMismatch)),
        (HeaderValue::from_static("sha-512=:AAAA:"), Err(SignatureError::Malformed("content-digest"))),
    ] {
        let mut trailers = HeaderMap::new();
        let first = content_digest_value(&DIGEST);
        let joined = format!("{}, {}", first.to_str().unwrap(), second.to_str().unwrap());
        trailers.append("content-digest", first);
        trailers.append("content-digest", second);
        forge(&mut trailers, Form::Trailers, &[("content-digest", &joined)], &parameters);
        assert_eq!(verifier.verify_trailers(&verified, &DIGEST, &trailers), verdict);
    }
}

#[test]
fn trailers_that_no_verifier_takes_are_not_signed() {
    let (signer, ..) = streamed(0);
    let mut trailers = HeaderMap::new();
    trailers.insert("x-a", HeaderValue::from_bytes(b"caf\xe9").unwrap());
    let refused = signer.sign_trailers(Nonce(0), &DIGEST, &mut trailers);
    assert_eq!(refused, Err(SignError::Component("a field's value is not plain ASCII")));
    assert!(!trailers.contains_key("signature"));
    trailers.clear();
    trailers.insert("signature-input", HeaderValue::from_static("a=();tag=\"kiro-trailers\""));
    assert_eq!(signer.sign_trailers(Nonce(0), &DIGEST, &mut trailers), Err(SignError::Reserved));
}
