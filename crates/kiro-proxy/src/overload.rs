//! Has the application room for one more request?
//!
//! Where `traffic.concurrency` says how many it may have under way. A request takes its place when it is ready to be sent, its body read
//! where its signature is over that, so that whoever sends slowly keeps nobody out. It keeps it until its answer has ended. A stream
//! (a call of gRPC, server-sent events) keeps it until its answer's head, and a WebSocket until it is open: they may last for days
//! in which the application has nothing to do for them, and as many as the limit would leave no room for any request.
//!
//! The rule, its count and its queue are `kiro-core`'s and shared by all workers; here are the waiting, and the places.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::StatusCode;
use kiro_core::concurrency::{
    Arrival, ConcurrencyLimit, ConcurrencySettings, Outcome, Patience, Shed, ShedReason, Ticket, Verdict,
};
use kiro_core::mesh::Timeout;
use tokio::sync::oneshot;

use crate::counts::Counts;
use crate::lock::lock;
use crate::reject::{Refused, Reject};

/// What wakes a request that waits.
type Waker = oneshot::Sender<Verdict>;

/// Why requests were refused for load, by the words of log and metric.
pub(crate) const SHED_REASONS: [&str; 3] = ["queue_full", "waited_too_long", DEADLINE];

/// Its own time was over while it waited.
const DEADLINE: &str = "deadline";

/// How many requests the application may have under way.
#[derive(Debug)]
pub(crate) struct AppLimit {
    /// The rule.
    pub(crate) rule: ConcurrencyLimit<Waker>,
    shed: Counts<{ SHED_REASONS.len() }>,
}

fn wake(waiter: Waker, verdict: Verdict) -> bool {
    waiter.send(verdict).is_ok()
}

impl AppLimit {
    fn new(settings: ConcurrencySettings, now: Instant) -> Self {
        Self { rule: ConcurrencyLimit::new(settings, now), shed: Counts::of(&SHED_REASONS) }
    }

    /// How many were refused, by reason.
    pub(crate) fn shed(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.shed.counts()
    }

    /// Takes a place, if need be after a wait, which is part of the time that is left.
    pub(crate) async fn enter(self: &Arc<Self>, left: Timeout) -> Result<Box<Entry>, Refused> {
        let now = Instant::now();
        let mut told = None;
        let waiter = || {
            let (waker, verdict) = oneshot::channel();
            told = Some(verdict);
            waker
        };
        match self.rule.arrive(now, waiter, wake) {
            Arrival::Admitted => Ok(self.entry()),
            Arrival::Shed(shed) => Err(self.refuse(shed)),
            Arrival::Queued { ticket, check_at } => {
                // There is one: whoever is queued has made it.
                let Some(verdict) = told else { return Err(Reject::Overloaded.into()) };
                let waiting = Waiting { limit: self, ticket, verdict, told: false };
                waiting.end(now, check_at, left).await
            }
        }
    }

    fn entry(self: &Arc<Self>) -> Box<Entry> {
        Box::new(Entry {
            limit: Arc::clone(self),
            since: Instant::now(),
            outcome: Outcome::Ignored,
            latency: Duration::ZERO,
        })
    }

    fn refuse(&self, Shed { reason, retry_after }: Shed) -> Refused {
        let why = match reason {
            ShedReason::QueueFull => "and as many wait as may",
            ShedReason::WaitedTooLong => "and it has waited for too long",
        };
        self.refused(reason.code(), why).after(retry_after)
    }

    fn refused(&self, code: &str, why: &str) -> Refused {
        self.shed.count(code);
        let most = self.rule.limit();
        let cause =
            format!("`traffic.concurrency`: the application has {most} requests under way, {why} ({code})");
        Refused::new(Reject::Overloaded, cause)
    }
}

/// A request that waits for its place.
struct Waiting<'l> {
    limit: &'l Arc<AppLimit>,
    ticket: Ticket,
    verdict: oneshot::Receiver<Verdict>,
    /// It waits no more: its place in the queue is gone.
    told: bool,
}

