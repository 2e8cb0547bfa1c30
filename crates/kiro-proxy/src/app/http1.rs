//! How is HTTP/1.1 spoken with the application?
//!
//! Each worker keeps connections of its own, and one request at a time is on each. An application that asks for patience (100) or hints
//! (103) is heard where somebody waits for that.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Instant;

use http::{HeaderMap, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use kiro_core::mesh::HeaderCase;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, spawn_local};

use super::{AppStream, Broken, answer_fits, error_chain, within};
use crate::admission::{Seat, Seats};
use crate::body::AppBody;
use crate::early::EarlyAnswer;
use crate::exchange::Progress;
use crate::headers;
use crate::interim::Interim;
use crate::limits;
use crate::reject::{Refused, Reject};
use crate::send::Pace;
use crate::state::State;
use crate::trailers::Named;
use crate::worker::Worker;

type Sender = http1::SendRequest<AppBody>;

/// Idle connections of one worker to the application, the one used last on top.
pub(crate) struct AppPool(Rc<Shared>);

/// What the pool and the connections in use share.
struct Shared {
    idle: RefCell<Vec<Idle>>,
    epoch: Cell<u64>,
    seats: Arc<Seats>,
}

struct Idle {
    sender: Sender,
    driver: Driver,
    since: Instant,
}

/// A connection in use. Dropping it closes it; [`AppConnection::reuse`] gives it back.
pub(crate) struct AppConnection {
    sender: Sender,
    driver: Driver,
    pool: Rc<Shared>,
    born: u64,
    fresh: bool,
    /// Carries no other request.
    spent: bool,
}

/// The task that moves a connection's bytes; dropping this ends it. By itself the HTTP library first writes all that it holds,
/// which an application that has stopped reading never lets it.
struct Driver(Option<AbortHandle>);

