//! How do bytes flow after CONNECT or a WebSocket handshake, and how is such a stream cut when the policy changes?
//!
//! Between sidecars both are HTTP/2 streams (CONNECT, and extended CONNECT by RFC 8441). Each open one is registered with what it
//! was allowed for; a new policy judges all of them again and resets those that it no longer allows.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Response};
use kiro_core::policy::{Call, CallKind, Caller, Verdict};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::app::{self, AppStream};
use crate::drain::Phase;
use crate::exchange::{Direction, Exchange, Progress};
use crate::flow::{self, Broke};
use crate::metrics::OpenConnection;
use crate::proof::Trusted;
use crate::reject::{Refused, Reject};
use crate::state::Snapshot;
use crate::worker::Worker;

/// What a tunnel was allowed for, to be judged again.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    /// The listener that it came by.
    pub(crate) direction: Direction,
    /// The service at the other end; absent for an ingress client.
    pub(crate) peer: Option<Box<str>>,
    /// The method as the policy sees it.
    pub(crate) method: Box<str>,
    /// The raw path.
    pub(crate) path: Box<str>,
    /// Whether the path is ambiguous.
    pub(crate) ambiguous: bool,
    /// CONNECT, or a request that was upgraded.
    pub(crate) kind: CallKind,
}

impl Claim {
    fn judge(&self, state: &Snapshot) -> Verdict {
        let call =
            Call { method: &self.method, path: &self.path, ambiguous: self.ambiguous, kind: self.kind };
        match (self.direction, self.peer.as_deref()) {
            (Direction::Outbound, peer) => state.policy.authorize_outbound(peer.unwrap_or_default(), &call),
            (_, Some(peer)) => state.policy.authorize_inbound(Caller::Service(peer), &call),
            (_, None) => state.policy.authorize_inbound(Caller::Ingress, &call),
        }
    }
}

type Register = Rc<RefCell<HashMap<u64, (Claim, Rc<Notify>)>>>;

/// The open tunnels of a worker.
pub(crate) struct Tunnels {
    open: Register,
    next: Cell<u64>,
    /// What their sockets are read into, one system call at a time.
    lent: RefCell<BytesMut>,
}

/// A tunnel's place in the register, left when it is dropped.
pub(crate) struct Registered {
    key: u64,
    open: Register,
    cut: Rc<Notify>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.open.borrow_mut().remove(&self.key);
    }
}

impl Tunnels {
    /// An empty register.
    pub(crate) fn new() -> Self {
        Self { open: Rc::default(), next: Cell::new(0), lent: RefCell::default() }
    }

    /// Registers a tunnel and judges it under the state of this moment, which may be newer than its request's: registering
    /// comes first, so that no change slips between.
    pub(crate) fn register(&self, claim: Claim, now: &Snapshot) -> Result<Registered, Refused> {
        let verdict = claim.judge(now);
        let key = self.next.get();
        self.next.set(key.wrapping_add(1));
        let cut = Rc::new(Notify::new());
        self.open.borrow_mut().insert(key, (claim, Rc::clone(&cut)));
        let registered = Registered { key, open: Rc::clone(&self.open), cut };
        match verdict {
            Verdict::Allowed | Verdict::Audited(_) => Ok(registered),
            Verdict::Denied(denial) => Err(Reject::Denied(denial).into()),
        }
    }

    /// Whether none is open.
    pub(crate) fn is_empty(&self) -> bool {
        self.open.borrow().is_empty()
    }

    /// Cuts what a new state no longer allows.
    pub(crate) fn judge_again(&self, state: &Snapshot) {
        for (claim, cut) in self.open.borrow().values() {
            if let Verdict::Denied(denial) = claim.judge(state) {
                tracing::warn!(
                    target: "kiro::policy", service = %state.me, direction = claim.direction.as_str(),
                    peer = claim.peer.as_deref().unwrap_or("ingress"), denial = denial.code(),
                    "open stream is no longer allowed and is cut"
                );
                cut.notify_one();
            }
        }
    }
}

/// Why a tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Both sides were done.
    Finished,
    /// One side failed.
    Broken(Broke),
    /// The policy no longer allows it.
    Cut,
    /// The sidecar ends.
    Stopped,
}

/// A tunnel that the application has accepted.
pub(crate) struct Accepted {
    io: Io,
    recv: RecvStream,
    answer: Response<()>,
    registered: Registered,
}

enum Io {
    Tcp(TcpStream, OpenConnection),
    WebSocket(AppStream),
}

/// Connects a trusted CONNECT to the application's port: the declared one, whatever port was asked.
pub(crate) async fn to_app(
    worker: &Rc<Worker>,
    trusted: Trusted<RecvStream>,
    exchange: &mut Exchange,
) -> Result<Accepted, Refused> {
    let claim = trusted.claim(exchange);
    let (_, recv, _) = trusted.take_body();
    let registered = worker.tunnels.register(claim, &worker.snapshot())?;
    let state = Rc::clone(exchange.state());
    exchange.upstream(app::address(worker, &state));
    exchange.attempt();
    let (stream, open) = app::tcp(worker, &state).await?;
    Ok(Accepted { io: Io::Tcp(stream, open), recv, answer: Response::new(()), registered })
}

