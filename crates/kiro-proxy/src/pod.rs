//! What does a sidecar in a pod learn from its pod?
//!
//! That it is to drain, by the pod process's word; and that its network namespace has died with its owner, by the interfaces that
//! are gone. In the latter case only an exit helps: Docker then starts the sidecar in the new namespace.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kiro_core::interfaces::Watch;
use tokio::net::TcpStream;

use crate::drain::pod_says_drain;

/// What has happened to the pod.
#[derive(Debug)]
pub(crate) enum PodEvent {
    /// The pod ends. It waits for the connection to be closed: keep it until the sidecar has drained.
    Drain(TcpStream),
    /// The namespace's owner is gone.
    NamespaceGone,
}

/// How often the interfaces are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Returns when something happens to the pod.
pub(crate) async fn watch_pod(pod: SocketAddr) -> PodEvent {
    tokio::select! {
        stream = pod_says_drain(pod) => PodEvent::Drain(stream),
        () = namespace_gone() => PodEvent::NamespaceGone,
    }
}

async fn namespace_gone() {
    let interfaces = || std::fs::read_to_string("/proc/net/dev").ok();
    // Where there is no such file there are no namespaces to lose.
    let Some(first) = interfaces() else { return std::future::pending().await };
    let mut watch = Watch::new(&first);
    loop {
        tokio::time::sleep(LOOK).await;
        if let Some(now) = interfaces()
            && watch.observe(&now, Instant::now())
        {
            return;
        }
    }
}
