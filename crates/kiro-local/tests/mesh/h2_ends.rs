//! HTTP/2 at either end of the mesh, call by call: a client and an application that see each frame's effect.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::ext::Protocol;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, response};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::support::{PATIENCE, World};

/// Waits for what has to come.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("never: {what}"))
}

/// A connection of a client that speaks HTTP/2.
pub(crate) struct H2Client {
    send: SendRequest<Bytes>,
    driver: JoinHandle<()>,
}

impl Drop for H2Client {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl H2Client {
    /// Connects.
    pub(crate) async fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self::on(stream).await
    }

    /// Connects to a service's outbound proxy, as its application does.
    pub(crate) async fn app_of(world: &World, service: &str) -> Self {
        Self::open(world.addresses(service).outbound).await
    }

    /// Speaks on a connection that stands.
    pub(crate) async fn on<S>(stream: S) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        let driver = tokio::spawn(async move {
            // Calls learn of the end from their streams.
            let _ = connection.await;
        });
        Self { send, driver }
    }

    /// Sends a head; `ends` where no body follows.
    pub(crate) async fn call(&self, request: Request<()>, ends: bool) -> Call {
        let mut sender = soon("room for a stream", self.send.clone().ready()).await.unwrap();
        let (answer, send) = sender.send_request(request, ends).unwrap();
        Call { answer, send }
    }

    /// Sends a request with a body, and waits for its answer's end.
    pub(crate) async fn exchange(&self, request: Request<()>, body: &'static [u8]) -> Whole {
        let mut call = self.call(request, body.is_empty()).await;
        if !body.is_empty() {
            // Head and body go out together.
            call.send.send_data(Bytes::from_static(body), true).unwrap();
        }
        call.whole().await
    }
}

/// One stream of a client.
pub(crate) struct Call {
    pub(crate) answer: ResponseFuture,
    pub(crate) send: SendStream<Bytes>,
}

impl Call {
    /// The next interim answer; none where the answer itself is next.
    pub(crate) async fn interim(&mut self) -> Option<Response<()>> {
        soon("an answer", poll_fn(|cx| self.answer.poll_informational(cx))).await.map(Result::unwrap)
    }

    /// The answer's head, and what comes behind it.
    pub(crate) async fn head(self) -> (response::Parts, RecvStream, SendStream<Bytes>) {
        let (head, recv) = soon("a head", self.answer).await.unwrap().into_parts();
        (head, recv, self.send)
    }

    /// The answer to its end.
    pub(crate) async fn whole(self) -> Whole {
        let (head, mut recv, _send) = self.head().await;
        let (body, trailers) = read_all(&mut recv).await.unwrap();
        Whole { head, body, trailers }
    }
}

/// An answer to its end.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) head: response::Parts,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
}

impl Whole {
    /// Status and reject code.
    pub(crate) fn verdict(&self) -> (u16, Option<&str>) {
        (self.head.status.as_u16(), self.field("x-kiro-reject"))
    }

    /// A field of the head.
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.head.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// A field of the trailers.
    pub(crate) fn trailer(&self, name: &str) -> Option<&str> {
        self.trailers.as_ref()?.get(name).map(|value| value.to_str().unwrap())
    }
}

/// A request's head.
pub(crate) fn request(method: Method, uri: &str, fields: &[(&'static str, &str)]) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = uri.parse().unwrap();
    *request.headers_mut() = fields_of(fields);
    request
}

/// The head of an extended CONNECT.
pub(crate) fn connect(protocol: &'static str, uri: &str, fields: &[(&'static str, &str)]) -> Request<()> {
    let mut request = request(Method::CONNECT, uri, fields);
    request.extensions_mut().insert(Protocol::from_static(protocol));
    request
}

/// Fields as a map.
pub(crate) fn fields_of(fields: &[(&'static str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in fields {
        headers.append(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
    }
    headers
}

/// Sends data as fast as the other side takes it.
pub(crate) async fn send_all(
    stream: &mut SendStream<Bytes>,
    mut data: Bytes,
    ends: bool,
) -> Result<(), h2::Error> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let capacity = match soon("capacity", poll_fn(|cx| stream.poll_capacity(cx))).await {
            Some(granted) => granted?,
            None => return Err(Reason::CANCEL.into()),
        };
        let piece = data.split_to(capacity.min(data.len()));
        let last = ends && data.is_empty();
        stream.send_data(piece, last)?;
    }
    Ok(())
}

