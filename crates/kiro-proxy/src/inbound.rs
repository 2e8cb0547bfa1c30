//! How does a request from another sidecar reach the application?
//!
//! ```text
//! accept ─► mutual TLS ─► h2 ─► admit ─► authorize ─► verify ─► rates ─► application
//!                                400       403         401       429      502, 503, 504
//! ```

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use kiro_core::fields;
use kiro_core::identity::ServiceName;
use kiro_core::mesh::Protocol;
use kiro_core::policy::Denial;
use kiro_core::signature::{ConnectionKey, Head, SignatureError, Verified, Verifier};
use kiro_tls::HandshakeContext;
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio::sync::futures::Notified;
use tokio::task::spawn_local;
use tokio::time::Instant;

use crate::abuse::{self, Reason as Abuse};
use crate::admission::{Limit, PeerSeat, Place};
use crate::answer;
use crate::app::{self, AppAnswer, Handshake};
use crate::body::{AppBody, BodyError, PeerBody, VerifiedBody};
use crate::drain::Phase;
use crate::exchange::{Direction, Exchange, Progress, Via};
use crate::frames::FrameTap;
use crate::headers::{self, Kind};
use crate::interim::Interim;
use crate::limits;
use crate::proof::{self, BodyRule, Trusted};
use crate::rates;
use crate::reject::{Refused, Reject};
use crate::send::{Pace, Watcher, break_off, send};
use crate::spans;
use crate::state::State;
use crate::trailers;
use crate::tunnel;
use crate::worker::Worker;

/// A connection from another sidecar, whose identity TLS has proven.
pub(crate) struct PeerConnection {
    /// The service at the other end.
    pub(crate) peer: ServiceName,
    via: Rc<Via>,
    caller_value: HeaderValue,
    verifier: RefCell<Verifier>,
    /// Among the connections of this peer.
    _seat: PeerSeat,
}

impl PeerConnection {
    /// Verifies a head's signature; the replay window moves with it.
    pub(crate) fn verify(
        &self,
        head: &Head<'_>,
        headers: &HeaderMap,
        now_unix_seconds: u64,
    ) -> Result<Verified, SignatureError> {
        self.verifier.borrow_mut().verify(head, headers, now_unix_seconds)
    }

    /// Verifies the trailer signature of a body.
    pub(crate) fn verify_trailers(
        &self,
        verified: &Verified,
        digest: &[u8; 32],
        trailers: &HeaderMap,
    ) -> Result<(), SignatureError> {
        self.verifier.borrow().verify_trailers(verified, digest, trailers)
    }
}

/// Serves one connection from accept to end.
pub(crate) async fn serve(worker: Rc<Worker>, stream: TcpStream, place: Rc<Place>) {
    // Listened for from before the look at the identity, so that no renewal falls between the two.
    let renewed = worker.renewed.notified();
    let state = worker.snapshot();
    let context = HandshakeContext {
        service: state.me.clone(),
        local: stream.local_addr().ok(),
        remote: Some(place.remote),
        direction: "inbound",
    };
    let Some(turn) = worker.turn(Direction::Inbound, &stream).await else { return };
    let handshake = Box::pin(state.mesh_server.accept(stream, &context));
    let Some(established) = worker.accept(Direction::Inbound, turn, handshake).await else { return };
    // The listener requires a certificate, so a handshake without a peer can't come this far.
    let Some(peer) = established.peer.map(|id| id.service) else { return };
    let Some(seat) = worker.peers.take(&peer) else { return too_many(&worker, &peer, &place) };
    let Ok(caller_value) = HeaderValue::from_str(peer.as_str()) else { return };
    let exporter = kiro_tls::exporter(established.stream.get_ref().1);
    let keys = exporter.iter().flat_map(|exporter| verifying_keys(&state, &peer, exporter)).collect();
    let via = Via {
        direction: Direction::Inbound,
        caller: Some(peer.clone()),
        caller_proof: "mtls",
        place,
        tunnelled: false,
    };
    let connection = Rc::new(PeerConnection {
        peer,
        via: Rc::new(via),
        caller_value,
        verifier: RefCell::new(Verifier::new(keys)),
        _seat: seat,
    });
    drop(state);
    http2(Rc::clone(&worker), connection, established.stream, renewed).await;
}

