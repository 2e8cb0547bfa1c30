//! Is a failed attempt tried again, and when?
//!
//! What was surely not processed is tried again whatever its method, without a declaration. What may have been processed is tried
//! again only where the mesh file declares it and the request may be repeated. All of it is bounded four times: by attempts, by
//! the request's deadline, by the edge's [`RetryBudget`], and by the response, which must not have begun.
//!
//! Who sends requests does this, and nothing else:
//! 1. [`RetryBudget::deposit`] once for each request, before its first attempt;
//! 2. [`RetryBudget::succeeded`] for each attempt that was answered and is no failure to the policy ([`RetryPolicy::is_failure`]);
//! 3. [`decide`] for each attempt that failed, exactly once.
//!
//! **Invariant**: of an edge's requests, `repeated ≤ ratio × requests + floor × time + burst`, where a repeated attempt is one that
//! follows one which may have been processed, or is a request's third. So the service never works more than `1 + ratio` times for
//! each request (and the floor). While nothing succeeds, no more than [`THROTTLE_FAILURES`] are repeated, and twice as many rerouted.

mod budget;
mod policy;
mod retry_after;

use std::fmt;
use std::time::{Duration, Instant};

use http::{Method, StatusCode};

use budget::Hope;
pub use budget::{
    BURST_MAX, BudgetSettings, BudgetSettingsError, FLOOR_PER_SECOND_MAX, RetryBudget, THROTTLE_FAILURES,
};
pub use policy::{BACKOFF_MAX, LISTED_MAX, RETRIES_MAX, RetryPolicy, RetrySettings, RetrySettingsError};
pub use retry_after::parse_retry_after;

/// How many attempts may follow the first one where nothing is declared: replicas of a rolling update go one after another, and
/// a third one that refuses says something about the service.
pub const REROUTES_MAX: u32 = 2;

/// The longest wait that a response may ask for with `Retry-After`: a request without a deadline (a stream) would else be held
/// for as long as a peer likes. As long as a request may take by default.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(15);

/// What is known of a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No connection came about. Surely not processed.
    Connect,
    /// The stream was reset with `REFUSED_STREAM` (RFC 9113, 8.7), or was never sent. Surely not processed.
    RefusedStream,
    /// The connection's GOAWAY had a last id below the stream's (RFC 9113, 6.8). Surely not processed.
    GoAway,
    /// A connection from the pool turned out to be closed before any of the request was taken. Surely not processed.
    StaleConnection,
    /// The peer's sidecar answered, with a mark that its application never saw the request. Surely not processed.
    NotProcessed {
        /// What its `Retry-After` said ([`parse_retry_after`]).
        retry_after: Option<Duration>,
    },
    /// The peer's sidecar answered that it has too much to do. Surely not processed; but where one replica has, others may have too, so
    /// that to ask them is paid for. Its `Retry-After` is about itself.
    Busy,
    /// The stream or its connection broke. Maybe processed.
    Reset,
    /// The attempt's own time was over. Maybe processed.
    Timeout,
    /// A response with a status. Maybe processed.
    Status {
        /// The status.
        status: StatusCode,
        /// What its `Retry-After` said ([`parse_retry_after`]).
        retry_after: Option<Duration>,
    },
}

impl Failure {
    /// Whether it is sure that no application saw the request.
    #[must_use]
    pub fn is_surely_not_processed(self) -> bool {
        match self {
            Self::Connect
            | Self::RefusedStream
            | Self::GoAway
            | Self::StaleConnection
            | Self::NotProcessed { .. }
            | Self::Busy => true,
            Self::Reset | Self::Timeout | Self::Status { .. } => false,
        }
    }

    /// Whether it says something about one connection alone, so that a new one to the same replica is as good as another replica.
    fn is_of_its_connection(self) -> bool {
        matches!(self, Self::GoAway | Self::StaleConnection)
    }

    fn retry_after(self) -> Option<Duration> {
        match self {
            Self::NotProcessed { retry_after } | Self::Status { retry_after, .. } => retry_after,
            Self::Connect
            | Self::RefusedStream
            | Self::GoAway
            | Self::StaleConnection
            | Self::Busy
            | Self::Reset
            | Self::Timeout => None,
        }
    }
}

/// An attempt that failed, and the request that it was for.
#[derive(Clone, Copy, Debug)]
pub struct FailedAttempt<'a> {
    /// The request's method.
    pub method: &'a Method,
    /// What is known of it.
    pub failure: Failure,
    /// How many attempts were made, this one included.
    pub attempts_made: u32,
    /// Whether there is a replica that this request was not sent to yet.
    pub another_replica: bool,
    /// Whether the whole body can be sent again.
    pub body_replayable: bool,
    /// Whether any of a response went on to the caller.
    pub response_begun: bool,
    /// What is left until the request's deadline; absent where it has none.
    pub left: Option<Duration>,
}

/// What becomes of a request whose attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Try again. It has been paid for.
    Retry {
        /// Wait so long first; zero: at once.
        after: Duration,
    },
    /// The failure is the caller's answer.
    GiveUp(GiveUp),
}

