//! Who gets through between an application and its sidecar, and at the ingress?

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
    Established, HandshakeContext, HandshakeError, HandshakeErrorKind as Kind, IngressFiles, IngressMaterial,
    LoopbackClient, LoopbackServer, classify_io, ingress_server, loopback_client, loopback_server,
    outbound_client,
};
use rcgen::ExtendedKeyUsagePurpose::ServerAuth;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, HandshakeKind};
use support::{Ca, Leaf, Log, TLS12, TLS13, app, context, foreign_client, foreign_server, sidecar};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector, server};

type Accepted = Result<Established<server::TlsStream<DuplexStream>>, HandshakeError>;

/// A foreign client at the outbound port: what the port says, and what the client's handshake or first read gives.
async fn call(port: &LoopbackServer, config: ClientConfig) -> (Accepted, Option<Kind>) {
    let (ours, theirs) = duplex(64 * 1024);
    let context = context("profile", "outbound");
    let client = async {
        let connector = TlsConnector::from(Arc::new(config));
        let connected = connector.connect(ServerName::try_from("profile").unwrap(), theirs).await;
        let error = match connected {
            Ok(mut stream) => stream.read(&mut [0; 1]).await.err(),
            Err(error) => Some(error),
        };
        error.and_then(|error| classify_io(&error))
    };
    let accept = async {
        // What was accepted is ended, so that the client's read is.
        let mut accepted = port.accept(ours, &context).await;
        if let Ok(established) = &mut accepted {
            established.stream.shutdown().await.unwrap();
        }
        accepted
    };
    tokio::join!(accept, client)
}

