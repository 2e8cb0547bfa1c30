//! Is the application beside this sidecar fit for traffic, and who learns of it?
//!
//! The control runtime asks it as the mesh file says ([`ask`]); the rules of thresholds are `kiro-core`'s. What came out is one word
//! that each request reads. A request whose connect is refused makes the application unready at once, without waiting for a check.
//!
//! **Invariant.** A check is of the own application alone: no failing dependency makes it unready. And the sidecar's own `/ready` asks
//! nothing of this: an application that waits for its sidecar would otherwise wait for ever.

mod ask;
mod document;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use http::StatusCode;
use kiro_core::health::{Health, State as Fitness, Transition};
use kiro_core::identity::ServiceName;
use kiro_core::mesh::{App, HealthCheck};
use tokio::sync::{Notify, watch};

use self::ask::Failed;
pub(crate) use self::document::document;
use crate::drain::{Phase, PhaseWatch};
use crate::lock::lock;
use crate::reject::{Refused, Reject};
use crate::settings::Settings;
use crate::state::State;

/// What is known of the application.
#[derive(Debug, Default)]
pub(crate) struct AppHealth {
    /// All that a request asks.
    word: AtomicU8,
    /// How often it came into each state, by [`Fitness`].
    changes: [AtomicU64; Fitness::ALL.len()],
    /// Locked by checks, by people who look, and by the first requests that could not connect, never by those that are turned away.
    record: Mutex<Option<Record>>,
    /// Somebody has found it unreachable, so that the next check is sooner.
    found: Notify,
}

const UNDECLARED: u8 = 0;
const UNKNOWN: u8 = 1;
const READY: u8 = 2;
const UNREADY: u8 = 3;

#[derive(Debug)]
struct Record {
    service: ServiceName,
    health: Health,
    since: SystemTime,
    /// What there is to say of the last check, which failed.
    failed: Option<Arc<str>>,
}

/// What a person sees of it.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) state: Fitness,
    /// Absent where nothing is declared.
    pub(crate) since: Option<SystemTime>,
    /// How the last check failed, if it did.
    pub(crate) last_failure: Option<String>,
}

impl AppHealth {
    /// Whether requests are turned away; undeclared, it never is.
    fn is_unready(&self) -> bool {
        self.word.load(Ordering::Relaxed) == UNREADY
    }

    /// Turns a request away whose application would not serve it. The check's interval is when there is news.
    pub(crate) fn admit(&self, state: &State) -> Result<(), Refused> {
        if !self.is_unready() {
            return Ok(());
        }
        // Between a new mesh file without the section and the next look at it there is nothing to go by.
        let Some(check) = &state.service.health else { return Ok(()) };
        // Which check, and how, is told once, when the state changes: there may be thousands of requests.
        const WHY: &str = "the application has failed its health checks, or does not listen";
        Err(Refused::new(Reject::AppUnready, WHY).after(check.settings.interval()))
    }

    /// A request's connect was refused: nobody listens, which is no matter of thresholds.
    pub(crate) fn unreachable(&self) {
        if matches!(self.word.load(Ordering::Relaxed), UNDECLARED | UNREADY) {
            return;
        }
        let mut record = lock(&self.record);
        let Some(known) = record.as_mut() else { return };
        let change = known.health.unreachable(Instant::now());
        known.failed = Some(Arc::from("connection refused"));
        self.changed(known, change);
        self.found.notify_one();
    }

    /// What an ingress client is told at `/healthz`. Where checks are declared, one has to have succeeded.
    pub(crate) fn at_ingress(&self, phase: Phase) -> (StatusCode, &'static str) {
        match (phase, self.word.load(Ordering::Relaxed)) {
            (Phase::Draining | Phase::Stopped, _) => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
            (Phase::Serving, UNKNOWN) => (StatusCode::SERVICE_UNAVAILABLE, "unknown\n"),
            (Phase::Serving, UNREADY) => (StatusCode::SERVICE_UNAVAILABLE, "unready\n"),
            (Phase::Serving, _) => (StatusCode::OK, "ready\n"),
        }
    }

    /// What there is to see.
    pub(crate) fn seen(&self) -> Seen {
        match &*lock(&self.record) {
            None => Seen { state: Fitness::Unknown, since: None, last_failure: None },
            Some(known) => {
                let failure = known.health.last_failure();
                let said = known.failed.as_deref().filter(|said| !said.is_empty());
                let told = |failure| match said {
                    Some(said) => format!("{failure}: {said}"),
                    None => format!("{failure}"),
                };
                Seen {
                    state: known.health.state(),
                    since: Some(known.since),
                    last_failure: failure.map(told),
                }
            }
        }
    }

    /// How often the application came into each state.
    pub(crate) fn changes(&self) -> impl Iterator<Item = (Fitness, u64)> {
        Fitness::ALL.into_iter().zip(self.changes.iter().map(|count| count.load(Ordering::Relaxed)))
    }

    /// Begins anew, as a mesh file declares it; nothing is known of what it asks.
    fn declare(&self, service: &ServiceName, check: Option<&HealthCheck>) {
        let mut record = lock(&self.record);
        *record = check.map(|check| Record {
            service: service.clone(),
            health: Health::new(check.settings, Instant::now()),
            since: SystemTime::now(),
            failed: None,
        });
        self.word.store(if record.is_some() { UNKNOWN } else { UNDECLARED }, Ordering::Relaxed);
    }

