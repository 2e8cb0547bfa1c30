//! Which version of a service gets this request, who else gets a copy, and what is to go wrong with it on purpose?
//!
//! Pure decisions: a random number comes in, so that a simulation can repeat them, and what a key decides is the same at each sidecar.

use std::time::Duration;

use http::header::{HeaderMap, HeaderName};
use http::{HeaderValue, StatusCode};

/// What is wrong with a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapingError {
    /// Some requests would have no version, or some versions no request.
    #[error("the weights add up to {0}; write percentages that add up to 100")]
    WeightsSum(u32),
    /// Nothing to choose from.
    #[error("no version is named; write one at least")]
    NoVersion,
    /// More than all.
    #[error("a share of {0} in 10,000 is more than all; write 10,000 or less")]
    ShareTooLarge(u32),
    /// A percentage that is none.
    #[error("a percentage of {0} is not between 0 and 100; write one that is")]
    Percentage(String),
    /// Nothing would happen to the request.
    #[error("{0} is not an error's status; write one from 400 to 599")]
    NotAnError(u16),
    /// A request would hang.
    #[error("a delay of {0:?} is over {FAULT_DELAY_MAX:?}; write {FAULT_DELAY_MAX:?} or less")]
    DelayTooLong(Duration),
}

/// A wait that was asked for is bounded too: longer than any time-out that a test of time-outs is about.
pub const FAULT_DELAY_MAX: Duration = Duration::from_secs(60);

const ALL: u32 = 10_000;

/// A part of all requests, in ten-thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(u32);

impl Share {
    /// So many in 10,000.
    pub fn new(in_10_000: u32) -> Result<Self, ShapingError> {
        if in_10_000 > ALL { Err(ShapingError::ShareTooLarge(in_10_000)) } else { Ok(Self(in_10_000)) }
    }

    /// So many in 100, as people write it: to the hundredth.
    pub fn percent(percent: f64) -> Result<Self, ShapingError> {
        if !(0.0..=100.0).contains(&percent) {
            return Err(ShapingError::Percentage(percent.to_string()));
        }
        // Between 0 and 10,000.
        Self::new((percent * 100.0).round() as u32)
    }

    /// How many in 10,000.
    #[must_use]
    pub fn in_10_000(self) -> u32 {
        self.0
    }

    /// Whether a request with this random number is one of them.
    #[must_use]
    pub fn hits(self, random: u64) -> bool {
        below(ALL, random) < self.0
    }
}

/// A number from 0 to `bound - 1`, each as likely as another (to 2^-32) and the greater the greater `random` is.
fn below(bound: u32, random: u64) -> u32 {
    u32::try_from((u128::from(random) * u128::from(bound)) >> 64).unwrap_or(0)
}

/// Versions with their weights in percent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split<T> {
    /// Each with the sum of the weights up to and with its own.
    versions: Vec<(u32, T)>,
}

impl<T> Split<T> {
    /// Weights in percent that add up to 100.
    pub fn new(versions: impl IntoIterator<Item = (u32, T)>) -> Result<Self, ShapingError> {
        let mut sum = 0_u32;
        let versions: Vec<_> = versions
            .into_iter()
            .map(|(weight, version)| {
                sum = sum.saturating_add(weight);
                (sum, version)
            })
            .collect();
        if versions.is_empty() {
            return Err(ShapingError::NoVersion);
        }
        if sum != 100 {
            return Err(ShapingError::WeightsSum(sum));
        }
        Ok(Self { versions })
    }

    /// The version for a number: a random one, or a hash of what is to stay with its version (a sticky key). Each version has a
    /// stretch of all numbers, in the order in which they were given, so that of two versions nobody moves but who has to when a
    /// weight changes.
    #[must_use]
    pub fn choose(&self, number: u64) -> Option<&T> {
        let point = below(100, number);
        self.versions.iter().find(|(up_to, _)| point < *up_to).map(|(_, version)| version)
    }
}

/// What a header's value is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderTest {
    /// It is this, byte for byte.
    Exact(HeaderValue),
    /// It begins with this.
    Prefix(HeaderValue),
    /// There is one.
    Present,
}

/// Where requests with some header go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderRoute<T> {
    /// The header.
    pub name: HeaderName,
    /// What it is asked for. A header with several values fits if one of them does.
    pub test: HeaderTest,
    /// Where to.
    pub to: T,
}

impl<T> HeaderRoute<T> {
    fn fits(&self, headers: &HeaderMap) -> bool {
        let mut values = headers.get_all(&self.name).iter();
        match &self.test {
            HeaderTest::Exact(wanted) => values.any(|value| value == wanted),
            HeaderTest::Prefix(prefix) => values.any(|value| value.as_bytes().starts_with(prefix.as_bytes())),
            HeaderTest::Present => values.next().is_some(),
        }
    }
}

/// The first route that fits.
#[must_use]
pub fn route<'a, T>(routes: &'a [HeaderRoute<T>], headers: &HeaderMap) -> Option<&'a T> {
    routes.iter().find(|route| route.fits(headers)).map(|route| &route.to)
}

/// Copies of some requests go to another version, whose answers nobody waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror<T> {
    /// Where to.
    pub to: T,
    /// Of how many requests.
    pub share: Share,
}

impl<T> Mirror<T> {
    /// Where a copy of the request with this random number goes.
    #[must_use]
    pub fn copy_to(&self, random: u64) -> Option<&T> {
        self.share.hits(random).then_some(&self.to)
    }
}

/// What goes wrong on purpose. Each happens or not, independently of the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    delay: Option<(Share, Duration)>,
    abort: Option<(Share, StatusCode)>,
}

/// What goes wrong with one request. First the delay, then the abort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Injected {
    /// Wait so long before the request goes on.
    pub delay: Option<Duration>,
    /// Answer with this status in the application's place.
    pub abort: Option<StatusCode>,
}

impl Fault {
    /// With a delay for some requests.
    pub fn with_delay(self, share: Share, delay: Duration) -> Result<Self, ShapingError> {
        if delay > FAULT_DELAY_MAX {
            return Err(ShapingError::DelayTooLong(delay));
        }
        Ok(Self { delay: Some((share, delay)), ..self })
    }

    /// With an error for some requests.
    pub fn with_abort(self, share: Share, status: StatusCode) -> Result<Self, ShapingError> {
        if !status.is_client_error() && !status.is_server_error() {
            return Err(ShapingError::NotAnError(status.as_u16()));
        }
        Ok(Self { abort: Some((share, status)), ..self })
    }

    /// What is to go wrong with a request.
    #[must_use]
    pub fn inject(&self, random: &mut impl FnMut() -> u64) -> Injected {
        Injected {
            delay: self.delay.and_then(|(share, delay)| share.hits(random()).then_some(delay)),
            abort: self.abort.and_then(|(share, status)| share.hits(random()).then_some(status)),
        }
    }
}
