//! Where does a request go next, and when is it given up?
//!
//! The rules are `kiro-core`'s: [`balance`] chooses the replica, [`retry`] decides what is sent again, and the breaker whether the
//! service is asked at all. Here they meet the request: what is known of a failure, whom it counts against, and what is told.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::header::RETRY_AFTER;
use http::{HeaderMap, Method, StatusCode};
use kiro_core::balance::{self, InFlight, Outcome, Replica};
use kiro_core::breaker::{self, Admission, Breaker};
use kiro_core::mesh::{Terms, Timeout};
use kiro_core::retry::{self, FailedAttempt, RetryPolicy, Verdict};

use crate::edge::{Calls, Edge, RETRIED};
use crate::reject::{self, Refused, Reject};
use crate::worker::unix_seconds;

/// An attempt that failed.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What the caller would learn.
    pub(crate) refused: Refused,
    /// How far it came.
    pub(crate) reached: retry::Failure,
}

impl Failure {
    /// A failure before anything was sent.
    pub(crate) fn nobody(refused: Refused) -> Self {
        Self { refused, reached: retry::Failure::Connect }
    }

    /// Whether it is the request itself, or this side, that no other attempt would mend.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(
            self.refused.reject,
            Reject::EdgeSecretMissing
                | Reject::SignatureLabelTaken
                | Reject::HeaderInvalid
                | Reject::HeadersTooLarge
                | Reject::PathInvalid
                | Reject::RequestTimeout
                | Reject::MessageInvalid
        )
    }

    /// Whom it counts against. What failed on this side says nothing about the replica; see also [`Failure::is_ours`].
    /// `excused` where whoever asked gave less time than the mesh file does, or is still sending.
    pub(crate) fn outcome(&self, excused: bool) -> Outcome {
        match (self.reached, self.refused.reject) {
            (_, Reject::QueueFull) => Outcome::Abandoned,
            (retry::Failure::Timeout, _) if excused => Outcome::Abandoned,
            // The request's own time was over before there was a connection with room, however long that would have taken.
            (retry::Failure::Connect, Reject::UpstreamTimeout) => Outcome::Abandoned,
            (retry::Failure::Connect, _) => Outcome::ConnectFailure,
            // It is on its way out, in good order; its address will soon be gone.
            (retry::Failure::GoAway | retry::Failure::RefusedStream | retry::Failure::StaleConnection, _) => {
                Outcome::Abandoned
            }
            (
                retry::Failure::Reset
                | retry::Failure::Timeout
                | retry::Failure::NotProcessed { .. }
                | retry::Failure::Busy
                | retry::Failure::Status { .. },
                _,
            ) => Outcome::Failure,
        }
    }
}

/// What an answer's head means for the attempt that it ends.
pub(crate) enum Answer {
    /// It is the caller's, and so is what became of the replica.
    Final(Outcome),
    /// It is a failure that may be tried again, with what it says of the replica.
    Failed(retry::Failure, Outcome),
    /// The replica has too much to do, and there is no other one. That is the caller's answer.
    Overloaded,
}

fn of_status(status: StatusCode) -> Outcome {
    if status.is_server_error() {
        Outcome::Failure
    } else if status.is_client_error() {
        Outcome::Rejected
    } else {
        Outcome::Success
    }
}

/// The attempts of one request.
pub(crate) struct Attempts<'a> {
    edge: &'a Arc<Edge>,
    replicas: Rc<[Arc<Replica>]>,
    policy: &'a RetryPolicy,
    method: &'a Method,
    tried: Vec<SocketAddr>,
    made: u32,
    /// Held until the caller's answer is known; dropped without, a trial frees its place.
    admitted: Option<(&'a Arc<Breaker>, Admission)>,
}

