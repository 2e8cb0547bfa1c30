//! What happened to one request?
//!
//! An [`Exchange`] is made when a request's head is read and is recorded exactly once, when it is dropped: one access line, one
//! count, one span. A client that went away drops the future that holds it, so such requests are recorded as well.

mod deadline;

use std::borrow::Cow;
use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Instant, SystemTime};

use http::uri::PathAndQuery;
use http::{HeaderMap, Method, StatusCode, Version, request};
use kiro_core::deadline::Deadline;
use kiro_core::identity::ServiceName;
use kiro_core::mesh::Protocol;
use kiro_core::policy::{Denial, Verdict};
use kiro_telemetry::access::AccessRecord;
use kiro_telemetry::trace::TraceContext;

use crate::admission::{Limit, Place};
use crate::headers;
use crate::metrics::Finished;
use crate::overload::Entry;
use crate::rates::Told;
use crate::reject::{Refused, Reject};
use crate::send::Pace;
use crate::spans;
use crate::state::Snapshot;
use crate::worker::{Worker, unix_seconds};

/// Which of the sidecar's listeners a request came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the application.
    Outbound,
    /// From another sidecar.
    Inbound,
    /// From outside the mesh.
    Ingress,
}

impl Direction {
    /// The word that log and metrics use.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Direction::Outbound => "outbound",
            Direction::Inbound => "inbound",
            Direction::Ingress => "ingress",
        }
    }
}

/// The connection that a request came by.
#[derive(Debug)]
pub(crate) struct Via {
    /// The listener.
    pub(crate) direction: Direction,
    /// Who is at the other end; absent for an ingress.
    pub(crate) caller: Option<ServiceName>,
    /// How that is known: `mtls`, `mtls-sidecar` (the sidecar's own leaf, of `kiro call`), `loopback`, `none`.
    pub(crate) caller_proof: &'static str,
    /// Its place at its listener, held by whatever is made of it.
    pub(crate) place: Rc<Place>,
    /// Whether it is the inside of a CONNECT tunnel.
    pub(crate) tunnelled: bool,
}

impl Via {
    /// The caller's name as log and metrics have it.
    pub(crate) fn caller(&self) -> &str {
        self.caller.as_ref().map_or("ingress", ServiceName::as_str)
    }

    /// The address of a client of whom nothing else is known.
    pub(crate) fn stranger(&self) -> Option<SocketAddr> {
        (self.direction == Direction::Ingress).then_some(self.place.remote)
    }
}

/// Whom a request is for.
#[derive(Debug)]
pub(crate) enum Callee {
    /// The application beside this sidecar.
    Own,
    /// A peer, by its place in [`crate::state::State::peers`].
    Peer(usize),
    /// Something that is no service of the mesh.
    Unknown(Box<str>),
}

/// How far a body has come; shared between whoever moves it and the exchange.
#[derive(Debug)]
pub(crate) struct Progress {
    /// Bytes moved.
    pub(crate) bytes: Cell<u64>,
    /// When the last of them moved.
    pub(crate) last: Cell<Instant>,
}

impl Progress {
    /// A body that has not moved yet.
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self { bytes: Cell::new(0), last: Cell::new(Instant::now()) })
    }

    /// Notes that `bytes` have moved.
    pub(crate) fn moved(&self, bytes: usize) {
        self.bytes.set(self.bytes.get().saturating_add(bytes as u64));
        self.last.set(Instant::now());
    }
}

/// One request's record.
pub(crate) struct Exchange {
    worker: Rc<Worker>,
    state: Snapshot,
    via: Rc<Via>,
    started: Instant,
    time: SystemTime,
    /// When the attempt that is under way began, since each is a span.
    attempt_started: (Instant, SystemTime),
    method: Method,
    target: Option<PathAndQuery>,
    version: Version,
    callee: Callee,
    status: Option<StatusCode>,
    reject: Option<&'static str>,
    cause: Cow<'static, str>,
    signature: &'static str,
    policy: &'static str,
    denial: Option<Denial>,
    request_body: Option<Rc<Progress>>,
    read_whole: bool,
    bytes_out: u64,
    upstream: Option<SocketAddr>,
    attempts: u32,
    /// Why the last attempt, which failed, was the last.
    gave_up: Option<&'static str>,
    /// What went wrong on purpose.
    fault: Option<&'static str>,
    /// The place of the service that was asked for, of which a version is called.
    split: Option<usize>,
    /// Where this is a copy: the place of the service that got the original.
    copy_of: Option<usize>,
    trace: TraceContext,
    websocket: bool,
    grpc: bool,
    /// When whoever asked gives up; absent where nobody ever does.
    deadline: Option<Deadline>,
    /// Whether that is sooner than the mesh file says, by the word of whoever asked.
    hurried: bool,
    /// The same, by a call's own `grpc-timeout`.
    impatient: bool,
    /// What the limits of its edge say of it.
    rates: Option<Box<Told>>,
    /// Its place among what the application has under way.
    entry: Option<Box<Entry>>,
    /// How a tunnel or upgraded stream ended.
    ended: Option<&'static str>,
    /// The protocol, where that is not the version of HTTP that the request came by.
    protocol: Option<&'static str>,
}

