//! What does the application answer when it is asked how it is?
//!
//! Each check is a connection of its own, which says more than one that was opened when all was well, and is gone with its answer. It
//! goes through the application's TLS where the mesh file says that it speaks it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use h2::RecvStream;
use http::header::{CONNECTION, CONTENT_TYPE, HOST, TE, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version};
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use kiro_core::health::Failure;
use kiro_core::mesh::{Protocol, Question};
use kiro_tls::HandshakeContext;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::limits;
use crate::state::State;

/// A check that failed.
#[derive(Debug)]
pub(super) struct Failed {
    /// By the rules' words.
    pub(super) how: Failure,
    /// What else there is to say.
    pub(super) said: String,
}

impl Failed {
    fn new(how: Failure, said: impl ToString) -> Self {
        Self { how, said: said.to_string() }
    }
}

impl From<Failure> for Failed {
    fn from(how: Failure) -> Self {
        Self { how, said: String::new() }
    }
}

/// Asks once. A request from nobody: an application that asks for a caller has to leave the path of its check out of that.
pub(super) async fn ask(
    question: &Question,
    timeout: Duration,
    address: SocketAddr,
    state: &Arc<State>,
) -> Result<(), Failed> {
    let asked = async {
        let stream =
            TcpStream::connect(address).await.map_err(|error| Failed::new(Failure::Connection, error))?;
        match question {
            Question::Tcp => Ok(()),
            Question::Http(_) | Question::Grpc(_) => through_tls(question, stream, state).await,
        }
    };
    tokio::time::timeout(timeout, asked)
        .await
        .unwrap_or_else(|_| Err(Failed::new(Failure::Timeout, format_args!("{} ms", timeout.as_millis()))))
}

async fn through_tls(question: &Question, stream: TcpStream, state: &State) -> Result<(), Failed> {
    let Some(tls) = &state.app_client else { return speak(question, stream, state).await };
    let context = HandshakeContext {
        service: state.me.clone(),
        local: stream.local_addr().ok(),
        remote: stream.peer_addr().ok(),
        direction: "app",
    };
    // What is wrong is told with the change of state that comes of it.
    let established =
        Box::pin(tls.clone().without_lines().connect(stream, &context)).await.map_err(|error| {
            Failed::new(Failure::Tls(error.code()), format_args!("{}; {}", error.cause(), error.fix()))
        })?;
    speak(question, established.stream, state).await
}

async fn speak<S>(question: &Question, stream: S, state: &State) -> Result<(), Failed>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let me = state.me.as_str();
    match (question, state.service.app.protocol) {
        (Question::Http(path), Protocol::H2 | Protocol::Grpc) => {
            let (parts, _) = http2(stream, get(me, path, state.app_client.is_some())?, None).await?;
            success(parts.status.as_u16())
        }
        (Question::Http(path), Protocol::Http1 | Protocol::Tcp) => http1(stream, me, path).await,
        (Question::Grpc(service), _) => grpc(stream, me, service, state.app_client.is_some()).await,
        (Question::Tcp, _) => Ok(()),
    }
}

/// A redirect is well: it is what a server says that works (and what Kubernetes takes it for).
fn success(status: u16) -> Result<(), Failed> {
    match status {
        200..=399 => Ok(()),
        _ => Err(Failure::Status(status).into()),
    }
}

fn unreadable(error: impl ToString) -> Failed {
    Failed::new(Failure::Protocol, error)
}

static AGENT: HeaderValue = HeaderValue::from_static("kiro-health");

async fn http1<S>(stream: S, me: &str, path: &str) -> Result<(), Failed>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let request = Request::get(path)
        .header(HOST, me)
        .header(USER_AGENT, &AGENT)
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(unreadable)?;
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(limits::HEALTH_ANSWER_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| Failed::new(Failure::Connection, error))?;
    // Ends with this function, whatever the application still has to say.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let answer = sender.send_request(request).await.map_err(|error| {
        let how = if error.is_parse() { Failure::Protocol } else { Failure::Connection };
        Failed::new(how, error)
    })?;
    success(answer.status().as_u16())
}

fn get(me: &str, path: &str, tls: bool) -> Result<Request<()>, Failed> {
    request_to(Method::GET, me, path, tls)
}

fn request_to(method: Method, me: &str, path: &str, tls: bool) -> Result<Request<()>, Failed> {
    let scheme = if tls { "https" } else { "http" };
    let uri = Uri::builder().scheme(scheme).authority(me).path_and_query(path).build().map_err(unreadable)?;
    let mut request = Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.version_mut() = Version::HTTP_2;
    request.headers_mut().insert(USER_AGENT, AGENT.clone());
    Ok(request)
}

/// One request over HTTP/2; with a body also its answer's, and its trailers.
async fn http2<S>(
    stream: S,
    request: Request<()>,
    body: Option<Bytes>,
) -> Result<(http::response::Parts, (Bytes, HeaderMap)), Failed>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let broken = |error: h2::Error| {
        let how = if error.is_io() || error.is_go_away() { Failure::Connection } else { Failure::Protocol };
        Failed::new(how, error)
    };
    let (sender, connection) = h2::client::Builder::new()
        .initial_window_size(limits::HEALTH_ANSWER_BYTES as u32)
        .max_header_list_size(limits::HEALTH_ANSWER_BYTES as u32)
        .enable_push(false)
        .handshake::<_, Bytes>(stream)
        .await
        .map_err(broken)?;
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let mut sender = sender.ready().await.map_err(broken)?;
    let (answer, mut send) = sender.send_request(request, body.is_none()).map_err(broken)?;
    let wants_body = body.is_some();
    if let Some(body) = body {
        send.send_data(body, true).map_err(broken)?;
    }
    let (parts, recv) = answer.await.map_err(broken)?.into_parts();
    let read = if wants_body { read(recv).await? } else { Default::default() };
    Ok((parts, read))
}

