//! Are renewed files picked up, bad ones left, and is each said once?

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
use std::sync::Arc;
use std::time::Duration;

use kiro_tls::{Material, POLL_EVERY, SidecarFiles, SidecarIdentity, SidecarSource, watch_sidecar};
use support::{Ca, Leaf, Log, sidecar};
use time::OffsetDateTime;
use tokio::sync::watch::Receiver;

type Watched = Receiver<Arc<SidecarIdentity>>;

const NO_EDGES: &str = r#"{"version":1,"edges":[]}"#;
const ONE_EDGE: &str = r#"{"version":1,"edges":[{"source":"profile","target":"auth","epoch":1,"secret":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}]}"#;

/// As a careful writer does it: whole, in place of the old one.
fn put(directory: &Path, name: &str, content: &[u8]) {
    let new = directory.join(format!("{name}.new"));
    fs::write(&new, content).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(new, directory.join(name)).unwrap();
}

fn put_material(directory: &Path, material: &Material) {
    put(directory, "ca.pem", &material.ca_pem);
    put(directory, "leaf.pem", &material.leaf_pem);
    put(directory, "leaf.key", &material.key_pem);
}

struct Setup {
    ca: Ca,
    directory: tempfile::TempDir,
    watched: Watched,
    log: Log,
}

impl Setup {
    fn new() -> Self {
        Self::with(Ca::new(), &Leaf::of(&sidecar("profile")))
    }

