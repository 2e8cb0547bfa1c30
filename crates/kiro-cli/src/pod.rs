//! Who owns a pod's network namespace, and how does the sidecar learn that the pod ends?
//!
//! The pod process owns it by being there. It does nothing else, so that nothing can make it crash, and sidecar and application
//! can die and come back within its namespace. When a pod is recreated Docker stops the owner first and never tells the others in
//! time; so on SIGTERM the pod writes `drain` to its sidecar, over the connection that the sidecar keeps, and stays until the
//! sidecar has drained and closed it, or the grace is over.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::output::note;

/// Own a pod's network namespace and tell the sidecar when the pod ends.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Where the sidecar connects.
    #[arg(long, env = "KIRO_POD_ADDR", default_value = "127.0.0.1:15021")]
    listen: SocketAddr,
    /// How long the sidecar may take to drain, in seconds: above the sidecar's own limit, below Docker's stop grace.
    #[arg(long, value_name = "SECONDS", default_value_t = 15)]
    grace: u64,
}

/// Who connects is the sidecar, and a health check for a moment. A sidecar that comes back takes a second place for as long as its
/// predecessor's connection takes to die.
const CONNECTIONS_MAX: usize = 16;

/// What a sidecar waits for.
const DRAIN: &[u8] = b"drain\n";

/// How long the pod looks out for a sidecar at its end where none is connected: one may have knocked in this very moment.
const SETTLE: Duration = Duration::from_millis(50);

/// How long accepting rests after it failed for want of a resource.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Owns the namespace until SIGTERM or SIGINT, and then until the sidecar has drained.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(own(arguments))
}

async fn own(arguments: &Arguments) -> anyhow::Result<u8> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM can't be handled")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT can't be handled")?;
    let listener = TcpListener::bind(arguments.listen).await.with_context(|| {
        format!("{} can't be bound: is a second pod process in this namespace?", arguments.listen)
    })?;
    note(&format!("kiro pod: owns the namespace, sidecar connects to {}", listener.local_addr()?));

    let (drain, told) = watch::channel(false);
    let grace = Duration::from_secs(arguments.grace);
    let mut sidecars = JoinSet::new();
    let mut leave_at: Option<Instant> = None;
    loop {
        let patience_ends = leave_at.unwrap_or_else(Instant::now);
        tokio::select! {
            // A second signal changes nothing: who is in a hurry sends SIGKILL.
            () = asked_to_end(&mut terminate, &mut interrupt), if leave_at.is_none() => {
                leave_at = Some(Instant::now() + if sidecars.is_empty() { SETTLE } else { grace });
                let _ = drain.send(true);
            }
            accepted = listener.accept() => match accepted {
                // Who is one too many is closed at once, and tries again.
                Ok((stream, _)) if sidecars.len() < CONNECTIONS_MAX => {
                    if sidecars.is_empty() && leave_at.is_some() {
                        leave_at = Some(Instant::now() + grace);
                    }
                    sidecars.spawn(keep(stream, told.clone()));
                }
                Ok(_) => {}
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
            Some(_) = sidecars.join_next(), if !sidecars.is_empty() => {
                if leave_at.is_some() && sidecars.is_empty() {
                    note("kiro pod: the sidecar has drained");
                    return Ok(0);
                }
            }
            () = sleep_until(patience_ends), if leave_at.is_some() => {
                if !sidecars.is_empty() {
                    note("kiro pod: the sidecar has not drained in time");
                }
                return Ok(0);
            }
        }
    }
}

async fn asked_to_end(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Keeps a sidecar's connection until the sidecar closes it, and gives it the word when it is time.
async fn keep(mut stream: TcpStream, mut told: watch::Receiver<bool>) {
    let (mut from, mut to) = stream.split();
    let closed = async {
        // Nothing is said in this direction; whatever comes is dropped.
        let mut buffer = [0; 64];
        while matches!(from.read(&mut buffer).await, Ok(1..)) {}
    };
    let word = async {
        if told.wait_for(|drain| *drain).await.is_ok() {
            let _ = to.write_all(DRAIN).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = closed => {}
        () = word => {}
    }
}
