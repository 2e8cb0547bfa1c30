//! When is each request of an open loop to be sent, whatever becomes of those before it?

use std::time::Duration;

/// How long a load runs.
#[derive(Debug, Clone, Copy)]
pub struct Length {
    /// Before anything counts.
    pub warm_up: Duration,
    /// What counts.
    pub measured: Duration,
}

/// The times at which one connection sends.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    first: Duration,
    every: Duration,
    /// Requests meant for before this do not count.
    pub from: Duration,
    /// The first that is not sent any more.
    until: Duration,
}

impl Schedule {
    /// Spreads `rate` requests a second evenly over the connections and over time.
    pub fn of(rate: f64, connections: usize, index: usize, length: Length) -> Self {
        let gap = 1.0 / rate.max(1.0);
        Self {
            first: Duration::from_secs_f64(gap * index as f64),
            every: Duration::from_secs_f64(gap * connections as f64),
            from: length.warm_up,
            until: length.warm_up + length.measured,
        }
    }

    /// When a request is to be sent, counted from the start; none after the end.
    pub fn intended(&self, number: u32) -> Option<Duration> {
        let at = self.first + self.every * number;
        (at < self.until).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_share_the_rate_evenly() {
        let length = Length { warm_up: Duration::from_secs(1), measured: Duration::from_secs(2) };
        let mut all: Vec<Duration> = Vec::new();
        for index in 0..4 {
            let schedule = Schedule::of(100.0, 4, index, length);
            all.extend((0..).map_while(|number| schedule.intended(number)));
        }
        all.sort();
        assert_eq!(all.len(), 300);
        let gaps = all.windows(2).map(|pair| pair[1] - pair[0]);
        assert!(gaps.into_iter().all(|gap| (9..=11).contains(&gap.as_millis())));
        assert!(all.iter().filter(|at| **at >= length.warm_up).count() == 200);
    }
}
