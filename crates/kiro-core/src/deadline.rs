//! How long may this request still take?
//!
//! A request's time is a budget that travels. Each hop says to the next what is left of it, as a span of time and never as a time
//! of day, since clocks differ between hosts; the next hop counts from when the word arrived. What it took on the wire is the
//! caller's loss, and the caller, who measures by itself, cancels what is late.
//!
//! Two fields carry it: `grpc-timeout`, as gRPC has it, and our own `x-kiro-deadline` between sidecars, in milliseconds.
//!
//! **Invariant**: whatever a peer or an application says can only shorten what the local policy allows ([`Budget::deadline`]).

use std::time::{Duration, Instant};

use http::HeaderValue;

/// The longest time that `x-kiro-deadline` says, and that a route's timeout may be. What takes longer than an hour is a stream,
/// and streams have no deadline.
pub const LEFT_MAX: Duration = Duration::from_hours(1);

/// As many digits as [`LEFT_MAX`] has in milliseconds.
const LEFT_DIGITS_MAX: usize = 7;

/// gRPC over HTTP/2, `TimeoutValue`: a "positive integer as ASCII string of at most 8 digits".
const GRPC_DIGITS_MAX: usize = 8;
const GRPC_VALUE_MAX: u128 = 99_999_999;

/// gRPC's units with their nanoseconds, the finest first.
const GRPC_UNITS: [(u8, u64); 6] = [
    (b'n', 1),
    (b'u', 1_000),
    (b'm', 1_000_000),
    (b'S', 1_000_000_000),
    (b'M', 60_000_000_000),
    (b'H', 3_600_000_000_000),
];

/// The farthest that a deadline lies ahead, so that adding it to any clock's time is defined: `99999999H` are 11,000 years.
const AHEAD_MAX: Duration = Duration::from_hours(24 * 365);

/// The time at which a request is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline {
    /// From then on nothing is worth doing.
    pub at: Instant,
}

impl Deadline {
    /// A deadline this long after `now`. One that is more than a year away is a year away.
    #[must_use]
    pub fn of_timeout(now: Instant, timeout: Duration) -> Self {
        // No clock that counts from its machine's start fails to hold another year; one that does has no time left to give.
        Self { at: now.checked_add(timeout.min(AHEAD_MAX)).unwrap_or(now) }
    }

    /// What is left; zero once it is over.
    #[must_use]
    pub fn left(self, now: Instant) -> Duration {
        self.at.saturating_duration_since(now)
    }

    /// Whether no time is left.
    #[must_use]
    pub fn is_over(self, now: Instant) -> bool {
        self.at <= now
    }

    /// This deadline, or `timeout` from now where that is sooner: an attempt's within its request's.
    #[must_use]
    pub fn within(self, now: Instant, timeout: Option<Duration>) -> Self {
        timeout.map_or(self, |timeout| self.min(Self::of_timeout(now, timeout)))
    }

    /// What `x-kiro-deadline` says to the next hop: the milliseconds left, rounded down, so that no hop believes in more time
    /// than the one before it has. Absent where more than [`LEFT_MAX`] is left: there the callee's own limits are the shorter.
    ///
    /// `0` says that it is over. Don't send such a request.
    #[must_use]
    pub fn field(self, now: Instant) -> Option<HeaderValue> {
        let left = self.left(now);
        let millis = u64::try_from(left.as_millis()).ok()?;
        (left <= LEFT_MAX).then(|| HeaderValue::from(millis))
    }

    /// What `grpc-timeout` says to the next hop.
    #[must_use]
    pub fn grpc_timeout(self, now: Instant) -> HeaderValue {
        format_grpc_timeout(self.left(now))
    }
}

/// What is known of a request's time when it arrives. Each is absent where nobody said anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// The route's timeout: the local policy.
    pub route: Option<Duration>,
    /// What the caller's sidecar said in `x-kiro-deadline` ([`parse_field`]).
    pub peer: Option<Duration>,
    /// What the application said in `grpc-timeout` ([`parse_grpc_timeout`]).
    pub grpc: Option<Duration>,
}

impl Budget {
    /// The deadline of a request that arrived at `now`: the soonest of all, so that nobody's word lengthens another's. Absent
    /// where nobody said anything.
    #[must_use]
    pub fn deadline(self, now: Instant) -> Option<Deadline> {
        let shortest = [self.route, self.peer, self.grpc].into_iter().flatten().min()?;
        Some(Deadline::of_timeout(now, shortest))
    }
}