impl Exchange {
    /// Begins the record of a request.
    pub(crate) fn begin(
        worker: &Rc<Worker>,
        state: &Snapshot,
        via: &Rc<Via>,
        head: &request::Parts,
        trace: TraceContext,
    ) -> Self {
        worker.begun(via.direction);
        via.place.begun();
        let (started, time) = (Instant::now(), SystemTime::now());
        Self {
            worker: Rc::clone(worker),
            state: Rc::clone(state),
            via: Rc::clone(via),
            started,
            time,
            attempt_started: (started, time),
            method: head.method.clone(),
            target: head.uri.path_and_query().cloned(),
            version: head.version,
            callee: Callee::Own,
            status: None,
            reject: None,
            cause: Cow::Borrowed(""),
            signature: "none",
            policy: "none",
            denial: None,
            request_body: None,
            read_whole: false,
            bytes_out: 0,
            upstream: None,
            attempts: 0,
            gave_up: None,
            fault: None,
            split: None,
            copy_of: None,
            trace,
            websocket: false,
            grpc: head.version == Version::HTTP_2 && headers::is_grpc(&head.headers),
            deadline: None,
            hurried: false,
            impatient: false,
            rates: None,
            entry: None,
            ended: None,
            protocol: None,
        }
    }

    /// The state of the mesh under which the request runs from head to end.
    pub(crate) fn state(&self) -> &Snapshot {
        &self.state
    }

    /// When the request's head was read: what its signature is verified against, since nothing waits in between.
    pub(crate) fn began_unix_seconds(&self) -> u64 {
        unix_seconds(self.time)
    }

    /// The worker that serves the request.
    pub(crate) fn worker(&self) -> &Rc<Worker> {
        &self.worker
    }

    /// The trace that the request is part of.
    pub(crate) fn trace(&self) -> &TraceContext {
        &self.trace
    }

    /// Notes whom the request is for.
    pub(crate) fn callee(&mut self, callee: Callee) {
        self.callee = callee;
    }

    /// Notes that the request is a WebSocket handshake, which policy and log see as GET.
    pub(crate) fn websocket(&mut self) {
        self.websocket = true;
    }

    /// Whether it is a call of gRPC, whose refusals are statuses of gRPC.
    pub(crate) fn is_grpc(&self) -> bool {
        self.grpc
    }

    /// Whether it is a call to a service that is declared to speak gRPC. What a client says of itself is not enough to lift a limit.
    pub(crate) fn is_call(&self) -> bool {
        let protocol = match &self.callee {
            Callee::Own => Some(self.state.service.app.protocol),
            Callee::Peer(index) => self.state.peer(*index).map(|peer| peer.protocol),
            Callee::Unknown(_) => None,
        };
        self.grpc && protocol == Some(Protocol::Grpc)
    }

    /// Notes what the limits of its edge say of it.
    pub(crate) fn rates(&mut self, told: Told) {
        self.rates = Some(Box::new(told));
    }

    /// Adds that to its answer.
    pub(crate) fn tell_rates(&self, headers: &mut HeaderMap) {
        if let Some(rates) = &self.rates {
            rates.tell(headers);
        }
    }

    /// Takes a place among what the application has under way.
    pub(crate) fn entered(&mut self, entry: Box<Entry>) {
        self.entry = Some(entry);
    }

    /// The application has begun to answer. Streams give their places back by that, all others when they have ended.
    pub(crate) fn app_answers(&mut self, status: StatusCode, headers: &HeaderMap) {
        let stream = self.entry.is_some() && (self.is_call() || headers::is_event_stream(headers));
        if let Some(entry) = &mut self.entry {
            entry.answered(status);
        }
        if stream {
            self.entry = None;
        }
    }

