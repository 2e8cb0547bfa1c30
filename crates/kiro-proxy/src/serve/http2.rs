//! How is HTTP/2 spoken with clients of this sidecar?
//!
//! By the `h2` crate directly, as between sidecars: a stream that is reset in the middle is an error and no end, interim answers pass,
//! and what CONNECT opens is a stream like any other.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::Instant;

use super::{Front, drains_at};
use crate::abuse::{self, Reason};
use crate::admission::Place;
use crate::body::{AnswerBody, BodyError};
use crate::client::{Client, RequestBody, StreamBody, Upgrade};
use crate::exchange::Via;
use crate::frames::{FrameTap, Seen};
use crate::headers;
use crate::interim::Interim;
use crate::limits;
use crate::send::{Pace, Passing, break_off, send};
use crate::worker::Worker;

/// Serves a connection from its preface to its end.
pub(super) async fn serve<S>(worker: Rc<Worker>, stream: S, via: Rc<Via>, front: Front)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (stream, seen) = FrameTap::new(stream, &limits::CLIENT_FRAMES, &worker.half_heads);
    let handshake = h2::server::Builder::new()
        .initial_window_size(limits::CLIENT_STREAM_WINDOW)
        .initial_connection_window_size(limits::CLIENT_CONNECTION_WINDOW)
        .max_concurrent_streams(limits::CLIENT_STREAMS)
        .max_header_list_size(limits::CLIENT_HEADER_LIST_BYTES)
        .max_send_buffer_size(limits::CLIENT_SEND_BUFFER)
        .max_pending_accept_reset_streams(limits::CLIENT_PENDING_RESETS)
        .max_local_error_reset_streams(Some(limits::CLIENT_STREAM_ERRORS))
        .max_concurrent_reset_streams(limits::REMEMBERED_RESETS)
        .enable_connect_protocol()
        .handshake::<_, Bytes>(stream);
    let mut h2 = match tokio::time::timeout(limits::HEAD, handshake).await {
        Ok(Ok(h2)) => h2,
        Ok(Err(error)) if error.is_io() => return,
        Ok(Err(_)) => return abuse::report(&worker, &via, Reason::Protocol),
        Err(_) => return abuse::report(&worker, &via, Reason::PrefaceTimeout),
    };
    let _in_order = worker.in_order(drains_at(front));
    let mut ending = std::pin::pin!(worker.phase.reached(drains_at(front)));
    let mut overdue = std::pin::pin!(preface_overdue(&seen));
    let mut unread = std::pin::pin!(via.place.not_read());
    let mut idle = std::pin::pin!(idle_for_too_long(&via.place));
    // None while it goes on; then, where it has one, the time by which it has to be over.
    let mut told: Option<Option<Instant>> = None;
    loop {
        let accepted = tokio::select! {
            accepted = abuse::next_request(&worker, &via, &mut h2, &seen) => accepted,
            () = &mut overdue => return abuse::report(&worker, &via, Reason::PrefaceTimeout),
            () = &mut unread => return abuse::report(&worker, &via, Reason::SlowReader),
            () = &mut ending, if told.is_none() => {
                told = Some(None);
                h2.graceful_shutdown();
                continue;
            }
            () = &mut idle, if told.is_none() => {
                told = Some(Some(Instant::now() + limits::GOODBYE));
                h2.graceful_shutdown();
                continue;
            }
            () = until(told), if told.is_some() => return,
        };
        match accepted {
            Some(Ok((request, respond))) => {
                spawn_local(stream_story(Rc::clone(&worker), Rc::clone(&via), front, request, respond));
            }
            Some(Err(_)) | None if let Some(reason) = seen.reason() => {
                return abuse::report(&worker, &via, reason);
            }
            Some(Err(error)) => {
                if !error.is_io() && !error.is_go_away() {
                    tracing::info!(
                        target: "kiro::serve", listener = via.direction.as_str(), remote = %via.place.remote, %error,
                        "HTTP/2 connection ended by an error"
                    );
                }
                return;
            }
            None => return,
        }
    }
}