/// What becomes of a request whose attempt has failed.
pub(crate) enum Next {
    /// Another attempt, after so long.
    Again(Duration),
    /// The failure is the caller's answer, for this reason.
    End(&'static str),
}

impl<'a> Attempts<'a> {
    /// Begins, if the service's breaker lets it.
    pub(crate) fn begin(
        calls: &'a Calls,
        terms: &Terms<'a>,
        method: &'a Method,
        replicas: Rc<[Arc<Replica>]>,
        now: Instant,
    ) -> Result<Self, Refused> {
        let edge = &calls.edge;
        let admitted = match &calls.breaker {
            None => None,
            Some(breaker) => match breaker.admit(now) {
                Admission::Refused { retry_after } => {
                    let cause =
                        format!("`{}` has failed too often: asked again in {retry_after:.1?}", edge.name);
                    return Err(Refused::new(Reject::BreakerOpen, cause).after(retry_after));
                }
                admission @ (Admission::Closed(_) | Admission::Trial(_)) => {
                    if let Admission::Trial(trial) = &admission
                        && let Some(transition) = trial.transition()
                    {
                        edge.tell_breaker(&transition);
                    }
                    Some((breaker, admission))
                }
            },
        };
        edge.budget.deposit(now);
        let policy = match terms.retries {
            Some(policy) => policy,
            None => RetryPolicy::none(),
        };
        Ok(Self { edge, replicas, policy, method, tried: Vec::new(), made: 0, admitted })
    }

    /// The replica for the next attempt, which counts as on its way there.
    pub(crate) fn next(&mut self, now: Instant) -> Result<Flight<'a>, Refused> {
        let random = fastrand::u64(..);
        let chosen =
            balance::choose(&self.replicas, now, random, &self.tried).ok_or(Reject::NameUnresolved)?;
        self.made += 1;
        Ok(Flight { edge: self.edge, in_flight: Some(chosen) })
    }

    /// How long one attempt may take, of what is left.
    pub(crate) fn within(&self, left: Timeout) -> Timeout {
        match (left, self.policy.settings().per_try_timeout) {
            (Timeout::After(left), Some(per_try)) => Timeout::After(left.min(per_try)),
            (Timeout::Off, Some(per_try)) => Timeout::After(per_try),
            (left, None) => left,
        }
    }

    /// Reads an answer's head. Only a sidecar's word says that its application has not seen the request; an application's
    /// `x-kiro-reject` does not come so far.
    ///
    /// `excused` as in [`Failure::outcome`]: that the time was not enough says nothing about the callee then.
    pub(crate) fn read_head(
        &self,
        flight: &Flight<'_>,
        status: StatusCode,
        headers: &HeaderMap,
        excused: bool,
    ) -> Answer {
        let policy = self.policy;
        let retry_after = || {
            let value = headers.get(RETRY_AFTER)?;
            retry::parse_retry_after(value.as_bytes(), unix_seconds(SystemTime::now()))
        };
        match reject::of_peer(headers) {
            Some(Reject::DeadlineOver) => Answer::Final(Outcome::Abandoned),
            Some(Reject::AppTimeout) if excused => Answer::Final(Outcome::Abandoned),
            // Whose application is unready is not asked again by the same request, and by others only as a trial. When it is worth
            // asking that replica again is no reason to keep the request from another one.
            Some(Reject::AppUnready) if self.is_elsewhere(flight.address()) => {
                Answer::Failed(retry::Failure::NotProcessed { retry_after: None }, Outcome::Failure)
            }
            Some(Reject::AppUnready) => Answer::Final(Outcome::Failure),
            // Whoever has too much to do already is not asked again by the same caller.
            Some(reject) if reject.is_overload() && !self.is_elsewhere(flight.address()) => {
                Answer::Overloaded
            }
            // Another may have room. To leave this one out for its word would only give the others more to do.
            Some(reject) if reject.is_overload() => Answer::Failed(retry::Failure::Busy, Outcome::Rejected),
            Some(reject) if reject.is_before_the_application() => {
                Answer::Failed(retry::Failure::NotProcessed { retry_after: retry_after() }, Outcome::Failure)
            }
            // What was refused for its rate is refused again, wherever it goes, and counts each time.
            Some(Reject::RateLimited) => Answer::Final(Outcome::Rejected),
            // A refusal of gRPC is a 200 to gRPC alone.
            Some(reject) if policy.is_failure(reject.status()) => Answer::Failed(
                retry::Failure::Status { status: reject.status(), retry_after: retry_after() },
                Outcome::Failure,
            ),
            Some(reject) => Answer::Final(of_status(reject.status())),
            None if policy.is_failure(status) => Answer::Failed(
                retry::Failure::Status { status, retry_after: retry_after() },
                Outcome::Failure,
            ),
            None => Answer::Final(of_status(status)),
        }
    }