/// Turns a connection away whose peer has as many as it may.
fn too_many(worker: &Worker, peer: &ServiceName, place: &Place) {
    worker.metrics.limit_hit(Limit::PeerConnections);
    let Some(suppressed) = worker.metrics.connections(place.listener).lines.take(Instant::now().into())
    else {
        return;
    };
    tracing::warn!(
        target: "kiro::inbound", service = %worker.snapshot().me, %peer, remote = %place.remote,
        most = limits::CONNECTIONS_PER_PEER, suppressed = (suppressed > 0).then_some(suppressed),
        "connection refused: its peer has too many to this worker; are there more replicas than that, or does it leave them behind?"
    );
}

fn verifying_keys(
    state: &State,
    peer: &ServiceName,
    exporter: &[u8; 32],
) -> Vec<(kiro_core::signature::KeyId, ConnectionKey)> {
    state
        .identity
        .edges
        .verifying(peer.as_str())
        .map(|(keyid, secret)| (keyid.clone(), ConnectionKey::derive(secret, exporter, keyid)))
        .collect()
}

async fn http2<S>(worker: Rc<Worker>, connection: Rc<PeerConnection>, stream: S, renewed: Notified<'_>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let (stream, seen) = FrameTap::new(stream, &limits::PEER_FRAMES, &worker.half_heads);
    let handshake = h2::server::Builder::new()
        .initial_window_size(limits::STREAM_WINDOW)
        .initial_connection_window_size(limits::CONNECTION_WINDOW)
        .max_concurrent_streams(limits::STREAMS_PER_CONNECTION)
        .max_header_list_size(limits::PEER_HEADER_LIST_BYTES)
        .max_send_buffer_size(limits::SEND_BUFFER)
        .max_pending_accept_reset_streams(limits::PEER_PENDING_RESETS)
        .max_local_error_reset_streams(Some(limits::STREAM_ERRORS))
        .max_concurrent_reset_streams(limits::REMEMBERED_RESETS)
        .data_frame_budget(limits::DATA_OVERHEAD_BYTES)
        .enable_connect_protocol()
        .handshake::<_, Bytes>(stream);
    let mut h2 = match tokio::time::timeout(limits::HANDSHAKE, handshake).await {
        Ok(Ok(h2)) => h2,
        Ok(Err(error)) if error.is_io() => return,
        Ok(Err(_)) => return abuse::report(&worker, &connection.via, Abuse::Protocol),
        Err(_) => return abuse::report(&worker, &connection.via, Abuse::PrefaceTimeout),
    };
    let _in_order = worker.in_order(Phase::Draining);
    let mut draining = std::pin::pin!(worker.phase.reached(Phase::Draining));
    // A peer was verified by the roots, and its requests by the secrets, of the identity that was: with another one it has to come again.
    let mut renewed = std::pin::pin!(renewed);
    let mut told = false;
    // From when on nobody is believed any more on what he proved to the identity that was.
    let mut believed_until: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            accepted = abuse::next_request(&worker, &connection.via, &mut h2, &seen) => accepted,
            () = &mut draining, if !told => {
                told = true;
                h2.graceful_shutdown();
                continue;
            }
            () = &mut renewed, if believed_until.is_none() => {
                believed_until = Some(Instant::now() + limits::GOODBYE);
                told = true;
                h2.graceful_shutdown();
                continue;
            }
        };
        match accepted {
            // An honest peer comes by a new connection. h2 names the last stream of this one only when the peer has acknowledged its
            // question, so one that never does would go on for ever.
            Some(Ok((_, mut respond))) if believed_until.is_some_and(|until| Instant::now() > until) => {
                respond.send_reset(Reason::REFUSED_STREAM);
            }
            Some(Ok((request, respond))) => {
                spawn_local(stream_story(Rc::clone(&worker), Rc::clone(&connection), request, respond));
            }
            Some(Err(_)) | None if let Some(reason) = seen.reason() => {
                return abuse::report(&worker, &connection.via, reason);
            }
            Some(Err(error)) => {
                if !error.is_io() && !error.is_go_away() {
                    tracing::info!(target: "kiro::inbound", peer = %connection.peer, %error, "connection ended by an error");
                }
                return;
            }
            None => return,
        }
    }
}

