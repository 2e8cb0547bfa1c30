//! How does an application's request reach a peer?
//!
//! ```text
//! accept ─► (mutual TLS) ─► HTTP ─► admit ─► plan ─► attempts: connect ─► slot ─► sign ─► send
//!                                    400     404, 403           502, 503   503
//! ```

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use h2::RecvStream;
use http::header::SEC_WEBSOCKET_KEY;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use kiro_core::identity::Role;
use kiro_core::mesh::Timeout;
use kiro_core::{balance, fields, retry};
use kiro_tls::HandshakeContext;
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio_rustls::server::TlsStream;

use crate::admission::Place;
use crate::answer;
use crate::app::{self, at_once, within};
use crate::attempt::{Answer, Attempts, Failure, Flight, Next};
use crate::body::AnswerBody;
use crate::client::{Client, RequestBody, Upgrade};
use crate::exchange::{Direction, Exchange, Via};
use crate::faults;
use crate::framing::Turn;
use crate::headers::{self, Kind};
use crate::interim::{Answering, Interim};
use crate::limits;
use crate::mirror;
use crate::payload::{Payload, Upload};
use crate::reject::{self, Refused, Reject};
use crate::route::{self, Plan};
use crate::serve::{self, Front};
use crate::spans;
use crate::state::{Peer, Snapshot, State};
use crate::tunnel;
use crate::upstream::Upstream;
use crate::upstream::connect::lost;
use crate::upstream::pool::Slot;
use crate::websocket;
use crate::worker::{Worker, unix_seconds};

/// Serves one connection of the application.
pub(crate) async fn serve(worker: Rc<Worker>, stream: TcpStream, place: Rc<Place>) {
    let state = worker.snapshot();
    if state.loopback_server.is_some() {
        // Boxed: what a handshake needs is given back when it is over, and a connection without TLS never has it.
        let handshake = Box::pin(shake_hands(Rc::clone(&worker), state, stream, place));
        let Some((stream, via)) = handshake.await else { return };
        return serve::encrypted(worker, stream, via, Front::Outbound).await;
    }
    let via = via(&state, "loopback", place);
    drop(state);
    serve::plain(worker, stream, via, Front::Outbound).await;
}

async fn shake_hands(
    worker: Rc<Worker>,
    state: Snapshot,
    stream: TcpStream,
    place: Rc<Place>,
) -> Option<(Box<TlsStream<TcpStream>>, Rc<Via>)> {
    let tls = state.loopback_server.as_ref()?;
    let context = HandshakeContext {
        service: state.me.clone(),
        local: stream.local_addr().ok(),
        remote: Some(place.remote),
        direction: "outbound",
    };
    let turn = worker.turn(Direction::Outbound, &stream).await?;
    let handshake = Box::pin(tls.accept(stream, &context));
    let established = worker.accept(Direction::Outbound, turn, handshake).await?;
    let sidecar = established.peer.as_ref().is_some_and(|peer| peer.role == Role::Sidecar);
    let via = via(&state, if sidecar { "mtls-sidecar" } else { "mtls" }, place);
    Some((Box::new(established.stream), via))
}

fn via(state: &State, caller_proof: &'static str, place: Rc<Place>) -> Rc<Via> {
    Rc::new(Via {
        direction: Direction::Outbound,
        caller: Some(state.me.clone()),
        caller_proof,
        place,
        tunnelled: false,
    })
}

/// What the story ends with.
enum Answered {
    /// A peer's answer, the stream slot that it holds, and what is left of the request's body.
    Response(Response<RecvStream>, Slot, Option<Upload>),
    /// Bytes both ways from here on.
    Stream(Stream),
    /// A tunnel to a service that speaks HTTP: its bytes are read as HTTP again.
    HttpTunnel(Upgrade),
}

/// An open stream to a peer, and the client's connection that becomes its other end.
struct Stream {
    response: Response<RecvStream>,
    send: h2::SendStream<Bytes>,
    slot: Slot,
    registered: tunnel::Registered,
    client: Upgrade,
    kind: Kind,
    version: Version,
    key: Option<HeaderValue>,
}

