//! What happens to spans once they are recorded, and who hears of it when they do not arrive?

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};

use super::SpanCounts;

/// A collector that stays down is said this often, not once a batch.
const SAY_EVERY: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub(super) struct Counts {
    recorded: AtomicU64,
    exported: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
    /// Recorded and not yet exported or failed.
    queued: AtomicUsize,
}

impl Counts {
    pub(super) fn read(&self) -> SpanCounts {
        SpanCounts {
            recorded: self.recorded.load(Ordering::Relaxed),
            exported: self.exported.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
        }
    }

    pub(super) fn queued(&self) -> usize {
        self.queued.load(Ordering::Acquire)
    }

    /// Takes a place in the queue, if there is one.
    pub(super) fn take_in(&self, queued_max: usize) -> bool {
        if self.queued.fetch_add(1, Ordering::AcqRel) >= queued_max {
            self.queued.fetch_sub(1, Ordering::AcqRel);
            return false;
        }
        self.recorded.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Notes that one of those in the queue will never leave it.
    pub(super) fn lose_one(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        self.queued.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn drop_one(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// An exporter whose failures are counted and said. The SDK's own messages are compiled out: they come once a batch.
#[derive(Debug)]
pub(super) struct Watched<E> {
    exporter: E,
    endpoint: String,
    counts: Arc<Counts>,
    complaints: Mutex<Complaints>,
}

impl<E> Watched<E> {
    pub(super) fn new(exporter: E, endpoint: String, counts: Arc<Counts>) -> Self {
        Self { exporter, endpoint, counts, complaints: Mutex::default() }
    }

    fn settle(&self, spans: usize, result: &OTelSdkResult) {
        let counts = &self.counts;
        let counter = if result.is_ok() { &counts.exported } else { &counts.failed };
        counter.fetch_add(spans as u64, Ordering::Relaxed);
        // After the count, so that who sees an empty queue sees what became of it.
        counts.queued.fetch_sub(spans, Ordering::AcqRel);
        let totals = counts.read();
        let said = {
            let mut complaints = self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
            complaints.after_export(Instant::now(), result.is_err(), totals)
        };
        match (said, result) {
            (Some(Saying::Failing(lost)), Err(error)) => tracing::warn!(
                target: "kiro::traces", endpoint = %self.endpoint, error = %error, spans_lost = lost,
                "spans could not be exported"
            ),
            (Some(Saying::Overflowing(lost)), _) => tracing::warn!(
                target: "kiro::traces", endpoint = %self.endpoint, spans_lost = lost,
                "spans were dropped, because they came faster than they could be exported"
            ),
            (Some(Saying::Recovered(lost)), _) => tracing::info!(
                target: "kiro::traces", endpoint = %self.endpoint, spans_lost = lost, "spans are exported again"
            ),
            (Some(Saying::Failing(_)) | None, _) => {}
        }
    }
}

impl<E: SpanExporter> SpanExporter for Watched<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let result = self.exporter.export(batch).await;
        self.settle(spans, &result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// When to say what: at the first loss, then now and then, and when a failure that was said is over. Where a collector
/// comes and goes, that makes two lines an interval.
#[derive(Debug, Default)]
struct Complaints {
    last_said: Option<Instant>,
    lost_said: u64,
    failure_said: bool,
}

/// Each with the spans lost since the last one.
#[derive(Debug, PartialEq)]
enum Saying {
    Failing(u64),
    Overflowing(u64),
    Recovered(u64),
}

impl Complaints {
    fn after_export(&mut self, now: Instant, failed: bool, totals: SpanCounts) -> Option<Saying> {
        let lost = totals.failed + totals.dropped;
        let unsaid = lost - self.lost_said;
        let due = self.last_said.is_none_or(|last| now.duration_since(last) >= SAY_EVERY);
        let saying = if !failed && self.failure_said {
            Saying::Recovered(unsaid)
        } else if failed && due {
            self.last_said = Some(now);
            Saying::Failing(unsaid)
        } else if unsaid > 0 && due {
            self.last_said = Some(now);
            Saying::Overflowing(unsaid)
        } else {
            return None;
        };
        self.failure_said = failed;
        self.lost_said = lost;
        Some(saying)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(failed: u64, dropped: u64) -> SpanCounts {
        SpanCounts { failed, dropped, ..SpanCounts::default() }
    }

    #[test]
    fn a_collector_that_stays_down_is_said_now_and_then() {
        let start = Instant::now();
        let mut complaints = Complaints::default();
        let mut said = Vec::new();
        // Two minutes of a failing batch each second.
        for second in 0..120 {
            let now = start + Duration::from_secs(second);
            said.extend(complaints.after_export(now, true, lost(second + 1, 0)));
        }
        assert_eq!(said, [Saying::Failing(1), Saying::Failing(30), Saying::Failing(30), Saying::Failing(30)]);
        let now = start + Duration::from_secs(121);
        assert_eq!(complaints.after_export(now, false, lost(120, 5)), Some(Saying::Recovered(34)));
        assert_eq!(complaints.after_export(now, false, lost(120, 5)), None);
    }

    #[test]
    fn a_collector_that_comes_and_goes_is_said_twice_an_interval() {
        let start = Instant::now();
        let mut complaints = Complaints::default();
        let sayings = (0..60)
            .filter_map(|second| {
                let now = start + Duration::from_secs(second);
                complaints.after_export(now, second % 2 == 0, lost(second / 2 + 1, 0))
            })
            .count();
        assert_eq!(sayings, 4);
    }

    #[test]
    fn drops_without_failure_are_said_too() {
        let start = Instant::now();
        let mut complaints = Complaints::default();
        assert_eq!(complaints.after_export(start, false, lost(0, 0)), None);
        assert_eq!(complaints.after_export(start, false, lost(0, 7)), Some(Saying::Overflowing(7)));
        assert_eq!(complaints.after_export(start, false, lost(0, 9)), None);
        let later = start + SAY_EVERY;
        assert_eq!(complaints.after_export(later, false, lost(0, 9)), Some(Saying::Overflowing(2)));
    }

    #[test]
    fn the_queue_has_an_end() {
        let counts = Counts::default();
        assert!(counts.take_in(2) && counts.take_in(2));
        assert!(!counts.take_in(2));
        assert_eq!((counts.queued(), counts.read().recorded), (2, 2));
    }
}