/// Why a failed attempt is not tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveUp {
    /// The caller has some of a response.
    ResponseBegun,
    /// The body can't be sent again.
    BodyGone,
    /// The time that is left is not enough, also for the wait that a response asked for.
    Deadline,
    /// It may have been processed, and the edge declares no retries.
    NotDeclared,
    /// The status is none of those that are retried.
    Status,
    /// It may have been processed, and the method may not be repeated.
    NotIdempotent,
    /// As many attempts were made as there may be.
    Attempts,
    /// Most attempts of this edge fail.
    Throttled,
    /// The edge's budget is spent.
    Budget,
}

impl GiveUp {
    /// The word for the log and the metric.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::ResponseBegun => "response_begun",
            Self::BodyGone => "body_gone",
            Self::Deadline => "deadline",
            Self::NotDeclared => "not_declared",
            Self::Status => "status",
            Self::NotIdempotent => "not_idempotent",
            Self::Attempts => "attempts",
            Self::Throttled => "throttled",
            Self::Budget => "budget",
        }
    }
}

impl fmt::Display for GiveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Decides about a failed attempt, and takes the retry from the budget where it needs one. `random` is any 64 random bits, for
/// the jitter.
pub fn decide(
    policy: &RetryPolicy,
    budget: &RetryBudget,
    attempt: &FailedAttempt<'_>,
    now: Instant,
    random: u64,
) -> Verdict {
    // Counted whatever becomes of the request: the throttle is about the edge.
    let hope = budget.failed(now);
    let wait = match allowed(policy, attempt).and_then(|()| wait(policy, attempt, random)) {
        Ok(wait) => wait,
        Err(reason) => return Verdict::GiveUp(reason),
    };
    // The last question, since its answer costs something.
    match pay(budget, attempt, hope, now) {
        Ok(()) => Verdict::Retry { after: wait },
        Err(reason) => Verdict::GiveUp(reason),
    }
}

/// Whether this request may be sent once more at all.
fn allowed(policy: &RetryPolicy, attempt: &FailedAttempt<'_>) -> Result<(), GiveUp> {
    if attempt.response_begun {
        return Err(GiveUp::ResponseBegun);
    }
    if !attempt.body_replayable {
        return Err(GiveUp::BodyGone);
    }
    let declared = if policy.is_declared() { policy.settings().retries } else { 0 };
    let retries = if attempt.failure.is_surely_not_processed() {
        declared.max(REROUTES_MAX)
    } else {
        if let Failure::Status { status, .. } = attempt.failure
            && !policy.is_failure(status)
        {
            return Err(GiveUp::Status);
        }
        if declared == 0 {
            return Err(GiveUp::NotDeclared);
        }
        if !policy.may_repeat(attempt.method) {
            return Err(GiveUp::NotIdempotent);
        }
        declared
    };
    if attempt.attempts_made > retries { Err(GiveUp::Attempts) } else { Ok(()) }
}

/// How long to wait, with full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015), so that callers which failed together
/// don't return together.
fn wait(policy: &RetryPolicy, attempt: &FailedAttempt<'_>, random: u64) -> Result<Duration, GiveUp> {
    let asked = attempt.failure.retry_after().unwrap_or(Duration::ZERO);
    let left = attempt.left.unwrap_or(Duration::MAX);
    if left.is_zero() || asked >= left || asked > RETRY_AFTER_MAX {
        return Err(GiveUp::Deadline);
    }
    if asked.is_zero() && is_free(attempt) {
        return Ok(Duration::ZERO);
    }
    // At least half of the time is left to the attempt itself: a wait that eats it up helps nobody.
    let room = left.saturating_sub(asked) / 2;
    let ceiling = policy.backoff_ceiling(attempt.attempts_made).min(room);
    Ok(asked.saturating_add(share(ceiling, random)))
}

/// Whether the retry is a reroute: the first one of a request that surely nobody processed, to where it was not refused yet. While
/// anything succeeds, none is refused: an update that takes away one replica of two must not cost the budget, nor a request.
fn is_free(attempt: &FailedAttempt<'_>) -> bool {
    attempt.failure.is_surely_not_processed()
        && attempt.failure != Failure::Busy
        && attempt.attempts_made <= 1
        && (attempt.another_replica || attempt.failure.is_of_its_connection())
}

fn pay(budget: &RetryBudget, attempt: &FailedAttempt<'_>, hope: Hope, now: Instant) -> Result<(), GiveUp> {
    if is_free(attempt) && hope.reroute {
        return Ok(());
    }
    // What was surely not processed cost the service next to nothing, and may find one of few that are left: the budget is bound
    // enough.
    if !attempt.failure.is_surely_not_processed() && !hope.repeat {
        return Err(GiveUp::Throttled);
    }
    if budget.withdraw(now) { Ok(()) } else { Err(GiveUp::Budget) }
}

/// A random part of a time, each as likely as any other.
fn share(whole: Duration, random: u64) -> Duration {
    let nanos = u64::try_from(whole.as_nanos()).unwrap_or(u64::MAX);
    let part = (u128::from(nanos) * u128::from(random)) >> 64;
    Duration::from_nanos(u64::try_from(part).unwrap_or(nanos))
}

#[cfg(test)]
mod tests;
