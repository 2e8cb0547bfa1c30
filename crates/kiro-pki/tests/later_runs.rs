//! What does a later run renew, issue again, tighten or refuse, and what does it leave alone?

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a test that meets a surprise has failed, and says so"
)]

mod support;

use kiro_pki::{Authority, LeafSpec, Options, PkiError};
use support::*;

const FOUR: &str = "\
trust_domain: kiro.mesh
services:
  dashboard: { app: { port: 8001 }, ingress: { port: 8080, tls_port: 8443, names: [dashboard.example] } }
  profile: { app: { port: 8002 } }
  auth: { app: { port: 8003 } }
  mail: { app: { port: 8004 } }
allow:
  - { from: ingress, to: dashboard }
";

#[test]
fn leaves_are_renewed_in_their_last_third_and_authority_and_secrets_stay() {
    let certs = Certs::of(&three());
    let before = certs.picture();
    assert!(certs.run(&three(), now() + days(59)).unwrap().is_unchanged());
    assert_eq!(before, certs.picture());

    let report = certs.run(&three(), now() + days(61)).unwrap();
    let renewed = [
        "renewed auth/leaf.pem",
        "renewed auth-app/leaf.pem",
        "renewed dashboard/leaf.pem",
        "renewed dashboard/ingress.pem",
        "renewed dashboard-app/leaf.pem",
        "renewed profile/leaf.pem",
        "renewed profile-app/leaf.pem",
    ];
    assert_eq!(actions(&certs, &report), renewed);
    let changed = differing(&before, &certs.picture());
    let only_leaves =
        |file: &String| file.ends_with("leaf.pem") || file.ends_with("leaf.key") || file.contains("ingress");
    let files: Vec<_> = changed.iter().filter(|file| file.contains('/')).collect();
    assert!(files.len() == 14 && files.iter().all(|file| only_leaves(file)), "{files:?}");
    assert!(certs.run(&three(), now() + days(61)).unwrap().is_unchanged());
}

#[test]
fn a_leaf_that_has_ended_or_not_begun_by_this_clock_is_replaced() {
    let certs = Certs::of(&three());
    let report = certs.run(&three(), now() + days(120)).unwrap();
    assert!(report.changes.iter().all(|change| change.reason.starts_with("it ended on")), "{report:?}");
    let report = certs.run(&three(), now() + days(30)).unwrap();
    assert_eq!(report.changes.len(), 7, "the clock was put back to before they were issued: {report:?}");
    assert!(report.changes[0].reason.contains("not valid before"), "{report:?}");
}

#[test]
fn a_changed_ingress_name_issues_that_leaf_again_and_no_other() {
    let certs = Certs::of(&three());
    let before = certs.picture();
    let report = certs.run(&mesh(&THREE.replace("dashboard.example", "other.example")), now()).unwrap();
    assert_eq!(actions(&certs, &report), ["reissued dashboard/ingress.pem"]);
    assert!(report.changes[0].reason.contains("other.example"), "{report:?}");
    assert_eq!(
        differing(&before, &certs.picture()),
        ["dashboard", "dashboard/ingress.key", "dashboard/ingress.pem"]
    );
    assert_eq!(sans(&certs.read("dashboard/ingress.pem")).last().unwrap(), "DNSName(other.example)");
}

#[test]
fn a_new_service_adds_edges_for_everybody_and_changes_no_secret() {
    let certs = Certs::of(&three());
    let old = edges(&certs, "auth");
    let leaf = certs.read("auth/leaf.pem");
    let report = certs.run(&mesh(FOUR), now()).unwrap();
    let mut expected = vec!["rewritten auth/edges.json", "rewritten dashboard/edges.json"];
    expected.extend(["created mail/leaf.pem", "created mail/ca.pem", "created mail/edges.json"]);
    expected.extend(["created mail-app/leaf.pem", "created mail-app/ca.pem", "rewritten profile/edges.json"]);
    assert_eq!(actions(&certs, &report), expected);
    assert_eq!(report.changes[0].reason, "new edges: auth>mail#1, mail>auth#1");
    assert_eq!(certs.read("auth/leaf.pem"), leaf);
    let new = edges(&certs, "auth");
    assert_eq!(new.len(), old.len() + 2);
    assert!(old.iter().all(|edge| new.contains(edge)), "an old secret changed");
    let shared =
        |service| edges(&certs, service).into_iter().find(|edge| edge.starts_with("mail>auth")).unwrap();
    assert_eq!(shared("mail"), shared("auth"));
}

fn edges(certs: &Certs, service: &str) -> Vec<String> {
    let json: serde_json::Value =
        serde_json::from_slice(&certs.read(&format!("{service}/edges.json"))).unwrap();
    assert_eq!(json["version"], 1);
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let edge = |edge: &serde_json::Value| {
        format!("{}>{} {}", text(&edge["source"]), text(&edge["target"]), text(&edge["secret"]))
    };
    json["edges"].as_array().unwrap().iter().map(edge).collect()
}

