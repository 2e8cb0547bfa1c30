//! How are things counted without a worker waiting for another, and without a client being able to grow the count?
//!
//! Each worker has counters of its own, made of relaxed atomics; a scrape adds them up. A [`Family`] knows all its label
//! values from the start, so what a request carries can pick one but never add one.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;

pub use prometheus_client::registry::Registry;

/// The `content-type` of what [`render`] returns.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The text of all that is registered, as Prometheus reads it.
pub fn render(registry: &Registry) -> String {
    let mut out = String::new();
    // Writing to a String does not fail, and our collectors pass on nothing else.
    let _ = text::encode(&mut out, registry);
    out
}

/// Something that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Counts `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Something that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Up by one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Down by one.
    pub fn dec(&self) {
        self.add(-1);
    }

    /// Up, or down, by `amount`.
    pub fn add(&self, amount: i64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Sets it.
    pub fn set(&self, value: i64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long things took: durations in buckets whose bounds are fixed, shown in seconds.
#[derive(Debug)]
pub struct Histogram {
    /// Ascending upper bounds in microseconds, inclusive.
    bounds_us: &'static [u64],
    /// One for each bound, and one for what is beyond them all.
    buckets: Box<[AtomicU64]>,
    sum_us: AtomicU64,
}

impl Histogram {
    /// An empty one with these upper bounds in microseconds, ascending.
    pub fn new(bounds_us: &'static [u64]) -> Self {
        debug_assert!(bounds_us.is_sorted(), "a histogram's bounds ascend");
        let buckets = (0..=bounds_us.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds_us, buckets, sum_us: AtomicU64::new(0) }
    }

    /// Counts one duration.
    pub fn observe(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = self.bounds_us.partition_point(|bound| *bound < micros);
        // There is a bucket for each point that a partition can have.
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Ordering::Relaxed);
            self.sum_us.fetch_add(micros, Ordering::Relaxed);
        }
    }

    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }
}

/// What a [`Family`] is made of.
pub trait Metric: fmt::Debug + Send + Sync + 'static {
    /// Its type in the text.
    const KIND: Kind;

    /// Writes the sum of `shards`, which are one metric as several workers see it.
    fn encode_sum(shards: &[&Self], encoder: MetricEncoder<'_>) -> fmt::Result;
}

/// A metric's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; its name gets the suffix `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Buckets, sum and count.
    Histogram,
}

impl Kind {
    fn metric_type(self) -> MetricType {
        match self {
            Self::Counter => MetricType::Counter,
            Self::Gauge => MetricType::Gauge,
            Self::Histogram => MetricType::Histogram,
        }
    }
}

impl Metric for Counter {
    const KIND: Kind = Kind::Counter;

    fn encode_sum(shards: &[&Self], mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let sum = shards.iter().fold(0_u64, |sum, shard| sum.wrapping_add(shard.get()));
        encoder.encode_counter::<NoLabelSet, _, f64>(&sum, None)
    }
}

impl Metric for Gauge {
    const KIND: Kind = Kind::Gauge;

    fn encode_sum(shards: &[&Self], mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let sum = shards.iter().fold(0_i64, |sum, shard| sum.wrapping_add(shard.get()));
        encoder.encode_gauge(&sum)
    }
}

impl Metric for Histogram {
    const KIND: Kind = Kind::Histogram;

    fn encode_sum(shards: &[&Self], mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = shards.first().map(|shard| shard.bounds_us).unwrap_or_default();
        let mut buckets: Vec<(f64, u64)> = bounds
            .iter()
            .map(|bound| *bound as f64 / 1e6)
            .chain([f64::INFINITY])
            .map(|bound| (bound, 0))
            .collect();
        let mut sum_us = 0_u64;
        for shard in shards {
            for (total, bucket) in buckets.iter_mut().zip(&shard.buckets) {
                total.1 += bucket.load(Ordering::Relaxed);
            }
            sum_us = sum_us.wrapping_add(shard.sum_us.load(Ordering::Relaxed));
        }
        // Of the buckets just read, so that the count and the last bucket are one number whatever was counted since.
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(sum_us as f64 / 1e6, count, &buckets, None)
    }
}

/// One label: its name and every value it can have.
#[derive(Debug, Clone)]
pub struct Label {
    name: &'static str,
    values: Vec<Cow<'static, str>>,
}

impl Label {
    /// A label with these values.
    pub fn new<V: Into<Cow<'static, str>>>(name: &'static str, values: impl IntoIterator<Item = V>) -> Self {
        Self { name, values: values.into_iter().map(Into::into).collect() }
    }
}

/// Metrics of one name, one for each combination of label values.
#[derive(Debug)]
pub struct Family<M, const N: usize> {
    labels: [Label; N],
    /// The last label's values lie side by side.
    metrics: Box<[M]>,
}

