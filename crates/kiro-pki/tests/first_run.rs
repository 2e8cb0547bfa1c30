//! What does the first run write, and does the second leave it alone?

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a test that meets a surprise has failed, and says so"
)]

mod support;

use kiro_pki::{Authority, Options, Owners, provision};
use support::*;
use x509_parser::extensions::ParsedExtension;

#[test]
fn the_directories_and_modes_of_the_design_are_there_and_nothing_else() {
    let certs = Certs::of(&three());
    let mut expected =
        vec![("ca", 0o700), ("ca/ca.pem", 0o644), ("ca/ca.key", 0o600), ("ca/edge-master.key", 0o600)];
    for (sidecar, app) in [("auth", "auth-app"), ("dashboard", "dashboard-app"), ("profile", "profile-app")] {
        for (directory, key) in [(sidecar, 0o600), (app, 0o640)] {
            expected.extend([(directory, 0o750)]);
            let file = |name: &str| -> &'static str { format!("{directory}/{name}").leak() };
            expected.extend([(file("ca.pem"), 0o644), (file("leaf.pem"), 0o644), (file("leaf.key"), key)]);
            if directory == sidecar {
                expected.push((file("edges.json"), 0o600));
            }
        }
    }
    expected.extend([("dashboard/ingress.pem", 0o644), ("dashboard/ingress.key", 0o600)]);
    expected.sort();
    let found: Vec<_> = certs.picture().into_keys().map(|name| (certs.mode(&name), name)).collect();
    let found: Vec<_> = found.iter().map(|(mode, name)| (name.as_str(), *mode)).collect();
    assert_eq!(found, expected);
}

#[test]
fn a_second_run_changes_not_a_byte_mode_or_time() {
    let certs = Certs::of(&three());
    let before = certs.picture();
    let report = certs.run(&three(), now() + days(1)).unwrap();
    assert_eq!(differing(&before, &certs.picture()), Vec::<String>::new());
    assert!(report.is_unchanged() && report.notes.is_empty(), "{report:?}");
    assert_eq!(report.kept, 3 + 3 * (2 + 1 + 1) + 3 * (2 + 1) + 2);
}

#[test]
fn names_are_exactly_those_of_the_design() {
    let certs = Certs::of(&three());
    for (file, expected) in [
        ("ca/ca.pem", &["URI(spiffe://kiro.mesh)"] as &[&str]),
        ("profile/leaf.pem", &["DNSName(profile)", "URI(spiffe://kiro.mesh/profile)"]),
        ("profile-app/leaf.pem", &["DNSName(app.profile)", "URI(spiffe://kiro.mesh/profile/app)"]),
        (
            "dashboard/ingress.pem",
            &["DNSName(localhost)", "DNSName(dashboard)", "DNSName(dashboard.example)"],
        ),
    ] {
        assert_eq!(sans(&certs.read(file)), expected, "{file}");
    }
}

#[test]
fn validity_serial_key_and_extensions_are_as_they_should_be() {
    let certs = Certs::of(&three());
    let ca_key_id = with_certificate(&certs.read("ca/ca.pem"), key_id);
    for (file, lifetime, server, client, authority) in [
        ("ca/ca.pem", days(3652), false, false, true),
        ("profile/leaf.pem", days(90), true, true, false),
        ("profile-app/leaf.pem", days(90), true, true, false),
        ("dashboard/ingress.pem", days(90), true, false, false),
    ] {
        with_certificate(&certs.read(file), |certificate| {
            let validity = certificate.validity();
            assert_eq!(validity.not_before.to_datetime(), now() - time::Duration::minutes(2), "{file}");
            assert_eq!(validity.not_after.to_datetime(), now() + lifetime, "{file}");
            assert_eq!(certificate.raw_serial().len(), 16, "{file}");
            assert!(certificate.raw_serial()[0] & 0x80 == 0, "{file}: a negative serial");
            assert_eq!(
                certificate.public_key().algorithm.algorithm.to_id_string(),
                "1.2.840.10045.2.1",
                "{file}"
            );
            assert_eq!(
                certificate.public_key().subject_public_key.data.len(),
                65,
                "{file}: not a P-256 point"
            );
            assert_eq!(certificate.issuer().to_string(), "CN=KiroCA", "{file}");

            let usage = certificate.extended_key_usage().unwrap();
            let usage =
                usage.map_or((false, false), |usage| (usage.value.server_auth, usage.value.client_auth));
            assert_eq!(usage, (server, client), "{file}");
            let constraints = certificate.basic_constraints().unwrap().unwrap();
            assert!(constraints.critical, "{file}");
            assert_eq!(constraints.value.ca, authority, "{file}");
            assert_eq!(constraints.value.path_len_constraint, authority.then_some(0), "{file}");
            let key_usage = certificate.key_usage().unwrap().unwrap().value;
            assert_eq!(
                (key_usage.digital_signature(), key_usage.key_cert_sign()),
                (!authority, authority),
                "{file}"
            );
            assert_eq!(authority_key_id(certificate), ca_key_id, "{file}");
            assert!(!key_id(certificate).is_empty(), "{file}");
        });
    }
}

