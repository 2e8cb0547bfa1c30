//! What does an answer say of a limit?
//!
//! `Retry-After` (RFC 9110, 10.2.3) and the fields of draft-ietf-httpapi-ratelimit-headers-11: `RateLimit-Policy`, which stays the
//! same, and `RateLimit`, which is about this moment. Both are lists of structured fields (RFC 9651), so that a proxy may add its
//! item to those of the application.

use std::time::Duration;

use super::{Left, Limited, RateSettings};

/// No name of a policy is longer: it travels with each answer.
const NAME_BYTES_MAX: usize = 64;

/// What a limit is called in the answers: a structured field's string that needs no escapes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyName(String);

/// A name that can't stand in a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name:?} can't name a limit; write 1 to {NAME_BYTES_MAX} of the letters a to z and A to Z, digits, and - _ . / :"
)]
pub struct PolicyNameError {
    /// As given.
    pub name: String,
}

impl PolicyName {
    /// A name of letters, digits and `-_./:`.
    pub fn new(name: &str) -> Result<Self, PolicyNameError> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:".contains(&byte);
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(fits) {
            return Err(PolicyNameError { name: name.to_owned() });
        }
        Ok(Self(name.to_owned()))
    }

    /// The name itself.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The value of `RateLimit-Policy`: `"name";q=quota;w=seconds`. It never changes, so write it once.
    ///
    /// A window has whole seconds. One that has not is rounded up, and the quota is what the rate makes of it, rounded down.
    #[must_use]
    pub fn policy_field(&self, settings: &RateSettings) -> String {
        let window = seconds_up(settings.per()).max(1);
        let per = settings.per().as_nanos().max(1);
        let quota = u128::from(settings.requests()) * u128::from(window) * 1_000_000_000 / per;
        // An integer of a structured field has fifteen digits at most; a million a second over a year has fourteen.
        self.item("q", u64::try_from(quota).unwrap_or(u64::MAX).min(999_999_999_999_999), "w", window)
    }

    /// The value of `RateLimit` for an answer to a request that passed: `"name";r=remaining;t=seconds`.
    #[must_use]
    pub fn left_field(&self, left: &Left) -> String {
        self.item("r", u64::from(left.remaining), "t", seconds_up(left.reset))
    }

    /// The value of `RateLimit` for a refusal. Its `t` is what `Retry-After` says: the draft wants that no earlier than the window's
    /// end (section 6).
    #[must_use]
    pub fn limited_field(&self, limited: &Limited) -> String {
        self.item("r", 0, "t", limited.retry_after_seconds())
    }

    fn item(&self, first: &str, first_value: u64, second: &str, second_value: u64) -> String {
        let mut numbers = (itoa::Buffer::new(), itoa::Buffer::new());
        let parts = [
            "\"",
            &self.0,
            "\";",
            first,
            "=",
            numbers.0.format(first_value),
            ";",
            second,
            "=",
            numbers.1.format(second_value),
        ];
        parts.concat()
    }
}

impl Limited {
    /// The value of `Retry-After`, in whole seconds: at least one, and never too early.
    #[must_use]
    pub fn retry_after_seconds(&self) -> u64 {
        seconds_up(self.retry_after).max(1)
    }
}

fn seconds_up(time: Duration) -> u64 {
    time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0))
}