#[test]
fn a_service_or_ingress_that_is_gone_is_told_and_its_files_stay() {
    let certs = Certs::of(&mesh(FOUR));
    let report = certs.run(&three(), now()).unwrap();
    assert!(certs.path("mail/leaf.key").exists() && certs.path("mail-app/leaf.key").exists());
    for directory in ["mail:", "mail-app:"] {
        assert!(report.notes.iter().any(|note| note.contains(directory)), "{directory} {report:?}");
    }
    assert!(
        report.changes.iter().all(|change| change.reason.starts_with("edges that are no more: ")),
        "{report:?}"
    );

    let without = "trust_domain: kiro.mesh\nservices:\n  dashboard: { app: { port: 8001 } }\n";
    let report = certs.run(&mesh(without), now()).unwrap();
    assert!(certs.path("dashboard/ingress.key").exists());
    assert!(
        report.notes.iter().any(|note| note.contains("ingress.key") && note.contains("no ingress")),
        "{report:?}"
    );
}

#[test]
fn another_trust_domain_is_an_error_that_names_both_ways_out_and_changes_nothing() {
    let certs = Certs::of(&three());
    let before = certs.picture();
    let error = certs.run(&mesh(&THREE.replace("kiro.mesh", "other.mesh")), now()).unwrap_err().to_string();
    for word in ["ca.pem", "`kiro.mesh`", "`other.mesh`", "put `trust_domain: kiro.mesh` back", "away"] {
        assert!(error.contains(word), "{word}: {error}");
    }
    assert_eq!(before, certs.picture());
}

#[test]
fn with_its_authority_moved_away_everything_is_issued_anew() {
    let certs = Certs::of(&three());
    let old_edges = edges(&certs, "auth");
    std::fs::rename(certs.path("ca"), certs.path("old-ca")).unwrap();
    let report = certs.run(&mesh(&THREE.replace("kiro.mesh", "other.mesh")), now()).unwrap();
    assert_eq!(sans(&certs.read("auth/leaf.pem"))[1], "URI(spiffe://other.mesh/auth)");
    let reissued =
        report.changes.iter().filter(|change| change.reason.starts_with("another authority")).count();
    assert_eq!(reissued, 7);
    assert_eq!(certs.read("auth/ca.pem"), certs.read("ca/ca.pem"));
    assert!(edges(&certs, "auth").iter().all(|edge| !old_edges.contains(edge)));
    assert!(certs.run(&mesh(&THREE.replace("kiro.mesh", "other.mesh")), now()).unwrap().is_unchanged());
}

#[test]
fn half_an_authority_is_refused_and_never_made_up() {
    for (file, rest) in [("ca/ca.pem", 2), ("ca/ca.key", 2), ("ca/edge-master.key", 2)] {
        let certs = Certs::of(&three());
        std::fs::remove_file(certs.path(file)).unwrap();
        let before = certs.picture();
        let error = certs.run(&three(), now()).unwrap_err().to_string();
        assert!(
            error.contains(file) && error.contains("is missing") && error.contains("restore it"),
            "{error}"
        );
        assert_eq!(before, certs.picture());
        assert_eq!(std::fs::read_dir(certs.path("ca")).unwrap().count(), rest);
    }
}

#[test]
fn what_is_broken_or_foreign_is_an_error_with_file_and_fix_and_changes_nothing() {
    let other = Certs::of(&three());
    type Case<'a> = (&'a str, &'a dyn Fn(&Certs), &'a str);
    let cases: &[Case<'_>] = &[
        ("ca/ca.pem", &|certs| certs.write("ca/ca.pem", "scribble"), "no certificate"),
        ("ca/ca.pem", &|certs| certs.write("ca/ca.pem", certs.read("auth/leaf.pem")), "not an authority"),
        ("ca/ca.pem", &|certs| certs.write("ca/ca.pem", foreign_authority()), "subject is `CN=Mine`"),
        ("ca/ca.key", &|certs| certs.write("ca/ca.key", "scribble"), "no private key"),
        ("ca/ca.key", &|certs| certs.write("ca/ca.key", other.read("ca/ca.key")), "does not fit ca.pem"),
        ("ca/edge-master.key", &|certs| certs.write("ca/edge-master.key", "c2NyaWJibGU=\n"), "32 bytes"),
        ("auth/leaf.pem", &|certs| certs.write("auth/leaf.pem", ""), "no certificate"),
        ("auth/leaf.pem", &|certs| certs.write("auth/leaf.pem", foreign().0), "not from KiroCA"),
        ("auth/leaf.key", &|certs| certs.write("auth/leaf.key", "scribble"), "no private key"),
        ("auth/edges.json", &|certs| certs.write("auth/edges.json", "{\"c2NyaWJibGU=\":1}"), "edge secrets"),
        (
            "auth/edges.json",
            &|certs| certs.write("auth/edges.json", r#"{"version":9,"edges":[]}"#),
            "version 9",
        ),
        ("profile-app/leaf.pem", &|certs| link(certs, "profile-app/leaf.pem"), "is a link"),
        ("profile", &|certs| link(certs, "profile"), "not a directory"),
    ];
    for (file, break_it, what) in cases {
        let certs = Certs::of(&three());
        break_it(&certs);
        let before = certs.picture();
        let error = certs.run(&three(), now()).unwrap_err().to_string();
        let names_file = error.contains(certs.path(file).to_str().unwrap());
        assert!(names_file && error.contains(what) && error.contains("`kiro certs`"), "{file}: {error}");
        assert!(!error.contains("c2NyaWJibGU"), "{error}");
        assert_eq!(before, certs.picture(), "{file}");
    }
}

