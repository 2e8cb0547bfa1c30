//! How does a request from outside the mesh reach the application?
//!
//! Like an inbound one, but for its proof: nobody outside has a certificate of the mesh or a key, so the policy's lines for
//! `ingress` are all that it has to pass, and what it says of its way is replaced.

use std::rc::Rc;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, SEC_WEBSOCKET_KEY};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use kiro_tls::HandshakeContext;
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio_rustls::server::TlsStream;

use crate::admission::Place;
use crate::answer;
use crate::app::{self, AppAnswer, AppStream, Handshake};
use crate::body::{AnswerBody, AppBody, ClientBody};
use crate::client::{Client, RequestBody, Upgrade};
use crate::exchange::{Direction, Exchange, Progress, Via};
use crate::framing::Turn;
use crate::headers::{self, Kind};
use crate::proof::{self, Trusted};
use crate::rates;
use crate::reject::Refused;
use crate::serve::{self, Front};
use crate::spans;
use crate::tunnel;
use crate::websocket;
use crate::worker::Worker;

/// Serves one connection to the plain port.
pub(crate) async fn serve_plain(worker: Rc<Worker>, stream: TcpStream, place: Rc<Place>) {
    serve::plain(worker, stream, via(place), Front::Ingress { tls: false }).await;
}

/// Serves one connection to the TLS port.
pub(crate) async fn serve_tls(worker: Rc<Worker>, stream: TcpStream, place: Rc<Place>) {
    // Boxed: what a handshake needs is given back when it is over.
    let Some(stream) = Box::pin(shake_hands(&worker, stream, &place)).await else { return };
    serve::encrypted(worker, stream, via(place), Front::Ingress { tls: true }).await;
}

async fn shake_hands(worker: &Worker, stream: TcpStream, place: &Place) -> Option<Box<TlsStream<TcpStream>>> {
    let state = worker.snapshot();
    let tls = state.ingress_server.as_ref()?;
    let context = HandshakeContext {
        service: state.me.clone(),
        local: stream.local_addr().ok(),
        remote: Some(place.remote),
        direction: "ingress",
    };
    let turn = worker.turn(Direction::Ingress, &stream).await?;
    let handshake = Box::pin(tls.accept(stream, &context));
    Some(Box::new(worker.accept(Direction::Ingress, turn, handshake).await?.stream))
}

fn via(place: Rc<Place>) -> Rc<Via> {
    Rc::new(Via {
        direction: Direction::Ingress,
        caller: None,
        caller_proof: "none",
        place,
        tunnelled: false,
    })
}

/// Answers one request from outside.
pub(crate) async fn answer(
    worker: Rc<Worker>,
    via: Rc<Via>,
    tls: bool,
    request: Request<RequestBody>,
    client: Client<'_>,
    turn: Option<Turn>,
) -> Response<AnswerBody> {
    let state = worker.snapshot();
    let (head, body) = request.into_parts();
    let trace = spans::outside(&worker.tracing, &head.headers);
    let mut exchange = Exchange::begin(&worker, &state, &via, &head, trace);
    let has_body = !http_body::Body::is_end_stream(&body);
    let request = Request::from_parts(head, body);
    let answered = Box::pin(story(&worker, &via, tls, request, client, &mut exchange)).await;
    match answered {
        Ok(Answered::Response(mut response)) => {
            exchange.status(response.status());
            exchange.tell_rates(response.headers_mut());
            response.map(|body| AnswerBody::app(body, exchange, turn))
        }
        Ok(Answered::Stream(stream)) => open(worker, stream, exchange),
        Ok(Answered::Health(status, word)) => {
            exchange.status(status);
            let mut response = healthz(status, word);
            if has_body && turn.is_some() {
                answer::closes(response.headers_mut());
            }
            response.map(|text| AnswerBody::fixed(text, Some(exchange), turn))
        }
        Err(refused) => {
            exchange.refused(&refused);
            let mut response = answer::refused(&refused, exchange.is_grpc());
            exchange.tell_rates(response.headers_mut());
            if has_body && turn.is_some() {
                answer::closes(response.headers_mut());
            }
            response.map(|text| AnswerBody::fixed(text, Some(exchange), turn))
        }
    }
}