#[tokio::test]
async fn the_outbound_port_takes_its_own_pod_alone() {
    let ca = Ca::new();
    let port = loopback_server(&ca.identity(&sidecar("profile"))).unwrap();
    let cases = [
        (app("profile"), None),
        (sidecar("profile"), None),
        (app("auth"), Some(Kind::WrongIdentity)),
        (sidecar("auth"), Some(Kind::WrongIdentity)),
    ];
    for (id, refused) in cases {
        let log = Log::start();
        let (accepted, alert) =
            call(&port, foreign_client(Some(&ca.issue(&Leaf::of(&id))), TLS13, &["http/1.1"])).await;
        let lines = log.certificates();
        assert_eq!(lines.len(), 1, "{id}");
        assert_eq!(lines[0]["expected"], "spiffe://kiro.mesh/profile/app or spiffe://kiro.mesh/profile");
        match refused {
            None => {
                assert_eq!(accepted.unwrap().peer, Some(id));
                assert_eq!((lines[0]["verdict"].as_str(), alert), ("ok", None));
            }
            Some(kind) => {
                let error = accepted.unwrap_err();
                assert_eq!((error.kind(), alert), (kind, Some(Kind::PeerRefused)), "{id}");
                assert_eq!(lines[0]["reason"], kind.code());
                assert!(error.fix().contains("certs/<service>-app"), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn the_outbound_port_refuses_other_meshes_and_no_certificate() {
    let ca = Ca::new();
    let port = loopback_server(&ca.identity(&sidecar("profile"))).unwrap();
    let leaf = Leaf::of(&app("profile"));
    let foreign = leaf.clone().uri(&["spiffe://other.mesh/profile/app"]);
    let cases = [
        (Some(Ca::new().issue(&leaf)), Kind::UnknownIssuer),
        (Some(ca.issue(&foreign)), Kind::TrustDomain),
        (Some(ca.issue(&leaf.dns(&["profile"]))), Kind::WrongIdentity),
        (None, Kind::NoCertificate),
    ];
    for (material, kind) in cases {
        let (accepted, alert) = call(&port, foreign_client(material.as_ref(), TLS13, &["http/1.1"])).await;
        assert_eq!((accepted.unwrap_err().kind(), alert), (kind, Some(Kind::PeerRefused)));
    }
}

#[tokio::test]
async fn the_outbound_port_speaks_both_http_versions_and_takes_none_for_the_older() {
    let ca = Ca::new();
    let port = loopback_server(&ca.identity(&sidecar("profile"))).unwrap();
    let material = ca.issue(&Leaf::of(&app("profile")));
    for (offers, agreed) in [
        (&["h2", "http/1.1"][..], Some(&b"h2"[..])),
        (&["http/1.1"], Some(b"http/1.1")),
        (&["http/1.0"], Some(b"http/1.0")),
        (&[], None),
    ] {
        let (accepted, _) = call(&port, foreign_client(Some(&material), TLS13, offers)).await;
        assert_eq!(accepted.unwrap().stream.get_ref().1.alpn_protocol(), agreed);
    }
    let (accepted, alert) = call(&port, foreign_client(Some(&material), TLS13, &["spdy/3"])).await;
    assert_eq!((accepted.unwrap_err().kind(), alert), (Kind::Alpn, Some(Kind::Alpn)));
    let (accepted, alert) = call(&port, foreign_client(Some(&material), TLS12, &["http/1.1"])).await;
    assert_eq!((accepted.unwrap_err().kind(), alert), (Kind::Version, Some(Kind::Version)));
}

#[tokio::test]
async fn plain_http_on_the_outbound_port_is_told_of_https() {
    let port = loopback_server(&Ca::new().identity(&sidecar("profile"))).unwrap();
    let (ours, mut theirs) = duplex(64 * 1024);
    theirs.write_all(b"GET http://auth/ HTTP/1.1\r\n\r\n").await.unwrap();
    theirs.shutdown().await.unwrap();
    let error = port.accept(ours, &context("profile", "outbound")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::PlainHttp);
    assert!(error.fix().contains("https://") && error.fix().contains("tls: none"), "{error}");
}

#[tokio::test]
async fn an_application_resumes_nothing_at_the_outbound_port() {
    let log = Log::start();
    let ca = Ca::new();
    let port = loopback_server(&ca.identity(&sidecar("profile"))).unwrap();
    let config = Arc::new(foreign_client(Some(&ca.issue(&Leaf::of(&app("profile")))), TLS13, &["http/1.1"]));
    for _ in 0..2 {
        let (ours, theirs) = duplex(64 * 1024);
        let context = context("profile", "outbound");
        let connector = TlsConnector::from(Arc::clone(&config));
        let (accepted, connected) = tokio::join!(
            port.accept(ours, &context),
            connector.connect(ServerName::try_from("profile").unwrap(), theirs)
        );
        let (mut accepted, mut connected) = (accepted.unwrap(), connected.unwrap());
        accepted.stream.write_all(b"x").await.unwrap();
        accepted.stream.flush().await.unwrap();
        connected.read_exact(&mut [0; 1]).await.unwrap();
        let tls = connected.get_ref().1;
        assert_eq!((tls.handshake_kind(), tls.tls13_tickets_received()), (Some(HandshakeKind::Full), 0));
        assert_eq!(log.certificates().len(), 1);
    }
}

/// Our loopback client at a foreign server.
async fn dial(
    client: &LoopbackClient,
    shows: &kiro_tls::Material,
    alpn: &[&str],
    context: &HandshakeContext,
) -> Result<Option<kiro_core::identity::SpiffeId>, HandshakeError> {
    let (ours, theirs) = duplex(64 * 1024);
    let acceptor = TlsAcceptor::from(Arc::new(foreign_server(shows, TLS13, alpn)));
    let (connected, _accepted) = tokio::join!(client.connect(ours, context), acceptor.accept(theirs));
    connected.map(|established| established.peer)
}

#[tokio::test]
async fn a_sidecar_calls_its_own_application_alone() {
    let ca = Ca::new();
    let client = loopback_client(&ca.identity(&sidecar("profile"))).unwrap();
    let context = context("profile", "app");
    let cases = [
        (Leaf::of(&app("profile")), Ok(Some(app("profile")))),
        (Leaf::of(&app("auth")), Err(Kind::WrongIdentity)),
        (Leaf::of(&sidecar("profile")), Err(Kind::WrongIdentity)),
        (Leaf::of(&app("profile")).dns(&["profile"]), Err(Kind::WrongIdentity)),
        (Leaf::of(&app("profile")).uri(&["spiffe://other.mesh/profile/app"]), Err(Kind::TrustDomain)),
    ];
    for (leaf, expected) in cases {
        let log = Log::start();
        let outcome = dial(&client, &ca.issue(&leaf), &["http/1.1"], &context).await;
        assert_eq!(outcome.map_err(|error| error.kind()), expected);
        let lines = log.certificates();
        assert_eq!((lines.len(), lines[0]["expected"].as_str()), (1, "spiffe://kiro.mesh/profile/app"));
    }
    let outcome = dial(&client, &Ca::new().issue(&Leaf::of(&app("profile"))), &["http/1.1"], &context).await;
    assert_eq!(outcome.map_err(|error| error.kind()), Err(Kind::UnknownIssuer));
}

#[tokio::test]
async fn an_application_without_alpn_is_taken_and_one_without_http1_is_not() {
    let ca = Ca::new();
    let client = loopback_client(&ca.identity(&sidecar("profile"))).unwrap();
    let material = ca.issue(&Leaf::of(&app("profile")));
    let context = context("profile", "app");
    assert!(dial(&client, &material, &[], &context).await.is_ok());
    let error = dial(&client, &material, &["h2"], &context).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Alpn);
}

#[tokio::test]
async fn an_application_that_speaks_plain_http_is_told_of_tls_none() {
    let client = loopback_client(&Ca::new().identity(&sidecar("profile"))).unwrap();
    let (ours, mut theirs) = duplex(64 * 1024);
    theirs.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    let error = client.connect(ours, &context("profile", "app")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::PlainHttp);
    assert!(error.fix().contains("tls: none"), "{error}");
}

#[tokio::test]
async fn application_and_sidecar_call_the_outbound_port() {
    let ca = Ca::new();
    let port = loopback_server(&ca.identity(&sidecar("profile"))).unwrap();
    for id in [app("profile"), sidecar("profile")] {
        let client = outbound_client(&ca.identity(&id)).unwrap();
        let (ours, theirs) = duplex(64 * 1024);
        let context = context("profile", "outbound");
        let (accepted, connected) =
            tokio::join!(port.accept(ours, &context), client.connect(theirs, &context));
        assert_eq!(accepted.unwrap().peer, Some(id));
        assert_eq!(connected.unwrap().peer, Some(sidecar("profile")));
    }
}

fn ingress(ca: &Ca) -> IngressMaterial {
    let leaf = Leaf::of(&sidecar("dashboard")).dns(&["localhost", "dashboard"]).uri(&[]).uses(&[ServerAuth]);
    let material = ca.issue(&leaf);
    let files = IngressFiles { chain_pem: material.leaf_pem, key_pem: material.key_pem };
    IngressMaterial::from_files(&files).unwrap()
}

#[tokio::test]
async fn outside_clients_need_no_certificate_and_resume_nothing() {
    let log = Log::start();
    let port = ingress_server(&ingress(&Ca::new())).unwrap();
    for (versions, name) in [(TLS13, "TLSv1.3"), (TLS12, "TLSv1.2")] {
        let config = Arc::new(foreign_client(None, versions, &["h2", "http/1.1"]));
        for _ in 0..2 {
            let (ours, theirs) = duplex(64 * 1024);
            let context = context("dashboard", "ingress");
            let connector = TlsConnector::from(Arc::clone(&config));
            let (accepted, connected) = tokio::join!(
                port.accept(ours, &context),
                connector.connect(ServerName::try_from("localhost").unwrap(), theirs)
            );
            let (mut accepted, mut connected) = (accepted.unwrap(), connected.unwrap());
            assert_eq!((accepted.peer, accepted.tls.version), (None, name));
            accepted.stream.write_all(b"x").await.unwrap();
            accepted.stream.flush().await.unwrap();
            connected.read_exact(&mut [0; 1]).await.unwrap();
            let tls = connected.get_ref().1;
            assert_eq!((tls.handshake_kind(), tls.tls13_tickets_received()), (Some(HandshakeKind::Full), 0));
        }
    }
    assert!(log.certificates().is_empty(), "no certificate was verified");
}

#[tokio::test]
async fn an_outside_client_that_refuses_our_certificate_makes_a_line() {
    let ca = Ca::new();
    let log = Log::start();
    let port = ingress_server(&ingress(&ca)).unwrap();
    // A client of ours dials something else than an ingress, and refuses it.
    let client = loopback_client(&ca.identity(&sidecar("dashboard"))).unwrap();
    let (ours, theirs) = duplex(64 * 1024);
    let (at_port, at_client) = (context("dashboard", "ingress"), context("dashboard", "app"));
    let (accepted, connected) = tokio::join!(port.accept(ours, &at_port), client.connect(theirs, &at_client));
    let error = accepted.unwrap_err();
    assert_eq!(error.kind(), Kind::PeerRefused);
    assert!(error.fix().contains("ca.pem"), "{error}");
    assert_eq!(connected.unwrap_err().kind(), Kind::WrongIdentity, "an ingress leaf is no application's");
    assert_eq!(log.certificates().len(), 2, "one an end");
}