fn key_id(certificate: &x509_parser::certificate::X509Certificate<'_>) -> Vec<u8> {
    let found = certificate.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
        _ => None,
    });
    found.expect("a subject key identifier")
}

fn authority_key_id(certificate: &x509_parser::certificate::X509Certificate<'_>) -> Vec<u8> {
    let found = certificate.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|id| id.0.to_vec()),
        _ => None,
    });
    found.expect("an authority key identifier")
}

#[test]
fn no_two_certificates_share_a_serial_or_a_key() {
    let certs = Certs::of(&three());
    let (mut serials, mut keys) = (std::collections::HashSet::new(), std::collections::HashSet::new());
    for file in
        certs.picture().into_keys().filter(|file| file.ends_with("leaf.pem") || file.ends_with("ingress.pem"))
    {
        with_certificate(&certs.read(&file), |certificate| {
            assert!(serials.insert(certificate.raw_serial().to_vec()), "{file}");
            assert!(keys.insert(certificate.public_key().raw.to_vec()), "{file}");
        });
    }
    assert_eq!(serials.len(), 7);
}

#[test]
fn an_authority_that_is_loaded_is_the_one_that_was_written() {
    let certs = Certs::of(&three());
    let authority = Authority::load(&certs.dir()).unwrap();
    assert_eq!(authority.ca_pem(), certs.read("ca/ca.pem"));
    assert_eq!(authority.trust_domain().as_str(), "kiro.mesh");
    let services = ["auth", "dashboard", "profile"].map(name);
    for service in &services {
        let on_disk = certs.read(&format!("{service}/edges.json"));
        assert_eq!(*authority.edges_json(&services, service).unwrap(), on_disk, "{service}");
    }
    let error = Authority::load(&certs.path("nowhere")).unwrap_err().to_string();
    assert!(error.contains("nowhere/ca") && error.contains("make certs"), "{error}");
}

#[test]
fn a_service_that_would_share_a_directory_is_refused_by_name() {
    for (services, words) in [
        ("  ca: {}\n", ["`ca`", "the authority"]),
        ("  x: {}\n  x-app: {}\n", ["`x-app`", "application of `x`"]),
    ] {
        let services = services.replace("{}", "{ app: { port: 8001 } }");
        let certs = Certs::empty();
        let error = certs
            .run(&mesh(&format!("trust_domain: t\nservices:\n{services}")), now())
            .unwrap_err()
            .to_string();
        assert!(words.iter().all(|word| error.contains(word)) && error.contains("rename"), "{error}");
        assert!(!certs.path("ca").exists());
    }
}

#[test]
fn as_root_each_file_belongs_to_the_one_who_reads_it_and_directories_to_root() {
    if !rustix::process::geteuid().is_root() {
        skipped("giving files away takes root");
        return;
    }
    use std::os::unix::fs::MetadataExt as _;
    let certs = Certs::empty();
    let owners = Owners { sidecar_uid: 10_001, app_uid: 10_002, gid: 10_003 };
    let options = Options { owners: Some(owners), ..Options::at(now()) };
    provision(&three(), &certs.dir(), &options).unwrap();
    let owner = |file: &str| {
        let meta = std::fs::metadata(certs.path(file)).unwrap();
        (meta.uid(), meta.gid())
    };
    let root_group = std::fs::metadata(certs.dir()).unwrap().gid();
    for (file, expected) in [
        ("ca/ca.key", (0, root_group)),
        ("ca/edge-master.key", (0, root_group)),
        ("profile", (0, 10_003)),
        ("profile/leaf.key", (10_001, 10_003)),
        ("profile/edges.json", (10_001, 10_003)),
        ("profile/ca.pem", (10_001, 10_003)),
        ("dashboard/ingress.key", (10_001, 10_003)),
        ("profile-app", (0, 10_003)),
        ("profile-app/leaf.key", (10_002, 10_003)),
    ] {
        assert_eq!(owner(file), expected, "{file}");
    }
    assert_eq!(certs.mode("profile/leaf.key"), 0o600);
    assert_eq!(certs.mode("profile-app/leaf.key"), 0o640);

    let before = certs.picture();
    assert!(provision(&three(), &certs.dir(), &options).unwrap().is_unchanged());
    assert_eq!(before, certs.picture());

    std::os::unix::fs::chown(certs.path("profile/leaf.key"), Some(4711), None).unwrap();
    let report = provision(&three(), &certs.dir(), &options).unwrap();
    assert_eq!(actions(&certs, &report), ["given profile/leaf.key"]);
    assert_eq!(owner("profile/leaf.key"), (10_001, 10_003));
}