impl Waiting<'_> {
    async fn end(mut self, since: Instant, check_at: Instant, left: Timeout) -> Result<Box<Entry>, Refused> {
        let deadline = match left {
            Timeout::After(left) => Some(since + left),
            Timeout::Off => None,
        };
        let mut look = Some(check_at);
        loop {
            let next = match (look, deadline) {
                (Some(look), Some(deadline)) => Some(look.min(deadline)),
                (look, deadline) => look.or(deadline),
            };
            let verdict = match next {
                None => Some((&mut self.verdict).await),
                Some(next) => tokio::time::timeout_at(next.into(), &mut self.verdict).await.ok(),
            };
            match verdict {
                Some(Ok(Verdict::Admitted)) => {
                    self.told = true;
                    return Ok(self.limit.entry());
                }
                Some(Ok(Verdict::Shed(shed))) => {
                    self.told = true;
                    return Err(self.limit.refuse(shed));
                }
                // Nobody drops a waker untold.
                Some(Err(_)) => return Err(Reject::Overloaded.into()),
                None => {}
            }
            let now = Instant::now();
            if deadline.is_some_and(|deadline| deadline <= now) {
                // Leaves the queue as whoever goes away does.
                let retry_after = self.limit.rule.settings().retry_after;
                return Err(self
                    .limit
                    .refused(DEADLINE, "and its time was over while it waited")
                    .after(retry_after));
            }
            match self.limit.rule.expired(self.ticket, now) {
                Patience::Until(later) => look = Some(later),
                Patience::Shed(shed) => {
                    self.told = true;
                    return Err(self.limit.refuse(shed));
                }
                // The verdict is being sent by another worker at this moment.
                Patience::Told => look = None,
            }
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.told || self.limit.rule.cancel(self.ticket) {
            return;
        }
        // A verdict is on its way. Once this end is closed, either it is here, or its sender learns that nobody is.
        self.verdict.close();
        if let Ok(Verdict::Admitted) = self.verdict.try_recv() {
            self.limit.rule.leave(Instant::now(), Outcome::Ignored, Duration::ZERO, wake);
        }
    }
}

/// A request's place among those that are under way. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Entry {
    limit: Arc<AppLimit>,
    since: Instant,
    outcome: Outcome,
    latency: Duration,
}

impl Entry {
    /// The application has begun to answer. What it says of its load is known by now: how fast an answer is read is its reader's doing.
    pub(crate) fn answered(&mut self, status: StatusCode) {
        self.latency = self.since.elapsed();
        self.outcome = match status {
            // 429 is about one caller, and must not cost the others.
            StatusCode::SERVICE_UNAVAILABLE => Outcome::Overloaded,
            _ if status.is_client_error() || status.is_server_error() => Outcome::Ignored,
            _ => Outcome::Answered,
        };
    }

    /// It has failed to; `hurried` where whoever asked gave it less time than the mesh file does, which says nothing of its load.
    pub(crate) fn failed(&mut self, reject: Reject, hurried: bool) {
        if reject == Reject::AppTimeout && !hurried {
            self.outcome = Outcome::Overloaded;
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.limit.rule.leave(Instant::now(), self.outcome, self.latency, wake);
    }
}

/// The limit of a sidecar's application. It outlives changes of the mesh file that are not about it.
#[derive(Debug, Default)]
pub(crate) struct AppLimits(Mutex<Option<Arc<AppLimit>>>);

impl AppLimits {
    /// The limit with these settings: the one that is there, if it has them.
    pub(crate) fn of(&self, settings: Option<ConcurrencySettings>, now: Instant) -> Option<Arc<AppLimit>> {
        let settings = settings?;
        let before = self.current().filter(|limit| *limit.rule.settings() == settings);
        Some(before.unwrap_or_else(|| Arc::new(AppLimit::new(settings, now))))
    }

    /// Takes over what holds from now on.
    pub(crate) fn keep(&self, limit: Option<&Arc<AppLimit>>) {
        *lock(&self.0) = limit.cloned();
    }

    /// The limit as it is, where one is declared.
    pub(crate) fn current(&self) -> Option<Arc<AppLimit>> {
        lock(&self.0).clone()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker as TaskWaker};

    use kiro_core::concurrency::{Limit, QueueSettings};

    use super::*;