/// Reads to the end.
pub(crate) async fn read_all(recv: &mut RecvStream) -> Result<(Bytes, Option<HeaderMap>), h2::Error> {
    let mut body = BytesMut::new();
    while let Some(piece) = soon("data", recv.data()).await {
        let piece = piece?;
        recv.flow_control().release_capacity(piece.len())?;
        body.extend_from_slice(&piece);
    }
    Ok((body.freeze(), soon("trailers", recv.trailers()).await?))
}

/// Reads exactly so many bytes, which may come in several frames.
pub(crate) async fn read_exact(recv: &mut RecvStream, count: usize) -> Bytes {
    let mut body = BytesMut::new();
    while body.len() < count {
        let piece = soon("data", recv.data()).await.expect("not the end yet").unwrap();
        recv.flow_control().release_capacity(piece.len()).unwrap();
        body.extend_from_slice(&piece);
    }
    assert_eq!(body.len(), count, "no more than that: {body:?}");
    body.freeze()
}

/// Waits until the other side resets a stream.
pub(crate) async fn reset(send: &mut SendStream<Bytes>) -> Reason {
    soon("a reset", poll_fn(|cx| send.poll_reset(cx))).await.unwrap()
}

/// An application that speaks HTTP/2.
pub(crate) struct H2App {
    task: JoinHandle<()>,
    connections: Arc<AtomicUsize>,
}

impl Drop for H2App {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How an application is to answer one stream.
pub(crate) type Answerer = SendResponse<Bytes>;

impl H2App {
    /// Puts an application behind a sidecar.
    pub(crate) async fn start<F, R>(world: &World, service: &str, handler: F) -> Self
    where
        F: Fn(Request<RecvStream>, Answerer) -> R + Clone + Send + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let mut builder = h2::server::Builder::new();
        builder.enable_connect_protocol();
        Self::with(world.listen(service).await, builder, handler)
    }

    /// The same, with settings of its own.
    pub(crate) fn with<F, R>(listener: TcpListener, builder: h2::server::Builder, handler: F) -> Self
    where
        F: Fn(Request<RecvStream>, Answerer) -> R + Clone + Send + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serve(stream, builder.clone(), handler.clone()));
            }
        });
        Self { task, connections }
    }

    /// Connections so far.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// Serves one connection of an application that speaks HTTP/2.
pub(crate) async fn serve<S, F, R>(stream: S, builder: h2::server::Builder, handler: F)
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Fn(Request<RecvStream>, Answerer) -> R,
    R: Future<Output = ()> + Send + 'static,
{
    let Ok(mut connection) = builder.handshake::<_, Bytes>(stream).await else { return };
    while let Some(Ok((request, respond))) = connection.accept().await {
        tokio::spawn(handler(request, respond));
    }
}

/// Answers a head; the body follows.
pub(crate) fn answer(
    respond: &mut Answerer,
    status: u16,
    fields: &[(&'static str, &str)],
    ends: bool,
) -> SendStream<Bytes> {
    let mut response = Response::new(());
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap();
    *response.headers_mut() = fields_of(fields);
    respond.send_response(response, ends).unwrap()
}

/// A stream as bytes both ways. An end is an end, a reset is one as well.
pub(crate) fn bytes_of(mut recv: RecvStream, mut send: SendStream<Bytes>) -> DuplexStream {
    let (ours, theirs) = tokio::io::duplex(16 * 1024);
    let (mut read, mut write) = tokio::io::split(ours);
    tokio::spawn(async move {
        while let Some(Ok(piece)) = recv.data().await {
            if write.write_all(&piece).await.is_err()
                || recv.flow_control().release_capacity(piece.len()).is_err()
            {
                return;
            }
        }
        let _ = write.shutdown().await;
    });
    tokio::spawn(async move {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(count) = read.read(&mut buffer).await {
            if send_all(&mut send, Bytes::copy_from_slice(&buffer[..count]), false).await.is_err() {
                return;
            }
            if count == 0 {
                let _ = send.send_data(Bytes::new(), true);
                return;
            }
        }
    });
    theirs
}
