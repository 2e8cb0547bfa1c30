//! To which service does an application's request go, and may it?

use http::request::Parts;
use http::uri::{PathAndQuery, Scheme};
use http::{Method, Request, Uri};
use kiro_core::mesh::Protocol;
use kiro_core::policy::Verdict;
use kiro_core::{authority, fields};

use crate::exchange::{Callee, Direction, Exchange};
use crate::headers::{self, Admitted, Kind};
use crate::mirror::Copied;
use crate::proof::{call_of, claim_of};
use crate::reject::{Refused, Reject};
use crate::state::Peer;
use crate::tunnel::Claim;

/// A request that this side's policy allows, dressed for the peer. The destination judges it again: its word counts.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The peer's place in the state.
    pub(crate) peer: usize,
    /// What it asks for.
    pub(crate) kind: Kind,
    /// What an open stream of it would be judged by again.
    pub(crate) claim: Option<Claim>,
    /// The head; its URI still is the application's.
    pub(crate) head: Parts,
    /// The copy that it is to have.
    pub(crate) copied: Option<Copied>,
}

/// Finds the service that a request names and asks the policy.
pub(crate) fn plan<B>(admitted: Admitted<B>, exchange: &mut Exchange) -> Result<(Plan, B), Refused> {
    let (named, protocol) = find(&admitted, exchange)?;
    let index = match exchange.state().peer(named).and_then(|peer| peer.versions.as_deref()) {
        None => named,
        Some(versions) => {
            let version = versions.choose(&admitted.head.headers, fastrand::u64(..)).unwrap_or(named);
            exchange.split(named);
            version
        }
    };
    let name = match exchange.state().peer(index) {
        Some(peer) => peer.name.clone(),
        None => return Err(Reject::ServiceUnknown.into()),
    };
    exchange.callee(Callee::Peer(index));
    let verdict = exchange.state().policy.authorize_outbound(name.as_str(), &call_of(&admitted));
    exchange.policy(verdict);
    if let Verdict::Denied(denial) = verdict {
        return Err(Reject::Denied(denial).into());
    }
    if protocol == Protocol::Tcp && admitted.kind != Kind::Tunnel {
        return Err(Reject::ServiceIsTcp.into());
    }
    let copied = copied(index, &admitted, exchange);
    let claim =
        (admitted.kind != Kind::Plain).then(|| claim_of(&admitted, Direction::Outbound, Some(name.as_str())));
    let Admitted { mut head, body, kind, .. } = admitted;
    let state = std::rc::Rc::clone(exchange.state());
    let peer = state.peer(index).ok_or(Reject::ServiceUnknown)?;
    exchange.take_deadline(&mut head, &peer.traffic)?;
    headers::for_peer(&mut head, &name, kind)?;
    if index != named {
        // A version's sidecar takes no other service's name for its own, and its application sees its own name as Host.
        head.headers.remove(&fields::HOST);
    }
    Ok((Plan { peer: index, kind, claim, head, copied }, body))
}

/// The copy that a request to a peer is to have, with the policy's word on it.
fn copied<B>(index: usize, admitted: &Admitted<B>, exchange: &Exchange) -> Option<Copied> {
    let state = exchange.state();
    let mirror = state.peer(index)?.mirror.as_ref()?;
    if admitted.kind != Kind::Plain {
        return None;
    }
    let to = *mirror.copy_to(fastrand::u64(..))?;
    let verdict = state.policy.authorize_outbound(state.peer(to)?.name.as_str(), &call_of(admitted));
    Some(Copied { to, verdict })
}

/// The service that a request names: its place among the peers, and what its application speaks.
pub(crate) fn find<B>(admitted: &Admitted<B>, exchange: &mut Exchange) -> Result<(usize, Protocol), Refused> {
    let requested = headers::requested_authority(&admitted.head)?;
    let named = match authority::service_of(requested) {
        Ok(named) => named,
        Err(error) => {
            exchange.callee(Callee::Unknown(shortened(requested)));
            return Err(Refused::new(Reject::AuthorityInvalid, error.to_string()));
        }
    };
    if let Some((index, peer)) = exchange.state().find(&named) {
        return Ok((index, peer.protocol));
    }
    let unknown = shortened(&named);
    let refused = if *named == *exchange.state().me.as_str() {
        Refused::new(Reject::ServiceUnknown, "a service does not call itself through the mesh")
    } else if named.contains('.') {
        Refused::new(Reject::HostExternal, "hosts outside the mesh can't be called")
    } else {
        Refused::new(Reject::ServiceUnknown, "the mesh file has no such service")
    };
    exchange.callee(Callee::Unknown(unknown));
    Err(refused)
}

/// A name from a request, for the log: no longer than a DNS name can be.
fn shortened(name: &str) -> Box<str> {
    name.chars().take(253).collect::<String>().into()
}

/// The head of one attempt, as it goes to the peer's sidecar.
pub(crate) fn request_to(plan: &Plan, peer: &Peer) -> Result<Request<()>, Refused> {
    let mut request = Request::new(());
    request.headers_mut().clone_from(&plan.head.headers);
    *request.version_mut() = http::Version::HTTP_2;
    let mut uri = http::uri::Parts::default();
    uri.authority = Some(peer.authority.clone());
    match plan.kind {
        Kind::Tunnel => *request.method_mut() = Method::CONNECT,
        Kind::Plain | Kind::WebSocket => {
            uri.scheme = Some(Scheme::HTTPS);
            uri.path_and_query = Some(
                plan.head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")),
            );
            *request.method_mut() = plan.head.method.clone();
        }
    }
    if plan.kind == Kind::WebSocket {
        *request.method_mut() = Method::CONNECT;
        request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    }
    *request.uri_mut() =
        Uri::from_parts(uri).map_err(|error| Refused::new(Reject::PathInvalid, error.to_string()))?;
    Ok(request)
}
