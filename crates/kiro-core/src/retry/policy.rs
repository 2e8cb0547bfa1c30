//! What did the mesh file declare about an edge's retries?

use std::sync::LazyLock;
use std::time::Duration;

use http::{Method, StatusCode};

/// More attempts than this are a storm of one request's own.
pub const RETRIES_MAX: u32 = 10;

/// The longest back-off that may be declared.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// As many methods or statuses as a list may have: each failure looks through it.
pub const LISTED_MAX: usize = 16;

/// What may be declared; any field may be changed before it becomes a [`RetryPolicy`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetrySettings {
    /// How many attempts may follow the first one.
    pub retries: u32,
    /// Which methods are retried; absent: those that RFC 9110, 9.2.2 calls idempotent.
    pub methods: Option<Vec<Method>>,
    /// Which statuses are.
    pub statuses: Vec<StatusCode>,
    /// How long one attempt may take; absent: as long as the request.
    pub per_try_timeout: Option<Duration>,
    /// The longest wait before the first retry; it doubles with each further one.
    pub backoff_base: Duration,
    /// What it doubles up to.
    pub backoff_max: Duration,
}

impl Default for RetrySettings {
    /// - Two retries: with a third of all attempts failing, 96 of 100 requests succeed, and a third one adds three.
    /// - 502, 503 and 504: what a gateway says when the service behind it could not. A 500 is the service's own word, which it
    ///   would say again.
    /// - 25 ms doubling to 250 ms: Envoy's.
    fn default() -> Self {
        Self {
            retries: 2,
            methods: None,
            statuses: vec![
                StatusCode::BAD_GATEWAY,
                StatusCode::SERVICE_UNAVAILABLE,
                StatusCode::GATEWAY_TIMEOUT,
            ],
            per_try_timeout: None,
            backoff_base: Duration::from_millis(25),
            backoff_max: Duration::from_millis(250),
        }
    }
}

/// Why settings make no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RetrySettingsError {
    /// None, or too many.
    #[error("{0} retries: write 1 to {RETRIES_MAX}, or leave the declaration out")]
    Retries(u32),
    /// A list that is empty or too long.
    #[error("a list of {0} methods: write 1 to {LISTED_MAX}, or leave it out for those that are idempotent")]
    Methods(usize),
    /// A list that is too long.
    #[error("a list of {0} statuses: write at most {LISTED_MAX}")]
    Statuses(usize),
    /// A status that says no failure of the service.
    #[error("status {0} is no failure that another try would mend: write 408, 425, 429 or one of 500 to 599")]
    Status(StatusCode),
    /// No time at all.
    #[error("a timeout of 0 for each try: write a longer one, or leave it out")]
    PerTryTimeout,
    /// A wait of nothing, one that shrinks, or one without end.
    #[error(
        "a back-off from {base:?} to {max:?}: write two times above 0, at most a minute, the shorter one first"
    )]
    Backoff {
        /// The first wait's bound.
        base: Duration,
        /// The longest wait's.
        max: Duration,
    },
}

/// How an edge's failed attempts are retried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    settings: RetrySettings,
    declared: bool,
}

impl RetryPolicy {
    /// A declared policy.
    ///
    /// # Errors
    /// When a setting makes no sense.
    pub fn new(settings: RetrySettings) -> Result<Self, RetrySettingsError> {
        if !(1..=RETRIES_MAX).contains(&settings.retries) {
            return Err(RetrySettingsError::Retries(settings.retries));
        }
        if let Some(methods) = &settings.methods
            && !(1..=LISTED_MAX).contains(&methods.len())
        {
            return Err(RetrySettingsError::Methods(methods.len()));
        }
        if settings.statuses.len() > LISTED_MAX {
            return Err(RetrySettingsError::Statuses(settings.statuses.len()));
        }
        if let Some(status) = settings.statuses.iter().find(|status| !may_be_retried(**status)) {
            return Err(RetrySettingsError::Status(*status));
        }
        if settings.per_try_timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(RetrySettingsError::PerTryTimeout);
        }
        let (base, max) = (settings.backoff_base, settings.backoff_max);
        if base.is_zero() || base > max || max > BACKOFF_MAX {
            return Err(RetrySettingsError::Backoff { base, max });
        }
        Ok(Self { settings, declared: true })
    }

    /// The policy of an edge that declares none: only what was surely not processed is retried.
    #[must_use]
    pub fn undeclared() -> Self {
        Self { settings: RetrySettings { statuses: Vec::new(), ..RetrySettings::default() }, declared: false }
    }

    /// The same, once for all.
    #[must_use]
    pub fn none() -> &'static Self {
        static NONE: LazyLock<RetryPolicy> = LazyLock::new(RetryPolicy::undeclared);
        &NONE
    }

    /// Whether the mesh file declared it.
    #[must_use]
    pub fn is_declared(&self) -> bool {
        self.declared
    }

    /// What it was made from.
    #[must_use]
    pub fn settings(&self) -> &RetrySettings {
        &self.settings
    }

    /// Whether a response with this status is a failed attempt. All others go to the caller as they are.
    #[must_use]
    pub fn is_failure(&self, status: StatusCode) -> bool {
        self.settings.statuses.contains(&status)
    }

    /// Whether a request with this method may be sent again though it may have been processed.
    #[must_use]
    pub fn may_repeat(&self, method: &Method) -> bool {
        match &self.settings.methods {
            Some(methods) => methods.contains(method),
            None => method.is_idempotent(),
        }
    }

    /// The most that is waited after so many attempts: the base, doubled for each attempt after the first.
    pub(super) fn backoff_ceiling(&self, attempts_made: u32) -> Duration {
        let doublings = attempts_made.saturating_sub(1).min(31);
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        self.settings.backoff_base.saturating_mul(factor).min(self.settings.backoff_max)
    }
}

/// RFC 9110, 15.5.9 and 15.6, RFC 8470, 5.2 (425) and RFC 6585, 4 (429): what may be different at another time.
fn may_be_retried(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 425 | 429 | 500..=599)
}

#[cfg(test)]
mod tests;
