//! How is a connection to a peer opened, and what can go wrong on the way?

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use kiro_core::mesh::Signatures;
use kiro_core::signature::{ConnectionKey, Signer};
use kiro_tls::HandshakeContext;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};
use tokio::task::spawn_local;

use crate::abuse::{self, Callee};
use crate::admission::Seat;
use crate::frames::FrameTap;
use crate::limits;
use crate::metrics::{Leg, OpenConnection};
use crate::reject::{Refused, Reject};
use crate::state::{Peer, State};
use crate::upstream::pool::Upstream;
use crate::worker::Worker;

/// Opens a connection to a peer's address.
pub(crate) async fn connect(
    worker: &Rc<Worker>,
    state: &State,
    peer: &Peer,
    address: SocketAddr,
    seat: Seat,
) -> Result<Rc<Upstream>, Refused> {
    let stream = tcp(address).await?;
    let tls = kiro_tls::mesh_client(&state.identity.identity, &peer.id)
        .map_err(|error| Refused::new(Reject::UpstreamTls("tls_other"), error.to_string()))?;
    let context = HandshakeContext {
        service: state.me.clone(),
        local: stream.local_addr().ok(),
        remote: Some(address),
        direction: "outbound",
    };
    let Some(handshake) = worker.handshake(Leg::Peer, Box::pin(tls.connect(stream, &context))).await else {
        return Err(Refused::new(
            Reject::UpstreamTls("tls_timeout"),
            format!("no TLS handshake with {address} in time"),
        ));
    };
    let established =
        handshake.map_err(|error| Refused::new(Reject::UpstreamTls(error.code()), error.to_string()))?;
    let signer = match state.signatures {
        Signatures::Off => None,
        Signatures::Required => {
            let Some((keyid, secret)) = state.identity.edges.signing(peer.name.as_str()) else {
                return Err(Refused::new(
                    Reject::EdgeSecretMissing,
                    format!("edges.json has no secret for {} → {}: run `make certs`", state.me, peer.name),
                ));
            };
            let exporter = kiro_tls::exporter(established.stream.get_ref().1).ok_or_else(|| {
                Refused::new(Reject::UpstreamTls("tls_other"), "no exporter for this TLS connection")
            })?;
            Some(RefCell::new(Signer::new(ConnectionKey::derive(secret, &exporter, keyid), keyid.clone())))
        }
    };
    let refusal = Refusal::default();
    let stream = RefusalTap { inner: established.stream, refusal: Rc::clone(&refusal) };
    let metrics = Arc::clone(&worker.metrics);
    let worker = Rc::downgrade(worker);
    let ended = move |upstream: &Rc<Upstream>| {
        if let Some(worker) = worker.upgrade() {
            worker.upstreams.forget(upstream);
        }
    };
    let callee = Callee { service: state.me.clone(), id: Some(peer.id.clone()), address };
    let open = OpenConnection::to_peer(&metrics, seat);
    http2(stream, Http2 { callee, signer, refusal, freed: Rc::default(), open }, ended).await
}

/// What a connection that speaks HTTP/2 has beside its stream.
pub(crate) struct Http2 {
    /// Where it leads, and to whom.
    pub(crate) callee: Callee,
    /// What signs requests on it.
    pub(crate) signer: Option<RefCell<Signer>>,
    /// The other side's refusal of our certificate.
    pub(crate) refusal: Refusal,
    /// Who waits for a stream of it, or of one of its kind, is told by this.
    pub(crate) freed: Rc<Notify>,
    /// That it is counted.
    pub(crate) open: OpenConnection,
}

async fn tcp(address: SocketAddr) -> Result<TcpStream, Refused> {
    match tokio::time::timeout(limits::CONNECT, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => {
            let _ = stream.set_nodelay(true);
            crate::listen::notice_dead_peers(&stream);
            Ok(stream)
        }
        Ok(Err(error)) => Err(Refused::new(Reject::UpstreamConnect, format!("{address}: {error}"))),
        Err(_) => Err(Refused::new(
            Reject::UpstreamConnect,
            format!("{address}: no answer within {} ms", limits::CONNECT.as_millis()),
        )),
    }
}