/// What the story ends with.
enum Answered {
    /// The application's answer.
    Response(Response<AppAnswer>),
    /// Bytes both ways from here on.
    Stream(Stream),
    /// The sidecar's own word of how it and its application are.
    Health(StatusCode, &'static str),
}

/// An open stream to the application, and the client's connection that becomes its other end.
struct Stream {
    answer: Response<()>,
    app: AppStream,
    registered: tunnel::Registered,
    client: Upgrade,
}

/// A request's way, top to bottom.
async fn story(
    worker: &Rc<Worker>,
    via: &Via,
    tls: bool,
    request: Request<RequestBody>,
    client: Client<'_>,
    exchange: &mut Exchange,
) -> Result<Answered, Refused> {
    let mut admitted = headers::ingress(request)?;
    if admitted.kind == Kind::WebSocket {
        exchange.websocket();
    }
    if is_healthz(&admitted, exchange) {
        let (status, word) = worker.health.at_ingress(worker.phase.current());
        return Ok(Answered::Health(status, word));
    }
    if !exchange.state().service.ingress.as_ref().is_some_and(|ingress| ingress.trust_forwarded) {
        headers::forwarded(&mut admitted.head.headers, via.place.remote.ip(), tls);
    }
    let permitted = proof::authorize_ingress(admitted, exchange)?;
    let trusted = proof::trust_ingress(permitted);
    worker.health.admit(exchange.state())?;
    rates::check(&trusted, exchange)?;
    match (trusted.kind(), client.upgrade) {
        (Kind::WebSocket, Some(upgrade)) => Box::pin(websocket(worker, trusted, upgrade, exchange)).await,
        _ => {
            let outgoing = outgoing(trusted, exchange)?;
            Ok(Answered::Response(app::send(worker, outgoing, exchange, &client.interim).await?))
        }
    }
}

/// Whether a balancer outside asks how we are, where the mesh file lets it. No line of `allow` is asked: it says no more than a word.
fn is_healthz(admitted: &headers::Admitted<RequestBody>, exchange: &Exchange) -> bool {
    let ingress = exchange.state().service.ingress.as_ref();
    ingress.is_some_and(|ingress| ingress.healthz)
        && admitted.kind == Kind::Plain
        && matches!(admitted.head.method, Method::GET | Method::HEAD)
        && admitted.head.uri.path() == "/healthz"
}

fn healthz(status: StatusCode, word: &'static str) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from_static(word.as_bytes()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn websocket(
    worker: &Rc<Worker>,
    trusted: Trusted<RequestBody>,
    client: Upgrade,
    exchange: &mut Exchange,
) -> Result<Answered, Refused> {
    let claim = trusted.claim(exchange);
    let (version, key) = (trusted.version(), trusted.header(&SEC_WEBSOCKET_KEY).cloned());
    let outgoing = outgoing(trusted, exchange)?;
    match app::websocket(worker, outgoing, exchange).await? {
        Handshake::Answered(response) => {
            if version == Version::HTTP_2 {
                app::not_opened(&response)?;
            }
            Ok(Answered::Response(response))
        }
        Handshake::Open(headers, app) => {
            let registered = worker.tunnels.register(claim, &worker.snapshot())?;
            let answer = websocket::opened(headers, version, key.as_ref());
            Ok(Answered::Stream(Stream { answer, app, registered, client }))
        }
    }
}

fn outgoing(trusted: Trusted<RequestBody>, exchange: &mut Exchange) -> Result<app::Outgoing, Refused> {
    let (trusted, incoming, _unsigned) = trusted.take_body();
    let broken = app::Broken::default();
    let (body, progress) = if http_body::Body::is_end_stream(&incoming) {
        (AppBody::Empty, None)
    } else {
        let progress = Progress::new();
        let (pace, of_it) = (exchange.request_pace(), Rc::clone(&broken));
        let body = ClientBody::new(incoming, Rc::clone(&progress), pace, of_it);
        (AppBody::Client(body), Some(progress))
    };
    let caller = HeaderValue::from_static("ingress");
    app::dress(trusted.with_body(body), exchange, &caller, progress, broken)
}

/// Answers the client's handshake and joins it with the application.
fn open(worker: Rc<Worker>, stream: Stream, mut exchange: Exchange) -> Response<AnswerBody> {
    let Stream { answer, app, registered, client } = stream;
    exchange.status(answer.status());
    spawn_local(async move {
        let Some(client) = client.stream().await else { return };
        tunnel::join_bytes(&worker, client, app, &registered, exchange).await;
    });
    answer.map(|()| AnswerBody::fixed(Bytes::new(), None, None))
}