    fn limit(max_waiting: u32) -> Arc<AppLimit> {
        let settings = ConcurrencySettings {
            limit: Limit::Fixed(NonZeroU32::MIN),
            queue: QueueSettings { max_waiting, ..QueueSettings::default() },
            ..ConcurrencySettings::default()
        };
        Arc::new(AppLimit::new(settings, Instant::now()))
    }

    fn counts(limit: &AppLimit) -> (u32, u32) {
        (limit.rule.in_flight(), limit.rule.waiting())
    }

    fn told(entered: Result<Box<Entry>, Refused>) -> (Reject, bool, String) {
        let refused = entered.unwrap_err();
        (refused.reject, refused.retry_after.is_some(), refused.cause.into_owned())
    }

    #[tokio::test]
    async fn whoever_waits_enters_when_another_leaves_and_the_rest_is_refused() {
        let limit = limit(1);
        let first = limit.enter(Timeout::Off).await.unwrap();
        let mut second = pin!(limit.enter(Timeout::Off));
        let mut cx = Context::from_waker(TaskWaker::noop());
        assert!(second.as_mut().poll(&mut cx).is_pending());
        let (reject, retry_after, cause) = told(limit.enter(Timeout::Off).await);
        assert_eq!((reject, retry_after), (Reject::Overloaded, true));
        assert!(cause.contains("queue_full"), "{cause}");
        assert_eq!(counts(&limit), (1, 1));
        drop(first);
        let second = second.await.unwrap();
        assert_eq!(counts(&limit), (1, 0));
        drop(second);
        assert_eq!(counts(&limit), (0, 0));
        assert_eq!(
            limit.shed().collect::<Vec<_>>(),
            [("queue_full", 1), ("waited_too_long", 0), ("deadline", 0)]
        );
    }

    #[tokio::test]
    async fn whoever_goes_away_leaves_no_trace_told_or_not() {
        let limit = limit(1);
        let mut cx = Context::from_waker(TaskWaker::noop());
        let first = limit.enter(Timeout::Off).await.unwrap();
        {
            let mut waits = Box::pin(limit.enter(Timeout::Off));
            assert!(waits.as_mut().poll(&mut cx).is_pending());
            assert_eq!(counts(&limit), (1, 1));
        }
        assert_eq!(counts(&limit), (1, 0));
        {
            let mut waits = Box::pin(limit.enter(Timeout::Off));
            assert!(waits.as_mut().poll(&mut cx).is_pending());
            // It is let in, and does not hear of it.
            drop(first);
            assert_eq!(counts(&limit), (1, 0));
        }
        assert_eq!(counts(&limit), (0, 0));
        let mut entered = pin!(limit.enter(Timeout::Off));
        assert!(matches!(entered.as_mut().poll(&mut cx), Poll::Ready(Ok(_))));
    }

    #[tokio::test]
    async fn the_wait_is_part_of_a_requests_time() {
        let limit = limit(5);
        let _first = limit.enter(Timeout::Off).await.unwrap();
        let began = Instant::now();
        let (reject, retry_after, cause) = told(limit.enter(Timeout::After(Duration::from_millis(20))).await);
        assert_eq!((reject, retry_after), (Reject::Overloaded, true));
        assert!(cause.contains("deadline"), "{cause}");
        assert!(began.elapsed() < Duration::from_millis(900), "{:?}", began.elapsed());
        assert_eq!(counts(&limit), (1, 0));
        // Without one, it waits as long as anybody does.
        let (_, _, cause) = told(limit.enter(Timeout::Off).await);
        assert!(cause.contains("waited_too_long"), "{cause}");
        assert_eq!(counts(&limit), (1, 0));
    }

    #[test]
    fn a_limit_outlives_a_change_that_is_not_about_it() {
        let (limits, now) = (AppLimits::default(), Instant::now());
        let settings = ConcurrencySettings::default();
        let first = limits.of(Some(settings), now).unwrap();
        limits.keep(Some(&first));
        assert!(Arc::ptr_eq(&first, &limits.of(Some(settings), now).unwrap()));
        let other = ConcurrencySettings { limit: Limit::Fixed(NonZeroU32::MIN), ..settings };
        assert!(!Arc::ptr_eq(&first, &limits.of(Some(other), now).unwrap()));
        assert!(limits.of(None, now).is_none());
        limits.keep(None);
        assert!(limits.current().is_none());
    }
}