/// Begins HTTP/2; `ended` learns of the connection's end.
pub(crate) async fn http2<S>(
    stream: S,
    Http2 { callee, signer, refusal, freed, open }: Http2,
    ended: impl FnOnce(&Rc<Upstream>) + 'static,
) -> Result<Rc<Upstream>, Refused>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let address = callee.address;
    let (stream, seen) = FrameTap::client(stream, &limits::PEER_FRAMES);
    let handshake = h2::client::Builder::new()
        .initial_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_header_list_size(limits::PEER_HEADER_LIST_BYTES)
        .max_send_buffer_size(limits::SEND_BUFFER)
        // Until the peer's SETTINGS have come: what any server must be ready for (RFC 9113 6.5.2 recommends at least 100).
        .initial_max_send_streams(100)
        .enable_push(false)
        .handshake::<_, Bytes>(stream);
    let (send, mut connection) = match tokio::time::timeout(limits::HANDSHAKE, handshake).await {
        Ok(Ok(pair)) => pair,
        Ok(Err(error)) => return Err(lost(&error, refusal.get())),
        Err(_) => return Err(Refused::new(Reject::UpstreamReset, format!("{address}: no HTTP/2 in time"))),
    };
    let (held, let_go) = oneshot::channel();
    let upstream = Rc::new(Upstream {
        address,
        send,
        signer,
        in_flight: Cell::new(0),
        waiting: Cell::new(0),
        freed,
        closed: Cell::new(false),
        heard: Cell::new(Instant::now()),
        ping: RefCell::new(connection.ping_pong()),
        asked: Notify::new(),
        refusal,
        metrics: Arc::clone(open.metrics()),
        readers: Rc::default(),
        _held: held,
    });
    let driven = Rc::downgrade(&upstream);
    spawn_local(async move {
        // Requests on the connection learn its end from their streams; here it only has to be forgotten.
        tokio::select! {
            biased;
            _ = std::future::poll_fn(|cx| Pin::new(&mut connection).poll(cx)) => {}
            () = nobody_needs(let_go) => {}
        }
        if let Some(reason) = seen.reason() {
            abuse::report_callee(&open, &callee, reason);
        }
        drop(open);
        let Some(upstream) = driven.upgrade() else { return };
        upstream.closed.set(true);
        upstream.freed.notify_waiters();
        ended(&upstream);
    });
    Ok(upstream)
}

/// Returns when a connection that carries nothing any more, and that nobody will use again, has had its time to end: who does not read
/// what was sent to him would keep it for ever.
async fn nobody_needs(let_go: oneshot::Receiver<()>) {
    // Nothing is sent; the other half is dropped.
    let _ = let_go.await;
    tokio::time::sleep(limits::BODY_IDLE).await;
}

/// What a lost stream or connection means for its request.
pub(crate) fn lost(error: &h2::Error, refusal: Option<&'static str>) -> Refused {
    match refusal {
        Some(code) => Refused::new(
            Reject::UpstreamTls(code),
            "the peer refused our certificate: its own log says why (`certificate refused`)",
        ),
        None => Refused::new(Reject::UpstreamReset, error.to_string()),
    }
}

/// The code of a refusal that was read from the connection. In TLS 1.3 a peer's refusal of our certificate comes after the
/// handshake, as the first thing that is read; h2 keeps no more of it than its text.
pub(crate) type Refusal = Rc<Cell<Option<&'static str>>>;

struct RefusalTap<S> {
    inner: S,
    refusal: Refusal,
}

impl<S: AsyncRead + Unpin> AsyncRead for RefusalTap<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        if let Poll::Ready(Err(error)) = &read
            && let Some(kind) = kiro_tls::classify_io(error)
        {
            self.refusal.set(Some(kind.code()));
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for RefusalTap<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use kiro_core::identity::ServiceName;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::task::LocalSet;

    use super::*;
    use crate::admission::{Admission, Seats};
    use crate::metrics::Metrics;

    async fn over(stream: DuplexStream) -> Rc<Upstream> {
        let metrics = Metrics::of_a_test(1, Admission::shared(1 << 20, 1));
        let service = ServiceName::parse("caller").unwrap();
        let parts = Http2 {
            callee: Callee { service, id: None, address: ([127, 0, 0, 1], 1).into() },
            signer: None,
            refusal: Refusal::default(),
            freed: Rc::default(),
            open: OpenConnection::to_peer(&metrics, Seats::new(1).take().unwrap()),
        };
        http2(stream, parts, |_| {}).await.map_err(|refused| refused.cause).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_callee_that_never_reads_keeps_no_connection_that_nobody_uses() {
        let story = async {
            // Room for the preface and the beginning of what follows.
            let (near, mut far) = tokio::io::duplex(64);
            let upstream = over(near).await;
            tokio::time::sleep(limits::BODY_IDLE * 2).await;
            let begin = tokio::time::Instant::now();
            drop(upstream);
            // Only the end is waited for: reading would make room.
            while far.write_u8(0).await.is_ok() {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            let taken = begin.elapsed();
            assert!(taken >= limits::BODY_IDLE && taken < limits::BODY_IDLE * 2, "{taken:?}");
            far.read_to_end(&mut Vec::new()).await.unwrap();
        };
        let in_time = tokio::time::timeout(limits::BODY_IDLE * 5, LocalSet::new().run_until(story)).await;
        in_time.expect("it ends");
    }
}
