//! Everything that can be wrong with the signature of a head, each with the very error it must give.

use super::*;

const UNKNOWN: SignatureError = SignatureError::Component("an unknown component is listed");
const TWICE: SignatureError = SignatureError::Component("a component is listed twice");
const NOT_LISTED: SignatureError = SignatureError::Component("a field is there that is not listed");
const NOT_THERE: SignatureError = SignatureError::Component("a field is listed that is not there");
const ORDER: SignatureError = SignatureError::Component("the components are listed in another order");

#[test]
fn what_is_covered_can_not_be_changed() {
    changed(|_| ()).unwrap();
    // What is not covered can.
    changed(|message| message.set("accept", "text/plain")).unwrap();
    type Change = fn(&mut Message);
    let cases: [Change; 10] = [
        |message| message.method = "PUT",
        |message| message.authority = "profile-2",
        |message| message.path = "/profiles/mallory",
        |message| message.path = "/profiles/alic%65",
        |message| message.query = Some("full=0"),
        |message| message.query = None,
        |message| message.set("x-kiro-host", "other.example"),
        |message| message.set("x-kiro-host", ""),
        |message| drop(message.headers.insert("content-digest", content_digest_value(&[2; 32]))),
        |message| message.append("content-digest", "sha-512=:AAAA:"),
    ];
    for (index, change) in cases.into_iter().enumerate() {
        assert_eq!(changed(change), Err(SignatureError::Mismatch), "{index}");
    }
}

#[test]
fn covered_fields_can_not_come_or_go() {
    assert_eq!(changed(|message| drop(message.headers.remove("x-kiro-host"))), Err(NOT_THERE));
    assert_eq!(changed(|message| drop(message.headers.remove("content-digest"))), Err(NOT_THERE));
    assert_eq!(changed(|message| message.set("x-kiro-body", "stream")), Err(NOT_LISTED));
    assert_eq!(changed(|message| message.set("x-kiro-upgrade", "websocket")), Err(NOT_LISTED));
    let mut message = signed(plain_message());
    message.headers.insert("content-digest", content_digest_value(&[1; 32]));
    assert_eq!(verify(&message), Err(NOT_LISTED));
}

#[test]
fn a_signature_must_be_there() {
    assert_eq!(verify(&message()), Err(SignatureError::Missing));
    assert_eq!(changed(|message| drop(message.headers.remove("signature"))), Err(SignatureError::Missing));
    assert_eq!(
        changed(|message| drop(message.headers.remove("signature-input"))),
        Err(SignatureError::Missing)
    );
    // Our tag under another label is no signature of ours.
    assert_eq!(
        changed(|message| {
            message.edit("signature", "kiro=", "other=");
            message.edit("signature-input", "kiro=", "other=");
        }),
        Err(SignatureError::Missing)
    );
}

#[test]
fn another_edge_is_unknown() {
    let mut message = message();
    let other = keyid("auth>profile#1");
    let mut signer = Signer::new(ConnectionKey::derive(&secret(1), &EXPORTER, &other), other);
    signer.sign(&message.clone().head(), &mut message.headers, NOW).unwrap();
    assert_eq!(verify(&message), Err(SignatureError::UnknownKey));
    // To call it ours takes our secret.
    message.edit("signature-input", "auth>profile", "dashboard>profile");
    assert_eq!(verify(&message), Err(SignatureError::Mismatch));
    assert_eq!(
        Verifier::new(vec![]).verify(&message.head(), &message.headers, NOW),
        Err(SignatureError::UnknownKey)
    );
}

#[test]
fn another_secret_connection_or_keyid_gives_another_key() {
    let ours = keyid(KEYID);
    for key in [
        ConnectionKey::derive(&secret(2), &EXPORTER, &ours),
        ConnectionKey::derive(&secret(1), &[8; 32], &ours),
        ConnectionKey::derive(&secret(1), &EXPORTER, &keyid("dashboard>profile#2")),
        ConnectionKey::derive(&secret(1), &EXPORTER, &keyid("profile>dashboard#1")),
    ] {
        let mut message = message();
        Signer::new(key, ours.clone()).sign(&message.clone().head(), &mut message.headers, NOW).unwrap();
        assert_eq!(verify(&message), Err(SignatureError::Mismatch));
    }
}

