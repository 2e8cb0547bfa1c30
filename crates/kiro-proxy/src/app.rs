//! How does a trusted request reach the application beside the sidecar?
//!
//! On loopback, by mutual TLS where the mesh file says so, in the HTTP that the mesh file says: [`http1`] or [`http2`].

mod answer;
pub(crate) mod http1;
mod http2;

use std::cell::RefCell;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use kiro_core::mesh::{Protocol, Timeout};
use kiro_tls::HandshakeContext;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

pub(crate) use self::answer::AppAnswer;
use self::http1::{AppPool, Sending};
use self::http2::AppConnections;
use crate::admission::{Limit, Seat, Seats};
use crate::body::AppBody;
use crate::exchange::{Exchange, Progress};
use crate::h2_io::H2Io;
use crate::header_size;
use crate::headers::{self, Kind};
use crate::interim::Interim;
use crate::limits;
use crate::metrics::{Leg, Metrics, OpenConnection};
use crate::proof::Trusted;
use crate::reject::{Refused, Reject};
use crate::spans;
use crate::state::State;
use crate::trailers;
use crate::upstream::pool::Slot;
use crate::worker::Worker;

/// One worker's connections to the application.
pub(crate) struct App {
    pub(crate) http1: AppPool,
    pub(crate) http2: AppConnections,
    /// All of them, tunnels included.
    seats: Arc<Seats>,
}

impl App {
    /// No connection yet, and never more than `bound`.
    pub(crate) fn new(bound: usize) -> Self {
        let seats = Seats::new(bound);
        Self { http1: AppPool::new(&seats), http2: AppConnections::new(), seats }
    }

    /// What `find` has at once, or within a moment; nobody overtakes those who wait.
    async fn within_bound<T>(
        &self,
        metrics: &Metrics,
        mut find: impl FnMut() -> Option<T>,
    ) -> Result<T, Refused> {
        let waiting = self.seats.waiting();
        if waiting == 0
            && let Some(found) = find()
        {
            return Ok(found);
        }
        metrics.limit_hit(Limit::AppConnections);
        let all = self.seats.bound;
        if waiting >= limits::STREAM_WAITERS {
            let cause =
                format!("all {all} connections to the application are in use, and {waiting} wait for one");
            return Err(Refused::new(Reject::QueueFull, cause));
        }
        let found = tokio::time::timeout(limits::APP_WAIT, self.seats.wait_for(find)).await;
        found.map_err(|_| {
            let wait = limits::APP_WAIT.as_millis();
            let cause = format!("all {all} connections to the application were in use for {wait} ms");
            Refused::new(Reject::QueueFull, cause)
        })
    }

    /// Lets all idle connections go, and those in use after their answers: the identity has changed.
    pub(crate) fn forget_all(&self) {
        self.http1.forget_all();
        self.http2.forget_all();
    }
}

/// The address of the application.
pub(crate) fn address(worker: &Worker, state: &State) -> SocketAddr {
    SocketAddr::new(worker.settings.app_host, state.service.app.port)
}

/// A request that is dressed for the application, and what its body has to prove on the way.
pub(crate) struct Outgoing {
    request: Request<AppBody>,
    progress: Option<Rc<Progress>>,
    broken: Broken,
    upgrade: bool,
}

/// Set when a streamed body breaks off by its sender's doing, or its signature turns out not to hold: that, and not what the
/// application's connection comes to, is why its request fails.
pub(crate) type Broken = Rc<RefCell<Option<Refused>>>;

/// Dresses what [`crate::proof`] trusts for the application. There is no other way to an [`Outgoing`].
pub(crate) fn dress(
    trusted: Trusted<AppBody>,
    exchange: &mut Exchange,
    caller: &HeaderValue,
    progress: Option<Rc<Progress>>,
    broken: Broken,
) -> Result<Outgoing, Refused> {
    let (mut head, body, kind) = trusted.into_parts();
    let state = Rc::clone(exchange.state());
    exchange.take_deadline(&mut head, &state.service.traffic)?;
    match state.service.app.protocol {
        Protocol::H2 | Protocol::Grpc => {
            header_size::check(&head.headers, limits::APP_H2_HEADER_BYTES)?;
            frame_h2(&mut head.headers, &body);
            headers::for_h2_app(&mut head, kind, caller, &state.me, state.app_client.is_some())?;
        }
        Protocol::Http1 | Protocol::Tcp => {
            frame(&mut head.headers, &body);
            headers::for_app(&mut head, kind, caller, &state.me_value);
        }
    }
    spans::propagate(&exchange.worker().tracing, exchange.trace(), &mut head.headers);
    exchange.tell_deadline(&mut head.headers);
    if let Some(progress) = &progress {
        exchange.request_body(Rc::clone(progress));
    }
    let upgrade = kind == Kind::WebSocket;
    Ok(Outgoing { request: Request::from_parts(head, body), progress, broken, upgrade })
}