/// Registers a WebSocket that the application has opened. Extended CONNECT answers 200, whatever the application's HTTP has for it
/// (RFC 8441 5).
pub(crate) fn opened(
    worker: &Rc<Worker>,
    headers: HeaderMap,
    app: AppStream,
    recv: RecvStream,
    claim: Claim,
) -> Result<Accepted, Refused> {
    let registered = worker.tunnels.register(claim, &worker.snapshot())?;
    let mut answer = Response::new(());
    *answer.headers_mut() = headers;
    Ok(Accepted { io: Io::WebSocket(app), recv, answer, registered })
}

/// Runs an accepted tunnel of the inbound listener until it ends.
pub(crate) async fn inbound(
    worker: &Rc<Worker>,
    accepted: Accepted,
    mut respond: SendResponse<Bytes>,
    mut exchange: Exchange,
) {
    exchange.status(accepted.answer.status());
    let Ok(send) = respond.send_response(accepted.answer, false) else { return };
    let streams = (accepted.recv, send);
    match accepted.io {
        Io::Tcp(io, _open) => join_tcp(worker, io, streams, &accepted.registered, exchange).await,
        Io::WebSocket(io) => join(worker, io, streams, &accepted.registered, exchange).await,
    }
}

/// Moves bytes between a connection and an HTTP/2 stream, both ways, until both have ended or the tunnel is cut.
///
/// An end that is none of the two sides' own reaches both as a reset: neither must take it for the other's word that all was said.
pub(crate) async fn join_tcp(
    worker: &Rc<Worker>,
    mut stream: TcpStream,
    streams: (RecvStream, SendStream<Bytes>),
    registered: &Registered,
    exchange: Exchange,
) {
    if both_ways(worker, stream.split(), streams, registered, exchange).await != End::Finished {
        reset(stream);
    }
}

/// The same for a connection that spoke HTTP before.
pub(crate) async fn join<IO>(
    worker: &Rc<Worker>,
    io: IO,
    streams: (RecvStream, SendStream<Bytes>),
    registered: &Registered,
    exchange: Exchange,
) where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    both_ways(worker, tokio::io::split(io), streams, registered, exchange).await;
}

async fn both_ways<R, W>(
    worker: &Rc<Worker>,
    (read, write): (R, W),
    (recv, mut send): (RecvStream, SendStream<Bytes>),
    registered: &Registered,
    mut exchange: Exchange,
) -> End
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (from_stream, to_stream) = (Progress::new(), Progress::new());
    let outward = exchange.is_outbound();
    exchange.request_body(Rc::clone(if outward { &to_stream } else { &from_stream }));
    let down = flow::stream_to_io(recv, write, &from_stream);
    let up = flow::io_to_stream(read, &mut send, &worker.tunnels.lent, &to_stream);
    let end = until_cut(worker, flow::both_halves(down, &from_stream, up, &to_stream), registered).await;
    if end != End::Finished {
        send.send_reset(Reason::CANCEL);
    }
    let answered = if outward { &from_stream } else { &to_stream };
    exchange.response_bytes(usize::try_from(answered.bytes.get()).unwrap_or(usize::MAX));
    exchange.ended(match end {
        End::Broken(Broke::Io) if outward => "client_reset",
        End::Broken(Broke::Io) => "app_reset",
        End::Broken(Broke::Stream) => "peer_reset",
        End::Broken(Broke::Idle) => "idle",
        End::Finished => "finished",
        End::Cut => "cut",
        End::Stopped => "stopped",
    });
    end
}

/// Ends a connection so that its other end can't take it for an end that was meant.
pub(crate) fn reset(stream: TcpStream) {
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    drop(stream);
}

/// Moves bytes between two byte streams: an ingress client and the application.
pub(crate) async fn join_bytes<A, B>(
    worker: &Rc<Worker>,
    client: A,
    app: B,
    registered: &Registered,
    mut exchange: Exchange,
) where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (from_client, from_app) = (Progress::new(), Progress::new());
    exchange.request_body(Rc::clone(&from_client));
    let ((client_read, client_write), (app_read, app_write)) =
        (tokio::io::split(client), tokio::io::split(app));
    let up = flow::io_to_io(client_read, app_write, &from_client);
    let down = flow::io_to_io(app_read, client_write, &from_app);
    let both = flow::both_halves(up, &from_client, down, &from_app);
    let end = until_cut(worker, both, registered).await;
    exchange.response_bytes(usize::try_from(from_app.bytes.get()).unwrap_or(usize::MAX));
    exchange.ended(match end {
        End::Broken(Broke::Idle) => "idle",
        End::Broken(Broke::Io | Broke::Stream) => "reset",
        End::Finished => "finished",
        End::Cut => "cut",
        End::Stopped => "stopped",
    });
}

async fn until_cut(
    worker: &Rc<Worker>,
    both: impl Future<Output = Result<(), Broke>>,
    registered: &Registered,
) -> End {
    tokio::select! {
        ended = both => ended.map_or_else(End::Broken, |()| End::Finished),
        () = registered.cut.notified() => End::Cut,
        () = worker.phase.reached(Phase::Stopped) => End::Stopped,
    }
}
