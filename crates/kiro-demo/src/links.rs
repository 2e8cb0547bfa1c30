//! With which certificates does a service speak now? Renewed files are taken up while it runs.
//!
//! [`Links`] is one generation: what the listener accepts with, and the pool of connections to the outbound proxy. A
//! renewal swaps it whole, so that no new connection uses old certificates; requests under way keep theirs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_rustls::TlsAcceptor;
use tracing::{info, warn};

use crate::Service;
use crate::connect::{Client, Connector, ProxyAddress};
use crate::tls::{FILES, Tls, TlsError, TlsMaterial, TlsSource};

/// How often the certificate files are looked at. Polled, since notifications do not cross every kind of mount.
const POLL_EVERY: Duration = Duration::from_millis(500);

/// One generation of both legs.
pub(crate) struct Links {
    /// None on a plain listener.
    pub(crate) acceptor: Option<TlsAcceptor>,
    /// Calls to the outbound proxy.
    pub(crate) client: Client,
}

/// Why a service can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its certificates can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The proxy wants TLS and there are no certificates.
    #[error("the proxy at {0} needs certificates: give their directory, or an http:// address")]
    ProxyNeedsTls(ProxyAddress),
}

/// Loads the first generation, and returns what keeps it current: a future that ends with the last receiver, or never.
pub(crate) fn start(
    service: Service,
    source: Option<TlsSource>,
    proxy: ProxyAddress,
) -> Result<(watch::Receiver<Arc<Links>>, impl Future<Output = ()> + Send), StartError> {
    if proxy.tls && source.is_none() {
        return Err(StartError::ProxyNeedsTls(proxy));
    }
    let (material, watched) = match source {
        None => (None, None),
        Some(TlsSource::Memory(material)) => (Some(material), None),
        Some(TlsSource::Directory(directory)) => {
            // Stamped before it is read: a change in between is then seen as one.
            let stamps = stamps(&directory);
            (Some(TlsMaterial::read(&directory)?), Some((directory, stamps)))
        }
    };
    let tls = material.as_ref().map(|material| Tls::new(service, material)).transpose()?;
    let (sender, links) = watch::channel(Arc::new(Links::new(tls.as_ref(), &proxy)));
    let keep_current = async move {
        match watched {
            Some((directory, stamps)) => poll(service, directory, stamps, &proxy, sender).await,
            None => sender.closed().await,
        }
    };
    Ok((links, keep_current))
}

impl Links {
    fn new(tls: Option<&Tls>, proxy: &ProxyAddress) -> Self {
        Self {
            acceptor: tls.map(|tls| TlsAcceptor::from(Arc::clone(&tls.server))),
            client: Connector::new(proxy.clone(), tls).into_client(),
        }
    }
}

/// Takes up each renewal of `directory`. A bad one leaves the running generation in place and is said once.
async fn poll(
    service: Service,
    directory: PathBuf,
    mut seen: [Stamp; 3],
    proxy: &ProxyAddress,
    sender: watch::Sender<Arc<Links>>,
) {
    let mut ticks = interval_at(Instant::now() + POLL_EVERY, POLL_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = sender.closed() => return,
        }
        // Three calls of stat on local files, twice a second: not worth a thread.
        let now = stamps(&directory);
        if now == seen {
            continue;
        }
        seen = now;
        match TlsMaterial::read(&directory).and_then(|material| Tls::new(service, &material)) {
            Ok(tls) => {
                sender.send_replace(Arc::new(Links::new(Some(&tls), proxy)));
                info!(target: "kiro::certificate", service = service.name(), "renewed certificate taken up");
            }
            // Files are renewed one after the other: a key that does not fit yet is looked at again when the next changes.
            Err(error) => warn!(
                target: "kiro::certificate",
                service = service.name(),
                cause = %error,
                "renewed certificate not usable, the old one is kept"
            ),
        }
    }
}

/// What changes when a file does: modification time, size and inode (a rename in place of a write). None: no such file.
type Stamp = Option<(i64, i64, u64, u64)>;

fn stamps(directory: &Path) -> [Stamp; 3] {
    use std::os::unix::fs::MetadataExt;
    FILES.map(|name| {
        let metadata = std::fs::metadata(directory.join(name)).ok()?;
        Some((metadata.mtime(), metadata.mtime_nsec(), metadata.size(), metadata.ino()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair};
    use tempfile::TempDir;

    /// A leaf that is its own CA.
    fn write(directory: &Path, names: &[&str]) {
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec!["app.auth".to_owned()]).unwrap().self_signed(&key).unwrap();
        for name in names {
            let path = directory.join(name);
            let pem = if *name == "leaf.key" { key.serialize_pem() } else { leaf.pem() };
            std::fs::write(&path, pem).unwrap();
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_bad_renewal_leaves_the_running_generation_in_place() {
        let directory = TempDir::new().unwrap();
        write(directory.path(), &FILES);
        let proxy = "https://127.0.0.1:15001".parse().unwrap();
        let source = TlsSource::Directory(directory.path().to_owned());
        let (mut links, keep_current) = start(Service::Auth, Some(source), proxy).unwrap();
        tokio::spawn(keep_current);

        write(directory.path(), &["leaf.key"]);
        tokio::time::sleep(POLL_EVERY * 3).await;
        assert!(!links.has_changed().unwrap(), "a key that does not fit was taken up");
        std::fs::remove_file(directory.path().join("leaf.pem")).unwrap();
        tokio::time::sleep(POLL_EVERY * 3).await;
        assert!(!links.has_changed().unwrap(), "a missing leaf was taken up");
        // Still watching.
        write(directory.path(), &FILES);
        tokio::time::timeout(POLL_EVERY * 3, links.changed()).await.expect("not taken up").unwrap();
        tokio::time::sleep(POLL_EVERY * 3).await;
        links.mark_unchanged();
        tokio::time::sleep(POLL_EVERY * 3).await;
        assert!(!links.has_changed().unwrap(), "taken up again without a change");
    }
}
