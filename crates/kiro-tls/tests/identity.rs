//! What is refused before anything listens, and does it say which file and how to mend it?

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test that fails may panic, and its helpers are not in test functions"
)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use kiro_core::identity::SpiffeId;
use kiro_tls::{
    HandshakeErrorKind as Kind, Identity, IdentityError, Material, SidecarIdentity, edges, mesh_server,
};
use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
use support::{Ca, Leaf, app, name, sidecar};
use tempfile::TempDir;
use time::{Duration, OffsetDateTime};

const NO_EDGES: &[u8] = br#"{"version":1,"edges":[]}"#;

fn put(directory: &Path, name: &str, content: &[u8], mode: u32) {
    let path = directory.join(name);
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
}

fn directory(material: &Material) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    put(directory.path(), "ca.pem", &material.ca_pem, 0o644);
    put(directory.path(), "leaf.pem", &material.leaf_pem, 0o644);
    put(directory.path(), "leaf.key", &material.key_pem, 0o600);
    put(directory.path(), "edges.json", NO_EDGES, 0o600);
    directory
}

fn good(id: &SpiffeId) -> TempDir {
    directory(&Ca::new().issue(&Leaf::of(id)))
}

/// The error of a sidecar's directory, with its text.
fn refused(directory: &TempDir) -> (IdentityError, String) {
    let error = SidecarIdentity::load(directory.path(), &sidecar("profile")).expect_err("refused");
    let text = error.to_string();
    (error, text)
}

#[test]
fn a_good_directory() {
    let directory = good(&sidecar("profile"));
    let loaded = SidecarIdentity::load(directory.path(), &sidecar("profile")).unwrap();
    assert_eq!((loaded.generation, loaded.identity.generation()), (1, 1));
    assert_eq!(loaded.identity.spiffe(), &sidecar("profile"));
    assert!(loaded.ingress.is_none());
    let facts = loaded.identity.facts();
    assert_eq!(facts.sans, ["DNS:profile", "URI:spiffe://kiro.mesh/profile"]);
    assert_eq!((facts.issuer.as_str(), loaded.identity.authorities().len()), ("CN=KiroCA", 1));
    assert!((facts.not_after - OffsetDateTime::now_utc()) > Duration::days(89));
}

#[test]
fn a_missing_file_is_named() {
    for file in ["ca.pem", "leaf.pem", "leaf.key", "edges.json"] {
        let directory = good(&sidecar("profile"));
        fs::remove_file(directory.path().join(file)).unwrap();
        let (_, text) = refused(&directory);
        assert!(text.contains(&format!("/{file}: can't be read")) && text.contains("make certs"), "{text}");
    }
}

#[test]
fn a_directory_in_place_of_a_file_is_named() {
    // Docker makes one where the source of a bind mount is missing.
    let directory = good(&sidecar("profile"));
    fs::remove_file(directory.path().join("ca.pem")).unwrap();
    fs::create_dir(directory.path().join("ca.pem")).unwrap();
    let (_, text) = refused(&directory);
    assert!(text.contains("/ca.pem: can't be read") && text.contains("make certs"), "{text}");
}

#[test]
fn secrets_that_others_can_read() {
    for file in ["leaf.key", "edges.json", "ingress.key"] {
        let directory = good(&sidecar("profile"));
        let key = fs::read(directory.path().join("leaf.key")).unwrap();
        let leaf = fs::read(directory.path().join("leaf.pem")).unwrap();
        put(directory.path(), "ingress.pem", &leaf, 0o644);
        put(directory.path(), "ingress.key", &key, 0o600);
        assert!(SidecarIdentity::load(directory.path(), &sidecar("profile")).is_ok());
        fs::set_permissions(directory.path().join(file), fs::Permissions::from_mode(0o644)).unwrap();
        let (error, text) = refused(&directory);
        assert!(matches!(error, IdentityError::KeyMode { mode: 0o644, .. }), "{text}");
        assert!(text.contains("mode 0644 opens this secret to everybody: run `chmod 600 /"), "{text}");
        assert!(text.ends_with(&format!("/{file}`")), "{text}");
    }
}