impl<M, const N: usize> Family<M, N> {
    /// Makes a metric for each combination.
    pub fn new(labels: [Label; N], mut metric: impl FnMut() -> M) -> Self {
        let combinations = labels.iter().map(|label| label.values.len()).product();
        Self { labels, metrics: (0..combinations).map(|_| metric()).collect() }
    }

    /// The metric of the values at these positions; `None` if there is no such position.
    pub fn at(&self, positions: [usize; N]) -> Option<&M> {
        let mut index = 0;
        for (label, position) in self.labels.iter().zip(positions) {
            if position >= label.values.len() {
                return None;
            }
            index = index * label.values.len() + position;
        }
        self.metrics.get(index)
    }

    /// The metric of these values; `None` if one of them was not there from the start.
    pub fn find(&self, values: [&str; N]) -> Option<&M> {
        let mut positions = [0; N];
        for ((position, label), value) in positions.iter_mut().zip(&self.labels).zip(values) {
            *position = label.values.iter().position(|known| known == value)?;
        }
        self.at(positions)
    }

    /// The label values of each metric, in the order of the metrics.
    fn label_sets(&self) -> impl Iterator<Item = [(&'static str, &str); N]> {
        (0..self.metrics.len()).map(|index| {
            let mut rest = index;
            let mut set = [("", ""); N];
            for (entry, label) in set.iter_mut().zip(&self.labels).rev() {
                let count = label.values.len();
                let value = label.values.get(rest % count).map(AsRef::as_ref).unwrap_or_default();
                *entry = (label.name, value);
                rest /= count;
            }
            set
        })
    }
}

/// Registers one family, as each worker has it: what is shown is the sum. The families are made alike.
pub fn register_family<M: Metric, const N: usize>(
    registry: &mut Registry,
    name: &'static str,
    help: &'static str,
    shards: Vec<Arc<Family<M, N>>>,
) {
    registry.register_collector(Box::new(FamilyCollector { name, help, shards }));
}

/// Registers a metric without labels, as each worker has it.
pub fn register_metric<M: Metric>(
    registry: &mut Registry,
    name: &'static str,
    help: &'static str,
    shards: Vec<Arc<M>>,
) {
    registry.register_collector(Box::new(MetricCollector { name, help, shards }));
}

/// Registers a number that is looked up when somebody asks: `kind` is counter or gauge.
pub fn register_number(
    registry: &mut Registry,
    kind: NumberKind,
    name: &'static str,
    help: &'static str,
    number: impl Fn() -> i64 + Send + Sync + 'static,
) {
    registry.register_collector(Box::new(NumberCollector { kind, name, help, number: Box::new(number) }));
}

/// The type of a number that is looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumberKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
}

#[derive(Debug)]
struct FamilyCollector<M, const N: usize> {
    name: &'static str,
    help: &'static str,
    shards: Vec<Arc<Family<M, N>>>,
}

impl<M: Metric, const N: usize> Collector for FamilyCollector<M, N> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(first) = self.shards.first() else { return Ok(()) };
        let mut family = encoder.encode_descriptor(self.name, self.help, None, M::KIND.metric_type())?;
        for (index, set) in first.label_sets().enumerate() {
            let shards: Vec<&M> = self.shards.iter().filter_map(|shard| shard.metrics.get(index)).collect();
            M::encode_sum(&shards, family.encode_family(&set)?)?;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct MetricCollector<M> {
    name: &'static str,
    help: &'static str,
    shards: Vec<Arc<M>>,
}

impl<M: Metric> Collector for MetricCollector<M> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let shards: Vec<&M> = self.shards.iter().map(AsRef::as_ref).collect();
        let metric = encoder.encode_descriptor(self.name, self.help, None, M::KIND.metric_type())?;
        M::encode_sum(&shards, metric)
    }
}

struct NumberCollector {
    kind: NumberKind,
    name: &'static str,
    help: &'static str,
    number: Box<dyn Fn() -> i64 + Send + Sync>,
}

