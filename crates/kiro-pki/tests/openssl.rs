//! Does somebody else's library accept what we issue, and refuse what nobody should accept?

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a test that meets a surprise has failed, and says so"
)]

mod support;

use std::path::Path;
use std::process::Command;

use kiro_core::identity::SpiffeId;
use kiro_pki::{Authority, LeafSpec};
use support::*;

/// What the command printed, and whether it was content; `None` where there is no such command.
fn openssl(arguments: &[&str]) -> Option<(bool, String)> {
    let Ok(output) = Command::new("openssl").args(arguments).output() else {
        skipped("there is no `openssl` command here");
        return None;
    };
    let text = [output.stdout, output.stderr].concat();
    Some((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}

fn verify(ca: &Path, leaf: &Path, purpose: &str) -> Option<(bool, String)> {
    let time = (now() + time::Duration::seconds(1)).unix_timestamp().to_string();
    let (ca, leaf) = (ca.to_str().unwrap(), leaf.to_str().unwrap());
    openssl(&["verify", "-x509_strict", "-attime", &time, "-purpose", purpose, "-CAfile", ca, leaf])
}

#[test]
fn openssl_verifies_every_leaf_for_its_use_and_no_other() {
    let certs = Certs::of(&three());
    let ca = certs.path("ca/ca.pem");
    for file in [
        "auth/leaf.pem",
        "auth-app/leaf.pem",
        "dashboard/leaf.pem",
        "profile/leaf.pem",
        "dashboard/ingress.pem",
    ] {
        let is_ingress = file.ends_with("ingress.pem");
        for (purpose, expected) in [("sslserver", true), ("sslclient", !is_ingress)] {
            let Some((accepted, text)) = verify(&ca, &certs.path(file), purpose) else { return };
            assert_eq!(accepted, expected, "{file} as {purpose}: {text}");
        }
    }
    let other = Certs::of(&three());
    let Some((accepted, text)) = verify(&other.path("ca/ca.pem"), &certs.path("auth/leaf.pem"), "sslserver")
    else {
        return;
    };
    assert!(!accepted, "a leaf of another authority: {text}");
}

#[test]
fn openssl_reads_the_keys_and_they_are_the_leaves() {
    let certs = Certs::of(&three());
    for pair in ["ca/ca", "auth/leaf", "auth-app/leaf", "dashboard/ingress"] {
        let (key, certificate) = (certs.path(&format!("{pair}.key")), certs.path(&format!("{pair}.pem")));
        let Some((ok, of_key)) = openssl(&["pkey", "-in", key.to_str().unwrap(), "-pubout"]) else { return };
        assert!(ok, "{pair}: {of_key}");
        let (_, of_leaf) =
            openssl(&["x509", "-in", certificate.to_str().unwrap(), "-noout", "-pubkey"]).unwrap();
        assert_eq!(of_key, of_leaf, "{pair}");
        let (_, text) = openssl(&["pkey", "-in", key.to_str().unwrap(), "-noout", "-text"]).unwrap();
        assert!(text.contains("prime256v1"), "{pair} is on another curve");
    }
}

#[test]
fn hostile_leaves_can_be_minted_and_say_what_they_were_told() {
    let certs = Certs::of(&three());
    let authority = Authority::load(&certs.dir()).unwrap();
    let good = LeafSpec::identity(&SpiffeId::sidecar(authority.trust_domain(), &name("profile")), now());
    let uris = ["spiffe://other.mesh/profile", "spiffe://kiro.mesh/auth"].map(str::to_owned);
    for (what, spec, acceptable) in [
        (
            "expired",
            LeafSpec { not_after: now() - days(1), not_before: now() - days(9), ..good.clone() },
            false,
        ),
        ("not yet valid", LeafSpec { not_before: now() + days(1), ..good.clone() }, false),
        ("past its authority", LeafSpec { not_after: now() + days(9000), ..good.clone() }, true),
        ("several URIs", LeafSpec { uri: uris.to_vec(), ..good.clone() }, true),
        ("no URI", LeafSpec { uri: vec![], ..good.clone() }, true),
        ("no name at all", LeafSpec { uri: vec![], dns: vec![], ..good.clone() }, true),
        (
            "an address",
            LeafSpec { dns: vec!["127.0.0.1".to_owned(), "::1".to_owned()], ..good.clone() },
            true,
        ),
    ] {
        let issued = authority.issue(&spec).unwrap();
        with_certificate(&issued.leaf_pem, |leaf| {
            assert_eq!(leaf.validity().not_after.to_datetime(), spec.not_after, "{what}");
            let names =
                leaf.subject_alternative_name().unwrap().map_or(0, |names| names.value.general_names.len());
            assert_eq!(names, spec.dns.len() + spec.uri.len(), "{what}");
        });
        certs.write("hostile.pem", &issued.leaf_pem);
        let Some((accepted, text)) =
            verify(&certs.path("ca/ca.pem"), &certs.path("hostile.pem"), "sslclient")
        else {
            return;
        };
        assert_eq!(accepted, acceptable, "{what}: {text}");
    }
    let error = authority
        .issue(&LeafSpec { uri: vec!["spiffe://kiro.mesh/pröfile".to_owned()], ..good })
        .unwrap_err();
    assert!(error.to_string().contains("pröfile"), "{error}");
}
