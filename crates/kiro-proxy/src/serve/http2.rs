//! How is HTTP/2 spoken with clients of this sidecar?
//!
//! By the `h2` crate directly, as between sidecars: a stream that is reset in the middle is an error and no end, interim answers pass,
//! and what CONNECT opens is a stream like any other.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{Method, Request, Response, Version};
use http_body::Body;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, oneshot};
use tokio::task::spawn_local;

use super::{Front, drains_at};
use crate::body::{AnswerBody, BodyError};
use crate::client::{Client, RequestBody, StreamBody, Upgrade};
use crate::exchange::Via;
use crate::headers;
use crate::interim::Interim;
use crate::limits;
use crate::send::{Pace, Passing, break_off, send};
use crate::worker::Worker;

/// Streams of one connection that are open.
#[derive(Default)]
struct Open {
    count: Cell<usize>,
    none: Notify,
}

/// One of them.
struct Counted(Rc<Open>);

impl Counted {
    fn new(open: &Rc<Open>) -> Self {
        open.count.set(open.count.get() + 1);
        Self(Rc::clone(open))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.count.set(self.0.count.get().saturating_sub(1));
        if self.0.count.get() == 0 {
            self.0.none.notify_one();
        }
    }
}

/// Serves a connection from its preface to its end.
pub(super) async fn serve<S>(worker: Rc<Worker>, stream: S, via: Rc<Via>, front: Front)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = h2::server::Builder::new()
        .initial_window_size(limits::CLIENT_STREAM_WINDOW)
        .initial_connection_window_size(limits::CLIENT_CONNECTION_WINDOW)
        .max_concurrent_streams(limits::CLIENT_STREAMS)
        .max_header_list_size(limits::CLIENT_HEADER_LIST_BYTES)
        .max_send_buffer_size(limits::SEND_BUFFER)
        .enable_connect_protocol()
        .handshake::<_, Bytes>(stream);
    let Ok(Ok(mut h2)) = tokio::time::timeout(limits::HEAD, handshake).await else { return };
    let open = Rc::new(Open::default());
    let mut ending = std::pin::pin!(worker.phase.reached(drains_at(front)));
    let mut told = false;
    loop {
        let accepted = tokio::select! {
            accepted = h2.accept() => accepted,
            () = &mut ending, if !told => {
                told = true;
                h2.graceful_shutdown();
                continue;
            }
            () = idle(&open), if !told => {
                told = true;
                h2.graceful_shutdown();
                continue;
            }
        };
        match accepted {
            Some(Ok((request, respond))) => {
                let counted = Counted::new(&open);
                let served = stream_story(Rc::clone(&worker), Rc::clone(&via), front, request, respond);
                spawn_local(async move {
                    served.await;
                    drop(counted);
                });
            }
            Some(Err(error)) => {
                if !error.is_io() && !error.is_go_away() {
                    tracing::info!(
                        target: "kiro::serve", listener = via.direction.as_str(), remote = %via.remote, %error,
                        "HTTP/2 connection ended by an error"
                    );
                }
                return;
            }
            None => return,
        }
    }
}

/// Waits until no stream has been open for a while.
async fn idle(open: &Open) {
    loop {
        while open.count.get() > 0 {
            open.none.notified().await;
        }
        let asleep = tokio::time::sleep(limits::CLIENT_IDLE);
        tokio::pin!(asleep);
        asleep.await;
        if open.count.get() == 0 {
            return;
        }
    }
}

/// One stream, from its head to its end.
async fn stream_story(
    worker: Rc<Worker>,
    via: Rc<Via>,
    front: Front,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) {
    let is_head = request.method() == Method::HEAD;
    let respond = RefCell::new(respond);
    let (request, upgrade, opened) = taken_apart(request);
    let client = Client { upgrade, interim: Interim::to(&respond) };
    let answer = {
        let mut answered = std::pin::pin!(super::answer(worker, via, front, request, client, None));
        // A client that has gone away resets the stream; dropping the story lets everything behind it know at once.
        let ended = poll_fn(|cx| {
            if let Poll::Ready(answer) = answered.as_mut().poll(cx) {
                return Poll::Ready(Some(answer));
            }
            respond.borrow_mut().poll_reset(cx).map(|_| None)
        });
        match ended.await {
            Some(answer) => answer,
            None => return,
        }
    };
    if let Err(error) = relay(answer, &respond, opened, is_head).await {
        tracing::debug!(target: "kiro::serve", %error, "answer broke off");
    }
}

type Opened = Option<oneshot::Sender<SendStream<Bytes>>>;

/// What comes after a CONNECT is no body, but the half to read of a stream; its other half follows when it has been answered.
fn taken_apart(request: Request<RecvStream>) -> (Request<RequestBody>, Option<Upgrade>, Opened) {
    let (head, recv) = request.into_parts();
    if head.method == Method::CONNECT {
        let (opened, half) = oneshot::channel();
        let upgrade = Upgrade::Http2(recv, half);
        return (Request::from_parts(head, RequestBody::Empty), Some(upgrade), Some(opened));
    }
    (Request::from_parts(head, RequestBody::Http2(StreamBody::new(recv))), None, None)
}

async fn relay(
    answer: Response<AnswerBody>,
    respond: &RefCell<SendResponse<Bytes>>,
    opened: Opened,
    is_head: bool,
) -> Result<(), BodyError> {
    let (mut head, body) = answer.into_parts();
    head.version = Version::HTTP_2;
    head.extensions.clear();
    if let Some(opened) = opened
        && head.status.is_success()
    {
        let stream = respond.borrow_mut().send_response(Response::from_parts(head, ()), false)?;
        let _ = opened.send(stream);
        return Ok(());
    }
    let grpc = headers::is_grpc(&head.headers);
    let pace = if grpc { Pace::Call } else { Pace::Answer };
    let ends = is_head || body.is_end_stream();
    let mut stream = respond.borrow_mut().send_response(Response::from_parts(head, ()), ends)?;
    if ends {
        return Ok(());
    }
    let sent = send(body, &mut stream, &mut Passing, pace).await;
    if let Err(error) = &sent {
        break_off(&mut stream, error, grpc);
    }
    sent
}