/// Answers one request of the application.
pub(crate) async fn answer(
    worker: Rc<Worker>,
    via: Rc<Via>,
    request: Request<RequestBody>,
    client: Client<'_>,
    turn: Option<Turn>,
) -> Response<AnswerBody> {
    let state = worker.snapshot();
    let (head, body) = request.into_parts();
    let trace = spans::inside(&worker.tracing, &head.headers);
    let mut exchange = Exchange::begin(&worker, &state, &via, &head, trace);
    let has_body = !http_body::Body::is_end_stream(&body);
    let answered = Box::pin(story(&worker, Request::from_parts(head, body), client, &mut exchange)).await;
    match answered {
        Ok(Answered::Response(response, slot, upload)) => {
            let (mut head, recv) = response.into_parts();
            let refused = tidy(&mut head.headers, &mut exchange);
            if let Some(reject) = refused.filter(|_| head.status.is_success()) {
                // A refusal of gRPC, which is a 200 to gRPC alone.
                exchange.status(reject.status());
                if !exchange.is_grpc() {
                    return answer::refusal(reject, false)
                        .map(|text| AnswerBody::fixed(text, Some(exchange), turn));
                }
            } else {
                exchange.status(head.status);
            }
            if turn.is_some() && upload.as_ref().is_some_and(|upload| !upload.is_done()) {
                answer::closes(&mut head.headers);
            }
            let length = app::length(&head.headers);
            Response::from_parts(head, AnswerBody::peer(recv, length, slot, upload, exchange, turn))
        }
        Ok(Answered::Stream(stream)) => open(worker, stream, exchange),
        Ok(Answered::HttpTunnel(client)) => {
            exchange.status(StatusCode::OK);
            let inside = Via {
                direction: via.direction,
                caller: via.caller.clone(),
                caller_proof: via.caller_proof,
                place: Rc::clone(&via.place),
                tunnelled: true,
            };
            let place = Rc::clone(&via.place);
            spawn_local(async move {
                // Of a connection that was handed over nobody else hears that it has to make room.
                let alone = matches!(client, Upgrade::Http1(_));
                let served = serve::tunnelled(worker, client, Rc::new(inside));
                tokio::select! {
                    () = served => {}
                    () = place.told_to_leave(), if alone => {}
                }
            });
            Response::new(AnswerBody::fixed(Bytes::new(), Some(exchange), None))
        }
        Err(refused) => {
            exchange.refused(&refused);
            let mut response = answer::refused(&refused, exchange.is_grpc());
            if has_body && !exchange.has_read_body() && turn.is_some() {
                answer::closes(response.headers_mut());
            }
            response.map(|text| AnswerBody::fixed(text, Some(exchange), turn))
        }
    }
}

/// A request's way, top to bottom.
async fn story(
    worker: &Rc<Worker>,
    request: Request<RequestBody>,
    client: Client<'_>,
    exchange: &mut Exchange,
) -> Result<Answered, Refused> {
    let admitted = headers::outbound(request)?;
    let Client { mut upgrade, interim } = client;
    if admitted.kind == Kind::WebSocket {
        exchange.websocket();
    }
    if admitted.kind == Kind::Tunnel && exchange.via().tunnelled {
        // Each level would be a stream within a stream, without end.
        return Err(Refused::new(Reject::UpgradeUnsupported, "CONNECT inside of CONNECT"));
    }
    if admitted.kind == Kind::Tunnel
        && let (peer, protocol) = route::find(&admitted, exchange)?
        && protocol.is_http()
        && let Some(upgrade) = upgrade.take()
    {
        // Each request inside names its service and is judged by itself.
        exchange.callee(crate::exchange::Callee::Peer(peer));
        return Ok(Answered::HttpTunnel(upgrade));
    }
    let (mut plan, body) = route::plan(admitted, exchange)?;
    if let Some(injected) = faults::of(&plan, exchange) {
        faults::inject(injected, &plan, exchange).await?;
    }
    if interim.is_wanted() && plan.kind == Kind::Plain && !exchange.is_grpc() {
        plan.head.headers.insert(fields::INTERIM.clone(), HeaderValue::from_static("103"));
    }
    let mut payload = Payload::of(&mut plan, body, exchange).await?;
    if let Some(copied) = plan.copied {
        mirror::send(worker, copied, &plan, &payload, exchange);
    }
    match deliver(worker, &plan, &mut payload, exchange, &interim).await? {
        Sent { response, send: None, slot, upload } => Ok(Answered::Response(response, slot, upload)),
        Sent { response, send: Some(send), slot, .. } => {
            accepted(worker, &plan, response, send, slot, upgrade)
        }
    }
}