impl Driver {
    /// Lets the task end by itself, which it does when the connection has become somebody else's.
    fn release(&mut self) {
        self.0 = None;
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl AppConnection {
    /// Gives the connection back: its last answer has ended.
    pub(crate) fn reuse(self) {
        let mut idle = self.pool.idle.borrow_mut();
        if !self.spent
            && self.born == self.pool.epoch.get()
            && !self.sender.is_closed()
            && idle.len() < limits::APP_IDLE_CONNECTIONS
        {
            idle.push(Idle { sender: self.sender, driver: self.driver, since: Instant::now() });
            self.pool.seats.tell();
        }
    }
}

impl AppPool {
    /// An empty pool; its connections have `seats`.
    pub(crate) fn new(seats: &Arc<Seats>) -> Self {
        Self(Rc::new(Shared { idle: RefCell::default(), epoch: Cell::new(0), seats: Arc::clone(seats) }))
    }

    /// Lets all idle connections go, and those in use after their answer: the identity has changed.
    pub(crate) fn forget_all(&self) {
        self.0.epoch.set(self.0.epoch.get() + 1);
        self.0.idle.borrow_mut().clear();
    }

    /// An idle connection, unless somebody waits for one.
    fn kept_for_nobody_else(&self) -> Option<AppConnection> {
        if self.0.seats.waiting() == 0 { self.kept() } else { None }
    }

    fn kept(&self) -> Option<AppConnection> {
        let mut idle = self.0.idle.borrow_mut();
        while let Some(candidate) = idle.pop() {
            if candidate.since.elapsed() > limits::APP_IDLE {
                // The rest was used even earlier.
                idle.clear();
                return None;
            }
            if candidate.sender.is_ready() {
                return Some(self.connection(candidate.sender, candidate.driver, false));
            }
        }
        None
    }

    fn connection(&self, sender: Sender, driver: Driver, fresh: bool) -> AppConnection {
        AppConnection {
            sender,
            driver,
            pool: Rc::clone(&self.0),
            born: self.0.epoch.get(),
            fresh,
            spent: false,
        }
    }
}

/// Lets a body go on its way once the application has asked for it (`Expect: 100-continue`), or has not in time.
#[derive(Default)]
pub(crate) struct Gate {
    open: Cell<bool>,
    waiting: RefCell<Option<Waker>>,
}

impl Gate {
    fn open(&self) {
        self.open.set(true);
        if let Some(waiting) = self.waiting.borrow_mut().take() {
            waiting.wake();
        }
    }

    /// Waits for the gate.
    pub(crate) fn poll(&self, cx: &std::task::Context<'_>) -> Poll<()> {
        if self.open.get() {
            return Poll::Ready(());
        }
        *self.waiting.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// A request on its way, and what it needs on it.
pub(super) struct Sending<'a> {
    pub(super) request: Request<AppBody>,
    pub(super) progress: Option<Rc<Progress>>,
    pub(super) broken: Broken,
    pub(super) upgrade: bool,
    pub(super) timeout: kiro_core::mesh::Timeout,
    /// How long its body may stand still.
    pub(super) pace: Pace,
    /// Where interim answers go.
    pub(super) interim: &'a Interim<'a>,
}

/// Sends a request and returns its answer with the connection that it comes on.
pub(super) async fn send(
    worker: &Rc<Worker>,
    state: &State,
    sending: Sending<'_>,
) -> Result<(Response<Incoming>, AppConnection), Refused> {
    let Sending { mut request, progress, broken, upgrade, timeout, interim, .. } = sending;
    drop_trailers(&mut request, worker);
    let mut told = listen(&mut request, interim);
    loop {
        let mut connection = match worker.app.http1.kept_for_nobody_else() {
            Some(connection) => connection,
            // Connecting is rare and its state large, which each request would carry with it.
            None => Box::pin(kept_or_connect(worker, state)).await?,
        };
        let sent = connection.sender.try_send_request(request);
        let answer = match &mut told {
            None => within(timeout, progress.as_deref(), sent).await,
            Some(told) => Box::pin(within(timeout, progress.as_deref(), told.relay(sent, interim))).await,
        };
        match answer {
            None => {
                let slow = || Refused::new(Reject::AppTimeout, "the application did not answer in time");
                return Err(broken.take().unwrap_or_else(slow));
            }
            Some(Ok(response)) if response.status() == StatusCode::SWITCHING_PROTOCOLS && !upgrade => {
                return Err(Refused::new(
                    Reject::AppReset,
                    "the application switched protocols without being asked",
                ));
            }
            Some(Ok(mut response)) => {
                let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
                if switches && !headers::switches_to_websocket(response.headers()) {
                    return Err(Refused::new(
                        Reject::AppReset,
                        "the application switched to a protocol that it was not asked for",
                    ));
                }
                headers::frame_answer(response.headers_mut())
                    .map_err(|error| Refused::new(Reject::AppReset, error))?;
                answer_fits(response.headers())?;
                // Whatever the answer to a handshake is, what follows it on this connection may not be HTTP; a body that was never asked
                // for is still to come; and after an answer of HTTP/1.0 the library would write the next request in that version, in
                // which there are no chunks.
                connection.spent = upgrade
                    || told.is_some_and(|told| !told.may_send())
                    || response.version() == Version::HTTP_10;
                // The version is this hop's (RFC 9112 2.3); the HTTP library would answer the client in an old application's.
                *response.version_mut() = Version::HTTP_11;
                if switches {
                    connection.driver.release();
                }
                headers::response(response.headers_mut(), false);
                return Ok((response, connection));
            }
            Some(Err(mut error)) => match error.take_message() {
                // A kept connection was closed before the request was written: the request is whole and goes on a new one.
                Some(unsent) if !connection.fresh => request = unsent,
                _ => {
                    let reset = || Refused::new(Reject::AppReset, error_chain(&error.into_error()));
                    return Err(broken.take().unwrap_or_else(reset));
                }
            },
        }
    }
}

/// A body that streams may end with more trailers than HTTP/1.1 carries.
fn drop_trailers(request: &mut Request<AppBody>, worker: &Worker) {
    if matches!(request.body(), AppBody::Empty | AppBody::Full(_)) {
        return;
    }
    let named = Named::by(request.headers());
    let body = std::mem::replace(request.body_mut(), AppBody::Empty);
    *request.body_mut() = AppBody::Http1(Box::new(body), named, Arc::clone(&worker.metrics));
}

/// What an application says before its answer.
struct Told {
    /// hyper calls back from its own task, whose types ask for a channel that could cross threads.
    interim: mpsc::Receiver<(StatusCode, HeaderMap)>,
    gate: Option<Rc<Gate>>,
}

/// Asks to be told of interim answers, where somebody waits for them: for leave to send a body, or to pass them on.
fn listen(request: &mut Request<AppBody>, interim: &Interim<'_>) -> Option<Told> {
    let expects = headers::expects_continue(request.headers()) && !matches!(request.body(), AppBody::Empty);
    if !expects && !interim.is_wanted() {
        return None;
    }
    let (tell, told) = mpsc::channel(limits::INTERIM_ANSWERS);
    hyper::ext::on_informational(request, move |answer| {
        // What finds no room is dropped, as interim answers may be.
        let _ = tell.try_send((answer.status(), answer.headers().clone()));
    });
    let gate = expects.then(Rc::<Gate>::default);
    if let Some(gate) = &gate {
        let body = std::mem::replace(request.body_mut(), AppBody::Empty);
        *request.body_mut() = AppBody::Gated(Box::new(body), Rc::clone(gate));
    }
    Some(Told { interim: told, gate })
}

impl Told {
    fn may_send(&self) -> bool {
        self.gate.as_ref().is_none_or(|gate| gate.open.get())
    }

    /// Waits for the answer, and meanwhile passes on what comes before it.
    async fn relay<F: Future>(&mut self, answer: F, interim: &Interim<'_>) -> F::Output {
        let mut answer = std::pin::pin!(answer);
        let mut patience = std::pin::pin!(tokio::time::sleep(limits::CONTINUE));
        loop {
            let may_send = self.may_send();
            tokio::select! {
                biased;
                told = self.interim.recv() => match told {
                    Some((status, headers)) => {
                        if status == StatusCode::CONTINUE && let Some(gate) = &self.gate {
                            gate.open();
                        }
                        interim.pass(status, headers);
                    }
                    None => return answer.await,
                },
                answer = &mut answer => return answer,
                // Not every application knows of the expectation, so nobody waits for its word for ever (RFC 9110 10.1.1).
                () = &mut patience, if !may_send => {
                    if let Some(gate) = &self.gate {
                        gate.open();
                    }
                }
            }
        }
    }
}

/// Takes over a connection after its 101.
pub(super) async fn upgraded(response: &mut Response<Incoming>) -> Result<AppStream, Refused> {
    let io = hyper::upgrade::on(response)
        .await
        .map_err(|error| Refused::new(Reject::AppReset, error_chain(&error)))?;
    Ok(AppStream::Upgraded(Box::new(TokioIo::new(io))))
}

/// What a request goes on.
enum Way {
    Kept(AppConnection),
    New(Seat),
}

/// A connection that another request has left, or a new one, as soon as there may be one.
async fn kept_or_connect(worker: &Rc<Worker>, state: &State) -> Result<AppConnection, Refused> {
    let app = &worker.app;
    let find = || app.http1.kept().map(Way::Kept).or_else(|| app.seats.take().map(Way::New));
    match app.within_bound(&worker.metrics, find).await? {
        Way::Kept(connection) => Ok(connection),
        Way::New(seat) => connect(worker, state, seat).await,
    }
}

async fn connect(worker: &Rc<Worker>, state: &State, seat: Seat) -> Result<AppConnection, Refused> {
    let (stream, open) = super::dial(worker, state, seat).await?;
    let ends = super::ends(&stream);
    let case = state.service.app.header_case;
    let (sender, driver) = match super::tls(worker, state, EarlyAnswer::new(stream, open), ends).await? {
        super::Wire::Plain(stream) => handshake(stream, case).await?,
        super::Wire::Tls(stream) => handshake(*stream, case).await?,
    };
    Ok(worker.app.http1.connection(sender, driver, true))
}

async fn handshake<S>(stream: S, case: HeaderCase) -> Result<(Sender, Driver), Refused>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .max_header_size(limits::HEADER_BYTES)
        .max_headers(limits::HEADER_FIELDS)
        .title_case_headers(case == HeaderCase::Title)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| Refused::new(Reject::AppReset, error_chain(&error)))?;
    let driver = spawn_local(async move {
        // What goes wrong is seen by the request that is under way; an idle connection that ends is nobody's concern.
        let _ = connection.with_upgrades().await;
    });
    Ok((sender, Driver(Some(driver.abort_handle()))))
}
