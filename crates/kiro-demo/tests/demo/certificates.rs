//! Does a service refuse certificates that can't work, say why, and take up renewed ones while it runs?

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use kiro_demo::{Service, StartError, TlsMaterial, TlsSource};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::support::{PATIENCE, Pki, client_config, listener, options};

/// As renewal does it: written beside, then renamed.
fn write(directory: &Path, name: &str, content: &[u8], mode: u32) {
    let temporary = directory.join(format!("{name}.new"));
    std::fs::write(&temporary, content).unwrap();
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(mode)).unwrap();
    std::fs::rename(temporary, directory.join(name)).unwrap();
}

fn write_all(directory: &Path, material: &TlsMaterial) {
    write(directory, "ca.pem", &material.ca_pem, 0o644);
    write(directory, "leaf.pem", &material.leaf_pem, 0o644);
    write(directory, "leaf.key", &material.key_pem, 0o640);
}

async fn start_error(source: TlsSource) -> String {
    let (own, address) = listener().await;
    let serving =
        kiro_demo::serve(Service::Auth, options(own, Some(source), address), std::future::pending());
    let error = tokio::time::timeout(PATIENCE, serving).await.expect("it serves").unwrap_err();
    assert!(matches!(error, StartError::Tls(_)));
    error.to_string()
}

#[tokio::test]
async fn material_that_no_peer_would_take_is_refused_at_start() {
    let pki = Pki::new();
    let good = pki.app(Service::Auth);
    let expired = pki.leaf_with("app.auth", |params| params.not_after = rcgen::date_time_ymd(2020, 1, 1));
    let cases = [
        ("leaf.key", "key", TlsMaterial { key_pem: pki.app(Service::Auth).key_pem, ..good.clone() }),
        (
            "leaf.pem",
            "BadSignature",
            TlsMaterial { ca_pem: Pki::new().app(Service::Auth).ca_pem, ..good.clone() },
        ),
        ("leaf.pem", "app.auth", pki.app(Service::Profile)),
        ("leaf.pem", "app.auth", pki.leaf("auth")),
        ("leaf.pem", "expired", expired),
        ("leaf.pem", "no certificate", TlsMaterial { leaf_pem: Vec::new(), ..good.clone() }),
        ("ca.pem", "no certificate", TlsMaterial { ca_pem: b"junk".to_vec(), ..good.clone() }),
        ("leaf.key", "", TlsMaterial { key_pem: good.leaf_pem.clone(), ..good.clone() }),
    ];
    for (file, what, material) in cases {
        let error = start_error(TlsSource::Memory(material)).await;
        assert!(error.starts_with(file) && error.contains(what), "{file}, {what}: {error}");
    }
}

#[tokio::test]
async fn a_directory_that_cannot_be_used_is_named() {
    let directory = TempDir::new().unwrap();
    let source = || TlsSource::Directory(directory.path().to_owned());
    let error = start_error(source()).await;
    assert!(error.contains("leaf.key") && error.contains("No such file"), "{error}");

    write_all(directory.path(), &Pki::new().app(Service::Auth));
    std::fs::set_permissions(directory.path().join("leaf.key"), std::fs::Permissions::from_mode(0o644))
        .unwrap();
    let error = start_error(source()).await;
    assert!(error.contains("everybody may read") && error.contains("chmod o-rwx"), "{error}");

    write(directory.path(), "leaf.key", b"", 0o640);
    write(directory.path(), "ca.pem", &vec![b'x'; 2 * 1024 * 1024], 0o644);
    let error = start_error(source()).await;
    assert!(error.contains("ca.pem") && error.contains("2097152 bytes"), "{error}");
}

#[tokio::test]
async fn a_proxy_over_tls_needs_certificates() {
    let (own, address) = listener().await;
    let mut options = options(own, None, address);
    options.proxy.tls = true;
    let error = kiro_demo::serve(Service::Auth, options, std::future::pending()).await.unwrap_err();
    assert!(matches!(error, StartError::ProxyNeedsTls(_)));
    assert!(error.to_string().contains(&format!("https://{address}")), "{error}");
}

#[tokio::test]
async fn renewed_files_are_taken_up() {
    let pki = Pki::new();
    let sidecar = pki.leaf("auth");
    let connector = TlsConnector::from(client_config(&sidecar, Some(&sidecar), &rustls::version::TLS13));
    let directory = TempDir::new().unwrap();
    let first = pki.app(Service::Auth);
    write_all(directory.path(), &first);

    let (own, address) = listener().await;
    let tls = Some(TlsSource::Directory(directory.path().to_owned()));
    tokio::spawn(kiro_demo::serve(Service::Auth, options(own, tls, address), std::future::pending()));
    let shown = async || {
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("app.auth").unwrap();
        let tls = connector.connect(name, tcp).await.unwrap();
        tls.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
    };
    let leaf = |material: &TlsMaterial| CertificateDer::from_pem_slice(&material.leaf_pem).unwrap();
    let shows = async |expected: &CertificateDer<'static>| {
        let wait = async {
            while shown().await != *expected {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("the renewed leaf is not shown");
    };
    assert_eq!(shown().await, leaf(&first));

    // One file after the other, as renewal goes: what is seen in between does not fit together.
    let second = pki.app(Service::Auth);
    write(directory.path(), "leaf.key", &second.key_pem, 0o640);
    assert_eq!(shown().await, leaf(&first));
    write(directory.path(), "leaf.pem", &second.leaf_pem, 0o644);
    shows(&leaf(&second)).await;
}
