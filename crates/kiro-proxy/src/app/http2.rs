//! How is HTTP/2 spoken with the application?
//!
//! On few connections with many streams: another one is opened where those that are open have no room.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::{Request, Response};
use http_body::Body;
use kiro_core::mesh::Timeout;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, spawn_local};

use super::http1::Sending;
use super::{Broken, Wire, address, answer_fits, within};
use crate::abuse::Callee;
use crate::admission::Limit;
use crate::body::{AppBody, BodyError};
use crate::exchange::Progress;
use crate::headers;
use crate::interim::{Answering, Interim};
use crate::limits;
use crate::reject::{Refused, Reject};
use crate::send::{Pace, Passing, send as send_body};
use crate::state::State;
use crate::upstream::connect::{self, Http2, Refusal};
use crate::upstream::pool::{Slot, Upstream, Waiting};
use crate::worker::Worker;

/// Connections of one worker to an application that speaks HTTP/2.
pub(crate) struct AppConnections {
    open: RefCell<Vec<Rc<Upstream>>>,
    /// One at a time, so that a crowd does not open one each.
    opening: RefCell<Option<Rc<Opening>>>,
    /// A stream has ended, or a connection has.
    freed: Rc<Notify>,
    waiting: Cell<usize>,
}

/// A connection that is being opened, for all who wait at that moment. It is a task of its own, so that one who goes away takes
/// nobody else's connection with him.
struct Opening {
    outcome: OnceCell<Result<(), Refused>>,
    done: Notify,
}

impl Opening {
    async fn outcome(&self) -> Result<(), Refused> {
        loop {
            let done = self.done.notified();
            match self.outcome.get() {
                Some(Ok(())) => return Ok(()),
                Some(Err(refused)) => return Err(Refused::new(refused.reject, refused.cause.clone())),
                None => done.await,
            }
        }
    }
}

impl AppConnections {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self {
            open: RefCell::default(),
            opening: RefCell::default(),
            freed: Rc::default(),
            waiting: Cell::new(0),
        }
    }

    /// Lets all connections go; each ends when its last stream has.
    pub(crate) fn forget_all(&self) {
        self.open.borrow_mut().clear();
        self.freed.notify_waiters();
    }

    fn forget(&self, ended: &Rc<Upstream>) {
        self.open.borrow_mut().retain(|upstream| !Rc::ptr_eq(upstream, ended));
        // There is room for another connection.
        self.freed.notify_waiters();
    }

    fn with_room(&self) -> Option<Slot> {
        self.open.borrow().iter().find_map(Upstream::slot_now)
    }

    /// A place for a stream on any of the connections, as soon as there is one. Where none can be opened, all who wait learn it at once.
    async fn slot(&self, worker: &Rc<Worker>) -> Result<Slot, Refused> {
        if let Some(slot) = self.with_room() {
            return Ok(slot);
        }
        if self.waiting.get() >= limits::STREAM_WAITERS {
            worker.metrics.limit_hit(Limit::StreamWaiters);
            let cause = format!("{} wait for a stream to the application", self.waiting.get());
            return Err(Refused::new(Reject::QueueFull, cause));
        }
        let _waiting = Waiting::new(&self.waiting);
        loop {
            let freed = self.freed.notified();
            if let Some(slot) = self.with_room() {
                return Ok(slot);
            }
            match self.opening(worker) {
                Some(opening) => tokio::select! {
                    outcome = opening.outcome() => outcome?,
                    () = freed => {}
                },
                None => freed.await,
            }
        }
    }

    /// The opening of another connection, begun where none is under way; none where there are as many as there may be.
    fn opening(&self, worker: &Rc<Worker>) -> Option<Rc<Opening>> {
        let mut current = self.opening.borrow_mut();
        if current.is_none() && self.open.borrow().len() < limits::APP_H2_CONNECTIONS {
            let opening = Rc::new(Opening { outcome: OnceCell::new(), done: Notify::new() });
            spawn_local(open_for_all(Rc::clone(worker), Rc::clone(&opening)));
            *current = Some(opening);
        }
        current.clone()
    }
}

/// Opens a connection under the state of this moment and tells all who wait for it what came of that.
async fn open_for_all(worker: Rc<Worker>, opening: Rc<Opening>) {
    let opened = open(&worker, &worker.snapshot()).await;
    let connections = &worker.app.http2;
    *connections.opening.borrow_mut() = None;
    let outcome = opened.map(|upstream| connections.open.borrow_mut().push(upstream));
    let _ = opening.outcome.set(outcome);
    opening.done.notify_waiters();
}

/// Opens a connection. Until its SETTINGS have come nobody knows how many streams an application takes, and those above that it
/// refuses.
async fn open(worker: &Rc<Worker>, state: &State) -> Result<Rc<Upstream>, Refused> {
    let (stream, open) = super::tcp(worker, state).await?;
    let (address, ends) = (address(worker, state), super::ends(&stream));
    let freed = Rc::clone(&worker.app.http2.freed);
    let callee = Callee { service: state.me.clone(), id: None, address };
    let parts = Http2 { callee, signer: None, refusal: Refusal::default(), freed, open };
    let upstream = match super::tls(worker, state, stream, ends).await? {
        Wire::Plain(stream) => handshake(worker, stream, parts).await?,
        Wire::Tls(stream) => handshake(worker, *stream, parts).await?,
    };
    if upstream.is_settled().await {
        Ok(upstream)
    } else {
        Err(Refused::new(Reject::AppReset, format!("the application at {address} does not speak HTTP/2")))
    }
}