/// Frames a request by the body that it has, whatever its caller said: the HTTP library writes a Content-Length as it finds it,
/// even where no body follows, and leaves a body without a length out of GET and HEAD.
fn frame(headers: &mut HeaderMap, body: &AppBody) {
    headers.remove(TRANSFER_ENCODING);
    match body {
        // `Content-Length: 0` is true, and some servers ask for it.
        AppBody::Empty => {
            if headers.remove(CONTENT_LENGTH).is_some_and(|length| length == "0") {
                headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
            }
        }
        AppBody::Full(bytes) => {
            let length = bytes.as_ref().map_or(0, |bytes| bytes.len());
            headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        // A length that came with a stream holds: both HTTP libraries break the stream off where it does not. It is written once, and
        // as a plain number, whatever it came as.
        AppBody::Plain(_)
        | AppBody::Verified(_)
        | AppBody::Client(_)
        | AppBody::Gated(..)
        | AppBody::Http1(..) => {
            match length(headers) {
                Some(length) if length > 0 => {
                    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
                }
                // A stream that is to bring nothing has not ended yet, and the head would say that it has.
                Some(_) | None => {
                    headers.remove(CONTENT_LENGTH);
                    headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
                }
            }
        }
    }
}

/// The length that all Content-Length fields agree on.
pub(crate) fn length(headers: &HeaderMap) -> Option<u64> {
    let digits = |value: &HeaderValue| {
        let text = value.to_str().ok()?;
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok())?
    };
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter().map(digits);
    let first = lengths.next()??;
    lengths.all(|length| length == Some(first)).then_some(first)
}

/// In HTTP/2 the stream frames a body; a length that is passed on holds as well, and none is made up.
fn frame_h2(headers: &mut HeaderMap, body: &AppBody) {
    let told = headers.contains_key(CONTENT_LENGTH);
    frame(headers, body);
    headers.remove(TRANSFER_ENCODING);
    if !told {
        headers.remove(CONTENT_LENGTH);
    }
}

/// Sends a request to the application and returns its answer, which holds the connection that it comes on.
pub(crate) async fn send(
    worker: &Rc<Worker>,
    mut outgoing: Outgoing,
    exchange: &mut Exchange,
    interim: &Interim<'_>,
) -> Result<Response<AppAnswer>, Refused> {
    outgoing.enter(exchange).await?;
    let state = Rc::clone(exchange.state());
    let sending = outgoing.sending(worker, exchange, interim);
    let answered = match state.service.app.protocol {
        Protocol::H2 | Protocol::Grpc => http2::send(worker, sending).await.map(|answered| {
            let http2::Answered { response, slot, upload, .. } = answered;
            response.map(|recv| AppAnswer::http2(recv, slot, upload))
        }),
        Protocol::Http1 | Protocol::Tcp => http1::send(worker, &state, sending)
            .await
            .map(|(response, connection)| response.map(|incoming| AppAnswer::http1(incoming, connection))),
    };
    match &answered {
        Ok(response) => exchange.app_answers(response.status(), response.headers()),
        Err(refused) => exchange.app_failed(refused.reject),
    }
    answered
}

/// Refuses an answer like any other that a stream can't carry: where a handshake came by HTTP/2, a 2xx means that the stream is open
/// (RFC 8441 5).
pub(crate) fn not_opened(answer: &Response<AppAnswer>) -> Result<(), Refused> {
    let status = answer.status();
    if status.is_success() {
        return Err(Refused::new(Reject::AppNoUpgrade, format!("the application answered {status}")));
    }
    Ok(())
}

/// What an application made of a WebSocket handshake.
pub(crate) enum Handshake {
    /// Bytes from here on; the head says with which subprotocol and extensions.
    Open(HeaderMap, AppStream),
    /// An answer like any other.
    Answered(Response<AppAnswer>),
}

/// Sends a WebSocket handshake to the application.
pub(crate) async fn websocket(
    worker: &Rc<Worker>,
    mut outgoing: Outgoing,
    exchange: &mut Exchange,
) -> Result<Handshake, Refused> {
    outgoing.enter(exchange).await?;
    let mut answered = shake_hands(worker, outgoing, exchange).await;
    match &mut answered {
        Ok(Handshake::Open(headers, _)) => {
            exchange.app_upgraded();
            exchange.tell_rates(headers);
        }
        Ok(Handshake::Answered(response)) => exchange.app_answers(response.status(), response.headers()),
        Err(refused) => exchange.app_failed(refused.reject),
    }
    answered
}

