//! How does a trusted request reach the application beside the sidecar?
//!
//! Over HTTP/1.1 on loopback, by mutual TLS where the mesh file says so, on connections that each worker keeps for itself.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use kiro_core::mesh::Timeout;
use kiro_tls::HandshakeContext;
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, spawn_local};

use crate::body::AppBody;
use crate::early::EarlyAnswer;
use crate::exchange::{Exchange, Progress};
use crate::headers::{self, Kind};
use crate::limits;
use crate::proof::Trusted;
use crate::reject::{Refused, Reject};
use crate::spans;
use crate::state::State;
use crate::worker::Worker;

type Sender = http1::SendRequest<AppBody>;

/// Idle connections of one worker to the application, the one used last on top.
pub(crate) struct AppPool {
    idle: Rc<RefCell<Vec<Idle>>>,
    epoch: Rc<Cell<u64>>,
}

struct Idle {
    sender: Sender,
    driver: Driver,
    since: Instant,
}

/// A connection in use. Dropping it closes it; [`AppConnection::reuse`] gives it back.
pub(crate) struct AppConnection {
    sender: Sender,
    driver: Driver,
    idle: Rc<RefCell<Vec<Idle>>>,
    epoch: Rc<Cell<u64>>,
    born: u64,
    fresh: bool,
    /// Carries no other request.
    spent: bool,
}

/// The task that moves a connection's bytes; dropping this ends it. By itself the HTTP library first writes all that it holds,
/// which an application that has stopped reading never lets it.
struct Driver(Option<AbortHandle>);

