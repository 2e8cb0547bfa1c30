//! Who gets through the inbound port, and what do both ends say when somebody does not?

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

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use kiro_core::identity::SpiffeId;
use kiro_tls::{HandshakeError, HandshakeErrorKind as Kind, Identity, Material, classify_io, mesh_server};
use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, HandshakeKind};
use support::{Ca, Leaf, Line, Log, TLS12, TLS13, app, context, foreign_client, sidecar};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::{TlsConnector, client};

const NAME: &str = "profile";

/// What the caller sees: its handshake's error, or what its first read gives.
#[derive(Debug, PartialEq)]
enum Caller {
    /// The handshake failed with this kind of alert.
    Handshake(Option<Kind>),
    /// The handshake succeeded, and the first read did not.
    Read(Option<Kind>),
    /// The other end closed properly.
    End,
}

fn connect(
    config: Arc<ClientConfig>,
    io: DuplexStream,
) -> impl Future<Output = std::io::Result<client::TlsStream<DuplexStream>>> {
    TlsConnector::from(config).connect(ServerName::try_from(NAME).unwrap(), io)
}

async fn first_read(config: Arc<ClientConfig>, io: DuplexStream) -> Caller {
    let mut stream = match connect(config, io).await {
        Ok(stream) => stream,
        Err(error) => return Caller::Handshake(classify_io(&error)),
    };
    match stream.read(&mut [0; 16]).await {
        Ok(_) => Caller::End,
        Err(error) => Caller::Read(classify_io(&error)),
    }
}

/// A foreign caller and our inbound port; gives the port's error, its one line and what the caller saw.
async fn refused(ca: &Ca, config: ClientConfig) -> (HandshakeError, Line, Caller) {
    let log = Log::start();
    let server = mesh_server(&ca.identity(&sidecar(NAME))).unwrap();
    let (ours, theirs) = duplex(64 * 1024);
    let context = context(NAME, "inbound");
    // One that is accepted by mistake is dropped, so that the caller's read ends.
    let accept = async { server.accept(ours, &context).await.map(drop) };
    let (accepted, caller) = tokio::join!(accept, first_read(Arc::new(config), theirs));
    let mut lines = log.certificates();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    (accepted.expect_err("refused"), lines.remove(0), caller)
}

fn shows(material: &Material) -> ClientConfig {
    foreign_client(Some(material), TLS13, &["h2"])
}

/// Asserts what holds for every certificate that is refused.
async fn certificate_refused(ca: &Ca, material: &Material, kind: Kind) -> (HandshakeError, Line) {
    let (error, line, caller) = refused(ca, shows(material)).await;
    assert_eq!(error.kind(), kind, "{error}");
    assert_eq!(caller, Caller::Read(Some(Kind::PeerRefused)), "{error}");
    assert_eq!(line["level"], "WARN");
    assert_eq!(line["message"], "certificate refused");
    assert_eq!((line["verdict"].as_str(), line["reason"].as_str()), ("refused", kind.code()));
    assert_eq!((line["side"].as_str(), line["service"].as_str()), ("server", NAME));
    assert_eq!(line["remote"], "127.0.0.1:40000");
    assert_eq!(line["expected"], "spiffe://kiro.mesh/<service>");
    assert_eq!(line["cause"], error.cause());
    assert_eq!(line["fix"], error.fix());
    assert_eq!(line["issuer"], "CN=KiroCA");
    assert_eq!(line["fingerprint"].len(), 64);
    assert_eq!(line["fingerprint"], error.presented().unwrap().fingerprint);
    assert!(!line.contains_key("cipher"), "nothing is known of it yet");
    (error, line)
}

#[tokio::test]
async fn no_certificate() {
    let (error, line, caller) = refused(&Ca::new(), foreign_client(None, TLS13, &["h2"])).await;
    assert_eq!(error.kind(), Kind::NoCertificate);
    assert_eq!(caller, Caller::Read(Some(Kind::PeerRefused)));
    assert_eq!(
        (line["message"].as_str(), line["reason"].as_str()),
        ("certificate refused", "tls_no_certificate")
    );
    assert!(line["fix"].contains("through its own sidecar"), "{line:?}");
    assert!(!line.contains_key("presented"));
}

#[tokio::test]
async fn another_ca_of_the_same_name() {
    let material = Ca::new().issue(&Leaf::of(&sidecar("dashboard")));
    let (_, line) = certificate_refused(&Ca::new(), &material, Kind::UnknownIssuer).await;
    assert_eq!(line["presented"], "spiffe://kiro.mesh/dashboard");
}