async fn handshake<S>(worker: &Rc<Worker>, stream: S, parts: Http2) -> Result<Rc<Upstream>, Refused>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let worker = Rc::downgrade(worker);
    let ended = move |upstream: &Rc<Upstream>| {
        if let Some(worker) = worker.upgrade() {
            worker.app.http2.forget(upstream);
        }
    };
    connect::http2(stream, parts, ended)
        .await
        .map_err(|refused| Refused { reject: Reject::AppReset, ..refused })
}

/// An answer of the application, and the stream that it comes on.
pub(super) struct Answered {
    pub(super) response: Response<RecvStream>,
    pub(super) slot: Slot,
    /// What is left of the request's body.
    pub(super) upload: Option<Upload>,
    /// The half to write of a stream that becomes bytes.
    pub(super) send: Option<SendStream<Bytes>>,
}

/// Sends a request. What the application surely did not process goes on another connection, once.
pub(super) async fn send(worker: &Rc<Worker>, sending: Sending<'_>) -> Result<Answered, Refused> {
    let Sending { request, progress, broken, upgrade, timeout, pace, interim } = sending;
    let (head, mut body) = request.into_parts();
    let (mut again, mut unsent) = (true, 0);
    loop {
        let slot = within(timeout, None, worker.app.http2.slot(worker)).await;
        let slot =
            slot.unwrap_or_else(|| Err(Refused::new(Reject::AppTimeout, "no stream with room in time")))?;
        if upgrade && !slot.upstream().takes_extended_connect() {
            let cause =
                "the application takes no extended CONNECT (RFC 8441), which WebSocket over HTTP/2 needs";
            return Err(Refused::new(Reject::AppNoUpgrade, cause));
        }
        let copy = body.whole_copy();
        let request = Request::from_parts(head.clone(), ());
        let ends = !upgrade && body.is_end_stream();
        let sent = slot.upstream().sender().send_request(request, ends);
        let answered = match sent {
            Ok((promised, stream)) => {
                let way = Way {
                    pace,
                    stream,
                    upgrade,
                    ends,
                    broken: &broken,
                    timeout,
                    progress: progress.as_deref(),
                };
                let mut answering = Answering::new(promised);
                if !ends
                    && headers::expects_continue(&head.headers)
                    && let Some(early) = answering.leave_to_send(interim).await
                {
                    early.map(|response| (response, None, None))
                } else {
                    way.on(body, answering, interim).await?
                }
            }
            // The connection takes no streams any more. Nothing of the request was sent, so it is no attempt.
            Err(error) if (error.is_go_away() || error.is_io()) && unsent < limits::APP_H2_CONNECTIONS => {
                worker.app.http2.forget(slot.upstream());
                unsent += 1;
                continue;
            }
            Err(error) => Err(error),
        };
        match answered {
            Ok((response, upload, send)) => {
                let (mut head, recv) = response.into_parts();
                answer_fits(&head.headers)?;
                headers::response(&mut head.headers, false);
                return Ok(Answered { response: Response::from_parts(head, recv), slot, upload, send });
            }
            Err(error) => {
                if error.is_go_away() {
                    worker.app.http2.forget(slot.upstream());
                }
                let Some(whole) = copy.filter(|_| again && was_not_processed(&error)) else {
                    return Err(failed(&error, &broken));
                };
                (body, again) = (whole, false);
            }
        }
    }
}

/// A request whose head is on its way.
struct Way<'a> {
    stream: SendStream<Bytes>,
    pace: Pace,
    upgrade: bool,
    ends: bool,
    broken: &'a Broken,
    timeout: Timeout,
    progress: Option<&'a Progress>,
}

type Settled = Result<(Response<RecvStream>, Option<Upload>, Option<SendStream<Bytes>>), h2::Error>;

impl Way<'_> {
    /// Lets the body follow and waits for the answer.
    async fn on(
        self,
        body: AppBody,
        answering: Answering,
        interim: &Interim<'_>,
    ) -> Result<Settled, Refused> {
        let (send, upload) = match (self.upgrade, self.ends) {
            (true, _) => (Some(self.stream), None),
            (false, true) => (None, None),
            (false, false) => (None, Some(Upload::new(body, self.stream, self.pace, Rc::clone(self.broken)))),
        };
        match within(self.timeout, self.progress, answering.answer(interim)).await {
            Some(answer) => Ok(answer.map(|response| (response, upload, send))),
            None => {
                let slow = || Refused::new(Reject::AppTimeout, "the application did not answer in time");
                Err(self.broken.take().unwrap_or_else(slow))
            }
        }
    }
}

/// h2 fails with a GOAWAY exactly the streams above the last processed id, and refused streams were not looked at (RFC 9113 8.7).
fn was_not_processed(error: &h2::Error) -> bool {
    // A GOAWAY for an error may be one for this very request.
    let ends_in_order = error.is_go_away() && error.reason() == Some(Reason::NO_ERROR);
    error.is_remote() && (ends_in_order || error.reason() == Some(Reason::REFUSED_STREAM))
}

fn failed(error: &h2::Error, broken: &Broken) -> Refused {
    broken.take().unwrap_or_else(|| Refused::new(Reject::AppReset, error.to_string()))
}

/// A body on its way to the application. It ends, at the latest, with its answer: dropping this ends it.
pub(crate) struct Upload(AbortHandle);

impl Upload {
    fn new(body: AppBody, mut stream: SendStream<Bytes>, pace: Pace, broken: Broken) -> Self {
        let task = spawn_local(async move {
            let mut passing = Passing { trailers_bytes: Some(limits::APP_H2_HEADER_BYTES) };
            if let Err(error) = send_body(body, &mut stream, &mut passing, pace).await {
                if matches!(error, BodyError::TooLarge) {
                    broken.replace(Some(error.by_sender()));
                }
                // The application must not take what it has for the whole.
                stream.send_reset(Reason::CANCEL);
            }
        });
        Self(task.abort_handle())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.abort();
    }
}
