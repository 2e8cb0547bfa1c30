//! What the tests share: mesh files, a directory's picture, and certificates read by another library.

#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use kiro_core::identity::ServiceName;
use kiro_core::mesh::Mesh;
use kiro_pki::{Options, PkiError, Report, provision};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use time::OffsetDateTime;

pub(crate) const THREE: &str = "\
trust_domain: kiro.mesh
services:
  dashboard: { app: { port: 8001 }, ingress: { port: 8080, tls_port: 8443, names: [dashboard.example] } }
  profile: { app: { port: 8002 } }
  auth: { app: { port: 8003 } }
allow:
  - { from: ingress, to: dashboard }
";

pub(crate) fn mesh(text: &str) -> Mesh {
    kiro_core::mesh::parse(text).unwrap_or_else(|problems| panic!("{problems}"))
}

pub(crate) fn three() -> Mesh {
    mesh(THREE)
}

pub(crate) fn name(text: &str) -> ServiceName {
    ServiceName::parse(text).unwrap()
}

pub(crate) fn now() -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap()
}

pub(crate) fn days(days: i64) -> time::Duration {
    time::Duration::days(days)
}

/// A directory for certificates, and runs on it.
pub(crate) struct Certs {
    temp: tempfile::TempDir,
}

impl Certs {
    pub(crate) fn empty() -> Self {
        Self { temp: tempfile::tempdir().unwrap() }
    }

    /// With what the first run writes.
    pub(crate) fn of(mesh: &Mesh) -> Self {
        let certs = Self::empty();
        certs.run(mesh, now()).unwrap();
        certs
    }

    pub(crate) fn dir(&self) -> PathBuf {
        self.temp.path().join("certs")
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.dir().join(file)
    }

    pub(crate) fn run(&self, mesh: &Mesh, now: OffsetDateTime) -> Result<Report, PkiError> {
        provision(mesh, &self.dir(), &Options::at(now))
    }

    pub(crate) fn read(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.path(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    pub(crate) fn write(&self, file: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(file), content).unwrap();
    }

    pub(crate) fn mode(&self, file: &str) -> u32 {
        std::fs::metadata(self.path(file)).unwrap().mode() & 0o7777
    }

    pub(crate) fn chmod(&self, file: &str, mode: u32) {
        std::fs::set_permissions(self.path(file), std::fs::Permissions::from_mode(mode)).unwrap();
    }

    /// Everything that a run could have changed: content, mode, owner, time and inode of each entry.
    pub(crate) fn picture(&self) -> BTreeMap<String, String> {
        let mut picture = BTreeMap::new();
        visit(&self.dir(), &self.dir(), &mut picture);
        picture
    }
}

fn visit(root: &Path, dir: &Path, picture: &mut BTreeMap<String, String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let content = if meta.is_file() { std::fs::read(&path).unwrap() } else { Vec::new() };
        let facts = format!(
            "{:o} {}:{} {}.{} {} {:?}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ino(),
            content
        );
        picture.insert(path.strip_prefix(root).unwrap().display().to_string(), facts);
        if meta.is_dir() {
            visit(root, &path, picture);
        }
    }
}

/// The names that differ between two pictures.
pub(crate) fn differing(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Vec<String> {
    let names: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
    names.into_iter().filter(|name| before.get(*name) != after.get(*name)).cloned().collect()
}

/// Says aloud that a test did not test; the harness would swallow what `eprintln!` prints.
pub(crate) fn skipped(why: &str) {
    use std::io::Write as _;
    std::io::stderr().write_all(format!("SKIPPED: {why}\n").as_bytes()).unwrap();
}

pub(crate) fn der(pem: &[u8]) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem).unwrap()
}

/// Reads a certificate and hands it to `f`.
pub(crate) fn with_certificate<T>(
    pem: &[u8],
    f: impl FnOnce(&x509_parser::certificate::X509Certificate<'_>) -> T,
) -> T {
    let der = der(pem);
    let (rest, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
    assert!(rest.is_empty());
    f(&certificate)
}

pub(crate) fn sans(pem: &[u8]) -> Vec<String> {
    with_certificate(pem, |certificate| {
        let names = certificate.subject_alternative_name().unwrap().unwrap();
        names.value.general_names.iter().map(ToString::to_string).collect()
    })
}

/// The actions of a report as `action path`, paths relative to the directory.
pub(crate) fn actions(certs: &Certs, report: &Report) -> Vec<String> {
    let relative = |path: &Path| path.strip_prefix(certs.dir()).unwrap().display().to_string();
    report.changes.iter().map(|change| format!("{} {}", change.action, relative(&change.path))).collect()
}