#[tokio::test]
async fn another_trust_domain() {
    let ca = Ca::new();
    let material = ca.issue(&Leaf::of(&sidecar("dashboard")).uri(&["spiffe://other.mesh/dashboard"]));
    let (error, line) = certificate_refused(&ca, &material, Kind::TrustDomain).await;
    assert!(error.cause().contains("other.mesh") && error.cause().contains("kiro.mesh"), "{error}");
    assert_eq!(line["presented"], "spiffe://other.mesh/dashboard");
}

#[tokio::test]
async fn expired_says_both_clocks() {
    let ca = Ca::new();
    let ended = OffsetDateTime::from_unix_timestamp(1_700_000_000).unwrap();
    let leaf = Leaf::of(&sidecar("dashboard")).from(ended - time::Duration::days(1)).until(ended);
    let (error, line) = certificate_refused(&ca, &ca.issue(&leaf), Kind::Expired).await;
    assert!(error.cause().contains("expired at 2023-11-14T22:13:20Z, our clock says 20"), "{error}");
    assert_eq!(line["not_after"], "2023-11-14T22:13:20Z");
}

#[tokio::test]
async fn not_yet_valid_says_both_clocks() {
    let ca = Ca::new();
    let begins = OffsetDateTime::from_unix_timestamp(4_000_000_000).unwrap();
    let leaf = Leaf::of(&sidecar("dashboard")).from(begins).until(begins + time::Duration::days(1));
    let (error, _) = certificate_refused(&ca, &ca.issue(&leaf), Kind::NotYetValid).await;
    assert!(error.cause().contains("valid from 2096-10-02T07:06:40Z, our clock says 20"), "{error}");
    assert!(error.fix().contains("clocks"), "{error}");
}

#[tokio::test]
async fn an_applications_leaf() {
    let ca = Ca::new();
    let (error, _) = certificate_refused(&ca, &ca.issue(&Leaf::of(&app("dashboard"))), Kind::AppLeaf).await;
    assert!(error.fix().contains("own sidecar"), "{error}");
}

#[tokio::test]
async fn leaves_that_name_no_one_identity() {
    let ca = Ca::new();
    let leaf = || Leaf::of(&sidecar("dashboard"));
    let two = ["spiffe://kiro.mesh/dashboard", "spiffe://kiro.mesh/auth"];
    let cases = [
        ("no URI name", leaf().uri(&[])),
        ("two URI names", leaf().uri(&two)),
        ("the same URI name twice", leaf().uri(&[two[0], two[0]])),
        ("no SPIFFE ID", leaf().uri(&["https://kiro.mesh/dashboard"])),
        ("a deeper path", leaf().uri(&["spiffe://kiro.mesh/dashboard/admin"])),
        ("a reserved name", leaf().uri(&["spiffe://kiro.mesh/ingress"])),
        ("no DNS name", leaf().dns(&[])),
        ("another DNS name", leaf().dns(&["auth"])),
        ("a wildcard", leaf().dns(&["*.mesh", "*"])),
        ("the app's DNS name", leaf().dns(&["app.dashboard"])),
    ];
    for (what, leaf) in cases {
        println!("{what}");
        certificate_refused(&ca, &ca.issue(&leaf), Kind::WrongIdentity).await;
    }
}

#[tokio::test]
async fn leaves_for_another_use() {
    let ca = Ca::new();
    let leaf = || Leaf::of(&sidecar("dashboard"));
    let cases = [
        ("server alone", leaf().uses(&[ServerAuth])),
        ("no use at all", leaf().uses(&[])),
        ("an ingress leaf", leaf().dns(&["localhost", "dashboard"]).uri(&[]).uses(&[ServerAuth])),
    ];
    for (what, leaf) in cases {
        println!("{what}");
        let (error, _) = certificate_refused(&ca, &ca.issue(&leaf), Kind::WrongIdentity).await;
        assert!(error.cause().contains("not for use as a TLS client"), "{error}");
    }
}

#[tokio::test]
async fn a_leaf_for_client_use_alone_is_enough_for_a_caller() {
    let ca = Ca::new();
    let material = ca.issue(&Leaf::of(&sidecar("dashboard")).uses(&[ClientAuth]));
    let server = mesh_server(&ca.identity(&sidecar(NAME))).unwrap();
    let (ours, theirs) = duplex(64 * 1024);
    let context = context(NAME, "inbound");
    let (accepted, caller) =
        tokio::join!(server.accept(ours, &context), connect(Arc::new(shows(&material)), theirs));
    assert!(accepted.is_ok() && caller.is_ok());
}