/// Why a field does not say how much time is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeadlineError {
    /// No digit where there must be one.
    #[error("no number: write the digits 0 to 9 first")]
    NoNumber,
    /// Something else than a digit (and, in `grpc-timeout`, its unit).
    #[error("not a number of digits alone")]
    NotDigits,
    /// A second spelling of a number that has one.
    #[error("a leading zero: write the number without it")]
    LeadingZero,
    /// More digits than the field may have.
    #[error("more than {max} digits")]
    TooManyDigits {
        /// How many there may be.
        max: usize,
    },
    /// More than [`LEFT_MAX`].
    #[error("more than an hour: leave the field out where so much time is left")]
    TooLong,
    /// `grpc-timeout` without one of its six units.
    #[error("no unit: end with one of H, M, S, m, u, n")]
    NoUnit,
}

/// Reads `x-kiro-deadline`: an unsigned decimal number of milliseconds, in its one spelling, at most [`LEFT_MAX`]. Zero is an
/// answer: it is over already.
///
/// # Errors
/// When it is anything else. A sidecar never writes such a thing, so its request is malformed.
pub fn parse_field(value: &[u8]) -> Result<Duration, DeadlineError> {
    let millis = digits(value, LEFT_DIGITS_MAX)?;
    if value.len() > 1 && value.first() == Some(&b'0') {
        return Err(DeadlineError::LeadingZero);
    }
    let left = Duration::from_millis(millis);
    if left > LEFT_MAX { Err(DeadlineError::TooLong) } else { Ok(left) }
}

/// Reads `grpc-timeout`: one to eight digits and a unit of one letter, whose case counts.
///
/// The specification asks for a positive number; zero is taken nevertheless, as "over already": gRPC for Go writes `0n` for a
/// deadline that has passed, and reading it as no deadline would lengthen what the caller asked for.
///
/// # Errors
/// When it is anything else. The specification doesn't say what then; a sidecar that ignores it keeps to its own limits, and
/// leaves the refusal to the application, which sees the field as it came.
pub fn parse_grpc_timeout(value: &[u8]) -> Result<Duration, DeadlineError> {
    let (unit, number) = value.split_last().ok_or(DeadlineError::NoNumber)?;
    let (_, nanos) = GRPC_UNITS.iter().find(|(letter, _)| letter == unit).ok_or(DeadlineError::NoUnit)?;
    let number = digits(number, GRPC_DIGITS_MAX)?;
    // 99999999H are 3.6e20 ns: more than a u64 holds, so whole units of a second and above are counted in seconds.
    Ok(match nanos / 1_000_000_000 {
        0 => Duration::from_nanos(number.saturating_mul(*nanos)),
        seconds => Duration::from_secs(number.saturating_mul(seconds)),
    })
}

/// Writes `grpc-timeout`, rounded down in the finest unit that holds it in eight digits: less than a hundred-thousandth is lost. What
/// is longer than `99999999H` is that; what is over is `1n`, since the number must be positive.
#[must_use]
pub fn format_grpc_timeout(left: Duration) -> HeaderValue {
    let left = left.as_nanos().max(1);
    let (value, unit) = GRPC_UNITS
        .iter()
        .map(|(unit, nanos)| (left / u128::from(*nanos), *unit))
        .find(|(value, _)| *value <= GRPC_VALUE_MAX)
        .unwrap_or((GRPC_VALUE_MAX, b'H'));
    let mut text = itoa::Buffer::new().format(value).to_owned();
    text.push(char::from(unit));
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("1n"))
}

/// A number of one to `max` digits and nothing else.
fn digits(text: &[u8], max: usize) -> Result<u64, DeadlineError> {
    if text.is_empty() {
        return Err(DeadlineError::NoNumber);
    }
    if !text.iter().all(u8::is_ascii_digit) {
        return Err(DeadlineError::NotDigits);
    }
    if text.len() > max {
        return Err(DeadlineError::TooManyDigits { max });
    }
    Ok(text.iter().fold(0, |number: u64, digit| {
        number.saturating_mul(10).saturating_add(u64::from(digit.saturating_sub(b'0')))
    }))
}

#[cfg(test)]
mod tests;
