//! What signers write and verifiers take.

use super::*;

#[test]
fn a_signature_is_written_in_the_one_form() {
    let message = signed(message());
    assert_eq!(
        lines(&message.headers, "signature-input"),
        [format!(
            "kiro=(\"@method\" \"@authority\" \"@path\" \"@query\" \"x-kiro-host\" \"content-digest\")\
             ;created={NOW};expires={};nonce=\"0\";keyid=\"{KEYID}\";alg=\"hmac-sha256\";tag=\"kiro\"",
            NOW + 30
        )]
    );
    let signature = lines(&message.headers, "signature");
    assert!(signature[0].starts_with("kiro=:") && signature[0].ends_with("=:"), "{signature:?}");
}

#[test]
fn the_mac_is_over_the_base_as_the_rfc_writes_it() {
    let message = signed(message());
    let input = lines(&message.headers, "signature-input").remove(0);
    let base = format!(
        "\"@method\": POST\n\"@authority\": profile\n\"@path\": /profiles/alice\n\"@query\": ?full=1\n\
         \"x-kiro-host\": profile.example:8080\n\"content-digest\": {}\n\"@signature-params\": {}",
        message.headers["content-digest"].to_str().unwrap(),
        input.strip_prefix("kiro=").unwrap()
    );
    let mut mac = key().mac();
    mac.update(base.as_bytes());
    assert_eq!(message.headers["signature"], labelled(b"kiro=", &mac.finalize().into_bytes().into()));
}

#[test]
fn nonces_count_from_zero_and_come_back_verified() {
    let (mut signer, mut verifier) = (signer(), verifier());
    for expected in 0..20 {
        let mut message = message();
        let nonce = signer.sign(&message.clone().head(), &mut message.headers, NOW).unwrap();
        let verified = verifier.verify(&message.head(), &message.headers, NOW).unwrap();
        assert_eq!((nonce, verified.nonce), (Nonce(expected), Nonce(expected)));
        assert_eq!(nonce.to_string(), expected.to_string());
    }
}

#[test]
fn the_body_is_proven_by_what_is_covered() {
    let body = |change: fn(&mut Message)| {
        let mut message = plain_message();
        change(&mut message);
        verify(&signed(message)).unwrap().body
    };
    let digest = content_digest_value(&[9; 32]).to_str().unwrap().to_owned();
    assert_eq!(digest, "sha-256=:CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=:");
    assert_eq!(body(|_| ()), BodyProof::Empty);
    assert_eq!(
        body(|message| drop(message.headers.insert("content-digest", content_digest_value(&[9; 32])))),
        BodyProof::Digest([9; 32])
    );
    assert_eq!(body(|message| message.set("x-kiro-body", "stream")), BodyProof::Trailers);
    // The application's own digest of a stream is covered and not looked into.
    assert_eq!(
        body(|message| {
            message.set("x-kiro-body", "stream");
            message.set("content-digest", "no digest at all");
        }),
        BodyProof::Trailers
    );
    // Several algorithms, in one line or two.
    assert_eq!(
        body(|message| {
            message.set("content-digest", "sha-512=:AAAA:;q=1");
            message.append(
                "content-digest",
                "sha-256=:CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=:, md5=:AA==:",
            );
        }),
        BodyProof::Digest([9; 32])
    );
}

