//! How is HTTP spoken with clients of this sidecar: the application at 15001, and anybody at the ingress?
//!
//! This module chooses the version. hyper reads and writes HTTP/1 within the limits that are set here, and what it answers by itself is
//! accounted for; [`http2`] is beside it.

mod http2;

use std::cell::Cell;
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use kiro_core::fields;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::abuse::{self, Reason};
use crate::body::AnswerBody;
use crate::client::{Client, ClientStream, RequestBody, Upgrade};
use crate::drain::Phase;
use crate::exchange::Via;
use crate::framing::{Guess, HeadTap, Heads, Oddities, Turn, guess};
use crate::headers;
use crate::interim::Interim;
use crate::limits;
use crate::reject::Reject;
use crate::trailers::{self, Named};
use crate::worker::Worker;
use crate::{ingress, outbound, park};

/// Which story a listener's requests take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Front {
    /// The application's.
    Outbound,
    /// Outside clients'.
    Ingress {
        /// Whether the client's connection is encrypted.
        tls: bool,
    },
}

/// Serves a connection without TLS.
pub(crate) async fn plain(worker: Rc<Worker>, stream: TcpStream, via: Rc<Via>, front: Front) {
    match tokio::time::timeout(limits::HEAD, first_bytes(&stream)).await {
        Err(_) if stream.try_read(&mut [0]).is_ok_and(|count| count > 0) => {
            abuse::report(&worker, &via, Reason::PrefaceTimeout);
        }
        // Boxed, as is what only some connections need: room that is not used is paid for by every one of them.
        Ok(Ok(Guess::Http2)) => Box::pin(http2::serve(worker, stream, via, front)).await,
        Ok(Ok(Guess::Http1 | Guess::NeedMore)) => http1(worker, stream, via, front).await,
        Ok(Ok(Guess::Tls)) => {
            worker.library_answer(&via, Reject::MessageInvalid, "TLS on a port that speaks plain HTTP");
        }
        Ok(Err(_)) | Err(_) => {}
    }
}

/// As many bytes as the preface of HTTP/2 has.
const FIRST_BYTES: usize = 24;

