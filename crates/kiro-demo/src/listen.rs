//! Who is let in, how long may it take, and how does it end? The listener of a service, in front of its router.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use crate::Service;
use crate::links::Links;

/// Connections served at a time. Only the service's own sidecar connects; further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 1024;

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long a connection may wait for the head of its next request, and so be idle. Well above the four seconds for which
/// a sidecar keeps an idle connection, so that the sidecar closes first and no request is sent into a closing one.
const HEAD: Duration = Duration::from_secs(60);

/// Header block of a request: what the mesh lets through.
const HEADER_BYTES_MAX: usize = 64 * 1024;

/// Header fields of a request: what the mesh lets through.
const HEADER_FIELDS_MAX: usize = 256;

/// How long requests under way may take to end on shutdown: as long as a call of a service to another may take.
const DRAIN: Duration = Duration::from_secs(10);

/// How long accepting rests after it failed for want of a resource (file descriptors, memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `router` until `shutdown`, then lets what is under way end.
pub(crate) async fn serve(
    service: Service,
    listener: TcpListener,
    links: watch::Receiver<Arc<Links>>,
    router: Router,
    shutdown: impl Future<Output = ()>,
) {
    let (closing, closed) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((tcp, remote)) => {
                    let peer = Peer { service, remote };
                    let links = Arc::clone(&links.borrow());
                    connections.spawn(connection(peer, tcp, links, router.clone(), closed.clone()));
                }
                Err(error) => {
                    warn!(service = service.name(), cause = %error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    // Closed at once: who connects now is refused by the kernel and tries elsewhere.
    drop(listener);
    drop(closing);
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN, ended).await.is_err() {
        warn!(service = service.name(), connections = connections.len(), "connections cut off at shutdown");
        connections.shutdown().await;
    }
    info!(service = service.name(), "stopped");
}

/// One connection, for its log lines.
#[derive(Clone, Copy)]
struct Peer {
    service: Service,
    remote: SocketAddr,
}

async fn connection(
    peer: Peer,
    tcp: TcpStream,
    links: Arc<Links>,
    router: Router,
    mut closing: watch::Receiver<()>,
) {
    // Without it small answers wait for the peer's acknowledgement. It can fail only on a socket that is closed already.
    let _ = tcp.set_nodelay(true);
    let Some(acceptor) = &links.acceptor else {
        return requests(peer, tcp, router, closing).await;
    };
    let accepted = tokio::select! {
        accepted = tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp)) => accepted,
        // Nothing is under way on it yet.
        _ = closing.changed() => return,
    };
    match accepted {
        Ok(Ok(tls)) => {
            // Not kept for the connection's life: an old generation's pool would stay with it.
            drop(links);
            requests(peer, tls, router, closing).await;
        }
        Ok(Err(error)) => peer.refused(&error),
        Err(_) => peer.refused(&io::Error::from(io::ErrorKind::TimedOut)),
    }
}

async fn requests<S>(peer: Peer, stream: S, router: Router, mut closing: watch::Receiver<()>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_header_size(HEADER_BYTES_MAX)
        .max_headers(HEADER_FIELDS_MAX);
    let mut served = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        // Nothing is ever sent: the channel ends when the service does.
        _ = closing.changed() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    match ended {
        Ok(()) => {}
        // hyper has answered these by itself (400, 431), and the router never saw them.
        Err(error) if error.is_parse() => peer.malformed(&error),
        Err(error) => {
            debug!(service = peer.service.name(), remote = %peer.remote, cause = %error, "connection ended");
        }
    }
}

impl Peer {
    /// A client that is not the service's own sidecar.
    fn refused(self, error: &io::Error) {
        let service = self.service.name();
        // A connection that closes without a word is somebody who looks whether the port is open.
        if error.kind() == io::ErrorKind::UnexpectedEof {
            debug!(service, remote = %self.remote, "connection closed before its handshake");
            return;
        }
        warn!(
            target: "kiro::certificate",
            service,
            side = "server",
            remote = %self.remote,
            expected = service,
            cause = %error,
            fix = "only this service's own sidecar may call it, over TLS 1.3 with its own leaf",
            "certificate refused"
        );
    }

    fn malformed(self, error: &hyper::Error) {
        warn!(service = self.service.name(), remote = %self.remote, cause = %error, "malformed request refused");
    }
}
