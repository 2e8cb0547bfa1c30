//! How are ports bound and connections accepted?
//!
//! Each worker has a listener of its own for each port (SO_REUSEPORT), so that the kernel spreads connections and workers share
//! nothing. A port is first bound without that option: else a second process of the same user would take half of the traffic in
//! silence.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;

use crate::admission::{Limit, Listener, Place};
use crate::drain::Phase;
use crate::limits;
use crate::metrics::Metrics;
use crate::worker::Worker;

/// Why a port can't be bound.
#[derive(Debug, thiserror::Error)]
#[error("{what}: can't listen on {address}: {error}{fix}")]
pub struct BindError {
    /// What was to listen.
    what: &'static str,
    /// Where.
    address: SocketAddr,
    /// The system's word.
    error: io::Error,
    /// What to do.
    fix: &'static str,
}

impl BindError {
    fn new(what: &'static str, address: SocketAddr, error: io::Error) -> Self {
        #[allow(
            clippy::wildcard_enum_match_arm,
            reason = "the system has many words, and a fix is known for three"
        )]
        let fix = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "; another process has the port: stop it, or give this one another address"
            }
            io::ErrorKind::PermissionDenied => {
                "; ports below 1024 need a privilege that sidecars do without: use a higher one"
            }
            io::ErrorKind::AddrNotAvailable => "; the host has no such address",
            _ => "",
        };
        Self { what, address, error, fix }
    }
}

/// Sockets of one port, one for each worker.
#[derive(Debug)]
pub(crate) struct Bound {
    sockets: Vec<std::net::TcpListener>,
    /// Where they listen; the port is known even where 0 was asked for.
    pub(crate) address: SocketAddr,
}

impl Bound {
    /// Binds a port for `workers` workers.
    pub(crate) fn new(what: &'static str, address: SocketAddr, workers: usize) -> Result<Self, BindError> {
        let fail = |error| BindError::new(what, address, error);
        if address.port() != 0 {
            drop(socket(address, false).map_err(fail)?);
        }
        // Asked for any port, the system gives one that nobody has, and it stays ours from the first socket on.
        let first = socket(address, true).map_err(fail)?;
        let address = first.local_addr().map_err(fail)?;
        let others = (1..workers).map(|_| socket(address, true));
        let sockets = std::iter::once(Ok(first)).chain(others).collect::<io::Result<_>>().map_err(fail)?;
        Ok(Self { sockets, address })
    }

    /// Takes the sockets, one for each worker.
    pub(crate) fn into_sockets(self) -> Vec<std::net::TcpListener> {
        self.sockets
    }
}

fn socket(address: SocketAddr, shared: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Lets a restarted sidecar bind while connections of its predecessor are in TIME_WAIT; it does not let two listen.
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

/// Accepts connections until the sidecar drains (`until`), each in a task of its own.
pub(crate) async fn accept<F>(
    worker: Rc<Worker>,
    (name, listener): (Listener, TcpListener),
    until: Phase,
    serve: impl Fn(Rc<Worker>, TcpStream, Rc<Place>) -> F,
) where
    F: Future<Output = ()> + 'static,
{
    let mut ended = std::pin::pin!(worker.phase.reached(until));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut ended => return,
        };
        let (stream, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or a client that was gone before it was accepted: others still wait.
                accept_failed(&worker.metrics, name, &error);
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let Some(place) = worker.places.take(name, remote).await else { continue };
        let _ = stream.set_nodelay(true);
        notice_dead_peers(&stream);
        // Boxed, or the task would have room for it twice: where it is captured and where it is awaited.
        let served = Box::pin(serve(Rc::clone(&worker), stream, Rc::clone(&place)));
        spawn_local(async move {
            tokio::select! {
                () = served => {}
                () = place.told_to_leave() => {}
            }
        });
    }
}

/// Counts, and says unless it was said often enough, that a connection could not be accepted.
pub(crate) fn accept_failed(metrics: &Metrics, listener: Listener, error: &io::Error) {
    // ENFILE and EMFILE have no kind of their own.
    if matches!(error.raw_os_error(), Some(23 | 24)) {
        metrics.limit_hit(Limit::Descriptors);
    }
    if let Some(suppressed) = metrics.connections(listener).lines.take(Instant::now()) {
        let suppressed = (suppressed > 0).then_some(suppressed);
        tracing::warn!(target: "kiro::listen", listener = listener.as_str(), %error, suppressed, "accept failed");
    }
}

/// Lets the kernel end idle connections whose other end is gone without a word: a cut network, a host that lost power. (Not
/// TCP_USER_TIMEOUT: that would also end those whose other end only does not read for a while.)
pub(crate) fn notice_dead_peers(stream: &TcpStream) {
    let keepalive = TcpKeepalive::new().with_time(limits::KEEPALIVE).with_interval(limits::KEEPALIVE / 3);
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
}
