//! How are the times of many requests kept?

use std::time::Duration;

use anyhow::Context as _;
use hdrhistogram::Histogram;

/// Latencies in microseconds, up to a minute, three digits exact.
pub fn latencies() -> anyhow::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 60_000_000, 3).context("no histogram")
}

/// Notes a latency; what is beyond the bounds counts as the bound.
pub fn note(latencies: &mut Histogram<u64>, latency: Duration) {
    latencies.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
}

/// Within which time so many of the answers came, in milliseconds; none where there was no answer.
pub fn quantile_ms(latencies: &Histogram<u64>, quantile: f64) -> Option<f64> {
    (!latencies.is_empty()).then(|| latencies.value_at_quantile(quantile) as f64 / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_them_and_nearly_all() {
        let mut kept = latencies().unwrap();
        assert_eq!(quantile_ms(&kept, 0.5), None);
        for ms in 1..=100 {
            note(&mut kept, Duration::from_millis(ms));
        }
        assert!((quantile_ms(&kept, 0.5).unwrap() - 50.0).abs() < 0.1);
        assert!((quantile_ms(&kept, 0.99).unwrap() - 99.0).abs() < 0.1);
    }
}