async fn shake_hands(
    worker: &Rc<Worker>,
    outgoing: Outgoing,
    exchange: &mut Exchange,
) -> Result<Handshake, Refused> {
    let state = Rc::clone(exchange.state());
    let interim = Interim::unwanted();
    let sending = outgoing.sending(worker, exchange, &interim);
    match state.service.app.protocol {
        Protocol::H2 | Protocol::Grpc => {
            let answered = http2::send(worker, sending).await?;
            let http2::Answered { response, slot, upload, send } = answered;
            match (response.status().is_success(), send) {
                (true, Some(send)) => {
                    let (head, recv) = response.into_parts();
                    Ok(Handshake::Open(
                        head.headers,
                        AppStream::Http2 { io: H2Io::new(recv, send), _slot: slot },
                    ))
                }
                _ => Ok(Handshake::Answered(response.map(|recv| AppAnswer::http2(recv, slot, upload)))),
            }
        }
        Protocol::Http1 | Protocol::Tcp => {
            let (mut response, connection) = http1::send(worker, &state, sending).await?;
            match response.status() {
                StatusCode::SWITCHING_PROTOCOLS => {
                    let stream = http1::upgraded(&mut response).await?;
                    Ok(Handshake::Open(response.into_parts().0.headers, stream))
                }
                _ => Ok(Handshake::Answered(response.map(|body| AppAnswer::http1(body, connection)))),
            }
        }
    }
}

impl Outgoing {
    /// Waits until the application has room for one more request, where it is declared how many it has.
    async fn enter(&mut self, exchange: &mut Exchange) -> Result<(), Refused> {
        let Some(limit) = &exchange.state().concurrency else { return Ok(()) };
        let limit = Arc::clone(limit);
        // Boxed, so that a request without a limit has no room for it in its task.
        exchange.entered(Box::pin(limit.enter(exchange.time_left())).await?);
        // There may be less of it now.
        exchange.tell_deadline(self.request.headers_mut());
        Ok(())
    }

    fn sending<'a>(self, worker: &Worker, exchange: &mut Exchange, interim: &'a Interim<'a>) -> Sending<'a> {
        exchange.upstream(address(worker, exchange.state()));
        exchange.attempt();
        let timeout = exchange.time_left();
        let Outgoing { request, progress, broken, upgrade } = self;
        let pace = exchange.request_pace();
        Sending { request, progress, broken, upgrade, timeout, pace, interim }
    }
}

/// Bytes from and to the application after a WebSocket handshake.
pub(crate) enum AppStream {
    /// A connection of its own.
    Upgraded(Box<TokioIo<Upgraded>>),
    /// One stream of many.
    Http2 {
        /// The bytes.
        io: H2Io,
        /// Its place among the streams.
        _slot: Slot,
    },
}

impl AsyncRead for AppStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            AppStream::Upgraded(io) => Pin::new(io).poll_read(cx, buf),
            AppStream::Http2 { io, .. } => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for AppStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            AppStream::Upgraded(io) => Pin::new(io).poll_write(cx, buf),
            AppStream::Http2 { io, .. } => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            AppStream::Upgraded(io) => Pin::new(io).poll_flush(cx),
            AppStream::Http2 { io, .. } => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            AppStream::Upgraded(io) => Pin::new(io).poll_shutdown(cx),
            AppStream::Http2 { io, .. } => Pin::new(io).poll_shutdown(cx),
        }
    }
}

/// An application's answer shares a connection between sidecars with those to others.
fn answer_fits(headers: &HeaderMap) -> Result<(), Refused> {
    header_size::check(headers, limits::HEADER_BYTES)
        .map_err(|refused| Refused::new(Reject::AppReset, format!("an answer with {}", refused.cause)))
}