    /// Whether there is a replica that this request has not been to, nor is at now.
    fn is_elsewhere(&self, here: Option<SocketAddr>) -> bool {
        let mut addresses = self.replicas.iter().map(|replica| replica.address());
        addresses.any(|one| Some(one) != here && !self.tried.contains(&one))
    }

    /// The replica has too much to do, and says so to the caller. For the service's breaker that is a failure; the replica does what
    /// it can.
    pub(crate) fn overloaded(&mut self, flight: Flight<'_>, now: Instant) {
        flight.end(now, Outcome::Rejected);
        self.told(breaker::Outcome::Failure, now);
    }

    /// An answer that is the caller's; or the end of a request that no attempt mends, which was abandoned: neither replica nor budget
    /// nor breaker is held to account.
    pub(crate) fn answered(&mut self, flight: Flight<'_>, outcome: Outcome, now: Instant) {
        flight.end(now, outcome);
        self.told(
            match outcome {
                Outcome::Failure | Outcome::ConnectFailure => breaker::Outcome::Failure,
                Outcome::Abandoned => breaker::Outcome::Abandoned,
                Outcome::Success | Outcome::Rejected => {
                    self.edge.budget.succeeded();
                    breaker::Outcome::Success
                }
            },
            now,
        );
    }

    /// An attempt that failed, with what is left of the request: decides whether there is another.
    pub(crate) fn failed(
        &mut self,
        flight: Flight<'_>,
        (reached, outcome): (retry::Failure, Outcome),
        body_replayable: bool,
        left: Timeout,
        now: Instant,
    ) -> Next {
        let address = flight.address();
        flight.end(now, outcome);
        if let Some(address) = address
            && !self.tried.contains(&address)
        {
            self.tried.push(address);
        }
        if matches!(reached, retry::Failure::Connect) {
            self.edge.again.notify_one();
        }
        let attempt = FailedAttempt {
            method: self.method,
            failure: reached,
            attempts_made: self.made,
            another_replica: self.is_elsewhere(address),
            body_replayable,
            response_begun: false,
            left: match left {
                Timeout::After(left) => Some(left),
                Timeout::Off => None,
            },
        };
        let verdict = retry::decide(self.policy, &self.edge.budget, &attempt, now, fastrand::u64(..));
        match verdict {
            Verdict::Retry { after } => {
                self.edge.retries.count(RETRIED);
                Next::Again(after)
            }
            Verdict::GiveUp(reason) => {
                // The caller is told an error, whoever's it is, but for one whose time nobody could have kept.
                let in_order = matches!(
                    reached,
                    retry::Failure::GoAway | retry::Failure::RefusedStream | retry::Failure::StaleConnection
                );
                self.told(
                    match outcome {
                        Outcome::Abandoned if !in_order => breaker::Outcome::Abandoned,
                        Outcome::Abandoned
                        | Outcome::Success
                        | Outcome::Rejected
                        | Outcome::Failure
                        | Outcome::ConnectFailure => breaker::Outcome::Failure,
                    },
                    now,
                );
                self.edge.retries.count(reason.word());
                Next::End(reason.word())
            }
        }
    }

    /// The breaker learns what the caller is told.
    fn told(&mut self, outcome: breaker::Outcome, now: Instant) {
        let Some((breaker, admission)) = self.admitted.take() else { return };
        if let Some(transition) = breaker.record(now, admission, outcome, || fastrand::u64(..)) {
            self.edge.tell_breaker(&transition);
        }
    }
}

/// A request on its way to a replica. One that is dropped was abandoned by its caller, which must not make a slow replica look fast.
pub(crate) struct Flight<'a> {
    edge: &'a Edge,
    in_flight: Option<InFlight>,
}

impl Flight<'_> {
    /// Where to.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.in_flight.as_ref().map(InFlight::address)
    }

    /// It leaves on a connection that stands.
    pub(crate) fn sent(&mut self, now: Instant) {
        if let Some(in_flight) = &mut self.in_flight {
            in_flight.sent(now);
        }
    }

    fn end(mut self, now: Instant, outcome: Outcome) {
        if let Some(event) = self.in_flight.take().and_then(|in_flight| in_flight.end(now, outcome)) {
            self.edge.tell(&event);
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if let Some(in_flight) = self.in_flight.take()
            && let Some(event) = in_flight.end(Instant::now(), Outcome::Abandoned)
        {
            self.edge.tell(&event);
        }
    }
}