/// Looks at a connection's first bytes without taking them.
async fn first_bytes(stream: &TcpStream) -> std::io::Result<Guess> {
    let mut first = [0; FIRST_BYTES];
    let mut pause = Duration::from_millis(2);
    loop {
        let count = stream.peek(&mut first).await?;
        let guessed = guess(first.get(..count).unwrap_or_default());
        if guessed != Guess::NeedMore || count == 0 {
            return Ok(guessed);
        }
        // Peeking returns at once while bytes are there, and the client is in the middle of its preface: an honest one sends the rest
        // in a moment, any other is looked at ever more seldom.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

/// Serves a connection after its TLS handshake; ALPN has chosen the version. The stream is boxed, since it is large, and each future on
/// the way would have room for it twice.
pub(crate) async fn encrypted<S>(
    worker: Rc<Worker>,
    stream: Box<tokio_rustls::server::TlsStream<S>>,
    via: Rc<Via>,
    front: Front,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    if is_h2 {
        Box::pin(http2::serve(worker, stream, via, front)).await;
    } else {
        http1(worker, stream, via, front).await;
    }
}

/// Serves the bytes of a CONNECT tunnel to a service that speaks HTTP: each request inside is an outbound one of its own.
pub(crate) async fn tunnelled(worker: Rc<Worker>, client: Upgrade, via: Rc<Via>) {
    let Some(mut client) = client.stream().await else { return };
    // hyper drops a connection without a word when it has answered the last request on it.
    client.end_when_dropped();
    let begun = tokio::time::timeout(limits::HEAD, read_first_bytes(&mut client)).await;
    let Ok(Ok((first, guessed))) = begun else { return };
    if guessed == Guess::Tls {
        worker.library_answer(
            &via,
            Reject::TlsInTunnel,
            "TLS inside CONNECT: call http://<service>, the mesh encrypts",
        );
        // A fatal alert `access_denied` (RFC 8446 6.2) is what a TLS client can read.
        let _ = client.write_all(&[21, 3, 3, 0, 2, 2, 49]).await;
        let _ = client.shutdown().await;
        return;
    }
    let (read, write) = tokio::io::split(client);
    let stream = tokio::io::join(std::io::Cursor::new(first).chain(read), write);
    if guessed == Guess::Http2 {
        http2::serve(worker, stream, via, Front::Outbound).await;
    } else {
        http1(worker, stream, via, Front::Outbound).await;
    }
}

/// Reads until it is clear what is spoken: no further than the preface of HTTP/2 goes.
async fn read_first_bytes(client: &mut ClientStream) -> std::io::Result<(Vec<u8>, Guess)> {
    let mut first = Vec::with_capacity(FIRST_BYTES);
    loop {
        let mut piece = [0; FIRST_BYTES];
        let room = piece.get_mut(first.len()..).unwrap_or_default();
        let count = client.read(room).await?;
        first.extend_from_slice(room.get(..count).unwrap_or_default());
        let guessed = guess(&first);
        if guessed != Guess::NeedMore || count == 0 {
            return Ok((first, guessed));
        }
    }
}

async fn http1<S>(worker: Rc<Worker>, stream: S, via: Rc<Via>, front: Front)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let heads = Heads::among(&worker.half_heads);
    let service = {
        let (worker, via, heads) = (Rc::clone(&worker), Rc::clone(&via), heads.clone());
        service_fn(move |request: Request<Incoming>| {
            let (oddities, turn) = heads.read();
            let heads = heads.clone();
            let tunnel = request.method() == Method::CONNECT;
            let asked = trailers::are_asked_for(request.headers());
            let (request, client, begun) = taken_apart(request);
            let answered = answer(Rc::clone(&worker), Rc::clone(&via), front, request, client, Some(turn));
            async move {
                let mut answer = answered.await;
                let named = Named::to_client(answer.headers(), asked);
                answer.body_mut().in_http1(named);
                if answer.status() == StatusCode::SWITCHING_PROTOCOLS
                    || (tunnel && answer.status().is_success())
                {
                    heads.upgraded();
                }
                let asked_in_vain = begun.is_some_and(|begun| !begun.get());
                Ok::<_, Infallible>(keep_or_close(answer, oddities, asked_in_vain))
            }
        })
    };
    let mut client = park::Client::new(HeadTap::new(stream, heads.clone()), service);
    let _in_order = worker.in_order(drains_at(front));
    let drained = std::pin::pin!(worker.phase.reached(drains_at(front)));
    if let Err(error) = park::serve(&mut client, &heads, http1_limits, drained).await {
        if heads.cut() {
            return abuse::report(&worker, &via, Reason::HalfHead);
        }
        library_error(&worker, &via, &error, heads.begun());
    }
}

/// HTTP/1 within the limits; the timer of heads is [`park`]'s. Answers are flushed one by one: what hyper gathers over pipelined
/// requests it loses when it closes.
fn http1_limits() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .header_read_timeout(limits::HEAD)
        .max_header_size(limits::HEADER_BYTES)
        .max_headers(limits::HEADER_FIELDS);
    builder
}

/// An ingress takes no new requests once the sidecar drains; the application's own calls go out until the end.
fn drains_at(front: Front) -> Phase {
    match front {
        Front::Outbound => Phase::Stopped,
        Front::Ingress { .. } => Phase::Draining,
    }
}

async fn answer(
    worker: Rc<Worker>,
    via: Rc<Via>,
    front: Front,
    request: Request<RequestBody>,
    client: Client<'_>,
    turn: Option<Turn>,
) -> Response<AnswerBody> {
    match front {
        Front::Outbound => outbound::answer(worker, via, request, client, turn).await,
        Front::Ingress { tls } => ingress::answer(worker, via, tls, request, client, turn).await,
    }
}