/// Returns when the time is over, where there is one.
async fn until(told: Option<Option<Instant>>) {
    match told.flatten() {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

/// Returns when a client has not got through its preface in time.
async fn preface_overdue(seen: &Seen) {
    tokio::time::sleep(limits::HEAD).await;
    if seen.settings() {
        std::future::pending::<()>().await;
    }
}

/// Returns when a connection has carried no request for too long.
async fn idle_for_too_long(place: &Place) {
    loop {
        let idle = place.idle_for().unwrap_or_default();
        let Some(left) = limits::CLIENT_IDLE.checked_sub(idle).filter(|left| !left.is_zero()) else { return };
        tokio::time::sleep(left).await;
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
    let (mut head, mut body) = answer.into_parts();
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
    let pace = if grpc && body.is_call() { Pace::Call } else { Pace::Answer };
    // As in HTTP/1, whatever an application sends with them (RFC 9110 6.4.1).
    let no_content = matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let ends = is_head || no_content || body.is_end_stream();
    let mut stream = respond.borrow_mut().send_response(Response::from_parts(head, ()), ends)?;
    if ends {
        return Ok(());
    }
    let passing = &mut Passing { trailers_bytes: None };
    let sent = send(&mut body, &mut stream, passing, pace).await;
    if let Err(error) = &sent {
        if matches!(error, BodyError::Idle) {
            body.not_read();
        }
        break_off(&mut stream, error, grpc);
    }
    sent
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::task::LocalSet;

    use super::*;
    use crate::exchange::Direction;
    use crate::trial::{PREFACE, Trial, has_frame, say};

    const GOAWAY: u8 = 7;

    /// Serves a client that says this and no more. After how long it was cut off, whether it was told before, and why it was.
    async fn cut(said: &[u8]) -> (Duration, bool, u64) {
        let trial = Trial::new();
        let (client, server) = tokio::io::duplex(64 * 1024);
        let via = trial.via(Direction::Outbound).await;
        let begin = Instant::now();
        let served = serve(Rc::clone(&trial.worker), server, via, Front::Outbound);
        let both = async { tokio::join!(served, say(client, said)) };
        let limit = limits::CLIENT_IDLE * 3;
        let ((), read) = tokio::time::timeout(limit, LocalSet::new().run_until(both)).await.expect("cut");
        (begin.elapsed(), has_frame(&read, GOAWAY), trial.abused("outbound", "preface_timeout"))
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_get_through_its_preface_is_cut() {
        for said in [&PREFACE[..1], &PREFACE[..23], &PREFACE[..24], &PREFACE[..30]] {
            let (after, _, abused) = cut(said).await;
            assert_eq!((after.as_secs(), abused), (limits::HEAD.as_secs(), 1), "{} bytes", said.len());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_asks_nothing_is_told_and_then_cut() {
        let (after, told, abused) = cut(PREFACE).await;
        assert_eq!(after.as_secs(), (limits::CLIENT_IDLE + limits::GOODBYE).as_secs());
        assert!(told, "a GOAWAY comes first");
        assert_eq!(abused, 0, "which is no abuse");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_nothing_of_its_answers_is_cut() {
        let trial = Trial::new();
        let (client, server) = tokio::io::duplex(64 * 1024);
        let (via, begin) = (trial.via(Direction::Outbound).await, Instant::now());
        let place = Rc::clone(&via.place);
        let served = serve(Rc::clone(&trial.worker), server, via, Front::Outbound);
        // An answer is there, and stays there; its own sender is not what is looked at here.
        place.begun();
        place.owes(true);
        let both = async { tokio::join!(served, say(client, PREFACE)) };
        let limit = limits::BODY_IDLE * 3;
        tokio::time::timeout(limit, LocalSet::new().run_until(both)).await.expect("cut");
        assert_eq!(begin.elapsed().as_secs(), limits::BODY_IDLE.as_secs());
        assert_eq!(trial.abused("outbound", "slow_reader"), 1);
    }
}