impl fmt::Debug for NumberCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NumberCollector").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Collector for NumberCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let value = (self.number)();
        match self.kind {
            NumberKind::Counter => {
                let value = u64::try_from(value).unwrap_or_default();
                encoder
                    .encode_descriptor(self.name, self.help, None, MetricType::Counter)?
                    .encode_counter::<NoLabelSet, _, f64>(&value, None)
            }
            NumberKind::Gauge => {
                encoder.encode_descriptor(self.name, self.help, None, MetricType::Gauge)?.encode_gauge(&value)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: &[u64] = &[1_000, 10_000];

    #[test]
    fn the_text_is_the_sum_of_all_workers() {
        let mut registry = Registry::default();
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let labels = [Label::new("direction", ["in", "out"]), Label::new("code", ["ok", "policy"])];
                Arc::new(Family::new(labels, Counter::default))
            })
            .collect();
        register_family(&mut registry, "kiro_requests", "Requests", workers.clone());
        workers[0].find(["in", "ok"]).unwrap().inc();
        workers[1].find(["in", "ok"]).unwrap().add(2);
        workers[1].at([1, 1]).unwrap().inc();
        assert_eq!(
            render(&registry),
            "# HELP kiro_requests Requests\n# TYPE kiro_requests counter\n\
             kiro_requests_total{direction=\"in\",code=\"ok\"} 3\n\
             kiro_requests_total{direction=\"in\",code=\"policy\"} 0\n\
             kiro_requests_total{direction=\"out\",code=\"ok\"} 0\n\
             kiro_requests_total{direction=\"out\",code=\"policy\"} 1\n# EOF\n"
        );
    }

    #[test]
    fn what_was_not_there_from_the_start_cannot_come() {
        let labels = [Label::new("a", ["x", "y"]), Label::new("b", ["1", "2", "3"])];
        let family = Family::new(labels, Counter::default);
        assert!(family.find(["x", "3"]).is_some());
        assert!(family.find(["z", "1"]).is_none() && family.find(["x", "4"]).is_none());
        // A position past its own label must not become one of another value.
        assert!(family.at([0, 3]).is_none() && family.at([2, 0]).is_none());
        for (position, value) in ["x", "y"].into_iter().enumerate() {
            for (other, second) in ["1", "2", "3"].into_iter().enumerate() {
                family.at([position, other]).unwrap().add(1);
                assert_eq!(family.find([value, second]).unwrap().get(), 1);
            }
        }
    }

    #[test]
    fn histograms_count_into_the_first_bucket_that_holds_it() {
        let mut registry = Registry::default();
        let workers = vec![Arc::new(Histogram::new(BOUNDS)), Arc::new(Histogram::new(BOUNDS))];
        register_metric(&mut registry, "kiro_duration_seconds", "Duration", workers.clone());
        workers[0].observe(Duration::from_micros(1_000));
        workers[0].observe(Duration::from_micros(1_001));
        workers[1].observe(Duration::ZERO);
        workers[1].observe(Duration::from_secs(3));
        assert_eq!(workers[1].count(), 2);
        assert_eq!(
            render(&registry),
            "# HELP kiro_duration_seconds Duration\n# TYPE kiro_duration_seconds histogram\n\
             kiro_duration_seconds_sum 3.002001\nkiro_duration_seconds_count 4\n\
             kiro_duration_seconds_bucket{le=\"0.001\"} 2\nkiro_duration_seconds_bucket{le=\"0.01\"} 3\n\
             kiro_duration_seconds_bucket{le=\"+Inf\"} 4\n# EOF\n"
        );
    }

    #[test]
    fn gauges_and_numbers() {
        let mut registry = Registry::default();
        let workers = vec![Arc::new(Gauge::default()), Arc::new(Gauge::default())];
        register_metric(&mut registry, "kiro_open", "Open", workers.clone());
        register_number(&mut registry, NumberKind::Counter, "kiro_lost_lines", "Lost", || 7);
        register_number(&mut registry, NumberKind::Gauge, "kiro_expiry_seconds", "Expiry", || -5);
        workers[0].set(10);
        workers[0].dec();
        workers[1].inc();
        workers[1].add(-4);
        let text = render(&registry);
        for line in ["\nkiro_open 6\n", "\nkiro_lost_lines_total 7\n", "\nkiro_expiry_seconds -5\n"] {
            assert!(text.contains(line), "{line:?} in {text}");
        }
    }

    #[test]
    fn families_of_histograms_and_label_values_with_quotes() {
        let mut registry = Registry::default();
        let labels = [Label::new("peer", ["a\"b\\c\nd"])];
        let family = Arc::new(Family::new(labels, || Histogram::new(BOUNDS)));
        register_family(&mut registry, "kiro_d", "D", vec![Arc::clone(&family)]);
        family.at([0]).unwrap().observe(Duration::from_micros(5));
        let text = render(&registry);
        assert!(text.contains("kiro_d_count{peer=\"a\\\"b\\\\c\\nd\"} 1\n"), "{text}");
        assert!(text.contains("kiro_d_bucket{le=\"0.001\",peer=\"a\\\"b\\\\c\\nd\"} 1\n"), "{text}");
    }

    #[test]
    fn a_family_with_a_label_that_has_no_values_is_empty() {
        let mut registry = Registry::default();
        let family = Arc::new(Family::new([Label::new("peer", [""; 0])], Counter::default));
        register_family(&mut registry, "kiro_empty", "Empty", vec![Arc::clone(&family)]);
        assert!(family.at([0]).is_none());
        assert!(render(&registry).ends_with("# TYPE kiro_empty counter\n# EOF\n"));
    }
}