    /// The application has not answered.
    pub(crate) fn app_failed(&mut self, reject: Reject) {
        let hurried = self.is_hurried();
        if let Some(mut entry) = self.entry.take() {
            entry.failed(reject, hurried);
        }
    }

    /// It has become a stream of bytes both ways.
    pub(crate) fn app_upgraded(&mut self) {
        self.entry = None;
    }

    /// How long the request's body may stand still.
    pub(crate) fn request_pace(&self) -> Pace {
        if self.is_call() { Pace::Call } else { Pace::Request }
    }

    /// Notes the policy's word.
    pub(crate) fn policy(&mut self, verdict: Verdict) {
        (self.policy, self.denial) = match verdict {
            Verdict::Allowed => ("allowed", None),
            Verdict::Audited(denial) => ("audited", Some(denial)),
            Verdict::Denied(denial) => ("denied", Some(denial)),
        };
    }

    /// Notes what was found of the signature: `verified`, `signed`, `off`, `refused`.
    pub(crate) fn signature(&mut self, word: &'static str) {
        self.signature = word;
    }

    /// Notes where the request went.
    pub(crate) fn upstream(&mut self, address: SocketAddr) {
        self.upstream = Some(address);
    }

    /// Begins another attempt, whose span is a new one of the same trace.
    pub(crate) fn attempt(&mut self) {
        if self.attempts > 0 {
            self.span(None, Some("retried"));
            // A sibling of the attempt before: the same parent, another span.
            self.trace.span_id = self.worker.tracing.child(&self.trace).span_id;
            self.attempt_started = (Instant::now(), SystemTime::now());
        }
        self.attempts += 1;
    }

    /// Notes why there is no other attempt.
    pub(crate) fn gave_up(&mut self, reason: &'static str) {
        self.gave_up = Some(reason);
    }

    /// Notes what goes wrong with it because the mesh file asks for it.
    pub(crate) fn fault(&mut self, word: &'static str) {
        self.fault = Some(word);
    }

    /// Notes the service that was asked for, where the mesh file says which version of it is called.
    pub(crate) fn split(&mut self, of: usize) {
        self.split = Some(of);
    }

    /// Notes that this is a copy of a request to another service.
    pub(crate) fn copy_of(&mut self, original: usize) {
        self.copy_of = Some(original);
    }

    fn peer_name(&self, place: Option<usize>) -> Option<&str> {
        place.and_then(|place| self.state.peer(place)).map(|peer| peer.name.as_str())
    }

    /// Notes how far the request's body has come, as its mover sees it.
    pub(crate) fn request_body(&mut self, progress: Rc<Progress>) {
        self.request_body = Some(progress);
    }

    /// Notes a body that was read whole.
    pub(crate) fn request_bytes(&mut self, bytes: usize) {
        let progress = Progress::new();
        progress.moved(bytes);
        self.request_body = Some(progress);
        self.read_whole = true;
    }

    /// Whether the request's body was read whole before it was sent on.
    pub(crate) fn has_read_body(&self) -> bool {
        self.read_whole
    }

