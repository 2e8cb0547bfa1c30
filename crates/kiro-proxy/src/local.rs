//! How does a connection to a local port reach a tcp service?
//!
//! The application connects to `127.0.0.1:<port>` and speaks its own protocol; from here on its bytes go the way of a CONNECT:
//!
//! ```text
//! accept ─► plan ─► attempts: connect ─► slot ─► sign ─► send ─► bytes both ways
//!           403              502, 503                             cut when the policy changes
//! ```
//!
//! The way to the service begins at once: in many protocols the server speaks first. What the client sends meanwhile waits in its
//! socket. There is no status that such a client could read, so a connection that can't be had is reset; the access line says why.

pub(crate) mod ports;

use std::rc::Rc;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{Method, Request, Uri, Version, request};
use kiro_core::identity::ServiceName;
use kiro_core::mesh::Protocol;
use tokio::net::TcpStream;

use crate::admission::Place;
use crate::exchange::{Callee, Direction, Exchange, Via};
use crate::headers::{Admitted, Kind};
use crate::interim::Interim;
use crate::outbound::{self, Sent};
use crate::payload::Payload;
use crate::reject::{Refused, Reject};
use crate::route;
use crate::state::State;
use crate::tunnel::{self, Registered};
use crate::upstream::pool::Slot;
use crate::worker::Worker;

/// Serves one connection of the application to `service`.
async fn serve(worker: Rc<Worker>, stream: TcpStream, place: Rc<Place>, service: Rc<ServiceName>) {
    let state = worker.snapshot();
    let via = Rc::new(Via {
        direction: Direction::Outbound,
        caller: Some(state.me.clone()),
        caller_proof: "loopback",
        place,
        tunnelled: false,
    });
    let head = head(&state, &service);
    let mut exchange = Exchange::begin(&worker, &state, &via, &head, worker.tracing.root());
    exchange.without_http();
    drop(state);
    match Box::pin(story(&worker, head, &service, &mut exchange)).await {
        Ok(Some(Open { streams, slot, registered })) => {
            tunnel::join_tcp(&worker, stream, streams, &registered, exchange).await;
            drop(slot);
        }
        Ok(None) => tunnel::reset(stream),
        Err(refused) => {
            exchange.refused(&refused);
            tunnel::reset(stream);
        }
    }
}

/// The CONNECT that stands for the connection.
fn head(state: &State, service: &ServiceName) -> request::Parts {
    let (mut head, ()) = Request::new(()).into_parts();
    head.method = Method::CONNECT;
    head.version = Version::HTTP_2;
    if let Some((_, peer)) = state.find(service.as_str()) {
        head.uri = Uri::from(peer.authority.clone());
    }
    head
}

/// A stream that the peer has accepted.
struct Open {
    streams: (RecvStream, SendStream<Bytes>),
    slot: Slot,
    registered: Registered,
}

/// A connection's way, top to bottom; none where the peer's sidecar has refused it.
async fn story(
    worker: &Rc<Worker>,
    head: request::Parts,
    service: &ServiceName,
    exchange: &mut Exchange,
) -> Result<Option<Open>, Refused> {
    // The listener may be older than the state that its last connections are judged by.
    if !exchange.state().find(service.as_str()).is_some_and(|(_, peer)| peer.protocol == Protocol::Tcp) {
        exchange.callee(Callee::Unknown(service.as_str().into()));
        return Err(Refused::new(Reject::ServiceUnknown, "the mesh file has no such tcp service any more"));
    }
    let (plan, ()) =
        route::plan(Admitted { head, body: (), kind: Kind::Tunnel, ambiguous: false }, exchange)?;
    let Sent { response, send, slot, .. } =
        outbound::deliver(worker, &plan, &mut Payload::Empty, exchange, &Interim::unwanted()).await?;
    let (mut head, recv) = response.into_parts();
    exchange.status(head.status);
    outbound::tidy(&mut head.headers, exchange);
    let (Some(claim), Some(send), true) = (plan.claim, send, head.status.is_success()) else {
        return Ok(None);
    };
    let registered = worker.tunnels.register(claim, &worker.snapshot())?;
    Ok(Some(Open { streams: (recv, send), slot, registered }))
}