/// A certificate and key that somebody else made.
fn foreign() -> (String, String) {
    let made = rcgen::generate_simple_self_signed(["mine.example".to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

fn foreign_authority() -> String {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, "Mine");
    params.subject_alt_names = vec![rcgen::SanType::URI("spiffe://kiro.mesh".try_into().unwrap())];
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.self_signed(&key).unwrap().pem()
}

fn link(certs: &Certs, file: &str) {
    std::fs::rename(certs.path(file), certs.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink(certs.path("elsewhere"), certs.path(file)).unwrap();
}

#[test]
fn a_lost_or_swapped_key_gets_a_new_pair() {
    for (file, reason) in [("leaf.key", "leaf.key was missing"), ("leaf.pem", "leaf.pem was missing")] {
        let certs = Certs::of(&three());
        std::fs::remove_file(certs.path("auth").join(file)).unwrap();
        let report = certs.run(&three(), now()).unwrap();
        assert_eq!(actions(&certs, &report), ["reissued auth/leaf.pem"]);
        assert!(report.changes[0].reason.starts_with(reason), "{report:?}");
    }
    let certs = Certs::of(&three());
    certs.write("auth/leaf.key", certs.read("profile/leaf.key"));
    let report = certs.run(&three(), now()).unwrap();
    assert!(report.changes[0].reason.starts_with("leaf.key did not fit"), "{report:?}");
    assert!(certs.run(&three(), now()).unwrap().is_unchanged());
}

#[test]
fn a_leaf_with_another_use_or_further_names_is_issued_again() {
    let certs = Certs::of(&three());
    let authority = Authority::load(&certs.dir()).unwrap();
    let id = kiro_core::identity::SpiffeId::sidecar(authority.trust_domain(), &name("auth"));
    let good = LeafSpec::identity(&id, now());
    let mut two = good.clone();
    two.uri.push("spiffe://kiro.mesh/profile".to_owned());
    for (spec, reason) in [
        (LeafSpec { client: false, ..good.clone() }, "it had another use"),
        (LeafSpec { uri: vec![], ..good.clone() }, "its names were"),
        (two, "its names were"),
    ] {
        let issued = authority.issue(&spec).unwrap();
        certs.write("auth/leaf.pem", &issued.leaf_pem);
        certs.write("auth/leaf.key", &*issued.key_pem);
        let report = certs.run(&three(), now()).unwrap();
        assert_eq!(actions(&certs, &report), ["reissued auth/leaf.pem"]);
        assert!(report.changes[0].reason.starts_with(reason), "{report:?}");
    }
}

#[test]
fn modes_are_tightened_and_never_weakened() {
    let certs = Certs::of(&three());
    for (file, mode) in [
        ("ca", 0o755),
        ("ca/ca.key", 0o644),
        ("auth/leaf.key", 0o640),
        ("auth/edges.json", 0o666),
        ("auth-app/leaf.key", 0o644),
        ("profile", 0o777),
        ("profile/leaf.key", 0o400),
        ("profile/ca.pem", 0o664),
    ] {
        certs.chmod(file, mode);
    }
    let report = certs.run(&three(), now()).unwrap();
    let tightened = [
        "ca",
        "ca/ca.key",
        "auth/leaf.key",
        "auth/edges.json",
        "auth-app/leaf.key",
        "profile",
        "profile/ca.pem",
    ];
    assert_eq!(actions(&certs, &report), tightened.map(|file| format!("tightened {file}")));
    assert!(
        report.changes[1].reason.contains("0644") && report.changes[1].reason.contains("0600"),
        "{report:?}"
    );
    for (file, mode) in [
        ("ca", 0o700),
        ("ca/ca.key", 0o600),
        ("auth/leaf.key", 0o600),
        ("auth/edges.json", 0o600),
        ("auth-app/leaf.key", 0o640),
        ("profile", 0o750),
        ("profile/leaf.key", 0o400),
        ("profile/ca.pem", 0o644),
    ] {
        assert_eq!(certs.mode(file), mode, "{file}");
    }

    let renewed = certs.run(&three(), now() + days(70)).unwrap();
    assert_eq!(renewed.changes.len(), 7);
    assert_eq!(certs.mode("profile/leaf.key"), 0o400, "a renewal opens nothing either");
}

#[test]
fn a_key_that_its_reader_cannot_read_is_told_and_left() {
    let certs = Certs::of(&three());
    certs.chmod("auth-app/leaf.key", 0o600);
    let report = certs.run(&three(), now()).unwrap();
    assert_eq!(certs.mode("auth-app/leaf.key"), 0o600);
    assert!(
        report.notes.iter().any(|note| note.contains("chmod 640") && note.contains("auth-app/leaf.key")),
        "{report:?}"
    );
}

#[test]
fn an_ingress_certificate_of_a_persons_own_is_kept() {
    let certs = Certs::of(&three());
    let (certificate, key) = foreign();
    certs.write("dashboard/ingress.pem", &certificate);
    certs.write("dashboard/ingress.key", &key);
    let report = certs.run(&three(), now() + days(80)).unwrap();
    assert_eq!(certs.read("dashboard/ingress.pem"), certificate.as_bytes());
    assert_eq!(certs.read("dashboard/ingress.key"), key.as_bytes());
    assert!(
        report.notes.iter().any(|note| note.contains("ingress.pem: not from this authority")),
        "{report:?}"
    );

    certs.write("dashboard/ingress.key", certs.read("dashboard/leaf.key"));
    let error = certs.run(&three(), now()).unwrap_err().to_string();
    assert!(error.contains("dashboard/ingress.key") && error.contains("does not fit"), "{error}");
}

#[test]
fn two_runs_at_once_are_refused() {
    let certs = Certs::of(&three());
    let other = std::fs::File::open(certs.dir()).unwrap();
    other.lock().unwrap();
    assert!(matches!(certs.run(&three(), now()), Err(PkiError::Busy { .. })));
    drop(other);
    certs.run(&three(), now()).unwrap();
}

#[test]
fn what_a_run_that_was_cut_off_left_is_removed_and_told() {
    let certs = Certs::of(&three());
    certs.write("auth/.kiro-new-leaf.key", "half a key");
    std::fs::create_dir(certs.path(".kiro-new-ca")).unwrap();
    certs.write(".kiro-new-ca/ca.key", "half a key");
    let report = certs.run(&three(), now()).unwrap();
    assert_eq!(actions(&certs, &report), ["removed .kiro-new-ca", "removed auth/.kiro-new-leaf.key"]);
    assert!(!certs.path("auth/.kiro-new-leaf.key").exists() && !certs.path(".kiro-new-ca").exists());
}

#[test]
fn near_its_authoritys_end_no_leaf_outlives_it_and_runs_stay_idempotent() {
    let certs = Certs::of(&three());
    let late = now() + days(3652 - 20);
    let report = certs.run(&three(), late).unwrap();
    assert!(report.notes.iter().any(|note| note.contains("ca.pem: ends on")), "{report:?}");
    with_certificate(&certs.read("auth/leaf.pem"), |leaf| {
        assert_eq!(leaf.validity().not_after.to_datetime(), now() + days(3652));
    });
    let before = certs.picture();
    assert!(certs.run(&three(), late + days(1)).unwrap().is_unchanged());
    assert_eq!(before, certs.picture());

    let error = certs.run(&three(), now() + days(3653)).unwrap_err().to_string();
    assert!(error.contains("ended on") && error.contains("new authority"), "{error}");
    let error = certs.run(&three(), now() - days(1)).unwrap_err().to_string();
    assert!(error.contains("not valid before") && error.contains("set the clock"), "{error}");
}

#[test]
fn further_roots_behind_the_authoritys_certificate_reach_everybody() {
    let certs = Certs::of(&three());
    let bundle = [certs.read("ca/ca.pem"), Certs::of(&three()).read("ca/ca.pem")].concat();
    certs.write("ca/ca.pem", &bundle);
    certs.run(&three(), now()).unwrap();
    assert_eq!(certs.read("profile-app/ca.pem"), bundle);
    assert!(certs.run(&three(), now()).unwrap().is_unchanged());
}

#[test]
fn the_time_of_renewal_can_be_chosen() {
    let certs = Certs::of(&three());
    let renew_within = std::time::Duration::from_secs(90 * 24 * 3600);
    let options = Options { renew_within, ..Options::at(now() + days(1)) };
    let report = kiro_pki::provision(&three(), &certs.dir(), &options).unwrap();
    assert_eq!(report.changes.len(), 7, "{report:?}");
}
