//! Does `show` tell what lies there, and does nothing tell a secret?

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a test that meets a surprise has failed, and says so"
)]

mod support;

use kiro_pki::{Use, in_memory, show};
use support::*;

#[test]
fn nothing_that_is_printed_holds_a_key_or_a_secret() {
    let pki = in_memory(&three(), now()).unwrap();
    let auth = &pki.sidecars[&name("auth")];
    let issued = pki.authority.issue_sidecar(&name("auth"), now()).unwrap();
    let printed = format!("{pki:?} {:?} {issued:?} {auth:?} {:?}", pki.authority, pki.apps);
    let secrets = [&auth.key_pem, &auth.edges_json, &issued.key_pem, &pki.apps[&name("auth")].key_pem];
    for secret in secrets {
        let text = std::str::from_utf8(secret).unwrap();
        for line in text.lines().map(str::trim).filter(|line| line.len() > 30 && !line.starts_with("-----")) {
            assert!(!printed.contains(line), "a line of a secret is printed");
        }
    }
    assert!(!printed.contains("PRIVATE KEY"), "{printed}");
}

#[test]
fn show_tells_each_certificate_with_its_key() {
    let certs = Certs::of(&three());
    certs.chmod("auth/leaf.key", 0o640);
    std::fs::remove_file(certs.path("profile/leaf.key")).unwrap();
    let entries = show(&certs.dir(), now() + days(10)).unwrap();
    assert_eq!(entries.len(), 8);
    assert_eq!((entries[0].usage, entries[0].path.clone()), (Use::Authority, certs.path("ca/ca.pem")));
    assert!(entries.iter().all(|entry| entry.issued_here));
    let of = |file: &str| entries.iter().find(|entry| entry.path == certs.path(file)).unwrap();

    let sidecar = of("auth/leaf.pem");
    assert_eq!(sidecar.usage, Use::Sidecar);
    assert_eq!(sidecar.sans, ["DNS:auth", "URI:spiffe://kiro.mesh/auth"]);
    assert_eq!(
        (sidecar.issuer.as_str(), sidecar.key_usage.as_slice()),
        ("CN=KiroCA", ["server", "client"].as_slice())
    );
    assert_eq!((sidecar.not_after, sidecar.days_left), (now() + days(90), 80));
    assert_eq!((sidecar.serial.len(), sidecar.fingerprint.len()), (32, 64));
    assert_eq!(
        (sidecar.key.mode.as_deref(), sidecar.key.ok),
        (Some("0640"), false),
        "group bits on a sidecar's key"
    );

    let app = of("auth-app/leaf.pem");
    assert_eq!((app.usage, app.key.mode.as_deref(), app.key.ok), (Use::App, Some("0640"), true));
    assert_eq!((of("profile/leaf.pem").key.mode.as_deref(), of("profile/leaf.pem").key.ok), (None, false));
    let ingress = of("dashboard/ingress.pem");
    assert_eq!((ingress.usage, ingress.key_usage.as_slice()), (Use::Ingress, ["server"].as_slice()));

    let ended = show(&certs.dir(), now() + days(90) + time::Duration::hours(1)).unwrap();
    assert_eq!(ended.iter().find(|entry| entry.path == certs.path("auth/leaf.pem")).unwrap().days_left, -1);
}

#[test]
fn show_as_json_has_times_that_other_programs_read() {
    let certs = Certs::of(&three());
    let json = serde_json::to_value(show(&certs.dir(), now()).unwrap()).unwrap();
    assert_eq!(json[0]["use"], "authority");
    assert_eq!(json[0]["not_before"], "2027-01-15T07:58:00Z");
    assert_eq!(json[0]["key"]["mode"], "0600");
    assert!(json[0].get("usage").is_none());
}

#[test]
fn show_names_a_leaf_of_another_authority_and_what_it_cannot_read() {
    let (certs, other) = (Certs::of(&three()), Certs::of(&three()));
    certs.write("auth/leaf.pem", other.read("auth/leaf.pem"));
    let entries = show(&certs.dir(), now()).unwrap();
    let strangers: Vec<_> =
        entries.iter().filter(|entry| !entry.issued_here).map(|entry| entry.path.clone()).collect();
    assert_eq!(strangers, [certs.path("auth/leaf.pem")]);
    certs.write("auth/leaf.pem", "scribble");
    let error = show(&certs.dir(), now()).unwrap_err().to_string();
    assert!(error.contains("auth/leaf.pem") && error.contains("no certificate"), "{error}");
    let error = show(&Certs::empty().dir(), now()).unwrap_err().to_string();
    assert!(error.contains("make certs"), "{error}");
}