/// What a future has at once, if it has it.
pub(crate) async fn at_once<F: Future>(mut future: Pin<&mut F>) -> Option<F::Output> {
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// Waits for an answer's head. The time counts from the last byte of the request that moved, so that a long upload is not cut.
pub(crate) async fn within<F: Future>(
    timeout: Timeout,
    progress: Option<&Progress>,
    answer: F,
) -> Option<F::Output> {
    let Timeout::After(limit) = timeout else { return Some(answer.await) };
    let mut answer = std::pin::pin!(answer);
    let mut deadline = tokio::time::Instant::now() + limit;
    loop {
        match tokio::time::timeout_at(deadline, &mut answer).await {
            Ok(output) => return Some(output),
            Err(_) => {
                let moved =
                    progress.map(|progress| tokio::time::Instant::from_std(progress.last.get()) + limit);
                match moved {
                    Some(later) if later > deadline => deadline = later,
                    _ => return None,
                }
            }
        }
    }
}

/// Opens a TCP connection to the application, which counts for as long as it is open.
pub(crate) async fn tcp(worker: &Worker, state: &State) -> Result<(TcpStream, OpenConnection), Refused> {
    let seats = &worker.app.seats;
    let seat = worker.app.within_bound(&worker.metrics, || seats.take()).await?;
    dial(worker, state, seat).await
}

/// The same with a seat that was had before.
async fn dial(worker: &Worker, state: &State, seat: Seat) -> Result<(TcpStream, OpenConnection), Refused> {
    let address = address(worker, state);
    let connected = tokio::time::timeout(limits::CONNECT, TcpStream::connect(address)).await;
    match connected {
        Ok(Ok(stream)) => {
            let _ = stream.set_nodelay(true);
            Ok((stream, OpenConnection::to_app(&worker.metrics, seat)))
        }
        Ok(Err(error)) => {
            // Of other errors many are this side's, such as too many open files.
            if error.kind() == std::io::ErrorKind::ConnectionRefused {
                worker.health.unreachable();
            }
            Err(Refused::new(Reject::AppConnect, format!("the application at {address}: {error}")))
        }
        Err(_) => Err(Refused::new(
            Reject::AppConnect,
            format!("the application at {address} does not accept connections"),
        )),
    }
}

/// A connection to the application, encrypted or not.
enum Wire<S> {
    Plain(S),
    Tls(Box<TlsStream<S>>),
}

/// Shows and asks for identities, where the mesh file says so.
async fn tls<S>(worker: &Worker, state: &State, stream: S, (local, remote): Ends) -> Result<Wire<S>, Refused>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Some(tls) = &state.app_client else { return Ok(Wire::Plain(stream)) };
    let context = HandshakeContext { service: state.me.clone(), local, remote, direction: "app" };
    match worker.handshake(Leg::App, Box::pin(tls.connect(stream, &context))).await {
        Some(Ok(established)) => Ok(Wire::Tls(Box::new(established.stream))),
        Some(Err(error)) => Err(Refused::new(Reject::AppTls(error.code()), error.to_string())),
        None => {
            Err(Refused::new(Reject::AppTls("tls_timeout"), "the application's TLS handshake took too long"))
        }
    }
}

/// The two addresses of a connection.
type Ends = (Option<SocketAddr>, Option<SocketAddr>);

fn ends(stream: &TcpStream) -> Ends {
    (stream.local_addr().ok(), stream.peer_addr().ok())
}

/// An error with its causes: hyper keeps what matters in the latter.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Trailers that a response may carry to a client.
pub(crate) fn clean_trailers(mut trailers: HeaderMap) -> Option<HeaderMap> {
    trailers::clean(&mut trailers);
    (!trailers.is_empty()).then_some(trailers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(lengths: &[&'static str], expected: Option<u64>) {
        let mut headers = HeaderMap::new();
        for length in lengths {
            headers.append(CONTENT_LENGTH, HeaderValue::from_static(length));
        }
        assert_eq!(length(&headers), expected, "{lengths:?}");
    }

    #[test]
    fn a_length_is_one_plain_number() {
        check(&["5"], Some(5));
        check(&["5", "5"], Some(5));
        check(&["5", "05"], Some(5));
        check(&[], None);
        check(&["5", "6"], None);
        check(&["+5"], None);
        check(&["5, 5"], None);
        check(&[""], None);
        check(&["99999999999999999999"], None);
    }

    #[test]
    fn a_request_is_framed_by_its_body() {
        let framed = |length: &'static [&'static str], body: AppBody| {
            let mut headers = HeaderMap::new();
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("gzip"));
            for length in length {
                headers.append(CONTENT_LENGTH, HeaderValue::from_static(length));
            }
            frame(&mut headers, &body);
            let texts =
                headers.get_all(CONTENT_LENGTH).iter().map(|value| value.to_str().unwrap().to_owned());
            (texts.collect::<Vec<_>>(), headers.contains_key(TRANSFER_ENCODING))
        };
        assert_eq!(framed(&["156"], AppBody::Empty), (vec![], false));
        assert_eq!(framed(&["0", "0"], AppBody::Empty), (vec!["0".to_owned()], false));
        let full = || AppBody::Full(Some(bytes::Bytes::from_static(b"hello")));
        assert_eq!(framed(&["156"], full()), (vec!["5".to_owned()], false));
        assert_eq!(framed(&[], full()), (vec!["5".to_owned()], false));
    }
}