#[test]
fn a_group_reads_the_applications_key_and_its_own_sidecars() {
    // A file that we make is of our own group.
    for (id, mode, fine) in [
        (sidecar("profile"), 0o640, true),
        (app("profile"), 0o640, true),
        (app("profile"), 0o660, false),
        (app("profile"), 0o644, false),
    ] {
        let directory = good(&id);
        fs::set_permissions(directory.path().join("leaf.key"), fs::Permissions::from_mode(mode)).unwrap();
        let loaded = Identity::load(directory.path(), &id);
        assert_eq!(loaded.is_ok(), fine, "{id} {mode:o} {loaded:?}");
    }
}

#[test]
fn another_group_may_not_read_a_sidecars_key() {
    let directory = good(&sidecar("profile"));
    let key = directory.path().join("leaf.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
    let other = rustix::process::getegid().as_raw() + 1;
    if std::os::unix::fs::chown(&key, None, Some(other)).is_err() {
        eprintln!("skipped: only root can give a file to a group that it is not in");
        return;
    }
    let (error, text) = refused(&directory);
    assert!(matches!(error, IdentityError::KeyMode { .. }) && text.contains("a group that is not"), "{text}");
}

#[test]
fn a_key_of_another_leaf() {
    let ca = Ca::new();
    let material = ca.issue(&Leaf::of(&sidecar("profile")));
    let other = ca.issue(&Leaf::of(&sidecar("profile")));
    let (_, text) = refused(&directory(&Material { key_pem: other.key_pem, ..material }));
    assert!(text.contains("/leaf.key: is not the key of /") && text.contains("make certs"), "{text}");
}

#[test]
fn files_that_hold_something_else() {
    let cases: [(&str, &[u8], &str); 7] = [
        ("leaf.pem", b"", "/leaf.pem: holds no certificate"),
        (
            "leaf.pem",
            b"-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n",
            "/leaf.pem: is not PEM",
        ),
        (
            "leaf.pem",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "/leaf.pem: holds a bad",
        ),
        ("ca.pem", b"hello", "/ca.pem: holds no certificate"),
        ("ca.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "/ca.pem: holds a bad"),
        ("leaf.key", b"hello", "/leaf.key: holds no private key"),
        (
            "leaf.key",
            b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            "/leaf.key: holds a key that",
        ),
    ];
    for (file, content, expected) in cases {
        let directory = good(&sidecar("profile"));
        put(directory.path(), file, content, 0o600);
        let (_, text) = refused(&directory);
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn a_file_that_never_ends() {
    let directory = good(&sidecar("profile"));
    put(directory.path(), "ca.pem", &vec![b'x'; 2 * 1024 * 1024], 0o644);
    let (error, text) = refused(&directory);
    assert!(matches!(error, IdentityError::TooLarge { .. }) && text.contains("/ca.pem"), "{text}");
}

#[test]
fn leaves_that_peers_would_refuse() {
    let ca = Ca::new();
    let now = OffsetDateTime::now_utc();
    let leaf = || Leaf::of(&sidecar("profile"));
    let cases = [
        (leaf().until(now - Duration::minutes(1)), Kind::Expired, "our clock says"),
        (leaf().from(now + Duration::minutes(1)), Kind::NotYetValid, "clock (NTP)"),
        (Leaf::of(&sidecar("auth")), Kind::WrongIdentity, "mount certs/profile"),
        (Leaf::of(&app("profile")), Kind::AppLeaf, "mount certs/profile"),
        (leaf().uri(&["spiffe://other.mesh/profile"]), Kind::TrustDomain, "other.mesh"),
        (leaf().dns(&["auth"]), Kind::WrongIdentity, "DNS name `profile`"),
        (leaf().uses(&[ServerAuth]), Kind::WrongIdentity, "TLS client"),
        (leaf().uses(&[ClientAuth]), Kind::WrongIdentity, "TLS server"),
    ];
    for (leaf, expected, says) in cases {
        let (error, text) = refused(&directory(&ca.issue(&leaf)));
        let IdentityError::Leaf { kind, .. } = error else { panic!("{text}") };
        assert_eq!(kind, expected, "{text}");
        assert!(text.contains("/leaf.pem: ") && text.contains(says), "{text}");
    }
}

#[test]
fn a_leaf_of_another_ca() {
    let material = Ca::new().issue(&Leaf::of(&sidecar("profile")));
    let (error, text) = refused(&directory(&Material { ca_pem: Ca::new().pem.into_bytes(), ..material }));
    assert!(matches!(error, IdentityError::Leaf { kind: Kind::UnknownIssuer, .. }), "{text}");
    assert!(text.contains("leaf.pem and ca.pem are of different CAs"), "{text}");
}

#[test]
fn several_roots_are_all_trusted() {
    let (old, new) = (Ca::new(), Ca::new());
    for ca in [&old, &new] {
        let material = ca.issue(&Leaf::of(&sidecar("profile")));
        let both = Material { ca_pem: format!("{}{}", old.pem, new.pem).into_bytes(), ..material };
        assert!(Identity::from_material(&both, &sidecar("profile")).is_ok());
    }
}

#[test]
fn an_ingress_needs_both_its_files() {
    for (present, missing) in [("ingress.pem", "ingress.key"), ("ingress.key", "ingress.pem")] {
        let directory = good(&sidecar("profile"));
        put(directory.path(), present, b"x", 0o600);
        let (_, text) = refused(&directory);
        assert!(text.contains(&format!("/{missing}: is not there")), "{text}");
    }
}

#[test]
fn an_ingress_key_that_does_not_fit() {
    let directory = good(&sidecar("profile"));
    let ca = Ca::new();
    put(directory.path(), "ingress.pem", &ca.issue(&Leaf::of(&sidecar("profile"))).leaf_pem, 0o644);
    put(directory.path(), "ingress.key", &ca.issue(&Leaf::of(&sidecar("profile"))).key_pem, 0o600);
    let (_, text) = refused(&directory);
    assert!(text.contains("/ingress.key: is not the key of /"), "{text}");
}

#[test]
fn bad_edge_secrets_are_named_and_not_shown() {
    let directory = good(&sidecar("profile"));
    put(directory.path(), "edges.json", br#"{"version":1,"edges":[{"secret":"c2VjcmV0"}]}"#, 0o600);
    let (_, text) = refused(&directory);
    assert!(text.contains("/edges.json: ") && text.contains("mount certs/profile"), "{text}");
    assert!(!text.contains("c2VjcmV0"), "{text}");
    let error = edges::load(directory.path(), &name("profile")).unwrap_err();
    assert_eq!(error.to_string(), text);
}

#[test]
fn nothing_shows_a_key() {
    let ca = Ca::new();
    let material = ca.issue(&Leaf::of(&sidecar("profile")));
    let directory = directory(&material);
    put(directory.path(), "ingress.pem", &material.leaf_pem, 0o644);
    put(directory.path(), "ingress.key", &material.key_pem, 0o600);
    let secret = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    let edges = format!(
        r#"{{"version":1,"edges":[{{"source":"profile","target":"auth","epoch":1,"secret":"{secret}"}}]}}"#
    );
    put(directory.path(), "edges.json", edges.as_bytes(), 0o600);
    let loaded = SidecarIdentity::load(directory.path(), &sidecar("profile")).unwrap();
    let server = mesh_server(&loaded.identity).unwrap();
    let client = kiro_tls::mesh_client(&loaded.identity, &sidecar("auth")).unwrap();
    let shown = format!("{material:?} {loaded:?} {server:?} {client:?}");
    assert!(shown.contains("profile>auth#1") && shown.contains("spiffe://kiro.mesh/auth"), "{shown}");
    let key = String::from_utf8(material.key_pem.to_vec()).unwrap();
    for line in key.lines().chain([secret]) {
        assert!(!shown.contains(line), "{shown}");
    }
    // Bytes would be shown as a list of numbers.
    assert!(!shown.contains("0, 1, 2, 3"), "{shown}");
    let (_, key) = support::chain(&material);
    let numbers = format!("{:?}", &key.secret_der()[40..48]);
    assert!(!shown.contains(numbers.trim_matches(['[', ']'])), "{shown}");
}