impl Driver {
    /// Lets the task end by itself, which it does when the connection has become somebody else's.
    fn release(&mut self) {
        self.0 = None;
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl AppConnection {
    /// Gives the connection back: its last answer has ended.
    pub(crate) fn reuse(self) {
        let mut idle = self.idle.borrow_mut();
        if !self.spent
            && self.born == self.epoch.get()
            && !self.sender.is_closed()
            && idle.len() < limits::APP_IDLE_CONNECTIONS
        {
            idle.push(Idle { sender: self.sender, driver: self.driver, since: Instant::now() });
        }
    }
}

impl AppPool {
    /// An empty pool.
    pub(crate) fn new() -> Self {
        Self { idle: Rc::default(), epoch: Rc::new(Cell::new(0)) }
    }

    /// Lets all idle connections go, and those in use after their answer: the identity has changed.
    pub(crate) fn forget_all(&self) {
        self.epoch.set(self.epoch.get() + 1);
        self.idle.borrow_mut().clear();
    }

    fn kept(&self) -> Option<AppConnection> {
        let mut idle = self.idle.borrow_mut();
        while let Some(candidate) = idle.pop() {
            if candidate.since.elapsed() > limits::APP_IDLE {
                // The rest was used even earlier.
                idle.clear();
                return None;
            }
            if candidate.sender.is_ready() {
                return Some(self.connection(candidate.sender, candidate.driver, false));
            }
        }
        None
    }

    fn connection(&self, sender: Sender, driver: Driver, fresh: bool) -> AppConnection {
        AppConnection {
            sender,
            driver,
            idle: Rc::clone(&self.idle),
            epoch: Rc::clone(&self.epoch),
            born: self.epoch.get(),
            fresh,
            spent: false,
        }
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

/// Set when a streamed body's signature turns out not to hold.
pub(crate) type Broken = Rc<Cell<Option<&'static str>>>;

/// Dresses what [`crate::proof`] trusts for the application. There is no other way to an [`Outgoing`].
pub(crate) fn dress(
    trusted: Trusted<AppBody>,
    exchange: &mut Exchange,
    caller: &HeaderValue,
    progress: Option<Rc<Progress>>,
    broken: Broken,
) -> Outgoing {
    let (mut head, body, kind) = trusted.into_parts();
    frame(&mut head.headers, &body);
    headers::for_app(&mut head, kind, caller, &exchange.state().me_value);
    spans::propagate(&exchange.worker().tracing, exchange.trace(), &mut head.headers);
    if let Some(progress) = &progress {
        exchange.request_body(Rc::clone(progress));
    }
    Outgoing { request: Request::from_parts(head, body), progress, broken, upgrade: kind == Kind::WebSocket }
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
        AppBody::Plain(_) | AppBody::Verified(_) | AppBody::Client(_) => match length(headers) {
            Some(length) => {
                headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
            }
            None => {
                headers.remove(CONTENT_LENGTH);
                headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
        },
    }
}

/// The length that all Content-Length fields agree on.
fn length(headers: &HeaderMap) -> Option<u64> {
    let digits = |value: &HeaderValue| {
        let text = value.to_str().ok()?;
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok())?
    };
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter().map(digits);
    let first = lengths.next()??;
    lengths.all(|length| length == Some(first)).then_some(first)
}

/// Sends a request to the application and returns its answer with the connection that it comes on.
pub(crate) async fn send(
    worker: &Rc<Worker>,
    outgoing: Outgoing,
    exchange: &mut Exchange,
) -> Result<(Response<Incoming>, AppConnection), Refused> {
    let state = Rc::clone(exchange.state());
    exchange.upstream(address(worker, &state));
    exchange.attempt();
    let Outgoing { mut request, progress, broken, upgrade } = outgoing;
    loop {
        let mut connection = match worker.app.kept() {
            Some(connection) => connection,
            None => connect(worker, &state).await?,
        };
        let sent = connection.sender.try_send_request(request);
        let answer = within(state.service.traffic.timeout, progress.as_deref(), sent).await;
        match answer {
            None if broken.get().is_none() => {
                return Err(Refused::new(Reject::AppTimeout, "the application did not answer in time"));
            }
            None => return Err(broken_signature(&broken)),
            Some(Ok(response)) if response.status() == StatusCode::SWITCHING_PROTOCOLS && !upgrade => {
                return Err(Refused::new(
                    Reject::AppReset,
                    "the application switched protocols without being asked",
                ));
            }
            Some(Ok(mut response)) => {
                // Whatever the answer is, what follows it on this connection may not be HTTP.
                connection.spent = upgrade;
                if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                    connection.driver.release();
                }
                headers::response(response.headers_mut(), false);
                return Ok((response, connection));
            }
            Some(Err(mut error)) => match error.take_message() {
                // A kept connection was closed before the request was written: the request is whole and goes on a new one.
                Some(unsent) if !connection.fresh => request = unsent,
                _ if broken.get().is_some() => return Err(broken_signature(&broken)),
                _ => return Err(Refused::new(Reject::AppReset, error_chain(&error.into_error()))),
            },
        }
    }
}

fn broken_signature(broken: &Cell<Option<&'static str>>) -> Refused {
    Refused::new(
        Reject::Signature(broken.get().unwrap_or_default()),
        "the body's trailer signature does not hold",
    )
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

/// Opens a TCP connection to the application.
pub(crate) async fn tcp(worker: &Worker, state: &State) -> Result<TcpStream, Refused> {
    let address = address(worker, state);
    let connected = tokio::time::timeout(limits::CONNECT, TcpStream::connect(address)).await;
    match connected {
        Ok(Ok(stream)) => {
            let _ = stream.set_nodelay(true);
            Ok(stream)
        }
        Ok(Err(error)) => {
            Err(Refused::new(Reject::AppConnect, format!("the application at {address}: {error}")))
        }
        Err(_) => Err(Refused::new(
            Reject::AppConnect,
            format!("the application at {address} does not accept connections"),
        )),
    }
}

async fn connect(worker: &Rc<Worker>, state: &State) -> Result<AppConnection, Refused> {
    let stream = tcp(worker, state).await?;
    let (sender, driver) = match &state.app_client {
        None => http1_handshake(EarlyAnswer::new(stream)).await?,
        Some(tls) => {
            let context = HandshakeContext {
                service: state.me.clone(),
                local: stream.local_addr().ok(),
                remote: stream.peer_addr().ok(),
                direction: "app",
            };
            let handshake = tokio::time::timeout(
                limits::HANDSHAKE,
                Box::pin(tls.connect(EarlyAnswer::new(stream), &context)),
            )
            .await;
            let established = match handshake {
                Ok(Ok(established)) => established,
                Ok(Err(error)) => {
                    return Err(Refused::new(Reject::AppTls(error.code()), error.to_string()));
                }
                Err(_) => {
                    return Err(Refused::new(
                        Reject::AppTls("tls_timeout"),
                        "the application's TLS handshake took too long",
                    ));
                }
            };
            http1_handshake(established.stream).await?
        }
    };
    Ok(worker.app.connection(sender, driver, true))
}

async fn http1_handshake<S>(stream: S) -> Result<(Sender, Driver), Refused>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .max_header_size(limits::HEADER_BYTES)
        .max_headers(limits::HEADER_FIELDS)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| Refused::new(Reject::AppReset, error_chain(&error)))?;
    let driver = spawn_local(async move {
        // What goes wrong is seen by the request that is under way; an idle connection that ends is nobody's concern.
        let _ = connection.with_upgrades().await;
    });
    Ok((sender, Driver(Some(driver.abort_handle()))))
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

/// Trailers that a response may carry to a client: without those of ours.
pub(crate) fn clean_trailers(mut trailers: HeaderMap) -> Option<HeaderMap> {
    headers::strip_own(&mut trailers);
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
