//! Whom does a caller believe that it has reached, and what do both ends say when it is somebody else?

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

use std::sync::Arc;

use kiro_tls::{
    HandshakeError, HandshakeErrorKind as Kind, Material, classify_io, exporter, mesh_client, mesh_server,
};
use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
use rustls::{HandshakeKind, ServerConfig};
use support::{Ca, Leaf, Line, Log, TLS12, TLS13, app, context, foreign_server, sidecar};
use time::{Duration, OffsetDateTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio_rustls::TlsAcceptor;

/// Our caller dials `profile` and reaches a foreign server; gives the caller's error, its one line and the server's alert.
async fn refused(ca: &Ca, config: ServerConfig) -> (HandshakeError, Line, Option<Kind>) {
    let log = Log::start();
    let client = mesh_client(&ca.identity(&sidecar("dashboard")), &sidecar("profile")).unwrap();
    let (ours, theirs) = duplex(64 * 1024);
    let context = context("dashboard", "outbound");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (connected, accepted) = tokio::join!(client.connect(ours, &context), acceptor.accept(theirs));
    let mut lines = log.certificates();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    let alert = accepted.err().and_then(|error| classify_io(&error));
    (connected.expect_err("refused"), lines.remove(0), alert)
}

/// Asserts what holds for every certificate that is refused.
async fn certificate_refused(ca: &Ca, material: &Material, kind: Kind) -> HandshakeError {
    let (error, line, alert) = refused(ca, foreign_server(material, TLS13, &["h2"])).await;
    assert_eq!((error.kind(), alert), (kind, Some(Kind::PeerRefused)), "{error}");
    assert_eq!((line["level"].as_str(), line["message"].as_str()), ("WARN", "certificate refused"));
    assert_eq!((line["verdict"].as_str(), line["reason"].as_str()), ("refused", kind.code()));
    assert_eq!((line["side"].as_str(), line["service"].as_str()), ("client", "dashboard"));
    assert_eq!(line["expected"], "spiffe://kiro.mesh/profile");
    assert_eq!((line["cause"].as_str(), line["fix"].as_str()), (error.cause(), error.fix()));
    assert_eq!(line["serial"], error.presented().unwrap().serial);
    error
}

#[tokio::test]
async fn another_service_than_the_one_dialled() {
    let ca = Ca::new();
    // Its DNS name alone would fit.
    for leaf in [Leaf::of(&sidecar("auth")), Leaf::of(&sidecar("auth")).dns(&["auth", "profile"])] {
        let error = certificate_refused(&ca, &ca.issue(&leaf), Kind::WrongIdentity).await;
        assert!(
            error.cause().contains("spiffe://kiro.mesh/auth, expected spiffe://kiro.mesh/profile"),
            "{error}"
        );
        assert!(error.fix().contains("DNS alias"), "{error}");
    }
}

#[tokio::test]
async fn the_right_identity_without_its_dns_name() {
    let ca = Ca::new();
    for dns in [&["auth"][..], &[], &["*"]] {
        let error =
            certificate_refused(&ca, &ca.issue(&Leaf::of(&sidecar("profile")).dns(dns)), Kind::WrongIdentity)
                .await;
        assert!(error.cause().contains("lacks the DNS name `profile`"), "{error}");
    }
}

#[tokio::test]
async fn more_identities_than_one() {
    let ca = Ca::new();
    for uri in [&["spiffe://kiro.mesh/profile", "spiffe://kiro.mesh/auth"][..], &[]] {
        certificate_refused(&ca, &ca.issue(&Leaf::of(&sidecar("profile")).uri(uri)), Kind::WrongIdentity)
            .await;
    }
}

#[tokio::test]
async fn the_applications_leaf() {
    let ca = Ca::new();
    certificate_refused(&ca, &ca.issue(&Leaf::of(&app("profile"))), Kind::AppLeaf).await;
}

#[tokio::test]
async fn another_ca_and_another_trust_domain() {
    let ca = Ca::new();
    let leaf = Leaf::of(&sidecar("profile"));
    certificate_refused(&ca, &Ca::new().issue(&leaf), Kind::UnknownIssuer).await;
    let foreign = leaf.uri(&["spiffe://other.mesh/profile"]);
    certificate_refused(&ca, &ca.issue(&foreign), Kind::TrustDomain).await;
}

#[tokio::test]
async fn out_of_its_time() {
    let ca = Ca::new();
    let now = OffsetDateTime::now_utc();
    let leaf = || Leaf::of(&sidecar("profile"));
    let expired = leaf().from(now - Duration::days(2)).until(now - Duration::minutes(1));
    let error = certificate_refused(&ca, &ca.issue(&expired), Kind::Expired).await;
    assert!(error.cause().contains("our clock says"), "{error}");
    let early = leaf().from(now + Duration::minutes(5));
    let error = certificate_refused(&ca, &ca.issue(&early), Kind::NotYetValid).await;
    assert!(error.cause().contains("our clock says"), "{error}");
}

#[tokio::test]
async fn a_leaf_for_another_use() {
    let ca = Ca::new();
    for uses in [&[ClientAuth][..], &[]] {
        let error = certificate_refused(
            &ca,
            &ca.issue(&Leaf::of(&sidecar("profile")).uses(uses)),
            Kind::WrongIdentity,
        )
        .await;
        assert!(error.cause().contains("not for use as a TLS server"), "{error}");
    }
    let config =
        foreign_server(&ca.issue(&Leaf::of(&sidecar("profile")).uses(&[ServerAuth])), TLS13, &["h2"]);
    let client = mesh_client(&ca.identity(&sidecar("dashboard")), &sidecar("profile")).unwrap();
    let (ours, theirs) = duplex(64 * 1024);
    let context = context("dashboard", "outbound");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (connected, _accepted) = tokio::join!(client.connect(ours, &context), acceptor.accept(theirs));
    assert_eq!(connected.unwrap().peer, Some(sidecar("profile")), "server use is enough for a server");
}

#[tokio::test]
async fn a_stolen_certificate_without_its_key() {
    let ca = Ca::new();
    let stolen = ca.issue(&Leaf::of(&sidecar("profile")));
    let mut config = foreign_server(&stolen, TLS13, &["h2"]);
    config.cert_resolver = support::without_its_key(&stolen);
    let (error, line, alert) = refused(&ca, config).await;
    assert_eq!((error.kind(), alert), (Kind::Other, Some(Kind::PeerRefused)), "{error}");
    assert_eq!(
        (line["verdict"].as_str(), line["presented"].as_str()),
        ("refused", "spiffe://kiro.mesh/profile")
    );
}

#[tokio::test]
async fn servers_of_other_protocols() {
    let ca = Ca::new();
    let material = ca.issue(&Leaf::of(&sidecar("profile")));
    let cases = [
        (foreign_server(&material, TLS12, &["h2"]), Kind::Version),
        (foreign_server(&material, TLS13, &["http/1.1"]), Kind::Alpn),
        (foreign_server(&material, TLS13, &[]), Kind::Alpn),
    ];
    for (config, kind) in cases {
        let (error, line, _) = refused(&ca, config).await;
        assert_eq!((error.kind(), line["reason"].as_str()), (kind, kind.code()), "{error}");
        assert_eq!(line["message"], "handshake failed");
    }
}

#[tokio::test]
async fn a_server_that_speaks_plain_http() {
    let log = Log::start();
    let client = mesh_client(&Ca::new().identity(&sidecar("dashboard")), &sidecar("profile")).unwrap();
    let (ours, mut theirs) = duplex(64 * 1024);
    theirs.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    let error = client.connect(ours, &context("dashboard", "outbound")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::PlainHttp);
    assert!(error.fix().contains("endpoints"), "{error}");
    assert_eq!(log.certificates().len(), 1);
}

#[tokio::test]
async fn a_server_that_hangs_up() {
    let log = Log::start();
    let client = mesh_client(&Ca::new().identity(&sidecar("dashboard")), &sidecar("profile")).unwrap();
    let (ours, theirs) = duplex(64 * 1024);
    drop(theirs);
    let error = client.connect(ours, &context("dashboard", "outbound")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Closed);
    let lines = log.certificates();
    assert_eq!((lines.len(), lines[0]["level"].as_str()), (1, "WARN"), "our own call failed: {lines:?}");
}

#[tokio::test]
async fn a_server_with_tickets_is_given_a_full_handshake_each_time() {
    let log = Log::start();
    let ca = Ca::new();
    let client = mesh_client(&ca.identity(&sidecar("dashboard")), &sidecar("profile")).unwrap();
    let config = Arc::new(foreign_server(&ca.issue(&Leaf::of(&sidecar("profile"))), TLS13, &["h2"]));
    for _ in 0..3 {
        let (ours, theirs) = duplex(64 * 1024);
        let context = context("dashboard", "outbound");
        let acceptor = TlsAcceptor::from(Arc::clone(&config));
        let (connected, accepted) = tokio::join!(client.connect(ours, &context), acceptor.accept(theirs));
        let (mut connected, mut accepted) = (connected.unwrap(), accepted.unwrap());
        accepted.write_all(b"x").await.unwrap();
        accepted.flush().await.unwrap();
        connected.stream.read_exact(&mut [0; 1]).await.unwrap();
        assert_eq!(connected.stream.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(accepted.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(log.certificates().len(), 1);
    }
}

#[tokio::test]
async fn two_sidecars_prove_themselves_and_share_a_secret_of_this_connection() {
    let log = Log::start();
    let ca = Ca::new();
    let server = mesh_server(&ca.identity(&sidecar("profile"))).unwrap();
    let client = mesh_client(&ca.identity(&sidecar("dashboard")), &sidecar("profile")).unwrap();
    let (inbound, outbound) = (context("profile", "inbound"), context("dashboard", "outbound"));
    let mut exported = Vec::new();
    for _ in 0..2 {
        let (near, far) = duplex(64 * 1024);
        let (accepted, connected) =
            tokio::join!(server.accept(near, &inbound), client.connect(far, &outbound));
        let (accepted, connected) = (accepted.unwrap(), connected.unwrap());
        assert_eq!((accepted.peer, connected.peer), (Some(sidecar("dashboard")), Some(sidecar("profile"))));
        assert_eq!(accepted.facts.unwrap().sans, ["DNS:dashboard", "URI:spiffe://kiro.mesh/dashboard"]);
        assert_eq!(accepted.tls, connected.tls);
        assert_eq!((accepted.tls.version, accepted.tls.group), ("TLSv1.3", "X25519MLKEM768"));
        let ends = (exporter(accepted.stream.get_ref().1), exporter(connected.stream.get_ref().1));
        assert!(ends.0.is_some() && ends.0 == ends.1, "both ends have the same");
        exported.push(ends.0);

        let lines = log.certificates();
        assert_eq!(lines.len(), 2);
        for (side, presented, expected) in [
            ("client", "spiffe://kiro.mesh/profile", "spiffe://kiro.mesh/profile"),
            ("server", "spiffe://kiro.mesh/dashboard", "spiffe://kiro.mesh/<service>"),
        ] {
            let line = lines.iter().find(|line| line["side"] == side).unwrap();
            assert_eq!((line["level"].as_str(), line["message"].as_str()), ("INFO", "certificate verified"));
            assert_eq!((line["presented"].as_str(), line["expected"].as_str()), (presented, expected));
            assert_eq!((line["verdict"].as_str(), line["group"].as_str()), ("ok", "X25519MLKEM768"));
            assert_eq!((line["tls_version"].as_str(), line["issuer"].as_str()), ("TLSv1.3", "CN=KiroCA"));
            assert!(line["cipher"].starts_with("TLS13_"), "{line:?}");
            for field in ["sans", "serial", "not_before", "not_after", "fingerprint", "remote", "direction"] {
                assert!(!line[field].is_empty(), "{field}");
            }
            assert!(!line.contains_key("reason") && !line.contains_key("fix"), "{line:?}");
        }
    }
    assert_ne!(exported[0], exported[1], "and each connection another one");
}

#[tokio::test]
async fn nothing_is_exported_before_the_handshake_is_complete() {
    let material = Ca::new().issue(&Leaf::of(&sidecar("profile")));
    let config = Arc::new(foreign_server(&material, TLS13, &["h2"]));
    let connection = rustls::ServerConnection::new(config).unwrap();
    assert_eq!(exporter(&connection), None);
}