/// Sends a planned request to one of its service's addresses after the other, until one answers or no attempt is left.
pub(crate) async fn deliver(
    worker: &Rc<Worker>,
    plan: &Plan,
    payload: &mut Payload,
    exchange: &mut Exchange,
    interim: &Interim<'_>,
) -> Result<Sent, Refused> {
    let state = Rc::clone(exchange.state());
    let peer = state.peer(plan.peer).ok_or(Reject::ServiceUnknown)?;
    let calls = peer.calls();
    let replicas = worker.names.replicas(worker, &calls.edge).await?;
    let terms = peer.traffic.terms(exchange.method(), headers::path_of(&plan.head));
    let mut now = Instant::now();
    let mut attempts = Attempts::begin(calls, &terms, &plan.head.method, replicas, now)?;
    loop {
        let mut flight = attempts.next(now)?;
        exchange.attempt();
        let time = attempts.within(exchange.time_left_at(now));
        let attempted = attempt(worker, plan, payload, &mut flight, time, exchange, interim).await;
        let excused = exchange.is_hurried() || !payload.is_whole();
        let (answer, reached, outcome) = match attempted {
            Ok(sent) => {
                let response = &sent.response;
                match attempts.read_head(&flight, response.status(), response.headers(), excused) {
                    Answer::Final(outcome) => {
                        attempts.answered(flight, outcome, Instant::now());
                        return Ok(sent);
                    }
                    Answer::Overloaded => {
                        attempts.overloaded(flight, Instant::now());
                        return Ok(sent);
                    }
                    Answer::Failed(reached, outcome) => (Ok(sent), reached, outcome),
                }
            }
            Err(failure) if failure.is_ours() => {
                attempts.answered(flight, balance::Outcome::Abandoned, Instant::now());
                return Err(failure.refused);
            }
            Err(failure) => {
                note(worker, peer, &flight, &failure);
                let outcome = failure.outcome(excused);
                (Err(failure.refused), failure.reached, outcome)
            }
        };
        let (left, replayable) = (exchange.time_left(), payload.is_whole());
        match attempts.failed(flight, (reached, outcome), replayable, left, Instant::now()) {
            // What came of the attempt is let go of first, so that its stream does not wait with us.
            Next::Again(after) => {
                drop(answer);
                if !after.is_zero() {
                    tokio::time::sleep(after).await;
                }
                now = Instant::now();
            }
            Next::End(reason) => {
                exchange.gave_up(reason);
                return answer;
            }
        }
    }
}

/// Lets what has failed be known where the next request looks.
fn note(worker: &Worker, peer: &Peer, flight: &Flight<'_>, failure: &Failure) {
    if let (Some(address), Reject::UpstreamTls(_)) = (flight.address(), failure.refused.reject) {
        worker.upstreams.refused(&peer.name, address, &failure.refused);
    }
}

/// A request that was answered; the sending half stays open where the request became a stream.
pub(crate) struct Sent {
    pub(crate) response: Response<RecvStream>,
    pub(crate) send: Option<h2::SendStream<Bytes>>,
    pub(crate) slot: Slot,
    upload: Option<Upload>,
}

