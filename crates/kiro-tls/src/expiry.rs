//! Is it time to say that a certificate ends soon?

use time::{Duration, OffsetDateTime};

/// How near the end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExpiryLevel {
    /// Within 30 days: renew it in passing.
    Month,
    /// Within 7 days: renew it this week.
    Week,
    /// Within a day: renew it now.
    Day,
    /// It is over.
    Past,
}

impl ExpiryLevel {
    /// The level's bound in days.
    #[must_use]
    pub const fn days(self) -> u32 {
        match self {
            Self::Month => 30,
            Self::Week => 7,
            Self::Day => 1,
            Self::Past => 0,
        }
    }
}

/// A certificate that ends soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpiryWarning {
    /// How near.
    pub level: ExpiryLevel,
    /// How much time is left; negative where it is over.
    pub left: Duration,
}

/// What to say of a certificate's end; `None` while it is over 30 days away.
#[must_use]
pub fn expiry_warning(not_after: OffsetDateTime, now: OffsetDateTime) -> Option<ExpiryWarning> {
    let left = not_after - now;
    [ExpiryLevel::Past, ExpiryLevel::Day, ExpiryLevel::Week, ExpiryLevel::Month]
        .into_iter()
        .find(|level| left <= Duration::days(level.days().into()))
        .map(|level| ExpiryWarning { level, left })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_level_begins_at_its_bound() {
        let end = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let second = Duration::seconds(1);
        let cases = [
            (Duration::days(30) + second, None),
            (Duration::days(30), Some(ExpiryLevel::Month)),
            (Duration::days(7) + second, Some(ExpiryLevel::Month)),
            (Duration::days(7), Some(ExpiryLevel::Week)),
            (Duration::days(1) + second, Some(ExpiryLevel::Week)),
            (Duration::days(1), Some(ExpiryLevel::Day)),
            (second, Some(ExpiryLevel::Day)),
            (Duration::ZERO, Some(ExpiryLevel::Past)),
            (-second, Some(ExpiryLevel::Past)),
        ];
        for (left, level) in cases {
            let warning = expiry_warning(end, end - left);
            assert_eq!(warning, level.map(|level| ExpiryWarning { level, left }), "{left}");
        }
    }
}
