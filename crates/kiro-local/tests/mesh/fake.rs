//! Something at a callee's endpoint that is not its sidecar, and does as it likes.

use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderMap, HeaderValue, Request, Response, request};
use rustls::{HandshakeKind, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

/// What a [`Fake`] does with a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) enum OnConnection {
    /// Serves HTTP/2 on it.
    Serve,
    /// Reads the first request, and goes away saying that it has processed streams up to this one.
    GoAway { last: u8 },
    /// Closes it once this many requests have been answered.
    ServeOnly(usize),
    /// Answers one request and then neither reads nor writes nor closes, like a pod that died with its network.
    FallSilent,
}

/// What a [`Fake`] does with a request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum OnRequest {
    /// Reads it and answers 200.
    Serve,
    /// Refuses its stream.
    Refuse,
}

/// What a [`Fake`] does, by how many have come before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Script {
    pub(crate) connection: fn(usize) -> OnConnection,
    pub(crate) request: fn(usize) -> OnRequest,
}

/// Serves whatever comes.
pub(crate) const OBEDIENT: Script =
    Script { connection: |_| OnConnection::Serve, request: |_| OnRequest::Serve };

/// One request as a [`Fake`] got it.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) head: request::Parts,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
}

/// Something at a callee's endpoint that is not its sidecar.
pub(crate) struct Fake {
    shared: Arc<FakeState>,
    task: JoinHandle<()>,
}

struct FakeState {
    config: Option<Arc<ServerConfig>>,
    script: Script,
    connections: AtomicUsize,
    handshakes: Mutex<Vec<HandshakeKind>>,
    heads: AtomicUsize,
    arrived: Mutex<Vec<Arrived>>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A place for a [`Fake`], and the mesh file's entry of a service that is to be there.
pub(crate) fn place() -> (StdListener, SocketAddr, &'static str) {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let entry = format!("app: {{ port: {{port}} }}, endpoints: [\"{address}\"]");
    (listener, address, Box::leak(entry.into_boxed_str()))
}

impl Fake {
    /// Stands at a place; without a configuration it speaks plain HTTP/1.1.
    pub(crate) fn start(listener: StdListener, config: Option<ServerConfig>, script: Script) -> Self {
        let shared = Arc::new(FakeState {
            config: config.map(Arc::new),
            script,
            connections: AtomicUsize::new(0),
            handshakes: Mutex::default(),
            heads: AtomicUsize::new(0),
            arrived: Mutex::default(),
        });
        let listener = TcpListener::from_std(listener).unwrap();
        let state = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let place = state.connections.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serve(Arc::clone(&state), stream, (state.script.connection)(place)));
            }
        });
        Self { shared, task }
    }

    /// Connections so far.
    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// The handshakes that succeeded.
    pub(crate) fn handshakes(&self) -> Vec<HandshakeKind> {
        self.shared.handshakes.lock().unwrap().clone()
    }

    /// Heads that came, served or not.
    pub(crate) fn heads(&self) -> usize {
        self.shared.heads.load(Ordering::SeqCst)
    }

    /// Takes what was served.
    pub(crate) fn take(&self) -> Vec<Arrived> {
        std::mem::take(&mut self.shared.arrived.lock().unwrap())
    }
}

async fn serve(state: Arc<FakeState>, stream: TcpStream, act: OnConnection) {
    let Some(config) = &state.config else { return plain(stream).await };
    let Ok(stream) = TlsAcceptor::from(Arc::clone(config)).accept(stream).await else { return };
    state.handshakes.lock().unwrap().push(stream.get_ref().1.handshake_kind().unwrap());
    match act {
        OnConnection::Serve => http2(state, stream, usize::MAX).await,
        OnConnection::ServeOnly(count) => http2(state, stream, count).await,
        OnConnection::FallSilent => fall_silent(state, stream).await,
        OnConnection::GoAway { last } => go_away(&state, stream, last).await,
    }
}

async fn plain(mut stream: TcpStream) {
    let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await;
    let _ = stream.shutdown().await;
    let _ = stream.read_to_end(&mut Vec::new()).await;
}

async fn http2<S>(state: Arc<FakeState>, stream: S, count: usize)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    let mut accepted = 0;
    while let Some(Ok((request, respond))) = connection.accept().await {
        let place = state.heads.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(answer(Arc::clone(&state), (state.script.request)(place), request, respond));
        accepted += 1;
        if accepted == count {
            connection.graceful_shutdown();
        }
    }
}

async fn fall_silent<S>(state: Arc<FakeState>, stream: S)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    let Some(Ok((request, respond))) = connection.accept().await else { return };
    let place = state.heads.fetch_add(1, Ordering::SeqCst);
    let answered = answer(Arc::clone(&state), (state.script.request)(place), request, respond);
    tokio::select! {
        () = async { answered.await; tokio::task::yield_now().await; } => {}
        _ = connection.accept() => {}
    }
    // The answer is written; from here on the connection is held and nobody looks at it.
    let _ = tokio::time::timeout(std::time::Duration::from_millis(100), connection.accept()).await;
    std::future::pending::<()>().await;
}

async fn answer(
    state: Arc<FakeState>,
    act: OnRequest,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    if matches!(act, OnRequest::Refuse) {
        respond.send_reset(Reason::REFUSED_STREAM);
        return;
    }
    let (head, mut recv) = request.into_parts();
    let mut body = BytesMut::new();
    while let Some(Ok(piece)) = recv.data().await {
        let _ = recv.flow_control().release_capacity(piece.len());
        body.extend_from_slice(&piece);
    }
    let trailers = recv.trailers().await.unwrap_or_default();
    state.arrived.lock().unwrap().push(Arrived { head, body: body.freeze(), trailers });
    let mut response = Response::new(());
    response.headers_mut().insert("x-fake", HeaderValue::from_static("yes"));
    let _ = respond.send_response(response, true);
}

/// HTTP/2 by hand, since the library's server names the streams itself that it has processed.
async fn go_away<S>(state: &FakeState, mut stream: S, last: u8)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    const PREFACE: usize = 24;
    const HEADERS: u8 = 1;
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let go_away = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, last, 0, 0, 0, 0];
    let talk = async {
        stream.read_exact(&mut [0; PREFACE]).await?;
        stream.write_all(&settings).await?;
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            stream.read_exact(&mut vec![0; length]).await?;
            if head[3] == HEADERS {
                state.heads.fetch_add(1, Ordering::SeqCst);
                break;
            }
        }
        stream.write_all(&go_away).await?;
        stream.shutdown().await?;
        stream.read_to_end(&mut Vec::new()).await
    };
    let _ = talk.await;
}