/// One stream, from its head to its end.
async fn stream_story(
    worker: Rc<Worker>,
    connection: Rc<PeerConnection>,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) {
    let state = worker.snapshot();
    let (head, body) = request.into_parts();
    let trace = spans::inside(&worker.tracing, &head.headers);
    let mut exchange = Exchange::begin(&worker, &state, &connection.via, &head, trace);
    let is_head = head.method == Method::HEAD;
    let request = Request::from_parts(head, body);
    let respond = RefCell::new(respond);
    let answered = {
        let interim = interim(request.headers(), &respond);
        let story = story(&worker, &connection, request, &mut exchange, &interim);
        let mut story = std::pin::pin!(story);
        // A caller that has gone away resets the stream; dropping the story closes the application's connection at once.
        let ended = poll_fn(|cx| {
            use std::task::Poll;
            if let Poll::Ready(answered) = story.as_mut().poll(cx) {
                return Poll::Ready(Some(answered));
            }
            respond.borrow_mut().poll_reset(cx).map(|_| None)
        });
        match ended.await {
            Some(answered) => answered,
            None => return,
        }
    };
    let respond = respond.into_inner();
    let sent = match answered {
        Ok(Answered::Response(response)) => relay(response, respond, &mut exchange).await,
        Ok(Answered::Stream(upgrade)) => {
            // Boxed like all that is rare, so that the task of each request, which is moved twice, stays small.
            Box::pin(tunnel::inbound(&worker, upgrade, respond, exchange)).await;
            return;
        }
        Err(refused) => {
            exchange.refused(&refused);
            let mut refusal = answer::refused(&refused, exchange.is_grpc());
            exchange.tell_rates(refusal.headers_mut());
            refuse(refusal, respond, is_head)
        }
    };
    if let Err(error) = sent {
        tracing::debug!(target: "kiro::inbound", %error, "answer broke off");
    }
}

/// The way back for interim answers: a caller takes them where its client does, or waits for leave to send a body.
fn interim<'a>(headers: &HeaderMap, respond: &'a RefCell<SendResponse<Bytes>>) -> Interim<'a> {
    if headers.contains_key(&fields::INTERIM) || headers::expects_continue(headers) {
        Interim::to(respond)
    } else {
        Interim::unwanted()
    }
}

/// What the story ends with.
enum Answered {
    /// An answer to relay.
    Response(Response<AppAnswer>),
    /// Bytes both ways from here on.
    Stream(tunnel::Accepted),
}

/// A request's way, top to bottom.
async fn story(
    worker: &Rc<Worker>,
    connection: &Rc<PeerConnection>,
    request: Request<RecvStream>,
    exchange: &mut Exchange,
    interim: &Interim<'_>,
) -> Result<Answered, Refused> {
    let admitted = headers::inbound(request, &exchange.state().me)?;
    if admitted.kind == Kind::WebSocket {
        exchange.websocket();
    }
    let permitted = proof::authorize_peer(connection, admitted, exchange)?;
    let trusted = proof::verify(permitted, connection, exchange)?;
    worker.health.admit(exchange.state())?;
    rates::check(&trusted, exchange)?;
    match (trusted.kind(), exchange.state().service.app.protocol) {
        (Kind::Plain, Protocol::Http1 | Protocol::H2 | Protocol::Grpc) => {
            let outgoing = settle_body(trusted, connection, exchange).await?;
            Ok(Answered::Response(app::send(worker, outgoing, exchange, interim).await?))
        }
        (Kind::WebSocket, Protocol::Http1 | Protocol::H2 | Protocol::Grpc) => {
            Box::pin(websocket(worker, connection, trusted, exchange)).await
        }
        (Kind::Tunnel, Protocol::Tcp) => {
            Ok(Answered::Stream(Box::pin(tunnel::to_app(worker, trusted, exchange)).await?))
        }
        (Kind::Tunnel, Protocol::Http1 | Protocol::H2 | Protocol::Grpc) => {
            Err(Reject::Denied(Denial::TunnelRestricted).into())
        }
        (Kind::Plain | Kind::WebSocket, Protocol::Tcp) => Err(Reject::ServiceIsTcp.into()),
    }
}