    /// Notes the answer's status.
    pub(crate) fn status(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    /// Notes the reject code that a peer's sidecar answered with.
    pub(crate) fn peer_reject(&mut self, code: &'static str) {
        self.reject = Some(code);
        self.cause = Cow::Borrowed("the peer's sidecar said so");
    }

    /// Notes bytes of the answer's body.
    pub(crate) fn response_bytes(&mut self, bytes: usize) {
        self.bytes_out = self.bytes_out.saturating_add(bytes as u64);
    }

    /// Notes a refusal, or what broke an answer off whose head has been sent.
    pub(crate) fn refused(&mut self, refused: &Refused) {
        self.reject = Some(refused.reject.code());
        self.cause = refused.cause.clone();
        if matches!(refused.reject, Reject::Signature(_)) {
            self.signature = "refused";
        }
        if refused.reject == Reject::HeadersTooLarge {
            self.worker.metrics.limit_hit(Limit::HeaderBytes);
        }
        if self.status.is_none() {
            self.status = Some(refused.reject.status());
        }
    }

    /// Notes how an open stream ended: `cut` where the policy no longer allowed it.
    pub(crate) fn ended(&mut self, how: &'static str) {
        if how == "cut" {
            self.cause = Cow::Borrowed("cut: the policy no longer allows it");
            self.policy = "cut";
        }
        self.ended = Some(how);
    }

    /// Notes that the application connected to a local port, without HTTP.
    pub(crate) fn without_http(&mut self) {
        self.protocol = Some("TCP");
    }

    /// Whether the request came from the application.
    pub(crate) fn is_outbound(&self) -> bool {
        self.via.direction == Direction::Outbound
    }

    /// The connection that the request came by.
    pub(crate) fn via(&self) -> &Rc<Via> {
        &self.via
    }

    fn callee_name(&self) -> &str {
        match &self.callee {
            Callee::Own => self.state.me.as_str(),
            Callee::Peer(index) => self.state.peer(*index).map_or("", |peer| peer.name.as_str()),
            Callee::Unknown(name) => name,
        }
    }

    /// The method as policy and log see it.
    pub(crate) fn method(&self) -> &str {
        if self.websocket { Method::GET.as_str() } else { self.method.as_str() }
    }

    /// A client that went away before an answer has no status; 499 is nginx's word for it.
    fn final_status(&self) -> u16 {
        self.status.map_or(499, |status| status.as_u16())
    }

    /// Hands over the span of the attempt that is under way; one that is made again got no answer.
    fn span(&self, status: Option<u16>, reject: Option<&'static str>) {
        if !self.trace.sampled {
            return;
        }
        spans::record(
            &self.worker.tracing,
            &spans::Hop {
                direction: self.via.direction,
                trace: &self.trace,
                start: self.attempt_started.1,
                duration: self.attempt_started.0.elapsed(),
                method: self.method(),
                target: self.target.as_ref(),
                version: self.version,
                status,
                reject,
                caller: self.via.caller(),
                callee: self.callee_name(),
                trust_domain: self.state.id.trust_domain.as_str(),
                upstream: self.upstream,
                resend_count: self.attempts.saturating_sub(1),
                fault: self.fault,
                split: self.peer_name(self.split),
                copy_of: self.peer_name(self.copy_of),
            },
        );
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.worker.ended(self.via.direction);
        self.via.place.ended();
        let status = self.final_status();
        if self.status.is_none() && self.reject.is_none() {
            self.cause = Cow::Borrowed("the client went away before an answer");
        }
        let duration = self.started.elapsed();
        let bytes_in = self.request_body.as_ref().map_or(0, |progress| progress.bytes.get());
        let edge = match self.callee {
            Callee::Peer(index) => {
                self.state.peer(index).map_or_else(|| self.state.unknown_callee(), |peer| &peer.metrics)
            }
            Callee::Own => self.state.incoming(&self.via),
            Callee::Unknown(_) => self.state.unknown_callee(),
        };
        let finished = Finished {
            method: self.method(),
            status,
            reject: self.reject,
            duration,
            bytes_in,
            bytes_out: self.bytes_out,
        };
        edge.request(self.worker.number, &finished);
        let record = AccessRecord {
            time: self.time,
            service: self.state.me.as_str(),
            direction: self.via.direction.as_str(),
            caller: self.via.caller(),
            caller_proof: self.via.caller_proof,
            remote: self.via.stranger(),
            callee: self.callee_name(),
            callee_proof: match (self.via.direction, self.upstream) {
                (Direction::Outbound, Some(_)) => "mtls",
                (Direction::Inbound | Direction::Ingress, Some(_)) => self.state.app_proof(),
                (_, None) => "none",
            },
            method: self.method(),
            path: self.target.as_ref().map_or("", PathAndQuery::path),
            protocol: self.protocol.unwrap_or_else(|| protocol(self.version)),
            status,
            reject: self.reject,
            reject_cause: (!self.cause.is_empty()).then_some(&*self.cause),
            signature: self.signature,
            policy: self.policy,
            policy_denial: self.denial.map(Denial::code),
            bytes_in,
            bytes_out: self.bytes_out,
            ended: self.ended,
            duration,
            upstream: self.upstream,
            attempts: self.attempts,
            gave_up: self.gave_up,
            fault: self.fault,
            split: self.peer_name(self.split),
            copy_of: self.peer_name(self.copy_of),
            trace_id: self.trace.trace_id,
            span_id: self.trace.span_id,
            sampled: self.trace.sampled,
        };
        self.worker.access_line(&record);
        self.span(Some(status), self.reject);
    }
}

/// The protocol's name by the semantic conventions, with its family.
fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2",
        _ => "HTTP/1.1",
    }
}
