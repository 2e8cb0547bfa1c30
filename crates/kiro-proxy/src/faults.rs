//! What goes wrong with a request because the mesh file asks for it?
//!
//! In the caller's sidecar, after the policy has allowed the request and before anything of it is sent: what was asked for costs the
//! callee nothing, and does not count against it.

use std::time::Duration;

use kiro_core::mesh::Timeout;
use kiro_core::shaping::Injected;

use crate::edge::milliseconds;
use crate::exchange::Exchange;
use crate::headers;
use crate::reject::{Refused, Reject};
use crate::route::Plan;
use crate::state::State;

/// The words for what can go wrong, for log, metric and span.
pub(crate) const WORDS: [&str; 3] = ["delay", "abort", "delay+abort"];

/// What is to go wrong with a request.
pub(crate) fn of(plan: &Plan, exchange: &Exchange) -> Option<Injected> {
    let lines = exchange.state().peer(plan.peer)?.faults.as_ref()?;
    let path = headers::path_of(&plan.head);
    let line = lines.iter().find(|line| line.fits(exchange.method(), path))?;
    let injected = line.fault.inject(&mut || fastrand::u64(..));
    (injected != Injected::default()).then_some(injected)
}

fn word(injected: Injected) -> &'static str {
    let [delay, abort, both] = WORDS;
    match (injected.delay, injected.abort) {
        (Some(_), Some(_)) => both,
        (_, Some(_)) => abort,
        (_, None) => delay,
    }
}

/// Lets it go wrong: waits, but no longer than the request has time, then refuses.
pub(crate) async fn inject(injected: Injected, plan: &Plan, exchange: &mut Exchange) -> Result<(), Refused> {
    let word = word(injected);
    exchange.fault(word);
    if let Some(peer) = exchange.state().peer(plan.peer) {
        peer.calls().edge.faults.count(word);
    }
    if let Some(delay) = injected.delay {
        wait(delay, exchange.time_left()).await?;
    }
    match injected.abort {
        Some(status) => {
            Err(Refused::new(Reject::FaultInjected(status), "the mesh file's `faults` ask for it"))
        }
        None => Ok(()),
    }
}

async fn wait(delay: Duration, left: Timeout) -> Result<(), Refused> {
    match left {
        Timeout::After(left) if left <= delay => {
            tokio::time::sleep(left).await;
            Err(Refused::new(Reject::UpstreamTimeout, "the delay that `faults` ask for took all of its time"))
        }
        Timeout::After(_) | Timeout::Off => {
            tokio::time::sleep(delay).await;
            Ok(())
        }
    }
}

/// Says at which edges faults are on, so that nobody hunts one.
pub(crate) fn tell(state: &State) {
    let service = state.me.as_str();
    for peer in &state.peers {
        for line in peer.faults.iter().flat_map(|lines| lines.iter()) {
            let (delay, abort) = (line.fault.delay(), line.fault.abort());
            tracing::warn!(
                target: "kiro::faults", service, to = peer.name.as_str(),
                delay_ms = delay.map(|(_, delay)| milliseconds(delay)),
                delay_percent = delay.map(|(share, _)| share.in_percent()),
                abort = abort.map(|(_, status)| status.as_u16()),
                abort_percent = abort.map(|(share, _)| share.in_percent()),
                "faults are on: the mesh file asks for requests to go wrong"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_delay_is_no_longer_than_the_request_has_time() {
        let seconds = Duration::from_secs;
        for (delay, left, waited, passes) in [
            (1, Timeout::After(seconds(2)), 1, true),
            (3, Timeout::After(seconds(2)), 2, false),
            (3, Timeout::Off, 3, true),
        ] {
            let begin = tokio::time::Instant::now();
            let result = wait(seconds(delay), left).await.map_err(|refused| refused.reject);
            assert_eq!(begin.elapsed().as_secs(), waited);
            assert_eq!(result, if passes { Ok(()) } else { Err(Reject::UpstreamTimeout) });
        }
    }
}