/// Makes of a trusted request's body one that reaches the application only as far as its signature holds.
async fn settle_body(
    trusted: Trusted<RecvStream>,
    connection: &Rc<PeerConnection>,
    exchange: &mut Exchange,
) -> Result<app::Outgoing, Refused> {
    let (trusted, recv, rule) = trusted.take_body();
    let broken = app::Broken::default();
    let (body, progress) = match rule {
        BodyRule::Empty if recv.is_end_stream() => (AppBody::Empty, None),
        BodyRule::Empty => {
            return Err(Refused::new(
                Reject::Signature("signature_digest"),
                "a body that the signature does not speak of",
            ));
        }
        BodyRule::Unsigned if recv.is_end_stream() => (AppBody::Empty, None),
        BodyRule::Unsigned => {
            let progress = Progress::new();
            (
                AppBody::Plain(PeerBody::new(recv, Rc::clone(&progress), exchange.request_pace())),
                Some(progress),
            )
        }
        BodyRule::Digest(digest) => {
            let bytes = read_digested(recv, &digest).await?;
            exchange.request_bytes(bytes.len());
            (AppBody::Full(Some(bytes)), None)
        }
        BodyRule::Trailers(verified) => {
            let progress = Progress::new();
            let length = trusted.length();
            let body = PeerBody::new(recv, Rc::clone(&progress), exchange.request_pace());
            let body = VerifiedBody::new(body, length, Rc::clone(connection), verified, Rc::clone(&broken));
            (AppBody::Verified(Box::new(body)), Some(progress))
        }
    };
    app::dress(trusted.with_body(body), exchange, &connection.caller_value, progress, broken)
}

/// Reads a body whose digest stands in the signed head; nothing of it may pass before it has been compared.
async fn read_digested(mut recv: RecvStream, digest: &[u8; 32]) -> Result<Bytes, Refused> {
    let mut whole = BytesMut::new();
    let reading = async {
        while let Some(piece) = recv.data().await {
            let piece = piece.map_err(|error| Refused::new(Reject::UpstreamReset, error.to_string()))?;
            if whole.len() + piece.len() > limits::DIGEST_BODY_BYTES {
                return Err(Refused::new(
                    Reject::Signature("signature_digest"),
                    format!(
                        "a body over {} bytes must stream with a trailer signature",
                        limits::DIGEST_BODY_BYTES
                    ),
                ));
            }
            let _ = recv.flow_control().release_capacity(piece.len());
            whole.extend_from_slice(&piece);
        }
        Ok(())
    };
    match tokio::time::timeout(limits::BODY_IDLE, reading).await {
        Ok(read) => read?,
        Err(_) => return Err(Refused::new(Reject::RequestTimeout, "the body did not come whole in time")),
    }
    let found: [u8; 32] = Sha256::digest(&whole).into();
    if found != *digest {
        return Err(Refused::new(
            Reject::Signature("signature_digest"),
            "the body is not the one that was signed",
        ));
    }
    Ok(whole.freeze())
}

async fn websocket(
    worker: &Rc<Worker>,
    connection: &Rc<PeerConnection>,
    trusted: Trusted<RecvStream>,
    exchange: &mut Exchange,
) -> Result<Answered, Refused> {
    let claim = trusted.claim(exchange);
    let (trusted, recv, _handshake_alone_is_signed) = trusted.take_body();
    let trusted = trusted.with_body(AppBody::Empty);
    let outgoing = app::dress(trusted, exchange, &connection.caller_value, None, app::Broken::default())?;
    match app::websocket(worker, outgoing, exchange).await? {
        Handshake::Answered(response) => {
            app::not_opened(&response)?;
            Ok(Answered::Response(response))
        }
        Handshake::Open(headers, app) => {
            Ok(Answered::Stream(tunnel::opened(worker, headers, app, recv, claim)?))
        }
    }
}

/// Relays the application's answer to the peer.
async fn relay(
    response: Response<AppAnswer>,
    mut respond: SendResponse<Bytes>,
    exchange: &mut Exchange,
) -> Result<(), BodyError> {
    let (mut head, body) = response.into_parts();
    head.version = http::Version::HTTP_2;
    head.extensions.clear();
    exchange.status(head.status);
    exchange.tell_rates(&mut head.headers);
    let ends = http_body::Body::is_end_stream(&body);
    let grpc = exchange.is_grpc() && headers::is_grpc(&head.headers);
    let mut stream = respond.send_response(Response::from_parts(head, ()), ends)?;
    let pace = if grpc && exchange.is_call() { Pace::Call } else { Pace::Answer };
    if !ends && let Err(error) = send(body, &mut stream, &mut Relay { exchange }, pace).await {
        if matches!(error, BodyError::Idle) {
            // Its connection goes on, for the others on it, so this line alone says who does not read.
            exchange.ended("idle");
        }
        break_off(&mut stream, &error, grpc);
        if matches!(error, BodyError::TooLarge) {
            exchange.refused(&error.by_sender());
        }
        return Err(error);
    }
    Ok(())
}

