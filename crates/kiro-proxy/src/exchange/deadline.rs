//! How much time has a request, and who learns of it?

use std::time::{Duration, Instant};

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, request};
use kiro_core::deadline::{self, Budget};
use kiro_core::fields;
use kiro_core::mesh::{Timeout, Traffic};

use super::Exchange;
use crate::reject::{Refused, Reject};

impl Exchange {
    /// Takes over how long the answer's head may take: the soonest of what the mesh file says, what the caller's sidecar or the
    /// application said in `x-kiro-deadline`, and in a call of gRPC `grpc-timeout`. Nobody's word lengthens another's.
    ///
    /// For a call of gRPC the mesh file says nothing: a stream may begin to answer whenever it likes.
    pub(crate) fn take_deadline(
        &mut self,
        head: &mut request::Parts,
        traffic: &Traffic,
    ) -> Result<(), Refused> {
        let call = self.is_call();
        let peer = asked_for(&mut head.headers)?;
        let grpc = if call { grpc_timeout(&head.headers) } else { None };
        let path = head.uri.path_and_query().map_or("/", PathAndQuery::path);
        let route = match traffic.terms(self.method(), path).timeout {
            Timeout::After(timeout) if !call => Some(timeout),
            Timeout::After(_) | Timeout::Off => None,
        };
        self.hurried = peer.is_some();
        self.impatient = grpc.is_some();
        self.deadline = Budget { route, peer, grpc }.deadline(self.started);
        if self.deadline.is_some_and(|deadline| deadline.left(self.started).is_zero()) {
            return Err(Refused::new(Reject::DeadlineOver, "no time was left when the request came"));
        }
        Ok(())
    }

    /// Whether whoever asked gave it less time than the mesh file does.
    pub(crate) fn is_hurried(&self) -> bool {
        self.hurried || self.impatient
    }

    /// How much time is left until the answer's head is of no use any more.
    pub(crate) fn time_left(&self) -> Timeout {
        self.time_left_at(Instant::now())
    }

    /// The same, as of a time that was read already.
    pub(crate) fn time_left_at(&self, now: Instant) -> Timeout {
        self.deadline.map_or(Timeout::Off, |deadline| Timeout::After(deadline.left(now)))
    }

    /// Lets the next hop know how much time is left, where it can't know that from the mesh file: at another attempt than the first,
    /// or where somebody asked for less.
    pub(crate) fn tell_deadline(&self, headers: &mut HeaderMap) {
        let Some(deadline) = self.deadline.filter(|_| self.hurried || self.attempts > 1) else { return };
        let now = Instant::now();
        if let Some(left) = deadline.field(now) {
            headers.insert(fields::DEADLINE.clone(), left);
        }
        if headers.contains_key(&GRPC_TIMEOUT) {
            headers.insert(GRPC_TIMEOUT.clone(), deadline.grpc_timeout(now));
        }
    }
}

static GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// What `x-kiro-deadline` says, which goes no further as it is.
fn asked_for(headers: &mut HeaderMap) -> Result<Option<Duration>, Refused> {
    if !headers.contains_key(&fields::DEADLINE) {
        return Ok(None);
    }
    let wrong = |what: String| Refused::new(Reject::HeaderInvalid, format!("x-kiro-deadline: {what}"));
    if headers.get_all(&fields::DEADLINE).iter().nth(1).is_some() {
        return Err(wrong("it is there twice".to_owned()));
    }
    let asked = headers.remove(&fields::DEADLINE);
    let parse = |asked: HeaderValue| {
        deadline::parse_field(asked.as_bytes()).map_err(|error| wrong(error.to_string()))
    };
    asked.map(parse).transpose()
}

/// What `grpc-timeout` says. One that says nothing is left to the application, which sees it as it came.
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    deadline::parse_grpc_timeout(headers.get(&GRPC_TIMEOUT)?.as_bytes()).ok()
}