#[tokio::test]
async fn a_stolen_certificate_without_its_key() {
    let ca = Ca::new();
    let stolen = ca.issue(&Leaf::of(&sidecar("dashboard")));
    let mut config = foreign_client(None, TLS13, &["h2"]);
    config.client_auth_cert_resolver = support::without_its_key(&stolen);
    let (error, line, caller) = refused(&ca, config).await;
    assert_eq!(error.kind(), Kind::Other);
    assert_eq!(caller, Caller::Read(Some(Kind::PeerRefused)));
    assert_eq!(
        (line["verdict"].as_str(), line["presented"].as_str()),
        ("refused", "spiffe://kiro.mesh/dashboard")
    );
}

#[tokio::test]
async fn tls_1_2() {
    let ca = Ca::new();
    let material = ca.issue(&Leaf::of(&sidecar("dashboard")));
    let (error, line, caller) = refused(&ca, foreign_client(Some(&material), TLS12, &["h2"])).await;
    assert_eq!((error.kind(), caller), (Kind::Version, Caller::Handshake(Some(Kind::Version))));
    assert_eq!((line["message"].as_str(), line["reason"].as_str()), ("handshake failed", "tls_version"));
    assert!(line["fix"].contains("TLS 1.3"), "{line:?}");
}

#[tokio::test]
async fn wrong_alpn() {
    let ca = Ca::new();
    let material = ca.issue(&Leaf::of(&sidecar("dashboard")));
    let (error, line, caller) = refused(&ca, foreign_client(Some(&material), TLS13, &["http/1.1"])).await;
    assert_eq!((error.kind(), caller), (Kind::Alpn, Caller::Handshake(Some(Kind::Alpn))));
    assert_eq!((line["message"].as_str(), line["reason"].as_str()), ("handshake failed", "tls_alpn"));
}

#[tokio::test]
async fn no_alpn_at_all() {
    let ca = Ca::new();
    let material = ca.issue(&Leaf::of(&sidecar("dashboard")));
    let (error, line, caller) = refused(&ca, foreign_client(Some(&material), TLS13, &[])).await;
    assert_eq!((error.kind(), caller), (Kind::Alpn, Caller::End));
    assert_eq!((line["reason"].as_str(), line["tls_version"].as_str()), ("tls_alpn", "TLSv1.3"));
    assert_eq!(line["presented"], "spiffe://kiro.mesh/dashboard");
}

/// Writes bytes to the inbound port and hangs up; gives the port's error and its lines.
async fn bytes(bytes: &[u8]) -> (HandshakeError, Vec<Line>) {
    let log = Log::start();
    let server = mesh_server(&Ca::new().identity(&sidecar(NAME))).unwrap();
    let (ours, mut theirs) = duplex(64 * 1024);
    theirs.write_all(bytes).await.unwrap();
    theirs.shutdown().await.unwrap();
    let error = server.accept(ours, &context(NAME, "inbound")).await.expect_err("refused");
    (error, log.certificates())
}

#[tokio::test]
async fn plain_http() {
    let (error, lines) = bytes(b"GET / HTTP/1.1\r\nhost: profile\r\n\r\n").await;
    assert_eq!(error.kind(), Kind::PlainHttp);
    assert_eq!(lines.len(), 1);
    assert_eq!((lines[0]["level"].as_str(), lines[0]["reason"].as_str()), ("WARN", "tls_plain_http"));
    assert!(lines[0]["fix"].contains("only sidecars"), "{lines:?}");
}

#[tokio::test]
async fn a_port_scan_is_no_warning() {
    let (error, lines) = bytes(b"").await;
    assert_eq!(error.kind(), Kind::Closed);
    assert_eq!(
        (lines.len(), lines[0]["level"].as_str(), lines[0]["reason"].as_str()),
        (1, "DEBUG", "tls_closed")
    );
}

#[tokio::test]
async fn bytes_that_only_begin_like_tls() {
    let (error, lines) = bytes(b"\x16\x03\x01\x00\x05hello").await;
    assert_eq!((error.kind(), lines.len()), (Kind::Other, 1));
}

