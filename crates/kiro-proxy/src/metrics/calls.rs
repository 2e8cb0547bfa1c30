//! What is there to say of the services that are called, and of their replicas?

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use kiro_core::balance::State;
use kiro_core::breaker::BreakerState;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;

use super::catalogue::{self as names, Entry};
use super::collect::Family;
use crate::edge::{Edge, Edges};
use crate::health::AppHealth;

/// The states of a breaker, in the order of their gauges.
pub(super) const BREAKER_STATES: [BreakerState; 3] =
    [BreakerState::Closed, BreakerState::HalfOpen, BreakerState::Open];

/// Writes them.
pub(super) fn encode(edges: &Edges, app: &AppHealth, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    called(&edges.all(), encoder)?;
    application(app, encoder)?;
    rates(edges, encoder)?;
    concurrency(edges, encoder)
}

fn called(edges: &[Arc<Edge>], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let now = Instant::now();
    replicas(edges, now, encoder)?;
    let mut family = Family::begin(encoder, &names::RETRIES)?;
    for edge in edges {
        for (outcome, count) in edge.retries.counts().filter(|(_, count)| *count > 0) {
            family.counter(&[("to", edge.name.as_str()), ("outcome", outcome)], count)?;
        }
    }
    let mut family = Family::begin(encoder, &names::FAULTS)?;
    for edge in edges {
        for (fault, count) in edge.faults.counts().filter(|(_, count)| *count > 0) {
            family.counter(&[("to", edge.name.as_str()), ("fault", fault)], count)?;
        }
    }
    let mut family = Family::begin(encoder, &names::COPIES)?;
    for edge in edges {
        for (copy, count) in edge.copies.counts().filter(|(_, count)| *count > 0) {
            family.counter(&[("to", edge.name.as_str()), ("copy", copy)], count)?;
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

/// What the lines of `limits` have done.
fn rates(edges: &Edges, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let rates = edges.rates.all();
    let mut family = Family::begin(encoder, &names::RATE_LIMITED)?;
    for (line, bucket) in &rates {
        family.counter(&[("line", line.as_str())], bucket.limited())?;
    }
    let keys = || rates.iter().filter_map(|(line, bucket)| Some((line.as_str(), bucket.keys()?)));
    let mut family = Family::begin(encoder, &names::RATE_KEYS)?;
    for (line, (known, _)) in keys() {
        family.gauge(&[("line", line)], i64::from(known))?;
    }
    let mut family = Family::begin(encoder, &names::RATE_KEYS_OVERFLOWED)?;
    for (line, (_, overflowed)) in keys() {
        family.counter(&[("line", line)], overflowed)?;
    }
    Ok(())
}

/// What the application has to do, where it is declared how much that may be.
fn concurrency(edges: &Edges, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let limit = edges.app.current();
    let rule = limit.as_ref().map(|limit| &limit.rule);
    one_gauge_of(encoder, &names::CONCURRENCY_LIMIT, rule.map(|rule| rule.limit()))?;
    one_gauge_of(encoder, &names::CONCURRENCY_IN_FLIGHT, rule.map(|rule| rule.in_flight()))?;
    one_gauge_of(encoder, &names::CONCURRENCY_WAITING, rule.map(|rule| rule.waiting()))?;
    let mut family = Family::begin(encoder, &names::OVERLOADED)?;
    for (cause, count) in limit.iter().flat_map(|limit| limit.shed()) {
        family.counter(&[("cause", cause)], count)?;
    }
    Ok(())
}

/// A value, where there is one to show.
fn one_gauge_of(encoder: &mut DescriptorEncoder<'_>, entry: &Entry, value: Option<u32>) -> fmt::Result {
    let metric = encoder.encode_descriptor(entry.name, entry.help, None, entry.kind)?;
    value.map_or(Ok(()), |value| ConstGauge::new(i64::from(value)).encode(metric))
}

/// How the application does, by its checks.
fn application(app: &AppHealth, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let now = app.seen().state;
    let mut family = Family::begin(encoder, &names::APP_HEALTH)?;
    for state in kiro_core::health::State::ALL {
        family.gauge(&[("state", state.name())], i64::from(state == now))?;
    }
    let mut family = Family::begin(encoder, &names::APP_HEALTH_CHANGES)?;
    for (state, count) in app.changes() {
        family.counter(&[("state", state.name())], count)?;
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
