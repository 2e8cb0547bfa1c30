//! What is there to say of the services that are called, and of their replicas?

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use kiro_core::balance::State;
use kiro_core::breaker::BreakerState;
use prometheus_client::encoding::DescriptorEncoder;

use super::catalogue as names;
use super::collect::Family;
use crate::edge::Edge;

/// The states of a breaker, in the order of their gauges.
pub(super) const BREAKER_STATES: [BreakerState; 3] =
    [BreakerState::Closed, BreakerState::HalfOpen, BreakerState::Open];

/// Writes them.
pub(super) fn encode(edges: &[Arc<Edge>], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let now = Instant::now();
    replicas(edges, now, encoder)?;
    let mut family = Family::begin(encoder, &names::RETRIES)?;
    for edge in edges {
        for (outcome, count) in edge.retries.counts().filter(|(_, count)| *count > 0) {
            family.counter(&[("to", edge.name.as_str()), ("outcome", outcome)], count)?;
        }
    }
    let mut family = Family::begin(encoder, &names::RETRY_BUDGET)?;
    for edge in edges {
        family.gauge(&[("to", edge.name.as_str())], i64::from(edge.budget.left(now)))?;
    }
    breakers(edges, now, encoder)?;
    let mut family = Family::begin(encoder, &names::NAME_AGE)?;
    for edge in edges {
        let Some(age) = edge.age(now) else { continue };
        family.gauge(&[("to", edge.name.as_str())], i64::try_from(age.as_secs()).unwrap_or(i64::MAX))?;
    }
    Ok(())
}

fn replicas(edges: &[Arc<Edge>], now: Instant, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let views: Vec<_> = edges.iter().map(|edge| (edge.name.as_str(), edge.replicas.view(now))).collect();
    let mut family = Family::begin(encoder, &names::REPLICAS)?;
    for (to, views) in &views {
        for state in State::ALL {
            let count = views.iter().filter(|view| view.state == state).count();
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            family.gauge(&[("to", *to), ("state", state.as_str())], count)?;
        }
    }
    let mut family = Family::begin(encoder, &names::EJECTIONS)?;
    for (to, views) in &views {
        let ejections = views.iter().map(|view| u64::from(view.ejections)).sum();
        family.counter(&[("to", *to)], ejections)?;
    }
    Ok(())
}

fn breakers(edges: &[Arc<Edge>], now: Instant, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let breakers: Vec<_> = edges
        .iter()
        .filter_map(|edge| Some((edge.name.as_str(), edge.current_breaker()?.snapshot(now))))
        .collect();
    let mut family = Family::begin(encoder, &names::BREAKER)?;
    for (to, breaker) in &breakers {
        for state in BREAKER_STATES {
            family.gauge(&[("to", *to), ("state", state.word())], i64::from(breaker.state == state))?;
        }
    }
    let mut family = Family::begin(encoder, &names::BREAKER_OPENED)?;
    for (to, breaker) in &breakers {
        family.counter(&[("to", *to)], breaker.opened_count)?;
    }
    Ok(())
}