#[test]
fn each_epoch_is_verified_with_its_own_key() {
    let (first, second) = (keyid(KEYID), keyid("dashboard>profile#2"));
    let derive = |edge, keyid| ConnectionKey::derive(&secret(edge), &EXPORTER, keyid);
    let mut verifier =
        Verifier::new(vec![(second.clone(), derive(2, &second)), (first.clone(), derive(1, &first))]);
    for (edge, keyid, nonces) in [(1, &first, 1), (2, &second, 3)] {
        let mut signer = Signer::new(derive(edge, keyid), keyid.clone());
        for _ in 0..nonces {
            let mut message = message();
            let nonce = signer.sign(&message.clone().head(), &mut message.headers, NOW).unwrap();
            let verified = verifier.verify(&message.head(), &message.headers, NOW);
            // The window is the connection's: a nonce is good for one request, whichever epoch signed it.
            let expected =
                if (edge, nonce) == (2, Nonce(0)) { Err(SignatureError::Replayed) } else { Ok(nonce) };
            assert_eq!(verified.map(|verified| verified.nonce), expected);
        }
    }
}

#[test]
fn a_signature_is_good_once() {
    let message = signed(message());
    let mut verifier = verifier();
    verifier.verify(&message.head(), &message.headers, NOW).unwrap();
    assert_eq!(verifier.verify(&message.head(), &message.headers, NOW), Err(SignatureError::Replayed));
}

#[test]
fn only_what_is_verified_moves_the_window() {
    let message = signed(message());
    let mut verifier = verifier();
    let mut far_ahead = message.clone();
    far_ahead.edit("signature-input", "nonce=\"0\"", "nonce=\"1000000\"");
    assert_eq!(verifier.verify(&far_ahead.head(), &far_ahead.headers, NOW), Err(SignatureError::Mismatch));
    let mut changed = message.clone();
    changed.path = "/";
    assert_eq!(verifier.verify(&changed.head(), &changed.headers, NOW), Err(SignatureError::Mismatch));
    let late = NOW + LIFETIME_SECONDS + SKEW_SECONDS_MAX + 1;
    verifier.verify(&message.head(), &message.headers, late).unwrap_err();
    let mut bodiless = plain_message();
    bodiless.set("content-digest", "md5=:AAAA:");
    let components = [PLAIN_COMPONENTS.as_slice(), &[("content-digest", "md5=:AAAA:")]].concat();
    forge(&mut bodiless.headers, Form::Head, &components, &head_parameters());
    verifier.verify(&bodiless.head(), &bodiless.headers, NOW).unwrap_err();
    verifier.verify(&message.head(), &message.headers, NOW).unwrap();
}

#[test]
fn the_clocks_may_differ_by_the_skew_and_no_more() {
    let message = signed(message());
    let at = |now| verifier().verify(&message.head(), &message.headers, now).map(|verified| verified.nonce);
    let (created, expires) = (NOW, NOW + LIFETIME_SECONDS);
    let (first, last) = (created - SKEW_SECONDS_MAX, expires + SKEW_SECONDS_MAX);
    assert_eq!(at(first), Ok(Nonce(0)));
    assert_eq!(at(last), Ok(Nonce(0)));
    let (early, late) = (first - 1, last + 1);
    assert_eq!(at(early), Err(SignatureError::NotYetValid { created, expires, now: early }));
    assert_eq!(at(late), Err(SignatureError::Expired { created, expires, now: late }));
    let text = at(late).unwrap_err().to_string();
    assert!(text.contains(&created.to_string()) && text.contains(&late.to_string()), "{text}");
    let text = at(early).unwrap_err().to_string();
    assert!(text.contains(&created.to_string()) && text.contains(&early.to_string()), "{text}");
}