async fn read(mut recv: RecvStream) -> Result<(Bytes, HeaderMap), Failed> {
    let mut whole = BytesMut::new();
    while let Some(piece) = recv.data().await {
        let piece = piece.map_err(unreadable)?;
        // Its window is not given back, so this is all that there can be.
        if whole.len() + piece.len() > limits::HEALTH_ANSWER_BYTES {
            return Err(unreadable("an answer that is too large"));
        }
        whole.extend_from_slice(&piece);
    }
    let trailers = recv.trailers().await.map_err(unreadable)?;
    Ok((whole.freeze(), trailers.unwrap_or_default()))
}

/// `grpc.health.v1.Health/Check`, whose two messages are small enough to be written and read by hand.
async fn grpc<S>(stream: S, me: &str, service: &str, tls: bool) -> Result<(), Failed>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut request = request_to(Method::POST, me, "/grpc.health.v1.Health/Check", tls)?;
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    let (parts, (body, trailers)) = http2(stream, request, Some(question(service))).await?;
    success(parts.status.as_u16())?;
    // In the head where there is no message ("Trailers-Only").
    let status = trailers.get("grpc-status").or_else(|| parts.headers.get("grpc-status"));
    match status.map(|status| status.to_str().ok()?.parse::<u16>().ok()) {
        Some(Some(0)) => match serving(&body) {
            Some(SERVING) => Ok(()),
            Some(other) => Err(Failure::NotServing(other).into()),
            None => Err(unreadable("not a HealthCheckResponse")),
        },
        Some(Some(status)) => Err(Failure::Grpc(status).into()),
        Some(None) | None => Err(unreadable("an answer without a gRPC status")),
    }
}

/// `ServingStatus.SERVING`.
const SERVING: i32 = 1;

/// A `HealthCheckRequest` in its frame: field 1 is the service's name, left out where it is empty.
fn question(service: &str) -> Bytes {
    let name = service.as_bytes();
    let mut message = BytesMut::new();
    if !name.is_empty() {
        message.extend_from_slice(&[1 << 3 | 2]);
        // A name has at most 255 bytes: two of a varint.
        match u8::try_from(name.len()).unwrap_or(u8::MAX) {
            length @ 0..0x80 => message.extend_from_slice(&[length]),
            length => message.extend_from_slice(&[length, 1]),
        }
        message.extend_from_slice(name);
    }
    let length = u32::try_from(message.len()).unwrap_or_default();
    let mut framed = BytesMut::from(&[0][..]);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(&message);
    framed.freeze()
}

/// The status of a framed `HealthCheckResponse`; none where it can't be read.
fn serving(framed: &Bytes) -> Option<i32> {
    let (head, mut message) = framed.split_first_chunk::<5>()?;
    let [compressed, length @ ..] = *head;
    if compressed != 0 || usize::try_from(u32::from_be_bytes(length)).ok()? != message.len() {
        return None;
    }
    // A number that is left out is 0, UNKNOWN.
    let mut status = 0;
    while !message.is_empty() {
        let tag = varint(&mut message)?;
        match (tag >> 3, tag & 7) {
            (1, 0) => status = i32::try_from(varint(&mut message)?).ok()?,
            (_, 0) => drop(varint(&mut message)?),
            (_, 1) => skip(&mut message, 8)?,
            (_, 2) => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                skip(&mut message, length)?;
            }
            (_, 5) => skip(&mut message, 4)?,
            _ => return None,
        }
    }
    Some(status)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = bytes.first().copied()?;
        bytes.advance(1);
        number |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn skip(bytes: &mut &[u8], count: usize) -> Option<()> {
    *bytes = bytes.get(count..)?;
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_a_message_in_its_frame() {
        assert_eq!(question("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(question("ab")[..], [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        let long = question(&"a".repeat(200));
        assert_eq!(long[..8], [0, 0, 0, 0, 203, 0x0a, 200, 1]);
        assert_eq!(long.len(), 5 + 203);
    }

    #[test]
    fn the_status_is_field_one() {
        let of = |message: &[u8]| {
            let length = u8::try_from(message.len()).unwrap();
            serving(&[&[0, 0, 0, 0, length], message].concat().into())
        };
        assert_eq!(of(&[8, 1]), Some(1));
        assert_eq!(of(&[8, 2]), Some(2));
        assert_eq!(of(&[]), Some(0));
        // Other fields are passed over, and the last one of several counts.
        assert_eq!(of(&[16, 200, 1, 0x1a, 1, b'x', 8, 2, 8, 1]), Some(1));
        assert_eq!(of(&[0x11, 1, 2, 3, 4, 5, 6, 7, 8, 0x15, 1, 2, 3, 4, 8, 1]), Some(1));
        for broken in [&[8][..], &[8, 0x80], &[0x12, 9, 1], &[0x0b], &[8, 0xff, 0xff, 0xff, 0xff, 0xff, 1]] {
            assert_eq!(of(broken), None, "{broken:?}");
        }
        assert_eq!(of(&[0x80; 100]), None);
        for broken in
            [&[][..], &[0, 0, 0, 0], &[1, 0, 0, 0, 0], &[0, 0, 0, 0, 3, 8, 1], &[0, 0, 0, 0, 1, 8, 1]]
        {
            assert_eq!(serving(&Bytes::copy_from_slice(broken)), None, "{broken:?}");
        }
    }

    #[test]
    fn redirects_are_well() {
        for (status, well) in
            [(200, true), (204, true), (302, true), (199, false), (404, false), (500, false)]
        {
            assert_eq!(success(status).is_ok(), well, "{status}");
        }
    }
}
