//! How does another service get a copy of a request?
//!
//! Beside the original, as a call of its own: judged, signed, logged and counted like any other, and a span below the original's.
//!
//! **Invariant.** A copy never delays or fails its original: it has a task of its own, of which a worker has a few, and no body but one
//! that is held already.

use std::rc::Rc;
use std::sync::Arc;

use h2::RecvStream;
use http::Response;
use kiro_core::fields;
use kiro_core::policy::Verdict;

use crate::exchange::{Callee, Exchange};
use crate::headers::Kind;
use crate::interim::Interim;
use crate::limits;
use crate::outbound;
use crate::payload::Payload;
use crate::reject::{Refused, Reject};
use crate::route::Plan;
use crate::worker::Worker;

/// What becomes of copies, for the metric: answered; refused or broken; too many under way; with a body that is not held.
pub(crate) const WORDS: [&str; 4] = ["answered", "failed", "too_many", "streamed"];

/// A copy that a request is to have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copied {
    /// Its receiver's place among the peers.
    pub(crate) to: usize,
    /// What the policy says of it.
    pub(crate) verdict: Verdict,
}

/// Sends a copy of a planned request beside it.
pub(crate) fn send(worker: &Rc<Worker>, copied: Copied, plan: &Plan, payload: &Payload, exchange: &Exchange) {
    let state = Rc::clone(exchange.state());
    let Some(peer) = state.peer(copied.to) else { return };
    let [answered, failed, too_many, streamed] = WORDS;
    let edge = Arc::clone(&peer.calls().edge);
    let Some(mut payload) = payload.again() else { return edge.copies.count(streamed) };
    let Some(place) = Place::take(worker) else { return edge.copies.count(too_many) };
    let mut head = plan.head.clone();
    // Another service's sidecar takes no other name for its own, and nobody is told of interim answers.
    head.headers.remove(&fields::HOST);
    head.headers.remove(&fields::INTERIM);
    let trace = worker.tracing.child(exchange.trace());
    let mut copy = Exchange::begin(worker, &state, exchange.via(), &head, trace);
    copy.callee(Callee::Peer(copied.to));
    copy.copy_of(plan.peer);
    copy.policy(copied.verdict);
    if let Payload::Held(bytes) = &payload {
        copy.request_bytes(bytes.len());
    }
    let worker = Rc::clone(worker);
    tokio::task::spawn_local(async move {
        let sending = deliver(&worker, copied, head, &mut payload, &mut copy);
        let result = tokio::time::timeout(limits::COPY, Box::pin(sending)).await;
        let late = || Refused::new(Reject::UpstreamTimeout, "the copy did not end in time");
        match result.unwrap_or_else(|_| Err(late())) {
            Ok(None) => edge.copies.count(answered),
            Ok(Some(_)) => edge.copies.count(failed),
            Err(refused) => {
                copy.refused(&refused);
                edge.copies.count(failed);
            }
        }
        drop(place);
    });
}

/// Gives the reason for which the receiver's sidecar refused the copy, if it did.
async fn deliver(
    worker: &Rc<Worker>,
    copied: Copied,
    mut head: http::request::Parts,
    payload: &mut Payload,
    copy: &mut Exchange,
) -> Result<Option<Reject>, Refused> {
    if let Verdict::Denied(denial) = copied.verdict {
        return Err(Reject::Denied(denial).into());
    }
    let state = Rc::clone(copy.state());
    let peer = state.peer(copied.to).ok_or(Reject::ServiceUnknown)?;
    copy.take_deadline(&mut head, &peer.traffic)?;
    let plan = Plan { peer: copied.to, kind: Kind::Plain, claim: None, head, copied: None };
    let sent = outbound::deliver(worker, &plan, payload, copy, &Interim::unwanted()).await?;
    let refused = drop_answer(sent.response, copy).await;
    drop(sent.slot);
    Ok(refused)
}

/// Reads a small answer to its end, so that its sender has not been cut off; a large one is. Gives the reason for which its sidecar
/// refused the copy, if it did.
async fn drop_answer(response: Response<RecvStream>, copy: &mut Exchange) -> Option<Reject> {
    let (mut head, mut body) = response.into_parts();
    let refused = outbound::tidy(&mut head.headers, copy);
    copy.status(refused.filter(|_| head.status.is_success()).map_or(head.status, Reject::status));
    let mut left = limits::COPY_ANSWER_BYTES;
    while let Some(Ok(data)) = body.data().await {
        copy.response_bytes(data.len());
        if data.len() > left || body.flow_control().release_capacity(data.len()).is_err() {
            break;
        }
        left -= data.len();
    }
    refused
}

/// One of the few copies that a worker has under way.
struct Place(Rc<Worker>);

impl Place {
    fn take(worker: &Rc<Worker>) -> Option<Self> {
        let under_way = worker.copies.get();
        if under_way >= limits::COPIES {
            return None;
        }
        worker.copies.set(under_way + 1);
        Some(Self(Rc::clone(worker)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.copies.set(self.0.copies.get().saturating_sub(1));
    }
}