struct Relay<'a> {
    exchange: &'a mut Exchange,
}

impl Watcher for Relay<'_> {
    fn data(&mut self, bytes: &Bytes) {
        self.exchange.response_bytes(bytes.len());
    }

    fn trailers(&mut self, own: Option<HeaderMap>) -> Result<Option<HeaderMap>, BodyError> {
        own.and_then(app::clean_trailers)
            .map(|trailers| trailers::carried(trailers, limits::HEADER_BYTES))
            .transpose()
    }

    fn always_trailers(&self) -> bool {
        false
    }
}

/// Answers in the application's place. A body after HEAD would be an error of the stream (RFC 9113 8.1.1), and the answer lost.
fn refuse(
    refusal: Response<Bytes>,
    mut respond: SendResponse<Bytes>,
    is_head: bool,
) -> Result<(), BodyError> {
    let (head, text) = refusal.into_parts();
    let ends = is_head || text.is_empty();
    let mut stream = respond.send_response(Response::from_parts(head, ()), ends)?;
    if ends {
        return Ok(());
    }
    // Where the request's body still comes, h2 resets the stream with NO_ERROR after a whole answer (RFC 9113 8.1).
    Ok(stream.send_data(text, true)?)
}

#[cfg(test)]
mod tests {
    use tokio::task::LocalSet;

    use super::*;
    use crate::h2_io::tests::ends;
    use crate::trial::{PREFACE, Trial, say};

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_get_through_its_preface_is_cut() {
        for said in [&PREFACE[..0], &PREFACE[..23]] {
            let trial = Trial::new();
            let (client, server) = tokio::io::duplex(4096);
            let peer = ServiceName::parse("callee").unwrap();
            let connection = PeerConnection {
                _seat: trial.worker.peers.take(&peer).unwrap(),
                peer,
                via: trial.via(Direction::Inbound).await,
                caller_value: HeaderValue::from_static("callee"),
                verifier: RefCell::new(Verifier::new(Vec::new())),
            };
            let (worker, begin) = (Rc::clone(&trial.worker), Instant::now());
            let served = http2(Rc::clone(&worker), Rc::new(connection), server, worker.renewed.notified());
            let both = async { tokio::join!(served, say(client, said)) };
            let limit = limits::HANDSHAKE * 10;
            tokio::time::timeout(limit, LocalSet::new().run_until(both)).await.expect("cut");
            assert_eq!(begin.elapsed().as_secs(), limits::HANDSHAKE.as_secs());
            assert_eq!(trial.abused("inbound", "preface_timeout"), 1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_digested_body_that_trickles_is_given_up() {
        let mut ends = ends().await;
        tokio::spawn(async move {
            // Each piece by itself is in time.
            while ends.client.send_data(Bytes::from_static(b"x"), false).is_ok() {
                tokio::time::sleep(limits::BODY_IDLE / 10).await;
            }
        });
        let begin = Instant::now();
        let reading = read_digested(ends.server.into_body(), &[0; 32]);
        let read = tokio::time::timeout(limits::BODY_IDLE * 10, reading).await.expect("given up");
        assert_eq!(read.unwrap_err().reject, Reject::RequestTimeout);
        assert_eq!(begin.elapsed().as_secs(), limits::BODY_IDLE.as_secs());
    }

    fn size_of_future<A, B, C, D, F: Future>(_: impl FnOnce(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    /// Each request is a task, which is moved twice until it runs and is memory for as long as it does. Once, opening a connection was
    /// part of it: 16 KiB, and a quarter of all instructions of a request.
    #[test]
    fn the_task_of_a_request_is_small() {
        let bytes = size_of_future(stream_story);
        assert!(bytes <= 5 * 1024, "{bytes} bytes: what is rare in it goes into a box");
    }
}
