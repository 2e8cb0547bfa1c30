//! What does `/mesh/health` say?
//!
//! The mesh as this sidecar sees it: its own application, and each service of the mesh file with its replicas, as far as it has called
//! them. Nobody is asked for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use kiro_core::balance::View as Replica;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::AppHealth;
use crate::drain::Phase;
use crate::edge::{Edge, Edges, milliseconds};
use crate::state::{Peer, State};

/// Writes it.
pub(crate) fn document(state: &State, health: &AppHealth, phase: Phase, edges: &Edges) -> Value {
    let now = Instant::now();
    let called: HashMap<_, _> = edges.all().into_iter().map(|edge| (edge.name.clone(), edge)).collect();
    let services: Vec<Value> =
        state.peers.iter().map(|peer| service(peer, called.get(&peer.name), now)).collect();
    let seen = health.seen();
    let since = seen.since.and_then(|since| OffsetDateTime::from(since).format(&Rfc3339).ok());
    json!({
        "service": state.me.as_str(),
        "draining": phase != Phase::Serving,
        "app": {
            "check": state.service.health.as_ref().map(|check| check.question.to_string()),
            "state": seen.state.name(),
            "since": since,
            "last_failure": seen.last_failure,
        },
        "services": services,
    })
}

fn service(peer: &Peer, edge: Option<&Arc<Edge>>, now: Instant) -> Value {
    let name = peer.name.as_str();
    let unused = json!({ "name": name, "unused": true });
    let Some(edge) = edge else { return unused };
    let replicas = edge.replicas.view(now);
    let outcome = edge.known.borrow().outcome.clone();
    // One that was not called for long is asked for no more, and nothing is known of it.
    if replicas.is_empty() && outcome.is_none() {
        return unused;
    }
    let requests: serde_json::Map<String, Value> =
        peer.metrics.statuses().map(|(status, count)| (status.to_owned(), json!(count))).collect();
    json!({
        "name": name,
        "unused": false,
        "replicas": replicas.iter().map(replica).collect::<Vec<_>>(),
        "breaker": edge.current_breaker().map(|breaker| breaker.snapshot(now).state.word()),
        "retry_budget": edge.budget.left(now),
        "name_age_ms": edge.age(now).map(milliseconds),
        "name_error": outcome.and_then(Result::err).as_deref(),
        "requests": requests,
    })
}

fn replica(replica: &Replica) -> Value {
    json!({
        "address": replica.address.to_string(),
        "state": replica.state.as_str(),
        // A latency is often below a millisecond.
        "latency_ms": replica.latency.map(|latency| (latency.as_secs_f64() * 1e6).round() / 1e3),
        "in_flight": replica.in_flight,
        "failures": replica.failures,
        "out_for_ms": replica.out_for.map(milliseconds),
    })
}