#[test]
fn a_peer_can_not_sign_for_long() {
    for (lifetime, verdict) in [
        (0, Ok(Nonce(0))),
        (LIFETIME_SECONDS as i64, Ok(Nonce(0))),
        (-1, Err(SignatureError::Malformed("expires is before created or too long after it"))),
        (
            LIFETIME_SECONDS as i64 + 1,
            Err(SignatureError::Malformed("expires is before created or too long after it")),
        ),
    ] {
        let expires = NOW.checked_add_signed(lifetime).unwrap();
        let parameters = head_parameters()
            .replace(&format!("expires={}", NOW + LIFETIME_SECONDS), &format!("expires={expires}"));
        assert_eq!(
            forged(&PLAIN_COMPONENTS, &parameters).map(|verified| verified.nonce),
            verdict,
            "{lifetime}"
        );
    }
}

#[test]
fn the_components_are_exactly_ours() {
    forged(&PLAIN_COMPONENTS, &head_parameters()).unwrap();
    let [method, authority, path, query] = PLAIN_COMPONENTS;
    for (components, error) in [
        (&[authority, path, query][..], NOT_LISTED),
        (&[method, path, query], NOT_LISTED),
        (&[method, authority, query], NOT_LISTED),
        (&[method, authority, path], NOT_LISTED),
        (&[method, authority, query, path], ORDER),
        (&[authority, method, path, query], ORDER),
        (&[method, authority, path, query, query], TWICE),
        (&[method, method, authority, path, query], TWICE),
        (&[method, authority, path, query, ("accept", "")], UNKNOWN),
        (&[method, authority, path, query, ("@scheme", "https")], UNKNOWN),
        (&[("@status", "200"), method, authority, path, query], UNKNOWN),
        (&[method, authority, path, query, ("x-kiro-caller", "me")], UNKNOWN),
        (&[method, authority, path, query, ("x-kiro-future", "")], UNKNOWN),
        (&[method, authority, path, query, ("x-kiro-host", "")], NOT_THERE),
        (&[method, authority, path, query, ("x-kiro-upgrade", "")], NOT_THERE),
        (&[method, authority, path, query, ("content-digest", "")], NOT_THERE),
    ] {
        assert_eq!(forged(components, &head_parameters()), Err(error), "{components:?}");
    }
    for (list, error) in [
        ("()", NOT_LISTED),
        (r#"("@method";req "@authority" "@path" "@query")"#, UNKNOWN),
        (r#"("@method" "@authority" "@path" "@query";tr)"#, UNKNOWN),
        (r#"("@Method" "@authority" "@path" "@query")"#, UNKNOWN),
        (r#"(@method "@authority" "@path" "@query")"#, SignatureError::Malformed("component list")),
        (r#"("@method"  "@authority" "@path" "@query")"#, SignatureError::Malformed("component list")),
        (r#"( "@method" "@authority" "@path" "@query")"#, SignatureError::Malformed("component list")),
        (r#"("@method" "@authority" "@path" "@query" )"#, SignatureError::Malformed("component list")),
        (r#"("@method" "@authority" "@path" "@query""#, SignatureError::Malformed("component list")),
        (r#""@method""#, SignatureError::Malformed("component list")),
    ] {
        let standard = r#"("@method" "@authority" "@path" "@query")"#;
        let mut message = signed(plain_message());
        message.edit("signature-input", standard, list);
        assert_eq!(verify(&message), Err(error), "{list}");
    }
}

/// A component that is there has to be listed even if the peer that leaves it out has the key.
#[test]
fn a_peer_can_not_leave_out_a_field() {
    for (name, value) in [
        ("x-kiro-host", "profile"),
        ("x-kiro-body", "stream"),
        ("x-kiro-upgrade", "websocket"),
        ("content-digest", ""),
    ] {
        let mut message = plain_message();
        message.set(name, value);
        forge(&mut message.headers, Form::Head, &PLAIN_COMPONENTS, &head_parameters());
        assert_eq!(verify(&message), Err(NOT_LISTED), "{name}");
    }
}

/// Each of these is signed with the right key: the parser alone refuses it.
#[test]
fn the_parameters_are_exactly_ours() {
    let malformed = |what| Err(SignatureError::Malformed(what));
    for (from, to, verdict) in [
        (";created=1800000000", "", malformed("created")),
        ("created=1800000000", "created=\"1800000000\"", malformed("created")),
        ("created=1800000000", "created=-1", malformed("created")),
        ("created=1800000000", "created=1800000000.0", malformed("expires")),
        ("created=1800000000", "created=01800000000", malformed("created")),
        ("created=1800000000", "created=1000000000000000", malformed("created")),
        ("created=1800000000", "created=99999999999999999999999", malformed("created")),
        ("created=1800000000", "created=1800000000;created=1800000000", malformed("expires")),
        (
            "created=1800000000;expires=1800000030",
            "expires=1800000030;created=1800000000",
            malformed("created"),
        ),
        (";expires=1800000030", "", malformed("expires")),
        ("expires=1800000030", "expires=", malformed("expires")),
        ("expires=1800000030", "expires=1800000030;expires=1800000030", malformed("nonce")),
        (";nonce=\"0\"", "", malformed("nonce")),
        ("nonce=\"0\"", "nonce=0", malformed("nonce")),
        ("nonce=\"0\"", "nonce=\"\"", malformed("nonce")),
        ("nonce=\"0\"", "nonce=\"00\"", malformed("nonce")),
        ("nonce=\"0\"", "nonce=\"+1\"", malformed("nonce")),
        ("nonce=\"0\"", "nonce=\"1", malformed("nonce")),
        ("nonce=\"0\"", "nonce=\"18446744073709551616\"", malformed("nonce")),
        ("nonce=\"0\"", "nonce=\"0\";nonce=\"1\"", malformed("keyid")),
        (";keyid=\"dashboard>profile#1\"", "", malformed("keyid")),
        ("keyid=\"dashboard>profile#1\"", "keyid=\"dashboard>profile#1\\\"\"", malformed("keyid")),
        ("keyid=\"dashboard>profile#1\"", "keyid=\"dashboard>profile#1", malformed("alg")),
        ("keyid=\"dashboard>profile#1\"", "keyid=\"dashboard>profile#1\";keyid=\"a\"", malformed("alg")),
        ("keyid=\"dashboard>profile#1\"", "keyid=\"dashboard>profile#2\"", Err(SignatureError::UnknownKey)),
        ("keyid=\"dashboard>profile#1\"", "keyid=\"dashboard>profile#10\"", Err(SignatureError::UnknownKey)),
        ("keyid=\"dashboard>profile#1\"", "keyid=\"\"", Err(SignatureError::UnknownKey)),
        (";alg=\"hmac-sha256\"", "", malformed("alg")),
        ("alg=\"hmac-sha256\"", "alg=hmac-sha256", malformed("alg")),
        ("alg=\"hmac-sha256\"", "alg=\"hmac-sha256\";alg=\"hmac-sha256\"", malformed("tag")),
        ("alg=\"hmac-sha256\"", "alg=\"hmac-sha512\"", Err(SignatureError::WrongAlgorithm)),
        ("alg=\"hmac-sha256\"", "alg=\"\"", Err(SignatureError::WrongAlgorithm)),
        (";tag=\"kiro\"", "", malformed("tag")),
        ("tag=\"kiro\"", "tag=kiro", malformed("tag")),
        ("tag=\"kiro\"", "tag=\"kiro-trailers\"", malformed("tag")),
        ("tag=\"kiro\"", "tag=\"Kiro\"", malformed("tag")),
        ("tag=\"kiro\"", "tag=\"kiro\";tag=\"kiro\"", malformed("more than our parameters")),
        ("tag=\"kiro\"", "tag=\"kiro\";more", malformed("more than our parameters")),
        ("tag=\"kiro\"", "tag=\"kiro\" ", malformed("more than our parameters")),
    ] {
        let parameters = head_parameters();
        assert!(parameters.contains(from), "{from}");
        assert_eq!(forged(&PLAIN_COMPONENTS, &parameters.replacen(from, to, 1)), verdict, "{from} → {to}");
    }
}

#[test]
fn the_mac_has_one_spelling() {
    let value = |change: fn(&str) -> String| {
        changed(|message| {
            let before = message.headers["signature"].to_str().unwrap().to_owned();
            message.set("signature", &change(before.strip_prefix("kiro=").unwrap()));
        })
    };
    let malformed = Err(SignatureError::Malformed("signature"));
    assert_eq!(value(|mac| format!("kiro={}", mac.replace("=:", ":"))), malformed);
    assert_eq!(value(|mac| format!("kiro={mac};a=1")), malformed);
    assert_eq!(value(|mac| format!("kiro={mac} ")), malformed);
    assert_eq!(value(|mac| format!("kiro=\"{mac}\"")), malformed);
    assert_eq!(value(|mac| format!("kiro={}", mac.replace(':', ""))), malformed);
    assert_eq!(value(|_| "kiro".to_owned()), malformed);
    assert_eq!(value(|_| "kiro=::".to_owned()), malformed);
    assert_eq!(value(|_| "kiro=:AAAA:".to_owned()), malformed);
    // The last character before the padding has two bits to spare; with one of them set the bytes are the same.
    assert_eq!(
        value(|mac| {
            let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
            let (head, last) = mac.split_at(mac.len() - 3);
            let next = alphabet.find(&last[..1]).unwrap() + 1;
            format!("kiro={head}{}=:", &alphabet[next..=next])
        }),
        malformed
    );
    // Every bit of the MAC counts.
    let message = signed(message());
    let mac =
        digest::bytes_of(message.headers["signature"].as_bytes().strip_prefix(b"kiro=").unwrap()).unwrap();
    for bit in 0..256 {
        let (mut message, mut mac) = (message.clone(), mac);
        mac[bit / 8] ^= 1 << (bit % 8);
        message.headers.insert("signature", labelled(b"kiro=", &mac));
        assert_eq!(verify(&message), Err(SignatureError::Mismatch));
    }
}

#[test]
fn two_of_ours_are_refused() {
    let mac = ":AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:";
    let same = |message: &mut Message, name: &'static str| {
        let value = message.headers[name].to_str().unwrap().to_owned();
        message.append(name, &value);
    };
    assert_eq!(changed(|message| same(message, "signature-input")), Err(SignatureError::Duplicate));
    assert_eq!(changed(|message| same(message, "signature")), Err(SignatureError::Duplicate));
    assert_eq!(
        changed(|message| message.append("signature", &format!("kiro={mac}"))),
        Err(SignatureError::Duplicate)
    );
    assert_eq!(
        changed(|message| message.append("signature-input", "kiro=()")),
        Err(SignatureError::Duplicate)
    );
    assert_eq!(
        changed(|message| message.edit("signature", "kiro=", "kiro=:AA==:, kiro=")),
        Err(SignatureError::Duplicate)
    );
    for other in [
        "other=();tag=\"kiro\"",
        "other=();created=1;tag=\"kiro\";keyid=\"x\"",
        "other=(\"@method\");tag=\"kiro-trailers\"",
        "first=(), other=();tag=\"kiro\"",
    ] {
        assert_eq!(
            changed(|message| message.append("signature-input", other)),
            Err(SignatureError::Duplicate),
            "{other}"
        );
        // In the same line, before ours.
        let before = format!("{other}, kiro=");
        let same_line = changed(|message| message.edit("signature-input", "kiro=", &before));
        assert_eq!(same_line, Err(SignatureError::Duplicate), "{other}");
    }
}

#[test]
fn each_error_has_a_code_of_its_own_kind() {
    use SignatureError as E;
    let (created, expires, now) = (1, 2, 3);
    let codes = [
        E::Missing,
        E::Malformed(""),
        E::Duplicate,
        E::UnknownKey,
        E::WrongAlgorithm,
        E::Component(""),
        E::Mismatch,
        E::Expired { created, expires, now },
        E::NotYetValid { created, expires, now },
        E::Replayed,
        E::DigestMismatch,
        E::TrailersMissing,
        E::TrailersOfAnother,
    ]
    .map(|error| error.code());
    assert_eq!(
        codes,
        [
            "signature_missing",
            "signature_malformed",
            "signature_duplicate",
            "signature_unknown_key",
            "signature_algorithm",
            "signature_component",
            "signature_mismatch",
            "signature_expired",
            "signature_not_yet_valid",
            "signature_replayed",
            "signature_digest",
            "signature_trailers",
            "signature_trailers",
        ]
    );
}