    /// Takes a check's result over, and says when the next one is due.
    fn checked(&self, result: Result<(), Failed>) -> Option<Instant> {
        let mut record = lock(&self.record);
        let known = record.as_mut()?;
        let now = Instant::now();
        let result = result.map_err(|failed| {
            known.failed = Some(failed.said.into());
            failed.how
        });
        let change = known.health.record(result, now);
        self.changed(known, change);
        Some(known.health.next_check(now, fastrand::u64(..)))
    }

    /// When the next check is due, by what is known now.
    fn due(&self) -> Option<Instant> {
        let known = lock(&self.record);
        known.as_ref().map(|known| known.health.next_check(Instant::now(), fastrand::u64(..)))
    }

    /// Tells a change to requests, to the metric and to the log.
    fn changed(&self, known: &mut Record, change: Option<Transition>) {
        let Some(change) = change else { return };
        known.since = SystemTime::now();
        let word = match change.to {
            Fitness::Unknown => UNKNOWN,
            Fitness::Ready => READY,
            Fitness::Unready => UNREADY,
        };
        self.word.store(word, Ordering::Relaxed);
        if let Some(count) = self.changes.get(change.to as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let (service, from, to) = (known.service.as_str(), change.from.name(), change.to.name());
        let reason = change.reason;
        let said = known.failed.as_deref().unwrap_or_default();
        match change.to {
            Fitness::Unready => tracing::warn!(
                target: "kiro::health", service, from, to, %reason, said, "application unready: requests go elsewhere"
            ),
            Fitness::Ready | Fitness::Unknown => {
                tracing::info!(target: "kiro::health", service, from, to, %reason, "application ready");
            }
        }
    }
}

/// Checks the application as the states say, until the sidecar stops.
pub(crate) async fn follow(
    health: Arc<AppHealth>,
    settings: Arc<Settings>,
    mut states: watch::Receiver<Arc<State>>,
    phase: PhaseWatch,
) {
    // Whoever holds a receiver of states keeps their sender waiting.
    tokio::select! {
        () = check(&health, &settings, &mut states) => {}
        () = phase.reached(Phase::Stopped) => {}
    }
}

async fn check(health: &AppHealth, settings: &Settings, states: &mut watch::Receiver<Arc<State>>) {
    let mut asked: Option<(HealthCheck, App)> = None;
    let mut due = Instant::now();
    loop {
        let state = Arc::clone(&states.borrow_and_update());
        // Of an application that listens elsewhere, or is asked otherwise, nothing is known.
        let wanted = state.service.health.clone().map(|check| (check, state.service.app));
        if wanted != asked {
            health.declare(&state.me, wanted.as_ref().map(|(check, _)| check));
            due = Instant::now();
            asked = wanted;
        }
        let Some((check, app)) = &asked else {
            if states.changed().await.is_err() {
                return;
            }
            continue;
        };
        tokio::select! {
            () = tokio::time::sleep_until(due.into()) => {
                let address = SocketAddr::new(settings.app_host, app.port);
                let result = ask::ask(&check.question, check.settings.timeout(), address, &state).await;
                due = health.checked(result).unwrap_or_else(Instant::now);
            }
            changed = states.changed() => if changed.is_err() { return },
            () = health.found.notified() => due = health.due().map_or(due, |sooner| sooner.min(due)),
        }
    }
}

#[cfg(test)]
mod tests {
    use kiro_core::health::{Failure, HealthSettings};
    use kiro_core::mesh::Question;

    use super::*;

    fn declared(health: &AppHealth) {
        let settings = HealthSettings::default().with_thresholds(1, 1).unwrap();
        let check = HealthCheck { question: Question::Tcp, settings };
        health.declare(&ServiceName::parse("a").unwrap(), Some(&check));
    }

    fn failed() -> Result<(), Failed> {
        Err(Failed { how: Failure::Status(500), said: String::new() })
    }

    #[test]
    fn the_ingress_tells_what_is_known_and_that_we_drain() {
        let health = AppHealth::default();
        let at = |health: &AppHealth, phase| {
            let (status, word) = health.at_ingress(phase);
            (status.as_u16(), word.trim_end())
        };
        assert_eq!(at(&health, Phase::Serving), (200, "ready"), "nothing is declared");
        assert_eq!(at(&health, Phase::Draining), (503, "draining"));
        declared(&health);
        assert_eq!(at(&health, Phase::Serving), (503, "unknown"));
        health.checked(Ok(()));
        assert_eq!(at(&health, Phase::Serving), (200, "ready"));
        assert_eq!(at(&health, Phase::Draining), (503, "draining"));
        health.checked(failed());
        assert_eq!(at(&health, Phase::Serving), (503, "unready"));
        health.declare(&ServiceName::parse("a").unwrap(), None);
        assert_eq!(at(&health, Phase::Serving), (200, "ready"));
    }

    #[test]
    fn a_refused_connect_counts_where_checks_are_declared() {
        let health = AppHealth::default();
        health.unreachable();
        assert!(!health.is_unready());
        declared(&health);
        health.unreachable();
        assert!(health.is_unready());
        let changes: Vec<_> = health.changes().map(|(_, count)| count).collect();
        assert_eq!(changes, [0, 0, 1]);
        health.checked(Ok(()));
        assert!(!health.is_unready());
        // A check that was on its way when nothing was declared any more.
        health.declare(&ServiceName::parse("a").unwrap(), None);
        assert_eq!(health.checked(failed()), None);
        assert!(!health.is_unready());
        assert_eq!(health.seen().state, Fitness::Unknown);
    }
}