/// What hyper holds of the connection, to hand it over after an upgrade, is the client's and not the request's. Beside them, where
/// the client waits for leave to send, whether its body is being read.
fn taken_apart(
    mut request: Request<Incoming>,
) -> (Request<RequestBody>, Client<'static>, Option<Rc<Cell<bool>>>) {
    let upgrade = request.extensions_mut().remove::<OnUpgrade>().map(Upgrade::Http1);
    let asks = headers::expects_continue(request.headers()) && !request.body().is_end_stream();
    let begun = asks.then(Rc::default);
    let request = request.map(|incoming| RequestBody::Http1(incoming, begun.clone()));
    (request, Client { upgrade, interim: Interim::unwanted() }, begun)
}

/// A connection whose head could be read in two ways carries no other request (RFC 9112 6.1, 2.2), and none whose head was
/// refused as malformed does. Nor does one whose client asked for leave to send and got an answer instead: hyper closes it, since
/// the body may come all the same, and a client that is not told sends its next request into the closing connection.
fn keep_or_close(
    mut response: Response<AnswerBody>,
    oddities: Oddities,
    asked_in_vain: bool,
) -> Response<AnswerBody> {
    let upgrade = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let malformed =
        response.status() == StatusCode::BAD_REQUEST && response.headers().contains_key(&fields::REJECT);
    if malformed || asked_in_vain || !oddities.keep_alive() && !upgrade {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Accounts for what hyper answered, or did not answer, by itself.
fn library_error(worker: &Worker, via: &Via, error: &hyper::Error, in_head: bool) {
    if let Some(reject) = library_reject(error, in_head) {
        worker.library_answer(via, reject, &crate::app::error_chain(error));
    }
}

/// What an error of the library means for the request. An idle connection that it closes is no refusal: only a head that has
/// begun (`in_head`) can be late.
fn library_reject(error: &hyper::Error, in_head: bool) -> Option<Reject> {
    if error.is_parse_too_large() {
        Some(Reject::HeadersTooLarge)
    } else if error.is_parse() {
        Some(Reject::MessageInvalid)
    } else if error.is_timeout() && in_head {
        Some(Reject::RequestTimeout)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::Full;

    use super::*;

    /// Serves one connection until it ends. What came of it, and whether it was in a head.
    async fn serve(stream: tokio::io::DuplexStream) -> (Result<(), hyper::Error>, bool) {
        let heads = Heads::default();
        let begun = heads.clone();
        let service = service_fn(|_| {
            // The answer has no body, so the turn is over at once.
            drop(heads.read());
            async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::new()))) }
        });
        let mut client = park::Client::new(HeadTap::new(stream, heads.clone()), service);
        let never = std::pin::pin!(std::future::pending());
        let ended = park::serve(&mut client, &begun, http1_limits, never).await;
        (ended, begun.begun())
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_never_ends_is_closed_in_time() {
        let (mut client, server) = tokio::io::duplex(4096);
        let begin = tokio::time::Instant::now();
        let trickle = tokio::spawn(async move {
            client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n").await.unwrap();
            // Each piece by itself is in time.
            while client.write_all(b"x: 1\r\n").await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        let (ended, in_head) = serve(server).await;
        assert_eq!(begin.elapsed().as_secs(), limits::HEAD.as_secs());
        assert_eq!(library_reject(&ended.unwrap_err(), in_head), Some(Reject::RequestTimeout));
        trickle.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_that_is_closed_was_no_refusal() {
        let (mut client, server) = tokio::io::duplex(4096);
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let begin = tokio::time::Instant::now();
        let (ended, in_head) = serve(server).await;
        assert_eq!(begin.elapsed().as_secs(), limits::HEAD.as_secs());
        assert!(!in_head);
        if let Err(error) = ended {
            assert_eq!(library_reject(&error, in_head), None);
        }
    }
}
