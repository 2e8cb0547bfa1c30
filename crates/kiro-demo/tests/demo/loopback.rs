//! Who may ask a service? Its own sidecar, and nobody else, over a handshake of its own each time.

use std::net::SocketAddr;

use http::Request;
use kiro_demo::{Service, TlsMaterial, TlsSource};
use rcgen::ExtendedKeyUsagePurpose as Usage;
use rustls::pki_types::ServerName;
use rustls::{HandshakeKind, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::support::{Action, Mesh, PATIENCE, Pki, Plan, client_config, listener, options, send};

const TLS13: &SupportedProtocolVersion = &rustls::version::TLS13;
const TLS12: &SupportedProtocolVersion = &rustls::version::TLS12;

async fn profile(pki: &Pki) -> SocketAddr {
    let (own, address) = listener().await;
    let tls = Some(TlsSource::Memory(pki.app(Service::Profile)));
    tokio::spawn(kiro_demo::serve(Service::Profile, options(own, tls, address), std::future::pending()));
    address
}

/// Asks Profile's health, with `own` as client certificate. In TLS 1.3 a refusal shows at the first read.
async fn healthy(
    address: SocketAddr,
    ca: &TlsMaterial,
    own: Option<&TlsMaterial>,
    version: &'static SupportedProtocolVersion,
) -> Result<(), String> {
    let ask = async {
        let tcp = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        let name = ServerName::try_from("app.profile").unwrap();
        let connector = TlsConnector::from(client_config(ca, own, version));
        let tls = connector.connect(name, tcp).await.map_err(|error| error.to_string())?;
        let request = Request::get("/healthz").header("host", "profile").body(Default::default()).unwrap();
        let response = send(tls, request).await.map_err(|error| format!("{error:?}"))?;
        assert_eq!(response.status(), 200);
        Ok(())
    };
    tokio::time::timeout(PATIENCE, ask).await.unwrap()
}

#[tokio::test]
async fn only_the_own_sidecar_is_let_in() {
    let pki = Pki::new();
    let address = profile(&pki).await;
    let sidecar = pki.leaf("profile");
    healthy(address, &sidecar, Some(&sidecar), TLS13).await.unwrap();

    let others: [(&str, TlsMaterial); 6] = [
        ("another service's sidecar", pki.leaf("dashboard")),
        ("the application's own leaf", pki.app(Service::Profile)),
        ("a name below the service's", pki.leaf("x.profile")),
        ("another CA", Pki::new().leaf("profile")),
        (
            "an expired leaf",
            pki.leaf_with("profile", |params| params.not_after = rcgen::date_time_ymd(2020, 1, 1)),
        ),
        (
            "a leaf for servers alone, as the ingress has",
            pki.leaf_with("profile", |params| params.extended_key_usages = vec![Usage::ServerAuth]),
        ),
    ];
    for (who, leaf) in &others {
        let refused = healthy(address, &sidecar, Some(leaf), TLS13).await;
        assert!(refused.is_err(), "{who} was let in");
    }
    assert!(healthy(address, &sidecar, None, TLS13).await.is_err(), "no certificate");
    assert!(healthy(address, &sidecar, Some(&sidecar), TLS12).await.is_err(), "TLS 1.2");
    // And it still serves who may ask.
    healthy(address, &sidecar, Some(&sidecar), TLS13).await.unwrap();
}

#[tokio::test]
async fn plain_http_gets_no_answer() {
    let pki = Pki::new();
    let address = profile(&pki).await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(b"GET /healthz HTTP/1.1\r\nhost: profile\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // A reset is as good as an end.
    let _ = tokio::time::timeout(PATIENCE, tcp.read_to_end(&mut answer)).await.unwrap();
    assert!(!answer.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn no_session_is_resumed() {
    let pki = Pki::new();
    let address = profile(&pki).await;
    let sidecar = pki.leaf("profile");
    // One configuration for both connections: it keeps whatever ticket the first brings.
    let connector = TlsConnector::from(client_config(&sidecar, Some(&sidecar), TLS13));
    for _ in 0..2 {
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("app.profile").unwrap();
        let mut tls = connector.connect(name, tcp).await.unwrap();
        // Tickets come after the handshake, with the first bytes of the answer.
        tls.write_all(b"GET /healthz HTTP/1.1\r\nhost: profile\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        tls.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"));
        let connection = tls.get_ref().1;
        assert_eq!(connection.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(connection.tls13_tickets_received(), 0);
    }
}

#[tokio::test]
async fn a_service_resumes_no_session_with_its_proxy() {
    let mesh = Mesh::start(Plan::new(true).rule(|seen| match seen.method.as_str() {
        "DELETE" => Action::Close,
        _ => Action::Forward,
    }))
    .await;
    for _ in 0..3 {
        assert_eq!(mesh.get(Service::Dashboard, "/try/denied").await.status, 404);
        // The proxy closes the connection, and the next call makes a new one.
        assert_eq!(mesh.get(Service::Dashboard, "/try/method").await.status, 502);
    }
    assert_eq!((mesh.connections(), mesh.resumed()), (3, 0));
}
