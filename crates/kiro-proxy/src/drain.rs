//! When does a sidecar stop, and in which order?
//!
//! On SIGTERM, or on its pod's word, a sidecar becomes unready and takes no new inbound connections; what is under way ends,
//! and the application's own calls still go out until nothing is under way or the drain time is over.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::watch;

/// Where a sidecar is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Takes requests.
    Serving,
    /// Ends what is under way.
    Draining,
    /// Ends at once.
    Stopped,
}

/// A view of the phase, one for each task that cares.
#[derive(Debug, Clone)]
pub(crate) struct PhaseWatch(pub(crate) watch::Receiver<Phase>);

impl PhaseWatch {
    /// The phase now.
    pub(crate) fn current(&self) -> Phase {
        *self.0.borrow()
    }

    /// Returns when the phase is `phase` or a later one, or when the sidecar is gone.
    pub(crate) async fn reached(&self, phase: Phase) {
        let mut receiver = self.0.clone();
        let order = |phase: Phase| match phase {
            Phase::Serving => 0,
            Phase::Draining => 1,
            Phase::Stopped => 2,
        };
        let _ = receiver.wait_for(|now| order(*now) >= order(phase)).await;
    }
}

/// What the pod process sends on its connections when it is told to end.
const WORD: &[u8] = b"drain\n";

/// Keeps a connection to the pod process and returns it when the pod says to drain. The pod ends when the connection is closed,
/// so whoever gets it keeps it until the sidecar has drained.
pub(crate) async fn pod_says_drain(pod: SocketAddr) -> TcpStream {
    loop {
        if let Ok(mut stream) = TcpStream::connect(pod).await {
            let mut word = [0; WORD.len()];
            // A pod that goes away without the word has crashed: there is nothing to drain for, and another one may come.
            if stream.read_exact(&mut word).await.is_ok() && word == WORD {
                return stream;
            }
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
