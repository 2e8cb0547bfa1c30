//! Who makes the load, and how are its answers timed?

pub(crate) mod grpc;
pub(crate) mod handshake;
pub(crate) mod hello;
pub(crate) mod idle;
pub(crate) mod open_loop;
pub(crate) mod tcp;
pub(crate) mod wrk;

use std::time::Duration;

use hdrhistogram::Histogram;
pub(crate) use kiro_bench::h1;
use kiro_bench::latency::{latencies, note, quantile_ms};
pub(crate) use kiro_bench::schedule::Length;
use kiro_bench::schedule::Schedule;

use crate::procfs;

/// What a load found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Loaded {
    /// Requests that were answered while it counted.
    pub(crate) requests: u64,
    /// Requests that failed.
    pub(crate) errors: u64,
    /// How long it counted.
    pub(crate) seconds: f64,
    /// Half of the answers came within.
    pub(crate) p50_ms: Option<f64>,
    /// 99 of a hundred.
    pub(crate) p99_ms: Option<f64>,
    /// 999 of a thousand.
    pub(crate) p999_ms: Option<f64>,
    /// All requests that were answered, those before it counted included.
    pub(crate) completed: u64,
    /// Requests that may have been under way at its end.
    pub(crate) cut_off_max: u64,
    /// What the proxies agreed on, where that could be seen.
    pub(crate) tls: Option<String>,
    /// Why it is worth nothing, if it is.
    pub(crate) void: Option<String>,
}

impl Loaded {
    /// With the percentiles of these latencies in microseconds.
    fn timed(self, latencies: &Histogram<u64>) -> Self {
        let at = |quantile| quantile_ms(latencies, quantile);
        Self { p50_ms: at(0.5), p99_ms: at(0.99), p999_ms: at(0.999), ..self }
    }
}

/// What the proxies cost while a load counts.
#[derive(Debug)]
pub(crate) struct Meter {
    roots: Vec<u32>,
    before: Duration,
    /// User and system time between begin and end.
    pub(crate) cpu: Duration,
    /// Their memory when it was looked at.
    pub(crate) rss_mb: Option<f64>,
}

impl Meter {
    /// For these processes and their descendants.
    pub(crate) fn new(roots: Vec<u32>) -> Self {
        Self { roots, before: Duration::ZERO, cpu: Duration::ZERO, rss_mb: None }
    }

    /// From here on it counts.
    pub(crate) fn begin(&mut self) {
        self.before = procfs::cpu(&self.roots);
    }

    /// Reads the memory, while the load is still on.
    pub(crate) fn look(&mut self) {
        self.rss_mb = procfs::pss_mb(&self.roots);
    }

    /// Here it ends to count.
    pub(crate) fn end(&mut self) {
        self.cpu = procfs::cpu(&self.roots).saturating_sub(self.before);
    }

    /// Whether there is anything to measure.
    pub(crate) fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }
}