#[tokio::test]
async fn plain_bytes_after_a_good_beginning_are_no_plain_http() {
    let config = Arc::new(foreign_client(None, TLS13, &["h2"]));
    let mut hello = Vec::new();
    let mut tls = rustls::ClientConnection::new(config, ServerName::try_from(NAME).unwrap()).unwrap();
    tls.write_tls(&mut hello).unwrap();
    hello.extend_from_slice(b"GET / HTTP/1.1\r\n\r\n");
    let (error, lines) = bytes(&hello).await;
    assert_eq!((error.kind(), lines.len()), (Kind::Other, 1), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_stays_silent_makes_its_line_when_it_is_given_up() {
    let log = Log::start();
    let server = mesh_server(&Ca::new().identity(&sidecar(NAME))).unwrap();
    let (ours, _theirs) = duplex(64 * 1024);
    let context = context(NAME, "inbound");
    let limit = tokio::time::timeout(Duration::from_secs(5), server.accept(ours, &context)).await;
    assert!(limit.is_err());
    let lines = log.certificates();
    assert_eq!((lines.len(), lines[0]["reason"].as_str()), (1, "tls_timeout"));
}

#[tokio::test]
async fn a_caller_that_would_resume_has_a_full_handshake_each_time() {
    let log = Log::start();
    let ca = Ca::new();
    let server = mesh_server(&ca.identity(&sidecar(NAME))).unwrap();
    let config = Arc::new(shows(&ca.issue(&Leaf::of(&sidecar("dashboard")))));
    for round in 1..=3 {
        let (ours, theirs) = duplex(64 * 1024);
        let context = context(NAME, "inbound");
        let (accepted, caller) =
            tokio::join!(server.accept(ours, &context), connect(Arc::clone(&config), theirs));
        let (mut accepted, mut caller) = (accepted.unwrap(), caller.unwrap());
        // Tickets would come with the first bytes.
        accepted.stream.write_all(b"x").await.unwrap();
        accepted.stream.flush().await.unwrap();
        caller.read_exact(&mut [0; 1]).await.unwrap();
        let tls = caller.get_ref().1;
        assert_eq!((tls.handshake_kind(), tls.tls13_tickets_received()), (Some(HandshakeKind::Full), 0));
        assert_eq!(accepted.stream.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(accepted.peer, Some(sidecar("dashboard")), "round {round}");
        assert_eq!(log.certificates().len(), 1, "the verifier was asked in round {round}");
    }
}

/// A refused caller has much to say, over a real socket: it still reads its alert before the connection is gone.
#[tokio::test]
async fn a_refused_caller_that_writes_on_still_reads_why() {
    let (ours, theirs) = (Ca::new(), Ca::new());
    let server = mesh_server(&ours.identity(&sidecar(NAME))).unwrap();
    let config = Arc::new(shows(&theirs.issue(&Leaf::of(&sidecar("dashboard")))));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    for _ in 0..10 {
        let accept = async {
            let (stream, _) = listener.accept().await.unwrap();
            server.accept(stream, &context(NAME, "inbound")).await.expect_err("refused").kind()
        };
        let call = async {
            let stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let connector = TlsConnector::from(Arc::clone(&config));
            let mut stream = connector.connect(ServerName::try_from(NAME).unwrap(), stream).await.unwrap();
            for _ in 0..8 {
                stream.write_all(&[0; 1024]).await.unwrap();
                stream.flush().await.unwrap();
                tokio::task::yield_now().await;
            }
            classify_io(&stream.read(&mut [0; 16]).await.unwrap_err())
        };
        assert_eq!(tokio::join!(accept, call), (Kind::UnknownIssuer, Some(Kind::PeerRefused)));
    }
}

/// Our own caller, whose certificate the other end does not take: the handshake succeeds, the first read tells.
#[tokio::test]
async fn our_own_caller_learns_of_its_refusal_at_the_first_read() {
    let (ours, theirs) = (Ca::new(), Ca::new());
    let server = mesh_server(&ours.identity(&sidecar(NAME))).unwrap();
    let id: SpiffeId = sidecar("dashboard");
    let mut material = theirs.issue(&Leaf::of(&id));
    material.ca_pem.extend_from_slice(ours.pem.as_bytes());
    let identity = Arc::new(Identity::from_material(&material, &id).unwrap());
    let client = kiro_tls::mesh_client(&identity, &sidecar(NAME)).unwrap();
    let (near, far) = duplex(64 * 1024);
    let (inbound, outbound) = (context(NAME, "inbound"), context("dashboard", "outbound"));
    let log = Log::start();
    let call = async {
        let mut established = client.connect(far, &outbound).await.unwrap();
        established.stream.read(&mut [0; 16]).await.unwrap_err()
    };
    let accept = async { server.accept(near, &inbound).await.map(drop) };
    let (accepted, error) = tokio::join!(accept, call);
    assert_eq!(accepted.unwrap_err().kind(), Kind::UnknownIssuer);
    assert_eq!(classify_io(&error), Some(Kind::PeerRefused));
    assert!(error.to_string().contains("UnknownCA"), "the alert says what kind: {error}");
    let lines = log.certificates();
    let of = |side: &str| lines.iter().filter(|line| line["side"] == side).collect::<Vec<_>>();
    assert_eq!((of("client").len(), of("server").len()), (1, 1));
    assert_eq!((of("client")[0]["verdict"].as_str(), of("server")[0]["verdict"].as_str()), ("ok", "refused"));
}