/// A connection to a peer that is still there, and a place on it.
async fn connection(
    worker: &Rc<Worker>,
    state: &Snapshot,
    peer: usize,
    address: SocketAddr,
) -> Result<(Rc<Upstream>, Slot), Refused> {
    loop {
        let upstream = worker.upstreams.connection(worker, state, peer, address).await?;
        if upstream.is_alive().await {
            let slot = upstream.slot().await?;
            return Ok((upstream, slot));
        }
        worker.upstreams.retire(&upstream);
    }
}

async fn attempt(
    worker: &Rc<Worker>,
    plan: &Plan,
    payload: &mut Payload,
    flight: &mut Flight<'_>,
    time: Timeout,
    exchange: &mut Exchange,
    interim: &Interim<'_>,
) -> Result<Sent, Failure> {
    let state = Rc::clone(exchange.state());
    let peer = state.peer(plan.peer).ok_or(Failure::nobody(Reject::ServiceUnknown.into()))?;
    let address = flight.address().ok_or(Failure::nobody(Reject::NameUnresolved.into()))?;
    let connected = {
        let mut connecting = std::pin::pin!(connection(worker, &state, plan.peer, address));
        // Nearly always there is a connection with room, and no need of a clock.
        match at_once(connecting.as_mut()).await {
            Some(connected) => Some(connected),
            None => {
                let connected = within(time, None, connecting).await;
                // What a connection took says nothing about how quickly the replica answers; that there is none does.
                if let Some(Ok(_)) = &connected {
                    flight.sent(Instant::now());
                }
                connected
            }
        }
    };
    let timed_out = || Refused::new(Reject::UpstreamTimeout, "no connection with room for a request in time");
    let (upstream, slot) = connected.unwrap_or_else(|| Err(timed_out())).map_err(Failure::nobody)?;
    exchange.upstream(address);

    // From here to `send_request` nothing waits: nonces arrive in the order in which they were given.
    let mut request = route::request_to(plan, peer).map_err(Failure::nobody)?;
    spans::propagate(&worker.tracing, exchange.trace(), request.headers_mut());
    exchange.tell_deadline(request.headers_mut());
    let nonce = sign(&upstream, plan, peer, &mut request, exchange).map_err(Failure::nobody)?;
    let ends = payload.is_empty() && plan.kind == Kind::Plain;
    let sent = upstream.sender().send_request(request, ends);
    let (promised, stream) = sent.map_err(|error| failed(worker, &upstream, &error))?;
    let mut answering = Answering::new(promised);
    let mut early = None;
    if !payload.is_empty() && headers::expects_continue(&plan.head.headers) {
        early = answering.leave_to_send(interim).await;
    }
    let (send, upload) = match plan.kind {
        Kind::WebSocket | Kind::Tunnel => (Some(stream), None),
        // Whoever got an answer instead of leave has sent nothing, and will not.
        Kind::Plain if early.is_some() => (None, None),
        Kind::Plain => (None, payload.send(&upstream, nonce, stream, exchange)),
    };
    let answer = async {
        match early {
            Some(early) => early,
            None => answering.answer(interim).await,
        }
    };
    // A tunnel's answer waits for the peer's application to accept a connection, no longer.
    let timeout = with_peer_word(time);
    match within(timeout, upload.as_ref().map(Upload::progress), answer).await {
        None => Err(Failure {
            refused: payload
                .failure()
                .unwrap_or_else(|| Refused::new(Reject::UpstreamTimeout, "the peer did not answer in time")),
            reached: retry::Failure::Timeout,
        }),
        Some(Err(error)) => Err(match payload.failure() {
            Some(refused) => Failure { refused, reached: retry::Failure::Reset },
            None => failed(worker, &upstream, &error),
        }),
        Some(Ok(response)) => {
            upstream.heard();
            Ok(Sent { response, send, slot, upload })
        }
    }
}

fn with_peer_word(timeout: Timeout) -> Timeout {
    match timeout {
        Timeout::Off => Timeout::Off,
        Timeout::After(limit) => Timeout::After(limit + limits::PEER_WORD),
    }
}

