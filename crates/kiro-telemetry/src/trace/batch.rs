//! How do recorded spans become exports? One thread gathers them and sends them, and the exporter's connection lives on it too.
//!
//! The SDK's batch processor would take a second thread, a queue whose places are all there from the start, and half a thousand spans
//! before it sends the first one: as much memory as all else that a sidecar at work has of its own. Here the queue grows with what waits in
//! it, and what waits is sent when there is a packet's worth of it.

use std::io;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use tokio::runtime::Builder;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::{Instant, timeout_at};

use super::export::Watched;

/// Spans that are worth an export before the delay is over. They take some tens of kilobytes, thrice while they are sent; a call to
/// the collector costs little against the requests that made them.
const WORTH_A_CALL_SPANS: usize = 64;

#[derive(Debug)]
enum Message {
    Span(Box<SpanData>),
    /// Send what came before, and say so.
    Flush(SyncSender<()>),
    /// The same, at most for so long, and end.
    Shutdown(Duration, SyncSender<()>),
    /// The first span of the batch has waited long enough; the thread tells itself.
    Due,
}

/// How spans are gathered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batching {
    /// The most that are sent at a time.
    pub(super) spans_max: usize,
    /// How long the first one waits for others.
    pub(super) delay: Duration,
}

/// The way to the thread. It sends what it has and ends when this is dropped.
#[derive(Debug)]
pub(super) struct Batcher {
    /// Unbounded, but for `Counts::take_in`, which is asked before each span.
    queue: UnboundedSender<Message>,
}

impl Batcher {
    /// Starts the thread. `make` is called on its runtime, for an exporter that needs one; what it says of a failure is given back.
    pub(super) fn start<E: SpanExporter + 'static, F: Send + 'static>(
        make: impl FnOnce() -> Result<Watched<E>, F> + Send + 'static,
        batching: Batching,
    ) -> io::Result<Result<Self, F>> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (queue, messages) = mpsc::unbounded_channel();
        let (made, outcome) = sync_channel(1);
        std::thread::Builder::new().name("kiro-otlp".to_owned()).spawn(move || {
            runtime.block_on(async move {
                match make() {
                    Ok(exporter) => {
                        let _ = made.send(Ok(()));
                        Gatherer { messages, exporter, batching, batch: Vec::new() }.run().await;
                    }
                    Err(failure) => {
                        let _ = made.send(Err(failure));
                    }
                }
            });
        })?;
        match outcome.recv() {
            Ok(outcome) => Ok(outcome.map(|()| Self { queue })),
            Err(_) => Err(io::Error::other("it ended before it began")),
        }
    }

    /// Queues a span that has been counted; false where the thread has ended.
    pub(super) fn push(&self, span: SpanData) -> bool {
        self.queue.send(Message::Span(Box::new(span))).is_ok()
    }

    /// Waits until what was pushed before has been sent or lost; says whether it was in time.
    pub(super) fn flush(&self, timeout: Duration) -> bool {
        let (done, sent) = sync_channel(1);
        self.queue.send(Message::Flush(done)).is_ok() && sent.recv_timeout(timeout).is_ok()
    }

    /// The same, and ends the thread.
    pub(super) fn shutdown(&self, timeout: Duration) -> bool {
        let (done, sent) = sync_channel(1);
        // A thread that has ended has nothing left.
        self.queue.send(Message::Shutdown(timeout, done)).is_err()
            || sent.recv_timeout(timeout) != Err(RecvTimeoutError::Timeout)
    }
}

/// The thread's own state.
struct Gatherer<E> {
    messages: UnboundedReceiver<Message>,
    exporter: Watched<E>,
    batching: Batching,
    batch: Vec<SpanData>,
}