#[test]
fn a_head_whose_digest_proves_nothing_is_neither_signed_nor_believed() {
    let sha256 = "sha-256=:CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=:";
    let no_dictionary = "content-digest is not a dictionary of byte sequences";
    let no_sha256 = "content-digest has a sha-256 that is not 32 bytes";
    for (digest, what) in [
        ("", "content-digest has no sha-256"),
        ("sha-512=:AAAA:", "content-digest has no sha-256"),
        ("SHA-256=:AAAA:", no_dictionary),
        ("sha-256", no_dictionary),
        ("sha-256=abc", no_dictionary),
        ("sha-256=(:AAAA:)", no_dictionary),
        (&format!("{sha256},"), no_dictionary),
        (&format!("{sha256} {sha256}"), no_dictionary),
        (&format!("{sha256}, md5=1"), no_dictionary),
        ("sha-256=:AAAA:", no_sha256),
        ("sha-256=::", no_sha256),
        // Two bytes too many, and none: the length of the text alone would not tell.
        ("sha-256=:CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJ:", no_sha256),
        ("sha-256=:CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQ==:", no_sha256),
        // The last character has bits to spare.
        ("sha-256=:CQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQl=:", no_sha256),
        (&format!("{sha256};a=1"), no_sha256),
        (&format!("{sha256}, {sha256}"), "content-digest has two sha-256"),
    ] {
        let mut message = plain_message();
        message.set("content-digest", digest);
        let head = message.clone();
        assert_eq!(
            signer().sign(&head.head(), &mut message.headers, NOW),
            Err(SignError::Body(what)),
            "{digest}"
        );
        assert!(!message.headers.contains_key("signature"));
        let components = [PLAIN_COMPONENTS.as_slice(), &[("content-digest", digest)]].concat();
        forge(&mut message.headers, Form::Head, &components, &head_parameters());
        assert_eq!(verify(&message), Err(SignatureError::Malformed(what)), "{digest}");
    }
}

#[test]
fn a_head_whose_body_field_is_not_ours_is_neither_signed_nor_believed() {
    for value in ["", "streams", "Stream", "stream, stream"] {
        let mut message = plain_message();
        message.set("x-kiro-body", value);
        let what = "x-kiro-body has a value that is not ours";
        let head = message.clone();
        assert_eq!(
            signer().sign(&head.head(), &mut message.headers, NOW),
            Err(SignError::Body(what)),
            "{value}"
        );
        let components = [PLAIN_COMPONENTS.as_slice(), &[("x-kiro-body", value)]].concat();
        forge(&mut message.headers, Form::Head, &components, &head_parameters());
        assert_eq!(verify(&message), Err(SignatureError::Malformed(what)), "{value}");
    }
}

#[test]
fn what_is_not_fit_for_a_base_is_neither_signed_nor_believed() {
    type Change = fn(&mut Message);
    let cases: [(Change, &str); 17] = [
        (|message| message.method = "", "@method is empty or not plain ASCII"),
        (|message| message.method = "GET\n", "@method is empty or not plain ASCII"),
        (|message| message.authority = "", "@authority is not a bare name in lower case"),
        (|message| message.authority = "Profile", "@authority is not a bare name in lower case"),
        (|message| message.authority = "profile:443", "@authority is not a bare name in lower case"),
        (|message| message.authority = "a@profile", "@authority is not a bare name in lower case"),
        (|message| message.path = "", "@path is empty or not plain ASCII"),
        (|message| message.path = "/ä", "@path is empty or not plain ASCII"),
        (|message| message.path = "/\n\"@query\": ?", "@path is empty or not plain ASCII"),
        (|message| message.query = Some("a b"), "@query is not plain ASCII"),
        (|message| message.query = Some("ä"), "@query is not plain ASCII"),
        (|message| obs_text(message, "x-kiro-host"), "a field's value is not plain ASCII"),
        (|message| obs_text(message, "content-digest"), "a field's value is not plain ASCII"),
        (|message| obs_text_after(message, "content-digest"), "a field's value is not plain ASCII"),
        (
            |message| message.append("x-kiro-host", "profile.example:8080"),
            "a field of the mesh's own is there twice",
        ),
        (
            |message| message.set("x-kiro-caller", "dashboard"),
            "a field of the mesh's own is there that a caller may not set",
        ),
        (
            |message| message.set("x-kiro-future", "1"),
            "a field of the mesh's own is there that a caller may not set",
        ),
    ];
    for (change, what) in cases {
        let mut unsigned = message();
        change(&mut unsigned);
        let head = unsigned.clone();
        let refused = signer().sign(&head.head(), &mut unsigned.headers, NOW);
        assert_eq!(refused, Err(SignError::Component(what)));
        assert_eq!(unsigned.headers, head.headers, "{what}");
        assert_eq!(changed(change), Err(SignatureError::Component(what)));
    }
}