fn sign(
    upstream: &Upstream,
    plan: &Plan,
    peer: &crate::state::Peer,
    request: &mut Request<()>,
    exchange: &mut Exchange,
) -> Result<Option<kiro_core::signature::Nonce>, Refused> {
    let Some(signer) = upstream.signer() else {
        exchange.signature("off");
        return Ok(None);
    };
    let method = request.method().clone();
    let head = kiro_core::signature::Head {
        method: method.as_str(),
        authority: peer.name.as_str(),
        path: if plan.kind == Kind::Tunnel { "/" } else { headers::path_of(&plan.head) },
        query: if plan.kind == Kind::Tunnel { None } else { plan.head.uri.query() },
    };
    let nonce = signer
        .borrow_mut()
        .sign(&head, request.headers_mut(), unix_seconds(SystemTime::now()))
        .map_err(|error| Refused::new(reject::unsignable(&error), error.to_string()))?;
    exchange.signature("signed");
    Ok(Some(nonce))
}

/// What a stream's error means, and whether the peer can have processed the request.
fn failed(worker: &Worker, upstream: &Rc<Upstream>, error: &h2::Error) -> Failure {
    if error.is_go_away() {
        worker.upstreams.retire(upstream);
    }
    let refused_stream = error.is_remote() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
    // h2 fails with a peer's GOAWAY exactly the streams above its last processed id.
    let above_last = error.is_remote() && error.is_go_away();
    if refused_stream {
        return Failure { refused: lost(error, None), reached: retry::Failure::RefusedStream };
    }
    if above_last {
        return Failure { refused: lost(error, None), reached: retry::Failure::GoAway };
    }
    // A peer that refused our certificate has not read anything.
    let reached = match upstream.refusal() {
        Some(_) => retry::Failure::Connect,
        None => retry::Failure::Reset,
    };
    Failure { refused: lost(error, upstream.refusal()), reached }
}

/// The peer has answered a CONNECT or a WebSocket handshake.
fn accepted(
    worker: &Rc<Worker>,
    plan: &Plan,
    response: Response<RecvStream>,
    send: h2::SendStream<Bytes>,
    slot: Slot,
    client: Option<Upgrade>,
) -> Result<Answered, Refused> {
    let (Some(client), true) = (client, response.status().is_success()) else {
        return Ok(Answered::Response(response, slot, None));
    };
    let Some(claim) = plan.claim.clone() else { return Ok(Answered::Response(response, slot, None)) };
    let registered = worker.tunnels.register(claim, &worker.snapshot())?;
    let (kind, version) = (plan.kind, plan.head.version);
    let key = plan.head.headers.get(SEC_WEBSOCKET_KEY).cloned();
    Ok(Answered::Stream(Stream { response, send, slot, registered, client, kind, version, key }))
}

/// Answers the client and joins the two ends once the HTTP library has let go of the client's connection.
fn open(worker: Rc<Worker>, stream: Stream, mut exchange: Exchange) -> Response<AnswerBody> {
    let (head, recv) = stream.response.into_parts();
    let mut headers = head.headers;
    tidy(&mut headers, &mut exchange);
    let response = match stream.kind {
        Kind::WebSocket => websocket::opened(headers, stream.version, stream.key.as_ref()),
        Kind::Plain | Kind::Tunnel => Response::new(()),
    };
    exchange.status(response.status());
    spawn_local(async move {
        // A client that goes away now drops the exchange, which is recorded.
        let Some(client) = stream.client.stream().await else { return };
        tunnel::join(&worker, client, (recv, stream.send), &stream.registered, exchange).await;
        drop(stream.slot);
    });
    response.map(|()| AnswerBody::fixed(Bytes::new(), None, None))
}

/// Cleans a peer's answer and notes whether its sidecar, rather than its application, gave it.
pub(crate) fn tidy(headers: &mut HeaderMap, exchange: &mut Exchange) -> Option<Reject> {
    headers::response(headers, true);
    let code = headers.get(&fields::REJECT).and_then(|code| reject::known_code(code.as_bytes()))?;
    exchange.peer_reject(code);
    reject::by_code(code)
}