impl<E: SpanExporter> Gatherer<E> {
    async fn run(mut self) {
        let worth_a_call = WORTH_A_CALL_SPANS.min(self.batching.spans_max);
        let mut due = None;
        loop {
            match self.next(due).await {
                Some(Message::Span(span)) => {
                    self.batch.push(*span);
                    due.get_or_insert_with(|| Instant::now() + self.batching.delay);
                    let count = self.batch.len();
                    // What came while the last batch was on its way goes in one call.
                    let full = count >= self.batching.spans_max;
                    if full || count >= worth_a_call && self.messages.is_empty() {
                        self.export().await;
                        due = None;
                    }
                }
                Some(Message::Due) => {
                    self.export().await;
                    due = None;
                }
                Some(Message::Flush(done)) => {
                    self.export().await;
                    due = None;
                    // The one who asked may have given up waiting.
                    let _ = done.try_send(());
                }
                Some(Message::Shutdown(timeout, done)) => {
                    self.export().await;
                    // Nothing can be done about it any more, and all that was to be sent has been.
                    let _ = self.exporter.shutdown_with_timeout(timeout);
                    let _ = done.try_send(());
                    return;
                }
                None => return self.export().await,
            }
        }
    }

    /// What comes next, or that the batch is due.
    async fn next(&mut self, due: Option<Instant>) -> Option<Message> {
        match due {
            Some(due) => timeout_at(due, self.messages.recv()).await.unwrap_or(Some(Message::Due)),
            None => self.messages.recv().await,
        }
    }

    async fn export(&mut self) {
        if !self.batch.is_empty() {
            // What becomes of it is counted and said by `Watched`.
            let _ = self.exporter.export(std::mem::take(&mut self.batch)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status};
    use opentelemetry_sdk::error::OTelSdkResult;
    use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};

    use super::*;
    use crate::trace::export::Counts;

    /// Keeps the sizes of its batches; holds each until it may go on.
    #[derive(Debug)]
    struct Sizes {
        seen: Arc<Mutex<Vec<usize>>>,
        go_on: tokio::sync::Semaphore,
        begun: SyncSender<()>,
    }

    #[derive(Debug, Clone)]
    struct Shared(Arc<Sizes>);

    impl SpanExporter for Shared {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.begun.send(()).unwrap();
            self.0.go_on.acquire().await.unwrap().forget();
            self.0.seen.lock().unwrap().push(batch.len());
            Ok(())
        }
    }

    fn span() -> SpanData {
        let now = std::time::SystemTime::UNIX_EPOCH;
        SpanData {
            span_context: SpanContext::empty_context(),
            parent_span_id: SpanId::INVALID,
            parent_span_is_remote: false,
            span_kind: SpanKind::Server,
            name: "x".into(),
            start_time: now,
            end_time: now,
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: opentelemetry::InstrumentationScope::default(),
        }
    }

    #[test]
    fn a_packets_worth_goes_at_once_and_what_waited_goes_together() {
        let (begun, begins) = sync_channel(100);
        let sizes = Arc::new(Sizes { seen: Arc::default(), go_on: tokio::sync::Semaphore::new(0), begun });
        let counts = Arc::new(Counts::default());
        let watched = Watched::new(Shared(Arc::clone(&sizes)), String::new(), Arc::clone(&counts));
        let batching = Batching { spans_max: 100, delay: Duration::from_secs(3600) };
        let batcher = Batcher::start(|| Ok::<_, ()>(watched), batching).unwrap().unwrap();
        let push = |count: usize| {
            for _ in 0..count {
                assert!(counts.take_in(1000) && batcher.push(span()));
            }
        };
        push(WORTH_A_CALL_SPANS);
        begins.recv().unwrap();
        // The collector takes its time.
        push(230);
        sizes.go_on.add_permits(100);
        assert!(batcher.flush(Duration::from_secs(60)));
        assert_eq!(*sizes.seen.lock().unwrap(), [WORTH_A_CALL_SPANS, 100, 100, 30]);
        assert_eq!((counts.queued(), counts.read().exported), (0, 294));
        push(1);
        assert!(batcher.shutdown(Duration::from_secs(60)));
        assert_eq!(sizes.seen.lock().unwrap().last(), Some(&1));
        // A thread that has ended has nothing left.
        assert!(batcher.shutdown(Duration::from_secs(60)));
    }
}