fn obs_text(message: &mut Message, name: &'static str) {
    message.headers.insert(name, HeaderValue::from_bytes(b"caf\xe9").unwrap());
}

fn obs_text_after(message: &mut Message, name: &'static str) {
    message.headers.append(name, HeaderValue::from_bytes(b"caf\xe9").unwrap());
}

#[test]
fn a_refused_head_uses_up_no_nonce() {
    let mut signer = signer();
    let mut bad = plain_message();
    bad.set("x-kiro-body", "no");
    signer.sign(&bad.clone().head(), &mut bad.headers, NOW).unwrap_err();
    let mut good = plain_message();
    assert_eq!(signer.sign(&good.clone().head(), &mut good.headers, NOW), Ok(Nonce(0)));
}

/// A second attempt goes over another connection, with the head that the first one signed.
#[test]
fn signing_again_replaces_the_first_signature() {
    let mut message = signed(message());
    let head = message.clone();
    let mut second = signer();
    second.sign(&head.head(), &mut message.headers, NOW + 1).unwrap();
    assert_eq!(lines(&message.headers, "signature-input").len(), 1);
    assert_eq!(lines(&message.headers, "signature").len(), 1);
    assert_ne!(message.headers["signature"], head.headers["signature"]);
    verify(&message).unwrap();
}

#[test]
fn whitespace_round_a_value_is_not_part_of_it() {
    let mut message = message();
    message.set("x-kiro-host", "profile.example:8080");
    let mut message = signed(message);
    message.set("x-kiro-host", " \tprofile.example:8080\t");
    verify(&message).unwrap();
}

#[test]
fn no_query_and_an_empty_one_are_the_same() {
    let mut message = signed(plain_message());
    message.query = Some("");
    verify(&message).unwrap();
}

/// `@path` and `@query` must not flow into each other.
#[test]
fn the_query_is_not_part_of_the_path() {
    let mut message = plain_message();
    message.path = "/a?b";
    let mut message = signed(message);
    (message.path, message.query) = ("/a", Some("b"));
    assert_eq!(verify(&message), Err(SignatureError::Mismatch));
}

#[test]
fn keyids_have_one_spelling() {
    for text in ["dashboard>profile#1", "a>b#0", "a>a#4294967295"] {
        assert_eq!(KeyId::parse(text).unwrap().to_string(), text);
    }
    for text in ["", "a>b", "a#1", "ab#1>c"] {
        assert_eq!(KeyId::parse(text), Err(KeyIdError::Form), "{text}");
    }
    for text in ["a>b#", "a>b#01", "a>b#+1", "a>b#-0", "a>b#4294967296", "a>b#1 ", "a>b#1#1"] {
        assert_eq!(KeyId::parse(text), Err(KeyIdError::Epoch), "{text}");
    }
    for text in [">b#1", "a>#1", "A>b#1", "a>b>c#1"] {
        assert!(matches!(KeyId::parse(text), Err(KeyIdError::Name(_))), "{text}");
    }
}

#[test]
fn secrets_and_keys_are_not_printed() {
    let keyid = keyid(KEYID);
    assert_eq!(format!("{:?}", secret(0xab)), "EdgeSecret(redacted)");
    assert_eq!(format!("{:?}", key()), "ConnectionKey(redacted)");
    let signer = format!("{:?}", Signer::new(ConnectionKey::derive(&secret(0xab), &EXPORTER, &keyid), keyid));
    assert!(signer.contains("key: ConnectionKey(redacted)"), "{signer}");
}