    fn with(ca: Ca, leaf: &Leaf) -> Self {
        let log = Log::start();
        let directory = tempfile::tempdir().unwrap();
        put_material(directory.path(), &ca.issue(leaf));
        put(directory.path(), "edges.json", NO_EDGES.as_bytes());
        let source = SidecarSource::Directory(directory.path().to_owned());
        let watched = watch_sidecar(source, sidecar("profile")).unwrap();
        Self { ca, directory, watched, log }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Lets the poller look a few times; time is paused, so this costs none.
    async fn looks(&self, count: u32) {
        tokio::time::sleep(POLL_EVERY * count + Duration::from_millis(1)).await;
    }

    fn running(&self) -> Arc<SidecarIdentity> {
        Arc::clone(&self.watched.borrow())
    }

    /// The reload lines since the last time, as level and message.
    fn said(&self) -> Vec<(String, String)> {
        let line = |mut line: support::Line| (line.remove("level").unwrap(), line.remove("message").unwrap());
        self.log.take("kiro::reload").into_iter().map(line).collect()
    }
}

fn said(level: &str, message: &str) -> Vec<(String, String)> {
    vec![(level.to_owned(), message.to_owned())]
}

const RENEWED: &str = "certificates renewed";
const KEPT: &str = "certificates can't be renewed: the running ones stay";

#[tokio::test(start_paused = true)]
async fn a_renewed_leaf_is_a_new_generation() {
    let mut setup = Setup::new();
    setup.looks(3).await;
    assert!(!setup.watched.has_changed().unwrap(), "nothing has changed");
    let before = setup.running();
    put_material(setup.path(), &setup.ca.issue(&Leaf::of(&sidecar("profile"))));
    tokio::time::timeout(POLL_EVERY * 2, setup.watched.changed()).await.unwrap().unwrap();
    let after = setup.running();
    assert_eq!((before.generation, after.generation, after.identity.generation()), (1, 2, 2));
    assert_ne!(before.identity.facts().serial, after.identity.facts().serial);
    assert_eq!(setup.said(), said("INFO", RENEWED));
}

#[tokio::test(start_paused = true)]
async fn renewed_edge_secrets_are_a_new_generation() {
    let setup = Setup::new();
    assert!(setup.running().edges.signing("auth").is_none());
    put(setup.path(), "edges.json", ONE_EDGE.as_bytes());
    setup.looks(1).await;
    assert!(setup.running().edges.signing("auth").is_some());
    assert_eq!(setup.running().generation, 2);
}

#[tokio::test(start_paused = true)]
async fn an_ingress_comes_and_goes() {
    let setup = Setup::new();
    let material = setup.ca.issue(&Leaf::of(&sidecar("profile")));
    put(setup.path(), "ingress.pem", &material.leaf_pem);
    put(setup.path(), "ingress.key", &material.key_pem);
    setup.looks(1).await;
    assert!(setup.running().ingress.is_some());
    fs::remove_file(setup.path().join("ingress.pem")).unwrap();
    fs::remove_file(setup.path().join("ingress.key")).unwrap();
    setup.looks(1).await;
    assert!(setup.running().ingress.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_touched_file_is_no_renewal() {
    let setup = Setup::new();
    for name in ["leaf.pem", "leaf.key", "edges.json"] {
        put(setup.path(), name, &fs::read(setup.path().join(name)).unwrap());
    }
    setup.looks(3).await;
    assert!(!setup.watched.has_changed().unwrap());
    assert!(setup.said().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_bad_renewal_keeps_the_old_one_and_is_told_once_a_change() {
    let setup = Setup::new();
    let before = setup.running();
    put(setup.path(), "leaf.pem", b"rubbish");
    setup.looks(20).await;
    assert_eq!(setup.said(), said("ERROR", KEPT));
    put(setup.path(), "leaf.pem", b"other rubbish");
    setup.looks(20).await;
    assert_eq!(setup.said(), said("ERROR", KEPT), "another change, told again");
    assert!(Arc::ptr_eq(&before, &setup.running()));

    put_material(setup.path(), &setup.ca.issue(&Leaf::of(&sidecar("profile"))));
    setup.looks(2).await;
    assert_eq!(setup.running().generation, 2);
    assert_eq!(setup.said(), said("INFO", RENEWED));
}

#[tokio::test(start_paused = true)]
async fn each_kind_of_bad_renewal_keeps_the_old_one() {
    let setup = Setup::new();
    let before = setup.running();
    let now = OffsetDateTime::now_utc();
    let good = setup.ca.issue(&Leaf::of(&sidecar("profile")));
    let other_key = setup.ca.issue(&Leaf::of(&sidecar("profile"))).key_pem;
    let bad = [
        setup.ca.issue(&Leaf::of(&sidecar("auth"))),
        setup.ca.issue(&Leaf::of(&sidecar("profile")).until(now - time::Duration::days(1))),
        setup.ca.issue(&Leaf::of(&sidecar("profile")).from(now + time::Duration::days(1))),
        Material { key_pem: other_key, ..good.clone() },
        Material { ca_pem: Ca::new().pem.into_bytes(), ..good },
    ];
    for material in bad {
        put_material(setup.path(), &material);
        setup.looks(5).await;
        assert_eq!(setup.said(), said("ERROR", KEPT));
        assert!(Arc::ptr_eq(&before, &setup.running()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_writer_that_is_half_done_is_not_complained_of() {
    let setup = Setup::new();
    setup.looks(1).await;
    let renewed = setup.ca.issue(&Leaf::of(&sidecar("profile")));
    put(setup.path(), "leaf.pem", &renewed.leaf_pem);
    setup.looks(1).await;
    assert_eq!(setup.running().generation, 1);
    put(setup.path(), "leaf.key", &renewed.key_pem);
    setup.looks(1).await;
    assert_eq!(setup.running().generation, 2);
    assert_eq!(setup.said(), said("INFO", RENEWED));
}

#[tokio::test(start_paused = true)]
async fn a_mode_that_is_mended_is_seen() {
    let setup = Setup::new();
    put_material(setup.path(), &setup.ca.issue(&Leaf::of(&sidecar("profile"))));
    let key = setup.path().join("leaf.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    setup.looks(3).await;
    assert_eq!(setup.said(), said("ERROR", KEPT));
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    setup.looks(1).await;
    assert_eq!(setup.running().generation, 2);
}

#[tokio::test(start_paused = true)]
async fn what_was_put_back_is_said() {
    let setup = Setup::new();
    let good = fs::read(setup.path().join("leaf.pem")).unwrap();
    put(setup.path(), "leaf.pem", b"rubbish");
    setup.looks(3).await;
    assert_eq!(setup.said(), said("ERROR", KEPT));
    put(setup.path(), "leaf.pem", &good);
    setup.looks(3).await;
    assert_eq!(setup.said(), said("INFO", "certificates are again the ones that run"));
    assert_eq!(setup.running().generation, 1);
}

#[tokio::test(start_paused = true)]
async fn the_poller_ends_with_its_receivers() {
    let metrics = tokio::runtime::Handle::current().metrics();
    let setup = Setup::new();
    let second = setup.watched.clone();
    setup.looks(1).await;
    assert_eq!(metrics.num_alive_tasks(), 1);
    drop(setup);
    tokio::time::sleep(POLL_EVERY * 3).await;
    assert_eq!(metrics.num_alive_tasks(), 1, "somebody still looks");
    drop(second);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(metrics.num_alive_tasks(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_end_that_is_near_is_told_once_a_level() {
    let now = OffsetDateTime::now_utc();
    let ca = Ca::until(now + time::Duration::hours(20));
    let setup = Setup::with(ca, &Leaf::of(&sidecar("profile")).until(now + time::Duration::days(20)));
    setup.looks(20).await;
    let mut told = setup.log.take("kiro::expiry");
    assert_eq!(told.len(), 2, "{told:#?}");
    let ca = told.pop().unwrap();
    let leaf = told.pop().unwrap();
    assert_eq!((leaf["certificate"].as_str(), leaf["within_days"].as_str()), ("leaf", "30"));
    assert_eq!((ca["certificate"].as_str(), ca["within_days"].as_str()), ("ca", "1"));
    assert!(leaf["fix"].contains("make certs") && leaf["message"] == "certificate expires soon");

    put_material(
        setup.path(),
        &setup.ca.issue(&Leaf::of(&sidecar("profile")).until(now + time::Duration::days(5))),
    );
    setup.looks(20).await;
    let told = setup.log.take("kiro::expiry");
    assert_eq!(told[0]["within_days"], "7", "a renewal that ends sooner is told again");
    assert_eq!(told.len(), 2);
}

#[tokio::test]
async fn from_memory_there_is_nothing_to_follow() {
    let material = Ca::new().issue(&Leaf::of(&sidecar("profile")));
    let files = SidecarFiles { material, edges_json: NO_EDGES.as_bytes().to_vec().into(), ingress: None };
    let mut watched = watch_sidecar(SidecarSource::Memory(files), sidecar("profile")).unwrap();
    assert_eq!(watched.borrow().identity.spiffe(), &sidecar("profile"));
    assert!(watched.changed().await.is_err());
}

#[tokio::test]
async fn what_is_bad_at_the_start_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let source = SidecarSource::Directory(directory.path().to_owned());
    assert!(watch_sidecar(source, sidecar("profile")).is_err());
}
